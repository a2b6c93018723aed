"""``torch.ops.seqkernels.resilient_batch_norm``: batch norm by given statistics, within bounds.

The op checks its arguments once, chooses a backend and lets it write the output. With gradients
to record it is the differentiable reference definition instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends import reference as reference_backend
from seqkernels.backends.call import ResilientBatchNormCall, new_norm_output
from seqkernels.backends.problem import Problem
from seqkernels.ops.library import (
    LIBRARY,
    NAMESPACE,
    NEEDS_GRADIENT,
    define,
    is_eager,
    is_exporting,
    nobody_listens,
    records_gradients,
    register_vmap,
)
from seqkernels.options import ResilientBatchNormOptions
from seqkernels.reference.resilient_batch_norm import compute_dtype

_OP = "resilient_batch_norm"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@lru_cache(maxsize=256)  # a model brings the same ones on every call
def _checked_options(options: ResilientBatchNormOptions) -> ResilientBatchNormOptions:
    return options.check()


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
    *arguments: Any,
) -> Tensor:
    options = _checked_options(ResilientBatchNormOptions(*arguments[:-1]))
    tensors = (mean, var, weight, bias)
    _check_tensors(x, *tensors)
    problem = Problem(_OP, x.device.type, _dispatch_dtype(x, *tensors))
    choice, label = backends.choose(problem, arguments[-1])
    if not x.numel():
        return new_norm_output(x)
    call = ResilientBatchNormCall(x, *tensors, options)
    result = choice.backend.resilient_batch_norm(call, choice.variant)
    backends.calls[label] += 1
    return result


def _fake(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """The checks of `_run`, and an empty output like its."""
    ResilientBatchNormOptions(*arguments[:-1]).check()
    _check_tensors(x, mean, var, weight, bias)
    backends.check_name(arguments[-1], f"{_OP}: backend")
    return new_norm_output(x)


def _autograd(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *arguments: Any,
) -> Tensor:
    if records_gradients(x, mean, var, weight, bias):
        return _differentiable(x, mean, var, weight, bias, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return resilient_batch_norm(x, mean, var, weight, bias, *arguments)


def _differentiable(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """The reference definition, checked like `_run` and laid out in memory like its output."""
    _fake(x.detach(), mean, var, weight, bias, *arguments)
    if not is_exporting():  # an exported program keeps the op, whatever runs while it is made
        backends.report_fallback(_OP, arguments[-1], [NEEDS_GRADIENT])
    options = ResilientBatchNormOptions(*arguments[:-1])
    result = reference_backend.resilient_batch_norm(x, mean, var, weight, bias, options)
    if type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        backends.calls["reference"] += 1
    return result


define(_OP)
LIBRARY.impl(_OP, _run, "CompositeExplicitAutograd")
LIBRARY.impl(_OP, _autograd, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::{_OP}", _fake, lib=LIBRARY)
register_vmap(_OP)

#: The op itself, with its arguments in the order of its schema.
resilient_batch_norm: Callable[..., Tensor] = torch.ops.seqkernels.resilient_batch_norm.default

_OF_KERNELS = (torch.float32, torch.bfloat16)


def apply_resilient_batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: ResilientBatchNormOptions,
    backend: str,
) -> Tensor | Sequence[str]:
    """The op as a module calls it, or why torch's batch norm, which has no bounds, is faster."""
    tensors = (mean, var, weight, bias)
    bounded = options.min_var > 0 or options.max_abs is not None
    if nobody_listens(x) and (bounded or x.dtype in _OF_KERNELS):
        return _run(x, *tensors, *options, backend)
    if not bounded and is_eager(x):
        _check_tensors(x, *tensors)
        problem = Problem(_OP, x.device.type, _dispatch_dtype(x, *tensors))
        declined = backends.declined(backends.choose(problem, backend)[0])
        if declined or records_gradients(x, *tensors):
            return declined or (NEEDS_GRADIENT,)
    return resilient_batch_norm(x, *tensors, *options, backend)


def native_norm(
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    options: ResilientBatchNormOptions,
    backend: str,
) -> backends.Native | None:
    """The native kernel of a module's calls with its constants, if one runs on the CPU."""
    mean, var, weight, bias = tensors
    assert mean is not None
    assert var is not None
    x = mean.new_empty((0, 1), dtype=dtype)
    problem = Problem(_OP, mean.device.type, _dispatch_dtype(x, mean, var, weight, bias))
    choice, label = backends.choose(problem, backend)
    if not isinstance(choice.backend, backends.CpuBackend):
        return None
    packed = choice.backend.packed_norm(tensors, options, choice.variant)
    return backends.Native(choice.backend.ops.resilient_batch_norm_packed.default, packed, label)
