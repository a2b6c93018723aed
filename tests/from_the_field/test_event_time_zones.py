"""Naive and aware datetimes that met in one store: an error, or resolved by `timezone`."""

from __future__ import annotations

import datetime
import zoneinfo
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from seqkernels.features import EventSequences

DateTime, UTC = datetime.datetime, datetime.UTC
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


NAIVE, AWARE = DateTime(2024, 6, 1, 12), DateTime(2024, 6, 1, 12, tzinfo=UTC)
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")  # 2 hours before UTC in summer

NAIVES: dict[str, Callable[[DateTime], Any]] = {
    "datetime": lambda t: [t],
    "numpy": lambda t: np.array([t], "M8[ns]"),
    "pandas": lambda t: pd.Series([pd.Timestamp(t)]),
    "pandas object": lambda t: pd.Series([pd.Timestamp(t)], dtype=object),
    "arrow": lambda t: pa.array([t], pa.timestamp("ms")),
    "arrow scalar": lambda t: pa.array([t], pa.timestamp("ms"))[0],
    "polars": lambda t: pl.Series([t]),
}
AWARES: dict[str, Callable[[DateTime], Any]] = {
    "datetime": lambda t: [t],
    "datetime elsewhere": lambda t: [t.astimezone(zoneinfo.ZoneInfo("Asia/Tokyo"))],
    "pandas": lambda t: pd.Series([pd.Timestamp(t)]),
    "pandas index": lambda t: pd.DatetimeIndex([pd.Timestamp(t)]),
    "pandas object": lambda t: pd.Series([pd.Timestamp(t)], dtype=object),
    "pandas categories": lambda t: pd.Series(pd.Categorical([pd.Timestamp(t)])),
    "pandas on arrow": lambda t: pd.Series([t], dtype=pd.ArrowDtype(pa.timestamp("us", "UTC"))),
    "arrow": lambda t: pa.array([t], pa.timestamp("ms", "Asia/Tokyo")),
    "arrow dictionary": lambda t: pa.array([t], pa.timestamp("ms", "UTC")).dictionary_encode(),
    "arrow scalar": lambda t: pa.array([t], pa.timestamp("ms", "UTC"))[0],
    "polars": lambda t: pl.Series([t]),
}


@pytest.mark.parametrize("form", AWARES)
def test_an_aware_request_to_naive_events_is_refused(form: str) -> None:
    """12:00 of an unknown zone was taken for 12:00 in UTC."""
    events = store(NAIVE)
    told = "at: expected naive datetimes, as in the first source, got aware datetimes .*timezone"
    with pytest.raises(TypeError, match=told):
        seen(events, AWARES[form](AWARE))
    if form != "arrow scalar":
        with pytest.raises(TypeError, match=told.replace("at:", "time:")):
            events.append({"user": [7], "time": AWARES[form](AWARE), "item": [1]})


@pytest.mark.parametrize("form", NAIVES)
def test_a_naive_request_to_aware_events_is_refused(form: str) -> None:
    events = store(AWARE)
    told = "at: expected aware datetimes, as in the first source, got naive datetimes .*timezone"
    with pytest.raises(TypeError, match=told):
        seen(events, NAIVES[form](NAIVE))
    if form != "arrow scalar":
        with pytest.raises(TypeError, match=told.replace("at:", "time:")):
            events.append({"user": [7], "time": NAIVES[form](NAIVE), "item": [1]})


@pytest.mark.parametrize("of_objects", [list, lambda v: pd.Series(v, dtype=object)])
def test_naive_and_aware_within_one_column_are_refused(of_objects: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"time: expected either .* in rows 2 and 0 .*timezone"):
        store(of_objects([AWARE, AWARE, NAIVE]))
    with pytest.raises(ValueError, match=r"at: expected either .* in rows 0 and 1 .*timezone"):
        store(NAIVE).batch([7, 7], at=of_objects([NAIVE, AWARE]))


def test_the_padding_of_times_passes_the_same_checks() -> None:
    for padding, error, told in [
        (DateTime(9999, 1, 1), ValueError, RANGE),
        (AWARE, TypeError, "expected naive datetimes"),
    ]:
        with pytest.raises(error, match=r"EventSequences: padding\['time'\]: " + told):
            store(NAIVE, padding={"time": padding})
    for padding in (NAIVE, np.datetime64(NAIVE, "s"), pd.Timestamp(NAIVE)):
        batch = store(NAIVE, padding={"time": padding}).batch([8], length=1)
        assert batch["time"].tolist() == [[int(np.datetime64(NAIVE, "ns").view("i8"))]]
    for padding in (np.datetime64("NaT"), pd.NaT):
        assert np.isnat(store(NAIVE, padding={"time": padding}).batch([8])["time"]).all()


@pytest.mark.parametrize("zone", ["Europe/Berlin", BERLIN], ids=["name", "tzinfo"])
@pytest.mark.parametrize("naive", sorted(NAIVES.keys() - {"arrow scalar"}))
def test_with_a_timezone_naive_and_aware_are_compared(zone: Any, naive: str) -> None:
    """An event at 12:00 in Berlin is one at 10:00 in UTC."""
    events = store(NAIVES[naive](NAIVE), timezone=zone)
    for of_aware in AWARES.values():
        assert seen(events, of_aware(AWARE.replace(hour=10))) == []
        assert seen(events, of_aware(AWARE.replace(hour=10, minute=1))) == [1]
    for of_naive in NAIVES.values():
        assert seen(events, of_naive(NAIVE)) == []
        assert seen(events, of_naive(NAIVE.replace(minute=1))) == [1]
    assert events.batch([7])["time"][0, 0] == np.datetime64("2024-06-01T10:00")


@pytest.mark.parametrize("aware", sorted(AWARES.keys() - {"arrow scalar"}))
def test_with_a_timezone_sources_may_be_of_both_kinds(aware: str) -> None:
    events = store(NAIVE, timezone="Europe/Berlin")
    events.append({"user": [7], "time": AWARES[aware](AWARE.replace(hour=9)), "item": [2]})
    assert seen(events, NAIVE) == [2]
    assert seen(events, NAIVE, datetime.timedelta(hours=1)) == []


def test_with_a_timezone_one_column_may_hold_both() -> None:
    """A naive event at 12:00 in Berlin is not in the history of 10:30 in Berlin."""
    events = store([NAIVE, AWARE.replace(hour=8), NAIVE.replace(hour=9)], timezone="Europe/Berlin")
    assert seen(events, NAIVE.replace(hour=10, minute=30)) == [2, 3]
    assert seen(events, AWARE.replace(hour=10, minute=30)) == [1, 2, 3]
    assert seen(events, [AWARE.replace(hour=8)]) == [3]


def test_numpy_s_datetimes_are_naive() -> None:
    """What a batch returns is UTC, which NumPy cannot say; the zone to name is UTC."""
    times = pd.to_datetime(["2024-06-01 10:00", "2024-06-01 11:00"], utc=True)
    back = store(times).batch([7])["time"][0, 0]
    with pytest.raises(TypeError, match="at: expected aware datetimes"):
        seen(store(times), back)
    assert seen(store(times, timezone="UTC"), back) == [1]


ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",  # half an hour of summer time
    "Pacific/Apia",  # left out a day
    "Africa/Casablanca",  # twice a year within weeks
    "Asia/Kolkata",
    "Europe/Dublin",
]


def utc_of(local: DateTime, zone: zoneinfo.ZoneInfo) -> DateTime | None:
    """By the rule of PEP 495; none if clocks show it never or twice."""
    both = {local.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1)}
    exact = {t for t in both if t.astimezone(zone).replace(tzinfo=None, fold=0) == local}
    return exact.pop() if len(exact) == 1 else None


@pytest.mark.parametrize("zone", [zoneinfo.ZoneInfo(name) for name in ZONES], ids=str)
@pytest.mark.parametrize("year", [2011, 2024])
def test_local_times_are_those_of_zoneinfo(zone: zoneinfo.ZoneInfo, year: int) -> None:
    """Each half hour of a year."""
    half_hours = np.arange(f"{year}", f"{year + 1}", np.timedelta64(30, "m"), "M8[m]")
    expected = [utc_of(local, zone) for local in half_hours.tolist()]
    lost = np.array([utc is None for utc in expected])
    if zone.key == "Europe/Berlin":
        assert lost.sum() == 4  # an hour in March, an hour in October

    local, users = half_hours[~lost], np.arange((~lost).sum())
    batch = EventSequences({"user": users, "time": local}, timezone=zone, length=1).batch(users)
    utc = np.array([t.replace(tzinfo=None) for t in expected if t], "M8[ns]")
    assert np.array_equal(batch["time"][:, 0], utc)
    for row in np.flatnonzero(lost):
        with pytest.raises(ValueError, match=f"time: .*{zone.key} show exactly once.* in row 1"):
            store(half_hours[[0, row]], timezone=zone)


@pytest.mark.parametrize(
    ("shown", "there"),
    [
        ("2024-03-31T01:59:59.999999999", True),
        ("2024-03-31T02:00", False),
        ("2024-03-31T02:59:59.999999999", False),
        ("2024-03-31T03:00", True),
        ("2024-10-27T01:59:59.999999999", True),
        ("2024-10-27T02:00", False),
        ("2024-10-27T02:59:59.999999999", False),
        ("2024-10-27T03:00", True),
    ],
)
def test_clocks_that_show_a_time_twice_or_never(shown: str, there: bool) -> None:
    """Which of the two it was is lost, and with it the order of events: an error, not a guess."""
    events = store(DateTime(2020, 1, 1), timezone="Europe/Berlin")
    at = np.datetime64(shown, "ns")
    if there:
        assert seen(events, at) == [1]
        return
    with pytest.raises(ValueError, match="at: expected a time that clocks in Europe/Berlin show"):
        seen(events, at)


@pytest.mark.parametrize(("zone", "end"), [("Asia/Tokyo", FIRST), ("America/New_York", LAST)])
def test_a_local_time_whose_utc_is_out_of_range(zone: str, end: int) -> None:
    with pytest.raises(ValueError, match="time: " + RANGE):
        store(np.array([end]).view("M8[ns]"), timezone=zone)


@pytest.mark.parametrize(
    ("zone", "times", "error", "told"),
    [
        (
            "Mars/Olympus",
            [NAIVE],
            ValueError,
            "expected a time zone that this system knows, got 'M",
        ),
        ("", [NAIVE], ValueError, "expected a time zone that this system knows, got ''"),
        (
            "Europe",
            [NAIVE],
            ValueError,
            "expected a time zone that this system knows, got 'Europe'",
        ),
        (2, [NAIVE], TypeError, "expected the name of a time zone or a tzinfo, got 2"),
        ("UTC", [5], ValueError, "expected none, as times are integers, got UTC"),
        ("UTC", [5.5], ValueError, "expected none, as times are numbers, got UTC"),
    ],
)
def test_a_bad_timezone(zone: Any, times: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"EventSequences: timezone: {told}"):
        store(times, timezone=zone)
