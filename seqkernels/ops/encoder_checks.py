"""What the ops ``encoder`` and ``request_scoring`` check of their arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from seqkernels.ops.library import is_transformed
from seqkernels.options import EncoderOptions
from seqkernels.reference.encoder import IGNORED_BELOW

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LENGTH_DTYPES = (torch.int64, torch.int32)


@lru_cache(maxsize=256)  # a model brings the same ones on every call
def checked_options(options: EncoderOptions, d_model: int) -> EncoderOptions:
    """The options, once they are checked."""
    return options.check(d_model)


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
        check_is_tensor(candidate, "encoder: candidate")
        if candidate.dim() != 2 or candidate.shape[0] != x.shape[0]:
            raise ValueError(
                f"encoder: candidate: expected shape [B, C] with B = {x.shape[0]}, "
                f"got {_shape(candidate)}"
            )
        check_candidate(x, candidate, fusion, d_model, names)
    check_validity(x, key_padding_mask, lengths, names)


def check_is_tensor(value: object, at: str) -> None:
    """Raise TypeError, in the name of the caller, unless it is a tensor."""
    if not isinstance(value, Tensor):
        told = "; torch.from_numpy makes one" if type(value).__name__ == "ndarray" else ""
        raise TypeError(f"{at}: expected a tensor, got {type(value).__name__}{told}")


def check_is_dense(x: object, names: Names) -> None:
    """Raise TypeError unless x is a tensor and not a nested one."""
    at = f"{names.op}: {names.x}"
    check_is_tensor(x, at)
    if x.is_nested:  # type: ignore[attr-defined]
        raise TypeError(
            f"{at}: expected a padded tensor [{names.rows}, L, E], got a nested one; "
            "torch.nested.to_padded_tensor makes one, and `lengths` says what is padding"
        )


def check_events(x: Tensor, device: torch.device, names: Names) -> None:
    """Raise unless x is [B, L, E], floating and where the weights are."""
    at = f"{names.op}: {names.x}"
    check_is_dense(x, names)
    if x.dim() != 3:
        raise ValueError(f"{at}: expected 3 dimensions [{names.rows}, L, E], got {_shape(x)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{at}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{at}: expected device {device} of weights, got {x.device}")


def check_candidate(x: Tensor, candidate: Tensor, fusion: str, d_model: int, names: Names) -> None:
    """Raise unless a candidate [*, C] goes with x and d_model."""
    at = f"{names.op}: {names.candidate}"
    check_is_tensor(candidate, at)
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
        check_is_tensor(mask, f"{op}: key_padding_mask")
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
        check_is_tensor(lengths, f"{op}: lengths")
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


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def is_plain(tensor: Tensor) -> bool:
    """Whether its values may be looked at.

    Not while a graph is traced, nor under a transform of ``torch.func``, nor on a GPU: that would
    wait for it, and cannot be captured in a CUDA graph. The kernels there read nothing outside the
    tensors, whatever a length or an index says; what they return for such a sequence means nothing.
    """
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_transformed(tensor)
    )


def _may_wait_for(tensor: Tensor) -> bool:
    """Whether its values may be looked at, if that has to be, on a GPU too."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type in ("cpu", "cuda")
        and not torch.compiler.is_compiling()
        and not is_transformed(tensor)
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class Ignored(NamedTuple):
    """A padding mask, taken apart."""

    mask: Tensor | None  # [B, L] bool, True = ignore
    bias: Tensor | None  # [B, L] the floating mask itself, if it holds anything else


def split_mask(mask: Tensor | None) -> Ignored:
    """Tell what a padding mask ignores from what it adds to the scores.

    A floating mask is looked at for values other than 0 and those that mean "ignore". That waits
    for a GPU; a bool mask and lengths do not. While a CUDA graph is captured or another graph is
    traced nothing can be looked at, and the mask is taken to hold no other values.
    """
    if mask is None or mask.dtype is torch.bool:
        return Ignored(mask, None)
    ignored = mask <= IGNORED_BELOW
    if _may_wait_for(mask) and bool(((mask != 0) & ~ignored).any()):
        return Ignored(ignored, mask)
    return Ignored(ignored, None)


def pads_at_end_only(ignored: Tensor) -> Tensor:
    """Whether no ignored position of [B, L] stands before a valid one, as a tensor []."""
    return ~((ignored.cumsum(1) > 0) & ~ignored).any()


def check_lengths(lengths: Tensor, limit: int, op: str = "encoder") -> None:
    """Raise ValueError for a length outside 0 .. limit."""
    if is_plain(lengths) and lengths.numel():
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 0 or high > limit:
            wrong = low if low < 0 else high
            raise ValueError(f"{op}: lengths: expected values in 0 .. {limit} (L), got {wrong}")


def ignored_by_lengths(x: Tensor, lengths: Tensor) -> Tensor:
    """Lengths as a bool mask [B, L], True = ignore, once their values are checked."""
    check_lengths(lengths, x.shape[1])
    return torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)
