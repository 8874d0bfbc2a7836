"""Distillation from logits as plain torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import widest


def _counts(student: Tensor, mask: Tensor | None, targets: Tensor | None, ignore: int) -> Tensor:
    """Which rows count."""
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if mask is not None:
        keep = keep & mask
    return keep if targets is None else keep & (targets != ignore)


def mass_tolerance(dtype: torch.dtype) -> float:
    """How much more than 1 the rounding of log-probabilities may make of their probabilities."""
    return {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(dtype, 1e-3)


def _faults(teacher: Tensor, indices: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with an index out of range, with an index twice, with probabilities that exceed 1."""
    out = ((indices < 0) | (indices >= vocab)).any(-1)
    ordered = indices.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    mass = widest(teacher).exp().sum(-1) > 1 + mass_tolerance(teacher.dtype)
    return out, twice, mass


def check(
    student: Tensor, teacher: Tensor, indices: Tensor | None, mask: Tensor | None,
    targets: Tensor | None, vocab: int, ignore_index: int,
) -> None:  # fmt: skip
    """What kernels check of a teacher's indices on the CPU."""
    if indices is None:
        return
    keep = _counts(student, mask, targets, ignore_index)
    faults = [(fault & keep).flatten() for fault in _faults(teacher, indices, vocab)]
    rows = torch.stack(faults).any(0).nonzero()
    if len(rows):
        row = int(rows[0])
        if faults[0][row]:
            what = f"teacher_indices: row {row} has an index that is not in [0, {vocab})"
        elif faults[1][row]:
            what = f"teacher_indices: row {row} has an index twice"
        else:
            what = (
                f"teacher_logits: the probabilities of row {row} add up to more than 1; with "
                "teacher_indices they are log-probabilities"
            )
        raise ValueError(what)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x·y where x is not 0, else 0, and so its gradient: 0·log 0 is 0."""
    zero = x == 0
    return x * torch.where(zero, 0, y)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    q = log_q.exp()
    return _times(q, log_q - torch.where(q == 0, 0, log_p)).sum(-1)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    value = _times(p, torch.where(p == 0, 0, log_p) - log_q).sum(-1)
    # Where it is infinite its gradient is NaN in the whole row: log_softmax makes that of an infinite one for
    # every log-probability. By itself only that of the columns that q lacks would be NaN.
    bad = value == torch.inf
    every = torch.where(bad.unsqueeze(-1), 1 - log_p, 0) * torch.where(bad, torch.inf, 0).unsqueeze(
        -1
    )
    return value.masked_fill(bad, 0) + every.sum(-1)


def _jsd(log_p: Tensor, log_q: Tensor, beta: Any) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    m = beta * q + (1 - beta) * p
    log_m = torch.where(m == 0, 1, m).log()
    of_p = _times(p, torch.where(p == 0, 0, log_p) - log_m).sum(-1)
    of_q = _times(q, torch.where(q == 0, 0, log_q) - log_m).sum(-1)
    return beta * of_q + (1 - beta) * of_p


def _divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: Any) -> Tensor:
    if kind == "jsd" and isinstance(beta, Tensor):  # while compiling
        inside = beta.clamp(1e-3, 1 - 1e-3)
        inside = torch.where((beta > 0) & (beta < 1), beta, inside)
        value = _jsd(log_p, log_q, inside.to(log_p.dtype))
        value = torch.where(beta == 0, _forward_kl(log_p, log_q), value)
        chosen = torch.where(
            beta == 1, log_p, log_p.detach()
        )  # NaN of what is not chosen stays out
        return torch.where(beta == 1, _reverse_kl(chosen, log_q), value)
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return _forward_kl(log_p, log_q)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return _reverse_kl(log_p, log_q)
    return _jsd(log_p, log_q, beta)


def _buckets(log_p: Tensor, log_q: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """log-probabilities of the K columns that the teacher names and of the rest together."""
    named = log_p.gather(-1, indices)
    if indices.shape[-1] == log_p.shape[-1]:
        return named, log_q
    rest = log_p.scatter(-1, indices, -torch.inf)
    empty = (rest == -torch.inf).all(-1, keepdim=True)
    log_rest = torch.where(empty, 0, rest).logsumexp(-1, keepdim=True)
    log_rest = log_rest.masked_fill(empty, -torch.inf)
    below = (1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([named, log_rest], -1), torch.cat([log_q, below.log()], -1)


def distill_loss(
    student: Tensor, teacher: Tensor, indices: Tensor | None, mask: Tensor | None,
    targets: Tensor | None, beta: Any, temperature: Any, alpha: Any, kind: str,
    temperature_squared: bool, vocab: int, ignore_index: int, reduction: str,
) -> Tensor:  # fmt: skip
    wide = torch.float64 if student.dtype is torch.float64 else torch.float32
    keep = _counts(student, mask, targets, ignore_index)
    bad = torch.zeros_like(keep)
    # rows that do not count become 0 before anything is computed: NaN there reaches nothing
    z = torch.where(keep.unsqueeze(-1), student[..., :vocab], 0).to(wide)
    log_p = (z / temperature).log_softmax(-1)
    if indices is None:
        teacher = teacher[..., :vocab]
    log_q = torch.where(keep.unsqueeze(-1), teacher, 0 if indices is None else -torch.inf).to(wide)
    if indices is None:
        log_q = (log_q / temperature).log_softmax(-1)
    else:
        out, twice, mass = _faults(teacher, indices, vocab)
        bad = out | twice | mass
        index = torch.where((keep & ~bad).unsqueeze(-1), indices, 0).long()
        log_p, log_q = _buckets(log_p, log_q, index)
    if isinstance(alpha, Tensor):
        log_p = torch.where(alpha > 0, log_p, log_p.detach())
    factor = alpha * (temperature * temperature if temperature_squared else 1)
    loss = factor * _divergence(log_p, log_q, kind, beta)
    if isinstance(alpha, Tensor):  # while compiling; 0·inf is not 0
        loss = torch.where(alpha > 0, loss, 0)
    elif alpha == 0:
        loss = torch.zeros_like(loss)
    if targets is not None:
        outside = keep & ((targets < 0) | (targets >= vocab))
        bad = bad | outside
        index = torch.where(keep & ~outside, targets, 0).long().unsqueeze(-1)
        share = 1 - alpha
        if isinstance(alpha, Tensor):
            logp = torch.where(alpha < 1, z.log_softmax(-1).gather(-1, index).squeeze(-1), 0)
            loss = loss - share * logp
        elif share != 0:
            loss = loss - share * z.log_softmax(-1).gather(-1, index).squeeze(-1)
    loss = torch.where(keep, loss.masked_fill(bad, torch.nan), 0).to(wide)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / keep.sum().clamp(min=1) if reduction == "mean" else total
