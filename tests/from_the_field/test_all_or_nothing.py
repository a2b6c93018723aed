"""`swap` changes all or nothing, and `restore` puts back what was there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import seqkernels
from seqkernels import PrecisionDecision, settings
from seqkernels.backends import native_module
from seqkernels.nn import FusedSequential, Linear, ResilientBatchNorm1d, TransformerEncoderLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")
BF16 = seqkernels.PrecisionPolicy(bf16=("*",))


@pytest.fixture(autouse=True)
def _backend_without_native() -> Any:
    with settings.override(backend=None if native_module.module is not None else "reference"):
        yield


def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    chain = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "chain": chain}).eval()


def everything(model: nn.Module) -> dict[str, Any]:
    """Each module's class and attributes; of dicts and sets what is in them."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in module.__dict__.items()
        }
        found[name] = (type(module), attributes)
    return found


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """By identity, since tensors have no truth value."""
    if before.keys() != after.keys():
        return False
    for name, (kind, attributes) in before.items():
        other_kind, others = after[name]
        if kind is not other_kind or attributes.keys() != others.keys():
            return False
        for key, value in attributes.items():
            if isinstance(value, dict):
                if value.keys() != others[key].keys():
                    return False
                if any(v is not others[key][k] for k, v in value.items()):
                    return False
            elif value is not others[key]:
                return False
    return True


def test_a_policy_that_raises_leaves_the_model_as_it_was() -> None:
    made = model()
    before = everything(made)
    asked: list[str] = []

    def policy(name: str, layer: nn.Linear) -> PrecisionDecision:
        asked.append(name)
        if len(asked) == 2:
            raise KeyError(name)
        return PrecisionDecision(True, "it pays")

    with pytest.raises(KeyError):
        seqkernels.swap(made, precision_policy=policy)
    assert asked == ["chain.0", "chain.3"]
    assert same(before, everything(made))


@pytest.mark.parametrize("owner", [TransformerEncoderLayer, ResilientBatchNorm1d, Linear])
def test_whatever_raises_within_is_rolled_back(owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of the module is changed already when its adoption raises."""
    made = model()
    before = everything(made)
    adopt = owner._adopt.__func__

    def broken(cls: Any, module: nn.Module, *arguments: Any) -> Any:
        adopt(cls, module, *arguments)
        raise MemoryError

    monkeypatch.setattr(owner, "_adopt", classmethod(broken))
    with pytest.raises(MemoryError):
        seqkernels.swap(made, precision_policy=BF16)
    assert same(before, everything(made))


def test_what_raises_while_chains_are_made_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    before = everything(made)
    monkeypatch.setattr(FusedSequential, "steps", None)
    with pytest.raises(TypeError):
        seqkernels.swap(made, precision_policy=BF16)
    assert same(before, everything(made))


def test_restore_gives_back_every_attribute() -> None:
    made = model()
    before = everything(made)
    report = seqkernels.swap(made, precision_policy=BF16, resilient=True)
    assert not same(before, everything(made))
    with torch.inference_mode():
        made["encoder"](torch.randn(2, 5, 8))
        made["chain"](torch.randn(3, 8))
    report.restore()
    assert same(before, everything(made))


def test_attributes_of_the_same_name_that_were_there_come_back() -> None:
    made = model()
    made["chain"][0].backend = "my own"
    made["chain"][1].min_var = made["encoder"].padded_output = 7
    before = everything(made)
    report = seqkernels.swap(made, precision_policy=BF16)
    assert made["chain"][0].backend == "auto"
    report.restore()
    assert same(before, everything(made))


def test_options_of_our_own_layers_in_a_stock_encoder_come_back() -> None:
    layer = TransformerEncoderLayer(
        8, 2, 8, batch_first=True, padded_output="zero", backend="reference"
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    before = everything(encoder)
    report = seqkernels.swap(encoder, padded_output="compute")
    assert {m.backend for m in encoder.layers} == {"auto"}
    report.restore()
    assert same(before, everything(encoder))
    assert {(m.padded_output, m.backend) for m in encoder.layers} == {("zero", "reference")}


def test_a_sequence_without_a_chain_is_not_touched() -> None:
    made = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval()
    before = everything(made)
    assert not seqkernels.swap(made).replaced
    assert same(before, everything(made))
