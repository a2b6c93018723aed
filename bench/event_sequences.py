"""The measurement that event_sequences.md quotes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from seqkernels.features import EventSequences

COUNT, USERS = 10_000_000, 200_000


def milliseconds(call: Callable[[], object], repeats: int = 200) -> float:
    """Median of repeated calls."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def main() -> None:
    """Build, read and append."""
    g = np.random.default_rng(0)
    columns = {
        "user": g.integers(0, USERS, COUNT),
        "time": g.integers(0, 10**9, COUNT),
        "action": g.integers(1, 5, COUNT),
        "item": g.integers(1, 10**6, COUNT),
    }
    start = time.perf_counter()
    events = EventSequences(columns)
    print(f"build: {time.perf_counter() - start:.1f} s")
    users = g.integers(0, USERS, 256)
    for name, at in (("after everything", 10**9), ("as of the middle", 5 * 10**8)):
        took = milliseconds(partial(events.batch, users, at=at, length=100))
        print(f"batch of 256 users, {name}: {took:.2f} ms")
    now = itertools.count(10**9)
    one = {"user": [5], "action": [1], "item": [1]}
    print(f"append: {milliseconds(lambda: events.append(one | {'time': [next(now)]})):.2f} ms")

    taken = []
    for _ in range(300):
        some = {name: column[:200] for name, column in columns.items()}
        some |= {"user": g.integers(0, USERS, 200), "time": np.full(200, next(now))}
        start = time.perf_counter()
        events.append(some)
        taken.append(1e3 * (time.perf_counter() - start))
    print(f"append of 200: {statistics.median(taken):.2f} ms, at most {max(taken):.0f} ms")


if __name__ == "__main__":
    main()
