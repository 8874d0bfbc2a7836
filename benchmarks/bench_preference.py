"""DPO: from logits, forward and with the gradient; and from vectors of log-probabilities. Then every loss.

Bytes at least: a forward reads the logits once; with the gradient they are read twice and it is written.

The two tables of every loss are of finefuse alone, sigmoid first: their ratios say what another loss costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from finefuse._args import PREFERENCE_LOSSES
from torch import Tensor

from . import peers
from .measure import (
    Inputs,
    Row,
    Run,
    compare,
    compare_calls,
    compare_small,
    forward,
    gradient,
    repeated,
)
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


NAMES = ("sigmoid", *(name for name in PREFERENCE_LOSSES if name not in ("sigmoid", "spin")))


def every_loss_from_logits(device: str, batch: int, tokens: int, vocab: int) -> list[Row]:
    def fused(name: str) -> peers.Loss:
        reference = PREFERENCE_LOSSES[name].reference

        def loss(logits: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
            given = {"ref_logprobs": ref} if reference else {}
            return ff.preference_loss_from_logits(logits, targets, loss=name, **given).loss

        return loss

    def draw(batch: int, tokens: int) -> Inputs:
        logits = torch.randn(batch, tokens, vocab, device=device).mul_(3)
        targets = torch.randint(0, vocab, (batch, tokens), device=device)
        ref = ff.sequence_logprobs(logits, targets) + torch.randn(batch, device=device)
        return logits.requires_grad_(), targets, ref

    inputs = draw(batch, tokens)
    rows = compare(
        f"every loss from logits {batch}x{tokens}x{vocab} float32, forward + backward",
        peers.load({name: (OURS, gradient(fused(name))) for name in NAMES}, device),
        inputs, truth=gradient(fused("sigmoid")), samples=[draw(2, 8)],
        moved=3 * inputs[0].nbytes,
    )  # fmt: skip
    for row in rows:
        row.error = None  # each has a truth of its own, in the tests
    return rows


def every_loss_from_vectors(device: str, pairs: int) -> list[Row]:
    vectors = [-torch.rand(pairs, device=device) * 50 for _ in range(4)]
    lengths = torch.full((pairs,), 64.0, device=device)
    for policy in vectors[:2]:
        policy.requires_grad_()

    def step(name: str) -> Run:
        kind = PREFERENCE_LOSSES[name]
        options: dict[str, Any] = {"loss": name}
        if kind.by_length:
            options |= {"chosen_lengths": lengths, "rejected_lengths": lengths}
        if kind.nll == "whole":
            options["chosen_nll"] = torch.ones((), device=device)

        def run(*v: Tensor) -> Tensor:
            v[0].grad = v[1].grad = None
            ff.preference_loss(*(v if kind.reference else v[:2]), **options).loss.backward()
            assert v[0].grad is not None
            return v[0].grad

        return run

    runs = peers.load({name: (OURS, step(name)) for name in NAMES}, device)
    repeats = {name: repeated(functools.partial(r, *vectors), 50) for name, r in runs.items()}
    case = f"every loss from vectors of {pairs}, forward + backward"
    return compare_calls(case, repeats, device, calls=50, rounds=31)


def run(device: str, quick: bool) -> Iterator[list[Row]]:
    for batch, tokens, vocab, dtype in CASES[device]:
        yield from from_logits(device, *((2, 32) if quick else (batch, tokens)), vocab, dtype)
    for pairs in (8, 64, 1024):
        yield from_vectors(device, pairs)
    yield every_loss_from_logits(device, *((2, 32) if quick else (8, 128)), 32000)
    yield every_loss_from_vectors(device, 1024)
