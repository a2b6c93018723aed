"""Scores and times of the same model in several forms, taking turns on the same work."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seqkernels import backends
from seqkernels.demo.examples import LENGTH, Batch, Examples
from seqkernels.demo.model import log_odds_of_a_like

CANDIDATES = 256
BATCH = 256
_BLOCK = 10  # requests that one variant answers before the next has its turn
_MAX_ROUNDS = 5

Progress = Callable[[int, int], None]  # done, of how many


@dataclass
class Variant:
    """One form of the model, and what was measured of it.

    Attributes
    ----------
    key, label : str
        Its name in the results file, and in the table.
    model : torch.nn.Module
        In eval mode.
    encoder : set of str
        What ran it: "torch", or backends and instruction sets of this package.
    scores : float64 array [test set]
        Predicted probabilities of a like.
    test_seconds : list of float
        Of each pass over the test set.
    request_seconds : list of float
        Of each request.
    request_scores : float64 array [requests, candidates]
        Log-odds.
    moved_scores : float64 array [test set]
        As ``scores``, with the feature that was constant in training moved.
    normed, moved_normed : float
        Largest absolute value that the dense features' batch norm gave, for both.
    """

    key: str
    label: str
    model: nn.Module
    encoder: set[str] = field(default_factory=set)
    scores: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    test_seconds: list[float] = field(default_factory=list)
    request_seconds: list[float] = field(default_factory=list)
    request_scores: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    moved_scores: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    normed: float = 0.0
    moved_normed: float = 0.0


@contextmanager
def _serving() -> Iterator[None]:
    """Without gradients, and without garbage collection in the middle of a measurement."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            # Stock torch says of its own fast path that it is a prototype.
            warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
            yield
    finally:
        if collecting:
            gc.enable()


def scoring_batches(
    examples: Examples, rows: NDArray[np.int64], *, trim: bool = False
) -> list[Batch]:
    """A set of examples in batches, as long as the model allows or, with `trim`, as they need."""
    parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return [examples.batch(part, _length(examples, part, trim)) for part in parts]


def request_batches(
    examples: Examples,
    rows: NDArray[np.int64],
    count: int,
    random: np.random.Generator,
    *,
    trim: bool = False,
) -> list[Batch]:
    """Requests: a user as of a moment of the test set, and candidates drawn at random."""
    moments = random.choice(rows, count, replace=len(rows) < count)
    items = np.arange(1, examples.num_items)
    requests = []
    for row in moments:
        drawn = random.choice(items, CANDIDATES, replace=len(items) < CANDIDATES)
        one = examples.batch(row[None], _length(examples, row[None], trim))
        requests.append(one.for_candidates(torch.from_numpy(drawn)))
    return requests


def _length(examples: Examples, rows: NDArray[np.int64], trim: bool) -> int:
    return max(1, int(examples.lengths[rows].max())) if trim else LENGTH


def log_odds(model: nn.Module, work: Sequence[Batch]) -> NDArray[np.float64]:
    """All log-odds in order, without gradients."""
    with _serving():
        return np.concatenate([log_odds_of_a_like(model, b).double().numpy() for b in work])


def probabilities(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """What log-odds stand for; however large they are, nothing overflows."""
    return np.exp(-np.logaddexp(0.0, -log_odds))


def measure_moved_feature(variants: Sequence[Variant], work: Sequence[Batch]) -> None:
    """Score the test set as it is and with the feature that was constant in training moved.

    Parameters
    ----------
    variants : sequence of Variant
        Their ``moved_scores``, ``normed`` and ``moved_normed`` are set.
    work : sequence of Batch
        The test set.
    """
    moved = [batch.from_new_clients() for batch in work]
    for variant in variants:
        with _largest_output(variant.model.dense_norm) as largest:
            log_odds(variant.model, work)
            variant.normed = largest[0]
        with _largest_output(variant.model.dense_norm) as largest:
            variant.moved_scores = probabilities(log_odds(variant.model, moved))
            variant.moved_normed = largest[0]


@contextmanager
def _largest_output(norm: Any) -> Iterator[list[float]]:
    """Watch the largest absolute value a module returns."""
    largest = [0.0]

    def watch(module: nn.Module, inputs: object, out: Tensor) -> None:
        largest[0] = max(largest[0], float(out.abs().max()))

    handle = norm.register_forward_hook(watch)
    try:
        yield largest
    finally:
        handle.remove()


def measure_test_set(
    variants: Sequence[Variant],
    work: Sequence[Batch],
    *,
    seconds: float,
    progress: Progress = lambda done, total: None,
) -> None:
    """Score the test set with each variant, then time passes over it, the variants in turn.

    Parameters
    ----------
    variants : sequence of Variant
        Their ``scores``, ``encoder`` and ``test_seconds`` are set.
    work : sequence of Batch
        The test set.
    seconds : float
        About how long the timed passes may take together; each variant gets one at least.
    progress : callable
        Told after each pass: passes done, passes planned.
    """
    gc.collect()
    total = len(variants) * (1 + _MAX_ROUNDS)
    done = 0
    start = time.perf_counter()
    for variant in variants:
        before = backends.calls.copy()
        variant.scores = probabilities(log_odds(variant.model, work))
        variant.encoder = set(backends.calls - before) or {"torch"}
        done += 1
        progress(done, total)
    cost = time.perf_counter() - start
    rounds = min(_MAX_ROUNDS, max(1, int(seconds / cost)))
    total = len(variants) * (1 + rounds)
    for round_ in range(rounds):
        for variant in _rotated(variants, round_):
            with _serving():
                variant.model(*work[0])  # the threads of whoever came before go to sleep
                begin = time.perf_counter()
                for batch in work:
                    variant.model(*batch)
                variant.test_seconds.append(time.perf_counter() - begin)
            done += 1
            progress(done, total)


def measure_requests(
    variants: Sequence[Variant],
    requests: Sequence[Batch],
    *,
    seconds: float,
    progress: Progress = lambda done, total: None,
) -> None:
    """Time single requests, the variants in turn, a block of requests each.

    Parameters
    ----------
    variants : sequence of Variant
        Their ``request_seconds`` and ``request_scores`` are set.
    requests : sequence of Batch
        What is asked for; all variants answer the same ones.
    seconds : float
        After about this time no new block begins.
    progress : callable
        Told after each block: requests answered by all, requests planned.
    """
    gc.collect()
    scores: dict[str, list[NDArray[np.float64]]] = {v.key: [] for v in variants}
    start = time.perf_counter()
    for number, first in enumerate(range(0, len(requests), _BLOCK)):
        block = requests[first : first + _BLOCK]
        for variant in _rotated(variants, number):
            with _serving():
                variant.model(*block[0])  # as above
                for request in block:
                    begin = time.perf_counter()
                    result = log_odds_of_a_like(variant.model, request)
                    variant.request_seconds.append(time.perf_counter() - begin)
                    scores[variant.key].append(result.double().numpy())
        progress(min(first + _BLOCK, len(requests)), len(requests))
        if time.perf_counter() - start > seconds:
            break
    for variant in variants:
        variant.request_scores = np.stack(scores[variant.key])


def _rotated(variants: Sequence[Variant], by: int) -> Sequence[Variant]:
    """Each in another place from round to round, so that nobody always comes first."""
    by %= len(variants)
    return [*variants[by:], *variants[:by]]
