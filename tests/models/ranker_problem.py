"""A small engagement ranker whose parts all matter, and inputs for it."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqkernels.models import EngagementRanker, EngagementRankerConfig

B, L, DENSE = 5, 11, 3
LENGTHS = (11, 6, 2, 1, 0)
SMALL: dict[str, Any] = {
    "num_actions": 5,
    "num_items": 30,
    "num_dense": DENSE,
    "heads": ("click", "save"),
    "action_dim": 8,
    "item_dim": 8,
    "dim_feedforward": 8,
    "latest_k": 3,
    "hidden": (16, 8),
}


class Inputs(NamedTuple):
    """What a ranker reads."""

    actions: Tensor  # [B, L] int64
    items: Tensor  # [B, L] int64
    lengths: Tensor  # [B] int64
    dense: Tensor  # [B, DENSE] float32, exact in bf16
    candidate: Tensor  # [B] int64

    def to(self, dtype: torch.dtype) -> Inputs:
        return self._replace(dense=self.dense.to(dtype))


def config(**changes: Any) -> EngagementRankerConfig:
    return EngagementRankerConfig(**(SMALL | changes))


def draw(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, length: int = L) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    return Inputs(
        torch.randint(0, SMALL["num_actions"], (batch, length), generator=g),
        torch.randint(0, SMALL["num_items"], (batch, length), generator=g),
        torch.tensor(lengths),
        (3.0 * torch.randn(batch, DENSE, generator=g) - 1.0).bfloat16().float(),
        torch.randint(1, SMALL["num_items"], (batch,), generator=g),
    )


def make(**changes: Any) -> EngagementRanker:
    """One with weights exact in bf16, attention that is not uniform and running statistics.

    In eval mode. No bound of its batch norms is reached by what `draw` draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ranker = EngagementRanker(config(**changes))
        with torch.no_grad():
            for name, parameter in ranker.named_parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
                if name in ("action.weight", "item.weight"):
                    parameter[0] = 0.0
                parameter.copy_(parameter.bfloat16())
            norms = [m for m in ranker.modules() if isinstance(m, nn.BatchNorm1d)]
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = None  # the mean of all batches
            for seed in range(20):
                ranker(*draw(seed, LENGTHS * 8))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                for buffer in (norm.running_mean, norm.running_var):
                    assert buffer is not None
                    buffer.copy_(buffer.bfloat16())
    return ranker.eval()


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy."""
    return copy.deepcopy(model).to(dtype)
