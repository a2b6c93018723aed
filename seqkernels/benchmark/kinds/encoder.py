"""The encoder alone, full-sequence output: beside ``torch.nn.TransformerEncoder``."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkernels.nn
from seqkernels.backends import native_module
from seqkernels.benchmark.contestants import (
    Compiled,
    Eager,
    OpenVino,
    Seqkernels,
    by_name,
    chosen_isa,
)
from seqkernels.benchmark.kinds.packed_attention import FLASH, XFORMERS
from seqkernels.benchmark.workload import (
    Contestant,
    Expected,
    Model,
    Runner,
    Task,
    Unavailable,
    Workload,
    both_ends,
)
from seqkernels.options import EncoderOptions
from seqkernels.testing import EncoderCase

#: All peers that a workload is measured against unless it names fewer.
PEERS = ("eager_fp32", "eager_bf16", "eager_bf16_padded", "compile_bf16", "openvino_bf16")
#: The same on a GPU.
GPU_PEERS = ("eager_bf16", "sdpa_bf16", "compile_bf16", "flash_attn_bf16", "xformers_bf16")
#: Sequences of the output that are held against fp64.
CHECKED = 8


class EncoderTask(Task):
    """A problem of the ``encoder`` op.

    Parameters
    ----------
    case : EncoderCase
        What the problem was drawn from.

    Attributes
    ----------
    problem : EncoderProblem
        As drawn.
    """

    def __init__(self, case: EncoderCase) -> None:
        self.case, self.problem = case, case.problem()

    def ours(self, dtype: torch.dtype) -> Model:
        """The module ``swap`` puts in; at padded positions it does what the case says."""
        module = seqkernels.nn.TransformerEncoder.from_torch(
            self._stock_module(dtype, nested=True), padded_output=self.case.padding
        )
        return Model(module.eval(), self._inputs(dtype))

    def stock(self, dtype: torch.dtype, *, nested: bool = False) -> Model:
        """``torch.nn.TransformerEncoder``; ``nested`` is its ``enable_nested_tensor``."""
        return Model(self._stock_module(dtype, nested=nested), self._inputs(dtype))

    def whole(self, out: Tensor) -> Tensor:
        """With the positions that no sequence fills, which torch's fast path drops."""
        return F.pad(out, (0, 0, 0, self.problem.x.shape[1] - out.shape[1]))

    def _inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        mask = self.problem.key_padding_mask
        inputs = {"src": self.problem.x.to(dtype)}
        return inputs if mask is None else inputs | {"src_key_padding_mask": mask}

    def _stock_module(self, dtype: torch.dtype, *, nested: bool) -> nn.TransformerEncoder:
        case = self.case
        activation: Any = case.activation
        if activation not in ("relu", "gelu"):
            raise ValueError(f"case: activation: expected relu or gelu, got {activation!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nested tensors are off: odd nhead, norm_first
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
            model = nn.TransformerEncoder(layer, case.num_layers, norm, nested)
        present = [w for w in self.problem.weights if w is not None]
        model.load_state_dict(dict(zip(model.state_dict(), present, strict=True)))
        return model.to(dtype).eval()

    def expected(self) -> Expected:
        """The reference on sequences from both ends of the batch."""
        problem = self.problem
        rows, mask = both_ends(len(problem.x), CHECKED), problem.key_padding_mask
        some = dataclasses.replace(
            problem, x=problem.x[rows], key_padding_mask=None if mask is None else mask[rows]
        )
        # What a peer leaves at padded positions is its own affair.
        counts = None if mask is None else ~mask[rows].unsqueeze(-1)
        shape = tuple(problem.x.shape)
        return Expected(shape, rows, some.golden(), some.low_precision().double(), counts)

    def packed(self, isa: str | None) -> tuple[Tensor, Tensor] | None:
        """The weights as seqkernels packs them, behind what stands beside them, or None."""
        isa = chosen_isa(isa)
        if isa is None:
            return None
        problem = self.problem
        options = EncoderOptions(**problem.options)
        return torch.ops.seqkernels.pack_encoder(list(problem.weights), *options, isa)  # type: ignore[no-any-return]

    def workspace_bytes(self, isa: str | None) -> int | None:
        """As the native module says."""
        packed = self.packed(isa)
        if packed is None:
            return None
        return int(torch.ops.seqkernels.encoder_workspace_bytes(packed[0], self.case.length))


class Kernel(Contestant[EncoderTask]):
    """The native op alone, on weights packed beforehand: what a module's call adds is known."""

    name, title = "seqkernels_kernel", "seqkernels, native op alone"
    ours = True

    def prepare(self, task: EncoderTask, workload: Workload) -> Runner:
        """Call the op on packed weights."""
        packed = task.packed(workload.isa)
        if packed is None:
            raise Unavailable(str(native_module.import_error))
        x, mask = task.problem.x, task.problem.key_padding_mask
        op = torch.ops.seqkernels.encoder_packed.default

        def call() -> Tensor:
            return op(x, None, None, mask, None, None, *packed)  # type: ignore[no-any-return]

        return Runner(call, note=f"cpu/{chosen_isa(workload.isa)}")


@dataclass(frozen=True, kw_only=True)
class EncoderWorkload(Workload):
    """An encoder problem.

    Attributes
    ----------
    case : EncoderCase
        The problem, full-sequence output.

    Examples
    --------
    >>> from seqkernels.benchmark import EncoderWorkload
    >>> from seqkernels.testing import EncoderCase
    >>> EncoderWorkload(id="small", group="doc", case=EncoderCase(batch=2)).multiply_adds()
    24883200
    """

    kind = "encoder"
    title = "Encoder"
    columns = (("B", "batch"), ("L", "length"))
    per = "sequence"
    checked = "sequences"
    rivals = by_name(
        Seqkernels("seqkernels", "seqkernels", torch.float32),
        Seqkernels("seqkernels_bf16", "seqkernels, bf16 in/out", torch.bfloat16),
        Seqkernels("seqkernels_triton", "seqkernels, Triton", torch.float32, "triton"),
        Kernel(),
        Eager("eager_fp32", "torch eager fp32", torch.float32),
        Eager("eager_bf16", "torch eager bf16", torch.bfloat16),
        Eager("eager_bf16_padded", "torch eager bf16, padded", torch.bfloat16, nested=False),
        Eager("sdpa_bf16", "torch SDPA bf16", torch.bfloat16, fast_path=False),
        Compiled("compile_bf16", "torch.compile bf16", torch.bfloat16),
        FLASH,
        XFORMERS,
        OpenVino(),
    )

    case: EncoderCase
    contestants: tuple[str, ...] = ("seqkernels", *PEERS)

    @property
    def masked(self) -> bool:
        """Whether there is a padding mask."""
        return self.case.mask != "none"

    def competing(self) -> tuple[str, ...]:
        """Without a mask there is nothing that nested tensors would change."""
        names = self.contestants
        return names if self.masked else tuple(n for n in names if n != "eager_bf16_padded")

    def task(self) -> EncoderTask:
        """Draw the problem."""
        return EncoderTask(self.case)

    def valid_lengths(self) -> tuple[int, ...]:
        """Number of valid events of each sequence."""
        case = self.case
        if not self.masked:
            return (case.length,) * case.batch
        if case.valid is None:
            raise ValueError(f"{self.id}: case: expected lengths in `valid`, got none")
        return case.valid

    def multiply_adds(self) -> int:
        """Multiply-accumulates the result needs: products with weights, scores, weighted sums.

        Only valid events are keys, and only they are queries unless padded ones are to be computed.
        """
        case = self.case
        d, f = case.d_model, case.dim_feedforward
        total = 0
        for keys in self.valid_lengths():
            queries = case.length if case.padding == "compute" else keys
            total += 2 * (queries + keys) * d * d + 2 * queries * (keys * d + d * f)
        return total * case.num_layers

    def sizes(self) -> dict[str, object]:
        """Of the encoder and its input."""
        case = self.case
        return {
            "batch": case.batch,
            "length": case.length,
            "d_model": case.d_model,
            "nhead": case.nhead,
            "dim_feedforward": case.dim_feedforward,
            "num_layers": case.num_layers,
            "masked": self.masked,
            "padded_output": case.padding,
            "valid_events": sum(self.valid_lengths()),
            "multiply_adds": self.multiply_adds(),
        }

    def small(self) -> Self:
        """Three short sequences, narrow layers."""
        case = self.case
        batch, length = min(case.batch, 3), min(case.length, 24)
        small = dataclasses.replace(
            case,
            batch=batch,
            length=length,
            d_model=min(case.d_model, 128),
            dim_feedforward=min(case.dim_feedforward, 64),
            valid=(length, length - 4, length - 8)[:batch] if self.masked else None,
        )
        return dataclasses.replace(self, case=small)


def uniform_lengths(batch: int, low: int, high: int, seed: int = 0) -> tuple[int, ...]:
    """Numbers of valid events of `batch` users, uniform in low .. high.

    Examples
    --------
    >>> from seqkernels.benchmark import uniform_lengths
    >>> len(uniform_lengths(256, 20, 100))
    256
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(low, high + 1, (batch,), generator=generator).tolist())
