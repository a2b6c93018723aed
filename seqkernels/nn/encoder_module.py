"""What `TransformerEncoderLayer` and `TransformerEncoder` share: the call of the op, and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqkernels import backends, ops
from seqkernels.backends.encoder_weights import PER_LAYER
from seqkernels.nn import read
from seqkernels.nn.owner import Owner
from seqkernels.nn.ready import Made, keep
from seqkernels.ops.encoder_checks import split_mask


def check_options(name: str, padded_output: str, known: tuple[str, ...], backend: str) -> None:
    """Raise ValueError, in the name of the caller, for an option that is none of its kind."""
    if padded_output not in known:
        raise ValueError(
            f"{name}: padded_output: expected one of {', '.join(known)}, got {padded_output!r}"
        )
    backends.check_name(backend, f"{name}: backend")


def run_op(
    module: EncoderModule,
    src: Tensor,
    mask: Tensor | None,
    r: read.Encoder,
    padding: str,
) -> Tensor | Sequence[str]:
    """Call the op on torch's layouts of src: [L, E], [L, B, E] or [B, L, E]."""
    unbatched = src.dim() == 2
    if unbatched:
        x = src.unsqueeze(0)
        if mask is not None:
            mask = mask.unsqueeze(0)
    else:
        x = src if r.batch_first or src.dim() != 3 else src.transpose(0, 1)
    options = r.options._replace(padding=padding)
    out = ops.apply_encoder(module, x, None, r.weights, mask, None, options, module.backend)
    if not isinstance(out, Tensor):
        return out
    if torch.is_autocast_enabled(src.device.type):
        out = out.to(_autocast_dtype(module, src, r))
    if unbatched:
        return out.squeeze(0)
    return (out if r.batch_first else out.transpose(0, 1)).contiguous()  # as torch's is


def keep_encoder(
    module: EncoderModule,
    src: Tensor,
    r: read.Encoder,
    read_again: Callable[[], tuple[read.Encoder, str] | None],
) -> None:
    """After a call: let the next one on a batch go straight to the op."""

    def make() -> Made:
        again = read_again()
        if again is None or again[0].batch_first != r.batch_first or again[0].norm_outside:
            return None
        now, padding = again
        options = now.options._replace(padding=padding)
        kernel = ops.native_encoder(module, now.weights, src.dtype, options, module.backend)
        return now.weights, kernel

    if src.dim() == 3:
        keep(module, src, module.modules(), r.weights, make, batch_first=r.batch_first)


def _autocast_dtype(module: nn.Module, src: Tensor, r: read.Encoder) -> torch.dtype:
    """The dtype of torch's result under autocast.

    On the CPU torch's fused layer returns the dtype of autocast. Everything else ends in a residual
    sum or in a norm, which autocast leaves in its input's dtype on the CPU and computes in float32
    on a GPU.
    """
    kind = src.device.type
    first: Any = module.layers[0] if isinstance(module, nn.TransformerEncoder) else module
    if kind != "cpu":
        ends_in_norm = not r.options.norm_first or len(r.weights) % PER_LAYER or r.norm_outside
        return torch.float32 if ends_in_norm else src.dtype
    fused = (
        torch.backends.mha.get_fastpath_enabled()
        and not torch.is_autocast_enabled("cuda")
        and src.dim() == 3
        and r.batch_first
        and r.options.nhead % 2 == 0
        and bool(first.activation_relu_or_gelu)
        and r.weights[1] is not None
    )
    return torch.get_autocast_dtype(kind) if fused else src.dtype


def ignored_or_bias(src: Tensor, mask: Tensor | None, batch_first: bool) -> Tensor | None:
    """The padding mask, checked as the op checks it: bool, or floating if it is a bias too."""
    if mask is None:
        return None
    expected = src.shape[:-1] if batch_first or src.dim() == 2 else (src.shape[1], src.shape[0])
    if mask.shape != expected:
        raise ValueError(
            f"encoder: key_padding_mask: expected shape {tuple(expected)}, "
            f"got shape {tuple(mask.shape)}"
        )
    if not mask.numel():
        return None  # torch's attention cannot take a mask over no keys
    if mask.dtype is torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(
            "encoder: key_padding_mask: expected bool (True = ignore) or a floating dtype "
            f"(0 = keep, -inf = ignore), got {mask.dtype}"
        )
    ignored, bias = split_mask(mask)
    return ignored if bias is None else bias


def fill_padding(src: Tensor, mask: Tensor | None, batch_first: bool) -> Tensor:
    """Select 0 at ignored positions."""
    ignored = split_mask(mask).mask
    if ignored is None:
        return src
    if src.dim() == 3 and not batch_first:
        ignored = ignored.transpose(0, 1)
    return src.masked_fill(ignored.unsqueeze(-1), 0.0)


def same_kind(mask: Tensor | None, beside: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as a floating one if the mask beside it is: torch warns of two kinds."""
    if mask is None or beside is None or mask.dtype is not torch.bool or beside.dtype is torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def is_finite(out: Tensor) -> bool:
    """Whether no value is NaN or infinite; a sum shows it in a fraction of the time.

    Not looked at away from the CPU, where it would wait for the device.
    """
    if out.device.type != "cpu":
        return True
    out = out.detach()
    return bool(out.sum().isfinite()) or bool(out.isfinite().all())


def where_finite(out: Tensor, other: Callable[[], Tensor], batch_first: bool) -> Tensor:
    """Every sequence of `out` that is finite, and the others as `other` computes them."""
    if is_finite(out):
        return out
    if out.dim() < 3:
        return other()
    batch = 0 if batch_first else 1
    finite = out.detach().isfinite().all(-1, keepdim=True).all(1 - batch, keepdim=True)
    return torch.where(finite, out, other())


def check_causal(mask: Tensor | None, is_causal: bool | None) -> None:
    """Raise ValueError for the hint without the mask that it is about."""
    if is_causal and mask is None:
        raise ValueError(
            "encoder: is_causal: expected the causal mask beside is_causal=True, which is a hint "
            "about it as in torch.nn, got no mask"
        )


class EncoderModule(Owner):
    """What the modules here have in common."""

    padded_output: str
    backend: str

    def extra_repr(self) -> str:
        """Show the options torch's class does not have."""
        return f"padded_output={self.padded_output!r}, backend={self.backend!r}"

    def _report(self, reasons: Sequence[str]) -> None:
        # Training with gradients is what the definition is for, not a fallback.
        if not (self.training and torch.is_grad_enabled()):
            backends.report_fallback("encoder", self.backend, list(reasons))

    def _call_reasons(self, src: Tensor | None, mask: Tensor | None, causal: bool) -> list[str]:
        """Why the op cannot take a call, whatever the module is made of."""
        reasons = read.mode_reasons(self)
        if mask is not None or causal:
            reasons.append("an attention mask was given")
        if src is not None and src.is_nested:
            reasons.append("src is a nested tensor")
        return reasons
