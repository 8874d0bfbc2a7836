"""What this machine's memory can do, measured in the run that quotes it: GB/s on buffers out of cache."""

from __future__ import annotations

import time
from statistics import median

import torch


def bandwidth(megabytes: int = 512, rounds: int = 5) -> dict[str, float]:
    """read (a sum), fill, copy (read + write), and the first write to fresh memory, in GB/s."""
    n = megabytes << 18
    a, b = torch.rand(n), torch.rand(n)
    size = 4 * n
    work = {
        "read": (lambda: a.sum(), size),
        "fill": (lambda: b.fill_(1.0), size),
        "copy": (lambda: b.copy_(a), 2 * size),
        "fresh": (lambda: torch.empty(n).fill_(1.0), size),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, (f, _) in work.items():
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return {name: moved / median(times[name]) / 1e9 for name, (_, moved) in work.items()}
