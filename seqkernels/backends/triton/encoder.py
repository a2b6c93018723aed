"""Launches of the encoder's kernels: two a layer, on the current stream, without synchronizing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqkernels.backends.call import EncoderCall
from seqkernels.backends.encoder_weights import EncoderShape
from seqkernels.backends.triton import configurations
from seqkernels.backends.triton.packing import PackedEncoder, pack
from seqkernels.reference.resilient_batch_norm import ACTIVATIONS

_FUSION = {"none": 0, "concat": 1, "append": 2}
_PADDING = {"zero": 0, "compute": 1, "exclude": 2}
_BY_MASK, _BY_LENGTH = 1, 2


def not_supported_reasons(d_model: int, nhead: int) -> list[str]:
    """Why the kernels do not take an encoder of this shape, empty if they do."""
    reasons = []
    if d_model > configurations.WIDEST_MODEL:
        reasons.append(f"d_model {d_model}, it takes at most {configurations.WIDEST_MODEL}")
    if d_model // nhead > configurations.WIDEST_HEAD:
        reasons.append(
            f"head_dim {d_model // nhead}, it takes at most {configurations.WIDEST_HEAD}"
        )
    return reasons


def run(call: EncoderCall, arch: str) -> Tensor:
    """Write ``call.out``; NaN where a length or a user index is out of range."""
    # Imported at the first call: a machine without Triton loses nothing before it.
    from seqkernels.backends.triton.kernels.attention import attention_long, attention_short
    from seqkernels.backends.triton.kernels.tail import tail_rows, tail_summary

    shape: EncoderShape = call.weight_set.shape
    options, out = call.options, call.out
    nhead, d = options.nhead, shape.d_model
    splits = configurations.splits(d, nhead, shape.dim_feedforward)
    packed: PackedEncoder = call.weight_set.derived(
        ("triton", splits, nhead), pack, call.weights, shape, nhead, *splits
    )

    batch, length = out.shape[0], call.x.shape[1]
    tokens = length + (call.fusion == "append")
    stride = -(-d // 8) * 8  # rows of a workspace start at 16 bytes
    attended = out.new_empty((batch, tokens, stride), dtype=torch.bfloat16)
    between = attended.new_empty((batch, tokens, stride)) if shape.num_layers > 1 else attended
    blocks = configurations.attention(arch, tokens, d, d // nhead)
    is_long = tokens > configurations.LONGEST_BLOCK
    kept = configurations.architecture(arch).barrier_shows_writes
    projected = attended
    if is_long and kept:
        projected = attended.new_empty((batch, nhead, 2, tokens, packed.head.padded))

    common = _common(call, shape, packed, stride)
    for n, layer in enumerate(packed.layers):
        is_first, is_last = n == 0, n == shape.num_layers - 1
        x = call.x if is_first else between
        source = {
            "x": x,
            "x_stride_b": x.stride(0),
            "x_stride_t": x.stride(1),
            "FIRST": is_first,
            "E": call.x.shape[2] if is_first else d,
        }
        attention: dict[str, Any] = {
            **common,
            **source,
            "weight": layer.heads,
            "bias": layer.head_biases,
            "norm": layer.norm,
            "attended": attended,
            "scale": packed.scale,
            "HEADS": nhead,
            "HEAD": d // nhead,
            "HEAD_CHUNKS": packed.head.chunks,
            "HEAD_CHUNK": packed.head.width,
            "ROWS": blocks.rows,
            "num_warps": blocks.num_warps,
            "num_stages": blocks.num_stages,
        }
        if is_long:
            attention_long[(batch * nhead,)](
                **attention, projected=projected, KEYS=blocks.keys, KEPT=kept
            )
        else:
            attention_short[(batch * nhead,)](**attention, HALF=blocks.half)

        is_summary = is_last and call.latest_k is not None
        tail = configurations.tail(arch, d, packed.hidden, is_summary)
        finish: dict[str, Any] = {
            **common,
            **source,
            "attended": attended,
            "matrices": layer.matrices,
            "vectors": layer.vectors,
            "final_norm": packed.final_norm,
            "final_eps": options.final_norm_eps,
            "negative_slope": options.negative_slope,
            "FINAL_NORM": shape.has_final_norm and is_last,
            "ACTIVATION": ACTIVATIONS.index(options.activation),
            "HIDDENS": packed.hidden.chunks,
            "HIDDEN": packed.hidden.width,
            "ROWS": tail.rows,
            "num_warps": tail.num_warps,
            "num_stages": tail.num_stages,
        }
        if is_summary:
            tail_summary[(batch,)](
                **finish,
                out=out,
                out_stride_b=out.stride(0),
                latest_k=call.latest_k,
                POOL=call.pool == "max",
            )
        else:
            target = out if is_last else between
            tail_rows[(-(-batch * tokens // tail.rows),)](
                **finish,
                out=target,
                out_stride_b=target.stride(0),
                out_stride_t=target.stride(1),
                B=batch,
                LAST=is_last,
            )
    return out


def _common(
    call: EncoderCall, shape: EncoderShape, packed: PackedEncoder, stride: int
) -> dict[str, Any]:
    """Arguments that every launch of a call shares. Where a tensor is absent, x stands in."""
    x, candidate, mask, lengths = call.x, call.candidate, call.mask, call.lengths
    length = x.shape[1]
    return {
        "candidate": x if candidate is None else candidate,
        "candidate_stride": 0 if candidate is None else candidate.stride(0),
        "user_index": x if call.user_index is None else call.user_index,
        "mask": x if mask is None else mask,
        "mask_stride_b": 0 if mask is None else mask.stride(0),
        "mask_stride_t": 0 if mask is None else mask.stride(1),
        "lengths": x if lengths is None else lengths.contiguous(),
        "U": x.shape[0],
        "L": length,
        "T": length + (call.fusion == "append"),
        "eps": call.options.layer_norm_eps,
        "D": shape.d_model,
        "FUSION": _FUSION[call.fusion],
        "USERS": call.user_index is not None,
        "VALIDITY": _BY_MASK if mask is not None else _BY_LENGTH if lengths is not None else 0,
        "PADDING": _PADDING[call.padding],
        "LATEST_LAST": call.order == "latest_last",
        "NORM_FIRST": call.options.norm_first,
        "ROW_STRIDE": stride,
        "CHUNKS": packed.model.chunks,
        "CHUNK": packed.model.width,
        "enable_fp_fusion": True,
    }
