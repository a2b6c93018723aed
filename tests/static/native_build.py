"""Which object of the native module is built from which source, and what stands in it."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

from tests.cpp.building import SHIPPED, build
from tests.static.project import ROOT

TARGETS = {"seqkernels_core.dir", "seqkernels.dir", "_native.dir"}
BUILD_DIR = ROOT / "build" / "native"  # where setup.py compiles for an in-place install


@functools.cache
def native_objects() -> dict[str, Path]:
    """Source -> up-to-date object; compiles what changed since the last `make native`.

    A source of csrc/cpu is named by its stem, any other by its path in csrc; the bindings are one
    source, and so are the ops, each named by its target.
    """
    build(SHIPPED, ("_native",))
    entries = json.loads((BUILD_DIR / "compile_commands.json").read_text())
    return {
        _name(Path(entry["file"]), entry["output"]): Path(entry["directory"], entry["output"])
        for entry in entries
        if TARGETS & set(Path(entry["output"]).parts)
        and Path(entry["directory"], entry["output"]).exists()
    }


def _name(source: Path, output: str) -> str:
    if not source.is_relative_to(ROOT / "csrc"):
        return next(part for part in Path(output).parts if part in TARGETS)
    path = source.relative_to(ROOT / "csrc")
    return path.stem if path.parts[0] == "cpu" else str(path)


def native_module() -> Path:
    (module,) = build(SHIPPED, ("_native",)).glob("_native*.so")
    return module


def native_library() -> Path:
    return build(SHIPPED, ("_native",)) / "libseqkernels.so"


def run_tool(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def disassembly(stem: str) -> str:
    return run_tool("objdump", "--disassemble", "--no-show-raw-insn", native_objects()[stem])
