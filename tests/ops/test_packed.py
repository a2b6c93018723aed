"""The native ops on packed weights refuse what does not fit, whatever it is; nothing crashes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkernels.backends import native_module
from seqkernels.options import EncoderOptions, LinearOptions, ResilientBatchNormOptions
from tests.ops.encoder_call import HEADS, D, weights

pytestmark = pytest.mark.skipif(native_module.module is None, reason="there is no native module")
OPS: Any = torch.ops.seqkernels
OPTIONS = EncoderOptions(nhead=HEADS)
B, L, C = 3, 7, 8


def packed_encoder(**changes: Any) -> tuple[Tensor, Tensor]:
    model, packed = OPS.pack_encoder(weights(), *OPTIONS._replace(**changes), "portable")
    return model, packed


def arguments(**changes: Any) -> dict[str, Any]:
    legal = {
        "x": torch.randn(B, L, D),
        "candidate": None,
        "user_index": None,
        "key_padding_mask": None,
        "lengths": None,
        "computes_padding": None,
    }
    assert not changes.keys() - legal.keys()
    return legal | changes


MODEL = packed_encoder() if native_module.module is not None else None
CONCAT = packed_encoder(fusion="concat") if native_module.module is not None else None
EVENTS = torch.randn(B, L, D - C)

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "rank": (MODEL, {"x": torch.randn(B, D)}, "x: expected 3 dimensions"),
    "width": (MODEL, {"x": torch.randn(B, L, D + 1)}, "fit d_model = 24, got 25 and 0"),
    "dtype": (MODEL, {"x": torch.randn(B, L, D).half()}, "x: expected float32 or bfloat16"),
    "candidate": (MODEL, {"candidate": torch.randn(B, C)}, "candidate: expected exactly with"),
    "no candidate": (CONCAT, {"x": EVENTS}, "candidate: expected exactly with fusion"),
    "rows": (CONCAT, {"x": EVENTS, "candidate": torch.randn(B + 1, C)}, "candidate: expected 3"),
    "kind": (
        CONCAT,
        {"x": EVENTS, "candidate": torch.randn(B, C).bfloat16()},
        "candidate: expected the dtype of x",
    ),
    "index": (
        CONCAT,
        {"x": EVENTS, "candidate": torch.randn(5, C), "user_index": torch.tensor([0, 1, 2, 0, 3])},
        "user_index: expected values in 0 .. 2, got 3",
    ),
    "index's length": (
        CONCAT,
        {"x": EVENTS, "candidate": torch.randn(5, C), "user_index": torch.tensor([0])},
        "user_index: expected shape [N]",
    ),
    "index's dtype": (
        CONCAT,
        {"x": EVENTS, "candidate": torch.randn(1, C), "user_index": torch.tensor([0.0])},
        "user_index: expected int32 or int64",
    ),
    "mask": (
        MODEL,
        {"key_padding_mask": torch.zeros(B, L + 1, dtype=torch.bool)},
        "key_padding_mask: expected shape [B, L]",
    ),
    "mask's dtype": (
        MODEL,
        {"key_padding_mask": torch.zeros(B, L)},
        "key_padding_mask: expected bool, got float32",
    ),
    "both": (
        MODEL,
        {
            "key_padding_mask": torch.zeros(B, L, dtype=torch.bool),
            "lengths": torch.zeros(B, dtype=torch.int64),
        },
        "lengths: expected None beside key_padding_mask",
    ),
    "lengths": (MODEL, {"lengths": torch.tensor([1, 2])}, "lengths: expected shape [B]"),
    "flag": (MODEL, {"computes_padding": torch.zeros(0)}, "computes_padding: expected [1] bool"),
    "a length": (MODEL, {"lengths": torch.tensor([1, 2, 8])}, "lengths: expected values in 0 .. 7"),
    "a negative one": (MODEL, {"lengths": torch.tensor([1, -2, 3])}, "got -2 at index 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_that_do_not_fit(name: str) -> None:
    packed, changes, message = REFUSED[name]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        OPS.encoder_packed(*arguments(**changes).values(), *packed)


def test_what_was_never_packed() -> None:
    model, packed = packed_encoder()
    x = arguments()
    for wrong in (model[:-1], torch.zeros_like(model), model.view(torch.int8), model.flip(0)):
        with pytest.raises(ValueError, match="model: expected what pack_encoder"):
            OPS.encoder_packed(*x.values(), wrong, packed)
    for wrong in (packed[:-64], packed.view(torch.int8), packed[None]):
        with pytest.raises(ValueError, match="packed: expected the"):
            OPS.encoder_packed(*x.values(), model, wrong)
    linear_model, linear = OPS.pack_linear(
        [torch.randn(4, 8), *[None] * 9], *LinearOptions(), "portable"
    )
    with pytest.raises(ValueError, match="model: expected what pack_linear"):
        OPS.linear_packed(torch.randn(2, 8), model, packed)
    with pytest.raises(ValueError, match="x: expected last dimension 8"):
        OPS.linear_packed(torch.randn(2, 9), linear_model, linear)


@pytest.mark.parametrize("count", [0, 11, 13])
def test_too_few_weights(count: int) -> None:
    flat = (weights() * 2)[:count]
    with pytest.raises(ValueError, match="weights: expected"):
        OPS.pack_encoder(flat, *OPTIONS, "portable")


@pytest.mark.parametrize("index", range(12))
def test_a_weight_of_another_shape(index: int) -> None:
    flat = weights()
    given = flat[index]
    assert given is not None
    flat[index] = given[..., :-1]
    with pytest.raises(ValueError, match=r"another shape|matrices|divisor"):
        OPS.pack_encoder(flat, *OPTIONS, "portable")


def test_packing_takes_any_layout_and_dtype() -> None:
    plain = packed_encoder()[1]
    spread = [None if w is None else w.double().repeat(2, *[1] * (w.dim() - 1)) for w in weights()]
    views = [None if w is None else w[: len(w) // 2] for w in spread]
    assert torch.equal(OPS.pack_encoder(views, *OPTIONS, "portable")[1], plain)
    with pytest.raises(ValueError, match="activation: expected one of"):
        OPS.pack_encoder(weights(), *OPTIONS._replace(activation="swish"), "portable")
    for nhead in (0, -2, 5):
        with pytest.raises(ValueError, match="nhead: expected a divisor of d_model = 24"):
            OPS.pack_encoder(weights(), *OPTIONS._replace(nhead=nhead), "portable")
    with pytest.raises(ValueError, match="isa: expected one of"):
        OPS.pack_encoder(weights(), *OPTIONS, "sse9")


def test_an_output_of_the_caller() -> None:
    call, packed = arguments().values(), packed_encoder()
    expected = OPS.encoder_packed(*call, *packed)
    out = torch.full((B, L, D + 3), torch.nan)[..., :D]
    result = OPS.encoder_packed.out(*call, *packed, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    for wrong in (expected[:2], expected.bfloat16(), torch.zeros(B, D, L).transpose(1, 2)):
        with pytest.raises(ValueError, match="out: expected"):
            OPS.encoder_packed.out(*call, *packed, out=wrong)


def test_batch_norm() -> None:
    channels = [torch.randn(5), torch.rand(5), None, torch.randn(5)]
    model, packed = OPS.pack_resilient_batch_norm(
        *channels, *ResilientBatchNormOptions(), "portable"
    )
    x = torch.randn(4, 5)
    expected = torch.nn.functional.batch_norm(x, channels[0], channels[1], None, channels[3])
    torch.testing.assert_close(OPS.resilient_batch_norm_packed(x, model, packed), expected)
    for wrong in (x[0], x[:, :4], x.half(), x.double(), x[None, None]):
        with pytest.raises((ValueError, RuntimeError), match="x: expected"):
            OPS.resilient_batch_norm_packed(wrong, model, packed)
    with pytest.raises(ValueError, match="expected one shape"):
        OPS.pack_resilient_batch_norm(
            channels[0], torch.rand(4), None, None, *ResilientBatchNormOptions(), "portable"
        )
