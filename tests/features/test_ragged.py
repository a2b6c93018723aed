"""The packed sort against ``numpy.lexsort``, at sizes and values where it is and is not taken."""

from __future__ import annotations

import numpy as np
import pytest

from seqkernels.features.ragged import Array, stable_order

INT64 = np.iinfo(np.int64)
G = np.random.default_rng(0)
KEYS = {
    "few values": lambda n: G.integers(-3, 3, n),
    "small integers": lambda n: G.integers(-128, 128, n, dtype=np.int8),
    "near the lowest": lambda n: G.integers(INT64.min, INT64.min + 50, n),
    "near the highest uint64": lambda n: G.integers(2**64 - 50, 2**64, n, dtype=np.uint64),
    "across the middle of uint64": lambda n: G.integers(2**63 - 9, 2**63 + 9, n, dtype=np.uint64),
    "as wide as fits": lambda n: np.append(G.integers(0, 9, n - 1), (1 << 63 - 14) - 1),
    "too wide by one bit": lambda n: np.append(G.integers(0, 9, n - 1), (1 << 64 - 14) - 1),
    "all of int64": lambda n: G.integers(INT64.min, INT64.max, n),
    "floats": lambda n: G.integers(-3, 3, n) / 2,
}


@pytest.mark.parametrize("count", [1, 5000, 2**14])
@pytest.mark.parametrize("kind", KEYS)
def test_stable_order_is_lexsort(kind: str, count: int) -> None:
    first: Array = KEYS[kind](count)
    second = G.integers(0, 5, count)
    for keys in ((first,), (first, second), (second, first)):
        assert np.array_equal(stable_order(*keys), np.lexsort(keys))
