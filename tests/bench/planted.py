"""Contestants with known faults, and workloads that take milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from seqkernels.benchmark import (
    BatchNormWorkload,
    Contestant,
    EncoderWorkload,
    LinearWorkload,
    Model,
    RankerWorkload,
    RequestWorkload,
    Runner,
    Task,
    Workload,
)
from seqkernels.testing import EncoderCase

MASKED = EncoderCase(batch=3, length=24, mask="right", valid=(24, 20, 16))
RIVALS = EncoderWorkload.rivals

_SMALL = {"id": "planted", "group": "test", "threads": 1, "seconds": 0.0}
NORM = BatchNormWorkload(**_SMALL, rows=65536, channels=256).small()
LINEAR = LinearWorkload(**_SMALL, rows=4096, in_features=512, out_features=512).small()
RANKER = RankerWorkload(**_SMALL, batch=256).small()
REQUEST = RequestWorkload(**_SMALL, candidates=256, lengths=(60, 100)).small()


def workload(*contestants: str, case: EncoderCase = MASKED) -> EncoderWorkload:
    return EncoderWorkload(**_SMALL, case=case, contestants=contestants)


class Faulty(Contestant):
    """Another contestant whose output passes through `fault`, after `delay` seconds."""

    def __init__(
        self,
        like: Contestant,
        fault: Callable[[Tensor], Tensor] = lambda out: out,
        delay: float = 0.0,
    ) -> None:
        self.like, self.fault, self.delay = like, fault, delay
        self.name = self.title = f"faulty {like.name}"
        self.ours = like.ours

    def prepare(self, task: Task, workload: Workload) -> Runner:
        runner = self.like.prepare(task, workload)

        def call() -> Tensor:
            time.sleep(self.delay)
            return self.fault(runner.call())

        return Runner(call, runner.around, runner.note)


class Edited(Contestant):
    """What seqkernels runs, after `edit` changed the module or its inputs."""

    name = title = "edited"
    ours = True

    def __init__(self, edit: Callable[[Model], object]) -> None:
        self.edit = edit

    def prepare(self, task: Task, workload: Workload) -> Runner:
        model = task.ours(task.dtype)
        with torch.no_grad():
            self.edit(model)
        return Runner(model)


class Broken(Contestant):
    name = title = "broken"

    def prepare(self, task: Task, workload: Workload) -> Runner:
        raise RuntimeError("does not work here\nsecond line")
