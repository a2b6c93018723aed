"""Hooks and fixtures of `pytest bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.registry import Entry, shrunk
from seqkernels.benchmark import Comparison, Unavailable, compare, machine_info

SMOKE_ROUNDS = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke",
        action="store_true",
        help="run every workload in a tiny size, without the slow peers: no speed is measured",
    )


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.pop("node", None)  # the host's name says nothing about speed
    machine_info["seqkernels"] = START | {"smoke": config.getoption("--smoke")}


#: As the run begins: later the load is our own.
START = machine_info()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Entry], Comparison]:
    """Measures a workload at its first use: all contestants at once, interleaved.

    An error is raised again for each contestant: what is wrong has no speed.
    """
    smoke = request.config.getoption("--smoke")
    done: dict[str, Comparison | BaseException] = {}

    def measure(entry: Entry) -> Comparison:
        name = entry.workload.id
        if name not in done:
            workload = shrunk(entry).workload if smoke else entry.workload
            try:
                done[name] = compare(workload, rounds=SMOKE_ROUNDS if smoke else None)
            except (AssertionError, Unavailable) as error:
                done[name] = error
        result = done[name]
        if isinstance(result, Unavailable):
            pytest.skip(str(result))
        if isinstance(result, BaseException):
            raise result
        return result

    return measure
