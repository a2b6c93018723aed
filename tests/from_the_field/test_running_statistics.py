"""What normalizes by running statistics is bounded, listed or refused; never passed over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import BackendUnavailableError, backends, settings
from seqkernels.backends import native_module
from seqkernels.nn import FusedSequential, ResilientBatchNorm1d
from seqkernels.testing import assert_close_to_oracle


@pytest.fixture(autouse=True)
def _backend_without_native() -> Any:
    with settings.override(backend=None if native_module.module is not None else "reference"):
        backends.calls.clear()
        yield


def drawn(norm: Any) -> Any:
    """Statistics away from 0 and 1, which bf16 holds."""
    torch.manual_seed(0)
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(norm.num_features).bfloat16())
        norm.running_var.copy_((torch.rand(norm.num_features) + 0.3).bfloat16())
        norm.weight.copy_(torch.randn(norm.num_features).bfloat16())
    return norm.eval()


SHAPES = {
    "2-D": (256, 4),
    "3-D": (16, 4, 20),
    "4-D": (8, 4, 5, 6),
    "5-D": (8, 4, 3, 2, 5),
    "channels last": (8, 4, 5, 6),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_sync_batch_norm_is_replaced_for_every_number_of_dimensions(kind: str) -> None:
    """`convert_sync_batchnorm` makes one of each BatchNorm1d, 2d and 3d."""
    made: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    stock = drawn(made.get(len(SHAPES[kind]), nn.BatchNorm3d)(4))
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(nn.ModuleDict({"norm": stock})).eval()
    x = torch.randn(SHAPES[kind]).bfloat16()
    if kind == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    ours = copy.deepcopy(stock)
    report = seqkernels.swap(ours, strict=True)
    assert [(r.name, r.type) for r in report.replaced] == [("norm", "torch.nn.SyncBatchNorm")]
    with torch.inference_mode():
        y, expected = ours["norm"](x.float()), stock["norm"](x.float())
        golden = copy.deepcopy(stock).double()["norm"](x.double())
        assert y.shape == expected.shape
        assert y.stride() == expected.stride()
        groups = (t.movedim(1, 0).flatten(1) for t in (y, golden, stock["norm"](x)))
        assert_close_to_oracle(*groups)
    if native_module.module is not None:
        assert sum(n for label, n in backends.calls.items() if label.startswith("cpu/")) == 1
    report.restore()
    assert type(ours["norm"]) is nn.SyncBatchNorm
    with torch.inference_mode():
        assert torch.equal(ours["norm"](x.float()), expected)


def test_a_sync_batch_norm_gets_bounds() -> None:
    norm = nn.SyncBatchNorm(4).eval()
    norm.running_var.zero_()
    x = torch.full((2, 4, 3, 3), 1e2)
    with torch.inference_mode():
        assert norm(x).max() > 30_000
        seqkernels.swap(norm, resilient=True, strict=True)
        assert norm(x).max() == 10.0


def test_training_of_what_was_a_sync_batch_norm() -> None:
    """In one process it is torch's; in several it is not, which the report says."""
    stock = drawn(nn.SyncBatchNorm(4))
    ours = copy.deepcopy(stock)
    report = seqkernels.swap(ours)
    assert "trained on in several processes" in " ".join(str(report).split())
    stock.train(), ours.train()
    for x in (torch.randn(32, 4), torch.randn(8, 4, 5, 6)):
        torch.testing.assert_close(ours(x), stock(x))
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_a_batch_norm_1d_still_refuses_four_dimensions() -> None:
    norm = nn.BatchNorm1d(4).eval()
    seqkernels.swap(norm)
    with torch.inference_mode(), pytest.raises(ValueError, match="x: expected 2 or 3 dimensions"):
        norm(torch.randn(2, 4, 3, 3))


class Frozen(nn.Module):
    """As detection libraries have it."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / self.running_var.sqrt()


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), "for a BatchNorm1d and a SyncBatchNorm only"),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), "for a BatchNorm1d and a SyncBatchNorm only"),
    "LazyBatchNorm1d": (nn.LazyBatchNorm1d, "it is lazy and knows no sizes yet"),
    "LazyBatchNorm2d": (nn.LazyBatchNorm2d, "it is lazy and knows no sizes yet"),
    "InstanceNorm1d": (
        lambda: nn.InstanceNorm1d(4, track_running_stats=True),
        "it normalizes by running statistics and is no torch.nn.BatchNorm1d",
    ),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        "it normalizes by running statistics and is no torch.nn.BatchNorm1d",
    ),
    "frozen": (Frozen, "it normalizes by running statistics and is no torch.nn.BatchNorm1d"),
    "exact already": (
        lambda: ResilientBatchNorm1d(4, min_var=0.0, max_abs=float("inf")),
        "it is a ResilientBatchNorm1d without bounds; set its min_var and max_abs",
    ),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_stays_without_bounds_is_listed_and_refused(kind: str) -> None:
    build, reason = LEFT[kind]
    model = nn.ModuleDict({"odd": build(), "plain": nn.BatchNorm1d(4)}).eval()
    was = type(model["odd"])
    report = seqkernels.swap(model, resilient=True)
    (skipped,) = report.skipped
    assert (skipped.name, skipped.optional) == ("odd", False)
    assert reason in skipped.reasons[0]
    assert type(model["odd"]) is was
    assert [r.name for r in report.replaced] == ["plain"]
    report.restore()
    with pytest.raises(BackendUnavailableError, match="swap: strict, and modules cannot be"):
        seqkernels.swap(model, resilient=True, strict=True)
    assert type(model["plain"]) is nn.BatchNorm1d


def test_bounded_norms_and_norms_without_running_statistics_of_their_own_are_no_matter() -> None:
    model = nn.ModuleList(
        [ResilientBatchNorm1d(4), nn.InstanceNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)]
    )
    assert not seqkernels.swap(model.eval(), resilient=True, strict=True).skipped


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")
def test_a_norm_behind_an_encoder_is_bounded_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, norm=nn.BatchNorm1d(5)).eval()
    encoder.norm.running_var.zero_()
    report = seqkernels.swap(encoder, resilient=True, strict=True)
    assert [r.name for r in report.replaced] == ["", "norm"]
    with torch.inference_mode():
        assert encoder(torch.randn(3, 5, 8)).abs().max() <= 10.0
    report.restore()
    assert type(encoder.norm) is nn.BatchNorm1d


@pytest.mark.parametrize("width", [3, 4])
def test_a_member_that_changes_the_shape_ends_the_fusion(width: int) -> None:
    """Behind `Unflatten` a norm's channels are dimension 1, not those of the product."""
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Linear(6, 4 * width),
        nn.Unflatten(1, (width, 4)),
        nn.Linear(4, 4),
        drawn(nn.BatchNorm1d(width)),
        nn.ReLU(),
    ).eval()
    ours = copy.deepcopy(stock)
    seqkernels.swap(ours)
    assert isinstance(ours, FusedSequential)
    x = torch.randn(5, 6)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), stock(x))
