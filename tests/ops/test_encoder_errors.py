"""Bad input gets one clear message that names the argument, what was expected and what came."""

import re
from typing import Any

import pytest
import torch

from seqkernels import BackendUnavailableError, backends, settings
from tests.ops.encoder_call import D, arguments, call, weights

X = arguments()["x"]


def changed(index: int, value: Any, layers: int = 1) -> list[Any]:
    flat: list[Any] = list(weights(layers))
    flat[index] = value
    return flat


VALUE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 2": ({"x": X[0]}, "x: expected 3 dimensions [B, L, E], got shape (7, 24)"),
    "rank 4": ({"x": X[None]}, "x: expected 3 dimensions [B, L, E], got shape (1, 3, 7, 24)"),
    "width": ({"x": X[..., :20]}, "x: expected last dimension 24 (d_model), got shape (3, 7, 20)"),
    "heads": ({"nhead": 5}, "nhead: expected a divisor of d_model = 24, got 5"),
    "no heads": ({"nhead": 0}, "nhead: expected a divisor of d_model = 24, got 0"),
    "activation": (
        {"activation": "swish"},
        "activation: expected one of relu, gelu, gelu_tanh, leaky_relu, got 'swish'",
    ),
    "slope": (
        {"negative_slope": float("inf")},
        "negative_slope: expected a finite number, got inf",
    ),
    "eps": (
        {"layer_norm_eps": float("nan")},
        "layer_norm_eps: expected a finite number, got nan",
    ),
    "fusion": ({"fusion": "sum"}, "fusion: expected one of none, concat, append, got 'sum'"),
    "padding": (
        {"padding": "nan"},
        "padding: expected one of zero, compute, exclude, stock, got 'nan'",
    ),
    "padding of a summary": (
        {"padding": "stock", "latest_k": 1},
        "padding: 'stock' needs fusion='none' and latest_k=None, got fusion='none' and latest_k=1",
    ),
    "order": ({"order": "up"}, "order: expected one of latest_first, latest_last, got 'up'"),
    "pool": ({"pool": "mean", "latest_k": 1}, "pool: expected one of none, max, got 'mean'"),
    "pool of a sequence": ({"pool": "max"}, "pool: expected 'none' without latest_k, got 'max'"),
    "latest_k": (
        {"latest_k": -1, "pool": "max"},
        "latest_k: expected at least 0 with pool='max', got -1",
    ),
    "nothing to return": (
        {"latest_k": 0},
        "latest_k: expected at least 1 with pool='none', got 0",
    ),
    "exclude": (
        {"padding": "exclude", "latest_k": 1},
        "padding: 'exclude' needs pool='max', got pool='none'",
    ),
    "backend": (
        {"backend": "gpu"},
        "backend: expected one of auto, cuda, triton, cpu, reference, got 'gpu'",
    ),
    "no candidate": (
        {"fusion": "concat"},
        "candidate: expected a tensor for fusion='concat', got None",
    ),
    "a candidate": (
        {"candidate": torch.ones(3, 4)},
        "candidate: expected None for fusion='none', got shape (3, 4)",
    ),
    "candidate's batch": (
        {"candidate": torch.ones(2, 4), "fusion": "concat", "x": X[..., :20]},
        "candidate: expected shape [B, C] with B = 3, got shape (2, 4)",
    ),
    "candidate's rank": (
        {"candidate": torch.ones(3, 1, 4), "fusion": "concat", "x": X[..., :20]},
        "candidate: expected shape [B, C] with B = 3, got shape (3, 1, 4)",
    ),
    "candidate's width": (
        {"candidate": torch.ones(3, 5), "fusion": "concat", "x": X[..., :20]},
        "x, candidate: expected last dimensions that add up to 24 (d_model) for fusion='concat', "
        "got 20 and 5",
    ),
    "width of an appended candidate": (
        {"candidate": torch.ones(3, 4), "fusion": "append"},
        "x, candidate: expected last dimension 24 (d_model) of both for fusion='append', "
        "got 24 and 4",
    ),
    "candidate's device": (
        {"candidate": torch.ones(3, 4, device="meta"), "fusion": "concat", "x": X[..., :20]},
        "candidate: expected device cpu like x, got meta",
    ),
    "mask's shape": (
        {"key_padding_mask": torch.zeros(7, 3, dtype=torch.bool)},
        "key_padding_mask: expected shape [B, L] = (3, 7), got shape (7, 3)",
    ),
    "mask's rank": (
        {"key_padding_mask": torch.zeros(7, dtype=torch.bool)},
        "key_padding_mask: expected shape [B, L] = (3, 7), got shape (7,)",
    ),
    "mask's device": (
        {"key_padding_mask": torch.zeros(3, 7, dtype=torch.bool, device="meta")},
        "key_padding_mask: expected device cpu like x, got meta",
    ),
    "mask and lengths": (
        {
            "key_padding_mask": torch.zeros(3, 7, dtype=torch.bool),
            "lengths": torch.tensor([1, 2, 3]),
        },
        "lengths: expected None beside key_padding_mask, got a tensor",
    ),
    "lengths' shape": (
        {"lengths": torch.tensor([1, 2])},
        "lengths: expected shape [B] = (3,), got shape (2,)",
    ),
    "lengths' rank": (
        {"lengths": torch.tensor([[1], [2], [3]])},
        "lengths: expected shape [B] = (3,), got shape (3, 1)",
    ),
    "lengths' device": (
        {"lengths": torch.ones(3, dtype=torch.int64, device="meta")},
        "lengths: expected device cpu like x, got meta",
    ),
    "no weights": ({"weights": []}, "weights: expected 12 per layer and 0 or 2 for the final"),
    "13 weights": ({"weights": [*weights(), torch.ones(D)]}, "norm, got 13"),
    "a missing projection": (
        {"weights": changed(2, None)},
        "weights: expected a tensor for layers.0.self_attn.out_proj.weight, got None",
    ),
    "no first weight": (
        {"weights": changed(0, None)},
        "weights: expected matrices for in_proj_weight and linear1.weight, got None and (16, 24)",
    ),
    "a weight's shape": (
        {"weights": changed(18, torch.ones(D, 8), layers=2)},
        "weights: expected shape (24, 16) for layers.1.linear2.weight, got (24, 8)",
    ),
    "the final norm's shape": (
        {"weights": [*weights(), torch.ones(5), None]},
        "weights: expected shape (24,) for norm.weight, got (5,)",
    ),
    "a weight's device": (
        {"weights": changed(3, torch.ones(D, device="meta"))},
        "weights: expected layers.0.self_attn.out_proj.bias on cpu like the first one, got meta",
    ),
}

TYPE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "integers": (
        {"x": torch.ones(3, 7, D, dtype=torch.int64)},
        "x: expected float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "complex": (
        {"x": torch.ones(3, 7, D, dtype=torch.complex64)},
        "x: expected float32, bfloat16, float16 or float64, got torch.complex64",
    ),
    "8 bits": (
        {"x": X.to(torch.float8_e5m2)},
        "x: expected float32, bfloat16, float16 or float64, got torch.float8_e5m2",
    ),
    "candidate's dtype": (
        {
            "candidate": torch.ones(3, 4, dtype=torch.bfloat16),
            "fusion": "concat",
            "x": X[..., :20],
        },
        "candidate: expected dtype torch.float32 like x, got torch.bfloat16",
    ),
    "mask's dtype": (
        {"key_padding_mask": torch.zeros(3, 7, dtype=torch.uint8)},
        "key_padding_mask: expected bool (True = ignore) or a floating dtype (0 = keep, -inf = "
        "ignore), got torch.uint8",
    ),
    "lengths' dtype": (
        {"lengths": torch.tensor([1.0, 2.0, 3.0])},
        "lengths: expected int32 or int64, got torch.float32",
    ),
    "small lengths": (
        {"lengths": torch.tensor([1, 2, 3], dtype=torch.int16)},
        "lengths: expected int32 or int64, got torch.int16",
    ),
    "a weight's dtype": (
        {"weights": changed(5, torch.ones(16, dtype=torch.int32))},
        "weights: expected a floating dtype for layers.0.linear1.bias, got torch.int32",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_value_errors(name: str, backend: str) -> None:
    changes, message = VALUE_ERRORS[name]
    with torch.inference_mode(), pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(**{"backend": backend} | changes)
    assert str(caught.value).startswith("encoder: ")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_type_errors(name: str, backend: str) -> None:
    changes, message = TYPE_ERRORS[name]
    with torch.inference_mode(), pytest.raises(TypeError, match=re.escape(message)) as caught:
        call(**{"backend": backend} | changes)
    assert str(caught.value).startswith("encoder: ")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("wrong", [-1, 8, 2**31 - 1])
def test_lengths_out_of_range(wrong: int, dtype: torch.dtype, backend: str, grad: bool) -> None:
    lengths = torch.tensor([3, wrong, 7], dtype=dtype)
    x = X.clone().requires_grad_(grad)
    with pytest.raises(ValueError, match=rf"encoder: lengths: expected values in 0 .. 7.*{wrong}"):
        call(x=x, lengths=lengths, backend=backend)


@pytest.mark.parametrize("name", [*VALUE_ERRORS, *TYPE_ERRORS])
def test_the_same_with_gradients(name: str) -> None:
    """The differentiable path checks as much; what it cannot see is what has no gradient."""
    changes, message = (VALUE_ERRORS | TYPE_ERRORS)[name]
    x = changes.get("x", X)
    if not x.is_floating_point() or name == "8 bits":
        pytest.skip("needs an x that can have a gradient")
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call(**changes | {"x": x.detach().clone().requires_grad_()})


@pytest.mark.parametrize("name", ["width", "heads", "mask's shape", "candidate's width"])
def test_the_same_while_a_graph_is_traced(name: str) -> None:
    changes, message = VALUE_ERRORS[name]
    made = arguments(**changes)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made["x"] = mode.from_tensor(made["x"])
        with pytest.raises(ValueError, match=re.escape(message)):
            torch.ops.seqkernels.encoder(*made.values())


def test_forced_backend_that_cannot_run_lists_every_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends.native_module, "module", None)
    monkeypatch.setattr(backends.native_module, "import_error", "undefined symbol: frobnicate")
    monkeypatch.setattr(backends, "_choices_for", None)
    with pytest.raises(BackendUnavailableError) as caught:
        call(x=X.double(), backend="cpu")
    assert str(caught.value) == (
        "encoder: backend 'cpu' cannot run:\n"
        "  - undefined symbol: frobnicate\n"
        "  - dtype torch.float64, it takes float32 and bfloat16"
    )
    assert len(caught.value.reasons) == 2


def test_forced_backend_with_gradients() -> None:
    with pytest.raises(BackendUnavailableError, match="gradients are to be recorded"):
        call(x=X.clone().requires_grad_(), backend="cpu")


@pytest.mark.parametrize("name", ["gpu", "fast"])
def test_unknown_backend_in_the_environment(name: str) -> None:
    with (
        settings.override(backend=name),
        pytest.raises(ValueError, match=f"SEQKERNELS_BACKEND: expected one of auto, cuda.*{name}"),
    ):
        call()


@pytest.mark.skipif(backends.native_module.module is None, reason="there is no native module")
def test_unknown_instruction_set_in_the_environment() -> None:
    with (
        settings.override(isa="avx9"),
        pytest.raises(
            ValueError, match=r"SEQKERNELS_ISA: expected one of .*portable.*, got 'avx9'"
        ),
    ):
        call()


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_input() -> None:
    with pytest.raises((NotImplementedError, RuntimeError, TypeError, ValueError)):
        call(x=X.to_sparse())
