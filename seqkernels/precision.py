"""Which linear layers of a model `swap` lets multiply in bf16, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from seqkernels import backends

#: The number of weights from which the product in bf16 is no slower than torch's product in the
#: dtype of the weights, from one row on, per instruction set and that dtype. Where there is no
#: entry bf16 gains nothing, or nobody has measured it. ``docs/design/linear.md`` has the figures.
FEWEST_WEIGHTS: dict[tuple[str, torch.dtype], int] = {
    ("amx_bf16", torch.float32): 1 << 18,
    ("amx_emulated", torch.float32): 1 << 18,
    ("avx512_bf16", torch.float32): 1 << 18,
    ("avx512_bf16", torch.bfloat16): 1 << 18,
    ("avx2", torch.bfloat16): 1 << 18,
}
_MULTIPLY_FP32 = ("avx512", "avx2", "portable")


class PrecisionDecision(NamedTuple):
    """Whether a layer multiplies in bf16, and why."""

    bf16: bool
    reason: str


@dataclass(frozen=True)
class PrecisionPolicy:
    """The layers that gain from bf16; a callable of a layer's name and the layer.

    It decides by rules and a table, never by a clock, so that all processes on one kind of machine
    give the same scores. A layer multiplies in bf16 if

    - it does not score items: its weight is not that of an embedding, and its outputs are fewer
      than thousands. There the order of the best items is the result, and rounding changes it;
    - it is not the last layer of a head, whose rounding is in the score, with nothing behind it to
      average it out;
    - it has so many weights that bf16 is no slower than torch's product on this instruction set, at
      one row already.

    Embeddings are no products and stay as they are.

    Parameters
    ----------
    min_weights : int, optional
        Smallest number of weights of a layer, in place of the table.
    min_out_features : int
        A layer with fewer outputs counts as the last one of a head.
    max_out_features : int
        A layer with more outputs counts as one that scores items.
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
    'the last layer of a head: fewer than 16 outputs'
    """

    min_weights: int | None = None
    min_out_features: int = 16
    max_out_features: int = 2048
    bf16: Sequence[str] = ()
    keep: Sequence[str] = ()

    def __call__(
        self, name: str, layer: nn.Linear, tied_to: str | None = None
    ) -> PrecisionDecision:
        """Decide for one layer; `tied_to` names the embedding whose weight it has, if any."""
        for pattern in self.keep:
            if fnmatchcase(name, pattern):
                return PrecisionDecision(False, f"kept by the policy's pattern {pattern!r}")
        for pattern in self.bf16:
            if fnmatchcase(name, pattern):
                return PrecisionDecision(True, f"bf16 by the policy's pattern {pattern!r}")
        if tied_to is not None:
            told = f"it scores items: its weight is that of the embedding {tied_to!r}"
            return PrecisionDecision(False, told)
        if layer.out_features > self.max_out_features:
            told = f"it scores items: more than {self.max_out_features} outputs"
            return PrecisionDecision(False, told)
        if layer.out_features < self.min_out_features:
            told = f"the last layer of a head: fewer than {self.min_out_features} outputs"
            return PrecisionDecision(False, told)
        return _by_size(layer.weight, self.min_weights)


#: What `swap` asks: of a layer's name and the layer.
Policy = Callable[[str, nn.Linear], PrecisionDecision]


def told_of_ties(policy: Policy, model: nn.Module) -> Policy:
    """The policy for the layers of a model, told of embeddings that have a layer's weight."""
    # A policy of the user's own decides alone.
    if not isinstance(policy, PrecisionPolicy):
        return policy
    if type(policy).__call__ is not PrecisionPolicy.__call__:
        return policy
    tied: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and weight is not None:
            tied.setdefault(_memory(weight), name)
    return lambda name, layer: policy(name, layer, tied.get(_memory(layer.weight)))


def _memory(tensor: torch.Tensor) -> int:
    """What two tensors have in common if one is the other, or a view of it."""
    return int(tensor.untyped_storage()._cdata)


def _by_size(weight: torch.Tensor, fewest: int | None) -> PrecisionDecision:
    isa = _instruction_set(weight.dtype)
    where = f"on {isa or 'this machine'}"
    if fewest is None:
        fewest = FEWEST_WEIGHTS.get((isa, weight.dtype))
    if fewest is None:
        told = f"no gain is known {where}"
        if isa in _MULTIPLY_FP32 and weight.dtype is torch.float32:
            told = f"no gain {where}, which multiplies fp32 whatever the operands are"
        return PrecisionDecision(False, told)
    count = weight.numel()
    if count < fewest:
        return PrecisionDecision(False, f"small: {count} weights, {where} it pays from {fewest} on")
    return PrecisionDecision(True, f"{count} weights, {where} it pays from {fewest} on")


def _instruction_set(dtype: torch.dtype) -> str:
    """What the CPU's kernels use for this dtype, "" if they do not run."""
    return backends.resolve(backends.Problem("linear", "cpu", dtype), "auto").variant
