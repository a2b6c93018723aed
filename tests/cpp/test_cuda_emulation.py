"""The CUDA kernels on the host emulation: primitives and ops, plain and sanitized.

Each program checks values, schedules and counters, and plants faults of its own that the emulation
has to notice.
"""

from __future__ import annotations

import pytest

from tests.cpp.building import CUDA_PRIMITIVES, OPTIONS, SANITIZED, SHIPPED, build, run
from tests.cpp.building import CUDA_PROGRAMS as PROGRAMS

#: Groups of a program that take longer than all its others: not in `make test`.
LONG_GROUPS = {"cuda_encoder_test": ("shapes", "mistakes")}


def groups(program: str, *, long: bool) -> list[str]:
    """The option that chooses the groups of a program; none for one that has no long groups."""
    if program not in LONG_GROUPS:
        return []
    listed = run([str(build(SHIPPED, (program,)) / program), "--list"]).stdout.split()
    assert set(LONG_GROUPS[program]) < set(listed)
    chosen = [name for name in listed if (name in LONG_GROUPS[program]) == long]
    return ["--only=" + ",".join(chosen)]


@pytest.mark.parametrize(
    ("program", "sanitizer", "long"),
    [
        # tests/backends/test_cuda.py runs the others' kernels from the ops down.
        *(
            pytest.param(
                program,
                SHIPPED,
                False,
                id=f"plain-{program}",
                marks=[] if program in CUDA_PRIMITIVES else pytest.mark.exhaustive,
            )
            for program in PROGRAMS
        ),
        *(
            pytest.param(
                program,
                sanitizer,
                long,
                id=f"{sanitizer or 'plain'}-{program}{'-long' if long else ''}",
                marks=pytest.mark.exhaustive,
            )
            for sanitizer in (SHIPPED, SANITIZED)
            for program in PROGRAMS
            for long in (False, True)
            if (sanitizer or long) and (program in LONG_GROUPS or not long)
        ),
    ],
)
def test_program(
    program: str, sanitizer: str, long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(sanitizer, (program,))
    command = [str(folder / program), *groups(program, long=long)]
    done = run(command, **OPTIONS)
    assert done.returncode == 0, done.stdout
    assert " 0 failures" in done.stdout.splitlines()[-1]
    with capsys.disabled():
        print(f"\n{program} ({sanitizer or 'plain'})\n{done.stdout}", end="")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("program", "plant", "finding"),
    [
        ("cuda_primitives_test", "overread", "heap-buffer-overflow"),
        ("cuda_primitives_test", "overwrite", "heap-buffer-overflow"),
        ("cuda_primitives_test", "copy", "heap-buffer-overflow"),
        ("cuda_resilient_batch_norm_test", "overread", "heap-buffer-overflow"),
        ("cuda_resilient_batch_norm_test", "overwrite", "heap-buffer-overflow"),
        ("cuda_resilient_batch_norm_test", "weights", "heap-buffer-overflow"),
        ("cuda_resilient_batch_norm_test", "stride", ""),
        ("cuda_resilient_batch_norm_test", "value", ""),
    ],
)
def test_planted_defect_is_found(program: str, plant: str, finding: str) -> None:
    done = run([str(build(SANITIZED, PROGRAMS) / program), f"--plant={plant}"], **OPTIONS)
    assert done.returncode not in (0, 2), done.stdout
    assert finding in done.stdout
