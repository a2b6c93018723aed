"""Replace what a model has and this package does faster, in place and reversibly.

What it knows is in `registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from seqkernels import backends
from seqkernels.errors import BackendUnavailableError
from seqkernels.precision import Policy, PrecisionPolicy, told_of_ties
from seqkernels.swap.batch_norms import bounds
from seqkernels.swap.encoders import request_scoring
from seqkernels.swap.kind import Job, Kind
from seqkernels.swap.registry import kind_of, swap_reasons
from seqkernels.swap.report import Replaced, Skipped, SwapReport, class_name, shown

__all__ = ["Replaced", "Skipped", "SwapReport", "swap", "swap_reasons"]

_PRECISIONS = ("bf16",)
_REFUSED = {
    "fp16": "its largest finite number is 65504, which attention scores and sums of products of "
    "trained models exceed; bf16 has the range of float32",
}


class _Found(NamedTuple):
    kind: Kind
    module: nn.Module
    names: tuple[str, ...]  # all of one module


def swap(
    model: nn.Module,
    *,
    precision: str = "bf16",
    backend: str = "auto",
    strict: bool = False,
    padded_output: str | None = None,
    resilient: bool = False,
    min_var: float | None = None,
    max_abs: float | None = None,
    precision_policy: Policy | None = None,
) -> SwapReport:
    """Let the parts of a model that this package knows run as its kernels, in place.

    ============================  =================================================================
    torch.nn                      becomes
    ============================  =================================================================
    ``TransformerEncoder``        this package's module of the same name: one kernel, all layers
    ``TransformerEncoderLayer``   the same, outside of an encoder
    ``BatchNorm1d``,              `ResilientBatchNorm1d`: exact, or bounded if asked for
    ``SyncBatchNorm``
    ``Linear``                    `Linear` in bf16, where the precision policy says so
    ``Sequential``                `FusedSequential`, if it has a chain with a batch norm or an
                                  activation to fuse
    ============================  =================================================================

    The object stays the same: its class changes, for this instance alone, so that the model itself
    may be replaced, shared modules stay shared, and hooks on the module, parameters and the
    training flag are untouched.

    Parameters
    ----------
    model : torch.nn.Module
        Searched with all its submodules.
    precision : str
        ``"bf16"``: bf16 operands where the processor multiplies them, sums, softmax and norms in
        float32. ``"fp16"`` is refused.
    backend : str
        ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``, for the replaced
        modules.
    strict : bool
        Whether it is an error if an encoder, or a module that normalizes by running statistics,
        cannot be replaced; nothing is replaced then.
    padded_output : str, optional
        What padded positions return, for all replaced encoders: ``"zero"`` or ``"compute"``.
        Default: what torch's module returns: ``"stock"`` for a ``TransformerEncoder`` set to take
        its nested-tensor path, which decides per batch (see `TransformerEncoder`), else
        ``"compute"``. Under ``"stock"`` what padded positions return depends on the rest of the
        batch; naming one answer makes scores independent of it.
    resilient : bool
        Whether batch norms get the default bounds of `ResilientBatchNorm1d`. By default they stay
        exact: ``swap`` preserves the function the model computes.
    min_var, max_abs : float, optional
        Bounds of the batch norms, instead of the default ones; either turns ``resilient`` on.
    precision_policy : callable, optional
        Decides for each linear layer: called with its name and the layer, it returns a
        `PrecisionDecision`. Default: `PrecisionPolicy`, which decides by rules and never by a
        clock, so that the same model gets the same scores in every process of a machine.

    Returns
    -------
    SwapReport
        ``replaced``, ``skipped`` (name, type, reasons), ``restore()``; its ``str()`` is a table.

    Notes
    -----
    Left alone, with the reasons: subclasses; encoders with hooks, parametrizations, patched
    forwards or tensor subclasses inside, which a fused kernel would pass over; encoders whose
    layers differ; linear layers and batch norms whose weights are computed on each call (pruned,
    weight norm, spectral norm); options the kernel does not know; and, with ``backend="auto"``,
    everything no kernel can run here (dtype, device, processor), since the plain definition would
    be no gain. Other modules that normalize by running statistics, such as ``BatchNorm2d``, are
    listed among them. A call of ``torch.nn.functional.batch_norm`` in somebody's ``forward`` is no
    module and cannot be seen.

    What lies within an encoder belongs to it. A model swapped twice stays as it was after the first
    time. ``swap`` is all or nothing: if anything raises, the policy included, the model is as it
    was.

    Raises
    ------
    ValueError, TypeError
        For an unknown precision, backend or padded output, a bound that is none, or a policy that
        returns something else than a `PrecisionDecision`.
    BackendUnavailableError
        If a backend is named that cannot run, or with ``strict`` if a module is left alone.

    Examples
    --------
    >>> import torch, seqkernels
    >>> layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    >>> model = torch.nn.Sequential(torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(32, 1))
    >>> report = seqkernels.swap(model.eval(), backend="reference")
    >>> [(r.name, r.padded_output) for r in report.replaced]
    [('0', 'stock')]
    >>> [(s.name, s.reasons) for s in report.skipped]
    [('1', ('the last layer of a head: fewer than 16 outputs',))]
    >>> report.restore()
    """
    _check_options(precision, backend, padded_output)
    limits = bounds(resilient, min_var, max_abs)
    policy = PrecisionPolicy() if precision_policy is None else precision_policy
    report = SwapReport()
    job = Job(backend, padded_output, limits, told_of_ties(policy, model), report)

    # All that can be refused is decided before the first change.
    found = _sort_out(_find(model, job), lambda f: swap_reasons(f.module, backend), report)
    every = [f"{shown(s.name)}: {r}" for s in report.skipped if not s.optional for r in s.reasons]
    if strict and every:
        listed = "".join(f"\n  - {reason}" for reason in every)
        raise BackendUnavailableError(
            f"swap: strict, and modules cannot be replaced:{listed}", every
        )
    found = _sort_out(found, lambda f: f.kind.declines(f.module, f.names[0], job), report)
    try:
        for kind, module, names in found:
            was = class_name(type(module))
            outcome = kind.replace(module, names[0], job)
            if outcome is not None:
                report.replaced.append(Replaced(names[0], was, *outcome, names[1:]))
    except BaseException:
        report.restore()
        raise
    report.request_scoring += request_scoring(model)
    return report


def _check_options(precision: str, backend: str, padded_output: str | None) -> None:
    if precision in _REFUSED:
        raise ValueError(
            f"swap: precision: {precision!r} is refused: {_REFUSED[precision]}; use 'bf16'"
        )
    if precision not in _PRECISIONS:
        raise ValueError(
            f"swap: precision: expected one of {', '.join(_PRECISIONS)}, got {precision!r}"
        )
    backends.check_name(backend, "swap: backend")
    if padded_output not in (None, "zero", "compute"):
        raise ValueError(
            f"swap: padded_output: expected None, 'zero' or 'compute', got {padded_output!r}"
        )


def _find(model: nn.Module, job: Job) -> list[_Found]:
    """What this swap has to do with, in the order in which it is replaced."""
    names: dict[nn.Module, list[str]] = {}
    within: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        kind = kind_of(module)
        if kind is not None and kind.whole:
            within.update(m for m in module.modules() if m is not module)
    found = []
    for module, all_names in names.items():
        kind = kind_of(module)
        if kind is None or (module in within and not kind.everywhere):
            continue
        if kind.considers(module, job):
            found.append(_Found(kind, module, tuple(all_names)))
    return sorted(found, key=lambda f: f.kind.stage)


def _sort_out(
    found: Sequence[_Found], why: Callable[[_Found], list[str]], report: SwapReport
) -> list[_Found]:
    """Those without a reason against them; the report gets the others."""
    kept = []
    for f in found:
        reasons = tuple(why(f))
        if reasons:
            was = class_name(type(f.module))
            report.skipped.append(Skipped(f.names[0], was, reasons, f.kind.optional))
        else:
            kept.append(f)
    return kept
