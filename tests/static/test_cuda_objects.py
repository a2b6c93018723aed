"""What ptxas made of the CUDA kernels for each architecture: registers, memory, instructions."""

from __future__ import annotations

import functools
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from seqkernels.backends import cpu
from seqkernels.backends.cuda import not_built_reason
from tests.static.native_build import native_objects, run_tool

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SOURCES = ("encoder", "request_scoring", "split_encoder", "resilient_batch_norm")
TRANSACT = "EncoderClassILi96ELi48ELi2E"  # the instance of the reference problem, as mangled

pytestmark = pytest.mark.skipif(
    not hasattr(cpu.native(), "cuda"),
    reason="" if hasattr(cpu.native(), "cuda") else not_built_reason(),
)


class Usage(NamedTuple):
    registers: int
    stack: int
    local: int
    shared: int


def cuobjdump(*arguments: str | Path) -> str:
    """Of NVIDIA's package, which brings nvdisasm along."""
    folders = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    assert folders, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return run_tool("env", f"PATH={folders[-1]}:/usr/bin:/bin", "cuobjdump", *arguments)


@functools.cache
def usage(op: str) -> dict[str, dict[str, Usage]]:
    """Architecture -> kernel -> what it takes."""
    text = cuobjdump("--dump-resource-usage", native_objects()[f"cuda/{op}.cu"])
    found: dict[str, dict[str, Usage]] = {}
    for section in text.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (sm_\w+)", section)
        assert arch is not None
        kernels = re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", section
        )
        found[arch[1]] = {
            name: Usage(int(reg), int(stack), int(local), int(shared))
            for name, reg, stack, shared, local in kernels
        }
    return found


@functools.cache
def instructions(op: str, arch: str) -> dict[str, Counter[str]]:
    """Kernel -> how often each instruction, without what follows its first dot, stands in it."""
    text = cuobjdump("-sass", "-arch", arch, native_objects()[f"cuda/{op}.cu"])
    found = {}
    for section in text.split("Function : ")[1:]:
        name = section.split(maxsplit=1)[0]
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", section)
        found[name] = Counter(opcodes)
    return found


@pytest.mark.parametrize("op", SOURCES)
def test_every_architecture_has_every_kernel(op: str) -> None:
    found = usage(op)
    assert set(ARCHITECTURES) <= set(found)
    assert len({frozenset(kernels) for kernels in found.values()}) == 1
    assert all(found.values())


@pytest.mark.parametrize("op", SOURCES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_is_spilled(arch: str, op: str) -> None:
    for name, used in usage(op)[arch].items():
        assert (used.stack, used.local) == (0, 0), name
        assert used.registers <= 255, name
    for name, counts in instructions(op, arch).items():
        assert not counts["LDL"] + counts["STL"], name


@pytest.mark.parametrize("op", ["encoder", "request_scoring", "split_encoder"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_encoders_multiply_on_tensor_cores(arch: str, op: str) -> None:
    kernels = instructions(op, arch)
    assert kernels
    for name, counts in kernels.items():
        assert counts["HMMA"] or "split_tokens_kernel" in name, name
        # Moves between registers say that fragments are not where the products want them.
        assert counts["MOV"] <= 0.15 * counts.total(), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_reference_problem_has_its_own_kernel(arch: str) -> None:
    (used,) = [u for name, u in usage("encoder")[arch].items() if TRANSACT in name]
    assert used.registers <= 128
    of_requests = [u for name, u in usage("request_scoring")[arch].items() if TRANSACT in name]
    assert len(of_requests) == 2  # of a user, of a candidate
    assert all(u.registers <= 128 for u in of_requests)  # two blocks of 7 warps fit


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_narrow_heads_leave_room_for_two_blocks(arch: str) -> None:
    """Attention of the split form, 256 threads a block: the docs count on it."""
    kernels = usage("split_encoder")[arch]
    for rows in (16, 32, 48, 64):
        (used,) = [u for name, u in kernels.items() if f"SplitAttentionClassILi{rows}E" in name]
        assert used.registers <= 128, rows


def test_instructions_are_read() -> None:
    """The reader itself: an empty listing would pass the rest."""
    counts = sum(instructions("resilient_batch_norm", "sm_90").values(), Counter())
    assert counts["LDG"]
    assert counts["STG"]
    assert counts["EXIT"]
