"""The shortest way from a module's ``forward`` to its native op.

A call reads the module's parts, checks everything and packs the weights. A `Ready` keeps what came
of it, together with a snapshot of all that was read: attributes, hooks, parameters and submodules
of the modules, the tensors' memory, shapes and version counters, and what holds for the whole
process. As long as nothing of that has changed, the next call goes straight to the op. What the op
refuses goes the long way, which words the error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqkernels import backends, settings
from seqkernels.backends import native_module, weights
from seqkernels.nn import read
from seqkernels.nn.owner import Owner
from seqkernels.ops.library import nobody_listens

_MOST_MISSES = 16
#: Weights and the kernel that has them packed, or None for what no native kernel runs any more.
Made = tuple[Sequence[Tensor | None], backends.Native | None] | None


class Ready(NamedTuple):
    """A native op with its packed weights, and what they hold good for."""

    op: Callable[..., Tensor]
    packed: tuple[Tensor, Tensor]
    label: str
    dtype: torch.dtype  # of x
    settings: settings.Settings
    epoch: int
    snapshot: Any
    batch_first: bool = True

    def run(self, *tensors: Tensor | None) -> Tensor | None:
        """The op's result, or None for what it refuses."""
        try:
            result = self.op(*tensors, *self.packed)
        except (ValueError, RuntimeError):
            return None
        backends.calls[self.label] += 1
        return result

    def encode(self, src: Tensor, mask: Tensor | None) -> Tensor | None:
        """The op ``encoder`` on torch's layouts of a batch; None for what it refuses."""
        if src.dim() != 3 or not (mask is None or mask.dtype is torch.bool):
            return None
        x = src if self.batch_first else src.transpose(0, 1)
        out = self.run(x, None, None, mask, None, None)
        if out is None:
            return None
        return (out if self.batch_first else out.transpose(0, 1)).contiguous()

    def summarize(
        self,
        events: Tensor,
        candidates: Tensor | None,
        user_index: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor | None:
        """The op ``encoder``, or with `user_index` ``request_scoring``; see `run`."""
        if mask is not None and mask.dtype is not torch.bool:
            return None
        return self.run(events, candidates, user_index, mask, lengths, None)


def ready_for(owner: Owner, x: Any) -> Ready | None:
    """What the module keeps, if a call on `x` may go straight to the op."""
    packed = owner.__dict__.get("_packed_weights")
    if packed is None:
        return None
    ready: Ready | None = packed.ready
    if (
        ready is not None
        and isinstance(x, Tensor)
        and x.dtype is ready.dtype
        and nobody_listens(x)
        and ready.epoch == weights.epoch
        and ready.settings is settings.current
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")  # whatever the device, in torch's encoder
        and ready.snapshot.holds(owner)
    ):
        packed.misses = 0
        return ready
    return None


@cache
def _tensor_offset() -> int | None:
    """Where in Python's object of a tensor torch keeps the tensor, None if it is not found.

    Looking at a tensor there takes a few nanoseconds, where its attributes take a microsecond. A
    snapshot checks each tensor's place before it relies on it.
    """
    tensor: Any = torch.empty(0)
    size: int = torch._C.TensorBase.__basicsize__
    for offset in range(16, size, 8):
        if ctypes.c_void_p.from_address(id(tensor) + offset).value == tensor._cdata:
            return offset
    return None


def keep(
    owner: Owner,
    x: Tensor,
    parts: Iterable[nn.Module],
    tensors: Sequence[Tensor | None],
    make: Callable[[], Made],
    *,
    batch_first: bool = True,
    by_contents: bool = False,
) -> None:
    """After a call on `x` that ran the native op: let the next one go straight to it.

    Not where `tensors` cannot be watched, nor for a module that is never twice the same. `make`
    reads the module once more, behind the snapshot, so that nothing can change between the two.
    With `by_contents` the tensors' contents are compared on each call.
    """
    native, packed = native_module.module, owner._packed
    if native is None or not nobody_listens(x) or packed.misses > _MOST_MISSES:
        return
    offset = _tensor_offset()
    present = [t for t in tensors if t is not None]
    if offset is None or not all(map(weights.can_be_watched, present)):
        return
    weights.watch_optimizers()
    epoch, now = weights.epoch, settings.current
    try:
        snapshot = native.Snapshot(
            owner,
            "_packed_weights",
            list(parts),
            read.watched,
            [(torch.backends.mha.__dict__, "_is_fastpath_enabled")],
            read.watched_hooks(),
            present,
            by_contents,
            offset,
        )
    except (ValueError, RuntimeError):  # a tensor that is not at its place, or became another
        return
    made = make()
    if made is None:
        return
    read_again, kernel = made
    same = len(read_again) == len(tensors) and all(map(is_, read_again, tensors))
    if kernel is None or not same or not snapshot.holds(owner):
        return
    packed.misses += 1
    packed.ready = Ready(*kernel, x.dtype, now, epoch, snapshot, batch_first)
