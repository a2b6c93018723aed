"""The backend's face: whether it can run, and one method for each op it has kernels for."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib import metadata

from torch import Tensor

from seqkernels.backends import gpu
from seqkernels.backends.call import EncoderCall, LinearCall, ResilientBatchNormCall
from seqkernels.backends.problem import Capability, KernelBackend
from seqkernels.backends.triton import batch_norm, encoder

_NO_LINEAR = "there is no Triton kernel for linear layers; torch's own is as fast"
_LOWEST = (3, 6)  # with which the tests pass
_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")


class TritonBackend(KernelBackend):
    """Runs the Triton kernels on NVIDIA and AMD GPUs."""

    name = "triton"
    devices: tuple[str, ...] = ("cuda",)  # torch calls AMD GPUs so too
    tensors = "CUDA tensors"
    capabilities: Mapping[str, Capability] = {
        "encoder": Capability(against_size=encoder.against_size),
        "request_scoring": Capability(against_size=encoder.against_size),
        "resilient_batch_norm": Capability(),
        "linear": Capability(missing=_NO_LINEAR),
    }

    def missing(self) -> list[str]:
        """Why there are no kernels."""
        return list(unmet_by_triton())

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
        """Run the op ``encoder`` or ``request_scoring``.

        By 2 x num_layers launches, and one more where a request shares its users' parts.
        """
        with self.on(call.x):
            return encoder.run(call, variant)

    def resilient_batch_norm(self, call: ResilientBatchNormCall, variant: str) -> Tensor:
        """Run the op ``resilient_batch_norm`` by one launch."""
        with self.on(call.x):
            return batch_norm.run(call)

    def linear(self, call: LinearCall, variant: str) -> Tensor:
        """Never called: its `Capability` is missing."""
        raise AssertionError(_NO_LINEAR)


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
