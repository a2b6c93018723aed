"""What the op hands to a backend: one checked call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from seqkernels.backends.weights import WeightSet


class EncoderSize(NamedTuple):
    """What of an encoder decides which kernels take it."""

    d_model: int
    nhead: int
    dim_feedforward: int
    num_layers: int


class EncoderOptions(NamedTuple):
    """What the model fixes beside its weights; with them, the key of the packed weights."""

    nhead: int
    activation: str
    negative_slope: float
    norm_first: bool
    layer_norm_eps: float
    final_norm_eps: float


class EncoderCall(NamedTuple):
    """A call of the op ``encoder`` whose shapes, dtypes, devices and options are checked.

    Or of ``request_scoring``: x, mask and lengths then have a row for each of U users, and B is the
    number of candidates.

    Letters: B sequences, L events, L' tokens (L + 1 with fusion "append"), D model width.
    Not checked: the values of a floating mask (done) and of ``lengths`` (the backend does).
    """

    x: Tensor  # [B, L, E], last dimension contiguous
    candidate: Tensor | None  # [B, C], last dimension contiguous
    weights: Sequence[Tensor | None]
    weight_set: WeightSet
    mask: Tensor | None  # [B, L] bool, True = ignore; at most one of mask and lengths
    lengths: Tensor | None  # [B] int64, contiguous
    options: EncoderOptions
    fusion: str
    padding: str
    order: str
    latest_k: int | None
    pool: str
    out: Tensor  # [B, L', D] or [B, latest_k * D (+ D)], to be written; B >= 1
    user_index: Tensor | None = None  # [B] int64, contiguous; of request scoring
    # [1] bool or uint8, on the device: padding is "compute" where it is true, else "zero", whatever
    # `padding` says. For what only the device knows; not of request scoring.
    computes_padding: Tensor | None = None


class ResilientBatchNormOptions(NamedTuple):
    """The numbers of a batch norm, and the activation after it."""

    eps: float
    min_var: float
    max_abs: float
    activation: str
    negative_slope: float


class ResilientBatchNormCall(NamedTuple):
    """A call of the op ``resilient_batch_norm`` that is checked and not empty.

    Letters: N rows, C channels, L positions.
    """

    x: Tensor  # [N, C], rows contiguous; [N, C, L], positions or channels contiguous
    mean: Tensor  # [C], any floating dtype, as those below
    var: Tensor  # [C]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    options: ResilientBatchNormOptions
    out: Tensor  # as x, to be written; contiguous in the order of x's dimensions in memory


class LinearOptions(NamedTuple):
    """The numbers of a linear layer's norms (eps, min_var, max_abs; or none), and the rest."""

    input_norm: tuple[float, ...]
    output_norm: tuple[float, ...]
    activation: str
    negative_slope: float
    precision: str  # of the product's operands: "bf16" or "fp32"


class LinearCall(NamedTuple):
    """A call of the op ``linear`` that is checked and not empty.

    Letters: N rows, K = in_features, F = out_features.
    """

    x: Tensor  # [N, K], rows contiguous
    weights: Sequence[Tensor | None]  # see linear_weights.NAMES
    weight_set: WeightSet
    options: LinearOptions
    out: Tensor  # [N, F], contiguous, to be written
