"""The torch library the ops are registered in, and when a call may pass its dispatcher by."""

from __future__ import annotations

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


def nobody_listens(x: Tensor) -> bool:
    """Whether an op on `x` may be called without torch's dispatcher, for nobody would notice.

    The dispatcher takes microseconds, 8 of them to pass two layers' weights. It is needed to record
    gradients or a graph, for modes, transforms and the profiler, for tensors that are not plain,
    and for devices other than the CPU.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not _C._len_torch_dispatch_stack()
        and not _C._len_torch_function_stack()
        and not _C._get_tracing_state()
        and not _C._functorch.peek_interpreter_stack()
        and not _C._autograd._profiler_enabled()
    )
