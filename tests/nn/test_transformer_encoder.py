"""The drop-in modules beside torch's: what they compute, take, hold and refuse."""

import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import pickle
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkernels
from seqkernels import BackendUnavailableError, backends, settings
from seqkernels.nn import TransformerEncoder, TransformerEncoderLayer, read
from seqkernels.testing import EncoderCase, EncoderProblem, assert_close_to_oracle
from tests.nn.stock import golden_and_low, stock_encoder

D, HEADS, FF = 16, 2, 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
has_native = backends.native_module.module is not None
FUSED = "cpu/" if has_native else "reference"


@pytest.fixture(autouse=True)
def _count_from_zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_reported", set())
    backends.calls.clear()
    yield
    torch._dynamo.reset()


def fused_calls() -> int:
    return sum(n for label, n in backends.calls.items() if label.startswith(FUSED))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(layers: int = 2, norm: bool = False, **options: Any) -> nn.TransformerEncoder:
    """torch's encoder with attention that is not uniform, in eval mode."""
    torch.manual_seed(0)
    options = {"batch_first": True} | options
    layer = nn.TransformerEncoderLayer(D, HEADS, FF, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        final = nn.LayerNorm(D) if norm else None
        encoder = nn.TransformerEncoder(layer, layers, final)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


@contextlib.contextmanager
def slow_path() -> Iterator[None]:
    """torch without its shortcuts."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


IGNORED = torch.arange(7) >= torch.tensor([[7], [3], [1]])


# --- the function it computes ---------------------------------------------------------------------

PADDED = EncoderCase(batch=4, length=40, mask="right", valid=(40, 17, 5, 1))
CASES = {
    "post-norm": PADDED,
    "final norm": dataclasses.replace(PADDED, final_norm=True, final_norm_eps=1e-3),
    "gelu": dataclasses.replace(PADDED, activation="gelu", num_layers=1),
    "poisoned": dataclasses.replace(PADDED, poison=math.nan),
}
SLOW_CASES = CASES | {
    "pre-norm": dataclasses.replace(PADDED, norm_first=True, final_norm=True),
    "no bias": dataclasses.replace(PADDED, bias=False),
    "odd heads": dataclasses.replace(PADDED, nhead=3),
    "gelu_tanh": dataclasses.replace(PADDED, activation="gelu_tanh", norm_first=True),
    "leaky_relu": dataclasses.replace(PADDED, activation="leaky_relu"),
}
del SLOW_CASES["poisoned"]  # there torch's layers let NaN out


#: No sequence has so few valid positions that the rule needs several draws.
ONE_DRAW = EncoderCase(batch=3, length=40, mask="right", valid=(40, 25, 11))


def one_problem(case: EncoderCase = ONE_DRAW) -> tuple[EncoderProblem, nn.TransformerEncoder]:
    """A problem that is enough for the rule, and torch's encoder, on its nested path, for it."""
    assert len(case.draws()) == 1
    problem = case.problem()
    return problem, stock_encoder(case, problem, nested=True)


def hold_to_stock(case: EncoderCase, nested: bool, padded_output: str | None) -> None:
    """The numerics rule with torch's module in fp64 as oracle and in bf16 as yardstick."""
    ours, golden, low = [], [], []
    for one in case.draws():
        problem = one.problem()
        stock = stock_encoder(one, problem, nested=nested)
        mine = TransformerEncoder.from_torch(stock, padded_output=padded_output)
        assert mine.padded_output == (padded_output or ("stock" if nested else "compute"))
        with torch.inference_mode():
            ours.append(mine(problem.x, src_key_padding_mask=problem.key_padding_mask))
        for runs, run in zip((golden, low), golden_and_low(stock, problem), strict=True):
            runs.append(run)
        if case.poison is not None:  # torch's nested path carries the poison nowhere
            assert golden[-1].isfinite().all()
    assert_close_to_oracle(ours, golden, low)
    assert fused_calls() == len(ours)


@pytest.mark.parametrize("padded_output", [None, "zero"])
@pytest.mark.parametrize("name", CASES)
def test_zero_padding_is_that_of_the_nested_tensor_path(
    name: str, padded_output: str | None
) -> None:
    hold_to_stock(CASES[name], True, padded_output)


@pytest.mark.parametrize("padded_output", [None, "compute"])
@pytest.mark.parametrize("name", SLOW_CASES)
def test_computed_padding_is_that_of_the_other_path(name: str, padded_output: str | None) -> None:
    hold_to_stock(SLOW_CASES[name], False, padded_output)


def test_padding_before_a_final_norm_is_normalized_zero() -> None:
    stock = make(norm=True)
    with torch.no_grad():
        stock.norm.bias.copy_(draw(D))  # type: ignore[union-attr, operator]
    ours = TransformerEncoder.from_torch(stock)
    x = draw(3, 7, D)
    with torch.inference_mode():
        result = ours(x, src_key_padding_mask=IGNORED)
        expected = stock(x, src_key_padding_mask=IGNORED)
    assert torch.equal(result[IGNORED], expected[IGNORED])
    assert torch.equal(result[1, 6], stock.norm.bias)  # type: ignore[union-attr]


def test_a_layer_computes_padding() -> None:
    """torch's layer does so in every mode."""
    problem, encoder = one_problem(dataclasses.replace(ONE_DRAW, num_layers=1))
    stock, ignored = encoder.layers[0], problem.key_padding_mask
    assert ignored is not None
    ours = TransformerEncoderLayer.from_torch(stock)
    assert ours.padded_output == "compute"
    zero = TransformerEncoderLayer.from_torch(stock, padded_output="zero")
    with torch.inference_mode():
        computed = ours(problem.x, src_key_padding_mask=ignored)
        zeroed = zero(problem.x, src_key_padding_mask=ignored)
    golden, low = golden_and_low(stock, problem)
    assert (golden[ignored] != 0).any(-1).all()
    assert_close_to_oracle(computed, golden, low)
    assert torch.equal(zeroed, computed.masked_fill(ignored.unsqueeze(-1), 0.0))
    assert fused_calls() == 2


STOCK_OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm_first": True},
    {"batch_first": False},
    {"bias": False},
    {"activation": nn.LeakyReLU()},
    {"activation": "gelu"},
    {"nhead": 1},
    {"layer_norm_eps": 1e-3},
]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("options", STOCK_OPTIONS, ids=str)
def test_default_padding_is_what_torch_does(options: dict[str, Any], nested: bool) -> None:
    """Constructed or converted, the default is what torch's module of the same options returns."""
    made = {"batch_first": True, "nhead": HEADS} | options
    arguments = (D, made.pop("nhead"), FF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*arguments, **made), 1, enable_nested_tensor=nested
        ).eval()
    ours = TransformerEncoder(
        TransformerEncoderLayer(*arguments, **made), 1, enable_nested_tensor=nested
    )
    assert ours.padded_output == TransformerEncoder.from_torch(stock).padded_output
    assert ours.use_nested_tensor == stock.use_nested_tensor
    x = draw(3, 7, D)
    with torch.inference_mode():
        if not made["batch_first"]:
            out = stock(x.transpose(0, 1), src_key_padding_mask=IGNORED).transpose(0, 1)
        else:
            out = stock(x, src_key_padding_mask=IGNORED)
        given = x if made["batch_first"] else x.transpose(0, 1)
        mine = TransformerEncoder.from_torch(stock)(given, src_key_padding_mask=IGNORED)
    mine = mine if made["batch_first"] else mine.transpose(0, 1)
    returned = bool((out[IGNORED] == 0).all())
    assert bool((mine[IGNORED] == 0).all()) == returned
    assert ours.padded_output == ("stock" if returned else "compute")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "layer"])
def test_layouts(kind: str, batch_first: bool) -> None:
    stock = make(batch_first=batch_first)
    ours: Any = TransformerEncoder.from_torch(stock, padded_output="compute")
    if kind == "layer":
        ours = TransformerEncoderLayer.from_torch(stock.layers[0])
    x = draw(3, 7, D)
    given = x if batch_first else x.transpose(0, 1).contiguous()
    with torch.inference_mode():
        result = ours(given, src_key_padding_mask=IGNORED)
        assert result.shape == given.shape
        assert result.is_contiguous()  # no copy was needed for that
        rows = result if batch_first else result.transpose(0, 1)
        for b in range(3):
            alone = ours(x[b], src_key_padding_mask=IGNORED[b])
            assert alone.shape == (7, D)
            assert torch.equal(alone, rows[b])
        assert torch.equal(
            ours(x[0]), ours(x[:1] if batch_first else x[:1].transpose(0, 1)).view(7, D)
        )
    assert fused_calls() == 6


def test_mask_forms_and_bad_masks() -> None:
    ours, x = TransformerEncoder.from_torch(make()), draw(3, 7, D)
    with torch.inference_mode():
        expected = ours(x, src_key_padding_mask=IGNORED)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            additive = torch.zeros(3, 7, dtype=dtype).masked_fill(IGNORED, -torch.inf)
            assert torch.equal(ours(x, src_key_padding_mask=additive), expected)
        with pytest.raises(ValueError, match=re.escape("expected shape [B, L] = (3, 7)")):
            ours(x, src_key_padding_mask=IGNORED.T)
        with pytest.raises(TypeError, match=r"expected bool \(True = ignore\).*got torch.int64"):
            ours(x, src_key_padding_mask=IGNORED.long())
        causal = nn.Transformer.generate_square_subsequent_mask(7)
        with pytest.raises(ValueError, match=re.escape("expected shape (3, 7), got shape (7, 3)")):
            ours(x, causal, IGNORED.T)
        with pytest.raises(TypeError, match=r"got torch\.int64"):
            ours(x, causal, IGNORED.long())


# --- what runs the definition, and says so --------------------------------------------------------


@pytest.mark.parametrize("causal_form", ["float", "bool", "per head"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_attention_masks(
    causal_form: str,
    padded: bool,
    batch_first: bool,
    norm_first: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stock = make(norm=True, batch_first=batch_first, norm_first=norm_first)
    ours = TransformerEncoder.from_torch(stock, padded_output="compute")
    x = draw(3, 7, D) if batch_first else draw(7, 3, D)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    mask = {
        "float": causal,
        "bool": causal != 0,
        "per head": causal.repeat(3 * HEADS, 1, 1) + draw(3 * HEADS, 7, 7),
    }[causal_form]
    pad = IGNORED if padded else None
    stock_pad = None
    if padded:
        stock_pad = IGNORED if mask.dtype == torch.bool else torch.zeros(3, 7)
        if mask.dtype != torch.bool:
            stock_pad = stock_pad.masked_fill(IGNORED, -torch.inf)
    with torch.inference_mode():
        with slow_path():  # the other one gives NaN for a floating mask per head
            expected = stock(x, mask, stock_pad)
        for is_causal in (None, causal_form != "per head"):
            torch.testing.assert_close(ours(x, mask, pad, is_causal), expected)
    assert not backends.calls
    assert [r.message for r in caplog.records] == [
        "encoder: runs the plain PyTorch definition: an attention mask was given"
    ]


def test_attention_mask_of_a_layer() -> None:
    stock = make().layers[0]
    ours = TransformerEncoderLayer.from_torch(stock)
    x, causal = draw(3, 7, D), nn.Transformer.generate_square_subsequent_mask(7)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, causal), stock(x, causal))
        torch.testing.assert_close(ours(x, causal, is_causal=True), stock(x, causal))


def test_is_causal_alone_is_an_error() -> None:
    encoder = TransformerEncoder.from_torch(make())
    for module in (encoder, encoder.layers[0]):
        with pytest.raises(ValueError, match="is_causal: expected the causal mask beside"):
            module(draw(3, 7, D), is_causal=True)


@pytest.mark.parametrize("padded_output", ["zero", "compute"])
def test_nobody_to_attend_to_and_poison_in_the_definition(padded_output: str) -> None:
    """The definition keeps what the kernel promises."""
    ours = TransformerEncoder.from_torch(make(norm=True), padded_output=padded_output)
    x, causal = draw(3, 7, D), nn.Transformer.generate_square_subsequent_mask(7)
    ignored = torch.tensor([[True] * 7, [True] + [False] * 6, [False] * 6 + [True]])
    with torch.inference_mode():
        clean = ours(x, causal, ignored)
        assert clean.isfinite().all()
        poisoned = ours(x.masked_fill(ignored.unsqueeze(-1), math.nan), causal, ignored)
        torch.testing.assert_close(poisoned[~ignored], clean[~ignored])
        if padded_output == "zero":
            torch.testing.assert_close(poisoned, clean)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(2 * x)


def odd_activation() -> nn.TransformerEncoder:
    return make(activation=Doubled())


def silu() -> nn.TransformerEncoder:
    return make(activation=F.silu)


def hook_inside() -> nn.TransformerEncoder:
    encoder = make()
    encoder.layers[1].linear1.register_forward_hook(lambda module, args, out: out + 1.0)
    return encoder


def pre_hook_on_a_layer() -> nn.TransformerEncoder:
    encoder = make()
    encoder.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1.0, *args[1:]))
    return encoder


def hook_on_the_projection() -> nn.TransformerEncoder:
    """torch reads its weight without calling it: the hook never runs, here as there."""
    encoder = make()
    encoder.layers[1].self_attn.out_proj.register_forward_hook(lambda module, args, out: out + 1.0)
    return encoder


def different_eps() -> nn.TransformerEncoder:
    encoder = make()
    encoder.layers[0].norm2.eps = 1e-2
    return encoder


def different_layers() -> nn.TransformerEncoder:
    encoder = make()
    encoder.layers[1].norm_first = True
    encoder.use_nested_tensor = False
    return encoder


def different_widths() -> nn.TransformerEncoder:
    encoder = make()
    encoder.layers[1].linear1, encoder.layers[1].linear2 = nn.Linear(D, 5), nn.Linear(5, D)
    return encoder.eval()


class Scaled(nn.TransformerEncoderLayer):
    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        return 1.5 * super().forward(*args, **keywords)


def subclassed_layer() -> nn.TransformerEncoder:
    encoder = make()
    encoder.layers[0].__class__ = Scaled
    encoder.use_nested_tensor = False
    return encoder


class Low(nn.Linear):
    """As adapters do: a linear layer that adds something."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


def adapted_linear() -> nn.TransformerEncoder:
    encoder = make()
    encoder.layers[1].linear1.__class__ = Low
    return encoder


def parametrized() -> nn.TransformerEncoder:
    encoder = make()
    nn.utils.parametrizations.weight_norm(encoder.layers[0].linear2)
    return encoder


def added_key() -> nn.TransformerEncoder:
    encoder = make()
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True, add_bias_kv=True)
    encoder.layers[0].self_attn = attention.eval()
    encoder.use_nested_tensor = False
    return encoder


ODD = {
    odd_activation: "layers.0.activation 'Doubled' is none the kernel knows",
    silu: "layers.0.activation 'silu' is none the kernel knows",
    hook_inside: "layers.1.linear1 has forward hooks",
    pre_hook_on_a_layer: "layers.1 has forward hooks",
    hook_on_the_projection: "layers.1.self_attn.out_proj has forward hooks",
    different_eps: "layers.0: eps of norm1 and norm2 differ (1e-05, 0.01)",
    different_layers: "layers.1 differs from layers.0 in norm_first",
    different_widths: "layers.1 differs from layers.0 in dim_feedforward",
    subclassed_layer: "not a torch.nn.TransformerEncoderLayer itself",
    adapted_linear: "layers.1.linear1 is a Low, not a torch.nn.Linear",
    parametrized: "layers.0.linear2 is parametrized",
    added_key: "layers.0.self_attn has add_bias_kv",
}


@pytest.mark.parametrize("build", ODD, ids=lambda build: build.__name__)
def test_what_the_op_cannot_take_runs_the_definition(
    build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And gives what torch's module gives, whichever of its paths it takes."""
    stock, x = build().double(), draw(3, 7, D).double()  # whatever fuses is exact in fp64
    ours = TransformerEncoder.from_torch(stock)
    with torch.inference_mode():
        expected = stock(x, src_key_padding_mask=IGNORED)
    with torch.inference_mode():
        result = ours(x, src_key_padding_mask=IGNORED)
        torch.testing.assert_close(result, expected)
        told = [record.message for record in caplog.records]
        assert any(ODD[build] in message for message in told)
        ours(x, src_key_padding_mask=IGNORED)
        assert [record.message for record in caplog.records] == told
        with settings.override(strict=True), pytest.raises(BackendUnavailableError) as caught:
            ours(x)
        assert ODD[build] in str(caught.value)
        ours.backend = "cpu"
        with pytest.raises(BackendUnavailableError, match="encoder: backend 'cpu' cannot run"):
            ours(x)


def test_dropout_left_on_is_torchs() -> None:
    """As Monte Carlo dropout does: the model evaluates, its dropout does not."""
    stock, x = make(), draw(3, 7, D)
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    ours = TransformerEncoder.from_torch(stock)

    def run(module: nn.Module, seed: int, no_gradients: bool) -> Tensor:
        torch.manual_seed(seed)
        with torch.inference_mode(no_gradients):
            out: Tensor = module(x).detach()
        return out

    for no_gradients in (True, False):  # torch's fused path, taken in the first case, has none
        result = run(ours, 1, no_gradients)
        assert torch.equal(result, run(stock, 1, no_gradients))
        assert torch.equal(result, run(ours, 2, no_gradients)) == no_gradients
    with (
        torch.inference_mode(),
        settings.override(strict=True),
        pytest.raises(BackendUnavailableError, match=r"layers.0.dropout is in training mode"),
    ):
        ours(x)


def test_another_final_norm_is_applied_by_itself() -> None:
    problem, stock = one_problem()
    stock.norm = nn.RMSNorm(ONE_DRAW.d_model)
    ours = TransformerEncoder.from_torch(stock)
    with torch.inference_mode():
        result = ours(problem.x, src_key_padding_mask=problem.key_padding_mask)
    assert_close_to_oracle(result, *golden_and_low(stock, problem))
    assert fused_calls() == 1


def test_hooks_on_the_module_itself_run() -> None:
    ours, x, seen = TransformerEncoder.from_torch(make()), draw(3, 7, D), []
    ours.register_forward_hook(lambda module, args, out: seen.append(out) or out + 1.0)
    with torch.inference_mode():
        result = ours(x)
    assert torch.equal(result, seen[0] + 1.0)
    assert fused_calls() == 1


def test_nested_tensors_go_to_torch() -> None:
    stock = make()
    ours = TransformerEncoder.from_torch(stock)
    nested = torch.nested.nested_tensor([draw(4, D), draw(7, D)])
    with torch.inference_mode():
        result, expected = ours(nested), stock(nested)
    for mine, theirs in zip(result.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(mine, theirs)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_training_is_torchs_dropout_included(
    padded: bool, norm_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stock = make(norm=True, norm_first=norm_first, dropout=0.3).train()
    ours = TransformerEncoder.from_torch(stock, padded_output="compute")
    assert ours.training
    pad, x = IGNORED if padded else None, draw(3, 7, D)
    results = []
    for module in (stock, ours):
        module.zero_grad()
        torch.manual_seed(3)
        out = module(x, src_key_padding_mask=pad)
        out.square().sum().backward()
        results.append((out.detach(), [p.grad.clone() for p in module.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])
    assert not caplog.records
    with settings.override(strict=True):
        ours(x)  # what training is for


def test_padding_is_the_same_in_training() -> None:
    problem, stock = one_problem()
    ours = TransformerEncoder.from_torch(stock, padded_output="zero")
    ignored = problem.key_padding_mask
    assert ignored is not None
    with torch.inference_mode():
        evaluated = ours(problem.x, src_key_padding_mask=ignored)
    ours.train()
    poisoned = problem.x.masked_fill(ignored.unsqueeze(-1), math.nan).requires_grad_()
    trained = ours(poisoned, src_key_padding_mask=ignored)
    golden, low = golden_and_low(stock, problem)
    assert (golden[ignored] == 0).all()
    for result in (evaluated, trained):
        assert (result[ignored] == 0).all()
        assert_close_to_oracle(result, golden, low)
    trained.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_training_mode_without_gradients_is_told(caplog: pytest.LogCaptureFixture) -> None:
    ours = TransformerEncoder.from_torch(make()).train()
    with torch.inference_mode():
        ours(draw(3, 7, D))
        assert "the module is in training mode; call .eval()" in caplog.text
        with settings.override(strict=True), pytest.raises(BackendUnavailableError, match="eval"):
            ours(draw(3, 7, D))


def test_evaluation_with_gradients_is_torchs(caplog: pytest.LogCaptureFixture) -> None:
    problem, stock = one_problem()
    ours, ignored = TransformerEncoder.from_torch(stock), problem.key_padding_mask
    result = ours(problem.x, src_key_padding_mask=ignored)
    assert result.requires_grad
    assert torch.equal(result, stock(problem.x, src_key_padding_mask=ignored))
    assert "gradients are to be recorded" in caplog.text
    assert not backends.calls


# --- a drop-in ------------------------------------------------------------------------------------


def test_constructors_and_state_dicts() -> None:
    """Same arguments, by position and name; same keys, both ways strict."""
    for bias, norm_first, batch_first in itertools.product((True, False), repeat=3):
        arguments = (D, HEADS, FF, 0.2, "gelu", 1e-4, batch_first, norm_first, bias)
        torch.manual_seed(1)
        stock_layer = nn.TransformerEncoderLayer(*arguments)
        torch.manual_seed(1)
        layer = TransformerEncoderLayer(*arguments)
        pairs: list[tuple[nn.Module, nn.Module]] = [(stock_layer, layer)]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            ours = TransformerEncoder(layer, 2, nn.LayerNorm(D), True, False)
        assert not warned
        stock = nn.TransformerEncoder(stock_layer, 2, nn.LayerNorm(D), False, False)
        pairs.append((stock, ours))
        for theirs, mine in pairs:
            state = theirs.state_dict()
            assert list(state) == list(mine.state_dict())
            for key, value in mine.state_dict().items():
                assert torch.equal(value, state[key])
            mine.load_state_dict(state, strict=True)
            theirs.load_state_dict(mine.state_dict(), strict=True)
            assert isinstance(mine, type(theirs))
        assert isinstance(ours.layers[1], TransformerEncoderLayer)


def read_layer(layer: nn.Module) -> read.Encoder | None:
    reasons: list[str] = []
    found = read.read_single_layer(layer, reasons)
    assert not reasons
    return found


def test_constructor_forms_of_activations() -> None:
    known = {"relu", "gelu", "gelu_tanh", "leaky_relu"}
    for name in known:
        layer = TransformerEncoderLayer(D, HEADS, FF, activation=name, batch_first=True).eval()
        reread = read_layer(layer)
        assert reread is not None
        assert reread.options.activation == name
        encoder = TransformerEncoder(layer, 3).eval()
        with torch.inference_mode():
            encoder(draw(1, 4, D))
    for given, name in (
        (torch.relu, "relu"),
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (F.leaky_relu, "leaky_relu"),
        (nn.LeakyReLU(0.3), "leaky_relu"),
    ):
        reread = read_layer(TransformerEncoderLayer(D, HEADS, FF, activation=given).eval())
        assert reread is not None
        assert reread.options.activation == name
        assert reread.options.negative_slope == (
            0.3 if getattr(given, "negative_slope", 0) == 0.3 else 0.01
        )
    assert fused_calls() == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nhead": 3}, "nhead: expected a divisor of d_model = 16, got 3"),
        ({"nhead": 0}, "nhead: expected a divisor of d_model = 16, got 0"),
        (
            {"activation": "swish"},
            "activation: expected one of relu, gelu, gelu_tanh, leaky_relu or",
        ),
        ({"padded_output": "nan"}, "compute, zero, got 'nan'"),
        (
            {"backend": "gpu"},
            "backend: expected one of auto, cuda, triton, cpu, reference, got 'gpu'",
        ),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformerEncoderLayer(**{"d_model": D, "nhead": HEADS, "dim_feedforward": FF} | options)
    message = message.replace("compute, zero", "stock, zero, compute")
    if "nhead" not in options and "activation" not in options:
        layer = nn.TransformerEncoderLayer(D, HEADS, FF)
        with pytest.raises(ValueError, match=re.escape(message)):
            TransformerEncoder(layer, 1, **options)
        with pytest.raises(ValueError, match=re.escape(message)):
            TransformerEncoder.from_torch(make(), **options)


def test_from_torch_refuses_other_classes() -> None:
    for kind in (TransformerEncoder, TransformerEncoderLayer):
        with pytest.raises(
            TypeError, match=r"expected a torch\.nn\.TransformerEncoder.*got Linear"
        ):
            kind.from_torch(nn.Linear(2, 2))  # type: ignore[arg-type, attr-defined]
    with pytest.raises(TypeError, match="got Scaled"):
        TransformerEncoderLayer.from_torch(Scaled(D, HEADS))


def test_from_torch_shares_parameters_and_nothing_else() -> None:
    stock = make(norm=True)
    ours = TransformerEncoder.from_torch(stock)
    assert type(stock.layers[0]) is nn.TransformerEncoderLayer
    theirs = dict(stock.named_parameters())
    assert {n: id(p) for n, p in ours.named_parameters()} == {n: id(p) for n, p in theirs.items()}
    ours.train()
    ours.layers[0].register_forward_hook(lambda *_: None)
    assert not any(module.training for module in stock.modules())
    assert not stock.layers[0]._forward_hooks
    with torch.no_grad():
        stock.layers[0].linear1.weight.zero_()
    assert (ours.layers[0].linear1.weight == 0).all()
    with pytest.raises(AttributeError):
        stock.padded_output  # noqa: B018


def test_copies_pickles_and_dtypes() -> None:
    problem, stock = one_problem(dataclasses.replace(ONE_DRAW, mask="none", valid=None))
    ours, x = TransformerEncoder.from_torch(stock, padded_output="compute"), problem.x
    golden, low = golden_and_low(stock, problem)
    with torch.inference_mode():
        expected = ours(x)
        assert_close_to_oracle(expected, golden, low)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(other) is TransformerEncoder
            assert (other.padded_output, other.backend) == ("compute", "auto")
            assert torch.equal(other(x), expected)
        half = copy.deepcopy(ours).to(torch.bfloat16)
        result = half(x.bfloat16())
        assert result.dtype == torch.bfloat16
        assert_close_to_oracle(result, golden, low)
        assert fused_calls() == 4
        backends.calls.clear()
        for dtype in (torch.float64, torch.float16):
            result = copy.deepcopy(ours).to(dtype)(x.to(dtype))
            assert torch.equal(result, copy.deepcopy(stock).to(dtype)(x.to(dtype)))
        assert not backends.calls


def test_autocast_with_padding() -> None:
    """Where torch's own module fails: its nested path meets two dtypes."""
    ours, x = TransformerEncoder.from_torch(make()), draw(3, 7, D)
    with torch.inference_mode():
        expected = ours(x, src_key_padding_mask=IGNORED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = ours(x, src_key_padding_mask=IGNORED)
            assert result.dtype == make()(x).dtype
            assert torch.equal(result, expected.bfloat16())
    ours.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x, src_key_padding_mask=IGNORED)
    out.float().sum().backward()


@pytest.mark.parametrize("padded", [False, True])
def test_compile_in_one_graph(padded: bool) -> None:
    ours, x = TransformerEncoder.from_torch(make(norm=True)), draw(3, 7, D)
    pad = IGNORED if padded else None
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = ours(x, src_key_padding_mask=pad)
        backends.calls.clear()
        assert torch.equal(compiled(x, src_key_padding_mask=pad), expected)
        assert fused_calls() == 1
        with torch.no_grad():
            ours.layers[0].linear1.bias.add_(1.0)
        assert torch.equal(compiled(x, src_key_padding_mask=pad), ours(x, src_key_padding_mask=pad))


def test_compile_of_a_fallback_in_one_graph(caplog: pytest.LogCaptureFixture) -> None:
    ours, x = TransformerEncoder.from_torch(make()), draw(3, 7, D)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, causal), ours(x, causal))
    assert [r.message for r in caplog.records if r.name == "seqkernels"] == [
        "encoder: runs the plain PyTorch definition: an attention mask was given"
    ]


@pytest.mark.parametrize("batch_first", [False, True])
def test_export_with_dynamic_batch_and_length(batch_first: bool) -> None:
    ours = TransformerEncoder.from_torch(make(batch_first=batch_first))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    x = draw(3, 7, D) if batch_first else draw(7, 3, D)
    of_x = {0: batch, 1: length} if batch_first else {0: length, 1: batch}
    program = torch.export.export(
        ours,
        (x,),
        {"src_key_padding_mask": IGNORED},
        dynamic_shapes={"src": of_x, "src_key_padding_mask": {0: batch, 1: length}},
    )
    other = draw(2, 9, D) if batch_first else draw(9, 2, D)
    ignored = torch.arange(9) >= torch.tensor([[9], [2]])
    with torch.inference_mode():
        result = program.module()(other, src_key_padding_mask=ignored)
        assert torch.equal(result, ours(other, src_key_padding_mask=ignored))
    assert fused_calls() == 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_records_plain_operations() -> None:
    problem, stock = one_problem(dataclasses.replace(ONE_DRAW, final_norm=True))
    ours, ignored = TransformerEncoder.from_torch(stock), problem.key_padding_mask
    assert ignored is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(
            ours, example_kwarg_inputs={"src": problem.x, "src_key_padding_mask": ignored}
        )
    golden, low = golden_and_low(stock, problem)
    with torch.inference_mode():
        for module in (traced, ours):  # of a batch that is not the one traced
            result = module(src=problem.x[1:], src_key_padding_mask=ignored[1:])
            assert_close_to_oracle(result, golden[1:], low[1:])


def test_valid_calls_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    if not has_native:
        pytest.skip("there is no native module, which is told")
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = seqkernels.nn.TransformerEncoderLayer(D, HEADS, FF, norm_first=True)
        module = seqkernels.nn.TransformerEncoder(layer, 2).eval()
        with torch.inference_mode(), settings.override(strict=True):
            module(draw(7, 3, D))
            module(draw(7, 3, D), src_key_padding_mask=IGNORED)
            module(draw(7, 0, D))
    assert not caplog.records
