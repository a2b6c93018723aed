"""A linear layer between two batch norms, in plain PyTorch.

::

    y = act(norm_out(norm_in(x) W^T + b))

Each norm, by given statistics, is `seqkernels.reference.resilient_batch_norm`.

Letters: N rows, K = in_features, F = out_features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels.reference.resilient_batch_norm import activate, resilient_batch_norm


class ChannelNorm(NamedTuple):
    """A batch norm by given statistics; tensors are [C]."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    min_var: float = 0.0
    max_abs: float = math.inf


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    input_norm: ChannelNorm | None = None,
    output_norm: ChannelNorm | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """Norm, multiply, norm, activate, in the dtype of ``x``.

    Parameters
    ----------
    x : Tensor
        [..., K], any floating dtype; norms compute in fp32, or in fp64 for fp64 ``x``.
    weight, bias : Tensor
        [F, K], and [F] or ``None``; cast to the dtype of ``x``.
    input_norm, output_norm : ChannelNorm, optional
        Of the K columns of ``x`` and of the F columns of the product.
    activation : str
        ``"none"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"leaky_relu"``.
    negative_slope : float
        Of ``"leaky_relu"``.

    Returns
    -------
    Tensor
        [..., F], of the dtype of ``x``.

    Raises
    ------
    ValueError
        For an unknown activation.

    Examples
    --------
    >>> import torch
    >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    >>> norm = ChannelNorm(torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
    >>> linear(x, weight, output_norm=norm, activation="relu")
    tensor([[1.]])
    """
    if input_norm is not None:
        x = _normalize(x, input_norm)
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if output_norm is not None:
        y = _normalize(y, output_norm)
    return activate("linear", y, activation, negative_slope)


def fold_norm(weight: Tensor, bias: Tensor | None, norm: ChannelNorm) -> tuple[Tensor, Tensor]:
    """The weights of one linear layer that equals this one and the unbounded norm behind it.

    ::

        s = g / sqrt(v + eps);   W' = s W;   b' = s (b - m) + b_norm

    computed in fp64 and rounded once to the dtype of ``weight``. `fold_reasons` says when this may
    not be done.

    Examples
    --------
    >>> import torch
    >>> norm = ChannelNorm(torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
    >>> fold_norm(torch.tensor([[3.0, 5.0]]), None, norm)
    (tensor([[1.5000, 2.5000]]), tensor([-0.5000]))
    """
    scale = 1.0 / torch.sqrt(norm.var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.mean.double() if bias is None else bias.double() - norm.mean.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return (weight.double() * scale.unsqueeze(1)).to(weight.dtype), shift.to(weight.dtype)


def fold_reasons(norm: ChannelNorm) -> list[str]:
    """Why a norm may not be folded into the weights of the linear layer before it.

    Examples
    --------
    >>> import torch
    >>> fold_reasons(ChannelNorm(torch.tensor([0.0]), torch.tensor([1.0]), max_abs=10.0))
    ['its bounds are no linear function']
    """
    reasons = []
    if norm.min_var > 0 or norm.max_abs < math.inf:
        reasons.append("its bounds are no linear function")
    scale = 1.0 / torch.sqrt(norm.var.double() + norm.eps)
    if not bool((norm.mean.isfinite() & norm.var.isfinite() & scale.isfinite()).all()):
        reasons.append("its statistics are not finite, or give no finite factor")
    return reasons


def _normalize(x: Tensor, norm: ChannelNorm) -> Tensor:
    """The norm over the last dimension of x [..., C]."""
    flat = x.reshape(-1, x.shape[-1])
    return resilient_batch_norm(
        flat,
        norm.mean,
        norm.var,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        min_var=norm.min_var,
        max_abs=norm.max_abs,
    ).reshape(x.shape)
