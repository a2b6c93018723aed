"""The Triton backend: portable GPU kernels, compiled when a problem first needs them.

Nothing here imports ``triton`` before the first call: without it, or without a GPU, the rest of the
package loses nothing.
"""

from seqkernels.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
