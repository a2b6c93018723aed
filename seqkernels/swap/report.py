"""What `swap` did to a model, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from seqkernels.nn.owner import release
from seqkernels.precision import PrecisionDecision
from seqkernels.tables import as_text


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


class _Change:
    """What one module was before it got another class, and which attributes it got with it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._was: type[nn.Module] = type(module)
        self._became: type[nn.Module] = self._was
        self._before: dict[str, Any] = dict(module.__dict__)
        self._names: set[str] = set()

    def finish(self) -> None:
        """Look at the module after the change."""
        now = self._module.__dict__
        both = self._before.keys() | now.keys()
        self._became = type(self._module)
        self._names = {
            n for n in both if n not in self._before or now.get(n) is not self._before[n]
        }
        self._before = {n: self._before[n] for n in self._names & self._before.keys()}

    def undo(self) -> None:
        """Give the module back its class and the attributes it had."""
        module = self._module
        kind: Any = type(module)
        if kind is self._became:
            module.__class__ = self._was
        elif kind.__bases__ == (self._became,):  # parametrized since, by a class of its own
            kind.__bases__ = (self._was,)
        release(module)
        for name in self._names:
            if name in self._before:
                module.__dict__[name] = self._before[name]
            else:
                module.__dict__.pop(name, None)


@dataclass
class SwapReport:
    """What `swap` did.

    Attributes
    ----------
    replaced : list of Replaced
        Each module that was replaced.
    skipped : list of Skipped
        Each module of a kind that `swap` knows that was left as it is, with the reasons.
    decisions : dict of str to PrecisionDecision
        What the precision policy said of each linear layer that could be replaced, by name.
    request_scoring : list of str
        Names of encoders that could score a request's candidates with the user's part computed
        once: each `UserSequenceEncoder` with a candidate (``score_candidates``), and each replaced
        ``TransformerEncoder``, if its input is one user's events, each joined with a candidate:
        no module shows what its caller puts there.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    decisions: dict[str, PrecisionDecision] = field(default_factory=dict)
    request_scoring: list[str] = field(default_factory=list)
    _changes: list[_Change] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Give every replaced module back its class; parameters keep their present values.

        The attributes that came with the class go, and those it changed are what they were. The
        modules are the objects they always were, so that references to them stay good. A second
        call does nothing.
        """
        while self._changes:
            self._changes.pop().undo()

    @contextmanager
    def changing(self, module: nn.Module) -> Iterator[None]:
        """Keep what `restore` needs of a module that gets another class within."""
        change = _Change(module)
        try:
            yield
        finally:
            change.finish()
            self._changes.append(change)

    def undo_last(self) -> None:
        """Take the last change back."""
        self._changes.pop().undo()

    def __str__(self) -> str:
        rows = [(shown(r.name, r.also), r.type, r.outcome) for r in self.replaced]
        rows += [(shown(s.name), s.type, "left: " + "\n".join(s.reasons)) for s in self.skipped]
        if not rows and not self.request_scoring:
            return "seqkernels.swap: nothing that it knows was found"
        told = [as_text("seqkernels.swap", ("module", "type", "outcome"), rows)] if rows else []
        if any(r.padded_output == "stock" for r in self.replaced):
            told.append(
                "padded_output='stock': padded positions return zeros if every sequence of a batch "
                "is padded at its end only, else computed values, as torch.nn decides. What a "
                "model reads there depends on the rest of the batch: swap(model, "
                "padded_output='zero') or 'compute' makes scores independent of it."
            )
        if self.request_scoring:
            told.append(
                "One user, many candidates? UserSequenceEncoder.score_candidates computes the "
                "user's part once, where events are joined with a candidate: "
                + ", ".join(map(shown, self.request_scoring))
            )
        return "\n".join(told)


def shown(name: str, also: tuple[str, ...] = ()) -> str:
    """All names of a module."""
    return " = ".join(n or "(the model)" for n in (name, *also))


def class_name(kind: type[nn.Module]) -> str:
    """The full name of a class, torch's as users import them."""
    where = "torch.nn" if getattr(nn, kind.__name__, None) is kind else kind.__module__
    return f"{where}.{kind.__qualname__}"
