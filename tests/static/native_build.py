"""Which object of the native module is built from which source, and what stands in it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

from tests.static.project import PACKAGE, ROOT

BUILD_DIR = ROOT / "build" / "native"  # where setup.py compiles for an in-place install


@functools.cache
def native_objects() -> dict[str, Path]:
    """Source -> up-to-date object; compiles what changed since the last `make native`.

    A source of csrc/cpu is named by its stem, any other by its path in csrc.
    """
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    entries = json.loads((BUILD_DIR / "compile_commands.json").read_text())
    return {
        _name(Path(entry["file"])): Path(entry["directory"], entry["output"]) for entry in entries
    }


def _name(source: Path) -> str:
    path = source.relative_to(ROOT / "csrc")
    return path.stem if path.parts[0] == "cpu" else str(path)


def native_module() -> Path:
    native_objects()
    (module,) = PACKAGE.glob("_native*.so")
    return module


def run_tool(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def disassembly(stem: str) -> str:
    return run_tool("objdump", "--disassemble", "--no-show-raw-insn", native_objects()[stem])
