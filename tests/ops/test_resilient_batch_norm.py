"""The op ``resilient_batch_norm`` within torch, and what it says of bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkernels import BackendUnavailableError, backends, ops, settings
from seqkernels.options import ResilientBatchNormOptions
from tests.channel_norms import channel_norm


def arguments(**changes: Any) -> list[Any]:
    norm = channel_norm(5, bounded=True)
    legal: dict[str, Any] = {"x": torch.randn(4, 5)}
    legal |= norm._asdict() | {"activation": "relu", "negative_slope": 0.01, "backend": "auto"}
    assert not changes.keys() - legal.keys()
    return list((legal | changes).values())


INPUTS = {
    "2-D": torch.randn(4, 5),
    "3-D": torch.randn(4, 5, 3),
    "channels last": torch.randn(4, 3, 5).transpose(1, 2),
    "columns": torch.randn(5, 4).t(),
    "bf16": torch.randn(4, 5).bfloat16(),
    "no rows": torch.randn(0, 5),
    "no positions": torch.randn(4, 5, 0),
}


def apply(*made: Any) -> Any:
    """As a module calls the op."""
    options = ResilientBatchNormOptions(*made[5:-1])
    return ops.apply_resilient_batch_norm(*made[:5], options, made[-1])


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_opcheck(x: Tensor) -> None:
    torch.library.opcheck(ops.resilient_batch_norm, tuple(arguments(x=x)))
    torch.library.opcheck(
        ops.resilient_batch_norm, tuple(arguments(x=x, weight=None, bias=None, activation="none"))
    )


def test_opcheck_with_gradients() -> None:
    call = arguments(x=torch.randn(4, 5, requires_grad=True), backend="reference")
    call[3] = call[3].requires_grad_()
    torch.library.opcheck(ops.resilient_batch_norm, tuple(call))


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_all_ways_to_call_it_agree(x: Tensor) -> None:
    with torch.inference_mode():
        expected = ops.resilient_batch_norm(*arguments(x=x))
        assert expected.shape == x.shape
        assert torch.equal(apply(*arguments(x=x)), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.resilient_batch_norm(*arguments(x=x)), expected)
    with torch.no_grad():
        assert torch.equal(ops.resilient_batch_norm(*arguments(x=x)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_fall_back(dtype: torch.dtype) -> None:
    backends.calls.clear()
    x = torch.randn(4, 5).to(dtype)
    with torch.inference_mode():
        assert ops.resilient_batch_norm(*arguments(x=x)).dtype == dtype
    assert backends.calls == {"reference": 1}
    with (
        settings.override(strict=True),
        torch.inference_mode(),
        pytest.raises(BackendUnavailableError, match="it takes float32 and bfloat16"),
    ):
        ops.resilient_batch_norm(*arguments(x=x))


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"x": torch.randn(4, 6)}, ValueError, "x: expected 5 channels (dimension 1), got shape"),
        ({"x": torch.randn(5)}, ValueError, "x: expected 2 or 3 dimensions, [N, C] or [N, C, L]"),
        ({"x": torch.randn(1, 5, 1, 1)}, ValueError, "x: expected 2 or 3 dimensions"),
        ({"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "x: expected float32, bfloat16"),
        (
            {"x": torch.randn(4, 0), "mean": torch.ones(0), "var": torch.ones(0)},
            ValueError,
            "x: expected at least one channel",
        ),
        ({"mean": torch.ones(5, 1)}, ValueError, "mean: expected shape [C], got shape (5, 1)"),
        ({"var": torch.ones(4)}, ValueError, "var: expected shape (5,) like mean, got shape (4,)"),
        ({"weight": torch.ones(5, dtype=torch.int32)}, TypeError, "weight: expected a floating"),
        ({"bias": torch.empty(5, device="meta")}, ValueError, "bias: expected device cpu like x"),
        ({"eps": -1e-5}, ValueError, "eps: expected a finite number >= 0, got -1e-05"),
        ({"min_var": math.inf}, ValueError, "min_var: expected a finite number >= 0, got inf"),
        ({"max_abs": math.nan}, ValueError, "max_abs: expected a number > 0 or inf, got nan"),
        (
            {"max_abs": math.inf},
            ValueError,
            "max_abs: expected a finite number > 0, or None for no bound, got inf",
        ),
        ({"negative_slope": math.nan}, ValueError, "negative_slope: expected a finite number, got"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of none, relu"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], told: str) -> None:
    with torch.inference_mode(), pytest.raises(error) as caught:
        ops.resilient_batch_norm(*arguments(**changes))
    assert str(caught.value).startswith("resilient_batch_norm: ")
    assert told in str(caught.value)
