"""Drop-in ``TransformerEncoder`` that runs as one fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

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
from seqkernels.nn.transformer_encoder_layer import LAYER_TYPES, TransformerEncoderLayer
from seqkernels.ops.encoder_checks import pads_at_end_only, split_mask
from seqkernels.ops.library import is_eager, is_exporting

_PADDED_OUTPUT = ("stock", "zero", "compute")


def _takes_nested_path(layer: nn.Module) -> bool:
    """The conditions under which torch's constructor leaves ``use_nested_tensor`` on."""
    if not isinstance(layer, nn.TransformerEncoderLayer):
        return False
    attention = layer.self_attn
    return (
        not layer.norm_first
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.in_proj_bias is not None
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
        and attention.num_heads % 2 == 0
    )


class TransformerEncoder(EncoderModule, nn.TransformerEncoder):
    """A stack of encoder layers; ``torch.nn.TransformerEncoder`` run as one kernel.

    Parameters
    ----------
    encoder_layer, num_layers, norm, enable_nested_tensor, mask_check
        As in ``torch.nn.TransformerEncoder``. ``encoder_layer`` may be torch's or this package's.
        The last two count for ``padded_output="stock"`` alone; no nested tensor is made.
    padded_output : str, optional
        What positions that ``src_key_padding_mask`` ignores return. ``"zero"``: 0, to which the
        final norm, if any, is applied; ``"compute"``: each is a query like any other, never a key;
        ``"stock"`` (default): one of the two, as torch's class decides per batch (see Notes).
    backend : str
        ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Notes
    -----
    Torch's encoder returns zeros where it takes its nested-tensor path: in eval mode without
    gradients, for layers with ``batch_first``, norm last, biases, ReLU or GELU and an even number
    of heads, without ``mask``, if every sequence of the batch is padded at its end only. Otherwise
    it returns computed values. ``padded_output="stock"`` follows it, in graphs of ``torch.compile``
    and ``torch.export`` too, where torch itself always computes. What padded positions return then
    depends on the rest of the batch; if something reads them, such as a pool over all positions, so
    do the scores. ``"zero"`` or ``"compute"`` makes them independent.

    In evaluation the op ``torch.ops.seqkernels.encoder`` runs, otherwise torch's own ``forward``,
    as for `TransformerEncoderLayer`.

    Raises
    ------
    ValueError, TypeError
        For options or inputs of the wrong shape, value or kind.

    Examples
    --------
    >>> import torch, seqkernels
    >>> layer = seqkernels.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    >>> encoder = seqkernels.nn.TransformerEncoder(layer, 2).eval()
    >>> ignored = torch.arange(10) >= torch.tensor([[10], [4]])
    >>> with torch.inference_mode():
    ...     out = encoder(torch.randn(2, 10, 32), src_key_padding_mask=ignored)
    >>> out.shape, bool((out[1, 4:] == 0).all())
    (torch.Size([2, 10, 32]), True)
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        padded_output: str | None = None,
        backend: str = "auto",
    ) -> None:
        # Not asked for: torch's constructor warns where its path does not fit.
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)  # type: ignore[arg-type]
        self.enable_nested_tensor = enable_nested_tensor
        self.use_nested_tensor = enable_nested_tensor and _takes_nested_path(encoder_layer)
        self._adopt_options(padded_output, backend)

    @classmethod
    def from_torch(
        cls,
        module: nn.TransformerEncoder,
        *,
        padded_output: str | None = None,
        backend: str = "auto",
    ) -> Self:
        """Make one that shares the parameters of torch's.

        Parameters
        ----------
        module : torch.nn.TransformerEncoder
            Of exactly this class; it is left as it is.
        padded_output : str, optional
            As in the constructor.
        backend : str
            As in the constructor.
        """
        if type(module) not in (nn.TransformerEncoder, TransformerEncoder):
            raise TypeError(
                "TransformerEncoder.from_torch: module: expected a torch.nn.TransformerEncoder, "
                f"got {type(module).__name__}"
            )
        return cls._adopt(shallow_clone(module), padded_output, backend)

    @classmethod
    def _adopt(cls, module: nn.Module, padded_output: str | None, backend: str) -> Self:
        """Turn this instance of torch's class into one of this class, its layers too."""
        check_options("TransformerEncoder", padded_output or "stock", _PADDED_OUTPUT, backend)
        module.__class__ = cls
        assert isinstance(module, cls)
        module._adopt_options(padded_output, backend)
        return module

    def _adopt_options(self, padded_output: str | None, backend: str) -> None:
        check_options("TransformerEncoder", padded_output or "stock", _PADDED_OUTPUT, backend)
        # Without its nested-tensor path torch has one answer.
        self.padded_output = padded_output or ("stock" if self.use_nested_tensor else "compute")
        self.backend = backend
        for layer in self.layers:
            if type(layer) in LAYER_TYPES:  # inside, the encoder's rule counts
                TransformerEncoderLayer._adopt(layer, "compute", backend)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Run the encoder; arguments and result as in ``torch.nn.TransformerEncoder``."""
        if mask is None and not is_causal:
            ready = ready_for(self, src)
            done = None if ready is None else ready.encode(src, src_key_padding_mask)
            if done is not None:
                return done
        node = as_fx_leaf(self, src, mask, src_key_padding_mask, is_causal)
        if node is not None:
            return node  # type: ignore[no-any-return]
        why: list[str] = []
        reasons: Sequence[str] = why
        found = self._read(src, mask, bool(is_causal), why)
        if found is not None:
            now, padding = found
            out = run_op(self, src, src_key_padding_mask, now, padding)
            if isinstance(out, Tensor):
                if not now.norm_outside:
                    keep_encoder(self, src, now, lambda: self._read(src, None, False, []))
                return self.norm(out) if now.norm_outside else out  # type: ignore[misc]
            reasons = out
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        check_causal(mask, is_causal)
        self._report(reasons)
        return self._fall_back(src, mask, src_key_padding_mask, is_causal)

    def fallback_reasons(self, src: Tensor | None = None, mask: Tensor | None = None) -> list[str]:
        """Every reason why a call with these arguments runs torch's forward; empty if none."""
        reasons = self._call_reasons(src, mask, False)
        read.read_encoder(self, LAYER_TYPES, reasons, any_mode=self.training)
        return reasons

    def _read(
        self, src: Tensor, mask: Tensor | None, is_causal: bool, reasons: list[str]
    ) -> tuple[read.Encoder, str] | None:
        """The op's arguments and padding for a call; without them, `reasons` gets the reasons."""
        reasons += self._call_reasons(src, mask, is_causal)
        if reasons:
            return None
        now = read.read_encoder(self, LAYER_TYPES, reasons)
        return None if now is None or reasons else (now, self._padding(src, mask))

    def padding_of(
        self, src: Tensor, mask: Tensor | None, src_key_padding_mask: Tensor | None
    ) -> str:
        """What padded positions return in a call with these arguments: "zero" or "compute"."""
        padding = self._padding(src, mask)
        if padding != "stock":
            return padding
        ignored = split_mask(src_key_padding_mask).mask
        return "zero" if ignored is None or bool(pads_at_end_only(ignored)) else "compute"

    def _padding(self, src: Tensor, mask: Tensor | None) -> str:
        """The op's option for a call, where torch's conditions that are no values are settled."""
        if self.padded_output != "stock":
            return self.padded_output
        nested = (
            self.use_nested_tensor
            and not self.layers[0].training
            and torch.backends.mha.get_fastpath_enabled()
            and src.dim() == 3
            and mask is None
            and not torch.is_autocast_enabled("cuda")  # whatever the device, in torch
            and (
                is_exporting()
                or read.wants_plain_operations()
                or not torch.is_grad_enabled()
                or not any(t.requires_grad for t in (src, *self.layers[0].parameters()))
            )
        )
        if not nested:
            return "compute"
        return "stock" if self.mask_check else "zero"

    def _fall_back(
        self,
        src: Tensor,
        mask: Tensor | None,
        padding_mask: Tensor | None,
        is_causal: bool | None,
    ) -> Tensor:
        """Torch's forward, unless it is not finite, cannot be traced or pads another way."""
        ignored = ignored_or_bias(src, padding_mask, self._batch_first())

        def by_layers() -> Tensor:
            return self._layer_by_layer(src, mask, ignored, is_causal, self._padding(src, mask))

        if not self._is_stocks(src, ignored):
            return by_layers()
        out = super().forward(src, mask, same_kind(ignored, mask, src.dtype), is_causal)
        if mask is None and ignored is None:
            return out
        return where_finite(out, by_layers, self._batch_first())

    def _is_stocks(self, src: Tensor, ignored: Tensor | None) -> bool:
        """Whether torch's forward gives the padded output asked for, and an answer at all."""
        if not is_eager(src):
            return False
        if ignored is None:
            return True
        on_cpu = src.device.type == "cpu"  # elsewhere no value can be looked at
        somebody = on_cpu and not bool(split_mask(ignored).mask.all())  # type: ignore[union-attr]
        return self.padded_output == "stock" and somebody

    def _batch_first(self) -> bool:
        attention = getattr(self.layers[0], "self_attn", None)
        return bool(getattr(attention, "batch_first", True))

    def _layer_by_layer(
        self,
        src: Tensor,
        mask: Tensor | None,
        ignored: Tensor | None,
        is_causal: bool | None,
        padding: str,
    ) -> Tensor:
        batch_first = self._batch_first()
        cleared = None if padding == "compute" else split_mask(ignored).mask
        if cleared is not None and padding == "stock":
            cleared = cleared & pads_at_end_only(cleared)
        out = fill_padding(src, cleared, batch_first)
        for layer in self.layers:
            out = layer(
                out,
                src_mask=mask,
                src_key_padding_mask=ignored,
                is_causal=bool(is_causal) and mask is not None,
            )
        out = fill_padding(out, cleared, batch_first)
        return out if self.norm is None else self.norm(out)
