"""The whole engagement ranker, swapped: beside its twin made of torch's modules."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

import seqkernels
from seqkernels.benchmark.contestants import Compiled, Eager, OpenVino, Seqkernels, by_name
from seqkernels.benchmark.kinds.encoder import uniform_lengths
from seqkernels.benchmark.workload import (
    Expected,
    Model,
    Task,
    Workload,
    both_ends,
    expected_of_stock,
    in_groups,
)
from seqkernels.models import EngagementRanker, EngagementRankerConfig, stock_twin
from seqkernels.testing import EncoderCase

#: Users whose scores are held against fp64, and how many make a group for the rule: the scores of
#: one are too few to tell how large torch's own error is.
CHECKED, GROUP = 128, 64
CONFIG = EngagementRankerConfig(
    num_actions=20, num_items=100_000, num_dense=64, heads=("click", "save"), dropout=0.0
)


class RankerTask(Task):
    """A ranker whose parts all matter, users and a candidate for each.

    Parameters
    ----------
    config : EngagementRankerConfig
    lengths : tuple of int
        Valid events of each user.
    length : int
        L, to which histories are padded.
    """

    def __init__(
        self, config: EngagementRankerConfig, lengths: tuple[int, ...], length: int
    ) -> None:
        g = torch.Generator().manual_seed(0)
        batch = len(lengths)
        self.inputs = {
            "actions": torch.randint(1, config.num_actions, (batch, length), generator=g),
            "items": torch.randint(1, config.num_items, (batch, length), generator=g),
            "lengths": torch.tensor(lengths),
            "dense": torch.randn(batch, config.num_dense, generator=g).bfloat16().float(),
            "candidate": torch.randint(1, config.num_items, (batch,), generator=g),
        }
        self.ranker = random_ranker(config, self.inputs)

    def ours(self, dtype: torch.dtype) -> Model:
        """The ranker after ``swap``."""
        ranker = copy.deepcopy(self.ranker).to(dtype)
        seqkernels.swap(ranker)
        return Model(ranker, self._inputs(dtype))

    def stock(self, dtype: torch.dtype, *, nested: bool = False) -> Model:
        """Its twin, whose encoder packs the valid events wherever torch's fast path is on."""
        return Model(stock_twin(self.ranker).to(dtype), self._inputs(dtype))

    def expected(self) -> Expected:
        """By the twin: no bound of a batch norm is reached."""
        rows = both_ends(len(self.inputs["lengths"]), CHECKED)
        return expected_of_stock(self, in_groups(rows, GROUP))

    def _inputs(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self.inputs | {"dense": self.inputs["dense"].to(dtype)}


def random_ranker(
    config: EngagementRankerConfig, inputs: dict[str, torch.Tensor]
) -> EngagementRanker:
    """One in eval mode, its parameters and statistics exact in bf16.

    Attention spreads as that of `EncoderCase`, and batch norms have the statistics of the inputs.
    """
    case = EncoderCase(
        d_model=config.d_model,
        nhead=config.nhead,
        dim_feedforward=config.dim_feedforward,
        num_layers=config.num_layers,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        ranker = EngagementRanker(config)
        for table in (ranker.action, ranker.item):
            table.weight[1:].normal_()
        encoder = ranker.sequence.encoder
        encoder.load_state_dict(
            dict(zip(encoder.state_dict(), case.problem().weights, strict=True))
        )
        for parameter in ranker.parameters():
            parameter.copy_(parameter.bfloat16())
        twin = stock_twin(ranker)
        norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm1d)]
        for norm in norms:
            norm.momentum = 1.0
        twin(**inputs)
        for norm in norms:
            for statistic in (norm.running_mean, norm.running_var):
                assert statistic is not None
                statistic.copy_(statistic.bfloat16())
        ranker.load_state_dict(twin.state_dict())
    return ranker.eval()


@dataclass(frozen=True, kw_only=True)
class RankerWorkload(Workload):
    """Scores of a candidate for each of ``batch`` users.

    Attributes
    ----------
    batch, length : int
        Users, and L, to which their histories are padded.
    masked : bool
        Whether they have a fifth of L to L events, uniform; else all have L.
    config : EngagementRankerConfig

    Examples
    --------
    >>> from seqkernels.benchmark import RankerWorkload
    >>> RankerWorkload(id="small", group="doc", batch=8, masked=False).sizes()["valid_events"]
    800
    """

    kind = "ranker"
    title = "Engagement ranker"
    columns = (("B", "batch"), ("L", "length"))
    per = "candidate"
    checked = "groups of rows"
    rivals = by_name(
        Seqkernels("seqkernels", "seqkernels", torch.float32),
        Seqkernels("seqkernels_triton", "seqkernels, Triton", torch.float32, "triton"),
        Eager("eager_fp32", "torch eager fp32", torch.float32),
        Eager("eager_bf16", "torch eager bf16", torch.bfloat16),
        Compiled("compile_bf16", "torch.compile bf16", torch.bfloat16),
        OpenVino(),
    )

    batch: int
    length: int = 100
    masked: bool = True
    config: EngagementRankerConfig = CONFIG
    contestants: tuple[str, ...] = tuple(n for n in rivals if n != "seqkernels_triton")

    def task(self) -> RankerTask:
        """Draw ranker and users."""
        return RankerTask(self.config, self.valid_lengths(), self.length)

    def valid_lengths(self) -> tuple[int, ...]:
        """Number of events of each user."""
        shortest = self.length // 5 if self.masked else self.length
        return uniform_lengths(self.batch, shortest, self.length)

    def sizes(self) -> dict[str, object]:
        """Of the ranker and its input."""
        config = self.config
        return {
            "batch": self.batch,
            "length": self.length,
            "masked": self.masked,
            "valid_events": sum(self.valid_lengths()),
            "d_model": config.d_model,
            "num_layers": config.num_layers,
            "crossed": config.crossed_dim,
            "hidden": config.hidden,
            "heads": len(config.heads),
        }

    def small(self) -> Self:
        """Sixty-four users with short histories, a narrow MLP."""
        config = dataclasses.replace(self.config, num_items=1000, latest_k=3, hidden=(64,))
        return dataclasses.replace(self, batch=GROUP, length=24, config=config)
