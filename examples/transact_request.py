"""Move a TransAct-style model to request scoring: same weights, same scores, no repeated user.

The model below is as one writes it: the candidate is joined to every event, and to score a request
the user is repeated for each candidate. `RequestModel` takes its weights and computes the user's
share once.

    python examples/transact_request.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import seqkernels

LATEST = 10


class TransActStyle(nn.Module):
    """Early fusion, torch's encoder, [latest 10 ; max pool], an MLP."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(96, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mlp = nn.Sequential(nn.Linear((LATEST + 1) * 96, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, events: Tensor, candidates: Tensor, lengths: Tensor) -> Tensor:
        """Scores [N] of events [1, L, 64], candidates [N, 32], lengths [1]."""
        count, length = len(candidates), events.shape[1]
        tokens = torch.cat(
            (events.expand(count, -1, -1), candidates[:, None].expand(-1, length, -1)), -1
        )  # [N, L, 96]
        ignored = torch.arange(length) >= lengths[:, None]
        mixed = self.encoder(tokens, src_key_padding_mask=ignored.expand(count, -1))
        mixed = mixed.masked_fill(ignored[..., None], 0.0)
        summary = torch.cat((mixed[:, :LATEST].flatten(1), mixed.amax(1)), -1)
        return self.mlp(summary).squeeze(-1)  # type: ignore[no-any-return]


class RequestModel(nn.Module):
    """The same function; no tensor [N, L, 96] anywhere."""

    def __init__(self, model: TransActStyle) -> None:
        super().__init__()
        # "zero": padded positions are 0 in the summary, as the masked_fill above says.
        self.sequence = seqkernels.nn.UserSequenceEncoder(
            64, 32, 2, 32, 2, latest_k=LATEST, pool="max", pool_padding="zero"
        )
        self.sequence.encoder.load_state_dict(model.encoder.state_dict())
        self.mlp = model.mlp

    def forward(self, events: Tensor, candidates: Tensor, lengths: Tensor) -> Tensor:
        """As `TransActStyle.forward`."""
        summary = self.sequence.score_candidates(events, candidates, lengths=lengths)
        return self.mlp(summary).squeeze(-1)  # type: ignore[no-any-return]


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median of repeated calls."""
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def main() -> None:
    """Compare scores and times of one request."""
    torch.manual_seed(0)
    model = TransActStyle().eval()
    request = RequestModel(model).eval()
    events, candidates, lengths = torch.randn(1, 100, 64), torch.randn(256, 32), torch.tensor([60])
    with torch.inference_mode():
        before, after = model(events, candidates, lengths), request(events, candidates, lengths)
        change = (before - after).abs().max()
        print(f"256 candidates, 60 of 100 events: no score changes by more than {change:.4f}")
        print(f"scores spread over {before.std():.4f}")
        one = milliseconds(lambda: model(events, candidates, lengths))
        other = milliseconds(lambda: request(events, candidates, lengths))
        print(f"user repeated, torch fp32: {one:.1f} ms; request scoring: {other:.1f} ms")


if __name__ == "__main__":
    main()
