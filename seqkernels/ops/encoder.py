"""``torch.ops.seqkernels.encoder``: a whole Transformer encoder, its input fusion and its summary.

The op checks its arguments once, chooses a backend and lets it write the output. With gradients
to record it is the differentiable reference definition instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends import reference as reference_backend
from seqkernels.backends.call import EncoderCall, EncoderOptions
from seqkernels.backends.encoder_weights import LAYOUT, EncoderShape, read_shape
from seqkernels.backends.weights import Owner, WeightSet, lookup, owned_by, recheck_weights
from seqkernels.ops.encoder_checks import (
    Names,
    check_inputs,
    check_is_dense,
    check_lengths,
    check_options,
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
    is_eager,
    is_exporting,
    nobody_listens,
    records_gradients,
    register_vmap,
)
from seqkernels.reference.encoder import IGNORED_BELOW

HAS_BIAS = (
    f"key_padding_mask holds values other than 0 and those below {IGNORED_BELOW}, which are added "
    "to the scores"
)

LIBRARY.define(
    "encoder(Tensor x, Tensor? candidate, Tensor?[] weights, Tensor? key_padding_mask, "
    "Tensor? lengths, int nhead, str activation, float negative_slope, bool norm_first, "
    "float layer_norm_eps, float final_norm_eps, str fusion, str padding, str order, "
    "int? latest_k, str pool, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Checked(NamedTuple):
    """A call whose arguments are legal, and what will run it."""

    weight_set: WeightSet
    options: EncoderOptions
    mask: Tensor | None  # [B, L] bool, True = ignore; with a bias the floating mask
    choice: backends.Choice
    label: str
    only_reference: tuple[str, ...]  # why the reference runs it although nobody asked for it


def choose(
    op: str, name: str, dtype: torch.dtype, weight_set: WeightSet, nhead: int
) -> tuple[backends.Choice, str, tuple[str, ...]]:
    """The last three fields of `Checked`, as long as no mask has a say."""
    shape: EncoderShape = weight_set.shape
    kind = shape.device.type
    size = None
    if kind != "cpu":  # whose kernels take every size
        size = backends.EncoderSize(shape.d_model, nhead, shape.dim_feedforward, shape.num_layers)
    choice, label = backends.choose(op, name, kind, dtype, size)
    return choice, label, backends.declined(choice)


def of_mask(checked: Checked, op: str) -> Checked:
    """The same call with its mask as bool, or on the reference if the mask adds to the scores."""
    if checked.mask is None or checked.mask.dtype is torch.bool:
        return checked
    ignored, bias = split_mask(checked.mask)
    if bias is None:
        return checked._replace(mask=ignored)
    if checked.choice.backend.name == "reference":
        return checked
    reference = backends.resolve(op, "reference", bias.device.type, bias.dtype)
    return checked._replace(choice=reference, label=reference.label, only_reference=(HAS_BIAS,))


def _new_output(x: Tensor, d_model: int, fusion: str, latest_k: int | None, pool: str) -> Tensor:
    """The output, not filled; a full sequence lies in memory in the order of x's dimensions."""
    batch, length, _ = x.shape
    if latest_k is not None:
        return x.new_empty((batch, (latest_k + (pool == "max")) * d_model))
    if fusion == "append":
        length = length + 1
    stride_b, stride_l, _ = x.stride()
    if 0 < stride_b < stride_l:
        return x.new_empty((length, batch, d_model)).transpose(0, 1)
    return x.new_empty((batch, length, d_model))


def _check(
    weight_set: WeightSet,
    x: Tensor,
    candidate: Tensor | None,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *options: Any,
) -> Checked:
    *of_encoder, backend = options
    nhead, *_, fusion, _, _, _, _ = of_encoder
    d_model, _, _, _, device = weight_set.shape
    chosen = checked_options(d_model, *of_encoder)
    check_inputs(x, candidate, key_padding_mask, lengths, fusion, d_model, device)
    choice = choose("encoder", backend, x.dtype, weight_set, nhead)
    return of_mask(Checked(weight_set, chosen, key_padding_mask, *choice), "encoder")


def _execute(
    checked: Checked,
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    *options: Any,
) -> Tensor:
    weight_set, of_encoder, mask, choice, label, _ = checked
    *_, fusion, padding, order, latest_k, pool, _ = options
    out = _new_output(x, weight_set.shape.d_model, fusion, latest_k, pool)
    if not out.numel() or not (x.shape[1] or fusion == "append"):
        return out.zero_()  # no sequences, or sequences without events
    if lengths is not None and choice.backend.name == "reference":
        check_lengths(lengths, x.shape[1])
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    computes_padding = None
    if padding == "stock":
        padding, computes_padding = _decide_padding(mask, choice.backend.name)
    call = EncoderCall(
        x if x.stride(2) == 1 else x.contiguous(),
        candidate if candidate is None or candidate.stride(1) == 1 else candidate.contiguous(),
        weights,
        weight_set,
        mask,
        lengths,
        of_encoder,
        fusion,
        padding,
        order,
        latest_k,
        pool,
        out,
        computes_padding=computes_padding,
    )
    result = choice.backend.encoder(call, choice.variant)
    backends.calls[label] += 1
    return result


def _decide_padding(mask: Tensor | None, backend: str) -> tuple[str, Tensor | None]:
    """What padding "stock" is for this batch: the option, and what overrules it on the device.

    torch returns zeros for padding where no sequence of the batch has any before a valid event.
    """
    if mask is None:
        return "zero", None  # lengths: padded at the end only
    if backend == "reference":
        return "stock", None
    if not is_plain(mask):  # the kernel reads the answer on the device; the host does not wait
        return "compute", pads_at_end_only(mask).logical_not().reshape(1)
    ignored = mask.numpy()  # half the time of torch's calls
    return ("compute" if (ignored[:, :-1] > ignored[:, 1:]).any() else "zero"), None


def _run(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *options: Any,
) -> Tensor:
    weight_set = lookup(LAYOUT, weights)
    checked = _check(weight_set, x, candidate, key_padding_mask, lengths, *options)
    if checked.only_reference == (HAS_BIAS,):
        backends.report_fallback("encoder", options[-1], checked.only_reference)
    return _execute(checked, x, candidate, weights, lengths, *options)


def _fake(
    x: Tensor,
    candidate: Tensor | None,
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
    check_inputs(x, candidate, key_padding_mask, lengths, fusion, shape.d_model, shape.device)
    backends.check_name(backend, "encoder: backend")
    return _new_output(x, shape.d_model, fusion, latest_k, pool)


def _autograd(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *options: Any,
) -> Tensor:
    if records_gradients(x, candidate, *weights):
        return _differentiable(x, candidate, weights, key_padding_mask, lengths, *options)
    with torch._C._AutoDispatchBelowAutograd():
        return encoder(x, candidate, weights, key_padding_mask, lengths, *options)


def _differentiable(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    *options: Any,
) -> Tensor:
    """The reference definition, checked like `_run` and laid out in memory like its output."""
    out = _fake(
        x.detach(),
        None if candidate is None else candidate.detach(),
        weights,
        key_padding_mask,
        lengths,
        *options,
    )
    *of_encoder, fusion, padding, order, latest_k, pool, backend = options
    recheck_weights()  # a step of an optimizer may follow, and fused ones are not counted
    if not is_exporting():  # an exported program keeps the op, whatever runs while it is made
        backends.report_fallback("encoder", backend, [NEEDS_GRADIENT])
    mask = key_padding_mask
    if lengths is not None:
        mask = ignored_by_lengths(x, lengths)
    result = reference_backend.encoder(
        x,
        candidate,
        weights,
        mask,
        None,
        EncoderOptions(*of_encoder),
        fusion,
        padding,
        order,
        latest_k,
        pool,
    )
    if is_plain(x):
        backends.calls["reference"] += 1
    if latest_k is None and out.stride(0) < out.stride(1):
        return result.transpose(0, 1).contiguous().transpose(0, 1)
    return result.contiguous()


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
    *options: Any,
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
        return encoder(x, candidate, weights, key_padding_mask, lengths, *options)
    weight_set = owner._packed.lookup(LAYOUT, weights)
    checked = _check(weight_set, x, candidate, key_padding_mask, lengths, *options)
    if checked.only_reference:
        return checked.only_reference
    if nobody_listens(x):
        return _execute(checked, x, candidate, weights, lengths, *options)
    if records_gradients(x, candidate, *weights):
        recheck_weights()
        return (NEEDS_GRADIENT,)
    with owned_by(owner._packed):
        return encoder(x, candidate, weights, key_padding_mask, lengths, *options)
