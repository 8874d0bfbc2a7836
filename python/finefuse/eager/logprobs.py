"""Token log-probabilities, cross-entropy and sequence log-probabilities as plain torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import widest


def _rows(
    logits: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 (or float64) logits, a usable index, which rows count, which are out of range.

    Rows that do not count become 0 before anything is computed, so that NaN there reaches nothing.
    """
    wide = logits.dtype if logits.dtype is torch.float64 else torch.float32
    keep = targets != ignore_index
    bad = keep & ((targets < 0) | (targets >= logits.shape[-1]))
    z = torch.where(keep.unsqueeze(-1), logits, 0).to(wide)
    return z, torch.where(keep & ~bad, targets, 0).long().unsqueeze(-1), keep, bad


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: Any, ignore_index: int, stats: bool
) -> Any:
    z, index, keep, bad = _rows(logits, targets, ignore_index)
    z = z / temperature
    logp = torch.log_softmax(z, -1)

    def rows(x: Tensor) -> Tensor:
        return torch.where(keep, x.masked_fill(bad, float("nan")), 0)

    lp = rows(logp.gather(-1, index).squeeze(-1))
    if not stats:
        return lp
    finite = logp.masked_fill(logp == -torch.inf, 0)  # 0·log 0 is 0, and so is its gradient
    return lp, rows(-(logp.exp() * finite).sum(-1)), rows(torch.logsumexp(z, -1))


def cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: Any, ignore_index: int, reduction: str
) -> Tensor:
    z, index, keep, bad = _rows(logits, targets, ignore_index)
    logp = torch.log_softmax(z, -1)
    loss = -logp.gather(-1, index).squeeze(-1)
    if isinstance(label_smoothing, Tensor):  # while compiling; 0·inf is not 0
        logp = torch.where(label_smoothing != 0, logp, 0)
    if isinstance(label_smoothing, Tensor) or label_smoothing != 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * logp.mean(-1)
    loss = torch.where(keep, loss.masked_fill(bad, float("nan")), 0)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / keep.sum().clamp(min=1) if reduction == "mean" else total


def sequence_logprobs(
    token_lp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, average: bool
) -> Tensor:
    if mask is not None:
        token_lp = torch.where(mask, token_lp, 0)
    if cu_seqlens is None:
        keep = torch.ones_like(token_lp) if mask is None else mask.to(token_lp.dtype)
        sums, counts = widest(token_lp).sum(-1), keep.sum(-1)
    else:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        counts, total = ends - starts, token_lp.shape[0]
        sequence = torch.searchsorted(ends, torch.arange(total, device=ends.device), right=True)
        sequence = sequence.clamp(max=max(len(counts) - 1, 0))
        wide = widest(token_lp)
        sums = wide.new_zeros(len(counts)).index_add(0, sequence, wide)
        rising = (counts >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)
        sums = torch.where(rising, sums, torch.nan)
    if average:
        sums = sums / counts.clamp(min=1)
    return sums.to(token_lp.dtype)
