"""The kernels in Triton's interpreter; each file in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from tests.triton.jobs import EXHAUSTIVE, INTERPRETED
from tests.triton.presence import needs_triton


def test_there_are_files() -> None:
    assert INTERPRETED


@needs_triton
@pytest.mark.parametrize(
    "job",
    [*INTERPRETED, *(pytest.param(job, marks=pytest.mark.exhaustive) for job in EXHAUSTIVE)],
)
def test_in_the_interpreter(job: str, finished: Callable[[str], CompletedProcess[str]]) -> None:
    result = finished(job)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout
