"""``torch.ops.seqkernels.linear``: a linear layer, the norms around it and an activation.

::

    y = act(norm_out(norm_in(x) W^T + b))

in bf16 where the processor multiplies it, with fp32 sums. The op checks its arguments once, chooses
a backend and lets it write the output. With gradients to record it is the differentiable reference
definition instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends import reference as reference_backend
from seqkernels.backends.call import LinearCall, LinearOptions
from seqkernels.backends.linear_weights import LAYOUT, LinearShape, read_shape
from seqkernels.backends.weights import Owner, WeightSet, lookup, owned_by, recheck_weights
from seqkernels.ops.library import (
    LIBRARY,
    NAMESPACE,
    NEEDS_GRADIENT,
    check_finite,
    is_eager,
    is_exporting,
    nobody_listens,
    records_gradients,
    register_vmap,
)
from seqkernels.ops.resilient_batch_norm import check_bounds, limit_of
from seqkernels.reference.resilient_batch_norm import ACTIVATIONS

_OP = "linear"
#: What the operands of the product are rounded to: bf16 where the processor multiplies it (the
#: weights everywhere), or nothing.
PRECISIONS = ("bf16", "fp32")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# weights: weight, bias, then mean, var, weight, bias of the norm in front and of the one behind
# (None where there is none); input_norm, output_norm: eps, min_var and, if there is a bound,
# max_abs; or nothing.
LIBRARY.define(
    "linear(Tensor x, Tensor?[] weights, float[] input_norm, float[] output_norm, "
    "str activation, float negative_slope, str precision, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_options(
    shape: LinearShape,
    input_norm: tuple[float, ...],
    output_norm: tuple[float, ...],
    activation: str,
    negative_slope: float,
    precision: str,
) -> LinearOptions:
    """Check everything that is no tensor."""
    norms = (
        _norm_numbers("input_norm", input_norm, shape.has_input_norm),
        _norm_numbers("output_norm", output_norm, shape.has_output_norm),
    )
    check_finite(_OP, negative_slope=negative_slope)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{_OP}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    check_precision(_OP, precision)
    return LinearOptions(*norms, activation, negative_slope, precision)


def check_precision(name: str, precision: str) -> None:
    """Raise ValueError, in the name of the caller, for a precision that is none."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"{name}: precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}"
        )


def _norm_numbers(name: str, numbers: tuple[float, ...], there: bool) -> tuple[float, ...]:
    """Check a norm's numbers; eps, min_var and max_abs, infinite without a bound, or nothing."""
    if len(numbers) not in ((2, 3) if there else (0,)):
        expected = "(eps, min_var)" if there else "nothing, as its tensors are None"
        more = " or (eps, min_var, max_abs)" if there else ""
        raise ValueError(f"{_OP}: {name}: expected {expected}{more}, got {numbers}")
    if not there:
        return ()
    eps, min_var, *bound = numbers
    limit = limit_of(f"{_OP}: {name}", bound[0] if bound else None)
    check_bounds(f"{_OP}: {name}", eps, min_var, limit)
    return eps, min_var, limit


# A model brings the same ones on every call.
_checked_options = lru_cache(maxsize=1024)(_check_options)


def _check_x(x: Tensor, shape: LinearShape) -> None:
    if x.dim() == 0 or x.shape[-1] != shape.in_features:
        raise ValueError(
            f"{_OP}: x: expected last dimension {shape.in_features} (in_features), "
            f"got shape {tuple(x.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"{_OP}: x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.device != shape.device:
        raise ValueError(f"{_OP}: x: expected device {shape.device} of weights, got {x.device}")


def _run(
    x: Tensor,
    weights: Sequence[Tensor | None],
    input_norm: Sequence[float],
    output_norm: Sequence[float],
    *options: Any,
) -> Tensor:
    weight_set = lookup(LAYOUT, weights)
    checked = _check(weight_set, x, input_norm, output_norm, *options)
    return _execute(weight_set, *checked, x, weights)


def _check(
    weight_set: WeightSet,
    x: Tensor,
    input_norm: Sequence[float],
    output_norm: Sequence[float],
    activation: str,
    negative_slope: float,
    precision: str,
    backend: str,
) -> tuple[LinearOptions, backends.Choice, str]:
    shape: LinearShape = weight_set.shape
    options = _checked_options(
        shape, tuple(input_norm), tuple(output_norm), activation, negative_slope, precision
    )
    _check_x(x, shape)
    return options, *backends.choose(_OP, backend, shape.device.type, x.dtype)


def _execute(
    weight_set: WeightSet,
    options: LinearOptions,
    choice: backends.Choice,
    label: str,
    x: Tensor,
    weights: Sequence[Tensor | None],
) -> Tensor:
    shape: LinearShape = weight_set.shape
    out = x.new_empty((*x.shape[:-1], shape.out_features))
    if not out.numel():
        return out
    rows = x if x.dim() == 2 else x.reshape(-1, shape.in_features)  # [N, K]
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    call = LinearCall(rows, weights, weight_set, options, out.view(-1, shape.out_features))
    choice.backend.linear(call, choice.variant)
    backends.calls[label] += 1
    return out


def _fake(
    x: Tensor,
    weights: Sequence[Tensor | None],
    input_norm: Sequence[float],
    output_norm: Sequence[float],
    activation: str,
    negative_slope: float,
    precision: str,
    backend: str,
) -> Tensor:
    """The checks of `_run`, and an empty output like its."""
    shape = read_shape(weights)
    _check_options(
        shape, tuple(input_norm), tuple(output_norm), activation, negative_slope, precision
    )
    _check_x(x, shape)
    backends.check_name(backend, f"{_OP}: backend")
    return x.new_empty((*x.shape[:-1], shape.out_features))


def _autograd(x: Tensor, weights: Sequence[Tensor | None], *options: Any) -> Tensor:
    if records_gradients(x, *weights):
        return _differentiable(x, weights, *options)
    with torch._C._AutoDispatchBelowAutograd():
        return linear(x, weights, *options)


def _differentiable(
    x: Tensor,
    weights: Sequence[Tensor | None],
    input_norm: Sequence[float],
    output_norm: Sequence[float],
    activation: str,
    negative_slope: float,
    precision: str,
    backend: str,
) -> Tensor:
    """The reference definition, checked like `_run`."""
    shape = read_shape(weights)
    options = _check_options(
        shape, tuple(input_norm), tuple(output_norm), activation, negative_slope, precision
    )
    _check_x(x, shape)
    backends.check_name(backend, f"{_OP}: backend")
    recheck_weights()  # a step of an optimizer may follow, and fused ones are not counted
    if not is_exporting():  # an exported program keeps the op, whatever runs while it is made
        backends.report_fallback(_OP, backend, [NEEDS_GRADIENT])
    result = reference_backend.linear(x, weights, options)
    if type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        backends.calls["reference"] += 1
    return result.contiguous()


LIBRARY.impl(_OP, _run, "CompositeExplicitAutograd")
LIBRARY.impl(_OP, _autograd, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::{_OP}", _fake, lib=LIBRARY)
register_vmap(_OP)

#: The op itself, with its arguments in the order of its schema.
linear: Callable[..., Tensor] = torch.ops.seqkernels.linear.default


def apply_linear(
    owner: Owner,
    part: Hashable,
    x: Tensor,
    weights: Sequence[Tensor | None],
    input_norm: Sequence[float],
    output_norm: Sequence[float],
    *options: Any,
) -> Tensor | Sequence[str]:
    """The op as the module calls it that owns the weights, or why torch's modules are faster.

    `part` tells the calls of a module apart. Here each norm has the modules' three numbers:
    ``max_abs`` is infinite without a bound. The result has the dtype that torch's product has under
    autocast.
    """
    norms = _finite(input_norm), _finite(output_norm)
    if not is_eager(x):
        return _as_autocast(linear(x, weights, *norms, *options))
    weight_set = owner._packed.lookup(LAYOUT, weights, part)
    checked = _check(weight_set, x, *norms, *options)
    declined = backends.declined(checked[1])
    if declined:
        return declined
    if nobody_listens(x):
        return _as_autocast(_execute(weight_set, *checked, x, weights))
    if records_gradients(x, *weights):
        recheck_weights()
        return (NEEDS_GRADIENT,)
    with owned_by(owner._packed, part):
        return _as_autocast(linear(x, weights, *norms, *options))


def _as_autocast(out: Tensor) -> Tensor:
    kind = out.device.type
    if torch.is_autocast_enabled(kind) and out.dtype is not torch.float64:
        return out.to(torch.get_autocast_dtype(kind))
    return out


def _finite(numbers: Sequence[float]) -> Sequence[float]:
    """A norm's numbers as the op takes them."""
    return numbers[:2] if numbers and numbers[2] == math.inf else numbers
