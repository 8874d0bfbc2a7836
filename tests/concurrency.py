"""Calls from several Python threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def at_once(work: Callable[[int], object], count: int = 6) -> None:
    """work(0) to work(count - 1), each in a thread of its own, begun together; what one raises is raised."""
    start = threading.Barrier(count)

    def begin(i: int) -> None:
        start.wait()
        work(i)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(begin, range(count)))
