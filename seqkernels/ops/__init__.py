"""The ops: schema, validation, fake and dispatch of each, as ``torch.ops.seqkernels.<op>``."""

from seqkernels.ops.encoder import apply_encoder, encoder

__all__ = ["apply_encoder", "encoder"]
