"""Arithmetic on rows of tokens: products with packed weights, norms, activations.

bf16 holds operands of products only; all else is fp32. Rows are tuples of chunks, see `tokens`.
"""

# Triton compiles what follows: no types, no unpacking of tuples.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

# Values of the constant ACTIVATION: positions in `seqkernels.options.ACTIVATIONS`.
IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
LEAKY_RELU = tl.constexpr(4)


@triton.jit
def to_operands(rows, CHUNKS: tl.constexpr):
    """The chunks rounded to bf16."""
    operands = ()
    for c in tl.static_range(CHUNKS):
        operands = operands + (rows[c].to(tl.bfloat16),)
    return operands


@triton.jit
def project_onto(
    product,
    rows,
    weight,
    column,
    ROW_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Product + columns column .. column + WIDTH of rows @ weight: fp32 [M, WIDTH].

    rows: bf16 chunks [M, CHUNK]; weight: bf16 [CHUNKS * CHUNK, ROW_STRIDE].
    """
    k = tl.arange(0, CHUNK)
    tile = weight + k[:, None] * ROW_STRIDE + column + tl.arange(0, WIDTH)[None, :]
    for c in tl.static_range(CHUNKS):
        product = tl.dot(rows[c], tl.load(tile + c * CHUNK * ROW_STRIDE), product)
    return product


@triton.jit
def project(
    rows,
    weight,
    column,
    ROW_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`project_onto` zeros."""
    zeros = tl.zeros([rows[0].shape[0], WIDTH], tl.float32)
    return project_onto(zeros, rows, weight, column, ROW_STRIDE, WIDTH, CHUNKS, CHUNK)


@triton.jit
def add_vector(rows, vector, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Rows + vector; vector: fp32 [CHUNKS * CHUNK]."""
    result = ()
    for c in tl.static_range(CHUNKS):
        part = tl.load(vector + c * CHUNK + tl.arange(0, CHUNK))
        result = result + (rows[c] + part[None, :],)
    return result


@triton.jit
def normalize(rows, weight, bias, eps, D: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Layer norm over the first D columns; weight, bias: fp32 [CHUNKS * CHUNK], 0 from D on."""
    total = tl.sum(rows[0], 1)
    for c in tl.static_range(1, CHUNKS):
        total += tl.sum(rows[c], 1)
    mean = (total / D)[:, None]
    centered = ()
    squares = tl.zeros_like(total)
    for c in tl.static_range(CHUNKS):
        part = rows[c] - mean
        if (c + 1) * CHUNK > D:
            part = tl.where((c * CHUNK + tl.arange(0, CHUNK) < D)[None, :], part, 0.0)
        squares += tl.sum(part * part, 1)
        centered = centered + (part,)
    scale = (1.0 / tl.sqrt(squares / D + eps))[:, None]
    result = ()
    for c in tl.static_range(CHUNKS):
        column = c * CHUNK + tl.arange(0, CHUNK)
        gain = tl.load(weight + column)[None, :]
        result = result + (centered[c] * scale * gain + tl.load(bias + column)[None, :],)
    return result


@triton.jit
def activate(x, negative_slope, ACTIVATION: tl.constexpr):
    """The activation of fp32 x; NaN stays NaN."""
    if ACTIVATION == RELU:
        y = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == LEAKY_RELU:
        y = tl.where(x < 0.0, x * negative_slope, x)
    elif ACTIVATION == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), which loses nothing for negative x.
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp2(-2.8853900817779268 * u))
    else:
        tl.static_assert(ACTIVATION == IDENTITY, "every activation has its branch here")
        y = x
    return y


@triton.jit
def column_max(x, keep):
    """Maximum over the rows [M] to keep of x [M, N], -inf without any; NaN where one is NaN."""
    most = tl.max(tl.where(keep[:, None], x, float("-inf")), 0)
    bad = tl.max((keep[:, None] & (x != x)).to(tl.int32), 0)
    return tl.where(bad > 0, float("nan"), most)


@triton.jit
def larger(a, b):
    """The larger of the two, NaN if one is."""
    return tl.where((a != a) | (a > b), a, b)
