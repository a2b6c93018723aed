"""The registry under pytest-benchmark: one benchmark for each workload and contestant.

pytest-benchmark times one function at a time, but times are comparable only if contestants take
turns. So a workload's first test measures all of its contestants interleaved, and each test then
hands its own samples to pytest-benchmark by way of its clock: a round's function moves the clock on
by the seconds that a sample took.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.registry import REGISTRY, Entry
from seqkernels.benchmark import Comparison


class ReplayClock:
    """A clock that stands still unless it is moved on."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds


CLOCK = ReplayClock()
PAIRS = [
    pytest.param(entry, name, id=f"{entry.workload.id}-{name}")
    for entry in REGISTRY
    for name in entry.workload.competing()
]


@pytest.mark.benchmark(timer=CLOCK.now)
@pytest.mark.parametrize(("entry", "contestant"), PAIRS)
def test_workload(
    entry: Entry,
    contestant: str,
    measured: Callable[[Entry], Comparison],
    benchmark: BenchmarkFixture,
) -> None:
    comparison = measured(entry)
    if contestant not in comparison.results:
        pytest.skip(comparison.absent.get(contestant, "not part of the smoke run"))
    result = comparison.results[contestant]

    benchmark.group = entry.workload.id
    CLOCK.time = 0.0
    samples = iter(result.samples.seconds)
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        CLOCK.advance, setup=lambda: ((next(samples),), {}), rounds=len(result.samples.seconds)
    )
    benchmark.extra_info.update(
        workload=entry.workload.id,
        contestant=contestant,
        note=result.note,
        quantiles=dataclasses.asdict(result.samples.spread),
        calls_per_sample=result.samples.calls_per_sample,
    )
    if contestant == "seqkernels":
        benchmark.extra_info["comparison"] = comparison.as_dict()
