"""Triton is either interpreted or compiled, as the process that imports it says: see `jobs`."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from tests.triton.jobs import run_job


@pytest.fixture
def finished() -> Callable[[str], CompletedProcess[str]]:
    """Runs a job to its end."""
    return run_job
