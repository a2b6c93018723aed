"""One comparison: prepare everyone, check everyone, then time those who are right."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from seqkernels.benchmark.contestants import (
    CONTESTANTS,
    Contestant,
    Runner,
    Unavailable,
    packed_weights,
)
from seqkernels.benchmark.gate import Accuracy, Gate, GateError
from seqkernels.benchmark.measure import Samples, Spread, interleave
from seqkernels.benchmark.workloads import Workload
from seqkernels.testing import EncoderProblem


@dataclass(frozen=True)
class Result:
    """What one contestant did."""

    contestant: Contestant
    note: str
    accuracy: Accuracy
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
            if not result.contestant.ours
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
                    "note": result.note,
                    "accuracy": dataclasses.asdict(result.accuracy),
                    "rounds": len(result.samples.seconds),
                    "calls_per_sample": result.samples.calls_per_sample,
                    "time": dataclasses.asdict(result.samples.spread),
                    # how many times as fast as this one the first of ours is
                    "speedup": dataclasses.asdict(self.speedup(name)),
                }
                for name, result in self.results.items()
            },
        }


def compare(
    workload: Workload,
    *,
    contestants: Mapping[str, Contestant] = CONTESTANTS,
    rounds: int | None = None,
) -> Comparison:
    """Measure a workload; the results are checked before anything is timed.

    Parameters
    ----------
    workload : Workload
    contestants : mapping of str to Contestant
        Those that the workload may name.
    rounds : int, optional
        Instead of as many as ``workload.seconds`` allows.

    Raises
    ------
    GateError
        If a result of seqkernels is wrong. A peer with a wrong result is listed in ``absent``.
    Unavailable
        If seqkernels itself cannot run the workload, for instance for want of its instruction set.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(workload.num_threads)
    try:
        return _compare(workload, contestants, rounds)
    finally:
        torch.set_num_threads(threads)


def _compare(
    workload: Workload, contestants: Mapping[str, Contestant], rounds: int | None
) -> Comparison:
    problem = workload.case.problem()
    gate = Gate(problem, workload)
    ready: dict[str, tuple[Contestant, Runner, Accuracy]] = {}
    absent: dict[str, str] = {}
    for name in workload.contestants:
        contestant = contestants[name]
        if not contestant.applies_to(workload):
            continue
        try:
            ready[name] = (contestant, *_admit(contestant, problem, workload, gate))
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
    )
    variant = ready["seqkernels"][1].note
    packed = packed_weights(problem, workload) if variant.startswith("cpu/") else None
    return Comparison(
        workload,
        {
            name: Result(contestant, runner.note, accuracy, samples[name])
            for name, (contestant, runner, accuracy) in ready.items()
        },
        absent,
        variant,
        None if packed is None else packed.workspace_bytes(workload.case.length, 0),
    )


def _admit(
    contestant: Contestant, problem: EncoderProblem, workload: Workload, gate: Gate
) -> tuple[Runner, Accuracy]:
    """Prepare a contestant and check what it computes."""
    with warnings.catch_warnings():
        if not contestant.ours:  # of ours a valid call gives no warning
            warnings.simplefilter("ignore")
        runner = contestant.prepare(problem, workload)
        with runner.around():
            out = runner.tensor(runner.call())
        return runner, gate.check(contestant.title, out, ours=contestant.ours)
