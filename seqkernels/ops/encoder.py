"""``torch.ops.seqkernels.encoder``: a whole Transformer encoder, its input fusion and its summary.

The op checks its arguments once, chooses a backend and lets it write the output. With gradients
to record it is the differentiable reference definition instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends import reference as reference_backend
from seqkernels.backends.call import EncoderCall, EncoderOptions
from seqkernels.backends.encoder_weights import LAYOUT, EncoderShape, read_shape
from seqkernels.backends.weights import lookup
from seqkernels.ops.library import LIBRARY, NAMESPACE, is_exporting, nobody_listens

_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": ("relu", "gelu", "gelu_tanh", "leaky_relu"),
    "fusion": ("none", "concat", "append"),
    "padding": ("zero", "compute", "exclude"),
    "order": ("latest_first", "latest_last"),
    "pool": ("none", "max"),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LENGTH_DTYPES = (torch.int64, torch.int32)
_NEEDS_GRADIENT = (
    "gradients are to be recorded (grad mode is on and x or a weight requires grad); "
    "call it under torch.inference_mode() or torch.no_grad()"
)

LIBRARY.define(
    "encoder(Tensor x, Tensor? candidate, Tensor?[] weights, Tensor? key_padding_mask, "
    "Tensor? lengths, int nhead, str activation, float negative_slope, bool norm_first, "
    "float layer_norm_eps, float final_norm_eps, str fusion, str padding, str order, "
    "int? latest_k, str pool, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_choice(argument: str, value: str) -> None:
    """Raise ValueError unless `value` is a legal value of this string argument."""
    if value not in _CHOICES[argument]:
        raise ValueError(
            f"encoder: {argument}: expected one of {', '.join(_CHOICES[argument])}, got {value!r}"
        )


def check_heads(d_model: int, nhead: int) -> None:
    """Raise ValueError unless `nhead` divides `d_model`."""
    if nhead < 1 or d_model % nhead:
        raise ValueError(f"encoder: nhead: expected a divisor of d_model = {d_model}, got {nhead}")


def check_summary(fusion: str, padding: str, order: str, latest_k: int | None, pool: str) -> None:
    """Raise ValueError for a combination of options that has no meaning."""
    check_choice("fusion", fusion)
    check_choice("padding", padding)
    check_choice("order", order)
    check_choice("pool", pool)
    if latest_k is None:
        if pool != "none":
            raise ValueError(f"encoder: pool: expected 'none' without latest_k, got {pool!r}")
    elif latest_k < (pool == "none"):
        low = int(pool == "none")
        raise ValueError(
            f"encoder: latest_k: expected at least {low} with pool={pool!r}, got {latest_k}"
        )
    if padding == "exclude" and pool != "max":
        raise ValueError(f"encoder: padding: 'exclude' needs pool='max', got pool={pool!r}")


def check_options(
    d_model: int,
    nhead: int,
    activation: str,
    negative_slope: float,
    norm_first: bool,
    layer_norm_eps: float,
    final_norm_eps: float,
    fusion: str,
    padding: str,
    order: str,
    latest_k: int | None,
    pool: str,
) -> EncoderOptions:
    """Check everything that is no tensor."""
    check_heads(d_model, nhead)
    check_choice("activation", activation)
    check_summary(fusion, padding, order, latest_k, pool)
    return EncoderOptions(
        nhead, activation, negative_slope, norm_first, layer_norm_eps, final_norm_eps
    )


# A model brings the same ones on every call.
checked_options = lru_cache(maxsize=256)(check_options)


class Names(NamedTuple):
    """How an op calls its arguments in messages."""

    op: str = "encoder"
    x: str = "x"
    candidate: str = "candidate"
    rows: str = "B"  # of x


def check_inputs(
    x: Tensor,
    candidate: Tensor | None,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    fusion: str,
    d_model: int,
    device: torch.device,
) -> None:
    """Raise unless the tensors fit each other, `d_model` and `fusion`; no value is looked at."""
    names = Names()
    check_events(x, device, names)
    if candidate is None:
        if fusion != "none":
            raise ValueError(
                f"encoder: candidate: expected a tensor for fusion={fusion!r}, got None"
            )
        if x.shape[2] != d_model:
            raise ValueError(
                f"encoder: x: expected last dimension {d_model} (d_model), got {_shape(x)}"
            )
    else:
        if fusion == "none":
            raise ValueError(
                f"encoder: candidate: expected None for fusion='none', got {_shape(candidate)}"
            )
        if candidate.dim() != 2 or candidate.shape[0] != x.shape[0]:
            raise ValueError(
                f"encoder: candidate: expected shape [B, C] with B = {x.shape[0]}, "
                f"got {_shape(candidate)}"
            )
        check_candidate(x, candidate, fusion, d_model, names)
    check_validity(x, key_padding_mask, lengths, names)


def check_events(x: Tensor, device: torch.device, names: Names) -> None:
    """Raise unless x is [B, L, E], floating and where the weights are."""
    at = f"{names.op}: {names.x}"
    if x.dim() != 3:
        raise ValueError(f"{at}: expected 3 dimensions [{names.rows}, L, E], got {_shape(x)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{at}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{at}: expected device {device} of weights, got {x.device}")


def check_candidate(x: Tensor, candidate: Tensor, fusion: str, d_model: int, names: Names) -> None:
    """Raise unless a candidate [*, C] goes with x and d_model."""
    at = f"{names.op}: {names.candidate}"
    if candidate.dtype != x.dtype:
        raise TypeError(f"{at}: expected dtype {x.dtype} like {names.x}, got {candidate.dtype}")
    if candidate.device != x.device:
        raise ValueError(f"{at}: expected device {x.device} like {names.x}, got {candidate.device}")
    both = f"{names.op}: {names.x}, {names.candidate}"
    width, c = x.shape[2], candidate.shape[1]
    if fusion == "append":
        if width != d_model or c != d_model:
            raise ValueError(
                f"{both}: expected last dimension {d_model} (d_model) of both for "
                f"fusion='append', got {width} and {c}"
            )
    elif width + c != d_model:
        raise ValueError(
            f"{both}: expected last dimensions that add up to {d_model} (d_model) for "
            f"fusion='concat', got {width} and {c}"
        )


def check_validity(x: Tensor, mask: Tensor | None, lengths: Tensor | None, names: Names) -> None:
    """Everything about them but their values."""
    op, rows = names.op, names.rows
    if mask is not None:
        if lengths is not None:
            raise ValueError(f"{op}: lengths: expected None beside key_padding_mask, got a tensor")
        if mask.dim() != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] != x.shape[1]:
            raise ValueError(
                f"{op}: key_padding_mask: expected shape [{rows}, L] = "
                f"({x.shape[0]}, {x.shape[1]}), got {_shape(mask)}"
            )
        if mask.dtype is not torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"{op}: key_padding_mask: expected bool (True = ignore) or a floating dtype "
                f"(0 = keep, -inf = ignore), got {mask.dtype}"
            )
        if mask.device != x.device:
            raise ValueError(
                f"{op}: key_padding_mask: expected device {x.device} like {names.x}, "
                f"got {mask.device}"
            )
    elif lengths is not None:
        if lengths.dim() != 1 or lengths.shape[0] != x.shape[0]:
            raise ValueError(
                f"{op}: lengths: expected shape [{rows}] = ({x.shape[0]},), got {_shape(lengths)}"
            )
        if lengths.dtype not in _LENGTH_DTYPES:
            raise TypeError(f"{op}: lengths: expected int32 or int64, got {lengths.dtype}")
        if lengths.device != x.device:
            raise ValueError(
                f"{op}: lengths: expected device {x.device} like {names.x}, got {lengths.device}"
            )


def _check_length(x: Tensor, fusion: str) -> None:
    if x.shape[1] == 0 and x.shape[0] and fusion != "append":
        raise ValueError(f"encoder: x: expected at least one event, got {_shape(x)}")


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def choose_encoder(
    op: str, backend: str, dtype: torch.dtype, shape: EncoderShape, nhead: int
) -> tuple[backends.Choice, str]:
    """The backend for a call of `op`, and its key in ``backends.calls``."""
    kind = shape.device.type
    size = None
    if kind != "cpu":  # whose kernels take every size
        size = backends.EncoderSize(shape.d_model, nhead, shape.dim_feedforward, shape.num_layers)
    return backends.choose(op, backend, kind, dtype, size)


def is_plain(tensor: Tensor) -> bool:
    """Whether its values may be looked at.

    Not while a graph is traced, nor on a GPU: that would wait for it, and cannot be captured in a
    CUDA graph. The kernels there read nothing outside the tensors, whatever a length or an index
    says; what they return for such a sequence means nothing.
    """
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def bool_mask(mask: Tensor, op: str = "encoder") -> Tensor:
    """A floating mask as its bool twin, once its values are found legal."""
    ignored = mask == float("-inf")
    if is_plain(mask) and not bool(((mask == 0) | ignored).all()):
        other = mask[(mask != 0) & ~ignored].flatten()[0].item()
        raise ValueError(
            f"{op}: key_padding_mask: expected a floating mask of only 0 (keep) and -inf "
            f"(ignore), a bias is not supported; got {other}"
        )
    return ignored


def check_lengths(lengths: Tensor, limit: int, op: str = "encoder") -> None:
    """Raise ValueError for a length outside 0 .. limit."""
    if is_plain(lengths) and lengths.numel():
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 0 or high > limit:
            wrong = low if low < 0 else high
            raise ValueError(f"{op}: lengths: expected values in 0 .. {limit} (L), got {wrong}")


def ignored_positions(
    x: Tensor, key_padding_mask: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """Either way to say it as a bool mask [B, L], True = ignore, once the values are checked."""
    if lengths is not None:
        check_lengths(lengths, x.shape[1])
        return torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)
    if key_padding_mask is not None and key_padding_mask.dtype is not torch.bool:
        return bool_mask(key_padding_mask)
    return key_padding_mask


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


def _run(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    nhead: int,
    activation: str,
    negative_slope: float,
    norm_first: bool,
    layer_norm_eps: float,
    final_norm_eps: float,
    fusion: str,
    padding: str,
    order: str,
    latest_k: int | None,
    pool: str,
    backend: str,
) -> Tensor:
    weight_set = lookup(LAYOUT, weights)
    d_model, _, _, _, device = weight_set.shape
    options = checked_options(
        d_model,
        nhead,
        activation,
        negative_slope,
        norm_first,
        layer_norm_eps,
        final_norm_eps,
        fusion,
        padding,
        order,
        latest_k,
        pool,
    )
    check_inputs(x, candidate, key_padding_mask, lengths, fusion, d_model, device)
    choice, label = choose_encoder("encoder", backend, x.dtype, weight_set.shape, nhead)

    out = _new_output(x, d_model, fusion, latest_k, pool)
    batch, length, _ = x.shape
    mask = key_padding_mask
    if mask is not None and mask.dtype is not torch.bool:
        mask = bool_mask(mask)
    if batch == 0:
        return out
    _check_length(x, fusion)
    if lengths is not None and choice.backend.name == "reference":
        check_lengths(lengths, length)
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    if x.stride(2) != 1:
        x = x.contiguous()
    if candidate is not None and candidate.stride(1) != 1:
        candidate = candidate.contiguous()
    call = EncoderCall(
        x,
        candidate,
        weights,
        weight_set,
        mask,
        lengths,
        options,
        fusion,
        padding,
        order,
        latest_k,
        pool,
        out,
    )
    result = choice.backend.encoder(call, choice.variant)
    backends.calls[label] += 1
    return result


def _fake(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    nhead: int,
    activation: str,
    negative_slope: float,
    norm_first: bool,
    layer_norm_eps: float,
    final_norm_eps: float,
    fusion: str,
    padding: str,
    order: str,
    latest_k: int | None,
    pool: str,
    backend: str,
) -> Tensor:
    """The checks of `_run` that need no values, and an empty output like its."""
    shape = read_shape(weights)
    check_options(
        shape.d_model,
        nhead,
        activation,
        negative_slope,
        norm_first,
        layer_norm_eps,
        final_norm_eps,
        fusion,
        padding,
        order,
        latest_k,
        pool,
    )
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
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (candidate is not None and candidate.requires_grad)
        or any(w is not None and w.requires_grad for w in weights)
    ):
        return _differentiable(x, candidate, weights, key_padding_mask, lengths, *options)
    with torch._C._AutoDispatchBelowAutograd():
        return encoder(x, candidate, weights, key_padding_mask, lengths, *options)


def _differentiable(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    nhead: int,
    activation: str,
    negative_slope: float,
    norm_first: bool,
    layer_norm_eps: float,
    final_norm_eps: float,
    fusion: str,
    padding: str,
    order: str,
    latest_k: int | None,
    pool: str,
    backend: str,
) -> Tensor:
    """The reference definition, checked like `_run` and laid out in memory like its output."""
    out = _fake(
        x.detach(),
        None if candidate is None else candidate.detach(),
        weights,
        key_padding_mask,
        lengths,
        nhead,
        activation,
        negative_slope,
        norm_first,
        layer_norm_eps,
        final_norm_eps,
        fusion,
        padding,
        order,
        latest_k,
        pool,
        backend,
    )
    _check_length(x, fusion)
    backends.forget(weights)  # a step of an optimizer may follow, and fused ones are not counted
    if not is_exporting():  # an exported program keeps the op, whatever runs while it is made
        backends.report_fallback("encoder", backend, [_NEEDS_GRADIENT])
    result = reference_backend.encoder(
        x,
        candidate,
        weights,
        # Always a bool mask: a traced graph cannot look at the values of the others.
        ignored_positions(x, key_padding_mask, lengths),
        None,
        EncoderOptions(
            nhead, activation, negative_slope, norm_first, layer_norm_eps, final_norm_eps
        ),
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

#: The op itself, with its arguments in the order of its schema.
encoder: Callable[..., Tensor] = torch.ops.seqkernels.encoder.default


def apply_encoder(x: Tensor, *arguments: Any) -> Tensor:
    """The op, called without torch's dispatcher where nobody would notice."""
    return _run(x, *arguments) if nobody_listens(x) else encoder(x, *arguments)
