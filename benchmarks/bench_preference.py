"""DPO: from logits, forward and with the gradient; and from vectors of log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor
from torch.nn import functional

from . import peers
from .measure import Row, interleaved, peak_extra_mb

CASES = {
    "DPO 8x512x32000 float32": (8, 512, 32000, torch.float32),
    "DPO 8x128x32000 float32": (8, 128, 32000, torch.float32),
    "DPO 8x512x32000 bfloat16": (8, 512, 32000, torch.bfloat16),
    "DPO 8x128x128256 bfloat16": (8, 128, 128256, torch.bfloat16),
}


def ours(logits: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
    return ff.preference_loss_from_logits(logits, targets, ref_logprobs=ref, beta=0.1).loss


def ours_inplace(logits: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
    return ff.preference_loss_from_logits(
        logits, targets, ref_logprobs=ref, beta=0.1, inplace=True
    ).loss


def candidates() -> dict[str, Any]:
    return peers.load(
        {
            "finefuse": (None, ours),
            "finefuse in place": (None, ours_inplace),
            "torch.compile": (None, peers.compiled(peers.dpo_eager)),
            "cross_entropy": (None, peers.dpo_cross_entropy),
            "eager": (None, peers.dpo_eager),
            "TRL": ("trl", peers.dpo_trl),
        }
    )


def gradient_error(function: Any, dtype: torch.dtype, vocab: int) -> float:
    """max|error| of the gradient over max|truth|, float64, 2 sequences of 8 tokens."""
    g = torch.Generator().manual_seed(1)
    logits = (torch.randn(2, 8, vocab, generator=g) * 3).to(dtype)
    targets = torch.randint(0, vocab, (2, 8), generator=g)
    truth = logits.double().requires_grad_()
    peers.dpo_eager(truth, targets, torch.zeros(2, dtype=torch.float64)).backward()
    x = logits.clone().requires_grad_()
    function(x, targets, torch.zeros(2)).backward()
    assert x.grad is not None
    assert truth.grad is not None
    return float((x.grad.double() - truth.grad).abs().max() / truth.grad.abs().max())


def from_logits(case: str, quick: bool) -> Iterator[list[Row]]:
    batch, tokens, vocab, dtype = CASES[case]
    if quick:
        batch, tokens = 2, 32
    source = (torch.randn(batch, tokens, vocab) * 3).to(dtype)
    logits = source.clone()
    targets = torch.randint(0, vocab, (batch, tokens))
    ref = torch.randn(batch)
    size = logits.numel() * logits.element_size()
    plain = [(n, f) for n, f in candidates().items() if n != "finefuse in place"]

    def forward(f: Any) -> Any:
        def call() -> Any:
            with torch.no_grad():
                return f(logits, targets, ref)

        return call

    rows = [Row(f"{case}, forward", name, moved=size) for name, _ in plain]
    calls = [forward(f) for _, f in plain]
    interleaved(rows, calls, 9, 10, lambda: None)
    for row, call in zip(rows, calls, strict=True):
        row.extra_mb = peak_extra_mb(call)
    yield rows

    every = list(candidates().items())
    leaf = logits.requires_grad_()

    def both(f: Any) -> Any:
        def call() -> None:
            f(leaf, targets, ref).backward()

        return call

    def setup() -> None:
        leaf.grad = None
        with torch.no_grad():
            leaf.copy_(source)  # the in-place candidate consumed them

    rows = [Row(f"{case}, forward + backward", name, moved=3 * size) for name, _ in every]
    calls = [both(f) for _, f in every]
    interleaved(rows, calls, 9, 20, setup)
    for row, call, (_, f) in zip(rows, calls, every, strict=True):
        setup()
        row.extra_mb = peak_extra_mb(call)
        row.error = gradient_error(f, dtype, vocab)
    yield rows


def from_vectors(pairs: int) -> list[Row]:
    chosen, rejected, ref_chosen, ref_rejected = (-torch.rand(pairs) * 50 for _ in range(4))
    chosen.requires_grad_()
    rejected.requires_grad_()

    def eager(c: Tensor, r: Tensor, rc: Tensor, rr: Tensor) -> Tensor:
        return -functional.logsigmoid(0.1 * ((c - rc) - (r - rr))).mean()

    def fused(*v: Tensor) -> Tensor:
        return ff.preference_loss(*v).loss

    def both(f: Any) -> Any:
        def call() -> None:
            for _ in range(100):
                chosen.grad = rejected.grad = None
                f(chosen, rejected, ref_chosen, ref_rejected).backward()

        return call

    functions = {"finefuse": fused, "torch.compile": peers.compiled(eager), "eager": eager}
    rows = [Row(f"DPO from vectors of {pairs}, forward + backward", name) for name in functions]
    interleaved(rows, [both(f) for f in functions.values()], 31, 5, lambda: None, twice=False)
    for row in rows:
        row.times = [t / 100 for t in row.times]
    return rows


def run(quick: bool) -> Iterator[list[Row]]:
    for case in CASES:
        yield from from_logits(case, quick)
    for pairs in (8, 64, 1024):
        yield from_vectors(pairs)
