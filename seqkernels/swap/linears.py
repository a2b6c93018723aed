"""Linear layers: in bf16 where the precision policy says so."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from seqkernels.nn import Linear, read
from seqkernels.precision import PrecisionDecision
from seqkernels.swap.kind import Job, Kind, Outcome


class Linears(Kind):
    """Torch's, and ours in fp32, such as those of an `EngagementRanker`."""

    replaces = (nn.Linear, Linear)
    ours = (Linear,)
    op = "linear"
    optional = True

    def considers(self, module: Any, job: Job) -> bool:
        """All but ours in bf16, and torch's attention's, which reads its weight only."""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return False
        return type(module) is not Linear or module.precision == "fp32"

    def reasons(self, module: nn.Module) -> list[str]:
        """It needs weights of its own."""
        return read.computed_weight_reasons(module)

    def declines(self, module: nn.Linear, name: str, job: Job) -> list[str]:
        """What the policy says."""
        decision = job.policy(name, module)
        if not isinstance(decision, PrecisionDecision):
            raise TypeError(
                f"swap: precision_policy: expected a PrecisionDecision for {name!r}, "
                f"got {decision!r}"
            )
        job.report.decisions[name] = decision
        return [] if decision.bf16 else [decision.reason]

    def replace(self, module: nn.Linear, name: str, job: Job) -> Outcome:
        """In bf16."""
        with job.report.changing(module):
            Linear._adopt(module, job.backend)
        return Outcome(f"bf16: {job.report.decisions[name].reason}")
