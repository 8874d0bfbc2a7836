"""Timing, counting and errors: candidates take turns, medians are quoted, truth is float64.

pytest-benchmark was considered and left: it runs one candidate to its end before the next begins, so
that a drifting machine favours whoever comes first.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from finefuse import _matmul
from torch import Tensor

Inputs = tuple[Tensor, ...]
Loss = Callable[..., Tensor]
Size = Literal["quick", "standard", "full"]
Run = Callable[..., Tensor]  # of the inputs, to the output or to the gradient of the first of them


# Seconds after which no further round of a case begins, if it asks for more; the standard size lowers it.
most_seconds = math.inf


@dataclass
class Row:
    """One candidate in one case, and the numbers to judge it by; None where a number has no meaning."""

    case: str
    name: str
    times: list[float] = field(default_factory=list, repr=False)  # seconds
    moved: int | None = None  # bytes that must be moved at least
    extra: int | None = None  # peak bytes above the start
    error: float | None = None  # against float64, max|error| / max|truth|
    # of losses on top of a linear layer, see `compare_products`
    bare: float | None = None  # seconds of the bare products
    resident: int | None = None  # as `extra`, by the system's pages
    accumulator: int | None = None  # bytes of a float32 gradient of a 16-bit weight
    error_weight: float | None = None  # of the weight's gradient

    def as_dict(self, family: str, limit: float) -> dict[str, Any]:
        """Milliseconds, MB and GB/s; `limit` is the copy bandwidth in GB/s."""
        seconds = statistics.median(self.times)
        low, _, high = statistics.quantiles(self.times, n=4)
        gb_s = self.moved / seconds / 1e9 if self.moved else None
        found = {
            "family": family, "case": self.case, "name": self.name, "ms": round(1e3 * seconds, 4),
            "spread": round((high - low) / 2 / seconds, 3),  # half the range between the quartiles
            "moved_mb": round(self.moved / 1e6, 1) if self.moved else None,
            "gb_s": round(gb_s, 2) if gb_s else None,
            "of_limit": round(gb_s / limit, 3) if gb_s else None,
            "extra_mb": None if self.extra is None else round(self.extra / 1e6, 2),
            "error": self.error,
            "times_ms": [float(f"{1e3 * t:.4g}") for t in self.times],
        }  # fmt: skip
        if self.bare is not None:
            found |= {
                "of_bare": round(seconds / self.bare, 3),
                "resident_mb": None if self.resident is None else round(self.resident / 1e6, 2),
                "accumulator_mb": round(self.accumulator / 1e6, 1) if self.accumulator else None,
                "error_weight": self.error_weight,
            }
        return found


def forward(function: Callable[..., Tensor]) -> Run:
    """The function's output, without a graph."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return run


def gradient(function: Callable[..., Tensor]) -> Run:
    """Forward and backward of a scalar function; the gradient of its first argument."""

    def run(leaf: Tensor, *rest: Tensor) -> Tensor:
        leaf.grad = None
        function(leaf, *rest).backward()
        assert leaf.grad is not None
        return leaf.grad

    return run


def gradients(
    function: Callable[[], Tensor], leaves: Sequence[Tensor], upstream: Tensor
) -> Callable[[], Tensor]:
    """Forward, then the gradients of the leaves; that of the first is what is compared."""
    return lambda: torch.autograd.grad(function(), leaves, upstream)[0]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def phases(backward: bool) -> str:
    """What a case is called."""
    return "forward + backward" if backward else "forward"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timer(device: str, host: bool = False) -> Callable[[Callable[[], Any]], float]:
    """Seconds of a call: by the host's clock, or by events on the GPU's stream.

    With events what stands in the stream before the call gives the host time to run ahead, as in a
    training loop: a wait, and a read of four times the L2 cache, so that the call finds nothing of its
    inputs there (which exceed it several times by themselves), and nothing to write back.
    """

    def by_clock(call: Callable[[], Any]) -> float:
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - begin

    if device == "cpu" or host:
        return by_clock
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    other = torch.ones(4 * cache, dtype=torch.uint8, device=device).view(torch.float32)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def by_events(call: Callable[[], Any]) -> float:
        other.sum()
        torch.cuda._sleep(2_000_000)  # about 1 ms
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return by_events


def interleaved(
    rows: list[Row],
    calls: list[Callable[[], Any]],
    seconds_of: Callable[[Callable[[], Any]], float],
    rounds: int,
    budget: float,
    setup: Callable[[], Any],
    twice: bool = True,
    slow: float = math.inf,
) -> None:
    """Rounds in which every candidate has its turn, so that a drifting machine drifts for all.

    In its turn it runs twice and the second run counts, as in a training loop: the memory it takes is
    what it gave back just before, not what another left, or what a virtual machine's host took back
    from the idle free list (that costs whoever comes next up to ten times the page faults). After
    `budget` seconds no further round begins, but four are run. A call of more than `slow` seconds, to
    which page faults matter little, has three turns of one run, the first in the warm-up.
    """
    once = []  # which run once a turn
    for row, call in zip(rows, calls, strict=True):  # warm up, twice: the first may compile
        setup()
        call()
        setup()
        seconds = seconds_of(call)
        once.append(seconds > slow)
        if once[-1]:
            row.times.append(seconds)
    start, budget = time.perf_counter(), min(budget, most_seconds)
    for done in range(rounds):
        if done >= 4 and time.perf_counter() - start > budget:
            break
        for row, call, alone in zip(rows, calls, once, strict=True):
            if alone and done >= 2:
                continue
            if twice and not alone:
                setup()
                call()
            setup()
            row.times.append(seconds_of(call))


def peak_extra(device: str, call: Callable[[], Any]) -> int:
    """The most bytes that were allocated above the start, counted by torch's allocator."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
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
    return peak


def peak_resident(call: Callable[[], Any]) -> int | None:
    """The most bytes of this process that were in memory above the start, also those that torch's allocator
    does not see, such as a product's packed operands. None where the system does not count.
    """

    def pages(which: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(which):
                return int(line.split()[1]) << 10
        raise OSError(which)

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, so that its use counts
        Path("/proc/self/clear_refs").write_text("5")  # the mark is lowered to what is there
        before = pages("VmRSS:")
        call()
        return pages("VmHWM:") - before
    except (AttributeError, OSError):
        return None


def fresh(t: Tensor, double: bool = False) -> Tensor:
    """A copy: a run may consume what it is given."""
    copy = t.detach().clone()
    copy = copy.double() if double and t.is_floating_point() else copy
    return copy.requires_grad_(t.requires_grad)


def errors(runs: Sequence[Run], truth: Run, samples: Sequence[Inputs]) -> list[float]:
    """max|run - truth| / max|truth| over all samples, for each run; truth on the samples in float64."""

    exact = [truth(*(fresh(t, double=True) for t in sample)) for sample in samples]
    scale = torch.stack([e.abs().max() for e in exact]).max()
    found = []
    for run in runs:
        off = [
            (run(*map(fresh, sample)) - e).abs().max()
            for sample, e in zip(samples, exact, strict=True)
        ]
        found.append(float(torch.stack(off).max() / scale))  # torch's max keeps a NaN
    return found


def compare(
    case: str,
    runs: dict[str, Run],
    inputs: Inputs,
    truth: Run,
    samples: Sequence[Inputs],
    moved: int,
    budget: float = 20.0,
) -> list[Row]:
    """A case in full: times on `inputs`, which are restored before each run, memory, errors on `samples`.

    `budget`: of a CPU, see `interleaved`.
    """
    device, leaf = inputs[0].device.type, inputs[0]
    source = leaf.detach().clone() if leaf.requires_grad else None

    def setup() -> None:
        if source is not None:  # with a gradient: an in-place candidate consumes the logits
            leaf.grad = None
            with torch.no_grad():
                leaf.copy_(source)

    rows = [Row(case, name, moved=moved) for name in runs]
    calls = [lambda run=run: run(*inputs) for run in runs.values()]
    rounds, budget = (30, 5.0) if device == "cuda" else (9, budget)
    interleaved(rows, calls, timer(device), rounds, budget, setup)
    for row, call in zip(rows, calls, strict=True):
        setup()
        row.extra = peak_extra(device, call)
    for row, error in zip(rows, errors(list(runs.values()), truth, samples), strict=True):
        row.error = error
    return rows


def compare_products(
    case: str,
    runs: dict[str, Loss],
    bare: Callable[[], Any],
    inputs: Inputs,
    truth: Loss,
    sample: Inputs,
    accumulates: Collection[str] = (),
    turns: int = 9,
) -> list[Row]:
    """A case of functions on top of a linear layer: times also against `bare`, the products alone, the last
    row.

    The gradients of all inputs that need one are taken: first that of the hidden states, second, if it has
    one, the weight's. Where no input needs one the output alone counts. Memory is counted beyond the
    gradients; a float32 gradient of a 16-bit weight, of those in `accumulates`, is counted apart.
    """
    device, leaves = inputs[0].device.type, [t for t in inputs if t.requires_grad]
    weight = inputs[1]

    def results(function: Loss, given: Inputs) -> list[Tensor]:
        wanted = [t for t in given if t.requires_grad]
        if not wanted:
            with torch.no_grad():
                return [function(*given)]
        for t in wanted:
            t.grad = None
        function(*given).backward()
        return [t.grad for t in wanted if t.grad is not None]

    def setup() -> None:
        for t in leaves:
            t.grad = None

    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(results, function, inputs) for name, function in runs.items()
    }
    calls["the bare products"] = bare
    rows = [Row(case, name) for name in calls]
    rounds, budget = (30, 5.0) if device == "cuda" else (turns, 10.0)
    interleaved(rows, list(calls.values()), timer(device), rounds, budget, setup, slow=1.0)
    seconds = statistics.median(rows[-1].times)
    gradients = sum(t.nbytes for t in leaves)
    for row in rows:
        row.bare = seconds
        if row is rows[-1]:
            continue

        def counted(count: Callable[[Callable[[], Any]], int | None], name: str) -> int | None:
            setup()
            gc.collect()
            _matmul.workspace.memory.clear()  # kept from call to call
            found = count(calls[name])
            return None if found is None else max(found - gradients, 0)

        row.extra = counted(functools.partial(peak_extra, device), row.name)
        row.resident = counted(peak_resident, row.name) if device == "cpu" else None
        float32 = 4 * weight.numel()
        if row.name in accumulates and weight.requires_grad and weight.itemsize == 2:
            assert row.extra is not None
            if row.extra >= float32:
                row.accumulator, row.extra = float32, row.extra - float32
                row.resident = None if row.resident is None else max(row.resident - float32, 0)
    setup()
    exact = results(truth, tuple(fresh(t, double=True) for t in sample))
    for row in rows[: len(runs)]:
        found = results(runs[row.name], tuple(map(fresh, sample)))
        off = [
            float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, exact, strict=True)
        ]
        row.error, row.error_weight = off[0], off[1] if len(off) > 1 else None
    return rows


def compare_outputs(
    case: str,
    runs: dict[str, Callable[[], Tensor]],
    truth: Tensor,
    moved: int,
    calls: int = 1,
    read: Callable[[Any], Tensor] = lambda out: out,
) -> list[Row]:
    """A case whose candidates hold their own forms of the inputs: times, memory, errors of outputs.

    Each run makes `calls` calls of a candidate; `read` makes of its output what is compared with `truth`.
    """
    device = truth.device.type
    rows = [Row(case, name, moved=moved) for name in runs]
    repeats = [repeated(call, calls) for call in runs.values()]
    rounds, budget = (30, 5.0) if device == "cuda" else (9, 20.0)
    interleaved(rows, repeats, timer(device), rounds, budget, lambda: None)
    for row, call in zip(rows, runs.values(), strict=True):
        row.times = [t / calls for t in row.times]
        row.extra = peak_extra(device, call)
        row.error = float((read(call()).double() - truth).abs().max() / truth.abs().max())
    return rows


def repeated(function: Callable[[], Any], calls: int) -> Callable[[], Any]:
    def run() -> Any:
        for _ in range(calls):
            out = function()
        return out

    return run


def compare_calls(
    case: str, runs: dict[str, Callable[[], Any]], device: str, calls: int, rounds: int
) -> list[Row]:
    """Time of a call by the host's clock, where calling is all; each run makes `calls` of them."""
    rows = [Row(case, name) for name in runs]
    turn = timer(device, host=True)
    interleaved(rows, list(runs.values()), turn, rounds, 10.0, lambda: None, twice=False)
    for row in rows:
        row.times = [t / calls for t in row.times]
    return rows


def compare_small(
    case: str, runs: dict[str, Run], inputs: Inputs, truth: Run, calls: int
) -> list[Row]:
    """A case of vectors that fit into a cache: times as of `compare_calls`, errors on the same inputs."""
    repeats = {name: repeated(functools.partial(r, *inputs), calls) for name, r in runs.items()}
    rows = compare_calls(case, repeats, inputs[0].device.type, calls, rounds=31)
    for row, error in zip(rows, errors(list(runs.values()), truth, [inputs]), strict=True):
        row.error = error
    return rows
