"""``Sequential``: its chains run as one op each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seqkernels.nn import FusedSequential, Linear, ResilientBatchNorm1d
from seqkernels.nn.fused_sequential import channel_norm
from seqkernels.reference.linear import fold_reasons
from seqkernels.swap.batch_norms import BatchNorms
from seqkernels.swap.choice import Why
from seqkernels.swap.kind import Job, Kind, Outcome, Told
from seqkernels.swap.linears import Linears


class Sequences(Kind):
    """Those with a chain that can be fused; of the others only the members are reported."""

    replaces = (nn.Sequential,)
    ours = (FusedSequential,)
    stage = 2  # what a chain can be depends on its members' classes

    def considers(self, module: nn.Module, job: Job) -> bool:
        """Only a plain one, whose own forward would run."""
        return type(module) is nn.Sequential and "forward" not in module.__dict__

    def replace(self, module: nn.Module, name: str, job: Job) -> Outcome | None:
        """None if there is no chain to fuse."""
        with job.report.changing(module):
            adopted = FusedSequential._adopt(module)
        fused = [step for step in adopted.steps(any_mode=True) if step.fused]
        if not fused:
            job.report.undo_last()
            return None
        return Outcome("fused: " + ", ".join(" + ".join(step.names) for step in fused))

    def explain(self, name: str, module: FusedSequential, call: dict[str, Any]) -> list[Told]:
        """One for each chain, and for each member on its own that this package knows."""
        x = call.get("input")
        against = module.reasons(x if isinstance(x, Tensor) else None)
        told: list[Told] = []
        for step in module.steps(any_mode=True):
            norm, linear = step.output_norm, step.linear
            if step.kind == "module" and not isinstance(linear, Linear | ResilientBatchNorm1d):
                continue
            members = f"{name}[{' + '.join(step.names)}]" if name else " + ".join(step.names)
            if against:
                told.append((members, "one by one", [("one op", tuple(against))]))
            elif step.kind == "torch":
                assert norm is not None
                reasons = fold_reasons(channel_norm(norm))
                runs, why = "torch.nn.functional.linear, the norm in its weights", Why()
                if reasons:
                    runs = "torch.nn.functional.linear"
                    why = [("norm folded into the weights", tuple(reasons))]
                told.append((members, runs, why))
            else:
                part = norm if step.kind == "norm" else linear
                kind = BatchNorms() if isinstance(part, ResilientBatchNorm1d) else Linears()
                told.append((members, *kind.runs(part, call)))
        return told
