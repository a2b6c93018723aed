"""The torch library the ops are registered in, and when a call may pass its dispatcher by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from seqkernels.options import SCHEMAS

NAMESPACE = "seqkernels"

#: Kept for the life of the process: the ops vanish with it.
LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def define(op: str) -> None:
    """Let torch know the op's schema, unless the native library has done so."""
    if not torch._C._jit_get_schemas_for_operator(f"{NAMESPACE}::{op}"):
        LIBRARY.define(f"{op}{SCHEMAS[op]}", tags=(torch.Tag.pt2_compliant_tag,))


# Older versions of torch do not have it.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
_C: Any = torch._C
_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(x: Tensor) -> bool:
    """Whether a call on `x` runs now and on values: no graph is traced, nothing transforms it."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and not _C._len_torch_dispatch_stack()
        and not _C._get_tracing_state()
        and not _C._functorch.peek_interpreter_stack()
        and forward_ad._current_level < 0
    )


NEEDS_GRADIENT = (
    "gradients are to be recorded (grad mode is on and an input or a weight requires grad, or one "
    "has a forward-mode tangent); call it under torch.inference_mode() or torch.no_grad()"
)


def records_gradients(*tensors: Tensor | None) -> bool:
    """Whether a call on these is to be differentiable, in reverse mode or in forward mode."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    # A compiled graph enters the level of torch.func.jvp without this variable.
    has_level = forward_ad._current_level >= 0 or _C._functorch.peek_interpreter_stack()
    if not has_level or not _C._is_fwd_grad_enabled():
        return False
    return any(t is not None and _tangent(t) is not None for t in tensors)


def _tangent(tensor: Tensor) -> Tensor | None:
    unpack: Callable[..., Any] = forward_ad.unpack_dual
    tangent: Tensor | None = unpack(tensor, level=0).tangent  # torch has no other level
    return tangent


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` hides the values of this tensor."""
    return bool(_C._functorch.is_functorch_wrapped_tensor(tensor))


def register_vmap(op: str) -> None:
    """Let ``torch.vmap`` call an op once for each slice of its batched arguments.

    So every slice gets the bits of a call of its own, whichever arguments are batched: inputs,
    weights of an ensemble, or both.
    """

    def of_slices(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        call = getattr(getattr(torch.ops, NAMESPACE), op).default
        slices = (_slice(arguments, in_dims, i) for i in range(info.batch_size))
        return torch.stack([call(*part) for part in slices]), 0

    torch.library.register_vmap(f"{NAMESPACE}::{op}", of_slices, lib=LIBRARY)


def _slice(argument: Any, dim: Any, index: int) -> Any:
    """An argument, or each of a sequence of them, at an index of its batched dimension."""
    if isinstance(argument, list | tuple):
        dims = [None] * len(argument) if dim is None else dim
        return [_slice(a, d, index) for a, d in zip(argument, dims, strict=True)]
    return argument if dim is None else argument.select(dim, index)


def nobody_listens(x: Tensor) -> bool:
    """Whether an op on `x` may be called without torch's dispatcher, for nobody would notice.

    The dispatcher takes microseconds, 8 of them to pass two layers' weights. It is needed to record
    gradients, tangents or a graph, for modes, transforms and the profiler, for tensors that are not
    plain, and for devices other than the CPU.
    """
    return (
        is_eager(x)
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not _C._len_torch_function_stack()
        and not _C._autograd._profiler_enabled()
    )
