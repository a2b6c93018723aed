"""The CUDA kernels, executed on the host, from the op down: the rule for numerics, hard values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkernels import BackendUnavailableError, backends, settings
from seqkernels.backends.cuda import CudaBackend
from seqkernels.backends.encoder_weights import PER_LAYER
from seqkernels.reference import ChannelNorm
from seqkernels.testing import EncoderCase, EncoderProblem, assert_close_to_oracle
from tests.backends.cuda_emulation import emulated_cuda
from tests.backends.encoder_runs import FLAGGED, flagged, grid_cases, oracle
from tests.backends.test_request_scoring import Request
from tests.backends.test_resilient_batch_norm import by_channel, definition, lay_out
from tests.channel_norms import apply, channel_norm, rounded
from tests.selection import every

SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]


def run(problem: EncoderProblem, *schedule: Any) -> Tensor:
    """The op on the emulation: one launch, or two a layer and one for wide models."""
    num_layers = len(problem.weights) // PER_LAYER
    launches = 1 if problem.weights[0].shape[1] <= 128 else 1 + 2 * num_layers
    with emulated_cuda(*schedule) as module:
        before = module.launches()
        result = problem.run("cuda")
        assert module.launches() == before + (launches if len(problem.x) else 0)
    return result


def emulated_cases() -> list[EncoderCase]:
    """Of the grid what the kernels take, in sizes that the emulation does in a second."""
    cases = [c for c in grid_cases() if c.d_model // c.nhead <= 128]
    return [dataclasses.replace(c, num_layers=min(c.num_layers, 2)) for c in cases]


TRANSACT = EncoderCase(
    fusion="concat", latest_k=8, pool="max", candidate_dim=32, mask="right", mask_form="lengths"
)
HARD = {
    "TransAct": dataclasses.replace(TRANSACT, batch=3),
    "lengths at strip edges": EncoderCase(
        batch=7, length=112, mask="right", valid=(1, 15, 16, 17, 100, 112, 2), poison=math.nan
    ),
    "x3": EncoderCase(sharpen=3.0, mask="right", valid=(100, 60, 40)),
    "x40": EncoderCase(sharpen=40.0, num_layers=1, batch=2),
    "1e4": EncoderCase(scale=1e4, mask="right", batch=2),
    "nobody": EncoderCase(mask="all", poison=math.nan, batch=2),
    "nobody, computed": EncoderCase(mask="all", padding="compute", batch=2),
    "some empty": EncoderCase(batch=3, mask="empty", poison=math.inf, final_norm=True),
    "long": EncoderCase(length=300, batch=1, num_layers=1, mask="holes"),
    "wide": EncoderCase(d_model=256, nhead=4, dim_feedforward=1024, length=40, mask="right"),
    "wide, TransAct": dataclasses.replace(
        TRANSACT, d_model=192, nhead=4, dim_feedforward=64, batch=2, length=60, norm_first=True
    ),
    "wider": EncoderCase(
        d_model=512, nhead=8, dim_feedforward=48, length=20, batch=1, num_layers=1, mask="holes"
    ),
    "widest": EncoderCase(
        d_model=1024, nhead=8, dim_feedforward=32, length=16, batch=1, num_layers=1
    ),
    "wide, x40": EncoderCase(d_model=192, nhead=4, sharpen=40.0, num_layers=1, batch=1),
    "wide, nobody": EncoderCase(d_model=192, mask="all", padding="compute", batch=2, length=20),
}


@pytest.mark.parametrize("case", every(4, emulated_cases()), ids=lambda case: f"grid{case.seed}")
def test_encoder_grid(case: EncoderCase) -> None:
    problems, golden, low_precision = oracle(case)
    results = [run(problem) for problem in problems]
    assert_close_to_oracle(results, golden, low_precision, label=str(case))


@pytest.mark.parametrize("name", HARD)
def test_hard(name: str) -> None:
    problems, golden, low_precision = oracle(HARD[name])
    results = [run(problem) for problem in problems]
    assert_close_to_oracle(results, golden, low_precision, label=name)


@pytest.mark.parametrize("computes_padding", [False, True])
@pytest.mark.parametrize("name", FLAGGED)
def test_padding_answered_on_the_device(name: str, computes_padding: bool) -> None:
    case, problems = flagged(name, computes_padding)
    results = [run(problem, "forward", 0, computes_padding) for problem in problems]
    assert_close_to_oracle(results, *oracle(case)[1:], label=name)
    assert torch.equal(results[0].nan_to_num(), run(oracle(case)[0][0]).nan_to_num())


@pytest.mark.parametrize("mask_form", ["bool", "float", "lengths"])
@pytest.mark.parametrize("latest_k", [None, 8])
def test_no_sequences(latest_k: int | None, mask_form: str) -> None:
    """No launch, and a result of the right shape."""
    pool = "none" if latest_k is None else "max"
    problem = EncoderCase(
        batch=0, latest_k=latest_k, pool=pool, mask="right", mask_form=mask_form
    ).problem()
    assert run(problem).shape == problem.golden().shape


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=str)
def test_schedules_give_the_same_bits(schedule: tuple[str, int]) -> None:
    case = dataclasses.replace(TRANSACT, batch=2, length=50)
    problem = case.problem()
    assert torch.equal(run(problem), run(problem, *schedule))


def test_bits_do_not_depend_on_company() -> None:
    problem = dataclasses.replace(TRANSACT, batch=3, length=40).problem()
    whole = run(problem)
    for b in range(3):
        changes = {
            name: getattr(problem, name)[b : b + 1]
            for name in ("x", "candidate", "key_padding_mask", "lengths")
            if getattr(problem, name) is not None
        }
        assert torch.equal(run(dataclasses.replace(problem, **changes)), whole[b : b + 1])


def score(request: Request, launches: int, **changes: Any) -> Tensor:
    """The op on the emulation: two launches where the user's part is shared, else one."""
    with emulated_cuda() as module:
        before = module.launches()
        result = request.score("cuda", **changes)
        assert module.launches() == before + launches
    return result


@pytest.mark.parametrize(
    ("launches", "case"),
    [
        (2, EncoderCase(length=60, fusion="concat", latest_k=10, pool="max", mask="right")),
        (2, EncoderCase(length=37, fusion="concat", mask="holes", num_layers=1, batch=1)),
        (2, EncoderCase(length=40, fusion="concat", dtype=torch.bfloat16, mask="right",
                        mask_form="lengths", latest_k=4, layout="strided", poison=math.nan)),
        (2, EncoderCase(length=33, d_model=48, nhead=2, dim_feedforward=10, candidate_dim=5,
                        fusion="concat", padding="compute", mask="left", latest_k=3)),
        (2, EncoderCase(length=17, d_model=128, nhead=4, fusion="concat", mask="empty")),
        (1, EncoderCase(length=33, fusion="append", mask="holes", latest_k=4, poison=math.nan)),
        (1, EncoderCase(length=33, fusion="concat", mask="right", latest_k=4, norm_first=True)),
        (1, EncoderCase(length=17, d_model=96, nhead=6, fusion="concat")),
    ],
    ids=str,
)  # fmt: skip
def test_request_scoring(launches: int, case: EncoderCase) -> None:
    draws = [Request.draw(one, 5) for one in case.draws()]
    repeated = [request.repeated() for request in draws]
    assert_close_to_oracle(
        [score(request, launches) for request in draws],
        [problem.golden() for problem in repeated],
        [problem.low_precision() for problem in repeated],
        label=str(case),
    )


def test_a_candidates_bits_do_not_depend_on_the_others() -> None:
    request = Request.draw(EncoderCase(length=20, fusion="concat", latest_k=4, mask="right"), 5)
    whole = score(request, 2)

    def part(first: int, end: int, launches: int) -> Tensor:
        candidates, user_index = request.candidates[first:end], request.user_index[first:end]
        return score(request, launches, candidates=candidates, user_index=user_index)

    for n in range(5):
        assert torch.equal(part(n, n + 1, 2), whole[n : n + 1])
    assert len(part(0, 0, 0)) == 0


def batch_norm(x: Tensor, norm: ChannelNorm, activation: str = "none") -> Tensor:
    with emulated_cuda() as module:
        before = module.launches()
        y = apply(x, norm, activation, "cuda")
        assert module.launches() == before + 1
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "wide rows"])
@pytest.mark.parametrize("shape", [(97, 16), (64, 35), (9, 5, 100), (30, 64, 1)], ids=str)
def test_batch_norm(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for bounded in (False, True):
        for activation in ("none", "relu", "gelu"):
            norm = channel_norm(shape[1], bounded=bounded)
            x = lay_out(rounded(torch.randn(shape, generator=g)).to(dtype), layout)
            golden = definition(x.double(), norm, activation)
            low = definition(x.bfloat16(), norm, activation)
            y = batch_norm(x, norm, activation)
            assert_close_to_oracle(by_channel(y), by_channel(golden), by_channel(low))


def test_batch_norm_stays_within_its_bounds() -> None:
    """Degenerate statistics, inputs that are no numbers: at most max_abs |g| + |b|."""
    variances = [0.0, 1e-12, 1e-42, 1.0, 1e30, math.inf, math.nan, -1.0]
    var = torch.tensor(variances)
    norm = ChannelNorm(
        torch.zeros(8), var, torch.full((8,), -2.0), torch.full((8,), 0.5), 1e-5, 1e-4, 10.0
    )
    values = torch.tensor([0.0, 1.0, -3.0, 1e6, 1e30, math.inf, -math.inf, math.nan])
    y = batch_norm(values[:, None].expand(8, 8).contiguous(), norm)
    assert (y.abs() <= 10.0 * 2.0 + 0.5).all()
    uninformative = ~var.isfinite() | (var < 0)
    assert (y[:, uninformative] == 0.5).all()
    assert (y[-1] == 0.5).all()  # NaN


def test_a_width_that_no_kernel_takes_is_a_reason() -> None:
    with emulated_cuda() as module:
        assert module.encoder_unsupported_reasons(96, 2, 32, 2) == []
        assert module.encoder_unsupported_reasons(1024, 8, 65536, 2) == []
        (width,) = module.encoder_unsupported_reasons(4096, 64, 32, 2)
        (head,) = module.encoder_unsupported_reasons(512, 2, 32, 2)
    assert width == "d_model: expected at most 1024, got 4096"
    assert head == "head_dim: expected at most 128, got 256"


def test_without_a_gpu_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = CudaBackend().reasons(backends.Problem("encoder", "cuda", torch.float64))
    assert any("CUDA" in reason for reason in reasons)
    assert "dtype torch.float64, it takes float32 and bfloat16" in reasons
    with pytest.raises(BackendUnavailableError, match="tensors on cpu, it takes CUDA tensors"):
        EncoderCase(length=3).problem().run("cuda")
    with settings.override(backend="auto"):
        choice = backends.resolve(backends.Problem("encoder", "cuda", torch.float32), "auto")
        assert choice.backend.name == "reference"
        assert "cuda" in dict(choice.rejected)
        # and nobody misses it on the CPU
        assert "cuda" not in dict(
            backends.resolve(backends.Problem("linear", "cpu", torch.half), "auto").rejected
        )
