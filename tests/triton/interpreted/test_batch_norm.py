"""The batch norm kernel, interpreted."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from seqkernels.reference import ChannelNorm
from tests.backends.test_resilient_batch_norm import (
    BOUNDS,
    check,
    check_hard,
    hard_problem,
    lay_out,
)
from tests.channel_norms import apply, channel_norm, rounded
from tests.triton.runs import interpreted, launches

SHAPES = [(37, 1), (97, 16), (64, 35), (5, 700), (9, 5, 100), (3, 33, 64), (3, 64, 1), (2, 2, 700)]


def run(x: Tensor, norm: ChannelNorm, activation: str = "none") -> Tensor:
    launches.clear()
    with interpreted(), torch.inference_mode():
        result = apply(x, norm, activation, "triton")
    assert launches == ["batch_norm"]
    assert result.dtype == x.dtype
    return result


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "wide rows", "every other"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numerics(shape: tuple[int, ...], layout: str) -> None:
    activations = itertools.cycle(["none", "relu", "gelu", "gelu_tanh", "leaky_relu"])
    generator = torch.Generator().manual_seed(0)
    for bounded, affine, dtype in itertools.product(
        (False, True), (False, True), (torch.float32, torch.bfloat16)
    ):
        x = rounded(torch.randn(shape, generator=generator) * 2).to(dtype)
        norm = channel_norm(shape[1], bounded=bounded, affine=affine)
        activation = next(activations)
        check(run(lay_out(x, layout), norm, activation), x, norm, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_hard_statistics_and_inputs(bounds: str, dtype: torch.dtype) -> None:
    x, norm = hard_problem(bounds, dtype)
    check_hard(run(x, norm), x, norm)
