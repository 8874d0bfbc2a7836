"""Low-rank updates of many adapters in float64: those of one, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .lora import keep_mask

Array = NDArray[Any]


def lora_linear_segmented(
    x: Array,
    weight: Array,
    lora_a: Array,
    lora_b: Array,
    adapter: Array,
    scale: Array | float = 1.0,
    bias: Array | None = None,
    p: float = 0.0,
    seed: int = 0,
) -> Array:
    """y_t = x_t Wᵀ + b + s_a·(D(x_t) A_aᵀ) B_aᵀ; x (tokens, in)."""
    x, weight, lora_a, lora_b = (np.asarray(v, np.float64) for v in (x, weight, lora_a, lora_b))
    scale = np.broadcast_to(np.asarray(scale, np.float64), len(lora_a))
    dropped = x * keep_mask(x.shape, p, seed) if p else x
    y = x @ weight.T if bias is None else x @ weight.T + np.asarray(bias, np.float64)
    for t, a in enumerate(adapter):
        if a >= 0:
            y[t] += scale[a] * lora_b[a] @ (lora_a[a] @ dropped[t])
    return y


def gradients(
    dy: Array,
    x: Array,
    weight: Array,
    lora_a: Array,
    lora_b: Array,
    adapter: Array,
    scale: Array | float = 1.0,
    p: float = 0.0,
    seed: int = 0,
) -> tuple[Array, Array, Array]:
    """dx, dA, dB: with g_t = s_a·B_aᵀ dy_t,  dA_a = Σ g_t D(x_t)ᵀ,  dB_a = Σ s_a·dy_t h_tᵀ."""
    dy, x, weight, lora_a, lora_b = (
        np.asarray(v, np.float64) for v in (dy, x, weight, lora_a, lora_b)
    )
    scale = np.broadcast_to(np.asarray(scale, np.float64), len(lora_a))
    mask = keep_mask(x.shape, p, seed) if p else np.ones(x.shape)
    dx, da, db = dy @ weight, np.zeros(lora_a.shape), np.zeros(lora_b.shape)
    for t, a in enumerate(adapter):
        if a < 0:
            continue
        dropped = mask[t] * x[t]
        g = scale[a] * dy[t] @ lora_b[a]
        dx[t] += mask[t] * (g @ lora_a[a])
        da[a] += np.outer(g, dropped)
        db[a] += scale[a] * np.outer(dy[t], lora_a[a] @ dropped)
    return dx, da, db
