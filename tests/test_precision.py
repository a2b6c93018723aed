"""The policy that says which linear layers multiply in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import seqkernels
from seqkernels import PrecisionDecision, PrecisionPolicy, precision, settings
from seqkernels.backends import cpu, native_module


@pytest.fixture(params=sorted({isa for isa, _ in precision.FEWEST_WEIGHTS}))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set the table knows, as if the processor had it."""
    name: str = request.param
    monkeypatch.setattr(precision, "_instruction_set", lambda _: name)
    return name


def layer(in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(in_features, out_features, device="meta", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_decides_by_the_number_of_weights(isa: str, dtype: torch.dtype) -> None:
    policy = PrecisionPolicy()
    fewest = precision.FEWEST_WEIGHTS.get((isa, dtype))
    large, small = policy("a", layer(512, 512, dtype)), policy("a", layer(512, 511, dtype))
    assert not small.bf16
    if fewest is None:
        assert not large.bf16
        assert f"on {isa}" in large.reason
        assert large.reason.startswith("no gain")
    else:
        assert fewest == 512 * 512
        assert large == (True, f"262144 weights, on {isa} it pays from 262144 on")
        assert small.reason == f"small: 261632 weights, on {isa} it pays from 262144 on"
    assert PrecisionPolicy(min_weights=4096)("a", layer(64, 64, dtype)).bf16


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_fp32_stays_where_the_processor_multiplies_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_instruction_set", lambda _: name)
    decision = PrecisionPolicy()("a", layer(4096, 1024))
    assert decision == (
        False,
        f"no gain on {name}, which multiplies fp32 whatever the operands are",
    )


def test_without_kernels_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_instruction_set", lambda _: "")
    decision = PrecisionPolicy()("a", layer(4096, 1024))
    assert decision == (False, "no gain is known on this machine")


@pytest.mark.skipif(native_module.module is None, reason="there is no native module")
def test_the_instruction_set_is_the_one_in_use() -> None:
    assert precision._instruction_set(torch.float32) == cpu.CpuBackend().variant()
    with settings.override(isa="portable"):
        assert precision._instruction_set(torch.float32) == "portable"


def test_heads_and_layers_that_score_items_stay(isa: str) -> None:
    policy = PrecisionPolicy(min_weights=1)
    assert policy("head", layer(20_000, 15)).reason == (
        "the last layer of a head: fewer than 16 outputs"
    )
    assert policy("mlp", layer(64, 2048)).bf16
    assert policy("items", layer(64, 2049)).reason == "it scores items: more than 2048 outputs"
    assert policy("items", layer(64, 64), "embed").reason == (
        "it scores items: its weight is that of the embedding 'embed'"
    )
    assert PrecisionPolicy(min_weights=1, max_out_features=10_000)("mlp", layer(64, 4096)).bf16


def test_patterns_go_first(isa: str) -> None:
    policy = PrecisionPolicy(bf16=("heads.*", "items"), keep=("heads.buy", "cross.?"))
    assert policy("heads.click", layer(4, 1)).bf16
    assert policy("items", layer(4, 50_000), "embed").bf16
    assert not policy("heads.buy", layer(4, 1)).bf16
    assert not policy("cross.1", layer(512, 512)).bf16
    assert "pattern" not in policy("cross.10", layer(512, 512)).reason


def test_swap_asks_the_policy_and_reports() -> None:
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
    assert report.decisions == {"0": (True, "because it is 0"), "2": (False, "because it is 2")}
    assert "bf16: because it is 0" in str(report)
    report.restore()
    assert type(model[0]) is nn.Linear
    assert type(model) is nn.Sequential


def test_a_policy_of_another_kind_is_told() -> None:
    policy: Any = lambda name, layer: True  # noqa: E731
    with pytest.raises(
        TypeError, match="swap: precision_policy: expected a PrecisionDecision for '0', got True"
    ):
        seqkernels.swap(
            nn.Sequential(nn.Linear(4, 5)), precision_policy=policy, backend="reference"
        )
