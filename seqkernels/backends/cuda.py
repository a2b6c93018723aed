"""The CUDA kernels of the native library: pack weights on the host, launch on torch's stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqkernels.backends import gpu, native_module
from seqkernels.backends.call import EncoderCall, LinearCall, ResilientBatchNormCall
from seqkernels.backends.cpu import run_encoder
from seqkernels.backends.problem import Capability, EncoderSize, KernelBackend

_NO_LINEAR = "there is no CUDA kernel for linear layers; torch's own is as fast"


class CudaBackend(KernelBackend):
    """Runs the native CUDA kernels."""

    name = "cuda"
    devices: tuple[str, ...] = ("cuda",)
    tensors = "CUDA tensors"
    ops: Any = torch.ops.seqkernels

    def __init__(self) -> None:
        encoder = Capability(against_size=self._against_size)
        self.capabilities = {
            "encoder": encoder,
            "request_scoring": encoder,
            "resilient_batch_norm": Capability(),
            "linear": Capability(missing=_NO_LINEAR),
        }

    def missing(self) -> list[str]:
        """Why there are no kernels."""
        return [not_built_reason()] if self.kernels() is None else []

    def _against_size(self, size: EncoderSize) -> list[str]:
        kernels = self.kernels()
        return [] if kernels is None else list(kernels.encoder_unsupported_reasons(*size))

    def kernels(self) -> Any:
        """The native functions, or None where they were not built."""
        return getattr(native_module.module, "cuda", None)

    def device_reasons(self) -> list[str]:
        """Why torch's current CUDA device, if there is one, cannot run them."""
        return gpu.unmet(takes_amd=False) or gpu.without_code(
            getattr(native_module.module, "cuda_build", "")
        )

    def variant(self) -> str:
        """The architecture of the current device, "sm_90"."""
        return gpu.architecture()

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        """Run the op ``encoder`` or ``request_scoring``.

        By one launch; by two where a request shares its users' parts. Beyond d_model 128 by
        1 + 2 x num_layers.
        """
        device = call.x.device
        model, packed = call.weight_set.derived(
            ("cuda", call.options, device), self._pack_encoder, call
        )
        return run_encoder(self.ops, call, model, packed)

    def _pack_encoder(self, call: EncoderCall) -> tuple[Tensor, Tensor]:
        model, packed = self.ops.pack_encoder_cuda(call.weights, *call.options)
        return model, packed.to(call.x.device)

    def resilient_batch_norm(self, call: ResilientBatchNormCall, variant: str) -> Tensor:
        """Run the op ``resilient_batch_norm`` by one launch."""
        tensors = call[:5]  # read where they are: nothing is packed, and the host does not wait
        return self.ops.resilient_batch_norm_cuda(  # type: ignore[no-any-return]
            *tensors, *call.options
        )

    def linear(self, call: LinearCall, variant: str) -> Tensor:
        """Never called: its `Capability` is missing."""
        raise AssertionError(_NO_LINEAR)


def not_built_reason() -> str:
    """Why the native library has no CUDA kernels."""
    native = native_module.module
    if native is None:
        return native_module.import_error or "the native module is missing"
    return f"the CUDA kernels were not built: {native.cuda_missing}"
