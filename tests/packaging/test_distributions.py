"""The sdist and the wheels hold what they should, and nothing else."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.building import Environment
from tests.static.project import ROOT


def tracked(folder: str, *suffixes: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def test_sdist_holds_all_sources_and_no_build_results(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = tracked("csrc", ".h", ".cpp", ".cu", ".cuh") | tracked("seqkernels", ".py")
    expected |= tracked("tests", ".py", ".cpp")
    expected |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    expected |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile"}
    expected |= {path.name for path in ROOT.glob("constraints-*.txt")}
    expected |= {"LICENSE", "seqkernels/py.typed"}
    assert expected <= names
    assert not {n for n in names if n.endswith((".so", ".o", ".pyc")) or n.startswith("build/")}


@pytest.mark.exhaustive  # compiles the native module
def test_wheel_holds_the_package_and_its_native_parts(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    native = {name for name in package if name.endswith(".so")}
    library, module = sorted(native, reverse=True)
    assert module.startswith("seqkernels/_native.")
    assert library == "seqkernels/lib/libseqkernels.so"
    assert package - native == tracked("seqkernels", ".py", ".pyi", ".typed")
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "none-any" not in wheel.name


@pytest.mark.exhaustive  # compiles the native module
def test_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path, wheel, other_packages=True)
    code = (
        "import seqkernels; from seqkernels import _native; print(_native.__file__); "
        "print(_native.isa_unsupported_reasons('portable'), _native.build_info()['version'], "
        "repr(_native.ops_error()))"
    )
    location, facts = environment.output("-c", code).splitlines()
    assert Path(location).parent == environment.site / "seqkernels"
    assert facts == f"[] {wheel.name.split('-')[1]} ''"


def test_pure_wheel_holds_python_alone(pure_wheel: Path) -> None:
    names = set(zipfile.ZipFile(pure_wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == tracked("seqkernels", ".py", ".pyi", ".typed")
    assert pure_wheel.name.endswith("-py3-none-any.whl")


def test_pure_wheel_runs_on_the_reference(pure_wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path, pure_wheel, other_packages=True)
    code = (
        "import torch, seqkernels; print(seqkernels.__file__); "
        "model = torch.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval(); "
        "x = torch.randn(2, 3, 16); want = model(x); seqkernels.swap(model); "
        "torch.set_grad_enabled(False); torch.testing.assert_close(model(x), want)"
    )
    assert Path(environment.output("-c", code).strip()).parent == environment.site / "seqkernels"
    info = environment.output("-m", "seqkernels", "info")
    assert re.search(r"^ *built +no\b", info, re.MULTILINE), info
