"""The results as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich import box
from rich.table import Table

from seqkernels.demo.examples import FEATURES, MOVING
from seqkernels.demo.measure import CANDIDATES, Variant
from seqkernels.demo.results import signed

_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("runs on", lambda r: ", ".join(r["encoder"])),
    ("AUC", lambda r: f"{r['auc']:.5f}"),
    ("change of AUC", lambda r: signed(r["auc_change"])),
    ("log loss", lambda r: f"{r['log_loss']:.5f}"),
    ("change of log loss", lambda r: signed(r["log_loss_change"])),
    ("largest score change", lambda r: f"{r['score_change_max']:.5f}"),
    ("mean score change", lambda r: f"{r['score_change_mean']:.6f}"),
    ("stock's 10 best kept", lambda r: f"{r['top10_kept']:.1%}"),
    ("test set, s", lambda r: f"{r['test_set_seconds']:.3f}"),
    ("request p50, ms", lambda r: f"{r['request_ms_p50']:.2f}"),
    ("request p99, ms", lambda r: f"{r['request_ms_p99']:.2f}"),
)
#: What becomes of each when the feature that was constant in training moves.
_MOVED_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("largest normalized value, before", lambda r: f"{r['moved']['normed_before']:.2f}"),
    ("largest normalized value, moved", lambda r: f"{r['moved']['normed']:.2f}"),
    ("AUC before", lambda r: f"{r['auc']:.5f}"),
    ("AUC moved", lambda r: f"{r['moved']['auc']:.5f}"),
    ("log loss before", lambda r: f"{r['log_loss']:.5f}"),
    ("log loss moved", lambda r: f"{r['moved']['log_loss']:.5f}"),
    ("mean score change", lambda r: f"{r['moved']['score_change_mean']:.5f}"),
)
_COLOURS = ("#8d99ae", "#3a5a80", "#c1121f")


def table(results: dict[str, dict[str, Any]], title: str) -> Table:
    """One column for each variant."""
    first = next(iter(results.values()))
    passes, requests = len(first["test_set_seconds_all"]), len(first["request_ms_all"])
    caption = f"passes over the test set: {passes} (the median is shown); requests: {requests}"
    return _table(results, _ROWS, title, caption)


def moved_table(results: dict[str, dict[str, Any]]) -> Table:
    """What becomes of each variant when the feature that was constant in training moves."""
    title = f"The feature {FEATURES[MOVING]!r}, 0 in all of training, is 1 at serving"
    caption = "stock: torch.nn.BatchNorm1d; swapped: ResilientBatchNorm1d"
    return _table(results, _MOVED_ROWS, title, caption)


def _table(
    results: dict[str, dict[str, Any]],
    rows: Sequence[tuple[str, Callable[[dict[str, Any]], str]]],
    title: str,
    caption: str,
) -> Table:
    made = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        caption=caption,
        caption_justify="left",
    )
    made.add_column("")
    for result in results.values():
        made.add_column(result["label"], justify="right")
    for name, shown in rows:
        made.add_row(name, *(shown(result) for result in results.values()))
    return made


def plot(
    variants: Sequence[Variant], results: dict[str, dict[str, Any]], title: str, path: Path
) -> None:
    """Write a PNG: times, latency of requests, scores before and after, a feature that moves."""
    figure = Figure(figsize=(12.5, 8.4), layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    (times, latency), (scores, moved) = figure.subplots(2, 2)
    _times(times, results)
    _latency(latency, results)
    _scores(scores, variants, results)
    _moved(moved, variants, results)
    for axes in (times, latency, scores, moved):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _times(axes: Axes, results: dict[str, dict[str, Any]]) -> None:
    axes.set_title("Time for the test set (dots: each pass)", loc="left", fontsize=10)
    for row, (result, colour) in enumerate(zip(results.values(), _COLOURS, strict=False)):
        seconds = result["test_set_seconds"]
        passes = result["test_set_seconds_all"]
        axes.barh(row, seconds, 0.6, color=colour)
        axes.plot(passes, [row] * len(passes), "o", ms=3, color="black", alpha=0.5)
        axes.annotate(f"  {seconds:.2f} s", (max(passes), row), va="center", fontsize=9)
    axes.set_yticks(range(len(results)), [r["label"] for r in results.values()], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    longest = max(max(r["test_set_seconds_all"]) for r in results.values())
    axes.set_xlim(0, 1.2 * longest)


def _latency(axes: Axes, results: dict[str, dict[str, Any]]) -> None:
    axes.set_title("Requests answered within a time", loc="left", fontsize=10)
    for result, colour in zip(results.values(), _COLOURS, strict=False):
        ms = np.sort(result["request_ms_all"])
        share = np.arange(1, len(ms) + 1) / len(ms)
        label = f"{result['label']}: p50 {result['request_ms_p50']:.3g} ms"
        axes.step(ms, 100 * share, where="post", color=colour, lw=1.8, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"ms for one user with {CANDIDATES} candidates (log scale)")
    axes.set_ylabel("% of the requests")
    axes.set_ylim(0, 102)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.9, fontsize=8, loc="lower right")


def _scores(axes: Axes, variants: Sequence[Variant], results: dict[str, dict[str, Any]]) -> None:
    stock = variants[0]
    axes.set_title(f"Scores of the test set against {stock.label}", loc="left", fontsize=10)
    axes.axhline(0, color="black", lw=0.8)
    for variant, colour in zip(variants[1:], _COLOURS[1:], strict=False):
        axes.plot(
            stock.scores,
            variant.scores - stock.scores,
            ".",
            ms=3,
            mew=0,
            alpha=0.35,
            color=colour,
            label=f"{variant.label}: AUC {signed(results[variant.key]['auc_change'])}",
        )
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"score of {stock.label}, AUC {results[stock.key]['auc']:.5f}")
    axes.set_ylabel("change of the score")
    legend = axes.legend(frameon=False, fontsize=8, loc="upper left", markerscale=3)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)


def _moved(axes: Axes, variants: Sequence[Variant], results: dict[str, dict[str, Any]]) -> None:
    axes.set_title(
        f"{FEATURES[MOVING]!r}, constant in training, moves at serving", loc="left", fontsize=10
    )
    axes.plot([0, 1], [0, 1], color="black", lw=0.8)
    for variant, colour in zip(variants, _COLOURS, strict=False):
        moved = results[variant.key]["moved"]
        label = (
            f"{variant.label}: normalized to {moved['normed']:.3g}, "
            f"AUC {results[variant.key]['auc']:.3f} to {moved['auc']:.3f}"
        )
        axes.plot(
            variant.scores,
            variant.moved_scores,
            ".",
            ms=3,
            mew=0,
            alpha=0.35,
            color=colour,
            label=label,
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.25)
    axes.set_xlabel("score before")
    axes.set_ylabel("score after the feature moved")
    legend = axes.legend(frameon=False, fontsize=8, loc="upper left", markerscale=3)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
