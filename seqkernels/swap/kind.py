"""What `swap` and `explain` know of one kind of module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seqkernels.backends import Problem
from seqkernels.precision import Policy
from seqkernels.swap import choice
from seqkernels.swap.choice import Why
from seqkernels.swap.report import SwapReport, class_name

DEFINITION = "plain PyTorch"
Told = tuple[str, str, Why]  # a name, what runs there, and why nothing else does


@dataclass(frozen=True)
class Job:
    """One call of `swap`: what was asked for, and its report."""

    backend: str
    padded_output: str | None
    bounds: tuple[float, float]  # of batch norms: min_var, max_abs
    policy: Policy
    report: SwapReport


class Outcome(NamedTuple):
    """What a replaced module is now, as in `Replaced`."""

    told: str
    padded_output: str | None = None


class Kind(ABC):
    """One kind of module; a subclass for each, an instance of it in `registry.KINDS`.

    Attributes
    ----------
    replaces : tuple of type
        The classes whose instances may be replaced; those of subclasses stay, with the reason.
    ours : tuple of type
        The classes of this package that `explain` tells of.
    op : str
        The op that runs them; ``""`` if they have none of their own.
    example : str
        The attribute of ours that has the dtype and the device of inputs.
    whole : bool
        Whether what lies within belongs to it: other kinds are not looked for there, and `explain`
        also tells of one that is not swapped.
    everywhere : bool
        Whether it is looked for within wholes of other kinds too.
    optional : bool
        Whether ``strict`` does not insist on it.
    stage : int
        Modules of a lower stage are replaced, and told, first; within a stage in the model's order.
    """

    replaces: tuple[type[nn.Module], ...] = ()
    ours: tuple[type[nn.Module], ...] = ()
    op: str = ""
    example: str = "weight"
    whole: bool = False
    everywhere: bool = False
    optional: bool = False
    stage: int = 1

    def recognizes(self, module: nn.Module) -> bool:
        """Whether a module is of this kind, be it torch's, ours, or a subclass."""
        return isinstance(module, (*self.replaces, *self.ours))

    # --- swap -------------------------------------------------------------------------------------

    def considers(self, module: Any, job: Job) -> bool:
        """Whether `swap` has to replace a module of this kind, or to tell why not."""
        return isinstance(module, self.replaces) and type(module) not in self.ours

    def other_class(self, module: nn.Module) -> str:
        """Why a module stays whose class is none of `replaces`."""
        if parametrize.is_parametrized(module):
            return "it is parametrized: its weights are computed on each call"
        base = next(kind for kind in self.replaces if isinstance(module, kind))
        return f"it is a subclass of {class_name(base)}, which may compute something else"

    def reasons(self, module: Any) -> list[str]:
        """Why a module of one of the classes `replaces` stays, backends aside."""
        return []

    def problem(self, module: Any, device: str, dtype: torch.dtype) -> Problem:
        """What calls with such inputs ask of backends."""
        return Problem(self.op, device, dtype)

    def declines(self, module: Any, name: str, job: Job) -> list[str]:
        """Why a module that could be replaced shall not be; the last word before the changes."""
        return []

    @abstractmethod
    def replace(self, module: Any, name: str, job: Job) -> Outcome | None:
        """Give a module our class, within ``job.report.changing``; None if it stayed after all."""

    # --- explain ----------------------------------------------------------------------------------

    def explain(self, name: str, module: Any, call: dict[str, Any]) -> list[Told]:
        """What runs one of ours, and why nothing else does.

        Parameters
        ----------
        name : str
        module : torch.nn.Module
        call : dict of str to object
            The arguments of its ``forward`` in one call, as far as known.
        """
        return [(name, *self.runs(module, call))]

    def runs(self, module: Any, call: dict[str, Any]) -> tuple[str, Why]:
        """The same for a module that is one op, without its name."""
        x = call.get("input")
        if not isinstance(x, Tensor):
            x = getattr(module, self.example)
        device, dtype = ("cpu", torch.float32) if x is None else (x.device.type, x.dtype)
        label, others = choice.what_runs(self.problem(module, device, dtype), module.backend)
        reasons = module.fallback_reasons()
        return (DEFINITION, [("kernel", tuple(reasons)), *others]) if reasons else (label, others)
