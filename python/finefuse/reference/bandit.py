"""The bandit as the plain NumPy program: a loop over steps, float64."""

from __future__ import annotations

from typing import Any

import numpy as np


def softmax(logits: Any) -> Any:
    e = np.exp(logits - np.max(logits))
    return e / e.sum()


def adjust(
    reward: float,
    how: str = "none",
    scale: float = 1.0,
    clip_val: float | None = None,
    temp: float = 1.0,
) -> float:
    """none: r; scale: r·scale; clip: clip(r, 0, clip_val); temp: e^{r/temp} / e^{1/temp}."""
    if how == "scale":
        return reward * scale
    if how == "clip":
        return float(np.clip(reward, 0.0, clip_val))
    if how == "temp":
        return float(np.exp(reward / temp) / np.exp(1.0 / temp))
    return reward


def train_agent(
    probs: Any,
    logits: Any,
    rng: np.random.RandomState,
    n_steps: int,
    lr: float = 0.1,
    baseline: float = 0.0,
    **adjustment: Any,
) -> tuple[Any, Any, Any, Any]:
    """(actions, rewards, adjusted, cumulative) of one agent; `logits` and `rng` move on.

    `adjustment`: what `adjust` takes beside the reward.
    """
    actions, rewards, adjusted = [], [], []
    for _ in range(n_steps):
        p = softmax(logits)
        action = rng.choice(len(p), p=p)
        reward = float(rng.random_sample() < probs[action])
        value = adjust(reward, **adjustment)
        grad = -p
        grad[action] += 1.0
        logits += lr * grad * (value - baseline)
        actions.append(action)
        rewards.append(reward)
        adjusted.append(value)
    return (
        np.array(actions, dtype=np.int64),
        np.array(rewards, dtype=np.float64),
        np.array(adjusted, dtype=np.float64),
        np.cumsum(rewards, dtype=np.float64),
    )
