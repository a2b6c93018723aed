"""Inference kernels for ranking models that read a user's action sequence."""

from __future__ import annotations

from importlib import metadata

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "seqkernels needs PyTorch, which is not installed here: pip install torch "
        "(https://pytorch.org/get-started/locally lists the builds)"
    ) from None

from seqkernels import backends, features, models, nn, ops, reference, settings
from seqkernels.backends import recheck_weights
from seqkernels.errors import BackendUnavailableError
from seqkernels.explain import Explained, Explanation, explain, warmup
from seqkernels.precision import PrecisionDecision, PrecisionPolicy
from seqkernels.swap import SwapReport, swap

try:
    __version__ = metadata.version("seqkernels")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "unknown"

__all__ = [
    "BackendUnavailableError",
    "Explained",
    "Explanation",
    "PrecisionDecision",
    "PrecisionPolicy",
    "SwapReport",
    "__version__",
    "backends",
    "explain",
    "features",
    "models",
    "nn",
    "ops",
    "recheck_weights",
    "reference",
    "settings",
    "swap",
    "warmup",
]
