"""Preference losses as plain torch operations; SPEC section 4, one line a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._args import PreferenceInputs, PreferenceOptions


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


def preference_loss(inputs: PreferenceInputs, options: PreferenceOptions) -> tuple[Tensor, ...]:
    """loss, chosen_rewards, rejected_rewards, margins, accuracy; computed in float64 as the kernels do."""
    raise NotImplementedError
