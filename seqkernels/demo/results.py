"""What was measured becomes numbers: a JSON value that table, plot and summary are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

from seqkernels.demo.measure import CANDIDATES, Variant

BAR = 0.0002  # what a swap may change AUC and log loss at most
_TOP = 10


def figures(
    variants: Sequence[Variant], liked: NDArray[np.bool_]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """All figures of the variants, and the verdict on the last one against the first.

    Parameters
    ----------
    variants : sequence of Variant
        Measured; changes are relative to the first.
    liked : bool array [test set]
        The labels.

    Returns
    -------
    results, verdict : dict
        ``results[key]`` of each variant; ``verdict`` with the changes of AUC and log loss, whether
        both are within `BAR`, and how many times as fast the last one is as each of the others.
    """
    stock = variants[0]
    results = {variant.key: _figures(variant, stock, liked) for variant in variants}
    swapped = results[variants[-1].key]
    verdict: dict[str, Any] = {
        "auc_change": swapped["auc_change"],
        "log_loss_change": swapped["log_loss_change"],
        "bar": BAR,
        "within_bar": max(abs(swapped["auc_change"]), abs(swapped["log_loss_change"])) <= BAR,
    }
    for what in ("test_set_seconds", "request_ms_p50", "request_ms_p99"):
        verdict[f"speedup_{what}"] = {
            v.key: results[v.key][what] / swapped[what] for v in variants[:-1]
        }
    return results, verdict


def _figures(variant: Variant, stock: Variant, liked: NDArray[np.bool_]) -> dict[str, Any]:
    auc = float(roc_auc_score(liked, variant.scores))
    loss, stock_loss = (float(log_loss(liked, v.scores)) for v in (variant, stock))
    change = np.abs(variant.scores - stock.scores)
    milliseconds = 1e3 * np.array(variant.request_seconds)
    p50, p99 = np.percentile(milliseconds, (50, 99))
    return {
        "label": variant.label,
        "encoder": sorted(variant.encoder),
        "auc": auc,
        "log_loss": loss,
        "auc_change": auc - float(roc_auc_score(liked, stock.scores)),
        "log_loss_change": loss - stock_loss,
        "score_change_max": float(change.max()),
        "score_change_mean": float(change.mean()),
        "top10_kept": _top_kept(variant.request_scores, stock.request_scores),
        "test_set_seconds": float(np.median(variant.test_seconds)),
        "test_set_seconds_all": list(variant.test_seconds),
        "request_ms_p50": float(p50),
        "request_ms_p99": float(p99),
        "request_ms_all": milliseconds.tolist(),
        "moved": {
            "auc": float(roc_auc_score(liked, variant.moved_scores)),
            "log_loss": float(log_loss(liked, variant.moved_scores)),
            "normed_before": variant.normed,
            "normed": variant.moved_normed,
            "score_change_mean": float(np.abs(variant.moved_scores - variant.scores).mean()),
        },
    }


def _top_kept(scores: NDArray[np.float64], stock: NDArray[np.float64]) -> float:
    """Share of the stock model's ten best candidates that are among this one's ten best."""
    kept = [
        len(set(_best(mine)) & set(_best(theirs))) / _TOP
        for mine, theirs in zip(scores, stock, strict=True)
    ]
    return float(np.mean(kept))


def _best(scores: NDArray[np.float64]) -> list[int]:
    best: list[int] = np.argsort(-scores, kind="stable")[:_TOP].tolist()
    return best


def summary(results: dict[str, dict[str, Any]], verdict: dict[str, Any]) -> str:
    """What it all means, in a few plain sentences.

    Parameters
    ----------
    results, verdict : dict
        As `figures` returns them; the first result is the stock model, the last the swapped one.
    """
    keys = list(results)
    stock, swapped = results[keys[0]], results[keys[-1]]
    sentences = []
    if swapped["encoder"] in (["torch"], ["reference"]):
        sentences.append(
            "The fused kernel did not run here (`python -m seqkernels info` says why), so both "
            "columns are plain PyTorch."
        )
    same = "as good as before" if verdict["within_bar"] else "NOT as good as before"
    sentences.append(
        f"After the swap the model is {same}: its AUC changes by {signed(swapped['auc_change'])} "
        f"({stock['auc']:.5f} to {swapped['auc']:.5f}), its log loss by "
        f"{signed(swapped['log_loss_change'])} (within {BAR}: "
        f"{'yes' if verdict['within_bar'] else 'no'}), and no score by more than "
        f"{swapped['score_change_max']:.4f}."
    )
    times = verdict["speedup_test_set_seconds"]
    sentences.append(
        "It scores the test set "
        + ", and ".join(f"{_faster(times[k])} {results[k]['label']}" for k in keys[:-1])
        + f"; a request of 1 user x {CANDIDATES} candidates takes "
        f"{swapped['request_ms_p50']:.3g} ms instead of {stock['request_ms_p50']:.3g} (p50), "
        f"{swapped['request_ms_p99']:.3g} instead of {stock['request_ms_p99']:.3g} (p99)."
    )
    moved, bounded = stock["moved"], swapped["moved"]
    sentences.append(
        "When the feature that was constant in training moves from 0 to 1, stock batch norm turns "
        f"it into {moved['normed']:.0f} standard deviations and the AUC goes from "
        f"{stock['auc']:.3f} to {moved['auc']:.3f} (log loss {moved['log_loss']:.2f}); "
        f"the resilient one stays within {bounded['normed']:.1f}, with an AUC of "
        f"{bounded['auc']:.3f} (log loss {bounded['log_loss']:.2f})."
    )
    return " ".join(sentences)


def signed(change: float) -> str:
    """A change of AUC or log loss with its sign, in millionths; no "-0".

    Examples
    --------
    >>> signed(2.54e-6), signed(-1e-9)
    ('+0.000003', '+0.000000')
    """
    return f"{round(change, 6) + 0.0:+.6f}"


def _faster(times: float) -> str:
    if times >= 1.05:
        return f"{times:.1f} times as fast as"
    if times > 0.95:
        return "as fast as"
    return f"slower, in {1 / times:.1f} times the time of"
