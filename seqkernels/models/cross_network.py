"""Explicit crossing of features: DCN-v2 (arXiv:2008.13535)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class CrossNetwork(nn.Module):
    """Multiply the input with learned combinations of itself, once for each layer.

    With ``x_0`` the input and ``*`` element by element::

        x_{l+1} = x_0 * (W_l x_l + b_l) + x_l

    so that layer l adds products of up to l + 1 features. With a rank, ``W_l = U_l V_l``.

    Parameters
    ----------
    width : int
        D, the number of features.
    num_layers : int
        How many; with 0 it returns its input.
    rank : int, optional
        r of ``U_l`` [D, r] and ``V_l`` [r, D]; ``None``: ``W_l`` is one [D, D] matrix.
    linear : callable
        Makes the linear layers, with the arguments of ``torch.nn.Linear``.

    Examples
    --------
    >>> import torch
    >>> from seqkernels.models import CrossNetwork
    >>> CrossNetwork(6, num_layers=2, rank=3)(torch.randn(4, 6)).shape
    torch.Size([4, 6])
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        rank: int | None = None,
        *,
        linear: Callable[..., nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()

        def product() -> nn.Module:
            if rank is None:
                return linear(width, width)
            return nn.Sequential(linear(width, rank, bias=False), linear(rank, width))

        self.layers = nn.ModuleList(product() for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Cross features [N, D] -> [N, D]."""
        x0 = x
        for layer in self.layers:
            x = torch.addcmul(x, x0, layer(x))  # [N, D]
        return x
