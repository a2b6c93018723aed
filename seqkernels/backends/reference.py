"""The reference definition as a backend: any device and floating dtype, slower, always there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import reference
from seqkernels.backends.call import (
    EncoderCall,
    LinearCall,
    ResilientBatchNormCall,
    is_channels_last,
)
from seqkernels.backends.linear_weights import INPUT_NORM, OUTPUT_NORM
from seqkernels.backends.problem import Problem
from seqkernels.options import (
    EncoderOptions,
    LinearOptions,
    ResilientBatchNormOptions,
    limit_of,
)


class ReferenceBackend:
    """Runs `seqkernels.reference`."""

    name = "reference"
    devices: tuple[str, ...] = ()

    def reasons(self, problem: Problem) -> list[str]:
        """Nothing keeps it from running."""
        return []

    def variant(self) -> str:
        """There is one."""
        return ""

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        """Run the op ``encoder``, or with ``call.user_index`` the op ``request_scoring``."""
        with torch.no_grad():
            result = encoder(
                call.x,
                call.candidate,
                call.weights,
                call.mask,
                call.lengths,
                call.options,
                call.user_index,
            )
            return call.new_output().copy_(result)

    def linear(self, call: LinearCall, variant: str) -> Tensor:
        """Run the op ``linear``."""
        with torch.no_grad():
            return linear(call.x, call.weights, call.options).contiguous()

    def resilient_batch_norm(self, call: ResilientBatchNormCall, variant: str) -> Tensor:
        """Run the op ``resilient_batch_norm``."""
        with torch.no_grad():
            return resilient_batch_norm(*call)


def encoder(
    x: Tensor,
    candidate: Tensor | None,
    weights: Sequence[Tensor | None],
    mask: Tensor | None,
    lengths: Tensor | None,
    options: EncoderOptions,
    user_index: Tensor | None = None,
) -> Tensor:
    """Evaluate `seqkernels.reference.encoder` in the dtype of x, whatever autocast says.

    With `user_index`, `seqkernels.reference.request_scoring`.
    """
    chosen = options._asdict()
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
    """Evaluate `seqkernels.reference.resilient_batch_norm`, whatever autocast says.

    The result lies in memory as x does: channels closer than positions, or not.
    """
    limit = limit_of("resilient_batch_norm", options.max_abs)
    chosen = options._replace(max_abs=limit)._asdict()
    with torch.autocast(x.device.type, enabled=False):
        result = reference.resilient_batch_norm(x, mean, var, weight, bias, **chosen)
    if is_channels_last(x):
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    return result.contiguous()


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
