"""Contestants with known faults, and a workload that takes milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from seqkernels.benchmark import CONTESTANTS, Contestant, Runner, Workload
from seqkernels.testing import EncoderCase, EncoderProblem

MASKED = EncoderCase(batch=3, length=24, mask="right", valid=(24, 20, 16))


def workload(*contestants: str, case: EncoderCase = MASKED) -> Workload:
    return Workload("planted", "test", case, contestants, threads=1, seconds=0.0)


class Faulty(Contestant):
    """Another contestant whose output passes through `fault`, after `delay` seconds."""

    def __init__(
        self,
        like: str,
        fault: Callable[[Tensor], Tensor] = lambda out: out,
        delay: float = 0.0,
    ) -> None:
        self.like, self.fault, self.delay = CONTESTANTS[like], fault, delay
        self.name = self.title = f"faulty {like}"
        self.ours = self.like.ours

    def prepare(self, problem: EncoderProblem, workload: Workload) -> Runner:
        runner = self.like.prepare(problem, workload)

        def call() -> Tensor:
            time.sleep(self.delay)
            return self.fault(runner.call())

        return Runner(call, runner.around, runner.note)


class Broken(Contestant):
    name = title = "broken"

    def prepare(self, problem: EncoderProblem, workload: Workload) -> Runner:
        raise RuntimeError("does not work here\nsecond line")
