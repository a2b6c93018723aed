"""``FusedSequential`` and ``Linear``: which chains run as one, and that they compute the same."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import backends, settings
from seqkernels.backends import native_module
from seqkernels.nn import FusedSequential, Linear, ResilientBatchNorm1d
from seqkernels.testing import assert_close_to_oracle
from tests.channel_norms import grouped, rounded

has_native = native_module.module is not None
KERNEL = "cpu" if has_native else "reference"
ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.LeakyReLU(0.1)]


@pytest.fixture(autouse=True)
def _backend_without_native() -> Any:
    with settings.override(backend=None if has_native else "reference"):
        backends.calls.clear()
        yield


def norm(width: int, *, bounded: bool) -> ResilientBatchNorm1d:
    bounds = {} if bounded else {"min_var": 0.0, "max_abs": math.inf}
    made = ResilientBatchNorm1d(width, **bounds)
    with torch.no_grad():
        for tensor in (made.running_mean, made.weight, made.bias):
            tensor.copy_(rounded(torch.randn(width)))
        made.running_var.copy_(rounded(torch.rand(width) + 0.3))
    return made


def product(k: int, f: int, *, bf16: bool, bias: bool = True) -> nn.Linear:
    layer = (Linear if bf16 else nn.Linear)(k, f, bias=bias)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(rounded(p))
    return layer


def one_by_one(model: nn.Sequential, x: Tensor) -> Tensor:
    """Torch's own way through the members, with torch's own linear layers."""
    for member in model:
        x = nn.Linear.forward(member, x) if isinstance(member, nn.Linear) else member(x)
    return x


def counted() -> int:
    return sum(n for label, n in backends.calls.items() if label.startswith(KERNEL))


CHAINS = list(itertools.product([False, True], [False, True], [False, True], range(5)))


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(("before", "behind", "bias", "activation"), CHAINS)
def test_every_chain_is_one_op_and_the_same_function(
    before: bool, behind: bool, bias: bool, activation: int, bounded: bool
) -> None:
    torch.manual_seed(0)
    members: list[nn.Module] = [norm(40, bounded=bounded)] if before else []
    members.append(product(40, 32, bf16=True, bias=bias))
    members += [norm(32, bounded=bounded)] if behind else []
    members += [ACTIVATIONS[activation]] if activation < 4 else []
    model = FusedSequential(*members).eval()
    (step,) = model.steps()
    assert step.kind == "bf16"
    assert len(step.names) == len(members)
    x = rounded(torch.randn(128, 40))
    with torch.inference_mode():
        y = model(x)
        assert counted() == 1
        golden = one_by_one(copy.deepcopy(model).double(), x.double())
        low = one_by_one(copy.deepcopy(model).bfloat16(), x.bfloat16())
    assert_close_to_oracle(grouped(y), grouped(golden), grouped(low))


@pytest.mark.parametrize("bias", [True, False])
def test_torchs_linear_takes_the_norm_into_its_weights(bias: bool) -> None:
    torch.manual_seed(0)
    model = FusedSequential(
        product(24, 16, bf16=False, bias=bias), norm(16, bounded=False), nn.ReLU()
    ).eval()
    assert [(s.kind, s.names) for s in model.steps()] == [("torch", ("0", "1", "2"))]
    x = torch.randn(50, 24)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), one_by_one(model, x))
        assert counted() == 1  # of one_by_one: the norm has gone into the weights
        model[1].running_var.mul_(4.0)
        torch.testing.assert_close(model(x), one_by_one(model, x))
        model[0].weight.mul_(2.0)
        torch.testing.assert_close(model(x), one_by_one(model, x))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m[1].running_var.fill_(math.nan),
        lambda m: m[1].running_mean.fill_(math.inf),
        lambda m: setattr(m[1], "max_abs", 2.0),
    ],
)
def test_a_norm_that_may_not_be_folded_runs_behind_the_product(spoil: Any) -> None:
    torch.manual_seed(0)
    model = FusedSequential(product(24, 16, bf16=False), norm(16, bounded=False), nn.ReLU()).eval()
    spoil(model)
    x = torch.randn(50, 24)
    with torch.inference_mode():
        y = model(x)
        assert counted() == 1
        torch.testing.assert_close(y, one_by_one(model, x), equal_nan=True)


def test_grouping() -> None:
    model = FusedSequential(
        norm(8, bounded=True),
        nn.ReLU(),
        norm(8, bounded=True),
        product(8, 8, bf16=False),
        nn.ReLU(),
        nn.Dropout(),
        product(8, 8, bf16=True),
        nn.Tanh(),
        norm(8, bounded=True),
        product(8, 8, bf16=True),
        norm(8, bounded=True),
        nn.BatchNorm1d(8),
    )
    shown = [(s.kind, s.names) for s in model.steps(any_mode=True)]
    assert shown == [
        ("norm", ("0", "1")),
        ("norm", ("2",)),
        ("module", ("3",)),
        ("module", ("4",)),
        ("module", ("5",)),
        ("bf16", ("6",)),
        ("module", ("7",)),
        ("bf16", ("8", "9", "10")),
        ("module", ("11",)),
    ]
    assert all(s.kind == "module" for s in model.steps())  # in training mode
    x = torch.randn(64, 8)
    model.eval()
    with torch.inference_mode():
        assert model(x).shape == (64, 8)


def test_hooks_on_members_still_run() -> None:
    model = FusedSequential(product(8, 8, bf16=True), norm(8, bounded=True), nn.ReLU()).eval()
    seen: list[str] = []
    handle = model[1].register_forward_hook(lambda *_: seen.append("norm"))
    with torch.inference_mode():
        expected = model(torch.ones(2, 8))
        assert seen == ["norm"]
        assert any("has forward hooks" in reason for reason in model.reasons())
        handle.remove()
        assert model.reasons() == []
        assert_same = torch.equal(model(torch.ones(2, 8)) > 0, expected > 0)
    assert assert_same
    assert seen == ["norm"]


def test_three_dimensions_and_training_run_member_by_member() -> None:
    torch.manual_seed(0)
    model = FusedSequential(product(8, 5, bf16=True), norm(4, bounded=True), nn.ReLU()).eval()
    x = torch.randn(3, 4, 8)  # the channels of the norm are dimension 1 of [3, 4, 5]
    assert any("3-D input" in reason for reason in model.reasons(x))
    with torch.inference_mode():
        expected = model[2](model[1](model[0](x)))
        assert torch.equal(model(x), expected)
    flat = FusedSequential(product(8, 5, bf16=True), norm(5, bounded=True), nn.ReLU()).train()
    before = flat[1].running_mean.clone()
    y = flat(torch.randn(16, 8))
    y.sum().backward()
    assert flat[0].weight.grad is not None
    assert not torch.equal(flat[1].running_mean, before)
    assert "the module is in training mode; call .eval()" in flat.reasons()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compile_export_pickle_and_state() -> None:
    torch._dynamo.reset()
    model = FusedSequential(
        product(8, 6, bf16=True),
        norm(6, bounded=True),
        nn.ReLU(),
        product(6, 6, bf16=False),
        norm(6, bounded=False),
    ).eval()
    x = torch.randn(7, 8)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        torch.testing.assert_close(program.module()(x[:3]), expected[:3])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
        stock = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6)
        )
        stock.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(stock.state_dict(), strict=True)
    assert type(model[:2]) is FusedSequential


def test_linear_is_a_drop_in() -> None:
    torch.manual_seed(0)
    stock = nn.Linear(64, 48)
    ours = Linear.from_torch(stock)
    assert type(stock) is nn.Linear
    assert ours.weight is stock.weight
    for shape in ((64,), (5, 64), (2, 3, 64), (0, 64)):
        x = torch.randn(shape)
        ours.eval()
        with torch.inference_mode():
            assert ours(x).shape == stock(x).shape
        ours.train()
        assert torch.equal(ours(x), stock(x))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Linear, got Bilinear"):
        Linear.from_torch(nn.Bilinear(2, 2, 2))
    with pytest.raises(ValueError, match="in_features: expected at least 1, got 0"):
        Linear(0, 3)
    assert "backend='auto'" in repr(ours)


def test_linear_packs_again_after_training() -> None:
    layer = Linear(32, 32, bias=False).eval()
    x = torch.randn(4, 32)
    with torch.inference_mode():
        first = layer(x)
    layer.weight.data.mul_(2.0)  # leaves no trace on the tensor
    layer.train()
    layer.eval()
    with torch.inference_mode():
        assert torch.equal(layer(x), 2 * first)


def test_strict_refuses_gradients_in_evaluation() -> None:
    layer = Linear(8, 8).eval()
    with (
        settings.override(strict=True, backend="auto"),
        pytest.raises(seqkernels.BackendUnavailableError, match="gradients are to be recorded"),
    ):
        layer(torch.randn(2, 8))
