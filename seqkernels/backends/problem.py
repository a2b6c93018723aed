"""What a backend is asked before a call, and what its kernels take, as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

#: What a call may ask for beyond sizes and dtypes, as a reason against a backend without it.
FEATURES = {
    "bias": "key_padding_mask holds values other than 0 and those below -9000.0, which are added "
    "to the scores",
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

    def reasons(self, problem: Problem) -> list[str]:
        """Why they do not take this problem, empty if they do."""
        reasons = []
        if problem.dtype not in self.dtypes:
            known = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            reasons.append(f"dtype {problem.dtype}, it takes {known}")
        reasons += [FEATURES[name] for name in problem.features if name not in self.features]
        if problem.size is not None:
            reasons += self.against_size(problem.size)
        return reasons
