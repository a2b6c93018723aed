"""Who competes: seqkernels as a swapped model calls it, and what its user could run instead.

A contestant gets the problem's values in the dtype it reads natively, converted before the clock
starts. All run on the threads that torch is set to.
"""

from __future__ import annotations

import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import seqkernels.nn
from seqkernels import backends, settings
from seqkernels.backends import cpu
from seqkernels.backends.encoder_weights import LAYOUT as ENCODER_WEIGHTS
from seqkernels.benchmark.workloads import Workload
from seqkernels.testing import EncoderCase, EncoderProblem


class Unavailable(Exception):
    """A contestant cannot compete; the message says why."""


@dataclass(frozen=True)
class Runner:
    """A contestant that is ready.

    Attributes
    ----------
    call : callable
        What is timed.
    around : callable
        Makes the context of a turn, outside the clock.
    note : str
        What ran, for the report.
    tensor : callable
        Turns what ``call`` returned into the output [B, L, D].
    """

    call: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
    note: str = ""
    tensor: Callable[[Any], Tensor] = lambda out: out


class Contestant(ABC):
    """One way to compute a workload."""

    name: str
    title: str
    ours = False

    def applies_to(self, workload: Workload) -> bool:
        """Whether it has anything to say there."""
        return True

    @abstractmethod
    def prepare(self, problem: EncoderProblem, workload: Workload) -> Runner:
        """Build what is timed; raise ``Unavailable`` if that cannot be."""


def stock_encoder(
    case: EncoderCase, problem: EncoderProblem, dtype: torch.dtype, *, nested: bool
) -> nn.TransformerEncoder:
    """``torch.nn.TransformerEncoder`` with the problem's weights, in eval mode.

    Parameters
    ----------
    nested : bool
        Its ``enable_nested_tensor``: with a mask, whether its fast path packs the valid events.
    """
    activation: Any = case.activation
    if activation not in ("relu", "gelu"):
        raise ValueError(f"case: activation: expected relu or gelu, got {activation!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are off, for odd nhead or norm_first
        layer = nn.TransformerEncoderLayer(
            case.d_model,
            case.nhead,
            case.dim_feedforward,
            dropout=0.0,
            activation=activation,
            layer_norm_eps=case.layer_norm_eps,
            batch_first=True,
            norm_first=case.norm_first,
            bias=case.bias,
        )
        norm = nn.LayerNorm(case.d_model, case.final_norm_eps) if case.final_norm else None
        model = nn.TransformerEncoder(layer, case.num_layers, norm, enable_nested_tensor=nested)
    present = [w for w in problem.weights if w is not None]
    model.load_state_dict(dict(zip(model.state_dict(), present, strict=True)))
    return model.to(dtype).eval()


def chosen_isa(forced: str | None) -> str | None:
    """The instruction set that the native kernels use; None without the native module.

    Raises
    ------
    Unavailable
        If another one than the one forced would be used.
    """
    if cpu.native() is None:
        if forced is not None:
            raise Unavailable(str(cpu.import_error))
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
def _forced(isa: str | None) -> Iterator[None]:
    with torch.inference_mode(), settings.override(isa=isa):
        yield


class Seqkernels(Contestant):
    """The module that ``swap`` puts in place of torch's."""

    ours = True

    def __init__(self, name: str, title: str, dtype: torch.dtype) -> None:
        self.name, self.title, self.dtype = name, title, dtype

    def prepare(self, problem: EncoderProblem, workload: Workload) -> Runner:
        """Its output at padded positions is what the case says."""
        chosen_isa(workload.isa)
        stock = stock_encoder(workload.case, problem, self.dtype, nested=True)
        module = seqkernels.nn.TransformerEncoder.from_torch(
            stock, padded_output=workload.case.padding
        ).eval()
        x, mask = problem.x.to(self.dtype), problem.key_padding_mask
        before = backends.calls.copy()
        with _forced(workload.isa):
            module(x, src_key_padding_mask=mask)
        ran = ", ".join(backends.calls - before)
        return Runner(
            call=lambda: module(x, src_key_padding_mask=mask),
            around=lambda: _forced(workload.isa),
            note=ran,
        )


class Kernel(Contestant):
    """The native call alone, on arguments made beforehand: what a module's call adds is known."""

    name, title = "seqkernels_kernel", "seqkernels, native call alone"
    ours = True

    def prepare(self, problem: EncoderProblem, workload: Workload) -> Runner:
        """Write one output over and over."""
        packed = packed_weights(problem, workload)
        if packed is None:
            raise Unavailable(str(cpu.import_error))
        case, x, mask = workload.case, problem.x, problem.key_padding_mask
        forward = packed.forward
        out = torch.empty_like(x)
        # Fusion and the summary are off; a bool mask is one byte an entry.
        masking = (0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())
        padding = ("zero", "compute").index(case.padding)
        arguments = (
            *(x.data_ptr(), False, *x.shape[:2], *x.stride()[:2]),
            *(0, 0, 0, *masking, 0, 0, padding, False, -1, False),
            *(out.data_ptr(), *out.stride()[:2], workload.num_threads),
        )

        def call() -> Tensor:
            forward(*arguments)
            return out

        return Runner(call, note=f"cpu/{packed.isa}")


def packed_weights(problem: EncoderProblem, workload: Workload) -> Any:
    """The native object that holds the problem's weights, packed as seqkernels would, or None."""
    isa = chosen_isa(workload.isa)
    if isa is None:
        return None
    options = backends.EncoderOptions(
        *(problem.options[name] for name in backends.EncoderOptions._fields)
    )
    weight_set = backends.lookup(ENCODER_WEIGHTS, problem.weights)
    return cpu._pack(problem.weights, weight_set, options, isa)


class Eager(Contestant):
    """``torch.nn.TransformerEncoder`` as it is, on its fast path."""

    def __init__(self, name: str, title: str, dtype: torch.dtype, *, nested: bool) -> None:
        self.name, self.title, self.dtype, self.nested = name, title, dtype, nested

    def applies_to(self, workload: Workload) -> bool:
        """Without a mask there is nothing that nested tensors would change."""
        return self.nested or workload.masked

    def prepare(self, problem: EncoderProblem, workload: Workload) -> Runner:
        """Call torch's module."""
        model = stock_encoder(workload.case, problem, self.dtype, nested=self.nested)
        x, mask = problem.x.to(self.dtype), problem.key_padding_mask
        return Runner(lambda: model(x, src_key_padding_mask=mask))


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """The fused layer of torch is one opaque op, in which a compiler finds nothing to do."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Compiled(Contestant):
    """``torch.compile`` of torch's module in bf16: one graph, inductor's default settings."""

    name, title = "compile_bf16", "torch.compile bf16"

    def prepare(self, problem: EncoderProblem, workload: Workload) -> Runner:
        """Compile for this shape, or for all shapes of a sweep."""
        model = stock_encoder(workload.case, problem, torch.bfloat16, nested=False)
        if not workload.dynamic:
            torch._dynamo.reset()  # a limit on recompilations would end in eager mode
        compiled = torch.compile(model, fullgraph=True, dynamic=workload.dynamic)
        x, mask = problem.x.to(torch.bfloat16), problem.key_padding_mask
        begin = time.perf_counter()
        with _without_fast_path():
            compiled(x, src_key_padding_mask=mask)
        shapes = "dynamic" if workload.dynamic else "static"
        return Runner(
            lambda: compiled(x, src_key_padding_mask=mask),
            _without_fast_path,
            f"{shapes} shapes, prepared in {time.perf_counter() - begin:.0f} s",
        )


class OpenVino(Contestant):
    """The module converted for OpenVINO's CPU plugin, bf16 where the plugin has it."""

    name, title = "openvino_bf16", "OpenVINO bf16"

    def prepare(self, problem: EncoderProblem, workload: Workload) -> Runner:
        """Static shapes, one stream on all threads, inputs and output in shared memory."""
        # Conversion would send usage statistics over the network; without this module it does not.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            import openvino
        except ImportError as error:
            raise Unavailable(f"{error}; pip install 'seqkernels[bench]'") from None

        model = stock_encoder(workload.case, problem, torch.float32, nested=False)
        inputs = {"src": problem.x}
        if problem.key_padding_mask is not None:
            inputs["src_key_padding_mask"] = problem.key_padding_mask
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad():
                converted = openvino.convert_model(torch.export.export(model, (), inputs))
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
        out = torch.empty_like(problem.x)
        request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))

        def call() -> Tensor:
            request.start_async()
            request.wait()
            return out

        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        told = "" if bf16 else ", the plugin has no bf16 on this processor"
        return Runner(call, note=f"static shapes, computes in {precision}{told}")


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Seqkernels("seqkernels", "seqkernels", torch.float32),
        Seqkernels("seqkernels_bf16", "seqkernels, bf16 in/out", torch.bfloat16),
        Kernel(),
        Eager("eager_fp32", "torch eager fp32", torch.float32, nested=True),
        Eager("eager_bf16", "torch eager bf16", torch.bfloat16, nested=True),
        Eager("eager_bf16_padded", "torch eager bf16, padded", torch.bfloat16, nested=False),
        Compiled(),
        OpenVino(),
    )
}
