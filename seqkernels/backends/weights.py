"""What is derived from the weights of an op, and how a change of the weights is noticed.

A module owns what backends derived from its weights (packed weights) in a `PackedWeights`, and uses
it while three things hold:

1. The weights are the same tensors, at the same addresses, with the same version counters, shapes,
   strides and dtypes. This is looked at on every call. It follows ``load_state_dict``, ``.to()``,
   ``p.data = ...``, replaced parameters and in-place edits.
2. Nothing happened that changes weights behind the counters' back: a step of an optimizer (fused
   ones count no edit), a change between training and evaluation of any module of this package, a
   backward pass through an op, a call of `recheck_weights`. Each of these moves one number, the
   `epoch`; after it, the contents are compared with those that were packed.
3. Where a version counter cannot be trusted, the contents are the same on every call: tensors made
   under ``torch.inference_mode`` have no counter, and what is part of a larger storage (a flat
   buffer) may be edited through another part.

What remains unseen are edits through ``p.data``, a NumPy view or another process's shared memory
between two calls in evaluation mode: `recheck_weights` is there for them.

Graphs (``torch.compile``, ``torch.export``) call an op without a module. What is derived for such a
call rests in a registry, as long as the weights live.
"""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import attrgetter, is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from seqkernels.backends import native_module

_data_ptr = Tensor.data_ptr
_stride = Tensor.stride
_version = attrgetter("_version")
_shape = attrgetter("shape")
_dtype = attrgetter("dtype")
_is_inference = Tensor.is_inference


class WeightLayout(NamedTuple):
    """How an op names and checks its weights."""

    op: str
    name: Callable[[int, int], str]  # of the weight at an index among so many
    read: Callable[[Sequence[Tensor | None]], Any]  # checks them and returns their sizes
    # Those that are statistics of batch norms, which torch's own kernels update uncounted.
    statistics: slice = slice(0)


Weights = Sequence[Tensor | None]

epoch = 0  # moves when weights may have changed unseen
_lock = threading.RLock()


def recheck_weights() -> None:
    """Let every module compare the contents of its weights with what it packed, once.

    The next call of each module does so, and packs again only what differs. Needed after an edit
    that torch does not count, such as ``p.data.mul_(2)`` or a write through a NumPy view, in a
    module that stays in eval mode.

    Examples
    --------
    >>> import seqkernels
    >>> seqkernels.recheck_weights()
    """
    global epoch
    epoch += 1


def _renew_lock() -> None:
    """Another thread may have held the lock at the fork; it does not exist in the child."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)

_watches_optimizers = False


def watch_optimizers() -> None:
    """Let every optimizer's step count as a change, once there is something to compare."""
    global _watches_optimizers
    if not _watches_optimizers:
        _watches_optimizers = True
        register_optimizer_step_post_hook(lambda *_: recheck_weights())


def _given(weights: Weights) -> list[Tensor]:
    return [w for w in weights if w is not None]


def _fingerprint(present: list[Tensor]) -> tuple[list[Any], ...] | None:
    """What an edit changes, None for tensors that do not count their versions."""
    if any(map(_is_inference, present)):  # also a parameter whose data is such a tensor's
        return None
    versions = list(map(_version, present))
    return (
        list(map(_data_ptr, present)),
        versions,
        list(map(_shape, present)),
        list(map(_stride, present)),
        list(map(_dtype, present)),
    )


def _content(present: list[Tensor]) -> int | None:
    """A hash of all bytes; None away from the CPU, where looking would wait for the device."""
    blocks = []
    for weight in present:
        if weight.device.type != "cpu":
            return None
        blocks.append(weight.detach().contiguous())
    if _native_hash is not None:
        sizes = [b.numel() * b.element_size() for b in blocks]
        return int(_native_hash([b.data_ptr() for b in blocks], sizes))
    value = 0
    for block in blocks:
        value = zlib.crc32(block.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


_native_hash: Callable[[list[int], list[int]], int] | None = getattr(
    native_module.module, "content_hash", None
)


def can_be_watched(weight: Tensor) -> bool:
    """Whether every edit that torch counts shows on the tensor itself."""
    return not weight.is_inference() and weight.is_contiguous() and not shares_storage(weight)


def shares_storage(weight: Tensor) -> bool:
    """Whether its storage holds more than the weight."""
    return weight.untyped_storage().nbytes() != weight.numel() * weight.element_size()


class WeightSet:
    """The sizes an op read off its weights, and what backends derived from their present values."""

    __slots__ = (
        "__weakref__",
        "_content",
        "_derived",
        "_epoch",
        "_fingerprint",
        "_statistics",
        "_statistics_content",
        "_storages",
        "_watched",
        "shape",
    )

    def __init__(self, layout: WeightLayout, weights: Weights) -> None:
        self.shape: Any = layout.read(weights)
        for index, weight in enumerate(weights):
            if weight is not None and hasattr(weight, "__tensor_flatten__"):
                raise TypeError(
                    f"{layout.op}: weights: expected a plain tensor for "
                    f"{layout.name(index, len(weights))}, got a {type(weight).__name__}"
                )
        present = _given(weights)
        # In this order: a change while this runs is noticed by the next call.
        self._epoch = epoch
        self._fingerprint = _fingerprint(present)
        self._content = _content(present)
        self._statistics = layout.statistics
        self._statistics_content = _content(_given(weights[layout.statistics]))
        # Held so that no other storage can come to lie at an address seen before.
        self._storages = [w.untyped_storage() for w in present]
        self._watched = self._fingerprint is None or any(map(shares_storage, present))
        self._derived: dict[Hashable, Any] = {}
        watch_optimizers()

    def is_current(self, weights: Weights) -> bool:
        """Whether these weights, the same tensors as at first, still are what they were."""
        present = _given(weights)
        if self._fingerprint is not None and self._fingerprint != _fingerprint(present):
            return False
        now = epoch
        if self._watched or self._epoch != now:
            if self._content is None or self._content != _content(present):
                return False
            self._epoch = now
        statistics = _given(weights[self._statistics])
        return not statistics or self._statistics_content == _content(statistics)

    def derived(self, key: Hashable, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make(*arguments)` returned for `key`; made by one thread, once."""
        value = self._derived.get(key)
        if value is None:
            with _lock:
                value = self._derived.get(key)
                if value is None:
                    value = self._derived[key] = make(*arguments)
        return value


class PackedWeights:
    """What a module owns beside its parameters: a `WeightSet` for each op that it calls.

    It holds the weights themselves, so that no other tensor can take the identity of one.
    """

    __slots__ = ("_sets", "misses", "ready")

    def __init__(self) -> None:
        self._sets: dict[Hashable, tuple[list[Tensor | None], WeightSet]] = {}
        # The module's, see nn/ready.py, and how often it was made since it was last of use.
        self.ready: Any = None
        self.misses = 0

    def lookup(self, layout: WeightLayout, weights: Weights, part: Hashable = None) -> WeightSet:
        """The `WeightSet` of these weights, new where they are new or have changed.

        `part` tells the calls of a module apart that has several.
        """
        kept = self._sets.get(part)
        if kept is not None and _same(kept[0], weights) and kept[1].is_current(weights):
            return kept[1]
        with _lock:
            kept = self._sets.get(part)
            if kept is None or not (_same(kept[0], weights) and kept[1].is_current(weights)):
                self.ready = None
                self._sets.pop(part, None)  # freed before its successor is made
                kept = self._sets[part] = (list(weights), WeightSet(layout, weights))
        return kept[1]

    def clear(self) -> None:
        """Drop everything; the next call packs again."""
        self._sets = {}
        self.ready = None


def _same(kept: list[Tensor | None], weights: Weights) -> bool:
    return len(kept) == len(weights) and all(map(is_, kept, weights))


class Owner(Protocol):
    """A module that owns what is derived from its weights."""

    @property
    def _packed(self) -> PackedWeights: ...


class _Caller(threading.local):
    """What the module owns that calls an op through torch's dispatcher."""

    packed: PackedWeights | None = None
    part: Hashable = None


_caller = _Caller()


class owned_by:
    """Let the ops called within use what a module owns."""

    __slots__ = ("_before", "_within")

    def __init__(self, packed: PackedWeights, part: Hashable = None) -> None:
        self._within = packed, part

    def __enter__(self) -> None:
        self._before = _caller.packed, _caller.part
        _caller.packed, _caller.part = self._within

    def __exit__(self, *_: object) -> None:
        _caller.packed, _caller.part = self._before


#: Of graphs' calls, by the weights' identity; an entry goes when one of its weights dies.
_registry: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], WeightSet]] = {}


def lookup(layout: WeightLayout, weights: Weights) -> WeightSet:
    """The `WeightSet` of a call: its module's, or the registry's for a call without one."""
    if _caller.packed is not None:
        return _caller.packed.lookup(layout, weights, _caller.part)
    key = tuple(map(id, weights))
    kept = _registry.get(key)
    if kept is not None and kept[1].is_current(weights):
        return kept[1]
    with _lock:
        kept = _registry.get(key)
        if kept is None or not kept[1].is_current(weights):
            made = WeightSet(layout, weights)
            # pop(key, reference): the dying reference serves as the default.
            pop = partial(_registry.pop, key)
            references = [weakref.ref(w, pop) for w in weights if w is not None]
            kept = _registry[key] = (references, made)
    return kept[1]
