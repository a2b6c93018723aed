"""The backends, which of them runs a call, and how a fallback is told.

A backend has a ``name``, says why it cannot run a `Problem`, names the ``variant`` of its code that
it would use (an instruction set, an architecture), and has one method for each op.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from seqkernels import settings
from seqkernels.backends.call import EncoderCall, LinearCall, ResilientBatchNormCall
from seqkernels.backends.cpu import CpuBackend
from seqkernels.backends.cuda import CudaBackend
from seqkernels.backends.problem import FEATURES, EncoderSize, Problem
from seqkernels.backends.reference import ReferenceBackend
from seqkernels.backends.triton import TritonBackend
from seqkernels.backends.weights import WeightSet, lookup, recheck_weights
from seqkernels.errors import BackendUnavailableError

__all__ = [
    "BACKENDS",
    "FEATURES",
    "Choice",
    "CpuBackend",
    "EncoderCall",
    "EncoderSize",
    "LinearCall",
    "Native",
    "Problem",
    "ResilientBatchNormCall",
    "WeightSet",
    "calls",
    "check_name",
    "choose",
    "declined",
    "lookup",
    "recheck_weights",
    "report_fallback",
    "resolve",
]

_log = logging.getLogger("seqkernels")


class Backend(Protocol):
    """What every backend offers."""

    name: str
    devices: tuple[str, ...]  # types of the devices it has kernels for; none: any

    def reasons(self, problem: Problem) -> list[str]:
        """Every reason why it cannot run a problem, empty if it can."""

    def variant(self) -> str:
        """Which of its variants runs, "" where there is one."""

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        """Run the op ``encoder``, or with ``call.user_index`` the op ``request_scoring``."""

    def linear(self, call: LinearCall, variant: str) -> Tensor:
        """Run the op ``linear``."""

    def resilient_batch_norm(self, call: ResilientBatchNormCall, variant: str) -> Tensor:
        """Run the op ``resilient_batch_norm``."""


#: Fastest first. The last one runs everything.
BACKENDS: tuple[Backend, ...] = (
    CudaBackend(),
    TritonBackend(),
    CpuBackend(),
    ReferenceBackend(),
)

#: How many calls of an op ran where: "cpu/avx2", "reference", ... Approximate under threads.
calls: Counter[str] = Counter()


class Choice(NamedTuple):
    """The backend that runs a call, and why each faster one does not."""

    backend: Backend
    variant: str
    rejected: tuple[tuple[str, tuple[str, ...]], ...]  # (backend, reasons)

    @property
    def label(self) -> str:
        """Its key in `calls`."""
        return f"{self.backend.name}/{self.variant}" if self.variant else self.backend.name


class Native(NamedTuple):
    """A native op of the CPU, its packed weights, and its key in `calls`."""

    op: Callable[..., Tensor]
    packed: tuple[Tensor, Tensor]
    label: str


def declined(choice: Choice) -> tuple[str, ...]:
    """Why the reference runs a call although nobody asked for it; empty if that is not so."""
    if choice.backend.name != "reference":
        return ()
    return tuple(f"{name}: {reason}" for name, reasons in choice.rejected for reason in reasons)


def check_name(name: str, argument: str = "backend") -> None:
    """Raise ValueError unless `name` is "auto" or a backend."""
    known = ("auto", *(b.name for b in BACKENDS))
    if name not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {name!r}")


_choices: dict[tuple[Problem, str], tuple[Choice, str]] = {}
_choices_for: settings.Settings | None = None  # the settings they were made under


def choose(problem: Problem, name: str) -> tuple[Choice, str]:
    """The backend for a call, and its key in `calls`; a fallback is told.

    Raises
    ------
    ValueError
        For an unknown name.
    BackendUnavailableError
        If the named backend cannot run, or with strict settings if a fallback would be taken.
    """
    global _choices_for
    now = settings.current
    if _choices_for is not now:
        _choices.clear()
        _choices_for = now
    key = (problem, name)
    made = _choices.get(key)
    if made is None:
        choice = resolve(problem, name)
        if choice.rejected and choice.backend.name == "reference":
            told = [f"{n}: {r}" for n, rs in choice.rejected for r in rs]
            report_fallback(problem.op, "auto", told)
        made = _choices[key] = (choice, choice.label)
    return made


def resolve(problem: Problem, name: str) -> Choice:
    """As `choose`, telling nobody of a fallback."""
    op, device = problem.op, problem.device
    check_name(name, f"{op}: backend")
    if name == "auto":
        name = settings.current.backend
        check_name(name, "SEQKERNELS_BACKEND")
    rejected: list[tuple[str, tuple[str, ...]]] = []
    # What has no kernels for the device is no faster backend, unless none has any.
    has_kernels = any(device in backend.devices for backend in BACKENDS)
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        if name == "auto" and has_kernels and backend.devices and device not in backend.devices:
            continue
        reasons = backend.reasons(problem)
        if not reasons:
            return Choice(backend, backend.variant(), tuple(rejected))
        if name != "auto":
            raise unavailable(op, name, reasons)
        rejected.append((backend.name, tuple(reasons)))
    raise AssertionError("the last backend runs everything")


def unavailable(op: str, name: str, reasons: Sequence[str]) -> BackendUnavailableError:
    """The error for a backend that was asked for and cannot run."""
    listed = "".join(f"\n  - {reason}" for reason in reasons)
    return BackendUnavailableError(f"{op}: backend {name!r} cannot run:{listed}", reasons)


_reported: set[tuple[str, tuple[str, ...]]] = set()


def _report_fallback(op: str, name: str, reasons: Sequence[str]) -> None:
    """Tell that slower code runs: one log line for each kind of reasons.

    Raises
    ------
    BackendUnavailableError
        If backend `name` was asked for by name, or with strict settings.
    """
    if name == "auto":
        name = settings.current.backend
    if name == "reference":
        return  # asked for
    if name != "auto":
        raise unavailable(op, name, reasons)
    if settings.current.is_strict:
        listed = "".join(f"\n  - {reason}" for reason in reasons)
        raise BackendUnavailableError(
            f"{op}: SEQKERNELS_STRICT=1 and the fused kernel cannot run:{listed}", reasons
        )
    kind = (op, tuple(reasons))
    if kind not in _reported:
        _reported.add(kind)
        _log.warning("%s: runs the plain PyTorch definition: %s", op, "; ".join(reasons))


# A traced graph tells it while it is traced.
_at_tracing: Any = torch.compiler.assume_constant_result  # not typed
report_fallback: Callable[[str, str, Sequence[str]], None] = _at_tracing(_report_fallback)
