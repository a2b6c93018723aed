"""The demo's ranker: `EngagementRanker` sized for MovieLens, and its log-odds of a like."""

from __future__ import annotations

from torch import Tensor, nn

from seqkernels.demo.examples import FEATURES, Batch, Examples
from seqkernels.models import EngagementRanker, EngagementRankerConfig

HEADS = ("like", "love")  # a rating of 4 or more, a rating of 5


def config(examples: Examples) -> EngagementRankerConfig:
    """Tokens [action ; item ; candidate], 96 wide, two layers, as in arXiv:2306.00248."""
    return EngagementRankerConfig(
        num_actions=examples.num_actions,
        num_items=examples.num_items,
        num_dense=len(FEATURES),
        heads=HEADS,
        cross_rank=64,
        hidden=(256, 128),
        max_abs=20.0,  # the longest pauses are 14 standard deviations from the mean one
    )


def ranker(examples: Examples) -> EngagementRanker:
    """A new one, to be trained."""
    return EngagementRanker(config(examples))


def log_odds_of_a_like(model: nn.Module, batch: Batch) -> Tensor:
    """[N], the first head's logit."""
    logits: Tensor = model(*batch)  # [N, H]
    return logits[:, 0]
