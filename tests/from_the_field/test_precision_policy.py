"""The same model gets the same scores in every process, and the order of items is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import PrecisionDecision, PrecisionPolicy, precision
from seqkernels.backends import native_module

native = pytest.mark.skipif(native_module.module is None, reason="there is no native module")

SCORES = """
import hashlib, torch, seqkernels
from torch import nn

for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(600, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 256), nn.Linear(256, 24)
    ).eval().to(dtype)
    report = seqkernels.swap(model)
    with torch.inference_mode():
        scores = model(torch.randn(64, 600).to(dtype)).float()
    print(sorted(r.name for r in report.replaced), report.decisions)
    print(hashlib.sha256(scores.numpy().tobytes()).hexdigest())
"""


@native
def test_every_process_gives_the_same_scores() -> None:
    """Beside a busy neighbour as on a quiet machine: some of these run at the same time."""
    command = [sys.executable, "-c", SCORES]
    said = set()
    for together in (1, 3):
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
            for _ in range(together)
        ]
        for process in running:
            out, _ = process.communicate()
            assert process.returncode == 0
            said.add(out)
    assert len(said) == 1


def test_no_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> float:
        raise AssertionError("the policy depends on the clock")

    for name in ("perf_counter", "perf_counter_ns", "monotonic", "process_time", "time"):
        monkeypatch.setattr(time, name, broken)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    report = seqkernels.swap(model, backend="reference")
    monkeypatch.undo()
    assert set(report.decisions) == {"0", "2"}


class Recommender(nn.Module):
    """As libraries build them: the items' embedding is the last layer's weight."""

    def __init__(self, tie: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items: nn.Embedding | nn.EmbeddingBag = nn.Embedding(1500, 192)
        if tie == "bag":
            self.items = nn.EmbeddingBag(1500, 192)
        self.body = nn.Linear(192, 192)
        self.score = nn.Linear(192, 1500, bias=False)
        if tie == "memory":
            self.score.weight.data = self.items.weight.data
        else:
            self.score.weight = self.items.weight

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(torch.tanh(self.body(x)))
        return scores


@pytest.fixture
def _bf16_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this processor too, from one weight on."""
    monkeypatch.setattr(precision, "_instruction_set", lambda _: "avx512_bf16")
    monkeypatch.setitem(precision.FEWEST_WEIGHTS, ("avx512_bf16", torch.float32), 1)


@pytest.mark.usefixtures("_bf16_pays")
@pytest.mark.parametrize("tie", ["parameter", "memory", "bag"])
def test_a_layer_tied_to_an_embedding_keeps_the_order_of_items(tie: str) -> None:
    model = Recommender(tie).eval()
    report = seqkernels.swap(model, backend="reference")
    assert report.decisions["body"].bf16
    assert report.decisions["score"] == (
        False,
        "it scores items: its weight is that of the embedding 'items'",
    )
    assert type(model.score) is nn.Linear
    x = torch.randn(64, 192)
    with torch.inference_mode():
        assert torch.equal(model.score(x), nn.functional.linear(x, model.items.weight))


@pytest.mark.usefixtures("_bf16_pays")
def test_thousands_of_outputs_are_items() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 3000)).eval()
    report = seqkernels.swap(model, backend="reference")
    assert [r.name for r in report.replaced] == ["0"]
    assert report.decisions["1"].reason == "it scores items: more than 2048 outputs"
    assert "it scores items" in " ".join(str(report).split())


@pytest.mark.usefixtures("_bf16_pays")
def test_patterns_and_policies_of_the_user_have_the_last_word() -> None:
    model = Recommender("parameter").eval()
    report = seqkernels.swap(model, precision_policy=PrecisionPolicy(bf16=("score",)))
    assert report.decisions["score"].bf16
    report.restore()
    own = seqkernels.swap(model, precision_policy=lambda *_: PrecisionDecision(True, "mine"))
    assert set(own.decisions.values()) == {(True, "mine")}
    own.restore()

    class Mine(PrecisionPolicy):
        def __call__(self, name: str, layer: nn.Linear) -> PrecisionDecision:  # type: ignore[override]
            return PrecisionDecision(name == "score", "mine")

    assert [r.name for r in seqkernels.swap(model, precision_policy=Mine()).replaced] == ["score"]
