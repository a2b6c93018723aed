"""The backend's face: whether it can run, and one method for each op it has kernels for."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from seqkernels.backends.call import (
    EncoderCall,
    EncoderSize,
    LinearCall,
    ResilientBatchNormCall,
)
from seqkernels.backends.triton import batch_norm, encoder

_DTYPES = (torch.float32, torch.bfloat16)
_LOWEST_CAPABILITY = (8, 0)


class TritonBackend:
    """Runs the Triton kernels on NVIDIA and AMD GPUs."""

    name = "triton"
    devices: tuple[str, ...] = ("cuda",)  # torch calls AMD GPUs so too

    def not_supported_reasons(
        self, op: str, device: str, dtype: torch.dtype, size: EncoderSize | None
    ) -> list[str]:
        """Every reason why it cannot run a call on tensors of this device type and dtype."""
        reasons = []
        if not _is_installed():
            reasons.append("Triton is not installed; `pip install triton` adds it")
        if device not in self.devices:
            reasons.append(f"tensors on {device}, it takes CUDA tensors")
        elif device == "cuda":
            reasons += _device_reasons()
        if dtype not in _DTYPES:
            reasons.append(f"dtype {dtype}, it takes float32 and bfloat16")
        if op == "linear":
            reasons.append("there is no Triton kernel for linear layers; torch's own is as fast")
        elif size is not None:
            reasons += encoder.not_supported_reasons(size.d_model, size.nhead)
        return reasons

    def variant(self) -> str:
        """The architecture of the current GPU, "sm_90" or "gfx942"; "" without one."""
        return _architecture(torch.cuda.current_device()) if torch.cuda.is_available() else ""

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        """Write ``call.out``: two launches a layer."""
        with _current(call.out.device):
            return encoder.run(call, variant)

    def resilient_batch_norm(self, call: ResilientBatchNormCall, variant: str) -> Tensor:
        """Write ``call.out`` by one launch."""
        with _current(call.out.device):
            return batch_norm.run(call)

    def linear(self, call: LinearCall, variant: str) -> Tensor:
        """There is none: `not_supported_reasons` says so."""
        raise AssertionError("no kernel for linear layers")


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _device_reasons() -> list[str]:
    if not torch.cuda.is_available():
        return ["no GPU that torch can use"]
    if torch.version.hip is None and torch.cuda.get_device_capability() < _LOWEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        return [f"a GPU of compute capability {major}.{minor}, it needs 8.0 (bf16 tensor cores)"]
    return []


@lru_cache(maxsize=16)
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
