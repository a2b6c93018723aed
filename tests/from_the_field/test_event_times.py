"""Times that stores were given: out of range, rounded, exactly at the distance."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from seqkernels.features import EventSequences

DateTime, UTC = datetime.datetime, datetime.UTC
EPOCH = DateTime(1970, 1, 1)
RANGE = r"expected a time from 1677-09-21 to 2262-04-11 \(64 bits of nanoseconds\), got "
FIRST, LAST = -(2**63) + 1, 2**63 - 1  # nanoseconds; one less is NaT


def store(*times: Any, **options: Any) -> EventSequences:
    """Events 1, 2, ... of user 7 at times given one by one, or as one column."""
    column = times[0] if len(times) == 1 and hasattr(times[0], "__len__") else list(times)
    count = len(column)
    events = {"user": [7] * count, "time": column, "item": list(range(1, count + 1))}
    return EventSequences(events, length=4, **options)


def seen(events: EventSequences, at: Any, exclude_within: Any = 0) -> list[int]:
    batch = events.batch([7], at, exclude_within=exclude_within)
    return sorted(batch["item"][0, : batch.lengths[0]].tolist())


CARRIERS: dict[str, Callable[[DateTime], Any]] = {
    "a list": lambda t: [t],
    "an array of objects": lambda t: np.array([t], dtype=object),
    "a pandas column of objects": lambda t: pd.Series([t], dtype=object),
    "a pandas column of microseconds": lambda t: pd.Series(np.array([t], "M8[us]")),
    "a list of pandas timestamps": lambda t: [pd.Timestamp(t)],
    "a list of datetime64": lambda t: [np.datetime64(t, "s")],
    "a list of datetime64 of two units": lambda t: [np.datetime64(t, "s"), np.datetime64(0, "ns")],
    "a list of datetimes and datetime64": lambda t: [t, np.datetime64(0, "ns")],
    "a list of dates": lambda t: [t.date()],
    "years": lambda t: np.array([t], "M8[Y]"),
    "months": lambda t: np.array([t], "M8[M]"),
    "weeks": lambda t: np.array([t], "M8[W]"),
    "days": lambda t: np.array([t], "M8[D]"),
    "milliseconds": lambda t: np.array([t], "M8[ms]"),
    "blocks of 25 s": lambda t: np.array([t], "M8[s]").astype("M8[25s]"),
    "big-endian microseconds": lambda t: np.array([t], "M8[us]").astype(">M8[us]"),
    "an arrow column": lambda t: pa.array([t], pa.timestamp("us")),
    "an arrow column of seconds": lambda t: pa.array([t], pa.timestamp("s")),
    "an arrow column of dates": lambda t: pa.array([t.date()]),
    "a polars column": lambda t: pl.Series([t]),
}


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("year", [1, 1600, 2300, 9999])
def test_a_datetime_out_of_range_is_refused_in_every_form(carrier: str, year: int) -> None:
    """Times wrapped around: an event of the year 9999 was in the history of 2024."""
    times = CARRIERS[carrier](DateTime(year, 1, 1))
    with pytest.raises(ValueError, match="EventSequences: time: " + RANGE + ".* in row 0$"):
        store(times)
    events = store(DateTime(2024, 1, 1))
    with pytest.raises(ValueError, match="EventSequences: at: " + RANGE):
        events.batch([7] * len(times), at=times)


@pytest.mark.parametrize(
    "at",
    [
        DateTime.max,
        DateTime.min,
        datetime.date.max,
        pd.Timestamp(DateTime.max),
        np.datetime64("9999", "Y"),
        np.datetime64("9999-01-01", "us"),
        np.array(10**15).view("M8[Y]"),
        np.array(-(10**15)).view("M8[M]"),
        pa.scalar(DateTime.max, pa.timestamp("us")),
    ],
    ids=lambda at: f"{type(at).__module__}.{at}",
)
def test_a_request_at_the_end_of_all_time_is_refused(at: Any) -> None:
    """`batch([1], at=datetime.max)` returned empty histories."""
    with pytest.raises(ValueError, match="EventSequences: at: " + RANGE) as caught:
        seen(store(DateTime(2024, 1, 1)), at)
    assert "row" not in str(caught.value)


@pytest.mark.parametrize("end", [DateTime.max, DateTime.min])
@pytest.mark.parametrize("hours", [-14, 14])
def test_an_aware_datetime_whose_utc_python_cannot_hold(end: DateTime, hours: int) -> None:
    aware = end.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=hours)))
    with pytest.raises(ValueError, match="EventSequences: at: " + RANGE):
        seen(store(DateTime(2024, 1, 1, tzinfo=UTC)), aware)


@pytest.mark.parametrize("unit", ["ns", "us", "ms", "s", "m", "h", "D", "W", "M", "Y", "25s"])
def test_the_first_and_the_last_tick_of_each_unit(unit: str) -> None:
    """What 64 bits of nanoseconds hold is accepted, and the tick after it is refused."""
    if unit in ("Y", "M"):
        inside = np.array(
            ["1678", "2262"] if unit == "Y" else ["1677-10", "2262-04"], f"M8[{unit}]"
        )
        expected = inside.astype("M8[ns]").view("i8").tolist()
    else:
        tick = int(np.array(1, f"m8[{unit}]").astype("m8[ns]").view("i8"))
        inside = np.array([-(LAST // tick), LAST // tick]).view(f"M8[{unit}]")
        expected = [-(LAST // tick) * tick, LAST // tick * tick]
    batch = store(inside).batch([7], order="latest_last", length=2)
    assert batch["time"].view("i8").tolist() == [expected]
    for outside in (inside[:1] - 1, inside[1:] + 1):
        with pytest.raises(
            ValueError, match="time: " + (RANGE if unit != "ns" else "expected a time")
        ):
            store(outside)


@pytest.mark.parametrize("unit", ["ps", "fs", "as"])
def test_units_that_numpy_has_wrapped_around_itself(unit: str) -> None:
    """Picoseconds end in April 1970: NumPy makes something else of 2024, and no error."""
    with pytest.raises(
        TypeError, match=f"at: expected .* nanoseconds to years, got datetime64.{unit}"
    ):
        seen(store(DateTime(2024, 1, 1)), np.datetime64("2024-01-02", unit))


MOMENTS = st.datetimes(DateTime(1600, 1, 1), DateTime(2400, 1, 1))


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
    times=st.lists(MOMENTS, min_size=1, max_size=6),
    at=MOMENTS,
    window=st.timedeltas(datetime.timedelta(), datetime.timedelta(days=100_000)),
    carrier=st.sampled_from(
        [
            list,
            lambda ts: np.array(ts, "M8[us]"),
            lambda ts: np.array(ts, dtype=object),
            lambda ts: [pd.Timestamp(t) for t in ts],
            lambda ts: [np.datetime64(t, "us") if i % 2 else t for i, t in enumerate(ts)],
            lambda ts: pa.array(ts, pa.timestamp("us")),
            lambda ts: pl.Series(ts),
        ]
    ),
)
def test_histories_are_those_of_python_s_datetimes(
    times: list[DateTime], at: DateTime, window: datetime.timedelta, carrier: Callable[..., Any]
) -> None:
    def nanoseconds(t: DateTime) -> int:
        return (t - EPOCH) // datetime.timedelta(microseconds=1) * 1000

    if any(not FIRST <= nanoseconds(t) <= LAST for t in (*times, at)):
        with pytest.raises(ValueError, match=RANGE):
            seen(store(carrier(times)), at)
        return
    bound = nanoseconds(at) - window // datetime.timedelta(microseconds=1) * 1000
    before = sorted(nanoseconds(t) for t in set(times) if nanoseconds(t) < bound)
    unique = {t: i + 1 for i, t in enumerate(times)}  # the last copy; items tell all apart
    events = EventSequences(
        {"user": [7] * len(times), "time": carrier(times), "item": list(range(1, len(times) + 1))},
        length=8,
        deduplicate_by=[],
    )
    batch = events.batch([7], at, exclude_within=window, order="latest_last")
    assert batch["time"].view("i8")[0, : batch.lengths[0]].tolist() == before
    expected = [unique[t] for t in sorted(unique) if nanoseconds(t) < bound]
    assert batch["item"][0, : batch.lengths[0]].tolist() == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
def test_floats_that_lose_the_order_of_seconds_are_refused(dtype: Any) -> None:
    """float32 rounds seconds since 1970 to multiples of 128."""
    with np.errstate(over="ignore"):
        times = np.array([1_700_000_000, 1_700_000_001], dtype=dtype)
    told = f": expected floats of 64 bits .*got {times.dtype}"
    with pytest.raises(TypeError, match="EventSequences: time" + told):
        store(times)
    with pytest.raises(TypeError, match="EventSequences: at" + told):
        store(1.0, 2.0).batch([7, 7], at=times)
    with pytest.raises(
        TypeError, match="exclude_within: expected an integer or a float of 64 bits"
    ):
        seen(store(1.0, 2.0), 5.0, dtype(0.1))
    if dtype != np.longdouble:
        frame = pd.DataFrame({"user": [7], "time": times[:1]})
        for form in (
            frame,
            pa.table(frame),
            pl.from_pandas(frame) if dtype == np.float32 else frame,
        ):
            with pytest.raises(TypeError, match="EventSequences: time" + told):
                EventSequences(form)


@pytest.mark.parametrize("values", [[2**53 + 1, 0.5], [2**63 + 1, -1], (1.5, 2**60 + 1)])
def test_integers_in_a_list_that_numpy_reads_as_floats(values: list[Any]) -> None:
    """NumPy rounds them to floats without a word."""
    row = int(isinstance(values, tuple))
    with pytest.raises(ValueError, match=f"time: expected integers that fit float64.*in row {row}"):
        store(values)
    with pytest.raises(ValueError, match=f"x: expected integers that fit float64.*in row {row}"):
        EventSequences({"user": [1, 1], "time": [1, 2], "x": values})
    with pytest.raises(ValueError, match=r"x: expected integers that fit float64.*in row 1"):
        EventSequences({"user": [1, 1], "time": [1, 2], "x": [[0, 1], values]})
    assert seen(store([2**53, 0.5]), 1.0) == [2]


DECIMALS = st.decimals(0, 2 * 10**9, places=3, allow_nan=False, allow_infinity=False)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(at=DECIMALS, span=st.decimals("0.001", 10**5, places=3))
@hypothesis.example(at=10.3, span=0.1)
def test_a_decimal_exactly_at_the_distance_is_not_seen(at: Any, span: Any) -> None:
    """10.3 - 0.1 is 10.200000000000001 in floats, and so an event at 10.2 was seen."""
    at, span = Fraction(str(at)), Fraction(str(span))
    tick = Fraction(1, 1000)
    times = [float(at - span + k * tick) for k in (-1, 0, 1)]
    assert seen(store(times), float(at), float(span)) == [1]


FLOATS = st.floats(-1e12, 1e12)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(time=FLOATS, at=FLOATS, span=st.floats(2.0**-20, 1e9))
def test_a_float_at_the_distance_however_computed_is_not_seen(
    time: float, at: float, span: float
) -> None:
    assert seen(store(time), time + span, span) == []
    assert seen(store(at - span), at, span) == []
    if 0 <= at - time <= 2**62:
        assert seen(store(time), at, at - time) == []


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
    at=FLOATS,
    span=st.one_of(st.floats(0, 1e9), st.integers(0, 10**9), st.sampled_from([0.1, 0.25, 2])),
    steps=st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
)
def test_only_earlier_floats_are_seen_and_no_earlier_one_is_missing(
    at: float, span: float, steps: list[int]
) -> None:
    """Against exact fractions: never one too late; none missing that rounding can tell apart."""
    distance = Fraction(at) - Fraction(span)
    unit = math.ulp(max(abs(at), abs(float(distance)), span))
    near = float(distance)
    times = [near + step * math.ulp(near) / 2 for step in steps]
    found = {times[item - 1] for item in seen_all(times, at, span)}
    assert all(Fraction(t) < distance for t in found)
    if span == 0:
        assert found == {t for t in times if t < at}
    assert found >= {t for t in times if Fraction(t) < distance - 2 * Fraction(unit)}


def seen_all(times: list[float], at: float, span: float) -> list[int]:
    events = {"user": [7] * len(times), "time": times, "item": list(range(1, len(times) + 1))}
    batch = EventSequences(events, length=50).batch([7], at, exclude_within=span)
    return batch["item"][0, : batch.lengths[0]].tolist()


@pytest.mark.parametrize("at", [1e9 + 0.5, 2.0, -3.0, 2.0**50])
def test_the_float_just_before_the_distance_is_seen(at: float) -> None:
    distance = at - 0.25
    assert seen(store(math.nextafter(distance, -math.inf), distance), at, 0.25) == [1]


def test_many_events_at_the_distance() -> None:
    """All of them, at one time or some roundings apart; and in each row of a batch by itself."""
    times = np.repeat(np.array([10.1, np.nextafter(10.2, 0), 10.2, np.nextafter(10.2, 11)]), 50)
    columns = {"user": np.arange(200) % 2, "time": times, "item": np.arange(200)}
    events = EventSequences(columns, length=200)
    batch = events.batch([0, 1, 0, 5, 1], at=[10.3, 10.3, 10.4, 10.3, 10.2], exclude_within=0.1)
    assert batch.lengths.tolist() == [50, 50, 100, 0, 0]


def test_the_ends_of_floats() -> None:
    most = 1.7976931348623157e308
    events = store(-most, 5e-324, most)
    assert seen(events, most, 1.0) == [1, 2]
    assert seen(events, -most, 2.0**62) == []
    assert seen(events, 5e-324, 5e-324) == [1]


@pytest.mark.parametrize("span", [2**53 + 1, 2**63, math.inf, math.nan, -0.5])
def test_a_span_that_floats_cannot_hold(span: Any) -> None:
    with pytest.raises(ValueError, match="EventSequences: exclude_within: expected"):
        seen(store(1.0), 2.0, span)


WIDE = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), -(2**63) + 9))


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    times=st.lists(WIDE, min_size=1, max_size=4, unique=True),
    at=WIDE,
    span=st.integers(0, 2**63 - 1),
)
def test_integers_at_the_ends_of_64_bits(times: list[int], at: int, span: int) -> None:
    expected = [i + 1 for i, t in enumerate(times) if t < at - span]
    assert seen(store(np.array(times)), np.int64(at), span) == expected


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(at=st.integers(FIRST, LAST), span=st.integers(0, LAST))
def test_datetimes_at_the_ends_of_64_bits(at: int, span: int) -> None:
    times = [FIRST, 0, LAST]
    expected = [i + 1 for i, t in enumerate(times) if t < at - span]
    moment, window = np.array(at).view("M8[ns]"), np.array(span).view("m8[ns]")[()]
    assert seen(store(np.array(times).view("M8[ns]")), moment, window) == expected


def test_a_request_for_nobody_at_no_time() -> None:
    """An empty list has no type that could be wrong."""
    for events in (store(1, 2), store(1.5), store(DateTime(2024, 1, 1))):
        assert events.batch([], at=[]).lengths.tolist() == []
        with pytest.raises(ValueError, match=r"at: expected one time or 1, got shape \[0\]"):
            events.batch([7], at=[])
