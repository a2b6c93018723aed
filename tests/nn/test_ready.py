"""The short way to the op: it is taken, gives the same bits, and misses nothing that changed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import backends, settings
from seqkernels.backends import native_module
from seqkernels.nn import Linear, ResilientBatchNorm1d, TransformerEncoder, UserSequenceEncoder
from seqkernels.nn.ready import ready_for
from seqkernels.testing import assert_close_to_oracle
from tests.from_the_field.stock_models import cast

pytestmark = pytest.mark.skipif(
    native_module.module is None, reason="there is no native module to go to"
)
D, HEADS, FF = 16, 2, 24


def encoder(**changes: Any) -> TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True, **changes)
    made = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D), enable_nested_tensor=False)
    return TransformerEncoder.from_torch(made).eval()


def norm() -> ResilientBatchNorm1d:
    made = ResilientBatchNorm1d(D).eval()
    assert made.running_mean is not None
    nn.init.normal_(made.running_mean)
    return made


def _seq_first() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, HEADS, FF)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


MODULES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "encoder": (encoder, (3, 5, D)),
    "seq first": (
        lambda: TransformerEncoder.from_torch(_seq_first()),
        (5, 3, D),
    ),
    "layer": (
        lambda: seqkernels.nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True).eval(),
        (3, 5, D),
    ),
    "user": (
        lambda: UserSequenceEncoder(D, 0, HEADS, FF, 1, fusion="none", latest_k=2).eval(),
        (3, 5, D),
    ),
    "linear": (lambda: Linear(D, FF).eval(), (3, D)),
    "norm": (norm, (3, D)),
}


def run(module: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = module(x)
    return out


def is_ready(module: Any, x: Tensor) -> bool:
    with torch.inference_mode():
        return ready_for(module, x) is not None


@pytest.mark.parametrize("name", MODULES)
def test_the_second_call_takes_it_and_gives_the_same_bits(name: str) -> None:
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape)
    assert not is_ready(module, x)
    first = run(module, x)
    assert is_ready(module, x)
    before = sum(backends.calls.values())
    assert torch.equal(run(module, x), first)
    assert sum(backends.calls.values()) == before + 1
    other = run(module, x.bfloat16())  # of another dtype: the long way, and another one is kept
    assert other.dtype is torch.bfloat16
    assert is_ready(module, x.bfloat16())


def _set_data(new: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        weight = m.layers[1].self_attn.out_proj.weight
        weight.data = new(weight.data)

    return change


def _swap_tensors(m: Any) -> None:
    weight = m.layers[0].linear1.weight
    other = nn.Parameter(torch.randn_like(weight))
    torch.utils.swap_tensors(weight, other)


@torch.no_grad()
def _edit(m: Any) -> None:
    m.layers[0].linear2.weight.mul_(-1.0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": _edit,
    "data": _set_data(lambda w: w * 2),
    "transposed data": _set_data(lambda w: w.t()),
    "swapped tensors": _swap_tensors,
    "new parameter": lambda m: setattr(m.layers[0].linear1, "bias", nn.Parameter(torch.ones(FF))),
    "activation": lambda m: (
        setattr(m.layers[0], "activation", nn.functional.gelu)
        or setattr(m.layers[1], "activation", nn.functional.gelu)
    ),
    "eps": lambda m: [
        setattr(n, "eps", 0.5) for layer in m.layers for n in (layer.norm1, layer.norm2)
    ],
    "final norm": lambda m: setattr(m, "norm", nn.LayerNorm(D, eps=2.0)),
    "a layer less": lambda m: setattr(m, "layers", m.layers[:1]),
    "a hook": lambda m: m.layers[0].register_forward_hook(lambda _m, _a, out: out * 2),
    "a hook of a part": lambda m: m.layers[1].linear1.register_forward_pre_hook(
        lambda _m, a: (a[0] * 2,)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_counts_at_once(name: str) -> None:
    module, x = encoder(), torch.randn(3, 5, D)
    before = run(module, x)
    assert is_ready(module, x)
    CHANGES[name](module)
    assert not is_ready(module, x)
    now = run(module, x)
    stock = _seq_first()
    stock.__dict__ = {k: v for k, v in module.__dict__.items() if k != "_packed_weights"}
    # With gradients: torch's own code, off its fast path.
    golden, low = (cast(stock, t)(x).detach() for t in (torch.float64, torch.bfloat16))
    # All sequences as one draw: a single one has too few values for a yardstick.
    one = [t.flatten()[None] for t in (now, golden, low)]
    assert_close_to_oracle(*one)
    with pytest.raises(AssertionError):
        assert_close_to_oracle(before.flatten()[None], *one[1:])


def test_methods_that_are_replaced_count() -> None:
    """Torch's fast path would pass them by too: tests/from_the_field/test_replaced_methods.py."""
    module, x = encoder(), torch.randn(3, 5, D)
    for owner, name in ((module.layers[0].linear1, "forward"), (module.layers[1], "_ff_block")):
        run(module, x)
        assert is_ready(module, x)
        setattr(owner, name, lambda y: y)
        assert not is_ready(module, x)
        delattr(owner, name)


def test_a_class_and_the_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = encoder(), torch.randn(3, 5, D)
    run(module, x)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        assert not is_ready(module, x)
    assert is_ready(module, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_ready(module, x)
    handle.remove()
    assert is_ready(module, x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert not is_ready(module, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with settings.override(isa="portable"):
        assert not is_ready(module, x)
    assert is_ready(module, x)
    seqkernels.recheck_weights()
    assert not is_ready(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_ready(module, x)


def test_running_statistics_count() -> None:
    module, x = norm(), torch.randn(3, D)
    run(module, x)
    assert module.running_mean is not None
    module.running_mean.add_(1.0)
    assert not is_ready(module, x)
    run(module, x)
    module.reset_running_stats()
    assert not is_ready(module, x)


def test_errors_are_worded_as_ever() -> None:
    module, x = encoder(), torch.randn(3, 5, D)
    run(module, x)
    with pytest.raises(ValueError, match="last dimension 16"):
        run(module, torch.randn(3, 5, D + 1))
    with pytest.raises(TypeError, match="bool"), torch.inference_mode():
        module(x, src_key_padding_mask=torch.zeros(3, 5, dtype=torch.int64))
    with (
        pytest.raises(ValueError, match="key_padding_mask: expected shape"),
        torch.inference_mode(),
    ):
        module(x, src_key_padding_mask=torch.zeros(3, 6, dtype=torch.bool))
    assert is_ready(module, x)


def test_a_module_that_is_never_the_same_is_left_alone() -> None:
    module, x = encoder(), torch.randn(3, 5, D)
    for i in range(60):
        module.counter = i  # type: ignore[assignment]
        run(module, x)
    packed = module._packed
    assert packed.misses > 16
    assert not is_ready(module, x)


def test_tensors_that_are_not_at_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that keeps tensors elsewhere costs the short way, and nothing else."""
    for offset in (24, None):
        monkeypatch.setattr("seqkernels.nn.ready._tensor_offset", lambda found=offset: found)
        module, x = encoder(), torch.randn(3, 5, D)
        expected = run(encoder(), x)
        for _ in range(3):
            assert torch.equal(run(module, x), expected)
        assert module._packed.ready is None


def test_nothing_keeps_a_module_alive() -> None:
    module, x = encoder(), torch.randn(3, 5, D)
    run(module, x)
    packed = weakref.ref(module._packed.ready.packed[1])
    died = weakref.ref(module)
    del module
    gc.collect()
    assert died() is None
    assert packed() is None


def test_a_move_frees_the_packed_weights_at_once() -> None:
    module, x = encoder(), torch.randn(3, 5, D)
    run(module, x)
    packed = weakref.ref(module._packed.ready.packed[1])
    gc.disable()
    try:
        module.to(torch.bfloat16)
        assert packed() is None
    finally:
        gc.enable()
