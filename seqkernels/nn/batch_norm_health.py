"""What running statistics say about the features they were taken of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from seqkernels.tables import as_text


@dataclass(frozen=True)
class DegenerateChannel:
    """One channel whose running statistics are of no use as they are.

    Attributes
    ----------
    index : int
        Of the channel.
    kind : str
        ``"non-finite"`` (mean or variance), ``"negative variance"``, ``"zero variance"``, or
        ``"below min_var"``; without a ``min_var``, ``"below eps"``.
    mean, var : float
        The running statistics.
    """

    index: int
    kind: str
    mean: float
    var: float


@dataclass(frozen=True)
class BatchNormHealth:
    """Report on the running statistics of a batch norm; ``str()`` is a table.

    Attributes
    ----------
    num_features : int
        Number of channels.
    num_batches_tracked : int or None
        Batches in the running statistics; None where there are none.
    channels : tuple of DegenerateChannel
        The degenerate ones, by index.
    """

    num_features: int
    num_batches_tracked: int | None
    channels: tuple[DegenerateChannel, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of channels of each kind found."""
        return dict(Counter(channel.kind for channel in self.channels))

    @property
    def healthy(self) -> bool:
        """Whether no channel is degenerate."""
        return not self.channels

    def __str__(self) -> str:
        if self.num_batches_tracked is None:
            return "batch norm: no running statistics"
        found = ", ".join(f"{n} {kind}" for kind, n in self.counts.items()) or "none"
        title = (
            f"batch norm: {self.num_features} channels, {self.num_batches_tracked} batches "
            f"tracked, degenerate: {found}"
        )
        if self.healthy:
            return title
        rows = [(str(c.index), c.kind, f"{c.mean:g}", f"{c.var:g}") for c in self.channels]
        return as_text(title, ("channel", "kind", "mean", "variance"), rows)


@torch.no_grad()
def examine(norm: nn.BatchNorm1d, min_var: float) -> BatchNormHealth:
    """The report on a module's running statistics as they are now, and on its floor for them."""
    mean, var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or batches is None:
        return BatchNormHealth(norm.num_features, None, ())
    limit, low = (min_var, "below min_var") if min_var > 0 else (norm.eps, "below eps")
    channels = []
    # Later kinds give way to earlier ones.
    for kind, found in (
        ("non-finite", ~(mean.isfinite() & var.isfinite())),
        ("negative variance", var < 0),
        ("zero variance", var == 0),
        (low, (var > 0) & (var < limit)),
    ):
        channels += [(int(i), kind) for i in found.nonzero().flatten()]
    kinds: dict[int, str] = {}
    for index, kind in channels:
        kinds.setdefault(index, kind)
    return BatchNormHealth(
        norm.num_features,
        int(batches),
        tuple(
            DegenerateChannel(i, kind, float(mean[i]), float(var[i]))
            for i, kind in sorted(kinds.items())
        ),
    )
