"""No speed for a wrong result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seqkernels.benchmark import Gate, GateError, compare
from seqkernels.testing import EncoderCase
from tests.bench.planted import MASKED, RIVALS, Broken, Faulty, workload


@pytest.fixture(scope="module")
def problem():
    return MASKED.problem()


@pytest.fixture(scope="module")
def gate() -> Gate:
    return encoder_gate()


def encoder_gate(case: EncoderCase = MASKED) -> Gate:
    return Gate(workload("seqkernels", case=case).task().expected(), "planted")


def one_wrong(out: Tensor) -> Tensor:
    """A single value, in the last sequence."""
    out = out.clone()
    out[-1, 5, 7] += 0.5
    return out


def padded_not_zero(out: Tensor) -> Tensor:
    out = out.clone()
    out[-1, -1] = 0.1
    return out


def nan(out: Tensor) -> Tensor:
    out = out.clone()
    out[0, 0, 0] = math.nan
    return out


WRONG = [one_wrong, nan, lambda out: out[:, :-1], lambda out: out.flip(0), torch.zeros_like]


def test_right_results_pass(problem, gate) -> None:
    exact = problem.reference(torch.float32)
    assert gate.check("ours", exact, ours=True).max_ratio < 0.01
    assert gate.check("peer", exact).mean_ratio < 0.01
    low = gate.check("bf16", problem.low_precision().float(), ours=True)
    assert low.max_ratio == low.worst_mean_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("fault", [*WRONG, padded_not_zero])
def test_a_wrong_result_of_ours_is_refused(problem, gate, fault: Callable) -> None:
    with pytest.raises(GateError, match="planted: ours"):
        gate.check("ours", fault(problem.reference(torch.float32)), ours=True)


@pytest.mark.parametrize("fault", [f for f in WRONG if f(torch.ones(3, 24, 96)).shape[1] == 24])
def test_a_wrong_result_of_a_peer_is_refused(problem, gate, fault: Callable) -> None:
    with pytest.raises(GateError, match="planted: peer"):
        gate.check("peer", fault(problem.reference(torch.float32)))


def test_what_a_peer_leaves_at_padded_positions_is_its_own_affair(problem, gate) -> None:
    exact = problem.reference(torch.float32)
    garbage = exact.masked_fill(problem.key_padding_mask.unsqueeze(-1), math.nan)
    assert gate.check("garbage", garbage).max_ratio < 0.01
    shorter = workload("seqkernels", case=replace(MASKED, batch=2, valid=(20, 16))).task()
    cut = shorter.problem.reference(torch.float32)[:, :20]
    gate = Gate(shorter.expected(), "planted")
    assert gate.check("cut", shorter.whole(cut)).max_ratio < 0.01


def test_both_ends_of_a_large_batch_are_checked() -> None:
    gate = encoder_gate(EncoderCase(batch=100, length=16))
    assert gate.expected.rows.tolist() == [*range(4), *range(96, 100)]


def test_there_is_no_comparison_if_ours_is_wrong() -> None:
    with pytest.raises(GateError, match="seqkernels"):
        compare(
            workload("seqkernels", "eager_fp32"),
            contestants={
                "seqkernels": Faulty(RIVALS["seqkernels"], one_wrong),
                "eager_fp32": Faulty(RIVALS["eager_fp32"]),
            },
            rounds=1,
        )


def test_a_peer_that_is_wrong_or_fails_is_listed_and_not_timed() -> None:
    comparison = compare(
        workload("seqkernels", "wrong", "broken", "right"),
        contestants={
            "seqkernels": Faulty(RIVALS["seqkernels"]),
            "wrong": Faulty(RIVALS["eager_fp32"], one_wrong),
            "broken": Broken(),
            "right": Faulty(RIVALS["eager_fp32"]),
        },
        rounds=2,
    )
    assert set(comparison.results) == {"seqkernels", "right"}
    assert "times that of torch" in comparison.absent["wrong"]
    assert comparison.absent["broken"] == "RuntimeError: does not work here"
    assert comparison.fastest_peer() == "right"
