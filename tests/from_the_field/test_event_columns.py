"""Columns that stores were given: of polars, over Arrow's C interface, twice named, with nulls."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from seqkernels.features import EventBatch, EventSequences

NAIVE = datetime.datetime(2024, 6, 1, 12)


class Stream:
    """Any library's table or column, read once by Arrow's C interface alone."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        of, self.of = self.of, None
        return of.__arrow_c_stream__(requested_schema)


class Array:
    def __init__(self, of: Any) -> None:
        self.of = of

    def __arrow_c_array__(self, requested_schema: object = None) -> object:
        return self.of.__arrow_c_array__(requested_schema)


class Derived(pd.DataFrame):
    """As geopandas and others make their frames; the module is not pandas."""


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pandas": pd.DataFrame,
    "derived from pandas": Derived,
    "polars": pl.DataFrame,
    "polars chunks": lambda c: pl.concat([pl.DataFrame(c)[:2], pl.DataFrame(c)[2:]], rechunk=False),
    "polars series": lambda c: {name: pl.Series(v) for name, v in c.items()},
    "a reader of record batches": lambda c: pa.table(c).to_reader(),
    "a stream": lambda c: Stream(pa.table(c)),
    "a stream of polars": lambda c: Stream(pl.DataFrame(c)),
    "an array": lambda c: Array(pa.RecordBatch.from_pydict(c)),
    "columns as streams": lambda c: {n: Stream(pa.chunked_array([v])) for n, v in c.items()},
    "columns as arrays": lambda c: {n: Array(pa.array(v)) for n, v in c.items()},
}


@pytest.mark.parametrize("users", ["integers", "strings"])
@pytest.mark.parametrize("times", ["int64", "float64", "M8[us]"])
@pytest.mark.parametrize("form", FORMS)
def test_every_library_s_frame_is_read_as_pandas_is(form: str, times: str, users: str) -> None:
    user = np.array([10**15, 3, 3, -4, 3, 10**15])
    columns = {
        "user": user if users == "integers" else [f"u{u}" for u in user],
        "time": np.array([100, 300, 200, 50, 400, 90]).astype(times),
        "item": np.array([1, 2, 3, 4, 5, 6], dtype=np.int16),
        "price": np.array([0.5, 1.5, 2.5, np.nan, 4.5, 5.5], dtype=np.float32),
        "seen": np.array([True, False, True, True, False, True]),
    }
    events = EventSequences(FORMS[form](columns), length=3)
    asked = ["u3", f"u{10**15}", "u8"] if users == "strings" else [3, 10**15, 8]
    at = np.array(350).astype(times)
    for column in (asked, pl.Series(asked), pd.Series(asked), Stream(pa.chunked_array([asked]))):
        batch = events.batch(column, at=at)
        assert batch["item"].tolist() == [[2, 3, 0], [1, 6, 0], [0, 0, 0]]
        assert batch["price"].tolist() == [[1.5, 2.5, 0.0], [0.5, 5.5, 0.0], [0.0, 0.0, 0.0]]
        assert batch["seen"].tolist() == [[False, True, False], [True, True, False], [False] * 3]
        assert (batch["item"].dtype, batch["price"].dtype) == (np.int16, np.float32)
    many = np.array([350, 0, 0]).astype(times)
    for moments in (many, pl.Series(many), pa.array(many), Array(pa.array(many))):
        assert events.batch(asked, at=moments).lengths.tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    "dtype",
    [pl.Categorical, pl.Enum(["b", "a", "c"]), pl.String],
    ids=["categorical", "enum", "str"],
)
def test_polars_strings_of_every_type_are_users(dtype: Any) -> None:
    frame = pl.DataFrame(
        {"user": pl.Series(["a", "b", "a"], dtype=dtype), "time": [1, 2, 3], "item": [4, 5, 6]}
    )
    events = EventSequences(frame, length=2)
    for asked in (["b", "a", "z"], pl.Series(["b", "a", "z"])):
        assert events.batch(asked)["item"].tolist() == [[5, 0], [6, 4], [0, 0]]


def test_polars_arrays_are_wide_columns() -> None:
    vectors = pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int16, 2))
    frame = pl.DataFrame({"user": [1, 1], "time": [1, 2], "vector": vectors})
    batch = EventSequences(frame[::-1], frame, length=3).batch([1])
    assert batch["vector"].tolist() == [[[3, 4], [1, 2], [0, 0]]]


def test_a_polars_column_that_is_not_read_may_be_of_any_type() -> None:
    odd = pl.Series([1, 2], dtype=pl.Int128)
    frame = pl.DataFrame({"user": [1, 1], "time": [1, 2], "item": [3, 4], "odd": odd})
    assert EventSequences(frame, columns=["item"], length=2).batch([1])["item"].tolist() == [[4, 3]]
    with pytest.raises(
        TypeError, match="odd: expected what pyarrow can read, got polars DataFrame"
    ):
        EventSequences(frame)


def test_without_pyarrow_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pl.DataFrame({"user": [1], "time": [1]})
    stream = Stream(pa.table({"user": [1], "time": [1]}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    told = "EventSequences: user: expected pyarrow to be installed, which reads polars DataFrame"
    with pytest.raises(ImportError, match=told):
        EventSequences(frame)
    with pytest.raises(ImportError, match="sources: expected pyarrow to be installed, which reads"):
        EventSequences(stream)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (lambda: pl.LazyFrame({"user": [1]}), "expected a mapping .*, got polars LazyFrame"),
        (lambda: pl.Series([1]), "expected what pyarrow can read, got polars Series"),
        (
            lambda: pa.array([1]),
            "expected a mapping .*, got pyarrow Int64Array|expected what pyarrow",
        ),
        (lambda: [{"user": 1}], "expected a mapping .*, got list"),
    ],
)
def test_what_is_no_table(source: Callable[[], Any], told: str) -> None:
    with pytest.raises(TypeError, match=f"EventSequences: sources: ({told})"):
        EventSequences(source())


# Two columns of one name


@pytest.mark.parametrize("form", ["pandas", "pyarrow", "a stream"])
@pytest.mark.parametrize("twice", ["user", "time", "item"])
def test_two_columns_of_one_name(form: str, twice: str) -> None:
    """pandas gave `'DataFrame' object has no attribute 'dtype'`, pyarrow a KeyError."""
    names = ["user", "time", "item", twice]

    def source(names: list[str]) -> Any:
        if form == "pandas":
            return pd.DataFrame([[1, 2, 3, 4]], columns=names)
        table = pa.Table.from_arrays([pa.array([i]) for i in range(1, 5)], names=names)
        return table if form == "pyarrow" else Stream(table)

    for options in ({}, {"columns": ["item"]}):
        with pytest.raises(
            ValueError, match=f"EventSequences: (columns|{twice}): expected (each|one)"
        ):
            EventSequences(source(names), **options)
    events = EventSequences({"user": [1], "time": [1], "item": [3]}, length=1)
    with pytest.raises(ValueError, match=f"{twice}: expected one column of this name, got 2"):
        events.append(source(names))
    events.append(source(["user", "time", "item", "unread"]))
    twice_unread = pd.DataFrame([[1, 9, 3, 4, 5]], columns=["user", "time", "item", "x", "x"])
    events.append(twice_unread)
    assert len(events) == 3


# Nulls

NULLS: dict[str, Callable[[list[Any]], Any]] = {
    "a list": lambda v: v,
    "a list with pandas' NA": lambda v: [pd.NA if x is None else x for x in v],
    "objects": lambda v: np.array(v, dtype=object),
    "objects with NaN": lambda v: np.array([np.nan if x is None else x for x in v], dtype=object),
    "a masked array": lambda v: np.ma.masked_array(
        [0 if x is None else x for x in v], mask=[x is None for x in v]
    ),
    "pandas objects": lambda v: pd.Series(v, dtype=object),
    "pandas Int64": lambda v: pd.Series(v, dtype="Int64"),
    "pandas on arrow": lambda v: pd.Series(v, dtype=pd.ArrowDtype(pa.int32())),
    "pandas categories": lambda v: pd.Series(pd.Categorical(v)),
    "arrow": lambda v: pa.array(v),
    "arrow chunks": lambda v: pa.chunked_array([v[:1], v[1:]], pa.int64()),
    "arrow dictionary": lambda v: pa.array(v).dictionary_encode(),
    "arrow runs": lambda v: pa.RunEndEncodedArray.from_arrays(list(range(1, len(v) + 1)), v),
    "polars": lambda v: pl.Series(v),
    "a stream": lambda v: Stream(pa.chunked_array([v])),
}


@pytest.mark.parametrize("form", NULLS)
def test_a_null_in_an_integer_column_names_column_and_row(form: str) -> None:
    make = NULLS[form]
    good = {"user": [1, 1, 2, 3], "time": [1, 2, 3, 4], "item": [5, 6, 7, 8]}
    told = "expected no null, got .* in row 2"
    with pytest.raises(ValueError, match=f"EventSequences: item: {told}"):
        EventSequences(good | {"item": make([5, 6, None, 8])})
    with pytest.raises(ValueError, match=f"EventSequences: time: {told}"):
        EventSequences(good | {"time": make([1, 2, None, 4])})
    with pytest.raises((ValueError, TypeError), match=r": user: expected .* in row 2"):
        EventSequences(good | {"user": make([1, 1, None, 3])})
    events = EventSequences(good)
    with pytest.raises(ValueError, match=f"EventSequences: item: {told}"):
        events.append(good | {"item": make([5, 6, None, 8])})
    with pytest.raises((ValueError, TypeError), match=r": users: expected .* in row 2"):
        events.batch(make([1, 1, None, 3]))
    with pytest.raises(ValueError, match=f"EventSequences: at: {told}"):
        events.batch([1, 1, 2, 3], at=make([1, 2, None, 4]))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    values=st.lists(st.one_of(st.none(), st.integers(-9, 9)), min_size=1, max_size=6),
    form=st.sampled_from(sorted(NULLS)),
)
def test_integers_with_nulls_are_the_integers_or_an_error(
    values: list[int | None], form: str
) -> None:
    columns = {"user": range(len(values)), "time": range(len(values)), "x": NULLS[form](values)}
    if None in values:
        with pytest.raises(ValueError, match=f"x: .* in row {values.index(None)}$"):
            EventSequences(columns)
    elif "objects" not in form:
        batch = EventSequences(columns, length=1).batch(range(len(values)))
        assert batch["x"][:, 0].tolist() == values


@pytest.mark.parametrize(
    "times",
    [
        [NAIVE, None],
        [NAIVE, pd.NaT],
        [np.datetime64(NAIVE), np.datetime64("NaT")],
        [np.datetime64(NAIVE), None],
        pd.Series([NAIVE, None], dtype=object),
        pd.Series([NAIVE, None]),
        pd.Series([NAIVE, None]).dt.tz_localize("UTC"),
        np.ma.masked_array(np.array([NAIVE, NAIVE], "M8[us]"), mask=[False, True]),
        pa.array([NAIVE, None]),
        pl.Series([NAIVE, None]),
    ],
    ids=lambda times: f"{type(times).__module__}.{type(times).__name__}",
)
def test_a_null_among_datetimes_names_the_row(times: Any) -> None:
    with pytest.raises(
        ValueError, match=r"EventSequences: time: expected (no null|a time), .* row 1"
    ):
        EventSequences({"user": [1, 2], "time": times})


@pytest.mark.parametrize(
    "make",
    [
        pa.array,
        pl.Series,
        lambda v: pd.Series(v, dtype="Float64"),
        lambda v: pd.Series(v, dtype="Sparse[float]"),
        lambda v: pd.Series(v, dtype=pd.ArrowDtype(pa.float64())),
        lambda v: np.ma.masked_array([v[0], 7.0], mask=[False, True]),
    ],
)
def test_a_null_in_a_floating_column_is_nan(make: Callable[..., Any]) -> None:
    events = EventSequences({"user": [1, 1], "time": [1, 2], "x": make([0.5, None])}, length=2)
    assert np.array_equal(events.batch([1])["x"], [[np.nan, 0.5]], equal_nan=True)


# What other raw errors there were


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (torch.ones(2, requires_grad=True), "expected what NumPy can read, got torch Tensor"),
        (torch.ones(2, dtype=torch.bfloat16), "expected what NumPy can read, got torch Tensor"),
        (pa.table({"a": [1, None]}), "expected a column, got pyarrow Table"),
        (pl.DataFrame({"a": [1, 2]}), "expected a column, got polars DataFrame"),
        (pl.Series(["a", "b"], dtype=pl.Categorical), "expected .*, got (string_view|object)"),
        (pa.array([[1], [2, 3]]), r"expected numbers .*, got object \(ndarray\)"),
    ],
    ids=["gradients", "bfloat16", "table", "frame", "categories", "lists"],
)
def test_what_is_no_column(column: Any, told: str) -> None:
    with pytest.raises(TypeError, match=f"EventSequences: x: .*({told})"):
        EventSequences({"user": [1, 1], "time": [1, 2], "x": column})


def test_big_endian_columns_become_tensors() -> None:
    columns = {"user": [1, 1], "time": [1, 2], "item": np.array([5, 6], ">i4")}
    for source in (columns, pd.DataFrame(columns)):
        inputs = EventSequences(source, length=2).batch([1]).tensors()
        assert inputs.columns["item"].tolist() == [[6, 5]]


# From a batch into modules


def test_a_batch_s_tensors_go_into_modules() -> None:
    """NumPy's lengths and mask do not; the mask as a tensor is one attribute away."""
    batch = EventBatch({"item": np.array([[5, 4, 0], [3, 2, 1]])}, np.array([2, 3]))
    inputs = batch.tensors()
    columns, lengths = inputs
    assert columns is inputs.columns
    assert lengths is inputs.lengths
    by_hand = torch.tensor([[False, False, True], [False, False, False]])
    assert torch.equal(inputs.key_padding_mask, by_hand)
    assert batch.key_padding_mask.tolist() == by_hand.tolist()
    torch.manual_seed(0)
    embed, layer = (
        torch.nn.Embedding(9, 8),
        torch.nn.TransformerEncoderLayer(8, 2, batch_first=True),
    )
    with torch.no_grad():
        x = embed(columns["item"])
        out = layer.eval()(x, src_key_padding_mask=inputs.key_padding_mask)
        assert torch.equal(out, layer(x, src_key_padding_mask=by_hand))


def test_a_mask_of_an_empty_batch() -> None:
    events = EventSequences({"user": [1], "time": [1], "item": [2]}, length=3)
    assert events.batch([]).tensors().key_padding_mask.shape == (0, 3)
    assert events.batch([9]).tensors().key_padding_mask.tolist() == [[True, True, True]]
