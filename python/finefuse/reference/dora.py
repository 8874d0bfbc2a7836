"""Weight-decomposed updates in float64, as SPEC section 2 writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .lora import keep_mask, merge_lora

Array = NDArray[Any]


def dora_norm(weight: Array, lora_a: Array, lora_b: Array, scale: float = 1.0) -> Array:
    """‖W + s·B A‖ of each row."""
    return np.linalg.norm(merge_lora(weight, lora_a, lora_b, scale), axis=1)


def _factor(magnitude: Array, norm: Array) -> Array:
    magnitude = np.asarray(magnitude, np.float64)
    return np.divide(magnitude, norm, out=np.zeros_like(norm), where=norm != 0)


def dora_linear(
    x: Array,
    weight: Array,
    lora_a: Array,
    lora_b: Array,
    magnitude: Array,
    scale: float = 1.0,
    bias: Array | None = None,
    p: float = 0.0,
    seed: int = 0,
) -> Array:
    """y = x Wᵀ + b + (c - 1)·D(x) Wᵀ + c·s·(D(x) Aᵀ) Bᵀ, c = m / ‖W + s·B A‖."""
    c = _factor(magnitude, dora_norm(weight, lora_a, lora_b, scale))
    x, weight, lora_a, lora_b = (np.asarray(v, np.float64) for v in (x, weight, lora_a, lora_b))
    dropped = x * keep_mask(x.shape, p, seed) if p else x
    y = x @ weight.T + (c - 1) * (dropped @ weight.T)
    y = y + c * scale * ((dropped @ lora_a.T) @ lora_b.T)
    return y if bias is None else y + np.asarray(bias, np.float64)


def gradients(
    dy: Array,
    x: Array,
    weight: Array,
    lora_a: Array,
    lora_b: Array,
    magnitude: Array,
    scale: float = 1.0,
    p: float = 0.0,
    seed: int = 0,
) -> tuple[Array, Array, Array, Array]:
    """dx, dA, dB, dm with the norm a constant.

    z = D(x) Wᵀ + s·(D(x) Aᵀ) Bᵀ;  dz = c·dy;  dm = Σ dy·z / norm;  g = s·dz B;
    dA = gᵀ D(x),  dB = s·dzᵀ h,  dx = dy W + D'((dz - dy) W + g A).
    """
    norm = dora_norm(weight, lora_a, lora_b, scale)
    c = _factor(magnitude, norm)
    dy, x, weight, lora_a, lora_b = (
        np.asarray(v, np.float64) for v in (dy, x, weight, lora_a, lora_b)
    )
    mask = keep_mask(x.shape, p, seed) if p else 1.0
    dropped = x * mask
    h = dropped @ lora_a.T
    z = dropped @ weight.T + scale * h @ lora_b.T
    dz = c * dy
    g = scale * dz @ lora_b
    dx = dy @ weight + mask * ((dz - dy) @ weight + g @ lora_a)

    def flat(v: Array) -> Array:
        return v.reshape(-1, v.shape[-1])

    dm = _factor(flat(dy * z).sum(0), norm)
    return dx, flat(g).T @ flat(dropped), scale * flat(dz).T @ flat(h), dm


def merge_dora(
    weight: Array, lora_a: Array, lora_b: Array, magnitude: Array, scale: float = 1.0
) -> Array:
    """m·(W + s·B A) / ‖W + s·B A‖, rows."""
    total = merge_lora(weight, lora_a, lora_b, scale)
    return _factor(magnitude, np.linalg.norm(total, axis=1))[:, None] * total
