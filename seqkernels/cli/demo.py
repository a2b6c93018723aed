"""``python -m seqkernels demo``: train a ranker on real ratings, swap its encoder, compare.

What the extra [demo] brings is imported when the demo runs, not for its help.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from seqkernels.demo.data import DataError
from seqkernels.demo.examples import LENGTH

_OUTPUT = Path("demo-output")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="your own copy: ml-100k.inter, or u.data")
    add("--json", type=Path, metavar="FILE", default=_OUTPUT / "demo.json", help="results")
    add("--plot", type=Path, metavar="FILE", default=_OUTPUT / "demo.png", help="picture")
    add("--epochs", type=_count, default=1, help="passes over the training set")
    add("--seconds", type=float, default=100.0, help="when training stops at the latest")
    add("--requests", type=_count, default=200, help="how many requests to time")
    add("--threads", type=_count, help="torch's threads; as torch has them by default")
    add("--seed", type=int, default=0, help="of the model, the training and the requests")
    add(
        "--trim",
        action="store_true",
        help="cut what is served to the longest history in its batch; without it histories are "
        f"padded to {LENGTH} events, as by a server with fixed shapes",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns 1 if the data cannot be had."""
    from seqkernels.demo.session import demonstrate

    before = torch.get_num_threads()
    try:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        demonstrate(arguments)
    except DataError as error:
        print(f"seqkernels demo: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0
