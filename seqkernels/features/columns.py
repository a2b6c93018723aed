"""Columns as users hold them become NumPy arrays, or an error.

pandas and polars are never imported; their objects are recognized by the module of their type.
pyarrow is imported only when an object arrives that offers Arrow's C interface and belongs neither
to pandas nor to pyarrow. `where` starts every message: ``<class>: <column or argument>``.
"""

from __future__ import annotations

import functools
import importlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from seqkernels.features.ragged import Array, Rows

_ARROW_STRINGS = ("string", "large_string", "string_view")
_ARROW_TIMES = ("timestamp", "date")


def frame(events: Any, where: str) -> Any:
    """A source as a mapping, a DataFrame of pandas or polars, or a pyarrow Table or RecordBatch.

    A stream can be read only once, so this precedes every question about a source.
    """
    library = _library(events)
    if (
        isinstance(events, Mapping)
        or (library == "pandas" and hasattr(events, "columns"))
        or (library == "pyarrow" and hasattr(events, "column"))
        or (library == "polars" and _speaks_arrow(events) and hasattr(events, "columns"))
    ):
        return events
    if hasattr(events, "__arrow_c_stream__"):
        return _through_arrow("table", events, where)
    if hasattr(events, "__arrow_c_array__"):
        return _through_arrow("record_batch", events, where)
    raise TypeError(
        f"{where}: expected a mapping of names to columns, a pandas or polars DataFrame, a pyarrow "
        f"Table or an object with Arrow's C stream interface, got {_title(events)}"
    )


def names(events: Any) -> list[str]:
    """Names of the columns of what `frame` returned."""
    if isinstance(events, Mapping):
        return list(events)
    return list(events.schema.names if _library(events) == "pyarrow" else events.columns)


def column(events: Any, name: str) -> Any:
    """One column of what `frame` returned, still as its library holds it."""
    return events.column(name) if _library(events) == "pyarrow" else events[name]


def is_empty(values: Any) -> bool:
    """Whether a column has no rows; then its type says nothing (an empty list, an empty frame)."""
    try:
        return len(values) == 0
    except TypeError:  # not a column: reported where it is read
        return False


def known(values: Any, where: str) -> Any:
    """A column as it is, or as pyarrow's where it has Arrow's C interface (polars and others)."""
    library = _library(values)
    if library == "polars":
        # As a frame: until 2025, streams of a Series of datetimes could not be read. Never by
        # np.asarray, which drops nulls and time zones.
        if not hasattr(values, "to_frame"):
            raise TypeError(f"{where}: expected a column, got {_title(values)}")
        return _through_arrow("table", values.to_frame(), where).column(0)
    if library == "arrow":
        kind = "chunked_array" if hasattr(values, "__arrow_c_stream__") else "array"
        return _through_arrow(kind, values, where)
    return values


def to_numpy(values: Any, where: str) -> Array:
    """Any column as an array, in the order of bytes of this machine.

    Null is NaN in floating columns, NaT in times, else an error.
    """
    values = known(values, where)
    library = _library(values)
    if library == "pyarrow":
        array = _from_arrow(values, where)
    elif library == "pandas" and hasattr(values, "isna") and hasattr(values, "dtype"):
        array = _from_pandas(values, where)
    elif isinstance(values, np.ma.MaskedArray):
        array = _from_masked(values, where)
    else:
        try:
            array = np.asarray(values)
        except ValueError:
            raise ValueError(f"{where}: expected rows of one shape, got different ones") from None
        except (TypeError, RuntimeError) as error:  # a tensor on a device, or with gradients
            raise TypeError(
                f"{where}: expected what NumPy can read, got {_title(values)} ({error})"
            ) from None
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def check_integers_are_exact(values: Any, array: Array, where: str) -> None:
    """Refuse integers that NumPy rounded: it reads lists of integers and floats as floats.

    The same happens to integers of which some are negative and some need 64 bits.
    """
    if array.dtype.kind != "f" or hasattr(values, "dtype") or not (np.abs(array) >= 2**53).any():
        return
    width = array.size // len(array) if array.ndim else 1
    items = np.array(values, dtype=object).ravel().tolist()
    for place, (item, number) in enumerate(zip(items, array.ravel().tolist(), strict=True)):
        if isinstance(item, int | np.integer) and int(item) != number:
            raise ValueError(
                f"{where}: expected integers that fit {array.dtype}, as the others are read, "
                f"got {item} in row {place // width}"
            )


def is_null(item: object) -> bool:
    """Whether an item of an object column stands for no value."""
    if item is None or type(item).__name__ in ("NAType", "NaTType"):  # the latter two: pandas
        return True
    floating = isinstance(item, float | np.floating | np.datetime64)
    return floating and bool(item != item)


def _library(values: object) -> str:
    kind: Any = type(values)
    return _library_of(kind)


@functools.lru_cache(maxsize=256)
def _library_of(kind: Any) -> str:
    """The known library that a type, or one of its bases, comes from.

    ``"arrow"`` for other types that have Arrow's C interface, ``""`` for the rest.
    """
    for base in kind.__mro__:
        library: str = base.__module__.partition(".")[0]
        if library in ("pandas", "polars", "pyarrow"):
            return library
    return "arrow" if _speaks_arrow(kind) else ""


def _speaks_arrow(values: object) -> bool:
    return hasattr(values, "__arrow_c_stream__") or hasattr(values, "__arrow_c_array__")


def _title(values: object) -> str:
    """``polars Series``."""
    kind = type(values)
    module = kind.__module__.partition(".")[0]
    return kind.__name__ if module == "builtins" else f"{module} {kind.__name__}"


def _through_arrow(kind: str, values: Any, where: str) -> Any:
    """``pyarrow.<kind>(values)``."""
    name = _title(values)
    try:
        pyarrow = importlib.import_module("pyarrow")
    except ImportError:
        raise ImportError(
            f"{where}: expected pyarrow to be installed, which reads {name}, got no such package"
        ) from None
    if not _speaks_arrow(values):
        raise TypeError(f"{where}: expected Arrow's C stream interface (polars 1.3), got {name}")
    try:
        return getattr(pyarrow, kind)(values)
    except (TypeError, ValueError, OSError, NotImplementedError) as error:
        raise TypeError(f"{where}: expected what pyarrow can read, got {name} ({error})") from None


def _from_arrow(values: Any, where: str, width: int = 1) -> Array:
    """`width` values of `values` make a row."""
    kind = getattr(values, "type", None)
    if kind is None:
        raise TypeError(f"{where}: expected a column, got {_title(values)}")
    if hasattr(values, "as_py"):  # a scalar
        pyarrow = importlib.import_module("pyarrow")
        return _from_arrow(pyarrow.array([values], kind), where).reshape(())
    try:
        if hasattr(kind, "index_type"):  # dictionary
            kind = kind.value_type
            values = values.cast(kind)
        elif hasattr(kind, "run_end_type"):  # its count of nulls is that of runs, always 0
            kind = kind.value_type
            values = importlib.import_module("pyarrow.compute").run_end_decode(values)
        floating = str(kind) in ("halffloat", "float", "double")
        if not floating and not str(kind).startswith(_ARROW_TIMES):
            _refuse_arrow_nulls(values, where, width)
        size = getattr(kind, "list_size", None)
        if size is None:
            return np.asarray(values.to_numpy(zero_copy_only=False))
    except NotImplementedError:
        raise TypeError(f"{where}: expected what NumPy can read, got {kind}") from None
    whole = values.combine_chunks() if hasattr(values, "chunks") else values
    return _from_arrow(whole.flatten(), where, size).reshape(-1, size)


def _refuse_arrow_nulls(values: Any, where: str, width: int = 1) -> None:
    if values.null_count:
        row = int(values.is_null().to_numpy(zero_copy_only=False).argmax()) // width
        raise ValueError(f"{where}: expected no null, got one in row {row}")


def _from_pandas(values: Any, where: str) -> Array:
    dtype = values.dtype
    if hasattr(dtype, "pyarrow_dtype"):
        array = values.array if hasattr(values, "array") else values
        return _from_arrow(array.__arrow_array__(), where)
    if getattr(dtype, "tz", None) is not None:
        values = values.dt.tz_convert(None) if hasattr(values, "dt") else values.tz_convert(None)
    elif not isinstance(dtype, np.dtype):
        missing = np.asarray(values.isna())
        if missing.any() and dtype.kind == "f":
            size = getattr(dtype, "itemsize", 8)  # sparse columns have none
            return np.asarray(values.to_numpy(f"f{size}", na_value=np.nan))
        if missing.any():
            raise ValueError(f"{where}: expected no null, got one in row {int(missing.argmax())}")
    return np.asarray(values.to_numpy())


def _from_masked(values: Any, where: str) -> Array:
    """Masked values are nulls; ``numpy.asarray`` would return what lies behind the mask."""
    if values.dtype.kind == "f":
        return np.asarray(values.filled(np.nan))
    check_rows(~np.ma.getmaskarray(values), values, "no null", where)
    return np.asarray(values.data)


def read_ids(values: Any, where: str) -> tuple[Array, list[str] | None]:
    """User ids: 64-bit integers [n] and None, or strings as codes [n] and what they stand for."""
    values = known(values, where)
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


def read_numbers(values: Any, where: str) -> Array:
    """A further column: booleans, integers or floats of at most 64 bits, [n] or [n, width]."""
    array = to_numpy(values, where)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        refuse_nulls(array, where)
        raise TypeError(
            f"{where}: expected numbers of at most 64 bits (or another choice of `columns`), "
            f"got {kind_of(array)}"
        )
    check_integers_are_exact(values, array, where)
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
        check_rows(np.isfinite(cast) | ~np.isfinite(array), array, f"to fit {dtype}", where)
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


def kind_of(array: Array) -> str:
    """The dtype, and what objects are."""
    if array.dtype.kind == "O" and array.size:
        return f"object ({', '.join(sorted({type(item).__name__ for item in array.flat}))})"
    return str(array.dtype)


def refuse_nulls(array: Array, where: str) -> None:
    """Refuse a null among objects; other arrays have none."""
    if array.dtype.kind == "O":
        nulls = np.fromiter(map(is_null, array.flat), bool, array.size)
        check_rows(~nulls.reshape(array.shape), array, "no null", where)


def check_rows(
    valid: Array, array: Array, expected: str, where: str, rows: Sequence[int] | None = None
) -> None:
    """Refuse the first value that is not valid, with its row (or what `rows` calls it)."""
    if not valid.all():
        place = int(np.argmin(valid))
        row = int(np.unravel_index(place, array.shape)[0]) if array.ndim else 0
        at = f" in row {row if rows is None else rows[row]}" if array.ndim else ""
        raise ValueError(f"{where}: expected {expected}, got {array.flat[place]}{at}")


def _check_one_dimension(array: Array, where: str) -> None:
    if array.ndim != 1:
        raise ValueError(f"{where}: expected shape [n], got {list(array.shape)}")
