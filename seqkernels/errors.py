"""Exceptions of this package; everything else raises ValueError or TypeError."""

from __future__ import annotations

from collections.abc import Sequence


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for cannot run, or a fallback happened that settings forbid.

    Attributes
    ----------
    reasons : tuple of str
        Every unmet condition.
    """

    def __init__(self, message: str, reasons: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)
