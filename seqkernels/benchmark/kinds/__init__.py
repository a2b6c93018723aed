"""The kinds of workloads, each with its contestants: one file a kind."""

from seqkernels.benchmark.kinds.encoder import EncoderWorkload, uniform_lengths
from seqkernels.benchmark.kinds.linear import LinearWorkload
from seqkernels.benchmark.kinds.ranker import RankerWorkload
from seqkernels.benchmark.kinds.request_scoring import RequestWorkload
from seqkernels.benchmark.kinds.resilient_batch_norm import BatchNormWorkload
from seqkernels.benchmark.workload import Workload

#: By the name that results files use, in a report's order.
KINDS: dict[str, type[Workload]] = {
    kind.kind: kind
    for kind in (
        EncoderWorkload,
        RequestWorkload,
        BatchNormWorkload,
        LinearWorkload,
        RankerWorkload,
    )
}

__all__ = [
    "KINDS",
    "BatchNormWorkload",
    "EncoderWorkload",
    "LinearWorkload",
    "RankerWorkload",
    "RequestWorkload",
    "uniform_lengths",
]
