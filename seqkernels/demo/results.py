"""What was measured becomes numbers: a JSON value that table, plot and summary are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

from seqkernels.demo.measure import CANDIDATES, Variant

AUC_BAR = 0.0002  # what a swap may change at most
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
        ``results[key]`` of each variant; ``verdict`` with the change of AUC, whether it is within
        `AUC_BAR`, and how many times as fast the last one is as each of the others.
    """
    stock = variants[0]
    results = {variant.key: _figures(variant, stock, liked) for variant in variants}
    swapped = results[variants[-1].key]
    verdict: dict[str, Any] = {
        "auc_change": swapped["auc_change"],
        "auc_bar": AUC_BAR,
        "within_auc_bar": abs(swapped["auc_change"]) <= AUC_BAR,
    }
    for what in ("test_set_seconds", "request_ms_p50", "request_ms_p99"):
        verdict[f"speedup_{what}"] = {
            v.key: results[v.key][what] / swapped[what] for v in variants[:-1]
        }
    return results, verdict


def _figures(variant: Variant, stock: Variant, liked: NDArray[np.bool_]) -> dict[str, Any]:
    auc = float(roc_auc_score(liked, variant.scores))
    change = np.abs(variant.scores - stock.scores)
    milliseconds = 1e3 * np.array(variant.request_seconds)
    p50, p99 = np.percentile(milliseconds, (50, 99))
    return {
        "label": variant.label,
        "encoder": sorted(variant.encoder),
        "auc": auc,
        "log_loss": float(log_loss(liked, variant.scores)),
        "auc_change": auc - float(roc_auc_score(liked, stock.scores)),
        "score_change_max": float(change.max()),
        "score_change_mean": float(change.mean()),
        "top10_kept": _top_kept(variant.request_scores, stock.request_scores),
        "test_set_seconds": float(np.median(variant.test_seconds)),
        "test_set_seconds_all": list(variant.test_seconds),
        "request_ms_p50": float(p50),
        "request_ms_p99": float(p99),
        "request_ms_all": milliseconds.tolist(),
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
    same = "the same" if verdict["within_auc_bar"] else "NOT the same"
    sentences.append(
        f"After the swap the AUC is {same}: it changes by {signed(swapped['auc_change'])} "
        f"({stock['auc']:.5f} to {swapped['auc']:.5f}; within {AUC_BAR}: "
        f"{'yes' if verdict['within_auc_bar'] else 'no'}), and no score by more than "
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
    return " ".join(sentences)


def signed(change: float) -> str:
    """A change of AUC with its sign, in millionths; no "-0".

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
