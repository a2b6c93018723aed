"""Attention of the first layer where candidates share users: what the events alone give, once.

With tokens [event ; candidate], q, k, v those of [event ; 0] and a, f the candidate's own parts::

    E_ij = 2^(q_i k_j - max_j q_i k_j)             `prepare_users`, for each user and head
    w_j = 2^(a k_j - max_j a k_j)                  `attention_shared`, for each candidate and head
    a_i = (sum_j E_ij w_j v_j) / (sum_j E_ij w_j) + f

E, q, k are bf16 where products take them; v and w are fp32 and w v is rounded to bf16 once. What
underflows is below 2^-126. A program with a row's sum below 2^-64, or NaN, does what
`attention_short` does instead. See `docs/design/request_scoring.md`.

Letters: U users, B candidates, M rows of a block, C = HEAD_CHUNK, d head width; else as in
`tokens`.
"""

# Triton compiles what follows: no types, no unpacking of tuples.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from seqkernels.backends.triton.kernels.attention import (
    attend_at_once,
    exponentials,
    keys_of,
    load_operands,
    project_heads,
    queries_of,
    scores,
    store_attended,
    value_biases,
)
from seqkernels.backends.triton.kernels.tokens import (
    COMPUTE,
    CONCAT,
    NONE,
    event_count,
    events_row,
    is_valid,
    span,
)

# The least sum of a row that stands.
LEAST_SUM = tl.constexpr(2.0**-64)
# Columns of a candidate taken at a time.
STEP = tl.constexpr(32)

_VARIES = (
    "candidate", "user_index", "mask", "lengths", "x_stride_b", "x_stride_t",
    "mask_stride_b", "mask_stride_t", "candidate_stride", "U", "L", "T",
)  # fmt: skip


@triton.jit
def _store_rows(place, rows, r, HEAD_CHUNKS: tl.constexpr, HEAD_CHUNK: tl.constexpr):
    """Write chunks [M, C] as rows r [M] of place [ROWS, d]."""
    for j in tl.static_range(HEAD_CHUNKS):
        column = j * HEAD_CHUNK + tl.arange(0, HEAD_CHUNK)
        tl.store(place + r[:, None] * (HEAD_CHUNKS * HEAD_CHUNK) + column[None, :], rows[j])


@triton.jit
def _prepare_block(
    x,
    shared,
    keys,
    values,
    weight,
    bias,
    t,
    valid,
    keep,
    u,
    x_stride_b,
    x_stride_t,
    L,
    scale,
    E: tl.constexpr,
    D: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
):
    """Tokens t [M] as queries and as keys, with zeros for the candidate."""
    rows = load_operands(
        x, x, t, u, u, keep, x_stride_b, x_stride_t, 0, L, bias, 0.0,
        E, D, NONE, LATEST_LAST, False, CHUNKS, CHUNK,
    )  # fmt: skip
    r = tl.arange(0, M)
    k = keys_of(rows, weight, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    q = queries_of(rows, weight, bias, scale, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    p = exponentials(scores(q, k, valid, HEAD_CHUNKS))  # [M, M] fp32
    tl.store(shared + r[:, None] * ROWS + r[None, :], p.to(tl.bfloat16))
    _store_rows(keys, k, r, HEAD_CHUNKS, HEAD_CHUNK)
    v = project_heads(rows, weight, 2, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    kept = ()
    for j in tl.static_range(HEAD_CHUNKS):
        kept = kept + (tl.where(valid[:, None], v[j], 0.0),)
    _store_rows(values, kept, r, HEAD_CHUNKS, HEAD_CHUNK)


@triton.jit(do_not_specialize=_VARIES)
def prepare_users(
    x,  # [U, L, E]
    mask,  # [U, L] bool, true = ignore
    lengths,  # [U]
    weight,  # bf16 [H, 3, CHUNKS * CHUNK, d]
    bias,  # fp32 [H, 2, d]
    shared,  # bf16 [U, H, ROWS, ROWS], written: E
    keys,  # bf16 [U, H, ROWS, d], written: k
    values,  # fp32 [U, H, ROWS, d], written: v, 0 where no key is valid
    x_stride_b,
    x_stride_t,
    mask_stride_b,
    mask_stride_t,
    L,
    T,
    scale,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    VALIDITY: tl.constexpr,
    PADDING: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program for each user and head; row 0 of what it writes is the first token computed."""
    x_stride_b = x_stride_b.to(tl.int64) * UNIT
    x_stride_t = x_stride_t.to(tl.int64) * UNIT
    h = tl.program_id(0) % HEADS
    u = (tl.program_id(0) // HEADS).to(tl.int64)
    WIDTH: tl.constexpr = HEAD_CHUNKS * HEAD_CHUNK
    weight += h * 3 * CHUNKS * CHUNK * WIDTH
    bias += h * 2 * WIDTH
    place = u * HEADS + h
    shared += place * ROWS * ROWS
    keys += place * ROWS * WIDTH
    values += place * ROWS * WIDTH

    count = event_count(lengths, u, L, VALIDITY)
    start = 0
    end = T
    if PADDING != COMPUTE:
        start, end = span(
            u, count, mask, mask_stride_b, mask_stride_t, L, T, VALIDITY, CONCAT, LATEST_LAST
        )
    if end - start > HALF:
        if HALF < ROWS:
            t = start + tl.arange(0, ROWS)
            valid = is_valid(
                t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, CONCAT, LATEST_LAST
            )
            keep = t < T if PADDING == COMPUTE else valid
            _prepare_block(
                x, shared, keys, values, weight, bias, t, valid, keep, u,
                x_stride_b, x_stride_t, L, scale,
                E, D, LATEST_LAST, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK, ROWS, ROWS,
            )  # fmt: skip
    elif end > start:
        t = start + tl.arange(0, HALF)
        valid = is_valid(
            t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, CONCAT, LATEST_LAST
        )
        keep = t < T if PADDING == COMPUTE else valid
        _prepare_block(
            x, shared, keys, values, weight, bias, t, valid, keep, u,
            x_stride_b, x_stride_t, L, scale,
            E, D, LATEST_LAST, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK, ROWS, HALF,
        )  # fmt: skip


@triton.jit
def _of_candidate(
    candidate,
    weight,
    KIND: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
):
    """The candidate's part of q (KIND 0) or v (2): fp32 chunks [C]."""
    WIDTH: tl.constexpr = HEAD_CHUNKS * HEAD_CHUNK
    weight += (KIND * CHUNKS * CHUNK + E) * WIDTH
    parts = ()
    for j in tl.static_range(HEAD_CHUNKS):
        column = j * HEAD_CHUNK + tl.arange(0, HEAD_CHUNK)
        part = tl.zeros([HEAD_CHUNK], tl.float32)
        for first in range(0, D - E, STEP):
            i = first + tl.arange(0, STEP)
            inside = i < D - E
            c = tl.load(candidate + i, inside, 0.0).to(tl.bfloat16).to(tl.float32)
            w = tl.load(weight + i[:, None] * WIDTH + column[None, :], inside[:, None], 0.0)
            part += tl.sum(c[:, None] * w.to(tl.float32), 0)
        parts = parts + (part,)
    return parts


@triton.jit
def _attend_block(
    x,
    candidate,
    shared,
    keys,
    values,
    attended,
    weight,
    bias,
    t,
    valid,
    keep,
    u,
    b,
    h,
    x_stride_b,
    x_stride_t,
    candidate_stride,
    L,
    T,
    scale,
    E: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
):
    """Tokens t [M] by the user's part, or by themselves where a sum does not stand."""
    WIDTH: tl.constexpr = HEAD_CHUNKS * HEAD_CHUNK
    r = tl.arange(0, M)
    own = candidate + b * candidate_stride
    a = _of_candidate(own, weight, 0, E, D, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    s = tl.zeros([M], tl.float32)
    for j in tl.static_range(HEAD_CHUNKS):
        column = j * HEAD_CHUNK + tl.arange(0, HEAD_CHUNK)
        k = tl.load(keys + r[:, None] * WIDTH + column[None, :])
        s += tl.sum(k.to(tl.float32) * a[j][None, :], 1)
    s = tl.where(valid, s * scale, float("-inf"))
    most = tl.max(s, 0)
    w = tl.exp2(s - tl.where(most == float("-inf"), 0.0, most))  # [M]

    e = tl.load(shared + r[:, None] * ROWS + r[None, :])  # [M, M]
    total = tl.sum(e.to(tl.float32) * w[None, :], 1)
    # NaN of a padded query that is computed is its own affair.
    fails = (keep & (total < LEAST_SUM)) | (valid & (total != total))
    if tl.max(fails.to(tl.int32), 0) == 0:
        f = _of_candidate(own, weight, 2, E, D, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
        b_v = value_biases(bias, HEAD_CHUNKS, HEAD_CHUNK)
        mixed = ()
        offsets = ()
        for j in tl.static_range(HEAD_CHUNKS):
            column = j * HEAD_CHUNK + tl.arange(0, HEAD_CHUNK)
            v = tl.load(values + r[:, None] * WIDTH + column[None, :])
            mixed = mixed + (tl.dot(e, (w[:, None] * v).to(tl.bfloat16)),)
            offsets = offsets + (f[j] + b_v[j],)
        store_attended(
            attended, mixed, total, offsets, b * T + t, h, keep,
            ROW_STRIDE, HEAD, HEAD_CHUNKS, HEAD_CHUNK,
        )  # fmt: skip
    else:
        attend_at_once(
            x, candidate, attended, weight, bias, bias, t, valid, keep, u, b, h,
            x_stride_b, x_stride_t, candidate_stride, L, T, scale, 0.0,
            E, D, HEAD, CONCAT, LATEST_LAST, False, ROW_STRIDE,
            CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=_VARIES)
def attention_shared(
    x,  # [U, L, E]
    candidate,  # [B, D - E]
    user_index,  # [B] int64
    mask,  # [U, L] bool, true = ignore
    lengths,  # [U]
    weight,  # bf16 [H, 3, CHUNKS * CHUNK, d]
    bias,  # fp32 [H, 2, d]
    shared,  # as `prepare_users` wrote it, and the next two
    keys,
    values,
    attended,  # bf16 [B, T, ROW_STRIDE], written
    x_stride_b,
    x_stride_t,
    candidate_stride,
    mask_stride_b,
    mask_stride_t,
    U,
    L,
    T,
    scale,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    VALIDITY: tl.constexpr,
    PADDING: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program for each candidate and head, over blocks as `attention_short` cuts them."""
    x_stride_b = x_stride_b.to(tl.int64) * UNIT
    x_stride_t = x_stride_t.to(tl.int64) * UNIT
    h = tl.program_id(0) % HEADS
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    u = events_row(user_index, b, U, True)
    WIDTH: tl.constexpr = HEAD_CHUNKS * HEAD_CHUNK
    weight += h * 3 * CHUNKS * CHUNK * WIDTH
    bias += h * 2 * WIDTH
    place = u * HEADS + h
    shared += place * ROWS * ROWS
    keys += place * ROWS * WIDTH
    values += place * ROWS * WIDTH

    count = event_count(lengths, u, L, VALIDITY)
    start = 0
    end = T
    if PADDING != COMPUTE:
        start, end = span(
            u, count, mask, mask_stride_b, mask_stride_t, L, T, VALIDITY, CONCAT, LATEST_LAST
        )
    if end - start > HALF:
        if HALF < ROWS:
            t = start + tl.arange(0, ROWS)
            valid = is_valid(
                t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, CONCAT, LATEST_LAST
            )
            keep = t < T if PADDING == COMPUTE else valid
            _attend_block(
                x, candidate, shared, keys, values, attended, weight, bias, t, valid, keep,
                u, b, h, x_stride_b, x_stride_t, candidate_stride, L, T, scale,
                E, D, HEAD, LATEST_LAST, ROW_STRIDE, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK,
                ROWS, ROWS,
            )  # fmt: skip
    elif end > start:
        t = start + tl.arange(0, HALF)
        valid = is_valid(
            t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, CONCAT, LATEST_LAST
        )
        keep = t < T if PADDING == COMPUTE else valid
        _attend_block(
            x, candidate, shared, keys, values, attended, weight, bias, t, valid, keep,
            u, b, h, x_stride_b, x_stride_t, candidate_stride, L, T, scale,
            E, D, HEAD, LATEST_LAST, ROW_STRIDE, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK,
            ROWS, HALF,
        )  # fmt: skip
