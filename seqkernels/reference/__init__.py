"""Every op in plain PyTorch: the definition, the training path and the oracle of the kernels.

Functions here depend on torch alone, take any floating dtype up to float64, compute in it and are
differentiable. An op has the same name here as in every other layer.
"""

from seqkernels.reference.encoder import encoder

__all__ = ["encoder"]
