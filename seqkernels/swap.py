"""Replace what a model has and this package does faster, in place and reversibly."""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from seqkernels import backends, settings
from seqkernels.errors import BackendUnavailableError
from seqkernels.nn import (
    FusedSequential,
    Linear,
    ResilientBatchNorm1d,
    TransformerEncoder,
    TransformerEncoderLayer,
    UserSequenceEncoder,
    read,
)
from seqkernels.nn.transformer_encoder_layer import LAYER_TYPES
from seqkernels.options import check_bounds
from seqkernels.precision import Policy, PrecisionDecision, PrecisionPolicy
from seqkernels.reference.resilient_batch_norm import is_bounded
from seqkernels.swap_report import Replaced, Skipped, SwapReport, shown

_PRECISIONS = ("bf16",)
_REFUSED = {
    "fp16": "its largest finite number is 65504, which attention scores and sums of products of "
    "trained models exceed; bf16 has the range of float32",
}
_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)
#: The classes whose instances `swap` replaces, and those it gives them.
_REPLACEABLE: tuple[type[nn.Module], ...] = (*_ENCODERS, *_NORMS, nn.Linear, nn.Sequential)
_OURS = (
    TransformerEncoder,
    TransformerEncoderLayer,
    ResilientBatchNorm1d,
    Linear,
    FusedSequential,
)
_Names = tuple[str, ...]  # all names of one module
_Found = list[tuple[nn.Module, _Names]]


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
    bounds = _bounds(resilient, min_var, max_abs)
    policy = PrecisionPolicy() if precision_policy is None else precision_policy

    # All that can be refused is decided before the first change.
    report = SwapReport()
    found = _sort_out(_find(model), backend, bounds, report)
    every = [f"{shown(s.name)}: {r}" for s in report.skipped if not s.optional for r in s.reasons]
    if strict and every:
        listed = "".join(f"\n  - {reason}" for reason in every)
        raise BackendUnavailableError(
            f"swap: strict, and modules cannot be replaced:{listed}", every
        )
    found = _decide(model, found, policy, report)
    try:
        for module, names in found:
            _replace(module, names, backend, padded_output, bounds, report)
        # Last: what a chain can be depends on its members' classes.
        for module, names in found:
            if isinstance(module, nn.Sequential):
                _replace_sequential(module, names, report)
    except BaseException:
        report.restore()
        raise
    report.request_scoring += _request_scoring(model)
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


def _bounds(resilient: bool, min_var: float | None, max_abs: float | None) -> tuple[float, float]:
    """Bounds of the batch norms: none unless asked for."""
    if not resilient and min_var is None and max_abs is None:
        return 0.0, math.inf
    defaults = ResilientBatchNorm1d.__init__.__kwdefaults__ or {}
    low = defaults["min_var"] if min_var is None else min_var
    high = defaults["max_abs"] if max_abs is None else max_abs
    check_bounds("swap", 0.0, low, high)
    return low, high


def _type_name(module: nn.Module) -> str:
    kind = type(module)
    where = "torch.nn" if getattr(nn, kind.__name__, None) is kind else kind.__module__
    return f"{where}.{kind.__qualname__}"


# --- what there is --------------------------------------------------------------------------------


def _find(model: nn.Module) -> _Found:
    """The outermost encoders, then everything else that `swap` has to do with, with all names.

    What lies within an encoder belongs to it, except batch norms: the encoder's kernel has none.
    """
    names: dict[nn.Module, list[str]] = {}
    within: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        if isinstance(module, (*_ENCODERS, UserSequenceEncoder)):
            within.update(m for m in module.modules() if m is not module)
    encoders, others = [], []
    for module, all_names in names.items():
        if isinstance(module, _ENCODERS):
            if module not in within and type(module) not in _OURS:
                encoders.append((module, tuple(all_names)))
        elif _is_norm(module) or (module not in within and _is_linear_or_sequence(module)):
            others.append((module, tuple(all_names)))
    return encoders + others


def _is_linear_or_sequence(module: nn.Module) -> bool:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # of torch's attention, which reads its weight and does not call it
    if type(module) is Linear:
        return module.precision == "fp32"  # such as those of an EngagementRanker
    return isinstance(module, nn.Linear | nn.Sequential) and type(module) not in _OURS


def _is_norm(module: nn.Module) -> bool:
    """Whether it normalizes by running statistics, or is a batch norm without any."""
    if isinstance(module, _InstanceNorm):
        return module.track_running_stats
    has_statistics = all(
        module._buffers.get(name) is not None for name in ("running_mean", "running_var")
    )
    return isinstance(module, _NormBase) or has_statistics


def _request_scoring(model: nn.Module) -> list[str]:
    """Encoders that may see one user with many candidates, once swapped."""
    own = {m.encoder for m in model.modules() if isinstance(m, UserSequenceEncoder)}
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, UserSequenceEncoder) and module.fusion != "none")
        or (isinstance(module, TransformerEncoder) and module not in own)
    ]


# --- what can be replaced -------------------------------------------------------------------------


def _sort_out(
    modules: _Found, backend: str, bounds: tuple[float, float], report: SwapReport
) -> _Found:
    """The modules that can be replaced; the report gets the others, with their reasons."""
    found = []
    for module, names in modules:
        if isinstance(module, ResilientBatchNorm1d):
            if not is_bounded(*bounds) or is_bounded(module.min_var, module.max_abs):
                continue
            reasons = ["it is a ResilientBatchNorm1d without bounds; set its min_var and max_abs"]
        else:
            reasons = swap_reasons(module, backend)
        if not reasons:
            found.append((module, names))
        elif not isinstance(module, nn.Sequential):
            optional = isinstance(module, nn.Linear)
            report.skipped.append(Skipped(names[0], _type_name(module), tuple(reasons), optional))
    return found


def swap_reasons(module: nn.Module, backend: str = "auto") -> list[str]:
    """Every reason why `swap` cannot replace this module; empty if it can."""
    kind: type[nn.Module] = type(module)
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return ["it is lazy and knows no sizes yet; run the model once before the swap"]
    if kind is Linear:
        kind = nn.Linear
    if kind not in _REPLACEABLE:
        return [_other_type(module)]
    reasons = []
    if "forward" in module.__dict__:
        reasons.append("its forward was replaced on the instance")
    if kind is nn.TransformerEncoder:
        read.read_encoder(module, LAYER_TYPES, reasons, any_mode=True)
    elif kind is nn.TransformerEncoderLayer:
        read.read_single_layer(module, reasons, any_mode=True)
    elif kind is nn.Linear or kind in _NORMS:
        reasons += read.computed_weight_reasons(module)
    for name, tensor in module.named_parameters(recurse=False):
        if type(tensor) not in (torch.Tensor, nn.Parameter) and kind in _ENCODERS:
            reasons.append(f"{name} is a {type(tensor).__name__}, not a plain tensor")
    if kind in _NORMS:
        reasons += _norm_reasons(module)
    if reasons or kind is nn.Sequential:
        return reasons
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if not all(t.numel() for t in tensors):
        return ["it is empty: one of its sizes is 0"]
    kinds = {t.dtype for t in tensors}
    if len(kinds) > 1:
        reasons.append(
            f"its parameters have different dtypes: {', '.join(sorted(map(str, kinds)))}"
        )
    return reasons + _backend_reasons(_problem(module, tensors[0]), backend)


def _other_type(module: nn.Module) -> str:
    """Why a module of a class that is not replaced stays."""
    if parametrize.is_parametrized(module):
        return "it is parametrized: its weights are computed on each call"
    base = next((kind for kind in _REPLACEABLE if isinstance(module, kind)), None)
    if base is not None:
        return f"it is a subclass of torch.nn.{base.__name__}, which may compute something else"
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        return "there are bounds for a BatchNorm1d and a SyncBatchNorm only"
    return "it normalizes by running statistics and is no torch.nn.BatchNorm1d or SyncBatchNorm"


def _norm_reasons(norm: nn.Module) -> list[str]:
    reasons = []
    if norm._buffers.get("running_mean") is None or norm._buffers.get("running_var") is None:
        reasons.append("it has no running statistics (track_running_stats=False)")
    if not 0 <= norm.eps < math.inf:  # type: ignore[operator]
        reasons.append(f"its eps is {norm.eps}; the kernel takes a finite number >= 0")
    return reasons


def _problem(module: nn.Module, tensor: torch.Tensor) -> backends.Problem:
    """What the module's calls will ask of backends, for inputs of the dtype of its tensors."""
    device, dtype = tensor.device.type, tensor.dtype
    if isinstance(module, _ENCODERS):
        return backends.Problem("encoder", device, dtype, read.encoder_size(module))
    return backends.Problem(
        "linear" if isinstance(module, nn.Linear) else "resilient_batch_norm", device, dtype
    )


def _backend_reasons(problem: backends.Problem, name: str) -> list[str]:
    """Why no backend but the reference runs it; for a named one that cannot, its error."""
    try:
        choice = backends.resolve(problem, name)
    except BackendUnavailableError as error:
        asked = settings.current.backend if name == "auto" else name
        named = next(b for b in backends.BACKENDS if b.name == asked)
        # A named backend without this kernel leaves the module alone; one that can run none is an
        # error.
        any_kernel = named.reasons(problem._replace(op="resilient_batch_norm", size=None))
        if any_kernel:
            raise backends.unavailable("swap", asked, any_kernel) from None
        return [f"{asked}: {reason}" for reason in error.reasons]
    if choice.backend.name != "reference":
        return []
    return [f"{n}: {reason}" for n, reasons in choice.rejected for reason in reasons]


def _decide(model: nn.Module, found: _Found, policy: Policy, report: SwapReport) -> _Found:
    """What is to be replaced once the policy has spoken on each linear layer."""
    tied = _embeddings(model)
    # A policy of the user's own decides alone.
    knows_ties = isinstance(policy, PrecisionPolicy) and (
        type(policy).__call__ is PrecisionPolicy.__call__
    )
    kept = []
    for module, names in found:
        if isinstance(module, nn.Linear):
            name = names[0]
            if knows_ties:
                assert isinstance(policy, PrecisionPolicy)
                decision = policy(name, module, tied.get(_memory(module.weight)))
            else:
                decision = policy(name, module)
            if not isinstance(decision, PrecisionDecision):
                raise TypeError(
                    f"swap: precision_policy: expected a PrecisionDecision for {name!r}, "
                    f"got {decision!r}"
                )
            report.decisions[name] = decision
            if not decision.bf16:
                reasons = (decision.reason,)
                report.skipped.append(Skipped(name, _type_name(module), reasons, True))
                continue
        kept.append((module, names))
    return kept


def _embeddings(model: nn.Module) -> dict[int, str]:
    """The names of the embeddings by the memory of their weights."""
    tied: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and weight is not None:
            tied.setdefault(_memory(weight), name)
    return tied


def _memory(tensor: torch.Tensor) -> int:
    """What two tensors have in common if one is the other, or a view of it."""
    return int(tensor.untyped_storage()._cdata)


# --- the change -----------------------------------------------------------------------------------


def _replace(
    module: nn.Module,
    names: _Names,
    backend: str,
    padded_output: str | None,
    bounds: tuple[float, float],
    report: SwapReport,
) -> None:
    was = _type_name(module)
    padded = None
    if isinstance(module, _ENCODERS):
        padded = _replace_encoder(module, backend, padded_output, report)
        outcome = f"replaced, padded_output={padded!r}"
    elif isinstance(module, _NORMS):
        with report.changing(module):
            ResilientBatchNorm1d._adopt(module, *bounds, backend)
        low, high = bounds
        exact = not is_bounded(*bounds)
        outcome = "replaced, " + ("exact" if exact else f"min_var={low:g}, max_abs={high:g}")
        if was == "torch.nn.SyncBatchNorm":
            outcome += (
                "; trained on in several processes, each takes statistics of its own: restore() "
                "before that"
            )
    elif isinstance(module, nn.Linear):
        with report.changing(module):
            Linear._adopt(module, backend)
        outcome = f"bf16: {report.decisions[names[0]].reason}"
    else:
        return
    report.replaced.append(Replaced(names[0], was, outcome, padded, names[1:]))


def _replace_encoder(
    module: nn.TransformerEncoder | nn.TransformerEncoderLayer,
    backend: str,
    padded_output: str | None,
    report: SwapReport,
) -> str:
    """Its ``padded_output``."""
    with ExitStack() as changes:
        changes.enter_context(report.changing(module))
        if isinstance(module, nn.TransformerEncoder):
            for layer in dict.fromkeys(module.layers):
                changes.enter_context(report.changing(layer))
            TransformerEncoder._adopt(module, padded_output, backend)
        else:
            TransformerEncoderLayer._adopt(module, padded_output, backend)
    return str(module.padded_output)


def _replace_sequential(module: nn.Sequential, names: _Names, report: SwapReport) -> None:
    was = _type_name(module)
    with report.changing(module):
        adopted = FusedSequential._adopt(module)
    fused = [step for step in adopted.steps(any_mode=True) if step.fused]
    if not fused:
        report.undo_last()
        return
    chains = ", ".join(" + ".join(step.names) for step in fused)
    report.replaced.append(Replaced(names[0], was, f"fused: {chains}", None, names[1:]))
