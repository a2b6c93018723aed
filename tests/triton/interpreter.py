"""Triton's interpreter with bf16 that computes, and memory that is watched.

As shipped it does arithmetic on the bit patterns of bf16 and truncates where a GPU rounds. Here
conversions round to nearest, products widen their bf16 operands to fp32, and any other arithmetic
on bf16 is an error (the kernels keep bf16 for operands of products).

Watched: each address that a mask lets through must lie in a tensor handed to the launch, no address
may be stored twice in a launch, and none may be stored by one program and touched by another.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

_NOBODY = -1
_SEVERAL = -2
BF16 = tl.bfloat16


def widen(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bf16 bit patterns nearest to fp32 values, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(*handles: Any) -> bool:
    return any(h.dtype.scalar == BF16 for h in handles if isinstance(h, stock.TensorHandle))


class Memory:
    """Who stored and who loaded each byte of the tensors of one launch."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        self.starts = np.array(sorted(storages), np.uint64)
        sizes = [storages[int(start)] for start in self.starts]
        self.ends = self.starts + np.array(sizes, np.uint64)
        self.base = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.stored_by = np.full(self.base[-1], _NOBODY, np.int64)
        self.loaded_by = np.full(self.base[-1], _NOBODY, np.int64)

    def _places(self, what: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """Positions of the unmasked elements in the arrays of this object."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        addresses = pointers[mask].astype(np.uint64)
        if not len(addresses):
            return np.zeros(0, np.int64)
        index = np.searchsorted(self.starts, addresses, "right").astype(np.int64) - 1
        nearest = np.maximum(index, 0)
        bad = (index < 0) | (addresses + np.uint64(size) > self.ends[nearest])
        if bad.any():
            raise MemoryError(f"{what} of {int(bad.sum())} elements outside the launch's tensors")
        return self.base[nearest] + (addresses - self.starts[nearest]).astype(np.int64)

    def load(self, program: int, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        places = self._places("load", pointers, mask, size)
        writers = self.stored_by[places]
        if ((writers != _NOBODY) & (writers != program)).any():
            raise MemoryError("load of what another program of the launch stores")
        readers = self.loaded_by[places]
        fresh = (readers == _NOBODY) | (readers == program)
        self.loaded_by[places] = np.where(fresh, program, _SEVERAL)

    def store(self, program: int, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        places = self._places("store", pointers, mask, size)
        if (self.stored_by[places] != _NOBODY).any() or len(np.unique(places)) < len(places):
            raise MemoryError("an address stored twice")
        readers = self.loaded_by[places]
        if ((readers != _NOBODY) & (readers != program)).any():
            raise MemoryError("store to what another program of the launch loads")
        self.stored_by[places] = program


class Builder(stock.InterpreterBuilder):
    """The interpreter's operations, repaired and watched."""

    memory: Memory | None = None

    def _program(self) -> int:
        x, y, z = self.grid_idx
        return (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    # --- conversions and products ---

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if source == BF16:
            wide = stock.TensorHandle(widen(src.data), tl.float32)
            return super().cast_impl(wide, dst_type) if target != tl.float32 else wide
        if target == BF16:
            return stock.TensorHandle(narrow(src.data.astype(np.float32)), BF16)
        return super().cast_impl(src, dst_type)

    def get_bf16(self, value: float) -> Any:  # before 3.9 there is none
        return self.cast_impl(self.get_fp32(value), BF16)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if BF16 in (src.dtype.scalar, dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if not _is_bf16(a) or not _is_bf16(b) or d.dtype.scalar != tl.float32:
            raise TypeError(f"dot of {a.dtype} and {b.dtype} into {d.dtype}: not bf16 into fp32")
        # BLAS sums a row in an order that depends on where in the tile the row lies. In fp64 the
        # order does not show: a sequence has the same bits wherever its tokens fall.
        product = np.matmul(widen(a.data).astype(np.float64), widen(b.data).astype(np.float64))
        return stock.TensorHandle(product.astype(np.float32) + d.data, tl.float32)

    # --- no other arithmetic on bf16 ---

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        _refuse_bf16(op, lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg: Any, op: Any) -> Any:
        _refuse_bf16(op, arg)
        return super().unary_op(arg, op)

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if op is not np.where:
            _refuse_bf16(op, lhs, rhs, other)
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        _refuse_bf16("fma", x, y, z)
        return super().create_fma(x, y, z)

    def create_fabs(self, arg: Any) -> Any:
        _refuse_bf16("fabs", arg)
        return super().create_fabs(arg)

    # --- memory ---

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        if self.memory is not None:
            size = stock._get_np_dtype(ptrs.get_element_ty()).itemsize
            self.memory.load(self._program(), ptrs.data, mask.data, size)
        if other is None:  # the stock answer is 0, a GPU's is anything
            element = ptrs.get_element_ty()
            other = stock.TensorHandle(_garbage(ptrs.data.shape, element), element)
        return super().create_masked_load(ptrs, mask, other, *rest)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if self.memory is not None:
            size = stock._get_np_dtype(ptrs.get_element_ty()).itemsize
            self.memory.store(self._program(), ptrs.data, mask.data, size)
        return super().create_masked_store(ptrs, value, mask, *rest)


def _refuse_bf16(op: Any, *handles: Any) -> None:
    if _is_bf16(*handles):
        raise TypeError(f"{getattr(op, '__name__', op)} on bf16: only products take it")


def _garbage(shape: tuple[int, ...], element: Any) -> np.ndarray:
    dtype = stock._get_np_dtype(element)
    if element == BF16:
        return np.full(shape, 0x7FC0, dtype)
    if np.issubdtype(dtype, np.floating):
        return np.full(shape, np.nan, dtype)
    return np.full(shape, 1 if dtype.kind == "b" else np.iinfo(dtype).max // 3, dtype)


class _Executor(stock.GridExecutor):
    """Launches with the memory of the tensors handed to them."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        builder: Any = stock.interpreter_builder
        builder.memory = Memory(given)
        launches.append(self.fn.__name__)
        patch_language = stock._patch_lang
        scopes: dict[tuple[bool, ...], Any] = {}
        kinds: dict[Any, tuple[bool, ...]] = {}

        def patch_once(fn: Any) -> Any:
            """The stock one, at each call of a device function again, takes a third of the time."""
            kind = kinds.get(fn)
            if kind is None:
                modules = [v for v in fn.__globals__.values() if isinstance(v, ModuleType)]
                kind = kinds[fn] = (tl in modules, tl.core in modules)
            if kind not in scopes:
                scopes[kind] = patch_language(fn)
            return scopes[kind]

        stock._patch_lang = patch_once
        try:
            # Infinities, NaN and maxima over nothing are the business of the kernels.
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                # The interpreter of Triton 3.6 does so itself; NumPy warns before 2.4.
                warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0")
                super().__call__(*args, **kwargs)
        finally:
            stock._patch_lang = patch_language
            builder.memory = None


#: Names of the kernels launched, in order.
launches: list[str] = []


class _Reductions(stock.ReduceOps):
    def apply_impl(self, arguments: Any) -> Any:
        _refuse_bf16("reduction", *(arg.handle for arg in arguments))
        return super().apply_impl(arguments)


@contextmanager
def repaired() -> Iterator[None]:
    """The repairs, for as long as the context lasts."""
    builder = stock.interpreter_builder
    kept = (type(builder), stock.GridExecutor, stock.ReduceOps)
    builder.__class__ = Builder
    stock.GridExecutor, stock.ReduceOps = _Executor, _Reductions
    try:
        yield
    finally:
        builder.__class__, stock.GridExecutor, stock.ReduceOps = kept


assert triton.knobs.runtime.interpret, "triton was imported before this module"
