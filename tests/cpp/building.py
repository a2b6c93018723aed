"""Builds what the tests run outside of Python; a second build compiles what has changed.

The programs as they ship, and the module with the CUDA kernels for the host, are built in the
folder of the native module, whose objects they share.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
SANITIZED = "address,undefined"
THREADS = "thread"
SHIPPED = ""  # the flags of a release, no sanitizer
# A sanitizer's finding ends the program with a status that is not 0.
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}

GRID_PROGRAMS = ("encoder_test", "dense_test")
CORE_PROGRAMS = (*GRID_PROGRAMS, "parallel_test")
CUDA_PRIMITIVES = ("cuda_primitives_test", "cuda_resilient_batch_norm_test")
CUDA_PROGRAMS = (
    *CUDA_PRIMITIVES,
    "cuda_encoder_test",
    "cuda_split_encoder_test",
    "cuda_request_scoring_test",
)
CUDA_MODULE = "_cuda_emulation"
#: What is built of each kind for `make test`, and what the exhaustive tests need besides.
EVERYDAY = {SHIPPED: (*CUDA_PRIMITIVES, *CORE_PROGRAMS, CUDA_MODULE)}
EXHAUSTIVE = {
    SHIPPED: CUDA_PROGRAMS,
    SANITIZED: (*CUDA_PROGRAMS, *CORE_PROGRAMS),
    THREADS: CORE_PROGRAMS,
}


def find_tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found, f"{name} is missing: pip install {name}"
    return found


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@functools.cache
def build(sanitizer: str, targets: tuple[str, ...], jobs: int | None = None) -> Path:
    """The folder of the targets built with `sanitizer`; builds them first."""
    folder = ROOT / "build" / (f"tests-{sanitizer.replace(',', '-')}" if sanitizer else "native")
    configure = ["-DSEQKERNELS_TESTS=ON", f"-DSEQKERNELS_SANITIZE={sanitizer}"]
    if not sanitizer:
        configure += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
    run_cmake(folder, configure, targets, jobs)
    return folder


def run_cmake(
    folder: Path, configure: list[str], targets: Sequence[str], jobs: int | None = None
) -> None:
    """Configure and build; processes that want the same folder wait for each other."""
    jobs = jobs or int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    cmake = find_tool("cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *generator, *configure],
        [cmake, "--build", str(folder), "--target", *targets, "--parallel", str(jobs)],
    ):
        with alone_in(folder):
            done = run(command)
        assert done.returncode == 0, done.stdout


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
