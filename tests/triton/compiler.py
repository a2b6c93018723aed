"""Compiles what the backend would launch, for a GPU that is not there, and reports what came out.

Run as a program, in a process of its own because Triton is either interpreted or compiled::

    python -m tests.triton.compiler sm_90            # a line of JSON for each kernel compiled
    python -m tests.triton.compiler specializations  # and for each of several lengths

The backend runs as it would on tensors of that GPU, up to the launch, so that types, alignments,
constants and blocks are its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import seqkernels
from seqkernels import backends, ops
from seqkernels.backends.call import EncoderCall
from seqkernels.backends.triton import TritonBackend
from seqkernels.nn import UserSequenceEncoder
from seqkernels.testing import EncoderCase
from tests.backends.test_request_scoring import Request

# The ranking model's own shape, one that is wide and one that is long: together they compile every
# kernel, each way to fuse, validity by lengths and by masks, one and several blocks of a loop.
TRANSACT = {
    "batch": 2, "fusion": "concat", "candidate_dim": 32, "latest_k": 8, "pool": "max",
    "mask": "right", "mask_form": "lengths", "dtype": torch.bfloat16,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "reference shape": {**TRANSACT, "num_layers": 1},
    "whole sequence": {"batch": 2, "num_layers": 1, "norm_first": True, "final_norm": True,
                       "activation": "gelu", "mask": "holes", "padding": "compute"},
    "wide": {"batch": 2, "length": 64, "d_model": 256, "nhead": 4, "dim_feedforward": 2048,
             "num_layers": 1, "fusion": "append", "latest_k": 8, "pool": "max",
             "dtype": torch.bfloat16},
    "long": {"batch": 2, "length": 400, "num_layers": 1, "mask": "holes",
             "dtype": torch.bfloat16},
}  # fmt: skip
# Cases whose padding is answered by a byte on the device, under names of their own.
BY_FLAG = {"stock padding": "whole sequence", "long, stock padding": "long"}
# These differ from sm_80 in shared memory and registers, not in instructions.
ALIKE = ("sm_86", "sm_89", "sm_120")
ALIKE_CASES = ("reference shape", "long")


class Kernel(NamedTuple):
    """What a compiled kernel asks of the chip, and what is in it."""

    case: str
    name: str
    registers: int
    spilled: int  # bytes of stack a thread
    shared: int  # bytes a block
    tensor_columns: int  # of tensor memory
    num_warps: int
    products: int  # tensor-core instructions, as written
    traps: int
    instructions: int


class _Driver:
    """Stands in for the GPU's driver up to the launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Backend(TritonBackend):
    devices = ("cpu",)
    arch = ""
    by_flag = False

    def device_reasons(self) -> list[str]:
        return []

    def variant(self) -> str:
        return self.arch

    def on(self, tensor: torch.Tensor) -> AbstractContextManager[object]:
        return nullcontext()

    def encoder(self, call: EncoderCall, variant: str) -> torch.Tensor:
        if self.by_flag:
            call = call._replace(computes_padding=torch.tensor([True]))
        return super().encoder(call, variant)


compiled: list[Any] = []  # kernels, in the order of their launches


def aim(arch: str) -> None:
    """Every launch from here on compiles for this architecture, and goes no further."""
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    driver.set_active(_Driver(target))
    _Backend.arch = arch
    backends.BACKENDS = (_Backend(), backends.BACKENDS[-1])

    def launch(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: compiled.append(
            kernel.run(*args, grid=grid, warmup=True, **kwargs)
        )

    JITFunction.__getitem__ = launch


def compile_encoder(case: EncoderCase) -> list[Any]:
    """The kernels that this problem launches, in order."""
    del compiled[:]
    with torch.inference_mode():
        case.problem().run("triton")
    return list(compiled)


def compile_request(case: EncoderCase) -> list[Any]:
    """The kernels that request scoring launches, in order."""
    del compiled[:]
    Request.draw(case, 3).score("triton")
    return list(compiled)


def compile_batch_norm(channels_last: bool) -> list[Any]:
    del compiled[:]
    x = torch.zeros(40, 96, 3)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    column = torch.ones(96)
    ops.resilient_batch_norm(
        x, column, column, column, column, 1e-5, 0.1, 10.0, "gelu", 0.0, "triton"
    )
    return list(compiled)


def describe(case: str, kernel: Any) -> Kernel:
    """Read the report of a compiled kernel off its binary."""
    meta = kernel.metadata
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        code = [
            line for line in text.splitlines() if re.match(r"\t[sv]_|\t(ds|global|buffer)_", line)
        ]
        registers, spilled = (
            _number(r"\.vgpr_count:\s+(\d+)", text),
            4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        )
        product, traps = r"\bv_mfma_", text.count("s_trap")
    else:
        usage, text = _cuobjdump(kernel.asm["cubin"])
        code = [line for line in text.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line)]
        registers, spilled = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
        product = r"\b(HMMA|HGMMA|UTCHMMA)\b"
        # In PTX: for sm_100 ptxas itself adds two to the machine code that nothing falls into.
        traps = len(re.findall(r"\btrap;", kernel.asm["ptx"]))
    return Kernel(
        case,
        meta.name,
        registers,
        spilled,
        meta.shared,
        getattr(meta, "tmem_size", None) or 0,
        meta.num_warps,
        sum(bool(re.search(product, line)) for line in code),
        traps,
        len(code),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} is not in the compiler's report")
    return int(found[1])


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a binary, by the tool in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True)
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return usage.stdout, code.stdout


def specializations() -> None:
    """Print, for each of several calls, the kernels it compiles, by their hashes."""
    aim("sm_90")

    def report(call: str, kernels: list[Any]) -> None:
        print(json.dumps([call, [kernel.hash for kernel in kernels]]), flush=True)

    for length in (100, 112, 101, 97, 1):
        report(f"length {length}", compile_encoder(EncoderCase(**{**TRANSACT, "length": length})))
    # 17 columns of an event: L E is a multiple of 16 for one length and not for the next.
    odd = {**TRANSACT, "candidate_dim": 79, "num_layers": 1, "mask": "holes", "mask_form": "bool"}
    for batch, length in ((2, 100), (1, 112), (16, 97)):
        case = EncoderCase(**{**odd, "batch": batch, "length": length, "dtype": torch.float32})
        report(f"odd {batch} {length}", compile_encoder(case))
    for batch, length in ((2, 100), (1, 112)):
        case = EncoderCase(**{**odd, "batch": batch, "length": length})
        report(f"request {batch} {length}", compile_request(case))
    # A model made ready by one batch, then batches of other sizes, lengths and places in memory.
    torch.manual_seed(0)
    model = UserSequenceEncoder(64, 32, 2, 32, 1, backend="triton").eval()

    def arguments(users: int, length: int, skip: int) -> tuple[torch.Tensor, ...]:
        events, candidates = torch.zeros(users + skip, length, 64), torch.zeros(users + skip, 32)
        mask = torch.zeros(users + skip, length, dtype=torch.bool)
        return events[skip:], candidates[skip:], mask[skip:]

    del compiled[:]
    seqkernels.warmup(model, arguments(8, 100, 0))
    report("warmup", compiled)
    for users, length, skip in ((8, 112, 0), (1, 65, 0), (16, 97, 1), (3, 128, 2)):
        del compiled[:]
        with torch.inference_mode():
            model(*arguments(users, length, skip))
        report(f"serving {users} {length} {skip}", compiled)


def main(arch: str) -> None:
    aim(arch)
    seen = set()

    def report(case: str, kernels: list[Any]) -> None:
        for kernel in kernels:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                print(json.dumps(describe(case, kernel)._asdict()), flush=True)

    for name, fields in CASES.items():
        if arch not in ALIKE or name in ALIKE_CASES:
            report(name, compile_encoder(EncoderCase(**fields)))
    _Backend.by_flag = True
    for name, case in BY_FLAG.items():
        if arch not in ALIKE or case in ALIKE_CASES:
            report(name, compile_encoder(EncoderCase(**CASES[case])))
    _Backend.by_flag = False
    report("request", compile_request(EncoderCase(**TRANSACT)))
    for channels_last in (False, True):
        report("batch norm", compile_batch_norm(channels_last))


if __name__ == "__main__":
    specializations() if sys.argv[1] == "specializations" else main(sys.argv[1])
