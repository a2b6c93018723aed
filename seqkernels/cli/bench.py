"""``python -m seqkernels bench``: an encoder of your own shape beside torch's, on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from seqkernels import tables
from seqkernels.benchmark import (
    Comparison,
    EncoderWorkload,
    GateError,
    Unavailable,
    compare,
    machine_info,
    uniform_lengths,
)
from seqkernels.testing import EncoderCase


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shape, what is forced, and how long to measure."""
    shape = parser.add_argument_group("shape (default: the encoder of TransAct, 256 sequences)")
    for name, default in (
        ("--d-model", 96),
        ("--nhead", 2),
        ("--dim-feedforward", 32),
        ("--num-layers", 2),
        ("--batch", 256),
        ("--length", 100),
    ):
        shape.add_argument(name, type=_positive, default=default, metavar="N", help=f"{default}")
    shape.add_argument("--activation", choices=("relu", "gelu"), default="relu")
    shape.add_argument("--norm-first", action="store_true")
    shape.add_argument(
        "--mask",
        type=_positive,
        nargs="?",
        const=0,
        metavar="N",
        help="with a padding mask: lengths uniform from N (default: a fifth of all) to all",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--isa", help="instruction set that seqkernels has to use")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu")
    run.add_argument("--threads", type=_positive, default=0, metavar="N", help="all cores")
    run.add_argument("--rounds", type=_positive, metavar="N", help="default: for 10 s")
    run.add_argument("--compile", action="store_true", help="also torch.compile (takes a while)")
    run.add_argument("--openvino", action="store_true", help="also OpenVINO (needs [bench])")
    run.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print a table; 1 if a result is wrong or what was forced cannot run."""
    try:
        workload = _workload(arguments)
        comparison = compare(workload, rounds=arguments.rounds)
    except (GateError, Unavailable, ValueError) as error:
        print(f"seqkernels bench: {error}", file=sys.stderr)
        return 1
    info = machine_info()
    if arguments.json:
        made = {"machine": info, "comparison": comparison.as_dict()}
        arguments.json.write_text(json.dumps(made, indent=1) + "\n")
    _show(workload, comparison, info)
    return 0


def _workload(arguments: argparse.Namespace) -> EncoderWorkload:
    d_model, nhead, length = arguments.d_model, arguments.nhead, arguments.length
    if d_model % nhead:
        raise ValueError(f"--nhead: expected a divisor of {d_model} (--d-model), got {nhead}")
    lengths = None
    if arguments.mask is not None:
        shortest = arguments.mask or max(1, length // 5)
        if shortest > length:
            raise ValueError(f"--mask: expected at most {length} (--length), got {shortest}")
        lengths = uniform_lengths(arguments.batch, shortest, length)
    peers = ["eager_fp32", "eager_bf16", "eager_bf16_padded"]
    if arguments.device == "cuda":
        peers = ["seqkernels_triton", "eager_bf16", "sdpa_bf16", "flash_attn_bf16", "xformers_bf16"]
    peers += ["compile_bf16"] * arguments.compile + ["openvino_bf16"] * arguments.openvino
    case = EncoderCase(
        batch=arguments.batch,
        length=length,
        d_model=d_model,
        nhead=nhead,
        dim_feedforward=arguments.dim_feedforward,
        num_layers=arguments.num_layers,
        activation=arguments.activation,
        norm_first=arguments.norm_first,
        mask="none" if lengths is None else "right",
        valid=lengths,
        # as torch's module, which cannot pack the events of such models
        padding="compute" if nhead % 2 or arguments.norm_first else "zero",
    )
    return EncoderWorkload(
        id="yours",
        group="yours",
        case=case,
        contestants=("seqkernels", "seqkernels_bf16", *peers),
        threads=arguments.threads,
        isa=arguments.isa,
        device=arguments.device,
        seconds=10.0,
    )


def _where(workload: EncoderWorkload, info: dict[str, object]) -> str:
    gpu = info["gpu"]
    if workload.device == "cuda" and isinstance(gpu, dict):
        return f"{gpu['name']}, by its own clock"
    return f"{info['processor']}, threads: {workload.num_threads}"


def _show(workload: EncoderWorkload, comparison: Comparison, info: dict[str, object]) -> None:
    case = workload.case
    rows = []
    for name, result in comparison.results.items():
        time, accuracy = result.samples.spread, result.accuracy
        assert accuracy is not None  # there is no yardstick among them
        rows.append(
            (
                result.contestant.title,
                f"{1e3 * time.median:.3f} ({1e3 * time.q20:.3f} to {1e3 * time.q80:.3f})",
                f"{1e6 * time.median / case.batch:.1f}",
                f"{comparison.speedup(name).median:.2f}",
                f"{accuracy.max_ratio:.2g} / {accuracy.mean_ratio:.2g}",
                result.note,
            )
        )
    valid = workload.valid_lengths()
    print(
        f"{case.batch} sequences, {min(valid)} to {max(valid)} of {case.length} events valid; "
        f"d_model {case.d_model}, heads {case.nhead}, feed-forward {case.dim_feedforward}, "
        f"layers {case.num_layers}\n{_where(workload, info)}\n"
    )
    columns = ("", "ms a call (20 to 80 %)", "us a sequence", "slower", "error", "ran")
    console = Console()
    if not console.is_terminal:
        console = Console(width=tables.WIDTH)
    console.print(tables.make("", columns, rows))
    print(
        "\nslower: time over that of seqkernels, round by round; "
        "error: largest / mean error against fp64 over that of torch's bf16 layers"
    )
    rounds = len(comparison.results["seqkernels"].samples.seconds)
    print(f"{rounds} interleaved rounds; the results were checked before the clock started")
    for name, why in comparison.absent.items():
        print(f"not measured: {name}: {why}")
    load = info["load"]
    if isinstance(load, float) and load > torch.get_num_threads() + 1:
        print(f"the machine was busy (load {load:.1f}): the times are not worth much")
