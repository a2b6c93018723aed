"""A new kind of module is one entry of the registry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import BackendUnavailableError, settings
from seqkernels.swap import Replaced, Skipped
from seqkernels.swap.kind import Job, Kind, Outcome
from seqkernels.swap.registry import KINDS

TYPE = f"{__name__}.Scale"
ELSE = "which may compute something else"


class Scale(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 2.0))
        self.inner = nn.Linear(size, size)  # belongs to it

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.weight * input


class Odd(Scale):
    pass


class FastScale(Scale):
    backend: str

    def fallback_reasons(self) -> list[str]:
        return ["it is in training mode"] if self.training else []


class Scales(Kind):
    replaces = (Scale,)
    ours = (FastScale,)
    op = "resilient_batch_norm"  # one that backends know
    whole = True

    def reasons(self, module: Any) -> list[str]:
        return [] if module.weight.min() > 0 else ["it has weights <= 0"]

    def declines(self, module: Any, name: str, job: Job) -> list[str]:
        return ["its name says so"] if name == "never" else []

    def replace(self, module: Any, name: str, job: Job) -> Outcome:
        with job.report.changing(module):
            module.__class__, module.backend = FastScale, job.backend
        return Outcome("replaced, faster")


def model() -> nn.ModuleDict:
    made = nn.ModuleDict({n: Scale() for n in ("first", "never", "negative")} | {"odd": Odd()})
    made["again"] = made["first"]
    nn.init.constant_(made["negative"].weight, -1.0)  # type: ignore[arg-type]
    return made.eval()


@pytest.fixture
def scales() -> Iterator[None]:
    kind = Scales()
    KINDS.append(kind)
    with settings.override(backend="reference"):
        yield
    KINDS.remove(kind)


def test_a_kind_that_is_not_registered_is_not_known() -> None:
    report = seqkernels.swap(nn.Sequential(Scale()).eval())
    assert [s.name for s in report.skipped] == ["0.inner"]
    assert not seqkernels.explain(Scale()).entries


@pytest.mark.usefixtures("scales")
def test_swap_replaces_what_is_registered() -> None:
    made = model()
    before = {name: (type(m), dict(m.__dict__)) for name, m in made.named_modules()}
    report = seqkernels.swap(made)
    assert report.replaced == [Replaced("first", TYPE, "replaced, faster", None, ("again",))]
    assert report.skipped == [
        Skipped("negative", TYPE, ("it has weights <= 0",)),
        Skipped("odd", f"{__name__}.Odd", (f"it is a subclass of {TYPE}, {ELSE}",)),
        Skipped("never", TYPE, ("its name says so",)),
    ]
    assert "replaced, faster" in str(report)
    assert type(made["first"]) is FastScale
    assert not seqkernels.swap(made).replaced
    report.restore()
    assert {name: (type(m), dict(m.__dict__)) for name, m in made.named_modules()} == before
    with pytest.raises(BackendUnavailableError, match="negative: it has weights <= 0"):
        seqkernels.swap(made, strict=True)


@pytest.mark.usefixtures("scales")
def test_explain_tells_of_what_is_registered() -> None:
    made = model()
    stock = {e.name: e for e in seqkernels.explain(made).entries}
    assert list(stock) == ["first", "never", "negative", "odd"]
    assert stock["first"].runs == "torch.nn"
    assert stock["first"].why_not == (("seqkernels", ("not swapped: seqkernels.swap(model)",)),)
    assert stock["negative"].why_not[0][1] == ("swap leaves it alone: it has weights <= 0",)
    seqkernels.swap(made, backend="reference")
    (entry,) = seqkernels.explain(made["first"], torch.ones(4)).entries
    assert entry.runs == "reference"
    (entry,) = seqkernels.explain(made["first"].train()).entries
    assert entry.runs == "plain PyTorch"
    assert entry.why_not[0] == ("kernel", ("it is in training mode",))
