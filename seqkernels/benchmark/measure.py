"""The clock: contestants take turns, so that whatever else the machine does meets them alike."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

MIN_ROUNDS = 5
MAX_ROUNDS = 300
#: Calls that take less are repeated until a sample is this long, and the sample is their mean.
MIN_SAMPLE = 1e-3
#: A turn begins with untimed calls for this long, one at least: the caches are then its own, and
#: the threads of whoever came before have gone to sleep.
SETTLE = 3e-3


class Clock(Protocol):
    """How long work takes where it is done."""

    def wait(self) -> None:
        """Return when all work that was started is done."""

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """Call so often and return the mean time."""


class WallClock:
    """Of work that is done when the call returns."""

    def wait(self) -> None:
        """There is nothing to wait for."""

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """By the system's clock."""
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class Timed(Protocol):
    """What `interleave` needs to know of a contestant."""

    @property
    def call(self) -> Callable[[], Any]:
        """What is timed."""

    @property
    def around(self) -> Callable[[], AbstractContextManager[Any]]:
        """What surrounds a turn, outside the clock."""


@dataclass(frozen=True)
class Spread:
    """Median and the 20 % and 80 % quantiles."""

    q20: float
    median: float
    q80: float

    @classmethod
    def of(cls, values: Any) -> Spread:
        """Of these values.

        Examples
        --------
        >>> Spread.of([1.0, 2.0, 3.0]).median
        2.0
        """
        q20, median, q80 = np.quantile(np.asarray(values, dtype=float), (0.2, 0.5, 0.8))
        return cls(float(q20), float(median), float(q80))


@dataclass(frozen=True)
class Samples:
    """Seconds a call took in each round."""

    seconds: tuple[float, ...]
    calls_per_sample: int

    @property
    def spread(self) -> Spread:
        """Over the rounds."""
        return Spread.of(self.seconds)

    def ratio_to(self, other: Samples) -> Spread:
        """Of this time over the other's, round by round."""
        return Spread.of(np.divide(self.seconds, other.seconds))

    def difference_to(self, other: Samples) -> Spread:
        """Of this time minus the other's, round by round."""
        return Spread.of(np.subtract(self.seconds, other.seconds))


def interleave(
    contestants: Mapping[str, Timed],
    *,
    seconds: float = 8.0,
    rounds: int | None = None,
    clock: Clock | None = None,
) -> dict[str, Samples]:
    """Time calls in rounds in which each contestant has one turn.

    The order within a round is drawn anew, reproducibly, so that nobody always follows the same
    one. A turn is some untimed calls (``SETTLE``), then timed ones for at least ``MIN_SAMPLE``.

    Parameters
    ----------
    contestants : mapping of str to object
        Each has ``call``, which is timed, and ``around``, a function that makes the context of a
        turn; entering and leaving it is not timed.
    seconds : float
        Time for everything, if ``rounds`` is None; at least ``MIN_ROUNDS`` rounds are run.
    rounds : int, optional
        Number of rounds.
    clock : Clock, optional
        The system's, if none is given.

    Returns
    -------
    dict of str to Samples
        One sample per contestant and round.

    Examples
    --------
    >>> from contextlib import nullcontext
    >>> from types import SimpleNamespace
    >>> nap = SimpleNamespace(call=lambda: time.sleep(0.001), around=nullcontext)
    >>> 0.001 <= interleave({"nap": nap}, rounds=3)["nap"].spread.median < 0.1
    True
    """
    clock = clock or WallClock()
    repeats: dict[str, int] = {}
    round_cost = 0.0
    for name, contestant in contestants.items():
        with contestant.around():
            contestant.call()  # what a first call does besides is nobody's speed
            per_call = clock.seconds(contestant.call, max(1, _settle(contestant.call, clock)))
        repeats[name] = min(10_000, max(1, math.ceil(MIN_SAMPLE / per_call)))
        round_cost += max(per_call, SETTLE) + repeats[name] * per_call
    if rounds is None:
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / round_cost)))

    taken: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                contestant = contestants[name]
                with contestant.around():
                    _settle(contestant.call, clock)
                    taken[name].append(clock.seconds(contestant.call, repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(tuple(taken[name]), repeats[name]) for name in contestants}


def _settle(call: Callable[[], Any], clock: Clock) -> int:
    """Call until ``SETTLE`` has passed; return how often that was."""
    count = 0
    end = time.perf_counter() + SETTLE
    while True:
        call()
        clock.wait()
        count += 1
        if time.perf_counter() >= end:
            return count
