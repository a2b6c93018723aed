"""Columns as users hold them (numpy, pandas, pyarrow, lists) become numpy arrays, or an error.

pandas and pyarrow are never imported: their objects are known by the module of their type.
`where` starts every message: ``<class>: <column or argument>``.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from seqkernels.features.ragged import Array, Rows

_ARROW_STRINGS = ("string", "large_string", "string_view")
_ARROW_TIMES = ("timestamp", "date")
_DATE_LIMIT = 9_223_372_036  # seconds from 1970 that nanoseconds in 64 bits can tell


def _library(values: object) -> str:
    return type(values).__module__.partition(".")[0]


def names(events: Any, where: str) -> list[str]:
    """Names of the columns of a mapping, a pandas DataFrame, a pyarrow Table or RecordBatch."""
    if isinstance(events, Mapping):
        return list(events)
    if _library(events) == "pyarrow" and hasattr(events, "schema"):
        return list(events.schema.names)
    if _library(events) == "pandas" and hasattr(events, "columns"):
        return list(events.columns)
    raise TypeError(
        f"{where}: expected a mapping of names to columns, a pandas DataFrame or a pyarrow Table, "
        f"got {type(events).__name__}"
    )


def column(events: Any, name: str) -> Any:
    """One column, still as its library holds it."""
    return events.column(name) if _library(events) == "pyarrow" else events[name]


def is_empty(values: Any) -> bool:
    """Whether a column has no rows; then its type says nothing (an empty list, an empty frame)."""
    try:
        return len(values) == 0
    except TypeError:  # not a column: told where it is read
        return False


def to_numpy(values: Any, where: str) -> Array:
    """Any column as an array. Null is NaN in floating columns, NaT in times, else an error."""
    library = _library(values)
    if library == "pyarrow":
        return _from_arrow(values, where)
    if library == "pandas" and hasattr(values, "isna"):
        return _from_pandas(values, where)
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{where}: expected rows of one shape, got different ones") from None
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _from_arrow(values: Any, where: str, width: int = 1) -> Array:
    """`width` values of `values` make a row."""
    kind = values.type
    if hasattr(kind, "value_type") and hasattr(kind, "index_type"):  # dictionary
        values, kind = values.cast(kind.value_type), kind.value_type
    if str(kind) not in ("halffloat", "float", "double") and not str(kind).startswith(_ARROW_TIMES):
        _refuse_arrow_nulls(values, where, width)
    size = getattr(kind, "list_size", None)
    if size is None:
        return np.asarray(values.to_numpy(zero_copy_only=False))
    whole = values.combine_chunks() if hasattr(values, "chunks") else values
    return _from_arrow(whole.flatten(), where, size).reshape(-1, size)


def _refuse_arrow_nulls(values: Any, where: str, width: int = 1) -> None:
    if values.null_count:
        row = int(values.is_null().to_numpy(zero_copy_only=False).argmax()) // width
        raise ValueError(f"{where}: expected no null, got one in row {row}")


def _from_pandas(values: Any, where: str) -> Array:
    dtype = values.dtype
    if hasattr(dtype, "pyarrow_dtype"):
        return _from_arrow(values.array.__arrow_array__(), where)
    if getattr(dtype, "tz", None) is not None:
        values = values.dt.tz_convert(None) if hasattr(values, "dt") else values.tz_convert(None)
    elif not isinstance(dtype, np.dtype):
        missing = np.asarray(values.isna())
        if missing.any() and dtype.kind == "f":
            return np.asarray(values.to_numpy(f"f{dtype.itemsize}", na_value=np.nan))
        if missing.any():
            raise ValueError(f"{where}: expected no null, got one in row {int(missing.argmax())}")
    return np.asarray(values.to_numpy())


def read_ids(values: Any, where: str) -> tuple[Array, list[str] | None]:
    """User ids: 64-bit integers [n] and None, or strings as codes [n] and what they stand for."""
    library = _library(values)
    parts: Iterable[tuple[Array, list[Any]]]
    if library == "pyarrow" and _arrow_strings(values.type):
        _refuse_arrow_nulls(values, where)
        chunks = values.chunks if hasattr(values, "chunks") else [values]
        parts = [_arrow_codes(chunk) for chunk in chunks]
    elif library == "pandas" and getattr(values.dtype, "kind", None) == "O":
        codes, labels = values.factorize()
        if len(codes) and codes.min() < 0:
            raise ValueError(f"{where}: expected no null, got one in row {int(codes.argmin())}")
        parts = [(codes, labels.tolist())]
    else:
        array = to_numpy(values, where)
        _check_one_dimension(array, where)
        if array.dtype.kind == "u" and array.dtype.itemsize == 8:
            return array, None
        if array.dtype.kind in "iu":
            return array.astype(np.int64, copy=False), None
        if isinstance(values, list | tuple) and values:
            # numpy would spell a NaN among strings, and round integers of 64 bits to floats
            array = np.array(values, dtype=object)
        if array.dtype.kind not in "UTO":
            raise TypeError(f"{where}: expected integers or strings, got {array.dtype}")
        parts = [_codes(array.tolist(), where)]

    # One numbering for all parts.
    number: dict[Any, int] = {}
    codes_of_all = [np.empty(0, dtype=np.int64)]
    for codes, labels in parts:
        numbers = np.array([number.setdefault(v, len(number)) for v in labels], dtype=np.int64)
        codes_of_all.append(numbers[codes])
    codes, labels = np.concatenate(codes_of_all), list(number)
    kinds = set(map(type, labels))
    if all(issubclass(kind, str) for kind in kinds):
        return codes, labels
    if all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        for dtype in (np.int64, np.uint64):
            if np.iinfo(dtype).min <= min(labels) and max(labels) <= np.iinfo(dtype).max:
                return np.array(labels, dtype=dtype)[codes], None
    row, value = _first_foreign(codes, labels)
    raise TypeError(
        f"{where}: expected integers of 64 bits, or strings, got {value!r} in row {row}"
    )


def _arrow_strings(kind: Any) -> bool:
    if hasattr(kind, "value_type") and hasattr(kind, "index_type"):
        kind = kind.value_type
    return str(kind) in _ARROW_STRINGS


def _arrow_codes(chunk: Any) -> tuple[Array, list[Any]]:
    encoded = chunk if hasattr(chunk, "indices") else chunk.dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()


def _codes(values: list[Any], where: str) -> tuple[Array, list[Any]]:
    """Number values in the order in which they appear."""
    number: defaultdict[Any, int] = defaultdict()
    number.default_factory = number.__len__
    try:
        codes = np.fromiter(map(number.__getitem__, values), np.int64, len(values))
    except TypeError as error:  # not hashable
        raise TypeError(f"{where}: expected integers or strings, got an {error}") from None
    return codes, list(number)


def _first_foreign(codes: Rows, labels: list[Any]) -> tuple[int, Any]:
    """Row and value of the first label that is not of the first one's kind, string or integer."""
    first = str if isinstance(labels[codes[0]], str) else int
    for row, code in enumerate(codes.tolist()):
        value = labels[code]
        if isinstance(value, bool) or not isinstance(value, first):
            return row, value
    return 0, labels[codes[0]]


def read_times(values: Any, where: str) -> tuple[Array, str]:
    """Times [...] as finite int64 or float64, and what they are.

    Returns
    -------
    array, str
        ``"integers"`` (int64), ``"numbers"`` (float64), or ``"datetimes"`` (int64, nanoseconds
        from 1970; with a time zone: UTC).
    """
    array = to_numpy(values, where)
    if array.dtype.kind == "O":
        array = _from_objects(array)
    kind = array.dtype.kind
    if kind in "iu":
        return conform(array, np.dtype(np.int64), where), "integers"
    if kind == "f":
        _check_rows(np.isfinite(array), array, "a finite time", where)
        return array.astype(np.float64, copy=False), "numbers"
    if kind == "M":
        _check_rows(~np.isnat(array), array, "a time", where)
        if array.dtype != np.dtype("M8[ns]"):
            seconds = array.astype("M8[s]").view(np.int64)
            possible = (seconds > -_DATE_LIMIT) & (seconds < _DATE_LIMIT)
            _check_rows(possible, array, "a time from 1678 to 2261", where)
        return array.astype("M8[ns]", copy=False).view(np.int64), "datetimes"
    raise TypeError(f"{where}: expected integers, floats or datetimes, got {_kind_of(array)}")


def _from_objects(array: Array) -> Array:
    """Datetime objects, pandas' included, as datetime64; anything else as it is."""
    items = array.ravel().tolist()
    if not items or not all(isinstance(item, datetime.datetime) for item in items):
        return array
    exact = [
        item.to_datetime64()  # pandas: has nanoseconds
        if hasattr(item, "to_datetime64")
        else np.datetime64(
            item.astimezone(datetime.UTC).replace(tzinfo=None) if item.tzinfo else item
        )
        for item in items
    ]
    return np.array(exact, dtype="M8[ns]").reshape(array.shape)


def read_span(value: Any, kind: str, where: str) -> int | float:
    """A length of time, at least 0, in the unit of times of this kind."""
    if kind == "datetimes":
        if hasattr(value, "to_timedelta64"):  # pandas: has nanoseconds
            value = value.to_timedelta64()
        # In Python's integers: numpy would wrap a long span around to a short one.
        if isinstance(value, datetime.timedelta):
            span = value // datetime.timedelta(microseconds=1) * 1000
        elif isinstance(value, np.timedelta64) and np.can_cast(value.dtype, "m8[ns]"):
            unit = np.array(1, dtype=value.dtype).astype("m8[ns]")
            span = int(value.astype(np.int64)) * int(unit.astype(np.int64))  # NaT is negative
        elif isinstance(value, int) and value == 0:
            span = 0
        else:
            raise TypeError(f"{where}: expected a timedelta, as times are datetimes, got {value!r}")
        if not 0 <= span < 2**63:
            raise ValueError(f"{where}: expected from 0 to 292 years, got {value}")
        return span
    allowed = (int, np.integer) if kind == "integers" else (int, np.integer, float, np.floating)
    if isinstance(value, bool) or not isinstance(value, allowed):
        expected = "an integer, as times are integers" if kind == "integers" else "a number"
        raise TypeError(f"{where}: expected {expected}, got {value!r}")
    if not 0 <= value < 2**63:
        raise ValueError(f"{where}: expected at least 0 and less than 2**63, got {value}")
    return value.item() if isinstance(value, np.generic) else value


def read_numbers(values: Any, where: str) -> Array:
    """A further column: booleans, integers or floats of at most 64 bits, [n] or [n, width]."""
    array = to_numpy(values, where)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(
            f"{where}: expected numbers of at most 64 bits (or another choice of `columns`), "
            f"got {_kind_of(array)}"
        )
    if array.ndim not in (1, 2):
        raise ValueError(f"{where}: expected shape [n] or [n, width], got {list(array.shape)}")
    return array


def conform(array: Array, dtype: np.dtype[Any], where: str) -> Array:
    """Cast where every value keeps what it is (floats may be rounded to floats), else an error."""
    if array.dtype == dtype:
        return array
    if array.dtype.kind == "f" and dtype.kind == "f":
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        _check_rows(np.isfinite(cast) | ~np.isfinite(array), array, f"to fit {dtype}", where)
        return cast
    if array.dtype.kind == "f" or dtype.kind == "b":
        raise TypeError(f"{where}: expected {dtype}, got {array.dtype}")
    if dtype.kind == "f":
        high = 2 ** (np.finfo(dtype).nmant + 1)
        low = -high
    else:
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    if array.size and array.dtype.kind != "b":
        for extreme in (array.argmin(), array.argmax()):
            value = int(array.flat[extreme])
            if not low <= value <= high:
                raise ValueError(
                    f"{where}: expected integers from {low} to {high} (to fit {dtype}), got {value}"
                    + (f" in row {np.unravel_index(extreme, array.shape)[0]}" if array.ndim else "")
                )
    return array.astype(dtype)


def _kind_of(array: Array) -> str:
    """The dtype, and what objects are."""
    if array.dtype.kind == "O" and array.size:
        return f"object ({', '.join(sorted({type(item).__name__ for item in array.flat}))})"
    return str(array.dtype)


def _check_rows(valid: Array, array: Array, expected: str, where: str) -> None:
    if not valid.all():
        place = int(np.argmin(valid))
        at = f" in row {np.unravel_index(place, array.shape)[0]}" if array.ndim else ""
        raise ValueError(f"{where}: expected {expected}, got {array.flat[place]}{at}")


def _check_one_dimension(array: Array, where: str) -> None:
    if array.ndim != 1:
        raise ValueError(f"{where}: expected shape [n], got {list(array.shape)}")
