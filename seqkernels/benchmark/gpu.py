"""Timing on a GPU: by the device's own clock, and without the host where a graph can replace it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from seqkernels.benchmark.workload import Runner

#: Calls before a capture: libraries choose their kernels and allocate their workspaces in them.
WARM_UP = 3


def missing() -> str | None:
    """Why there is no GPU to measure on; None: there is one."""
    if torch.cuda.is_available():
        return None
    return "torch finds no CUDA device"


class EventClock:
    """Of work on the current CUDA stream, between two events in it."""

    def wait(self) -> None:
        """For the device."""
        torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """From the first call's start on the device to the last one's end."""
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / repeats


def replayed(runner: Runner) -> Runner:
    """The runner with its call captured as a CUDA graph, which is then replayed.

    A call that cannot be captured, for instance because it reads a result on the host, is timed as
    it is; the note says why.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with runner.around():
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    runner.call()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                out = runner.call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).strip().partition("\n")[0]
        return dataclasses.replace(runner, note=_joined(runner.note, f"no graph: {reason}"))

    def replay() -> Any:
        graph.replay()
        return out

    return dataclasses.replace(runner, call=replay, note=_joined(runner.note, "graph"))


def _joined(*notes: str) -> str:
    return ", ".join(note for note in notes if note)
