"""How the tests run the Triton backend: interpreted, through the op, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends.triton import TritonBackend
from seqkernels.testing import Closeness, EncoderCase, EncoderProblem, assert_close_to_oracle
from tests.backends.encoder_runs import oracle
from tests.triton.interpreter import launches, repaired


class InterpretedBackend(TritonBackend):
    """Takes CPU tensors and cuts problems as for one architecture."""

    devices = ("cpu",)

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def variant(self) -> str:
        return self.arch


@contextmanager
def interpreted(arch: str = "sm_80") -> Iterator[None]:
    """The op's backend "triton" is the interpreted one, and fresh memory is NaN."""
    with pytest.MonkeyPatch.context() as patch, repaired():
        others = tuple(b for b in backends.BACKENDS if b.name != "triton")
        patch.setattr(backends, "BACKENDS", (InterpretedBackend(arch), *others))
        backends._choices.clear()
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.ones(1).new_empty(1).isnan()
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            backends._choices.clear()


def run(problem: EncoderProblem, arch: str = "sm_80") -> Tensor:
    """The op, interpreted; at most two launches a layer."""
    launches.clear()
    with interpreted(arch), torch.inference_mode():
        result = problem.run("triton")
    assert len(launches) <= 2 * (len(problem.weights) // 12)
    assert bool(launches) == (len(problem.x) > 0)
    return result


def check(case: EncoderCase, arch: str = "sm_80") -> Closeness:
    """Hold the interpreted kernels to the numerics rule on a case."""
    problems, golden, low_precision = oracle(case)
    results = [run(problem, arch) for problem in problems]
    for result, problem in zip(results, problems, strict=True):
        assert result.dtype == problem.x.dtype
    return assert_close_to_oracle(results, golden, low_precision, label=str(case))
