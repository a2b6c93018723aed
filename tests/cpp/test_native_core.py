"""The native core on its grid of hard problems: as it ships, and under sanitizers.

The program is `encoder_test.cpp`. Each build stays in `build/`, so that a second run compiles only
what has changed.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

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

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the sanitizers' options are those of Linux"
)


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
def launcher(sanitizer: str) -> list[str]:
    """The command that starts the program built with `sanitizer`; builds it first."""
    build = ROOT / "build" / ("tests-" + (sanitizer.replace(",", "-") or "release"))
    configure = [
        *(find_tool("cmake"), "-S", str(ROOT), "-B", str(build)),
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"),
        *("-DSEQKERNELS_TESTS=ON", "-DSEQKERNELS_PYTHON=OFF", f"-DSEQKERNELS_SANITIZE={sanitizer}"),
    ]
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    compile_it = [
        *(find_tool("cmake"), "--build", str(build)),
        *("--target", "encoder_test", "--parallel", jobs),
    ]
    for command in (configure, compile_it):
        done = run(command)
        assert done.returncode == 0, done.stdout
    command = [str(build / "encoder_test")]
    if "unexpected memory mapping" in run([*command, "--list"]).stdout:
        # ThreadSanitizer and the system's address randomization do not always go together.
        command = ["setarch", "--addr-no-randomize", *command]
    return command


def run_program(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([*launcher(sanitizer), *arguments], **OPTIONS)


def targets(sanitizer: str) -> list[str]:
    listed = run_program(sanitizer, "--list")
    assert listed.returncode == 0, listed.stdout
    return listed.stdout.split()


@pytest.mark.parametrize(
    ("sanitizer", "arguments"),
    [
        pytest.param(SHIPPED, [], id="shipped"),
        pytest.param(SANITIZED, [], id="address,undefined"),
        pytest.param(THREADS, ["--only=company,concurrency"], id="thread"),
    ],
)
def test_hard_problems(
    sanitizer: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_program(sanitizer, *arguments)
    assert done.returncode == 0, done.stdout
    assert " 0 failures" in done.stdout.splitlines()[-1]
    with capsys.disabled():
        print(f"\nencoder_test ({sanitizer or 'as shipped'})\n{done.stdout}", end="")


def test_every_supported_instruction_set_is_among_the_targets() -> None:
    native = pytest.importorskip("seqkernels._native")
    supported = {name for name in native.isa_names() if not native.isa_unsupported_reasons(name)}
    assert supported | {"portable", "amx_emulated"} <= set(targets(SANITIZED))


@pytest.mark.parametrize(
    ("plant", "sanitizer", "finding"),
    [
        ("overread", SANITIZED, "heap-buffer-overflow"),
        ("overwrite", SANITIZED, "heap-buffer-overflow"),
        ("weights", SANITIZED, "heap-buffer-overflow"),
        ("misaligned", SANITIZED, "misaligned address"),
        ("stride", SANITIZED, "wrote outside the rows"),
        ("value", SANITIZED, "exceeds the bound"),
        ("race", THREADS, "data race"),
    ],
)
def test_planted_defect_is_found(plant: str, sanitizer: str, finding: str) -> None:
    """On every instruction set: sanitizers do not see through all intrinsics alike."""
    for isa in targets(sanitizer):
        done = run_program(sanitizer, f"--isa={isa}", f"--plant={plant}")
        assert done.returncode != 0, f"{isa}: not noticed\n{done.stdout}"
        assert finding in done.stdout, f"{isa}: {done.stdout}"


def test_unknown_arguments_are_refused() -> None:
    for argument in ("--what", "--isa=sse9", "--only=nothing", "--plant=nothing"):
        assert run_program(SANITIZED, argument).returncode == 2, argument
