"""Every op in plain PyTorch: the definition, the training path and the oracle of the kernels.

Functions here depend on torch alone, take any floating dtype up to float64, compute in it (batch
norm: in float32 at least) and are differentiable. An op has the same name here as in every layer.
"""

from seqkernels.reference.encoder import encoder
from seqkernels.reference.linear import ChannelNorm, linear
from seqkernels.reference.request_scoring import request_scoring
from seqkernels.reference.resilient_batch_norm import resilient_batch_norm

__all__ = ["ChannelNorm", "encoder", "linear", "request_scoring", "resilient_batch_norm"]
