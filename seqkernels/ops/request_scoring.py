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
from seqkernels.backends.call import EncoderCall, new_encoder_output
from seqkernels.backends.encoder_weights import LAYOUT, EncoderShape, read_shape
from seqkernels.backends.weights import Owner, WeightSet, lookup, owned_by, recheck_weights
from seqkernels.ops.encoder import HAS_BIAS, Checked, choose, execute, problem_of
from seqkernels.ops.encoder_checks import (
    Names,
    check_candidate,
    check_events,
    check_is_dense,
    check_is_tensor,
    check_lengths,
    check_validity,
    checked_options,
    ignored_by_lengths,
    is_plain,
)
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
from seqkernels.options import EncoderOptions

_OP = "request_scoring"
_NAMES = Names(_OP, "events", "candidates", "U")
_INDEX_DTYPES = (torch.int64, torch.int32)


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
    check_is_tensor(candidates, f"{_OP}: candidates")
    check_is_tensor(user_index, f"{_OP}: user_index")
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


def check_user_index(user_index: Tensor, users: int) -> None:
    """Raise ValueError for an index outside 0 .. users - 1."""
    if is_plain(user_index) and user_index.numel():
        low, high = (int(v) for v in torch.aminmax(user_index))
        if low < 0 or high >= users:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{_OP}: user_index: expected values in 0 .. {users - 1} (U - 1), got {wrong}"
            )


def _check(
    weight_set: WeightSet,
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    options: EncoderOptions,
    backend: str,
) -> Checked:
    shape: EncoderShape = weight_set.shape
    checked_options(options, shape.d_model)
    _check_inputs(events, candidates, user_index, key_padding_mask, lengths, options.fusion, shape)
    check_user_index(user_index, events.shape[0])
    if lengths is not None:
        check_lengths(lengths, events.shape[1], _OP)
    problem = problem_of(_OP, events.dtype, weight_set, options)
    return choose(problem, backend, weight_set, key_padding_mask)


def _execute(
    checked: Checked,
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    options: EncoderOptions,
) -> Tensor:
    call = EncoderCall(
        events,
        candidates,
        weights,
        checked.weight_set,
        checked.mask,
        lengths,
        options,
        user_index,
    )
    return execute(checked, call)


def _run(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *arguments: Any,
) -> Tensor:
    options, backend = EncoderOptions(*arguments[:-1]), arguments[-1]
    weight_set = lookup(LAYOUT, weights)
    checked = _check(
        weight_set, events, candidates, user_index, key_padding_mask, lengths, options, backend
    )
    if checked.only_reference == (HAS_BIAS,):
        backends.report_fallback(_OP, backend, checked.only_reference)
    return _execute(checked, events, candidates, user_index, weights, lengths, options)


def _fake(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """The checks of `_run` that need no values, and an empty output like its."""
    shape = read_shape(weights)
    options = EncoderOptions(*arguments[:-1]).check(shape.d_model)
    _check_inputs(events, candidates, user_index, key_padding_mask, lengths, options.fusion, shape)
    backends.check_name(arguments[-1], f"{_OP}: backend")
    return new_encoder_output(events, shape.d_model, options, candidates.shape[0])


def _autograd(
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    *arguments: Any,
) -> Tensor:
    if records_gradients(events, candidates, *weights):
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
    *arguments: Any,
) -> Tensor:
    """The reference definition, checked like `_run`."""
    tensors = (user_index, weights, key_padding_mask, lengths)
    _fake(events.detach(), candidates.detach(), *tensors, *arguments)
    check_user_index(user_index, events.shape[0])
    recheck_weights()  # a step of an optimizer may follow, and fused ones are not counted
    options, backend = EncoderOptions(*arguments[:-1]), arguments[-1]
    if not is_exporting():  # an exported program keeps the op, whatever runs while it is made
        backends.report_fallback(_OP, backend, [NEEDS_GRADIENT])
    mask = key_padding_mask if lengths is None else ignored_by_lengths(events, lengths)
    result = reference_backend.encoder(events, candidates, weights, mask, None, options, user_index)
    if is_plain(events):
        backends.calls["reference"] += 1
    return result.contiguous()


define(_OP)
LIBRARY.impl(_OP, _run, "CompositeExplicitAutograd")
LIBRARY.impl(_OP, _autograd, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::{_OP}", _fake, lib=LIBRARY)
register_vmap(_OP)

#: The op itself, with its arguments in the order of its schema.
request_scoring: Callable[..., Tensor] = torch.ops.seqkernels.request_scoring.default


def apply_request_scoring(
    owner: Owner,
    events: Tensor,
    candidates: Tensor,
    user_index: Tensor,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    options: EncoderOptions,
    backend: str,
) -> Tensor | Sequence[str]:
    """The op as the module calls it that owns the weights; see `apply_encoder`."""
    arguments = (events, candidates, user_index)
    if not is_eager(events):
        check_is_dense(events, _NAMES)
        return request_scoring(*arguments, weights, key_padding_mask, lengths, *options, backend)
    weight_set = owner._packed.lookup(LAYOUT, weights)
    checked = _check(weight_set, *arguments, key_padding_mask, lengths, options, backend)
    if checked.only_reference:
        return checked.only_reference
    if nobody_listens(events):
        return _execute(checked, *arguments, weights, lengths, options)
    if records_gradients(events, candidates, *weights):
        recheck_weights()
        return (NEEDS_GRADIENT,)
    with owned_by(owner._packed):
        return request_scoring(*arguments, weights, key_padding_mask, lengths, *options, backend)
