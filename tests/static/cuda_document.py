"""The tables of docs/design that say what the CUDA kernels are and cost: made, never written.

    python -m tests.static.cuda_document     writes them anew

A table stands between two lines `<!-- made: TABLE -->` and `<!-- end -->`, where TABLE is
`resources NAME` for the kernels of csrc/cuda/NAME.cu, or `costs` for the reference problem, from
the counters of the emulation and the machine code.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from seqkernels.testing import EncoderCase
from tests.backends.cuda_emulation import emulated_cuda
from tests.static.cuda_objects import (
    ARCHITECTURES,
    REFERENCE,
    REFERENCE_WARPS,
    executed,
    nvcc_release,
    opcodes,
    usage,
)
from tests.static.project import ROOT
from tests.static.sass import count, share_of_moves

DOCUMENTS = sorted((ROOT / "docs" / "design").glob("*.md"))
_MADE = re.compile(r"(<!-- made: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


class Chip(NamedTuple):
    """A GPU: data sheets, and per multiprocessor and cycle what its units do."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    terabytes: float  # a second, of main memory
    products: int  # multiply-adds by mma.sync in bf16
    warps: int  # that a multiprocessor holds
    shared: int  # KB of a multiprocessor


CHIPS = (
    Chip("A100", "sm_80", 108, 1.41, 2.0, 1024, 64, 164),
    Chip("L4", "sm_89", 58, 2.04, 0.3, 512, 48, 100),
    Chip("H100", "sm_90", 132, 1.755, 3.35, 1300, 64, 228),
    Chip("B200", "sm_100", 148, 1.85, 8.0, 1300, 64, 228),
)
_ISSUED, _L1_BYTES, _EXPONENTIALS = 4, 128, 16  # a cycle, the same on all of them
_REGISTERS = 64 * 1024  # of a multiprocessor
_WARPS_BILLED = 4  # registers go to warps by fours
_RESERVED = 1024  # bytes of shared memory that the system takes of each block

_LENGTH, _D_MODEL, _HIDDEN, _LAYERS = 100, 96, 32, 2
# What the shape needs in products of 16 x 8 x 16, of one strip of 16 tokens and one layer: Q, K and
# V; scores and P V of a head with 7 key tiles; out-projection; feed-forward part.
_NEEDED = 36 * 6 + 2 * (14 * 3 + 7 * 6) + 12 * 6 + 4 * 6 + 12 * 2
PRODUCTS_NEEDED = _NEEDED * REFERENCE_WARPS * _LAYERS
_PRODUCT = 16 * 8 * 16  # multiply-adds


@functools.cache
def reference_launches() -> tuple[dict[str, int], dict[str, int]]:
    """Sizes and counters of the reference problem, one and two sequences, on the emulation."""
    found = []
    for batch in (1, 2):
        case = EncoderCase(length=_LENGTH, batch=batch, mask="none", dtype=torch.bfloat16)
        with emulated_cuda() as module:
            case.problem().run("cuda")
            found.append(dict(module.last_launch()))
    return found[0], found[1]


def of_a_sequence(counter: str) -> int:
    """What one more sequence adds: weights come from main memory once."""
    one, two = reference_launches()
    return two[counter] - one[counter]


def products(m16n8k16: int, m16n8k8: int) -> float:
    """Work on tensor cores in products of 16 x 8 x 16."""
    return m16n8k16 + m16n8k8 / 2


def made(document: str) -> str:
    """The document with its tables as they should be."""
    return _MADE.sub(lambda m: m[1] + "\n".join(_lines(m[2])) + "\n" + m[4], document)


def tables() -> dict[str, Path]:
    """Every table and where it stands."""
    return {m[2]: path for path in DOCUMENTS for m in _MADE.finditer(path.read_text())}


def documented_release() -> str:
    """The nvcc of the tables."""
    return re.findall(r"`nvcc` (\d+\.\d+)", "".join(path.read_text() for path in DOCUMENTS))[0]


def _lines(table: str) -> list[str]:
    kind, *arguments = table.split()
    return list({"resources": _resources, "costs": _costs}[kind](*arguments))


def _resources(name: str) -> Iterator[str]:
    used = {arch: usage(name, arch) for arch in ARCHITECTURES}
    kernels = list(used[ARCHITECTURES[0]])
    spilled = {k: u for of in used.values() for k, u in of.items() if u.stack or u.local}
    yield f"`nvcc` {nvcc_release()}. Spills and local memory: {', '.join(spilled) or 'none'}."
    yield ""
    yield from _row("registers", *ARCHITECTURES, "`mma` in the code", "moves at most")
    yield from _rule(len(ARCHITECTURES) + 3)
    for kernel in sorted(kernels, key=_natural):
        codes = [opcodes(name, arch)[kernel] for arch in ARCHITECTURES]
        multiplying = sorted({count(code, "HMMA") for code in codes})
        yield from _row(
            f"`{kernel}`",
            *(used[arch][kernel].registers for arch in ARCHITECTURES),
            " to ".join(str(n) for n in (multiplying[0], *multiplying[1:][-1:])),
            f"{max(share_of_moves(code) for code in codes):.1%}",
        )


def _costs() -> Iterator[str]:
    launch = reference_launches()[0]
    k16, k8 = of_a_sequence("mma_m16n8k16"), of_a_sequence("mma_m16n8k8")
    work = products(k16, k8)
    exponentials = of_a_sequence("exp2")
    wavefronts = of_a_sequence("shared_wavefronts")
    through_l1 = 32 * (of_a_sequence("global_load_sectors") + of_a_sequence("global_store_sectors"))
    memory = of_a_sequence("dram_load_bytes") + of_a_sequence("dram_store_bytes")
    weights = launch["dram_load_bytes"] + launch["dram_store_bytes"] - memory
    yield from _row("a sequence", "")
    yield from _rule(2)
    ratio = work / PRODUCTS_NEEDED
    yield from _row(
        "products, in m16n8k16",
        f"{work:,.0f}: {ratio:.3f} of the {PRODUCTS_NEEDED:,} that the shape needs",
    )
    yield from _row("exponentials", f"{exponentials:,}")
    yield from _row(
        "passes through shared memory",
        f"{wavefronts:,}, of them for bank conflicts {of_a_sequence('shared_conflicts')}",
    )
    yield from _row("bytes through L1: weights once a warp, rows", f"{through_l1:,}")
    yield from _row("bytes of main memory", f"{memory:,}, and weights once: {weights:,}")
    yield from _row("shared memory of a block", f"{launch['shared_bytes']:,} bytes")
    yield ""
    yield "Cycles of a multiprocessor, and the time of a sequence if all are busy with nothing but"
    yield "the limiting unit:"
    yield ""
    yield from _row("unit", *(chip.name for chip in CHIPS))
    yield from _rule(len(CHIPS) + 1)
    columns = [
        _chip_column(chip, work, exponentials, wavefronts + through_l1 // _L1_BYTES, memory, launch)
        for chip in CHIPS
    ]
    for what in columns[0]:
        yield from _row(what, *(column[what] for column in columns))


def _chip_column(
    chip: Chip, work: float, exponentials: int, l1_lines: int, memory: int, launch: dict[str, int]
) -> dict[str, str]:
    instructions = executed(chip.arch).total() * REFERENCE_WARPS
    cycles = {
        "products": work * _PRODUCT / chip.products,
        "L1 and shared memory": l1_lines,
        "issue": instructions / _ISSUED,
        "exponentials": exponentials / _EXPONENTIALS,
    }
    limiting = max(cycles, key=lambda unit: cycles[unit])
    registers = usage("encoder", chip.arch)[REFERENCE].registers
    billed = -(-REFERENCE_WARPS // _WARPS_BILLED) * _WARPS_BILLED
    blocks = {
        "registers": _REGISTERS // (registers * 32 * billed),
        "shared memory": chip.shared * 1024 // (launch["shared_bytes"] + _RESERVED),
        "warps": chip.warps // REFERENCE_WARPS,
    }
    fewest = min(blocks, key=lambda unit: blocks[unit])
    # Bytes over bytes a nanosecond and chip.
    unfused = _LAYERS * _unfused_bytes() / (chip.terabytes * 1e3)
    return {
        "multiply-adds a cycle by `mma.sync`": f"{chip.products:,}",
        "instructions of warps": f"{instructions:,}",
        "products, cycles": f"{cycles['products']:,.0f}",
        "L1 and shared memory, 128 bytes a cycle": f"{cycles['L1 and shared memory']:,.0f}",
        "issue, 4 a cycle": f"{cycles['issue']:,.0f}",
        "exponentials, 16 a cycle": f"{cycles['exponentials']:,.0f}",
        "limiting unit": limiting,
        "multiprocessors x GHz": f"{chip.multiprocessors} x {chip.gigahertz}",
        "ns, limiting unit": f"{cycles[limiting] / (chip.multiprocessors * chip.gigahertz):.0f}",
        "TB/s": f"{chip.terabytes}",
        "ns, main memory": f"{memory / (chip.terabytes * 1e3):.0f}",
        "blocks a multiprocessor, limited by": f"{blocks[fewest]}, {fewest}",
        "warps a multiprocessor": f"{blocks[fewest] * REFERENCE_WARPS} of {chip.warps}",
        "**unfused bf16, ns, main memory alone**": f"**{unfused:,.0f}**",
    }


def _unfused_bytes() -> float:
    """The least that one kernel a step moves in a layer, with attention fused."""
    row = _LENGTH * _D_MODEL * 2
    steps = {  # rows in and out
        "QKV": 1 + 3,
        "attention": 3 + 1,
        "out-projection": 1 + 1,
        "sums with norms": 2 * (2 + 1),
        "feed-forward products": 1 + 1,
        "hidden layer, out, activated, in": 4 * _HIDDEN / _D_MODEL,
    }
    return row * sum(steps.values())


def _row(*cells: object) -> Iterator[str]:
    yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def _rule(columns: int) -> Iterator[str]:
    yield "|" + " --- |" * columns


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(made(path.read_text()))
