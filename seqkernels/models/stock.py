"""The engagement ranker out of torch.nn alone: what this package is measured against."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkernels.models.cross_network import CrossNetwork
from seqkernels.models.engagement_ranker import (
    EngagementRanker,
    EngagementRankerConfig,
    embedding,
    heads,
    mlp,
)


class StockRanker(nn.Module):
    """`EngagementRanker` as one writes it without this package; the same function and state dict.

    The tokens [event ; candidate] are concatenated, a ``torch.nn.TransformerEncoder`` reads them
    (in ``eval`` without gradients by its nested-tensor fast path), and every batch norm is
    ``torch.nn.BatchNorm1d``, which has no bounds.

    Parameters
    ----------
    config : EngagementRankerConfig
        ``min_var`` and ``max_abs`` have no meaning here.

    Examples
    --------
    >>> import torch
    >>> from seqkernels.models import EngagementRankerConfig, StockRanker
    >>> config = EngagementRankerConfig(num_actions=6, num_items=1000, num_dense=4)
    >>> actions, items = torch.randint(1, 6, (3, 100)), torch.randint(1, 1000, (3, 100))
    >>> lengths, dense = torch.tensor([100, 7, 0]), torch.randn(3, 4)
    >>> StockRanker(config)(actions, items, lengths, dense, torch.tensor([5, 17, 900])).shape
    torch.Size([3, 1])
    """

    def __init__(self, config: EngagementRankerConfig) -> None:
        super().__init__()
        self.config = config
        self.action = embedding(config.num_actions, config.action_dim)
        self.item = embedding(config.num_items, config.item_dim)
        self.sequence = StockSequence(config)
        self.dense_norm = nn.BatchNorm1d(config.num_dense)
        self.cross = CrossNetwork(config.crossed_dim, config.cross_layers, config.cross_rank)
        self.mlp = mlp(config, nn.BatchNorm1d)
        self.heads = heads(config)

    def forward(
        self, actions: Tensor, items: Tensor, lengths: Tensor, dense: Tensor, candidate: Tensor
    ) -> Tensor:
        """Logits [N, H]; parameters as in `EngagementRanker.forward`, which checks them."""
        count = len(candidate)  # N
        c = self.item(candidate)  # [N, item_dim]
        events = torch.cat((self.action(actions), self.item(items)), -1)  # [B, L, E]
        summary = self.sequence(events, lengths, c)  # [N, summary_dim]
        normed = self.dense_norm(dense.to(c.dtype)).expand(count, -1)  # [N, F]
        h = self.mlp(self.cross(torch.cat((summary, c, normed), -1)))
        logits = torch.cat([head(h) for head in self.heads.values()], -1)  # [N, H]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class StockSequence(nn.Module):
    """Early fusion, torch's encoder, and the summary of the valid events."""

    def __init__(self, config: EngagementRankerConfig) -> None:
        super().__init__()
        self.latest_k, self.pool = config.latest_k, config.pool
        layer = nn.TransformerEncoderLayer(
            config.d_model,
            config.nhead,
            config.dim_feedforward,
            config.encoder_dropout,
            batch_first=True,
        )
        # Torch's fast path takes an even number of heads only, and warns of others.
        nested = config.nhead % 2 == 0
        self.encoder = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=nested)

    def forward(self, events: Tensor, lengths: Tensor, candidate: Tensor) -> Tensor:
        """Events [B, L, E], lengths [B], candidate [N, C] -> [N, summary_dim]."""
        count, length = len(candidate), events.shape[1]
        tokens = torch.cat(
            (events.expand(count, -1, -1), candidate[:, None].expand(-1, length, -1)), -1
        )  # [N, L, D]
        position = torch.arange(length, device=lengths.device)
        ignored = (position >= lengths[:, None]).expand(count, -1)  # [N, L]
        # A sequence without events gets a key, or its softmax would be NaN; what comes of it is
        # not read: every ignored row is 0 in the summary.
        masked = (position >= lengths.clamp(min=1)[:, None]).expand(count, -1)
        mixed = self.encoder(tokens, src_key_padding_mask=masked)  # [N, L, D]
        latest = mixed[:, : self.latest_k].masked_fill(ignored[:, : self.latest_k, None], 0.0)
        latest = F.pad(latest, (0, 0, 0, self.latest_k - latest.shape[1]))  # [N, k, D]
        if self.pool == "none":
            return latest.flatten(1)
        pooled = mixed.masked_fill(ignored[..., None], -torch.inf).amax(1)
        pooled = pooled.masked_fill(ignored.all(1, keepdim=True), 0.0)  # [N, D]
        return torch.cat((latest.flatten(1), pooled), -1)


def stock_twin(ranker: EngagementRanker) -> StockRanker:
    """Copy a ranker into modules of torch.nn; the mode, dtype and device stay.

    Where no bound of a resilient batch norm is reached, both compute the same.

    Parameters
    ----------
    ranker : EngagementRanker
        Swapped or not; it keeps its parameters.

    Examples
    --------
    >>> from seqkernels.models import EngagementRanker, EngagementRankerConfig, stock_twin
    >>> config = EngagementRankerConfig(num_actions=6, num_items=1000, num_dense=4)
    >>> twin = stock_twin(EngagementRanker(config).eval())
    >>> type(twin.dense_norm).__name__, twin.training
    ('BatchNorm1d', False)
    """
    weight = ranker.item.weight
    twin = StockRanker(ranker.config).to(weight.device, weight.dtype)
    twin.load_state_dict(ranker.state_dict())
    return twin.train(ranker.training)
