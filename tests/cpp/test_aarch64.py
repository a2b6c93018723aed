"""The native core on AArch64: cross-compiled, run by an emulator of its instructions."""

from __future__ import annotations

import shutil

import pytest

from tests.cpp.building import GRID_PROGRAMS, ROOT, run, run_cmake

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]


@pytest.mark.exhaustive
@pytest.mark.parametrize("program", GRID_PROGRAMS)
def test_program(program: str, request: pytest.FixtureRequest) -> None:
    if MISSING:
        assert not request.config.getoption("require_aarch64"), f"not installed: {MISSING}"
        pytest.skip(f"AArch64: {' and '.join(MISSING)} not installed")
    folder = ROOT / "build" / "tests-aarch64"
    configure = [
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"),
        *(f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_EXE_LINKER_FLAGS=-static"),
        *("-DSEQKERNELS_TESTS=ON", "-DSEQKERNELS_PYTHON=OFF", "-DSEQKERNELS_WERROR=ON"),
    ]
    run_cmake(folder, configure, [program])
    done = run([EMULATOR, str(folder / program)])
    assert done.returncode == 0, done.stdout
    assert " 0 failures" in done.stdout.splitlines()[-1]
