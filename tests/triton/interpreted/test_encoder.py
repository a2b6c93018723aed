"""The encoder's kernels, interpreted: the numerics rule over a grid, and hard inputs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from seqkernels import backends
from seqkernels.testing import EncoderCase, assert_close_to_oracle
from tests.backends.encoder_runs import FLAGGED, flagged, one_sided_problem, oracle
from tests.backends.test_encoder import offset_problem
from tests.kernel_rounding import negative_gelu_problem
from tests.triton.grid import grid_cases
from tests.triton.runs import check, run

TRANSACT = EncoderCase(
    fusion="concat", latest_k=8, pool="max", candidate_dim=32, mask="right", mask_form="lengths",
    dtype=torch.bfloat16,
)  # fmt: skip
HARD = {
    "dense": EncoderCase(batch=2),
    "TransAct": dataclasses.replace(TRANSACT, batch=4, valid=(100, 64, 65, 20)),
    "lengths at strip edges": EncoderCase(
        batch=8, length=112, mask="right", valid=(15, 16, 17, 64, 65, 100, 111, 112),
        poison=math.nan, mask_form="lengths", num_layers=1,
    ),
    "lengths at strip edges, computed": EncoderCase(
        batch=6, length=100, mask="right", valid=(1, 15, 16, 17, 99, 100), padding="compute",
        poison=math.nan, num_layers=1,
    ),
    "starts at strip edges": EncoderCase(
        batch=5, length=100, mask="left", valid=(16, 36, 84, 99, 100), poison=math.nan,
        dtype=torch.bfloat16, num_layers=1,
    ),
    "x3, norm first": EncoderCase(batch=2, sharpen=3.0, norm_first=True, mask="holes"),
    "x40": EncoderCase(batch=1, sharpen=40.0, num_layers=1),
    "1e4": EncoderCase(batch=2, scale=1e4, mask="right"),
    "large eps": EncoderCase(
        batch=1, length=40, layer_norm_eps=0.5, final_norm=True, final_norm_eps=0.5
    ),
    "pool alone": EncoderCase(batch=1, length=20, latest_k=0, pool="max", mask="holes"),
    "offset views": EncoderCase(batch=2, length=20, layout="offset", mask="right"),
    "every other column": EncoderCase(batch=2, length=20, layout="last_dim", fusion="concat"),
    "20 columns": EncoderCase(batch=2, length=30, d_model=20, dim_feedforward=7),
    "nobody": EncoderCase(batch=2, mask="all", poison=math.nan),
    "nobody, computed": EncoderCase(batch=2, length=40, mask="all", padding="compute"),
    "wide": EncoderCase(d_model=256, nhead=4, dim_feedforward=512, length=50, batch=1),
    "wider": EncoderCase(d_model=512, nhead=8, dim_feedforward=64, length=33, batch=1),
    "long": EncoderCase(length=300, batch=1, num_layers=1),
    "long, holes": EncoderCase(length=260, batch=2, num_layers=1, mask="holes", poison=math.nan),
    "long, empty ones": EncoderCase(
        length=140, batch=2, num_layers=1, mask="empty", padding="compute", poison=math.nan
    ),
    "one head of 128": EncoderCase(batch=1, d_model=128, nhead=1, length=40),
    "one column a head": EncoderCase(batch=1, d_model=16, nhead=16, length=40),
    "one feed-forward column": EncoderCase(batch=1, dim_feedforward=1, length=20),
}  # fmt: skip


@pytest.mark.parametrize("case", grid_cases(), ids=lambda case: f"grid{case.seed}")
def test_grid(case: EncoderCase) -> None:
    check(case)


@pytest.mark.parametrize("name", HARD)
def test_hard(name: str) -> None:
    check(HARD[name])


@pytest.mark.parametrize("name", [name for name in HARD if name.startswith("long")])
def test_long_where_barriers_show_no_writes(name: str) -> None:
    check(HARD[name], "gfx942")


@pytest.mark.parametrize("computes_padding", [False, True])
@pytest.mark.parametrize("name", FLAGGED)
def test_padding_answered_on_the_device(name: str, computes_padding: bool) -> None:
    case, problems = flagged(name, computes_padding)
    results = [run(problem, computes_padding=computes_padding) for problem in problems]
    assert_close_to_oracle(results, *oracle(case)[1:], label=name)
    assert torch.equal(results[0].nan_to_num(), run(oracle(case)[0][0]).nan_to_num())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_far_from_zero(sign: float) -> None:
    problem = offset_problem(sign, "holes")
    assert_close_to_oracle(run(problem), problem.golden(), problem.low_precision())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weights_times_values_out_of_range(sign: float) -> None:
    problem = one_sided_problem(sign)
    assert_close_to_oracle(run(problem), problem.golden(), problem.low_precision())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_forms(activation: str) -> None:
    problem = negative_gelu_problem(activation)
    result = run(problem)
    assert_close_to_oracle(result, problem.golden(), problem.low_precision())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("length", [40, 140])
@pytest.mark.parametrize("summary", [(None, "none"), (3, "max")])
def test_non_finite_events_are_seen(
    value: float, length: int, summary: tuple[int | None, str]
) -> None:
    """A NaN that a user does have ends in that user's result, and in no other's."""
    case = EncoderCase(
        length=length, num_layers=1, mask="right", valid=(40, 20, 33),
        latest_k=summary[0], pool=summary[1],
    )  # fmt: skip
    clean = case.problem()
    x = clean.x.clone()
    x[1, 5, 7] = value
    dirty = dataclasses.replace(clean, x=x)
    result, golden = run(dirty), dirty.golden()
    assert not golden[1].isfinite().all()
    assert torch.equal(result.isnan(), golden.isnan())
    assert torch.equal(result[[0, 2]], run(clean)[[0, 2]])


@pytest.mark.parametrize("length", [100, 140])
def test_company_changes_nothing(length: int) -> None:
    """A sequence gives the same bits alone and among others."""
    case = EncoderCase(batch=3, length=length, num_layers=1, mask="right", valid=(60, 100, 7))
    together = case.problem()
    mask = together.key_padding_mask
    assert mask is not None
    alone = dataclasses.replace(together, x=together.x[1:2], key_padding_mask=mask[1:2])
    assert torch.equal(run(together)[1:2], run(alone))


@pytest.mark.parametrize("summary", [(None, "none"), (2, "max")])
@pytest.mark.parametrize("wrong", [-1, 31])
def test_an_illegal_length_gives_nan(wrong: int, summary: tuple[int | None, str]) -> None:
    """To look at lengths would stop the stream; nothing outside the tensors is read either."""
    case = EncoderCase(
        length=30, num_layers=1, mask="right", valid=(30, 12, 5), mask_form="lengths",
        latest_k=summary[0], pool=summary[1],
    )  # fmt: skip
    problem = case.problem()
    lengths = problem.lengths
    assert lengths is not None
    broken = lengths.clone()
    broken[1] = wrong
    result = run(dataclasses.replace(problem, lengths=broken))
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], run(problem)[[0, 2]])


def test_the_count_of_calls_names_the_backend() -> None:
    before = backends.calls["triton/sm_80"]
    run(EncoderCase(batch=1, length=3, num_layers=1).problem())
    assert backends.calls["triton/sm_80"] == before + 1
