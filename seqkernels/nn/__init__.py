"""Drop-in modules: torch's constructors, forward and state dict, one fused kernel inside."""

from seqkernels.nn.batch_norm_health import BatchNormHealth, DegenerateChannel
from seqkernels.nn.fused_sequential import FusedSequential
from seqkernels.nn.linear import Linear
from seqkernels.nn.resilient_batch_norm import ResilientBatchNorm1d
from seqkernels.nn.transformer_encoder import TransformerEncoder
from seqkernels.nn.transformer_encoder_layer import TransformerEncoderLayer
from seqkernels.nn.user_sequence_encoder import UserSequenceEncoder

__all__ = [
    "BatchNormHealth",
    "DegenerateChannel",
    "FusedSequential",
    "Linear",
    "ResilientBatchNorm1d",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "UserSequenceEncoder",
]
