"""Linear layer, batch norm and ReLU: beside torch's modules in a Sequential."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

import seqkernels
from seqkernels.benchmark.contestants import Compiled, Eager, OpenVino, Seqkernels, by_name
from seqkernels.benchmark.kinds.resilient_batch_norm import random_norm
from seqkernels.benchmark.workload import (
    Expected,
    Model,
    Task,
    Workload,
    both_ends,
    expected_of_stock,
    in_groups,
)

#: Rows of the output that are held against fp64, and how many of them make a group for the rule.
CHECKED, GROUP = 64, 16


class LinearTask(Task):
    """A layer, inputs, and the statistics that its products have.

    Parameters
    ----------
    rows, in_features, out_features : int
        N, K, F.
    """

    def __init__(self, rows: int, in_features: int, out_features: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, in_features, generator=g).bfloat16()  # [N, K]
        linear = nn.Linear(in_features, out_features)
        weight = torch.randn(out_features, in_features, generator=g) / math.sqrt(in_features)
        bias = torch.randn(out_features, generator=g)
        linear.load_state_dict({"weight": weight.bfloat16(), "bias": bias.bfloat16()})
        product = linear(self.x.float()).detach()  # [N, F]
        norm = random_norm(product.mean(0), product.var(0), g)
        self.state = nn.Sequential(linear, norm, nn.ReLU()).state_dict()

    def ours(self, dtype: torch.dtype) -> Model:
        """Torch's modules after ``swap``, with the default bounds, as one op.

        The policy is not asked: it looks at the product alone, and where torch's is as fast its
        answer would differ from run to run.
        """
        model = self.stock(dtype)
        policy = seqkernels.PrecisionPolicy(bf16=("*",))
        seqkernels.swap(model.module, resilient=True, precision_policy=policy)
        return model

    def stock(self, dtype: torch.dtype, *, nested: bool = False) -> Model:
        """Torch's modules."""
        out_features, in_features = self.state["0.weight"].shape
        norm = nn.BatchNorm1d(out_features)
        module = nn.Sequential(nn.Linear(in_features, out_features), norm, nn.ReLU())
        module.load_state_dict(self.state)
        return Model(module.to(dtype).eval(), {"input": self.x.to(dtype)})

    def expected(self) -> Expected:
        """By torch's modules: no bound is reached."""
        return expected_of_stock(self, in_groups(both_ends(len(self.x), CHECKED), GROUP))


@dataclass(frozen=True, kw_only=True)
class LinearWorkload(Workload):
    """Linear, batch norm with bounds, ReLU on [rows, in_features].

    Attributes
    ----------
    rows, in_features, out_features : int
        N, K, F.

    Examples
    --------
    >>> from seqkernels.benchmark import LinearWorkload
    >>> small = LinearWorkload(id="small", group="doc", rows=8, in_features=4, out_features=2)
    >>> small.sizes()["multiply_adds"]
    64
    """

    kind = "linear"
    title = "Linear, batch norm, ReLU"
    columns = (("N", "batch"), ("K", "in_features"), ("F", "out_features"))
    checked = "groups of rows"
    rivals = by_name(
        Seqkernels("seqkernels", "seqkernels, bf16 in/out", torch.bfloat16),
        Seqkernels("seqkernels_fp32", "seqkernels, fp32 in/out", torch.float32),
        Eager("eager_fp32", "torch eager fp32", torch.float32),
        Eager("eager_bf16", "torch eager bf16", torch.bfloat16),
        Compiled("compile_bf16", "torch.compile bf16", torch.bfloat16),
        OpenVino(),
    )

    rows: int
    in_features: int
    out_features: int
    contestants: tuple[str, ...] = tuple(rivals)

    def task(self) -> LinearTask:
        """Draw input, weights and statistics."""
        return LinearTask(self.rows, self.in_features, self.out_features)

    def sizes(self) -> dict[str, object]:
        """Of the layer and its input."""
        return {
            "batch": self.rows,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "multiply_adds": self.rows * self.in_features * self.out_features,
        }

    def small(self) -> Self:
        """A hundred rows, a layer that ``swap`` takes for large still."""
        return dataclasses.replace(self, rows=100, in_features=128, out_features=128)
