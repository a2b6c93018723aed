"""How each problem is cut into blocks, from a fixed table: equal problems always run equal code.

Nothing is tried out at run time. `docs/design/triton.md` says what each number rests on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

#: Sequences of at most so many tokens are one block.
LONGEST_BLOCK = 128
#: Wider tokens and heads do not fit the registers.
WIDEST_MODEL = 512
WIDEST_HEAD = 256
#: Wider tokens do not share what their users' events give: it spills.
WIDEST_SHARED = 128

_CHUNKS = (128, 64, 32, 16)
_WASTE = 1.25
_WIDE = 128


class Split(NamedTuple):
    """A width as so many chunks of `width` columns, the last of which may be padded."""

    chunks: int
    width: int

    @property
    def padded(self) -> int:
        """All columns."""
        return self.chunks * self.width


class Attention(NamedTuple):
    """Blocks of the attention kernels."""

    rows: int  # queries of a step
    keys: int  # keys of a step; the short kernel has one step
    half: int  # short kernel: rows of the block for sequences that fit it
    num_warps: int
    num_stages: int


class Tail(NamedTuple):
    """Blocks of the kernels after attention."""

    rows: int
    num_warps: int
    num_stages: int


class BatchNorm(NamedTuple):
    """Blocks of the batch norm kernel."""

    rows: int
    columns: int
    num_warps: int


class Architecture(NamedTuple):
    """What the choice depends on beside the problem."""

    stages: int  # of loops over weights and keys
    wide_rows: int  # of the tail for tokens of 129 to 256 columns
    keys: int  # of a step of long attention
    # Whether all threads of a program see what one wrote to memory before a barrier. On AMD GPUs
    # the barrier that Triton emits does not wait for writes.
    barrier_shows_writes: bool


_DEFAULT = Architecture(stages=2, wide_rows=32, keys=64, barrier_shows_writes=True)
# 64 KB of shared memory.
_AMD = Architecture(stages=1, wide_rows=16, keys=32, barrier_shows_writes=False)
_ARCHITECTURES = {
    "sm_80": _DEFAULT,
    "sm_86": _DEFAULT,
    "sm_89": _DEFAULT,
    "sm_90": _DEFAULT,
    "sm_100": _DEFAULT._replace(stages=1),  # pipelined, long attention spills
    "sm_120": _DEFAULT,
    "gfx942": _AMD,
}


def architecture(name: str) -> Architecture:
    """The row of the table for "sm_90", "gfx942", ...; the default for a chip it does not know."""
    return _ARCHITECTURES.get(name, _AMD if name.startswith("gfx") else _DEFAULT)


def split(width: int, widest: int) -> Split:
    """The widest chunks that pad little: at most a quarter, or as little as any would.

    Examples
    --------
    >>> split(96, 64), split(48, 64), split(20, 64)
    (Split(chunks=3, width=32), Split(chunks=3, width=16), Split(chunks=1, width=32))
    """
    choices = [Split(-(-width // c), c) for c in _CHUNKS if c <= widest]
    allowed = max(_WASTE * width, min(c.padded for c in choices))
    return next(c for c in choices if c.padded <= allowed)


class Splits(NamedTuple):
    """How the widths of an encoder are cut; the packed weights depend on nothing else."""

    model: Split
    head: Split
    hidden: Split


@lru_cache(maxsize=256)
def splits(d_model: int, nhead: int, dim_feedforward: int) -> Splits:
    """Chunks of an encoder of this shape."""
    wide = d_model > _WIDE
    return Splits(
        split(d_model, 128 if wide else 64),
        split(d_model // nhead, 16 if wide else 64),
        split(dim_feedforward, 64),
    )


@lru_cache(maxsize=256)
def attention(arch: str, tokens: int, d_model: int, head: int) -> Attention:
    """Blocks for sequences of this many tokens."""
    if tokens > LONGEST_BLOCK:
        table = architecture(arch)
        rows = 64 if max(d_model, head) > _WIDE else 128
        return Attention(rows, table.keys, 0, rows // 16, table.stages)
    rows = max(16, 1 << (tokens - 1).bit_length())
    half = rows // 2 if rows >= 64 else rows
    return Attention(rows, rows, half, rows // 16, 1)


@lru_cache(maxsize=256)
def tail(arch: str, d_model: int, hidden: Split, is_summary: bool) -> Tail:
    """Blocks for tokens of this width."""
    table = architecture(arch)
    stages = table.stages if hidden.chunks > 1 else 1
    if d_model <= _WIDE:
        # The summary passes over a sequence in steps, for which the weights stay in L1.
        return Tail(16 if is_summary else 64, 4, stages)
    return Tail(table.wide_rows if d_model <= 256 else 16, 8, stages)


@lru_cache(maxsize=256)
def batch_norm(rows: int, columns: int) -> BatchNorm:
    """Blocks of about 2,048 elements, 16 a thread, for a matrix of this size."""
    across = min(512, max(16, 1 << (columns - 1).bit_length()))
    down = min(2048 // across, 1 << (rows - 1).bit_length())
    return BatchNorm(down, across, 4)
