"""The repaired interpreter does what it promises; without these the other tests prove little."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.triton.interpreter import narrow, repaired, widen


@triton.jit
def _convert(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _multiply(a, b, y, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None] * N, tl.arange(0, N)[None, :]
    tl.store(y + i + j, tl.dot(tl.load(a + i + j), tl.load(b + i + j)))


@triton.jit
def _arithmetic(x, y, WHICH: tl.constexpr):
    i = tl.arange(0, 16)
    value = tl.load(x + i)
    if WHICH == 0:
        value = value + value
    elif WHICH == 1:
        value = value * 2.0
    elif WHICH == 2:
        value = -value
    elif WHICH == 3:
        value = tl.abs(value)
    else:
        value = tl.zeros([16], tl.bfloat16) + tl.sum(value, 0)
    tl.store(y + i, value)


@triton.jit
def _copy(x, y, n, SHIFT: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i + SHIFT, i < n), i < n)


@triton.jit
def _store_twice(y, ACROSS: tl.constexpr):
    where = tl.program_id(0) * 0 if ACROSS else tl.arange(0, 16) // 2
    tl.store(y + where, (where * 0).to(tl.float32))


@triton.jit
def _pass_on(x, BACKWARDS: tl.constexpr):
    p = tl.program_id(0)
    value = tl.load(x + (p + 1 if BACKWARDS else tl.maximum(p - 1, 0)))
    tl.store(x + p, value + 1.0)


def test_conversions_round_to_nearest() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    bits[:6] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x00000001, 0x80000000]
    x = torch.from_numpy(bits.view(np.float32))
    y = torch.empty(4096, dtype=torch.bfloat16)
    with repaired():
        _convert[(1,)](x, y, 4096)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(4096)
    with repaired():
        _convert[(1,)](y, back, 4096)
    torch.testing.assert_close(back, y.float(), rtol=0, atol=0, equal_nan=True)
    assert np.array_equal(widen(narrow(x.numpy())), x.bfloat16().float().numpy(), equal_nan=True)


def test_products_widen_their_operands() -> None:
    a, b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    y = torch.empty(32, 32)
    with repaired():
        _multiply[(1,)](a, b, y, 32)
    torch.testing.assert_close(y, a.float() @ b.float())


def test_products_of_fp32_are_refused() -> None:
    a = torch.randn(16, 16)
    with repaired(), pytest.raises(InterpreterError, match="not bf16 into fp32"):
        _multiply[(1,)](a, a, torch.empty(16, 16), 16)


@pytest.mark.parametrize("which", range(5))
def test_other_arithmetic_on_bf16_is_refused(which: int) -> None:
    x, y = torch.ones(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    with repaired(), pytest.raises(InterpreterError, match="on bf16: only products take it"):
        _arithmetic[(1,)](x, y, which)


def test_reads_and_writes_stay_inside() -> None:
    x, y = torch.ones(16), torch.zeros(16)
    with repaired():
        _copy[(1,)](x, y, 16, 0)
        assert y.sum() == 16
        for shift in (1, -1, 1000):
            with pytest.raises(InterpreterError, match="load of"):
                _copy[(1,)](x, y, 16, shift)
        with pytest.raises(InterpreterError, match="store of"):
            _copy[(1,)](x, y[:15].clone(), 16, 0)
        _copy[(1,)](x[:15].clone(), y[:15].clone(), 15, 0)  # the mask keeps it inside


def test_what_no_load_fills_is_not_zero() -> None:
    x, y = torch.ones(16), torch.zeros(16)
    with repaired():
        _copy[(1,)](x, y, 16, 0)
        kept = y.clone()
        _unfilled[(1,)](x, y)
    assert kept.sum() == 16
    assert y.isnan().all()


@triton.jit
def _unfilled(x, y):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i, i < 0))


@pytest.mark.parametrize("across", [False, True])
def test_an_address_is_stored_once(across: bool) -> None:
    with repaired(), pytest.raises(InterpreterError, match="stored twice"):
        _store_twice[(2 if across else 1,)](torch.zeros(16), across)


@pytest.mark.parametrize("backwards", [False, True])
def test_programs_do_not_talk(backwards: bool) -> None:
    with repaired(), pytest.raises(InterpreterError, match="another program"):
        _pass_on[(4,)](torch.zeros(16), backwards)


def test_the_stock_interpreter_needs_the_repair() -> None:
    """Once this fails, Triton does it itself and the repair can go."""
    x, y = torch.tensor([1.0 + 2**-8 + 2**-9] * 16), torch.empty(16, dtype=torch.bfloat16)
    _convert[(1,)](x, y, 16)
    assert y[0] != x.bfloat16()[0]
