"""A request: few users, many candidates; beside the encoder over the repeated user."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from seqkernels.benchmark.contestants import (
    Compiled,
    Eager,
    OpenVino,
    Seqkernels,
    by_name,
    runner_of,
)
from seqkernels.benchmark.workload import (
    Contestant,
    Expected,
    Model,
    Runner,
    Task,
    Workload,
    both_ends,
    without_fast_path,
)
from seqkernels.models import EngagementRankerConfig
from seqkernels.models.stock import StockSequence
from seqkernels.nn import UserSequenceEncoder
from seqkernels.testing import EncoderCase

#: Candidates whose summary is held against fp64, each for itself.
CHECKED = 16
LATEST = 10


class _Scoring(nn.Module):
    """``score_candidates`` as a module's forward; or `forward` on the repeated user."""

    def __init__(self, encoder: UserSequenceEncoder, *, repeated: bool) -> None:
        super().__init__()
        self.encoder, self.repeated = encoder, repeated

    def forward(
        self, events: Tensor, candidates: Tensor, user_index: Tensor, lengths: Tensor
    ) -> Tensor:
        if self.repeated:
            out: Tensor = self.encoder(events[user_index], candidates, lengths=lengths[user_index])
            return out
        return self.encoder.score_candidates(events, candidates, user_index, lengths=lengths)


class _StockScoring(nn.Module):
    """Early fusion as one writes it: the user repeated, the candidate joined to every event."""

    def __init__(self, sequence: StockSequence) -> None:
        super().__init__()
        self.sequence = sequence

    def forward(
        self, events: Tensor, candidates: Tensor, user_index: Tensor, lengths: Tensor
    ) -> Tensor:
        out: Tensor = self.sequence(events[user_index], lengths[user_index], candidates)
        return out


class RequestTask(Task):
    """Events of U users, N candidates, an encoder in the TransAct shape, latest 10 + max pool."""

    def __init__(
        self, lengths: tuple[int, ...], length: int, candidates: int, num_layers: int
    ) -> None:
        g = torch.Generator().manual_seed(0)
        users = len(lengths)
        self.num_layers = num_layers
        case = EncoderCase(batch=users, length=length, fusion="concat", num_layers=num_layers)
        drawn = case.problem()
        self.weights = [w for w in drawn.weights if w is not None]
        self.inputs = {
            "events": drawn.x,
            "candidates": torch.randn(candidates, 32, generator=g).bfloat16().float(),
            "user_index": torch.randint(users, (candidates,), generator=g),
            "lengths": torch.tensor(lengths),
        }

    def ours(self, dtype: torch.dtype) -> Model:
        """``score_candidates``."""
        return self._ours(dtype, repeated=False)

    def forward_repeated(self, dtype: torch.dtype) -> Model:
        """The same module's ``forward`` over the repeated user."""
        return self._ours(dtype, repeated=True)

    def _ours(self, dtype: torch.dtype, *, repeated: bool) -> Model:
        encoder = UserSequenceEncoder(
            64, 32, 2, 32, self.num_layers, latest_k=LATEST, pool_padding="exclude", dropout=0.0
        )
        encoder.encoder.load_state_dict(
            dict(zip(encoder.encoder.state_dict(), self.weights, strict=True))
        )
        return Model(_Scoring(encoder, repeated=repeated).to(dtype).eval(), self._inputs(dtype))

    def stock(self, dtype: torch.dtype, *, nested: bool = False) -> Model:
        """Torch's encoder over the repeated user."""
        config = EngagementRankerConfig(
            num_actions=2, num_items=2, num_dense=1, num_layers=self.num_layers, latest_k=LATEST
        )
        sequence = StockSequence(config)
        sequence.encoder.load_state_dict(
            dict(zip(sequence.encoder.state_dict(), self.weights, strict=True))
        )
        if not nested:
            sequence.encoder.use_nested_tensor = False
        return Model(_StockScoring(sequence).to(dtype).eval(), self._inputs(dtype))

    def _inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        cast = {name: self.inputs[name].to(dtype) for name in ("events", "candidates")}
        return self.inputs | cast

    def expected(self) -> Expected:
        """The stock module on candidates from both ends, in fp64 and in bf16."""
        rows = both_ends(len(self.inputs["candidates"]), CHECKED)

        def run(dtype: torch.dtype) -> Tensor:
            model = self.stock(dtype)
            some = {name: model.inputs[name][rows] for name in ("candidates", "user_index")}
            with without_fast_path():
                out: Tensor = model.module(**(model.inputs | some)).double()
            return out

        golden = run(torch.float64)
        shape = (len(self.inputs["candidates"]), golden.shape[1])
        return Expected(shape, rows, golden, run(torch.bfloat16))


class Repeated(Contestant[RequestTask]):
    """Our own ``forward`` over the repeated user: what sharing is worth."""

    name, title = "seqkernels_forward", "seqkernels, user repeated"
    ours = True

    def prepare(self, task: RequestTask, workload: Workload) -> Runner:
        """As every model of ours."""
        return runner_of(task.forward_repeated(torch.float32), workload)


class Autocast(Contestant[RequestTask]):
    """The fp32 module under autocast, off the fast path, which fails there with a mask."""

    name, title = "autocast_bf16", "torch autocast bf16"

    def prepare(self, task: RequestTask, workload: Workload) -> Runner:
        """Call torch's module."""
        module, inputs = task.stock(torch.float32).on(workload.device)

        @contextmanager
        def around() -> Iterator[None]:
            with without_fast_path(), torch.autocast(workload.device, torch.bfloat16):
                yield

        def tensor(out: Any) -> Tensor:
            return out.float()  # type: ignore[no-any-return]

        return Runner(lambda: module(**inputs), around, tensor=tensor)


@dataclass(frozen=True, kw_only=True)
class RequestWorkload(Workload):
    """One call for N candidates of a few users.

    Attributes
    ----------
    candidates, length : int
        N and L.
    lengths : tuple of int
        Valid events of each user.
    num_layers : int
        Of the encoder.

    Examples
    --------
    >>> from seqkernels.benchmark import RequestWorkload
    >>> RequestWorkload(id="r", group="doc", candidates=256, lengths=(60,)).sizes()["users"]
    1
    """

    kind = "request_scoring"
    title = "Request scoring"
    columns = (
        ("N", "batch"),
        ("users", "users"),
        ("L", "length"),
        ("events", "valid_events"),
        ("layers", "num_layers"),
    )
    per = "candidate"
    checked = "summaries"
    rivals = by_name(
        Seqkernels("seqkernels", "seqkernels", torch.float32),
        Seqkernels("seqkernels_triton", "seqkernels, Triton", torch.float32, "triton"),
        Repeated(),
        Eager("eager_fp32", "torch eager fp32", torch.float32),
        Eager("eager_bf16", "torch eager bf16", torch.bfloat16),
        Autocast(),
        Compiled("compile_bf16", "torch.compile bf16", torch.bfloat16),
        OpenVino(),
    )

    candidates: int
    lengths: tuple[int, ...]
    length: int = 100
    num_layers: int = 2
    contestants: tuple[str, ...] = (
        *("seqkernels", "seqkernels_forward", "eager_fp32", "eager_bf16", "autocast_bf16"),
        *("compile_bf16", "openvino_bf16"),
    )

    def task(self) -> RequestTask:
        """Draw users and candidates."""
        return RequestTask(self.lengths, self.length, self.candidates, self.num_layers)

    def sizes(self) -> dict[str, object]:
        """Of the request."""
        return {
            "batch": self.candidates,
            "users": len(self.lengths),
            "length": self.length,
            "valid_events": sum(self.lengths),
            "num_layers": self.num_layers,
        }

    def small(self) -> Self:
        """Few candidates, short histories."""
        lengths = (20, 7, 16)[: len(self.lengths)]
        candidates = min(self.candidates, 12)
        return dataclasses.replace(self, candidates=candidates, lengths=lengths, length=24)
