"""The definition of ``linear`` beside torch.nn, and the folding of a norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from seqkernels import reference
from seqkernels.reference.linear import fold_norm, fold_reasons
from tests.channel_norms import LinearCase, channel_norm

ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "leaky_relu": nn.LeakyReLU(0.2),
}


def stock_norm(norm: reference.ChannelNorm) -> nn.BatchNorm1d:
    made = nn.BatchNorm1d(len(norm.mean), norm.eps, affine=norm.weight is not None)
    state = [norm.weight, norm.bias, norm.mean, norm.var]
    present = [t for t in state if t is not None]
    made.load_state_dict(dict(zip(made.state_dict(), present, strict=False)), strict=False)
    return made


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norms", ["", "in", "out", "both"])
def test_it_is_what_torchs_modules_compute(
    norms: str, bias: bool, affine: bool, activation: str
) -> None:
    before = "exact" if norms in ("in", "both") else ""
    behind = "exact" if norms in ("out", "both") else ""
    case = LinearCase(20, 12, 9, before, behind, activation, bias, affine)
    weight, b, norm_in, norm_out = case.layer()
    layer = nn.Linear(12, 9, bias=bias)
    layer.load_state_dict({"weight": weight} | ({} if b is None else {"bias": b}))
    members = [*([stock_norm(norm_in)] if norm_in else []), layer]
    members += [*([stock_norm(norm_out)] if norm_out else []), ACTIVATIONS[activation]]
    stock = nn.Sequential(*members).double().eval()
    with torch.inference_mode():
        torch.testing.assert_close(case.reference(torch.float64), stock(case.x().double()))


def test_gradients_reach_everything() -> None:
    case = LinearCase(20, 12, 9, "bounded", "bounded", "gelu")
    weight, bias, before, behind = case.layer()
    tensors = (weight, bias, before.weight, before.bias, behind.weight, behind.bias)
    for t in tensors:
        t.requires_grad_()
    reference.linear(
        case.x(), weight, bias, input_norm=before, output_norm=behind, activation="gelu"
    ).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_keeps_the_function(bias: bool, affine: bool) -> None:
    case = LinearCase(50, 12, 9, "", "exact", "none", bias, affine)
    weight, b, _, norm = case.layer()
    assert norm is not None
    x = case.x().double()
    folded = fold_norm(weight.double(), None if b is None else b.double(), norm)
    torch.testing.assert_close(reference.linear(x, *folded), case.reference(torch.float64))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_abs": 5.0}, "bounds"),
        ({"min_var": 1e-3}, "bounds"),
        ({"mean": torch.tensor([0.0, math.nan])}, "not finite"),
        ({"var": torch.tensor([1.0, math.inf])}, "not finite"),
        ({"var": torch.tensor([1.0, -1.0])}, "not finite"),
        ({"var": torch.tensor([1.0, 0.0]), "eps": 0.0}, "no finite factor"),
        ({}, ""),
    ],
)
def test_when_a_norm_may_not_be_folded(changes: dict[str, object], reason: str) -> None:
    norm = channel_norm(2, bounded=False)._replace(**changes)
    reasons = fold_reasons(norm)
    assert reasons == [] if not reason else any(reason in told for told in reasons)
