"""The clock."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from seqkernels.benchmark import Samples, Spread, interleave
from seqkernels.benchmark import measure as module


def test_everyone_has_one_turn_a_round_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE", 0.0)
    monkeypatch.setattr(module, "MIN_SAMPLE", 0.0)
    turns: list[str] = []

    def contestant(name: str) -> SimpleNamespace:
        @contextmanager
        def around():
            turns.append(name)
            yield

        return SimpleNamespace(call=lambda: None, around=around)

    names = ["a", "b", "c"]
    samples = interleave({name: contestant(name) for name in names}, rounds=20)
    assert turns[:3] == names  # where it finds out how long each takes
    rounds = [tuple(turns[i : i + 3]) for i in range(3, len(turns), 3)]
    assert [sorted(r) for r in rounds] == [names] * 20
    assert len(set(rounds)) > 3
    assert {len(s.seconds) for s in samples.values()} == {20}
    assert gc.isenabled()


@pytest.mark.timing
def test_the_slower_is_slower() -> None:
    made = {
        name: SimpleNamespace(call=lambda s=seconds: time.sleep(s), around=_nothing)
        for name, seconds in (("fast", 0.002), ("slow", 0.008))
    }
    samples = interleave(made, rounds=5)
    assert 0.002 <= samples["fast"].spread.median < samples["slow"].spread.median
    assert samples["slow"].ratio_to(samples["fast"]).median > 1.5
    assert samples["slow"].difference_to(samples["fast"]).median > 0.003


@pytest.mark.timing
def test_short_calls_are_repeated_within_a_sample() -> None:
    samples = interleave({"nothing": SimpleNamespace(call=int, around=_nothing)}, rounds=2)
    assert samples["nothing"].calls_per_sample > 100
    assert samples["nothing"].spread.median < 1e-5


def test_ratios_are_taken_round_by_round() -> None:
    ours, peer = Samples((1.0, 10.0, 2.0), 1), Samples((3.0, 30.0, 6.0), 1)
    assert peer.ratio_to(ours) == Spread(3.0, 3.0, 3.0)
    assert peer.difference_to(ours).median == 4.0


@contextmanager
def _nothing():
    yield
