"""Distillation from logits: forward and reverse KL, JSD, cross-entropy beside it, a top-K teacher.

Bytes at least: student and teacher are read once; with the gradient it is also written once. All candidates
are measured by that, those too that go over the logits more often.

TRL's loss is the static one of its GKD trainer: beta 0 is the forward KL, 1 the reverse. Liger's kernels
start from log-softmaxes, which its users compute by torch; on a CPU they cannot run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor

from . import peers
from .measure import Inputs, Row, Size, compare, forward, gradient, name_of, phases
from .peers import LIGER_TRITON, TRL, Candidates, Loss

# rows, vocabulary, type
SHAPES = {
    "cpu": (
        (1024, 32000, torch.float32),
        (1024, 32000, torch.bfloat16),
        (256, 128256, torch.bfloat16),
    ),
    "cuda": (
        (4096, 32000, torch.bfloat16),
        (4096, 128256, torch.bfloat16),
        (4096, 32000, torch.float32),
    ),
}
K = 64
QUICK_ROWS = 16


def ours(inplace: bool = False, **options: Any) -> Loss:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return ff.distill_loss(student, teacher, inplace=inplace, **options)

    return loss


def ours_mix(inplace: bool = False) -> Loss:
    def loss(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return ff.distill_loss(
            student, teacher, alpha=0.5, targets=targets, temperature=2.0, temperature_squared=True,
            inplace=inplace,
        )  # fmt: skip

    return loss


def ours_top_k(inplace: bool = False) -> Loss:
    def loss(student: Tensor, logprobs: Tensor, indices: Tensor) -> Tensor:
        return ff.distill_loss(student, logprobs, teacher_indices=indices, inplace=inplace)

    return loss


def draw(device: str, rows: int, vocab: int, dtype: torch.dtype) -> Inputs:
    """A student that is near its teacher, as after some training."""
    teacher = torch.randn(rows, vocab, dtype=dtype, device=device).mul_(3)
    return (torch.randn_like(teacher) + teacher).requires_grad_(), teacher


def draw_mix(device: str, rows: int, vocab: int, dtype: torch.dtype) -> Inputs:
    targets = torch.randint(0, vocab, (rows,), device=device)
    return *draw(device, rows, vocab, dtype), targets


def draw_top_k(device: str, rows: int, vocab: int, dtype: torch.dtype) -> Inputs:
    """The teacher's K best log-probabilities, as a server sends them, and their tokens."""
    student, teacher = draw(device, rows, vocab, dtype)
    return student, *torch.log_softmax(teacher.float(), -1).topk(K)


def from_logits(
    name: str,
    fused: Any,
    plain: Loss,
    others: Candidates,
    drawn: Any,
    device: str,
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    backward: bool = True,
) -> list[Row]:
    """One divergence; `fused` makes our loss, in place if asked, `drawn` its inputs."""
    runs = peers.from_logits(fused, plain, others, dtype, inplace=backward)
    step = gradient if backward else forward
    inputs = drawn(device, rows, vocab, dtype)
    moved = inputs[0].nbytes * (2 if backward else 1) + sum(t.nbytes for t in inputs[1:])
    if not backward:
        inputs = tuple(t.detach() for t in inputs)
    return compare(
        f"{name} {rows}x{vocab} {name_of(dtype)}, {phases(backward)}",
        peers.load({who: (needs, step(loss)) for who, (needs, loss) in runs.items()}, device),
        inputs,
        truth=step(plain),
        samples=[drawn(device, 8, vocab, dtype) for _ in range(2)],
        moved=moved,
        budget=8.0,
    )


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    shapes = [(QUICK_ROWS if quick else rows, *rest) for rows, *rest in SHAPES[device]]
    kl, jsd = peers.forward_kl, peers.jsd
    of_kl = {
        "TRL": (TRL, peers.gkd_trl(0.0)),
        "Liger": (LIGER_TRITON, peers.kl_liger),
    }
    of_jsd = {
        "TRL": (TRL, peers.gkd_trl(0.5)),
        "Liger": (LIGER_TRITON, peers.jsd_liger(0.5)),
    }

    def fused_jsd(inplace: bool = False) -> Loss:
        return ours(inplace, kind="jsd", beta=0.5)

    def fused_reverse(inplace: bool = False) -> Loss:
        return ours(inplace, kind="reverse_kl")

    if size == "standard":
        shape = 256, 32000
        yield from_logits("forward KL", ours, kl, of_kl, draw, device, *shape, torch.float32)
        yield from_logits("JSD", fused_jsd, jsd, of_jsd, draw, device, *shape, torch.bfloat16)
        return
    for shape in shapes[:2]:
        yield from_logits("forward KL", ours, kl, of_kl, draw, device, *shape, backward=False)
    for shape in shapes:
        yield from_logits("forward KL", ours, kl, of_kl, draw, device, *shape)
        yield from_logits("JSD", fused_jsd, jsd, of_jsd, draw, device, *shape)
    shape = shapes[1]
    of_reverse = {
        "TRL": (TRL, peers.gkd_trl(1.0)),
        "Liger": (LIGER_TRITON, peers.jsd_liger(1.0)),
    }
    reverse = peers.reverse_kl
    yield from_logits("reverse KL", fused_reverse, reverse, of_reverse, draw, device, *shape)
    mix, top_k = peers.kl_and_cross_entropy, peers.kl_top_k
    yield from_logits("KL at T = 2 + cross-entropy", ours_mix, mix, {}, draw_mix, device, *shape)
    yield from_logits(f"forward KL, top {K}", ours_top_k, top_k, {}, draw_top_k, device, *shape)
