"""Kinds of workloads beside the encoder: who competes, and what the gate refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqkernels.benchmark import GateError, Model, Workload, compare
from seqkernels.benchmark.contestants import Compiled, OpenVino
from tests.bench.planted import LINEAR, NORM, RANKER, REQUEST, Edited, Faulty

NORM_BF16 = dataclasses.replace(NORM, dtype=torch.bfloat16)
RANKER_DENSE = dataclasses.replace(RANKER, masked=False)
ALL = {
    "norm": NORM,
    "norm-bf16": NORM_BF16,
    "linear": LINEAR,
    "ranker": RANKER,
    "ranker-dense": RANKER_DENSE,
    "request": REQUEST,
}


def quick(workload: Workload) -> tuple[str, ...]:
    rivals = workload.rivals
    slow = (Compiled, OpenVino)
    return tuple(n for n in rivals if n != "seqkernels_triton" and not isinstance(rivals[n], slow))


@pytest.mark.parametrize("workload", ALL.values(), ids=ALL)
def test_everyone_is_right(workload: Workload) -> None:
    names = quick(workload)
    comparison = compare(dataclasses.replace(workload, contestants=names), rounds=2)
    assert not comparison.absent
    assert set(comparison.results) == set(names)
    peer = comparison.fastest_peer()
    assert peer is not None
    assert peer.startswith("eager")
    made = comparison.as_dict()
    for name, result in comparison.results.items():
        assert (result.accuracy is None) == name.startswith("copy")
        assert bool(made["results"][name]["speedup_of"]) == name.startswith("copy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_norm_and_activation_are_one_op(dtype: torch.dtype) -> None:
    module = LINEAR.task().ours(dtype).module
    assert [(step.kind, step.names) for step in module.steps()] == [("bf16", ("0", "1", "2"))]
    assert (module[1].min_var, module[1].max_abs) == (1e-4, 10.0)


def channel_off(tensor: Tensor, by: float) -> None:
    tensor[3] += by


NORM_FAULTS = {
    "eps": lambda model: setattr(model.module, "eps", 1e-3),
    "bound": lambda model: setattr(model.module, "max_abs", 1.0),
    "mean": lambda model: channel_off(model.module.running_mean, 0.2),
    "variance": lambda model: channel_off(model.module.running_var, 1.0),
    "weight": lambda model: channel_off(model.module.weight, 0.1),
    "bias": lambda model: model.module.bias.zero_(),
    "input": lambda model: model.inputs.update(input=model.inputs["input"].roll(1, 0)),
}
LINEAR_FAULTS = {
    "bound": lambda model: setattr(model.module[1], "max_abs", 1.0),
    "mean": lambda model: channel_off(model.module[1].running_mean, 0.5),
    "bias": lambda model: channel_off(model.module[0].bias, 0.5),
    "norm": lambda model: model.module.__delitem__(1),
    "activation": lambda model: model.module.__delitem__(2),
}


def cut(model: Model) -> None:
    """The earliest event of each history is missing."""
    model.inputs["lengths"] = model.inputs["lengths"] - 1


RANKER_FAULTS = {
    "lengths": cut,
    "candidate": lambda model: model.inputs.update(candidate=model.inputs["candidate"].flip(0)),
    "order": lambda model: model.inputs.update(actions=model.inputs["actions"].flip(1)),
    "dense": lambda model: model.inputs["dense"].add_(0.5),
    "norm": lambda model: model.module.dense_norm.running_var.mul_(1.5),
    "head": lambda model: channel_off(model.module.heads["save"].weight[0], 0.5),
}
REQUEST_FAULTS = {
    "lengths": cut,
    "candidates": lambda model: model.inputs.update(candidates=model.inputs["candidates"].flip(0)),
    "users": lambda model: model.inputs.update(user_index=1 - model.inputs["user_index"]),
    "order": lambda model: model.inputs.update(events=model.inputs["events"].flip(1)),
    "pool": lambda model: setattr(model.module.encoder, "pool_padding", "zero"),
}
FAULTS = [
    *((NORM, name, fault) for name, fault in NORM_FAULTS.items()),
    # Of eps, bf16 rounds away what 1e-3 changes.
    *((NORM_BF16, name, fault) for name, fault in NORM_FAULTS.items() if name != "eps"),
    *((LINEAR, name, fault) for name, fault in LINEAR_FAULTS.items()),
    *((RANKER, name, fault) for name, fault in RANKER_FAULTS.items()),
    *((REQUEST, name, fault) for name, fault in REQUEST_FAULTS.items()),
]


@pytest.mark.parametrize(
    ("workload", "fault"),
    [pytest.param(w, fault, id=f"{w.kind}-{name}") for w, name, fault in FAULTS],
)
def test_a_wrong_result_of_ours_is_refused(
    workload: Workload, fault: Callable[[Model], object]
) -> None:
    alone = dataclasses.replace(workload, contestants=("seqkernels",))
    compare(alone, contestants={"seqkernels": Edited(lambda model: None)}, rounds=1)
    with pytest.raises(GateError, match="break the rule"):
        compare(alone, contestants={"seqkernels": Edited(fault)}, rounds=1)


@pytest.mark.parametrize("workload", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    "fault", [lambda out: out.flip(0), lambda out: 1.1 * out, torch.zeros_like], ids=range(3)
)
def test_a_wrong_peer_is_listed_and_not_timed(
    workload: Workload, fault: Callable[[Tensor], Tensor]
) -> None:
    rivals = workload.rivals
    peer = "eager" if "eager" in rivals else "eager_fp32"
    contestants = {**rivals, peer: Faulty(rivals[peer], fault)}
    narrow = dataclasses.replace(workload, contestants=("seqkernels", peer))
    comparison = compare(narrow, contestants=contestants, rounds=1)
    assert "times that of torch" in comparison.absent[peer]
    assert comparison.fastest_peer() is None
