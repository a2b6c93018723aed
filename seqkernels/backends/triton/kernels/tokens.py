"""Which tokens a sequence has and where they lie: validity, spans, loads with the input fusion.

A block holds rows of tokens as ``CHUNKS`` tensors of ``CHUNK`` columns: 96 columns are three of 32,
not one of 128. Columns from D on are zero.

Letters: B sequences, L events, T tokens (L + 1 with fusion "append"), D model width, E event width.
"""

# Triton compiles what follows: no types, no unpacking of tuples.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

# Values of the constants FUSION, VALIDITY and PADDING.
NONE = tl.constexpr(0)
CONCAT = tl.constexpr(1)
APPEND = tl.constexpr(2)
BY_MASK = tl.constexpr(1)
BY_LENGTH = tl.constexpr(2)
ZERO = tl.constexpr(0)
COMPUTE = tl.constexpr(1)
EXCLUDE = tl.constexpr(2)
BY_FLAG = tl.constexpr(3)  # ZERO or COMPUTE: what a byte on the device says


@triton.jit
def events_row(user_index, b, U, USERS: tl.constexpr):
    """Row of the events of sequence b; an index outside 0 .. U - 1 counts as the nearer end."""
    if USERS:
        b = tl.minimum(tl.maximum(tl.load(user_index + b), 0), U - 1)
    return b


@triton.jit
def event_count(lengths, u, L, VALIDITY: tl.constexpr):
    """Number of leading valid events; a length outside 0 .. L counts as the nearer end."""
    if VALIDITY == BY_LENGTH:
        count = tl.minimum(tl.maximum(tl.load(lengths + u), 0), L).to(tl.int32)
    else:
        count = L
    return count


@triton.jit
def complaint(lengths, user_index, u, b, L, USERS: tl.constexpr, VALIDITY: tl.constexpr):
    """NaN where a length or an index was out of range, else 0: added to what leaves the encoder.

    To raise, the host would have to wait for the GPU.
    """
    wrong = b != b
    if VALIDITY == BY_LENGTH:
        given = tl.load(lengths + u)
        wrong = wrong | (given < 0) | (given > L)
    if USERS:
        wrong = wrong | (tl.load(user_index + b) != u)
    return tl.where(wrong, float("nan"), 0.0)


@triton.jit
def is_valid(
    t,
    u,
    count,
    mask,
    mask_stride_b,
    mask_stride_t,
    L,
    VALIDITY: tl.constexpr,
    FUSION: tl.constexpr,
    LATEST_LAST: tl.constexpr,
):
    """Which tokens t [M] of row u of the events are valid keys; none outside the sequence."""
    event = t
    if FUSION == APPEND and not LATEST_LAST:
        event = t - 1
    inside = (event >= 0) & (event < count)
    if VALIDITY == BY_MASK:
        where = mask + u * mask_stride_b + event.to(tl.int64) * mask_stride_t
        valid = inside & (tl.load(where, mask=inside, other=1) == 0)
    else:
        valid = inside
    if FUSION == APPEND:
        valid = valid | (t == (L if LATEST_LAST else 0))
    return valid


@triton.jit
def span(
    u,
    count,
    mask,
    mask_stride_b,
    mask_stride_t,
    L,
    T,
    VALIDITY: tl.constexpr,
    FUSION: tl.constexpr,
    LATEST_LAST: tl.constexpr,
):
    """First valid token and one past the last; (0, 0) where none is valid."""
    if VALIDITY == BY_MASK:
        first = T
        last = 0
        for start in range(0, T, 128):
            t = start + tl.arange(0, 128)
            valid = is_valid(
                t, u, count, mask, mask_stride_b, mask_stride_t, L, VALIDITY, FUSION, LATEST_LAST
            )
            first = tl.minimum(first, tl.min(tl.where(valid, t, T), 0))
            last = tl.maximum(last, tl.max(tl.where(valid, t + 1, 0), 0))
        first = tl.minimum(first, last)
    elif FUSION == APPEND:
        if LATEST_LAST:
            first = tl.where(count > 0, 0, L)
            last = T
        else:
            first = 0
            last = count + 1
    else:
        first = 0
        last = count
    return first, last


@triton.jit
def rows_to_compute(first, last, T, computes_padding, PADDING: tl.constexpr):
    """The span of valid tokens, or all: the first row that is computed and one past the last."""
    if PADDING == COMPUTE:
        first = 0
        last = T
    elif PADDING == BY_FLAG:
        whole = tl.load(computes_padding) != 0
        first = tl.where(whole, 0, first)
        last = tl.where(whole, T, last)
    return first, last


@triton.jit
def is_computed(inside, valid, computes_padding, PADDING: tl.constexpr):
    """Which of the tokens inside the sequence [M] are computed."""
    if PADDING == COMPUTE:
        kept = inside
    elif PADDING == BY_FLAG:
        kept = tl.where(tl.load(computes_padding) != 0, inside, valid)
    else:
        kept = valid
    return kept


@triton.jit
def load_tokens(
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
    E: tl.constexpr,
    D: tl.constexpr,
    FUSION: tl.constexpr,
    LATEST_LAST: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows t [M] of the sequence, 0 where not `keep`: fp32 chunks [M, CHUNK].

    Events are those of row u of x, the candidate is that of b; each a scalar or [M].
    """
    event = t
    of_event = keep
    if FUSION == APPEND:
        if LATEST_LAST:
            own = t == L
        else:
            own = t == 0
            event = t - 1
        of_event = keep & (own == 0)
    row = x + u * x_stride_b + event.to(tl.int64) * x_stride_t
    other_row = candidate + b * candidate_stride + t * 0
    chunks = ()
    for c in tl.static_range(CHUNKS):
        column = c * CHUNK + tl.arange(0, CHUNK)
        in_event = (column < E)[None, :]
        if FUSION == CONCAT and c * CHUNK >= E:
            of_candidate = keep[:, None] & (column < D)[None, :]
            value = tl.load(other_row[:, None] + (column - E)[None, :], of_candidate, 0.0)
        elif FUSION == CONCAT and (c + 1) * CHUNK > E:
            value = tl.load(row[:, None] + column[None, :], keep[:, None] & in_event, 0.0)
            of_candidate = keep[:, None] & (column >= E)[None, :] & (column < D)[None, :]
            token = tl.load(other_row[:, None] + (column - E)[None, :], of_candidate, 0.0)
            value = tl.where(in_event, value, token)
        else:
            inside = of_event[:, None]
            if (c + 1) * CHUNK > E:
                inside = inside & in_event
            value = tl.load(row[:, None] + column[None, :], inside, 0.0)
            if FUSION == APPEND:
                of_candidate = (keep & own)[:, None] & in_event
                token = tl.load(other_row[:, None] + column[None, :], of_candidate, 0.0)
                value = tl.where(own[:, None], token, value)
        chunks = chunks + (value.to(tl.float32),)
    return chunks
