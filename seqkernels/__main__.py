"""``python -m seqkernels info | demo | bench``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import seqkernels

COMMANDS = {
    "info": "what was built, what this machine can run, what would be chosen",
    "demo": "train an engagement ranker on real data, swap it, compare (needs [demo])",
    "bench": "measure workloads beside other implementations (needs [bench])",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; only its own module is imported."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m seqkernels",
        description="Inference kernels for ranking models that read user action sequences.",
    )
    version = f"seqkernels {seqkernels.__version__}"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    chosen = given[0] if given and given[0] in COMMANDS else None
    module = None
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:
            try:
                module = importlib.import_module(f"seqkernels.cli.{name}")
            except ModuleNotFoundError as error:
                return _missing(name, error)
            module.add_arguments(subparser)
    parsed = parser.parse_args(given)
    assert module is not None  # the parser let only known commands pass
    try:
        return int(module.run(parsed))
    except ModuleNotFoundError as error:
        return _missing(parsed.command, error)


def _missing(command: str, error: ModuleNotFoundError) -> int:
    """Name the package that a command needs and does not find, and the extra that brings it."""
    print(
        f"seqkernels {command}: {error.name} is not installed: pip install 'seqkernels[{command}]'",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
