"""Interleaved measurement of the encoder beside its peers; results are checked before the clock.

``bench/`` runs a registry of workloads through it, ``python -m seqkernels bench`` one of the
user's own. Nothing here is imported by the rest of the package.
"""

from seqkernels.benchmark.comparison import Comparison, Result, compare
from seqkernels.benchmark.contestants import CONTESTANTS, Contestant, Runner, Unavailable
from seqkernels.benchmark.gate import Accuracy, Gate, GateError
from seqkernels.benchmark.machine import machine_info
from seqkernels.benchmark.measure import Samples, Spread, interleave
from seqkernels.benchmark.workloads import Workload, uniform_lengths

__all__ = [
    "CONTESTANTS",
    "Accuracy",
    "Comparison",
    "Contestant",
    "Gate",
    "GateError",
    "Result",
    "Runner",
    "Samples",
    "Spread",
    "Unavailable",
    "Workload",
    "compare",
    "interleave",
    "machine_info",
    "uniform_lengths",
]
