"""The native CPU kernels: choose an instruction set, pack weights, call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels import settings
from seqkernels.backends import native_module
from seqkernels.backends.call import EncoderCall, LinearCall, ResilientBatchNormCall
from seqkernels.backends.problem import Capability, KernelBackend
from seqkernels.backends.weights import WeightSet
from seqkernels.options import EncoderOptions, LinearOptions, ResilientBatchNormOptions

_EMULATED = "_emulated"  # such a set is for tests: it is used when named, never chosen


Packed = tuple[Tensor, Tensor]  # what stands beside packed weights, and them


class IsaStatus(NamedTuple):
    """One instruction set of the native module, and why it would not be used."""

    name: str
    runnable: bool  # by this processor and operating system
    chosen: bool
    reasons: tuple[str, ...]  # why it is not chosen; empty when it is


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
    module = native_module.module
    return () if module is None else _isa_table(module, settings.current.isa)


class CpuBackend(KernelBackend):
    """Runs the native kernels."""

    name = "cpu"
    devices: tuple[str, ...] = ("cpu",)
    tensors = "CPU tensors"
    ops: Any = torch.ops.seqkernels
    capabilities = dict.fromkeys(
        ("encoder", "request_scoring", "linear", "resilient_batch_norm"), Capability()
    )

    def missing(self) -> list[str]:
        """Why there are no kernels, or none that can run."""
        if native_module.module is None:
            return [native_module.import_error or "the native module is missing"]
        if self.variant():
            return []
        sets = "; ".join(f"{s.name}: {', '.join(s.reasons)}" for s in isa_table())
        return [f"no instruction set can run: {sets}"]

    def variant(self) -> str:
        """The instruction set in use, "" if there is none."""
        return next((s.name for s in isa_table() if s.chosen), "")

    def encoder(self, call: EncoderCall, isa: str) -> Tensor:
        """Run the op ``encoder``, or with ``call.user_index`` the op ``request_scoring``."""
        packed = self.packed_encoder(call.weight_set, call.weights, call.options, isa)
        return run_encoder(self.ops, call, *packed)

    def packed_encoder(
        self,
        weight_set: WeightSet,
        weights: Sequence[Tensor | None],
        options: EncoderOptions,
        isa: str,
    ) -> Packed:
        """An encoder's weights for one instruction set, behind what stands beside them."""
        return weight_set.derived(  # type: ignore[no-any-return]
            (isa, options), self.ops.pack_encoder, weights, *options, isa
        )

    def resilient_batch_norm(self, call: ResilientBatchNormCall, isa: str) -> Tensor:
        """Run the op ``resilient_batch_norm``."""
        packed = self.packed_norm(call[1:5], call.options, isa)
        return self.ops.resilient_batch_norm_packed(call.x, *packed)  # type: ignore[no-any-return]

    def packed_norm(
        self, tensors: Sequence[Tensor | None], options: ResilientBatchNormOptions, isa: str
    ) -> Packed:
        """The constants of a batch norm; not kept, since no `WeightSet` stands for statistics."""
        return self.ops.pack_resilient_batch_norm(  # type: ignore[no-any-return]
            *tensors, *options, isa
        )

    def linear(self, call: LinearCall, isa: str) -> Tensor:
        """Run the op ``linear``."""
        packed = self.packed_linear(call.weight_set, call.weights, call.options, isa)
        return self.ops.linear_packed(call.x, *packed)  # type: ignore[no-any-return]

    def packed_linear(
        self,
        weight_set: WeightSet,
        weights: Sequence[Tensor | None],
        options: LinearOptions,
        isa: str,
    ) -> Packed:
        """As `packed_encoder`."""
        return weight_set.derived(  # type: ignore[no-any-return]
            (isa, options), self.ops.pack_linear, weights, *options, isa
        )


def run_encoder(ops: Any, call: EncoderCall, model: Tensor, packed: Tensor) -> Tensor:
    """One call of the native kernel."""
    return ops.encoder_packed(  # type: ignore[no-any-return]
        call.x,
        call.candidate,
        call.user_index,
        call.mask,
        call.lengths,
        call.computes_padding,
        model,
        packed,
    )
