"""``EventSequences`` against plain Python lists, in every input format, and at every edge."""

from __future__ import annotations

import copy
import datetime
import math
import pickle
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from seqkernels.features import EventSequences


class Event(NamedTuple):
    user: int
    time: int
    action: int
    item: int


class Oracle:
    """The same by the letter of the docstring: lists, sorted by hand."""

    def __init__(self, keep_latest: int | None = None, by: tuple[str, ...] = ("action", "item")):
        self.events: list[Event] = []
        self.keep_latest, self.by = keep_latest, by

    def append(self, events: list[Event]) -> None:
        for new in events:
            self.events = [
                old
                for old in self.events
                if (old.user, old.time) != (new.user, new.time)
                or any(getattr(old, n) != getattr(new, n) for n in self.by)
            ] + [new]
        if self.keep_latest is not None:
            kept = []
            for user in {e.user for e in self.events}:
                kept += self.of(user)[-self.keep_latest :]
            self.events = [e for e in self.events if e in kept]

    def of(self, user: int) -> list[Event]:
        """In order of time, then arrival."""
        return sorted((e for e in self.events if e.user == user), key=lambda e: e.time)

    def row(self, user: int, at: int | None, length: int, window: int, order: str) -> list[Event]:
        seen = [e for e in self.of(user) if at is None or e.time < at - window][-length:]
        return seen[::-1] if order == "latest_first" else seen


def as_columns(events: list[Event]) -> dict[str, np.ndarray[Any, Any]]:
    rows = np.array(events, dtype=np.int64).reshape(-1, 4)
    return {name: rows[:, i] for i, name in enumerate(Event._fields)}


def check(
    events: EventSequences,
    oracle: Oracle,
    users: list[int],
    at: list[int] | int | None,
    length: int = 4,
    window: int = 0,
    order: str = "latest_first",
) -> None:
    moments = np.array(at, dtype=np.int64) if isinstance(at, list) else at
    batch = events.batch(users, moments, length=length, exclude_within=window, order=order)
    for b, user in enumerate(users):
        moment = at[b] if isinstance(at, list) else at
        expected = oracle.row(user, moment, length, window, order)
        assert batch.lengths[b] == len(expected)
        for name in ("time", "action", "item"):
            padded = [getattr(e, name) for e in expected] + [0] * (length - len(expected))
            assert batch[name][b].tolist() == padded, name
    assert batch.key_padding_mask.sum(1).tolist() == (length - batch.lengths).tolist()


SMALL = st.integers(0, 5)
EVENTS = st.lists(st.builds(Event, st.integers(0, 3), st.integers(-3, 9), SMALL, SMALL))


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
    sources=st.lists(EVENTS, min_size=1, max_size=6),
    keep_latest=st.sampled_from([None, None, 1, 3]),
    data=st.data(),
)
def test_it_is_what_lists_give(
    sources: list[list[Event]], keep_latest: int | None, data: st.DataObject
) -> None:
    """Out of order, duplicate, future, unknown and empty, in any number of appends."""
    oracle = Oracle(keep_latest)
    events = EventSequences(as_columns(sources[0]), keep_latest=keep_latest)
    oracle.append(sources[0])
    for source in sources[1:]:
        events.append(as_columns(source))
        oracle.append(source)
    assert len(events) == len(oracle.events)
    users = data.draw(st.lists(st.integers(0, 5), max_size=6))
    moments = data.draw(st.lists(st.integers(-5, 12), min_size=len(users), max_size=len(users)))
    window, length = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 7))
    for order in ("latest_first", "latest_last"):
        check(events, oracle, users, moments, length, window, order)
        check(events, oracle, users, None, length, 0, order)
        check(events, oracle, users, 6, length, window, order)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    sources=st.lists(EVENTS, min_size=2, max_size=8), keep_latest=st.sampled_from([None, 1, 3])
)
def test_appended_or_built_at_once_is_the_same(
    sources: list[list[Event]], keep_latest: int | None
) -> None:
    one_by_one = EventSequences(as_columns(sources[0]), keep_latest=keep_latest)
    for source in sources[1:]:
        one_by_one.append(as_columns(source))
    everything = as_columns([e for source in sources for e in source])
    together = EventSequences(everything, keep_latest=keep_latest)
    several = EventSequences(*map(as_columns, sources), keep_latest=keep_latest)
    expected = together.batch([0, 1, 2, 3], at=5, length=9)
    for other in (one_by_one, several, copy.deepcopy(several), pickle.loads(pickle.dumps(several))):
        batch = other.batch([0, 1, 2, 3], at=5, length=9)
        assert batch.lengths.tolist() == expected.lengths.tolist()
        for name in expected.columns:
            assert np.array_equal(batch[name], expected[name])


def test_deduplication_by_some_columns() -> None:
    first = as_columns([Event(1, 5, 1, 7), Event(1, 5, 2, 8)])
    by_action = EventSequences(first, deduplicate_by=["action"])
    by_action.append(as_columns([Event(1, 5, 1, 9)]))
    assert by_action.batch([1], length=3)["item"].tolist() == [[9, 8, 0]]
    by_nothing = EventSequences(first, deduplicate_by=[])
    assert len(by_nothing) == 1
    assert by_nothing.batch([1], length=2)["item"].tolist() == [[8, 0]]


def test_nan_repeats_nan() -> None:
    columns = {"user": [1, 1, 1], "time": [2, 2, 2], "x": [math.nan, 1.0, math.nan]}
    assert len(EventSequences(columns)) == 2


@pytest.mark.parametrize("keep_latest", [None, 7])
def test_many_appends_at_random(keep_latest: int | None) -> None:
    """Regions fill up, move and are laid out anew; a copy goes on from where it was taken."""
    g = np.random.default_rng(0)
    rows = np.stack(
        [g.integers(0, 30, 6000), g.integers(0, 500, 6000), *g.integers(0, 9, (2, 6000))]
    )
    events = EventSequences(as_columns([]), keep_latest=keep_latest, length=300)
    start = 0
    while start < rows.shape[1]:
        stop = start + int(g.integers(1, 40))
        events.append(dict(zip(Event._fields, rows[:, start:stop], strict=True)))
        start = stop
        if g.random() < 0.05:
            events = pickle.loads(pickle.dumps(events))
    whole = EventSequences(
        dict(zip(Event._fields, rows, strict=True)), keep_latest=keep_latest, length=300
    )
    assert len(events) == len(whole)
    for at in (None, 100, 400):
        batch, expected = events.batch(range(30), at), whole.batch(range(30), at)
        assert batch.lengths.tolist() == expected.lengths.tolist()
        for name in expected.columns:
            assert np.array_equal(batch[name], expected[name]), name


@pytest.mark.parametrize(
    ("at", "window", "seen"),
    [
        (30, 0, [20, 10]),
        (31, 0, [30, 20, 10]),
        (30, 10, [10]),
        (31, 10, [20, 10]),
        (30, 9, [20, 10]),
    ],
)
@pytest.mark.parametrize("unit", [None, "s"])
def test_the_boundary(at: int, window: int, seen: list[int], unit: str | None) -> None:
    """An event at the moment itself, or just at the window's far end, is not seen."""
    times = np.array([10, 20, 30, 40])
    columns = {"user": np.ones(4, int), "time": times, "item": times}
    if unit is None:
        batch = EventSequences(columns, length=4).batch([1], at, exclude_within=window)
    else:
        events = EventSequences(columns | {"time": times.astype("M8[s]")}, length=4)
        span = np.timedelta64(window, unit)
        batch = events.batch([1], np.datetime64(at, unit), exclude_within=span)
    assert batch["item"][0, : batch.lengths[0]].tolist() == seen


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_label_cannot_leak_into_its_own_input(window: int) -> None:
    """As of each event: nothing of its moment, nor of the window before it, is seen."""
    g = np.random.default_rng(0)
    rows = np.stack(
        [g.integers(0, 20, 3000), g.integers(0, 50, 3000), *g.integers(1, 9, (2, 3000))]
    )
    columns = dict(zip(Event._fields, rows, strict=True))
    events = EventSequences(columns, length=200)
    batch = events.batch(columns["user"], columns["time"], exclude_within=window)
    seen = np.where(batch.key_padding_mask, np.iinfo(np.int64).min, batch["time"])
    assert (seen.max(1) < columns["time"] - window).all()
    before = [
        len({tuple(r) for r in rows.T if r[0] == u and r[1] < t - window})
        for u, t in zip(columns["user"][:50], columns["time"][:50], strict=True)
    ]
    assert batch.lengths[:50].tolist() == before  # and nothing that may be seen is missing


FORMATS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "numpy": lambda c: c,
    "lists": lambda c: {name: v.tolist() for name, v in c.items()},
    "pandas": pd.DataFrame,
    "pandas nullable": lambda c: pd.DataFrame(c).convert_dtypes(),
    "arrow table": pa.table,
    "arrow batch": lambda c: pa.RecordBatch.from_pydict(c),
    "arrow chunks": lambda c: pa.concat_tables([pa.table(c).slice(0, 3), pa.table(c).slice(3)]),
}


@pytest.mark.parametrize("users", ["integers", "strings"])
@pytest.mark.parametrize(
    ("form", "times"),
    [
        (form, times)
        for form in FORMATS
        for times in ("int64", "float64", "datetime64[ns]", "datetime64[s]")
        if form != "lists" or not times.startswith("datetime")  # a list of integers has no unit
    ],
)
def test_formats(form: str, times: str, users: str) -> None:
    user = np.array([10**15, 3, 3, -4, 3, 10**15])
    columns = {
        "user": user if users == "integers" else np.char.add("u", user.astype(str)),
        "time": np.array([100, 300, 200, 50, 400, 90]).astype(times),
        "item": np.array([1, 2, 3, 4, 5, 6]),
        "price": np.array([0.5, 1.5, 2.5, np.nan, 4.5, 5.5], dtype=np.float32),
    }
    events = EventSequences(FORMATS[form](columns), length=3)
    at = np.array(350).astype(times) if times.startswith("datetime") else 350
    asked = ["u3", f"u{10**15}", "u8"] if users == "strings" else [3, 10**15, 8]
    batch = events.batch(asked, at=at)
    assert batch["item"].tolist() == [[2, 3, 0], [1, 6, 0], [0, 0, 0]]
    assert batch["price"].tolist() == [[1.5, 2.5, 0.0], [0.5, 5.5, 0.0], [0.0, 0.0, 0.0]]
    assert batch.lengths.tolist() == [2, 2, 0]
    if times.startswith("datetime"):
        assert batch["time"].dtype == "datetime64[ns]"
    tensors, lengths = batch.tensors()
    assert tensors["item"].tolist() == batch["item"].tolist()
    assert lengths.dtype == torch.int64


def test_time_zones_and_timedeltas() -> None:
    utc = pd.to_datetime(["2026-01-01 12:00", "2026-01-01 13:00"], utc=True)
    frame = pd.DataFrame({"user": [1, 1], "time": utc.tz_convert("Asia/Tokyo"), "item": [1, 2]})
    events = EventSequences(frame, length=2)
    at = datetime.datetime(2026, 1, 1, 13, 30, tzinfo=datetime.UTC)
    assert events.batch([1], at).lengths.tolist() == [2]
    for span in (datetime.timedelta(hours=1), pd.Timedelta("1h"), np.timedelta64(1, "h")):
        assert events.batch([1], at, exclude_within=span)["item"].tolist() == [[1, 0]]
    assert events.batch([1], at, exclude_within=0).lengths.tolist() == [2]
    with pytest.raises(TypeError, match="exclude_within: expected a timedelta"):
        events.batch([1], at, exclude_within=3600)
    # 2**64 ns and a little is not a little
    for span in (datetime.timedelta(days=213_504), np.timedelta64(213_504, "D")):
        with pytest.raises(ValueError, match="exclude_within: expected from 0 to 292 years"):
            events.batch([1], at, exclude_within=span)


def test_a_window_before_all_time() -> None:
    """at - exclude_within is below what 64 bits hold: nothing is seen, and nothing wraps around."""
    events = EventSequences({"user": [1], "time": [-(2**62)], "item": [5]})
    assert events.batch([1], at=-(2**62) - 2, exclude_within=2**63 - 1).lengths.tolist() == [0]


@pytest.mark.parametrize(
    "users",
    [
        np.array([2**63 + 5, 1], dtype=np.uint64),
        [2**63 + 5, 1],
        np.array(["a", "b"], dtype=object),
        pd.Categorical(["a", "b"]),
        pd.Series(["a", "b"], dtype="string[pyarrow]"),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array([7, 8], pa.uint8()),
    ],
    ids=lambda users: f"{type(users).__module__}.{getattr(users, 'dtype', '')}",
)
def test_kinds_of_ids(users: Any) -> None:
    users = pd.Series(users) if isinstance(users, pd.Categorical) else users
    events = EventSequences({"user": users, "time": [1, 2], "item": [3, 4]}, length=1)
    as_list = users if isinstance(users, list) else np.asarray(users).tolist()
    for asked in (users, as_list, as_list[:1]):
        assert events.batch(asked)["item"].tolist() == [[3], [4]][: len(asked)]


def test_further_columns() -> None:
    """Booleans, small integers and arrow's lists keep their types."""
    vectors = pa.array([[1, 2], [3, 4]], pa.list_(pa.int16(), 2))
    table = pa.table({"user": [1, 1], "time": [1, 2], "seen": [True, False], "vector": vectors})
    batch = EventSequences(pa.concat_tables([table.slice(1), table]), length=3).batch([1])
    assert batch["seen"].tolist() == [[False, True, False]]
    assert batch["vector"].tolist() == [[[3, 4], [1, 2], [0, 0]]]
    assert (batch["seen"].dtype, batch["vector"].dtype) == (np.bool_, np.int16)
    assert batch.tensors()[0]["seen"].dtype == torch.bool


def test_wide_columns_and_padding() -> None:
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    columns = {"user": [1, 1, 2], "time": [1, 2, 3], "item": [5, 6, 7], "vector": vectors}
    events = EventSequences(columns, length=2, padding={"item": -1, "vector": 9})
    batch = events.batch([2, 1], order="latest_last")
    assert batch["item"].tolist() == [[7, -1], [5, 6]]
    assert batch["vector"].tolist() == [[[4, 5], [9, 9]], [[0, 1], [2, 3]]]
    assert batch.tensors()[0]["vector"].shape == (2, 2, 2)


def test_nothing_at_all() -> None:
    events = EventSequences(as_columns([]), length=3)
    assert len(events) == events.num_users == 0
    batch = events.batch([1, 2], at=5)
    assert batch.lengths.tolist() == [0, 0]
    assert batch["item"].shape == (2, 3)
    assert events.batch([]).lengths.shape == (0,)
    assert events.batch(np.array([])).lengths.shape == (0,)
    for nothing in ({n: [] for n in Event._fields}, pd.DataFrame(columns=list(Event._fields))):
        events.append(nothing)  # without rows there is no type to refuse
    events.append(as_columns([Event(1, 2, 3, 4)]))
    assert events.batch([1])["item"].tolist() == [[4, 0, 0]]


def test_an_append_with_an_error_changes_nothing() -> None:
    events = EventSequences(as_columns([Event(1, 2, 3, 4)]))
    with pytest.raises(TypeError):
        events.append({"user": [1], "time": [9], "action": [1], "item": [1.5]})
    assert len(events) == 1


def test_threads() -> None:
    events = EventSequences(as_columns([]), length=10)
    errors: list[BaseException] = []

    def write(user: int) -> None:
        try:
            for t in range(200):
                events.append(as_columns([Event(user, t, t, user)]))
                batch = events.batch([user], at=t + 1)
                assert batch["action"][0, 0] == t
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(u,)) for u in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(events) == 800


@pytest.mark.timing
def test_speed() -> None:
    """A million events, and requests: bounds far above what it takes, far below a Python loop."""
    g = np.random.default_rng(0)
    count = 1_000_000
    columns = {
        "user": g.integers(0, 20_000, count),
        "time": g.integers(0, 10**9, count),
        "action": g.integers(1, 5, count),
        "item": g.integers(1, 10**6, count),
    }
    start = time.perf_counter()
    events = EventSequences(columns)
    assert time.perf_counter() - start < 10

    def median(call: Callable[[], object]) -> float:
        taken = []
        for _ in range(30):
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    users = g.integers(0, 20_000, 256)
    assert median(lambda: events.batch(users, at=10**9)) < 0.02
    now = iter(range(10**9, 2 * 10**9))
    one = {"user": [5], "action": [1], "item": [1]}
    assert median(lambda: events.append(one | {"time": [next(now)]})) < 0.01


GOOD = {"user": [1, 2], "time": [1, 2], "item": [3, 4]}


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: EventSequences(), TypeError, "sources: expected at least one, got none"),
        (lambda: EventSequences([1]), TypeError, "sources: expected a mapping"),
        (lambda: EventSequences({"user": [1], "item": [1]}), ValueError, "time: expected a column"),
        (lambda: EventSequences(GOOD, columns=["x"]), ValueError, "x: expected a column of this"),
        (lambda: EventSequences(GOOD | {"item": [1]}), ValueError, "item: expected 2 rows, as in"),
        (lambda: EventSequences(GOOD | {"item": ["a", "b"]}), TypeError, "item: expected numbers"),
        (lambda: EventSequences(GOOD | {"user": [1.0, 2.0]}), TypeError, "user: expected integers"),
        (lambda: EventSequences(GOOD | {"user": [1, "b"]}), TypeError, "user: expected integers"),
        (lambda: EventSequences(GOOD | {"user": ["a", None]}), TypeError, "got None in row 1"),
        (lambda: EventSequences(GOOD | {"time": [1.0, math.nan]}), ValueError, "got nan in row 1"),
        (lambda: EventSequences(GOOD | {"time": ["a", "b"]}), TypeError, "time: expected integers"),
        (
            lambda: EventSequences(GOOD | {"time": np.array(["2026", "NaT"], "M8[ns]")}),
            ValueError,
            "time: expected a time, got NaT in row 1",
        ),
        (
            lambda: EventSequences(GOOD | {"time": [datetime.datetime(2026, 1, 1), None]}),
            ValueError,
            "time: expected no null, got None in row 1",
        ),
        (
            lambda: EventSequences(GOOD | {"time": np.array(["2026", "3000"], "M8[D]")}),
            ValueError,
            "time: expected a time from 1677-09-21 to 2262-04-11 (64 bits of nanoseconds), got 3",
        ),
        (
            lambda: EventSequences(GOOD | {"x": [[1, 2], [1]]}),
            ValueError,
            "x: expected rows of one",
        ),
        (
            lambda: EventSequences(pa.table(GOOD | {"item": [1, None]})),
            ValueError,
            "item: expected no null, got one in row 1",
        ),
        (
            lambda: EventSequences(pd.DataFrame(GOOD | {"item": pd.array([1, None], "Int64")})),
            ValueError,
            "item: expected no null, got one in row 1",
        ),
        (
            lambda: EventSequences(
                pa.table(GOOD | {"x": pa.array([[1, 2], [3, None]], pa.list_(pa.int64(), 2))})
            ),
            ValueError,
            "x: expected no null, got one in row 1",
        ),
        (
            lambda: EventSequences(
                pd.DataFrame([[1, 1, 1, 1]], columns=["user", "time", "x", "x"])
            ),
            ValueError,
            "columns: expected each name once",
        ),
        (lambda: EventSequences(GOOD, time="user"), ValueError, "time: expected another column"),
        (lambda: EventSequences(GOOD, columns=["time"]), ValueError, "columns: expected further"),
        (lambda: EventSequences(GOOD, columns="item"), TypeError, "columns: expected a sequence"),
        (lambda: EventSequences(GOOD, length=0), ValueError, "length: expected at least 1, got 0"),
        (lambda: EventSequences(GOOD, keep_latest=True), TypeError, "keep_latest: expected an int"),
        (
            lambda: EventSequences(GOOD, deduplicate_by=["x"]),
            ValueError,
            "deduplicate_by: expected",
        ),
        (lambda: EventSequences(GOOD, padding={"x": 1}), ValueError, "padding: expected some of"),
        (lambda: EventSequences(GOOD, padding={"item": "a"}), TypeError, "padding['item']"),
        (lambda: EventSequences(GOOD, padding=1), TypeError, "padding: expected a mapping"),
        (lambda: EventSequences(GOOD, columns=1), TypeError, "columns: expected a sequence"),
        (
            lambda: EventSequences(GOOD | {"x": np.float32([1, 2])}).append(
                GOOD | {"x": [1, 1e300]}
            ),
            ValueError,
            "x: expected to fit float32, got 1e+300 in row 1",
        ),
        (
            lambda: EventSequences(GOOD | {"item": np.int8([1, 2])}).append(
                GOOD | {"item": [1, 128]}
            ),
            ValueError,
            "item: expected integers from -128 to 127 (to fit int8), got 128 in row 1",
        ),
        (lambda: EventSequences(GOOD).batch(1), ValueError, "users: expected shape [n], got []"),
        (lambda: EventSequences(GOOD).append({"user": [1]}), ValueError, "time: expected a column"),
        (
            lambda: EventSequences(GOOD).append(GOOD | {"user": ["a", "b"]}),
            TypeError,
            "user: expected integers, as in the first source, got strings",
        ),
        (
            lambda: EventSequences(GOOD).append(GOOD | {"time": [1.5, 2.5]}),
            TypeError,
            "time: expected integers, as in the first source, got numbers",
        ),
        (lambda: EventSequences(GOOD).batch(["a"]), TypeError, "users: expected integers"),
        (
            lambda: EventSequences(GOOD).batch([1], at=[1, 2]),
            ValueError,
            "at: expected one time or",
        ),
        (lambda: EventSequences(GOOD).batch([1], at="now"), TypeError, "at: expected integers"),
        (
            lambda: EventSequences(GOOD).batch([1], length=0),
            ValueError,
            "length: expected at least",
        ),
        (
            lambda: EventSequences(GOOD).batch([1], at=5, exclude_within=-1),
            ValueError,
            "exclude_within: expected at least 0",
        ),
        (
            lambda: EventSequences(GOOD).batch([1], exclude_within=1),
            ValueError,
            "exclude_within: expected 0 without `at`",
        ),
        (lambda: EventSequences(GOOD).batch([1], order="x"), ValueError, "order: expected 'latest"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], told: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith("EventSequences: ")
    assert told in str(caught.value)
