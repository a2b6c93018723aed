"""The time below which no kernel can go: its multiply-accumulates at the processor's best rate.

    floor = multiply-accumulates / (rate of a core x cores x clock)

Only products of the valid events count: with the weights, of queries and keys, of probabilities and
values. Exponentials, norms, conversions, memory and any padding to whole tiles or vectors cost more
than nothing, so a distance of 1 cannot be reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Multiply-accumulates a core does in a cycle by one pipe of each kind.
AMX_BF16 = 16 * 16 * 32 / 16  # a tile product takes 16 cycles
AVX512_BF16 = 32  # one vdpbf16ps a cycle
AVX512_PIPE = 16
AVX2_PIPE = 8


@dataclass(frozen=True)
class Machine:
    """What the floor assumes."""

    rates: dict[str, float]
    clock_ghz: float
    clock_source: str
    assumption: str

    def floor(self, comparison: dict[str, Any]) -> float | None:
        """Seconds a call takes at least; None without multiply-accumulates or a known rate."""
        rate = self.rates.get(comparison["variant"].removeprefix("cpu/"))
        workload = comparison["workload"]
        if rate is None or "multiply_adds" not in workload:
            return None
        per_second = rate * workload["threads"] * self.clock_ghz * 1e9
        return float(workload["multiply_adds"] / per_second)


def machine(info: dict[str, Any], clock_ghz: float | None = None) -> Machine | None:
    """The model for a results file's machine; None without a clock frequency."""
    clock, source = clock_ghz, "as given"
    if clock is None:
        clock, source = info.get("clock_ghz"), "as the system reports it; a boost is not seen"
    if clock is None:
        return None
    vendor, family = (info.get("processor_model") or "? ?").split()[:2]
    # Up to Zen 4 (family 25) a 512-bit operation takes both of the 256-bit pipes.
    pipes512 = 1 if vendor == "AuthenticAMD" and int(family) <= 25 else 2
    rates = {
        "amx_bf16": AMX_BF16,
        "avx512_bf16": float(AVX512_BF16),
        "avx512": float(AVX512_PIPE * pipes512),
        "avx2": float(AVX2_PIPE * 2),
    }
    listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return Machine(
        rates,
        clock,
        source,
        f"multiply-accumulates a cycle and core: {listed} ({pipes512} 512-bit and 2 256-bit FMA "
        f"pipes); clock {clock:.2f} GHz, {source}; a core for each thread",
    )
