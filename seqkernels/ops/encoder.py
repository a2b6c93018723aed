"""``torch.ops.seqkernels.encoder``: a whole Transformer encoder, its input fusion and its summary.

The op checks its arguments once, chooses a backend and lets it run the call. With gradients
to record it is the differentiable reference definition instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends import reference as reference_backend
from seqkernels.backends.call import EncoderCall, new_encoder_output
from seqkernels.backends.encoder_weights import LAYOUT, EncoderShape, read_shape
from seqkernels.backends.problem import FEATURES, EncoderSize, Problem
from seqkernels.backends.weights import Owner, WeightSet, lookup, owned_by, recheck_weights
from seqkernels.ops.encoder_checks import (
    Names,
    check_inputs,
    check_is_dense,
    check_lengths,
    checked_options,
    ignored_by_lengths,
    is_plain,
    pads_at_end_only,
    split_mask,
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

HAS_BIAS = FEATURES["bias"]


class Checked(NamedTuple):
    """A call whose arguments are legal, and what will run it."""

    weight_set: WeightSet
    mask: Tensor | None  # [B, L] bool, True = ignore; with a bias the floating mask
    choice: backends.Choice
    label: str
    only_reference: tuple[str, ...]  # why the reference runs it although nobody asked for it


def problem_of(
    op: str, dtype: torch.dtype, weight_set: WeightSet, options: EncoderOptions
) -> Problem:
    """What backends are asked about the call."""
    shape: EncoderShape = weight_set.shape
    size = EncoderSize(shape.d_model, options.nhead, shape.dim_feedforward, shape.num_layers)
    return Problem(op, shape.device.type, dtype, size)


def choose(problem: Problem, name: str, weight_set: WeightSet, mask: Tensor | None) -> Checked:
    """The call's backend; the reference runs it if its mask adds to the scores."""
    choice, label = backends.choose(problem, name)
    if mask is not None and mask.dtype is not torch.bool:
        mask, bias = split_mask(mask)
        if bias is not None:
            mask = bias
            if choice.backend.name != "reference":
                choice = backends.resolve(problem._replace(features=("bias",)), "reference")
                return Checked(weight_set, mask, choice, choice.label, (HAS_BIAS,))
    return Checked(weight_set, mask, choice, label, backends.declined(choice))


def _check(
    weight_set: WeightSet,
    x: Tensor,
    candidate: Tensor | None,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    options: EncoderOptions,
    backend: str,
) -> Checked:
    shape: EncoderShape = weight_set.shape
    checked_options(options, shape.d_model)
    check_inputs(
        x, candidate, key_padding_mask, lengths, options.fusion, shape.d_model, shape.device
    )
    problem = problem_of("encoder", x.dtype, weight_set, options)
    return choose(problem, backend, weight_set, key_padding_mask)


def execute(checked: Checked, call: EncoderCall) -> Tensor:
    """Let the backend run a call, if there is something to compute."""
    if call.is_empty():
        return call.new_output().zero_()
    result = checked.choice.backend.encoder(call, checked.choice.variant)
    backends.calls[checked.label] += 1
    return result


def _execute(
    checked: Checked,
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    options: EncoderOptions,
) -> Tensor:
    weight_set, mask, choice, *_ = checked
    if lengths is not None and choice.backend.name == "reference":
        check_lengths(lengths, x.shape[1])
    call = EncoderCall(x, candidate, weights, weight_set, mask, lengths, options)
    if options.padding == "stock" and mask is not None and choice.backend.name in _ASK_DEVICE:
        # torch returns zeros for padding where no sequence of the batch has any before a valid
        # event. The kernel reads the answer on the device; the host does not wait.
        computes_padding = pads_at_end_only(mask).logical_not().reshape(1)
        call = call._replace(computes_padding=computes_padding)
    return execute(checked, call)


_ASK_DEVICE = ("cuda", "triton")


def _run(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *arguments: Any,
) -> Tensor:
    options, backend = EncoderOptions(*arguments[:-1]), arguments[-1]
    weight_set = lookup(LAYOUT, weights)
    checked = _check(weight_set, x, candidate, key_padding_mask, lengths, options, backend)
    if checked.only_reference == (HAS_BIAS,):
        backends.report_fallback("encoder", backend, checked.only_reference)
    return _execute(checked, x, candidate, weights, lengths, options)


def _fake(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """The checks of `_run` that need no values, and an empty output like its."""
    shape = read_shape(weights)
    options = EncoderOptions(*arguments[:-1]).check(shape.d_model)
    check_inputs(
        x, candidate, key_padding_mask, lengths, options.fusion, shape.d_model, shape.device
    )
    backends.check_name(arguments[-1], "encoder: backend")
    return new_encoder_output(x, shape.d_model, options)


def _autograd(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    *arguments: Any,
) -> Tensor:
    if records_gradients(x, candidate, *weights):
        return _differentiable(x, candidate, weights, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return encoder(x, candidate, weights, *arguments)


def _differentiable(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """The reference definition, checked like `_run` and laid out in memory like its output."""
    detached = None if candidate is None else candidate.detach()
    out = _fake(x.detach(), detached, weights, key_padding_mask, lengths, *arguments)
    options, backend = EncoderOptions(*arguments[:-1]), arguments[-1]
    recheck_weights()  # a step of an optimizer may follow, and fused ones are not counted
    if not is_exporting():  # an exported program keeps the op, whatever runs while it is made
        backends.report_fallback("encoder", backend, [NEEDS_GRADIENT])
    mask = key_padding_mask
    if lengths is not None:
        mask = ignored_by_lengths(x, lengths)
    result = reference_backend.encoder(x, candidate, weights, mask, None, options)
    if is_plain(x):
        backends.calls["reference"] += 1
    if options.latest_k is None and out.stride(0) < out.stride(1):
        return result.transpose(0, 1).contiguous().transpose(0, 1)
    return result.contiguous()


define("encoder")
LIBRARY.impl("encoder", _run, "CompositeExplicitAutograd")
LIBRARY.impl("encoder", _autograd, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::encoder", _fake, lib=LIBRARY)
register_vmap("encoder")

#: The op itself, with its arguments in the order of its schema.
encoder: Callable[..., Tensor] = torch.ops.seqkernels.encoder.default


def apply_encoder(
    owner: Owner,
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    options: EncoderOptions,
    backend: str,
) -> Tensor | Sequence[str]:
    """The op as the module calls it that owns the weights.

    Returns
    -------
    Tensor or sequence of str
        The result, or every reason why the op would run the reference although nobody asked for
        it: the module has something faster.
    """
    if not is_eager(x):
        check_is_dense(x, Names())
        return encoder(x, candidate, weights, key_padding_mask, lengths, *options, backend)
    weight_set = owner._packed.lookup(LAYOUT, weights)
    checked = _check(weight_set, x, candidate, key_padding_mask, lengths, options, backend)
    if checked.only_reference:
        return checked.only_reference
    if nobody_listens(x):
        return _execute(checked, x, candidate, weights, lengths, options)
    if records_gradients(x, candidate, *weights):
        recheck_weights()
        return (NEEDS_GRADIENT,)
    with owned_by(owner._packed):
        return encoder(x, candidate, weights, key_padding_mask, lengths, *options, backend)


def native_encoder(
    owner: Owner,
    weights: Sequence[Tensor | None],
    dtype: torch.dtype,
    options: EncoderOptions,
    backend: str,
    op: str = "encoder",
) -> backends.Native | None:
    """The native kernel of a module's calls with its packed weights, if one runs on the CPU."""
    weight_set = owner._packed.lookup(LAYOUT, weights)
    choice, label = backends.choose(problem_of(op, dtype, weight_set, options), backend)
    if not isinstance(choice.backend, backends.CpuBackend):
        return None
    packed = choice.backend.packed_encoder(weight_set, weights, options, choice.variant)
    return backends.Native(choice.backend.ops.encoder_packed.default, packed, label)
