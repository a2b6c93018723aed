"""The fused CUDA kernels of the native module: pack weights on the host, launch on torch's stream.

A launch neither waits nor allocates device memory but the output and, for long or wide sequences
and for requests, a workspace from torch's allocator, so that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seqkernels.backends import cpu, gpu
from seqkernels.backends.call import (
    EncoderCall,
    EncoderOptions,
    EncoderSize,
    LinearCall,
    ResilientBatchNormCall,
)
from seqkernels.backends.encoder_weights import PER_LAYER
from seqkernels.backends.native_arguments import batch_norm_arguments, encoder_arguments, fp32
from seqkernels.backends.weights import WeightSet

_DTYPES = (torch.float32, torch.bfloat16)


class CudaBackend:
    """Runs the native CUDA kernels."""

    name = "cuda"
    devices: tuple[str, ...] = ("cuda",)

    def not_supported_reasons(
        self, op: str, device: str, dtype: torch.dtype, size: EncoderSize | None
    ) -> list[str]:
        """Every reason why it cannot run a call on tensors of this device type and dtype."""
        reasons = []
        kernels = self.kernels()
        if kernels is None:
            reasons.append(not_built_reason())
        if device not in self.devices:
            reasons.append(f"tensors on {device}, it takes CUDA tensors")
        reasons += self.device_reasons()
        if dtype not in _DTYPES:
            reasons.append(f"dtype {dtype}, it takes float32 and bfloat16")
        if op == "linear":
            reasons.append("there is no CUDA kernel for linear layers; torch's own is as fast")
        elif kernels is not None and size is not None:
            reasons += kernels.encoder_unsupported_reasons(*size)
        return reasons

    def kernels(self) -> Any:
        """The native functions, or None where they were not built."""
        return getattr(cpu.native(), "cuda", None)

    def device_reasons(self) -> list[str]:
        """Why torch's current CUDA device, if there is one, cannot run them."""
        return gpu.unmet(takes_amd=False)

    def variant(self) -> str:
        """The architecture of the current device, "sm_90"."""
        return gpu.architecture()

    def stream(self, tensor: Tensor) -> tuple[int, int]:
        """The index of the tensor's device and the stream to launch on."""
        index = tensor.device.index
        return index, torch.cuda.current_stream(index).cuda_stream

    def on(self, tensor: Tensor) -> AbstractContextManager[object]:
        """The tensor's device as the current one, on which launches run."""
        return gpu.on(tensor)

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        """Write ``call.out``: by one launch; by two where a request shares its users' parts.

        Beyond d_model 128 by one, and two a layer.
        """
        packed = call.weight_set.derived(
            ("cuda", call.options, call.out.device), self._pack, call
        )  # [bytes] uint8, on the device
        device, stream = self.stream(call.out)
        kept: list[Tensor] = []

        def allocate(count: int) -> int:
            kept.append(call.out.new_empty(count, dtype=torch.uint8))
            return kept[-1].data_ptr()

        model = _model(self.kernels(), call.weight_set, call.options)
        with self.on(call.out):
            model.forward(packed.data_ptr(), allocate, device, stream, *encoder_arguments(call))
        return call.out

    def resilient_batch_norm(self, call: ResilientBatchNormCall, variant: str) -> Tensor:
        """Write ``call.out`` by one launch."""
        device, stream = self.stream(call.out)
        arguments, kept = batch_norm_arguments(call)
        with self.on(call.out):
            self.kernels().resilient_batch_norm(device, stream, *arguments)
        del kept  # until the launch is in the stream, in whose order their memory is used again
        return call.out

    def linear(self, call: LinearCall, variant: str) -> Tensor:
        """There is none: `not_supported_reasons` says so."""
        raise AssertionError("no kernel for linear layers")

    def _pack(self, call: EncoderCall) -> Tensor:
        """The weights in the layout of the kernels."""
        model = _model(self.kernels(), call.weight_set, call.options)
        packed = torch.empty(model.packed_bytes, dtype=torch.uint8)
        plain = [None if w is None else fp32(w).cpu() for w in call.weights]
        pointers = [0 if w is None else w.data_ptr() for w in plain]
        end = call.weight_set.shape.num_layers * PER_LAYER
        layers = [pointers[i : i + PER_LAYER] for i in range(0, end, PER_LAYER)]
        model.pack(layers, pointers[end:], packed.data_ptr())
        return packed.to(call.out.device)


def _model(kernels: Any, weight_set: WeightSet, options: EncoderOptions) -> Any:
    shape = weight_set.shape
    return _cached_model(
        kernels,
        (shape.d_model, options.nhead, shape.dim_feedforward, shape.num_layers),
        shape.has_final_norm,
        options,
    )


@lru_cache(maxsize=64)
def _cached_model(
    kernels: Any, sizes: Sequence[int], has_final_norm: bool, options: EncoderOptions
) -> Any:
    return kernels.EncoderModel(
        *sizes,
        options.activation,
        options.negative_slope,
        options.norm_first,
        options.layer_norm_eps,
        has_final_norm,
        options.final_norm_eps,
    )


def not_built_reason() -> str:
    """Why the native module has no CUDA kernels."""
    native = cpu.native()
    if native is None:
        return cpu.import_error or "the native module is missing"
    return f"the CUDA kernels were not built: {native.cuda_missing}"
