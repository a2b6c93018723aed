"""The op ``request_scoring`` within torch, ``score_candidates``, and what both say of bad input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqkernels import BackendUnavailableError, backends, ops, settings
from seqkernels.nn import UserSequenceEncoder
from tests.ops.encoder_call import D, weights

E, C, USERS, COUNT = 16, 8, 3, 7


def arguments(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    legal: dict[str, Any] = {
        "events": torch.randn(USERS, 5, E, generator=g),
        "candidates": torch.randn(COUNT, C, generator=g),
        "user_index": torch.tensor([2, 0, 0, 2, 1, 0, 2]),
        "weights": weights(),
        "key_padding_mask": None,
        "lengths": torch.tensor([5, 2, 0]),
        "nhead": 2,
        "activation": "relu",
        "negative_slope": 0.01,
        "norm_first": False,
        "layer_norm_eps": 1e-5,
        "final_norm_eps": 1e-5,
        "fusion": "concat",
        "padding": "zero",
        "order": "latest_first",
        "latest_k": 2,
        "pool": "max",
        "backend": "auto",
    }
    assert not changes.keys() - legal.keys()
    return legal | changes


def call(**changes: Any) -> Tensor:
    return ops.request_scoring(*arguments(**changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latest_k": None, "pool": "none", "lengths": None},
        {"fusion": "append", "events": torch.randn(3, 5, D), "candidates": torch.randn(7, D)},
        {"events": torch.randn(5, 3, E).transpose(0, 1)},
        {"user_index": torch.zeros(7, dtype=torch.int32)},
        {"candidates": torch.randn(0, C), "user_index": torch.zeros(0, dtype=torch.int64)},
    ],
)
def test_opcheck(changes: dict[str, Any]) -> None:
    torch.library.opcheck(ops.request_scoring, tuple(arguments(**changes).values()))


def test_opcheck_with_gradients() -> None:
    given = arguments(backend="reference", candidates=torch.randn(COUNT, C, requires_grad=True))
    # Static sizes: dynamic ones would make d_model, a size of parameters, a symbol too.
    tests = ("schema", "autograd_registration", "faketensor", "aot_dispatch_static")
    torch.library.opcheck(
        ops.request_scoring, tuple(given.values()), test_utils=[f"test_{test}" for test in tests]
    )


def test_gradients_are_those_of_the_repeated_user() -> None:
    with settings.override(backend="reference"):
        events = torch.randn(USERS, 5, E, dtype=torch.float64, requires_grad=True)
        candidates = torch.randn(COUNT, C, dtype=torch.float64, requires_grad=True)
        given = arguments(events=events, candidates=candidates)
        found = torch.autograd.grad(
            ops.request_scoring(*given.values()).sum(), (events, candidates)
        )
        index = given["user_index"]
        del given["user_index"]
        given["events"], given["lengths"] = events[index], given["lengths"][index]
        repeated = torch.autograd.grad(ops.encoder(*given.values()).sum(), (events, candidates))
    for one, other in zip(found, repeated, strict=True):
        torch.testing.assert_close(one, other)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = UserSequenceEncoder(E, C, 2, 16, 2, latest_k=2)

    def forward(self, events: Tensor, candidates: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
        return self.encoder.score_candidates(events, candidates, index, lengths=lengths)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compile_and_export_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    model = Model().eval()
    given = arguments()
    inputs = tuple(given[n] for n in ("events", "candidates", "user_index", "lengths"))
    with torch.no_grad():
        expected = model(*inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), expected)
        count, length = torch.export.Dim("count"), torch.export.Dim("length")
        program = torch.export.export(
            model, inputs, dynamic_shapes=({1: length}, {0: count}, {0: count}, {})
        )
        fewer = (
            inputs[0][:, :4].contiguous(),
            inputs[1][:3],
            inputs[2][:3],
            inputs[3].clamp(max=4),
        )
        assert torch.equal(program.module()(*fewer), model(*fewer))
    assert "seqkernels.request_scoring" in str(program.graph)


def test_the_module_scores_as_it_forwards() -> None:
    module = UserSequenceEncoder(E, C, 2, 16, 2, latest_k=2, dropout=0.0).double()
    given = arguments()
    events, candidates = given["events"].double(), given["candidates"].double()
    index, lengths = given["user_index"], given["lengths"]
    for mode in (True, False):
        module.train(mode)
        with settings.override(backend="reference"):
            torch.testing.assert_close(
                module.score_candidates(events, candidates, index, lengths=lengths),
                module(events[index], candidates, lengths=lengths[index]),
            )
            torch.testing.assert_close(
                module.score_candidates(events[:1], candidates, lengths=lengths[:1]),
                module(events[:1].expand(COUNT, -1, -1), candidates, lengths=lengths[:1].expand(7)),
            )


def test_hooks_inside_run_the_definition() -> None:
    module = UserSequenceEncoder(E, C, 2, 16, 1, latest_k=2).eval()
    seen: list[int] = []
    module.encoder.layers[0].linear1.register_forward_hook(lambda *_: seen.append(1))
    given = arguments()
    with torch.inference_mode():
        module.score_candidates(given["events"], given["candidates"], given["user_index"])
    assert seen
    strict = copy.deepcopy(module)
    with (
        settings.override(strict=True),
        torch.inference_mode(),
        pytest.raises(BackendUnavailableError, match="forward hooks"),
    ):
        strict.score_candidates(given["events"], given["candidates"], given["user_index"])


def test_other_dtypes_fall_back() -> None:
    backends.calls.clear()
    given = arguments()
    with torch.inference_mode():
        call(events=given["events"].double(), candidates=given["candidates"].double())
    assert backends.calls == {"reference": 1}


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"user_index": torch.tensor([0, 1, 2, 3, 0, 0, 0])}, ValueError, "user_index: expected "),
        (
            {"user_index": torch.tensor([0, -1, 2, 0, 0, 0, 0])},
            ValueError,
            "0 .. 2 (U - 1), got -1",
        ),
        ({"user_index": torch.zeros(7)}, TypeError, "user_index: expected int32 or int64, got"),
        (
            {"user_index": torch.zeros(6, dtype=torch.int64)},
            ValueError,
            "expected shape [N] = (7,)",
        ),
        ({"candidates": torch.randn(7, C + 1)}, ValueError, "events, candidates: expected last"),
        (
            {"candidates": torch.randn(7)},
            ValueError,
            "candidates: expected shape [N, C], got shape",
        ),
        ({"candidates": torch.randn(7, C).double()}, TypeError, "candidates: expected dtype"),
        ({"events": torch.randn(3, E)}, ValueError, "events: expected 3 dimensions [U, L, E], got"),
        ({"events": torch.ones(3, 5, E, dtype=torch.int64)}, TypeError, "events: expected float32"),
        ({"lengths": torch.tensor([5, -2, 0])}, ValueError, "lengths: expected values in 0 .. 5"),
        ({"lengths": torch.tensor([5, 6, 0])}, ValueError, "lengths: expected values in 0 .. 5"),
        ({"lengths": torch.tensor([5, 6])}, ValueError, "lengths: expected shape [U] = (3,)"),
        (
            {"lengths": None, "key_padding_mask": torch.zeros(7, 5, dtype=torch.bool)},
            ValueError,
            "key_padding_mask: expected shape [U, L] = (3, 5)",
        ),
        ({"fusion": "none"}, ValueError, "fusion: expected 'concat' or 'append', got 'none'"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], told: str) -> None:
    with torch.inference_mode(), pytest.raises(error) as caught:
        call(**changes)
    assert str(caught.value).startswith("request_scoring: ")
    assert told in str(caught.value)


def test_what_the_module_asks_for() -> None:
    module = UserSequenceEncoder(E, C, 2, 16, 1).eval()
    given = arguments()
    with pytest.raises(ValueError, match="user_index: expected a tensor for 3 users, got None"):
        module.score_candidates(given["events"], given["candidates"])
    alone = UserSequenceEncoder(E, 0, 2, 16, 1, fusion="none").eval()
    with pytest.raises(ValueError, match="fusion: expected 'concat' or 'append'"):
        alone.score_candidates(given["events"], given["candidates"], given["user_index"])


def test_nan_stays_where_it_is() -> None:
    given = arguments(lengths=None)
    given["events"][1] = math.nan  # a user of one candidate
    with torch.inference_mode():
        y = ops.request_scoring(*given.values())
    assert y[4].isnan().any()
    assert y[torch.arange(COUNT) != 4].isfinite().all()
