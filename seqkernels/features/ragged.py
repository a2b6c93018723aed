"""Many sorted runs in flat arrays, worked on all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rows = NDArray[np.int64]

_FEW = 4096  # below, packing costs more than it saves


def expand(first: Rows, counts: Rows) -> Rows:
    """Rows ``first[i], ..., first[i] + counts[i] - 1`` of each run, one run after the other.

    Examples
    --------
    >>> expand(np.array([10, 5]), np.array([2, 3])).tolist()
    [10, 11, 5, 6, 7]
    """
    ends = np.cumsum(counts)
    rows = np.repeat(first - (ends - counts), counts)
    rows += np.arange(len(rows))
    return rows


def first_not_before(time: Array, first: Rows, last: Rows, bound: Array) -> Rows:
    """Binary search in runs: the first row of ``first <= row < last`` with time >= bound, or last.

    Parameters
    ----------
    time : array
        Sorted within each run.
    first, last, bound : arrays [R]
        The runs; one bound for each.

    Returns
    -------
    int64 array [R]

    Examples
    --------
    >>> time = np.array([1, 3, 3, 9, 2])
    >>> first_not_before(time, np.array([0, 4]), np.array([4, 5]), np.array([3, 7])).tolist()
    [1, 5]
    """
    # Most requests and most appends come after everything known: one look at the end is enough.
    end_is_late = time.take(last - 1, mode="clip") >= bound
    end_is_late &= first < last
    unsure = np.flatnonzero(end_is_late)
    if not len(unsure):
        return last
    result = last.copy()
    row, high, bound = first[unsure], last[unsure], bound[unsure]
    step = 1 << (int((high - row).max()).bit_length() - 1)
    while step:
        probe = row + step
        ahead = time.take(probe - 1, mode="clip") < bound
        ahead &= probe <= high
        row += step * ahead
        step >>= 1
    result[unsure] = row
    return result


def stable_order(*keys: Array) -> Rows:
    """What ``numpy.lexsort`` returns (the last key is the primary one), faster for integers.

    Examples
    --------
    >>> stable_order(np.array([5, 1, 5, 0]), np.array([1, 0, 0, 1])).tolist()
    [1, 2, 3, 0]
    """
    order = _argsort(keys[0])
    for key in keys[1:]:
        order = order[_argsort(key[order])]
    return order


def _argsort(key: Array) -> Rows:
    """Stable. A value and its row in one integer are sorted directly, where they fit."""
    if len(key) >= _FEW and key.dtype.kind in "iu":
        row_bits = (len(key) - 1).bit_length()
        if (int(key.max()) - int(key.min())).bit_length() + row_bits < 64:
            packed = key.astype(np.int64)  # wraps for uint64, and so does the difference
            packed -= key.min(keepdims=True).astype(np.int64)
            packed <<= row_bits
            packed |= np.arange(len(key))
            packed.sort()
            packed &= (1 << row_bits) - 1
            return packed
    return np.argsort(key, kind="stable")


def earlier_copies(keys: Sequence[Array]) -> Rows:
    """Rows that a later row repeats in every key; NaN repeats NaN.

    Examples
    --------
    >>> earlier_copies([np.array([7, 8, 7, 7]), np.array([0, 0, 0, 1])]).tolist()
    [0]
    """
    order = stable_order(*keys)
    repeated = np.ones(len(order) - 1, dtype=bool)
    for key in keys:
        here, following = key[order[:-1]], key[order[1:]]
        repeated &= (here == following) | ((here != here) & (following != following))
    return order[:-1][repeated]
