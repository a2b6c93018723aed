"""Weights of the encoder in the layouts the kernels read: padded to chunks, transposed, bf16.

Padding is zero everywhere, so padded columns of tokens stay zero through every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqkernels.backends.encoder_weights import PER_LAYER, EncoderShape
from seqkernels.backends.triton.configurations import Split


class PackedLayer(NamedTuple):
    """One layer; P = the padded model width, F = the padded feed-forward width, d = that of a head.

    Attributes
    ----------
    heads : Tensor
        bf16 [H, 3, P, d]: W_q, W_k, W_v of each head, transposed.
    head_biases : Tensor
        fp32 [H, 2, d]: b_q and b_v. b_k changes no result.
    matrices : Tensor
        bf16 [P P + P F + F P]: W_o, W_1, W_2, transposed.
    vectors : Tensor
        fp32 [6 P + F]: b_o, weight and bias of norm1, of norm2, b_2; b_1.
    """

    heads: Tensor
    head_biases: Tensor
    matrices: Tensor
    vectors: Tensor
    norm: Tensor  # fp32 [2, P], of norm1 for encoders that normalize first: a view of vectors


class PackedEncoder(NamedTuple):
    """All layers and the final norm, with how widths were cut."""

    layers: tuple[PackedLayer, ...]
    final_norm: Tensor  # fp32 [2, P]; not read without a final norm
    model: Split
    head: Split
    hidden: Split
    scale: float  # log2(e) / sqrt(head_dim)


def pack(
    weights: Sequence[Tensor | None],
    shape: EncoderShape,
    nhead: int,
    model: Split,
    head: Split,
    hidden: Split,
) -> PackedEncoder:
    """Pack the weights of the op ``encoder``."""
    with torch.no_grad():
        layers = tuple(
            _pack_layer(
                weights[i * PER_LAYER : (i + 1) * PER_LAYER], shape, nhead, model, head, hidden
            )
            for i in range(shape.num_layers)
        )
        last = shape.num_layers * PER_LAYER
        gain, offset = weights[last:] if shape.has_final_norm else (None, None)
        final_norm = torch.cat(_norm(gain, offset, shape, model.padded)).view(2, -1)
    scale = math.log2(math.e) / math.sqrt(shape.d_model // nhead)
    return PackedEncoder(layers, final_norm, model, head, hidden, scale)


def _pack_layer(
    layer: Sequence[Tensor | None],
    shape: EncoderShape,
    nhead: int,
    model: Split,
    head: Split,
    hidden: Split,
) -> PackedLayer:
    w_in, b_in, w_out, b_out, w1, b1, w2, b2, g1, c1, g2, c2 = layer
    d, f, device = shape.d_model, shape.dim_feedforward, shape.device
    width, p = d // nhead, model.padded
    assert w_in is not None
    assert w_out is not None
    assert w1 is not None
    assert w2 is not None

    heads = torch.zeros(nhead, 3, p, head.padded, dtype=torch.bfloat16, device=device)
    by_head = w_in.reshape(3, nhead, width, d)  # [3, H, head, D]
    heads[:, :, :d, :width] = by_head.permute(1, 0, 3, 2).to(torch.bfloat16)
    head_biases = torch.zeros(nhead, 2, head.padded, device=device)
    if b_in is not None:
        head_biases[:, :, :width] = b_in.reshape(3, nhead, width)[::2].transpose(0, 1).float()

    matrices = [
        _padded(w.t(), rows, columns)
        for w, rows, columns in (
            (w_out, p, p),
            (w1, p, hidden.padded),
            (w2, hidden.padded, p),
        )
    ]
    vectors = torch.cat(
        [
            _vector(b_out, d, p, 0.0, device),
            *_norm(g1, c1, shape, p),
            *_norm(g2, c2, shape, p),
            _vector(b2, d, p, 0.0, device),
            _vector(b1, f, hidden.padded, 0.0, device),
        ]
    )
    return PackedLayer(
        heads,
        head_biases,
        torch.cat([m.flatten() for m in matrices]),
        vectors,
        vectors[p : 3 * p],
    )


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    result = torch.zeros(rows, columns, dtype=torch.bfloat16, device=matrix.device)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix.to(torch.bfloat16)
    return result


def _norm(
    weight: Tensor | None, bias: Tensor | None, shape: EncoderShape, padded: int
) -> tuple[Tensor, Tensor]:
    d, device = shape.d_model, shape.device
    return _vector(weight, d, padded, 1.0, device), _vector(bias, d, padded, 0.0, device)


def _vector(
    given: Tensor | None, width: int, padded: int, absent: float, device: torch.device
) -> Tensor:
    result = torch.zeros(padded, device=device)
    result[:width] = absent if given is None else given.float()
    return result
