"""The CUDA backend on machines without a GPU: its kernels, compiled for the host, on CPU tensors.

Everything else is what runs on a GPU: dispatch, packing, the binding, the launchers' plans.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends.call import EncoderCall
from seqkernels.backends.cuda import CudaBackend
from tests.cpp.building import CUDA_MODULE, SHIPPED, build


@functools.cache
def emulation() -> Any:
    """The module `_cuda_emulation`, compiled where its sources changed."""
    folder = build(SHIPPED, (CUDA_MODULE,))
    (path,) = folder.glob("_cuda_emulation*.so")
    return _load(path)


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("_cuda_emulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ops_error() == ""
    return module


class EmulatedCuda(CudaBackend):
    """Takes CPU tensors for device memory."""

    devices = ("cpu",)

    def __init__(self, computes_padding: bool | None = None) -> None:
        super().__init__()
        self.ops = torch.ops.seqkernels_emulated
        self.computes_padding = computes_padding  # what a byte on the device says of each call

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        if self.computes_padding is not None:
            call = call._replace(computes_padding=torch.tensor([self.computes_padding]))
        return super().encoder(call, variant)

    def kernels(self) -> Any:
        return emulation()

    def variant(self) -> str:
        return "emulated"

    def device_reasons(self) -> list[str]:
        return []


@contextmanager
def emulated_cuda(
    order: str = "forward", seed: int = 0, computes_padding: bool | None = None
) -> Iterator[Any]:
    """Let ``backend="cuda"`` mean the emulation, and count its launches."""
    module = emulation()
    module.set_schedule(order, seed)
    before = backends.BACKENDS
    backends._choices.clear()
    backends.BACKENDS = (EmulatedCuda(computes_padding), *(b for b in before if b.name != "cuda"))
    try:
        with torch.inference_mode():
            yield module
    finally:
        backends.BACKENDS = before
        backends._choices.clear()
