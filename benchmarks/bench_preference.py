"""DPO: from logits, forward and with the gradient; and from vectors of log-probabilities. Every loss of the
family beside DPO, "sigmoid", which is the first row: ratios are to its time.

Bytes at least: a forward reads the logits once; with the gradient they are read twice and it is written.

The errors of every loss are against the same loss by plain torch operations in float64. Of the
peers that start from vectors each gets what its users have: averages for Liger's SimPO and ORPO, one vector
and labels, joined within the call, for its KTO.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor

from . import peers
from .measure import Inputs, Row, Run, compare, compare_small, errors, forward, gradient
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
EVERY = (8, 128, 32000, torch.float32)
# "spin" is "sigmoid" by another name
LOSSES = (
    "sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft", "cpo", "simpo", "slic",
    "orpo", "kto", "apo_zero_unpaired",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.1},
    "cpo": {"sft_weight": 1.0},
    "slic": {"sft_weight": 1.0},
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


def in_eager(run: Run) -> Run:
    def call(*inputs: Tensor) -> Tensor:
        with ff.backend("eager"):
            return run(*inputs)

    return call


def with_errors(rows: list[Row], runs: dict[str, Run], samples: list[Inputs]) -> list[Row]:
    """Each loss against itself by plain operations in float64."""
    for row, call in zip(rows, runs.values(), strict=True):
        (row.error,) = errors([call], in_eager(call), samples)
    return rows


def every_loss_from_logits(
    device: str, batch: int, tokens: int, vocab: int, dtype: torch.dtype
) -> list[Row]:
    def draw(batch: int, tokens: int) -> Inputs:
        logits = torch.randn(batch, tokens, vocab, dtype=dtype, device=device).mul_(3)
        targets = torch.randint(0, vocab, (batch, tokens), device=device)
        lp = ff.token_logprobs(logits, targets).sum(-1)
        return logits.requires_grad_(), targets, lp + torch.randn_like(lp)

    def of(loss: str, logits: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
        return ff.preference_loss_from_logits(
            logits, targets, ref_logprobs=ref, loss=loss, **OPTIONS.get(loss, {})
        ).loss

    steps = {loss: (OURS, gradient(functools.partial(of, loss))) for loss in LOSSES}
    runs, inputs = peers.load(steps, device), draw(batch, tokens)
    first = next(iter(runs.values()))
    samples = [draw(4, 8)]
    rows = compare(
        f"every loss from logits {batch}x{tokens}x{vocab} {str(dtype).removeprefix('torch.')}, "
        "forward + backward",
        runs, inputs, in_eager(first), samples, 3 * inputs[0].nbytes,
    )  # fmt: skip
    return with_errors(rows, runs, samples)


Vectors = Callable[..., Tensor]  # of chosen, rejected, their references and lengths, to a loss


def by_chosen(function: Vectors) -> Run:
    """Forward and backward; the gradient of the chosen."""

    def run(*v: Tensor) -> Tensor:
        v[0].grad = v[1].grad = None
        function(*v).backward()
        assert v[0].grad is not None
        return v[0].grad

    return run


def vectors(device: str, pairs: int) -> Inputs:
    lengths = [torch.randint(10, 100, (pairs,), device=device) for _ in range(2)]
    lp = [-(torch.rand(pairs, device=device) + 0.1) * n for n in lengths]
    ref = [x + torch.randn_like(x) for x in lp]
    return *(x.requires_grad_() for x in lp), *ref, *lengths


def from_six(loss: str, w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, *n: Tensor) -> Tensor:
    return ff.preference_loss(
        w, l, ref_w, ref_l, loss=loss, chosen_lengths=n[0], rejected_lengths=n[1],
        **OPTIONS.get(loss, {}),
    ).loss  # fmt: skip


def every_loss_from_vectors(device: str, pairs: int) -> list[Row]:
    steps = {loss: (OURS, by_chosen(functools.partial(from_six, loss))) for loss in LOSSES}
    runs, inputs = peers.load(steps, device), vectors(device, pairs)
    first = next(iter(runs.values()))
    case = f"every loss from vectors of {pairs}, forward + backward"
    rows = compare_small(case, runs, inputs, in_eager(first), calls=50)
    return with_errors(rows, runs, [inputs])


def one_loss_from_vectors(device: str, pairs: int, loss: str) -> list[Row]:
    plain = peers.PREFERENCES[loss]
    steps = {
        "finefuse": (OURS, by_chosen(functools.partial(from_six, loss))),
        "torch.compile": (TORCH, by_chosen(peers.compiled(plain))),
        "eager": (TORCH, by_chosen(plain)),
        "Liger": (LIGER, by_chosen(peers.PREFERENCES_LIGER[loss])),
    }
    case = f"{loss} from vectors of {pairs}, forward + backward"
    inputs = vectors(device, pairs)
    return compare_small(case, peers.load(steps, device), inputs, by_chosen(plain), calls=50)


def run(device: str, quick: bool) -> Iterator[list[Row]]:
    for batch, tokens, vocab, dtype in CASES[device]:
        yield from from_logits(device, *((2, 32) if quick else (batch, tokens)), vocab, dtype)
    for pairs in (8, 64, 1024):
        yield from_vectors(device, pairs)
    yield every_loss_from_logits(device, *((2, 32) if quick else EVERY[:2]), *EVERY[2:])
    yield every_loss_from_vectors(device, 1024)
    for loss in peers.PREFERENCES:
        yield one_loss_from_vectors(device, 1024, loss)
