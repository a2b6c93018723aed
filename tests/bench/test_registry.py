"""The registry holds what the project promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.registry import REGISTRY, SHAPES, shrunk
from bench.verdicts import judge
from seqkernels.benchmark import KINDS, compare, gpu
from seqkernels.benchmark.kinds.encoder import GPU_PEERS, PEERS
from tests.bench.planted import Faulty

BY_ID = {entry.workload.id: entry for entry in REGISTRY}


def test_ids_are_unique_and_contestants_exist() -> None:
    assert len(BY_ID) == len(REGISTRY)
    for entry in REGISTRY:
        rivals = entry.workload.rivals
        assert set(entry.workload.contestants) <= set(rivals)
        assert entry.workload.contestants[0] == "seqkernels"
        assert entry.bars
        assert all(bar.over is None or bar.over in rivals for bar in entry.bars)


def test_key_workloads() -> None:
    dense, masked, one = (BY_ID[f"transact/{n}"].workload for n in ("dense", "masked", "one"))
    for workload in (dense, masked, one):
        case = workload.case
        sizes = (case.d_model, case.nhead, case.dim_feedforward, case.num_layers, case.length)
        assert sizes == (96, 2, 32, 2, 100)
        assert (case.activation, case.norm_first, case.latest_k) == ("relu", False, None)
        assert set(PEERS) <= set(workload.contestants)
    assert (dense.case.batch, masked.case.batch, one.case.batch) == (256, 256, 1)
    assert (dense.threads, masked.threads, one.threads) == (0, 0, 1)
    lengths = masked.valid_lengths()
    assert (min(lengths), max(lengths)) == (20, 100)
    assert 55 < sum(lengths) / len(lengths) < 65


def test_sweeps_shapes_and_instruction_sets() -> None:
    batches = [w.case.batch for w in _group("batch")]
    assert batches == [2**i for i in range(11)]
    lengths = [w.case.length for w in _group("length")]
    assert (min(lengths), max(lengths)) == (16, 512)
    shapes = {
        (w.case.d_model, w.case.nhead, w.case.dim_feedforward, w.case.length, w.masked)
        for w in _group("shapes")
    }
    assert shapes == {(*shape[:4], masked) for shape in SHAPES for masked in (False, True)}
    assert [w.isa for w in _group("isa")] == ["avx512", "avx2"]


def test_batch_norm_linear_and_ranker() -> None:
    norms = _group("batch_norm")
    assert [(w.rows, w.channels) for w in norms] == [(65536, 256)] * 2
    assert [w.dtype for w in norms] == [torch.float32, torch.bfloat16]
    (linear,) = _group("linear")
    assert (linear.rows, linear.in_features, linear.out_features) == (4096, 512, 512)
    assert linear.sizes()["multiply_adds"] == 4096 * 512 * 512
    rankers = _group("ranker")
    assert [(w.batch, w.masked) for w in rankers] == [
        (32, True),
        (256, True),
        (2048, True),
        (256, False),
    ]
    for ranker in rankers:
        config, lengths = ranker.config, ranker.valid_lengths()
        assert (config.d_model, config.num_layers, ranker.length) == (96, 2, 100)
        assert set(lengths) <= (set(range(20, 101)) if ranker.masked else {100})
    for workload in (*norms, linear, *rankers):
        assert set(workload.contestants) == set(workload.rivals) - {"seqkernels_triton"}


def test_gpu() -> None:
    workloads = _group("gpu")
    assert {w.device for w in workloads} == {"cuda"}
    assert {w.device for w in _all() if w.group != "gpu"} == {"cpu"}
    assert [w.id for w in workloads if not w.replay] == ["gpu/transact-b1-launched"]
    assert {w.kind for w in workloads} == set(KINDS) - {"linear"}
    for workload in workloads:
        assert {"seqkernels", "seqkernels_triton"} <= set(workload.contestants)
        if workload.kind == "encoder":
            assert set(GPU_PEERS) <= set(workload.contestants)
        if gpu.missing():
            assert shrunk(BY_ID[workload.id]).workload.device == "cpu"


def test_multiply_adds() -> None:
    """12.4 MFLOP a layer and sequence at the TransAct shape; two FLOP each."""
    dense, masked = BY_ID["transact/dense"].workload, BY_ID["transact/masked"].workload
    by_hand = 2 * (100 * (4 * 96 * 96 + 2 * 96 * 32) + 2 * 100 * 100 * 96)
    assert dense.multiply_adds() == 256 * by_hand
    assert by_hand == pytest.approx(12.4e6, rel=0.01)
    assert masked.multiply_adds() < 0.6 * dense.multiply_adds()


@pytest.mark.parametrize("name", ["transact/masked", "shapes/d64-h1-f32-l256/masked"])
def test_a_small_copy_runs_and_a_slow_one_misses_its_bar(name: str) -> None:
    entry = shrunk(BY_ID[name])
    rivals = entry.workload.rivals
    contestants = {**rivals, "seqkernels": Faulty(rivals["seqkernels"], delay=0.02)}
    narrow = dataclasses.replace(entry.workload, contestants=("seqkernels", "eager_fp32"))
    slow = compare(narrow, contestants=contestants, rounds=2)
    speed = [v for v in judge({name: slow.as_dict()}) if "fastest" in v.bar]
    assert [v.met for v in speed] == [False]


def _all():
    return [e.workload for e in REGISTRY]


def _group(group: str):
    return [w for w in _all() if w.group == group]
