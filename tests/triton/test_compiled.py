"""What the kernels become for each architecture, compiled without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import pytest

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
EVERYDAY = ("sm_90",)  # `make test-all` compiles for all of them
TENSOR_COLUMNS = 512
# Without products: for a kernel that has become a trap, or nothing.
FEWEST_INSTRUCTIONS = 200


Finished = Callable[[str], CompletedProcess[str]]


def lines(result: CompletedProcess[str]) -> list[Any]:
    """What `tests.triton.compiler` printed."""
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@needs_triton
@pytest.mark.parametrize(
    "job",
    [
        pytest.param(arch, marks=[] if arch in EVERYDAY else pytest.mark.exhaustive)
        for arch in ARCHITECTURES
    ],
)
def test_architecture(job: str, finished: Finished) -> None:
    limits, kernels = ARCHITECTURES[job], lines(finished(job))
    assert {kernel["name"] for kernel in kernels} == {
        "attention_short", "attention_long", "prepare_users", "attention_shared",
        "tail_rows", "tail_summary", "batch_norm",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["traps"] == 0, kernel
        assert kernel["instructions"] >= FEWEST_INSTRUCTIONS, kernel
        assert kernel["shared"] <= limits.shared * 1024, kernel
        assert kernel["tensor_columns"] <= TENSOR_COLUMNS, kernel
        assert kernel["spilled"] <= limits.spilled, kernel
        assert kernel["products"] > 0 or kernel["name"] == "batch_norm", kernel


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("job", ["specializations"])
def test_few_kernels_for_many_calls(job: str, finished: Finished) -> None:
    """Sequences of 97 to 112 tokens run the same code; one token is a case of its own."""
    compiled = dict(lines(finished(job)))
    lengths = [compiled[f"length {n}"] for n in (100, 112, 101, 97)]
    assert lengths == [lengths[0]] * 4
    assert len(set(compiled["length 1"])) == len(compiled["length 1"]) == 4
    assert compiled["odd 2 100"] == compiled["odd 1 112"] == compiled["odd 16 97"]
    assert compiled["request 2 100"] == compiled["request 1 112"]
    serving = [kernels for call, kernels in compiled.items() if call.startswith("serving")]
    assert serving == [compiled["warmup"]] * 4
