"""The launch of the batch norm kernel."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from seqkernels.backends.call import ResilientBatchNormCall, new_norm_output, readable
from seqkernels.backends.triton import configurations
from seqkernels.options import ACTIVATIONS, limit_of
from seqkernels.reference.resilient_batch_norm import is_bounded


def run(call: ResilientBatchNormCall) -> Tensor:
    """The result of the op."""
    from seqkernels.backends.triton.kernels.batch_norm import batch_norm  # at the first call

    given, mean, var, weight, bias, options = call
    x = readable(given)
    out = new_norm_output(x)
    limit = limit_of("resilient_batch_norm", options.max_abs)
    channels_last = x.dim() == 2 or x.stride(1) < x.stride(2)
    if x.dim() == 2:
        outer, rows, row, column = 1, x.shape[0], 0, 1
    elif channels_last:
        outer, rows, row, column = x.shape[0], x.shape[2], 2, 1
    else:
        outer, rows, row, column = x.shape[0], x.shape[1], 1, 2
    columns = x.shape[column]
    blocks = configurations.batch_norm(rows, columns)
    grid = outer * -(-rows // blocks.rows) * -(-columns // blocks.columns)
    batch_norm[(grid,)](
        x,
        mean.contiguous(),
        var.contiguous(),
        mean if weight is None else weight.contiguous(),
        mean if bias is None else bias.contiguous(),
        out,
        rows=rows,
        columns=columns,
        x_stride=x.stride(0),
        x_row_stride=x.stride(row),
        out_stride=out.stride(0),
        out_row_stride=out.stride(row),
        eps=options.eps,
        min_var=options.min_var,
        limit=_toward_zero(limit),
        negative_slope=options.negative_slope,
        CHANNELS_LAST=channels_last,
        BOUNDED=is_bounded(options.min_var, limit),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=ACTIVATIONS.index(options.activation),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        num_warps=blocks.num_warps,
        enable_fp_fusion=False,  # g * z + b rounds twice, as the definition's bound does
    )
    return out


@lru_cache(maxsize=64)
def _toward_zero(value: float) -> float:
    """The largest fp32 number that is not above `value`, so that a bound stays one."""
    nearest = torch.tensor(value, dtype=torch.float64).to(torch.float32)
    if nearest.item() > value:
        nearest = torch.nextafter(nearest, torch.zeros(()))
    return nearest.item()
