"""``torch.ops.seqkernels.request_scoring``: users apart from candidates, see the op ``encoder``.

::

    out[n] = encoder(events[user_index[n]], candidates[n])

No tensor [N, L, D] is built. With fusion "concat" and norm last, what the first layer computes of
the events alone is computed once for each user. With gradients to record it is the differentiable
reference definition instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends import reference as reference_backend
from seqkernels.backends.call import EncoderCall
from seqkernels.backends.encoder_weights import LAYOUT, EncoderShape, read_shape
from seqkernels.backends.weights import lookup
from seqkernels.ops.encoder import (
    Names,
    bool_mask,
    check_candidate,
    check_events,
    check_lengths,
    check_options,
    check_validity,
    checked_options,
    choose_encoder,
    ignored_positions,
    is_plain,
)
from seqkernels.ops.library import LIBRARY, NAMESPACE, is_exporting, nobody_listens

_OP = "request_scoring"
_NAMES = Names(_OP, "events", "candidates", "U")
_INDEX_DTYPES = (torch.int64, torch.int32)
_NEEDS_GRADIENT = (
    "gradients are to be recorded (grad mode is on and an input or a weight requires grad); "
    "call it under torch.inference_mode() or torch.no_grad()"
)

LIBRARY.define(
    "request_scoring(Tensor events, Tensor candidates, Tensor user_index, Tensor?[] weights, "
    "Tensor? key_padding_mask, Tensor? lengths, int nhead, str activation, float negative_slope, "
    "bool norm_first, float layer_norm_eps, float final_norm_eps, str fusion, str padding, "
    "str order, int? latest_k, str pool, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_inputs(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    fusion: str,
    shape: EncoderShape,
) -> None:
    """Raise unless the tensors fit each other; no value is looked at."""
    check_events(events, shape.device, _NAMES)
    if fusion == "none":
        raise ValueError(f"{_OP}: fusion: expected 'concat' or 'append', got 'none'")
    if candidates.dim() != 2:
        raise ValueError(
            f"{_OP}: candidates: expected shape [N, C], got shape {tuple(candidates.shape)}"
        )
    check_candidate(events, candidates, fusion, shape.d_model, _NAMES)
    if user_index.dim() != 1 or user_index.shape[0] != candidates.shape[0]:
        raise ValueError(
            f"{_OP}: user_index: expected shape [N] = ({candidates.shape[0]},), "
            f"got shape {tuple(user_index.shape)}"
        )
    if user_index.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{_OP}: user_index: expected int32 or int64, got {user_index.dtype}")
    if user_index.device != events.device:
        raise ValueError(
            f"{_OP}: user_index: expected device {events.device} like events, "
            f"got {user_index.device}"
        )
    check_validity(events, mask, lengths, _NAMES)
    if events.shape[1] == 0 and candidates.shape[0] and fusion != "append":
        raise ValueError(
            f"{_OP}: events: expected at least one event, got shape {tuple(events.shape)}"
        )


def check_user_index(user_index: Tensor, users: int) -> None:
    """Raise ValueError for an index outside 0 .. users - 1."""
    if is_plain(user_index) and user_index.numel():
        low, high = (int(v) for v in torch.aminmax(user_index))
        if low < 0 or high >= users:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{_OP}: user_index: expected values in 0 .. {users - 1} (U - 1), got {wrong}"
            )


def _new_output(
    events: Tensor, candidates: Tensor, d_model: int, fusion: str, latest_k: int | None, pool: str
) -> Tensor:
    """The output, not filled."""
    count, length = candidates.shape[0], events.shape[1]
    if latest_k is not None:
        return events.new_empty((count, (latest_k + (pool == "max")) * d_model))
    return events.new_empty((count, length + 1 if fusion == "append" else length, d_model))


def _run(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *options: Any,
) -> Tensor:
    weight_set = lookup(LAYOUT, weights)
    shape: EncoderShape = weight_set.shape
    nhead, *_, fusion, padding, order, latest_k, pool, backend = options
    of_model = checked_options(shape.d_model, *options[:-1])
    _check_inputs(events, candidates, user_index, key_padding_mask, lengths, fusion, shape)
    choice, label = choose_encoder(_OP, backend, events.dtype, shape, nhead)
    mask = key_padding_mask
    if mask is not None and mask.dtype is not torch.bool:
        mask = bool_mask(mask, _OP)
    check_user_index(user_index, events.shape[0])
    if lengths is not None:
        check_lengths(lengths, events.shape[1], _OP)
        lengths = lengths.to(torch.int64).contiguous()
    out = _new_output(events, candidates, shape.d_model, fusion, latest_k, pool)
    if candidates.shape[0] == 0:
        return out
    call = EncoderCall(
        events if events.stride(2) == 1 else events.contiguous(),
        candidates if candidates.stride(1) == 1 else candidates.contiguous(),
        weights,
        weight_set,
        mask,
        lengths,
        of_model,
        fusion,
        padding,
        order,
        latest_k,
        pool,
        out,
        user_index.to(torch.int64).contiguous(),
    )
    result = choice.backend.encoder(call, choice.variant)
    backends.calls[label] += 1
    return result


def _fake(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *options: Any,
) -> Tensor:
    """The checks of `_run` that need no values, and an empty output like its."""
    shape = read_shape(weights)
    *of_encoder, backend = options
    check_options(shape.d_model, *of_encoder)
    *_, fusion, _, _, latest_k, pool = of_encoder
    _check_inputs(events, candidates, user_index, key_padding_mask, lengths, fusion, shape)
    backends.check_name(backend, f"{_OP}: backend")
    return _new_output(events, candidates, shape.d_model, fusion, latest_k, pool)


def _autograd(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    *arguments: Any,
) -> Tensor:
    if torch.is_grad_enabled() and (
        events.requires_grad
        or candidates.requires_grad
        or any(w is not None and w.requires_grad for w in weights)
    ):
        return _differentiable(events, candidates, user_index, weights, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return request_scoring(events, candidates, user_index, weights, *arguments)


def _differentiable(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *options: Any,
) -> Tensor:
    """The reference definition, checked like `_run`."""
    _fake(
        events.detach(),
        candidates.detach(),
        user_index,
        weights,
        key_padding_mask,
        lengths,
        *options,
    )
    check_user_index(user_index, events.shape[0])
    backends.forget(weights)  # a step of an optimizer may follow, and fused ones are not counted
    *of_encoder, fusion, padding, order, latest_k, pool, backend = options
    if not is_exporting():  # an exported program keeps the op, whatever runs while it is made
        backends.report_fallback(_OP, backend, [_NEEDS_GRADIENT])
    result = reference_backend.encoder(
        events,
        candidates,
        weights,
        # Always a bool mask: a traced graph cannot look at the values of the others.
        ignored_positions(events, key_padding_mask, lengths),
        None,
        backends.EncoderOptions(*of_encoder),
        fusion,
        padding,
        order,
        latest_k,
        pool,
        user_index,
    )
    if is_plain(events):
        backends.calls["reference"] += 1
    return result.contiguous()


LIBRARY.impl(_OP, _run, "CompositeExplicitAutograd")
LIBRARY.impl(_OP, _autograd, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::{_OP}", _fake, lib=LIBRARY)

#: The op itself, with its arguments in the order of its schema.
request_scoring: Callable[..., Tensor] = torch.ops.seqkernels.request_scoring.default


def apply_request_scoring(events: Tensor, *arguments: Any) -> Tensor:
    """The op, called without torch's dispatcher where nobody would notice."""
    if nobody_listens(events):
        return _run(events, *arguments)
    return request_scoring(events, *arguments)
