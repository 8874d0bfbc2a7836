"""The linear layer with a low-rank update (LoRA, QLoRA) on NumPy arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import _C
from .._args import check_dropout, check_lora_shapes, dropout_numbers
from ._array import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    Array,
    contiguous,
    float_array,
    get_num_threads,
    integer,
    scalar,
)
from .codebook import CodebookArray, packed_product

_NO_DROPOUT = (None, 0, 1.0)


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
        seed: of the mask: the same seed draws the same mask, that of finefuse.lora_linear too. None: from
            np.random's global generator.
        return_grad: also return the gradients of Σ dy·y.
        upstream: dy (…, out), None for ones.

    Returns:
        (…, out) in the type of x. With `return_grad` (that, dx, dA, dB), each of the type of what it is the
        gradient of.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    x, lora_a, lora_b = (
        float_array(name, value) for name, value in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b))
    )
    if not isinstance(weight, CodebookArray):
        weight = float_array("weight", weight)
        if weight.dtype != x.dtype:
            raise TypeError(f"weight: dtype {weight.dtype}; x has {x.dtype}")
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        if value.dtype == FLOAT64 and x.dtype != FLOAT64:
            raise TypeError(f"{name}: dtype float64; x has {x.dtype}")
    check_lora_shapes(weight.shape, lora_a.shape, lora_b.shape)
    rows, columns = weight.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x: shape {x.shape}; a weight of ({rows}, {columns}) takes (…, {columns})"
        )
    if bias is not None:
        bias = _cast(float_array("bias", bias), x.dtype)
        if bias.shape != (rows,):
            raise ValueError(f"bias: shape {bias.shape}; allowed: ({rows},)")
    shape = (*x.shape[:-1], rows)
    if upstream is not None:
        if not return_grad:
            raise ValueError("upstream: of use only with return_grad=True")
        upstream = float_array("upstream", upstream)
        if upstream.shape != shape:
            raise ValueError(f"upstream: shape {upstream.shape}; allowed: {shape}")
    scale, p = scalar("scale", scale), scalar("dropout", dropout)
    check_dropout(p)
    drops: Any = _NO_DROPOUT
    if p:
        drawn = np.random.randint(2**63 - 1) if seed is None else integer("seed", seed)
        drops = (np.array([drawn], np.int64), *dropout_numbers(p))
    tokens = math.prod(x.shape[:-1])
    flat = contiguous(x.reshape(tokens, columns))
    h, _ = _shrink(flat, lora_a, 1.0, dropout=drops)
    y = _onto(_base(flat, weight, bias, False), h, lora_b.T, scale, x.dtype).reshape(shape)
    if not return_grad:
        return y
    dy = np.ones((tokens, rows), x.dtype)
    if upstream is not None:
        dy = contiguous(_cast(upstream, x.dtype).reshape(tokens, rows))
    g, outer = _shrink(dy, lora_b.T, scale, h, scale)
    _, da = _shrink(flat, None, 1.0, g, dropout=drops)
    dx = _onto(_base(dy, weight, None, True), g, lora_a, 1.0, x.dtype, drops)
    return (
        y,
        dx.reshape(x.shape),
        _cast(da, lora_a.dtype),
        _cast(np.ascontiguousarray(outer.T), lora_b.dtype),
    )


def _cast(value: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return contiguous(value if value.dtype == dtype else value.astype(dtype))


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def _base(x: Array, weight: Array | CodebookArray, bias: Array | None, transposed: bool) -> Array:
    """x Wᵀ + bias or, transposed, x W: in float32, float64 for float64; packed, in the type of x."""
    if isinstance(weight, CodebookArray):
        return packed_product(x, weight, bias, transposed)
    wide = _wide(x.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        w = weight.astype(wide, copy=False)
        y = np.matmul(x.astype(wide, copy=False), w if transposed else w.T)
        return y if bias is None else y + bias.astype(wide, copy=False)


def _factor(factor: Array) -> tuple[Array, int, int, int]:
    """(rank, columns), of strides that are whole elements."""
    size = factor.dtype.itemsize
    if not factor.flags.aligned or any(stride % size for stride in factor.strides):
        factor = contiguous(factor)
    return factor, DTYPES[factor.dtype], factor.strides[0] // size, factor.strides[1] // size


def _shrink(
    x: Array,
    factor: Array | None,
    scale: float,
    g: Array | None = None,
    outer_scale: float = 1.0,
    dropout: Any = _NO_DROPOUT,
) -> tuple[Any, Any]:
    """(scale·D(x)·factorᵀ, outer_scale·gᵀ·D(x)); without a factor or g, None."""
    tokens, columns = x.shape
    wide, h, outer = _wide(x.dtype), None, None
    rank = len(factor) if factor is not None else g.shape[1] if g is not None else 0
    if factor is not None:
        h = np.empty((tokens, rank), wide)
    if g is not None:
        outer = np.empty((rank, columns), wide)
    _C.lora_shrink(
        x, DTYPES[x.dtype], tokens, columns, rank,
        *(_factor(factor) if factor is not None else (None, 0, 0, 0)), h, scale, g, outer, outer_scale,
        *dropout, get_num_threads(),
    )  # fmt: skip
    return h, outer


def _onto(
    y: Array, h: Array, factor: Array, scale: float, dtype: np.dtype[Any], dropout: Any = _NO_DROPOUT
) -> Array:
    """y + D(scale·h·factor), over the memory of y, as `dtype`."""
    y = contiguous(y)
    _C.lora_expand(
        h, *y.shape, h.shape[1], *_factor(factor), scale, None, True, y, DTYPES[y.dtype], *dropout,
        get_num_threads(),
    )  # fmt: skip
    return _cast(y, dtype)
