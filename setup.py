"""Builds the native module `seqkernels._native` by driving CMake; the rest is in pyproject.toml.

Environment variables of a build:
    SEQKERNELS_NATIVE=0   leave the native module out (a pure Python install)
    SEQKERNELS_CUDA       0: without the CUDA kernels; 1: an error where they cannot be built;
                          local: for the GPUs of this machine, which may be none
                          (default: built where nvcc is on PATH, in CUDA_HOME, or among Python's
                          packages)
    TORCH_CUDA_ARCH_LIST  architectures of the CUDA kernels, such as "8.0;9.0+PTX"
    MAX_JOBS              compilers at a time (default: by processors and free memory)
    CMAKE_ARGS            further arguments for CMake, such as -DSEQKERNELS_WERROR=ON
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
MEMORY_PER_JOB = 2 << 30  # bytes; a kernel source full of templates needs up to half of it


def available_memory() -> int | None:
    """Bytes that may be used: what the system has free, within the container's limit."""
    bounds = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        bounds += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        bounds += [int(limit)] if limit.isdigit() else []
    except OSError:
        pass  # not Linux, or no such control group: the processors alone bound the jobs
    return min(bounds, default=None)


def job_count() -> int:
    """Compilers to run at a time: MAX_JOBS, or what processors and memory allow."""
    requested = os.environ.get("MAX_JOBS", "")
    if requested:
        if not requested.isdigit() or int(requested) < 1:
            raise CompileError(f"MAX_JOBS: expected a positive integer, got {requested!r}")
        return int(requested)
    affinity = getattr(os, "sched_getaffinity", None)
    jobs = len(affinity(0)) if affinity else os.cpu_count() or 1
    memory = available_memory()
    return jobs if memory is None else max(1, min(jobs, memory // MEMORY_PER_JOB))


def find_tool(name: str) -> str | None:
    """The tool of this Python environment if it has one (it need not be activated), else PATH's."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def native_wanted() -> bool:
    value = os.environ.get("SEQKERNELS_NATIVE", "1")
    if value not in ("0", "1"):
        raise SystemExit(f"SEQKERNELS_NATIVE: expected 0 or 1, got {value!r}")
    return value == "1"


class Cuda(NamedTuple):
    """The CUDA compiler and the architectures to build for, or why there are none."""

    nvcc: str | None = None
    architectures: tuple[str, ...] = ()
    missing: str = ""

    def cmake_arguments(self) -> list[str]:
        if self.nvcc is None:
            return [
                "-DSEQKERNELS_CUDA_ARCHITECTURES=",
                f"-DSEQKERNELS_CUDA_MISSING={self.missing}",
            ]
        return [
            f"-DCMAKE_CUDA_COMPILER={self.nvcc}",
            f"-DSEQKERNELS_CUDA_ARCHITECTURES={';'.join(self.architectures)}",
        ]

    def announcement(self) -> str:
        """What will be built and how to build less; `pip install -v` shows it."""
        if self.nvcc is None:
            return f"seqkernels: building the CPU core, without CUDA kernels: {self.missing}"
        return (
            "seqkernels: building the CPU core and the CUDA kernels for "
            + ", ".join(name.removesuffix("-real") for name in self.architectures)
            + "; TORCH_CUDA_ARCH_LIST=9.0 builds them for one architecture, SEQKERNELS_CUDA=local "
            "for the GPUs of this machine, SEQKERNELS_CUDA=0 not at all"
        )


def find_nvcc() -> str | None:
    """The nvcc of PATH, of CUDA_HOME, or of NVIDIA's packages in this Python."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME",) if os.environ.get(name)]
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"), reverse=True)
    found = shutil.which("nvcc")
    return found or next(filter(None, (shutil.which("nvcc", path=str(f)) for f in folders)), None)


def local_architectures() -> list[str]:
    """The compute capabilities of this machine's GPUs, each once, such as "9.0"."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return []
    query = [nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)
    names = listed.stdout.split() if listed.returncode == 0 else []
    return sorted({name for name in names if re.fullmatch(r"\d+\.\d", name)}, key=float)


def default_architectures(nvcc: str) -> list[str]:
    """Those that this nvcc knows, the last one as PTX too."""
    listing = [nvcc, "--list-gpu-arch"]
    listed = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split()
    names = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in listed]
    return [*names[:-1], names[-1] + "+PTX"]


def in_words_of_cmake(names: list[str]) -> tuple[str, ...]:
    """Architectures as TORCH_CUDA_ARCH_LIST names them, but for those that run no kernel."""
    result = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise CompileError(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0 or 12.0+PTX, got {name!r}"
            )
        major, minor, kind, ptx = match.groups()
        if int(major) >= 8:  # older ones have no bf16 tensor cores
            result.append(f"{major}{minor}{kind}" + ("" if ptx else "-real"))
    return tuple(result)


def find_cuda() -> Cuda:
    wanted = os.environ.get("SEQKERNELS_CUDA", "")
    if wanted not in ("", "0", "1", "local"):
        raise SystemExit(f"SEQKERNELS_CUDA: expected 0, 1 or local, got {wanted!r}")
    if wanted == "0":
        return Cuda(missing="SEQKERNELS_CUDA=0 when it was compiled")
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    named = [name for name in named if name]
    source = "TORCH_CUDA_ARCH_LIST"
    if wanted == "local" and not named:
        named, source = local_architectures(), "the GPUs of the machine"
        if not named:
            return Cuda(missing="SEQKERNELS_CUDA=local and no GPU when it was compiled")
    nvcc = find_nvcc()
    if nvcc is None:
        missing = "no nvcc was found when it was compiled"
    else:
        architectures = in_words_of_cmake(named or default_architectures(nvcc))
        if architectures:
            return Cuda(nvcc, architectures)
        missing = f"{source} named no architecture from 8.0 on when it was compiled"
    if wanted == "1":
        raise CompileError(f"seqkernels: SEQKERNELS_CUDA=1, but {missing}")
    return Cuda(missing=missing)


@contextlib.contextmanager
def the_tree_alone() -> Iterator[None]:
    """Let no other build work in this folder at the same time: it waits.

    Setuptools writes its results into the source tree, where two builds would delete each other's.
    """
    if not os.access(ROOT, os.W_OK):
        raise SystemExit(
            f"error: seqkernels: the source folder {ROOT} is read-only, and a build writes into "
            "it: copy the folder and install from the copy"
        )
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"seqkernels: waiting for another build in {ROOT}", file=sys.stderr, flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


def describe(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"`{Path(error.cmd[0]).name} {error.cmd[1]}` ended with status {error.returncode}"
    return str(error)


class CMakeBuild(build_ext):
    """Configures, builds and installs CMake's target `_native`, and what it links to."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.fresh = not self.inplace
        if self.inplace:  # for editable installs: kept, so that a rebuild compiles what changed
            self.build_temp = str(ROOT / "build" / "native")

    def build_extension(self, ext: Extension) -> None:
        try:
            self.run_cmake(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                "seqkernels: the native CPU module could not be built; the reason stands above. It "
                "needs a C++20 compiler (g++ >= 11 or clang >= 14; CXX names another one). Nothing "
                "was installed. SEQKERNELS_NATIVE=0 installs without the native module: everything "
                f"then runs on the plain PyTorch reference. [{describe(error)}]"
            ) from error

    def run_cmake(self, destination: Path) -> None:
        import pybind11

        cmake = find_tool("cmake")
        if cmake is None:
            raise FileNotFoundError("cmake was not found: pip install cmake")
        build_dir = Path(self.build_temp).resolve()
        cuda = find_cuda()
        print(cuda.announcement(), flush=True)
        configure = [
            f"-DSEQKERNELS_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *cuda.cmake_arguments(),
        ]
        ninja = find_tool("ninja")
        if ninja is not None:
            # Named each time: the one in CMake's cache may have gone with its build environment.
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if self.fresh:  # or CMake would keep to the compiler of an earlier build, whatever CXX says
            configure.append("--fresh")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = str(job_count())

        subprocess.check_call([cmake, "-S", str(ROOT), "-B", str(build_dir), *configure])
        subprocess.check_call(
            [cmake, "--build", str(build_dir), "--target", "_native", "--parallel", jobs]
        )
        destinations = [destination]
        if not self.fresh:  # setuptools copies the module to the sources, and not what it links to
            destinations.append(ROOT / "seqkernels")
        for folder in destinations:
            subprocess.check_call([cmake, "--install", str(build_dir), "--prefix", str(folder)])


if __name__ == "__main__":
    with the_tree_alone():
        setup(
            ext_modules=[Extension("seqkernels._native", sources=[])] if native_wanted() else [],
            cmdclass={"build_ext": CMakeBuild},
        )
