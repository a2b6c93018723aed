"""What a backend is asked before a call, and what its kernels take, as data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from seqkernels.reference.encoder import IGNORED_BELOW

#: What a call may ask for beyond sizes and dtypes, as a reason against a backend without it.
FEATURES = {
    "bias": f"key_padding_mask holds values other than 0 and those below {IGNORED_BELOW}, which "
    "are added to the scores",
}


class EncoderSize(NamedTuple):
    """What of an encoder decides which kernels take it."""

    d_model: int
    nhead: int
    dim_feedforward: int
    num_layers: int


class Problem(NamedTuple):
    """A call, as far as a backend's answer depends on it."""

    op: str
    device: str  # its type
    dtype: torch.dtype
    size: EncoderSize | None = None
    features: tuple[str, ...] = ()  # of `FEATURES`


def _takes_all(_: EncoderSize) -> list[str]:
    return []


class Capability(NamedTuple):
    """What a backend's kernels of an op take."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    features: tuple[str, ...] = ()
    against_size: Callable[[EncoderSize], list[str]] = _takes_all
    missing: str = ""  # why there is no kernel, whatever the problem

    def reasons(self, problem: Problem) -> list[str]:
        """Why they do not take this problem, empty if they do."""
        reasons = []
        if problem.dtype not in self.dtypes:
            known = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            reasons.append(f"dtype {problem.dtype}, it takes {known}")
        reasons += [FEATURES[name] for name in problem.features if name not in self.features]
        if problem.size is not None:
            reasons += self.against_size(problem.size)
        return [*reasons, self.missing] if self.missing else reasons


class KernelBackend(ABC):
    """What the backends with kernels of their own have in common."""

    devices: tuple[str, ...]  # types of the devices it has kernels for
    tensors: str  # these devices' tensors, in words
    capabilities: Mapping[str, Capability]  # of each op

    @abstractmethod
    def missing(self) -> list[str]:
        """Why there are no kernels at all, empty if there are."""

    def device_reasons(self) -> list[str]:
        """Why the current device, if there is one, cannot run them."""
        return []

    def reasons(self, problem: Problem) -> list[str]:
        """Every reason why it cannot run a problem, empty if it can."""
        reasons = self.missing()
        if problem.device not in self.devices:
            reasons.append(f"tensors on {problem.device}, it takes {self.tensors}")
        return reasons + self.device_reasons() + self.capabilities[problem.op].reasons(problem)
