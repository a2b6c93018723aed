"""Attention of one head over one sequence, its projections included.

::

    q = (x W_q + b_q) log2(e) / sqrt(d);  k = x W_k;  v = x W_v    of valid keys, else v = 0
    p = 2^(q k^T - max) over valid keys;  a = (p v) / sum(p) + b_v, or 0 where no key is valid

b_k adds the same number to all scores of a query, so it is left out; rows of p / sum(p) add up to
one, so b_v is added once. x is normalized before, for encoders that normalize first.

Letters: M rows of a block, C = HEAD_CHUNK, d head width; else as in `tokens`.
"""

# Triton compiles what follows: no types, no unpacking of tuples.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from seqkernels.backends.triton.kernels.rows import normalize, project, to_operands
from seqkernels.backends.triton.kernels.tokens import (
    COMPUTE,
    NONE,
    event_count,
    events_row,
    is_computed,
    is_valid,
    load_tokens,
    rows_to_compute,
    span,
)

# What changes from call to call and would only multiply the compiled variants.
_VARIES = (
    "candidate", "user_index", "mask", "lengths", "computes_padding", "x_stride_b", "x_stride_t",
    "mask_stride_b", "mask_stride_t", "candidate_stride", "U", "L", "T", "eps",
)  # fmt: skip


@triton.jit
def project_heads(
    rows,
    weight,
    KIND: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
):
    """Q (KIND 0), k (1) or v (2) of one head: fp32 chunks [M, C].

    weight: bf16 [3, CHUNKS * CHUNK, HEAD_CHUNKS * HEAD_CHUNK].
    """
    WIDTH: tl.constexpr = HEAD_CHUNKS * HEAD_CHUNK
    parts = ()
    for j in tl.static_range(HEAD_CHUNKS):
        parts = parts + (
            project(
                rows,
                weight + KIND * CHUNKS * CHUNK * WIDTH,
                j * HEAD_CHUNK,
                WIDTH,
                HEAD_CHUNK,
                CHUNKS,
                CHUNK,
            ),
        )
    return parts


@triton.jit
def keys_of(
    rows,
    weight,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
):
    """k: bf16 chunks [M, C]."""
    raw = project_heads(rows, weight, 1, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    return to_operands(raw, HEAD_CHUNKS)


@triton.jit
def queries_of(
    rows,
    weight,
    bias,
    scale,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
):
    """Scaled q: bf16 chunks [M, C]; bias: fp32 [2, d], that of q and that of v."""
    raw = project_heads(rows, weight, 0, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    result = ()
    for j in tl.static_range(HEAD_CHUNKS):
        part = tl.load(bias + j * HEAD_CHUNK + tl.arange(0, HEAD_CHUNK))
        result = result + (((raw[j] + part[None, :]) * scale).to(tl.bfloat16),)
    return result


@triton.jit
def values_of(
    rows,
    weight,
    valid,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
):
    """v, cleared where no key is valid, so that NaN there meets no weight of 0."""
    raw = project_heads(rows, weight, 2, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    result = ()
    for j in tl.static_range(HEAD_CHUNKS):
        result = result + (tl.where(valid[:, None], raw[j], 0.0).to(tl.bfloat16),)
    return result


@triton.jit
def scores(q, k, valid, HEAD_CHUNKS: tl.constexpr):
    """Q k^T [M, N] with -inf for keys that are not valid."""
    s = tl.dot(q[0], tl.trans(k[0]))
    for j in tl.static_range(1, HEAD_CHUNKS):
        s = tl.dot(q[j], tl.trans(k[j]), s)
    return tl.where(valid[None, :], s, float("-inf"))


@triton.jit
def exponentials(s):
    """2^(s - the row's largest), 0 in a row of -inf: fp32 [M, N]."""
    most = tl.max(s, 1)
    return tl.exp2(s - tl.where(most == float("-inf"), 0.0, most)[:, None])


@triton.jit
def value_biases(bias, HEAD_CHUNKS: tl.constexpr, HEAD_CHUNK: tl.constexpr):
    """b_v of one head: fp32 chunks [C]; bias: fp32 [2, d]."""
    parts = ()
    for j in tl.static_range(HEAD_CHUNKS):
        column = j * HEAD_CHUNK + tl.arange(0, HEAD_CHUNK)
        parts = parts + (tl.load(bias + HEAD_CHUNKS * HEAD_CHUNK + column),)
    return parts


@triton.jit
def store_attended(
    attended,
    mixed,
    total,
    offsets,
    row,
    h,
    keep,
    ROW_STRIDE: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
):
    """Write mixed / total + offsets to the columns of head h of rows `row` [M]; offsets: [C]."""
    present = (total != 0.0)[:, None]
    inverse = (1.0 / tl.where(total != 0.0, total, 1.0))[:, None]
    for j in tl.static_range(HEAD_CHUNKS):
        column = j * HEAD_CHUNK + tl.arange(0, HEAD_CHUNK)
        value = tl.where(present, mixed[j] * inverse + offsets[j][None, :], 0.0)
        where = attended + row[:, None] * ROW_STRIDE + h * HEAD + column[None, :]
        tl.store(where, value.to(tl.bfloat16), keep[:, None] & (column < HEAD)[None, :])


@triton.jit
def load_operands(
    x,
    candidate,
    t,
    u,
    b,
    keep,
    x_stride_b,
    x_stride_t,
    candidate_stride,
    L,
    norm,
    eps,
    E: tl.constexpr,
    D: tl.constexpr,
    FUSION: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows t as operands of the projections; norm: fp32 [2, CHUNKS * CHUNK], weight and bias."""
    rows = load_tokens(
        x, candidate, t, u, b, keep, x_stride_b, x_stride_t, candidate_stride, L,
        E, D, FUSION, LATEST_LAST, CHUNKS, CHUNK,
    )  # fmt: skip
    if NORM_FIRST:
        rows = normalize(rows, norm, norm + CHUNKS * CHUNK, eps, D, CHUNKS, CHUNK)
    return to_operands(rows, CHUNKS)


@triton.jit
def attend_at_once(
    x,
    candidate,
    attended,
    weight,
    bias,
    norm,
    t,
    valid,
    keep,
    row_of_x,
    b,
    h,
    x_stride_b,
    x_stride_t,
    candidate_stride,
    L,
    T,
    scale,
    eps,
    E: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    FUSION: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
):
    """Tokens t [M] as queries and as keys; nothing between x and the result leaves the chip."""
    rows = load_operands(
        x, candidate, t, row_of_x, b, keep, x_stride_b, x_stride_t, candidate_stride, L, norm, eps,
        E, D, FUSION, LATEST_LAST, NORM_FIRST, CHUNKS, CHUNK,
    )  # fmt: skip
    k = keys_of(rows, weight, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    q = queries_of(rows, weight, bias, scale, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    s = scores(q, k, valid, HEAD_CHUNKS)
    p = exponentials(s)
    total = tl.sum(p, 1)
    weights = p.to(tl.bfloat16)
    v = values_of(rows, weight, valid, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
    mixed = ()
    for j in tl.static_range(HEAD_CHUNKS):
        mixed = mixed + (tl.dot(weights, v[j]),)
    offsets = value_biases(bias, HEAD_CHUNKS, HEAD_CHUNK)
    store_attended(
        attended, mixed, total, offsets, b * T + t, h, keep,
        ROW_STRIDE, HEAD, HEAD_CHUNKS, HEAD_CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARIES)
def attention_short(
    x,  # [B, L, E]; above the first layer [B, T, D]
    candidate,  # [B, C]
    user_index,  # [B] int64: the row of a sequence in x, mask and lengths
    mask,  # [B, L] bool, true = ignore
    lengths,  # [B]
    computes_padding,  # [1] uint8, with PADDING BY_FLAG
    weight,  # bf16 [H, 3, CHUNKS * CHUNK, d]
    bias,  # fp32 [H, 2, d]
    norm,  # fp32 [2, CHUNKS * CHUNK]
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
    eps,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD: tl.constexpr,
    FUSION: tl.constexpr,
    FIRST: tl.constexpr,  # whether x holds events, to be fused with the candidate
    USERS: tl.constexpr,  # whether there is a user_index
    VALIDITY: tl.constexpr,
    PADDING: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,  # at least T
    HALF: tl.constexpr,  # rows of the block for sequences that fit it, ROWS if there is none
):
    """One program for each sequence and head; the sequence is one block."""
    x_stride_b = x_stride_b.to(tl.int64) * UNIT
    x_stride_t = x_stride_t.to(tl.int64) * UNIT
    h = tl.program_id(0) % HEADS
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    u = events_row(user_index, b, U, USERS)
    row_of_x = u if FIRST else b
    SOURCE: tl.constexpr = FUSION if FIRST else NONE
    weight += h * 3 * CHUNKS * CHUNK * HEAD_CHUNKS * HEAD_CHUNK
    bias += h * 2 * HEAD_CHUNKS * HEAD_CHUNK

    count = event_count(lengths, u, L, VALIDITY)
    start = 0
    end = T
    if PADDING != COMPUTE:
        start, end = span(
            u, count, mask, mask_stride_b, mask_stride_t, L, T, VALIDITY, FUSION, LATEST_LAST
        )
        start, end = rows_to_compute(start, end, T, computes_padding, PADDING)
    if end - start > HALF:
        if HALF < ROWS:
            t = start + tl.arange(0, ROWS)
            valid = is_valid(
                t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, FUSION, LATEST_LAST
            )
            keep = is_computed(t < T, valid, computes_padding, PADDING)
            attend_at_once(
                x, candidate, attended, weight, bias, norm, t, valid, keep, row_of_x, b, h,
                x_stride_b, x_stride_t, candidate_stride, L, T, scale, eps,
                E, D, HEAD, SOURCE, LATEST_LAST, NORM_FIRST, ROW_STRIDE,
                CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK,
            )  # fmt: skip
    elif end > start:
        t = start + tl.arange(0, HALF)
        valid = is_valid(
            t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, FUSION, LATEST_LAST
        )
        keep = is_computed(t < T, valid, computes_padding, PADDING)
        attend_at_once(
            x, candidate, attended, weight, bias, norm, t, valid, keep, row_of_x, b, h,
            x_stride_b, x_stride_t, candidate_stride, L, T, scale, eps,
            E, D, HEAD, SOURCE, LATEST_LAST, NORM_FIRST, ROW_STRIDE,
            CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK,
        )  # fmt: skip


@triton.jit
def _load_projected(
    projected,
    t,
    inside,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
):
    """Rows t [N] of k or v as `attention_long` put them down: bf16 chunks [N, C]."""
    parts = ()
    for j in tl.static_range(HEAD_CHUNKS):
        column = j * HEAD_CHUNK + tl.arange(0, HEAD_CHUNK)
        where = projected + t[:, None] * (HEAD_CHUNKS * HEAD_CHUNK) + column[None, :]
        parts = parts + (tl.load(where, inside[:, None], 0.0),)
    return parts


@triton.jit
def _store_projected(
    projected,
    parts,
    t,
    inside,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
):
    """The inverse of `_load_projected`."""
    for j in tl.static_range(HEAD_CHUNKS):
        column = j * HEAD_CHUNK + tl.arange(0, HEAD_CHUNK)
        where = projected + t[:, None] * (HEAD_CHUNKS * HEAD_CHUNK) + column[None, :]
        tl.store(where, parts[j], inside[:, None])


@triton.jit(do_not_specialize=_VARIES)
def attention_long(
    x,
    candidate,
    user_index,
    mask,
    lengths,
    computes_padding,
    weight,
    bias,
    norm,
    projected,  # bf16 [B, H, 2, T, d], written and read; the rest are those of `attention_short`
    attended,
    x_stride_b,
    x_stride_t,
    candidate_stride,
    mask_stride_b,
    mask_stride_t,
    U,
    L,
    T,
    scale,
    eps,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD: tl.constexpr,
    FUSION: tl.constexpr,
    FIRST: tl.constexpr,
    USERS: tl.constexpr,
    VALIDITY: tl.constexpr,
    PADDING: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_CHUNKS: tl.constexpr,
    HEAD_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,  # queries of a step
    KEYS: tl.constexpr,  # keys of a step
    KEPT: tl.constexpr,  # whether k and v are put down once, or projected for each step of queries
):
    """One program for each sequence and head, in steps of queries and of keys."""
    x_stride_b = x_stride_b.to(tl.int64) * UNIT
    x_stride_t = x_stride_t.to(tl.int64) * UNIT
    h = tl.program_id(0) % HEADS
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    u = events_row(user_index, b, U, USERS)
    row_of_x = u if FIRST else b
    SOURCE: tl.constexpr = FUSION if FIRST else NONE
    WIDTH: tl.constexpr = HEAD_CHUNKS * HEAD_CHUNK
    weight += h * 3 * CHUNKS * CHUNK * WIDTH
    bias += h * 2 * WIDTH
    k_rows = projected + (b * HEADS + h) * 2 * T * WIDTH
    v_rows = k_rows + T.to(tl.int64) * WIDTH

    count = event_count(lengths, u, L, VALIDITY)
    first, last = span(
        u, count, mask, mask_stride_b, mask_stride_t, L, T, VALIDITY, FUSION, LATEST_LAST
    )
    if KEPT:
        for start in range(first, last, KEYS):
            t = start + tl.arange(0, KEYS)
            inside = t < last
            valid = inside & is_valid(
                t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, FUSION, LATEST_LAST
            )
            rows = load_operands(
                x, candidate, t, row_of_x, b, valid, x_stride_b, x_stride_t, candidate_stride, L,
                norm, eps, E, D, SOURCE, LATEST_LAST, NORM_FIRST, CHUNKS, CHUNK,
            )  # fmt: skip
            k = keys_of(rows, weight, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
            _store_projected(k_rows, k, t, inside, HEAD_CHUNKS, HEAD_CHUNK)
            v = values_of(rows, weight, valid, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
            _store_projected(v_rows, v, t, inside, HEAD_CHUNKS, HEAD_CHUNK)
        tl.debug_barrier()  # what one thread of the program wrote, others read

    begin, end = rows_to_compute(first, last, T, computes_padding, PADDING)
    for start in range(begin, end, ROWS):
        t = start + tl.arange(0, ROWS)
        in_block = t < end
        valid_rows = in_block & is_valid(
            t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, FUSION, LATEST_LAST
        )
        keep = is_computed(in_block, valid_rows, computes_padding, PADDING)
        rows = load_operands(
            x, candidate, t, row_of_x, b, keep, x_stride_b, x_stride_t, candidate_stride, L,
            norm, eps, E, D, SOURCE, LATEST_LAST, NORM_FIRST, CHUNKS, CHUNK,
        )  # fmt: skip
        q = queries_of(rows, weight, bias, scale, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = ()
        for _ in tl.static_range(HEAD_CHUNKS):
            mixed = mixed + (tl.zeros([ROWS, HEAD_CHUNK], tl.float32),)
        for key in range(first, last, KEYS):
            s_t = key + tl.arange(0, KEYS)
            inside = s_t < last
            valid = inside & is_valid(
                s_t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, FUSION, LATEST_LAST
            )
            if KEPT:
                k = _load_projected(k_rows, s_t, inside, HEAD_CHUNKS, HEAD_CHUNK)
            else:
                key_rows = load_operands(
                    x, candidate, s_t, row_of_x, b, valid, x_stride_b, x_stride_t,
                    candidate_stride, L, norm, eps, E, D, SOURCE, LATEST_LAST, NORM_FIRST,
                    CHUNKS, CHUNK,
                )  # fmt: skip
                k = keys_of(key_rows, weight, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
            s = scores(q, k, valid, HEAD_CHUNKS)
            grown = tl.maximum(most, tl.max(s, 1))
            # A query whose keys so far are all hidden has no maximum yet.
            offset = tl.where(grown == float("-inf"), 0.0, grown)
            p = tl.exp2(s - offset[:, None])
            shrink = tl.exp2(most - offset)
            total = total * shrink + tl.sum(p, 1)
            weights = p.to(tl.bfloat16)
            if KEPT:
                v = _load_projected(v_rows, s_t, inside, HEAD_CHUNKS, HEAD_CHUNK)
            else:
                v = values_of(key_rows, weight, valid, CHUNKS, CHUNK, HEAD_CHUNKS, HEAD_CHUNK)
            scaled = ()
            for j in tl.static_range(HEAD_CHUNKS):
                scaled = scaled + (tl.dot(weights, v[j], mixed[j] * shrink[:, None]),)
            mixed = scaled
            most = grown
        offsets = value_biases(bias, HEAD_CHUNKS, HEAD_CHUNK)
        store_attended(
            attended, mixed, total, offsets, b * T + t, h, keep,
            ROW_STRIDE, HEAD, HEAD_CHUNKS, HEAD_CHUNK,
        )  # fmt: skip
