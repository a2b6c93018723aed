"""The op ``linear`` within torch, and what it says of bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqkernels import BackendUnavailableError, backends, ops, settings
from tests.channel_norms import LinearCase, check_linear

CASES = [
    LinearCase(5, 12, 9),
    LinearCase(5, 12, 9, "bounded", "exact", "gelu", bias=False),
    LinearCase(5, 12, 9, "", "bounded", "relu", dtype=torch.bfloat16),
    LinearCase(5, 12, 9, "exact", "", affine=False, layout="transposed"),
    LinearCase(5, 12, 9, "", "exact", "relu", precision="fp32"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: LinearCase) -> None:
    torch.library.opcheck(ops.linear, (case.x(), *case.arguments("auto")))


def test_opcheck_with_gradients() -> None:
    case = CASES[0]
    tensors, *rest = case.arguments("reference")
    tensors = [t if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(ops.linear, (case.x().requires_grad_(), tensors, *rest))


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 0, 12), (0, 12), (1, 2, 2, 12)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    case = LinearCase(1, 12, 9, "", "exact", "relu")
    x = torch.randn(shape)
    with torch.inference_mode():
        y = ops.linear(x, *case.arguments("auto"))
        flat = ops.linear(x.reshape(-1, 12), *case.arguments("auto"))
    assert y.shape == (*shape[:-1], 9)
    assert y.is_contiguous()
    assert torch.equal(y.reshape(-1, 9), flat)


class Model(nn.Module):
    def __init__(self, case: LinearCase) -> None:
        super().__init__()
        tensors, *self.rest = case.arguments("auto")
        self.tensors = nn.ParameterList(t for t in tensors if t is not None)
        self.present = [t is not None for t in tensors]

    def forward(self, x: Tensor) -> Tensor:
        given = iter(self.tensors)
        tensors = [next(given) if there else None for there in self.present]
        return ops.linear(x, tensors, *self.rest)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compile_and_export() -> None:
    torch._dynamo.reset()
    case = LinearCase(7, 12, 9, "bounded", "exact", "relu")
    model = Model(case).eval()
    with torch.no_grad():
        expected = model(case.x())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(case.x()), expected)
        program = torch.export.export(
            model, (case.x(),), dynamic_shapes=({0: torch.export.Dim("rows")},)
        )
        assert torch.equal(program.module()(case.x()[:3]), expected[:3])
    assert "seqkernels.linear" in str(program.graph)


def test_with_gradients_it_is_the_definition() -> None:
    case = LinearCase(7, 12, 9, "exact", "bounded", "gelu")
    tensors, *rest = case.arguments("auto")
    tensors[0].requires_grad_()
    with settings.override(backend="reference"):
        y = ops.linear(case.x(), tensors, *rest)
    y.sum().backward()
    assert tensors[0].grad.isfinite().all()
    assert torch.equal(y.detach(), case.reference(torch.float32))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_fall_back(mode: Any, dtype: torch.dtype) -> None:
    case = LinearCase(7, 12, 9, "", "exact")
    backends.calls.clear()
    with mode():
        y = ops.linear(case.x().to(dtype), *case.arguments("auto"))
    assert y.dtype == dtype
    assert backends.calls == {"reference": 1}
    with settings.override(strict=True), mode(), pytest.raises(BackendUnavailableError):
        ops.linear(case.x().to(dtype), *case.arguments("auto"))


def test_under_autocast_it_stays_what_it_is() -> None:
    case = LinearCase(40, 64, 32, "", "exact")
    with torch.inference_mode():
        expected = ops.linear(case.x(), *case.arguments("auto"))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.linear(case.x(), *case.arguments("auto")), expected)
    check_linear(case, expected)


def arguments(**changes: Any) -> list[Any]:
    tensors, *rest = LinearCase(5, 12, 9, "exact", "exact").arguments("auto")
    named = {"x": torch.randn(5, 12), "weights": tensors}
    named |= dict(
        zip(
            ("input_norm", "output_norm", "activation", "negative_slope", "precision", "backend"),
            rest,
            strict=True,
        )
    )
    at = changes.pop("at", None)
    if at is not None:
        tensors[at] = changes.pop("tensor")
    assert not changes.keys() - named.keys()
    return list((named | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"x": torch.randn(5, 11)}, ValueError, "x: expected last dimension 12 (in_features), got"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected last dimension 12"),
        ({"x": torch.ones(5, 12, dtype=torch.int64)}, TypeError, "x: expected float32, bfloat16"),
        ({"x": torch.empty(5, 12, device="meta")}, ValueError, "x: expected device cpu of weights"),
        ({"weights": [torch.randn(9, 12)]}, ValueError, "weights: expected 10"),
        ({"at": 0, "tensor": None}, ValueError, "weights: expected a matrix [F, K] for weight"),
        ({"at": 0, "tensor": torch.randn(0, 12)}, ValueError, "expected a matrix [F, K]"),
        ({"at": 1, "tensor": torch.randn(8)}, ValueError, "expected shape (9,) for bias, got (8,)"),
        ({"at": 2, "tensor": None}, ValueError, "expected a tensor for input_norm.mean, got None"),
        ({"at": 7, "tensor": None}, ValueError, "expected a tensor for output_norm.var, got None"),
        ({"at": 4, "tensor": torch.ones(3)}, ValueError, "shape (12,) for input_norm.weight"),
        (
            {"at": 9, "tensor": torch.ones(9, dtype=torch.int32)},
            TypeError,
            "expected a floating dtype for output_norm.bias, got torch.int32",
        ),
        ({"input_norm": []}, ValueError, "input_norm: expected (eps, min_var) or"),
        ({"input_norm": [1e-5, 0.0, 1.0, 2.0]}, ValueError, "(eps, min_var, max_abs), got (1e-05,"),
        ({"output_norm": [0.0, 0.0, math.inf]}, ValueError, "max_abs: expected a finite number >"),
        ({"output_norm": [math.inf, 0.0]}, ValueError, "output_norm: eps: expected a finite"),
        (
            {"negative_slope": -math.inf},
            ValueError,
            "negative_slope: expected a finite number, got -inf",
        ),
        ({"output_norm": [-1.0, 0.0, 1.0]}, ValueError, "output_norm: eps: expected a finite"),
        ({"output_norm": [0.0, math.nan, 1.0]}, ValueError, "output_norm: min_var: expected"),
        ({"output_norm": [0.0, 0.0, 0.0]}, ValueError, "output_norm: max_abs: expected a number"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of none, relu"),
        ({"precision": "fp16"}, ValueError, "precision: expected one of bf16, fp32, got 'fp16'"),
        ({"backend": "gpu"}, ValueError, "linear: backend: expected one of auto"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], told: str) -> None:
    with torch.inference_mode(), pytest.raises(error) as e:
        ops.linear(*arguments(**changes))
    assert told in str(e.value)
    assert str(e.value).startswith("linear: ")
