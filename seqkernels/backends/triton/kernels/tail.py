"""What follows attention in a layer, row by row: output projection, norms, feed-forward; summary.

::

    x = norm1(x + a W_o + b_o);   x = norm2(x + act(x W_1 + b_1) W_2 + b_2)             or
    x = x + a W_o + b_o;   x = x + act(norm2(x) W_1 + b_1) W_2 + b_2           with NORM_FIRST

Letters: M rows of a block, F = HIDDENS * HIDDEN the feed-forward width padded; else as in `tokens`.
"""

# Triton compiles what follows: no types, no unpacking of tuples.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from seqkernels.backends.triton.kernels.rows import (
    activate,
    add_vector,
    column_max,
    larger,
    normalize,
    project,
    project_onto,
    to_operands,
)
from seqkernels.backends.triton.kernels.tokens import (
    COMPUTE,
    EXCLUDE,
    NONE,
    complaint,
    event_count,
    events_row,
    is_computed,
    is_valid,
    load_tokens,
    rows_to_compute,
    span,
)

# The widest tokens whose output projection is unrolled.
UNROLLED = tl.constexpr(128)

# What changes from call to call and would only multiply the compiled variants.
_VARIES = (
    "candidate", "user_index", "mask", "lengths", "computes_padding", "x_stride_b", "x_stride_t",
    "candidate_stride", "mask_stride_b", "mask_stride_t", "out_stride_b", "out_stride_t",
    "B", "U", "L", "T", "latest_k", "eps", "final_eps", "negative_slope",
)  # fmt: skip


@triton.jit
def _feed_forward(
    rows,
    into,
    weight_in,
    bias_in,
    weight_out,
    negative_slope,
    ACTIVATION: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HIDDENS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Add act(rows W_1 + b_1) W_2 to `into`, a block of HIDDEN hidden columns at a time."""
    F: tl.constexpr = HIDDENS * HIDDEN
    D_PADDED: tl.constexpr = CHUNKS * CHUNK
    for f in range(0, F, HIDDEN):
        hidden = project(rows, weight_in, f, F, HIDDEN, CHUNKS, CHUNK)
        hidden += tl.load(bias_in + f + tl.arange(0, HIDDEN))[None, :]
        operand = activate(hidden, negative_slope, ACTIVATION).to(tl.bfloat16)
        tile = weight_out + (f + tl.arange(0, HIDDEN))[:, None] * D_PADDED
        grown = ()
        for c in tl.static_range(CHUNKS):
            w = tl.load(tile + c * CHUNK + tl.arange(0, CHUNK)[None, :])
            grown = grown + (tl.dot(operand, w, into[c]),)
        into = grown
    return into


@triton.jit
def _load_attended(attended, keep, columns, D: tl.constexpr, PADDED: tl.constexpr):
    """Columns [C] of the rows attended [M] points to, 0 where not `keep`: bf16."""
    inside = keep[:, None]
    if PADDED > D:
        inside = inside & (columns < D)[None, :]
    return tl.load(attended[:, None] + columns[None, :], inside, 0.0)


@triton.jit
def _add_attended(
    rows,
    attended,
    keep,
    weight,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows + a W_o, with rows of a where attended [M] points, 0 where not `keep`."""
    P: tl.constexpr = CHUNKS * CHUNK
    k = tl.arange(0, CHUNK)
    if P <= UNROLLED:
        a = ()
        for c in tl.static_range(CHUNKS):
            a = a + (_load_attended(attended, keep, c * CHUNK + k, D, P),)
        result = ()
        for c in tl.static_range(CHUNKS):
            result = result + (
                project_onto(rows[c], a, weight, c * CHUNK, P, CHUNK, CHUNKS, CHUNK),
            )
        rows = result
    else:
        # A loop, or the compiler loads so many weights ahead that registers spill.
        for start in range(0, P, CHUNK):
            part = _load_attended(attended, keep, start + k, D, P)
            tile = weight + (start + k)[:, None] * P
            grown = ()
            for c in tl.static_range(CHUNKS):
                w = tl.load(tile + c * CHUNK + k[None, :])
                grown = grown + (tl.dot(part, w, rows[c]),)
            rows = grown
    return rows


@triton.jit
def _finish_rows(
    x,
    candidate,
    attended,
    matrices,
    vectors,
    t,
    keep,
    row_of_x,
    b,
    x_stride_b,
    x_stride_t,
    candidate_stride,
    L,
    T,
    eps,
    negative_slope,
    E: tl.constexpr,
    D: tl.constexpr,
    FUSION: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HIDDENS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """The layer's output for rows t of sequences b, each a scalar or [M]: fp32 chunks.

    matrices: bf16 W_o [P, P], W_1 [P, F], W_2 [F, P], one after the other, P = CHUNKS * CHUNK;
    vectors: fp32 b_o, weight and bias of norm1 and of norm2, b_2, [P] each, and b_1 [F].
    """
    P: tl.constexpr = CHUNKS * CHUNK
    F: tl.constexpr = HIDDENS * HIDDEN
    rows = load_tokens(
        x, candidate, t, row_of_x, b, keep, x_stride_b, x_stride_t, candidate_stride, L,
        E, D, FUSION, LATEST_LAST, CHUNKS, CHUNK,
    )  # fmt: skip
    attended += (b * T + t) * ROW_STRIDE
    rows = _add_attended(rows, attended, keep, matrices, D, CHUNKS, CHUNK)
    rows = add_vector(rows, vectors, CHUNKS, CHUNK)
    if NORM_FIRST:
        operands = to_operands(
            normalize(rows, vectors + 3 * P, vectors + 4 * P, eps, D, CHUNKS, CHUNK), CHUNKS
        )
    else:
        rows = normalize(rows, vectors + P, vectors + 2 * P, eps, D, CHUNKS, CHUNK)
        operands = to_operands(rows, CHUNKS)
    rows = _feed_forward(
        operands, rows, matrices + P * P, vectors + 6 * P, matrices + P * P + P * F,
        negative_slope, ACTIVATION, CHUNKS, CHUNK, HIDDENS, HIDDEN,
    )  # fmt: skip
    rows = add_vector(rows, vectors + 5 * P, CHUNKS, CHUNK)
    if not NORM_FIRST:
        rows = normalize(rows, vectors + 3 * P, vectors + 4 * P, eps, D, CHUNKS, CHUNK)
    return rows


@triton.jit
def _leave(
    rows,
    keep,
    final_norm,
    final_eps,
    PADDING: tl.constexpr,
    FINAL_NORM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows as they leave the encoder, those not to `keep` as zeros through the final norm.

    final_norm: fp32 [2, CHUNKS * CHUNK], weight and bias.
    """
    if PADDING != COMPUTE:
        kept = ()
        for c in tl.static_range(CHUNKS):
            kept = kept + (tl.where(keep[:, None], rows[c], 0.0),)
        rows = kept
    if FINAL_NORM:
        rows = normalize(rows, final_norm, final_norm + CHUNKS * CHUNK, final_eps, D, CHUNKS, CHUNK)
    return rows


@triton.jit
def _of_padding(
    final_norm, column, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, FINAL_NORM: tl.constexpr
):
    """What a padded position leaves with where it is zeroed: the final norm of zeros, its bias."""
    if FINAL_NORM:
        value = tl.load(final_norm + CHUNKS * CHUNK + column)
    else:
        value = tl.zeros_like(column).to(tl.float32)
    return value


@triton.jit(do_not_specialize=_VARIES)
def tail_rows(
    x,  # [B, L, E]; above the first layer [B, T, D]
    candidate,  # [B, C]
    user_index,  # [B] int64: the row of a sequence in x, mask and lengths
    mask,  # [B, L] bool, true = ignore
    lengths,  # [B]
    computes_padding,  # [1] uint8, with PADDING BY_FLAG
    attended,  # bf16 [B, T, ROW_STRIDE]
    matrices,
    vectors,
    final_norm,
    out,  # [B, T, D], written; may be x above the first layer
    x_stride_b,
    x_stride_t,
    candidate_stride,
    mask_stride_b,
    mask_stride_t,
    out_stride_b,
    out_stride_t,
    B,
    U,
    L,
    T,
    eps,
    final_eps,
    negative_slope,
    E: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    FUSION: tl.constexpr,
    FIRST: tl.constexpr,  # whether x holds events, to be fused with the candidate
    LAST: tl.constexpr,  # whether the rows leave the encoder
    USERS: tl.constexpr,  # whether there is a user_index
    VALIDITY: tl.constexpr,
    PADDING: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    FINAL_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HIDDENS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program for ROWS rows of the whole batch, wherever its sequences begin."""
    x_stride_b = x_stride_b.to(tl.int64) * UNIT
    x_stride_t = x_stride_t.to(tl.int64) * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = row // T
    t = (row - b * T).to(tl.int32)
    inside = b < B
    b = tl.where(inside, b, 0)
    u = events_row(user_index, b, U, USERS)
    row_of_x = u if FIRST else b
    SOURCE: tl.constexpr = FUSION if FIRST else NONE

    count = event_count(lengths, u, L, VALIDITY)
    valid = inside & is_valid(
        t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, FUSION, LATEST_LAST
    )
    keep = is_computed(inside, valid, computes_padding, PADDING)
    wrong = complaint(lengths, user_index, u, b, L, USERS, VALIDITY) + tl.zeros([ROWS], tl.float32)
    out_row = out + b * out_stride_b + t.to(tl.int64) * out_stride_t
    if tl.max(keep.to(tl.int32), 0) > 0:
        rows = _finish_rows(
            x, candidate, attended, matrices, vectors, t, keep, row_of_x, b,
            x_stride_b, x_stride_t, candidate_stride, L, T, eps, negative_slope,
            E, D, SOURCE, LATEST_LAST, NORM_FIRST, ACTIVATION, ROW_STRIDE,
            CHUNKS, CHUNK, HIDDENS, HIDDEN,
        )  # fmt: skip
        written = keep
        if LAST:
            written = inside
            rows = _leave(rows, keep, final_norm, final_eps, PADDING, FINAL_NORM, D, CHUNKS, CHUNK)
        for c in tl.static_range(CHUNKS):
            column = c * CHUNK + tl.arange(0, CHUNK)
            value = rows[c]
            if LAST:
                value += wrong[:, None]
            tl.store(
                out_row[:, None] + column[None, :],
                value.to(out.dtype.element_ty),
                written[:, None] & (column < D)[None, :],
            )
    elif LAST:
        for c in tl.static_range(CHUNKS):
            column = c * CHUNK + tl.arange(0, CHUNK)
            of_padding = _of_padding(final_norm, column, CHUNKS, CHUNK, FINAL_NORM)
            tl.store(
                out_row[:, None] + column[None, :],
                (of_padding[None, :] + wrong[:, None]).to(out.dtype.element_ty),
                inside[:, None] & (column < D)[None, :],
            )


@triton.jit(do_not_specialize=_VARIES)
def tail_summary(
    x,
    candidate,
    user_index,
    mask,
    lengths,
    computes_padding,
    attended,
    matrices,
    vectors,
    final_norm,
    out,  # [B, latest_k * D (+ D)], written; the other arguments are those of `tail_rows`
    x_stride_b,
    x_stride_t,
    candidate_stride,
    mask_stride_b,
    mask_stride_t,
    out_stride_b,
    U,
    L,
    T,
    latest_k,
    eps,
    final_eps,
    negative_slope,
    E: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    FUSION: tl.constexpr,
    FIRST: tl.constexpr,
    USERS: tl.constexpr,
    VALIDITY: tl.constexpr,
    PADDING: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    POOL: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    FINAL_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HIDDENS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program for each sequence, of which only the window and the pool are written."""
    x_stride_b = x_stride_b.to(tl.int64) * UNIT
    x_stride_t = x_stride_t.to(tl.int64) * UNIT
    b = tl.program_id(0).to(tl.int64)
    u = events_row(user_index, b, U, USERS)
    row_of_x = u if FIRST else b
    SOURCE: tl.constexpr = FUSION if FIRST else NONE

    count = event_count(lengths, u, L, VALIDITY)
    wrong = complaint(lengths, user_index, u, b, L, USERS, VALIDITY)
    first, last = span(
        u, count, mask, mask_stride_b, mask_stride_t, L, T, VALIDITY, FUSION, LATEST_LAST
    )
    if LATEST_LAST:
        window = tl.where(last > first, last, T) - latest_k
    else:
        window = tl.where(last > first, first, 0)
    begin, end = rows_to_compute(first, last, T, computes_padding, PADDING)
    if not POOL:
        begin = tl.maximum(begin, window)
        end = tl.maximum(tl.minimum(end, window + latest_k), begin)

    out_row = out + b * out_stride_b
    pooled = ()
    for _ in tl.static_range(CHUNKS):
        pooled = pooled + (tl.full([CHUNK], float("-inf"), tl.float32),)
    for start in range(begin, end, ROWS):
        t = start + tl.arange(0, ROWS)
        inside = t < end
        valid = inside & is_valid(
            t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, FUSION, LATEST_LAST
        )
        keep = is_computed(inside, valid, computes_padding, PADDING)
        rows = _finish_rows(
            x, candidate, attended, matrices, vectors, t, keep, row_of_x, b,
            x_stride_b, x_stride_t, candidate_stride, L, T, eps, negative_slope,
            E, D, SOURCE, LATEST_LAST, NORM_FIRST, ACTIVATION, ROW_STRIDE,
            CHUNKS, CHUNK, HIDDENS, HIDDEN,
        )  # fmt: skip
        rows = _leave(rows, keep, final_norm, final_eps, PADDING, FINAL_NORM, D, CHUNKS, CHUNK)
        slot = t - window
        shown = inside & (slot >= 0) & (slot < latest_k)
        grown = ()
        for c in tl.static_range(CHUNKS):
            column = c * CHUNK + tl.arange(0, CHUNK)
            tl.store(
                out_row + slot[:, None] * D + column[None, :],
                (rows[c] + wrong).to(out.dtype.element_ty),
                shown[:, None] & (column < D)[None, :],
            )
            if POOL:
                pooled_rows = valid if PADDING == EXCLUDE else inside
                grown = grown + (larger(pooled[c], column_max(rows[c], pooled_rows)),)
        if POOL:
            pooled = grown

    if POOL:
        for c in tl.static_range(CHUNKS):
            column = c * CHUNK + tl.arange(0, CHUNK)
            most = pooled[c]
            if PADDING == EXCLUDE:
                most = tl.where(end > begin, most, 0.0)
            elif PADDING != COMPUTE:
                of_padding = _of_padding(final_norm, column, CHUNKS, CHUNK, FINAL_NORM)
                most = tl.where(end - begin < T, larger(most, of_padding), most)
            where = out_row + latest_k * D + column
            tl.store(where, (most + wrong).to(out.dtype.element_ty), column < D)
    # The window's slots that no row computed above filled: padded positions, and none at all.
    for start in range(0, latest_k, 16):
        slot = start + tl.arange(0, 16)
        t = window + slot
        missing = (slot < latest_k) & ((t < begin) | (t >= end))
        exists = (t >= 0) & (t < T)
        for c in tl.static_range(CHUNKS):
            column = c * CHUNK + tl.arange(0, CHUNK)
            of_padding = _of_padding(final_norm, column, CHUNKS, CHUNK, FINAL_NORM)
            value = tl.where(exists[:, None], of_padding[None, :], 0.0) + wrong
            tl.store(
                out_row + slot[:, None] * D + column[None, :],
                value.to(out.dtype.element_ty),
                missing[:, None] & (column < D)[None, :],
            )
