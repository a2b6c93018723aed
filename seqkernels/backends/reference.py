"""The reference definition as a backend: any device and floating dtype, slower, always there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import reference
from seqkernels.backends.call import (
    EncoderCall,
    EncoderOptions,
    EncoderSize,
    LinearCall,
    LinearOptions,
    ResilientBatchNormCall,
    ResilientBatchNormOptions,
)
from seqkernels.backends.linear_weights import INPUT_NORM, OUTPUT_NORM


class ReferenceBackend:
    """Runs `seqkernels.reference`."""

    name = "reference"
    devices: tuple[str, ...] = ()

    def not_supported_reasons(
        self, op: str, device: str, dtype: torch.dtype, size: EncoderSize | None
    ) -> list[str]:
        """Nothing keeps it from running."""
        return []

    def variant(self) -> str:
        """There is one."""
        return ""

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        """Write ``call.out``; with ``call.user_index``, of request scoring."""
        with torch.no_grad():
            result = encoder(
                call.x,
                call.candidate,
                call.weights,
                call.mask,
                call.lengths,
                call.options,
                call.fusion,
                call.padding,
                call.order,
                call.latest_k,
                call.pool,
                call.user_index,
            )
            return call.out.copy_(result)

    def linear(self, call: LinearCall, variant: str) -> Tensor:
        """Write ``call.out``."""
        with torch.no_grad():
            return call.out.copy_(linear(call.x, call.weights, call.options))

    def resilient_batch_norm(self, call: ResilientBatchNormCall, variant: str) -> Tensor:
        """Write ``call.out``."""
        with torch.no_grad():
            return call.out.copy_(resilient_batch_norm(*call[:6]))


def encoder(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    mask: Tensor | None,
    lengths: Tensor | None,
    options: EncoderOptions,
    fusion: str,
    padding: str,
    order: str,
    latest_k: int | None,
    pool: str,
    user_index: Tensor | None = None,
) -> Tensor:
    """Evaluate `seqkernels.reference.encoder` in the dtype of x, whatever autocast says.

    With `user_index`, `seqkernels.reference.request_scoring`.
    """
    chosen = options._asdict() | {
        "fusion": fusion,
        "padding": padding,
        "order": order,
        "latest_k": latest_k,
        "pool": pool,
    }
    with torch.autocast(x.device.type, enabled=False):
        if user_index is None:
            return reference.encoder(x, candidate, weights, mask, lengths, **chosen)
        assert candidate is not None
        return reference.request_scoring(x, candidate, user_index, weights, mask, lengths, **chosen)


def resilient_batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: ResilientBatchNormOptions,
) -> Tensor:
    """Evaluate `seqkernels.reference.resilient_batch_norm`, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return reference.resilient_batch_norm(x, mean, var, weight, bias, **options._asdict())


def linear(x: Tensor, weights: Sequence[Tensor | None], options: LinearOptions) -> Tensor:
    """Evaluate `seqkernels.reference.linear` in the dtype of x, whatever autocast says."""
    weight, bias = weights[:2]
    assert weight is not None
    norms: list[reference.ChannelNorm | None] = []
    for tensors, numbers in (
        (weights[INPUT_NORM], options.input_norm),
        (weights[OUTPUT_NORM], options.output_norm),
    ):
        mean, var, gain, offset = tensors
        if mean is None or var is None:
            norms.append(None)
        else:
            norms.append(reference.ChannelNorm(mean, var, gain, offset, *numbers))
    with torch.autocast(x.device.type, enabled=False):
        return reference.linear(
            x,
            weight,
            bias,
            input_norm=norms[0],
            output_norm=norms[1],
            activation=options.activation,
            negative_slope=options.negative_slope,
        )
