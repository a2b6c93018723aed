"""An install that cannot work says so in one message and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import CompileError

from tests.packaging.building import Environment, run_build
from tests.static.project import ROOT


@pytest.fixture
def setup_module_() -> ModuleType:
    """setup.py as a module; importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("seqkernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(unpacked_sdist: Path, tmp_path: Path) -> Path:
    """The unpacked sdist without the results of other tests' builds."""
    results = shutil.ignore_patterns("build", "*.egg-info")
    return Path(shutil.copytree(unpacked_sdist, tmp_path / "tree", ignore=results))


def failed_build(source: Path, **env: str) -> str:
    """The one line in which a build that must fail says why."""
    out = source.parent / "out"
    result = run_build(source, "wheel", out, **env)
    output = result.stdout + result.stderr
    assert result.returncode != 0, output
    assert not out.exists() or not list(out.iterdir())
    assert not list(source.rglob("*.so"))
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    return line


def test_no_compiler(tree: Path) -> None:
    line = failed_build(tree, CXX="/nonexistent/c++")
    assert "native CPU module could not be built" in line
    assert "SEQKERNELS_NATIVE=0" in line


def test_source_that_does_not_compile(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "processor.cpp").write_text("#error broken\n")
    assert "native CPU module could not be built" in failed_build(tree, MAX_JOBS="1")


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_max_jobs_is_checked(value: str, tree: Path) -> None:
    line = failed_build(tree, MAX_JOBS=value)
    assert line == f"error: MAX_JOBS: expected a positive integer, got {value!r}"


def test_native_switch_is_checked(tree: Path, tmp_path: Path) -> None:
    result = run_build(tree, "wheel", tmp_path / "out", SEQKERNELS_NATIVE="no")
    assert result.returncode != 0
    assert "SEQKERNELS_NATIVE: expected 0 or 1, got 'no'" in result.stdout + result.stderr


def test_jobs_are_bounded(setup_module_: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gigabyte = 1 << 30
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(setup_module_.os, "sched_getaffinity", lambda _: set(range(8)))
    for memory, jobs in ((gigabyte // 2, 1), (5 * gigabyte, 2), (64 * gigabyte, 8), (None, 8)):
        monkeypatch.setattr(setup_module_, "available_memory", lambda memory=memory: memory)
        assert setup_module_.job_count() == jobs
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_module_.job_count() == 3
    monkeypatch.setenv("MAX_JOBS", "none")
    with pytest.raises(CompileError, match="MAX_JOBS"):
        setup_module_.job_count()


def test_cuda_is_found_or_its_absence_told(
    setup_module_: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SEQKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup_module_, "find_nvcc", lambda: None)
    assert setup_module_.find_cuda().missing == "no nvcc was found when it was compiled"
    monkeypatch.setenv("SEQKERNELS_CUDA", "1")
    with pytest.raises(CompileError, match="SEQKERNELS_CUDA=1, but no nvcc was found"):
        setup_module_.find_cuda()
    monkeypatch.setattr(setup_module_, "find_nvcc", lambda: "/somewhere/nvcc")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0;9.0a;12.0+PTX")
    assert setup_module_.find_cuda().architectures == ("80-real", "90a-real", "120")
    monkeypatch.setenv("SEQKERNELS_CUDA", "0")
    assert setup_module_.find_cuda().nvcc is None
    monkeypatch.setenv("SEQKERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="SEQKERNELS_CUDA: expected 0 or 1, got 'yes'"):
        setup_module_.find_cuda()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "best")
    with pytest.raises(CompileError, match=r"expected numbers such as 9\.0 .*, got 'best'"):
        setup_module_.cuda_architectures("/somewhere/nvcc")


def test_nvcc_is_looked_for_in_three_places(
    setup_module_: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On PATH, else in CUDA_HOME, else among NVIDIA's packages, of which the newest."""

    def nvcc_in(*parts: str) -> str:
        path = tmp_path.joinpath(*parts, "nvcc")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        path.chmod(0o755)
        return str(path)

    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(setup_module_.sysconfig, "get_path", lambda _: str(tmp_path / "site"))
    assert setup_module_.find_nvcc() is None
    for place in (
        ("site", "nvidia", "cu12", "bin"),
        ("site", "nvidia", "cu13", "bin"),
        ("home", "bin"),
        ("path",),
    ):
        expected = nvcc_in(*place)
        assert setup_module_.find_nvcc() == expected


@pytest.mark.parametrize("kind", ["wheel", "pure_wheel"])
def test_environment_without_torch(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """One message that says what to do, from an environment that holds this package alone."""
    environment = Environment(tmp_path, request.getfixturevalue(kind), other_packages=False)
    for command in (["-c", "import seqkernels"], ["-m", "seqkernels", "info"]):
        result = environment.run(*command)
        assert result.returncode != 0
        last = result.stderr.splitlines()[-1]
        assert re.search(r"seqkernels needs PyTorch\b.*\bpip install torch\b", last), result.stderr
        assert result.stderr.count("Traceback") <= 1, result.stderr
