"""Compiles what the tests run, before they run: `python -m tests.prebuild [--exhaustive]`.

The folders are built side by side, since each ends with a file or two for which the other
processors would wait.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tests.cpp import building
from tests.static import cuda_objects


def folders(exhaustive: bool) -> dict[str, Callable[[int], object]]:
    """What to build, the longest first, as functions of the number of compilers."""
    architectures = cuda_objects.EVERYDAY
    if exhaustive:
        architectures = tuple(a for a in cuda_objects.ARCHITECTURES if a not in architectures)
    programs = building.EXHAUSTIVE if exhaustive else building.EVERYDAY
    kernels = {
        f"CUDA kernels for {arch}": partial(cuda_objects.build_kernels, arch)
        for arch in architectures
    }
    return kernels | {
        f"programs ({sanitizer or 'as shipped'})": partial(building.build, sanitizer, targets)
        for sanitizer, targets in programs.items()
    }


def main(arguments: list[str]) -> None:
    wanted = folders("--exhaustive" in arguments)
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    at_once = min(jobs, len(wanted))

    def timed(name: str) -> None:
        start = time.monotonic()
        wanted[name](jobs // at_once)
        print(f"  {name}: {time.monotonic() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(timed, wanted))


if __name__ == "__main__":
    main(sys.argv[1:])
