"""What an op hands to a backend: one checked call, of which the backend returns the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from seqkernels.backends.weights import WeightSet
from seqkernels.options import EncoderOptions, LinearOptions, ResilientBatchNormOptions


class EncoderCall(NamedTuple):
    """A call of the op ``encoder`` whose shapes, dtypes, devices and options are checked.

    Or of ``request_scoring``: x, mask and lengths then have a row for each of U users, and B is the
    number of candidates.

    Letters: B sequences, L events, L' tokens (L + 1 with fusion "append"), D model width.
    Not checked: the values of a floating mask (done) and of ``lengths`` (the backend does).
    """

    x: Tensor  # [B, L, E]
    candidate: Tensor | None  # [B, C]
    weights: Sequence[Tensor | None]
    weight_set: WeightSet
    mask: Tensor | None  # [B, L] bool, True = ignore; at most one of mask and lengths
    lengths: Tensor | None  # [B] int32 or int64
    options: EncoderOptions
    user_index: Tensor | None = None  # [B] int32 or int64; of request scoring
    # [1] bool or uint8, on the device: padding is "compute" where it is true, else "zero", whatever
    # the options say. For what only the device knows; not of request scoring.
    computes_padding: Tensor | None = None

    def new_output(self) -> Tensor:
        """The result, not filled: [B, L', D] or [B, latest_k * D (+ D)]."""
        candidates = None if self.user_index is None else self.user_index.shape[0]
        return new_encoder_output(self.x, self.weight_set.shape.d_model, self.options, candidates)

    def is_empty(self) -> bool:
        """Whether there are no sequences, or only some without events."""
        rows = self.x if self.user_index is None else self.user_index
        return not rows.shape[0] or not (self.x.shape[1] or self.options.fusion == "append")


def new_encoder_output(
    x: Tensor, d_model: int, options: EncoderOptions, candidates: int | None = None
) -> Tensor:
    """An encoder's result, not filled; a full sequence lies in memory in the order of x.

    With the number of `candidates`, that of request scoring.
    """
    batch, length, _ = x.shape
    stride_b, stride_l, _ = x.stride()
    if candidates is not None:
        batch = candidates
    if options.latest_k is not None:
        return x.new_empty((batch, (options.latest_k + (options.pool == "max")) * d_model))
    if options.fusion == "append":
        length = length + 1
    if candidates is None and 0 < stride_b < stride_l:
        return x.new_empty((length, batch, d_model)).transpose(0, 1)
    return x.new_empty((batch, length, d_model))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of [N, C, L] lie closer in memory than the positions."""
    return x.dim() == 3 and 0 < x.stride(1) < x.stride(2)


def new_norm_output(x: Tensor) -> Tensor:
    """A batch norm's result, not filled; channels lie in memory where those of x do."""
    if is_channels_last(x):
        n, c, length = x.shape
        return x.new_empty((n, length, c)).transpose(1, 2)
    return x.new_empty(x.shape)


def readable(x: Tensor) -> Tensor:
    """X itself where its rows or positions are contiguous, else a copy."""
    if is_channels_last(x):
        return x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


class ResilientBatchNormCall(NamedTuple):
    """A call of the op ``resilient_batch_norm`` that is checked and not empty.

    Letters: N rows, C channels, L positions.
    """

    x: Tensor  # [N, C] or [N, C, L]
    mean: Tensor  # [C], any floating dtype, as those below
    var: Tensor  # [C]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    options: ResilientBatchNormOptions


class LinearCall(NamedTuple):
    """A call of the op ``linear`` that is checked and not empty.

    Letters: K = in_features, F = out_features.
    """

    x: Tensor  # [..., K]
    weights: Sequence[Tensor | None]  # see linear_weights.NAMES
    weight_set: WeightSet
    options: LinearOptions
