"""Low-rank updates in float64, as SPEC section 2 writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox(counter: Array, seed: int) -> Array:
    """Four 32-bit words (…, 4) of each 64-bit counter, under a 64-bit key."""
    counter = np.asarray(counter, np.uint64)
    zero = np.zeros_like(counter)
    words = [counter & _LOW, counter >> np.uint64(32), zero, zero]
    return philox4x32(words, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)


def philox4x32(counter: list[Array], *key: int) -> Array:
    """Philox4x32-10 (Salmon et al., SC 2011): 32-bit words (…, 4) of four counter words, two of the key."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = (c[i] * np.uint64(m) for i, m in zip((0, 2), _MULTIPLIERS, strict=True))
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & _LOW,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & _LOW,
        ]
        k = [word + step & 0xFFFFFFFF for word, step in zip(k, _KEY_STEPS, strict=True)]
    return np.stack(c, -1).astype(np.uint32)


def keep_mask(shape: tuple[int, ...], p: float, seed: int) -> Array:
    """What dropout multiplies by: 1/(1 - p) where an element survives, else 0."""
    count = int(np.prod(shape))
    words = philox(np.arange((count + 3) // 4), seed).reshape(-1)[:count].reshape(shape)
    survives = words.astype(np.uint64) >= np.uint64(round(p * 2**32))
    return np.where(survives, 0.0 if p == 1 else 1 / (1 - p), 0.0)


def lora_linear(
    x: Array,
    weight: Array,
    lora_a: Array,
    lora_b: Array,
    scale: float = 1.0,
    bias: Array | None = None,
    p: float = 0.0,
    seed: int = 0,
) -> Array:
    """y = x Wᵀ + b + s·(D(x) Aᵀ) Bᵀ."""
    x, weight, lora_a, lora_b = (np.asarray(v, np.float64) for v in (x, weight, lora_a, lora_b))
    dropped = x * keep_mask(x.shape, p, seed) if p else x
    y = x @ weight.T + scale * (dropped @ lora_a.T) @ lora_b.T
    return y if bias is None else y + np.asarray(bias, np.float64)


def gradients(
    dy: Array,
    x: Array,
    weight: Array,
    lora_a: Array,
    lora_b: Array,
    scale: float = 1.0,
    p: float = 0.0,
    seed: int = 0,
) -> tuple[Array, Array, Array]:
    """dx, dA, dB: g = s·dy B;  dx = dy W + D'(g A),  dA = gᵀ D(x),  dB = s·dyᵀ h."""
    dy, x, weight, lora_a, lora_b = (
        np.asarray(v, np.float64) for v in (dy, x, weight, lora_a, lora_b)
    )
    mask = keep_mask(x.shape, p, seed) if p else 1.0
    rows, dropped = dy.reshape(-1, dy.shape[-1]), (x * mask).reshape(-1, x.shape[-1])
    g = scale * dy @ lora_b
    dx = dy @ weight + mask * (g @ lora_a)
    return (
        dx,
        g.reshape(-1, g.shape[-1]).T @ dropped,
        scale * rows.T @ (dropped @ lora_a.T),
    )


def merge_lora(weight: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    """W + s·B A."""
    weight, lora_a, lora_b = (np.asarray(v, np.float64) for v in (weight, lora_a, lora_b))
    return weight + scale * lora_b @ lora_a
