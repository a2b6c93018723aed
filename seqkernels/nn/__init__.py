"""Drop-in modules: torch's constructors, forward and state dict, one fused kernel inside."""

from seqkernels.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer
from seqkernels.nn.user_sequence_encoder import UserSequenceEncoder

__all__ = ["TransformerEncoder", "TransformerEncoderLayer", "UserSequenceEncoder"]
