"""``ResilientBatchNorm1d`` beside torch's ``BatchNorm1d``: state, training, evaluation, health."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import backends, settings
from seqkernels.nn import ResilientBatchNorm1d

EXACT: dict[str, Any] = {"min_var": 0.0, "max_abs": math.inf}


def batches(*shape: int, count: int = 5, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=g) + 0.5 for _ in range(count)]


def pair(channels: int = 6, **options: Any) -> tuple[nn.BatchNorm1d, ResilientBatchNorm1d]:
    torch.manual_seed(0)
    stock = nn.BatchNorm1d(channels, **options)
    if stock.affine:
        nn.init.normal_(stock.weight)
        nn.init.normal_(stock.bias)
    ours = ResilientBatchNorm1d(channels, **options, **EXACT)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


@pytest.mark.parametrize("shape", [(32, 6), (8, 6, 5), (2, 6, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"momentum": None},
        {"momentum": 0.5, "eps": 1e-2},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_without_bounds_it_trains_and_evaluates_as_torchs(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    stock, ours = (module.double() for module in pair(**options))
    for x in batches(*shape):
        x = x.double()
        theirs, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = stock(theirs), ours(mine)
        torch.testing.assert_close(z, y)
        (y.square().sum() + y.sum()).backward()
        (z.square().sum() + z.sum()).backward()
        torch.testing.assert_close(mine.grad, theirs.grad)
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    stock.eval()
    ours.eval()
    stock.float()
    ours.float()
    x = batches(*shape, seed=9)[0]
    with torch.inference_mode(), settings.override(strict=False):
        torch.testing.assert_close(ours(x), stock(x))
    if "track_running_stats" in options:
        return
    x.requires_grad_()
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("affine", [True, False])
def test_state_dicts_go_both_ways(affine: bool) -> None:
    ours = ResilientBatchNorm1d(6, affine=affine)
    for x in batches(8, 6):
        ours(x)
    for stock in (nn.BatchNorm1d(6, affine=affine), nn.SyncBatchNorm(6, affine=affine)):
        stock.load_state_dict(ours.state_dict(), strict=True)
        back = ResilientBatchNorm1d(6, affine=affine)
        back.load_state_dict(stock.state_dict(), strict=True)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_from_torch_shares_and_leaves(kind: type[nn.Module]) -> None:
    stock = kind(6)
    made = ResilientBatchNorm1d.from_torch(stock)
    assert type(stock) is kind
    assert made.weight is stock.weight
    assert made.running_var is stock.running_var
    assert (made.min_var, made.max_abs) == (0.0, math.inf)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.BatchNorm1d or"):
        ResilientBatchNorm1d.from_torch(nn.BatchNorm2d(6))


def test_with_bounds_nothing_explodes() -> None:
    norm = ResilientBatchNorm1d(4).eval()
    norm.running_var.copy_(torch.tensor([1.0, 0.0, math.nan, -1.0]))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan, 0.1]).unsqueeze(1).repeat(1, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        wide = torch.promote_types(dtype, torch.float32)
        limit = norm.max_abs * norm.weight.to(wide).abs() + norm.bias.to(wide).abs()
        with torch.inference_mode():
            y = norm(x.to(dtype))
        assert (y.abs() <= limit.to(dtype)).all()
    stock = nn.BatchNorm1d(4, affine=False).eval()
    stock.running_var[1] = 0.0
    assert float(stock(torch.ones(1, 4))[0, 1]) > 300


def test_batches_that_are_not_finite_do_not_enter(caplog: pytest.LogCaptureFixture) -> None:
    norm = ResilientBatchNorm1d(3)
    norm(batches(16, 3)[0])
    before = copy.deepcopy(norm.state_dict())
    poisoned = batches(16, 3, seed=1)[0]
    poisoned[3, 1] = math.nan
    seqkernels.nn.resilient_batch_norm._told_of_skipped_batch = False
    with caplog.at_level(logging.WARNING, "seqkernels"):
        y = norm(poisoned.requires_grad_())
    assert y.isfinite().all()
    assert "its channels 1 are not finite" in caplog.text
    y.sum().backward()
    assert poisoned.grad is not None
    assert poisoned.grad.isfinite().all()
    for name, tensor in before.items():
        assert torch.equal(norm.state_dict()[name], tensor), name
    norm(batches(16, 3, seed=2)[0])
    assert int(norm.num_batches_tracked) == 2


@pytest.mark.parametrize(
    "cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)]
)
def test_statistics_and_parameters_stay_float32(cast: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), ResilientBatchNorm1d(6), nn.Linear(6, 1)).eval()
    for tensor in (model[1].running_mean, model[1].running_var):
        tensor.add_(1e-3 * torch.rand(6))
    before = copy.deepcopy(model[1].state_dict())
    cast(model)
    assert model[0].weight.dtype in (torch.bfloat16, torch.float16)
    for name, tensor in model[1].state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with torch.inference_mode():
        assert model(torch.randn(4, 6).to(model[0].weight.dtype)).dtype == model[0].weight.dtype
    model.double()
    assert model[1].running_mean.dtype == torch.float64


def test_copies_and_pickles() -> None:
    norm = ResilientBatchNorm1d(6, min_var=1e-3, max_abs=4.0, backend="reference")
    norm(batches(8, 6)[0])
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    others = [copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))]
    others.append(torch.load(file, weights_only=False))
    for other in others:
        assert (other.min_var, other.max_abs, other.backend) == (1e-3, 4.0, "reference")
        for name, tensor in norm.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)
    assert "min_var=0.001, max_abs=4.0, backend='reference'" in repr(norm)


def test_hooks_run() -> None:
    norm = ResilientBatchNorm1d(3).eval()
    seen: list[int] = []
    norm.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        norm(torch.randn(2, 3))
    assert seen == [1]


def test_health() -> None:
    norm = ResilientBatchNorm1d(7)
    norm(batches(8, 7)[0])
    assert norm.health().healthy
    norm.running_var.copy_(torch.tensor([0.0, 1e-6, math.nan, math.inf, -1.0, 1.0, 1.0]))
    norm.running_mean[6] = math.inf
    health = norm.health()
    assert [(c.index, c.kind) for c in health.channels] == [
        (0, "zero variance"),
        (1, "below min_var"),
        (2, "non-finite"),
        (3, "non-finite"),
        (4, "negative variance"),
        (6, "non-finite"),
    ]
    assert health.counts["non-finite"] == 3
    assert "1 zero variance" in str(health)
    assert "-1" in str(health)
    assert "no running statistics" in str(
        ResilientBatchNorm1d(2, track_running_stats=False).health()
    )


def test_evaluation_runs_on_the_kernel_and_tells_when_not() -> None:
    norm = ResilientBatchNorm1d(5).eval()
    backends.calls.clear()
    with torch.inference_mode():
        norm(torch.randn(4, 5))
    (label,) = backends.calls
    assert label.startswith("cpu/") or backends.native_module.module is None
    untracked = ResilientBatchNorm1d(5, track_running_stats=False).eval()
    with (
        settings.override(strict=True),
        torch.inference_mode(),
        pytest.raises(seqkernels.BackendUnavailableError, match="no running statistics"),
    ):
        untracked(torch.randn(4, 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_compile_and_export(shape: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    norm = ResilientBatchNorm1d(5).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = norm(x)
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        dynamic = ({0: torch.export.Dim("rows")},)
        program = torch.export.export(norm, (x,), dynamic_shapes=dynamic)
        assert torch.equal(program.module()(x[:3]), expected[:3])


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda m: m(torch.randn(4, 6)), ValueError, "expected 5 channels (dimension 1), got"),
        (lambda m: m(torch.randn(5)), ValueError, "expected 2 or 3 dimensions"),
        (lambda m: m(torch.randn(2, 5, 3, 3)), ValueError, "expected 2 or 3 dimensions"),
        (lambda m: m(torch.ones(4, 5, dtype=torch.int32)), TypeError, "got torch.int32"),
        (lambda m: m.train()(torch.randn(1, 5)), ValueError, "more than 1 value per channel"),
        (lambda m: m.train()(torch.randn(1, 5, 1)), ValueError, "more than 1 value per channel"),
        (lambda m: m.train()(torch.randn(4, 6)), ValueError, "expected 5 channels"),
        (lambda _: ResilientBatchNorm1d(0), ValueError, "num_features: expected at least 1, got 0"),
        (lambda _: ResilientBatchNorm1d(5, min_var=-1.0), ValueError, "min_var: expected a finite"),
        (lambda _: ResilientBatchNorm1d(5, max_abs=0.0), ValueError, "max_abs: expected a number"),
        (lambda _: ResilientBatchNorm1d(5, eps=math.nan), ValueError, "eps: expected a finite"),
        (lambda _: ResilientBatchNorm1d(5, backend="x"), ValueError, "backend: expected one of"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], told: str) -> None:
    norm = ResilientBatchNorm1d(5).eval()
    with pytest.raises(error) as caught:
        call(norm)
    assert told in str(caught.value)
