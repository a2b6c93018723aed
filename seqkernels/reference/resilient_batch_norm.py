"""Batch norm whose output cannot explode, in plain PyTorch.

Per channel, with mean m, variance v, weight g and bias b::

    z = (x - m) / sqrt(max(v, min_var) + eps);   y = act(g * clamp(z, -max_abs, max_abs) + b)

With ``min_var=0`` and ``max_abs=inf`` there is no bound, and it is torch's batch norm.

Letters: N rows, C channels, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels.options import ACTIVATIONS, check_choice


def resilient_batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    min_var: float = 0.0,
    max_abs: float = math.inf,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """Normalize each channel by given statistics, within bounds.

    Parameters
    ----------
    x : Tensor
        [N, C] or [N, C, L], any floating dtype. The computation runs in fp32, or in fp64 if one of
        the tensors is fp64; the result has the dtype of ``x``.
    mean, var : Tensor
        [C], statistics of the channels, floating.
    weight, bias : Tensor, optional
        [C], floating.
    eps : float
        Added to the variance.
    min_var : float
        Variances below it count as this one.
    max_abs : float
        Bound of the normalized value, before ``weight`` and ``bias``.
    activation : str
        ``"none"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"leaky_relu"``.
    negative_slope : float
        Of ``"leaky_relu"``.

    Returns
    -------
    Tensor
        Of the shape of ``x``. With a bound, whatever ``x`` holds, ``|y|`` before the activation is
        at most ``max_abs * |weight| + |bias|`` (evaluated in the same precision: every step
        rounds monotonically): a NaN counts as the mean of its channel, infinities are clamped,
        and a channel whose mean or variance is not finite, or whose variance is negative, has
        z = 0.

    Raises
    ------
    ValueError
        For an unknown activation.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[2.0, 1.001], [float("nan"), float("inf")]])
    >>> mean, var = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])
    >>> resilient_batch_norm(x, mean, var, min_var=0.01, max_abs=10.0, eps=0.0)
    tensor([[ 1.0000,  0.0100],
            [ 0.0000, 10.0000]])
    """
    per_channel = [mean, var, *(t for t in (weight, bias) if t is not None)]
    dtype = compute_dtype(x, *per_channel)
    ones = (1,) * (x.dim() - 2)

    def column(tensor: Tensor) -> Tensor:  # [C] -> [C, 1] for [N, C, L]
        return tensor.to(dtype).reshape(-1, *ones)

    m, v = column(mean), column(var)
    z = _bounded if is_bounded(min_var, max_abs) else _exact
    y = z(x.to(dtype), m, v, eps, min_var, max_abs)
    if weight is not None:
        y = y * column(weight)
    if bias is not None:
        y = y + column(bias)
    return activate("resilient_batch_norm", y, activation, negative_slope).to(x.dtype)


def batch_statistics(x: Tensor, *, bounded: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a batch, [C] each; differentiable.

    Parameters
    ----------
    x : Tensor
        [N, C] or [N, C, L].
    bounded : bool
        Whether the normalization that follows has bounds. Statistics that are not finite then
        carry no gradient either, so that those of the other channels stay finite.

    Returns
    -------
    mean, var : Tensor
        fp32, or fp64 for fp64 ``x``; NaN of an empty batch.

    Examples
    --------
    >>> import torch
    >>> mean, var = batch_statistics(torch.tensor([[1.0], [3.0]]), bounded=True)
    >>> mean, var
    (tensor([2.]), tensor([1.]))
    """
    x = x.to(compute_dtype(x))
    over = [i for i in range(x.dim()) if i != 1]
    if x.shape[0] == 0 or x.shape[-1] == 0:
        nothing = x.new_full((x.shape[1],), math.nan)
        return nothing, nothing.clone()
    var, mean = torch.var_mean(x, over, correction=0)
    if bounded and torch.is_grad_enabled() and x.requires_grad:
        useful = mean.isfinite() & var.isfinite()
        kept = torch.where(useful.reshape(-1, *(1,) * (x.dim() - 2)), x, 0.0)
        kept_var, kept_mean = torch.var_mean(kept, over, correction=0)
        mean = torch.where(useful, kept_mean, mean.detach())
        var = torch.where(useful, kept_var, var.detach())
    return mean, var


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype an evaluation on these runs in: fp64 if one of them is, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def is_bounded(min_var: float, max_abs: float) -> bool:
    """Whether there is a bound at all."""
    return min_var > 0 or max_abs < math.inf


def _exact(x: Tensor, m: Tensor, v: Tensor, eps: float, _min_var: float, _max_abs: float) -> Tensor:
    return (x - m) / torch.sqrt(v + eps)


def _bounded(x: Tensor, m: Tensor, v: Tensor, eps: float, min_var: float, max_abs: float) -> Tensor:
    # What is not used is replaced before it is computed with, not after: gradients of a product
    # with NaN or infinity would be NaN even where its value is dropped.
    useful = m.isfinite() & v.isfinite() & (v >= 0)
    m, v = torch.where(useful, m, 0.0), torch.where(useful, v, 1.0)
    finite = x.isfinite()
    z = (torch.where(finite, x, m) - m) / torch.sqrt(v.clamp(min=min_var) + eps)
    z = torch.where(finite, z, x)
    # NaN: of x, and 0 / 0 where v, min_var and eps all are 0.
    z = torch.where(useful & ~z.isnan(), z, 0.0)
    limit = _toward_zero(max_abs, z.dtype)
    return z.clamp(-limit, limit)


def _toward_zero(value: float, dtype: torch.dtype) -> float:
    """The largest number of this dtype that is not above `value`, so that a bound stays one."""
    if dtype == torch.float64 or value == math.inf:
        return value
    fraction, exponent = math.frexp(value)
    last = max(exponent, -125) - 24
    return min(math.ldexp(math.floor(math.ldexp(fraction, exponent - last)), last), _LARGEST_FP32)


_LARGEST_FP32 = math.ldexp(2**24 - 1, 104)


#: Every activation of the ops, as a function of the value and ``negative_slope``.
_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda y, _: y,
    "relu": lambda y, _: F.relu(y),
    "gelu": lambda y, _: F.gelu(y),
    "gelu_tanh": lambda y, _: F.gelu(y, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
}
assert tuple(_ACTIVATIONS) == ACTIVATIONS


def activate(op: str, y: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation of this name, for the op named in the error."""
    check_choice(f"{op}: activation", activation, ACTIVATIONS)
    return _ACTIVATIONS[activation](y, negative_slope)
