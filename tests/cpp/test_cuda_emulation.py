"""The CUDA kernels on the host emulation: primitives and ops, plain and sanitized.

Each program checks values, schedules and counters, and plants faults of its own that the emulation
has to notice.
"""

from __future__ import annotations

import pytest

from tests.cpp.building import CUDA_PROGRAMS as PROGRAMS
from tests.cpp.building import OPTIONS, SANITIZED, SHIPPED, build, run


@pytest.mark.parametrize(
    "sanitizer",
    [
        pytest.param(SHIPPED, id="plain"),
        pytest.param(SANITIZED, id=SANITIZED, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, sanitizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run([str(build(sanitizer, PROGRAMS) / program)], **OPTIONS)
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
