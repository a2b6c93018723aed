"""Drop-in ``TransformerEncoderLayer`` and ``TransformerEncoder`` that run as one fused kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkernels import backends, ops
from seqkernels.nn import read
from seqkernels.ops.encoder import bool_mask, check_heads

_log = logging.getLogger("seqkernels")
_PADDED_OUTPUT = ("zero", "compute")
_ALIGNMENT_CHECKS = 8
_M = TypeVar("_M", bound=nn.Module)


def stock_padded_output(module: nn.Module) -> str:
    """What torch's own module returns at padded positions in eval mode under inference_mode.

    ``"zero"`` for a ``torch.nn.TransformerEncoder`` that takes its nested-tensor path, which its
    configuration decides (``use_nested_tensor``, the global
    ``torch.backends.mha.get_fastpath_enabled()``), ``"compute"`` for one that does not and for a
    layer on its own. Torch looks at the data as well: with ``mask_check`` a batch in which any
    sequence is not padded at its end only is computed on the other path. Here a module has one
    answer for all data.
    """
    nested = getattr(module, "use_nested_tensor", False)
    return "zero" if nested and torch.backends.mha.get_fastpath_enabled() else "compute"


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


def _check_options(name: str, padded_output: str, backend: str) -> None:
    if padded_output not in _PADDED_OUTPUT:
        raise ValueError(
            f"{name}: padded_output: expected one of {', '.join(_PADDED_OUTPUT)}, "
            f"got {padded_output!r}"
        )
    backends.check_name(backend, f"{name}: backend")


def shallow_clone(module: _M) -> _M:
    """Copy a module and its submodules; parameters, buffers and everything else are shared."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__ = {
        key: value.copy() if isinstance(value, dict | set) else value
        for key, value in module.__dict__.items()
    }
    for name, child in module._modules.items():
        if child is not None:
            clone._modules[name] = shallow_clone(child)
    return clone


def _run_op(
    module: TransformerEncoderLayer | TransformerEncoder,
    src: Tensor,
    mask: Tensor | None,
    r: read.Encoder,
    padding: str,
) -> Tensor:
    """Call the op on torch's layouts of src: [L, E], [L, B, E] or [B, L, E]."""
    unbatched = src.dim() == 2
    if unbatched:
        x = src.unsqueeze(0)
        if mask is not None:
            mask = mask.unsqueeze(0)
    else:
        x = src if r.batch_first or src.dim() != 3 else src.transpose(0, 1)
    out = ops.apply_encoder(
        x,
        None,
        r.weights,
        mask,
        None,
        r.nhead,
        r.activation,
        r.negative_slope,
        r.norm_first,
        r.eps,
        r.final_eps,
        "none",
        padding,
        "latest_first",
        None,
        "none",
        module.backend,
    )
    if unbatched:
        return out.squeeze(0)
    return out if r.batch_first else out.transpose(0, 1)


def _ignored(src: Tensor, mask: Tensor | None, batch_first: bool) -> Tensor | None:
    """The padding mask as bool [B, L] (or [L]), checked as the op checks it."""
    if mask is None:
        return None
    expected = src.shape[:-1] if batch_first or src.dim() == 2 else (src.shape[1], src.shape[0])
    if mask.shape != expected:
        raise ValueError(
            f"encoder: key_padding_mask: expected shape {tuple(expected)}, "
            f"got shape {tuple(mask.shape)}"
        )
    if mask.dtype is torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(
            "encoder: key_padding_mask: expected bool (True = ignore) or a floating dtype "
            f"(0 = keep, -inf = ignore), got {mask.dtype}"
        )
    return bool_mask(mask)


def _fill_padding(src: Tensor, ignored: Tensor | None, batch_first: bool) -> Tensor:
    """Select 0 at ignored positions."""
    if ignored is None:
        return src
    if src.dim() == 3 and not batch_first:
        ignored = ignored.transpose(0, 1)
    return src.masked_fill(ignored.unsqueeze(-1), 0.0)


def _check_causal(mask: Tensor | None, is_causal: bool | None) -> None:
    if is_causal and mask is None:
        raise ValueError(
            "encoder: is_causal: expected the causal mask beside is_causal=True, which is a hint "
            "about it as in torch.nn, got no mask"
        )


class _Fused(nn.Module):
    """What the modules here have in common."""

    padded_output: str
    backend: str
    # Each class has its own: the module as arguments of the op, None where the op cannot take it.
    _read: Callable[[], read.Encoder | None]

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as in torch.nn.

        When training begins the packed weights are dropped, so that the next evaluation sees
        edits through ``.data`` too, which torch does not count.
        """
        if mode and not self.training:
            now = self._read()
            if now is not None:
                backends.forget(now.weights)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Show the options torch's class does not have."""
        return f"padded_output={self.padded_output!r}, backend={self.backend!r}"

    def _report(self, reasons: list[str]) -> None:
        # Training with gradients is what the definition is for, not a fallback.
        if reasons and not (self.training and torch.is_grad_enabled()):
            backends.report_fallback("encoder", self.backend, reasons)


class TransformerEncoderLayer(_Fused, nn.TransformerEncoderLayer):
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
    In evaluation the op ``torch.ops.seqkernels.encoder`` runs. In training mode, with ``src_mask``
    or ``is_causal``, with hooks on submodules, or with options the kernel does not know, the
    plain PyTorch definition runs instead: equal but slower, told in one log line (training with
    gradients is not told). ``padded_output`` holds in every mode. A floating
    ``src_key_padding_mask`` may hold 0 and -inf only.

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
        _check_options("TransformerEncoderLayer", padded_output, backend)
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
        _check_options("TransformerEncoderLayer", padded_output, backend)
        module.__class__ = cls
        assert isinstance(module, cls)
        module.padded_output = padded_output
        module.backend = backend
        return module

    def _read(self) -> read.Encoder | None:
        weights: read.Weights = []
        layer = read.read_layer(self, weights)
        if layer is None:
            return None
        return read.Encoder(
            weights,
            layer.nhead,
            *layer.activation,
            layer.norm_first,
            layer.eps,
            layer.eps,
            layer.batch_first,
            False,
        )

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run the layer; arguments and result as in ``torch.nn.TransformerEncoderLayer``."""
        if not (self.training or src_mask is not None or is_causal or src.is_nested):
            now = self._read()
            if now is not None and not read.is_tracing():
                return _run_op(self, src, src_key_padding_mask, now, self.padded_output)
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        _check_causal(src_mask, is_causal)
        self._report(self.fallback_reasons(src, src_mask))
        return self._definition(src, src_mask, src_key_padding_mask, self.padded_output)

    def fallback_reasons(
        self, src: Tensor | None = None, src_mask: Tensor | None = None
    ) -> list[str]:
        """Every reason why a call with these arguments runs the definition; empty if none."""
        reasons = read.mode_reasons(self)
        if src_mask is not None:
            reasons.append("an attention mask was given")
        if src is not None and src.is_nested:
            reasons.append("src is a nested tensor")
        return reasons + read.layer_reasons(self)

    def _definition(
        self, src: Tensor, src_mask: Tensor | None, mask: Tensor | None, padding: str
    ) -> Tensor:
        """Torch's layer by its submodules, finite where every key is ignored."""
        batch_first = self.self_attn.batch_first
        ignored = _ignored(src, mask, batch_first)
        if padding == "zero":
            src = _fill_padding(src, ignored, batch_first)
        x = src
        if self.norm_first:
            x = x + self._attend(self.norm1(x), src_mask, ignored)
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + self._attend(x, src_mask, ignored))
            x = self.norm2(x + self._ff_block(x))
        return _fill_padding(x, ignored, batch_first) if padding == "zero" else x

    def _attend(self, x: Tensor, src_mask: Tensor | None, ignored: Tensor | None) -> Tensor:
        keys = x
        if ignored is not None or src_mask is not None or read.is_tracing():
            # A tensor of its own keeps torch off its fast path, which gives NaN where every key
            # is ignored and cannot be traced; zeros keep NaN of padded slots from the sums.
            keys = _fill_padding(x, ignored, self.self_attn.batch_first)
            keys = keys.view_as(keys) if keys is x else keys
        key_padding_mask = ignored
        if ignored is not None and src_mask is not None and src_mask.is_floating_point():
            zeros = torch.zeros(ignored.shape, dtype=src_mask.dtype, device=ignored.device)
            key_padding_mask = zeros.masked_fill(ignored, float("-inf"))
        attended = self.self_attn(
            x,
            keys,
            keys,
            attn_mask=src_mask,
            key_padding_mask=key_padding_mask,
            need_weights=False,
        )[0]
        return self.dropout1(attended)  # type: ignore[no-any-return]


class TransformerEncoder(_Fused, nn.TransformerEncoder):
    """A stack of encoder layers; ``torch.nn.TransformerEncoder`` run as one kernel.

    Parameters
    ----------
    encoder_layer, num_layers, norm, enable_nested_tensor, mask_check
        As in ``torch.nn.TransformerEncoder``. ``encoder_layer`` may be torch's or this package's.
        The last two serve only to choose ``padded_output``; no nested tensor is made.
    padded_output : str, optional
        What positions that ``src_key_padding_mask`` ignores return. ``"zero"``: 0, to which the
        final norm, if any, is applied; ``"compute"``: each is a query like any other, never a key.
        Default: what torch's class with these arguments gives in eval mode under
        ``inference_mode`` (see Notes).
    backend : str
        ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Notes
    -----
    Torch's encoder returns zeros where it takes its nested-tensor path (in eval mode without
    gradients, for layers with ``batch_first``, norm last, biases, ReLU or GELU and an even number
    of heads, if every sequence of the batch is padded at its end only) and computed values
    otherwise. Here ``padded_output`` says which, in every mode and for every mask.

    In evaluation the op ``torch.ops.seqkernels.encoder`` runs; otherwise the definition, as for
    `TransformerEncoderLayer`.

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
            ``"zero"`` or ``"compute"``; default: as torch's module in eval mode under
            ``inference_mode``.
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
        _check_options("TransformerEncoder", padded_output or "zero", backend)
        module.__class__ = cls
        assert isinstance(module, cls)
        module._adopt_options(padded_output, backend)
        return module

    def _adopt_options(self, padded_output: str | None, backend: str) -> None:
        _check_options("TransformerEncoder", padded_output or "zero", backend)
        self.padded_output = padded_output or stock_padded_output(self)
        self.backend = backend
        # Batches whose mask is still to be compared with what torch would do.
        chosen_here = padded_output is None and self.padded_output == "zero" and self.mask_check
        self._alignment_checks = _ALIGNMENT_CHECKS if chosen_here else 0
        for layer in self.layers:
            if type(layer) in LAYER_TYPES:  # inside, the encoder's rule counts
                TransformerEncoderLayer._adopt(layer, "compute", backend)

    def _read(self) -> read.Encoder | None:
        return read.read_encoder(self, LAYER_TYPES)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Run the encoder; arguments and result as in ``torch.nn.TransformerEncoder``."""
        if not (self.training or mask is not None or is_causal or src.is_nested):
            now = self._read()
            if now is not None and not read.is_tracing():
                if src_key_padding_mask is not None and self._alignment_checks:
                    self._compare_alignment(src_key_padding_mask)
                out = _run_op(self, src, src_key_padding_mask, now, self.padded_output)
                return self.norm(out) if now.norm_outside else out  # type: ignore[misc]
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        _check_causal(mask, is_causal)
        self._report(self.fallback_reasons(src, mask))
        return self._layer_by_layer(src, mask, src_key_padding_mask)

    def fallback_reasons(self, src: Tensor | None = None, mask: Tensor | None = None) -> list[str]:
        """Every reason why a call with these arguments runs the definition; empty if none."""
        reasons = read.mode_reasons(self)
        if mask is not None:
            reasons.append("an attention mask was given")
        if src is not None and src.is_nested:
            reasons.append("src is a nested tensor")
        return reasons + read.encoder_reasons(self, LAYER_TYPES)

    def _layer_by_layer(
        self, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor:
        attention = getattr(self.layers[0], "self_attn", None)
        batch_first = getattr(attention, "batch_first", True)
        ignored = _ignored(src, key_padding_mask, batch_first)
        if self.padded_output == "zero":
            src = _fill_padding(src, ignored, batch_first)
        out = src
        for layer in self.layers:
            out = layer(out, src_mask=mask, src_key_padding_mask=ignored, is_causal=False)
        if self.padded_output == "zero":
            out = _fill_padding(out, ignored, batch_first)
        return out if self.norm is None else self.norm(out)

    def _compare_alignment(self, mask: Tensor) -> None:
        """Tell once when torch would have computed the padded positions of such a batch."""
        if torch.compiler.is_compiling() or mask.dim() != 2:
            return
        ignored = mask if mask.dtype is torch.bool else mask != 0
        if not ignored.any():
            return
        self._alignment_checks -= 1
        if (ignored[:, :-1] & ~ignored[:, 1:]).any():
            self._alignment_checks = 0
            _log.warning(
                "encoder: a mask ignores positions before valid ones: torch's TransformerEncoder "
                "computes the padded positions of such a batch, this one returns zeros; pass "
                "padded_output='compute' (or 'zero', to confirm) to choose"
            )


#: A layer of an encoder is replaced or fused only if it is of exactly one of these.
LAYER_TYPES: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer, TransformerEncoderLayer)
