"""The tensors of the op ``linear``: their order, names and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqkernels.backends.weights import WeightLayout

NAMES = (
    "weight",
    "bias",
    *(
        f"{norm}.{n}"
        for norm in ("input_norm", "output_norm")
        for n in ("mean", "var", "weight", "bias")
    ),
)
INPUT_NORM, OUTPUT_NORM = slice(2, 6), slice(6, 10)


class LinearShape(NamedTuple):
    """Sizes of a linear layer, read from its tensors."""

    in_features: int
    out_features: int
    has_input_norm: bool
    has_output_norm: bool
    device: torch.device


def read_shape(tensors: Sequence[Tensor | None]) -> LinearShape:
    """Check a layer's tensors and return its sizes.

    Raises
    ------
    ValueError
        For a wrong number of tensors, a missing one, a wrong shape or mixed devices.
    TypeError
        For tensors that are not floating.
    """
    if len(tensors) != len(NAMES):
        raise ValueError(
            f"linear: weights: expected {len(NAMES)} ({', '.join(NAMES)}), got {len(tensors)}"
        )
    weight = tensors[0]
    if weight is None or weight.dim() != 2 or 0 in weight.shape:
        got = "None" if weight is None else str(tuple(weight.shape))
        raise ValueError(f"linear: weights: expected a matrix [F, K] for weight, got {got}")
    f, k = weight.shape
    has_input_norm = _check_norm(tensors, INPUT_NORM, k, weight.device)
    has_output_norm = _check_norm(tensors, OUTPUT_NORM, f, weight.device)
    _check("weight", weight, (f, k), weight.device)
    _check("bias", tensors[1], (f,), weight.device)
    return LinearShape(k, f, has_input_norm, has_output_norm, weight.device)


def _check_norm(
    tensors: Sequence[Tensor | None], which: slice, width: int, device: torch.device
) -> bool:
    """Check a norm's tensors; whether there is one."""
    norm, names = tensors[which], NAMES[which]
    given = [t is not None for t in norm]
    if any(given) and not all(given[:2]):
        missing = names[given.index(False)]
        raise ValueError(f"linear: weights: expected a tensor for {missing}, got None")
    for name, t in zip(names, norm, strict=True):
        _check(name, t, (width,), device)
    return any(given)


def _check(name: str, t: Tensor | None, expected: tuple[int, ...], device: torch.device) -> None:
    if t is None:
        return
    if t.shape != expected:
        raise ValueError(
            f"linear: weights: expected shape {expected} for {name}, got {tuple(t.shape)}"
        )
    if not t.is_floating_point():
        raise TypeError(f"linear: weights: expected a floating dtype for {name}, got {t.dtype}")
    if t.device != device:
        raise ValueError(
            f"linear: weights: expected {name} on {device} like weight, got {t.device}"
        )


LAYOUT = WeightLayout("linear", lambda index, count: NAMES[index], read_shape, slice(2, 10))
