"""What ptxas made of the CUDA kernels, as cuobjdump shows it: registers, memory, instructions."""

from __future__ import annotations

import functools
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from seqkernels.backends import cpu
from tests.static.native_build import native_objects, run_tool
from tests.static.sass import Flow, Instruction, LoopShape, parse, trips_of

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

# The kernel of the reference problem, and how often its loops run there: L = 100, two layers.
REFERENCE_CLASS = "EncoderClass<96, 48, 2, 16>"
REFERENCE = f"encoder_kernel<{REFERENCE_CLASS}>"
_HEAD = LoopShape(
    "passes of a softmax",
    1,
    (LoopShape("pairs of the 7 key tiles", 3), LoopShape("largest scores of a row", 0)),
)
REFERENCE_WARPS = 7
REFERENCE_LOOPS = (
    LoopShape(
        "layers",
        2,
        (
            LoopShape("heads of keys and values", 2),
            _HEAD,
            _HEAD,
            LoopShape("chunks of the hidden layer", 1),
        ),
    ),
)


class Usage(NamedTuple):
    """What a kernel takes, bytes but for the registers."""

    registers: int
    stack: int
    shared: int
    local: int


def nvcc_release() -> str:
    """Of the compiler that made the objects, "13.0"."""
    found = re.search(r"nvcc (\d+\.\d+)", cpu.native().cuda_build)
    assert found is not None
    return found[1]


@functools.cache
def cuda_objects() -> dict[str, Path]:
    """Name of each source csrc/cuda/<name>.cu -> its object."""
    found = {name: re.fullmatch(r"cuda/(\w+)\.cu", name) for name in native_objects()}
    return {match[1]: native_objects()[name] for name, match in found.items() if match}


@functools.cache
def usage(name: str) -> dict[str, dict[str, Usage]]:
    """Architecture -> kernel -> what it takes."""
    text = _cuobjdump("--dump-resource-usage", cuda_objects()[name])
    found: dict[str, dict[str, Usage]] = {}
    for section in text.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (sm_\w+)", section)
        assert arch is not None
        kernels = re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", section
        )
        found[arch[1]] = {
            _readable(mangled): Usage(*(int(n) for n in numbers)) for mangled, *numbers in kernels
        }
    return found


def opcodes(name: str, arch: str) -> dict[str, Counter[str]]:
    """Kernel -> how often each opcode stands in it."""
    return _listings(name, arch).opcodes


@functools.cache
def executed(arch: str) -> Counter[str]:
    """How often a warp of the reference problem meets each opcode."""
    flow = Flow(_listings("encoder", arch).reference)
    return flow.execute(trips_of(flow, REFERENCE_LOOPS))


class _Listings(NamedTuple):
    opcodes: dict[str, Counter[str]]
    reference: list[Instruction]


@functools.cache
def _listings(name: str, arch: str) -> _Listings:
    """What is kept of a disassembly, which has tens of megabytes."""
    found = _Listings({}, [])
    text = _cuobjdump("-sass", "-arch", arch, cuda_objects()[name])
    for section in text.split("Function : ")[1:]:
        kernel = _readable(section.split(maxsplit=1)[0])
        code = parse(section)
        found.opcodes[kernel] = Counter(instruction.label for instruction in code)
        if kernel == REFERENCE:
            found.reference.extend(code)
    return found


@functools.cache
def _readable(mangled: str) -> str:
    """`kernel<arguments>`, without namespaces and parameters."""
    text = run_tool("c++filt", mangled).strip().replace("seqkernels::cuda::", "")
    name = re.fullmatch(r"(?:void )?(.*?)\([^()]*\)", text.replace(" >", ">"))
    assert name is not None, text
    return name[1]


def _cuobjdump(*arguments: str | Path) -> str:
    """Of NVIDIA's package, which brings nvdisasm along."""
    folders = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    assert folders, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return run_tool("env", f"PATH={folders[-1]}:/usr/bin:/bin", "cuobjdump", *arguments)
