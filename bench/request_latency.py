"""How even the time of a request is: ``python -m bench.request_latency``.

One user with 60 of 100 events and 256 candidates, 1,000 times; the machine should be quiet.
"""

from __future__ import annotations

import gc
import time

import numpy as np
import torch

from seqkernels.benchmark import RequestWorkload

REQUESTS = 1000


def main() -> None:
    """Print quantiles and their ratio."""
    workload = RequestWorkload(id="latency", group="latency", candidates=256, lengths=(60,))
    model = workload.task().ours(torch.float32)
    taken = []
    gc.disable()
    with torch.inference_mode():
        for _ in range(20):
            model()
        for _ in range(REQUESTS):
            start = time.perf_counter()
            model()
            taken.append(time.perf_counter() - start)
    p50, p90, p99 = (1e3 * float(v) for v in np.quantile(taken, (0.5, 0.9, 0.99)))
    print(
        f"{REQUESTS} requests of 256 candidates, {torch.get_num_threads()} threads: "
        f"p50 {p50:.2f} ms, p90 {p90:.2f}, p99 {p99:.2f}; p99 / p50 {p99 / p50:.2f}"
    )


if __name__ == "__main__":
    main()
