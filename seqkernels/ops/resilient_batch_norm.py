"""``torch.ops.seqkernels.resilient_batch_norm``: batch norm by given statistics, within bounds.

The op checks its arguments once, chooses a backend and lets it write the output. With gradients
to record it is the differentiable reference definition instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends import reference as reference_backend
from seqkernels.backends.call import ResilientBatchNormCall, ResilientBatchNormOptions
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
from seqkernels.reference.resilient_batch_norm import ACTIVATIONS, compute_dtype, is_bounded

_OP = "resilient_batch_norm"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# max_abs: None where there is no bound, since a package of AOTInductor cannot hold infinity.
LIBRARY.define(
    "resilient_batch_norm(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    "float eps, float min_var, float? max_abs, str activation, float negative_slope, str backend) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_bounds(name: str, eps: float, min_var: float, max_abs: float) -> None:
    """Raise ValueError, in the name of the caller, for numbers that are none of their kind."""
    for argument, value in (("eps", eps), ("min_var", min_var)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: {argument}: expected a finite number >= 0, got {value}")
    if not max_abs > 0:
        raise ValueError(f"{name}: max_abs: expected a number > 0 or inf, got {max_abs}")


def limit_of(name: str, max_abs: float | None) -> float:
    """The number that an op's argument stands for: infinity where it is None."""
    if max_abs == math.inf:
        raise ValueError(
            f"{name}: max_abs: expected a finite number > 0, or None for no bound, got inf"
        )
    return math.inf if max_abs is None else max_abs


def _check_options(
    eps: float, min_var: float, max_abs: float | None, activation: str, negative_slope: float
) -> ResilientBatchNormOptions:
    """Check everything that is no tensor."""
    limit = limit_of(_OP, max_abs)
    check_bounds(_OP, eps, min_var, limit)
    check_finite(_OP, negative_slope=negative_slope)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{_OP}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    return ResilientBatchNormOptions(eps, min_var, limit, activation, negative_slope)


# A model brings the same ones on every call.
_checked_options = lru_cache(maxsize=256)(_check_options)


def check_x(name: str, x: Tensor, channels: int | None = None) -> None:
    """Raise, in the name of the caller, unless x is [N, C] or [N, C, L] of a floating dtype."""
    if x.dim() not in (2, 3):
        raise ValueError(
            f"{name}: x: expected 2 or 3 dimensions, [N, C] or [N, C, L], "
            f"got shape {tuple(x.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    count = x.shape[1]
    if channels is not None and count != channels:
        raise ValueError(
            f"{name}: x: expected {channels} channels (dimension 1), got shape {tuple(x.shape)}"
        )
    if count == 0:
        raise ValueError(f"{name}: x: expected at least one channel, got shape {tuple(x.shape)}")


def _check_tensors(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> None:
    if mean.dim() != 1:
        raise ValueError(f"{_OP}: mean: expected shape [C], got shape {tuple(mean.shape)}")
    shape, device = mean.shape, x.device
    check_x(_OP, x, shape[0])
    for name, tensor in (("mean", mean), ("var", var), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{_OP}: {name}: expected shape ({shape[0]},) like mean, "
                f"got shape {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{_OP}: {name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{_OP}: {name}: expected device {device} like x, got {tensor.device}")


def _is_channels_last(x: Tensor) -> bool:
    """Whether the channels of [N, C, L] lie closer in memory than the positions."""
    return x.dim() == 3 and 0 < x.stride(1) < x.stride(2)


def _new_output(x: Tensor) -> Tensor:
    """The output, not filled; channels lie in memory where those of x do."""
    if _is_channels_last(x):
        n, c, length = x.shape
        return x.new_empty((n, length, c)).transpose(1, 2)
    return x.new_empty(x.shape)


def _readable(x: Tensor) -> Tensor:
    """X itself where its rows or positions are contiguous, else a copy."""
    if _is_channels_last(x):
        return x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _dispatch_dtype(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> torch.dtype:
    """What decides whether a backend can run it: fp64 as soon as one tensor has it."""
    given = [t for t in (mean, var, weight, bias) if t is not None]
    return torch.float64 if compute_dtype(*given) is torch.float64 else x.dtype


def _run(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    min_var: float,
    max_abs: float | None,
    activation: str,
    negative_slope: float,
    backend: str,
) -> Tensor:
    options = _checked_options(eps, min_var, max_abs, activation, negative_slope)
    _check_tensors(x, mean, var, weight, bias)
    dtype = _dispatch_dtype(x, mean, var, weight, bias)
    choice, label = backends.choose(_OP, backend, x.device.type, dtype)
    out = _new_output(x)
    if not out.numel():
        return out
    call = ResilientBatchNormCall(_readable(x), mean, var, weight, bias, options, out)
    result = choice.backend.resilient_batch_norm(call, choice.variant)
    backends.calls[label] += 1
    return result


def _fake(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    min_var: float,
    max_abs: float | None,
    activation: str,
    negative_slope: float,
    backend: str,
) -> Tensor:
    """The checks of `_run`, and an empty output like its."""
    _check_options(eps, min_var, max_abs, activation, negative_slope)
    _check_tensors(x, mean, var, weight, bias)
    backends.check_name(backend, f"{_OP}: backend")
    return _new_output(x)


def _autograd(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *options: Any,
) -> Tensor:
    if records_gradients(x, mean, var, weight, bias):
        return _differentiable(x, mean, var, weight, bias, *options)
    with torch._C._AutoDispatchBelowAutograd():
        return resilient_batch_norm(x, mean, var, weight, bias, *options)


def _differentiable(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    min_var: float,
    max_abs: float | None,
    activation: str,
    negative_slope: float,
    backend: str,
) -> Tensor:
    """The reference definition, checked like `_run` and laid out in memory like its output."""
    options = _check_options(eps, min_var, max_abs, activation, negative_slope)
    _check_tensors(x, mean, var, weight, bias)
    backends.check_name(backend, f"{_OP}: backend")
    if not is_exporting():  # an exported program keeps the op, whatever runs while it is made
        backends.report_fallback(_OP, backend, [NEEDS_GRADIENT])
    result = reference_backend.resilient_batch_norm(x, mean, var, weight, bias, options)
    if type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        backends.calls["reference"] += 1
    if _is_channels_last(x):
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    return result.contiguous()


LIBRARY.impl(_OP, _run, "CompositeExplicitAutograd")
LIBRARY.impl(_OP, _autograd, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::{_OP}", _fake, lib=LIBRARY)
register_vmap(_OP)

#: The op itself, with its arguments in the order of its schema.
resilient_batch_norm: Callable[..., Tensor] = torch.ops.seqkernels.resilient_batch_norm.default


_MAX_ABS = 6  # its place among the arguments behind x
_OF_KERNELS = (torch.float32, torch.bfloat16)


def apply_resilient_batch_norm(x: Tensor, *arguments: Any) -> Tensor | Sequence[str]:
    """The op as a module calls it, or why torch's batch norm, which has no bounds, is faster.

    Here ``max_abs`` is the modules' number: infinite without a bound.
    """
    min_var, max_abs = arguments[_MAX_ABS - 1 : _MAX_ABS + 1]
    bounded = is_bounded(min_var, max_abs)
    if max_abs == math.inf:
        arguments = (*arguments[:_MAX_ABS], None, *arguments[_MAX_ABS + 1 :])
    if nobody_listens(x) and (bounded or x.dtype in _OF_KERNELS):
        return _run(x, *arguments)
    if not bounded and is_eager(x):
        tensors, backend = arguments[:4], arguments[-1]
        _check_tensors(x, *tensors)
        dtype = _dispatch_dtype(x, *tensors)
        declined = backends.declined(backends.choose(_OP, backend, x.device.type, dtype)[0])
        if declined or records_gradients(x, *tensors):
            return declined or (NEEDS_GRADIENT,)
    return resilient_batch_norm(x, *arguments)
