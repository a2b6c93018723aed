"""Training of the demo's ranker: plain torch, seeded, about a minute on two cores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

from seqkernels.demo.examples import Examples
from seqkernels.models import EngagementRanker

BATCH = 256
_LEARNING_RATE = 4e-3  # the peak, after a tenth of the steps; then it falls linearly
_WEIGHT_DECAY = 0.01
_BATCHES_SORTED = 50


@dataclass(frozen=True)
class Training:
    """How it went.

    Attributes
    ----------
    steps, planned_steps : int
        Steps done; fewer than planned if the time was up.
    seconds : float
        Time it took.
    loss : float
        Mean over the last tenth of the steps.
    """

    steps: int
    planned_steps: int
    seconds: float
    loss: float


def batches(
    examples: Examples, rows: NDArray[np.int64], random: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Shuffled batches of rows whose histories are about equally long, so that padding is short."""
    rows = random.permutation(rows)
    made = []
    for start in range(0, len(rows), _BATCHES_SORTED * BATCH):
        some = rows[start : start + _BATCHES_SORTED * BATCH]
        some = some[np.argsort(examples.lengths[some], kind="stable")]
        made += [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
    return [made[i] for i in random.permutation(len(made))]


def train(
    model: EngagementRanker,
    examples: Examples,
    rows: NDArray[np.int64],
    *,
    epochs: int,
    seconds: float,
    seed: int,
    progress: Callable[[int, int, float], None] = lambda done, planned, loss: None,
) -> Training:
    """Train in place; the same seed and number of threads give the same model.

    Parameters
    ----------
    model : EngagementRanker
        Left in eval mode.
    examples, rows : Examples, int64 array
        The training set.
    epochs : int
        Passes over it.
    seconds : float
        When they are over it stops, whatever is left to do.
    seed : int
        Of the order of batches and of dropout.
    progress : callable
        Told after each step: steps done, steps planned, the loss.
    """
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    planned = epochs * math.ceil(len(rows) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=planned + 1, pct_start=0.1, anneal_strategy="linear"
    )
    # [examples, heads]
    both = np.stack([examples.liked, examples.loved], axis=1)
    labels = torch.from_numpy(both.astype(np.float32))
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(losses) < planned:
            for some in batches(examples, rows, random):
                length = max(1, int(examples.lengths[some].max()))
                logits = model(*examples.batch(some, length))  # [B, heads]
                loss = binary_cross_entropy_with_logits(logits, labels[torch.from_numpy(some)])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress(len(losses), planned, losses[-1])
                if time.perf_counter() - start > seconds:
                    break
            else:
                continue
            break
    model.eval()
    return Training(
        steps=len(losses),
        planned_steps=planned,
        seconds=time.perf_counter() - start,
        loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
    )
