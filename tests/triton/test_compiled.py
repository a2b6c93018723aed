"""What the kernels become for each architecture, compiled without a GPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import pytest

from tests.static.project import ROOT
from tests.triton.presence import needs_triton


class Limits(NamedTuple):
    shared: int  # KB a block may have
    spilled: int  # bytes a thread, the budget


# What does not spill today does not get to tomorrow; see docs/design/triton.md.
ARCHITECTURES = {
    "sm_80": Limits(163, 0),
    "sm_86": Limits(99, 8),
    "sm_89": Limits(99, 8),
    "sm_90": Limits(227, 0),
    "sm_100": Limits(227, 32),
    "sm_120": Limits(99, 8),
    "gfx942": Limits(64, 0),
}
TENSOR_COLUMNS = 512
# Without products: for a kernel that has become a trap, or nothing.
FEWEST_INSTRUCTIONS = 200


def compile_for(what: str) -> list[Any]:
    """The lines of `tests.triton.compiler`, from a process that does not interpret."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        result = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tests.triton.compiler", what],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@functools.cache
def kernels(arch: str) -> list[dict[str, Any]]:
    return compile_for(arch)


@needs_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture(arch: str) -> None:
    limits = ARCHITECTURES[arch]
    names = {kernel["name"] for kernel in kernels(arch)}
    assert names == {
        "attention_short", "attention_long", "tail_rows", "tail_summary", "batch_norm",
    }  # fmt: skip
    for kernel in kernels(arch):
        assert kernel["traps"] == 0, kernel
        assert kernel["instructions"] >= FEWEST_INSTRUCTIONS, kernel
        assert kernel["shared"] <= limits.shared * 1024, kernel
        assert kernel["tensor_columns"] <= TENSOR_COLUMNS, kernel
        assert kernel["spilled"] <= limits.spilled, kernel
        assert kernel["products"] > 0 or kernel["name"] == "batch_norm", kernel


@needs_triton
def test_few_kernels_for_many_lengths() -> None:
    """Sequences of 97 to 112 tokens run the same code; one token is a case of its own."""
    compiled = dict(compile_for("specializations"))
    assert compiled[100] == compiled[112] == compiled[101] == compiled[97]
    assert len(set(compiled[1])) == len(compiled[1]) == 4
