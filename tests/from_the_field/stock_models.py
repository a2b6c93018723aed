"""Stock models as users have them, and what they are held to."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import seqkernels
from seqkernels.testing import assert_close_to_oracle

D, HEADS, FF, B, L = 96, 2, 32, 4, 40


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def encoder(layers: int = 2, norm: bool = False, **options: Any) -> nn.TransformerEncoder:
    """torch's encoder with attention that is not uniform, in eval mode; bf16 holds its weights."""
    options = {"batch_first": True, "nhead": HEADS} | options
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, dim_feedforward=FF, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = nn.TransformerEncoder(layer, layers, nn.LayerNorm(D) if norm else None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 2.0 if "in_proj_weight" in name else 1.0
            parameter.copy_((scale * parameter + 0.1 * noise).bfloat16())
    return made.eval()


def swapped(stock: nn.Module, **options: Any) -> Any:
    """A copy of the model, swapped."""
    model = copy.deepcopy(stock)
    seqkernels.swap(model, **options)
    return model


def hold_to_stock(stock: nn.Module, result: Tensor, call: Callable[[nn.Module], Tensor]) -> None:
    """The numerics rule for a result, by torch's module in fp64 and in bf16 in the same call."""
    with torch.inference_mode():
        golden, low = (call(cast(stock, t)) for t in (torch.float64, torch.bfloat16))
    assert_close_to_oracle(result, golden, low)


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype, whose inputs are cast too; what it returns for whom is its own."""
    other = copy.deepcopy(module).to(dtype)
    other.register_forward_pre_hook(
        lambda _, args, keywords: (
            tuple(_cast(a, dtype) for a in args),
            {k: _cast(v, dtype) for k, v in keywords.items()},
        ),
        with_kwargs=True,
    )
    return other


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute within."""
    had = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
