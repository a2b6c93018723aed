"""Calls as the native functions take them: addresses, sizes, strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqkernels.backends.call import EncoderCall, ResilientBatchNormCall

_FUSION = {"none": 0, "concat": 1, "append": 2}
_PADDING = {"zero": 0, "compute": 1, "exclude": 2}


def fp32(tensor: Tensor) -> Tensor:
    """The tensor as contiguous float32: itself where it is."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def encoder_arguments(call: EncoderCall) -> tuple[Any, ...]:
    """Of every device's encoder; the call's tensors have to outlive them."""
    x, candidate, _, _, mask, lengths = call[:6]
    out, latest_k, user_index = call.out, call.latest_k, call.user_index
    flag = call.computes_padding
    x_stride, out_stride = x.stride(), out.stride()
    return (
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        out.shape[0],
        x.shape[1],
        x_stride[0],
        x_stride[1],
        0 if candidate is None else candidate.data_ptr(),
        0 if candidate is None else candidate.shape[1],
        0 if candidate is None else candidate.stride(0),
        0 if mask is None else mask.data_ptr(),
        0 if mask is None else mask.stride(0),
        0 if mask is None else mask.stride(1),
        0 if lengths is None else lengths.data_ptr(),
        _FUSION[call.fusion],
        _PADDING[call.padding],
        call.order == "latest_last",
        -1 if latest_k is None else latest_k,
        call.pool == "max",
        out.data_ptr(),
        out_stride[0],
        out_stride[1] if latest_k is None else 0,
        0 if user_index is None else user_index.data_ptr(),
        x.shape[0],
        0 if flag is None else flag.data_ptr(),
    )


def batch_norm_arguments(call: ResilientBatchNormCall) -> tuple[tuple[Any, ...], list[Any]]:
    """Of every device's batch norm, and what has to outlive them beside the call's tensors."""
    x, mean, var, weight, bias, options, out = call
    kept = [None if t is None else fp32(t) for t in (mean, var, weight, bias)]
    # Rows of channels (outer, inner, C), or rows of positions (outer, C, inner).
    channels_last = x.dim() == 2 or x.stride(1) < x.stride(2)
    if x.dim() == 2:
        outer, inner = 1, x.shape[0]
        x_outer, x_row, out_outer, out_row = 0, x.stride(0), 0, out.stride(0)
    else:
        outer, inner = x.shape[0], x.shape[2]
        row = 2 if channels_last else 1
        x_outer, x_row = x.stride(0), x.stride(row)
        out_outer, out_row = out.stride(0), out.stride(row)
    arguments = (
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        channels_last,
        outer,
        inner,
        x.shape[1],
        x_outer,
        x_row,
        *(0 if t is None else t.data_ptr() for t in kept),
        *options,
        out.data_ptr(),
        out_outer,
        out_row,
    )
    return arguments, kept
