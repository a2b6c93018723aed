"""Locks that a fork finds free, around state that it copies whole."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

# A fork copies the memory of all threads but only the thread that forks. A lock that another one
# held would stay locked in the child for ever, and what it guards could be half changed. So a fork
# first takes every lock, which waits for what is under way, and the child gets new ones.
_owners: weakref.WeakSet[Any] = weakref.WeakSet()
_registry = threading.RLock()  # one fork at a time, and no new owner meanwhile
_held: list[threading.RLock] = []


def give_lock(owner: Any) -> None:
    """Set ``owner._lock``, a reentrant lock that forks respect; the owner stays collectable.

    Whoever holds it must not wait for the lock of another owner: a fork takes all of them, in no
    order, and only that makes every order a safe one. It is reentrant since a thread may fork while
    it holds the lock (in a signal handler).
    """
    with _registry:
        owner._lock = threading.RLock()
        _owners.add(owner)


def _before() -> None:
    _registry.acquire()
    for owner in list(_owners):
        owner._lock.acquire()
        _held.append(owner._lock)


def _after_in_parent() -> None:
    while _held:
        _held.pop().release()
    _registry.release()


def _after_in_child() -> None:
    global _registry
    _held.clear()
    _registry = threading.RLock()
    for owner in list(_owners):
        owner._lock = threading.RLock()


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
