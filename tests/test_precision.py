"""The policy that says which linear layers multiply in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seqkernels
from seqkernels import PrecisionDecision, PrecisionPolicy, precision


@pytest.fixture
def speedup(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the measurement says, instead of the clock."""
    said = {"value": 2.0}
    monkeypatch.setattr(precision, "measured_speedup", lambda *_: said["value"])
    return said


def test_large_layers_that_are_faster(speedup: dict[str, float]) -> None:
    policy = PrecisionPolicy()
    decision = policy("mlp.0", nn.Linear(256, 128))
    assert decision == (True, "measured 2.00 times as fast as torch at 256 rows in bf16")
    speedup["value"] = 1.01
    assert not policy("mlp.0", nn.Linear(256, 128)).bf16
    assert PrecisionPolicy(min_speedup=1.0)("mlp.0", nn.Linear(256, 128)).bf16
    assert policy("mlp.0", nn.Linear(256, 128).bfloat16()).bf16  # multiplies in bf16 anyway
    speedup["value"] = 0.8
    assert not policy("mlp.0", nn.Linear(256, 128).bfloat16()).bf16


def test_what_is_small_or_last_stays(speedup: dict[str, float]) -> None:
    policy = PrecisionPolicy()
    assert "small: 4096 weights" in policy("mlp.0", nn.Linear(64, 64)).reason
    assert "the last layer of a head: 1 outputs" in policy("head", nn.Linear(20_000, 1)).reason
    assert PrecisionPolicy(min_weights=4096)("mlp.0", nn.Linear(64, 64)).bf16


def test_patterns_go_first(speedup: dict[str, float]) -> None:
    policy = PrecisionPolicy(bf16=("heads.*",), keep=("heads.buy", "cross.?"))
    assert policy("heads.click", nn.Linear(4, 1)).bf16
    assert not policy("heads.buy", nn.Linear(4, 1)).bf16
    assert not policy("cross.1", nn.Linear(512, 512)).bf16
    assert policy("cross.10", nn.Linear(512, 512)).bf16


def test_the_measurement_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    seconds = precision._seconds

    def counting(call: object) -> float:
        calls.append(1)
        return seconds(call)

    monkeypatch.setattr(precision, "_seconds", counting)
    precision._measured.cache_clear()
    first = precision.measured_speedup(64, 32, 16)
    assert first > 0
    made = len(calls)
    assert made > 0
    assert precision.measured_speedup(64, 32, 16) == first
    assert len(calls) == made
    precision.measured_speedup(64, 32, 16, torch.bfloat16)
    assert len(calls) == 2 * made


def test_swap_asks_the_policy_and_reports(speedup: dict[str, float]) -> None:
    asked: list[str] = []

    def policy(name: str, layer: nn.Linear) -> PrecisionDecision:
        asked.append(f"{name}: {layer.out_features}")
        return PrecisionDecision(name == "0", f"because it is {name}")

    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6)).eval()
    report = seqkernels.swap(model, precision_policy=policy, backend="reference")
    assert asked == ["0: 5", "2: 6"]
    assert type(model[0]) is seqkernels.nn.Linear
    assert type(model[2]) is nn.Linear
    assert [s.reasons for s in report.skipped] == [("because it is 2",)]
    assert "bf16: because it is 0" in str(report)
    report.restore()
    assert type(model[0]) is nn.Linear
    assert type(model) is nn.Sequential
