"""The torch library the ops are registered in, and when a call may pass its dispatcher by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "seqkernels"

#: Kept for the life of the process: the ops vanish with it.
LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]

# Older versions of torch do not have it.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
_C: Any = torch._C
_PLAIN = (Tensor, torch.nn.Parameter)


NEEDS_GRADIENT = (
    "gradients are to be recorded (grad mode is on and an input or a weight requires grad); "
    "call it under torch.inference_mode() or torch.no_grad()"
)


def records_gradients(*tensors: Tensor | None) -> bool:
    """Whether a call on these is to be differentiable."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_eager(x: Tensor) -> bool:
    """Whether a call on `x` runs now and on values: no graph is traced, nothing transforms it."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and not _C._len_torch_dispatch_stack()
        and not _C._get_tracing_state()
        and not _C._functorch.peek_interpreter_stack()
    )


def check_finite(op: str, **arguments: float) -> None:
    """Raise ValueError for a number that no exported package could hold."""
    for name, value in arguments.items():
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name}: expected a finite number, got {value}")


def nobody_listens(x: Tensor) -> bool:
    """Whether an op on `x` may be called without torch's dispatcher, for nobody would notice.

    The dispatcher takes microseconds, 8 of them to pass two layers' weights. It is needed to record
    gradients or a graph, for modes, transforms and the profiler, for tensors that are not plain,
    and for devices other than the CPU.
    """
    return (
        is_eager(x)
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not _C._len_torch_function_stack()
        and not _C._autograd._profiler_enabled()
    )
