"""Each contestant computes the workload, and what cannot run says why."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from seqkernels.backends import native_module
from seqkernels.benchmark import Unavailable, Workload, compare
from seqkernels.testing import EncoderCase
from tests.bench.planted import LINEAR, MASKED, NORM, RANKER, RIVALS, workload

DENSE = EncoderCase(batch=2, length=16, nhead=3, final_norm=True)
SMALL = dataclasses.replace(MASKED, num_layers=1)


@pytest.mark.parametrize("case", [MASKED, DENSE], ids=["masked", "dense"])
def test_torch_and_ours(case: EncoderCase) -> None:
    names = ("seqkernels", "seqkernels_bf16", "eager_fp32", "eager_bf16", "eager_bf16_padded")
    comparison = compare(workload(*names, case=case), rounds=1)
    expected = set(names) - ({"eager_bf16_padded"} if case is DENSE else set())
    assert set(comparison.results) == expected
    assert not comparison.absent
    assert comparison.results["eager_fp32"].accuracy.max_ratio < 0.01


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)
@pytest.mark.parametrize("asked", [workload(case=SMALL), LINEAR, RANKER], ids=lambda w: w.kind)
def test_openvino(asked: Workload) -> None:
    names = ("seqkernels", "openvino_bf16")
    comparison = compare(dataclasses.replace(asked, contestants=names), rounds=1)
    assert not comparison.absent
    assert "computes in" in comparison.results["openvino_bf16"].note


@pytest.mark.parametrize(
    ("asked", "peer"),
    [(workload(case=SMALL), "compile_bf16"), (NORM, "compile"), (LINEAR, "compile_bf16")],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_torch_compile(asked: Workload, peer: str) -> None:
    comparison = compare(dataclasses.replace(asked, contestants=("seqkernels", peer)), rounds=1)
    assert not comparison.absent
    assert comparison.results[peer].note.startswith("static shapes, prepared in")
    assert torch.backends.mha.get_fastpath_enabled()


def test_without_openvino_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    comparison = compare(workload("seqkernels", "openvino_bf16"), rounds=1)
    assert "pip install 'seqkernels[bench]'" in comparison.absent["openvino_bf16"]


@pytest.mark.skipif(native_module.module is None, reason="the native module was not built")
def test_kernel_alone_and_forced_instruction_set() -> None:
    names = ("seqkernels", "seqkernels_kernel", "eager_fp32")
    forced = dataclasses.replace(workload(*names), isa="portable")
    comparison = compare(forced, rounds=2)
    assert comparison.variant == "cpu/portable"
    assert comparison.results["seqkernels_kernel"].note == "cpu/portable"
    assert comparison.outside_kernel() is not None
    assert 0 < comparison.workspace_bytes < 2**21


def test_an_instruction_set_that_cannot_run_is_no_comparison() -> None:
    with pytest.raises(Unavailable):
        compare(dataclasses.replace(workload("seqkernels"), isa="unheard_of"), rounds=1)


def test_threads_are_set_and_restored() -> None:
    seen = []
    asked = dataclasses.replace(workload("seqkernels"), threads=2)

    class Spy(type(RIVALS["seqkernels"])):
        def prepare(self, task, workload):
            seen.append(torch.get_num_threads())
            return super().prepare(task, workload)

    compare(asked, contestants={"seqkernels": Spy("seqkernels", "", torch.float32)}, rounds=1)
    assert seen == [2]
    assert torch.get_num_threads() == 1
