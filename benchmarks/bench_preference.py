"""DPO: from logits, forward and with the gradient; and from vectors of log-probabilities. Every loss of the
family beside DPO, "sigmoid", which is the first row: ratios are to its time.

Bytes at least: a forward reads the logits once; with the gradient they are read twice and it is written.

The errors of every loss are against the float64 reference, through plain log-softmaxes. Of the
peers that start from vectors each gets what its users have: averages for Liger's SimPO and ORPO, one vector
and labels, joined within the call, for its KTO.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from finefuse.reference import preference as reference
from torch import Tensor

from . import peers
from .measure import (
    Inputs,
    Row,
    Run,
    Size,
    compare,
    compare_small,
    errors,
    forward,
    gradient,
    name_of,
    phases,
)  # fmt: skip
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


STEPS = (
    (forward, 1, False),
    (gradient, 3, True),
)  # passes over the logits, whether with a gradient


def from_logits(
    device: str, batch: int, tokens: int, vocab: int, dtype: torch.dtype, steps: Any = STEPS
) -> Iterator[list[Row]]:
    def draw(batch: int, tokens: int, leaf: bool) -> Inputs:
        logits = torch.randn(batch, tokens, vocab, dtype=dtype, device=device).mul_(3)
        targets = torch.randint(0, vocab, (batch, tokens), device=device)
        return logits.requires_grad_(leaf), targets, torch.randn(batch, device=device)

    case = f"DPO {batch}x{tokens}x{vocab} {name_of(dtype)}"
    for step, passes, leaf in steps:
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
            f"{case}, {phases(leaf)}",
            peers.load(runs, device),
            inputs,
            truth=step(peers.dpo_eager),
            samples=[draw(2, 8, leaf) for _ in range(4)],
            moved=passes * inputs[0].nbytes,
        )


Vectors = Callable[..., Tensor]  # of chosen, rejected, their references and more, to a loss


def by_chosen(function: Vectors) -> Run:
    """Forward and backward; the gradient of the chosen (by DPO that of the rejected is its negative)."""

    def run(*v: Tensor) -> Tensor:
        v[0].grad = v[1].grad = None
        function(*v).backward()
        assert v[0].grad is not None
        return v[0].grad

    return run


def from_vectors(device: str, pairs: int) -> list[Row]:
    vectors = [-torch.rand(pairs, device=device) * 50 for _ in range(4)]
    for policy in vectors[:2]:
        policy.requires_grad_()

    def fused(*v: Tensor) -> Tensor:
        return ff.preference_loss(*v).loss

    steps = {
        "finefuse": (OURS, by_chosen(fused)),
        "torch.compile": (TORCH, by_chosen(peers.compiled(peers.dpo_from_vectors))),
        "eager": (TORCH, by_chosen(peers.dpo_from_vectors)),
        "Liger": (LIGER, by_chosen(peers.dpo_from_vectors_liger)),
    }
    case = f"DPO from vectors of {pairs}, forward + backward"
    runs = peers.load(steps, device)
    return compare_small(case, runs, tuple(vectors), by_chosen(peers.dpo_from_vectors), calls=100)


def exact(loss: str, *vectors: Tensor) -> list[Tensor]:
    """The gradients of chosen and rejected by the float64 reference; of `from_six`'s arguments."""
    w, l, ref_w, ref_l, n_w, n_l = (v.detach().cpu().double().numpy() for v in vectors)
    out = reference.preference_loss(
        w, l, ref_w, ref_l, loss=loss, chosen_lengths=n_w, rejected_lengths=n_l,
        **OPTIONS.get(loss, {}),
    )  # fmt: skip
    return [torch.from_numpy(d).to(vectors[0]) for d in (out.d_chosen, out.d_rejected)]


def exact_from_logits(loss: str, logits: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
    lp = peers.logprobs_eager(logits, targets).sum(-1)
    lengths = torch.full_like(ref, targets.shape[1]).chunk(2)
    lp.backward(torch.cat(exact(loss, *lp.chunk(2), *ref.chunk(2), *lengths)))
    assert logits.grad is not None
    return logits.grad


def exact_from_vectors(loss: str, *vectors: Tensor) -> Tensor:
    return exact(loss, *vectors)[0]


def with_errors(
    rows: list[Row], runs: dict[str, Run], truth: Callable[..., Tensor], samples: list[Inputs]
) -> list[Row]:
    """Each loss against its own truth; a GPU has as many rows a loss as backends."""
    for row, (name, call) in zip(rows, runs.items(), strict=True):
        loss = functools.partial(truth, name.split()[0])
        (row.error,) = errors([call], loss, samples)
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
    samples = [draw(4, 8)]
    first = functools.partial(exact_from_logits, LOSSES[0])
    rows = compare(
        f"every loss from logits {batch}x{tokens}x{vocab} {name_of(dtype)}, "
        "forward + backward",
        runs, inputs, first, samples, 3 * inputs[0].nbytes,
    )  # fmt: skip
    return with_errors(rows, runs, exact_from_logits, samples)


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
    first = functools.partial(exact_from_vectors, LOSSES[0])
    case = f"every loss from vectors of {pairs}, forward + backward"
    rows = compare_small(case, runs, inputs, first, calls=50)
    return with_errors(rows, runs, exact_from_vectors, [inputs])


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


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    if size == "standard":
        for dtype in (torch.float32, torch.bfloat16):
            yield from from_logits(device, 8, 64, 32000, dtype, STEPS[1:])
        return
    for batch, tokens, vocab, dtype in CASES[device]:
        yield from from_logits(device, *((2, 32) if quick else (batch, tokens)), vocab, dtype)
    for pairs in (8, 64, 1024):
        yield from_vectors(device, pairs)
    yield every_loss_from_logits(device, *((2, 32) if quick else EVERY[:2]), *EVERY[2:])
    yield every_loss_from_vectors(device, 1024)
    for loss in peers.PREFERENCES:
        yield one_loss_from_vectors(device, 1024, loss)
