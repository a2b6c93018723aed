"""Who competes: seqkernels as a swapped model calls it, and what its user could run instead.

A contestant gets the task's values in the dtype it reads natively, converted before the clock
starts. All run on the threads that torch is set to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from seqkernels import backends, settings
from seqkernels.backends import cpu, native_module
from seqkernels.benchmark.workload import (
    Contestant,
    Model,
    Runner,
    Task,
    Unavailable,
    Workload,
    without_fast_path,
)
from seqkernels.errors import BackendUnavailableError


def chosen_isa(forced: str | None) -> str | None:
    """The instruction set that the native kernels use; None without the native module.

    Raises
    ------
    Unavailable
        If another one than the one forced would be used.
    """
    if native_module.module is None:
        if forced is not None:
            raise Unavailable(str(native_module.import_error))
        return None
    with settings.override(isa=forced):
        try:
            table = cpu.isa_table()
        except ValueError as error:
            raise Unavailable(str(error)) from None
    for status in table:
        if status.name == forced and not status.chosen:
            raise Unavailable(f"{forced}: " + "; ".join(status.reasons))
    return next((status.name for status in table if status.chosen), None)


@contextmanager
def forced(isa: str | None, backend: str | None = None) -> Iterator[None]:
    """Inference on this instruction set and backend; None: on the best."""
    with torch.inference_mode(), settings.override(isa=isa, backend=backend):
        yield


def runner_of(model: Model, workload: Workload, backend: str | None = None) -> Runner:
    """Of a model of ours, called once, which packs the weights; the note says what ran.

    Raises
    ------
    Unavailable
        If the backend or the workload's instruction set cannot run it.
    """
    chosen_isa(workload.isa)
    module, inputs = model.on(workload.device)
    before = backends.calls.copy()
    try:
        with forced(workload.isa, backend):
            module(**inputs)
    except BackendUnavailableError as error:
        raise Unavailable("; ".join(error.reasons)) from None
    ran = ", ".join(sorted(backends.calls - before))
    return Runner(lambda: module(**inputs), lambda: forced(workload.isa, backend), ran)


class Seqkernels(Contestant[Task]):
    """What a user of seqkernels runs.

    ``dtype`` is that of input and output, None: the task's; ``backend`` is forced, None: the best.
    """

    ours = True

    def __init__(
        self,
        name: str,
        title: str,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        self.name, self.title, self.dtype, self.backend = name, title, dtype, backend

    def prepare(self, task: Task, workload: Workload) -> Runner:
        """As every model of ours."""
        return runner_of(task.ours(self.dtype or task.dtype), workload, self.backend)


class Eager(Contestant[Task]):
    """Torch's modules as they are, on their fast paths where they have any.

    Without them its attention is ``torch.nn.functional.scaled_dot_product_attention``.
    """

    def __init__(
        self,
        name: str,
        title: str,
        dtype: torch.dtype | None = None,
        *,
        nested: bool = True,
        fast_path: bool = True,
    ) -> None:
        self.name, self.title, self.dtype, self.nested = name, title, dtype, nested
        self.fast_path = fast_path

    def prepare(self, task: Task, workload: Workload) -> Runner:
        """Call torch's module."""
        model = task.stock(self.dtype or task.dtype, nested=self.nested and self.fast_path)
        module, inputs = model.on(workload.device)
        around = torch.inference_mode if self.fast_path else without_fast_path
        return Runner(lambda: module(**inputs), around, tensor=task.whole)


class Compiled(Contestant[Task]):
    """``torch.compile`` of torch's module: one graph, inductor's default settings."""

    def __init__(self, name: str, title: str, dtype: torch.dtype | None = None) -> None:
        self.name, self.title, self.dtype = name, title, dtype

    def prepare(self, task: Task, workload: Workload) -> Runner:
        """Compile for this shape, or for all shapes of a sweep."""
        module, inputs = task.stock(self.dtype or task.dtype).on(workload.device)
        if not workload.dynamic:
            torch._dynamo.reset()  # a limit on recompilations would end in eager mode
        compiled = torch.compile(module, fullgraph=True, dynamic=workload.dynamic)
        begin = time.perf_counter()
        with without_fast_path():
            compiled(**inputs)
        shapes = "dynamic" if workload.dynamic else "static"
        return Runner(
            lambda: compiled(**inputs),
            without_fast_path,
            f"{shapes} shapes, prepared in {time.perf_counter() - begin:.0f} s",
        )


class OpenVino(Contestant[Task]):
    """The module converted for OpenVINO's CPU plugin, bf16 where the plugin has it."""

    name, title = "openvino_bf16", "OpenVINO bf16"

    def prepare(self, task: Task, workload: Workload) -> Runner:
        """Static shapes, one stream on all threads, inputs and output in shared memory."""
        # Conversion would send usage statistics over the network; without this module it does not.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            import openvino
        except ImportError as error:
            raise Unavailable(f"{error}; pip install 'seqkernels[bench]'") from None

        module, inputs = task.stock(torch.float32)
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad():
                converted = openvino.convert_model(torch.export.export(module, (), inputs))
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
        converted.reshape({name: list(t.shape) for name, t in inputs.items()})

        core = openvino.Core()
        bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        compiled = core.compile_model(
            converted,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": workload.num_threads,
                # It would pin the calling thread, which the other contestants share.
                "ENABLE_CPU_PINNING": False,
            },
        )
        request = compiled.create_infer_request()
        for name, t in inputs.items():
            request.set_tensor(name, openvino.Tensor(t.numpy(), shared_memory=True))
        out = torch.empty(tuple(compiled.output(0).shape))
        request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))

        def call() -> Tensor:
            assert inputs  # it reads their memory
            request.start_async()
            request.wait()
            return out

        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        told = "" if bf16 else ", the plugin has no bf16 on this processor"
        return Runner(call, note=f"static shapes, computes in {precision}{told}")


def by_name(*contestants: Contestant[Any]) -> dict[str, Contestant[Any]]:
    """The rivals of a kind of workload."""
    return {contestant.name: contestant for contestant in contestants}
