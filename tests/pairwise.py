"""Encoder problems in which all pairs of options meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from seqkernels.testing import EncoderCase

Row = dict[str, Any]  # one value of each factor


def pairwise_cases(
    factors: dict[str, list[Any]], legal: Callable[[Row], bool], tries: int, **fixed: Any
) -> list[EncoderCase]:
    """Cases in which all pairs of legal values meet, chosen greedily and reproducibly.

    Of `tries` drawn rows the one with the most pairs not seen yet is taken. `fixed` is the same in
    all cases. The factors "shape" (d_model, nhead, dim_feedforward), "summary" (latest_k, pool) and
    "weights" stand for several fields of a case, any other for its own.
    """
    chooser = random.Random(0)

    def rows() -> Iterator[tuple[tuple[str, int], ...]]:
        while True:
            row = tuple((name, chooser.randrange(len(v))) for name, v in factors.items())
            if legal({name: factors[name][i] for name, i in row}):
                yield row

    def pairs(row: tuple[tuple[str, int], ...]) -> set[Any]:
        return set(itertools.combinations(row, 2))

    missing = set().union(*map(pairs, itertools.islice(rows(), 4000)))
    chosen = []
    while missing:
        best = max(itertools.islice(rows(), tries), key=lambda row: len(pairs(row) & missing))
        if pairs(best) & missing:
            missing -= pairs(best)
            chosen.append({name: factors[name][i] for name, i in best})
    return [_case(row | fixed, i) for i, row in enumerate(chosen)]


def _case(row: Row, seed: int) -> EncoderCase:
    row["d_model"], row["nhead"], row["dim_feedforward"] = row.pop("shape")
    row["latest_k"], row["pool"] = row.pop("summary")
    weights = row.pop("weights")
    return EncoderCase(
        **row,
        bias="no bias" not in weights,
        affine=weights != "no affine",
        final_norm="final norm" in weights,
        negative_slope=0.2,
        layer_norm_eps=1e-5 if seed % 2 else 1e-2,
        final_norm_eps=1e-3,
        seed=seed,
    )
