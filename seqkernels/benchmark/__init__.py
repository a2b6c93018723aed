"""Interleaved measurement beside peers; results are checked before the clock.

``bench/`` runs a registry of workloads through it, ``python -m seqkernels bench`` an encoder of the
user's own. Nothing here is imported by the rest of the package.
"""

from seqkernels.benchmark.comparison import Comparison, Result, compare
from seqkernels.benchmark.gate import Accuracy, Gate, GateError
from seqkernels.benchmark.kinds import (
    KINDS,
    BatchNormWorkload,
    EncoderWorkload,
    LinearWorkload,
    RankerWorkload,
    RequestWorkload,
    uniform_lengths,
)
from seqkernels.benchmark.machine import machine_info
from seqkernels.benchmark.measure import Samples, Spread, interleave
from seqkernels.benchmark.workload import (
    Contestant,
    Expected,
    Model,
    Runner,
    Task,
    Unavailable,
    Workload,
)

__all__ = [
    "KINDS",
    "Accuracy",
    "BatchNormWorkload",
    "Comparison",
    "Contestant",
    "EncoderWorkload",
    "Expected",
    "Gate",
    "GateError",
    "LinearWorkload",
    "Model",
    "RankerWorkload",
    "RequestWorkload",
    "Result",
    "Runner",
    "Samples",
    "Spread",
    "Task",
    "Unavailable",
    "Workload",
    "compare",
    "interleave",
    "machine_info",
    "uniform_lengths",
]
