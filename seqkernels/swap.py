"""Replace what a model has and this package does faster, in place and reversibly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from seqkernels import backends
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
from seqkernels.ops.resilient_batch_norm import check_bounds
from seqkernels.precision import Policy, PrecisionPolicy
from seqkernels.tables import as_text

_PRECISIONS = ("bf16",)
_REFUSED = {
    "fp16": "its largest finite number is 65504, which attention scores and sums of products of "
    "trained models exceed; bf16 has the range of float32",
}
_ENCODERS = (TransformerEncoder, TransformerEncoderLayer)
_STOCK = (nn.TransformerEncoder, nn.TransformerEncoderLayer)

#: The classes that `swap` gives to modules, and the attributes that come with each.
_ADDED: dict[type[nn.Module], tuple[str, ...]] = {
    TransformerEncoder: ("padded_output", "backend"),
    TransformerEncoderLayer: ("padded_output", "backend"),
    ResilientBatchNorm1d: ("min_var", "max_abs", "backend"),
    Linear: ("backend",),
    FusedSequential: (),
}


@dataclass(frozen=True)
class Replaced:
    """One module that was replaced.

    Attributes
    ----------
    name, also : str, tuple of str
        As in ``named_modules()``; ``""`` is the model itself. Further names of the same module.
    type : str
        What it was.
    outcome : str
        What it is now, and why.
    padded_output : str or None
        Of an encoder.
    """

    name: str
    type: str
    outcome: str
    padded_output: str | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """One module that was left as it is, and why.

    Attributes
    ----------
    name, type : str
    reasons : tuple of str
    optional : bool
        Whether ``strict`` does not insist on it: a linear layer.
    """

    name: str
    type: str
    reasons: tuple[str, ...]
    optional: bool = False


@dataclass
class SwapReport:
    """What `swap` did.

    Attributes
    ----------
    replaced : list of Replaced
        Each module that was replaced.
    skipped : list of Skipped
        Each module of a kind that `swap` knows that was left as it is, with the reasons.
    request_scoring : list of str
        Names of encoders that could score a request's candidates with the user's part computed
        once: each `UserSequenceEncoder` with a candidate (``score_candidates``), and each replaced
        ``TransformerEncoder``, if its input is one user's events, each joined with a candidate:
        no module shows what its caller puts there.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    request_scoring: list[str] = field(default_factory=list)
    _modules: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Give every replaced module back its class; parameters keep their present values.

        The modules are the objects they always were, so that references to them stay good.
        A second call does nothing.
        """
        while self._modules:
            module, stock = self._modules.pop()
            added = _ADDED.get(type(module))
            if added is not None:
                module.__class__ = stock
                for name in (*added, "_packed_weights"):
                    module.__dict__.pop(name, None)

    def __str__(self) -> str:
        rows = [(_shown(r.name, r.also), r.type, r.outcome) for r in self.replaced]
        rows += [(_shown(s.name), s.type, "left: " + "\n".join(s.reasons)) for s in self.skipped]
        if not rows and not self.request_scoring:
            return "seqkernels.swap: nothing that it knows was found"
        told = [as_text("seqkernels.swap", ("module", "type", "outcome"), rows)] if rows else []
        if self.request_scoring:
            told.append(
                "One user, many candidates? UserSequenceEncoder.score_candidates computes the "
                "user's part once, where events are joined with a candidate: "
                + ", ".join(map(_shown, self.request_scoring))
            )
        return "\n".join(told)


def _shown(name: str, also: tuple[str, ...] = ()) -> str:
    return " = ".join(n or "(the model)" for n in (name, *also))


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
    ``BatchNorm1d``               `ResilientBatchNorm1d`: exact, or bounded if asked for
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
        Whether it is an error if an encoder or a batch norm cannot be replaced; nothing is
        replaced then.
    padded_output : str, optional
        What padded positions return, for all replaced encoders: ``"zero"`` or ``"compute"``.
        Default: for each module what it returns now in eval mode under ``inference_mode``: zeros
        from a ``TransformerEncoder`` set to take its nested-tensor path, else computed values.
        (Torch leaves that path for a batch with padding before valid positions; models that pad
        so want ``"compute"``. A log line tells if such a batch comes.)
    resilient : bool
        Whether batch norms get the default bounds of `ResilientBatchNorm1d`. By default they stay
        exact: ``swap`` preserves the function the model computes.
    min_var, max_abs : float, optional
        Bounds of the batch norms, instead of the default ones; either turns ``resilient`` on.
    precision_policy : callable, optional
        Decides for each linear layer; see `PrecisionPolicy`, the default.

    Returns
    -------
    SwapReport
        ``replaced``, ``skipped`` (name, type, reasons), ``restore()``; its ``str()`` is a table.

    Notes
    -----
    Left alone, with the reasons: subclasses; encoders with hooks, parametrizations, patched
    forwards or tensor subclasses inside, which a fused kernel would pass over; encoders whose
    layers differ; options the kernel does not know; and, with ``backend="auto"``, everything no
    kernel can run here (dtype, device, processor), since the plain definition would be no gain.
    What lies within an encoder belongs to it. A model swapped twice stays as it was after the first
    time.

    Raises
    ------
    ValueError
        For an unknown precision, backend or padded output, or a bound that is none.
    BackendUnavailableError
        If a backend is named that cannot run, or with ``strict`` if a module is left alone.

    Examples
    --------
    >>> import torch, seqkernels
    >>> layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    >>> model = torch.nn.Sequential(torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(32, 1))
    >>> report = seqkernels.swap(model.eval(), backend="reference")
    >>> [(r.name, r.padded_output) for r in report.replaced]
    [('0', 'zero')]
    >>> [(s.name, s.reasons) for s in report.skipped]
    [('1', ('small: 32 weights, from 16384 on it pays',))]
    >>> report.restore()
    """
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
    bounds = _bounds(resilient, min_var, max_abs)
    policy = PrecisionPolicy() if precision_policy is None else precision_policy

    report = SwapReport()
    encoders, within = _encoders(model)
    others = _others(model, within)
    found = _sort_out(encoders + others, backend, report)
    every = [f"{_shown(s.name)}: {r}" for s in report.skipped if not s.optional for r in s.reasons]
    if strict and every:
        listed = "".join(f"\n  - {reason}" for reason in every)
        raise BackendUnavailableError(
            f"swap: strict, and modules cannot be replaced:{listed}", every
        )
    for module, names in found:
        if isinstance(module, _STOCK):
            _replace_encoder(module, names, backend, padded_output, report)
        elif isinstance(module, nn.BatchNorm1d):
            _replace_norm(module, names, backend, bounds, report)
        elif isinstance(module, nn.Linear):
            _replace_linear(module, names, backend, policy, report)
    report.request_scoring += _request_scoring(model)
    # Last: what a chain can be depends on its members' classes.
    for module, names in found:
        if isinstance(module, nn.Sequential):
            _replace_sequential(module, names, report)
    return report


def _bounds(resilient: bool, min_var: float | None, max_abs: float | None) -> tuple[float, float]:
    """Bounds of the batch norms: none unless asked for."""
    if not resilient and min_var is None and max_abs is None:
        return 0.0, math.inf
    defaults = ResilientBatchNorm1d.__init__.__kwdefaults__ or {}
    low = defaults["min_var"] if min_var is None else min_var
    high = defaults["max_abs"] if max_abs is None else max_abs
    check_bounds("swap", 0.0, low, high)
    return low, high


_Names = tuple[str, ...]  # all names of one module
_Found = list[tuple[nn.Module, _Names]]


def _type_name(module: nn.Module) -> str:
    kind = type(module)
    where = "torch.nn" if kind in _REPLACEABLE else kind.__module__
    return f"{where}.{kind.__qualname__}"


def _encoders(model: nn.Module) -> tuple[_Found, set[nn.Module]]:
    """Torch's encoders that lie in no other one, and all modules inside of any encoder."""
    names: dict[nn.Module, list[str]] = {}
    within: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (*_STOCK, UserSequenceEncoder)):
            within.update(m for m in module.modules() if m is not module)
        if isinstance(module, _STOCK):
            names.setdefault(module, []).append(name)
    found = [
        (module, tuple(all_names))
        for module, all_names in names.items()
        if module not in within and type(module) not in _ENCODERS
    ]
    return found, within


def _request_scoring(model: nn.Module) -> list[str]:
    """Encoders that may see one user with many candidates, once swapped."""
    own = {m.encoder for m in model.modules() if isinstance(m, UserSequenceEncoder)}
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, UserSequenceEncoder) and module.fusion != "none")
        or (isinstance(module, TransformerEncoder) and module not in own)
    ]


def _others(model: nn.Module, within: set[nn.Module]) -> _Found:
    """Batch norms, linear layers and sequences outside of encoders that are not ours already."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NonDynamicallyQuantizableLinear):
            continue  # of torch's attention, which reads its weight and does not call it
        kinds = (nn.BatchNorm1d, nn.Linear, nn.Sequential)
        if isinstance(module, kinds) and module not in within and type(module) not in _ADDED:
            names.setdefault(module, []).append(name)
    return [(module, tuple(all_names)) for module, all_names in names.items()]


def _sort_out(modules: _Found, backend: str, report: SwapReport) -> _Found:
    """The modules that can be replaced; the report gets the others, with their reasons."""
    found = []
    for module, names in modules:
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
    if kind not in _REPLACEABLE:
        base = next(s for s in _REPLACEABLE if isinstance(module, s))
        return [f"it is a subclass of torch.nn.{base.__name__}, which may compute something else"]
    reasons = []
    if "forward" in module.__dict__:
        reasons.append("its forward was replaced on the instance")
    if kind is nn.TransformerEncoder:
        read.read_encoder(module, LAYER_TYPES, reasons, any_mode=True)
    elif kind is nn.TransformerEncoderLayer:
        read.read_single_layer(module, reasons, any_mode=True)
    elif kind is nn.BatchNorm1d and module._buffers.get("running_mean") is None:
        reasons.append("it has no running statistics (track_running_stats=False)")
    for name, tensor in module.named_parameters(recurse=False):
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            reasons.append(f"{name} is a {type(tensor).__name__}, not a plain tensor")
    if reasons or kind is nn.Sequential:
        return reasons
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    kinds = {t.dtype for t in tensors}
    if len(kinds) > 1:
        reasons.append(
            f"its parameters have different dtypes: {', '.join(sorted(map(str, kinds)))}"
        )
    return reasons + _backend_reasons(backend, tensors[0].device.type, tensors[0].dtype)


def _backend_reasons(name: str, device: str, dtype: torch.dtype) -> list[str]:
    """Why no backend but the reference runs it; for a named one that cannot, its error."""
    choice = backends.resolve("swap", name, device, dtype)
    if choice.backend.name != "reference":
        return []
    return [f"{n}: {reason}" for n, reasons in choice.rejected for reason in reasons]


def _adopted(module: nn.Module, report: SwapReport) -> None:
    """Keep what `restore` needs, before a module gets another class."""
    report._modules.append((module, type(module)))


def _replace_encoder(
    module: nn.Module,
    names: _Names,
    backend: str,
    padded_output: str | None,
    report: SwapReport,
) -> None:
    was = _type_name(module)
    _adopted(module, report)
    if isinstance(module, nn.TransformerEncoder):
        for layer in module.layers:
            if type(layer) is nn.TransformerEncoderLayer:
                _adopted(layer, report)
        TransformerEncoder._adopt(module, padded_output, backend)
    else:
        TransformerEncoderLayer._adopt(module, padded_output, backend)
    padded = str(module.padded_output)
    report.replaced.append(
        Replaced(names[0], was, f"replaced, padded_output={padded!r}", padded, names[1:])
    )


def _replace_norm(
    module: nn.Module,
    names: _Names,
    backend: str,
    bounds: tuple[float, float],
    report: SwapReport,
) -> None:
    was = _type_name(module)
    _adopted(module, report)
    ResilientBatchNorm1d._adopt(module, *bounds, backend)
    exact = bounds == (0.0, math.inf)
    told = "exact" if exact else f"min_var={bounds[0]:g}, max_abs={bounds[1]:g}"
    report.replaced.append(Replaced(names[0], was, f"replaced, {told}", None, names[1:]))


def _replace_linear(
    module: nn.Linear, names: _Names, backend: str, policy: Policy, report: SwapReport
) -> None:
    was = _type_name(module)
    decision = policy(names[0], module)
    if not decision.bf16:
        report.skipped.append(Skipped(names[0], was, (decision.reason,), True))
        return
    _adopted(module, report)
    Linear._adopt(module, backend)
    report.replaced.append(Replaced(names[0], was, f"bf16: {decision.reason}", None, names[1:]))


def _replace_sequential(module: nn.Sequential, names: _Names, report: SwapReport) -> None:
    was = _type_name(module)
    adopted = FusedSequential._adopt(module)
    fused = [step for step in adopted.steps(any_mode=True) if step.fused]
    if not fused:
        adopted.__class__ = nn.Sequential  # type: ignore[assignment]
        return
    report._modules.append((module, nn.Sequential))
    chains = ", ".join(" + ".join(step.names) for step in fused)
    report.replaced.append(Replaced(names[0], was, f"fused: {chains}", None, names[1:]))


_REPLACEABLE: tuple[type[nn.Module], ...] = (
    *_STOCK,
    nn.BatchNorm1d,
    nn.Linear,
    nn.Sequential,
)
