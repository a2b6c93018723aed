"""Which code runs a model's parts, why no other does, and how to get it ready."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seqkernels.swap.kind import Kind, Told
from seqkernels.swap.registry import kind_of, swap_reasons
from seqkernels.tables import as_text

NOT_SWAPPED = "torch.nn"
NOT_CALLED = "nothing"


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
        with _recording([m for _, m, _ in parts], calls), evaluating(module):
            module(*example_inputs, **example_keywords)
    entries: list[Explained] = []
    for name, part, kind in parts:
        type_name = f"{type(part).__module__}.{type(part).__qualname__}"
        told: list[Told]
        if given and part not in calls:
            told = [(name, NOT_CALLED, [("any", ("these inputs do not reach it",))])]
        elif isinstance(part, kind.ours):
            told = kind.explain(name, part, calls.get(part, {}))
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


def _outermost(module: nn.Module) -> list[tuple[str, nn.Module, Kind]]:
    """The parts, with their names and kinds."""
    found: list[tuple[str, nn.Module, Kind]] = []
    within: set[nn.Module] = set()
    for name, m in module.named_modules():
        kind = kind_of(m)
        if kind is not None and m not in within and (kind.whole or isinstance(m, kind.ours)):
            found.append((name, m, kind))
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
