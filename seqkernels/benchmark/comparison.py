"""One comparison: prepare everyone, check everyone, then time those who are right."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from seqkernels.benchmark import gpu
from seqkernels.benchmark.gate import Accuracy, Gate, GateError
from seqkernels.benchmark.measure import Samples, Spread, interleave
from seqkernels.benchmark.workload import Contestant, Runner, Task, Unavailable, Workload


@dataclass(frozen=True)
class Result:
    """What one contestant did; a yardstick has no accuracy."""

    contestant: Contestant[Any]
    note: str
    accuracy: Accuracy | None
    samples: Samples


@dataclass(frozen=True)
class Comparison:
    """What all contestants did with one workload.

    Attributes
    ----------
    workload : Workload
    results : dict of str to Result
        Of those who were timed, "seqkernels" among them.
    absent : dict of str to str
        Those who were not, and why.
    variant : str
        Backend and instruction set of seqkernels.
    workspace_bytes : int or None
        What one thread of the native kernel needs beyond output and packed weights.
    """

    workload: Workload
    results: dict[str, Result]
    absent: dict[str, str]
    variant: str
    workspace_bytes: int | None

    def fastest_peer(self) -> str | None:
        """The peer with the least median, if any was timed."""
        peers = {
            name: result.samples.spread.median
            for name, result in self.results.items()
            if not (result.contestant.ours or result.contestant.yardstick)
        }
        return min(peers, key=lambda name: peers[name], default=None)

    def speedup(self, over: str, of: str = "seqkernels") -> Spread:
        """A contestant's time over that of seqkernels, round by round."""
        return self.results[over].samples.ratio_to(self.results[of].samples)

    def outside_kernel(self) -> Spread | None:
        """Seconds a module's call takes besides the native call, if that was timed on its own."""
        kernel = self.results.get("seqkernels_kernel")
        if kernel is None:
            return None
        return self.results["seqkernels"].samples.difference_to(kernel.samples)

    def as_dict(self) -> dict[str, object]:
        """Everything, as JSON; times are in seconds a call."""
        fastest, outside = self.fastest_peer(), self.outside_kernel()
        ours = [name for name, result in self.results.items() if result.contestant.ours]
        return {
            "workload": self.workload.describe(),
            "variant": self.variant,
            "workspace_bytes": self.workspace_bytes,
            "fastest_peer": fastest,
            "outside_kernel": outside and dataclasses.asdict(outside),
            "absent": self.absent,
            "results": {
                name: {
                    "title": result.contestant.title,
                    "ours": result.contestant.ours,
                    "yardstick": result.contestant.yardstick,
                    "note": result.note,
                    "accuracy": result.accuracy and dataclasses.asdict(result.accuracy),
                    "rounds": len(result.samples.seconds),
                    "calls_per_sample": result.samples.calls_per_sample,
                    "time": dataclasses.asdict(result.samples.spread),
                    # how many times as fast as this one "seqkernels" is
                    "speedup": dataclasses.asdict(self.speedup(name)),
                    # over a yardstick, how many times as fast each of ours is
                    "speedup_of": {
                        one: dataclasses.asdict(self.speedup(name, one))
                        for one in (ours if result.contestant.yardstick else ())
                    },
                }
                for name, result in self.results.items()
            },
        }


def compare(
    workload: Workload,
    *,
    contestants: Mapping[str, Contestant[Any]] | None = None,
    rounds: int | None = None,
) -> Comparison:
    """Measure a workload; the results are checked before anything is timed.

    Parameters
    ----------
    workload : Workload
    contestants : mapping of str to Contestant, optional
        Those that the workload may name, instead of its ``rivals``.
    rounds : int, optional
        Instead of as many as ``workload.seconds`` allows.

    Raises
    ------
    GateError
        If a result of seqkernels is wrong. A peer with a wrong result is listed in ``absent``.
    Unavailable
        If seqkernels itself cannot run the workload, for instance for want of its instruction set,
        or there is no GPU for it.
    """
    reason = gpu.missing() if workload.device == "cuda" else None
    if reason is not None:
        raise Unavailable(reason)
    threads = torch.get_num_threads()
    torch.set_num_threads(workload.num_threads)
    try:
        return _compare(workload, contestants or workload.rivals, rounds)
    finally:
        torch.set_num_threads(threads)


def _compare(
    workload: Workload, contestants: Mapping[str, Contestant[Any]], rounds: int | None
) -> Comparison:
    task = workload.task()
    gate = Gate(task.expected(), workload.id)
    ready: dict[str, tuple[Contestant[Any], Runner, Accuracy | None]] = {}
    absent: dict[str, str] = {}
    for name in workload.competing():
        contestant = contestants[name]
        try:
            ready[name] = (contestant, *_admit(contestant, task, workload, gate))
        except (GateError, Unavailable) as error:
            if name == "seqkernels" or (contestant.ours and isinstance(error, GateError)):
                raise
            absent[name] = str(error)
        except Exception as error:  # whatever a peer stumbles over, its reader shall know
            if contestant.ours:
                raise
            first_line = str(error).strip().partition("\n")[0]
            absent[name] = f"{type(error).__name__}: {first_line}"

    samples = interleave(
        {name: runner for name, (_, runner, _) in ready.items()},
        seconds=workload.seconds,
        rounds=rounds,
        clock=gpu.EventClock() if workload.device == "cuda" else None,
    )
    variant = ready["seqkernels"][1].note
    return Comparison(
        workload,
        {
            name: Result(contestant, runner.note, accuracy, samples[name])
            for name, (contestant, runner, accuracy) in ready.items()
        },
        absent,
        variant,
        task.workspace_bytes(workload.isa) if variant.startswith("cpu/") else None,
    )


def _admit(
    contestant: Contestant[Any], task: Task, workload: Workload, gate: Gate
) -> tuple[Runner, Accuracy | None]:
    """Prepare a contestant and check what it computes."""
    with warnings.catch_warnings():
        if not contestant.ours:  # of ours a valid call gives no warning
            warnings.simplefilter("ignore")
        runner = contestant.prepare(task, workload)
        if workload.device == "cuda" and workload.replay:
            runner = gpu.replayed(runner)
        if contestant.yardstick:
            return runner, None
        with runner.around():
            out = runner.tensor(runner.call()).cpu()
        return runner, gate.check(contestant.title, out, ours=contestant.ours)
