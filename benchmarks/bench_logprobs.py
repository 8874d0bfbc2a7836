"""Token log-probabilities and cross-entropy; and what a call costs on a tiny tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch

from . import peers
from .measure import Row, interleaved, peak_extra_mb


def large(
    case: str, functions: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, gradient: bool
) -> list[Row]:
    source = (torch.randn(shape) * 3).to(dtype)
    logits = source.clone().requires_grad_(gradient)
    targets = torch.randint(0, shape[1], (shape[0],))
    size = logits.numel() * logits.element_size()

    def make(f: Any) -> Callable[[], Any]:
        def call() -> Any:
            out = f(logits, targets)
            if gradient:
                out.sum().backward()
            return out

        return call

    def setup() -> None:
        logits.grad = None
        with torch.no_grad():
            logits.copy_(source)

    rows = [Row(case, name, moved=(2 if gradient else 1) * size) for name in functions]
    calls = [make(f) for f in functions.values()]
    interleaved(rows, calls, 9, 10, setup)
    for row, call in zip(rows, calls, strict=True):
        setup()
        row.extra_mb = peak_extra_mb(call)
    return rows


def calls() -> Iterator[list[Row]]:
    """Microseconds a call, 200 calls a sample; `x + x` is there as this machine's yardstick."""
    x, y = torch.randn(4, 32), torch.randint(0, 32, (4,))
    z, one = x.clone().requires_grad_(), torch.ones(4)
    raw = torch.ops.finefuse.token_logprobs_inference.default

    def both(f: Any) -> Callable[[], None]:
        def call() -> None:
            z.grad = None
            f(z, y).backward(one)

        return call

    functions: dict[str, Callable[[], Any]] = {
        "x + x": lambda: x + x,
        "torch.log_softmax": lambda: torch.log_softmax(x, -1),
        "raw op": lambda: raw(x, y, 1.0, -100),
        "token_logprobs": lambda: ff.token_logprobs(x, y),
        "token_logprobs with stats": lambda: ff.token_logprobs(x, y, stats=True),
        "eager": lambda: peers.logprobs_eager(x, y),
        "token_logprobs, forward + backward": both(ff.token_logprobs),
        "eager, forward + backward": both(peers.logprobs_eager),
    }

    def repeated(f: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(200):
                f()

        return call

    rows = [Row("a call on 4x32", name) for name in functions]
    interleaved(rows, [repeated(f) for f in functions.values()], 41, 10, lambda: None, twice=False)
    for row in rows:
        row.times = [t / 200 for t in row.times]
    yield rows


def run(quick: bool) -> Iterator[list[Row]]:
    yield from calls()
    rows = 64 if quick else 2048
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        shape = (rows, 32000)
        functions = peers.load(
            {
                "finefuse": (None, ff.token_logprobs),
                "torch.compile": (None, peers.compiled(peers.logprobs_eager)),
                "eager": (None, peers.logprobs_eager),
                "TRL": ("trl", peers.logprobs_trl),
            }
        )
        yield large(f"token_logprobs {rows}x32000 {name}, forward", functions, shape, dtype, False)
        functions = peers.load(
            {
                "finefuse": (None, ff.cross_entropy),
                "finefuse in place": (None, lambda a, b: ff.cross_entropy(a, b, inplace=True)),
                "torch.compile": (None, peers.compiled(peers.cross_entropy)),
                "eager": (None, peers.cross_entropy),
            }
        )
        yield large(
            f"cross_entropy {rows}x32000 {name}, forward + backward", functions, shape, dtype, True
        )
