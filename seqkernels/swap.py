"""Replace the Transformer encoders of a model, in place and reversibly."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from seqkernels import backends
from seqkernels.errors import BackendUnavailableError
from seqkernels.nn import TransformerEncoder, TransformerEncoderLayer, read
from seqkernels.nn.transformer_encoder import LAYER_TYPES
from seqkernels.tables import as_text

_PRECISIONS = ("bf16",)
_REFUSED = {
    "fp16": "its largest finite number is 65504, which attention scores and sums of products of "
    "trained models exceed; bf16 has the range of float32",
}
_OURS = (TransformerEncoder, TransformerEncoderLayer)
_STOCK = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Replaced:
    """One module that was replaced."""

    name: str  # as in named_modules(); "" is the model itself
    type: str
    padded_output: str
    also: tuple[str, ...] = ()  # further names of the same module


@dataclass(frozen=True)
class Skipped:
    """One encoder that was left as it is, and why."""

    name: str
    type: str
    reasons: tuple[str, ...]


@dataclass
class SwapReport:
    """What `swap` did.

    Attributes
    ----------
    replaced : list of Replaced
        Name, type and padded output of each module replaced.
    skipped : list of Skipped
        Name, type and reasons of each encoder left as it is.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _modules: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Give every replaced module back its class; parameters keep their present values.

        The modules are the objects they always were, so that references to them stay good.
        A second call does nothing.
        """
        while self._modules:
            module, stock = self._modules.pop()
            if type(module) in _OURS:
                module.__class__ = stock
                for name in ("padded_output", "backend", "_alignment_checks"):
                    module.__dict__.pop(name, None)

    def __str__(self) -> str:
        rows = [
            (_shown(r.name, r.also), r.type, f"replaced, padded_output={r.padded_output!r}")
            for r in self.replaced
        ]
        rows += [(_shown(s.name), s.type, "left: " + "\n".join(s.reasons)) for s in self.skipped]
        if not rows:
            return "seqkernels.swap: no Transformer encoder of torch.nn was found"
        return as_text("seqkernels.swap", ("module", "type", "outcome"), rows)


def _shown(name: str, also: tuple[str, ...] = ()) -> str:
    return " = ".join(n or "(the model)" for n in (name, *also))


def swap(
    model: nn.Module,
    *,
    precision: str = "bf16",
    backend: str = "auto",
    strict: bool = False,
    padded_output: str | None = None,
) -> SwapReport:
    """Let the Transformer encoders of a model run as fused kernels, in place.

    Every ``torch.nn.TransformerEncoder``, and every ``torch.nn.TransformerEncoderLayer`` outside
    of one, becomes this package's module of the same name. The object stays the same: its class
    changes, for this instance alone, so that the model itself may be such an encoder, shared
    modules stay shared, and hooks on the module, parameters and the training flag are untouched.

    Parameters
    ----------
    model : torch.nn.Module
        Searched with all its submodules.
    precision : str
        ``"bf16"``: bf16 operands where the processor multiplies them, sums, softmax and norms in
        float32. ``"fp16"`` is refused.
    backend : str
        ``"auto"``, ``"cpu"`` or ``"reference"``, for the replaced modules.
    strict : bool
        Whether it is an error if an encoder cannot be replaced; nothing is replaced then.
    padded_output : str, optional
        What padded positions return, for all replaced modules: ``"zero"`` or ``"compute"``.
        Default: for each module what it returns now in eval mode under ``inference_mode``: zeros
        from a ``TransformerEncoder`` set to take its nested-tensor path, else computed values.
        (Torch leaves that path for a batch with padding before valid positions; models that pad
        so want ``"compute"``. A log line tells if such a batch comes.)

    Returns
    -------
    SwapReport
        ``replaced``, ``skipped`` (name, type, reasons), ``restore()``; its ``str()`` is a table.

    Notes
    -----
    Left alone, with the reasons: subclasses; modules with hooks, parametrizations, patched
    forwards or tensor subclasses inside, which a fused kernel would pass over; encoders whose
    layers differ; options the kernel does not know; and, with ``backend="auto"``, everything no
    fused kernel can run here (dtype, device, processor), since the plain definition would be no
    gain. A model swapped twice stays as it was after the first time.

    Raises
    ------
    ValueError
        For an unknown precision, backend or padded output.
    BackendUnavailableError
        If a backend is named that cannot run, or with ``strict`` if an encoder is left alone.

    Examples
    --------
    >>> import torch, seqkernels
    >>> layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    >>> model = torch.nn.Sequential(torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(32, 1))
    >>> report = seqkernels.swap(model.eval(), backend="reference")
    >>> [(r.name, r.padded_output) for r in report.replaced]
    [('0', 'zero')]
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

    report = SwapReport()
    found: list[tuple[nn.Module, str, tuple[str, ...]]] = []
    for module, name, also in _outermost_encoders(model):
        reasons = swap_reasons(module, backend)
        if reasons:
            report.skipped.append(Skipped(name, _type_name(module), tuple(reasons)))
        else:
            found.append((module, name, also))
    if strict and report.skipped:
        every = [f"{_shown(s.name)}: {r}" for s in report.skipped for r in s.reasons]
        listed = "".join(f"\n  - {reason}" for reason in every)
        raise BackendUnavailableError(
            f"swap: strict, and encoders cannot be replaced:{listed}", every
        )
    for module, name, also in found:
        replaced_type = _type_name(module)
        _replace(module, backend, padded_output, report)
        report.replaced.append(Replaced(name, replaced_type, str(module.padded_output), also))
    return report


def _type_name(module: nn.Module) -> str:
    kind = type(module)
    where = "torch.nn" if kind in _STOCK else kind.__module__
    return f"{where}.{kind.__qualname__}"


def _outermost_encoders(model: nn.Module) -> list[tuple[nn.Module, str, tuple[str, ...]]]:
    """Each of torch's encoders that lies in no other one, and all its names."""
    names: dict[nn.Module, list[str]] = {}
    within: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _STOCK):
            within.update(m for m in module.modules() if m is not module)
            names.setdefault(module, []).append(name)
    return [
        (module, all_names[0], tuple(all_names[1:]))
        for module, all_names in names.items()
        if module not in within and type(module) not in _OURS
    ]


def swap_reasons(module: nn.Module, backend: str = "auto") -> list[str]:
    """Every reason why `swap` leaves this encoder alone; empty if it replaces it."""
    kind = type(module)
    if kind not in _STOCK:
        base = next(s for s in _STOCK if isinstance(module, s))
        return [f"it is a subclass of torch.nn.{base.__name__}, which may compute something else"]
    reasons = []
    if "forward" in module.__dict__:
        reasons.append("its forward was replaced on the instance")
    if kind is nn.TransformerEncoder:
        reasons += read.encoder_reasons(module, LAYER_TYPES)
    else:
        reasons += read.layer_reasons(module)
    if reasons:
        return reasons
    parameter = next(module.parameters())
    kinds = {p.dtype for p in module.parameters()}
    if len(kinds) > 1:
        reasons.append(
            f"its parameters have different dtypes: {', '.join(sorted(map(str, kinds)))}"
        )
    return reasons + _backend_reasons(backend, parameter.device.type, parameter.dtype)


def _backend_reasons(name: str, device: str, dtype: torch.dtype) -> list[str]:
    """Why no backend but the reference runs it; for a named one that cannot, its error."""
    choice = backends.resolve("swap", name, device, dtype)
    if choice.backend.name != "reference":
        return []
    return [f"{n}: {reason}" for n, reasons in choice.rejected for reason in reasons]


def _replace(
    module: nn.Module, backend: str, padded_output: str | None, report: SwapReport
) -> None:
    if isinstance(module, nn.TransformerEncoder):
        inner = [m for m in module.layers if type(m) is nn.TransformerEncoderLayer]
        report._modules += [(m, type(m)) for m in (module, *inner)]
        TransformerEncoder._adopt(module, padded_output, backend)
    else:
        report._modules.append((module, type(module)))
        TransformerEncoderLayer._adopt(module, padded_output, backend)
