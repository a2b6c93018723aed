"""The GPU kernels on the GPU at hand: the grid of the emulated ones, and what only a GPU shows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkernels import backends, ops
from seqkernels.testing import EncoderCase, EncoderProblem, assert_close_to_oracle, check_encoder
from tests.backends.test_request_scoring import Request
from tests.backends.test_resilient_batch_norm import by_channel, definition
from tests.channel_norms import channel_norm, rounded
from tests.triton.grid import grid_cases

LONG = EncoderCase(length=517, num_layers=1, mask="holes", poison=math.nan)


def gpu_backends() -> list[Any]:
    """Each GPU backend; one that cannot run here is skipped, with its reasons."""
    parameters = []
    for backend in backends.BACKENDS:
        if "cuda" in backend.devices:
            reasons = backend.reasons(backends.Problem("encoder", "cuda", torch.bfloat16))
            marks = [pytest.mark.skip(reason="; ".join(reasons))] if reasons else []
            parameters.append(pytest.param(backend.name, marks=marks))
    return parameters


pytestmark = pytest.mark.parametrize("backend", gpu_backends())


def move(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cuda()


def on_gpu(problem: EncoderProblem) -> EncoderProblem:
    return dataclasses.replace(
        problem,
        x=problem.x.cuda(),
        candidate=move(problem.candidate),
        weights=tuple(move(w) for w in problem.weights),
        key_padding_mask=move(problem.key_padding_mask),
        lengths=move(problem.lengths),
    )


def run(problem: EncoderProblem, backend: str) -> Tensor:
    with torch.inference_mode():
        return on_gpu(problem).run(backend).cpu()


@pytest.mark.parametrize("case", grid_cases(), ids=lambda case: f"grid{case.seed}")
def test_grid(case: EncoderCase, backend: str) -> None:
    check_encoder(case, lambda problem: run(problem, backend))


@pytest.mark.parametrize("norm_first", [False, True])
def test_long(norm_first: bool, backend: str) -> None:
    case = dataclasses.replace(LONG, norm_first=norm_first)
    check_encoder(case, lambda problem: run(problem, backend))


@pytest.mark.parametrize("length", [100, 300])
def test_equal_bits_again_and_alone(length: int, backend: str) -> None:
    """No block's result depends on when it ran, or beside which."""
    problem = on_gpu(EncoderCase(batch=64, length=length, num_layers=1).problem())
    with torch.inference_mode():
        first = problem.run(backend)
        assert all(torch.equal(problem.run(backend), first) for _ in range(20))
        alone = dataclasses.replace(problem, x=problem.x[5:6]).run(backend)
    assert torch.equal(alone, first[5:6])


def request_on_gpu(request: Request) -> Request:
    return Request(on_gpu(request.problem), request.candidates.cuda(), request.user_index.cuda())


@pytest.mark.parametrize("op", ["encoder", "request_scoring"])
def test_a_graph_captures_it(op: str, backend: str) -> None:
    case = EncoderCase(
        batch=4, fusion="concat", latest_k=8, pool="max", mask="right", mask_form="lengths"
    )
    problem = on_gpu(case.problem())
    request = request_on_gpu(Request.draw(case, 8))

    def forward() -> Tensor:
        return problem.run(backend) if op == "encoder" else request.score(backend)

    with torch.inference_mode():
        expected = forward()  # packs, compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward()
        captured.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_request_scoring(backend: str) -> None:
    case = EncoderCase(length=60, fusion="concat", latest_k=10, pool="max", mask="right")
    request = Request.draw(case, 64)
    repeated = request.repeated()
    result = request_on_gpu(request).score(backend)
    assert_close_to_oracle(result.cpu(), repeated.golden(), repeated.low_precision())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4097, 256), (64, 35), (9, 5, 100)], ids=str)
def test_batch_norm(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    norm = channel_norm(shape[1], bounded=True)
    x = rounded(torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    tensors = (move(t) for t in norm[:4])
    with torch.inference_mode():
        y = ops.resilient_batch_norm(x.cuda(), *tensors, *norm[4:], "relu", 0.2, backend).cpu()
    golden, low = (definition(x.to(d), norm, "relu") for d in (torch.float64, torch.bfloat16))
    assert_close_to_oracle(by_channel(y), by_channel(golden), by_channel(low))
