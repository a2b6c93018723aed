"""What ptxas made of the CUDA kernels, as cuobjdump shows it: registers, memory, instructions."""

from __future__ import annotations

import functools
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.cpp.building import ROOT, run_cmake
from tests.static.native_build import run_tool
from tests.static.sass import Flow, Instruction, LoopShape, parse, trips_of

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
EVERYDAY = ("sm_80", "sm_90")  # which `make test` compiles; `make test-all` compiles all
# Compiled together, since they share a PTX.
BUILDS = (EVERYDAY, ("sm_86", "sm_89"), ("sm_100",), ("sm_120",))

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


def nvcc() -> Path:
    """The compiler of NVIDIA's packages, so that no gate depends on what the machine has."""
    return _nvidia_tools() / "nvcc"


def nvcc_release() -> str:
    """Of the compiler that made the objects, "13.0"."""
    found = re.search(r"release (\d+\.\d+)", run_tool(nvcc(), "--version"))
    assert found is not None
    return found[1]


@functools.cache
def build_kernels(architectures: tuple[str, ...], jobs: int | None = None) -> Path:
    """The folder of the CUDA kernels compiled for one of `BUILDS`; compiles what changed."""
    folder = ROOT / "build" / "-".join(("cuda", *architectures))
    numbers = ";".join(f"{arch.removeprefix('sm_')}-real" for arch in architectures)
    configure = [
        "-DSEQKERNELS_PYTHON=OFF",
        "-DSEQKERNELS_WERROR=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc()}",
        f"-DSEQKERNELS_CUDA_ARCHITECTURES={numbers}",
    ]
    run_cmake(folder, configure, ["seqkernels_cuda"], jobs)
    return folder


@functools.cache
def cuda_objects(arch: str) -> dict[str, Path]:
    """Name of each source csrc/cuda/<name>.cu -> its object."""
    (together,) = (architectures for architectures in BUILDS if arch in architectures)
    folder = build_kernels(together) / "CMakeFiles/seqkernels_cuda.dir/csrc/cuda"
    return {path.name.removesuffix(".cu.o"): path for path in folder.glob("*.cu.o")}


@functools.cache
def usage(name: str, arch: str) -> dict[str, Usage]:
    """Kernel -> what it takes."""
    text = _cuobjdump(arch, "--dump-resource-usage", cuda_objects(arch)[name])
    assert re.findall(r"arch = (sm_\w+)", text) == [arch]
    kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {_readable(mangled): Usage(*(int(n) for n in numbers)) for mangled, *numbers in kernels}


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
    text = _cuobjdump(arch, "--dump-sass", cuda_objects(arch)[name])
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


def _cuobjdump(arch: str, *arguments: str | Path) -> str:
    """Of NVIDIA's package, which brings nvdisasm along."""
    path = f"PATH={_nvidia_tools()}:/usr/bin:/bin"
    return run_tool("env", path, "cuobjdump", f"--gpu-architecture={arch}", *arguments)


def _nvidia_tools() -> Path:
    folders = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    assert folders, "NVIDIA's compiler is missing: pip install '.[test]'"
    return folders[-1]
