"""Linear layers whose weights are computed on each call, before the swap and since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import seqkernels
from seqkernels import backends, ops, settings
from seqkernels.backends import cpu, native_module
from seqkernels.nn import FusedSequential, Linear

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
BF16 = seqkernels.PrecisionPolicy(bf16=("*",))


@pytest.fixture(autouse=True)
def _backend_without_native() -> Any:
    with settings.override(backend=None if native_module.module is not None else "reference"):
        backends.calls.clear()
        yield


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def assigned(layer: nn.Linear) -> None:
    """As networks do that make the weights of others."""
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight = weight  # type: ignore[assignment]


def rewritten(layer: nn.Linear) -> None:
    """A hook of the user's own; the edit through ``.data`` leaves no trace."""
    base = layer.weight.detach().clone()

    def scale(module: nn.Module, args: tuple[Tensor]) -> None:
        module.weight.data.copy_(base * args[0].mean())

    layer.register_forward_pre_hook(scale)


COMPUTED: dict[str, Callable[[nn.Linear], object]] = {
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "bias pruned": lambda m: prune.random_unstructured(m, "bias", 0.5),
    "weight norm, old": nn.utils.weight_norm,
    "spectral norm, old": nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "bias parametrized": lambda m: parametrize.register_parametrization(m, "bias", Half()),
    "assigned": assigned,
    "rewritten by a hook": rewritten,
}
all_kinds = pytest.mark.parametrize("kind", COMPUTED)
X = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    """A layer alone, and one in a chain."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8)
    nn.init.normal_(norm.running_mean)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), norm, nn.ReLU()).eval()


def compute(stock: nn.Sequential, kind: str) -> nn.Sequential:
    torch.manual_seed(1)
    for layer in (stock[0], stock[2]):
        COMPUTED[kind](layer)
    return stock.eval()


@all_kinds
def test_they_are_left_with_the_reason(kind: str) -> None:
    stock, ours = compute(model(), kind), compute(model(), kind)
    report = seqkernels.swap(ours, precision_policy=BF16)
    reasons = {s.name: " ".join(s.reasons) for s in report.skipped}
    assert reasons.keys() == {"0", "2"}
    assert all(
        "computed on each call" in r or "may compute its weights" in r for r in reasons.values()
    )
    assert type(ours[0]) is type(stock[0]) or parametrize.is_parametrized(ours[0])
    assert [step.names for step in ours.steps() if step.fused] == [("3", "4")]
    with torch.inference_mode():
        assert torch.equal(ours[:3](X), stock[:3](X))
        torch.testing.assert_close(ours(X), stock(X))


@all_kinds
def test_after_the_swap_torchs_forward_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = compute(model(), kind), model()
    seqkernels.swap(ours, precision_policy=BF16)
    assert isinstance(ours, FusedSequential)
    with torch.inference_mode():
        ours(X)
    compute(ours, kind)
    assert isinstance(ours[0], Linear)
    monkeypatch.setattr(ops, "apply_linear", None)  # nothing is packed
    with torch.inference_mode():
        for x in (X, 2.0 * X):
            assert torch.equal(ours[:3](x), stock[:3](x))
            torch.testing.assert_close(ours(x), stock(x))


@all_kinds
def test_the_change_is_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    backends._reported.clear()
    layer = Linear(8, 8).eval()
    COMPUTED[kind](layer)
    layer.eval()
    with settings.override(backend="auto"), torch.inference_mode():
        layer(X)
    assert "linear: runs the plain PyTorch definition: it" in caplog.text
    backends._reported.clear()


def test_a_layer_made_permanent_again_runs_as_a_kernel() -> None:
    ours = model()
    seqkernels.swap(ours, precision_policy=BF16)
    prune.l1_unstructured(ours[0], "weight", 0.5)
    prune.remove(ours[0], "weight")
    assert not ours[0].fallback_reasons()
    backends.calls.clear()
    with torch.inference_mode():
        ours[0](X)
    assert sum(backends.calls.values()) == 1


def test_explain_does_not_disturb_the_layer_it_looks_at() -> None:
    layer = Linear(8, 8).eval()
    (entry,) = seqkernels.explain(layer, X).entries
    assert entry.runs in ("reference", f"cpu/{cpu.CpuBackend().variant()}")
    assert sum(backends.calls.values()) == 1


def test_lazy_layers_are_left_until_they_know_their_size() -> None:
    made = nn.ModuleDict({"linear": nn.LazyLinear(8), "norm": nn.LazyBatchNorm1d()}).eval()
    report = seqkernels.swap(made, precision_policy=BF16)
    told = "it is lazy and knows no sizes yet; run the model once before the swap"
    assert {s.name: s.reasons for s in report.skipped} == {"linear": (told,), "norm": (told,)}
    for module in made.values():
        module(torch.randn(4, 8))
    assert len(seqkernels.swap(made.eval(), precision_policy=BF16).replaced) == 2


def test_empty_layers_are_left() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        made = nn.ModuleDict(
            {"in": nn.Linear(0, 8), "out": nn.Linear(8, 0), "norm": nn.BatchNorm1d(0)}
        )
    report = seqkernels.swap(made.eval(), precision_policy=BF16)
    assert {s.reasons for s in report.skipped} == {("it is empty: one of its sizes is 0",)}
    assert not report.replaced


def test_a_norm_with_an_odd_eps_is_left() -> None:
    norm = nn.BatchNorm1d(4, eps=float("inf")).eval()
    expected = norm(torch.ones(2, 4))
    report = seqkernels.swap(norm)
    assert report.skipped[0].reasons == ("its eps is inf; the kernel takes a finite number >= 0",)
    assert torch.equal(norm(torch.ones(2, 4)), expected)


def test_restore_of_a_layer_parametrized_since() -> None:
    ours = model()
    report = seqkernels.swap(ours, precision_policy=BF16)
    parametrizations.weight_norm(ours[0])
    expected = ours[0].weight.detach().clone()
    report.restore()
    assert not isinstance(ours[0], Linear)
    assert torch.equal(ours[0].weight, expected)
    parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is nn.Linear
    assert "backend" not in ours[0].__dict__
