"""What the tests of Triton run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.static.project import ROOT

#: Files of tests for the interpreter; the longest first, for it is waited for.
INTERPRETED = sorted(
    (path.stem for path in (Path(__file__).parent / "interpreted").glob("test_*.py")),
    key=lambda name: (name != "test_encoder", name),
)
#: The tests of a file that are left out otherwise.
EXHAUSTIVE = [f"{file}, exhaustive" for file in INTERPRETED if file != "test_interpreter"]


def run_job(name: str) -> subprocess.CompletedProcess[str]:
    """Interpret a file of tests, or let `tests.triton.compiler` compile what `name` says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if name in (*INTERPRETED, *EXHAUSTIVE):
        environment["TRITON_INTERPRET"] = "1"
        file, _, chosen = name.partition(", ")
        command = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", chosen or "not exhaustive"]
        command.append(f"tests/triton/interpreted/{file}.py")
    else:
        command = ["-W", "error", "-m", "tests.triton.compiler", name]
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        return subprocess.run(
            [sys.executable, *command],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
