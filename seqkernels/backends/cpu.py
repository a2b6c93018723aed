"""The fused CPU kernels of the native module: choose an instruction set, pack weights, call."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels import settings
from seqkernels.backends.call import (
    EncoderCall,
    EncoderOptions,
    LinearCall,
    LinearOptions,
    ResilientBatchNormCall,
)
from seqkernels.backends.encoder_weights import PER_LAYER
from seqkernels.backends.linear_weights import INPUT_NORM, OUTPUT_NORM
from seqkernels.backends.weights import WeightSet

_native: Any = None
import_error: str | None = None  # why there is no native module; the whole text
try:
    _native = importlib.import_module("seqkernels._native")
except ModuleNotFoundError as error:
    import_error = (
        f"the native module was not built ({error}); install the package with a C++20 compiler"
    )
except Exception as error:  # a broken build must not keep the reference from working
    import_error = (
        "the native module is there but cannot be loaded: "
        + "".join(traceback.format_exception_only(error)).strip()
        + "; rebuild it with `pip install --force-reinstall --no-deps .`"
    )

_FUSION = {"none": 0, "concat": 1, "append": 2}
_PADDING = {"zero": 0, "compute": 1, "exclude": 2}
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

    def not_supported_reasons(self, device: str, dtype: torch.dtype) -> list[str]:
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
        x, candidate, weights, weight_set, mask, lengths, options = call[:7]
        user_index = call.user_index
        out, latest_k = call.out, call.latest_k
        packed = weight_set.derived((isa, options), _pack, weights, weight_set, options, isa)
        if lengths is not None and (lengths.dtype != torch.int64 or not lengths.is_contiguous()):
            lengths = lengths.to(torch.int64).contiguous()
        x_stride, out_stride = x.stride(), out.stride()
        packed.forward(
            x.data_ptr(),
            x.dtype is torch.bfloat16,
            out.shape[0],
            x.shape[1],
            x_stride[0],
            x_stride[1],
            0 if candidate is None else candidate.data_ptr(),
            0 if candidate is None else candidate.shape[1],
            0 if candidate is None else candidate.stride(0),
            0 if mask is None else mask.data_ptr(),
            0 if mask is None else mask.stride(0),
            0 if mask is None else mask.stride(1),
            0 if lengths is None else lengths.data_ptr(),
            _FUSION[call.fusion],
            _PADDING[call.padding],
            call.order == "latest_last",
            -1 if latest_k is None else latest_k,
            call.pool == "max",
            out.data_ptr(),
            out_stride[0],
            out_stride[1] if latest_k is None else 0,
            torch.get_num_threads(),
            0 if user_index is None else user_index.data_ptr(),
            x.shape[0],
        )
        return out

    def request_scoring(self, call: EncoderCall, isa: str) -> Tensor:
        """Write ``call.out``: the encoder's kernel, with users apart from candidates."""
        return self.encoder(call, isa)

    def resilient_batch_norm(self, call: ResilientBatchNormCall, isa: str) -> Tensor:
        """Write ``call.out`` by one call of the kernel."""
        x, mean, var, weight, bias, options, out = call
        mean, var = _fp32(mean), _fp32(var)
        weight = None if weight is None else _fp32(weight)
        bias = None if bias is None else _fp32(bias)
        # Rows of channels (outer, inner, C), or rows of positions (outer, C, inner).
        channels_last = x.dim() == 2 or x.stride(1) < x.stride(2)
        if x.dim() == 2:
            outer, inner = 1, x.shape[0]
            x_outer, x_row, out_outer, out_row = 0, x.stride(0), 0, out.stride(0)
        else:
            outer, inner = x.shape[0], x.shape[2]
            row = 2 if channels_last else 1
            x_outer, x_row = x.stride(0), x.stride(row)
            out_outer, out_row = out.stride(0), out.stride(row)
        _batch_norm_kernel(isa).forward(
            x.data_ptr(),
            x.dtype is torch.bfloat16,
            channels_last,
            outer,
            inner,
            x.shape[1],
            x_outer,
            x_row,
            mean.data_ptr(),
            var.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            *options,
            out.data_ptr(),
            out_outer,
            out_row,
            torch.get_num_threads(),
        )
        return out

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
    plain = [None if w is None else _fp32(w) for w in weights]  # kept until the copy is made
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
    )


@lru_cache(maxsize=16)
def _batch_norm_kernel(isa: str) -> Any:
    return _native.ResilientBatchNorm(isa)


def _fp32(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def _pack(
    weights: Sequence[Tensor | None], weight_set: WeightSet, options: EncoderOptions, isa: str
) -> Any:
    """The native object that holds the weights in the layout of one instruction set."""
    shape = weight_set.shape
    plain = [
        None if w is None else w.detach().to(torch.float32).contiguous() for w in weights
    ]  # kept until the copy is made
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
