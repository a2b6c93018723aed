"""Correctness before speed: nobody is timed whose result is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqkernels.benchmark.workload import Expected
from seqkernels.testing import assert_close_to_oracle

#: What a peer may do: larger than the rule for ourselves, since a peer may round at more places
#: than the yardstick, and far below what any mistake would cost.
PEER_MAX_RULE = 4.0
PEER_MEAN_RULE = 3.0


class GateError(AssertionError):
    """A result is wrong; there is no speed to report."""


@dataclass(frozen=True)
class Accuracy:
    """Error against fp64 over that of torch's own run in low precision, on the values checked.

    Attributes
    ----------
    max_ratio, mean_ratio : float
        Of the largest and of the mean absolute error over all groups together.
    worst_max_ratio, worst_mean_ratio : float
        The largest of the ratios of single groups: sequences, or what else the rule holds for.
    """

    max_ratio: float
    mean_ratio: float
    worst_max_ratio: float
    worst_mean_ratio: float


class Gate:
    """Knows the right result of a workload on some of its rows.

    Parameters
    ----------
    expected : Expected
        What is right.
    label : str
        The workload's name, for messages.

    Examples
    --------
    >>> import torch
    >>> from seqkernels.benchmark import Expected, Gate
    >>> g = torch.randn(4, 100, dtype=torch.float64)
    >>> gate = Gate(Expected((4, 100), torch.arange(4), g, g.bfloat16().double()), "doc")
    >>> gate.check("fp32", g.float()).max_ratio < 0.1
    True
    """

    def __init__(self, expected: Expected, label: str) -> None:
        self.expected, self.label = expected, label

    def check(self, name: str, out: Tensor, *, ours: bool = False) -> Accuracy:
        """Hold an output against fp64.

        Ours has to meet the rule of ``seqkernels.testing.assert_close_to_oracle`` everywhere. Of a
        peer only what ``counts`` counts: what padded positions hold is its own affair.

        Raises
        ------
        GateError
            If the result is wrong.
        """
        label, expected = f"{self.label}: {name}", self.expected
        if out.shape != expected.shape:
            raise GateError(
                f"{label}: expected an output of shape {expected.shape}, got {tuple(out.shape)}"
            )
        picked = out[expected.rows].double()
        if ours:
            try:
                assert_close_to_oracle(picked, expected.golden, expected.low_precision, label=label)
            except AssertionError as error:
                raise GateError(str(error)) from None
            if not out.isfinite().all():
                raise GateError(f"{label}: values that are not finite")
        accuracy = self._accuracy(picked)
        if not ours and not (  # negated, so that NaN fails
            accuracy.max_ratio <= PEER_MAX_RULE and accuracy.mean_ratio <= PEER_MEAN_RULE
        ):
            raise GateError(
                f"{label}: error against fp64 is {accuracy.max_ratio:.3g} times that of torch at "
                f"most and {accuracy.mean_ratio:.3g} times on average (allowed {PEER_MAX_RULE:g}, "
                f"{PEER_MEAN_RULE:g})"
            )
        return accuracy

    def _accuracy(self, picked: Tensor) -> Accuracy:
        def errors(t: Tensor) -> Tensor:
            found = (t - self.expected.golden).abs()
            if self.expected.counts is not None:
                found = torch.where(self.expected.counts, found, 0.0)
            return found.flatten(1)  # [groups, values]

        ours, theirs = errors(picked), errors(self.expected.low_precision)
        return Accuracy(
            float(ours.amax() / theirs.amax()),
            float(ours.sum() / theirs.sum()),
            float((ours.amax(1) / theirs.amax(1)).amax()),
            float((ours.sum(1) / theirs.sum(1)).amax()),
        )
