"""The environment variables of this package, read once at import, and a way to override them.

======================  ===========================================================================
``SEQKERNELS_BACKEND``  what ``backend="auto"`` means, by default ``auto``
``SEQKERNELS_ISA``      the best instruction set the CPU backend may use, e.g. ``avx2``
``SEQKERNELS_STRICT``   ``1``: every fallback to slower code is an error
======================  ===========================================================================
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

_TRUTH = {"0": False, "false": False, "1": True, "true": True}


@dataclass(frozen=True)
class Settings:
    """One set of values. Names are checked where they are used, so that ``info`` can show any."""

    backend: str = "auto"
    isa: str | None = None
    strict: str = "0"

    @property
    def is_strict(self) -> bool:
        """Whether a fallback is an error."""
        value = _TRUTH.get(self.strict.lower())
        if value is None:
            raise ValueError(f"SEQKERNELS_STRICT: expected 0 or 1, got {self.strict!r}")
        return value


VARIABLES = ("SEQKERNELS_BACKEND", "SEQKERNELS_ISA", "SEQKERNELS_STRICT")


def environment() -> dict[str, str | None]:
    """The variables as this process has them, None where not set."""
    return {name: os.environ.get(name) for name in VARIABLES}


def from_environment() -> Settings:
    """The settings that the environment variables of this process describe."""
    backend, isa, strict = environment().values()
    return Settings(backend=backend or "auto", isa=isa or None, strict=strict or "0")


current: Settings = from_environment()


@contextmanager
def override(
    *, backend: str | None = None, isa: str | None = None, strict: bool | None = None
) -> Iterator[Settings]:
    """Change settings within a ``with`` block, in all threads; meant for tests.

    Parameters
    ----------
    backend, isa : str, optional
        As in the environment variables; ``None`` leaves the value as it is.
    strict : bool, optional
        Whether every fallback is an error; ``None`` leaves the value as it is.

    Examples
    --------
    >>> from seqkernels import settings
    >>> with settings.override(backend="reference", strict=True) as changed:
    ...     changed.backend
    'reference'
    """
    global current
    before = current
    changed = before
    if backend is not None:
        changed = replace(changed, backend=backend)
    if isa is not None:
        changed = replace(changed, isa=isa)
    if strict is not None:
        changed = replace(changed, strict="1" if strict else "0")
    current = changed
    try:
        yield changed
    finally:
        current = before
