"""Weight-decomposed updates (DoRA) on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _C
from .._args.lora import check_lora_shapes
from ._array import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    Array,
    contiguous,
    float_array,
    get_num_threads,
    scalar,
)
from ._low_rank import Call, accumulator, base_product, cast, factor_of, onto, shrink
from .codebook import CodebookArray, dequantize


def dora_norm(
    weight: Array | CodebookArray, lora_a: Array, lora_b: Array, scale: float = 1.0
) -> Array:
    """The norms of the rows of an adapted weight, which DoRA divides by (arXiv:2402.09353, equation 5).

        norm_j = ‖W_j + s·(B A)_j‖₂

    Args:
        weight: W (out, in), an array of any float type or a CodebookArray.
        lora_a, lora_b: A (r, in) and B (out, r), of any float type (float64 only if W is, or packed).
        scale: s.

    Returns:
        (out,) float32, or float64 for a float64 weight and for float64 factors of a packed one.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(weight, CodebookArray):
        weight = float_array("weight", weight)
    lora_a, lora_b = float_array("lora_a", lora_a), float_array("lora_b", lora_b)
    check_lora_shapes(weight.shape, lora_a.shape, lora_b.shape)
    scale, factors = scalar("scale", scale), (lora_a.dtype, lora_b.dtype)
    if isinstance(weight, CodebookArray):
        return _norm(weight, lora_a, lora_b, scale, FLOAT64 if FLOAT64 in factors else FLOAT32)
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        if value.dtype == FLOAT64 and weight.dtype != FLOAT64:
            raise TypeError(f"{name}: dtype float64; the weight has {weight.dtype}")
    return _norm(weight, lora_a, lora_b, scale, accumulator(weight.dtype))


def _norm(
    weight: Array | CodebookArray, lora_a: Array, lora_b: Array, scale: float, wide: Any
) -> Array:
    """In the type `wide`, to which a packed weight is decoded."""
    if isinstance(weight, CodebookArray):
        plain = cast(dequantize(weight, FLOAT32), wide)
    else:
        plain = contiguous(weight)
    norm = np.empty(len(plain), wide)
    _C.dora_norm(
        plain, DTYPES[plain.dtype], *plain.shape, len(lora_a), *factor_of(lora_b.T), *factor_of(lora_a),
        scale, norm, get_num_threads(),
    )  # fmt: skip
    return norm


def _quotient(a: Array, b: Array) -> Array:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=b != 0)


def dora_linear(call: Call, magnitude: Any, scale: float) -> Any:
    """What `lora_linear` is with a magnitude."""
    x, weight, lora_a, lora_b, bias, dropout, dy, leading = call
    magnitude = float_array("magnitude", magnitude)
    if magnitude.shape != lora_b.shape[:1]:
        raise ValueError(f"magnitude: shape {magnitude.shape}; allowed: ({len(lora_b)},)")
    wide = accumulator(x.dtype)
    norm = _norm(weight, lora_a, lora_b, scale, wide)
    factor = _quotient(cast(magnitude, wide), norm)
    drops = dropout[0] is not None
    dropped = _drop(x, dropout, np.empty_like(x), False) if drops else x
    h, _ = shrink(dropped, lora_a, 1.0)
    z = onto(base_product(dropped, weight, None, False), h, lora_b.T, scale, x.dtype)
    y = np.empty_like(z)
    if drops:
        y = cast(base_product(_minus(x, dropped), weight, None, False), x.dtype)
    _C.dora_scale(z, DTYPES[z.dtype], *z.shape, factor, bias, drops, y, get_num_threads())
    y = y.reshape(*leading, len(lora_b))
    if dy is None:
        return y
    dz, total = np.empty_like(dy), np.empty_like(norm)
    _C.dora_scale_backward(dy, z, DTYPES[dy.dtype], *dy.shape, factor, dz, total, get_num_threads())
    g, outer = shrink(dz, lora_b.T, scale, h, scale)
    _, da = shrink(x, None, 1.0, g, dropout=dropout)
    dx = onto(base_product(dz, weight, None, True), g, lora_a, 1.0, x.dtype)
    if drops:
        plain = cast(base_product(dy, weight, None, True), x.dtype)
        dx = _drop(_minus(dx, plain), dropout, plain, True)
    return (
        y,
        dx.reshape(*leading, x.shape[1]),
        cast(da, lora_a.dtype),
        cast(np.ascontiguousarray(outer.T), lora_b.dtype),
        cast(_quotient(total, norm), magnitude.dtype),
    )


def _minus(a: Array, b: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return a - b


def _drop(x: Array, dropout: Any, y: Array, accumulate: bool) -> Array:
    """D(x), or y + D(x), in y."""
    _C.lora_dropout(x, DTYPES[x.dtype], x.size, accumulate, y, *dropout, get_num_threads())
    return y
