"""Preference losses in float64: SPEC section 4, a line a loss, value and derivatives by hand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_sigmoid(x: Array) -> Array:
    return np.asarray(np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))))


def sigmoid(x: Array) -> Array:
    return np.exp(log_sigmoid(x))


def pair_loss(loss: str, w: Array, l: Array, beta: float, eps: float) -> tuple[Array, Array, Array]:
    """(value, d/dw, d/dl) per pair; w and l are the log-ratios, divided by length where wanted."""
    x = beta * (w - l)
    if loss == "sigmoid":
        value = -(1 - eps) * log_sigmoid(x) - (eps * log_sigmoid(-x) if eps else 0)
        slope = -(1 - eps) * sigmoid(-x) + eps * sigmoid(x)
    elif loss == "ipo":
        value = (w - l - 1 / (2 * beta)) ** 2
        slope = 2 * (w - l - 1 / (2 * beta)) / beta
    elif loss == "hinge":
        value = np.maximum(0, 1 - x)
        slope = np.where(x < 1, -1.0, 0.0)
    else:
        raise ValueError(loss)
    return value, beta * slope, -beta * slope


class Output(NamedTuple):
    loss: Array
    chosen_rewards: Array
    rejected_rewards: Array
    margins: Array
    accuracy: float
    d_chosen: Array
    d_rejected: Array


def preference_loss(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array | float = 0.0,
    ref_rejected: Array | float = 0.0,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Array | float = 1.0,
    rejected_lengths: Array | float = 1.0,
    reduction: str = "mean",
) -> Output:
    chosen_lengths, rejected_lengths = (
        np.where(np.asarray(n) == 0, 1.0, n) for n in (chosen_lengths, rejected_lengths)
    )  # an empty completion counts as one token
    r_w, r_l = np.asarray(chosen - ref_chosen), np.asarray(rejected - ref_rejected)
    value, d_w, d_l = pair_loss(
        loss, r_w / chosen_lengths, r_l / rejected_lengths, beta, label_smoothing
    )
    scale = 1 / max(len(value), 1) if reduction == "mean" else 1.0
    return Output(
        value if reduction == "none" else scale * value.sum(),
        beta * r_w,
        beta * r_l,
        beta * (r_w - r_l),
        float(np.mean(r_w > r_l)) if len(value) else 0.0,
        scale * d_w / chosen_lengths,
        scale * d_l / rejected_lengths,
    )
