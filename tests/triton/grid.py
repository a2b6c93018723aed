"""The problems of the Triton kernels' tests: small ones, in which all pairs of options meet."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch

from seqkernels.testing import EncoderCase

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


def pairwise_cases() -> list[EncoderCase]:
    """Cases in which all pairs of legal values meet, chosen greedily and reproducibly."""
    chooser = random.Random(0)

    def rows() -> Iterator[tuple[tuple[str, int], ...]]:
        while True:
            row = tuple((name, chooser.randrange(len(v))) for name, v in _FACTORS.items())
            if _legal({name: _FACTORS[name][i] for name, i in row}):
                yield row

    def pairs(row: tuple[tuple[str, int], ...]) -> set[Any]:
        return set(itertools.combinations(row, 2))

    missing = set().union(*map(pairs, itertools.islice(rows(), 4000)))
    chosen = []
    while missing:
        best = max(itertools.islice(rows(), 60), key=lambda row: len(pairs(row) & missing))
        if pairs(best) & missing:
            missing -= pairs(best)
            chosen.append({name: _FACTORS[name][i] for name, i in best})
    return [_case(row, i) for i, row in enumerate(chosen)]


def _case(row: dict[str, Any], seed: int) -> EncoderCase:
    row = dict(row)
    row["d_model"], row["nhead"], row["dim_feedforward"] = row.pop("shape")
    row["latest_k"], row["pool"] = row.pop("summary")
    weights = row.pop("weights")
    return EncoderCase(
        **row,
        batch=2,
        bias="no bias" not in weights,
        affine=weights != "no affine",
        final_norm="final norm" in weights,
        negative_slope=0.2,
        layer_norm_eps=1e-5 if seed % 2 else 1e-2,
        final_norm_eps=1e-3,
        seed=seed,
    )
