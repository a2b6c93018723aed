"""A user's action sequence, joined with the candidate, encoded and summarized in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkernels import backends, ops
from seqkernels.nn import read
from seqkernels.nn.owner import Owner, as_fx_leaf
from seqkernels.nn.ready import Made, keep, ready_for
from seqkernels.nn.transformer_encoder import TransformerEncoder
from seqkernels.nn.transformer_encoder_layer import LAYER_TYPES, TransformerEncoderLayer
from seqkernels.ops.encoder_checks import (
    check_inputs,
    ignored_by_lengths,
    split_mask,
)
from seqkernels.ops.request_scoring import check_user_index
from seqkernels.options import EncoderOptions
from seqkernels.reference.encoder import fuse, summarize


class UserSequenceEncoder(Owner):
    """Encode a user's events for a candidate item and return short- and long-term interest.

    The events, each joined with the candidate (early fusion), pass a Transformer encoder; what
    leaves is the latest few tokens, flattened, and the maximum over all positions::

        tokens = [event_l ; candidate]   or   candidate, event_1, ..., event_L
        h = encoder(tokens);   out = [h of the latest k ; max over positions of h]

    Parameters
    ----------
    event_dim : int
        E, the width of an event.
    candidate_dim : int
        C, the width of the candidate; 0 with ``fusion="none"``, E with ``"append"``.
    nhead, dim_feedforward, num_layers : int
        Of the Transformer encoder. Its width D (``d_model``) is E + C with ``"concat"``, else E.
    fusion : str
        ``"concat"``: the candidate is appended to every event; ``"append"``: it is one more
        token, the most recent one, never ignored; ``"none"``: there is no candidate.
    latest_k : int or None
        How many of the most recent tokens to return: those that start at the first valid position
        (``order="latest_first"``) or end at the last valid one (``"latest_last"``), 0 where the
        sequence ends before. ``None``: the whole sequence [B, L', D], and no pool.
    pool : str
        ``"max"`` or ``"none"``.
    pool_padding : str
        What ignored positions hold for both summaries. ``"zero"``: 0 (then the final norm, if
        any); ``"compute"``: the encoder's output for a query there; ``"exclude"``: 0, and they do
        not enter the maximum.
    order : str
        ``"latest_first"`` or ``"latest_last"``: which end of the sequence is the most recent.
    activation, norm_first, layer_norm_eps, bias, dropout, device, dtype
        As in `TransformerEncoderLayer`.
    final_norm : bool
        Whether a layer norm follows the last layer.
    backend : str
        ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Attributes
    ----------
    d_model : int
        Width of a token.
    out_dim : int
        Width of the result: ``latest_k * d_model``, plus ``d_model`` with ``pool="max"``.
    encoder : TransformerEncoder
        The weights, with the keys of ``torch.nn.TransformerEncoder``.

    Raises
    ------
    ValueError, TypeError
        For options or inputs of the wrong shape, value or kind.

    Examples
    --------
    >>> import torch, seqkernels
    >>> module = seqkernels.nn.UserSequenceEncoder(64, 32, 2, 32, 2, latest_k=8).eval()
    >>> events, candidate = torch.randn(4, 100, 64), torch.randn(4, 32)
    >>> with torch.inference_mode():
    ...     out = module(events, candidate, lengths=torch.tensor([100, 60, 3, 0]))
    >>> out.shape, module.out_dim
    (torch.Size([4, 864]), 864)
    """

    def __init__(
        self,
        event_dim: int,
        candidate_dim: int,
        nhead: int,
        dim_feedforward: int,
        num_layers: int,
        *,
        fusion: str = "concat",
        latest_k: int | None = 8,
        pool: str = "max",
        pool_padding: str = "zero",
        order: str = "latest_first",
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        norm_first: bool = False,
        layer_norm_eps: float = 1e-5,
        bias: bool = True,
        dropout: float = 0.1,
        final_norm: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        EncoderOptions(
            nhead=1,
            fusion=fusion,
            padding=pool_padding,
            order=order,
            latest_k=latest_k,
            pool=pool,
        ).check(d_model=1)
        expected = {"none": 0, "append": event_dim}.get(fusion, candidate_dim)
        if candidate_dim != expected or candidate_dim < 0:
            raise ValueError(
                f"UserSequenceEncoder: candidate_dim: expected {max(expected, 0)} for "
                f"fusion={fusion!r} and event_dim={event_dim}, got {candidate_dim}"
            )
        if num_layers < 1:
            raise ValueError(
                f"UserSequenceEncoder: num_layers: expected at least 1, got {num_layers}"
            )
        self.event_dim = event_dim
        self.candidate_dim = candidate_dim
        self.d_model = event_dim + candidate_dim if fusion == "concat" else event_dim
        self.fusion = fusion
        self.latest_k = latest_k
        self.pool = pool
        self.pool_padding = pool_padding
        self.order = order
        self.backend = backend
        layer = TransformerEncoderLayer(
            self.d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            True,
            norm_first,
            bias,
            device,
            dtype,
            backend=backend,
        )
        norm = (
            nn.LayerNorm(self.d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
            if final_norm
            else None
        )
        self.encoder = TransformerEncoder(
            layer,
            num_layers,
            norm,
            padded_output="compute" if pool_padding == "compute" else "zero",
            backend=backend,
        )

    @property
    def out_dim(self) -> int:
        """Width of the result."""
        if self.latest_k is None:
            return self.d_model
        return (self.latest_k + (self.pool == "max")) * self.d_model

    def extra_repr(self) -> str:
        """Show the options."""
        shown = ("event_dim", "candidate_dim", "fusion", "latest_k", "pool", "pool_padding")
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in (*shown, "order", "backend"))

    def forward(
        self,
        events: Tensor,
        candidate: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Encode and summarize.

        Parameters
        ----------
        events : Tensor
            [B, L, E], float32 or bfloat16 (float16 and float64 run the definition).
        candidate : Tensor, optional
            [B, C], of the same dtype; ``None`` with ``fusion="none"``.
        key_padding_mask : Tensor, optional
            [B, L], bool (True: ignore) or floating (-9000 or less: ignore; other values are added
            to the scores, by the definition).
        lengths : Tensor, optional
            [B] int32 or int64: the first ``lengths[b]`` events are valid. At most one of the two.

        Returns
        -------
        Tensor
            [B, out_dim], or [B, L', D] with ``latest_k=None`` (L' = L + 1 with
            ``fusion="append"``), in the dtype of `events`.
        """
        ready = ready_for(self, events)
        if ready is not None:
            done = ready.summarize(events, candidate, None, key_padding_mask, lengths)
            if done is not None:
                return done
        node = as_fx_leaf(self, events, candidate, key_padding_mask, lengths)
        if node is not None:
            return node  # type: ignore[no-any-return]
        reasons: Any = []
        now = self._read(reasons)
        if now is not None:
            arguments = (
                events,
                candidate,
                now.weights,
                key_padding_mask,
                lengths,
            )
            options = self._options(now)
            out = ops.apply_encoder(self, *arguments, options, self.backend)
            if isinstance(out, Tensor):
                self._keep(events, now.weights)
                return out
            if split_mask(key_padding_mask).bias is not None:
                # torch's fused layer takes a bias for a bool mask.
                return ops.encoder(*arguments, *options, self.backend)
            reasons = out
        self._report("encoder", reasons)
        return self._definition(events, candidate, key_padding_mask, lengths)

    def score_candidates(
        self,
        events: Tensor,
        candidates: Tensor,
        user_index: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Encode many candidates for a few users, as `forward` does for each pair.

        ::

            out[n] = forward(events[user_index[n]], candidates[n])

        No tensor [N, L, D] is built. With ``fusion="concat"`` and norm last, what the first layer
        computes of the events alone (projections, scores, exponentials) is computed once for each
        user; behind a norm in front, or with the candidate as a token of its own, the events are
        read in place and each candidate runs all of it. A candidate's result has the same bits
        whatever the other candidates, their order and the number of threads.

        Parameters
        ----------
        events : Tensor
            [U, L, E], as in `forward`.
        candidates : Tensor
            [N, C], of the same dtype.
        user_index : Tensor, optional
            [N] int32 or int64 in 0 .. U - 1, in any order: whose candidate each is. May be left out
            for one user.
        key_padding_mask, lengths : Tensor, optional
            [U, L] or [U], of the users.

        Returns
        -------
        Tensor
            [N, out_dim], or [N, L', D] with ``latest_k=None``.

        Raises
        ------
        ValueError, TypeError
            For inputs of the wrong shape, value or kind, and for ``fusion="none"``.

        Examples
        --------
        >>> import torch, seqkernels
        >>> module = seqkernels.nn.UserSequenceEncoder(64, 32, 2, 32, 2, latest_k=8).eval()
        >>> events, candidates = torch.randn(2, 100, 64), torch.randn(5, 32)
        >>> with torch.inference_mode():
        ...     out = module.score_candidates(
        ...         events, candidates, torch.tensor([0, 1, 0, 0, 1]), lengths=torch.tensor([60, 9])
        ...     )
        >>> out.shape
        torch.Size([5, 864])
        """
        if self.fusion == "none":
            raise ValueError(
                "request_scoring: fusion: expected 'concat' or 'append': with 'none' the result is "
                "the same for all candidates"
            )
        if user_index is not None:
            ready = ready_for(self, events)
            if ready is not None:
                done = ready.summarize(events, candidates, user_index, key_padding_mask, lengths)
                if done is not None:
                    return done
        if user_index is None:
            if events.shape[0] != 1:
                raise ValueError(
                    f"request_scoring: user_index: expected a tensor for {events.shape[0]} users, "
                    "got None"
                )
            user_index = torch.zeros(
                candidates.shape[0], dtype=torch.int64, device=candidates.device
            )
        reasons: Any = []
        now = self._read(reasons)
        if now is not None:
            arguments = (
                events,
                candidates,
                user_index,
                now.weights,
                key_padding_mask,
                lengths,
            )
            options = self._options(now)
            out = ops.apply_request_scoring(self, *arguments, options, self.backend)
            if isinstance(out, Tensor):
                self._keep(events, now.weights)
                return out
            if split_mask(key_padding_mask).bias is not None:
                return ops.request_scoring(*arguments, *options, self.backend)
            reasons = out
        self._report("request_scoring", reasons)
        check_user_index(user_index, events.shape[0])
        return self._definition(
            events[user_index],
            candidates,
            None if key_padding_mask is None else key_padding_mask[user_index],
            None if lengths is None else lengths[user_index],
        )

    def _keep(self, events: Tensor, weights: read.Weights) -> None:
        def make() -> Made:
            now = self._read([])
            if now is None:
                return None
            options = self._options(now)
            kernel = ops.native_encoder(self, now.weights, events.dtype, options, self.backend)
            return now.weights, kernel

        keep(self, events, self.modules(), weights, make)

    def _read(self, reasons: list[str], *, any_mode: bool = False) -> read.Encoder | None:
        """The encoder as arguments of an op; without one, `reasons` gets the reasons."""
        encoder = self.encoder
        if not any_mode:
            reasons += read.mode_reasons(self)
            if encoder.training and not self.training:
                reasons.append("encoder is in training mode")
        reasons += read.module_reasons(encoder, "encoder")
        now = read.read_encoder(encoder, LAYER_TYPES, reasons, any_mode=any_mode)
        if now is not None and now.norm_outside:
            norm: Any = encoder.norm
            kind = type(norm).__name__
            reasons += read.module_reasons(norm, "encoder.norm") or [f"encoder.norm is a {kind}"]
        return None if reasons else now

    def _options(self, now: read.Encoder) -> EncoderOptions:
        """The options of both ops."""
        return now.options._replace(
            fusion=self.fusion,
            padding=self.pool_padding,
            order=self.order,
            latest_k=self.latest_k,
            pool=self.pool,
        )

    def _report(self, op: str, reasons: Sequence[str]) -> None:
        # Training with gradients is what the definition is for, not a fallback.
        if not (self.training and torch.is_grad_enabled()):
            backends.report_fallback(op, self.backend, list(reasons))

    def fallback_reasons(self) -> list[str]:
        """Every reason why a call runs the definition; empty if none."""
        reasons = read.mode_reasons(self)
        self._read(reasons, any_mode=self.training)
        return reasons

    def _definition(
        self,
        events: Tensor,
        candidate: Tensor | None,
        key_padding_mask: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """The encoder by its submodules (dropout and hooks included), then the summary."""
        check_inputs(
            events,
            candidate,
            key_padding_mask,
            lengths,
            self.fusion,
            self.d_model,
            next(self.parameters()).device,
        )
        if lengths is not None:
            mask: Tensor | None = ignored_by_lengths(events, lengths)
        else:
            mask = key_padding_mask
        ignored, bias = split_mask(mask)
        valid = torch.ones(events.shape[:2], dtype=torch.bool, device=events.device)
        if ignored is not None:
            valid = ~ignored
        tokens, valid = fuse(events, candidate, valid, self.fusion, self.order)
        mask = None if ignored is None else ~valid
        if bias is not None:
            mask = bias
            if self.fusion == "append":
                mask = F.pad(bias, (1, 0) if self.order == "latest_first" else (0, 1))
        h: Tensor = self.encoder(tokens, src_key_padding_mask=mask)
        if self.latest_k is None:
            return h
        if not tokens.shape[1]:
            return h.sum(1).repeat(1, self.latest_k + (self.pool == "max"))  # zeros
        return summarize(h, valid, self.pool_padding, self.order, self.latest_k, self.pool)
