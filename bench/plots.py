"""Plots of a results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.floor import Machine
from bench.verdicts import Comparisons, seconds_each, sharers
from seqkernels.benchmark import EncoderWorkload, RequestWorkload

mpl.use("Agg")  # no display is needed

RIVALS = EncoderWorkload.rivals
COLOURS = {
    "seqkernels": "#c1121f",
    "seqkernels_bf16": "#f28482",
    "seqkernels_kernel": "#780000",
    "eager_fp32": "#8d99ae",
    "eager_bf16": "#3a5a80",
    "eager_bf16_padded": "#98c1d9",
    "seqkernels_forward": "#780000",
    "autocast_bf16": "#98c1d9",
    "compile_bf16": "#2a9d8f",
    "openvino_bf16": "#e9a03b",
}


def draw(comparisons: Comparisons, floors: Machine | None, folder: Path) -> list[tuple[str, Path]]:
    """Write the plots that these comparisons allow; return titles and files."""
    figures = {
        "time_by_length": _sweep(comparisons, floors, "length", "events a sequence, L"),
        "time_by_batch": _sweep(comparisons, floors, "batch", "sequences a call, B"),
        "padding": _padding(comparisons),
        "request": _request(comparisons),
        "request_stages": _request_stages(comparisons),
        "floor": _floor(comparisons, floors),
    }
    written = []
    for name, made in figures.items():
        if made is None:
            continue
        title, figure = made
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        written.append((title, path))
    return written


def _figure(title: str, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _sweep(
    comparisons: Comparisons, floors: Machine | None, key: str, label: str
) -> tuple[str, Figure] | None:
    swept = sorted(
        (c for c in comparisons.values() if c["workload"]["group"] == key),
        key=lambda c: c["workload"][key],
    )
    if len(swept) < 2:
        return None
    title = f"Time a sequence against {label}"
    figure, axes = _figure(title)
    for name in RIVALS:
        there = [c for c in swept if name in c["results"]]
        if not there:
            continue
        x = [c["workload"][key] for c in there]
        low, y, high = (
            [1e6 * seconds_each(c, name, at) for c in there] for at in ("q20", "median", "q80")
        )
        axes.plot(x, y, "o-", ms=3.5, color=COLOURS[name], label=RIVALS[name].title)
        axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    known = [(c, floors.floor(c)) for c in swept] if floors else []
    line = [(c["workload"][key], 1e6 * f / sharers(c)) for c, f in known if f]
    if line:
        axes.plot(*zip(*line, strict=True), "--", color="black", lw=1, label="floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([c["workload"][key] for c in swept])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("us a sequence (band: 20 to 80 %)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return title, figure


#: One user with 100 events, more and more candidates.
REQUESTS = ("request/n1", "request/n16", "request/n256-100of100", "request/n1024")


def _request(comparisons: Comparisons) -> tuple[str, Figure] | None:
    swept = [comparisons[name] for name in REQUESTS if name in comparisons]
    if len(swept) < 2:
        return None
    title = "One user with 100 events: time a candidate against candidates a request"
    figure, axes = _figure(title)
    for name, rival in RequestWorkload.rivals.items():
        there = [c for c in swept if name in c["results"]]
        if not there:
            continue
        low, y, high = (
            [1e6 * seconds_each(c, name, at) for c in there] for at in ("q20", "median", "q80")
        )
        x = [c["workload"]["batch"] for c in there]
        axes.plot(x, y, "o-", ms=3.5, color=COLOURS[name], label=rival.title)
        axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set_xticks([c["workload"]["batch"] for c in swept])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("candidates a request, N")
    axes.set_ylabel("us a candidate (band: 20 to 80 %)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return title, figure


def _request_stages(comparisons: Comparisons) -> tuple[str, Figure] | None:
    """Stages by difference: of one layer a line over N, of two layers what comes on top."""
    swept = [comparisons[name] for name in REQUESTS if name in comparisons]
    one, many = (comparisons.get(f"request/{n}-layer1") for n in ("n1", "n1024"))
    if not swept or one is None or many is None:
        return None
    fewest, most = one["workload"]["batch"], many["workload"]["batch"]
    if fewest == most:
        return None  # as small as in tests
    title = "One user with 100 events: where the time of a request goes"
    figure, axes = _figure(title)
    first, last = (c["workload"]["batch"] * seconds_each(c, "seqkernels") for c in (one, many))
    per_candidate = (last - first) / (most - fewest)
    stages: dict[str, list[float]] = {
        "call and user's part": [],
        "first layer of the candidates": [],
        "second layer": [],
    }
    for c in swept:
        count = c["workload"]["batch"]
        whole = count * seconds_each(c, "seqkernels")
        layer = count * per_candidate
        for share, part in zip(
            stages.values(),
            (first - fewest * per_candidate, layer, whole - first - layer + fewest * per_candidate),
            strict=True,
        ):
            share.append(100.0 * part / whole)
    labels = [f"{c['workload']['batch']}" for c in swept]
    below = [0.0] * len(swept)
    colours = ("seqkernels_forward", "eager_fp32", "seqkernels")
    for (name, shares), colour in zip(stages.items(), colours, strict=True):
        axes.bar(labels, shares, 0.6, bottom=below, color=COLOURS[colour], label=name)
        below = [b + s for b, s in zip(below, shares, strict=True)]
    axes.set_xlabel("candidates a request, N")
    axes.set_ylabel("% of the request")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return title, figure


def _padding(comparisons: Comparisons) -> tuple[str, Figure] | None:
    pair = [comparisons.get(f"transact/{kind}") for kind in ("dense", "masked")]
    both = [c for c in pair if c is not None]
    if len(both) < 2:
        return None
    title = "Time a sequence, TransAct shape: all events valid, and 20 to 100 of 100"
    figure, axes = _figure(title)
    names = [n for n in RIVALS if any(n in c["results"] for c in both)]
    for side, (c, kind) in enumerate(zip(both, ("dense", "masked"), strict=True)):
        for row, name in enumerate(names):
            if name not in c["results"]:
                continue
            low, y, high = (1e6 * seconds_each(c, name, at) for at in ("q20", "median", "q80"))
            axes.barh(
                row + (side - 0.5) * 0.38,
                y,
                0.36,
                xerr=[[y - low], [high - y]],
                color=COLOURS[name],
                alpha=1.0 if side == 0 else 0.6,
                error_kw={"lw": 0.8},
            )
            axes.annotate(
                f" {kind} {y:.0f}",
                (high, row + (side - 0.5) * 0.38),
                va="center",
                fontsize=7,
            )
    axes.set_yticks(range(len(names)), [RIVALS[n].title for n in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("us a sequence (lines: 20 to 80 %)")
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    return title, figure


def _floor(comparisons: Comparisons, floors: Machine | None) -> tuple[str, Figure] | None:
    if floors is None:
        return None
    rows: list[tuple[str, float, float]] = []
    for name, c in comparisons.items():
        floor = floors.floor(c)
        if floor is not None:
            rows.append((name, floor, c["results"]["seqkernels"]["time"]["median"]))
    if not rows:
        return None
    title = "Time of seqkernels over the floor of its multiply-accumulates"
    figure, axes = _figure(title, height=1.2 + 0.2 * len(rows))
    distances: list[Any] = [measured / floor for _, floor, measured in rows]
    axes.barh(range(len(rows)), distances, color=COLOURS["seqkernels"], height=0.7)
    for row, distance in enumerate(distances):
        axes.annotate(f" {distance:.1f}", (distance, row), va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
    axes.axvline(1.0, color="black", lw=1, ls="--")
    axes.invert_yaxis()
    axes.set_xlabel("times the floor")
    axes.grid(axis="y", visible=False)
    return title, figure
