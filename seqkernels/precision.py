"""Which linear layers of a model `swap` lets multiply in bf16, and why."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkernels import backends, ops


class PrecisionDecision(NamedTuple):
    """Whether a layer multiplies in bf16, and why."""

    bf16: bool
    reason: str


@dataclass(frozen=True)
class PrecisionPolicy:
    """The layers that gain from bf16; a callable of a layer's name and the layer.

    A layer multiplies in bf16 if its weight is large, it is not the last layer of a head, and bf16
    is measured faster than torch's product in the layer's own dtype, on this machine with torch's
    present number of threads. What is small has little to gain, and what is last has its rounding
    in the score, with nothing behind it to average it out. Embeddings are no products and stay as
    they are.

    Parameters
    ----------
    min_weights : int
        Smallest number of weights of a layer.
    min_out_features : int
        A layer with fewer outputs counts as the last one of a head.
    rows : int
        Rows of the measured product, e.g. the candidates of a request.
    min_speedup : float
        Smallest measured ratio of torch's time to that of bf16. For a layer whose weights are bf16
        already 0.9 will do: its product gains nothing, what is fused with it does.
    bf16, keep : sequence of str
        Names of layers, or patterns as of a shell (``"heads.*"``), to be in bf16 or not, whatever
        the rest says; ``keep`` goes first.

    Examples
    --------
    >>> import torch, seqkernels
    >>> policy = seqkernels.PrecisionPolicy(keep=("cross.*",))
    >>> policy("cross.0", torch.nn.Linear(512, 512))
    PrecisionDecision(bf16=False, reason="kept by the policy's pattern 'cross.*'")
    >>> policy("head", torch.nn.Linear(512, 1)).reason
    'small: 512 weights, from 16384 on it pays'
    """

    min_weights: int = 16_384
    min_out_features: int = 16
    rows: int = 256
    min_speedup: float = 1.05
    bf16: Sequence[str] = ()
    keep: Sequence[str] = ()

    def __call__(self, name: str, layer: nn.Linear) -> PrecisionDecision:
        """Decide for one layer."""
        for pattern in self.keep:
            if fnmatchcase(name, pattern):
                return PrecisionDecision(False, f"kept by the policy's pattern {pattern!r}")
        for pattern in self.bf16:
            if fnmatchcase(name, pattern):
                return PrecisionDecision(True, f"bf16 by the policy's pattern {pattern!r}")
        count = layer.weight.numel()
        if count < self.min_weights:
            return PrecisionDecision(
                False, f"small: {count} weights, from {self.min_weights} on it pays"
            )
        if layer.out_features < self.min_out_features:
            return PrecisionDecision(
                False, f"the last layer of a head: {layer.out_features} outputs"
            )
        speedup = measured_speedup(
            layer.in_features, layer.out_features, self.rows, layer.weight.dtype
        )
        told = f"{speedup:.2f} times as fast as torch at {self.rows} rows"
        short = layer.weight.dtype is torch.bfloat16
        needed = min(self.min_speedup, _AS_FAST) if short else self.min_speedup
        return PrecisionDecision(speedup >= needed, f"measured {told} in bf16")


_AS_FAST = 0.9

#: What `swap` asks: of a layer's name and the layer.
Policy = Callable[[str, nn.Linear], PrecisionDecision]


def measured_speedup(
    in_features: int, out_features: int, rows: int, dtype: torch.dtype = torch.float32
) -> float:
    """How many times as fast as torch's product the bf16 one is, here and now.

    Measured once for each size, dtype, number of threads and instruction set: the median ratio of
    calls that take turns.

    Examples
    --------
    >>> measured_speedup(64, 64, 8) > 0
    True
    """
    choice = backends.resolve("linear", "auto", "cpu", dtype)
    return _measured(in_features, out_features, rows, dtype, torch.get_num_threads(), choice.label)


_ROUNDS = 7


@lru_cache(maxsize=1024)
def _measured(
    in_features: int, out_features: int, rows: int, dtype: torch.dtype, threads: int, label: str
) -> float:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        x = torch.randn(rows, in_features, generator=generator).to(dtype)
        weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
        bias = torch.zeros(out_features, dtype=dtype)
        weights: list[Tensor | None] = [weight, bias, *[None] * 8]

        def ours() -> None:
            ops.apply_linear(x, weights, [], [], "none", 0.01, "auto")

        def torchs() -> None:
            F.linear(x, weight, bias)

        ratios = []
        for round_ in range(_ROUNDS + 2):
            seconds = [_seconds(call) for call in (torchs, ours)]
            if round_ >= 2:  # the first ones pack weights and start threads
                ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def _seconds(call: Callable[[], None]) -> float:
    call()  # the caches are its own, and the threads of whoever came before have gone to sleep
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
