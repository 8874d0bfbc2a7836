"""Token log-probabilities and cross-entropy; and what a call costs on a tiny tensor.

Bytes at least: a forward reads the logits once; with the gradient they are read once and it is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor

from . import peers
from .measure import Row, Size, compare, compare_calls, forward, gradient, name_of, phases, repeated
from .peers import LIGER_TRITON, OURS, TORCH, TRL, Candidates

# rows, vocabulary, type
LOGPROBS = {
    "cpu": ((2048, 32000, torch.float32), (2048, 32000, torch.bfloat16)),
    "cuda": ((8192, 151936, torch.bfloat16),),
}
CROSS_ENTROPY = {
    "cpu": ((2048, 32000, torch.float32), (2048, 32000, torch.bfloat16)),
    "cuda": ((8192, 128256, torch.bfloat16),),
}


def draw(
    device: str, rows: int, vocab: int, dtype: torch.dtype, leaf: bool
) -> tuple[Tensor, Tensor]:
    logits = torch.randn(rows, vocab, dtype=dtype, device=device).mul_(3)
    return logits.requires_grad_(leaf), torch.randint(0, vocab, (rows,), device=device)


def from_logits(
    name: str,
    backward: bool,
    candidates: Candidates,
    device: str,
    rows: int,
    vocab: int,
    dtype: torch.dtype,
) -> list[Row]:
    """One function; the truth is eager's."""
    step = gradient if backward else forward
    inputs = draw(device, rows, vocab, dtype, leaf=backward)
    return compare(
        f"{name} {rows}x{vocab} {name_of(dtype)}, {phases(backward)}",
        peers.load({who: (needs, step(run)) for who, (needs, run) in candidates.items()}, device),
        inputs,
        truth=step(candidates["eager"][1]),
        samples=[draw(device, 16, vocab, dtype, leaf=backward)],
        moved=(2 if backward else 1) * inputs[0].nbytes,
    )


def token_logprobs(*shape: Any) -> list[Row]:
    candidates: Candidates = {
        "finefuse": (OURS, ff.token_logprobs),
        "torch.compile": (TORCH, peers.compiled(peers.logprobs_eager)),
        "eager": (TORCH, peers.logprobs_eager),
        "TRL": (TRL, peers.logprobs_trl),
    }
    return from_logits("token_logprobs", False, candidates, *shape)


def cross_entropy(*shape: Any) -> list[Row]:
    candidates: Candidates = {
        "finefuse": (OURS, ff.cross_entropy),
        "finefuse in place": (OURS, functools.partial(ff.cross_entropy, inplace=True)),
        "torch.compile": (TORCH, peers.compiled(peers.cross_entropy)),
        "eager": (TORCH, peers.cross_entropy),
        "Liger": (LIGER_TRITON, peers.cross_entropy_liger),
    }
    return from_logits("cross_entropy", True, candidates, *shape)


def calls(device: str) -> list[Row]:
    """`x + x` is there as this machine's yardstick."""
    x, y = torch.randn(4, 32, device=device), torch.randint(0, 32, (4,), device=device)
    z, one = x.clone().requires_grad_(), torch.ones(4, device=device)
    raw = torch.ops.finefuse.token_logprobs_inference.default

    def both(f: Any) -> Callable[[], None]:
        def call() -> None:
            z.grad = None
            f(z, y).backward(one)

        return call

    functions: dict[str, tuple[str, Callable[[], Any]]] = {
        "x + x": (TORCH, lambda: x + x),
        "torch.log_softmax": (TORCH, lambda: torch.log_softmax(x, -1)),
        "raw op": (OURS, lambda: raw(x, y, 1.0, -100)),
        "token_logprobs": (OURS, lambda: ff.token_logprobs(x, y)),
        "token_logprobs with stats": (OURS, lambda: ff.token_logprobs(x, y, stats=True)),
        "eager": (TORCH, lambda: peers.logprobs_eager(x, y)),
        "token_logprobs, forward + backward": (OURS, both(ff.token_logprobs)),
        "eager, forward + backward": (TORCH, both(peers.logprobs_eager)),
    }
    runs = {name: (needs, repeated(f, 200)) for name, (needs, f) in functions.items()}
    return compare_calls("a call on 4x32", peers.load(runs, device), device, 200, rounds=41)


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    if size == "standard":
        yield token_logprobs(device, *LOGPROBS[device][0])
        return
    yield calls(device)
    for bench, cases in ((token_logprobs, LOGPROBS), (cross_entropy, CROSS_ENTROPY)):
        for rows, vocab, dtype in cases[device]:
            yield bench(device, 64 if quick else rows, vocab, dtype)
