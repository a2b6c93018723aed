"""The fused CPU kernels of the native module: choose an instruction set, pack weights, call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels import settings
from seqkernels.backends import native_module
from seqkernels.backends.call import (
    EncoderCall,
    EncoderOptions,
    EncoderSize,
    LinearCall,
    LinearOptions,
    ResilientBatchNormCall,
)
from seqkernels.backends.encoder_weights import PER_LAYER
from seqkernels.backends.linear_weights import INPUT_NORM, OUTPUT_NORM
from seqkernels.backends.native_arguments import batch_norm_arguments, encoder_arguments, fp32
from seqkernels.backends.weights import WeightSet

_native: Any = native_module.module
import_error = native_module.import_error

_DTYPES = (torch.float32, torch.bfloat16)
_EMULATED = "_emulated"  # such a set is for tests: it is used when named, never chosen


class IsaStatus(NamedTuple):
    """One instruction set of the native module, and why it would not be used."""

    name: str
    runnable: bool  # by this processor and operating system
    chosen: bool
    reasons: tuple[str, ...]  # why it is not chosen; empty when it is


def native() -> Any:
    """The native module, or None; `import_error` then says why."""
    return _native


@lru_cache(maxsize=16)
def _isa_table(module: Any, cap: str | None) -> tuple[IsaStatus, ...]:
    names: list[str] = module.isa_names()
    if cap is not None and cap not in names:
        raise ValueError(f"SEQKERNELS_ISA: expected one of {', '.join(names)}, got {cap!r}")
    table = []
    found = False
    for position, name in enumerate(names):
        unmet = list(module.isa_unsupported_reasons(name))
        reasons = list(unmet)
        if cap is not None and position < names.index(cap):
            reasons.append(f"SEQKERNELS_ISA={cap} allows nothing better")
        if name.endswith(_EMULATED) and name != cap:
            reasons.append("emulated, for tests: used only when SEQKERNELS_ISA names it")
        chosen = not reasons and not found
        if found and not reasons:
            reasons.append("a better one runs")
        found = found or chosen
        table.append(IsaStatus(name, not unmet, chosen, tuple(reasons)))
    return tuple(table)


def isa_table() -> tuple[IsaStatus, ...]:
    """Every instruction set compiled in, best first; empty without the native module.

    Raises
    ------
    ValueError
        When ``SEQKERNELS_ISA`` names none of them.
    """
    return () if _native is None else _isa_table(_native, settings.current.isa)


class CpuBackend:
    """Runs the native kernels."""

    name = "cpu"
    devices: tuple[str, ...] = ("cpu",)

    def not_supported_reasons(
        self, op: str, device: str, dtype: torch.dtype, size: EncoderSize | None
    ) -> list[str]:
        """Every reason why it cannot run a call on tensors of this device type and dtype."""
        reasons = []
        if _native is None:
            reasons.append(import_error or "the native module is missing")
        elif not self.variant():
            reasons.append(
                "no instruction set can run: "
                + "; ".join(f"{s.name}: {', '.join(s.reasons)}" for s in isa_table())
            )
        if device != "cpu":
            reasons.append(f"tensors on {device}, it takes CPU tensors")
        if dtype not in _DTYPES:
            reasons.append(f"dtype {dtype}, it takes float32 and bfloat16")
        return reasons

    def variant(self) -> str:
        """The instruction set in use, "" if there is none."""
        return next((s.name for s in isa_table() if s.chosen), "")

    def encoder(self, call: EncoderCall, isa: str) -> Tensor:
        """Write ``call.out`` by one call of the kernel."""
        packed = call.weight_set.derived(
            (isa, call.options), _pack, call.weights, call.weight_set, call.options, isa
        )
        packed.forward(*encoder_arguments(call), torch.get_num_threads())
        return call.out

    def resilient_batch_norm(self, call: ResilientBatchNormCall, isa: str) -> Tensor:
        """Write ``call.out`` by one call of the kernel."""
        arguments, kept = batch_norm_arguments(call)
        _batch_norm_kernel(isa).forward(*arguments, torch.get_num_threads())
        del kept  # the call is over
        return call.out

    def linear(self, call: LinearCall, isa: str) -> Tensor:
        """Write ``call.out`` by one call of the kernel."""
        x, weights, weight_set, options, out = call
        packed = weight_set.derived((isa, options), _pack_linear, weights, options, isa)
        packed.forward(
            x.data_ptr(),
            x.dtype is torch.bfloat16,
            x.shape[0],
            x.stride(0),
            out.data_ptr(),
            out.stride(0),
            torch.get_num_threads(),
        )
        return out


def _pack_linear(weights: Sequence[Tensor | None], options: LinearOptions, isa: str) -> Any:
    """The native object that holds the weights and norms for one instruction set."""
    plain = [None if w is None else fp32(w) for w in weights]  # kept until the copy is made
    pointers = [0 if w is None else w.data_ptr() for w in plain]
    weight = weights[0]
    assert weight is not None
    return _native.LinearWeights(
        isa,
        weight.shape[1],
        weight.shape[0],
        *pointers[:2],
        pointers[INPUT_NORM] if options.input_norm else [],
        options.input_norm,
        pointers[OUTPUT_NORM] if options.output_norm else [],
        options.output_norm,
        options.activation,
        options.negative_slope,
        options.precision == "fp32",
    )


@lru_cache(maxsize=16)
def _batch_norm_kernel(isa: str) -> Any:
    return _native.ResilientBatchNorm(isa)


def _pack(
    weights: Sequence[Tensor | None], weight_set: WeightSet, options: EncoderOptions, isa: str
) -> Any:
    """The native object that holds the weights in the layout of one instruction set."""
    shape = weight_set.shape
    plain = [None if w is None else fp32(w) for w in weights]  # kept until the copy is made
    pointers = [0 if w is None else w.data_ptr() for w in plain]
    end = shape.num_layers * PER_LAYER
    return _native.EncoderWeights(
        isa,
        shape.d_model,
        options.nhead,
        shape.dim_feedforward,
        options.activation,
        options.negative_slope,
        options.norm_first,
        options.layer_norm_eps,
        options.final_norm_eps,
        [pointers[i : i + PER_LAYER] for i in range(0, end, PER_LAYER)],
        pointers[end:],
    )
