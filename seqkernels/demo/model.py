"""The demo's ranker: stock torch modules only, in the shape of TransAct (arXiv:2306.00248)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqkernels.demo.examples import Batch

EMBEDDING_DIM = 32
LATEST = 8  # events of the short-term summary
_FEATURES = 3


class Ranker(nn.Module):
    """The log-odds that a user likes a candidate item.

    Every event of the history is [action ; item ; candidate] (early fusion), 96 wide; a
    Transformer encoder of two layers mixes them; the latest 8 rows and the maximum over all of them
    summarize the history; an MLP reads both, the candidate and the user's features.

    Parameters
    ----------
    num_actions, num_items : int
        Sizes of the embedding tables, the empty entry 0 included.
    dropout : float
        Before the last layer of the MLP, while training.
    """

    def __init__(self, num_actions: int, num_items: int, dropout: float = 0.1) -> None:
        super().__init__()
        width = 3 * EMBEDDING_DIM
        self.action = nn.Embedding(num_actions, EMBEDDING_DIM)
        self.item = nn.Embedding(num_items, EMBEDDING_DIM)
        for table in (self.action, self.item):
            nn.init.normal_(table.weight, std=0.1)  # of torch's 1.0 a rare item would keep too much
        layer = nn.TransformerEncoderLayer(
            width, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.mlp = nn.Sequential(
            nn.Linear((LATEST + 1) * width + EMBEDDING_DIM + _FEATURES, 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, 1),
        )

    def forward(self, batch: Batch) -> Tensor:
        """Log-odds [N], float32."""
        actions, items, lengths, features, candidate = batch
        count = len(candidate)  # N
        c = self.item(candidate)  # [N, 32]
        events = torch.cat((self.action(actions), self.item(items)), -1)  # [B, L, 64]
        length = events.shape[1]
        # One user with many candidates is repeated for each of them, as early fusion asks for.
        tokens = torch.cat(
            (events.expand(count, -1, -1), c[:, None].expand(-1, length, -1)), -1
        )  # [N, L, 96]
        # Position 0 is never padding: the empty event there tells of a user without history, and
        # the softmax of every sequence has a key.
        padding = torch.arange(length) >= lengths.clamp(min=1)[:, None]  # [B, L]
        padding = padding.expand(count, -1)

        mixed = self.encoder(tokens, src_key_padding_mask=padding)  # [N, L, 96]
        # What torch's encoder leaves in padded rows depends on the mode: zeros in eval without
        # gradients (its nested-tensor path), values computed from the padding in training. So no
        # padded row is read: the model trained is the model served, whatever the amount of padding.
        latest = mixed[:, :LATEST].masked_fill(padding[:, :LATEST, None], 0.0)  # [N, 8, 96]
        pooled = mixed.masked_fill(padding[..., None], -torch.inf).amax(1)  # [N, 96]
        user = features.to(c.dtype).expand(count, -1)  # [N, 3]
        summary = torch.cat((latest.flatten(1), pooled, c, user), -1)
        logits: Tensor = self.mlp(summary).squeeze(-1)
        return logits.float()
