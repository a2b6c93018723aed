"""The batch norm kernel, interpreted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from seqkernels import ops
from seqkernels.reference import ChannelNorm
from tests.backends.test_resilient_batch_norm import check, lay_out
from tests.channel_norms import channel_norm, rounded
from tests.triton.runs import interpreted, launches

SHAPES = [(37, 1), (97, 16), (64, 35), (5, 700), (9, 5, 100), (3, 33, 64), (3, 64, 1), (2, 2, 700)]


def run(x: Tensor, norm: ChannelNorm, activation: str = "none") -> Tensor:
    launches.clear()
    with interpreted(), torch.inference_mode():
        result = ops.resilient_batch_norm(x, *norm, activation, 0.2, "triton")
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


HARD_X = (0.0, -0.0, 1.0, 1e30, -1e38, 3e38, math.inf, -math.inf, math.nan, 1e-40)
HARD_STATISTICS = (0.0, 1.0, -1.0, 1e30, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (1e-4, 10.0), (0.0, 2.0), (0.5, math.inf)])
def test_hard_values(bounds: tuple[float, float]) -> None:
    """As the definition in fp32 has it, not-a-number for not-a-number; bounds hold exactly."""
    from seqkernels.reference import resilient_batch_norm as definition

    statistics = torch.tensor(list(itertools.product(HARD_STATISTICS, HARD_STATISTICS)))
    mean, var = statistics.unbind(1)
    channels = len(mean)
    weight, bias = torch.linspace(-2, 2, channels), torch.linspace(1, -1, channels)
    x = torch.tensor(HARD_X).unsqueeze(1).expand(-1, channels).contiguous()
    norm = ChannelNorm(mean, var, weight, bias, 1e-5, *bounds)
    y = run(x, norm)
    expected = definition(
        x, mean, var, weight, bias, eps=1e-5, min_var=bounds[0], max_abs=bounds[1]
    )
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0.0, equal_nan=True)
    if bounds[1] < math.inf:
        assert bool((y.abs() <= bounds[1] * weight.abs() + bias.abs()).all())
