"""EngagementRanker: its function, its errors, training, serving, and its life within torch."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkernels
from seqkernels import backends
from seqkernels.models import CrossNetwork, EngagementRanker, EngagementRankerConfig, stock_twin
from seqkernels.testing import assert_close_to_oracle
from tests.models.ranker_problem import (
    DENSE,
    LENGTHS,
    B,
    Inputs,
    L,
    config,
    draw,
    in_dtype,
    make,
)

FUSED = "cpu/" if backends.native_module.module is not None else "reference"
DRAWS = 48  # a row of logits is a short sequence: the rule wants several
# torch's own modules use what it deprecates, and say of their fast path that it is a prototype
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"heads": ("click",), "cross_layers": 0},
    {"cross_rank": 4, "cross_layers": 3},
    {"head_hidden": 6},
    {"pool": "none"},
    {"latest_k": 0},
    {"latest_k": 20},
    {"nhead": 3},
    {"hidden": (12,), "num_layers": 1},
    {"action_dim": 4, "item_dim": 10},
]


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(*inputs)
    return result


def check_against_stock(served: nn.Module, ranker: EngagementRanker) -> None:
    """Hold a model in eval mode to the rule, by the twin of the ranker it was made of."""
    golden, low = (in_dtype(stock_twin(ranker), dtype) for dtype in (torch.float64, torch.bfloat16))
    draws = [draw(seed) for seed in range(DRAWS)]
    assert_close_to_oracle(
        [run(served, d) for d in draws],
        [run(golden, d.to(torch.float64)) for d in draws],
        [run(low, d) for d in draws],
    )


# --- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_definition_is_that_of_stock_torch(options: dict[str, Any]) -> None:
    """In float64, where two ways to one function give nearly the same."""
    ranker = make(**options)
    double = in_dtype(ranker, torch.float64)
    twin = in_dtype(stock_twin(ranker), torch.float64)
    for seed in range(5):
        inputs = draw(seed).to(torch.float64)
        torch.testing.assert_close(run(double, inputs), run(twin, inputs))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_serving(options: dict[str, Any]) -> None:
    ranker = make(**options)
    backends.calls.clear()
    result = run(ranker, draw())
    assert any(label.startswith(FUSED) for label in backends.calls)
    assert result.shape == (B, len(ranker.config.heads))
    assert result.dtype == torch.float32
    check_against_stock(ranker, ranker)


def test_cross_network_by_hand() -> None:
    """Every product of a feature with each combination, one degree more for each layer."""
    cross = CrossNetwork(3, num_layers=2)
    x = torch.randn(4, 3)
    expected = x
    for layer in cross.layers:
        assert isinstance(layer, nn.Linear)
        w, b = layer.weight, layer.bias
        rows = [x[n] * (w @ expected[n] + b) + expected[n] for n in range(4)]
        expected = torch.stack(rows)
    torch.testing.assert_close(cross(x), expected)


def test_cross_network_of_low_rank() -> None:
    cross, full = CrossNetwork(6, 1, rank=2), CrossNetwork(6, 1)
    low, linear = cross.layers[0], full.layers[0]
    assert isinstance(low, nn.Sequential)
    assert isinstance(linear, nn.Linear)
    v, u = low
    with torch.no_grad():
        linear.weight.copy_(u.weight @ v.weight)  # [6, 2] @ [2, 6]
        linear.bias.copy_(u.bias)
    x = torch.randn(4, 6)
    torch.testing.assert_close(cross(x), full(x))


def test_heads_are_columns_by_name() -> None:
    ranker = make()
    inputs = draw()
    logits = run(ranker, inputs)
    with torch.inference_mode():
        predicted = ranker.predict(*inputs)
    assert list(predicted) == ["click", "save"]
    for column, p in enumerate(predicted.values()):
        assert torch.equal(p, logits[:, column].sigmoid())
    with torch.no_grad():
        head = ranker.heads["save"]
        assert isinstance(head, nn.Linear)
        head.weight.zero_()
        head.bias.fill_(3.0)
    changed = run(ranker, inputs)
    assert torch.equal(changed[:, 0], logits[:, 0])
    assert torch.equal(changed[:, 1], torch.full((B,), 3.0))


@pytest.mark.parametrize("mode", ["serving", "gradients", "training"])
def test_what_is_padded_does_not_matter(mode: str) -> None:
    ranker = make(dropout=0.0).train(mode == "training")
    inputs = draw()
    other = draw(1)
    padded = torch.arange(L) >= inputs.lengths[:, None]
    changed = inputs._replace(
        actions=torch.where(padded, other.actions, inputs.actions),
        items=torch.where(padded, other.items, inputs.items),
    )
    with torch.set_grad_enabled(mode != "serving"):
        assert torch.equal(ranker(*inputs), ranker(*changed))
    if mode == "serving":  # and how much of it there is
        some = Inputs(*(t[1:4] for t in inputs))
        cut = some._replace(actions=some.actions[:, :6], items=some.items[:, :6])
        assert torch.equal(run(ranker, some), run(ranker, cut))


def test_every_input_matters() -> None:
    ranker, inputs = make(), draw()
    before = run(ranker, inputs)
    has_events = inputs.lengths > 0
    changes = {
        "actions": inputs.actions % 4 + 1,
        "items": inputs.items % 29 + 1,
        "lengths": inputs.lengths - has_events.long(),
        "dense": inputs.dense + 1.0,
        "candidate": inputs.candidate % 29 + 1,
    }
    for name, changed in changes.items():
        moved = (run(ranker, inputs._replace(**{name: changed})) != before).any(1)
        expected = torch.ones(B, dtype=torch.bool)
        if name in ("actions", "items", "lengths"):
            expected = has_events
        assert torch.equal(moved, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_user_with_many_candidates_is_that_user_many_times(dtype: torch.dtype) -> None:
    ranker = in_dtype(make(), dtype)
    one = draw(lengths=(7,)).to(dtype)._replace(candidate=torch.arange(1, 20))
    many = Inputs(*(t.repeat_interleave(19, 0) for t in one[:4]), one.candidate)
    twin = stock_twin(ranker)
    torch.testing.assert_close(run(twin, one), run(twin, many))
    if dtype is torch.float64:
        torch.testing.assert_close(run(ranker, one), run(ranker, many))
        return
    # In bf16 both are right, by different roundings.
    golden = run(stock_twin(in_dtype(make(), torch.float64)), many.to(torch.float64))
    low = run(stock_twin(in_dtype(make(), torch.bfloat16)), many.to(torch.bfloat16))
    for inputs in (one, many):
        y = run(ranker, inputs)
        assert_close_to_oracle(y.unsqueeze(0), golden.unsqueeze(0), low.unsqueeze(0))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_request_of_several_users_is_each_pair(shuffled: bool) -> None:
    ranker, inputs = in_dtype(make(), torch.float64), draw().to(torch.float64)
    user = torch.arange(B).repeat_interleave(3)
    if shuffled:
        user = user[torch.randperm(len(user), generator=torch.Generator().manual_seed(0))]
    candidate = torch.arange(1, len(user) + 1)
    pairs = Inputs(*(t[user] for t in inputs[:4]), candidate)
    with torch.inference_mode():
        request = ranker.score_request(*inputs[:4], candidate, user)
    torch.testing.assert_close(request, run(ranker, pairs))


def test_requests_that_do_not_fit() -> None:
    ranker, inputs = make(), draw()
    with pytest.raises(ValueError, match="user_index: expected a tensor for"):
        ranker.score_request(*inputs)
    with pytest.raises(ValueError, match="user_index: expected shape"):
        ranker.score_request(*inputs, torch.zeros(B + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"user_index: expected values in 0 .. {B - 1}"):
        ranker.score_request(*inputs, torch.full((B,), B))


def test_a_row_does_not_depend_on_the_others() -> None:
    ranker, inputs = make(), draw()
    every = run(ranker, inputs)
    for b in range(B):
        alone = run(ranker, Inputs(*(t[b : b + 1] for t in inputs)))
        torch.testing.assert_close(alone[0], every[b])


def test_no_rows() -> None:
    inputs = Inputs(*(t[:0] for t in draw()))
    assert run(make(), inputs).shape == (0, 2)


def test_int32_inputs() -> None:
    ranker, inputs = make(), draw()
    narrow = Inputs(*(t if t.is_floating_point() else t.int() for t in inputs))
    assert torch.equal(run(ranker, narrow), run(ranker, inputs))


def test_bf16_model() -> None:
    ranker = make()
    served = in_dtype(ranker, torch.bfloat16)
    result = run(served, draw())
    assert result.dtype == torch.float32
    check_against_stock(served, ranker)


def test_a_moved_feature_stays_bounded() -> None:
    """A feature without variance in training moves; torch's batch norm multiplies it by 316."""
    ranker = make()
    norm = ranker.dense_norm
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean[1], norm.running_var[1] = 0.0, 0.0
    twin = stock_twin(ranker)
    dense = draw().dense
    dense[:, 1] = 1.0
    with torch.inference_mode():
        bounded, exploded = norm(dense)[:, 1], twin.dense_norm(dense)[:, 1]
    bound = ranker.config.max_abs * norm.weight[1].abs() + norm.bias[1].abs()
    assert (bounded.abs() <= bound).all()
    assert (exploded.abs() > 10 * bound).all()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 1}, "num_items: expected an integer of at least 2, got 1"),
        ({"num_actions": True}, "num_actions: expected an integer of at least 2, got True"),
        ({"num_dense": 0}, "num_dense: expected an integer of at least 1, got 0"),
        ({"item_dim": 8.0}, "item_dim: expected an integer of at least 1, got 8.0"),
        ({"num_layers": 0}, "num_layers: expected an integer of at least 1, got 0"),
        ({"nhead": 5}, "nhead: expected a divisor of 24 (action_dim + 2 * item_dim), got 5"),
        ({"pool": "mean"}, "pool: expected 'max' or 'none', got 'mean'"),
        ({"pool": "none", "latest_k": 0}, "latest_k: expected an integer of at least 1, got 0"),
        ({"latest_k": None}, "latest_k: expected an integer of at least 0, got None"),
        ({"cross_layers": -1}, "cross_layers: expected an integer of at least 0, got -1"),
        ({"cross_rank": 0}, "cross_rank: expected an integer of at least 1, got 0"),
        ({"head_hidden": 0}, "head_hidden: expected an integer of at least 1, got 0"),
        ({"hidden": ()}, "hidden: expected a tuple of at least one integer above 0, got ()"),
        ({"hidden": [8]}, "hidden: expected a tuple of at least one integer above 0, got [8]"),
        ({"heads": ()}, "heads: expected a tuple of at least one name of a head, got ()"),
        ({"heads": "click"}, "heads: expected a tuple of at least one name of a head, got 'click'"),
        ({"heads": ("a.b",)}, "heads: expected a tuple of at least one name of a head"),
        ({"heads": ("keys",)}, "heads: expected a tuple of at least one name of a head"),
        ({"heads": ("a", "a")}, "heads: expected names that differ, got ('a', 'a')"),
        ({"dropout": 1.0}, "dropout: expected a number in [0, 1), got 1.0"),
        ({"encoder_dropout": -0.1}, "encoder_dropout: expected a number in [0, 1), got -0.1"),
        ({"min_var": -1.0}, "min_var: expected a finite number of at least 0, got -1.0"),
        ({"max_abs": 0.0}, "max_abs: expected a number above 0, got 0.0"),
        ({"max_abs": float("nan")}, "max_abs: expected a number above 0, got nan"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        config(**changes)
    assert str(raised.value).startswith(f"EngagementRankerConfig: {message}")


def test_config_without_bounds_is_legal() -> None:
    assert config(min_var=0.0, max_abs=float("inf")).max_abs == float("inf")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"actions": torch.zeros(B, L)}, TypeError, "actions: expected int64 or int32, got torch."),
        ({"lengths": torch.ones(B)}, TypeError, "lengths: expected int64 or int32, got torch."),
        ({"dense": torch.ones(B, DENSE).int()}, TypeError, "dense: expected floating, got torch."),
        (
            {"actions": torch.ones(L).long()},
            ValueError,
            "actions: expected shape 2 dimensions [B, L] got (11,)",
        ),
        (
            {"items": torch.ones(B, L + 1).long()},
            ValueError,
            "items: expected shape (5, 11), that of actions, got (5, 12)",
        ),
        (
            {"lengths": torch.ones(B, 1).long()},
            ValueError,
            "lengths: expected shape (5,), B of actions, got (5, 1)",
        ),
        (
            {"dense": torch.ones(B, DENSE + 1)},
            ValueError,
            "dense: expected shape (5, 3), B of actions and num_dense, got (5, 4)",
        ),
        (
            {"dense": torch.ones(B - 1, DENSE)},
            ValueError,
            "dense: expected shape (5, 3), B of actions and num_dense, got (4, 3)",
        ),
        (
            {"candidate": torch.ones(1).long()},
            ValueError,
            "candidate: expected shape (5,), B of actions, got (1,)",
        ),
        (
            {"candidate": torch.full((B,), 30)},
            ValueError,
            "candidate: expected indices in [0, 30), got 30 to 30",
        ),
        (
            {"items": torch.full((B, L), -1)},
            ValueError,
            "items: expected indices in [0, 30), got -1 to -1",
        ),
        (
            {"actions": torch.full((B, L), 5)},
            ValueError,
            "actions: expected indices in [0, 5), got 5 to 5",
        ),
    ],
)
def test_inputs_that_do_not_fit(
    changes: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    ranker = make()
    for mode in (True, False):
        with torch.set_grad_enabled(mode), pytest.raises(error) as raised:
            ranker(*draw()._replace(**changes))
        assert str(raised.value).startswith(f"EngagementRanker: {message}")


@pytest.mark.parametrize("lengths", [(12, 0, 0, 0, 0), (-1, 0, 0, 0, 0)])
def test_lengths_beyond_the_events(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="encoder: lengths: expected values in "):
        run(make(), draw()._replace(lengths=torch.tensor(lengths)))


def test_one_user_alone_cannot_train() -> None:
    """Batch statistics of one row are no statistics."""
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make().train()(*draw(lengths=(7,)))


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_reach_every_parameter(options: dict[str, Any], training: bool) -> None:
    ranker = make(**options).train(training)
    ranker(*draw(lengths=LENGTHS * 4)).sin().sum().backward()
    for name, parameter in ranker.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Batch statistics take a constant away again: without a cross network the gradient of the
        # dense features' bias is zero in training, but for what rounding leaves.
        if not (training and name == "dense_norm.bias"):
            assert parameter.grad.any(), name
    for table in (ranker.action, ranker.item):
        assert not table.weight.grad[0].any()  # type: ignore[index]  # padding is not trained


def test_training_lowers_the_loss() -> None:
    """A rule in each input: what a user did last, with which candidate, and a dense feature."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ranker = EngagementRanker(config(dropout=0.0))
        inputs = draw(3, (11, 7, 4, 2) * 64)
        inputs.actions.clamp_(min=1)
        labels = torch.stack(
            (
                (inputs.actions[:, 0] + inputs.candidate) % 2 == 0,
                inputs.dense[:, 1] > -1.0,
            ),
            1,
        ).float()
        optimizer = torch.optim.AdamW(ranker.parameters(), lr=1e-2)
        losses = []
        for _ in range(60):
            loss = F.binary_cross_entropy_with_logits(ranker(*inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] > 0.6
    assert losses[-1] < 0.1 * losses[0]
    # And what was trained is what is served.
    check_against_stock(ranker.eval(), ranker)


def test_serving_follows_the_training() -> None:
    ranker, inputs = make(), draw()
    before = run(ranker, inputs)
    ranker.train()
    optimizer = torch.optim.SGD(ranker.parameters(), lr=0.1)
    ranker(*draw(lengths=LENGTHS * 4)).square().mean().backward()
    optimizer.step()
    ranker.eval()
    assert not torch.equal(run(ranker, inputs), before)
    check_against_stock(ranker, ranker)


# --- swap -----------------------------------------------------------------------------------------


def test_swap_keeps_the_scores_and_can_be_undone() -> None:
    ranker, inputs = make(), draw()
    before = run(ranker, inputs)
    original = copy.deepcopy(ranker)
    report = seqkernels.swap(ranker)
    check_against_stock(ranker, original)
    assert ranker.state_dict().keys() == original.state_dict().keys()
    report.restore()
    assert torch.equal(run(ranker, inputs), before)


def test_swap_of_the_stock_twin() -> None:
    ranker = make()
    twin = stock_twin(ranker)
    report = seqkernels.swap(twin)
    if FUSED == "cpu/":
        assert "sequence.encoder" in {r.name for r in report.replaced}
    check_against_stock(twin, ranker)


# --- the twin -------------------------------------------------------------------------------------


def test_stock_twin_is_a_copy_in_the_same_state() -> None:
    ranker = make().double()
    twin = stock_twin(ranker)
    assert not twin.training
    assert stock_twin(ranker.train()).training
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    with torch.no_grad():
        twin.item.weight.zero_()
    assert ranker.item.weight.any()
    kinds = {type(m).__module__ for m in twin.modules()}
    assert all(k.startswith(("torch.nn", "seqkernels.models")) for k in kinds)


def test_stock_twin_of_a_swapped_ranker() -> None:
    ranker = make()
    twin = stock_twin(ranker)
    seqkernels.swap(ranker)
    for one, other in zip(twin.parameters(), stock_twin(ranker).parameters(), strict=True):
        assert torch.equal(one, other)


# --- life within torch ----------------------------------------------------------------------------


def test_state_dict_round_trip() -> None:
    ranker, inputs = make(), draw()
    other = EngagementRanker(config()).eval()
    assert not torch.equal(run(other, inputs), run(ranker, inputs))
    other.load_state_dict(ranker.state_dict())
    assert torch.equal(run(other, inputs), run(ranker, inputs))


@pytest.mark.parametrize("swapped", [False, True])
def test_copies(swapped: bool) -> None:
    ranker, inputs = make(), draw()
    if swapped:
        seqkernels.swap(ranker)
    expected = run(ranker, inputs)
    assert torch.equal(run(copy.deepcopy(ranker), inputs), expected)
    again = pickle.loads(pickle.dumps(ranker))
    assert again.config == ranker.config
    assert torch.equal(run(again, inputs), expected)


@pytest.mark.parametrize("mode", ["serving", "gradients", "training"])
def test_compile_in_one_graph(mode: str) -> None:
    torch._dynamo.reset()
    ranker, inputs = make(dropout=0.0).train(mode == "training"), draw()
    compiled = torch.compile(copy.deepcopy(ranker), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode != "serving"):
        result, expected = compiled(*inputs), ranker(*inputs)
    torch.testing.assert_close(result, expected)
    assert result.requires_grad == (mode != "serving")


@pytest.mark.parametrize("swapped", [False, True])
def test_compile_with_dynamic_sizes(swapped: bool) -> None:
    torch._dynamo.reset()
    ranker = make()
    if swapped:
        seqkernels.swap(ranker)
    compiled = torch.compile(ranker, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, length in itertools.product(((11, 3, 0), (5, 5, 5, 1, 0, 2)), (11, 13)):
        inputs = draw(lengths=lengths, length=length)
        torch.testing.assert_close(run(compiled, inputs), run(ranker, inputs))


@pytest.mark.parametrize("swapped", [False, True])
def test_export_with_dynamic_batch_and_length(swapped: bool) -> None:
    ranker = make()
    if swapped:
        seqkernels.swap(ranker)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {
        "actions": {0: batch, 1: length},
        "items": {0: batch, 1: length},
        "lengths": {0: batch},
        "dense": {0: batch},
        "candidate": {0: batch},
    }
    program = torch.export.export(ranker, tuple(draw()), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for lengths, size in (((3, 4, 1), 4), ((2,), 9), ((30, 0, 1, 1, 7, 8), 30)):
        inputs = draw(lengths=lengths, length=size)
        torch.testing.assert_close(run(loaded, inputs), run(ranker, inputs))


def test_export_of_one_user_with_many_candidates() -> None:
    ranker = make()
    one = draw(lengths=(7,))._replace(candidate=torch.arange(1, 7))
    count = torch.export.Dim("count")
    shapes = {
        "actions": None,
        "items": None,
        "lengths": None,
        "dense": None,
        "candidate": {0: count},
    }
    loaded = torch.export.export(ranker, tuple(one), dynamic_shapes=shapes).module()
    for n in (2, 6, 29):
        inputs = one._replace(candidate=torch.arange(1, n + 1))
        torch.testing.assert_close(run(loaded, inputs), run(ranker, inputs))


def test_defaults_are_what_the_package_is_measured_on() -> None:
    sizes = EngagementRankerConfig(num_actions=6, num_items=1000, num_dense=4)
    assert (sizes.d_model, sizes.summary_dim, sizes.crossed_dim) == (96, 864, 900)
