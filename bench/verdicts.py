"""The bars of the registry held against measured comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.registry import AMX_ERROR_LIMIT, LINEAR_BATCHES, LINEAR_LIMIT, REGISTRY, Bar
from seqkernels.benchmark import KINDS, EncoderWorkload, Workload

Comparisons = dict[str, dict[str, Any]]  # by the workload's id


@dataclass(frozen=True)
class Verdict:
    """One bar, what was measured, and whether it was cleared."""

    workload: str
    bar: str
    measured: str
    met: bool


def judge(comparisons: Comparisons) -> list[Verdict]:
    """All verdicts that these comparisons allow, in the order of the registry."""
    verdicts = []
    for entry in REGISTRY:
        comparison = comparisons.get(entry.workload.id)
        if comparison is not None:
            verdicts += [_judge(comparison, bar) for bar in entry.bars]
    return verdicts + _linear(comparisons) + _error(comparisons)


def is_amx(comparison: dict[str, Any]) -> bool:
    """Whether seqkernels ran on AMX."""
    return bool(comparison["variant"] == "cpu/amx_bf16")


def _judge(comparison: dict[str, Any], bar: Bar) -> Verdict:
    limit = bar.amx if is_amx(comparison) else bar.otherwise
    name = comparison["workload"]["id"]
    if bar.quantity == "speedup":
        peer = bar.over or comparison["fastest_peer"]
        asked = f"at least {limit:g} x {bar.over or 'the fastest peer'}"
        if peer not in comparison["results"]:
            why = comparison["absent"].get(peer, "no peer was timed")
            return Verdict(name, asked, f"nothing: {why}", False)
        result = comparison["results"][peer]
        s = result["speedup"]
        measured = f"{s['median']:.2f} ({s['q20']:.2f} to {s['q80']:.2f}) x {result['title']}"
        return Verdict(name, asked, measured, s["median"] >= limit)
    if bar.quantity == "time":
        return _judge_time(comparison, bar, limit)
    if bar.quantity == "workspace_bytes":
        value = comparison["workspace_bytes"]
        asked = f"at most {limit / 1024:.0f} KB a thread beyond output and packed weights"
        if value is None:
            return Verdict(name, asked, "nothing: no native kernel ran", False)
        return Verdict(name, asked, f"{value / 1024:.0f} KB", value <= limit)
    assert bar.quantity == "outside_kernel", bar.quantity
    spread = comparison["outside_kernel"]
    asked = f"at most {limit * 1e6:.0f} us outside the kernel"
    if spread is None:
        return Verdict(name, asked, "nothing: no native kernel ran", False)
    low, median, high = (spread[q] * 1e6 for q in ("q20", "median", "q80"))
    return Verdict(name, asked, f"{median:.1f} us ({low:.1f} to {high:.1f})", median <= limit * 1e6)


def _judge_time(comparison: dict[str, Any], bar: Bar, limit: float) -> Verdict:
    name, results = comparison["workload"]["id"], comparison["results"]
    rivals = kind_of(comparison).rivals
    assert bar.over is not None
    asked = f"{rivals[bar.of].title}: at most {limit:g} x the time of a {rivals[bar.over].title}"
    for needed in (bar.of, bar.over):
        if needed not in results:
            why = comparison["absent"].get(needed, f"{needed} was not timed")
            return Verdict(name, asked, f"nothing: {why}", False)
    s = results[bar.over]["speedup_of"][bar.of]
    low, median, high = 1 / s["q80"], 1 / s["median"], 1 / s["q20"]
    return Verdict(name, asked, f"{median:.2f} ({low:.2f} to {high:.2f}) x", median <= limit)


def _linear(comparisons: Comparisons) -> list[Verdict]:
    small, large = LINEAR_BATCHES
    names = [f"batch/{b}" for b in LINEAR_BATCHES]
    if any(name not in comparisons for name in names):
        return []
    per_sequence = [seconds_each(comparisons[name], "seqkernels") for name in names]
    growth = per_sequence[1] / per_sequence[0]
    return [
        Verdict(
            f"batch/{small}, batch/{large}",
            f"time linear in B: a sequence takes at most {LINEAR_LIMIT:g} times as long at B = "
            f"{large} as at B = {small}",
            f"{growth:.2f} times",
            growth <= LINEAR_LIMIT,
        )
    ]


def _error(comparisons: Comparisons) -> list[Verdict]:
    ratios = [
        c["results"]["seqkernels"]["accuracy"][key]
        for c in comparisons.values()
        if is_amx(c) and kind_of(c) is EncoderWorkload
        for key in ("max_ratio", "mean_ratio")
    ]
    if not ratios:
        return []
    return [
        Verdict(
            "all encoders on AMX",
            f"error against fp64 at most {AMX_ERROR_LIMIT:g} x that of torch's own bf16 run",
            f"{max(ratios):.2f} x, largest and mean error, all workloads",
            max(ratios) <= AMX_ERROR_LIMIT,
        )
    ]


def kind_of(comparison: dict[str, Any]) -> type[Workload]:
    """Of its workload; results files were once of encoders alone and did not tell."""
    return KINDS[comparison["workload"].get("kind", "encoder")]


def sharers(comparison: dict[str, Any]) -> int:
    """Among how many sequences, or what else its kind counts, the time of a call is shared out."""
    return int(comparison["workload"]["batch"]) if kind_of(comparison).per else 1


def seconds_each(comparison: dict[str, Any], contestant: str, at: str = "median") -> float:
    """Its time for a call, shared out."""
    seconds: float = comparison["results"][contestant]["time"][at]
    return seconds / sharers(comparison)
