"""The op ``request_scoring`` on every instruction set: numerics, guard, bits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkernels import backends, ops, settings
from seqkernels.testing import EncoderCase, EncoderProblem, assert_close_to_oracle
from tests.backends.encoder_runs import on_each_isa

RESTS = (
    *("nhead", "activation", "negative_slope", "norm_first", "layer_norm_eps", "final_norm_eps"),
    *("fusion", "padding", "order", "latest_k", "pool"),
)


@dataclasses.dataclass(frozen=True)
class Request:
    """Users of an encoder problem and candidates of their own."""

    problem: EncoderProblem
    candidates: Tensor
    user_index: Tensor

    @classmethod
    def draw(cls, case: EncoderCase, count: int, scale: float = 1.0) -> Request:
        problem = case.problem()
        g = torch.Generator().manual_seed(100 + case.seed)
        assert problem.candidate is not None
        shape = (count, problem.candidate.shape[1])
        candidates = (scale * torch.randn(shape, generator=g)).bfloat16().to(problem.x.dtype)
        return cls(problem, candidates, torch.randint(case.batch, (count,), generator=g))

    def score(self, backend: str, **changes: Any) -> Tensor:
        given = {"candidates": self.candidates, "user_index": self.user_index} | changes
        p = self.problem
        with torch.inference_mode():
            return ops.request_scoring(
                p.x,
                given["candidates"],
                given["user_index"],
                list(p.weights),
                p.key_padding_mask,
                p.lengths,
                *(p.options[name] for name in RESTS),
                backend,
            )

    def run(self, isa: str, **changes: Any) -> Tensor:
        label = f"cpu/{isa}"
        before = backends.calls[label]
        with settings.override(isa=isa):
            y = self.score("cpu", **changes)
        assert backends.calls[label] == before + (len(y) > 0)
        return y

    def repeated(self) -> EncoderProblem:
        """The same as the encoder's problem: the user of each candidate."""
        p, i = self.problem, self.user_index
        return dataclasses.replace(
            p,
            x=p.x[i],
            candidate=self.candidates,
            key_padding_mask=None if p.key_padding_mask is None else p.key_padding_mask[i],
            lengths=None if p.lengths is None else p.lengths[i],
        )


CASES = [
    EncoderCase(length=60, fusion="concat", latest_k=10, pool="max", mask="right"),
    EncoderCase(length=100, fusion="concat", latest_k=8),
    EncoderCase(length=37, fusion="concat", mask="holes", num_layers=1),
    EncoderCase(length=37, fusion="concat", mask="left", num_layers=1, latest_k=2),
    EncoderCase(length=50, fusion="concat", mask="right", mask_form="lengths", num_layers=3),
    EncoderCase(
        length=33, d_model=24, nhead=3, dim_feedforward=10, candidate_dim=5, fusion="concat",
        padding="compute", mask="left", latest_k=3, activation="gelu",
    ),
    EncoderCase(
        length=17, d_model=20, nhead=2, dim_feedforward=7, candidate_dim=7, fusion="concat",
        bias=False, affine=False, order="latest_last", latest_k=3, pool="max", mask="right",
    ),
    EncoderCase(length=16, d_model=64, nhead=8, fusion="concat", mask="empty", latest_k=2),
    EncoderCase(length=1, fusion="concat", latest_k=2, pool="max"),
    EncoderCase(length=48, d_model=130, nhead=1, dim_feedforward=16, candidate_dim=1,
                fusion="concat", final_norm=True, activation="leaky_relu"),
    EncoderCase(length=40, fusion="concat", dtype=torch.bfloat16, mask="right", latest_k=4),
    EncoderCase(length=40, fusion="concat", layout="strided", mask="right", poison=math.nan),
    EncoderCase(length=33, fusion="concat", norm_first=True, mask="right", latest_k=4),
    EncoderCase(length=33, fusion="append", mask="right", latest_k=4, pool="max"),
    EncoderCase(length=33, fusion="append", norm_first=True, order="latest_last"),
]  # fmt: skip


@on_each_isa
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numerics(case: EncoderCase, isa: str) -> None:
    """The rule of the encoder, for each candidate; short ones over several draws."""
    draws = [Request.draw(one, 7) for one in case.draws()]
    repeated = [request.repeated() for request in draws]
    assert_close_to_oracle(
        [request.run(isa) for request in draws],
        [problem.golden() for problem in repeated],
        [problem.low_precision() for problem in repeated],
        label=f"{isa}: {case}",
    )


@on_each_isa
@pytest.mark.parametrize("scale", [200.0, 1e4])
def test_terms_that_do_not_fit_together_take_the_direct_path(scale: float, isa: str) -> None:
    """Scores of a candidate with the keys far beyond the user's own, in both directions."""
    case = EncoderCase(
        batch=2, length=40, fusion="concat", num_layers=1, sharpen=20.0, latest_k=8, pool="max"
    )
    draws = [Request.draw(one, 6, scale) for one in case.draws()]
    repeated = [request.repeated() for request in draws]
    results = [request.run(isa) for request in draws]
    assert all(y.isfinite().all() for y in results)
    assert_close_to_oracle(
        results,
        [problem.golden() for problem in repeated],
        [problem.low_precision() for problem in repeated],
    )


@on_each_isa
@pytest.mark.parametrize(
    "case",
    [
        EncoderCase(length=60, fusion="concat", latest_k=8, pool="max", mask="right"),
        EncoderCase(length=20, fusion="append", latest_k=2),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_company(case: EncoderCase, isa: str) -> None:
    """Other candidates, their order, their number, other users, threads: the same bits."""
    request = Request.draw(case, 40 if isa.endswith("emulated") else 150)
    whole = request.run(isa)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    shuffled = request.run(
        isa, candidates=request.candidates[order], user_index=request.user_index[order]
    )
    assert torch.equal(shuffled, whole[order])
    for n in (0, 17, 39):
        one = request.run(
            isa, candidates=request.candidates[n : n + 1], user_index=request.user_index[n : n + 1]
        )
        assert torch.equal(one, whole[n : n + 1])
    twice = request.run(
        isa,
        candidates=torch.cat([request.candidates] * 2),
        user_index=torch.cat([request.user_index] * 2),
    )
    assert torch.equal(twice, torch.cat([whole] * 2))  # equal candidates, equal bits
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(request.run(isa), whole)
    finally:
        torch.set_num_threads(threads)


@on_each_isa
def test_what_padded_slots_hold_does_not_matter(isa: str) -> None:
    case = EncoderCase(length=30, fusion="concat", latest_k=4, pool="max", mask="holes")
    clean, poisoned = (
        Request.draw(dataclasses.replace(case, poison=poison), 9) for poison in (0.0, math.nan)
    )
    assert torch.equal(clean.run(isa), poisoned.run(isa))


@on_each_isa
def test_users_without_candidates_and_without_events(isa: str) -> None:
    case = EncoderCase(batch=4, length=20, fusion="concat", mask="empty", latest_k=4, pool="max")
    request = Request.draw(case, 12)
    index = torch.full((12,), 3)
    index[5] = 0  # has no event; users 1 and 2 have no candidate
    request = dataclasses.replace(request, user_index=index)
    y = request.run(isa)
    assert y.isfinite().all()
    nothing = request.run(isa, candidates=request.candidates[:0], user_index=index[:0])
    assert nothing.shape == (0, y.shape[1])


def test_a_nan_in_a_candidate_stays_with_it() -> None:
    case = EncoderCase(length=30, fusion="concat", latest_k=4, pool="max")
    request = Request.draw(case, 9)
    candidates = request.candidates.clone()
    candidates[4, 3] = math.nan
    isa = next(s.name for s in backends.cpu.isa_table() if s.chosen)
    y, clean = request.run(isa, candidates=candidates), request.run(isa)
    assert y[4].isnan().any()
    rest = torch.arange(9) != 4
    assert torch.equal(y[rest], clean[rest])
