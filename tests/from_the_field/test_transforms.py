"""Derivatives of every kind, and ``torch.vmap``, through a swapped model and through the ops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import seqkernels
from seqkernels import backends, ops, reference, settings
from seqkernels.backends import native_module
from seqkernels.testing import assert_close_to_oracle
from tests.ops.encoder_call import arguments

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*nested tensors is in prototype.*",
    "ignore:`torch.jit.script` is deprecated",  # of the first dual tensor in a process
)
BF16 = seqkernels.PrecisionPolicy(bf16=("*",))
Transform = Callable[[nn.Module, Tensor, Tensor], Any]
HIGH, SAME, LOW = torch.float64, torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _torch_without_fast_paths() -> Any:
    """Torch's fast encoder has no forward derivative, nor has its fast attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    native = native_module.module is not None
    with settings.override(backend=None if native else "reference"), sdpa_kernel(SDPBackend.MATH):
        backends.calls.clear()
        yield
    torch.backends.mha.set_fastpath_enabled(before)


def norm() -> nn.Module:
    made = nn.BatchNorm1d(8)
    nn.init.normal_(made.running_mean)
    nn.init.uniform_(made.running_var, 0.5, 2.0)
    return made


def chain() -> nn.Module:
    return nn.Sequential(norm(), nn.Linear(8, 8), norm(), nn.GELU(), nn.Linear(8, 8))


def layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 8, activation="gelu", batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(layer(), 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "norm": norm,
    "linear": lambda: nn.Linear(8, 8),
    "chain": chain,
    "layer": layer,
    "encoder": encoder,
}
all_models = pytest.mark.parametrize("name", MODELS)


def drawn(name: str, seed: int, dtype: torch.dtype, *, swap: bool = False) -> nn.Module:
    """The stock model with parameters that bf16 holds; what autograd calls a constant."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    model = model.to(dtype).requires_grad_(False)
    if swap:
        assert seqkernels.swap(model, precision_policy=BF16).replaced
    return model


def inputs(name: str, seed: int, dtype: torch.dtype, count: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (6, 5, 8) if name in ("layer", "encoder") else (6, 8)
    return [torch.randn(shape, generator=g).bfloat16().to(dtype) for _ in range(count)]


def check(name: str, transform: Transform, count: int = 2) -> None:
    """The transform of the swapped model is that of the stock one, by the rule, for each result."""
    draws: dict[torch.dtype, list[list[Tensor]]] = {HIGH: [], SAME: [], LOW: []}
    for seed in range(4):
        for dtype, results in draws.items():
            model = drawn(name, seed, dtype, swap=dtype is SAME)
            leaves = tree_leaves(transform(model, *inputs(name, seed, dtype, count)))
            results.append([leaf.detach().flatten()[None] for leaf in leaves])
    per_result = zip(
        *(zip(*d, strict=True) for d in (draws[SAME], draws[HIGH], draws[LOW])), strict=True
    )
    for actual, golden, low in per_result:
        if any(t.any() for t in golden):
            assert_close_to_oracle(actual, golden, low, label=name)


def dual(model: nn.Module, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        y, derivative = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
        assert derivative is not None
        return y.clone(), derivative


def jvp_of_weights(model: nn.Module, x: Tensor, _: Tensor) -> Any:
    tangents = {}
    for name, p in model.named_parameters():
        g = torch.Generator().manual_seed(len(tangents))
        tangents[name] = torch.randn(p.shape, generator=g).bfloat16().to(p.dtype)
    weights = dict(model.named_parameters())
    return jvp(lambda w: functional_call(model, w, (x,)), (weights,), (tangents,))


def without_gradients(transform: Transform) -> Transform:
    def run(model: nn.Module, *tensors: Tensor) -> Any:
        with torch.no_grad():
            return transform(model, *tensors)

    return run


def summed(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).sin().sum()


FIRST_ORDER: dict[str, Transform] = {
    "jvp": lambda m, x, t: jvp(m, (x,), (t,)),
    "dual tensors": dual,
    "jvp of the weights": jvp_of_weights,
    "jacfwd": lambda m, x, _: jacfwd(m)(x),
    "jacrev": lambda m, x, _: jacrev(m)(x),
    "grad": lambda m, x, _: grad(summed(m))(x),
    "jvp of grad": lambda m, x, t: jvp(grad(summed(m)), (x,), (t,)),
}


@all_models
@pytest.mark.parametrize("kind", FIRST_ORDER)
def test_derivatives_are_those_of_the_stock_model(kind: str, name: str) -> None:
    check(name, FIRST_ORDER[kind])


@pytest.mark.parametrize("name", ["norm", "linear", "chain"])
def test_second_derivatives(name: str) -> None:
    check(name, lambda m, x, _: hessian(summed(m))(x))


@all_models
def test_tangents_pass_under_no_grad(name: str) -> None:
    def transform(model: nn.Module, x: Tensor, tangent: Tensor) -> Any:
        return jvp(model, (x,), (tangent,)), dual(model, x, tangent)

    check(name, without_gradients(transform))


@all_models
def test_inference_mode_has_no_tangents_as_in_torch(name: str) -> None:
    x, tangent = inputs(name, 0, SAME)
    with forward_ad.dual_level():
        seen = forward_ad.make_dual(x, tangent)
        for swap in (False, True):
            model = drawn(name, 0, SAME, swap=swap)
            backends.calls.clear()
            with torch.inference_mode():
                assert forward_ad.unpack_dual(model(seen)).tangent is None
    assert not backends.calls["reference"] or native_module.module is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_graph_keeps_tangents() -> None:
    torch._dynamo.reset()
    model = drawn("chain", 0, SAME, swap=True)
    x, tangent = inputs("chain", 0, SAME)
    compiled = torch.compile(
        lambda x, t: jvp(model, (x,), (t,))[1], backend="aot_eager", fullgraph=True
    )
    expected = jvp(drawn("chain", 0, SAME), (x,), (tangent,))[1]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, tangent), expected)


def bounded(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z = (x - mean) / (var.clamp(min=0.5) + 1e-5).sqrt()
    return weight * z.clamp(-1.5, 1.5) + bias


@pytest.mark.parametrize("at", range(5), ids=["x", "mean", "var", "weight", "bias"])
def test_tangents_of_a_bounded_norms_tensors(at: int) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(64, 8, generator=g).double(), *torch.randn(4, 8, generator=g).double()]
    tensors[2] = tensors[2].abs() + 0.1

    def ours(t: Tensor) -> Tensor:
        given = [*tensors[:at], t, *tensors[at + 1 :]]
        return ops.resilient_batch_norm(*given, 1e-5, 0.5, 1.5, "none", 0.01, "auto")

    def by_hand(t: Tensor) -> Tensor:
        return bounded(*tensors[:at], t, *tensors[at + 1 :])

    tangent = torch.randn(tensors[at].shape, generator=g).double()
    with torch.no_grad():
        actual = jvp(ours, (tensors[at],), (tangent,))
    torch.testing.assert_close(actual, jvp(by_hand, (tensors[at],), (tangent,)))
    assert actual[1].any()


@pytest.mark.parametrize("argument", ["events", "candidates", "weights"])
def test_tangents_of_a_request(argument: str) -> None:
    """What the op gives is what stock torch gives of events joined with their candidate."""
    torch.manual_seed(0)
    stock = encoder().eval().double().requires_grad_(False)
    user_index = torch.tensor([0, 1, 1, 0, 1])
    given: dict[str, Any] = {
        "events": torch.randn(2, 7, 5).double(),
        "candidates": torch.randn(5, 3).double(),
        "weights": list(stock.parameters()),
    }
    names = [name for name, _ in stock.named_parameters()]

    def joined(events: Tensor, candidates: Tensor, weights: list[Tensor]) -> Tensor:
        x = torch.cat((events[user_index], candidates[:, None].expand(-1, 7, -1)), -1)
        out = functional_call(stock, dict(zip(names, weights, strict=True)), (x,))
        return torch.cat((out[:, :2].flatten(1), out.amax(1)), -1)

    def scored(events: Tensor, candidates: Tensor, weights: list[Tensor]) -> Tensor:
        options = (2, "gelu", 0.01, False, 1e-5, 1e-5, "concat", "zero", "latest_first", 2, "max")
        return ops.request_scoring(
            events, candidates, user_index, weights, None, None, *options, "auto"
        )

    value = given[argument]
    tangent: Any = [torch.randn_like(v) for v in value]
    tangent = tangent if isinstance(value, list) else torch.stack(tangent)

    def derivative(of: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = jvp(
            lambda v: of(**given | {argument: v}), (value,), (tangent,)
        )
        return result

    expected, actual = derivative(joined), derivative(scored)
    torch.testing.assert_close(actual, expected)
    assert actual[1].any()


# --- vmap -----------------------------------------------------------------------------------------


@all_models
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_inputs(name: str, dim: int) -> None:
    def transform(model: nn.Module, *xs: Tensor) -> Tensor:
        return torch.vmap(model, in_dims=dim)(torch.stack(xs, dim))

    check(name, without_gradients(transform), count=3)


def test_vmap_over_inputs_has_the_bits_of_single_calls() -> None:
    for name in MODELS:
        model = drawn(name, 0, SAME, swap=True)
        xs = torch.stack(inputs(name, 0, SAME, 3))
        with torch.inference_mode():
            assert torch.equal(torch.vmap(model)(xs), torch.stack([model(x) for x in xs]))


@all_models
@pytest.mark.parametrize("with_inputs", [False, True])
def test_an_ensemble_of_stacked_weights(name: str, with_inputs: bool) -> None:
    def transform(model: nn.Module, *xs: Tensor) -> Tensor:
        members = [copy.deepcopy(model) for _ in xs]
        for seed, member in enumerate(members):
            torch.manual_seed(seed)
            for p in member.parameters():
                p.copy_((p + torch.randn(p.shape)).bfloat16())
        weights, statistics = stack_module_state(members)
        x = torch.stack(xs) if with_inputs else xs[0]
        return torch.vmap(
            lambda w, s, x: functional_call(model, (w, s), (x,)),
            in_dims=(0, 0, 0 if with_inputs else None),
        )(weights, statistics, x)

    check(name, without_gradients(transform), count=3)


@all_models
def test_gradients_of_each_sample(name: str) -> None:
    def transform(model: nn.Module, x: Tensor, _: Tensor) -> Any:
        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            out: Tensor = functional_call(model, weights, (x.unsqueeze(0),))
            return out.sin().sum()

        return torch.vmap(grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), x)

    check(name, transform)


@pytest.mark.parametrize("kind", ["bool", "float", "lengths"])
def test_vmap_over_masks(kind: str) -> None:
    valid = torch.tensor([[[4], [7], [1]], [[7], [2], [3]]])
    ignored = torch.arange(7) >= valid  # [2, 3, 7]
    mask: Tensor | None = ignored
    if kind == "float":
        mask = torch.zeros(ignored.shape).masked_fill(ignored, -math.inf)
    given = (None, valid.squeeze(-1)) if kind == "lengths" else (mask, None)

    call = arguments()
    x = torch.stack([call["x"], 1.0 - call["x"]])

    def of(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        changed = {"x": x, "key_padding_mask": mask, "lengths": lengths}
        return ops.encoder(*(call | changed).values())

    dims = [0, *(None if g is None else 0 for g in given)]
    with torch.no_grad():
        actual = torch.vmap(of, in_dims=tuple(dims))(x, *given)
    options = {n: call[n] for n in ("nhead", "activation", "padding", "order")}
    golden, low = (
        torch.stack(
            [
                reference.encoder(x[i].to(d), None, call["weights"], ignored[i], **options)
                for i in range(2)
            ]
        )
        for d in (HIGH, LOW)
    )
    assert_close_to_oracle(actual.flatten(0, 1), golden.flatten(0, 1), low.flatten(0, 1))
    # Gradients of each sample run the definition, which reads no values of a batched mask.
    gradients = torch.vmap(grad(lambda *a: of(*a).sin().sum()), in_dims=tuple(dims))(x, *given)
    assert gradients.shape == x.shape
    assert not gradients[ignored].any()


def test_a_length_out_of_range_is_still_an_error_under_vmap() -> None:
    lengths = torch.tensor([[1, 2, 3], [1, 2, 8]])
    call = arguments()
    with torch.no_grad(), pytest.raises(ValueError, match=r"lengths: expected values in 0 .. 7"):
        torch.vmap(lambda n: ops.encoder(*(call | {"lengths": n}).values()))(lengths)
