"""Verdicts, floors and the report, on numbers made up for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [bench])")

from bench import floor, report
from bench.registry import REGISTRY
from bench.verdicts import judge
from seqkernels.benchmark import KINDS, Contestant

INFO = {
    "commit": "0" * 40,
    "commit_changed": False,
    "processor": "Made-up(R) CPU @ 2 GHz",
    "processor_model": "GenuineIntel 6 143 8",
    "clock_ghz": 2.0,
    "load": 0.1,
    "cores": 2,
    "isa": "amx_bf16",
    "isa_runnable": ["amx_bf16", "avx2"],
    "system": "Linux",
    "python": "3.11",
    "seqkernels": "0",
    "torch": "0",
    "openvino": None,
    "smoke": False,
}


def spread(value: float) -> dict[str, float]:
    return {"q20": 0.9 * value, "median": value, "q80": 1.1 * value}


def result(rival: Contestant, seconds: float, speedup: float) -> dict[str, Any]:
    names = ("max_ratio", "mean_ratio", "worst_max_ratio", "worst_mean_ratio")
    return {
        "title": rival.title,
        "ours": rival.ours,
        "yardstick": rival.yardstick,
        "note": "cpu/amx_bf16" if rival.ours else "",
        "accuracy": None if rival.yardstick else dict.fromkeys(names, 0.5),
        "rounds": 5,
        "calls_per_sample": 1,
        "time": spread(seconds),
        "speedup": spread(speedup),
        "speedup_of": dict.fromkeys(("seqkernels", "seqkernels_kernel"), spread(speedup)),
    }


def comparisons() -> dict[str, dict[str, Any]]:
    """Each peer takes 13 times as long as seqkernels, a copy as long."""
    made = {}
    for entry in REGISTRY:
        rivals = entry.workload.rivals
        described = entry.workload.describe() | {"threads": entry.workload.threads or 2}
        seconds = 25e-6 * described["batch"]
        peer = next(n for n in entry.workload.contestants if n.startswith("eager"))
        timed = {name: 13.0 for name in entry.workload.contestants if name != "openvino_bf16"}
        absent = {"openvino_bf16": "not installed"}
        if described["kind"] == "ranker":
            timed, absent = timed | {"openvino_bf16": 13.0}, {}
        for name in timed:
            if rivals[name].ours or rivals[name].yardstick:
                timed[name] = 1.0
        if "seqkernels_forward" in timed:
            timed["seqkernels_forward"] = 1.6
        made[entry.workload.id] = {
            "workload": described,
            "variant": "cuda/sm_90"
            if described["device"] == "cuda"
            else "cpu/" + (entry.workload.isa or "amx_bf16"),
            "workspace_bytes": 500_000 if described["kind"] == "encoder" else None,
            "fastest_peer": peer,
            "outside_kernel": spread(2e-5) if "seqkernels_kernel" in timed else None,
            "absent": absent,
            "results": {n: result(rivals[n], t * seconds, t) for n, t in timed.items()},
        }
    return made


def missed(found: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(v.workload, v.measured) for v in judge(found) if not v.met]


def test_all_bars_are_judged() -> None:
    verdicts = judge(comparisons())
    assert all(v.met for v in verdicts)
    assert len(verdicts) == sum(len(entry.bars) for entry in REGISTRY) + 2
    by_name = {v.workload: v.bar for v in verdicts if "fastest" in v.bar}
    assert by_name["transact/masked"] == "at least 12 x the fastest peer"
    assert by_name["shapes/d512-h8-f2048-l128/dense"] == "at least 1 x the fastest peer"


def test_each_bar_can_be_missed() -> None:
    found = comparisons()
    one = copy.deepcopy(found)
    one["transact/masked"]["results"]["eager_fp32"]["speedup"]["median"] = 11.9
    assert [w for w, _ in missed(one)] == ["transact/masked"]
    one["transact/masked"]["variant"] = "cpu/avx512_bf16"  # asks for less
    assert not missed(one)

    one = copy.deepcopy(found)
    one["transact/dense"]["workspace_bytes"] = 3 << 20
    one["transact/one"]["outside_kernel"]["median"] = 31e-6
    one["isa/avx2"]["results"]["eager_fp32"]["speedup"]["median"] = 1.4
    one["batch/1024"]["results"]["seqkernels"]["time"]["median"] *= 1.3
    one["length/16"]["results"]["seqkernels"]["accuracy"]["max_ratio"] = 1.1
    assert [w for w, _ in missed(one)] == [
        "transact/dense",
        "transact/one",
        "isa/avx2",
        "batch/32, batch/1024",
        "all encoders on AMX",
    ]

    one = copy.deepcopy(found)
    results = one["batch_norm/bf16"]["results"]
    results["copy_new"]["speedup_of"]["seqkernels"]["median"] = 1 / 1.16
    results["copy_into"]["speedup_of"]["seqkernels_kernel"]["median"] = 1 / 1.14
    one["linear/k512-f512"]["results"]["eager_bf16"]["speedup"]["median"] = 1.4
    one["ranker/256"]["results"]["eager_fp32"]["speedup"]["median"] = 3.9
    one["ranker/256"]["results"]["openvino_bf16"]["speedup"]["median"] = 0.9
    assert missed(one) == [
        ("batch_norm/bf16", "1.16 (0.91 to 1.11) x"),
        ("linear/k512-f512", "1.40 (11.70 to 14.30) x torch eager bf16"),
        ("ranker/256", "3.90 (11.70 to 14.30) x torch eager fp32"),
        ("ranker/256", "0.90 (11.70 to 14.30) x OpenVINO bf16"),
    ]

    one = copy.deepcopy(found)
    results = one["request/n256-60of100"]["results"]
    results["seqkernels_forward"]["speedup"]["median"] = 1.4
    results["eager_fp32"]["speedup"]["median"] = 11.9
    assert missed(one) == [
        ("request/n256-60of100", "11.90 (11.70 to 14.30) x torch eager fp32"),
        ("request/n256-60of100", "1.40 (1.44 to 1.76) x seqkernels, user repeated"),
    ]

    one = copy.deepcopy(found)
    del one["isa/avx2"]["results"]["eager_fp32"]
    one["isa/avx2"]["absent"]["eager_fp32"] = "it failed"
    assert missed(one) == [("isa/avx2", "nothing: it failed")]


def test_floor() -> None:
    dense = comparisons()["transact/dense"]
    machine = floor.machine(INFO)
    macs = 256 * 12.4e6
    assert machine.floor(dense) == pytest.approx(macs / (512 * 2 * 2e9), rel=0.01)
    assert floor.machine(INFO, clock_ghz=4.0).floor(dense) == machine.floor(dense) / 2
    assert machine.floor(dense | {"variant": "reference"}) is None
    amd = floor.machine(INFO | {"processor_model": "AuthenticAMD 25 17 1"})
    assert (machine.rates["avx512"], amd.rates["avx512"]) == (32, 16)
    assert floor.machine(INFO | {"clock_ghz": None}) is None


@pytest.mark.parametrize(
    ("strict", "slow", "code"), [(True, False, 0), (True, True, 1), (False, True, 0)]
)
def test_report(tmp_path: Path, strict: bool, slow: bool, code: int) -> None:
    found = comparisons()
    if slow:
        found["batch/1"]["results"]["eager_fp32"]["speedup"]["median"] = 0.9
    data = {
        "datetime": "2030-01-02T03:04:05",
        "machine_info": {"seqkernels": INFO},
        "benchmarks": [{"extra_info": {"comparison": c}} for c in found.values()]
        + [{"extra_info": {"contestant": "eager_fp32"}}],
    }
    results = tmp_path / "results.json"
    results.write_text(json.dumps(data))
    arguments = [str(results), "--output", str(tmp_path / "out"), *["--strict"] * strict]
    assert report.main(arguments) == code

    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("# Benchmark: Made-up(R) CPU @ 2 GHz, 2030-01-02")
    assert "12.4" in text
    assert "openvino_bf16, not measured in transact/dense" in text
    for kind in KINDS.values():
        assert f"## {kind.title}" in text
    assert "GB/s" in text
    assert ("**missed**" in text) == slow
    for name in ("time_by_length", "time_by_batch", "padding", "floor"):
        assert f"({name}.png)" in text
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(kept["comparisons"]) == set(found)


def test_results_from_before_there_were_kinds() -> None:
    found = {n: c for n, c in comparisons().items() if c["workload"]["kind"] == "encoder"}
    then = copy.deepcopy(found)
    for comparison in then.values():
        del comparison["workload"]["kind"]
        for measured in comparison["results"].values():
            del measured["yardstick"], measured["speedup_of"]
    assert judge(then) == judge(found)
    date, floors = "2030-01-02", floor.machine(INFO)
    texts = [report.markdown(date, INFO, c, judge(c), floors, []) for c in (then, found)]
    assert texts[0] == texts[1]


def test_slug() -> None:
    assert report.slug("Intel(R) Xeon(R) Platinum 8488C") == "intel-xeon-platinum-8488c"
