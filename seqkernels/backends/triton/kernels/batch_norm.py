"""Batch norm by given statistics, within bounds, and the activation after it.

x is seen as [outer, rows, columns] with the columns contiguous; channels are the columns
(CHANNELS_LAST), or the rows.
"""

# Triton compiles what follows: no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from seqkernels.backends.triton.kernels.rows import activate

_VARIES = (
    "rows", "columns", "x_stride", "x_row_stride", "out_stride", "out_row_stride",
    "eps", "min_var", "limit", "negative_slope",
)  # fmt: skip


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")  # false for NaN


@triton.jit(do_not_specialize=_VARIES)
def batch_norm(
    x,
    mean,  # [C], as those below; any float
    var,
    weight,
    bias,
    out,
    rows,
    columns,
    x_stride,
    x_row_stride,
    out_stride,
    out_row_stride,
    eps,
    min_var,
    limit,
    negative_slope,
    CHANNELS_LAST: tl.constexpr,
    BOUNDED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for a block [ROWS, COLUMNS] of one matrix."""
    across = tl.cdiv(columns, COLUMNS)
    down = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    row = program // across % down * ROWS + tl.arange(0, ROWS)
    outer = (program // across // down).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    where = outer * x_stride + row.to(tl.int64)[:, None] * x_row_stride + column[None, :]
    value = tl.load(x + where, inside, 0.0).to(tl.float32)

    if CHANNELS_LAST:
        channel = column[None, :]
        known = (column < columns)[None, :]
    else:
        channel = row[:, None]
        known = (row < rows)[:, None]
    m = tl.load(mean + channel, known, 0.0).to(tl.float32)
    v = tl.load(var + channel, known, 1.0).to(tl.float32)
    if BOUNDED:
        useful = _is_finite(m) & _is_finite(v) & (v >= 0.0)
        m = tl.where(useful, m, 0.0)
        v = tl.where(useful, v, 1.0)
        deviation = tl.sqrt_rn(tl.maximum(v, min_var) + eps)
        z = tl.where(_is_finite(value), tl.div_rn(value - m, deviation), value)
        z = tl.where(useful & (z == z), z, 0.0)
        z = tl.minimum(tl.maximum(z, -limit), limit)
    else:
        z = tl.div_rn(value - m, tl.sqrt_rn(v + eps))
    if HAS_WEIGHT:
        z *= tl.load(weight + channel, known, 1.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + channel, known, 0.0).to(tl.float32)
    y = activate(z, negative_slope, ACTIVATION)
    where = outer * out_stride + row.to(tl.int64)[:, None] * out_row_stride + column[None, :]
    tl.store(out + where, y.to(out.dtype.element_ty), inside)
