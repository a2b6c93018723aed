"""Compiles what the tests run, before they run: `python -m tests.prebuild [--exhaustive]`.

The folders are built side by side, each with as many compilers as there are processors: near its
end a folder has fewer files than that.
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
    """What to build, as functions of the number of compilers."""
    programs = building.EXHAUSTIVE if exhaustive else building.EVERYDAY
    kernels = {
        f"CUDA kernels for {', '.join(architectures)}": partial(
            cuda_objects.build_kernels, architectures
        )
        for architectures in cuda_objects.BUILDS
        if (architectures != cuda_objects.EVERYDAY) == exhaustive
    }
    return kernels | {
        f"programs ({sanitizer or 'as shipped'})": partial(building.build, sanitizer, targets)
        for sanitizer, targets in programs.items()
    }


def main(arguments: list[str]) -> None:
    wanted = folders("--exhaustive" in arguments)
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))

    def timed(name: str) -> None:
        start = time.monotonic()
        wanted[name](jobs)
        print(f"  {name}: {time.monotonic() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(timed, wanted))


if __name__ == "__main__":
    main(sys.argv[1:])
