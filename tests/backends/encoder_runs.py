"""How the tests of the encoder run it: on which instruction sets, on which grid of problems."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkernels import backends, settings
from seqkernels.backends import native_module
from seqkernels.testing import Closeness, EncoderCase, EncoderProblem, assert_close_to_oracle
from tests.pairwise import pairwise_cases


def instruction_sets() -> list[Any]:
    """Every instruction set compiled in as a parameter; those that cannot run here are skipped."""
    module = native_module.module
    if module is None:
        reason = native_module.import_error or "the native module is missing"
        return [pytest.param("none", marks=pytest.mark.skip(reason=reason))]
    parameters = []
    for name in module.isa_names():
        reasons = "; ".join(module.isa_unsupported_reasons(name))
        marks = [pytest.mark.skip(reason=f"{name}: {reasons}")] if reasons else []
        parameters.append(pytest.param(name, marks=marks))
    return parameters


on_each_isa = pytest.mark.parametrize("isa", instruction_sets())


def run(problem: EncoderProblem, isa: str) -> Tensor:
    """The op on one instruction set, of which the backend's own count is proof."""
    label = f"cpu/{isa}"
    before = backends.calls[label]
    with settings.override(isa=isa), torch.inference_mode():
        result = problem.run("cpu")
    assert backends.calls[label] == before + (len(problem.x) > 0)
    return result


@functools.cache
def oracle(case: EncoderCase) -> tuple[list[EncoderProblem], list[Tensor], list[Tensor]]:
    """Problems, golden results and yardsticks of a case, shared by the instruction sets."""
    problems = [draw.problem() for draw in case.draws()]
    return (
        problems,
        [problem.golden() for problem in problems],
        [problem.low_precision() for problem in problems],
    )


def check(case: EncoderCase, isa: str) -> Closeness:
    """Hold one instruction set to the numerics rule on a case."""
    problems, golden, low_precision = oracle(case)
    results = [run(problem, isa) for problem in problems]
    for result, problem in zip(results, problems, strict=True):
        assert result.dtype == problem.x.dtype
    return assert_close_to_oracle(results, golden, low_precision, label=f"{isa}: {case}")


def one_sided_problem(sign: float) -> EncoderProblem:
    """Logits near 60 and values of 1e12, or logits near -60 and values of 1e-24.

    So no maximum has to be subtracted for the exponentials' sake, but for the values'. The first
    feature of each token is a constant, and that of q and of k in the first head a multiple of it.
    """
    unit, value_scale, key = (1.0, 1e12, 26.0) if sign > 0 else (2.0**-80, 1.0, 28.0)
    case = EncoderCase(num_layers=1, length=50, mask="holes", scale=unit, bias=sign > 0)
    problem = case.problem()
    x = problem.x.clone()
    x[..., 0] = unit
    w_in, b_in, *rest = problem.weights
    assert w_in is not None
    w_in = w_in.clone()
    w_in[:, 0] = 0.0
    w_in[0], w_in[96] = 0.0, 0.0
    w_in[0, 0], w_in[96, 0] = 16.0 * sign / unit, key / unit
    w_in[192:] *= value_scale
    if b_in is not None:
        b_in = b_in.clone()
        b_in[0] = 0.0
        b_in[192:] *= value_scale
    made = dataclasses.replace(problem, x=x, weights=(w_in, b_in, *rest))
    sums = _log2_sums(made)
    assert ((sign * sums > 80) & (sign * sums < 100)).all()
    return made


def _log2_sums(problem: EncoderProblem) -> Tensor:
    """Of the first head's exponentials over each query's valid keys."""
    w_in, b_in, *_ = problem.weights
    assert w_in is not None
    projected = problem.x.double() @ w_in[:192].double().T
    if b_in is not None:
        projected += b_in[:192].double()
    q, k = projected[..., :48], projected[..., 96:144]
    mask = problem.key_padding_mask
    assert mask is not None
    scores = (q @ k.transpose(1, 2) / math.sqrt(48)).masked_fill(mask[:, None], -math.inf)
    return scores.logsumexp(-1)[~mask] / math.log(2)


# Problems whose padding is answered by a byte on the device, in sizes that emulations take.
_BASE = EncoderCase(length=40, batch=3, num_layers=2)
FLAGGED = {
    "right": dataclasses.replace(_BASE, mask="right", final_norm=True),
    "left": dataclasses.replace(_BASE, mask="left", norm_first=True),
    "holes": dataclasses.replace(_BASE, mask="holes", norm_first=True, final_norm=True),
    "full": dataclasses.replace(_BASE, mask="right", valid=(40, 40, 40)),
    "empty": dataclasses.replace(_BASE, mask="empty", poison=math.nan, dtype=torch.bfloat16),
    "all": dataclasses.replace(_BASE, mask="all", d_model=64, nhead=1, final_norm=True),
    "lengths": dataclasses.replace(_BASE, mask="right", mask_form="lengths", fusion="append"),
    "summary": dataclasses.replace(_BASE, mask="holes", latest_k=8, pool="max", fusion="concat"),
    "window": dataclasses.replace(_BASE, mask="left", latest_k=20, order="latest_last"),
    "wide": dataclasses.replace(
        _BASE, mask="holes", d_model=160, dim_feedforward=64, final_norm=True, norm_first=True
    ),
    "long": dataclasses.replace(_BASE, mask="holes", length=300, batch=1, num_layers=1),
}


def flagged(name: str, computes_padding: bool) -> tuple[EncoderCase, list[EncoderProblem]]:
    """A case with its own answer, and its problems with the other one, which the byte overrules."""
    answers = ("zero", "compute")
    case = dataclasses.replace(FLAGGED[name], padding=answers[computes_padding])
    return case, [
        dataclasses.replace(p, options=p.options | {"padding": answers[not computes_padding]})
        for p in oracle(case)[0]
    ]


# Every pair of values of two factors meets in at least one case of the grid.
_FACTORS: dict[str, list[Any]] = {
    "shape": [  # d_model, nhead, dim_feedforward
        (96, 2, 32),  # head_dim 48
        (64, 1, 32),  # 64
        (128, 8, 128),  # 16
        (64, 8, 2048),  # 8
        (160, 2, 48),  # 80
        (24, 2, 33),  # 12
        (20, 2, 7),
        (24, 3, 10),
        (130, 1, 16),
        (7, 7, 5),  # 1
    ],
    "length": [1, 7, 16, 17, 99, 100, 101, 128, 200],
    "num_layers": [1, 2, 3],
    "activation": ["relu", "gelu", "gelu_tanh", "leaky_relu"],
    "norm_first": [False, True],
    "weights": ["all", "no bias", "no affine", "final norm", "final norm, no bias"],
    "fusion": ["none", "concat", "append"],
    "padding": ["zero", "compute", "exclude"],
    "order": ["latest_first", "latest_last"],
    "summary": [  # latest_k, pool
        (None, "none"),
        (8, "max"),
        (0, "max"),
        (3, "none"),
        (203, "max"),
    ],
    "mask": ["none", "right", "left", "holes", "empty", "all"],
    "mask_form": ["bool", "float", "lengths"],
    "poison": [None, math.nan, math.inf],
    "scale": [1.0, 1e4, 1e-3],
    "dtype": [torch.float32, torch.bfloat16],
    "representable": [True, False],
    "layout": ["contiguous", "offset", "strided", "transposed", "last_dim"],
    "batch": [3, 1],
}


def _legal(row: dict[str, Any]) -> bool:
    if row["padding"] == "exclude" and row["summary"][1] != "max":
        return False
    if row["mask_form"] == "lengths" and row["mask"] in ("left", "holes"):
        return False
    if row["poison"] is not None and row["mask"] == "none":
        return False
    if row["shape"][2] > 1000 and row["length"] > 17:
        return False  # takes long, and shows nothing that shorter ones do not
    return row["shape"][0] > 7 or row["length"] > 1  # needs too many draws


def grid_cases() -> list[EncoderCase]:
    """The grid."""
    return pairwise_cases(_FACTORS, _legal, 40)
