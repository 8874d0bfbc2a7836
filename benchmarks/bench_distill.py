"""Distillation from logits: forward and reverse KL, JSD, cross-entropy beside it, a top-K teacher.

Bytes at least: a forward reads the logits of both once; with the gradient they are read once and it is
written, which all candidates are measured by. The values and indices of a top-K teacher count instead of its
logits.

Only the student has a gradient. TRL's loss has the forward and the reverse KL at its beta 0 and 1. Liger's
kernels take log-probabilities; they run on a GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor

from . import peers
from .measure import Inputs, Row, compare, forward, gradient
from .peers import LIGER_TRITON, OURS, TORCH, TRL, Loss

# rows, vocabulary, type
SHAPES = {
    "cpu": (
        (1024, 32000, torch.float32),
        (1024, 32000, torch.bfloat16),
        (512, 128256, torch.bfloat16),
    ),
    "cuda": (
        (8192, 32000, torch.bfloat16),
        (8192, 128256, torch.bfloat16),
        (8192, 32000, torch.float32),
    ),
}
TOP = 64


def ours(kind: str, inplace: bool = False, **options: Any) -> Loss:
    def loss(student: Tensor, teacher: Tensor, *rest: Tensor) -> Tensor:
        given = dict(
            zip(("targets",) if "alpha" in options else ("teacher_indices",), rest, strict=False)
        )
        return ff.distill_loss(student, teacher, kind=kind, inplace=inplace, **options, **given)

    return loss


def draw(device: str, rows: int, vocab: int, dtype: torch.dtype, leaf: bool) -> Inputs:
    student = torch.randn(rows, vocab, dtype=dtype, device=device).mul_(3)
    teacher = torch.randn_like(student).mul_(3)
    return student.requires_grad_(leaf), teacher


def with_targets(*args: Any) -> Inputs:
    student, teacher = draw(*args)
    targets = torch.randint(0, student.shape[1], student.shape[:1], device=student.device)
    return student, teacher, targets


def with_top(*args: Any) -> Inputs:
    """The teacher's largest log-probabilities and where they are."""
    student, teacher = draw(*args)
    values, indices = torch.log_softmax(teacher.float(), -1).topk(TOP)
    return student, values.to(teacher.dtype), indices


def case(
    name: str,
    fused: Callable[..., Loss],
    plain: Loss,
    others: dict[str, tuple[str, Loss]],
    inputs_of: Callable[..., Inputs],
    device: str,
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    leaf: bool,
) -> list[Row]:
    step = gradient if leaf else forward
    runs = {"finefuse": (OURS, fused())}
    if leaf:
        runs["finefuse in place"] = (OURS, fused(inplace=True))
    runs["torch.compile"] = (TORCH, peers.compiled(plain))
    if dtype is not torch.float32:
        runs["torch.compile in float32"] = (TORCH, peers.compiled(peers.both_in_float32(plain)))
    runs |= {"eager": (TORCH, plain), **others}
    inputs = inputs_of(device, rows, vocab, dtype, leaf)
    read = sum(t.nbytes for t in inputs)
    return compare(
        f"{name} {rows}x{vocab} {str(dtype).removeprefix('torch.')}, forward{' + backward' * leaf}",
        peers.load({who: (needs, step(loss)) for who, (needs, loss) in runs.items()}, device),
        inputs,
        truth=step(plain),
        samples=[inputs_of(device, 16, vocab, dtype, leaf) for _ in range(4)],
        moved=read + inputs[0].nbytes * leaf,
    )


def run(device: str, quick: bool) -> Iterator[list[Row]]:
    kinds = {
        "forward KL": ("forward_kl", peers.forward_kl, peers.forward_kl_div, 0.0),
        "reverse KL": ("reverse_kl", peers.reverse_kl, peers.reverse_kl_div, 1.0),
        "JSD": ("jsd", peers.jsd, peers.jsd_kl_div, 0.5),
    }
    for rows, vocab, dtype in SHAPES[device]:
        shape = (32 if quick else rows, vocab, dtype)
        for name, (kind, plain, by_kl_div, beta) in kinds.items():
            others: dict[str, tuple[str, Loss]] = {
                "kl_div": (TORCH, by_kl_div),
                "TRL": (TRL, peers.distill_trl(beta)),
                "Liger": (LIGER_TRITON, peers.distill_liger(beta)),
            }
            for leaf in (False, True):
                fused = lambda kind=kind, **options: ours(kind, **options)  # noqa: E731
                yield case(name, fused, plain, others, draw, device, *shape, leaf)
    rows, vocab, dtype = SHAPES[device][1]
    shape = (32 if quick else rows, vocab, dtype)
    yield case(
        "half forward KL, half cross-entropy",
        lambda **options: ours("forward_kl", alpha=0.5, **options),
        peers.forward_kl_and_cross_entropy, {}, with_targets, device, *shape, True,
    )  # fmt: skip
    yield case(
        f"forward KL of the teacher's {TOP} largest",
        lambda **options: ours("forward_kl", **options),
        peers.forward_kl_top, {}, with_top, device, *shape, True,
    )  # fmt: skip
