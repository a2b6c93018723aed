"""Which code runs a model's encoders, why no other does, and how to get it ready."""

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
from seqkernels.nn import TransformerEncoder, TransformerEncoderLayer, UserSequenceEncoder
from seqkernels.swap import swap_reasons
from seqkernels.tables import as_text

_OURS = (UserSequenceEncoder, TransformerEncoder, TransformerEncoderLayer)
_STOCK = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
DEFINITION = "plain PyTorch"
NOT_SWAPPED = "torch.nn"
NOT_CALLED = "nothing"


@dataclass(frozen=True)
class Explained:
    """What runs one encoder.

    Attributes
    ----------
    name, type : str
        The module, as in ``named_modules()``.
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
    """The result of `explain`: one entry an encoder; ``str()`` is a table."""

    entries: tuple[Explained, ...]

    def __str__(self) -> str:
        if not self.entries:
            return "seqkernels.explain: the module has no Transformer encoder"
        rows: list[tuple[str, str, str, str]] = []
        for e in self.entries:
            first = (e.name or "(the module)", e.runs)
            for other, reasons in e.why_not or (("", ("",)),):
                rows.append((*first, other, "\n".join(reasons)))
                first = ("", "")
        return as_text("seqkernels.explain", ("module", "runs", "not", "because"), rows)


def explain(module: nn.Module, *example_inputs: Any, **example_keywords: Any) -> Explanation:
    """Say which backend and instruction set run a model's encoders, and why the others do not.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or an encoder.
    *example_inputs, **example_keywords
        Arguments of one call. The module is run once with them, in eval mode under
        ``inference_mode``, to see what reaches its encoders (masks, dtypes). Without any, inputs
        are taken to have the dtype and device of the encoder's parameters, and no mask.

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
    encoders = _outermost(module)
    calls: dict[nn.Module, dict[str, Any]] = {}
    given = bool(example_inputs or example_keywords)
    if given:
        with _recording([m for _, m in encoders], calls), evaluating(module):
            module(*example_inputs, **example_keywords)
    entries = []
    why_not: list[tuple[str, tuple[str, ...]]]
    for name, encoder in encoders:
        kind = type(encoder)
        type_name = f"{kind.__module__}.{kind.__qualname__}"
        if given and encoder not in calls:
            runs, why_not = NOT_CALLED, [("any", ("these inputs do not reach it",))]
        elif isinstance(encoder, _OURS):
            runs, why_not = _explain_ours(encoder, calls.get(encoder, {}))
        else:
            reasons = swap_reasons(encoder)
            told = [f"swap leaves it alone: {r}" for r in reasons]
            runs = NOT_SWAPPED
            why_not = [("seqkernels", tuple(told) or ("not swapped: seqkernels.swap(model)",))]
        entries.append(Explained(name, type_name, runs, tuple(why_not)))
    return Explanation(tuple(entries))


def warmup(model: nn.Module, example_inputs: Any) -> None:
    """Run a model once, so that the first request finds weights packed and threads started.

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
    encoders: Sequence[nn.Module], calls: dict[nn.Module, dict[str, Any]]
) -> Iterator[None]:
    """Keep the arguments of the first call of each encoder."""

    def keep(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **keywords)
        calls.setdefault(module, dict(bound.arguments))

    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in encoders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _explain_ours(
    encoder: UserSequenceEncoder | TransformerEncoder | TransformerEncoderLayer,
    call: dict[str, Any],
) -> tuple[str, list[tuple[str, tuple[str, ...]]]]:
    parameter = next(encoder.parameters())
    x = call.get("events", call.get("src"))
    if not isinstance(x, Tensor):
        x = parameter
    if isinstance(encoder, UserSequenceEncoder):
        reasons = encoder.fallback_reasons()
    else:
        mask = call.get("mask", call.get("src_mask"))
        reasons = encoder.fallback_reasons(x, mask)
    label, others = _explain_backend(encoder.backend, x.device.type, x.dtype)
    if reasons:
        return DEFINITION, [("fused kernel", tuple(reasons)), *others]
    if parameter.is_inference():
        told = (
            "the weights were made under inference_mode and have no version counter: they are "
            "packed on every call"
        )
        others.append(("packed weights kept", (told,)))
    return label, others


def _explain_backend(
    name: str, device: str, dtype: torch.dtype
) -> tuple[str, list[tuple[str, tuple[str, ...]]]]:
    asked = settings.current.backend if name == "auto" else name
    try:
        choice = backends.resolve("explain", name, device, dtype)
    except BackendUnavailableError as error:
        return f"an error: backend {asked!r} cannot run", [(asked, error.reasons)]
    others: list[tuple[str, tuple[str, ...]]] = list(choice.rejected)
    if choice.backend.name == "cpu":
        others += [(f"cpu/{s.name}", s.reasons) for s in cpu.isa_table() if not s.chosen]
        others.append(("reference", ("a faster backend runs",)))
    elif not choice.rejected:
        others.append(("cpu", (f"backend {asked!r} was asked for",)))
    return choice.label, others
