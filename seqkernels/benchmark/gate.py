"""Correctness before speed: nobody is timed whose result is wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels.benchmark.workloads import Workload
from seqkernels.testing import EncoderProblem, assert_close_to_oracle

#: Sequences of the output that are held against fp64, from both ends of the batch.
ROWS = 8
#: What a peer may do: larger than the rule for ourselves, since a peer may round at more places
#: than the yardstick, and far below what any mistake would cost.
PEER_MAX_RULE = 4.0
PEER_MEAN_RULE = 3.0


class GateError(AssertionError):
    """A result is wrong; there is no speed to report."""


@dataclass(frozen=True)
class Accuracy:
    """Error against fp64 over that of torch's own bf16 run, on the valid events checked.

    Attributes
    ----------
    max_ratio, mean_ratio : float
        Of the largest and of the mean absolute error over all sequences together.
    worst_max_ratio, worst_mean_ratio : float
        The largest of the ratios of single sequences.
    """

    max_ratio: float
    mean_ratio: float
    worst_max_ratio: float
    worst_mean_ratio: float


class Gate:
    """Knows the right result of a workload on some of its sequences.

    Parameters
    ----------
    problem : EncoderProblem
    workload : Workload

    Examples
    --------
    >>> from seqkernels.benchmark import Gate, Workload
    >>> from seqkernels.testing import EncoderCase
    >>> workload = Workload("small", "doc", EncoderCase(batch=2, length=16))
    >>> problem = workload.case.problem()
    >>> Gate(problem, workload).check("fp32", problem.reference(torch.float32)).max_ratio < 0.1
    True
    """

    def __init__(self, problem: EncoderProblem, workload: Workload) -> None:
        self.workload = workload
        batch = len(problem.x)
        half = min(ROWS, batch) // 2
        self.rows = [*range(min(ROWS, batch) - half), *range(batch - half, batch)]
        mask = problem.key_padding_mask
        some = dataclasses.replace(
            problem,
            x=problem.x[self.rows],
            key_padding_mask=None if mask is None else mask[self.rows],
        )
        self.shape = problem.x.shape
        self.golden, self.low = some.golden(), some.low_precision().double()
        self.valid = torch.ones(some.x.shape[:2], dtype=torch.bool)
        if some.key_padding_mask is not None:
            self.valid = ~some.key_padding_mask

    def check(self, name: str, out: Tensor, *, ours: bool = False) -> Accuracy:
        """Hold an output [B, L, D] against fp64.

        Ours has to meet the rule of ``seqkernels.testing.assert_close_to_oracle``, at padded
        positions too. Of a peer only the valid positions count, since what padded ones hold is its
        own affair; torch's fast path even drops those that no sequence fills.

        Raises
        ------
        GateError
            If the result is wrong.
        """
        label = f"{self.workload.id}: {name}"
        if not ours and out.dim() == 3 and out.shape[1] < self.shape[1]:
            out = F.pad(out, (0, 0, 0, self.shape[1] - out.shape[1]))
        if out.shape != self.shape:
            raise GateError(
                f"{label}: expected an output of shape {tuple(self.shape)}, got {tuple(out.shape)}"
            )
        picked = out[self.rows].double()
        if ours:
            try:
                assert_close_to_oracle(picked, self.golden, self.low, label=label)
            except AssertionError as error:
                raise GateError(str(error)) from None
            if not out.isfinite().all():
                raise GateError(f"{label}: values that are not finite")
        accuracy = self._accuracy(picked)
        if not ours and not (  # negated, so that NaN fails
            accuracy.max_ratio <= PEER_MAX_RULE and accuracy.mean_ratio <= PEER_MEAN_RULE
        ):
            raise GateError(
                f"{label}: error against fp64 is {accuracy.max_ratio:.3g} times that of bf16 at "
                f"most and {accuracy.mean_ratio:.3g} times on average (allowed {PEER_MAX_RULE:g}, "
                f"{PEER_MEAN_RULE:g})"
            )
        return accuracy

    def _accuracy(self, picked: Tensor) -> Accuracy:
        ours, theirs = (
            (t - self.golden).abs().amax(-1).masked_fill(~self.valid, 0.0)
            for t in (picked, self.low)
        )  # [rows, L]
        ours_mean, theirs_mean = (
            (t - self.golden).abs().mean(-1).masked_fill(~self.valid, 0.0)
            for t in (picked, self.low)
        )
        return Accuracy(
            float(ours.amax() / theirs.amax()),
            float(ours_mean.sum() / theirs_mean.sum()),
            float((ours.amax(1) / theirs.amax(1)).amax()),
            float((ours_mean.sum(1) / theirs_mean.sum(1)).amax()),
        )
