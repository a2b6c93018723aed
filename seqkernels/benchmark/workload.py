"""What is measured: a problem, the threads and the instruction set it gets, and who competes.

A kind of workload is one file in ``kinds``: a `Workload`, the `Task` it draws, and contestants.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn


class Model(NamedTuple):
    """A module in eval mode and what it is called with, by name."""

    module: nn.Module
    inputs: dict[str, Tensor]

    def __call__(self) -> Any:
        """What the module returns."""
        return self.module(**self.inputs)

    def on(self, device: str) -> Model:
        """Both there."""
        inputs = {name: t.to(device) for name, t in self.inputs.items()}
        return Model(self.module.to(device), inputs)


class Expected(NamedTuple):
    """What is right, for the part of an output that is checked."""

    shape: tuple[int, ...]  # of a whole output
    rows: Tensor  # [G] or [G, n] int64, indices of dimension 0: the rule holds for each of G groups
    golden: Tensor  # [*rows.shape, ...] fp64: the oracle
    low_precision: Tensor  # alike: the yardstick, torch's own run in low precision
    counts: Tensor | None = None  # bool, broadcast with golden: what of a peer's output is checked


class Task(ABC):
    """The values of a workload, drawn, and the modules that hold and compute with them.

    The values are exact in bf16, so that no contestant has an error from rounding what it is given.

    Attributes
    ----------
    dtype : torch.dtype
        Of inputs and output, for contestants that have none of their own.
    """

    dtype: torch.dtype = torch.float32

    @abstractmethod
    def ours(self, dtype: torch.dtype) -> Model:
        """What a user of seqkernels runs, with inputs and output of this dtype."""

    @abstractmethod
    def stock(self, dtype: torch.dtype, *, nested: bool = False) -> Model:
        """The same function of modules of ``torch.nn``, all of it in this dtype.

        ``nested`` lets its Transformer encoders, if it has any, pack the valid events.
        """

    @abstractmethod
    def expected(self) -> Expected:
        """What is right."""

    def whole(self, out: Tensor) -> Tensor:
        """The output that a result of the stock module stands for."""
        return out

    def workspace_bytes(self, isa: str | None) -> int | None:
        """What a thread of the native kernel needs beyond output and packed weights, if known."""
        return None


class Unavailable(Exception):
    """A contestant cannot compete; the message says why."""


@dataclass(frozen=True)
class Runner:
    """A contestant that is ready.

    Attributes
    ----------
    call : callable
        What is timed.
    around : callable
        Makes the context of a turn, outside the clock.
    note : str
        What ran, for the report.
    tensor : callable
        Turns what ``call`` returned into the output as the workload has it.
    """

    call: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
    note: str = ""
    tensor: Callable[[Any], Tensor] = lambda out: out


AnyTask = TypeVar("AnyTask", bound=Task)


class Contestant(ABC, Generic[AnyTask]):
    """One way to compute a task.

    Attributes
    ----------
    name, title : str
        In results files, and in reports.
    ours : bool
        Whether it is seqkernels, which the rule for its numerics then applies to.
    yardstick : bool
        Whether it computes something else, which is told beside the others and is nobody's rival:
        a copy of the same bytes, or a part of the whole. Its output is not checked.
    """

    name: str
    title: str
    ours = False
    yardstick = False

    @abstractmethod
    def prepare(self, task: AnyTask, workload: Workload) -> Runner:
        """Build what is timed; raise ``Unavailable`` if that cannot be."""


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """One comparison: every contestant computes the same task in one interleaved run.

    Attributes
    ----------
    id, group : str
        Its name, and the part of the registry it belongs to.
    contestants : tuple of str
        Names from ``rivals``; "seqkernels" is among them.
    threads : int
        Threads of every contestant; 0: torch's default, which is the number of cores.
    isa : str or None
        Instruction set forced upon seqkernels; None: the best.
    seconds : float
        Time for the interleaved rounds, preparation aside; it decides how many rounds there are.
    dynamic : bool
        Whether torch.compile compiles once for all shapes of a sweep, instead of for this shape.
    device : str
        Where everybody computes: "cpu" or "cuda". Time on a GPU is that of its own clock.
    replay : bool
        On a GPU: time replays of a CUDA graph instead of calls, for whoever can be captured.
    kind, title : str
        Of the class: its name in ``KINDS``, and in a report.
    columns : tuple of (str, str)
        Of the class: what a report shows beside the times, a heading and a key of ``sizes()``.
    per : str
        Of the class: what a time is shared out among, one for each of ``batch``; "": nothing.
    checked : str
        Of the class: what the rule for numerics holds for, each of them: "sequences", "channels".
    yardstick : str
        Of the class: whose error that rule compares with.
    rivals : dict of str to Contestant
        Of the class: who may compete, in a report's order.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    columns: ClassVar[tuple[tuple[str, str], ...]]
    per: ClassVar[str] = ""
    checked: ClassVar[str]
    yardstick: ClassVar[str] = "torch's own bf16 run"
    rivals: ClassVar[Mapping[str, Contestant[Any]]]

    id: str
    group: str
    contestants: tuple[str, ...]
    threads: int = 0
    isa: str | None = None
    seconds: float = 8.0
    dynamic: bool = False
    device: str = "cpu"
    replay: bool = True

    @property
    def num_threads(self) -> int:
        """Threads of every contestant."""
        return self.threads or torch.get_num_threads()

    def competing(self) -> tuple[str, ...]:
        """Those of ``contestants`` that have anything to say here."""
        return self.contestants

    @abstractmethod
    def task(self) -> Task:
        """Draw the values; always the same."""

    @abstractmethod
    def sizes(self) -> dict[str, object]:
        """Of the task, for a results file, as JSON.

        ``batch`` is the output's dimension 0. Where they mean something, ``multiply_adds`` and
        ``bytes`` say what the result needs computed, and read and written.
        """

    @abstractmethod
    def small(self) -> Self:
        """The same in a size that takes a moment."""

    def describe(self) -> dict[str, object]:
        """What it is, for a results file."""
        return {
            "id": self.id,
            "group": self.group,
            "kind": self.kind,
            **self.sizes(),
            "threads": self.num_threads,
            "isa": self.isa,
            "dynamic": self.dynamic,
            "device": self.device,
            "replay": self.replay and self.device == "cuda",
        }


def both_ends(batch: int, most: int) -> Tensor:
    """At most so many indices, of the first and of the last rows: [n] int64.

    Examples
    --------
    >>> from seqkernels.benchmark.workload import both_ends
    >>> both_ends(100, 4).tolist(), both_ends(3, 4).tolist()
    ([0, 1, 98, 99], [0, 1, 2])
    """
    count = min(batch, most)
    last = count // 2
    return torch.cat((torch.arange(count - last), torch.arange(batch - last, batch)))


def in_groups(rows: Tensor, size: int) -> Tensor:
    """Indices [n] as [groups, size]; fewer than ``size`` are one group, a rest is left out.

    Examples
    --------
    >>> import torch
    >>> from seqkernels.benchmark.workload import in_groups
    >>> in_groups(torch.arange(5), 2).tolist(), in_groups(torch.arange(3), 4).tolist()
    ([[0, 1], [2, 3]], [[0, 1, 2]])
    """
    size = min(size, len(rows))
    return rows[: len(rows) // size * size].view(-1, size)


def expected_of_stock(
    task: Task, rows: Tensor, low_precision: torch.dtype = torch.bfloat16
) -> Expected:
    """What the stock module returns on these rows of its inputs in fp64, and in low precision.

    Each row of the output comes of the row of every input; ``rows`` is [G] or [G, n]. Torch's fast
    paths are off, so that the yardstick rounds where each of its modules does.
    """

    def run(model: Model) -> Tensor:
        some = {name: t[rows.flatten()] for name, t in model.inputs.items()}
        with without_fast_path():
            out: Tensor = model.module(**some).double()
        return out.view(*rows.shape, *out.shape[1:])

    exact = task.stock(torch.float64)
    golden = run(exact)
    batch = len(next(iter(exact.inputs.values())))
    shape = (batch, *golden.shape[rows.dim() :])
    return Expected(shape, rows, golden, run(task.stock(low_precision)))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Inference without the fused layer of torch, an opaque op in which a compiler sees nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
