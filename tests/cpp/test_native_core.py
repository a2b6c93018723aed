"""The native core on its grid of hard problems: as it ships, and under sanitizers.

The programs are `encoder_test.cpp`, `dense_test.cpp` for the linear layer and batch norm, and
`parallel_test.cpp` for what happens where threads or memory are short. Each build stays in
`build/`, so that a second run compiles only what has changed.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cpp.building import CORE_PROGRAMS, OPTIONS, SANITIZED, SHIPPED, THREADS, build, run
from tests.cpp.building import GRID_PROGRAMS as PROGRAMS

WITHOUT_GRID = (
    "--only=company,concurrency,request,workspace,twins,tiles,softmax,magnitudes,errors,defects"
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the sanitizers' options are those of Linux"
)


def launcher(program: str, sanitizer: str) -> list[str]:
    """The command that starts a program."""
    command = [str(build(sanitizer, CORE_PROGRAMS) / program)]
    if "unexpected memory mapping" in run([*command, "--list"]).stdout:
        # ThreadSanitizer and the system's address randomization do not always go together.
        command = ["setarch", "--addr-no-randomize", *command]
    return command


def run_program(program: str, sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([*launcher(program, sanitizer), *arguments], **OPTIONS)


def targets(program: str, sanitizer: str) -> list[str]:
    listed = run_program(program, sanitizer, "--list")
    assert listed.returncode == 0, listed.stdout
    return listed.stdout.split()


@pytest.mark.parametrize(
    ("program", "sanitizer", "arguments"),
    [
        pytest.param("encoder_test", SHIPPED, [], id="encoder-shipped"),
        pytest.param("dense_test", SHIPPED, [], id="dense-shipped"),
        *(
            pytest.param(*case, id=name, marks=pytest.mark.exhaustive)
            for name, case in {
                "encoder-address,undefined": ("encoder_test", SANITIZED, [WITHOUT_GRID]),
                "encoder-address,undefined-grid": ("encoder_test", SANITIZED, ["--only=grid"]),
                "encoder-thread": (
                    "encoder_test",
                    THREADS,
                    ["--only=company,concurrency,request"],
                ),
                "dense-address,undefined": ("dense_test", SANITIZED, []),
                "dense-thread": ("dense_test", THREADS, []),
            }.items()
        ),
    ],
)
def test_hard_problems(
    program: str, sanitizer: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_program(program, sanitizer, *arguments)
    assert done.returncode == 0, done.stdout
    assert " 0 failures" in done.stdout.splitlines()[-1]
    with capsys.disabled():
        print(f"\n{program} ({sanitizer or 'as shipped'})\n{done.stdout}", end="")


@pytest.mark.parametrize(
    "sanitizer",
    [SHIPPED, *(pytest.param(s, marks=pytest.mark.exhaustive) for s in (SANITIZED, THREADS))],
    ids=lambda s: s or "shipped",
)
def test_too_few_threads_and_too_little_memory(sanitizer: str) -> None:
    done = run_program("parallel_test", sanitizer)
    assert done.returncode == 0, done.stdout
    assert " 0 failures" in done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_supported_instruction_set_is_among_the_targets(program: str) -> None:
    native = pytest.importorskip("seqkernels._native")
    supported = {name for name in native.isa_names() if not native.isa_unsupported_reasons(name)}
    assert supported | {"portable", "amx_emulated"} <= set(targets(program, SHIPPED))


@pytest.mark.parametrize(
    ("program", "plant", "sanitizer", "finding"),
    [
        *(
            (program, plant, SHIPPED, finding)
            for program, ops in (("encoder_test", ("",)), ("dense_test", ("linear:", "norm:")))
            for plant, finding in (
                *((f"{op}stride", "wrote outside the rows") for op in ops),
                *((f"{op}value", "exceeds the bound") for op in ops),
            )
        ),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                *(
                    (program, f"{op}{plant}", SANITIZED, "heap-buffer-overflow")
                    for program, op in (
                        ("encoder_test", ""),
                        ("dense_test", "linear:"),
                        ("dense_test", "norm:"),
                    )
                    for plant in ("overread", "overwrite", "weights")
                ),
                ("encoder_test", "misaligned", SANITIZED, "misaligned address"),
                ("encoder_test", "race", THREADS, "data race"),
            )
        ),
    ],
)
def test_planted_defect_is_found(program: str, plant: str, sanitizer: str, finding: str) -> None:
    """On every instruction set: sanitizers do not see through all intrinsics alike."""
    for isa in targets(program, sanitizer):
        if plant.startswith("norm:") and isa.endswith("(trapped)"):
            continue  # batch norm has no tiles
        done = run_program(program, sanitizer, f"--isa={isa}", f"--plant={plant}")
        assert done.returncode != 0, f"{isa}: not noticed\n{done.stdout}"
        assert finding in done.stdout, f"{isa}: {done.stdout}"


def test_unknown_arguments_are_refused() -> None:
    for argument in ("--what", "--isa=sse9", "--only=nothing", "--plant=nothing"):
        for program in PROGRAMS:
            assert run_program(program, SHIPPED, argument).returncode == 2, argument
