"""Mistakes planted in the kernels are caught: by the numerics rule, or by the watched memory."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.errors import InterpreterError

from seqkernels.testing import EncoderCase
from tests.triton.faults import Fault, plant
from tests.triton.runs import check

POISONED: dict[str, Any] = {"mask": "right", "poison": math.nan}


FAULTS = {
    "mask ignored": Fault(
        "attention", 'tl.where(valid[None, :], s, float("-inf"))', "s", {"mask": "right"}
    ),
    "mask ignored, long": Fault(
        "attention", 'tl.where(valid[None, :], s, float("-inf"))', "s",
        {"mask": "holes", "length": 140, "batch": 1},
    ),
    "scale of the next power of two": Fault(
        "attention", "part[None, :]) * scale)", "part[None, :]) * (scale * 0.8660254))", {}
    ),
    "no b_q": Fault("attention", "(raw[j] + part[None, :]) * scale", "raw[j] * scale", {}),
    "no b_v": Fault(
        "attention", "mixed[j] * inverse + offsets[j][None, :]", "mixed[j] * inverse", {}
    ),
    "values of padding not cleared": Fault(
        "attention", "tl.where(valid[:, None], raw[j], 0.0)", "raw[j]",
        {**POISONED, "padding": "compute"},
    ),
    "padded columns not cleared": Fault(
        "tokens", "tl.load(row[:, None] + column[None, :], inside, 0.0)",
        "tl.load(row[:, None] + column[None, :], inside)", {"d_model": 20, "dim_feedforward": 7},
    ),
    "missing other of values": Fault(
        "attention", "tl.load(where, inside[:, None], 0.0)", "tl.load(where, inside[:, None])",
        {"length": 140, "batch": 1},
    ),
    "last block of keys dropped": Fault(
        "attention", "for key in range(first, last, KEYS)",
        "for key in range(first, last - KEYS, KEYS)", {"length": 140, "batch": 1},
    ),
    "maximum not carried": Fault(
        "attention", "mixed[j] * shrink[:, None]", "mixed[j]", {"length": 140, "batch": 1}
    ),
    "block starts a key late": Fault(
        "attention", "t = start + tl.arange(0, ROWS)", "t = start + 1 + tl.arange(0, ROWS)", {}
    ),
    "heads written to one place": Fault(
        "attention", "row[:, None] * ROW_STRIDE + h * HEAD", "row[:, None] * ROW_STRIDE + 0 * HEAD",
        {},
    ),
    "rows of a block too many": Fault(
        "tail", "program_id(0).to(tl.int64) * ROWS", "program_id(0).to(tl.int64) * (ROWS - 1)",
        {},
    ),
    "rows of a block too few": Fault(
        "tail", "program_id(0).to(tl.int64) * ROWS", "program_id(0).to(tl.int64) * (ROWS + 1)",
        {},
    ),
    "rows after the last": Fault("tail", "inside = b < B", "inside = b <= B", {}),
    "norm over padded columns": Fault(
        "rows", "squares / D", "squares / (CHUNKS * CHUNK)", {"d_model": 20, "dim_feedforward": 7}
    ),
    "norms swapped": Fault(
        "tail", "vectors + P, vectors + 2 * P", "vectors + 3 * P, vectors + 4 * P", {}
    ),
    "residual dropped": Fault(
        "tail", "(tl.dot(operand, w, into[c]),)", "(tl.dot(operand, w),)", {}
    ),
    "one feed-forward block": Fault(
        "tail", "for f in range(0, F, HIDDEN)", "for f in range(0, HIDDEN, HIDDEN)",
        {"dim_feedforward": 128},
    ),
    "window shifted by one": Fault(
        "tail", "slot = t - window\n", "slot = t - window + 1\n", {"latest_k": 4, "pool": "max"}
    ),
    "pool forgets earlier blocks": Fault(
        "tail", "larger(pooled[c], column_max(rows[c], pooled_rows))",
        "column_max(rows[c], pooled_rows)", {"length": 70, "latest_k": 12, "pool": "max"},
    ),
    "pool ignores padding": Fault(
        "tail", "tl.where(end - begin < T, larger(most, of_padding), most)", "most",
        {"length": 12, "mask": "right", "valid": (2, 1), "latest_k": 0, "pool": "max",
         "d_model": 256, "nhead": 1},
    ),
    "candidate shifted": Fault(
        "tokens", "other_row[:, None] + (column - E)[None, :]",
        "other_row[:, None] + (column - E - 1)[None, :]", {"fusion": "concat"},
    ),
    "appended token masked": Fault(
        "tokens", "valid | (t == (L if LATEST_LAST else 0))", "valid",
        {"fusion": "append", "length": 9},
    ),
    "leaky slope forgotten": Fault(
        "rows", "tl.where(x < 0.0, x * negative_slope, x)", "tl.where(x < 0.0, 0.0, x)",
        {"activation": "leaky_relu", "negative_slope": 0.2},
    ),
}  # fmt: skip


@functools.cache
def passes_without(case: EncoderCase) -> None:
    check(case)


def test_copies_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the fault that fails, not the copying."""
    plant(None, tmp_path, monkeypatch)
    check(EncoderCase(batch=2, length=40, num_layers=1))


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    case = EncoderCase(**{"batch": 2, "length": 40, "num_layers": 1, **fault.case})
    passes_without(case)
    plant(fault, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, InterpreterError)):
        check(case)
