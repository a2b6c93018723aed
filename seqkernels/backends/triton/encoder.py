"""Launches of the encoder's kernels on the current stream, without synchronizing.

Two a layer, and one before them for users whose candidates share what their events give.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqkernels.backends.call import EncoderCall
from seqkernels.backends.encoder_weights import EncoderShape
from seqkernels.backends.problem import EncoderSize
from seqkernels.backends.triton import configurations
from seqkernels.backends.triton.packing import PackedEncoder, pack
from seqkernels.options import ACTIVATIONS

_FUSION = {"none": 0, "concat": 1, "append": 2}
_PADDING = {"zero": 0, "compute": 1, "exclude": 2, "stock": 0}  # stock: without a mask
_BY_FLAG = 3
_BY_MASK, _BY_LENGTH = 1, 2


def against_size(size: EncoderSize) -> list[str]:
    """Why the kernels do not take an encoder of these sizes, empty if they do."""
    reasons = []
    if size.d_model > configurations.WIDEST_MODEL:
        reasons.append(f"d_model {size.d_model}, it takes at most {configurations.WIDEST_MODEL}")
    head_dim = size.d_model // size.nhead
    if head_dim > configurations.WIDEST_HEAD:
        reasons.append(f"head_dim {head_dim}, it takes at most {configurations.WIDEST_HEAD}")
    return reasons


def run(call: EncoderCall, arch: str) -> Tensor:
    """The result; NaN where a length or a user index is out of range."""
    # Imported at the first call: a machine without Triton loses nothing before it.
    from seqkernels.backends.triton.kernels.attention import attention_long, attention_short
    from seqkernels.backends.triton.kernels.request_scoring import attention_shared, prepare_users
    from seqkernels.backends.triton.kernels.tail import tail_rows, tail_summary

    call = _readable(call)
    shape: EncoderShape = call.weight_set.shape
    options, out = call.options, call.new_output()
    nhead, d = options.nhead, shape.d_model
    splits = configurations.splits(d, nhead, shape.dim_feedforward)
    packed: PackedEncoder = call.weight_set.derived(
        ("triton", splits, nhead), pack, call.weights, shape, nhead, *splits
    )

    users, length, width = call.x.shape
    batch, tokens = out.shape[0], length + (options.fusion == "append")
    stride = -(-d // 8) * 8  # rows of a workspace start at 16 bytes
    attended = out.new_empty((batch, tokens, stride), dtype=torch.bfloat16)
    between = attended.new_empty((batch, tokens, stride)) if shape.num_layers > 1 else attended
    blocks = configurations.attention(arch, tokens, d, d // nhead)
    is_long = tokens > configurations.LONGEST_BLOCK
    arguments = _common(call, batch, shape, packed, stride) | {"attended": attended}
    if is_long:
        kept = configurations.architecture(arch).barrier_shows_writes
        rows = (batch, nhead, 2, tokens, packed.head.padded)
        arguments |= {
            "projected": attended.new_empty(rows) if kept else attended,
            "KEPT": kept,
        }
    shares = _shares_users(call, d) and not is_long
    if shares:
        rows_of_user = (users, nhead, blocks.rows)
        width_of_head = packed.head.padded
        arguments |= {
            "shared": attended.new_empty((*rows_of_user, blocks.rows)),
            "keys": attended.new_empty((*rows_of_user, width_of_head)),
            "values": attended.new_empty((*rows_of_user, width_of_head), dtype=torch.float32),
        }

    for n, layer in enumerate(packed.layers):
        is_first, is_last = n == 0, n == shape.num_layers - 1
        arguments |= _source(call.x if is_first else between, width if is_first else d)
        arguments |= {
            "weight": layer.heads,
            "bias": layer.head_biases,
            "norm": layer.norm,
            "matrices": layer.matrices,
            "vectors": layer.vectors,
            "FIRST": is_first,
            "LAST": is_last,
            "FINAL_NORM": shape.has_final_norm and is_last,
        }
        if is_long:
            _launch(attention_long, batch * nhead, arguments, blocks)
        elif is_first and shares:
            _launch(prepare_users, users * nhead, arguments, blocks)
            _launch(attention_shared, batch * nhead, arguments, blocks)
        else:
            _launch(attention_short, batch * nhead, arguments, blocks)

        is_summary = is_last and options.latest_k is not None
        tail = configurations.tail(arch, d, packed.hidden, is_summary)
        target = out if is_last else between
        arguments |= {"out": target, "out_stride_b": target.stride(0)}
        if is_summary:
            _launch(tail_summary, batch, arguments, tail)
        else:
            arguments["out_stride_t"] = target.stride(1)
            _launch(tail_rows, -(-batch * tokens // tail.rows), arguments, tail)
    return out


def _readable(call: EncoderCall) -> EncoderCall:
    """The call with its tensors as the kernels read them."""
    x, candidate = call.x, call.candidate
    return call._replace(
        x=x if x.stride(2) == 1 else x.contiguous(),
        candidate=candidate
        if candidate is None or candidate.stride(1) == 1
        else candidate.contiguous(),
        lengths=_whole(call.lengths),
        user_index=_whole(call.user_index),
    )


def _whole(numbers: Tensor | None) -> Tensor | None:
    return None if numbers is None else numbers.to(torch.int64).contiguous()


def _shares_users(call: EncoderCall, d_model: int) -> bool:
    """Whether what the first layer computes of the events alone serves several candidates."""
    return (
        call.user_index is not None
        and call.options.fusion == "concat"
        and not call.options.norm_first
        and d_model <= configurations.WIDEST_SHARED
    )


def _launch(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    blocks: configurations.Attention | configurations.Tail,
) -> None:
    """Launch with what the kernel takes of the arguments, and its blocks."""
    own = {name.upper(): value for name, value in blocks._asdict().items()}
    given = arguments | own
    kernel[(programs,)](
        **{name: given[name] for name in kernel.arg_names},
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        enable_fp_fusion=True,
    )


def _source(x: Tensor, width: int) -> dict[str, Any]:
    """Where a layer finds its tokens.

    Strides go in units of a divisor that is the same for all lengths, or each length would be
    compiled for itself.
    """
    stride_b, stride_t, _ = x.stride()
    stride_b = stride_b if len(x) > 1 else 0
    unit = math.gcd(16, stride_b, stride_t)
    return {
        "x": x,
        "x_stride_b": stride_b // unit,
        "x_stride_t": stride_t // unit,
        "UNIT": unit,
        "E": width,
    }


def _common(
    call: EncoderCall, batch: int, shape: EncoderShape, packed: PackedEncoder, stride: int
) -> dict[str, Any]:
    """Arguments of all layers. Where a tensor is absent, x stands in."""
    x, candidate, mask, lengths = call.x, call.candidate, call.mask, call.lengths
    flag = call.computes_padding
    options, length = call.options, x.shape[1]
    return {
        "candidate": x if candidate is None else candidate,
        "candidate_stride": 0 if candidate is None else candidate.stride(0),
        "user_index": x if call.user_index is None else call.user_index,
        "mask": x if mask is None else mask,
        "mask_stride_b": 0 if mask is None else mask.stride(0),
        "mask_stride_t": 0 if mask is None else mask.stride(1),
        "lengths": x if lengths is None else lengths,
        "computes_padding": x if flag is None else flag.view(torch.uint8),
        "final_norm": packed.final_norm,
        "B": batch,
        "U": x.shape[0],
        "L": length,
        "T": length + (options.fusion == "append"),
        "scale": packed.scale,
        "eps": options.layer_norm_eps,
        "final_eps": options.final_norm_eps,
        "negative_slope": options.negative_slope,
        "latest_k": options.latest_k,
        "HEADS": options.nhead,
        "D": shape.d_model,
        "HEAD": shape.d_model // options.nhead,
        "FUSION": _FUSION[options.fusion],
        "USERS": call.user_index is not None,
        "VALIDITY": _BY_MASK if mask is not None else _BY_LENGTH if lengths is not None else 0,
        "PADDING": _PADDING[options.padding] if flag is None else _BY_FLAG,
        "LATEST_LAST": options.order == "latest_last",
        "POOL": options.pool == "max",
        "NORM_FIRST": options.norm_first,
        "ACTIVATION": ACTIVATIONS.index(options.activation),
        "ROW_STRIDE": stride,
        "CHUNKS": packed.model.chunks,
        "CHUNK": packed.model.width,
        "HEAD_CHUNKS": packed.head.chunks,
        "HEAD_CHUNK": packed.head.width,
        "HIDDENS": packed.hidden.chunks,
        "HIDDEN": packed.hidden.width,
    }
