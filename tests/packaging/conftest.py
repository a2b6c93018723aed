"""An sdist of a clean copy of the tree, and wheels built from that sdist."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from tests.packaging.building import built
from tests.static.project import ROOT


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("sdist")
    # The module compiled in place goes along: it must not find its way into an sdist.
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp / "tree", ignore=unwanted)
    return built(tmp / "tree", "sdist", tmp / "dist")


@pytest.fixture(scope="session")
def unpacked_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("a comma, a space")  # which builds have to stand
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp, filter="data")
    (top,) = tmp.iterdir()
    return top


@pytest.fixture(scope="session")
def wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the native module, compiled without optimizations: the contents matter here."""
    flags = "-DCMAKE_CXX_FLAGS_RELEASE=-O0"
    return built(unpacked_sdist, "wheel", tmp_path_factory.mktemp("wheel"), CMAKE_ARGS=flags)


@pytest.fixture(scope="session")
def pure_wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the native module, and without a compiler."""
    out = tmp_path_factory.mktemp("pure")
    return built(unpacked_sdist, "wheel", out, SEQKERNELS_NATIVE="0", CXX="/nonexistent/c++")
