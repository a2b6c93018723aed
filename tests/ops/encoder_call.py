"""A call of the op with every argument, changed one at a time by the tests."""

from typing import Any

import torch
from torch import Tensor

from seqkernels import ops

D, HEADS, FF = 24, 2, 16


def weights(
    layers: int = 1, *, d: int = D, ff: int = FF, final_norm: bool = False, seed: int = 0
) -> list[Tensor | None]:
    """Weights of an encoder."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3 * d, d), (3 * d,), (d, d), (d,), (ff, d), (ff,), (d, ff), (d,), *[(d,)] * 4]
    flat: list[Tensor | None] = [
        0.3 * torch.randn(shape, generator=generator) for _ in range(layers) for shape in shapes
    ]
    if final_norm:
        flat += [torch.ones(d), torch.zeros(d)]
    return flat


def arguments(**changes: Any) -> dict[str, Any]:
    """All arguments of a legal call, with `changes`."""
    legal: dict[str, Any] = {
        "x": torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1)),
        "candidate": None,
        "weights": weights(),
        "key_padding_mask": None,
        "lengths": None,
        "nhead": HEADS,
        "activation": "relu",
        "negative_slope": 0.01,
        "norm_first": False,
        "layer_norm_eps": 1e-5,
        "final_norm_eps": 1e-5,
        "fusion": "none",
        "padding": "zero",
        "order": "latest_first",
        "latest_k": None,
        "pool": "none",
        "backend": "auto",
    }
    assert not changes.keys() - legal.keys()
    return legal | changes


def call(**changes: Any) -> Tensor:
    """The op, by keyword."""
    return ops.encoder(*arguments(**changes).values())
