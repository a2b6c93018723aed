"""What no kernel takes runs what torch would run: the same bits, dtypes and shapes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import backends, reference
from tests.from_the_field.stock_models import B, D, L, draw, encoder, swapped

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*")

RIGHT = torch.arange(L) >= torch.tensor([40, 17, 12, 31]).unsqueeze(1)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)


@pytest.fixture(autouse=True)
def _count_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_reported", set())
    backends.calls.clear()


def tower(**options: Any) -> nn.Module:
    """A stock tower of Linear, BatchNorm1d and ReLU with statistics."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(D, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64), nn.BatchNorm1d(64)
    )
    for module in made:
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return made.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": encoder,
    "pre-norm encoder": lambda: encoder(norm=True, norm_first=True),
    "odd heads": lambda: encoder(nhead=3),
    "layer": lambda: encoder().layers[0],  # type: ignore[return-value]
}
BF16 = seqkernels.PrecisionPolicy(bf16=("*",))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_other_dtypes_after_the_swap(name: str, dtype: torch.dtype, padded: bool) -> None:
    stock = MODELS[name]()
    ours = swapped(stock).to(dtype)
    stock, x = stock.to(dtype), draw(B, L, D).to(dtype)
    call = {"src_key_padding_mask": RIGHT} if padded else {}
    with torch.inference_mode():
        assert torch.equal(ours(x, **call), stock(x, **call))
    assert not backends.calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_after_the_swap(name: str, padded: bool) -> None:
    stock = MODELS[name]()
    ours = swapped(stock)
    call = {"src_key_padding_mask": RIGHT} if padded else {}
    gradients = []
    for module in (stock, ours):
        x = draw(B, L, D).requires_grad_()
        out = module(x, **call)
        out.square().sum().backward()
        gradients.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
    for expected, result in zip(*gradients, strict=True):
        assert torch.equal(result, expected)
    assert not backends.calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("said", [False, True])
def test_causal_masks(name: str, padded: bool, said: bool) -> None:
    stock = MODELS[name]()
    ours, x = swapped(stock), draw(B, L, D)
    call: dict[str, Any] = {"is_causal": said}
    if padded:
        call["src_key_padding_mask"] = torch.zeros(B, L).masked_fill(RIGHT, -math.inf)
    with torch.inference_mode():
        assert torch.equal(ours(x, CAUSAL, **call), stock(x, CAUSAL, **call))


@pytest.mark.parametrize("policy", [None, BF16])
@pytest.mark.parametrize("how", ["gradients", "float64"])
def test_towers(how: str, policy: Any) -> None:
    stock = tower()
    ours, x = swapped(stock, precision_policy=policy), draw(B, D)
    if how == "float64":
        stock, ours, x = stock.double(), ours.double(), x.double()
    with torch.inference_mode(how == "float64"):
        assert torch.equal(ours(x), stock(x))


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": True},
        {"nhead": 3},
        {"batch_first": False},
        {"bias": False},
        {"activation": "gelu"},
        {"activation": nn.LeakyReLU()},
        {"activation": nn.GELU("tanh")},
    ],
    ids=str,
)
def test_autocast_gives_torchs_dtype(
    options: dict[str, Any], dtype: torch.dtype, padded: bool, gradients: bool
) -> None:
    stock = encoder(**options)
    ours, x = swapped(stock), draw(B, L, D).to(dtype)
    call = {"src_key_padding_mask": RIGHT.flip(1)} if padded else {}
    if not stock.layers[0].self_attn.batch_first:  # type: ignore[union-attr]
        x = x.transpose(0, 1)
    with torch.inference_mode(not gradients), torch.autocast("cpu", torch.bfloat16):
        assert ours(x, **call).dtype == stock(x, **call).dtype
        assert ours(x[0] if stock.layers[0].self_attn.batch_first else x[:, 0]).dtype == (  # type: ignore[union-attr]
            stock(x[0] if stock.layers[0].self_attn.batch_first else x[:, 0]).dtype  # type: ignore[union-attr]
        )


@pytest.mark.parametrize("policy", [None, BF16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_of_towers(policy: Any, dtype: torch.dtype) -> None:
    stock = tower()
    ours, x = swapped(stock, precision_policy=policy), draw(B, D).to(dtype)
    for pick in (lambda m: m, lambda m: m[0], lambda m: m[1]):
        given = x if pick(stock) is not stock[1] else draw(B, 256).to(dtype)  # type: ignore[index]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert pick(ours)(given).dtype == pick(stock)(given).dtype  # type: ignore[no-untyped-call]


# --- nothing to do --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inference", "gradients", "training"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_users_without_any_event(name: str, padded: bool, mode: str) -> None:
    ours = swapped(MODELS[name]())
    ours.train(mode == "training")
    call = {"src_key_padding_mask": RIGHT[:, :0]} if padded else {}
    with torch.inference_mode(mode == "inference"):
        out = ours(draw(B, 0, D), **call)
        assert out.shape == (B, 0, D)
        assert ours(draw(0, L, D)).shape == (0, L, D)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fusion", ["none", "concat", "append"])
@pytest.mark.parametrize("summary", [{}, {"pool_padding": "exclude"}, {"latest_k": 0}])
def test_summaries_of_users_without_any_event(
    fusion: str, summary: dict[str, Any], train: bool
) -> None:
    extra = {"none": 0, "concat": 8, "append": 16}[fusion]
    module = seqkernels.nn.UserSequenceEncoder(16, extra, 2, 8, 1, fusion=fusion, **summary)
    module.train(train)
    candidate = draw(B, extra) if extra else None
    with torch.inference_mode(not train):
        out = module(draw(B, 0, 16), candidate)
        assert out.shape == (B, module.out_dim)
        if fusion != "append":  # the candidate is a token
            assert (out == 0).all()
            weights = [p.detach() for p in module.encoder.layers[0].parameters()]
            given = {"nhead": 2, "fusion": fusion, "latest_k": module.latest_k, "pool": "max"}
            by_reference = reference.encoder(draw(B, 0, 16), candidate, weights, **given)
            assert torch.equal(by_reference, out)
        if train:
            out.sum().backward()
        if candidate is not None:
            index = torch.zeros(B, dtype=torch.int64)
            assert module.score_candidates(draw(1, 0, 16), candidate, index).shape == out.shape


# --- weights that move, or are of another kind ----------------------------------------------------


class Labelled(Tensor):
    """A subclass that does nothing of its own."""


def test_weights_of_a_subclass_after_the_swap(caplog: pytest.LogCaptureFixture) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    stock, x = encoder(), draw(B, L, D)
    ours = swapped(stock)
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.as_subclass(Labelled),
        lambda w: TwoTensor(w, w.clone()),
    ]
    with torch.inference_mode():
        ours(x)
    for kind in kinds:
        for module in (stock, ours):
            linear = module.layers[0].linear1
            plain = torch.ones(linear.weight.shape) / 7
            linear.weight = nn.Parameter(kind(plain), requires_grad=False)
        with torch.no_grad():
            expected, result = stock.layers[0](x), ours.layers[0](x)
        assert type(result) is type(expected)
        plainly = [
            t.a if isinstance(t, TwoTensor) else t.as_subclass(Tensor) for t in (result, expected)
        ]
        assert torch.equal(*plainly)
    assert "linear1.weight is a Labelled, not a plain tensor" in caplog.text
    assert "linear1.weight is a TwoTensor, not a plain tensor" in caplog.text


class Offloading:
    """As offloading hooks do: weights are there while a module runs, and on meta otherwise."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        self.state = {n: p.detach().clone() for n, p in module.named_parameters(recurse=False)}
        self._install("meta")
        module.forward = self  # type: ignore[assignment]

    def _install(self, device: str) -> None:
        for name, value in self.state.items():
            setattr(self.module, name, nn.Parameter(value.to(device), requires_grad=False))

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self._install("cpu")
        try:
            return self.forward(*args, **keywords)
        finally:
            self._install("meta")


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_moved_by_offloading_hooks(when: str) -> None:
    stock = nn.Sequential(tower(), nn.Linear(64, 3)).eval()
    x, model = draw(B, D), copy.deepcopy(stock)
    if when == "after":
        seqkernels.swap(model, precision_policy=BF16)
        with torch.inference_mode():
            model(x)
    for module in list(model.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            Offloading(module)
    if when == "before":
        seqkernels.swap(model, precision_policy=BF16)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), stock(x), rtol=0.02, atol=0.02)


def test_an_encoder_on_meta_is_torchs_error(caplog: pytest.LogCaptureFixture) -> None:
    ours = swapped(encoder()).to("meta")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="meta"):
        ours(draw(B, L, D))
    assert "its weights are on the meta device" in caplog.text
