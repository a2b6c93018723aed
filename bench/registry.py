"""What `make bench` measures, and the bars it has to clear; these numbers stand nowhere else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from seqkernels.benchmark import (
    BatchNormWorkload,
    EncoderWorkload,
    LinearWorkload,
    RankerWorkload,
    RequestWorkload,
    Workload,
    gpu,
    uniform_lengths,
)
from seqkernels.benchmark.contestants import Compiled, OpenVino
from seqkernels.benchmark.kinds.encoder import GPU_PEERS, PEERS
from seqkernels.testing import EncoderCase


@dataclass(frozen=True)
class Bar:
    """A limit for one quantity of a comparison.

    `speedup` (at least; over the fastest peer, or over the one named), `time` (at most; over that
    of the yardstick named), `workspace_bytes` and `outside_kernel` (at most; bytes a thread,
    seconds a call). `amx` holds where seqkernels ran on AMX, `otherwise` on any other processor.
    The times of `time` are those of the contestant `of`.
    """

    quantity: str
    amx: float
    otherwise: float
    over: str | None = None
    of: str = "seqkernels"


@dataclass(frozen=True)
class Entry:
    """A workload and its bars."""

    workload: Workload
    bars: tuple[Bar, ...]


#: Time a sequence at the largest of these batches over that at the smallest, at most: linear in B.
LINEAR_BATCHES = (32, 1024)
LINEAR_LIMIT = 1.25
#: On AMX, the error against fp64 over that of torch's own bf16 run, at most.
AMX_ERROR_LIMIT = 1.0

SHARED = Bar("speedup", amx=1.5, otherwise=1.0, over="seqkernels_forward")
NEVER_SLOWER = Bar("speedup", amx=1.0, otherwise=1.0)
WORKSPACE = Bar("workspace_bytes", amx=2 * 2**20, otherwise=2 * 2**20)
OUTSIDE_KERNEL = Bar("outside_kernel", amx=30e-6, otherwise=30e-6)
FP32_PATH = Bar("speedup", amx=1.5, otherwise=1.5, over="eager_fp32")

BOTH_DTYPES = ("seqkernels", "seqkernels_bf16", *PEERS)


def case(
    d_model: int,
    nhead: int,
    dim_feedforward: int,
    length: int,
    batch: int,
    lengths: tuple[int, ...] | None = None,
) -> EncoderCase:
    """Two post-norm ReLU layers; padded positions as torch's module returns them."""
    return EncoderCase(
        batch=batch,
        length=length,
        d_model=d_model,
        nhead=nhead,
        dim_feedforward=dim_feedforward,
        num_layers=2,
        mask="none" if lengths is None else "right",
        valid=lengths,
        # torch's nested-tensor path wants an even number of heads; without it, it computes them
        padding="compute" if nhead % 2 else "zero",
    )


def transact(batch: int, *, masked: bool = False, length: int = 100) -> EncoderCase:
    """The encoder of TransAct; with a mask, lengths are uniform in a fifth of `length` .. all."""
    lengths = uniform_lengths(batch, length // 5, length) if masked else None
    return case(96, 2, 32, length, batch, lengths)


def _transact() -> list[Entry]:
    def entry(name: str, case: EncoderCase, *bars: Bar, threads: int = 0, **more: str) -> Entry:
        workload = EncoderWorkload(
            id=name,
            group="transact",
            case=case,
            contestants=(*BOTH_DTYPES, *more.values()),
            threads=threads,
            seconds=20.0,
        )
        return Entry(workload, bars)

    return [
        entry("transact/dense", transact(256), Bar("speedup", 4.0, 1.0), WORKSPACE),
        entry("transact/masked", transact(256, masked=True), Bar("speedup", 12.0, 1.5), WORKSPACE),
        entry(
            "transact/one",
            transact(1),
            Bar("speedup", 4.0, 1.0),
            OUTSIDE_KERNEL,
            threads=1,
            kernel="seqkernels_kernel",
        ),
    ]


def _sweeps() -> list[Entry]:
    by_batch = {f"batch/{b}": transact(b) for b in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)}
    by_length = {
        f"length/{n}": transact(64, length=n) for n in (16, 32, 64, 100, 128, 192, 256, 384, 512)
    }
    return [
        Entry(
            EncoderWorkload(
                id=name, group=name.partition("/")[0], case=case, seconds=4.0, dynamic=True
            ),
            (NEVER_SLOWER,),
        )
        for name, case in {**by_batch, **by_length}.items()
    ]


#: d_model, nhead, dim_feedforward, length, and a batch that keeps a call within a second.
SHAPES = (
    (64, 1, 32, 256, 64),
    (128, 8, 512, 100, 64),
    (256, 4, 1024, 200, 16),
    (64, 8, 2048, 50, 64),
    (512, 8, 2048, 128, 16),
)


def _shapes() -> list[Entry]:
    entries = []
    for d, heads, f, length, batch in SHAPES:
        name = f"shapes/d{d}-h{heads}-f{f}-l{length}"
        lengths = uniform_lengths(batch, length // 5, length)
        for kind, valid in (("dense", None), ("masked", lengths)):
            problem = case(d, heads, f, length, batch, valid)
            workload = EncoderWorkload(
                id=f"{name}/{kind}", group="shapes", case=problem, seconds=6.0
            )
            entries.append(Entry(workload, (NEVER_SLOWER,)))
    return entries


def _instruction_sets() -> list[Entry]:
    return [
        Entry(
            EncoderWorkload(
                id=f"isa/{isa}",
                group="isa",
                case=transact(256, masked=True),
                contestants=("seqkernels", "eager_fp32"),
                isa=isa,
                seconds=6.0,
            ),
            (FP32_PATH,),
        )
        for isa in ("avx512", "avx2")
    ]


def _batch_norm() -> list[Entry]:
    """As fast as memory is: new memory for the module's output, the same for the kernel alone."""
    bars = (
        Bar("time", amx=1.15, otherwise=1.15, over="copy_new"),
        Bar("time", amx=1.15, otherwise=1.15, over="copy_into", of="seqkernels_kernel"),
        NEVER_SLOWER,
    )
    return [
        Entry(
            BatchNormWorkload(
                id=f"batch_norm/{name}",
                group="batch_norm",
                rows=65536,
                channels=256,
                dtype=dtype,
                seconds=6.0,
            ),
            bars,
        )
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]


def _linear() -> list[Entry]:
    workload = LinearWorkload(
        id="linear/k512-f512",
        group="linear",
        rows=4096,
        in_features=512,
        out_features=512,
        seconds=6.0,
    )
    # Without AMX torch multiplies with the same instruction, which is most of the time.
    over_eager = Bar("speedup", amx=1.5, otherwise=1.0, over="eager_bf16")
    over_compiled = Bar("speedup", amx=1.0, otherwise=1.0, over="compile_bf16")
    return [Entry(workload, (over_eager, over_compiled))]


def _requests() -> list[Entry]:
    """One user or eight, some candidates: what sharing the users' part is worth."""

    def entry(
        name: str, candidates: int, lengths: tuple[int, ...], *bars: Bar, **more: Any
    ) -> Entry:
        workload = RequestWorkload(
            id=f"request/{name}",
            group="request",
            candidates=candidates,
            lengths=lengths,
            seconds=4.0,
            **more,
        )
        beside_forward = candidates >= 256 and "seqkernels_forward" in workload.contestants
        return Entry(workload, (*bars, SHARED) if beside_forward else bars)

    return [
        # Without AMX the bars are those of the encoder: never slower, 1.5 with a mask.
        entry("n256-60of100", 256, (60,), Bar("speedup", amx=12.0, otherwise=1.5)),
        entry("n256-100of100", 256, (100,), Bar("speedup", amx=6.0, otherwise=1.0)),
        *(entry(f"n{n}", n, (100,), NEVER_SLOWER) for n in (1, 16, 1024)),
        *(
            entry(f"n256-l{length}", 256, (length,), NEVER_SLOWER, length=length)
            for length in (50, 200)
        ),
        entry("n256-8users", 256, uniform_lengths(8, 20, 100), NEVER_SLOWER),
        # Without the second layer, for the shares of the stages.
        *(
            entry(
                f"n{n}-layer1",
                n,
                (100,),
                NEVER_SLOWER,
                num_layers=1,
                contestants=("seqkernels", "eager_fp32"),
            )
            for n in (1, 1024)
        ),
    ]


def _ranker() -> list[Entry]:
    """The whole model; at B = 256 a quarter of torch's fp32 time, and less than any compiler's."""

    def entry(name: str, batch: int, *bars: Bar, masked: bool = True) -> Entry:
        workload = RankerWorkload(
            id=f"ranker/{name}", group="ranker", batch=batch, masked=masked, seconds=8.0
        )
        return Entry(workload, bars)

    bars = (
        Bar("speedup", amx=4.0, otherwise=4.0, over="eager_fp32"),
        Bar("speedup", amx=1.0, otherwise=1.0, over="compile_bf16"),
        Bar("speedup", amx=1.0, otherwise=1.0, over="openvino_bf16"),
    )
    return [
        entry("32", 32, NEVER_SLOWER),
        entry("256", 256, *bars),
        entry("2048", 2048, NEVER_SLOWER),
        entry("256-dense", 256, *bars, masked=False),
    ]


def _gpu() -> list[Entry]:
    """The same on a GPU, where there is one: times by its clock, of replayed graphs."""
    ours = ("seqkernels", "seqkernels_triton")

    def encoder(name: str, case: EncoderCase, **more: Any) -> Entry:
        workload = EncoderWorkload(
            id=f"gpu/{name}",
            group="gpu",
            case=case,
            contestants=("seqkernels", "seqkernels_bf16", "seqkernels_triton", *GPU_PEERS),
            device="cuda",
            seconds=4.0,
            **more,
        )
        return Entry(workload, (NEVER_SLOWER,))

    def request(name: str, candidates: int, lengths: tuple[int, ...]) -> Entry:
        peers = ("seqkernels_forward", "eager_bf16", "autocast_bf16", "compile_bf16")
        workload = RequestWorkload(
            id=f"gpu/request-{name}",
            group="gpu",
            candidates=candidates,
            lengths=lengths,
            contestants=(*ours, *peers),
            device="cuda",
            seconds=4.0,
        )
        return Entry(workload, (NEVER_SLOWER,))

    def batch_norm(name: str, dtype: torch.dtype) -> Entry:
        workload = BatchNormWorkload(
            id=f"gpu/batch_norm-{name}",
            group="gpu",
            rows=1 << 20,  # half a gigabyte in bf16, beyond every cache
            channels=256,
            dtype=dtype,
            contestants=(*ours, "copy_new", "eager", "compile"),
            device="cuda",
            seconds=4.0,
        )
        return Entry(workload, (Bar("time", 1.15, 1.15, over="copy_new"), NEVER_SLOWER))

    def ranker(batch: int) -> Entry:
        workload = RankerWorkload(
            id=f"gpu/ranker-{batch}",
            group="gpu",
            batch=batch,
            contestants=(*ours, "eager_fp32", "eager_bf16", "compile_bf16"),
            device="cuda",
            seconds=4.0,
        )
        return Entry(workload, (NEVER_SLOWER,))

    wide = ((256, 4, 1024, 200, 256), (512, 8, 2048, 128, 256))
    return [
        *(encoder(f"transact-b{b}", transact(b)) for b in (1, 32, 256, 1024, 4096)),
        encoder("transact-b1-launched", transact(1), replay=False),
        encoder("transact-masked", transact(1024, masked=True)),
        *(encoder(f"length-{n}", transact(1024, length=n)) for n in (16, 50, 200, 512)),
        *(encoder(f"d{shape[0]}", case(*shape)) for shape in wide),
        *(request(f"n{n}", n, (100,)) for n in (256, 1024)),
        request("n1024-8users", 1024, uniform_lengths(8, 20, 100)),
        batch_norm("fp32", torch.float32),
        batch_norm("bf16", torch.bfloat16),
        *(ranker(b) for b in (256, 2048)),
    ]


REGISTRY: tuple[Entry, ...] = (
    *_transact(),
    *_sweeps(),
    *_shapes(),
    *_instruction_sets(),
    *_requests(),
    *_batch_norm(),
    *_linear(),
    *_ranker(),
    *_gpu(),
)


def shrunk(entry: Entry) -> Entry:
    """The entry in a size that takes a moment: it shows that everything works, and no speed.

    Those for a GPU run on the CPU where there is none.
    """
    workload = entry.workload
    names = tuple(
        name
        for name in workload.contestants
        if not isinstance(workload.rivals[name], Compiled | OpenVino)  # slow to prepare
    )
    device = "cpu" if gpu.missing() else workload.device
    small = dataclasses.replace(
        workload.small(), contestants=names, threads=1, seconds=0.0, device=device
    )
    return Entry(small, entry.bars)
