"""How the tests run the Triton backend: interpreted, through the op, on CPU tensors."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkernels import backends
from seqkernels.backends.call import EncoderCall
from seqkernels.backends.triton import TritonBackend, kernels
from seqkernels.testing import Closeness, EncoderCase, EncoderProblem, assert_close_to_oracle
from tests.backends.encoder_runs import oracle
from tests.backends.test_request_scoring import Request
from tests.triton.interpreter import launches, repaired


class InterpretedBackend(TritonBackend):
    """Takes CPU tensors and cuts problems as for one architecture."""

    devices = ("cpu",)

    def __init__(self, arch: str, computes_padding: bool | None = None) -> None:
        self.arch = arch
        self.computes_padding = computes_padding  # what a byte on the device says of each call

    def device_reasons(self) -> list[str]:
        return []

    def variant(self) -> str:
        return self.arch

    def on(self, tensor: Tensor) -> AbstractContextManager[object]:
        return nullcontext()

    def encoder(self, call: EncoderCall, variant: str) -> Tensor:
        if self.computes_padding is not None:
            call = call._replace(computes_padding=torch.tensor([self.computes_padding]))
        return super().encoder(call, variant)


@contextmanager
def interpreted(arch: str = "sm_80", computes_padding: bool | None = None) -> Iterator[None]:
    """The op's backend "triton" is the interpreted one, and fresh memory is NaN."""
    with pytest.MonkeyPatch.context() as patch, repaired():
        others = tuple(b for b in backends.BACKENDS if b.name != "triton")
        patch.setattr(backends, "BACKENDS", (InterpretedBackend(arch, computes_padding), *others))
        backends._choices.clear()
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.ones(1).new_empty(1).isnan()
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            backends._choices.clear()


def run(
    problem: EncoderProblem, arch: str = "sm_80", computes_padding: bool | None = None
) -> Tensor:
    """The op, interpreted; at most two launches a layer."""
    launches.clear()
    with interpreted(arch, computes_padding), torch.inference_mode():
        result = problem.run("triton")
    assert len(launches) <= 2 * (len(problem.weights) // 12)
    assert bool(launches) == (len(problem.x) > 0)
    return result


def score(request: Request, arch: str = "sm_80", **changes: Any) -> Tensor:
    """The op ``request_scoring``, interpreted; at most one launch more."""
    launches.clear()
    direct.clear()
    with interpreted(arch), pytest.MonkeyPatch.context() as patch:
        _count_direct(patch)
        result = request.score("triton", **changes)
    assert len(launches) <= 2 * (len(request.problem.weights) // 12) + shares_users()
    return result


def shares_users() -> bool:
    """Whether the last call computed the users' part of the first layer for itself."""
    assert ("prepare_users" in launches) == ("attention_shared" in launches)
    return launches[:2] == ["prepare_users", "attention_shared"]


#: A line for each program of `attention_shared` that took the direct path, in the last call.
direct: list[None] = []


def _count_direct(patch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"{kernels.__name__}.request_scoring")
    attend_at_once = module.attend_at_once

    def counted(*arguments: Any) -> None:
        direct.append(None)
        attend_at_once(*arguments)

    patch.setattr(module, "attend_at_once", counted)


def check(case: EncoderCase, arch: str = "sm_80") -> Closeness:
    """Hold the interpreted kernels to the numerics rule on a case."""
    problems, golden, low_precision = oracle(case)
    results = [run(problem, arch) for problem in problems]
    for result, problem in zip(results, problems, strict=True):
        assert result.dtype == problem.x.dtype
    return assert_close_to_oracle(results, golden, low_precision, label=str(case))
