"""The op request_scoring, interpreted: the numerics rule, the guard and which path ran, faults."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

from seqkernels.testing import EncoderCase, assert_close_to_oracle
from tests.backends.test_request_scoring import Request
from tests.triton.faults import Fault, plant
from tests.triton.runs import direct, score, shares_users

SHARED = {
    "TransAct": EncoderCase(
        batch=2, length=70, fusion="concat", candidate_dim=32, latest_k=8, pool="max",
        mask="right", valid=(70, 12), mask_form="lengths", dtype=torch.bfloat16, poison=math.nan,
    ),
    "100, whole": EncoderCase(batch=1, length=100, fusion="concat", num_layers=1),
    "holes": EncoderCase(batch=2, length=37, fusion="concat", mask="holes", num_layers=1),
    "left, computed": EncoderCase(
        batch=2, length=33, d_model=24, nhead=3, dim_feedforward=10, candidate_dim=5,
        fusion="concat", padding="compute", mask="left", activation="gelu", num_layers=1,
        poison=math.nan,
    ),
    "latest last": EncoderCase(
        batch=2, length=40, d_model=20, nhead=2, dim_feedforward=7, candidate_dim=7,
        fusion="concat", bias=False, affine=False, order="latest_last", latest_k=12, pool="max",
        mask="right", valid=(40, 20), num_layers=1,
    ),
    "empty": EncoderCase(
        length=16, d_model=64, nhead=4, fusion="concat", mask="empty", valid=(9, 16, 9),
        num_layers=1,
    ),
    "one candidate column": EncoderCase(
        batch=2, length=48, d_model=104, nhead=1, dim_feedforward=16, candidate_dim=1,
        fusion="concat", final_norm=True, activation="leaky_relu", num_layers=1, layout="strided",
    ),
    "candidate alone": EncoderCase(
        batch=1, length=20, d_model=48, candidate_dim=48, fusion="concat", num_layers=1
    ),
}  # fmt: skip
ORDINARY = {
    "wide": EncoderCase(
        batch=2, length=20, d_model=160, nhead=2, dim_feedforward=48, fusion="concat", num_layers=1
    ),
    "norm first": EncoderCase(
        batch=2, length=40, fusion="concat", norm_first=True, mask="right", num_layers=1
    ),
    "appended": EncoderCase(
        length=40, fusion="append", mask="right", valid=(40, 0, 20), num_layers=1
    ),
    "appended, lengths": EncoderCase(
        batch=2, length=30, fusion="append", mask="right", mask_form="lengths",
        order="latest_last", latest_k=12, pool="max", num_layers=1,
    ),
    "long": EncoderCase(batch=2, length=129, fusion="concat", mask="right", num_layers=1),
}  # fmt: skip
# Scores of a user spread so far, and those of a candidate with the keys too, that they do not fit.
APART = EncoderCase(batch=1, length=128, fusion="concat", num_layers=1, sharpen=20.0)


def check(case: EncoderCase, count: int = 4, scale: float = 1.0) -> int:
    """Hold each candidate to the rule of its encoder problem; how many programs went direct."""
    draws = [Request.draw(one, count, scale) for one in case.draws()]
    repeated = [request.repeated() for request in draws]
    results, went_direct = [], 0
    for request in draws:
        results.append(score(request))
        went_direct += len(direct)
    assert_close_to_oracle(
        results,
        [problem.golden() for problem in repeated],
        [problem.low_precision() for problem in repeated],
        label=str(case),
    )
    return went_direct


@pytest.mark.parametrize("name", SHARED)
def test_with_the_user_s_part_shared(name: str) -> None:
    assert check(SHARED[name]) == 0
    assert shares_users()


@pytest.mark.parametrize("name", ORDINARY)
def test_what_cannot_be_shared(name: str) -> None:
    check(ORDINARY[name])
    assert not shares_users()


def test_users_without_events_that_are_computed_go_direct() -> None:
    case = EncoderCase(
        batch=2, length=40, fusion="concat", mask="empty", padding="compute", num_layers=1
    )
    request = dataclasses.replace(Request.draw(case, 4), user_index=torch.tensor([0, 1, 1, 0]))
    repeated = request.repeated()
    result = score(request)
    assert len(direct) == 2 * case.nhead
    assert_close_to_oracle(result, repeated.golden(), repeated.low_precision())


@pytest.mark.parametrize("scale", [200.0, 1e4])
def test_terms_that_do_not_fit_together_go_direct(scale: float) -> None:
    assert check(APART, 2, scale) > 0
    assert shares_users()


def test_company_changes_nothing() -> None:
    """Other candidates, their order, their number, other users: the same bits."""
    case = EncoderCase(
        length=40, fusion="concat", num_layers=1, mask="right", latest_k=4, pool="max"
    )
    request = Request.draw(case, 6)
    whole = score(request)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    candidates, index = request.candidates, request.user_index
    assert torch.equal(
        score(request, candidates=candidates[order], user_index=index[order]), whole[order]
    )
    one = score(request, candidates=candidates[4:5], user_index=index[4:5])
    assert torch.equal(one, whole[4:5])
    mask, user = request.problem.key_padding_mask, int(index[4])
    assert mask is not None
    alone = dataclasses.replace(
        request.problem,
        x=request.problem.x[user : user + 1],
        key_padding_mask=mask[user : user + 1],
    )
    request = Request(alone, candidates[4:5], torch.zeros(1, dtype=torch.int64))
    assert torch.equal(score(request), whole[4:5])


@pytest.mark.parametrize("padding", ["zero", "compute"])
def test_what_padded_slots_hold_does_not_matter(padding: str) -> None:
    case = EncoderCase(
        batch=2, length=30, fusion="concat", mask="holes", padding=padding, num_layers=1
    )
    clean, poisoned = (
        Request.draw(dataclasses.replace(case, poison=poison), 3) for poison in (0.0, math.nan)
    )
    valid = clean.problem.key_padding_mask[clean.user_index] == 0
    assert torch.equal(score(clean)[valid], score(poisoned)[valid])
    assert not direct


def test_a_nan_in_a_candidate_stays_with_it() -> None:
    case = EncoderCase(length=20, fusion="concat", latest_k=4, pool="max", num_layers=1)
    request = Request.draw(case, 4)
    candidates = request.candidates.clone()
    candidates[2, 3] = math.nan
    y, clean = score(request, candidates=candidates), score(request)
    assert y[2].isnan().all()
    rest = torch.arange(4) != 2
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("summary", [(None, "none"), (2, "max")])
@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_illegal_index_gives_nan(
    wrong: int, summary: tuple[int | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nobody looks at the indices before the kernels do."""
    case = EncoderCase(
        length=20, fusion="concat", num_layers=1, latest_k=summary[0], pool=summary[1]
    )
    request = Request.draw(case, 4)
    index = request.user_index.clone()
    index[1] = wrong
    clean = score(request)
    op = importlib.import_module("seqkernels.ops.request_scoring")
    monkeypatch.setattr(op, "is_plain", lambda tensor: False)
    y = score(request, user_index=index)
    assert y[1].isnan().all()
    rest = torch.arange(4) != 1
    assert torch.equal(y[rest], clean[rest])


HERE = "request_scoring"
FAULTS = {
    "candidate's query part forgotten": Fault(HERE, "s += tl.sum(k", "s += 0.0 * tl.sum(k", {}),
    "scale of the next power of two": Fault(HERE, "s * scale", "s * (scale * 0.8660254)", {}),
    "candidate's value part forgotten": Fault(HERE, "(f[j] + b_v[j],)", "(b_v[j],)", {}),
    "no b_v": Fault(HERE, "(f[j] + b_v[j],)", "(f[j],)", {}),
    "sum not weighted": Fault(HERE, "tl.float32) * w[None, :]", "tl.float32)", {}),
    "values not weighted": Fault(HERE, "(w[:, None] * v)", "v", {}),
    "values of padding not cleared": Fault(
        HERE, "tl.where(valid[:, None], v[j], 0.0)", "v[j]",
        {"mask": "right", "padding": "compute", "poison": math.nan},
    ),
    "missing other of weights": Fault(
        HERE, "inside[:, None], 0.0)", "inside[:, None])", {"candidate_dim": 40}
    ),
    "columns of the candidate shifted": Fault(HERE, "CHUNK + E)", "CHUNK + E - 1)", {}),
    "candidate cut short": Fault(
        HERE, "range(0, D - E, STEP)", "range(0, D - E - STEP, STEP)", {"candidate_dim": 40}
    ),
    "users' part by candidate": Fault(HERE, "u = events_row(user_index, b, U, True)", "u = b", {}),
    "one head's exponentials": Fault(
        HERE, "shared += place * ROWS * ROWS", "shared += u * HEADS * ROWS * ROWS", {}
    ),
    "block a row late": Fault(HERE, "t = start + tl.arange(0, HALF)",
                              "t = start + 1 + tl.arange(0, HALF)", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    case = EncoderCase(
        **{"batch": 2, "length": 30, "num_layers": 1, "fusion": "concat", **fault.case}
    )
    assert check(case, 2) == 0
    plant(fault, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, InterpreterError)):
        assert check(case, 2) == 0


def test_without_the_guard_the_rule_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(Fault(HERE, "total < LEAST_SUM", "total < 0.0", {}), tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(APART, 2, 1e4)
