"""Imports point one way: nn -> ops -> backends -> native core.

The reference depends on torch and on the options' records alone, and these on nothing.
"""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

from tests.static.project import PACKAGE, ROOT

LAYERS = ("backends", "ops", "nn")  # lowest first


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all that a file of the package imports, anywhere in it."""
    here = ["seqkernels", *path.relative_to(PACKAGE).with_suffix("").parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def files_of(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_imports_a_higher_one(layer: str) -> None:
    higher = LAYERS[LAYERS.index(layer) + 1 :]
    forbidden = [f"seqkernels.{name}" for name in (*higher, "swap", "explain", "cli")]
    assert files_of(layer)
    for path in files_of(layer):
        assert not {n for n in imported_modules(path) if within(n, *forbidden)}, path


STANDARD = ("__future__", "collections", "dataclasses", "functools", "math", "typing")


def test_reference_depends_on_torch_and_options_alone() -> None:
    allowed = ("torch", "seqkernels.reference", "seqkernels.options", *STANDARD)
    for path in files_of("reference"):
        names = imported_modules(path)
        assert names == {n for n in names if within(n, *allowed)}, path


def test_options_depend_on_nothing() -> None:
    """Building runs the file where neither torch nor this package is installed."""
    names = imported_modules(PACKAGE / "options.py")
    assert names == {n for n in names if within(n, "sys", "pathlib", *STANDARD)}


def test_only_backends_import_the_native_module() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if PACKAGE / "backends" not in path.parents:
            assert not {n for n in imported_modules(path) if within(n, "seqkernels._native")}, path


def test_native_core_includes_only_itself_and_the_system() -> None:
    foreign = re.compile(
        r'#\s*include\s*(<torch|"torch/(csrc|headeronly|\w+\.h>)|[<"](ATen|c10|pybind11|Python\.h|'
        r"cuda\w*\.h))"
    )
    core = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp"}]
    assert core
    for path in core:
        if path.parent.name != "bindings" and path.name != "python_module.cpp":
            assert not foreign.search(path.read_text()), path


def test_cmake_lists_every_native_source() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    by_isa = {
        f"csrc/cpu/{op}_{name}.cpp"
        for name, ops in re.findall(r"seqkernels_add_isa\((\w+)\s+OPS ([\w\s]+?)\s+FLAGS", cmake)
        for op in ops.split()
    }
    listed = set(re.findall(r"\bcsrc/[\w/]+\.cpp", cmake)) | by_isa
    present = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")}
    assert listed == present


def test_no_import_goes_in_a_circle() -> None:
    """Not even for type checking: what needs each other belongs in one file, or below both."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }

    def module_of(name: str) -> str | None:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name or None

    graph = {
        module: {m for m in map(module_of, imported_modules(path)) if m not in (None, module)}
        for module, path in files.items()
    }
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter(graph).prepare()
