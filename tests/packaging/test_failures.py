"""An install that cannot work says so in one message and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import CompileError

from tests.packaging.building import Environment, built, run_build
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
    with pytest.raises(SystemExit, match="SEQKERNELS_CUDA: expected 0, 1 or local, got 'yes'"):
        setup_module_.find_cuda()
    with pytest.raises(CompileError, match=r"expected numbers such as 9\.0 .*, got 'best'"):
        setup_module_.in_words_of_cmake(["best"])


@pytest.mark.parametrize(
    ("listed", "architectures", "missing"),
    [
        ("9.0\n9.0\n8.0\n", ("80-real", "90-real"), ""),
        ("7.5\n", (), "the GPUs of the machine named no architecture from 8.0 on"),
        ("", (), "SEQKERNELS_CUDA=local and no GPU"),
        (None, (), "SEQKERNELS_CUDA=local and no GPU"),
    ],
)
def test_a_local_build_is_for_the_gpus_at_hand(
    listed: str | None,
    architectures: tuple[str, ...],
    missing: str,
    setup_module_: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Without one, nothing is compiled for GPUs, nvcc or not."""
    if listed is not None:
        nvidia_smi = tmp_path / "nvidia-smi"
        nvidia_smi.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
        nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nonexistent")
    monkeypatch.setenv("SEQKERNELS_CUDA", "local")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(setup_module_, "find_nvcc", lambda: "/somewhere/nvcc")
    found = setup_module_.find_cuda()
    assert found.architectures == architectures
    assert found.missing.startswith(missing)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")  # whoever names one gets it
    assert setup_module_.find_cuda().architectures == ("86-real",)


def test_the_build_says_in_one_line_what_it_builds(setup_module_: ModuleType) -> None:
    some = setup_module_.Cuda("/somewhere/nvcc", ("80-real", "120")).announcement()
    assert "CUDA kernels for 80, 120; TORCH_CUDA_ARCH_LIST=9.0 builds them for one" in some
    none = setup_module_.Cuda(missing="no nvcc was found when it was compiled").announcement()
    assert none.endswith("without CUDA kernels: no nvcc was found when it was compiled")
    assert "\n" not in some + none


def test_two_builds_of_one_tree_take_turns(tree: Path) -> None:
    """A pure one each, so that it takes a moment; both wheels are whole."""
    with ThreadPoolExecutor(2) as pool:
        outs = [tree.parent / name for name in ("one", "two")]
        wheels = list(pool.map(lambda out: built(tree, "wheel", out, SEQKERNELS_NATIVE="0"), outs))
    first, second = (set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels)
    assert first == second
    assert "seqkernels/__init__.py" in first


def test_a_build_waits_for_another(setup_module_: ModuleType, tmp_path: Path) -> None:
    setup_module_.ROOT = tmp_path
    code = (
        "import fcntl, os, sys; "
        f"fcntl.flock(os.open({str(tmp_path)!r}, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )

    def another() -> int:
        return subprocess.run(
            [sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False
        ).returncode

    with setup_module_.the_tree_alone():
        assert another() != 0
    assert another() == 0


def test_a_read_only_tree_is_named(
    setup_module_: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its permissions, which do not bind root."""
    monkeypatch.setattr(setup_module_.os, "access", lambda path, mode: False)
    told = r"the source folder .* is read-only.*copy the folder"
    with pytest.raises(SystemExit, match=told), setup_module_.the_tree_alone():
        pass


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


@pytest.mark.parametrize(
    "kind", [pytest.param("wheel", marks=pytest.mark.exhaustive), "pure_wheel"]
)
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
