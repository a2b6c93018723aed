"""``python -m seqkernels``: info tells everything and never fails; other commands are found."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqkernels
from seqkernels import __main__ as command_line
from seqkernels import settings
from seqkernels.backends import cpu, native_module


def told(capsys: pytest.CaptureFixture[str]) -> str:
    assert command_line.main(["info"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return " ".join(captured.out.split())


def test_versions_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys)
    assert f"seqkernels {seqkernels.__version__}" in shown
    assert f"torch {torch.__version__}" in shown
    assert f"torch threads {torch.get_num_threads()}" in shown


@pytest.mark.skipif(native_module.module is None, reason="there is no native module")
def test_native_module_and_instruction_sets(capsys: pytest.CaptureFixture[str]) -> None:
    module = native_module.module
    shown = told(capsys)
    for value in (module.processor(), *module.build_info().values()):
        assert " ".join(value.split()) in shown
    for status in cpu.isa_table():
        assert f"{status.name} {'runs it' if status.runnable else 'cannot'}" in shown
        for reason in status.reasons:
            assert reason in shown
    best = next(s.name for s in cpu.isa_table() if s.chosen)
    assert f"cpu, float32 cpu/{best}" in shown
    assert "cpu, float64 reference cpu dtype torch.float64" in shown


def test_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with settings.override(backend="reference", strict=True):
        shown = told(capsys)
    assert "SEQKERNELS_BACKEND (unset) reference" in shown
    assert "SEQKERNELS_STRICT (unset) yes" in shown
    assert "cpu, float32 reference" in shown


def test_a_broken_native_module_is_shown_in_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "ImportError: [brackets] " + "undefined symbol: " + "_ZN" * 60
    monkeypatch.setattr(native_module, "module", None)
    monkeypatch.setattr(native_module, "import_error", text)
    shown = told(capsys)
    assert "no usable module" in shown
    assert text.replace(" ", "") in shown.replace(" ", "")
    assert "there is no native module" in shown


@pytest.mark.skipif(native_module.module is None, reason="there is no native module")
@pytest.mark.parametrize("wrong", [{"backend": "gpu"}, {"isa": "avx9"}])
def test_wrong_settings_are_shown(
    wrong: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with settings.override(**wrong):  # type: ignore[arg-type]
        shown = told(capsys)
    (name, value) = next(iter(wrong.items()))
    assert f"SEQKERNELS_{name.upper()}: expected one of" in shown
    assert f"got '{value}'" in shown


def test_as_a_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "seqkernels", "info"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"SEQKERNELS_ISA": "nonsense", "SEQKERNELS_STRICT": "maybe"},
    )
    shown = " ".join(result.stdout.split())
    assert "SEQKERNELS_ISA nonsense" in shown
    assert "SEQKERNELS_STRICT: expected 0 or 1, got 'maybe'" in shown
    assert not result.stderr


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command_line.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in command_line.COMMANDS)
    for arguments in ([], ["fly"]):
        with pytest.raises(SystemExit) as left:
            command_line.main(arguments)
        assert left.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_a_source_folder_that_hides_the_installed_package_is_named(tmp_path: Path) -> None:
    """`pip install .`, then Python started in the checkout: no compiler is to blame."""
    source, site = tmp_path / "checkout", tmp_path / "site-packages"
    package, installed = source / "seqkernels", site / "seqkernels"
    package.mkdir(parents=True)
    (source / "CMakeLists.txt").touch()
    error = ModuleNotFoundError("No module named 'seqkernels._native'")
    places = [str(source), str(site)]
    text = native_module.missing_reason(error, package, places)
    assert text.startswith(f"the native module was not built in the source folder {source}; ")
    installed.mkdir(parents=True)
    (installed / "_native.cpython-311-x86_64-linux-gnu.so").touch()
    text = native_module.missing_reason(error, package, places)
    assert f"started in the source folder {source}" in text
    assert f"hides the package installed in {installed}: start it in another folder" in text
    assert "compiler" not in text
    (source / "CMakeLists.txt").unlink()
    assert "install the package with a C++20 compiler" in native_module.missing_reason(
        error, package
    )


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command_line.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == f"seqkernels {seqkernels.__version__}"


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_help_needs_no_extra(command: str) -> None:
    """In a Python that finds none of the packages that the extras bring."""
    code = (
        "import sys\n"
        "for name in ('sklearn', 'matplotlib', 'openvino', 'triton'): sys.modules[name] = None\n"
        "from seqkernels.__main__ import main\n"
        f"main([{command!r}, '--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"python -m seqkernels {command}" in result.stdout


def test_only_the_command_asked_for_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        assert name == "seqkernels.cli.demo"
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert command_line.main(["demo"]) == 2
    assert "sklearn is not installed: pip install 'seqkernels[demo]'" in capsys.readouterr().err
