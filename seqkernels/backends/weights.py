"""What is derived from the weights of an op, kept as long as the weights live and stay equal.

A module hands its plain parameters to the op on each call, so that exported and compiled graphs
hold parameters and the state dict stays torch's. What a backend derives from them (packed weights)
rests here, found by the identity of the weight tensors and trusted while each one's address and
version counter are what they were. That follows ``load_state_dict``, ``.to()``, optimizer steps,
``p.data = ...`` and in-place edits of a parameter.

What escapes a version counter escapes this: in-place edits through ``p.data`` or a NumPy view, and
steps of torch's optimizers with ``fused=True``. For those there is `forget`; it is called where
weights are about to change, when a module goes from evaluation to training and when the op records
gradients. Tensors made under ``torch.inference_mode`` have no counter at all: what is derived from
them is not kept.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

_data_ptr = Tensor.data_ptr
_version = attrgetter("_version")


class WeightLayout(NamedTuple):
    """How an op names and checks its weights."""

    op: str
    name: Callable[[int, int], str]  # of the weight at an index among so many
    read: Callable[[Sequence[Tensor | None]], Any]  # checks them and returns their sizes


class WeightSet:
    """The sizes an op read off its weights, and what backends derived from their present values."""

    __slots__ = ("_derived", "_references", "_storages", "complete", "fingerprint", "shape")

    def __init__(self, layout: WeightLayout, weights: Sequence[Tensor | None]) -> None:
        self.shape: Any = layout.read(weights)
        for index, weight in enumerate(weights):
            if weight is not None and hasattr(weight, "__tensor_flatten__"):
                raise TypeError(
                    f"{layout.op}: weights: expected a plain tensor for "
                    f"{layout.name(index, len(weights))}, got a {type(weight).__name__}"
                )
        self.complete = all(w is not None for w in weights)
        self.fingerprint: list[int] | None = None
        self._references: list[weakref.ref[Tensor]] = []
        self._storages: list[torch.UntypedStorage] = []
        self._derived: dict[Hashable, Any] = {}

    def keep(self, weights: Sequence[Tensor], fingerprint: list[int], key: tuple[int, ...]) -> None:
        """Enter the cache under `key`, until one of the weights dies."""
        self.fingerprint = fingerprint
        # The storages are held so that a new one cannot come to lie at an address seen before.
        self._storages = [w.untyped_storage() for w in weights]
        # pop(key, reference): the dying reference serves as the default.
        self._references = [weakref.ref(w, partial(_sets.pop, key)) for w in weights]
        _sets[key] = self

    def derived(self, key: Hashable, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make(*arguments)` returned for `key`; made by one thread, once."""
        value = self._derived.get(key)
        if value is None:
            with _lock:
                value = self._derived.get(key)
                if value is None:
                    value = self._derived[key] = make(*arguments)
        return value


_sets: dict[tuple[int, ...], WeightSet] = {}
_lock = threading.RLock()


def _renew_lock() -> None:
    """Another thread may have held the lock at the fork; in the child nobody would release it."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def lookup(layout: WeightLayout, weights: Sequence[Tensor | None]) -> WeightSet:
    """The `WeightSet` of these weights, checked and new where they are new or have changed."""
    key = tuple(map(id, weights))
    found = _sets.get(key)
    if found is not None and found.complete:
        present: Sequence[Tensor] = weights  # type: ignore[assignment]
    else:
        present = [w for w in weights if w is not None]
    try:
        fingerprint = list(map(_data_ptr, present)) + list(map(_version, present))
    except RuntimeError:
        if not any(w.is_inference() for w in present):
            raise
        return WeightSet(layout, weights)  # no version counters: nothing to trust on the next call
    if found is not None and found.fingerprint == fingerprint:
        return found
    with _lock:
        found = _sets.get(key)
        if found is None or found.fingerprint != fingerprint:
            found = WeightSet(layout, weights)
            found.keep(present, fingerprint, key)
    return found


def forget(weights: Sequence[Tensor | None] | None = None) -> None:
    """Drop what is kept for these weights, or for all.

    Needed only after an edit that torch does not count, such as ``p.data.mul_(2)``, in a module
    that stays in eval mode.

    Examples
    --------
    >>> from seqkernels import backends
    >>> backends.forget()
    """
    if weights is None:
        _sets.clear()
    else:
        _sets.pop(tuple(map(id, weights)), None)
