"""Triton is either interpreted or compiled, as the process that imports it says: see `jobs`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest

from tests.triton.jobs import run_job


@pytest.fixture(scope="session")
def finished(request: pytest.FixtureRequest) -> Iterator[Callable[[str], CompletedProcess[str]]]:
    """The jobs of all selected tests, as many at a time as there are processors."""
    called = [getattr(item, "callspec", None) for item in request.session.items]
    names = [c.params["job"] for c in called if c is not None and "job" in c.params]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {name: pool.submit(run_job, name) for name in dict.fromkeys(names)}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)
