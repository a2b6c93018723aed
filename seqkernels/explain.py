"""Which code runs a model's parts, why no other does, and how to get it ready."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqkernels import backends, settings
from seqkernels.backends import cpu
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
from seqkernels.nn.fused_sequential import channel_norm
from seqkernels.ops.encoder_checks import split_mask
from seqkernels.reference.linear import fold_reasons
from seqkernels.swap import swap_reasons
from seqkernels.tables import as_text

_ENCODERS = (UserSequenceEncoder, TransformerEncoder, TransformerEncoderLayer)
_OURS = (*_ENCODERS, FusedSequential, Linear, ResilientBatchNorm1d)
_STOCK = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
DEFINITION = "plain PyTorch"
NOT_SWAPPED = "torch.nn"
NOT_CALLED = "nothing"

Why = list[tuple[str, tuple[str, ...]]]  # (other code, reasons) for each that does not run


@dataclass(frozen=True)
class Explained:
    """What runs one module.

    Attributes
    ----------
    name, type : str
        The module, as in ``named_modules()``; of a `FusedSequential` each chain for itself, named
        by its members.
    runs : str
        ``"cpu/<instruction set>"``, ``"reference"``, ``"plain PyTorch"`` (the definition by the
        module's submodules), ``"torch.nn"`` (not swapped) or ``"nothing"``.
    why_not : tuple
        (other code, reasons) for each that does not run.
    """

    name: str
    type: str
    runs: str
    why_not: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`: one entry a module; ``str()`` is a table."""

    entries: tuple[Explained, ...]

    def __str__(self) -> str:
        if not self.entries:
            return "seqkernels.explain: nothing that seqkernels knows was found"
        rows: list[tuple[str, str, str, str]] = []
        for e in self.entries:
            first = (e.name or "(the module)", e.runs)
            for other, reasons in e.why_not or (("", ("",)),):
                rows.append((*first, other, "\n".join(reasons)))
                first = ("", "")
        return as_text("seqkernels.explain", ("module", "runs", "not", "because"), rows)


def explain(module: nn.Module, *example_inputs: Any, **example_keywords: Any) -> Explanation:
    """Say which backend and instruction set run a model's parts, and why the others do not.

    Its parts are Transformer encoders, torch's or this package's, and this package's other modules.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or one of its parts.
    *example_inputs, **example_keywords
        Arguments of one call. The module is run once with them, in eval mode under
        ``inference_mode``, to see what reaches its parts (masks, dtypes). Without any, inputs are
        taken to have the dtype and device of the part's parameters, and no mask.

    Returns
    -------
    Explanation
        ``entries``, and a table as ``str()``.

    Examples
    --------
    >>> import torch, seqkernels
    >>> layer = seqkernels.nn.TransformerEncoderLayer(32, 2, 64, backend="reference").eval()
    >>> [entry.runs for entry in seqkernels.explain(layer, torch.randn(5, 1, 32)).entries]
    ['reference']
    """
    parts = _outermost(module)
    calls: dict[nn.Module, dict[str, Any]] = {}
    given = bool(example_inputs or example_keywords)
    if given:
        with _recording([m for _, m in parts], calls), evaluating(module):
            module(*example_inputs, **example_keywords)
    entries: list[Explained] = []
    for name, part in parts:
        kind = type(part)
        type_name = f"{kind.__module__}.{kind.__qualname__}"
        told: list[tuple[str, str, Why]]
        if given and part not in calls:
            told = [(name, NOT_CALLED, [("any", ("these inputs do not reach it",))])]
        elif isinstance(part, FusedSequential):
            told = _explain_chains(name, part, calls.get(part, {}))
        elif isinstance(part, Linear | ResilientBatchNorm1d):
            told = [(name, *_explain_single(part, calls.get(part, {})))]
        elif isinstance(part, _ENCODERS):
            told = [(name, *_explain_encoder(part, calls.get(part, {})))]
        else:
            reasons = tuple(f"swap leaves it alone: {r}" for r in swap_reasons(part))
            why = reasons or ("not swapped: seqkernels.swap(model)",)
            told = [(name, NOT_SWAPPED, [("seqkernels", why)])]
        entries += [Explained(n, type_name, runs, tuple(why_not)) for n, runs, why_not in told]
    return Explanation(tuple(entries))


def warmup(model: nn.Module, example_inputs: Any) -> None:
    """Run a model once, so that the first request finds weights packed and threads started.

    With the Triton backend this compiles the kernels that the inputs reach, which takes seconds
    each. All batch sizes share them, and so do lengths of 1 to 16, of 17 to 32, 33 to 64, 65 to 128
    and of more tokens; a mask instead of lengths, and another dtype, reach others. So warm up with
    an input of each kind that will come, and call ``score_candidates`` or ``score_request`` once
    where requests are served.

    Parameters
    ----------
    model : torch.nn.Module
        Run in eval mode under ``inference_mode``; its training flags are as before afterwards.
    example_inputs : Tensor, sequence or mapping
        The argument, the arguments, or the keyword arguments of one call. The batch size does not
        matter.

    Examples
    --------
    >>> import torch, seqkernels
    >>> layer = seqkernels.nn.TransformerEncoderLayer(32, 2, 64, backend="reference").eval()
    >>> seqkernels.warmup(layer, torch.randn(5, 1, 32))
    """
    with evaluating(model):
        if isinstance(example_inputs, Mapping):
            model(**example_inputs)
        elif isinstance(example_inputs, Sequence):
            model(*example_inputs)
        else:
            model(example_inputs)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients within, the flags as they were afterwards."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = False
        with torch.inference_mode():
            yield
    finally:
        for m, flag in flags:
            m.training = flag


def _outermost(module: nn.Module) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    within: set[nn.Module] = set()
    for name, m in module.named_modules():
        if isinstance(m, (*_OURS, *_STOCK)) and m not in within:
            found.append((name, m))
            within.update(m.modules())
    return found


@contextmanager
def _recording(
    parts: Sequence[nn.Module], calls: dict[nn.Module, dict[str, Any]]
) -> Iterator[None]:
    """Keep the arguments of the first call of each part."""

    def keep(
        module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], _output: Any
    ) -> None:
        bound = inspect.signature(module.forward).bind(*args, **keywords)
        calls.setdefault(module, dict(bound.arguments))

    # Behind the call: a hook in front of it may change weights, which keeps kernels from running.
    handles = [m.register_forward_hook(keep, with_kwargs=True) for m in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _explain_chains(
    name: str, sequence: FusedSequential, call: dict[str, Any]
) -> list[tuple[str, str, Why]]:
    """An entry for each chain, and for each member on its own that this package knows."""
    x = call.get("input")
    against = sequence.reasons(x if isinstance(x, Tensor) else None)
    told: list[tuple[str, str, Why]] = []
    for step in sequence.steps(any_mode=True):
        norm, linear = step.output_norm, step.linear
        if step.kind == "module" and not isinstance(linear, Linear | ResilientBatchNorm1d):
            continue
        members = f"{name}[{' + '.join(step.names)}]" if name else " + ".join(step.names)
        if against:
            told.append((members, "one by one", [("one op", tuple(against))]))
        elif step.kind == "torch":
            assert norm is not None
            assert linear is not None
            reasons = fold_reasons(channel_norm(norm))
            folded: Why = [("norm folded into the weights", tuple(reasons))] if reasons else []
            runs = "torch.nn.functional.linear" + ("" if reasons else ", the norm in its weights")
            told.append((members, runs, folded))
        else:
            part = norm if step.kind == "norm" else linear
            assert isinstance(part, Linear | ResilientBatchNorm1d)
            told.append((members, *_explain_single(part, call)))
    return told


def _explain_single(part: Linear | ResilientBatchNorm1d, call: dict[str, Any]) -> tuple[str, Why]:
    """A module that is one op."""
    tensor = part.weight if isinstance(part, Linear) else part.running_mean
    x = call.get("input")
    if not isinstance(x, Tensor):
        x = tensor
    device, dtype = ("cpu", torch.float32) if x is None else (x.device.type, x.dtype)
    op = "linear" if isinstance(part, Linear) else "resilient_batch_norm"
    label, others = _explain_backend(backends.Problem(op, device, dtype), part.backend)
    reasons = part.fallback_reasons()
    return (DEFINITION, [("kernel", tuple(reasons)), *others]) if reasons else (label, others)


def _explain_encoder(
    encoder: UserSequenceEncoder | TransformerEncoder | TransformerEncoderLayer,
    call: dict[str, Any],
) -> tuple[str, Why]:
    parameter = next(encoder.parameters())
    x = call.get("events", call.get("src"))
    if not isinstance(x, Tensor):
        x = parameter
    if isinstance(encoder, UserSequenceEncoder):
        reasons = encoder.fallback_reasons()
    else:
        mask = call.get("mask", call.get("src_mask"))
        reasons = encoder.fallback_reasons(x, mask)
    padding_mask = call.get("src_key_padding_mask", call.get("key_padding_mask"))
    if isinstance(padding_mask, Tensor) and split_mask(padding_mask).bias is not None:
        reasons.append(backends.FEATURES["bias"])
    problem = backends.Problem("encoder", x.device.type, x.dtype, read.encoder_size(encoder))
    label, others = _explain_backend(problem, encoder.backend)
    if reasons:
        return DEFINITION, [("fused kernel", tuple(reasons)), *others]
    if label == "reference" and _asked(encoder.backend) == "auto":
        return DEFINITION, others  # torch's forward is faster than the reference
    if isinstance(encoder, TransformerEncoder) and "src" in call:
        others += _explain_padding(encoder, call)
    return label, others


def _explain_padding(encoder: TransformerEncoder, call: dict[str, Any]) -> Why:
    """Which of its two answers torch has for this batch, where the module follows it."""
    mask = call.get("src_key_padding_mask")
    if encoder.padded_output != "stock" or mask is None:
        return []
    with torch.inference_mode():  # with gradients torch has one answer
        taken = encoder.padding_of(call["src"], call.get("mask"), mask)
    other = "zero" if taken == "compute" else "compute"
    told = (
        f"padded positions return {taken!r} for this batch, as torch.nn decides for each batch; "
        "name padded_output='zero' or 'compute' to make them independent of the batch"
    )
    return [(f"padded_output={other!r}", (told,))]


def _asked(name: str) -> str:
    """The backend that counts where a module names this one."""
    return settings.current.backend if name == "auto" else name


def _explain_backend(problem: backends.Problem, name: str) -> tuple[str, Why]:
    """The backend that runs, and every condition that each other one does not meet."""
    asked = _asked(name)
    try:
        choice = backends.resolve(problem, name)
    except BackendUnavailableError as error:
        return f"an error: backend {asked!r} cannot run", [(asked, error.reasons)]
    others: Why = []
    for backend in backends.BACKENDS:
        if backend is choice.backend:
            if backend.name == "cpu":
                others += [(f"cpu/{s.name}", s.reasons) for s in cpu.isa_table() if not s.chosen]
            continue
        reasons = [] if asked == "auto" else [f"backend {asked!r} was asked for"]
        reasons += backend.reasons(problem)
        others.append((backend.name, tuple(reasons or ["a faster backend runs"])))
    return choice.label, others
