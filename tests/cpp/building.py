"""Builds the C++ test programs and runs them; a second build compiles what has changed."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

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
def build(sanitizer: str, programs: tuple[str, ...]) -> Path:
    """The folder of the programs built with `sanitizer`; builds them first."""
    folder = ROOT / "build" / ("tests-" + (sanitizer.replace(",", "-") or "release"))
    configure = [
        *(find_tool("cmake"), "-S", str(ROOT), "-B", str(folder)),
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"),
        *("-DSEQKERNELS_TESTS=ON", "-DSEQKERNELS_PYTHON=OFF", f"-DSEQKERNELS_SANITIZE={sanitizer}"),
    ]
    run_cmake(folder, configure, programs)
    return folder


def run_cmake(folder: Path, configure: list[str], targets: Sequence[str]) -> None:
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    compile_it = [find_tool("cmake"), "--build", str(folder), "--target", *targets]
    for command in (configure, [*compile_it, "--parallel", jobs]):
        done = run(command)
        assert done.returncode == 0, done.stdout
