"""`make bench` end to end, on tiny sizes: pytest-benchmark, its results file, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [bench])")

from bench import report
from bench.registry import REGISTRY

# All but the sweeps, which differ in sizes that are made equal here, and one of each of them.
GROUPS = ("transact", "shapes", "batch_norm", "linear", "ranker", "gpu")
CHOSEN = " or ".join((*GROUPS, "isa", "batch/1-", "length/16-"))
ROOT = Path(__file__).resolve().parents[2]


def test_smoke_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "bench.json"
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "bench", "--smoke", "-k", CHOSEN),
            f"--benchmark-json={results}",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    data = json.loads(results.read_text())
    info = data["machine_info"]["seqkernels"]
    assert {"commit", "processor", "isa", "cores", "torch", "openvino"} <= set(info)
    assert "node" not in data["machine_info"]
    comparisons = report.comparisons_of(data)
    # All but instruction sets that this processor lacks.
    assert {e.workload.id for e in REGISTRY if e.workload.group in GROUPS} <= set(comparisons)
    for benchmark in data["benchmarks"]:
        extra, stats = benchmark["extra_info"], benchmark["stats"]
        assert benchmark["group"] == extra["workload"]
        assert stats["rounds"] == 2
        told = comparisons[extra["workload"]]["results"][extra["contestant"]]["time"]
        assert stats["median"] == pytest.approx(told["median"], rel=1e-6)
        assert extra["quantiles"] == told

    assert report.main([str(results), "--output", str(tmp_path / "out")]) == 0
    assert "A smoke run" in (tmp_path / "out" / "README.md").read_text()
    assert "report:" in capsys.readouterr().out
