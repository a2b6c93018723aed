"""Whole models made of this package's modules, and their twins made of torch's."""

from seqkernels.models.cross_network import CrossNetwork
from seqkernels.models.engagement_ranker import EngagementRanker, EngagementRankerConfig
from seqkernels.models.stock import StockRanker, stock_twin

__all__ = [
    "CrossNetwork",
    "EngagementRanker",
    "EngagementRankerConfig",
    "StockRanker",
    "stock_twin",
]
