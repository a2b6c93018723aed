"""The problems of the Triton kernels' tests: small ones, in which all pairs of options meet."""

from __future__ import annotations

import math
from typing import Any

import torch

from seqkernels.testing import EncoderCase
from tests.pairwise import pairwise_cases

# Interpreting takes milliseconds a program.
_FACTORS: dict[str, list[Any]] = {
    "shape": [  # d_model, nhead, dim_feedforward
        (96, 2, 32),  # three chunks of 32, heads of three chunks of 16
        (64, 1, 130),  # three blocks of feed-forward columns
        (160, 2, 48),  # loops over chunks, heads of 80
        (40, 2, 7),  # padded: 48, heads 32, feed-forward 16
        (130, 1, 16),
    ],
    "length": [1, 17, 40, 65, 133],
    "num_layers": [1, 2],
    "activation": ["relu", "gelu", "gelu_tanh", "leaky_relu"],
    "norm_first": [False, True],
    "weights": ["all", "no bias", "no affine", "final norm", "final norm, no bias"],
    "fusion": ["none", "concat", "append"],
    "padding": ["zero", "compute", "exclude"],
    "order": ["latest_first", "latest_last"],
    "summary": [(None, "none"), (8, "max"), (4, "none"), (135, "max")],
    "mask": ["none", "right", "left", "holes", "empty"],
    "mask_form": ["bool", "lengths"],
    "poison": [math.nan, math.inf],
    "scale": [1.0, 1e4, 1e-3],
    "dtype": [torch.float32, torch.bfloat16],
    "layout": ["contiguous", "strided", "transposed"],
}


def _legal(row: dict[str, Any]) -> bool:
    if row["padding"] == "exclude" and row["summary"][1] != "max":
        return False
    return row["mask_form"] != "lengths" or row["mask"] not in ("left", "holes")


def grid_cases() -> list[EncoderCase]:
    """The grid."""
    return pairwise_cases(_FACTORS, _legal, 60, batch=2)
