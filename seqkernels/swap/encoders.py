"""Transformer encoders and their layers: one kernel for all within."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from seqkernels import backends
from seqkernels.nn import TransformerEncoder, TransformerEncoderLayer, UserSequenceEncoder, read
from seqkernels.nn.transformer_encoder_layer import LAYER_TYPES
from seqkernels.ops.encoder_checks import split_mask
from seqkernels.swap import choice
from seqkernels.swap.choice import Why
from seqkernels.swap.kind import DEFINITION, Job, Kind, Outcome


class Encoders(Kind):
    """Torch's two, outside of other encoders; a `UserSequenceEncoder` is ours from the start."""

    replaces = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
    ours = (TransformerEncoder, TransformerEncoderLayer, UserSequenceEncoder)
    op = "encoder"
    whole = True
    stage = 0

    def reasons(self, module: nn.Module) -> list[str]:
        """Whatever keeps the op from standing for the module."""
        reasons: list[str] = []
        if isinstance(module, nn.TransformerEncoder):
            read.read_encoder(module, LAYER_TYPES, reasons, any_mode=True)
        else:
            read.read_single_layer(module, reasons, any_mode=True)
        for name, tensor in module.named_parameters(recurse=False):
            if type(tensor) not in (Tensor, nn.Parameter):
                reasons.append(f"{name} is a {type(tensor).__name__}, not a plain tensor")
        return reasons

    def problem(self, module: nn.Module, device: str, dtype: torch.dtype) -> backends.Problem:
        """With its sizes, which decide which kernels take it."""
        return backends.Problem(self.op, device, dtype, read.encoder_size(module))

    def replace(self, module: Any, name: str, job: Job) -> Outcome:
        """Change it, and the layers of an encoder with it."""
        with ExitStack() as changes:
            changes.enter_context(job.report.changing(module))
            if isinstance(module, nn.TransformerEncoder):
                for layer in dict.fromkeys(module.layers):
                    changes.enter_context(job.report.changing(layer))
                TransformerEncoder._adopt(module, job.padded_output, job.backend)
            else:
                TransformerEncoderLayer._adopt(module, job.padded_output, job.backend)
        padded = str(module.padded_output)
        return Outcome(f"replaced, padded_output={padded!r}", padded)

    def runs(self, module: Any, call: dict[str, Any]) -> tuple[str, Why]:
        """Masks count too, and torch's forward where it is faster than the reference."""
        x = call.get("events", call.get("src"))
        if not isinstance(x, Tensor):
            x = next(module.parameters())
        if isinstance(module, UserSequenceEncoder):
            reasons = module.fallback_reasons()
        else:
            reasons = module.fallback_reasons(x, call.get("mask", call.get("src_mask")))
        padding_mask = call.get("src_key_padding_mask", call.get("key_padding_mask"))
        if isinstance(padding_mask, Tensor) and split_mask(padding_mask).bias is not None:
            reasons.append(backends.FEATURES["bias"])
        problem = self.problem(module, x.device.type, x.dtype)
        label, others = choice.what_runs(problem, module.backend)
        if reasons:
            return DEFINITION, [("fused kernel", tuple(reasons)), *others]
        if label == "reference" and choice.asked(module.backend) == "auto":
            return DEFINITION, others
        if isinstance(module, TransformerEncoder) and "src" in call:
            others += _padding(module, call)
        return label, others


def _padding(encoder: TransformerEncoder, call: dict[str, Any]) -> Why:
    """Which of its two answers torch has for this batch, where the module follows it."""
    mask = call.get("src_key_padding_mask")
    if encoder.padded_output != "stock" or mask is None:
        return []
    with torch.inference_mode():  # with gradients torch has one answer
        taken = encoder.padding_of(call["src"], call.get("mask"), mask)
    other = "zero" if taken == "compute" else "compute"
    told = (
        f"padded positions return {taken!r} for this batch, as torch.nn decides for each batch; "
        "name padded_output='zero' or 'compute' to make them independent of the batch"
    )
    return [(f"padded_output={other!r}", (told,))]


def request_scoring(model: nn.Module) -> list[str]:
    """Encoders that may see one user with many candidates, once swapped."""
    own = {m.encoder for m in model.modules() if isinstance(m, UserSequenceEncoder)}
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, UserSequenceEncoder) and module.fusion != "none")
        or (isinstance(module, TransformerEncoder) and module not in own)
    ]
