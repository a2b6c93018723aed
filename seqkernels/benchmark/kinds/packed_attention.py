"""Torch's encoder around an attention library: packed sequences, unfused steps, bf16.

What a user of such a library writes: the valid events of all sequences are one row of tokens, so
that padding costs nothing, and every step but attention is torch's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkernels.benchmark.workload import Contestant, Runner, Task, Unavailable, Workload


class Packing(NamedTuple):
    """Where the valid events of a batch are; known on the host, as to whoever made the batch."""

    lengths: tuple[int, ...]
    starts: Tensor  # [B + 1] int32: of each sequence's tokens, and of what would come next
    events: Tensor  # [T] int64: each token's row of x as [B L, D]

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None) -> Packing:
        """Of events [B, L, D] and a mask [B, L], True = ignore."""
        batch, length, _ = x.shape
        valid = x.new_ones(batch, length, dtype=torch.bool) if mask is None else ~mask
        lengths = valid.sum(1)
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(tuple(lengths.tolist()), starts, valid.flatten().nonzero().squeeze(1))


#: Attention of packed tokens: q, k, v [T, H, head_dim] -> [T, H, head_dim].
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class PackedEncoder(nn.Module):
    """The function of a ``torch.nn.TransformerEncoder`` on the valid events; the rest is 0.

    Parameters
    ----------
    encoder : torch.nn.TransformerEncoder
        Whose parameters it has.
    packing : Packing
        Of the inputs it will be called with.
    attention : callable
        See `Attention`; of the same packing.
    """

    def __init__(
        self, encoder: nn.TransformerEncoder, packing: Packing, attention: Attention
    ) -> None:
        super().__init__()
        self.encoder, self.packing, self.attention = encoder, packing, attention

    def forward(self, src: Tensor) -> Tensor:
        """Return [B, L, D]."""
        d = src.shape[-1]
        x = src.reshape(-1, d)[self.packing.events]  # [T, D]
        for layer in self.encoder.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            if layer.norm_first:
                x = x + self._attend(layer, layer.norm1(x))
                x = x + self._feed_forward(layer, layer.norm2(x))
            else:
                x = layer.norm1(x + self._attend(layer, x))
                x = layer.norm2(x + self._feed_forward(layer, x))
        if self.encoder.norm is not None:
            x = self.encoder.norm(x)
        out = x.new_zeros(src.shape[0] * src.shape[1], d)
        out[self.packing.events] = x
        return out.view_as(src)

    def _attend(self, layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
        attention = layer.self_attn
        projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # [T, 3 D]
        q, k, v = projected.view(len(x), 3, attention.num_heads, -1).unbind(1)
        joined = self.attention(q, k, v).reshape(x.shape)
        result: Tensor = attention.out_proj(joined)
        return result

    def _feed_forward(self, layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
        activation: Any = layer.activation
        result: Tensor = layer.linear2(activation(layer.linear1(x)))
        return result


def flash_attention(library: Any, packing: Packing) -> Attention:
    """By ``flash_attn.flash_attn_varlen_func``."""
    starts, longest = packing.starts, max(packing.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = library.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest)
        return out

    return attend


def memory_efficient_attention(library: Any, packing: Packing) -> Attention:
    """By ``xformers.ops.memory_efficient_attention``."""
    mask_of = library.fmha.attn_bias.BlockDiagonalMask.from_seqlens
    bias = mask_of(packing.lengths, device=packing.starts.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = library.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)
        return out[0]

    return attend


class PackedAttention(Contestant[Task]):
    """Torch's encoder around the attention of another package.

    Parameters
    ----------
    name, title : str
    module : str
        The module of that package.
    make : callable
        Turns the module and a `Packing` into an `Attention`.
    """

    def __init__(
        self, name: str, title: str, module: str, make: Callable[[Any, Packing], Attention]
    ):
        self.name, self.title, self.module, self.make = name, title, module, make

    def prepare(self, task: Task, workload: Workload) -> Runner:
        """Pack the batch; none of these packages computes on a CPU."""
        try:
            library = importlib.import_module(self.module)
        except ImportError as error:
            raise Unavailable(str(error)) from None
        module, inputs = task.stock(torch.bfloat16).on(workload.device)
        assert isinstance(module, nn.TransformerEncoder)
        packing = Packing.of(inputs["src"], inputs.get("src_key_padding_mask"))
        packed = PackedEncoder(module, packing, self.make(library, packing))
        return Runner(lambda: packed(inputs["src"]), note="packed events")


FLASH = PackedAttention("flash_attn_bf16", "flash-attn bf16", "flash_attn", flash_attention)
XFORMERS = PackedAttention(
    "xformers_bf16", "xformers bf16", "xformers.ops", memory_efficient_attention
)
