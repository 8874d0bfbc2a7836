"""The linear layer with a low-rank update (LoRA, QLoRA, DoRA) on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._args.lora import check_lora_shapes
from ._array import Array, scalar
from ._low_rank import base_product, call_of, cast, onto, shrink
from .codebook import CodebookArray
from .dora import dora_linear


def lora_linear(
    x: Array,
    weight: Array | CodebookArray,
    lora_a: Array,
    lora_b: Array,
    *,
    scale: float = 1.0,
    bias: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    magnitude: Array | None = None,
    return_grad: bool = False,
    upstream: Array | None = None,
) -> Any:
    """A linear layer with a low-rank update (LoRA, arXiv:2106.09685; on packed weights QLoRA, 2305.14314).

        y = x Wᵀ + bias + s·h Bᵀ        h = D(x) Aᵀ        g = s·dy B
        dx = dy W + D'(g A)             dA = gᵀ D(x)       dB = s·dyᵀ h

    D is dropout: elements vanish with probability p, the others are divided by 1 - p. BA is never formed. The
    base product is NumPy's, with its threads and its last bit; 16-bit arrays are multiplied as float32.

    Args:
        x: (…, in) float32, bfloat16, float16 or float64, any strides.
        weight: W (out, in), an array of the type of x or a CodebookArray.
        lora_a: A (r, in), r ≥ 1; any strides and float type (float64 only if x is).
        lora_b: B (out, r), likewise.
        scale: s.
        bias: (out,); another type than that of x is cast to it.
        dropout: p in [0, 1]; 1 leaves the base product alone.
        seed: of the mask, needed with dropout: the same seed draws the same mask, that of
            finefuse.lora_linear too.
        magnitude: m (out,), of any float type: DoRA, as in `finefuse.lora_linear`.
        return_grad: also return the gradients of Σ dy·y.
        upstream: dy (…, out), None for ones.

    Returns:
        (…, out) in the type of x. With `return_grad` (that, dx, dA, dB and, with a magnitude, dm), each of
        the type of what it is the gradient of.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    call = call_of(
        x, weight, lora_a, lora_b, check_lora_shapes, bias, dropout, seed, return_grad, upstream
    )
    scale = scalar("scale", scale)
    if magnitude is not None:
        return dora_linear(call, magnitude, scale)
    x, weight, lora_a, lora_b, bias, drops, dy, leading = call
    h, _ = shrink(x, lora_a, 1.0, dropout=drops)
    y = onto(base_product(x, weight, bias, False), h, lora_b.T, scale, x.dtype)
    y = y.reshape(*leading, len(lora_b))
    if dy is None:
        return y
    g, outer = shrink(dy, lora_b.T, scale, h, scale)
    _, da = shrink(x, None, 1.0, g, dropout=drops)
    dx = onto(base_product(dy, weight, None, True), g, lora_a, 1.0, x.dtype, drops)
    return (
        y,
        dx.reshape(*leading, x.shape[1]),
        cast(da, lora_a.dtype),
        cast(np.ascontiguousarray(outer.T), lora_b.dtype),
    )
