"""The backend's face: whether it can run, and one method for each op it has kernels for."""

from __future__ import annotations

import importlib.util
import re
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib import metadata

import torch
from torch import Tensor

from seqkernels.backends import gpu
from seqkernels.backends.call import (
    EncoderCall,
    EncoderSize,
    LinearCall,
    ResilientBatchNormCall,
)
from seqkernels.backends.triton import batch_norm, encoder

_DTYPES = (torch.float32, torch.bfloat16)
_LOWEST = (3, 6)  # with which the tests pass
_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")


class TritonBackend:
    """Runs the Triton kernels on NVIDIA and AMD GPUs."""

    name = "triton"
    devices: tuple[str, ...] = ("cuda",)  # torch calls AMD GPUs so too

    def not_supported_reasons(
        self, op: str, device: str, dtype: torch.dtype, size: EncoderSize | None
    ) -> list[str]:
        """Every reason why it cannot run a call on tensors of this device type and dtype."""
        reasons = list(unmet_by_triton())
        if device not in self.devices:
            reasons.append(f"tensors on {device}, it takes CUDA tensors")
        reasons += self.device_reasons()
        if dtype not in _DTYPES:
            reasons.append(f"dtype {dtype}, it takes float32 and bfloat16")
        if op == "linear":
            reasons.append("there is no Triton kernel for linear layers; torch's own is as fast")
        elif size is not None:
            reasons += encoder.not_supported_reasons(size.d_model, size.nhead)
        return reasons

    def device_reasons(self) -> list[str]:
        """Why torch's current GPU, if there is one, cannot run them."""
        return gpu.unmet(takes_amd=True)

    def variant(self) -> str:
        """The architecture of the current GPU, "sm_90" or "gfx942"."""
        return gpu.architecture()

    def on(self, tensor: Tensor) -> AbstractContextManager[object]:
        """The tensor's device as the current one, on which Triton launches."""
        return gpu.on(tensor)

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        """Write ``call.out``: two launches a layer, one more to share a user's part."""
        with self.on(call.out):
            return encoder.run(call, variant)

    def resilient_batch_norm(self, call: ResilientBatchNormCall, variant: str) -> Tensor:
        """Write ``call.out`` by one launch."""
        with self.on(call.out):
            return batch_norm.run(call)

    def linear(self, call: LinearCall, variant: str) -> Tensor:
        """There is none: `not_supported_reasons` says so."""
        raise AssertionError("no kernel for linear layers")


@lru_cache(maxsize=1)
def unmet_by_triton() -> tuple[str, ...]:
    """Why the Triton that is installed does not do, empty if it does; nothing is imported.

    No requirement of the package says so: each torch pins a Triton of its own, and a bound on
    Triton would replace torch.
    """
    if importlib.util.find_spec("triton") is None:
        return ("Triton is not installed; `pip install triton` adds it",)
    for distribution in _DISTRIBUTIONS:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        lowest = ".".join(str(part) for part in _LOWEST)
        return () if found >= _LOWEST else (f"Triton {version}, it needs {lowest} or newer",)
    return ()  # a build under another name, of which nothing is known
