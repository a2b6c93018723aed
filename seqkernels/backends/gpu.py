"""What the GPU backends ask of the GPU at hand."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_LOWEST_CAPABILITY = (8, 0)  # bf16 tensor cores


def unmet(*, takes_amd: bool) -> list[str]:
    """Why torch's current GPU cannot run the kernels, empty if it can."""
    if not torch.cuda.is_available():
        built_for_one = torch.version.cuda is not None or torch.version.hip is not None
        return ["torch finds no GPU" if built_for_one else "torch was built without CUDA"]
    if torch.version.hip is not None:
        return [] if takes_amd else ["an AMD GPU, it takes NVIDIA's"]
    capability = torch.cuda.get_device_capability()
    if capability < _LOWEST_CAPABILITY:
        return [f"compute capability {capability[0]}.{capability[1]}, it needs 8.0 or more"]
    return []


def architecture() -> str:
    """Of the current GPU: "sm_90", "gfx942"."""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """The tensor's device as the current one, on which launches run."""
    if tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def without_code(built: str) -> list[str]:
    """Why kernels built for these architectures, as in "nvcc 13.0, 80-real 120", do not run here.

    Code for an architecture runs on newer ones of its generation, and its PTX ("120" without
    "-real") on all newer ones.
    """
    known = re.findall(r"\b(\d+)(\d)[af]?(-real)?(?= |$)", built.partition(",")[2])
    if not known:
        return []
    major, minor = torch.cuda.get_device_capability()
    for known_major, known_minor, real in known:
        other = (int(known_major), int(known_minor))
        if other <= (major, minor) and (other[0] == major or not real):
            return []
    names = ", ".join(f"{a}.{b}" for a, b, _ in known)
    return [f"compute capability {major}.{minor}, it was built for {names}"]
