"""The encoder on every instruction set: the numerics rule over a grid, and hard inputs."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from seqkernels.testing import EncoderCase, EncoderProblem, assert_close_to_oracle
from tests.backends.encoder_runs import check, grid_cases, on_each_isa, run
from tests.kernel_rounding import negative_gelu_problem
from tests.selection import every

TRANSACT = EncoderCase(
    fusion="concat", latest_k=8, pool="max", candidate_dim=32, mask="right", mask_form="lengths"
)
HARD = {
    "dense": EncoderCase(batch=4),
    "dense, bf16": EncoderCase(batch=4, dtype=torch.bfloat16),
    "TransAct": dataclasses.replace(TRANSACT, batch=8),
    "lengths at strip edges": EncoderCase(
        batch=10, length=112, mask="right", valid=(1, 15, 16, 17, 32, 33, 100, 111, 112, 2),
        poison=math.nan,
    ),
    "lengths at strip edges, computed": EncoderCase(
        batch=6, length=100, mask="right", valid=(1, 15, 16, 17, 99, 100), padding="compute",
        poison=math.nan,
    ),
    "starts at strip edges": EncoderCase(
        batch=8, length=100, mask="left", valid=(1, 4, 5, 84, 85, 99, 100, 36), poison=math.nan,
        dtype=torch.bfloat16,
    ),
    "x3": EncoderCase(sharpen=3.0, mask="right", valid=(100, 60, 40)),
    "x3, norm first": EncoderCase(sharpen=3.0, norm_first=True, mask="holes"),
    "x40": EncoderCase(sharpen=40.0, num_layers=1),
    "x40, two layers": EncoderCase(
        sharpen=40.0, d_model=64, nhead=4, mask="right", valid=(100, 97, 90), poison=math.nan
    ),
    "x40, computed": EncoderCase(
        sharpen=40.0, padding="compute", mask="right", valid=(90, 80, 100), num_layers=1,
        d_model=64, nhead=1, dtype=torch.bfloat16,
    ),
    "1e4": EncoderCase(scale=1e4, mask="right"),
    "1e4, bf16, norm first": EncoderCase(scale=1e4, norm_first=True, dtype=torch.bfloat16),
    "1e-3": EncoderCase(scale=1e-3, bias=False),
    "large eps": EncoderCase(layer_norm_eps=0.5, final_norm=True, final_norm_eps=0.5),
    "nobody": EncoderCase(mask="all", poison=math.nan),
    "nobody, computed": EncoderCase(mask="all", padding="compute"),
    "nobody, no bias": EncoderCase(mask="all", padding="compute", bias=False, norm_first=True),
    "some empty": EncoderCase(batch=5, mask="empty", poison=math.inf, final_norm=True),
    "one event": EncoderCase(length=1),
    "wide": EncoderCase(d_model=256, nhead=4, dim_feedforward=1024, length=50, batch=1),
    "wider": EncoderCase(d_model=512, nhead=8, dim_feedforward=64, length=33, batch=1),
    "long": EncoderCase(length=517, batch=1, num_layers=1),
    "long, holes": EncoderCase(length=400, batch=2, num_layers=1, mask="holes", poison=math.nan),
    "one head of 128": EncoderCase(d_model=128, nhead=1, length=40),
    "one column a head": EncoderCase(d_model=16, nhead=16, length=40),
    "default feed-forward": EncoderCase(d_model=64, nhead=8, dim_feedforward=2048, length=16),
    "one feed-forward column": EncoderCase(dim_feedforward=1, length=20),
    "eight layers": EncoderCase(num_layers=8, length=20, norm_first=True),
}  # fmt: skip


@on_each_isa
@pytest.mark.parametrize("case", every(2, grid_cases()), ids=lambda case: f"grid{case.seed}")
def test_grid(case: EncoderCase, isa: str) -> None:
    check(case, isa)


@on_each_isa
@pytest.mark.parametrize("name", HARD)
def test_hard(name: str, isa: str) -> None:
    check(HARD[name], isa)


@on_each_isa
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_that_of_torch(norm_first: bool, dtype: torch.dtype, isa: str) -> None:
    """At the reference shape the rule's allowance is not needed: the mean is well below 1."""
    case = EncoderCase(norm_first=norm_first, dtype=dtype)
    problems = [dataclasses.replace(case, seed=seed).problem() for seed in range(16)]
    closeness = assert_close_to_oracle(
        [run(problem, isa) for problem in problems],
        [problem.golden() for problem in problems],
        [problem.low_precision() for problem in problems],
    )
    assert closeness.mean_ratio <= 1.0
    assert closeness.max_ratio <= 1.0


def offset_problem(sign: float, mask: str) -> EncoderProblem:
    """Scores that are all near sign * 4e4, and spread by a few around it.

    The first feature of each token is 1; the first feature of q and of k is a multiple of it alone.
    """
    problem = EncoderCase(num_layers=1, mask=mask, poison=math.nan, length=50).problem()
    x = problem.x.clone()
    x[..., 0] = torch.where(x[..., 0].isnan(), math.nan, 1.0)
    w_in, b_in, *rest = problem.weights
    assert w_in is not None
    assert b_in is not None
    w_in, b_in = w_in.clone(), b_in.clone()
    for row, value in ((0, 256.0 * sign), (96, 1024.0)):
        w_in[row] = 0.0
        w_in[row, 0] = value
        b_in[row] = 0.0
    return dataclasses.replace(problem, x=x, weights=(w_in, b_in, *rest))


@on_each_isa
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("mask", ["right", "holes"])
def test_scores_far_from_zero(sign: float, mask: str, isa: str) -> None:
    problem = offset_problem(sign, mask)
    assert_close_to_oracle(run(problem, isa), problem.golden(), problem.low_precision())


@on_each_isa
def test_attention_to_exactly_one_key(isa: str) -> None:
    """Tokens are multiples of unit vectors, so each attends to its equals by a margin of 1e6."""
    problem = EncoderCase(num_layers=1, length=48, mask="right", valid=(48, 31, 17)).problem()
    w_in, b_in, *rest = problem.weights
    assert w_in is not None
    w_in = w_in.clone()
    w_in[:192] = 64.0 * torch.eye(96).repeat(2, 1)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(96, generator=generator)[:48] for _ in range(3)])
    x = 32.0 * torch.nn.functional.one_hot(order, 96).float()
    problem = dataclasses.replace(problem, x=x, weights=(w_in, b_in, *rest))
    assert_close_to_oracle(run(problem, isa), problem.golden(), problem.low_precision())


@on_each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_overflow_nothing(dtype: torch.dtype, isa: str) -> None:
    """Features of 1e4 through weights of ordinary size: scores of 1e8, which choose one key."""
    case = EncoderCase(scale=1e4, sharpen=1e8, mask="right", dtype=dtype, poison=math.nan)
    for norm_first in (False, True):
        result = run(dataclasses.replace(case, norm_first=norm_first).problem(), isa)
        assert result.isfinite().all()


@on_each_isa
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_forms(activation: str, isa: str) -> None:
    problem = negative_gelu_problem(activation)
    result = run(problem, isa)
    assert_close_to_oracle(result, problem.golden(), problem.low_precision())
    other = negative_gelu_problem("gelu" if activation == "gelu_tanh" else "gelu_tanh")
    with pytest.raises(AssertionError, match="break the rule"):
        assert_close_to_oracle(result, other.golden(), other.low_precision())


@on_each_isa
@pytest.mark.parametrize("fusion", ["none", "concat", "append"])
@pytest.mark.parametrize("summary", [(None, "none"), (8, "max"), (0, "max"), (3, "none")])
def test_empty_batch(fusion: str, summary: tuple[int | None, str], isa: str) -> None:
    case = EncoderCase(batch=0, fusion=fusion, latest_k=summary[0], pool=summary[1], mask="right")
    result = run(case.problem(), isa)
    assert result.shape == case.golden().shape
    check(case, isa)


@on_each_isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("summary", [(None, "none"), (3, "max")])
@pytest.mark.parametrize("padding", ["zero", "compute"])
def test_non_finite_events_are_seen(
    value: float, norm_first: bool, summary: tuple[int | None, str], padding: str, isa: str
) -> None:
    """A NaN that a user does have ends in that user's result, and in no other's."""
    case = EncoderCase(
        length=40, norm_first=norm_first, mask="right", valid=(40, 20, 33), padding=padding,
        latest_k=summary[0], pool=summary[1],
    )  # fmt: skip
    clean = case.problem()
    x = clean.x.clone()
    x[1, 5, 7] = value
    dirty = dataclasses.replace(clean, x=x)
    result = run(dirty, isa)
    # Infinity meets itself in the products, as far as there are any, and becomes NaN.
    golden = dirty.golden()
    assert not golden[1].isfinite().all()
    assert torch.equal(result.isnan(), golden.isnan())
    assert torch.equal(result[[0, 2]], run(clean, isa)[[0, 2]])


@on_each_isa
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mask", ["right", "holes"])
def test_the_computed_output_of_a_poisoned_slot_is_poisoned(
    value: float, mask: str, isa: str
) -> None:
    """With padding="compute" the pool covers padded positions too, as torch's maximum does."""
    for latest_k, pool in ((None, "none"), (8, "max"), (0, "max")):
        case = EncoderCase(
            length=40, mask=mask, padding="compute", poison=value, latest_k=latest_k, pool=pool
        )
        check(case, isa)


@hypothesis_settings(
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],  # to shrink a failure takes minutes
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
@on_each_isa
def test_any_shape(isa: str, data: st.DataObject) -> None:
    def choose(name: str, values: list[Any]) -> Any:
        return data.draw(st.sampled_from(values), label=name)

    nhead = data.draw(st.integers(1, 6), label="nhead")
    head_dim = data.draw(st.integers(1, 70), label="head_dim")
    length = data.draw(st.integers(1, 140), label="length")
    # A narrower model would need many draws: see EncoderCase.draws.
    head_dim = max(head_dim, -(-12 // nhead))
    mask = choose("mask", ["none", "right", "left", "holes", "empty", "all"])
    summary = choose("summary", [(None, "none"), (8, "max"), (0, "max"), (1, "none")])
    check(
        EncoderCase(
            batch=data.draw(st.integers(0, 3), label="batch"),
            length=length,
            d_model=nhead * head_dim,
            nhead=nhead,
            dim_feedforward=data.draw(st.integers(1, 150), label="dim_feedforward"),
            num_layers=data.draw(st.integers(1, 2), label="num_layers"),
            activation=choose("activation", ["relu", "gelu", "gelu_tanh", "leaky_relu"]),
            norm_first=choose("norm_first", [False, True]),
            fusion=choose("fusion", ["none", "concat", "append"]),
            padding=choose("padding", ["zero", "compute"]),
            order=choose("order", ["latest_first", "latest_last"]),
            latest_k=summary[0],
            pool=summary[1],
            bias=choose("bias", [False, True]),
            final_norm=choose("final_norm", [False, True]),
            mask=mask,
            poison=None if mask == "none" else math.nan,
            dtype=choose("dtype", [torch.float32, torch.bfloat16]),
            seed=data.draw(st.integers(0, 10_000), label="seed"),
        ),
        isa,
    )
