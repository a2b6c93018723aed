"""Timing on a GPU as far as it can be seen without one, and the attention packages there."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels.benchmark import Runner, Unavailable, compare, gpu, interleave
from seqkernels.testing import EncoderCase
from tests.bench.planted import MASKED, workload

DENSE = EncoderCase(batch=2, length=16, norm_first=True, final_norm=True)


class Device:
    """A device whose every launch takes 2 ms of its own clock; it runs at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.captured: list[Any] | None = None
        self.launched = self.waits = 0

    def launch(self) -> str:
        if self.captured is None:
            self.now += 2e-3
            self.launched += 1
        else:
            self.captured.append(self.launch)
        return "out"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """In the place of torch's CUDA device."""
    made = Device()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.synchronized = False

        def record(self) -> None:
            self.time = made.now

        def synchronize(self) -> None:
            self.synchronized = True

        def elapsed_time(self, end: Event) -> float:
            assert end.synchronized
            return (end.time - self.time) * 1e3

    class Graph:
        calls: tuple[Any, ...] = ()

        def replay(self) -> None:
            for call in self.calls:
                call()

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            made.waits += 1

    @contextmanager
    def capture(graph: Graph):
        made.captured = []
        try:
            yield
            graph.calls = tuple(made.captured)
        finally:
            made.captured = None

    @contextmanager
    def stream(which: Stream):
        yield

    def synchronize() -> None:
        if made.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    fakes = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "graph": capture,
        "stream": stream,
        "synchronize": synchronize,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return made


def test_time_is_that_of_the_device(device: Device) -> None:
    runner = Runner(device.launch)
    samples = interleave({"one": runner}, rounds=3, clock=gpu.EventClock())
    assert samples["one"].spread.median == pytest.approx(2e-3)


def test_a_captured_call_is_replayed(device: Device) -> None:
    runner = gpu.replayed(Runner(device.launch, note="cuda/sm_90"))
    assert runner.note == "cuda/sm_90, graph"
    assert device.launched == gpu.WARM_UP
    assert device.waits == 2
    assert [runner.call(), runner.call()] == ["out", "out"]
    assert device.launched == gpu.WARM_UP + 2


def test_what_cannot_be_captured_is_called(device: Device) -> None:
    def call() -> str:
        torch.cuda.synchronize()
        return device.launch()

    runner = gpu.replayed(Runner(call))
    assert runner.call is call
    assert runner.note == "no graph: operation not permitted when stream is capturing"


@pytest.mark.skipif(gpu.missing() is None, reason="there is a GPU")
def test_without_a_gpu_there_is_no_comparison() -> None:
    with pytest.raises(Unavailable, match="torch finds no CUDA device"):
        compare(dataclasses.replace(workload("seqkernels"), device="cuda"), rounds=1)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    """Sequence by sequence."""
    parts = []
    for begin, end in itertools.pairwise(starts):
        heads = (t[begin:end].transpose(0, 1) for t in (q, k, v))  # [H, L, head_dim]
        parts.append(F.scaled_dot_product_attention(*heads).transpose(0, 1))
    return torch.cat(parts)


def libraries(shift: int) -> dict[str, Any]:
    """Both packages, right with a shift of 0; else sequences begin so many tokens too late."""

    def flash(q, k, v, starts_q, starts_k, longest_q, longest_k):
        assert starts_q.dtype is starts_k.dtype is torch.int32
        assert longest_q == longest_k == int(starts_q.diff().max())
        starts = starts_q.tolist()
        return packed_attention(q, k, v, [0, *(s + shift for s in starts[1:-1]), starts[-1]])

    def from_seqlens(lengths, device):
        assert device == torch.device("cpu")
        return [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def memory_efficient(q, k, v, attn_bias):
        assert q.shape[0] == 1
        starts = [0, *(s + shift for s in attn_bias[1:-1]), attn_bias[-1]]
        return packed_attention(q[0], k[0], v[0], starts)[None]

    mask = SimpleNamespace(from_seqlens=from_seqlens)
    bias = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=mask))
    return {
        "flash_attn": SimpleNamespace(flash_attn_varlen_func=flash),
        "xformers.ops": SimpleNamespace(memory_efficient_attention=memory_efficient, fmha=bias),
    }


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("case", [MASKED, DENSE], ids=["masked", "dense"])
def test_attention_packages(case: EncoderCase, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in libraries(shift).items():
        monkeypatch.setitem(sys.modules, name, module)
    names = ("seqkernels", "sdpa_bf16", "flash_attn_bf16", "xformers_bf16")
    comparison = compare(workload(*names, case=case), rounds=1)
    wrong = set(names[2:]) if shift else set()
    assert set(comparison.results) == set(names) - wrong
    assert set(comparison.absent) == wrong
    assert all("error against fp64" in why for why in comparison.absent.values())


def test_packages_that_are_absent_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    comparison = compare(workload("seqkernels", "flash_attn_bf16"), rounds=1)
    assert "flash_attn" in comparison.absent["flash_attn_bf16"]


@pytest.mark.skipif(gpu.missing() is None, reason="there is a GPU")
def test_a_backend_that_cannot_run_is_told() -> None:
    comparison = compare(workload("seqkernels", "seqkernels_triton"), rounds=1)
    assert "it takes CUDA tensors" in comparison.absent["seqkernels_triton"]
