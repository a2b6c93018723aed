"""The ops: schema, validation, fake and dispatch of each, as ``torch.ops.seqkernels.<op>``."""

from seqkernels.ops.encoder import encoder

__all__ = ["encoder"]
