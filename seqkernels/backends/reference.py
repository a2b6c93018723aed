"""The reference definition as a backend: any device and floating dtype, slower, always there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import reference
from seqkernels.backends.call import EncoderCall, EncoderOptions


class ReferenceBackend:
    """Runs `seqkernels.reference`."""

    name = "reference"

    def not_supported_reasons(self, device: str, dtype: torch.dtype) -> list[str]:
        """Nothing keeps it from running."""
        return []

    def variant(self) -> str:
        """There is one."""
        return ""

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        """Write ``call.out``."""
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
            )
            return call.out.copy_(result)


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
) -> Tensor:
    """Evaluate `seqkernels.reference.encoder` in the dtype of x, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return reference.encoder(
            x,
            candidate,
            weights,
            mask,
            lengths,
            fusion=fusion,
            padding=padding,
            order=order,
            latest_k=latest_k,
            pool=pool,
            **options._asdict(),
        )
