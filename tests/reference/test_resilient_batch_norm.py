"""The definition of ``resilient_batch_norm`` beside torch's, and within its bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels import reference
from seqkernels.reference.resilient_batch_norm import batch_statistics

SPECIAL = [0.0, 1e-12, 1e-40, 1.0, 1e30, math.inf, math.nan, -1.0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (1, 5), (7, 5, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_without_bounds_it_is_torchs(shape: tuple[int, ...], affine: bool) -> None:
    x, mean, var = random(*shape), random(5, seed=1), random(5, seed=2).exp()
    weight, bias = (random(5, seed=3), random(5, seed=4)) if affine else (None, None)
    ours = reference.resilient_batch_norm(x, mean, var, weight, bias, eps=1e-3)
    torch.testing.assert_close(ours, F.batch_norm(x, mean, var, weight, bias, eps=1e-3))


def test_without_bounds_what_is_not_finite_spreads_as_in_torch() -> None:
    mean = torch.tensor([0.0] * len(SPECIAL) + [math.nan, math.inf], dtype=torch.float64)
    var = torch.tensor([*SPECIAL, 1.0, 1.0], dtype=torch.float64)
    x = torch.tensor([0.5, math.nan, math.inf, -math.inf, 1e30], dtype=torch.float64)
    x = x.unsqueeze(1).expand(-1, len(var)).contiguous()
    ours = reference.resilient_batch_norm(x, mean, var)
    torch.testing.assert_close(ours, F.batch_norm(x, mean, var), equal_nan=True)


def test_with_bounds_it_is_the_formula() -> None:
    x, mean, var = (
        3 * random(50, 4),
        random(4, seed=1),
        torch.tensor([1e-6, 0.01, 1.0, 4.0]).double(),
    )
    weight, bias = random(4, seed=3), random(4, seed=4)
    ours = reference.resilient_batch_norm(x, mean, var, weight, bias, min_var=0.05, max_abs=2.0)
    for n in range(50):
        for c in range(4):
            z = (x[n, c] - mean[c]) / math.sqrt(max(float(var[c]), 0.05) + 1e-5)
            z = min(max(float(z), -2.0), 2.0)
            torch.testing.assert_close(ours[n, c], weight[c] * z + bias[c])


def test_channels_without_information_give_the_bias() -> None:
    var = torch.tensor([math.nan, math.inf, -1.0, 1.0, 1.0])
    mean = torch.tensor([0.0, 0.0, 0.0, math.nan, -math.inf])
    bias = torch.arange(5.0)
    x = torch.tensor([[0.3], [math.nan], [math.inf], [-1e30]]).expand(4, 5)
    y = reference.resilient_batch_norm(x, mean, var, None, bias, max_abs=5.0)
    assert torch.equal(y, bias.expand(4, 5))


def test_gradients_stay_finite_beside_what_is_not() -> None:
    x = torch.tensor([[1.0, math.nan, 3.0], [math.inf, 1.0, 0.0]], requires_grad=True)
    mean, var = torch.zeros(3), torch.tensor([1.0, math.nan, 0.0])
    weight = torch.ones(3, requires_grad=True)
    y = reference.resilient_batch_norm(x, mean, var, weight, min_var=0.1, max_abs=2.0)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3)])
def test_statistics_of_a_batch(shape: tuple[int, ...]) -> None:
    x = random(*shape).requires_grad_()
    mean, var = batch_statistics(x, bounded=True)
    flat = x.movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, flat.mean(1))
    torch.testing.assert_close(var, flat.var(1, correction=0))
    running = [torch.zeros(5).double(), torch.ones(5).double()]
    expected = F.batch_norm(x, *running, training=True)
    torch.testing.assert_close(reference.resilient_batch_norm(x, mean, var), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_compute_in_float32(dtype: torch.dtype) -> None:
    """An offset of 256 has steps of 2 in bf16: taken off after rounding it would leave nothing."""
    x = (256 + 2 * torch.arange(-4, 5)).to(dtype).unsqueeze(1)
    mean, var = torch.tensor([256.7]), torch.tensor([30.0])
    ours = reference.resilient_batch_norm(x, mean, var)
    assert torch.equal(ours, ((x.float() - 256.7) / (30.0 + 1e-5) ** 0.5).to(dtype))
