"""Turns a results file into a markdown report with plots: `python -m bench.report --help`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import floor, plots
from bench.verdicts import Comparisons, Verdict, judge, kind_of, seconds_each, sharers
from seqkernels import tables
from seqkernels.benchmark import KINDS, Workload

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("build/bench.json")
SCRATCH = ROOT / "build" / "bench"  # ignored by git
KEPT = ROOT / "bench" / "results"  # for results that are to be committed
HOW = """A speedup is the median over rounds of a peer's time over that of seqkernels, with the 20 %
and 80 % quantiles. The rounds of all contestants were interleaved; before, their results were held
against fp64."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="what pytest wrote")
    parser.add_argument("--output", type=Path, help="folder (default: one in build/bench)")
    parser.add_argument("--keep", action="store_true", help="write to bench/results instead")
    parser.add_argument(
        "--clock-ghz", type=float, help="clock for the floor, if it is known better"
    )
    parser.add_argument("--strict", action="store_true", help="fail if a bar was missed")
    given = parser.parse_args(arguments)

    data = json.loads(given.results.read_text())
    comparisons = comparisons_of(data)
    if not comparisons:
        print(f"{given.results}: no comparison in it", file=sys.stderr)
        return 2
    info = data["machine_info"]["seqkernels"]
    parent = KEPT if given.keep else SCRATCH
    folder = given.output or parent / f"{data['datetime'][:10]}-{slug(info['processor'])}"
    folder.mkdir(parents=True, exist_ok=True)

    verdicts = [] if info["smoke"] else judge(comparisons)
    floors = floor.machine(info, given.clock_ghz)
    images = plots.draw(comparisons, floors, folder)
    text = markdown(data["datetime"], info, comparisons, verdicts, floors, images)
    (folder / "README.md").write_text(text)
    # What the report says and no more: the samples one by one stay in the file of pytest.
    kept = {"datetime": data["datetime"], "machine": info, "comparisons": comparisons}
    (folder / "results.json").write_text(json.dumps(kept, indent=1) + "\n")

    if verdicts:
        print_verdicts(verdicts)
    print(f"report: {folder / 'README.md'}")
    return int(given.strict and not all(v.met for v in verdicts))


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=tables.WIDTH)
    rows = [(v.workload, v.bar, v.measured, "met" if v.met else "MISSED") for v in verdicts]
    made = tables.make("Bars", ("workload", "bar", "measured", "verdict"), rows)
    console.print(made)
    missed = sum(not v.met for v in verdicts)
    print(f"\n{len(verdicts)} bars, {missed} missed")


def comparisons_of(data: dict[str, Any]) -> Comparisons:
    """The comparisons in a file of pytest-benchmark, by workload."""
    found = (b["extra_info"].get("comparison") for b in data["benchmarks"])
    return {c["workload"]["id"]: c for c in found if c is not None}


def slug(text: str) -> str:
    """The text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in lines)


def markdown(
    date: str,
    info: dict[str, Any],
    comparisons: Comparisons,
    verdicts: Sequence[Verdict],
    floors: floor.Machine | None,
    images: Sequence[tuple[str, Path]],
) -> str:
    """The report."""
    parts = [f"# Benchmark: {info['processor']}, {date[:10]}", _machine(info)]
    if info["smoke"]:
        parts.append("**A smoke run: sizes are tiny and rounds few, the times say nothing.**")
    else:
        rows = [(v.workload, v.bar, v.measured, "met" if v.met else "**missed**") for v in verdicts]
        parts += ["## Bars", HOW, table(("workload", "bar", "measured", "verdict"), rows)]
    for kind in KINDS.values():
        those = {name: c for name, c in comparisons.items() if kind_of(c) is kind}
        if those:
            parts += [f"## {kind.title}", *_times(kind, those), _errors(kind, those)]
    parts += ["## Beside the kernel", _beside(comparisons)]
    parts += ["## Distance to the floor", _floors(comparisons, floors)]
    parts += [f"![{title}]({path.name})" for title, path in images]
    parts += ["## Who was not measured, and what ran", _notes(comparisons)]
    return "\n\n".join(parts) + "\n"


def _machine(info: dict[str, Any]) -> str:
    changed = " and uncommitted changes" if info["commit_changed"] else ""
    cores = f"{info['cores']} threads unless said"
    rows = [
        ("processor", f"{info['processor']} ({info['processor_model']}), {cores}"),
        ("instruction sets", f"{info['isa']} chosen; it runs {', '.join(info['isa_runnable'])}"),
        *([("GPU", _gpu(info["gpu"]))] if info.get("gpu") else []),
        ("commit", f"{info['commit']}{changed}"),
        ("versions", ", ".join(f"{n} {info[n]}" for n in ("seqkernels", "torch", "openvino"))),
        ("system", f"{info['system']}, Python {info['python']}"),
        ("load before", f"{info['load']} processes on average wanted to run"),
    ]
    return table(("", ""), rows)


def _gpu(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']} ({gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
        f"{gpu['memory'] / 2**30:.0f} GB), CUDA {gpu['cuda']}"
    )


def _present(kind: type[Workload], comparisons: Comparisons) -> list[str]:
    return [n for n in kind.rivals if any(n in c["results"] for c in comparisons.values())]


def _times(kind: type[Workload], comparisons: Comparisons) -> list[str]:
    names = _present(kind, comparisons)
    titles = [kind.rivals[name].title for name in names]
    head = ["workload", *(heading for heading, _ in kind.columns), "threads"]
    rows, rates = [], []
    for c in comparisons.values():
        w, results, peer = c["workload"], c["results"], c["fastest_peer"]
        sizes = [w["id"], *(str(w[key]) for _, key in kind.columns), str(w["threads"])]
        times, rate = [], []
        for name in names:
            shown = ""
            if name in results:
                low, median, high = (
                    f"{1e6 * seconds_each(c, name, at):.1f}" for at in ("q20", "median", "q80")
                )
                shown = f"{median} ({low} to {high})"
            times.append(f"**{shown}**" if name == peer else shown)
            if "bytes" in w:
                seconds = results[name]["time"]["median"] if name in results else None
                rate.append(f"{w['bytes'] / seconds / 1e9:.1f}" if seconds else "")
        s = results[peer]["speedup"] if peer else None
        ratio = f"{s['median']:.2f} ({s['q20']:.2f} to {s['q80']:.2f})" if s else ""
        rows.append([*sizes, *times, ratio, str(results["seqkernels"]["rounds"])])
        if rate:
            rates.append([*sizes, *rate])
    per = f"a {kind.per}" if kind.per else "a call"
    over = " over B" if kind.per else ""
    parts = [
        f"Time {per}, us: median (20 % to 80 %) of a call's time{over}; the fastest peer is bold.",
        table([*head, *titles, "fastest peer / seqkernels", "rounds"], rows),
    ]
    if rates:
        said = "GB/s: bytes that have to be read and written, over the median time."
        parts += [said, table([*head, *titles], rates)]
    return parts


def _errors(kind: type[Workload], comparisons: Comparisons) -> str:
    names = _present(kind, comparisons)
    names = [name for name in names if not kind.rivals[name].yardstick]
    rows = []
    for c in comparisons.values():
        cells = [c["workload"]["id"]]
        for name in names:
            a = c["results"][name]["accuracy"] if name in c["results"] else None
            cells.append(f"{a['max_ratio']:.2g} / {a['mean_ratio']:.2g}" if a else "")
        worst = c["results"]["seqkernels"]["accuracy"]
        cells.append(f"{worst['worst_max_ratio']:.2g} / {worst['worst_mean_ratio']:.2g}")
        rows.append(cells)
    said = (
        f"Error against fp64: largest / mean absolute error over that of {kind.yardstick}, all "
        f"checked {kind.checked} together; the last column is the worst of them for seqkernels, "
        "to which the rule applies (2 / 1.5)."
    )
    titles = [kind.rivals[name].title for name in names]
    return f"{said}\n\n{table(['workload', *titles, 'worst'], rows)}"


def _beside(comparisons: Comparisons) -> str:
    rows = []
    for c in comparisons.values():
        memory, outside = c["workspace_bytes"], c["outside_kernel"]
        if outside or (memory and c["workload"]["group"] in ("transact", "shapes")):
            shown = f"{1e6 * outside['median']:.1f}" if outside else ""
            space = "" if memory is None else f"{memory / 1024:.0f}"
            rows.append((c["workload"]["id"], space, shown))
    if not rows:
        return "No native kernel ran."
    head = ("workload", "workspace, KB a thread", "outside the native call, us")
    return table(head, rows)


def _floors(comparisons: Comparisons, floors: floor.Machine | None) -> str:
    if floors is None:
        return "The clock is not known: `--clock-ghz`."
    rows = []
    for c in comparisons.values():
        least = floors.floor(c)
        if least is None:
            continue
        w, measured = c["workload"], c["results"]["seqkernels"]["time"]["median"]
        batch = sharers(c)
        per = 1e6 / batch
        macs = w["multiply_adds"] / batch / 1e6
        rows.append(
            (
                w["id"],
                c["variant"],
                f"{macs:.2f}",
                f"{least * per:.1f}",
                f"{measured * per:.1f}",
                f"{measured / least:.1f}",
            )
        )
    if not rows:
        return "No instruction set with a known rate ran."
    head = (
        "workload",
        "ran on",
        "10^6 multiply-accumulates",
        "floor, us",
        "measured, us",
        "times the floor",
    )
    model = (floor.__doc__ or "").partition("\n\n")[2].strip()
    return f"{model}\n\nAssumed: {floors.assumption}.\n\n{table(head, rows)}"


def _notes(comparisons: Comparisons) -> str:
    absent: dict[tuple[str, str], list[str]] = {}
    ran: dict[tuple[str, str], list[str]] = {}
    for name, c in comparisons.items():
        for who, why in c["absent"].items():
            absent.setdefault((who, why), []).append(name)
        for who, result in c["results"].items():
            note = re.sub(r", prepared in .*", "", result["note"])
            if note:
                ran.setdefault((who, note), []).append(name)
    lines = [
        f"- {who}, not measured in {', '.join(where)}: {why}"
        for (who, why), where in absent.items()
    ] or ["- Everyone was measured."]
    lines += [
        f"- {who}, {note}: in {len(where)} of {len(comparisons)} workloads"
        for (who, note), where in ran.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
