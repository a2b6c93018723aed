"""Builds distributions the way a user's tools do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_build(source: Path, kind: str, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m build`, offline: what the build needs is in this environment already."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SEQKERNELS_") and name not in ("CMAKE_ARGS", "MAX_JOBS")
    }
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out)]
    return subprocess.run(
        [*command, str(source)], env=inherited | env, capture_output=True, text=True, check=False
    )


def built(source: Path, kind: str, out: Path, **env: str) -> Path:
    result = run_build(source, kind, out, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    (distribution,) = out.iterdir()
    return distribution
