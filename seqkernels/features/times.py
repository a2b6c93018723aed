"""Times as users hold them become int64 or float64 in the same order, or an error.

Datetimes of every origin (NumPy's of any unit, pandas', pyarrow's, Python's; scalars, lists,
columns of objects) pass through `_nanoseconds`, the only place that converts them and checks that
they are in range.
"""

from __future__ import annotations

import datetime
import zoneinfo
from collections.abc import Iterator, Sequence
from decimal import Context, Decimal
from typing import Any

import numpy as np

from seqkernels.features import columns as read
from seqkernels.features.ragged import Array, Rows, first_not_before

INTEGERS, NUMBERS, NAIVE, AWARE = "integers", "numbers", "naive datetimes", "aware datetimes"
DATETIMES = (NAIVE, AWARE)

_MOST = 2**63 - 1
_RANGE = "a time from 1677-09-21 to 2262-04-11 (64 bits of nanoseconds)"
# Nanoseconds in a unit. Finer units are refused: they reach only months from 1970, beyond which
# NumPy has wrapped around before we see them.
_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_UNITS |= {"m": 60 * 10**9, "h": 3_600 * 10**9, "D": 86_400 * 10**9, "W": 604_800 * 10**9}
_DAY = 86_400  # seconds
_EXACTLY = Context(prec=1000)  # sums of floats need 650 digits at most


def read_times(values: Any, zone: datetime.tzinfo | None, where: str) -> tuple[Array, str]:
    """Times [...] as finite int64 or float64, and what they are.

    Returns
    -------
    array, str
        ``INTEGERS`` (int64), ``NUMBERS`` (float64), ``AWARE`` (int64, nanoseconds from 1970 in
        UTC) or ``NAIVE`` (int64, nanoseconds from 1970 by a clock of unknown zone). With `zone`
        naive times are local times there, and become aware.
    """
    values = read.known(values, where)
    array = read.to_numpy(values, where)
    kind = array.dtype.kind
    if kind in "iu":
        return read.conform(array, np.dtype(np.int64), where), INTEGERS
    if kind == "f":
        if array.dtype != np.float64:
            raise TypeError(
                f"{where}: expected floats of 64 bits (in 32, seconds since 1970 are rounded to "
                f"multiples of 128), got {array.dtype}"
            )
        read.check_integers_are_exact(values, array, where)
        read.check_rows(np.isfinite(array), array, "a finite time", where)
        return array, NUMBERS
    if kind == "M" and isinstance(values, Sequence):
        # np.asarray converted them to one unit, which may have wrapped around
        array = np.array(values, dtype=object)
    if array.dtype.kind == "O":
        times, aware = _from_objects(array, where)
    elif kind == "M":
        times, aware = _nanoseconds(array, where), np.array(_has_zone(values))
    else:
        raise _foreign(array, where)
    if not aware.any():
        return (times, NAIVE) if zone is None else (_to_utc(times, zone, where), AWARE)
    if not aware.all():
        naive = np.flatnonzero(~aware)
        if zone is None:
            raise ValueError(
                f"{where}: expected either naive or aware datetimes, got both, in rows {naive[0]} "
                f"and {aware.argmax()} (`timezone` says where naive ones are local)"
            )
        times.flat[naive] = _to_utc(times.flat[naive], zone, where, naive.tolist())
    return times, AWARE


def read_span(value: Any, kind: str, where: str) -> int | float:
    """A length of time, at least 0, in the unit of times of this kind."""
    if kind in DATETIMES:
        if hasattr(value, "to_timedelta64"):  # pandas: has nanoseconds
            value = value.to_timedelta64()
        # In Python's integers: NumPy would wrap a long span around to a short one.
        if isinstance(value, datetime.timedelta):
            span = value // datetime.timedelta(microseconds=1) * 1000
        elif isinstance(value, np.timedelta64) and (tick := _tick(value.dtype)):
            span = int(value.astype(np.int64)) * tick  # NaT is negative
        elif isinstance(value, int) and value == 0:
            span = 0
        else:
            raise TypeError(f"{where}: expected a timedelta, as times are datetimes, got {value!r}")
        if not 0 <= span <= _MOST:
            raise ValueError(f"{where}: expected from 0 to 292 years, got {value}")
        return span
    allowed = (int, np.integer) if kind == INTEGERS else (int, np.integer, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        expected = "an integer" if kind == INTEGERS else "an integer or a float of 64 bits"
        raise TypeError(f"{where}: expected {expected}, as times are {kind}, got {value!r}")
    if not 0 <= value <= _MOST:
        raise ValueError(f"{where}: expected at least 0 and less than 2**63, got {value}")
    if kind == NUMBERS and not isinstance(value, float) and float(value) != int(value):
        raise ValueError(f"{where}: expected an integer that fits float64, got {value}")
    return float(value) if kind == NUMBERS else int(value)


def read_zone(zone: Any, where: str) -> datetime.tzinfo | None:
    """The zone of a name, or as it is given."""
    if zone is None or isinstance(zone, datetime.tzinfo):
        return zone
    if not isinstance(zone, str):
        raise TypeError(f"{where}: expected the name of a time zone or a tzinfo, got {zone!r}")
    try:
        return zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):  # OSError: the name of a folder
        raise ValueError(
            f"{where}: expected a time zone that this system knows, got {zone!r}"
        ) from None


def rows_before(time: Array, first: Rows, last: Rows, at: Array, span: int | float) -> Rows:
    """Binary search in runs: the first row with ``time >= at - span``, or last.

    With floats, an event that rounding cannot tell from one exactly at the distance counts as at
    the distance: it is not before, see `_is_before`.

    Parameters
    ----------
    time : array
        int64 or float64, sorted within each run.
    first, last, at : arrays [R]
        The runs; one moment for each, of the dtype of `time`.
    span : number
        At least 0.

    Returns
    -------
    int64 array [R]

    Examples
    --------
    >>> time, runs = np.array([10.1, 10.2]), (np.array([0]), np.array([2]))
    >>> float(10.3 - 0.1), rows_before(time, *runs, np.array([10.3]), 0.1).tolist()
    (10.200000000000001, [1])
    """
    bound: Array = at - np.array(span, dtype=at.dtype)
    if time.dtype.kind == "i":
        bound[bound > at] = np.iinfo(np.int64).min  # wrapped around
        return first_not_before(time, first, last, bound)
    last = first_not_before(time, first, last, bound)
    if not span:
        return last
    # The readings differ by a few roundings of the largest number. Events so close to the bound are
    # rare; they are looked at one by one, from the latest back to the first that is before.
    with np.errstate(over="ignore"):
        close_to = bound - 8 * np.spacing(np.maximum(np.abs(at), span))
        close = np.flatnonzero((time.take(last - 1, mode="clip") >= close_to) & (first < last))
        last = last.copy()
        while len(close):
            latest = time[last[close] - 1]
            hidden = ~_is_before(latest, at[close], float(span))
            close, latest = close[hidden], latest[hidden]
            last[close] = first_not_before(time, first[close], last[close], latest)
            close = close[first[close] < last[close]]
    return last


def _is_before(time: Array, at: Array, span: float) -> Array:
    """Whether ``time < at - span`` also holds in decimals, and if computed in another order.

    10.2 is exactly 0.1 before 10.3, but not so as floats; and if `at` was computed as the time plus
    the span, or the span as the difference of the two, that sum was rounded.
    """
    decimals = [
        _EXACTLY.add(Decimal(repr(t)), Decimal(repr(span))) < Decimal(repr(moment))
        for t, moment in zip(time.tolist(), at.tolist(), strict=True)
    ]
    return np.array(decimals) & (time + span < at) & (at - time > span)


def _from_objects(array: Array, where: str) -> tuple[Array, Array]:
    """Datetimes of any types and units: nanoseconds, and whether aware."""
    items = array.ravel().tolist()
    types = set(map(type, items))
    # pandas' NaT is a datetime too.
    datetimes = {t for t in types if issubclass(t, datetime.date | np.datetime64)}
    if not types or types != datetimes or any(t.__name__ == "NaTType" for t in types):
        read.refuse_nulls(array, where)
        raise _foreign(array, where)
    parts = list(_by_unit(items))
    if len(parts) == 1:
        ((_, moments, aware),) = parts
        return _nanoseconds(moments.reshape(array.shape), where), aware.reshape(array.shape)
    times, aware = np.empty(len(items), dtype=np.int64), np.empty(len(items), dtype=bool)
    for rows, moments, part in parts:
        times[rows], aware[rows] = _nanoseconds(moments, where, rows), part
    return times.reshape(array.shape), aware.reshape(array.shape)


def _by_unit(items: list[Any]) -> Iterator[tuple[list[int], Array, Array]]:
    """Rows, datetime64 of one unit, and whether aware."""
    for kind in set(map(type, items)):
        rows = [row for row, item in enumerate(items) if type(item) is kind]
        some = [items[row] for row in rows] if len(rows) < len(items) else items
        aware = np.zeros(len(rows), dtype=bool)
        if hasattr(kind, "to_datetime64"):  # pandas: has nanoseconds, and years out of range
            aware = np.array([item.tzinfo is not None for item in some])
            some = [item.to_datetime64() for item in some]
        elif issubclass(kind, datetime.datetime):
            offsets = [item.utcoffset() for item in some]
            aware = np.array([offset is not None for offset in offsets])
            if aware.any():
                some = [item.replace(tzinfo=None) for item in some]
            moments = np.array(some, dtype="M8[us]")
            if aware.any():
                shift = [offset or datetime.timedelta() for offset in offsets]
                moments -= np.array(shift, dtype="m8[us]")
            yield rows, moments, aware
            continue
        elif issubclass(kind, datetime.date):
            yield rows, np.array(some, dtype="M8[D]"), aware
            continue
        dtypes = [moment.dtype for moment in some]
        for dtype in set(dtypes):
            places = [place for place, other in enumerate(dtypes) if other == dtype]
            moments = np.array([some[place] for place in places], dtype)
            yield [rows[place] for place in places], moments, aware[places]


def _foreign(array: Array, where: str) -> TypeError:
    kind = read.kind_of(array)
    return TypeError(f"{where}: expected integers, floats or datetimes, got {kind}")


def _has_zone(values: Any) -> bool:
    """Whether a column of pandas or pyarrow has a time zone; an array of NumPy never does."""
    kind = values.dtype if hasattr(values, "dtype") else getattr(values, "type", None)
    kind = getattr(kind, "pyarrow_dtype", kind)
    kind = getattr(kind, "value_type", kind)  # of a dictionary
    return getattr(kind, "tz", None) is not None


def _tick(dtype: np.dtype[Any]) -> int:
    """Nanoseconds in one tick of datetime64 or timedelta64; 0 if there is no such number."""
    unit, count = np.datetime_data(dtype)
    return count * _UNITS.get(unit, 0)


def _nanoseconds(array: Array, where: str, rows: Sequence[int] | None = None) -> Array:
    """datetime64 of any unit as int64, in nanoseconds from 1970. `rows` numbers them in errors."""

    def check(valid: Array, expected: str = _RANGE) -> None:
        read.check_rows(valid, array, expected, where, rows)

    check(~np.isnat(array), "a time")
    unit, count = np.datetime_data(array.dtype)
    ticks = array.view(np.int64)
    tick = _tick(array.dtype)
    if unit in ("Y", "M"):
        most = (300 if unit == "Y" else 3600) // count
        check((ticks >= -most) & (ticks <= most))
        ticks, tick = array.astype("M8[D]").view(np.int64), _UNITS["D"]
    if tick == 0:
        raise TypeError(f"{where}: expected datetimes of nanoseconds to years, got {array.dtype}")
    if tick > 1:  # not by astype, which wraps around
        most = _MOST // tick
        check((ticks >= -most) & (ticks <= most))
        ticks = ticks * tick
    return ticks


def _to_utc(
    local: Array, zone: datetime.tzinfo, where: str, rows: Sequence[int] | None = None
) -> Array:
    """Nanoseconds by the clocks of a zone as nanoseconds in UTC."""
    if not local.size:
        return local
    begin, offset = _periods(zone, int(local.min()), int(local.max()))
    clock = local // 1000
    opens = begin + offset
    closes = np.append(opens[1:] - np.diff(offset), _MOST)
    period = np.searchsorted(opens[1:], clock, side="right")
    once = (clock < closes[period]) & ((period == 0) | (clock >= closes[period - 1]))
    shown = f"a time that clocks in {zone} show exactly once"
    read.check_rows(once, local.view("M8[ns]"), shown, where, rows)
    shift = 1000 * offset[period]
    utc: Array = local - shift
    inside = np.where(shift < 0, utc > local, utc <= local) & (utc >= -_MOST)  # wrapped around
    read.check_rows(inside, local.view("M8[ns]"), _RANGE, where, rows)
    return utc


def _periods(zone: datetime.tzinfo, first: int, last: int) -> tuple[Array, Array]:
    """Start in UTC and offset of each period of one offset, in microseconds.

    They cover every moment at which clocks show something from `first` to `last` (nanoseconds).
    """

    def offset_at(second: int) -> int:
        shown = datetime.datetime.fromtimestamp(second, zone).utcoffset() or datetime.timedelta()
        return shown // datetime.timedelta(microseconds=1)

    # Offsets are below a day. One sample per day, and a binary search where two samples differ.
    days = range(first // (_DAY * 10**9) - 1, last // (_DAY * 10**9) + 3)
    begin, offset = [days[0] * _DAY * 10**6], [offset_at(days[0] * _DAY)]
    for day in days[1:]:
        low, end = (day - 1) * _DAY, day * _DAY
        while offset[-1] != offset_at(end):
            high = end
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if offset_at(middle) == offset[-1] else (low, middle)
            begin.append(high * 10**6)
            offset.append(offset_at(high))
            low = high
    return np.array(begin), np.array(offset)
