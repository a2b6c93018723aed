"""Builds distributions and installs them the way a user's tools do."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path


def run_build(source: Path, kind: str, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m build`, offline: what the build needs is in this environment already.

    Without the CUDA kernels: `tests.static` compiles those.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SEQKERNELS_") and name not in ("CMAKE_ARGS", "MAX_JOBS")
    }
    inherited["SEQKERNELS_CUDA"] = "0"
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out)]
    return subprocess.run(
        [*command, str(source)], env=inherited | env, capture_output=True, text=True, check=False
    )


def built(source: Path, kind: str, out: Path, **env: str) -> Path:
    """The one distribution that a build must give."""
    result = run_build(source, kind, out, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    (distribution,) = out.iterdir()
    return distribution


class Environment:
    """A new environment that holds a wheel, and either nothing else or the packages of this one.

    They are seen through a .pth file, which leaves out the in-place install of this checkout.
    """

    def __init__(self, folder: Path, wheel: Path, *, other_packages: bool) -> None:
        venv.create(folder, symlinks=True, with_pip=False)
        self.folder = folder
        (self.site,) = folder.glob("lib/python*/site-packages")
        zipfile.ZipFile(wheel).extractall(self.site)
        if other_packages:
            (self.site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`python <arguments>`, outside of any source tree."""
        return subprocess.run(
            [self.folder / "bin" / "python", "-I", *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            check=False,
        )

    def output(self, *arguments: str) -> str:
        """What a command that must succeed prints."""
        result = self.run(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout
