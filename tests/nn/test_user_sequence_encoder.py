"""UserSequenceEncoder: the summary of the reference, in every option, mode and use."""

import copy
import itertools
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seqkernels import BackendUnavailableError, backends, reference, settings
from seqkernels.nn import UserSequenceEncoder
from seqkernels.testing import assert_close_to_oracle

B, L, E, C, HEADS, FF = 4, 11, 16, 8, 2, 8
LENGTHS = torch.tensor([11, 6, 1, 0])
FUSED = "cpu/" if backends.native_module.module is not None else "reference"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def draw(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().float()


def make(fusion: str = "concat", **options: Any) -> UserSequenceEncoder:
    """One with attention that is not uniform and weights exact in bf16, in eval mode."""
    candidate = {"none": 0, "concat": C, "append": E}[fusion]
    torch.manual_seed(0)
    options = {"latest_k": 3} | options
    module = UserSequenceEncoder(E, candidate, HEADS, FF, 2, fusion=fusion, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    return module.eval()


def inputs(module: UserSequenceEncoder, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    candidate = draw(B, module.candidate_dim or E, seed=seed + 1)
    return draw(B, L, E, seed=seed), None if module.fusion == "none" else candidate


def by_reference(
    module: UserSequenceEncoder,
    events: Tensor,
    candidate: Tensor | None,
    lengths: Tensor | None,
    dtype: torch.dtype,
    ignored: Tensor | None = None,
) -> Tensor:
    """The reference, from options that stand here once more."""
    layer: Any = module.encoder.layers[0]
    result = reference.encoder(
        events.to(dtype),
        None if candidate is None else candidate.to(dtype),
        list(module.encoder.parameters()),
        ignored,
        lengths,
        nhead=HEADS,
        norm_first=layer.norm_first,
        fusion=module.fusion,
        padding=module.pool_padding,
        order=module.order,
        latest_k=module.latest_k,
        pool=module.pool,
    )
    return result.detach()


OPTIONS = [
    {"fusion": fusion, "pool_padding": padding, "order": order}
    for fusion, padding, order in itertools.product(
        ("none", "concat", "append"),
        ("zero", "compute", "exclude"),
        ("latest_first", "latest_last"),
    )
] + [
    {"fusion": "concat", "norm_first": True, "final_norm": True},
    {"fusion": "append", "norm_first": True, "final_norm": True, "pool_padding": "exclude"},
    {"fusion": "concat", "latest_k": None, "pool": "none"},
    {"fusion": "append", "latest_k": None, "pool": "none", "order": "latest_last"},
    {"fusion": "concat", "latest_k": 0},
    {"fusion": "concat", "latest_k": 20, "pool": "none"},
]


DRAWS = 24  # a latest row is a short sequence: the rule wants several


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_summary(options: dict[str, Any]) -> None:
    module = make(**options)
    draws = [inputs(module, seed=10 * i) for i in range(DRAWS)]
    backends.calls.clear()
    with torch.inference_mode():
        ours = [module(*d, lengths=LENGTHS) for d in draws]
    assert sum(n for label, n in backends.calls.items() if label.startswith(FUSED)) == len(draws)
    assert ours[0].shape[-1] == module.out_dim
    golden = [by_reference(module, *d, LENGTHS, torch.float64) for d in draws]
    low = [by_reference(module, *d, LENGTHS, torch.bfloat16) for d in draws]
    assert_close_to_oracle(ours, golden, low)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_the_same_function(options: dict[str, Any]) -> None:
    """By the submodules, and so with their dropout; without dropout it equals the reference."""
    module = make(dropout=0.0, **options).train()
    events, candidate = inputs(module)
    result = module(events, candidate, lengths=LENGTHS)
    expected = by_reference(module, events, candidate, LENGTHS, torch.float32)
    torch.testing.assert_close(result.detach(), expected)
    result.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_training_has_dropout() -> None:
    module = make(dropout=0.5).train()
    events, candidate = inputs(module)
    assert not torch.equal(module(events, candidate), module(events, candidate))
    module.eval()
    assert torch.equal(module(events, candidate), module(events, candidate))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_forms_of_padding(mode: str) -> None:
    module = make(dropout=0.0, pool_padding="exclude").train(mode == "train")
    events, candidate = inputs(module)
    ignored = torch.arange(L) >= LENGTHS.unsqueeze(1)
    additive = torch.zeros(B, L).masked_fill(ignored, -torch.inf)
    with torch.no_grad():
        expected = module(events, candidate, lengths=LENGTHS)
        assert torch.equal(module(events, candidate, ignored), expected)
        assert torch.equal(module(events, candidate, additive), expected)
        assert torch.equal(module(events, candidate, lengths=LENGTHS.int()), expected)
        poisoned = events.masked_fill(ignored.unsqueeze(-1), math.nan)
        assert torch.equal(module(poisoned, candidate, ignored), expected)
    assert (expected[3] == 0).all()  # nobody to pool over


@pytest.mark.parametrize("where", ["holes", "left"])
def test_holes_and_left_padding(where: str) -> None:
    module = make("append", order="latest_last", pool_padding="compute")
    draws = [inputs(module, seed=10 * i) for i in range(DRAWS)]
    ignored = (torch.arange(L) >= LENGTHS.unsqueeze(1)).flip(1)
    if where == "holes":
        ignored = torch.rand(B, L, generator=torch.Generator().manual_seed(4)) < 0.5
    golden = [by_reference(module, *d, None, torch.float64, ignored) for d in draws]
    low = [by_reference(module, *d, None, torch.bfloat16, ignored) for d in draws]
    in_fp64 = copy.deepcopy(module).double()
    events, candidate = draws[0]
    assert candidate is not None
    with torch.inference_mode():
        assert_close_to_oracle([module(*d, ignored) for d in draws], golden, low)
        exact = in_fp64(events.double(), candidate.double(), ignored)
    torch.testing.assert_close(exact, golden[0])  # which no kernel runs


def jagged(events: Tensor) -> Tensor:
    rows = [row[:n] for row, n in zip(events, LENGTHS.clamp(min=1).tolist(), strict=True)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_bad_inputs(mode: str) -> None:
    module = make().train(mode == "train")
    events, candidate = inputs(module)
    assert candidate is not None
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((events, None), ValueError, "candidate: expected a tensor for fusion='concat', got None"),
        ((events[0], candidate), ValueError, "x: expected 3 dimensions [B, L, E], got shape"),
        ((events, candidate[:, :5]), ValueError, "expected last dimensions that add up to 24"),
        ((events, candidate[:2]), ValueError, "candidate: expected shape [B, C] with B = 4"),
        ((events, candidate.double()), TypeError, "candidate: expected dtype torch.float32 like x"),
        ((events.long(), candidate.long()), TypeError, "x: expected float32, bfloat16"),
        ((events, candidate, torch.zeros(B, 3)), ValueError, "expected shape [B, L] = (4, 11)"),
        ((events, candidate, np.zeros((B, L))), TypeError, "expected a tensor, got ndarray; torch"),
        ((events, candidate, None, LENGTHS.numpy()), TypeError, "lengths: expected a tensor, got"),
        ((events, candidate.numpy()), TypeError, "candidate: expected a tensor, got ndarray"),
        ((events.numpy(), candidate), TypeError, "x: expected a tensor, got ndarray; torch.from_"),
        ((jagged(events), candidate), TypeError, "x: expected a padded tensor [B, L, E], got a ne"),
        ((events, candidate, None, LENGTHS[:2]), ValueError, "lengths: expected shape [B] = (4,)"),
        ((events, candidate, None, LENGTHS + 1), ValueError, "values in 0 .. 11"),
        ((events, candidate, None, LENGTHS - 1), ValueError, "values in 0 .. 11"),
        ((events, candidate, None, LENGTHS.double()), TypeError, "expected int32 or int64"),
        (
            (events, candidate, torch.zeros(B, L), LENGTHS),
            ValueError,
            "lengths: expected None beside key_padding_mask",
        ),
    ]
    for arguments, kind, message in cases:
        with torch.no_grad(), pytest.raises(kind, match=re.escape(message)) as caught:
            module(*arguments)
        assert str(caught.value).startswith("encoder: ")
    with torch.no_grad(), pytest.raises(ValueError, match="expected None for fusion='none'"):
        make("none").train(mode == "train")(events, candidate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, "fusion: expected one of none, concat, append, got 'sum'"),
        ({"pool": "mean"}, "pool: expected one of none, max, got 'mean'"),
        ({"pool_padding": "nan"}, "padding: expected one of zero, compute, exclude, stock"),
        ({"pool_padding": "stock"}, "padding: 'stock' needs fusion='none' and latest_k=None"),
        ({"order": "up"}, "order: expected one of latest_first, latest_last, got 'up'"),
        ({"latest_k": -1}, "latest_k: expected at least 0"),
        ({"latest_k": 0, "pool": "none"}, "latest_k: expected at least 1"),
        ({"latest_k": None}, "pool: expected 'none' without latest_k"),
        ({"pool": "none", "pool_padding": "exclude"}, "'exclude' needs pool='max'"),
        ({"nhead": 5}, "nhead: expected a divisor of d_model = 24, got 5"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"fusion": "append"}, "candidate_dim: expected 16 for fusion='append'"),
        ({"fusion": "none"}, "candidate_dim: expected 0 for fusion='none'"),
        ({"candidate_dim": -1}, "candidate_dim: expected 0 for fusion='concat'"),
        (
            {"backend": "gpu"},
            "backend: expected one of auto, cuda, triton, cpu, reference, got 'gpu'",
        ),
        ({"activation": "swish"}, "activation: expected one of relu, gelu"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    legal = {
        "event_dim": E,
        "candidate_dim": C,
        "nhead": HEADS,
        "dim_feedforward": FF,
        "num_layers": 1,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        UserSequenceEncoder(**legal | options)


def test_state_is_that_of_torchs_encoder() -> None:
    module = make(final_norm=True)
    layer = nn.TransformerEncoderLayer(E + C, HEADS, FF, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E + C))
    module.encoder.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(module.encoder.state_dict(), strict=True)
    assert [f"encoder.{key}" for key in stock.state_dict()] == list(module.state_dict())


def test_copies_and_dtypes() -> None:
    module = make()
    draws = [inputs(module, seed=10 * i) for i in range(DRAWS)]
    golden = [by_reference(module, *d, None, torch.float64) for d in draws]
    low = [by_reference(module, *d, None, torch.bfloat16) for d in draws]
    events, candidate = draws[0]
    with torch.inference_mode():
        expected = module(events, candidate)
        assert torch.equal(pickle.loads(pickle.dumps(module))(events, candidate), expected)
        half = copy.deepcopy(module).bfloat16()
        halves = [half(e.bfloat16(), c.bfloat16()) for e, c in draws if c is not None]
        assert all(result.dtype == torch.bfloat16 for result in halves)
        assert_close_to_oracle(halves, golden, low)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(events, candidate), expected)


def test_hooks_inside_run_the_definition(caplog: pytest.LogCaptureFixture) -> None:
    module = make()
    events, candidate = inputs(module)
    seen: list[Any] = []
    module.encoder.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        module(events, candidate)
        assert seen
        assert "encoder has forward hooks" in caplog.text
        with (
            settings.override(strict=True),
            pytest.raises(BackendUnavailableError, match="encoder has forward hooks"),
        ):
            module(events, candidate)


def test_empty_batch_and_lone_candidate() -> None:
    module = make("append")
    with torch.inference_mode():
        assert module(draw(0, L, E), draw(0, E)).shape == (0, module.out_dim)
        alone = module(draw(2, 0, E), draw(2, E))
    assert alone.shape == (2, module.out_dim)
    assert alone.isfinite().all()


@pytest.mark.parametrize("grad", [False, True])
def test_compile_in_one_graph(grad: bool) -> None:
    torch._dynamo.reset()
    module = make()
    events, candidate = inputs(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        result = compiled(events, candidate, lengths=LENGTHS)
        torch.testing.assert_close(result, module(events, candidate, lengths=LENGTHS))
    assert result.requires_grad == grad


def test_compile_of_training_in_one_graph() -> None:
    torch._dynamo.reset()
    module = make(dropout=0.0).train()
    events, candidate = inputs(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    result = compiled(events, candidate, lengths=LENGTHS)
    torch.testing.assert_close(result, module(events, candidate, lengths=LENGTHS))


def test_export_with_dynamic_batch_and_length() -> None:
    module = make()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    events, candidate = inputs(module)
    program = torch.export.export(
        module,
        (events, candidate),
        {"lengths": LENGTHS},
        dynamic_shapes={
            "events": {0: batch, 1: length},
            "candidate": {0: batch},
            "lengths": {0: batch},
        },
    )
    other = (draw(2, 5, E), draw(2, C))
    with torch.inference_mode():
        result = program.module()(*other, lengths=torch.tensor([5, 2]))
        assert torch.equal(result, module(*other, lengths=torch.tensor([5, 2])))
