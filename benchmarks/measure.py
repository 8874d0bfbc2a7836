"""Timing and counting: candidates take turns, medians are quoted, memory is the allocator's own count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Row:
    """One candidate in one case; milliseconds, MB, and the numbers to judge them by."""

    case: str
    name: str
    times: list[float] = field(default_factory=list, repr=False)
    moved: int = 0  # bytes that must be moved at least
    extra_mb: float = 0.0
    error: float | None = None  # of the gradient, max, relative to max|truth|

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.times)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.times, n=4)
        return (high - low) / 2 / statistics.median(self.times)

    def as_dict(self, limit: float) -> dict[str, Any]:
        gbs = self.moved / self.ms / 1e6
        return {
            "case": self.case, "name": self.name, "ms": round(self.ms, 4),
            "spread": round(self.spread, 3), "gb_s": round(gbs, 2),
            "of_limit": round(gbs / limit, 3), "extra_mb": round(self.extra_mb, 2),
            "error": self.error,
        }  # fmt: skip


def interleaved(
    rows: list[Row],
    calls: list[Callable[[], Any]],
    rounds: int,
    seconds: float,
    setup: Callable[[], Any],
    twice: bool = True,
) -> None:
    """Rounds in which every candidate has its turn, so that a drifting machine drifts for all.

    In its turn it runs twice and the second run counts, as in a training loop: the memory it takes is
    what it gave back just before, not what another left, or what a virtual machine's host took back
    from the idle free list (that costs whoever comes next up to ten times the page faults).
    """
    for call in calls:  # warm up, twice: the first may compile
        for _ in range(2):
            setup()
            call()
    start = time.perf_counter()
    for done in range(rounds):
        for row, call in zip(rows, calls, strict=True):
            if twice:
                setup()
                call()
            setup()
            begin = time.perf_counter()
            call()
            row.times.append(time.perf_counter() - begin)
        if done >= 3 and time.perf_counter() - start > seconds:
            break


def peak_extra_mb(call: Callable[[], Any]) -> float:
    """The most that was allocated above the start, counted by torch's CPU allocator."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [
        (e.start_ns(), e.nbytes())
        for e in profile.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    total = peak = 0
    for _, nbytes in sorted(events, key=lambda e: e[0]):
        total += nbytes
        peak = max(peak, total)
    return peak / 1e6
