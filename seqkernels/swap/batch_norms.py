"""Batch norms, and whatever else normalizes by running statistics."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from seqkernels.nn import ResilientBatchNorm1d, read
from seqkernels.options import check_bounds
from seqkernels.reference.resilient_batch_norm import is_bounded
from seqkernels.swap.kind import Job, Kind, Outcome


class BatchNorms(Kind):
    """Exact, or with bounds; within encoders too, since the encoder's kernel has none."""

    replaces = (nn.BatchNorm1d, nn.SyncBatchNorm)
    ours = (ResilientBatchNorm1d,)
    op = "resilient_batch_norm"
    example = "running_mean"
    everywhere = True

    def recognizes(self, module: nn.Module) -> bool:
        """Whether it normalizes by running statistics, or is a batch norm without any."""
        if isinstance(module, _InstanceNorm):
            return module.track_running_stats
        return isinstance(module, _NormBase) or _has_statistics(module)

    def considers(self, module: Any, job: Job) -> bool:
        """Ours too, where bounds are asked for and it has none."""
        if not isinstance(module, ResilientBatchNorm1d):
            return True
        return is_bounded(*job.bounds) and not _bounded(module)

    def other_class(self, module: nn.Module) -> str:
        """There are many modules with running statistics, and bounds for a few."""
        if isinstance(module, ResilientBatchNorm1d) and not _bounded(module):
            return "it is a ResilientBatchNorm1d without bounds; set its min_var and max_abs"
        if isinstance(module, self.replaces) or parametrize.is_parametrized(module):
            return super().other_class(module)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            return "there are bounds for a BatchNorm1d and a SyncBatchNorm only"
        return "it normalizes by running statistics and is no torch.nn.BatchNorm1d or SyncBatchNorm"

    def reasons(self, module: Any) -> list[str]:
        """It needs weights and statistics of its own, and an eps that the kernel takes."""
        reasons = read.computed_weight_reasons(module)
        if not _has_statistics(module):
            reasons.append("it has no running statistics (track_running_stats=False)")
        if not 0 <= module.eps < math.inf:
            reasons.append(f"its eps is {module.eps}; the kernel takes a finite number >= 0")
        return reasons

    def replace(self, module: Any, name: str, job: Job) -> Outcome:
        """With the bounds that were asked for."""
        synchronized = type(module) is nn.SyncBatchNorm
        with job.report.changing(module):
            ResilientBatchNorm1d._adopt(module, *job.bounds, job.backend)
        low, high = job.bounds
        exact = not is_bounded(low, high)
        told = "replaced, " + ("exact" if exact else f"min_var={low:g}, max_abs={high:g}")
        if synchronized:
            told += (
                "; trained on in several processes, each takes statistics of its own: restore() "
                "before that"
            )
        return Outcome(told)


def _has_statistics(module: nn.Module) -> bool:
    return all(module._buffers.get(n) is not None for n in ("running_mean", "running_var"))


def _bounded(norm: ResilientBatchNorm1d) -> bool:
    return is_bounded(norm.min_var, norm.max_abs)


def bounds(resilient: bool, min_var: float | None, max_abs: float | None) -> tuple[float, float]:
    """Bounds of the batch norms: none unless asked for."""
    if not resilient and min_var is None and max_abs is None:
        return 0.0, math.inf
    defaults = ResilientBatchNorm1d.__init__.__kwdefaults__ or {}
    low = defaults["min_var"] if min_var is None else min_var
    high = defaults["max_abs"] if max_abs is None else max_abs
    check_bounds("swap", 0.0, low, high)
    return low, high
