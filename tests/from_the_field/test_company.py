"""A candidate's logits have the same bits whatever its company, with every part of the ranker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import PrecisionPolicy
from seqkernels.backends import native_module
from seqkernels.models import EngagementRanker, EngagementRankerConfig
from seqkernels.nn import Linear

pytestmark = pytest.mark.skipif(
    native_module.module is None, reason="torch's products are not ours"
)

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "low rank, hidden heads": {"cross_rank": 16, "head_hidden": 33, "hidden": (130, 70)},
    "odd widths": {"action_dim": 7, "item_dim": 5, "nhead": 1, "hidden": (37, 19, 3)},
}
SWAPS: dict[str, Callable[[nn.Module], object]] = {
    "as built": lambda model: None,
    "swapped": seqkernels.swap,
    "swapped to bf16": lambda model: seqkernels.swap(
        model, precision_policy=PrecisionPolicy(bf16=("mlp.*", "cross.layers.0"))
    ),
}
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 256, 257, 300)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class Request:
    actions: Tensor
    items: Tensor
    lengths: Tensor
    dense: Tensor
    candidates: Tensor

    def score(self, model: EngagementRanker, candidates: Tensor) -> Tensor:
        user = (self.actions, self.items, self.lengths, self.dense)
        with torch.inference_mode():
            return model.score_request(*user, candidates)

    def forward(self, model: EngagementRanker, candidates: Tensor) -> Tensor:
        """Each candidate with a copy of the user."""
        user = (self.actions, self.items, self.lengths, self.dense)
        with torch.inference_mode():
            return model(*(t.expand(len(candidates), *t.shape[1:]) for t in user), candidates)


def drawn(config: str, dtype: torch.dtype) -> tuple[EngagementRanker, Request]:
    torch.manual_seed(0)
    model = EngagementRanker(
        EngagementRankerConfig(
            num_actions=6, num_items=1000, num_dense=7, heads=("click", "save"), **CONFIGS[config]
        )
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    request = Request(
        torch.randint(1, 6, (1, 30)),
        torch.randint(1, 1000, (1, 30)),
        torch.tensor([21]),
        torch.randn(1, 7),
        torch.randperm(999)[:300] + 1,
    )
    return model.eval().to(dtype), request


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("how", SWAPS)
def test_logits_do_not_depend_on_company(how: str, config: str, dtype: torch.dtype) -> None:
    model, request = drawn(config, dtype)
    SWAPS[how](model)
    candidates = request.candidates
    torch.set_num_threads(1)
    alone = torch.cat([request.score(model, c) for c in candidates[:40].split(1)])
    whole = request.score(model, candidates)
    assert torch.equal(alone, whole[:40])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in COUNTS:
            assert torch.equal(request.score(model, candidates[:count]), whole[:count])
    order = torch.randperm(len(candidates))
    assert torch.equal(request.score(model, candidates[order]), whole[order])


@pytest.mark.parametrize("how", SWAPS)
def test_pairs_of_forward_do_not_depend_on_company(how: str) -> None:
    model, request = drawn("default", torch.float32)
    SWAPS[how](model)
    candidates = request.candidates[:130]
    whole = request.forward(model, candidates)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        parts = candidates.split([1, 2, 3, 60, 64])
        assert torch.equal(torch.cat([request.forward(model, c) for c in parts]), whole)


def test_the_rankers_linear_layers_are_the_stock_ones_to_load_and_to_train() -> None:
    """The same names and gradients; `swap` may take them to bf16 and gives them back."""
    model, request = drawn("default", torch.float32)
    twin = seqkernels.models.stock_twin(model)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert all(m.precision == "fp32" for m in model.modules() if isinstance(m, Linear))
    x = torch.randn(5, model.config.crossed_dim)
    for part in ("cross", "mlp"):
        ours, stock = getattr(model, part).train(), getattr(twin, part).train()
        if part == "mlp":
            ours, stock = ours[0], stock[0]
        assert torch.equal(ours(x), stock(x))
    model.eval()
    before = request.score(model, request.candidates)
    report = seqkernels.swap(model, precision_policy=PrecisionPolicy(bf16=("mlp.0",)))
    assert ("mlp.0", "bf16") in {
        (n, m.precision) for n, m in model.named_modules() if isinstance(m, Linear)
    }
    assert report.decisions["mlp.0"].bf16
    report.restore()
    assert all(m.precision == "fp32" for m in model.modules() if isinstance(m, Linear))
    assert torch.equal(request.score(model, request.candidates), before)
