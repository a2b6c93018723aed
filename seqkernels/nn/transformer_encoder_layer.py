"""Drop-in ``TransformerEncoderLayer`` that runs as one fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkernels.nn import read
from seqkernels.nn.encoder_module import (
    EncoderModule,
    check_causal,
    check_options,
    fill_padding,
    ignored_or_bias,
    keep_encoder,
    run_op,
    same_kind,
    where_finite,
)
from seqkernels.nn.owner import as_fx_leaf, shallow_clone
from seqkernels.nn.ready import ready_for
from seqkernels.ops.library import is_eager
from seqkernels.options import check_heads

_PADDED_OUTPUT = ("compute", "zero")


class TransformerEncoderLayer(EncoderModule, nn.TransformerEncoderLayer):
    """One Transformer encoder layer; ``torch.nn.TransformerEncoderLayer`` run as one kernel.

    ::

        x = norm1(x + attention(x));  x = norm2(x + linear2(act(linear1(x))))     or norm first

    Parameters
    ----------
    d_model, nhead, dim_feedforward, dropout, layer_norm_eps, batch_first, norm_first, bias, \
device, dtype
        As in ``torch.nn.TransformerEncoderLayer``.
    activation : str or callable
        ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"leaky_relu"``, or a callable. The kernel knows
        torch's functions and modules of these four; any other callable runs the definition.
    padded_output : str
        What positions that ``src_key_padding_mask`` ignores return: ``"compute"`` (default, what
        torch's layer gives): a query like any other, never a key; or ``"zero"``.
    backend : str
        ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Notes
    -----
    In evaluation the op ``torch.ops.seqkernels.encoder`` runs. What it cannot take runs torch's own
    ``forward``: training, gradients to record, ``src_mask`` or ``is_causal``, hooks on submodules,
    replaced methods, options and dtypes that no kernel knows. One log line gives the reason, except
    in training with gradients. ``padded_output`` holds in every mode.

    A floating ``src_key_padding_mask`` ignores where it is -9000 or less. Other values than 0 are
    added to the scores, as in torch, which no kernel does.

    Raises
    ------
    ValueError, TypeError
        For options or inputs of the wrong shape, value or kind.

    Examples
    --------
    >>> import torch, seqkernels
    >>> layer = seqkernels.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    >>> ignored = torch.arange(10) >= torch.tensor([[10], [4]])
    >>> with torch.inference_mode():
    ...     layer(torch.randn(2, 10, 32), src_key_padding_mask=ignored).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        padded_output: str = "compute",
        backend: str = "auto",
    ) -> None:
        check_heads(d_model, nhead)
        check_options("TransformerEncoderLayer", padded_output, _PADDED_OUTPUT, backend)
        if isinstance(activation, str):
            activation = read.activation_from_name(activation)
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        self.padded_output = padded_output
        self.backend = backend

    @classmethod
    def from_torch(
        cls,
        module: nn.TransformerEncoderLayer,
        *,
        padded_output: str | None = None,
        backend: str = "auto",
    ) -> Self:
        """Make one that shares the parameters of torch's.

        Parameters
        ----------
        module : torch.nn.TransformerEncoderLayer
            Of exactly this class; it is left as it is.
        padded_output : str, optional
            ``"zero"`` or ``"compute"``; default: as torch's module in eval mode, ``"compute"``.
        backend : str
            As in the constructor.
        """
        if type(module) not in LAYER_TYPES:
            raise TypeError(
                "TransformerEncoderLayer.from_torch: module: expected a "
                f"torch.nn.TransformerEncoderLayer, got {type(module).__name__}"
            )
        return cls._adopt(shallow_clone(module), padded_output, backend)

    @classmethod
    def _adopt(cls, module: nn.Module, padded_output: str | None, backend: str) -> Self:
        """Turn this instance of torch's class into one of this class."""
        padded_output = padded_output or "compute"
        check_options("TransformerEncoderLayer", padded_output, _PADDED_OUTPUT, backend)
        module.__class__ = cls
        assert isinstance(module, cls)
        module.padded_output = padded_output
        module.backend = backend
        return module

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run the layer; arguments and result as in ``torch.nn.TransformerEncoderLayer``."""
        if src_mask is None and not is_causal:
            ready = ready_for(self, src)
            done = None if ready is None else ready.encode(src, src_key_padding_mask)
            if done is not None:
                return done
        node = as_fx_leaf(self, src, src_mask, src_key_padding_mask, is_causal)
        if node is not None:
            return node  # type: ignore[no-any-return]
        why: list[str] = []
        reasons: Sequence[str] = why
        found = self._read(src, src_mask, is_causal, why)
        if found is not None:
            out = run_op(self, src, src_key_padding_mask, *found)
            if isinstance(out, Tensor):
                keep_encoder(self, src, found[0], lambda: self._read(src, None, False, []))
                return out
            reasons = out
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        check_causal(src_mask, is_causal)
        self._report(reasons)
        return self._fall_back(src, src_mask, src_key_padding_mask, is_causal)

    def _read(
        self, src: Tensor, src_mask: Tensor | None, is_causal: bool, reasons: list[str]
    ) -> tuple[read.Encoder, str] | None:
        """The op's arguments and padding for a call; without them, `reasons` gets the reasons."""
        reasons += self._call_reasons(src, src_mask, is_causal)
        if reasons:
            return None
        now = read.read_single_layer(self, reasons)
        return None if now is None or reasons else (now, self.padded_output)

    def fallback_reasons(
        self, src: Tensor | None = None, src_mask: Tensor | None = None
    ) -> list[str]:
        """Every reason why a call with these arguments runs torch's forward; empty if none."""
        reasons = self._call_reasons(src, src_mask, False)
        read.read_single_layer(self, reasons, any_mode=self.training)
        return reasons

    def _fall_back(
        self, src: Tensor, src_mask: Tensor | None, padding_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Torch's forward, unless it is not finite or cannot be traced."""
        batch_first = self.self_attn.batch_first
        mask = ignored_or_bias(src, padding_mask, batch_first)
        zero = self.padded_output == "zero"
        x = fill_padding(src, mask, batch_first) if zero else src
        if is_eager(src) and (mask is None or src.device.type == "cpu"):  # to look at values
            out = super().forward(x, src_mask, same_kind(mask, src_mask, src.dtype), is_causal)
            if mask is not None or src_mask is not None:
                out = where_finite(out, lambda: self._definition(x, src_mask, mask), batch_first)
        else:
            out = self._definition(x, src_mask, mask)
        return fill_padding(out, mask, batch_first) if zero else out

    def _definition(self, x: Tensor, src_mask: Tensor | None, mask: Tensor | None) -> Tensor:
        """Torch's layer by its blocks: it can be traced, and is finite if every key is ignored.

        Torch's fused path, which its ``forward`` prefers, is neither, and what it finds in padded
        slots, such as NaN, reaches valid ones.
        """
        if self.norm_first:
            x = x + self._attend(self.norm1(x), src_mask, mask)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._attend(x, src_mask, mask))
        return self.norm2(x + self._ff_block(x))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor, src_mask: Tensor | None, mask: Tensor | None) -> Tensor:
        if read.replaced_methods(self, "", "_sa_block") or read.process_reasons():
            return self._sa_block(x, src_mask, same_kind(mask, src_mask, x.dtype))
        # Another tensor than the query keeps torch's attention off its fused path too; zeros keep
        # NaN of padded slots from the sums.
        keys = fill_padding(x, mask, self.self_attn.batch_first)
        keys = keys.view_as(keys) if keys is x else keys
        attended = self.self_attn(
            x,
            keys,
            keys,
            attn_mask=src_mask,
            key_padding_mask=same_kind(mask, src_mask, x.dtype),
            need_weights=False,
        )[0]
        return self.dropout1(attended)  # type: ignore[no-any-return]


#: A layer of an encoder is replaced or fused only if it is of exactly one of these.
LAYER_TYPES: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer, TransformerEncoderLayer)

read.watch(TransformerEncoderLayer, "forward", "_sa_block", "_ff_block")
