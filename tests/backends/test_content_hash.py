"""The hash of weights in memory: what changes it, what does not, and what it refuses."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

native = pytest.importorskip("seqkernels._native", reason="the native module is not built")


def hash_of(*tensors: Tensor) -> int:
    assert all(t.is_contiguous() for t in tensors)
    return native.content_hash([t.data_ptr() for t in tensors], [t.nbytes for t in tensors])


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_bit_of_every_byte_counts() -> None:
    """Of all lengths around the width of a step: no single bit goes unseen, no two collide."""
    for size in range(301):
        data = np.random.default_rng(size).integers(256, size=size, dtype=np.uint8)
        where = [data.ctypes.data], [size]
        hashes = {native.content_hash(*where)}
        for place in range(size):
            for bit in range(8):
                data[place] ^= 1 << bit
                hashes.add(native.content_hash(*where))
                data[place] ^= 1 << bit
        assert len(hashes) == 1 + 8 * size
        assert all(0 <= h < 1 << 64 for h in hashes)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 65, 127, 300, 4096])
def test_alignment_does_not_matter(size: int) -> None:
    data = torch.randint(256, (size,), generator=torch.Generator().manual_seed(1)).byte()
    room = torch.zeros(size + 64, dtype=torch.uint8)
    hashes = set()
    for shift in range(64):
        room.fill_(shift)
        room[shift : shift + size] = data
        hashes.add(hash_of(room[shift : shift + size]))
    assert hashes == {hash_of(data)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_edits_of_weights_change_it(dtype: torch.dtype) -> None:
    w = weights(32, 32, dtype=dtype)
    edits = {
        "": w,
        "negated": -w,
        "transposed": w.t(),
        "rolled": w.roll(1, 0),
        "flipped": w.flip(1),
    }
    for i in range(32):
        for j in range(i):
            order = torch.arange(32)
            order[i], order[j] = j, i
            edits[f"rows {i} and {j}"] = w[order]
            edits[f"columns {i} and {j}"] = w[:, order]
        for width in (1, 2, 4):  # the signs of neighbours: a difference in the uppermost bits alone
            signs = torch.ones(32, dtype=dtype)
            signs[i : i + width] = -1
            edits[f"signs of columns {i} to {i + width}"] = w * signs
            edits[f"signs of rows {i} to {i + width}"] = w * signs[:, None]
    different = {t.contiguous().view(torch.uint8).numpy().tobytes() for t in edits.values()}
    assert len({hash_of(t.contiguous()) for t in edits.values()}) == len(different) > 1000


def test_zeros_differ_by_their_number_alone() -> None:
    hashes = {hash_of(torch.zeros(size, dtype=torch.uint8)) for size in range(1000)}
    assert len(hashes) == 1000


def test_random_small_blocks_do_not_collide() -> None:
    """200,000 hashes of 32 bits would collide about 5 times: so both halves count in full."""
    blocks = torch.arange(200_000)
    pointers, size = blocks.data_ptr(), blocks.element_size()
    hashes = [native.content_hash([pointers + size * i], [size]) for i in range(len(blocks))]
    assert len(set(hashes)) == len(hashes)
    assert len({h >> 32 for h in hashes}) > len(hashes) - 20
    assert len({h & 0xFFFFFFFF for h in hashes}) > len(hashes) - 20


def test_order_and_bounds_of_blocks_count() -> None:
    a, b = weights(8, 8), weights(8, 8, seed=1)
    joined = torch.cat([a, b])
    empty = torch.empty(0)
    contents = [(a, b), (b, a), (a,), (b,), (joined,), (a, a), (a, empty), (empty, a), (empty,), ()]
    contents += [(joined[:4], joined[4:]), (joined[:15], joined[15:])]
    assert len({hash_of(*tensors) for tensors in contents}) == len(contents)
    assert hash_of(a, b) == hash_of(a.clone(), b.clone())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="sizes_in_bytes: expected one for each of 2"):
        native.content_hash([1, 2], [0])
    with pytest.raises(ValueError, match="pointers: expected an address of 4 bytes"):
        native.content_hash([0], [4])
    assert native.content_hash([0], [0]) == hash_of(torch.empty(0))


def test_other_threads_run_meanwhile() -> None:
    """With the switch interval out of reach, a thread runs only where the lock is given up."""
    large = torch.zeros(16 << 20, dtype=torch.uint8)
    go = threading.Event()
    seen: list[bool] = []

    def other() -> None:
        go.wait(timeout=60)
        seen.append(True)

    thread = threading.Thread(target=other)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        go.set()  # from here on the other thread wants the lock
        for _ in range(2000):
            hash_of(large)
            if seen:
                break
        assert seen
        thread.join()
    finally:
        sys.setswitchinterval(interval)
