"""Batch norm alone, by running statistics: beside ``torch.nn.BatchNorm1d`` and a copy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

import seqkernels.nn
from seqkernels.backends import native_module
from seqkernels.benchmark.contestants import Compiled, Eager, Seqkernels, by_name, chosen_isa
from seqkernels.benchmark.workload import (
    Contestant,
    Expected,
    Model,
    Runner,
    Task,
    Unavailable,
    Workload,
    both_ends,
    expected_of_stock,
    in_groups,
)
from seqkernels.nn.resilient_batch_norm import finite
from seqkernels.options import ResilientBatchNormOptions

#: Rows of the output that are held against fp64, and how many of them make a group for the rule.
CHECKED, GROUP = 64, 16


class BatchNormTask(Task):
    """Columns that differ in mean and spread, with their statistics.

    Parameters
    ----------
    rows, channels : int
        N, C.
    dtype : torch.dtype
        Of input and output.
    """

    def __init__(self, rows: int, channels: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        g = torch.Generator().manual_seed(0)
        spread = 0.1 + 3.0 * torch.rand(channels, generator=g)  # [C]
        shift = 2.0 * torch.randn(channels, generator=g)  # [C]
        self.x = (shift + spread * torch.randn(rows, channels, generator=g)).bfloat16()  # [N, C]
        self.norm = random_norm(shift, spread.square(), g)

    def ours(self, dtype: torch.dtype) -> Model:
        """The module with its default bounds."""
        norm = seqkernels.nn.ResilientBatchNorm1d(len(self.norm.weight))
        norm.load_state_dict(self.norm.state_dict())
        return Model(norm.eval(), {"input": self.x.to(dtype)})

    def stock(self, dtype: torch.dtype, *, nested: bool = False) -> Model:
        """``torch.nn.BatchNorm1d``."""
        norm = nn.BatchNorm1d(len(self.norm.weight))
        norm.load_state_dict(self.norm.state_dict())
        return Model(norm.to(dtype).eval(), {"input": self.x.to(dtype)})

    def expected(self) -> Expected:
        """By torch's module; the yardstick is its run in the input's dtype."""
        return expected_of_stock(
            self, in_groups(both_ends(len(self.x), CHECKED), GROUP), self.dtype
        )


def random_norm(mean: Tensor, var: Tensor, generator: torch.Generator) -> nn.BatchNorm1d:
    """A batch norm with these statistics and random weights, all exact in bf16, in eval mode."""
    norm = nn.BatchNorm1d(len(mean)).eval()
    values = {
        "running_mean": mean,
        "running_var": var,
        "weight": 0.5 + torch.rand(len(mean), generator=generator),
        "bias": torch.randn(len(mean), generator=generator),
    }
    norm.load_state_dict({n: v.bfloat16().float() for n, v in values.items()}, strict=False)
    return norm


class Kernel(Contestant[BatchNormTask]):
    """The native op alone, on constants packed beforehand."""

    name, title = "seqkernels_kernel", "seqkernels, native op alone"
    ours = True

    def prepare(self, task: BatchNormTask, workload: Workload) -> Runner:
        """Call the op on packed constants."""
        isa = chosen_isa(workload.isa)
        if isa is None:
            raise Unavailable(str(native_module.import_error))
        model = task.ours(task.dtype)
        norm, x = model.module, model.inputs["input"]
        assert isinstance(norm, seqkernels.nn.ResilientBatchNorm1d)
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)  # [C] each
        options = ResilientBatchNormOptions(norm.eps, norm.min_var, finite(norm.max_abs))
        packed = torch.ops.seqkernels.pack_resilient_batch_norm(*tensors, *options, isa)
        op = torch.ops.seqkernels.resilient_batch_norm_packed.default

        def call() -> Tensor:
            return op(x, *packed)  # type: ignore[no-any-return]

        return Runner(call, note=f"cpu/{isa}")


class CopyNew(Contestant[BatchNormTask]):
    """A copy of the input in new memory, as an output is."""

    name, title = "copy_new", "copy into new memory"
    yardstick = True

    def prepare(self, task: BatchNormTask, workload: Workload) -> Runner:
        """Torch's ``clone``."""
        return Runner(task.x.to(workload.device, task.dtype).clone)


class CopyInto(Contestant[BatchNormTask]):
    """A copy of the input into memory that is there already."""

    name, title = "copy_into", "copy into the same memory"
    yardstick = True

    def prepare(self, task: BatchNormTask, workload: Workload) -> Runner:
        """Torch's ``copy_``."""
        x = task.x.to(workload.device, task.dtype)
        out = torch.empty_like(x)
        return Runner(lambda: out.copy_(x))


@dataclass(frozen=True, kw_only=True)
class BatchNormWorkload(Workload):
    """Batch norm of [rows, channels] by running statistics.

    Attributes
    ----------
    rows, channels : int
        N, C.
    dtype : torch.dtype
        Of input and output, for every contestant.

    Examples
    --------
    >>> import torch
    >>> from seqkernels.benchmark import BatchNormWorkload
    >>> BatchNormWorkload(id="small", group="doc", rows=8, channels=4).sizes()["bytes"]
    256
    """

    kind = "resilient_batch_norm"
    title = "Batch norm"
    columns = (("N", "batch"), ("C", "channels"), ("dtype", "dtype"))
    checked = "groups of rows"
    yardstick = "torch's own run in the same dtype"
    rivals = by_name(
        Seqkernels("seqkernels", "seqkernels"),
        Seqkernels("seqkernels_triton", "seqkernels, Triton", backend="triton"),
        Kernel(),
        CopyNew(),
        CopyInto(),
        Eager("eager", "torch eager"),
        Compiled("compile", "torch.compile"),
    )

    rows: int
    channels: int
    dtype: torch.dtype = torch.float32
    contestants: tuple[str, ...] = tuple(n for n in rivals if n != "seqkernels_triton")

    def task(self) -> BatchNormTask:
        """Draw input and statistics."""
        return BatchNormTask(self.rows, self.channels, self.dtype)

    def sizes(self) -> dict[str, object]:
        """Of input and output."""
        return {
            "batch": self.rows,
            "channels": self.channels,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bytes": 2 * self.rows * self.channels * self.dtype.itemsize,
        }

    def small(self) -> Self:
        """A hundred rows."""
        return dataclasses.replace(self, rows=min(self.rows, 100), channels=min(self.channels, 40))
