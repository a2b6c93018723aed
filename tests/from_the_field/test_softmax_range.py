"""Attention whose weights times values leave the range of fp32, where those of torch do not."""

from __future__ import annotations

import pytest

from seqkernels.testing import assert_close_to_oracle
from tests.backends import test_cuda as on_cuda
from tests.backends.encoder_runs import on_each_isa, one_sided_problem, run


@on_each_isa
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["large", "small"])
def test_weights_times_values_out_of_range(sign: float, isa: str) -> None:
    problem = one_sided_problem(sign)
    assert_close_to_oracle(run(problem, isa), problem.golden(), problem.low_precision())


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["large", "small"])
def test_weights_times_values_out_of_range_on_cuda(sign: float) -> None:
    problem = one_sided_problem(sign)
    assert_close_to_oracle(on_cuda.run(problem), problem.golden(), problem.low_precision())
