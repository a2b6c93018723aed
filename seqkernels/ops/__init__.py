"""The ops: schema, validation, fake and dispatch of each, as ``torch.ops.seqkernels.<op>``."""

from seqkernels.ops.encoder import apply_encoder, encoder, native_encoder
from seqkernels.ops.linear import apply_linear, linear, native_linear
from seqkernels.ops.request_scoring import apply_request_scoring, request_scoring
from seqkernels.ops.resilient_batch_norm import (
    apply_resilient_batch_norm,
    native_norm,
    resilient_batch_norm,
)

__all__ = [
    "apply_encoder",
    "apply_linear",
    "apply_request_scoring",
    "apply_resilient_batch_norm",
    "encoder",
    "linear",
    "native_encoder",
    "native_linear",
    "native_norm",
    "request_scoring",
    "resilient_batch_norm",
]
