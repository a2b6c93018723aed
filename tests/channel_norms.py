"""Linear layers and batch norms as the tests draw them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqkernels import backends, ops, reference, settings
from seqkernels.nn.resilient_batch_norm import finite
from seqkernels.options import ResilientBatchNormOptions
from seqkernels.reference import ChannelNorm
from seqkernels.testing import Closeness, assert_close_to_oracle

_ENOUGH_VALUES = 1024  # of a group that the rule is applied to


def rounded(t: Tensor) -> Tensor:
    """Exact in bf16, so that nobody has an error from rounding what it is given."""
    return t.to(torch.bfloat16).to(t.dtype)


def apply(x: Tensor, norm: ChannelNorm, activation: str, backend: str) -> Tensor:
    """The op as a module calls it."""
    options = ResilientBatchNormOptions(
        norm.eps, norm.min_var, finite(norm.max_abs), activation, 0.2
    )
    result = ops.apply_resilient_batch_norm(x, *norm[:4], options, backend)
    assert isinstance(result, Tensor)
    return result


def channel_norm(
    channels: int, *, bounded: bool, seed: int = 0, affine: bool = True, offset: float = 0.0
) -> ChannelNorm:
    """Statistics away from 0 and 1; with bounds, some of each kind are met."""
    g = torch.Generator().manual_seed(seed)
    norm = ChannelNorm(
        rounded(offset + torch.randn(channels, generator=g)),
        rounded(torch.rand(channels, generator=g) * 2 + 0.2),
        rounded(torch.randn(channels, generator=g)) if affine else None,
        rounded(torch.randn(channels, generator=g)) if affine else None,
    )
    return norm._replace(min_var=0.5, max_abs=1.5) if bounded else norm


def op_numbers(norm: ChannelNorm) -> list[float]:
    """Of the op ``linear``: eps, min_var and, if there is a bound, max_abs."""
    return [n for n in norm[4:] if n != math.inf]


@dataclass(frozen=True)
class LinearCase:
    """A problem of the op ``linear``; norms are "", "exact" or "bounded"."""

    rows: int = 130
    in_features: int = 96
    out_features: int = 64
    input_norm: str = ""
    output_norm: str = ""
    activation: str = "none"
    bias: bool = True
    affine: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0
    precision: str = "bf16"

    def x(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed)
        x = rounded(torch.randn(self.rows, self.in_features, generator=g) * 1.5 + 0.5)
        x = x.to(self.dtype)
        if self.layout == "strided":
            wide = torch.full((self.rows, self.in_features + 3), math.nan, dtype=self.dtype)
            wide[:, : self.in_features] = x
            return wide[:, : self.in_features]
        if self.layout == "transposed":
            return x.t().contiguous().t()
        return x

    def layer(self) -> tuple[Tensor, Tensor | None, ChannelNorm | None, ChannelNorm | None]:
        """Weight, bias and both norms."""
        g = torch.Generator().manual_seed(self.seed + 1)
        k, f = self.in_features, self.out_features
        weight = rounded(torch.randn(f, k, generator=g) * k**-0.5)
        bias = rounded(torch.randn(f, generator=g)) if self.bias else None
        norms = [
            channel_norm(width, bounded=kind == "bounded", seed=self.seed + i, affine=self.affine)
            if kind
            else None
            for i, (width, kind) in enumerate(((k, self.input_norm), (f, self.output_norm)))
        ]
        return weight, bias, norms[0], norms[1]

    def arguments(self, backend: str) -> tuple[Any, ...]:
        """Of the op, after x."""
        weight, bias, *norms = self.layer()
        tensors: list[Tensor | None] = [weight, bias]
        numbers = []
        for norm in norms:
            tensors += [None] * 4 if norm is None else list(norm[:4])
            numbers.append([] if norm is None else op_numbers(norm))
        return tensors, *numbers, self.activation, 0.2, self.precision, backend

    def run(self, isa: str, x: Tensor | None = None) -> Tensor:
        """The op on one instruction set, of which the backend's own count is proof."""
        x = self.x() if x is None else x
        label = f"cpu/{isa}"
        before = backends.calls[label]
        with settings.override(isa=isa), torch.inference_mode():
            result = ops.linear(x, *self.arguments("cpu"))
        assert backends.calls[label] == before + (len(x) > 0)
        return result

    def reference(self, dtype: torch.dtype) -> Tensor:
        """The definition in a dtype: the oracle in fp64, the yardstick in bf16."""
        weight, bias, before, behind = self.layer()
        return reference.linear(
            self.x().to(dtype),
            weight,
            bias,
            input_norm=before,
            output_norm=behind,
            activation=self.activation,
            negative_slope=0.2,
        )

    def with_enough_values(self) -> LinearCase:
        """As many rows as make one group for the rule."""
        return replace(self, rows=max(self.rows, -(-_ENOUGH_VALUES // self.out_features)))


def grouped(y: Tensor) -> Tensor:
    """[groups, values]: rows together until they are enough for the rule."""
    count = max(1, y.numel() // _ENOUGH_VALUES)
    while len(y) % count:
        count -= 1
    return y.reshape(count, -1)


def check_linear(case: LinearCase, result: Tensor) -> Closeness:
    """Hold a result to the numerics rule."""
    assert result.dtype == case.dtype
    return assert_close_to_oracle(
        grouped(result),
        grouped(case.reference(torch.float64)),
        grouped(case.reference(torch.bfloat16)),
        label=str(case),
    )
