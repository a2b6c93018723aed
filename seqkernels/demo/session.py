"""The demo from data to verdict: what ``python -m seqkernels demo`` does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sklearn.metrics import roc_auc_score

import seqkernels
from seqkernels.benchmark.machine import machine_info
from seqkernels.demo import measure, show
from seqkernels.demo.data import LIKED, LOVED, TERMS, Ratings, download, load
from seqkernels.demo.examples import LENGTH, Examples, Split, prepare
from seqkernels.demo.measure import Variant
from seqkernels.demo.model import ranker
from seqkernels.demo.results import figures, summary
from seqkernels.demo.training import Training, train
from seqkernels.models import EngagementRanker, stock_twin

_TEST_SECONDS = 30.0  # of timed passes over the test set
_REQUEST_SECONDS = 40.0


def demonstrate(arguments: argparse.Namespace) -> None:
    """Train, swap, measure and show; the arguments are those of the command."""
    console = Console(highlight=False)
    start = time.perf_counter()
    ratings, name = _ratings(arguments, console)
    examples, split = prepare(ratings)
    console.print(
        f"{len(ratings):,} ratings by {ratings.num_users:,} users of {ratings.num_items:,} items, "
        f"split by time: {len(split.train):,} to train, {len(split.validation):,} to validate, "
        f"{len(split.test):,} to test. An example is a user's up to {LENGTH} earlier ratings and a "
        f"candidate item; its labels, whether the rating was {LIKED:g} or more (shown below) and "
        f"whether it was {LOVED:g}.\n"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        model = ranker(examples)
    training = _train(model, examples, split, arguments, console)

    # What the swapped model is compared with: the same weights in modules of torch.nn, and what one
    # would do without this package, that model in bf16.
    stock, stock_bf16 = stock_twin(model), stock_twin(model).bfloat16()
    report = seqkernels.swap(model)
    console.print(str(report), markup=False, soft_wrap=True)
    console.print()
    variants = [
        Variant("stock_fp32", "stock fp32", stock),
        Variant("stock_bf16", "stock bf16", stock_bf16),
        Variant("swapped", "swapped", model),
    ]
    _measure(variants, examples, split, arguments, console)

    results, verdict = figures(variants, examples.liked[split.test])
    machine = {**machine_info(), "threads": torch.get_num_threads()}
    title = f"{name} on {machine['processor']}, torch threads: {machine['threads']}"
    console.print(show.table(results, title))
    console.print()
    console.print(show.moved_table(results))
    console.print()
    console.print(summary(results, verdict))
    whole = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "data": _describe(name, ratings, examples, split),
        "training": dataclasses.asdict(training),
        "swap": {
            "replaced": [dataclasses.asdict(r) for r in report.replaced],
            "skipped": [dataclasses.asdict(s) for s in report.skipped],
        },
        "test_set_batch": measure.BATCH,
        "request_candidates": measure.CANDIDATES,
        "results": results,
        "verdict": verdict,
        "seconds": time.perf_counter() - start,
    }
    for path in (arguments.json, arguments.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
    show.plot(variants, results, title, arguments.plot)
    console.print(
        f"\nDone in {time.perf_counter() - start:.0f} s. Results: {arguments.json}, picture: "
        f"{arguments.plot}",
        soft_wrap=True,
    )


def _ratings(arguments: argparse.Namespace, console: Console) -> tuple[Ratings, str]:
    """The ratings, and what to call them."""
    if arguments.data is not None:
        console.print(f"If {arguments.data} is MovieLens data, these are its terms of use.")
    console.print(TERMS, style="dim")
    console.print()
    if arguments.data is not None:
        return load(arguments.data), arguments.data.name
    console.print("Reading MovieLens-100K (the first time, 2 MB are downloaded) ...")
    return download(), "MovieLens-100K"


def _train(
    model: EngagementRanker,
    examples: Examples,
    split: Split,
    arguments: argparse.Namespace,
    console: Console,
) -> Training:
    with _progress(console, "training", "loss {task.fields[loss]:.3f}") as progress:
        task = progress.add_task("", total=None, loss=float("nan"))
        training = train(
            model,
            examples,
            split.train,
            epochs=arguments.epochs,
            seconds=arguments.seconds,
            seed=arguments.seed,
            progress=lambda done, total, loss: progress.update(
                task, completed=done, total=total, loss=loss, refresh=True
            ),
        )
    scores = measure.log_odds(model, measure.scoring_batches(examples, split.validation))
    auc = float(roc_auc_score(examples.liked[split.validation], scores))
    cut = "" if training.steps == training.planned_steps else ", cut short by --seconds"
    console.print(
        f"Trained {training.steps} of {training.planned_steps} steps in {training.seconds:.0f} s"
        f"{cut}: loss {training.loss:.4f}, AUC on the validation set {auc:.4f}.\n"
    )
    return training


def _measure(
    variants: list[Variant],
    examples: Examples,
    split: Split,
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    work = measure.scoring_batches(examples, split.test, trim=arguments.trim)
    requests = measure.request_batches(
        examples,
        split.test,
        arguments.requests,
        np.random.default_rng(arguments.seed),
        trim=arguments.trim,
    )
    with _progress(console, "scoring the test set") as progress:
        task = progress.add_task("", total=None)
        measure.measure_test_set(
            variants,
            work,
            seconds=_TEST_SECONDS,
            progress=lambda done, total: progress.update(
                task, completed=done, total=total, refresh=True
            ),
        )
    measure.measure_moved_feature(variants, work)
    with _progress(console, f"requests of 1 user x {measure.CANDIDATES} candidates") as progress:
        task = progress.add_task("", total=None)
        measure.measure_requests(
            variants,
            requests,
            seconds=_REQUEST_SECONDS,
            progress=lambda done, total: progress.update(
                task, completed=done, total=total, refresh=True
            ),
        )
    console.print()


def _progress(console: Console, name: str, extra: str = "") -> Progress:
    columns = [
        TextColumn(name),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn(extra),
    ]
    # Refreshed from this thread alone: a second one would compete with what is timed.
    return Progress(*columns, console=console, auto_refresh=False)


def _describe(name: str, ratings: Ratings, examples: Examples, split: Split) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": name,
        "ratings": len(ratings),
        "users": ratings.num_users,
        "items": ratings.num_items,
    }
    for field in dataclasses.fields(split):
        rows = getattr(split, field.name)
        described[field.name] = {
            "examples": len(rows),
            "likes": float(examples.liked[rows].mean()),
            "mean_history": float(examples.lengths[rows].mean()),
            "without_history": int((examples.lengths[rows] == 0).sum()),
            "first_time": float(examples.time[rows].min()),
            "last_time": float(examples.time[rows].max()),
        }
    return described
