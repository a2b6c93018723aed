"""The weights of the op ``encoder``: their order, names and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqkernels.backends.weights import WeightLayout

PER_LAYER = 12
_LAYER_NAMES = (
    "self_attn.in_proj_weight",
    "self_attn.in_proj_bias",
    "self_attn.out_proj.weight",
    "self_attn.out_proj.bias",
    "linear1.weight",
    "linear1.bias",
    "linear2.weight",
    "linear2.bias",
    "norm1.weight",
    "norm1.bias",
    "norm2.weight",
    "norm2.bias",
)
_PROJECTIONS = (0, 2, 4, 6)  # these may not be absent


class EncoderShape(NamedTuple):
    """Sizes of an encoder, read from its weights."""

    d_model: int
    dim_feedforward: int
    num_layers: int
    has_final_norm: bool
    device: torch.device


def read_shape(weights: Sequence[Tensor | None]) -> EncoderShape:
    """Check an encoder's weights and return its sizes.

    Raises
    ------
    ValueError
        For a wrong number of weights, a missing projection, a wrong shape or mixed devices.
    TypeError
        For weights that are not floating.
    """
    num_layers, extra = divmod(len(weights), PER_LAYER)
    if num_layers == 0 or extra not in (0, 2):
        raise ValueError(
            f"encoder: weights: expected {PER_LAYER} per layer and 0 or 2 for the final norm, "
            f"got {len(weights)}"
        )
    first, first_linear = weights[0], weights[4]
    if first is None or first.dim() != 2 or first_linear is None or first_linear.dim() != 2:
        raise ValueError(
            "encoder: weights: expected matrices for in_proj_weight and linear1.weight, "
            f"got {_describe(first)} and {_describe(first_linear)}"
        )
    d, f, device = first.shape[1], first_linear.shape[0], first.device
    layer = ((3 * d, d), (3 * d,), (d, d), (d,), (f, d), (f,), (d, f), (d,), *[(d,)] * 4)
    for index, weight in enumerate(weights):
        n, i = divmod(index, PER_LAYER)
        in_layer = n < num_layers
        name = _name(index, len(weights))
        expected = layer[i] if in_layer else (d,)
        if weight is None:
            if in_layer and i in _PROJECTIONS:
                raise ValueError(f"encoder: weights: expected a tensor for {name}, got None")
            continue
        if weight.shape != expected:
            raise ValueError(
                f"encoder: weights: expected shape {expected} for {name}, got {_describe(weight)}"
            )
        if not weight.is_floating_point():
            raise TypeError(
                f"encoder: weights: expected a floating dtype for {name}, got {weight.dtype}"
            )
        if weight.device != device:
            raise ValueError(
                f"encoder: weights: expected {name} on {device} like the first one, "
                f"got {weight.device}"
            )
    return EncoderShape(d, f, num_layers, extra == 2, device)


def _name(index: int, count: int) -> str:
    n, i = divmod(index, PER_LAYER)
    if n < count // PER_LAYER:
        return f"layers.{n}.{_LAYER_NAMES[i]}"
    return ("norm.weight", "norm.bias")[i]


def _describe(weight: Tensor | None) -> str:
    return "None" if weight is None else str(tuple(weight.shape))


LAYOUT = WeightLayout("encoder", _name, read_shape)
