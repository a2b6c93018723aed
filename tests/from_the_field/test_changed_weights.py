"""Chains and encoders use the weights of now, whatever changed them and in whichever mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from tests.from_the_field.stock_models import draw

WIDTH = 32
POLICIES = {
    "folded": seqkernels.PrecisionPolicy(keep=("*",)),
    "bf16": seqkernels.PrecisionPolicy(bf16=("*",)),
}


def chain(kind: str, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()).eval()
    seqkernels.swap(made, precision_policy=POLICIES[kind], **options)
    return made


X = draw(5, WIDTH)


def run(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        out: Tensor = module(X)
    return out


def fused_step(module: nn.Module, which: Callable[[Any], Any] = lambda m: m) -> None:
    optimizer = torch.optim.AdamW(which(module).parameters(), lr=0.5, fused=True)
    for parameter in which(module).parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def step_of_one_member(net: nn.Module) -> None:
    """One member stays in evaluation mode: its owner is the whole chain."""
    net.train()
    net[1].eval()  # type: ignore[index, operator]
    fused_step(net, lambda m: m[0])
    net.eval()


def hidden_edit(net: nn.Module) -> None:
    net.train()
    for parameter in net.parameters():
        parameter.data.mul_(1.5)
    net.eval()


def hidden_edit_of_a_buffer(net: nn.Module) -> None:
    net.train()
    net[1].running_mean.data.add_(1.0)  # type: ignore[index, union-attr]
    net.eval()


def step_in_evaluation(net: nn.Module) -> None:
    fused_step(net)


def warmup_then_step(net: nn.Module) -> None:
    net.train()
    seqkernels.warmup(net, X)
    fused_step(net)
    net.eval()


def explain_then_hidden_edit(net: nn.Module) -> None:
    net.train()
    seqkernels.explain(net, X)
    net[0].weight.data.mul_(1.5)  # type: ignore[index, operator, union-attr]
    net.eval()


def transposed(net: nn.Module) -> None:
    net[0].weight.data = net[0].weight.data.t()  # type: ignore[index, union-attr]


def one_vector(net: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(vector, net.parameters())
    run(net)
    vector.mul_(1.5)
    nn.utils.vector_to_parameters(vector, net.parameters())


def tensors_swapped(net: nn.Module) -> None:
    weight = net[0].weight  # type: ignore[index, union-attr]
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 1.5))  # type: ignore[arg-type]


def numpy_view(net: nn.Module) -> None:
    net[0].weight.detach().numpy()[...] *= 1.5  # type: ignore[index, operator, union-attr]
    seqkernels.recheck_weights()


EDITS = [
    step_of_one_member,
    hidden_edit,
    hidden_edit_of_a_buffer,
    step_in_evaluation,
    warmup_then_step,
    explain_then_hidden_edit,
    transposed,
    one_vector,
    tensors_swapped,
    numpy_view,
]


@pytest.mark.parametrize("resilient", [False, True])
@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_chain_follows(edit: Callable[[nn.Module], None], kind: str, resilient: bool) -> None:
    net = chain(kind, resilient=resilient)
    for _ in range(2):
        before = run(net)
        edit(net)
        after = run(net)
        assert torch.equal(after, run(copy.deepcopy(net)))  # which packs anew
        assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", POLICIES)
def test_a_shorter_weight_is_its_shape(kind: str) -> None:
    net = chain(kind)
    run(net)
    weight, bias = net[0].weight, net[0].bias
    full = weight.data  # type: ignore[union-attr]
    norm = nn.BatchNorm1d(16).eval()
    weight.data, bias.data = full[:16], bias.data[:16]  # type: ignore[union-attr, index]
    net[1] = norm
    assert run(net).shape == (5, 16)
    assert run(net[0]).shape == (5, 16)


def test_set_swap_module_params_on_conversion() -> None:
    net = chain("bf16")
    expected = run(net)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double()
        net.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(run(net), expected)
