"""The numerics rule: what it accepts and refuses, the problems drawn for it, planted mistakes."""

import dataclasses
import doctest
import math

import pytest
import torch
from torch import Tensor, nn

import seqkernels.testing
from seqkernels.testing import EncoderCase, assert_close_to_oracle, check_encoder
from tests.kernel_rounding import DEFECTS, emulate, negative_gelu_problem

# ------------------------------------------------------------------------------------- the rule


def draw(*shape: int) -> tuple[Tensor, Tensor]:
    """An oracle in fp64 and a yardstick that errs by 1 everywhere."""
    golden = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return golden, golden + 1.0


def test_examples_run() -> None:
    results = doctest.testmod(seqkernels.testing)
    assert results.attempted
    assert not results.failed


def test_ratios_are_measured_per_sequence() -> None:
    g, lp = draw(3, 5, 4)
    y = g.clone()
    y[1] += 0.5
    y[2, 0, 0] += 1.0
    result = assert_close_to_oracle(y, g, lp)
    assert result.max_ratios == pytest.approx((0.0, 0.5, 1.0))
    assert result.mean_ratios == pytest.approx((0.0, 0.5, 1 / 20))
    assert (result.max_ratio, result.mean_ratio) == pytest.approx((1.0, 0.5))


@pytest.mark.parametrize(("factor", "passes"), [(1.999, True), (2.001, False)])
def test_max_rule(factor: float, passes: bool) -> None:
    g, lp = draw(3, 5, 4)
    y = g.clone()
    y[1, 2, 3] -= factor
    if passes:
        assert_close_to_oracle(y, g, lp)
    else:
        with pytest.raises(AssertionError):
            assert_close_to_oracle(y, g, lp)


@pytest.mark.parametrize(("factor", "passes"), [(1.499, True), (1.501, False)])
def test_mean_rule(factor: float, passes: bool) -> None:
    g, lp = draw(3, 5, 4)
    y = g.clone()
    y[2] += factor
    if passes:
        assert_close_to_oracle(y, g, lp)
    else:
        with pytest.raises(AssertionError):
            assert_close_to_oracle(y, g, lp)


def test_a_good_neighbour_does_not_help() -> None:
    g, lp = draw(3, 5, 4)
    lp[1:] += 100.0
    y = g.clone()
    y[0, 0, 0] += 3.0
    with pytest.raises(AssertionError, match="sequence 0"):
        assert_close_to_oracle(y, g, lp)


def test_there_is_no_floor() -> None:
    g, lp = draw(2, 5, 4)
    lp[1] = g[1] = 0.0
    assert assert_close_to_oracle(g.clone(), g, lp).max_ratio == 0.0
    y = g.clone()
    y[1, 0, 0] = 1e-30
    with pytest.raises(AssertionError, match="inf times"):
        assert_close_to_oracle(y, g, lp)


def test_message_shows_where_and_what() -> None:
    g, lp = draw(3, 5, 4)
    y = g.clone()
    y[1, 2, 3] = 40.0
    with pytest.raises(AssertionError) as caught:
        assert_close_to_oracle(y, g, lp, label="case seven")
    message = str(caught.value)
    for part in (
        "case seven: 1 of 3 sequences",
        "sequence 1:",
        "index [1, 2, 3]:",
        "y=40.0",
        f"lp={float(lp[1, 2, 3])!r}",
        f"g={float(g[1, 2, 3])!r}",
        f"is {abs(40 - float(g[1, 2, 3])):.2f} times",
        "(allowed 2)",
        "(allowed 1.5)",
    ):
        assert part in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_positions_have_to_agree(value: float) -> None:
    g, lp = draw(3, 5, 4)
    y = g.clone()
    y[1, 2, 3] = value
    with pytest.raises(AssertionError, match=r"not finite as golden is; first: index \[1, 2, 3\]"):
        assert_close_to_oracle(y, g, lp)
    with pytest.raises(AssertionError, match="not finite as golden is"):
        assert_close_to_oracle(g, y, lp)
    # The same value in both is agreement, whatever the yardstick has there.
    for there in (value, 1e30):
        lp[1, 2, 3] = there
        assert assert_close_to_oracle(y, y, lp).max_ratio == 0.0
    if math.isinf(value):
        other = y.clone()
        other[1, 2, 3] = -value
        with pytest.raises(AssertionError):
            assert_close_to_oracle(other, y, lp)


def test_a_yardstick_that_is_not_finite_is_refused() -> None:
    g, lp = draw(3, 5, 4)
    lp[0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="no yardstick"):
        assert_close_to_oracle(g, g, lp)


def test_draws_are_pooled_per_sequence() -> None:
    g, lp = draw(2, 4)
    exact = lp.clone()
    exact[0] = g[0]
    y = g.clone()
    y[0] += 0.7
    with pytest.raises(AssertionError):
        assert_close_to_oracle(y, g, exact)
    result = assert_close_to_oracle([y, g], [g, g], [exact, lp])
    assert result.max_ratios == pytest.approx((0.7, 0.0))
    assert result.mean_ratios == pytest.approx((0.7, 0.0))
    y[0, 0] = g[0, 0] + 3.0
    with pytest.raises(AssertionError, match=r"index \[0, 0\] of draw 1"):
        assert_close_to_oracle([g, y], [g, g], [exact, lp])


def test_misuse_is_refused() -> None:
    g, lp = draw(2, 4)
    with pytest.raises(ValueError, match="equal shapes"):
        assert_close_to_oracle(g[:, :1], g, lp)
    with pytest.raises(ValueError, match="equal shapes"):
        assert_close_to_oracle([], [], [])
    with pytest.raises(ValueError, match="as many draws"):
        assert_close_to_oracle([g, g], [g], [lp, lp])
    with pytest.raises(ValueError, match="expected float64"):
        assert_close_to_oracle(g, g.float(), lp)


def test_an_empty_batch_is_close() -> None:
    g, lp = draw(0, 5, 4)
    result = assert_close_to_oracle(g, g, lp)
    assert (result.max_ratio, result.mean_ratio) == (0.0, 0.0)


# ----------------------------------------------------------------------------------- the problems


@pytest.mark.parametrize(
    "case",
    [
        EncoderCase(),
        EncoderCase(sharpen=40.0, bias=False),
        EncoderCase(norm_first=True, scale=1e4),
        EncoderCase(scale=1e4, fusion="concat", dtype=torch.bfloat16),
        EncoderCase(d_model=20, nhead=10, num_layers=3, fusion="append"),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_spread(case: EncoderCase, seed: int) -> None:
    case = dataclasses.replace(case, seed=seed, batch=8, length=64)
    problem, d, heads = case.problem(), case.d_model, case.nhead
    weights = [None if w is None else w.double() for w in problem.weights]
    x = problem.x.double()
    if case.fusion == "concat":
        assert problem.candidate is not None
        x = torch.cat([x, problem.candidate.double()[:, None].expand(-1, 64, -1)], -1)
    for i in range(case.num_layers):
        layer = weights[12 * i : 12 * i + 12]
        y = nn.functional.layer_norm(x, (d,), layer[8], layer[9]) if case.norm_first else x
        q, k, _ = nn.functional.linear(y, layer[0], layer[1]).chunk(3, -1)
        for h in range(heads):
            part = slice(h * d // heads, (h + 1) * d // heads)
            scores = q[..., part] @ k[..., part].transpose(1, 2) * (heads / d) ** 0.5
            assert 0.3 * case.sharpen < scores.std(-1).mean() < 5 * case.sharpen
        scores = torch.stack([scores])
        options = problem.options | {"fusion": "none"}
        x = seqkernels.reference.encoder(x, None, layer, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fusion", ["none", "concat", "append"])
def test_values_are_exact_in_bf16_and_weights_are_not_trivial(
    dtype: torch.dtype, fusion: str
) -> None:
    problem = EncoderCase(dtype=dtype, fusion=fusion, final_norm=True, seed=3).problem()
    assert len(problem.weights) == 26
    for t in (problem.x, problem.candidate, *problem.weights):
        if t is not None:
            assert t.dtype == dtype
            assert torch.equal(t, t.bfloat16().to(dtype))
            assert t.double().std() > 0.05
    # Rounding that the kernels may do anyway changes nothing; without it, it does.
    rough = EncoderCase(fusion=fusion, representable=False, seed=3).problem()
    assert not torch.equal(rough.x, rough.x.bfloat16().float())
    assert torch.equal(rough.x.bfloat16().to(dtype), problem.x)


def test_drawing_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    case = EncoderCase(mask="holes", fusion="append", seed=5)
    one, two = case.problem(), case.problem()
    case.low_precision()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.x, two.x)
    other = dataclasses.replace(case, batch=7, length=9, mask="all", padding="compute")
    for a, b in zip(one.weights, other.problem().weights, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    assert not torch.equal(one.x, dataclasses.replace(case, seed=6).problem().x)


@pytest.mark.parametrize("layout", ["offset", "strided", "transposed", "last_dim"])
def test_layouts_hold_the_same_values(layout: str) -> None:
    case = EncoderCase(mask="holes", fusion="concat")
    plain, other = case.problem(), dataclasses.replace(case, layout=layout).problem()
    for a, b in (
        (plain.x, other.x),
        (plain.candidate, other.candidate),
        (plain.key_padding_mask, other.key_padding_mask),
    ):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    assert (other.x.storage_offset() == 1) == (layout == "offset")
    assert other.x.is_contiguous() == (layout == "offset")


def test_masks() -> None:
    def valid(**options: object) -> Tensor:
        problem = EncoderCase(batch=6, length=8, **options).problem()  # type: ignore[arg-type]
        assert problem.key_padding_mask is not None
        return problem.key_padding_mask == 0

    position = torch.arange(8)
    right = valid(mask="right")
    assert torch.equal(right, position < right.sum(1, keepdim=True))
    assert (right.sum(1) >= 1).all()
    assert len(set(right.sum(1).tolist())) > 2
    assert torch.equal(valid(mask="left"), right.flip(1))
    assert torch.equal(valid(mask="right", mask_form="float"), right)
    lengths = EncoderCase(batch=6, length=8, mask="right", mask_form="lengths").problem().lengths
    assert lengths is not None
    assert torch.equal(lengths, right.sum(1))
    assert valid(mask="right", valid=(8, 0, 1, 2, 3, 4)).sum(1).tolist() == [8, 0, 1, 2, 3, 4]
    assert valid(mask="empty").any(1).tolist() == [False, True] * 3
    assert not valid(mask="all").any()
    holes = valid(mask="holes")
    assert holes.any(1).all()
    assert not torch.equal(holes, position < holes.sum(1, keepdim=True))
    with pytest.raises(ValueError, match="unknown kind 'up'"):
        valid(mask="up")
    with pytest.raises(ValueError, match="cannot express"):
        valid(mask="left", mask_form="lengths")


def test_poison_fills_padded_slots_and_only_them() -> None:
    case = EncoderCase(mask="holes")
    clean, dirty = case.problem(), dataclasses.replace(case, poison=math.nan).problem()
    assert clean.key_padding_mask is not None
    assert torch.equal(dirty.x.isnan().all(-1), clean.key_padding_mask)
    assert torch.equal(dirty.x.isnan().any(-1), clean.key_padding_mask)
    assert torch.equal(dirty.x[~clean.key_padding_mask], clean.x[~clean.key_padding_mask])
    assert torch.equal(dirty.golden(), clean.golden())
    assert torch.equal(dirty.low_precision(), clean.low_precision())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("final_norm", [False, True])
def test_yardstick_is_torch_in_bf16(norm_first: bool, activation: str, final_norm: bool) -> None:
    case = EncoderCase(
        batch=4,
        length=11,
        norm_first=norm_first,
        activation=activation,
        final_norm=final_norm,
        final_norm_eps=0.1,
        mask="right",
        padding="compute",
    )
    problem = case.problem()
    layer = nn.TransformerEncoderLayer(
        96, 2, 32, activation=activation, batch_first=True, norm_first=norm_first
    )
    norm = nn.LayerNorm(96, eps=0.1) if final_norm else None
    model = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    state = dict(zip(model.state_dict(), problem.weights, strict=True))
    model.load_state_dict(state)
    model = model.bfloat16().eval()
    expected = model(problem.x.bfloat16(), src_key_padding_mask=problem.key_padding_mask)
    assert torch.equal(problem.low_precision(), expected)
    with torch.inference_mode():
        assert torch.equal(case.problem().low_precision(), expected)
    error = (expected.double() - problem.golden()).abs()
    assert 1e-4 < error.mean() < 2e-2


def test_short_sequences_and_sharpened_scores_are_drawn_more_often() -> None:
    assert len(EncoderCase().draws()) == 1
    assert len(EncoderCase(length=1).draws()) == 11
    assert len(EncoderCase(mask="right", valid=(100, 1, 0)).draws()) == 11
    assert len(EncoderCase(mask="right", valid=(100, 1, 0), padding="compute").draws()) == 1
    assert len(EncoderCase(latest_k=0, pool="max").draws()) == 11
    assert len(EncoderCase(sharpen=40.0).draws()) == 32
    draws = EncoderCase(length=1, seed=4).draws()
    assert len({case.seed for case in draws}) == 11
    assert draws[0].seed == 4


# ------------------------------------------------------------------------------- planted mistakes

PADDED = EncoderCase(mask="right")
SUMMARY = EncoderCase(mask="left", order="latest_last", latest_k=8, pool="max", length=16)
CASES = {
    "dense": EncoderCase(),
    "padded": PADDED,
    "bf16": dataclasses.replace(PADDED, dtype=torch.bfloat16),
    "short": EncoderCase(length=7),
    "narrow": EncoderCase(length=16, d_model=20, dim_feedforward=7),
    "norm first": dataclasses.replace(PADDED, norm_first=True),
    "final norm": dataclasses.replace(PADDED, final_norm=True),
    "small": EncoderCase(bias=False, scale=0.02),
    "large": dataclasses.replace(PADDED, scale=1e4),
    "sharp": dataclasses.replace(PADDED, sharpen=3.0),
    "gelu": EncoderCase(activation="gelu"),
    "leaky": EncoderCase(activation="leaky_relu", negative_slope=0.2),
    "summary": SUMMARY,
    "pool": EncoderCase(latest_k=0, pool="max", length=7, mask="right", valid=(7, 5, 3)),
    "concat": EncoderCase(fusion="concat"),
    "append": EncoderCase(fusion="append"),
    "computed": EncoderCase(mask="holes", padding="compute", poison=math.nan),
    "nobody": EncoderCase(mask="all", padding="compute"),
}

# The case that shows a mistake, where "padded" does not.
SHOWN_BY = {
    "norm with ddof=1": "narrow",  # 1 part in 2 * 96 is less than bf16 errs; 1 in 40 is more
    "norm eps 1e-2": "small",  # of variances near 1 an eps takes nothing that bf16 would keep
    "leaky slope 0.01": "leaky",
    "query strip stale": "dense",
    "final norm skipped on padding": "final norm",
    "window shifted by one": "summary",
    "window from the other end": "summary",
    "pool ignores one position": "pool",
    "pool ignores padding": "pool",
    "candidate forgotten": "concat",
}


@pytest.mark.parametrize("name", CASES)
def test_correct_kernel_rounding_passes(name: str) -> None:
    for seed in range(3):
        check_encoder(dataclasses.replace(CASES[name], seed=seed), emulate)


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d != "tanh gelu"])
def test_planted_defect_fails(defect: str) -> None:
    case = CASES[SHOWN_BY.get(defect, "padded")]
    for seed in range(3):
        with pytest.raises(AssertionError, match="break the rule"):
            check_encoder(dataclasses.replace(case, seed=seed), lambda p: emulate(p, defect))


def test_appended_candidate_forgotten_fails() -> None:
    with pytest.raises(AssertionError, match="break the rule"):
        check_encoder(CASES["append"], lambda p: emulate(p, "candidate forgotten"))


def test_gelu_forms_differ_where_gelu_is_small() -> None:
    """Elsewhere the two differ by less than bf16 errs: 5e-4 beside values of about 1."""
    check_encoder(CASES["gelu"], lambda p: emulate(p, "tanh gelu"))
    for form, defect in (("gelu", "tanh gelu"), ("gelu_tanh", None)):
        problem = negative_gelu_problem(form)
        yardstick = (problem.golden(), problem.low_precision())
        assert_close_to_oracle(emulate(problem), *yardstick)
        wrong = negative_gelu_problem("gelu" if defect is None else form)
        with pytest.raises(AssertionError, match="break the rule"):
            assert_close_to_oracle(emulate(wrong, defect), *yardstick)
