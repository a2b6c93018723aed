"""The op ``resilient_batch_norm`` on every instruction set."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis.extra import numpy as hnp
from torch import Tensor

from seqkernels import backends, ops, reference, settings
from seqkernels.reference import ChannelNorm
from seqkernels.testing import assert_close_to_oracle
from tests.backends.encoder_runs import on_each_isa
from tests.channel_norms import apply, channel_norm, rounded

BOUNDS = {"exact": (0.0, math.inf), "bounded": (0.5, 1.5), "clamp alone": (0.0, 2.0)}


def run(isa: str, x: Tensor, norm: ChannelNorm, activation: str = "none") -> Tensor:
    """The op on one instruction set, of which the backend's own count is proof."""
    label = f"cpu/{isa}"
    before = backends.calls[label]
    with settings.override(isa=isa), torch.inference_mode():
        result = apply(x, norm, activation, "cpu")
    assert backends.calls[label] == before + (x.numel() > 0)
    assert result.dtype == x.dtype
    return result


def definition(x: Tensor, norm: ChannelNorm, activation: str = "none") -> Tensor:
    tensors, numbers = norm[:4], dict(zip(("eps", "min_var", "max_abs"), norm[4:], strict=True))
    return reference.resilient_batch_norm(
        x, *tensors, **numbers, activation=activation, negative_slope=0.2
    )


def by_channel(y: Tensor) -> Tensor:
    """[C, values]: the rule holds for each channel."""
    return y.movedim(1, 0).flatten(1)


def check(y: Tensor, x: Tensor, norm: ChannelNorm, activation: str = "none") -> None:
    golden = definition(x.double(), norm, activation)
    low = definition(x.bfloat16(), norm, activation)
    assert_close_to_oracle(by_channel(y), by_channel(golden), by_channel(low))


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return x
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan)
    if layout == "wide rows":
        view = wide[..., : x.shape[-1]]
    elif layout == "every other":
        view = wide[..., : 2 * x.shape[-1] : 2]
    else:
        raise ValueError(layout)
    return view.copy_(x)


SHAPES = [
    (300, 1), (300, 3), (97, 16), (64, 35), (1000, 64), (40, 257), (5, 4000),
    (40, 3, 7), (9, 5, 100), (3, 33, 64), (30, 64, 1), (1, 3, 300), (2, 2, 3000),
]  # fmt: skip


@on_each_isa
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "wide rows", "every other"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numerics(shape: tuple[int, ...], layout: str, isa: str) -> None:
    activations = itertools.cycle(["none", "relu", "gelu", "gelu_tanh", "leaky_relu"])
    dtypes = itertools.cycle([torch.float32, torch.bfloat16])
    for seed, (low, high) in enumerate(BOUNDS.values()):
        g = torch.Generator().manual_seed(seed)
        dtype, activation = next(dtypes), next(activations)
        # Enough values of each channel for the rule, all of them of the one shape.
        repeats = max(1, 256 * shape[1] // math.prod(shape))
        xs, ys = [], []
        norm = channel_norm(shape[1], bounded=False, seed=seed, affine=seed != 1)
        norm = norm._replace(min_var=low, max_abs=high)
        for _ in range(repeats):
            x = lay_out(rounded(2 * torch.randn(shape, generator=g)).to(dtype), layout)
            xs.append(x)
            ys.append(run(isa, x, norm, activation))
        check(torch.cat(ys), torch.cat([x.contiguous() for x in xs]), norm, activation)


VARIANCES = [0.0, 1e-12, 1e-40, 1.0, 1e30, math.inf, math.nan, -1.0]
HARD = [0.0, 1.0, -3.0, math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38]


def hard_problem(bounds: str, dtype: torch.dtype) -> tuple[Tensor, ChannelNorm]:
    """Everything meets everything: x and the norm of its channels."""
    means = [0.0, 1e6, math.nan, -math.inf]
    grid = list(itertools.product(VARIANCES, means))
    var, mean = (torch.tensor(column) for column in zip(*grid, strict=True))
    weight, bias = channel_norm(len(grid), bounded=False)[2:4]
    x = torch.tensor(HARD).unsqueeze(1).expand(-1, len(grid)).to(dtype).contiguous()
    return x, ChannelNorm(mean, var, weight, bias, 1e-5, *BOUNDS[bounds])


def check_hard(y: Tensor, x: Tensor, norm: ChannelNorm) -> None:
    """With bounds nothing leaves them, without it is torch's; where finite, the rule holds."""
    expected = definition(x.double(), norm)
    if norm[5:] == BOUNDS["exact"]:
        stock = torch.nn.functional.batch_norm(x.double(), *(t.double() for t in norm[:4]))
        assert torch.equal(expected.isnan(), stock.isnan())
        assert torch.equal(y.isnan(), stock.to(x.dtype).isnan())
    else:
        assert y.isfinite().all()
        assert norm.weight is not None
        assert norm.bias is not None
        limit = norm.max_abs * norm.weight.abs() + norm.bias.abs()
        assert (y.abs() <= limit.to(x.dtype)).all()
    finite = expected.to(x.dtype).isfinite()
    assert torch.equal(y.isfinite(), finite)
    low_precision = definition(x.bfloat16(), norm).double()
    usable = finite & low_precision.isfinite()
    pick = [torch.where(usable, t.double(), 0.0).t() for t in (y, expected, low_precision)]
    assert_close_to_oracle(*pick)


@on_each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_hard_statistics_and_inputs(bounds: str, dtype: torch.dtype, isa: str) -> None:
    x, norm = hard_problem(bounds, dtype)
    check_hard(run(isa, x, norm), x, norm)


@on_each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_of_a_million_keeps_a_unit_spread(dtype: torch.dtype, isa: str) -> None:
    """The mean is taken off in fp32, before anything is rounded to bf16."""
    x = (1e6 + torch.randn(512, 32)).to(dtype)
    norm = ChannelNorm(torch.full((32,), 1e6), torch.ones(32))
    y = run(isa, x, norm)
    exact = definition(x.double(), norm)
    # x - mean is exact, so only the division and the output round.
    last_bit = torch.finfo(dtype).eps
    assert ((y.double() - exact).abs() <= 2 * last_bit * exact.abs()).all()


@on_each_isa
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_no_bits_leave_the_bounds(data: st.DataObject, isa: str) -> None:
    """Any fp32 or bf16 bit pattern, any statistics."""
    channels = data.draw(st.integers(1, 40))
    rows = data.draw(st.integers(1, 9))
    words = hnp.arrays(np.uint32, (rows, channels))
    x = torch.from_numpy(data.draw(words).view(np.float32).copy())
    if data.draw(st.booleans()):
        x = x.bfloat16()
    anything = hnp.arrays(np.uint32, channels)
    mean, var = (torch.from_numpy(data.draw(anything).view(np.float32).copy()) for _ in range(2))
    ordinary = hnp.arrays(np.float32, channels, elements=st.floats(-1e3, 1e3, width=32))
    weight, bias = (torch.from_numpy(data.draw(ordinary)) for _ in range(2))
    max_abs = data.draw(st.floats(2.0**-10, 1e6, width=32))
    min_var = data.draw(st.floats(0.0, 1e6, width=32))
    y = run(isa, x, ChannelNorm(mean, var, weight, bias, 1e-5, min_var, max_abs))
    limit = torch.tensor(max_abs) * weight.abs() + bias.abs()
    assert (y.float().abs() <= limit.to(x.dtype).float()).all()  # NaN fails


@on_each_isa
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_do_not_depend_on_company(dtype: torch.dtype, bounds: str, isa: str) -> None:
    """Bit for bit: rows, neighbours, channels, layout, threads."""
    low, high = BOUNDS[bounds]
    norm = channel_norm(37, bounded=False)._replace(min_var=low, max_abs=high)
    x = torch.randn(700, 37).to(dtype)
    whole = run(isa, x, norm, "gelu")
    for first, count in ((0, 1), (3, 5), (699, 1), (13, 200)):
        assert torch.equal(run(isa, x[first : first + count], norm, "gelu"), whole[first:][:count])
    some = norm._replace(
        mean=norm.mean[5:17], var=norm.var[5:17], weight=norm.weight[5:17], bias=norm.bias[5:17]
    )
    assert torch.equal(run(isa, x[:, 5:17], some, "gelu"), whole[:, 5:17])
    as_positions = x.view(7, 100, 37).transpose(1, 2)  # [N, C, L], channels last
    assert torch.equal(run(isa, as_positions, norm, "gelu"), whole.view(7, 100, 37).transpose(1, 2))
    contiguous = run(isa, as_positions.contiguous(), norm, "gelu")
    assert torch.equal(contiguous, whole.view(7, 100, 37).transpose(1, 2))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            large = run(isa, x.repeat(10, 1), norm, "gelu")
            assert torch.equal(large, whole.repeat(10, 1))
    finally:
        torch.set_num_threads(threads)


def _planted(x: Tensor, norm: ChannelNorm, mistake: str) -> Tensor:
    """What a kernel with this mistake would give, in fp64."""
    m, v, g, b, eps, low, high = norm
    x, m, v, g, b = (t.double() for t in (x, m, v, g, b))
    root = torch.sqrt(v.clamp(min=low) + eps)
    if mistake == "unbiased variance":
        root = torch.sqrt((v * 64 / 63).clamp(min=low) + eps)
    elif mistake == "eps outside the root":
        root = torch.sqrt(v.clamp(min=low)) + eps
    elif mistake == "statistics rounded to bf16":
        m, root = m.bfloat16().double(), torch.sqrt(v.bfloat16().double().clamp(min=low) + eps)
    elif mistake == "clamp before the division":
        return ((x - m).clamp(-high, high) / root) * g + b
    elif mistake == "no floor of the variance":
        root = torch.sqrt(v + eps)
    elif mistake == "a neighbour's mean":
        m = m.roll(1)
    z = (x - m) / root
    return (z if mistake == "no clamp" else z.clamp(-high, high)) * g + b


@pytest.mark.parametrize(
    "mistake",
    [
        "unbiased variance",
        "eps outside the root",
        "statistics rounded to bf16",
        "clamp before the division",
        "no floor of the variance",
        "a neighbour's mean",
        "no clamp",
    ],
)
def test_planted_mistakes_break_the_rule(mistake: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = rounded(3 * torch.randn(512, 24, generator=g))
    norm = channel_norm(24, bounded=True)
    norm = norm._replace(
        mean=norm.mean + 0.003, var=norm.var * 1.003, eps=1e-2, weight=norm.weight.abs() + 0.5
    )
    check(_planted(x, norm, "none"), x, norm)
    with pytest.raises(AssertionError, match="break the rule"):
        check(_planted(x, norm, mistake), x, norm)


def test_statistics_of_other_dtypes_are_read_as_they_are() -> None:
    norm = channel_norm(8, bounded=True)
    x = torch.randn(20, 8)
    short = ChannelNorm(*(t.bfloat16() for t in norm[:4]), *norm[4:])
    with torch.inference_mode():
        arguments: tuple[Any, ...] = ("none", 0.01, "cpu")
        expected = ops.resilient_batch_norm(x, *norm, *arguments)
        assert torch.equal(ops.resilient_batch_norm(x, *short, *arguments), expected)
