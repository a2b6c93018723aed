"""Methods and hooks that users put in place run, before the swap and after it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import backends
from tests.from_the_field.stock_models import B, D, L, draw, encoder, replaced, swapped

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")


@pytest.fixture(autouse=True)
def _tell_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_reported", set())


def doubled(method: Any) -> Any:
    """As rotary embeddings and rollouts do: the method with something added."""

    def changed(*args: Any, **keywords: Any) -> Any:
        out = method(*args, **keywords)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    return changed


#: Where a method is, seen from an encoder; torch calls each of them with gradients to record.
PLACES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "attention block": (lambda e: e.layers[0], "_sa_block"),
    "feed-forward block": (lambda e: e.layers[1], "_ff_block"),
    "linear layer": (lambda e: e.layers[0].linear1, "forward"),
    "layer": (lambda e: e.layers[1], "forward"),
    "attention": (lambda e: e.layers[0].self_attn, "forward"),
    "norm": (lambda e: e.layers[0].norm2, "forward"),
}
CLASSES: dict[str, tuple[type[nn.Module], str]] = {
    "attention block": (nn.TransformerEncoderLayer, "_sa_block"),
    "feed-forward block": (nn.TransformerEncoderLayer, "_ff_block"),
    "linear layer": (nn.Linear, "forward"),
    "attention": (nn.MultiheadAttention, "forward"),
}


def agree(stock: nn.Module, ours: nn.Module, *, differs_from: Tensor | None = None) -> None:
    """Bit for bit, with torch's fused path and without it, in evaluation and in training."""
    x = draw(B, L, D)
    with torch.inference_mode():
        expected = stock(x)
        # A layer that nothing was done to runs on the kernel, in bf16.
        assert (ours(x) - expected).abs().max() < 0.1
    assert torch.equal(ours(x), stock(x))
    if differs_from is not None:
        assert (stock(x) - differs_from).abs().max() > 0.1
    for module in (stock, ours):
        module.train()
    assert torch.equal(ours(x), stock(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", PLACES)
def test_on_the_instance(place: str, when: str, caplog: pytest.LogCaptureFixture) -> None:
    find, name = PLACES[place]
    stock, x = encoder(dropout=0.0), draw(B, L, D)
    plain = stock(x)
    ours = None
    if when == "after":
        ours = swapped(stock)
        with torch.inference_mode():
            ours(x)  # packs the weights
    for module in (stock,) if ours is None else (stock, ours):
        part = find(module)
        setattr(part, name, doubled(getattr(part, name)))
    if ours is None:
        # A bound method of the original would come along in a copy.
        ours = encoder(dropout=0.0)
        part = find(ours)
        setattr(part, name, doubled(getattr(part, name)))
        report = seqkernels.swap(ours)
        assert [r.name for r in report.replaced] == []
        assert any(f"{name} was replaced on the instance" in r for r in report.skipped[0].reasons)
    agree(stock, ours, differs_from=plain)
    if when == "after":
        assert f"{name} was replaced on the instance" in caplog.text


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", CLASSES)
def test_on_the_class(place: str, when: str) -> None:
    kind, name = CLASSES[place]
    stock, x = encoder(dropout=0.0), draw(B, L, D)
    plain = stock(x)
    ours = swapped(stock) if when == "after" else None
    with replaced(kind, name, doubled(getattr(kind, name))):
        if ours is None:
            report = seqkernels.swap(ours := encoder(dropout=0.0))
            assert report.replaced == []
            told = f"{kind.__name__}.{name} was replaced on the class"
            assert told in report.skipped[0].reasons
        agree(stock, ours, differs_from=plain)


def test_a_method_of_this_package_s_class() -> None:
    ours, x = swapped(encoder()), draw(B, L, D)
    kind = seqkernels.nn.TransformerEncoderLayer
    seen: list[Tensor] = []

    def watched(self: Any, *args: Any, **keywords: Any) -> Tensor:
        seen.append(args[0])
        return nn.TransformerEncoderLayer._ff_block(self, *args, **keywords)

    with replaced(kind, "_ff_block", watched):
        ours(x)
    assert len(seen) == 2


def test_global_hooks_see_what_they_see_in_torch() -> None:
    stock, x = encoder(), draw(B, L, D)
    chain = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU()).eval()
    for model, given in ((stock, x), (chain, x[0])):
        ours, seen = swapped(model), list[str]()
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, seen=seen: seen.append(type(module).__name__)  # type: ignore[misc]
        )
        try:
            with torch.inference_mode():
                model(given)
                expected = list(seen)
                seen.clear()
                ours(given)
        finally:
            handle.remove()
        assert len(seen) == len(expected)
        assert len(expected) > 1


def test_backward_hooks_run() -> None:
    seen: list[str] = []
    ours = encoder()
    ours.layers[0].linear1.register_full_backward_hook(  # type: ignore[union-attr]
        lambda module, gradients, outputs: seen.append(type(module).__name__)
    )
    assert seqkernels.swap(ours).replaced
    ours(draw(B, L, D)).sum().backward()
    assert seen == ["Linear"]


@pytest.fixture
def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()).eval()


def test_methods_of_members_of_a_chain(chain: nn.Sequential) -> None:
    stock, x = chain, draw(5, 32)
    for member in range(3):
        ours = swapped(stock)
        with torch.inference_mode():
            ours(x)
            ours[member].forward = doubled(ours[member].forward)
            expected = x
            for i, part in enumerate(stock):
                expected = part(expected) * (2 if i == member else 1)
            torch.testing.assert_close(ours(x), expected)


def test_what_falls_back_is_told_once_and_by_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ours, x = swapped(encoder()), draw(B, L, D)
    ours.layers[1].self_attn.forward = doubled(ours.layers[1].self_attn.forward)
    with torch.inference_mode():
        for _ in range(3):
            ours(x)
    told = [r.message for r in caplog.records if "layers.1.self_attn.forward" in r.message]
    assert len(told) == 1
