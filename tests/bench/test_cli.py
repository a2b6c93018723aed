"""`python -m seqkernels bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seqkernels.__main__ import main
from seqkernels.benchmark import gpu

SMALL = ["--batch", "2", "--length", "24", "--threads", "1", "--rounds", "2"]


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert main(["bench", *SMALL, "--mask", "16", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    for title in ("seqkernels", "torch eager fp32", "torch eager bf16"):
        assert title in text
    assert "2 interleaved rounds" in text
    made = json.loads(file.read_text())
    assert made["comparison"]["workload"]["masked"]
    assert set(made["comparison"]["results"]) == {
        "seqkernels",
        "seqkernels_bf16",
        "eager_fp32",
        "eager_bf16",
        "eager_bf16_padded",
    }
    assert "processor" in made["machine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nhead", "5"], "--nhead: expected a divisor of 96 (--d-model), got 5"),
        (["--mask", "30"], "--mask: expected at most 24 (--length), got 30"),
        (["--isa", "unheard_of"], "unheard_of"),
    ],
)
def test_what_cannot_be_is_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *SMALL, *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(gpu.missing() is None, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--device", "cuda"]) == 1
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_numbers_are_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--batch", "0"])
    assert "expected a positive integer, got 0" in capsys.readouterr().err
