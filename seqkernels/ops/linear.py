"""``torch.ops.seqkernels.linear``: a linear layer, the norms around it and an activation.

::

    y = act(norm_out(norm_in(x) W^T + b))

in bf16 where the processor multiplies it, with fp32 sums. The op checks its arguments once, chooses
a backend and lets it write the output. With gradients to record it is the differentiable reference
definition instead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends import reference as reference_backend
from seqkernels.backends.call import LinearCall
from seqkernels.backends.linear_weights import LAYOUT, LinearShape, read_shape
from seqkernels.backends.problem import Problem
from seqkernels.backends.weights import Owner, WeightSet, lookup, owned_by, recheck_weights
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
from seqkernels.options import LinearOptions

_OP = "linear"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@lru_cache(maxsize=1024)  # a model brings the same ones on every call
def _checked_options(options: LinearOptions, shape: LinearShape) -> LinearOptions:
    return options.check(shape.has_input_norm, shape.has_output_norm)


def _options_of(arguments: Sequence[Any]) -> LinearOptions:
    """The record from the op's arguments, whose lists are made tuples."""
    input_norm, output_norm, *others = arguments
    return LinearOptions(tuple(input_norm), tuple(output_norm), *others)


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


class Checked(NamedTuple):
    """A call whose arguments are legal, and what will run it."""

    weight_set: WeightSet
    choice: backends.Choice
    label: str


def _check(weight_set: WeightSet, x: Tensor, options: LinearOptions, backend: str) -> Checked:
    shape: LinearShape = weight_set.shape
    _checked_options(options, shape)
    _check_x(x, shape)
    choice = backends.choose(Problem(_OP, shape.device.type, x.dtype), backend)
    return Checked(weight_set, *choice)


def _execute(
    checked: Checked, x: Tensor, weights: Sequence[Tensor | None], options: LinearOptions
) -> Tensor:
    if not x.numel():
        return x.new_empty((*x.shape[:-1], checked.weight_set.shape.out_features))
    call = LinearCall(x, weights, checked.weight_set, options)
    result = checked.choice.backend.linear(call, checked.choice.variant)
    backends.calls[checked.label] += 1
    return result


def _run(x: Tensor, weights: Sequence[Tensor | None], *arguments: Any) -> Tensor:
    options = _options_of(arguments[:-1])
    checked = _check(lookup(LAYOUT, weights), x, options, arguments[-1])
    return _execute(checked, x, weights, options)


def _fake(x: Tensor, weights: Sequence[Tensor | None], *arguments: Any) -> Tensor:
    """The checks of `_run`, and an empty output like its."""
    shape = read_shape(weights)
    _options_of(arguments[:-1]).check(shape.has_input_norm, shape.has_output_norm)
    _check_x(x, shape)
    backends.check_name(arguments[-1], f"{_OP}: backend")
    return x.new_empty((*x.shape[:-1], shape.out_features))


def _autograd(x: Tensor, weights: Sequence[Tensor | None], *arguments: Any) -> Tensor:
    if records_gradients(x, *weights):
        return _differentiable(x, weights, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return linear(x, weights, *arguments)


def _differentiable(x: Tensor, weights: Sequence[Tensor | None], *arguments: Any) -> Tensor:
    """The reference definition, checked like `_run`."""
    _fake(x.detach(), weights, *arguments)
    recheck_weights()  # a step of an optimizer may follow, and fused ones are not counted
    if not is_exporting():  # an exported program keeps the op, whatever runs while it is made
        backends.report_fallback(_OP, arguments[-1], [NEEDS_GRADIENT])
    result = reference_backend.linear(x, weights, _options_of(arguments[:-1]))
    if type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        backends.calls["reference"] += 1
    return result.contiguous()


define(_OP)
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
    options: LinearOptions,
    backend: str,
) -> Tensor | Sequence[str]:
    """The op as the module calls it that owns the weights, or why torch's modules are faster.

    `part` tells the calls of a module apart. The result has the dtype that torch's product has
    under autocast.
    """
    if not is_eager(x):
        return _as_autocast(linear(x, weights, *options, backend))
    weight_set = owner._packed.lookup(LAYOUT, weights, part)
    checked = _check(weight_set, x, options, backend)
    declined = backends.declined(checked.choice)
    if declined:
        return declined
    if nobody_listens(x):
        return _as_autocast(_execute(checked, x, weights, options))
    if records_gradients(x, *weights):
        recheck_weights()
        return (NEEDS_GRADIENT,)
    with owned_by(owner._packed, part):
        return _as_autocast(linear(x, weights, *options, backend))


def native_linear(
    owner: Owner,
    part: Hashable,
    weights: Sequence[Tensor | None],
    dtype: torch.dtype,
    options: LinearOptions,
    backend: str,
) -> backends.Native | None:
    """The native kernel of a module's calls with its packed weights, if one runs on the CPU."""
    weight_set = owner._packed.lookup(LAYOUT, weights, part)
    choice, label = backends.choose(Problem(_OP, weight_set.shape.device.type, dtype), backend)
    if not isinstance(choice.backend, backends.CpuBackend):
        return None
    packed = choice.backend.packed_linear(weight_set, weights, options, choice.variant)
    return backends.Native(choice.backend.ops.linear_packed.default, packed, label)


def _as_autocast(out: Tensor) -> Tensor:
    kind = out.device.type
    if torch.is_autocast_enabled(kind) and out.dtype is not torch.float64:
        return out.to(torch.get_autocast_dtype(kind))
    return out
