"""The op ``linear`` on every instruction set: numerics, layouts, independence, planted mistakes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels import ops, reference, settings
from tests.backends.encoder_runs import on_each_isa
from tests.channel_norms import LinearCase, channel_norm, check_linear

SHAPES = [(1, 1), (3, 5), (35, 50), (96, 64), (512, 130), (930, 48), (64, 257)]
NORMS = ["", "exact", "bounded"]
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "leaky_relu"]


def grid() -> list[LinearCase]:
    """Every shape, pair of norms and activation, in turn with the other options."""
    cases = []
    pairs = list(itertools.product(NORMS, NORMS))
    for i, ((before, behind), activation) in enumerate(itertools.product(pairs, ACTIVATIONS)):
        k, f = SHAPES[i % len(SHAPES)]
        cases.append(
            LinearCase(
                rows=(1, 2, 7, 16, 33, 130, 300)[i % 7],
                in_features=k,
                out_features=f,
                input_norm=before,
                output_norm=behind,
                activation=activation,
                bias=i % 3 != 0,
                affine=i % 4 != 0,
                dtype=(torch.float32, torch.bfloat16)[i % 2],
                layout=("contiguous", "strided", "transposed")[i % 3],
                seed=i,
            ).with_enough_values()
        )
    return cases


@on_each_isa
@pytest.mark.parametrize("case", grid(), ids=str)
def test_numerics(case: LinearCase, isa: str) -> None:
    check_linear(case, case.run(isa))


@on_each_isa
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 15, 17, 31, 129])
def test_rows_do_not_depend_on_company(
    rows: int, dtype: torch.dtype, precision: str, isa: str
) -> None:
    """Bit for bit: on the number of rows, their place, and what the others hold."""
    case = LinearCase(300, 70, 150, "bounded", "exact", "gelu", dtype=dtype, precision=precision)
    x = case.x()
    whole = case.run(isa)
    assert torch.equal(case.run(isa, x[:rows]), whole[:rows])
    assert torch.equal(case.run(isa, x[300 - rows :]), whole[300 - rows :])
    other = torch.full_like(x, math.nan)
    other[100 : 100 + rows] = x[100 : 100 + rows]
    assert torch.equal(case.run(isa, other)[100 : 100 + rows], whole[100 : 100 + rows])


@on_each_isa
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("rows", [1, 40, 1000])
def test_threads_change_nothing(rows: int, precision: str, isa: str) -> None:
    if isa.endswith("emulated") and rows > 40:
        rows = 200  # slow, and cut into as many tasks
    case = LinearCase(rows, 200, 400, "", "bounded", "relu", precision=precision)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(case.run(isa))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@on_each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_fp32_operands_are_not_rounded(size: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    """Inputs and weights that bf16 does not hold; a sum in order is as good as torch's is."""
    k, f = size
    case = LinearCase(1024 // f + 3, k, f, dtype=dtype, precision="fp32")
    weight, bias, _, _ = case.layer()
    assert bias is not None
    weight, bias, x = weight * 1.001, bias * 1.001, (case.x() * 1.001).to(dtype)
    tensors = [weight, bias, *[None] * 8]
    with settings.override(isa=isa), torch.inference_mode():
        y = ops.linear(x, tensors, [], [], "none", 0.01, "fp32", "cpu")
        exact = F.linear(x.double(), weight.double(), bias.double())
    bound = (F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())) * 2.0**-24
    steps = k + 2
    rounding = exact.abs() * 2.0**-8 if dtype is torch.bfloat16 else 0.0
    assert ((y.double() - exact).abs() <= steps * bound + rounding).all()


@on_each_isa
@pytest.mark.parametrize("side", ["input_norm", "output_norm"])
def test_a_large_offset_is_taken_off_before_anything_rounds(side: str, isa: str) -> None:
    """A mean of 1e6 with unit spread would leave nothing of bf16's eight bits."""
    case = LinearCase(64, 64, 64, **{side: "exact"})
    norm = channel_norm(64, bounded=False, seed=3)._replace(mean=torch.full((64,), 1e6))
    weight, bias, _, _ = case.layer()
    x = torch.randn(64, 64) + (1e6 if side == "input_norm" else 0.0)
    if side == "output_norm":
        bias = torch.full((64,), 1e6)
    tensors: list[Tensor | None] = [weight, bias, *[None] * 8]
    at = 2 if side == "input_norm" else 6
    tensors[at : at + 4] = norm[:4]
    numbers = [norm.eps, norm.min_var]
    arguments = (numbers, []) if side == "input_norm" else ([], numbers)
    with settings.override(isa=isa), torch.inference_mode():
        y = ops.linear(x, tensors, *arguments, "none", 0.01, "bf16", "cpu")
    golden = reference.linear(x.double(), weight.double(), bias, **{side: norm})
    spread = golden.std()
    assert (y - golden).abs().max() < 0.2 * spread  # nothing was lost; without care it is all


@on_each_isa
@pytest.mark.parametrize("kind", ["exact", "bounded"])
def test_values_that_are_not_finite(kind: str, isa: str) -> None:
    """With bounds behind the product nothing leaves them; without, NaN stays in its row."""
    case = LinearCase(40, 64, 48, "", kind, "none")
    x = case.x()
    x[3, 5], x[7, 0], x[9, 1], x[11] = math.nan, math.inf, -math.inf, 3e38
    y = case.run(isa, x)
    clean = case.run(isa)
    rows = torch.ones(40, dtype=torch.bool)
    rows[[3, 7, 9, 11]] = False
    assert torch.equal(y[rows], clean[rows])
    if kind == "exact":
        assert y[3].isnan().all()
        return
    _, _, _, norm = case.layer()
    assert norm is not None
    assert norm.weight is not None
    assert norm.bias is not None
    limit = norm.max_abs * norm.weight.abs() + norm.bias.abs()
    assert (y.abs() <= limit).all()
    assert torch.equal(y[3], norm.bias)


@on_each_isa
def test_degenerate_channels_behind_the_product(isa: str) -> None:
    case = LinearCase(40, 64, 8, "", "bounded", "none")
    weight, bias, _, norm = case.layer()
    assert norm is not None
    mean, var = norm.mean.clone(), norm.var.clone()
    mean[0], mean[1], var[2], var[3], var[4], var[5] = math.nan, math.inf, math.nan, -1, 0, 1e30

    def run(which: str, backend: str) -> Tensor:
        bounds = [0.5, 1.5] if which == "bounded" else [0.0]
        tensors = [weight, bias, *[None] * 4, mean, var, norm.weight, norm.bias]
        with settings.override(isa=isa), torch.inference_mode():
            numbers = [1e-5, *bounds]
            return ops.linear(case.x(), tensors, [], numbers, "none", 0.01, "bf16", backend)

    y = run("bounded", "cpu")
    assert norm.bias is not None
    assert torch.equal(y[:, :4], norm.bias[:4].expand(40, 4))
    assert y.isfinite().all()
    exact = run("exact", "cpu")
    assert torch.equal(exact.isnan(), run("exact", "reference").isnan())
    assert not exact[:, :4].isfinite().any()


# Each takes the case, gives what a kernel with the mistake would.
def _product(case: LinearCase, weight: Tensor | None = None) -> Tensor:
    w, bias, _, _ = case.layer()
    w = w if weight is None else weight
    return F.linear(case.x().double(), w.double(), None if bias is None else bias.double())


def _norm(case: LinearCase, y: Tensor, **changes: object) -> Tensor:
    norm = case.layer()[3]
    assert norm is not None
    return reference.resilient_batch_norm(
        y,
        changes.get("mean", norm.mean),
        changes.get("var", norm.var),
        norm.weight,
        norm.bias,
        eps=changes.get("eps", norm.eps),
        min_var=changes.get("min_var", norm.min_var),
        max_abs=changes.get("max_abs", norm.max_abs),
    )


def _clamp_before_division(case: LinearCase) -> Tensor:
    norm = case.layer()[3]
    assert norm is not None
    d = (_product(case) - norm.mean).clamp(-norm.max_abs, norm.max_abs)
    z = d / torch.sqrt(norm.var.clamp(min=norm.min_var).double() + norm.eps)
    return z * norm.weight + norm.bias


PLANTED: dict[str, Callable[[LinearCase], Tensor]] = {
    "unbiased variance": lambda c: _norm(c, _product(c), var=c.layer()[3].var * (64 / 63)),
    "eps outside the root": lambda c: _norm(
        c,
        _product(c),
        eps=0.0,
        var=(c.layer()[3].var.double().sqrt() + 1e-2) ** 2,
    ),
    "clamp before the division": _clamp_before_division,
    "no bound": lambda c: _norm(c, _product(c), max_abs=math.inf),
    "no floor of the variance": lambda c: _norm(c, _product(c), min_var=0.0),
    "bias forgotten": lambda c: _norm(c, _product(c) - c.layer()[1]),
    "last column dropped": lambda c: _norm(
        c, _product(c, torch.cat([c.layer()[0][:, :-1], torch.zeros(64, 1)], 1))
    ),
    "a neighbour's statistics": lambda c: _norm(c, _product(c), mean=c.layer()[3].mean.roll(1)),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_break_the_rule(mistake: str) -> None:
    case = LinearCase(256, 96, 64, "", "bounded", "none")
    right = _norm(case, _product(case))
    check_linear(case, right.float())
    with pytest.raises(AssertionError, match="break the rule"):
        check_linear(case, PLANTED[mistake](case).float())


def test_the_packed_weights_follow_changes() -> None:
    case = LinearCase(4, 64, 32, bias=False)
    arguments = case.arguments("cpu")
    with torch.inference_mode():
        first = ops.linear(case.x(), *arguments)
        assert torch.equal(ops.linear(case.x(), *arguments), first)
    with torch.no_grad():
        arguments[0][0].mul_(2.0)
    with torch.inference_mode():
        assert torch.equal(ops.linear(case.x(), *arguments), 2 * first)
