"""Preference losses as plain torch operations; SPEC section 4, one line a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import widest


def _smoothed_sigmoid(x: Tensor, eps: Any) -> Tensor:
    loss = -functional.logsigmoid(x)
    if not isinstance(eps, Tensor) and eps == 0:
        return loss
    other = functional.logsigmoid(-x)
    if isinstance(eps, Tensor):  # while compiling; 0·inf is not 0
        other = torch.where(eps != 0, other, 0)
    return (1 - eps) * loss - eps * other


def pair_loss(loss: str, w: Tensor, l: Tensor, beta: Any, eps: Any) -> Tensor:
    """The loss of each pair; w and l are the log-ratios, divided by lengths where those are given."""
    if loss == "sigmoid":
        return _smoothed_sigmoid(beta * (w - l), eps)
    if loss == "ipo":
        return (w - l - 1 / (2 * beta)) ** 2
    assert loss == "hinge", loss
    return torch.relu(1 - beta * (w - l))


def preference_loss(
    vectors: Any, loss: str, beta: Any, label_smoothing: Any, reduction: str
) -> tuple[Tensor, ...]:
    """loss, chosen_rewards, rejected_rewards, margins, accuracy; computed in float64 as the kernels do."""
    chosen, rejected, ref_chosen, ref_rejected, *lengths = vectors
    # a negative length makes its pair NaN
    chosen_lengths, rejected_lengths = (
        n if n is None else torch.where(n >= 0, n, torch.nan) for n in lengths
    )
    dtype = chosen.dtype
    chosen, rejected = widest(chosen), widest(rejected)
    r_w = chosen if ref_chosen is None else chosen - ref_chosen
    r_l = rejected if ref_rejected is None else rejected - ref_rejected
    w = r_w if chosen_lengths is None else r_w / chosen_lengths.masked_fill(chosen_lengths == 0, 1)
    l = (
        r_l
        if rejected_lengths is None
        else r_l / rejected_lengths.masked_fill(rejected_lengths == 0, 1)
    )
    out = pair_loss(loss, w, l, beta, label_smoothing)
    pairs = max(out.numel(), 1)
    if reduction != "none":
        out = out.sum() / (pairs if reduction == "mean" else 1)
    metrics = (beta * r_w, beta * r_l, beta * (r_w - r_l), (r_w > r_l).sum() / pairs)
    return out.to(dtype), *(m.detach().to(dtype) for m in metrics)
