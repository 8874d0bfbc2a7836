"""DPO: from logits, forward and with the gradient; and from vectors of log-probabilities.

Bytes at least: a forward reads the logits once; with the gradient they are read twice and it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import finefuse as ff
import torch
from torch import Tensor

from . import peers
from .measure import Inputs, Row, Run, compare, compare_small, forward, gradient
from .peers import LIGER, OURS, TORCH, TRL

# sequences, tokens, vocabulary, type
CASES = {
    "cpu": (
        (8, 512, 32000, torch.float32),
        (8, 128, 32000, torch.float32),
        (8, 512, 32000, torch.bfloat16),
        (8, 128, 128256, torch.bfloat16),
    ),
    "cuda": (
        (8, 512, 32000, torch.bfloat16),
        (8, 512, 128256, torch.bfloat16),
        (8, 512, 32000, torch.float32),
    ),
}


def ours(logits: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
    return ff.preference_loss_from_logits(logits, targets, ref_logprobs=ref, beta=0.1).loss


def ours_inplace(logits: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
    return ff.preference_loss_from_logits(
        logits, targets, ref_logprobs=ref, beta=0.1, inplace=True
    ).loss


def from_logits(
    device: str, batch: int, tokens: int, vocab: int, dtype: torch.dtype
) -> Iterator[list[Row]]:
    def draw(batch: int, tokens: int, leaf: bool) -> Inputs:
        logits = torch.randn(batch, tokens, vocab, dtype=dtype, device=device).mul_(3)
        targets = torch.randint(0, vocab, (batch, tokens), device=device)
        return logits.requires_grad_(leaf), targets, torch.randn(batch, device=device)

    case = f"DPO {batch}x{tokens}x{vocab} {str(dtype).removeprefix('torch.')}"
    for step, passes, leaf in ((forward, 1, False), (gradient, 3, True)):
        runs = {
            "finefuse": (OURS, step(ours)),
            "finefuse in place": (OURS, step(ours_inplace)),
            "torch.compile": (TORCH, step(peers.compiled(peers.dpo_eager))),
            "cross_entropy": (TORCH, step(peers.dpo_cross_entropy)),
            "eager": (TORCH, step(peers.dpo_eager)),
            "TRL": (TRL, step(peers.dpo_trl)),
        }
        if not leaf:
            del runs["finefuse in place"]  # of the gradient
        inputs = draw(batch, tokens, leaf)
        yield compare(
            f"{case}, forward{' + backward' if leaf else ''}",
            peers.load(runs, device),
            inputs,
            truth=step(peers.dpo_eager),
            samples=[draw(2, 8, leaf) for _ in range(4)],
            moved=passes * inputs[0].nbytes,
        )


def from_vectors(device: str, pairs: int) -> list[Row]:
    vectors = [-torch.rand(pairs, device=device) * 50 for _ in range(4)]
    for policy in vectors[:2]:
        policy.requires_grad_()

    def fused(*v: Tensor) -> Tensor:
        return ff.preference_loss(*v).loss

    def step(function: Callable[..., Tensor]) -> Run:
        """The gradient of the chosen; that of the rejected is its negative."""

        def run(*v: Tensor) -> Tensor:
            v[0].grad = v[1].grad = None
            function(*v).backward()
            assert v[0].grad is not None
            return v[0].grad

        return run

    steps = {
        "finefuse": (OURS, step(fused)),
        "torch.compile": (TORCH, step(peers.compiled(peers.dpo_from_vectors))),
        "eager": (TORCH, step(peers.dpo_from_vectors)),
        "Liger": (LIGER, step(peers.dpo_from_vectors_liger)),
    }
    case = f"DPO from vectors of {pairs}, forward + backward"
    runs = peers.load(steps, device)
    return compare_small(case, runs, tuple(vectors), step(peers.dpo_from_vectors), calls=100)


def run(device: str, quick: bool) -> Iterator[list[Row]]:
    for batch, tokens, vocab, dtype in CASES[device]:
        yield from from_logits(device, *((2, 32) if quick else (batch, tokens)), vocab, dtype)
    for pairs in (8, 64, 1024):
        yield from_vectors(device, pairs)
