"""Below lora, dora and segmented: narrow products beside a base product, and what is checked."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .. import _C
from .._args.lora import check_dropout, dropout_numbers
from ._array import (
    DTYPES,
    FLOAT64,
    Array,
    accumulator,
    cast,
    contiguous,
    float_array,
    get_num_threads,
    integer,
    product_gradient,
    scalar,
)
from .codebook import CodebookArray, check_packed, packed_product

NO_DROPOUT = (None, 0, 1.0)


class Call(NamedTuple):
    """What low-rank functions have in common, checked."""

    x: Array  # (tokens, columns), contiguous
    weight: Array | CodebookArray
    lora_a: Array
    lora_b: Array
    bias: Array | None
    dropout: Any  # as kernels take it
    dy: Array | None  # (tokens, rows), contiguous; None: no gradients wanted
    leading: tuple[int, ...]


def call_of(
    x: Any, weight: Any, lora_a: Any, lora_b: Any, check_shapes: Any, bias: Any, dropout: Any, seed: Any,
    return_grad: bool, upstream: Any,
) -> Call:  # fmt: skip
    x, lora_a, lora_b = (
        float_array(name, value)
        for name, value in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b))
    )
    if isinstance(weight, CodebookArray):
        check_packed(weight)
    else:
        weight = float_array("weight", weight)
        if weight.dtype != x.dtype:
            raise TypeError(f"weight: dtype {weight.dtype}; x has {x.dtype}")
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        if value.dtype == FLOAT64 and x.dtype != FLOAT64:
            raise TypeError(f"{name}: dtype float64; x has {x.dtype}")
    check_shapes(weight.shape, lora_a.shape, lora_b.shape)
    rows, columns = weight.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x: shape {x.shape}; a weight of ({rows}, {columns}) takes (…, {columns})"
        )
    if bias is not None:
        bias = cast(float_array("bias", bias), x.dtype)
        if bias.shape != (rows,):
            raise ValueError(f"bias: shape {bias.shape}; allowed: ({rows},)")
    shape = (*x.shape[:-1], rows)
    upstream = product_gradient(upstream, shape, return_grad)
    p = scalar("dropout", dropout)
    check_dropout(p)
    drops: Any = NO_DROPOUT
    if p:
        if seed is None:
            raise ValueError("seed: None; with dropout the mask is a function of it, give an int")
        drops = (np.array([integer("seed", seed)], np.int64), *dropout_numbers(p))
    tokens = math.prod(x.shape[:-1])
    flat = contiguous(x.reshape(tokens, columns))
    dy = None
    if return_grad:
        dy = np.ones((tokens, rows), x.dtype)
        if upstream is not None:
            dy = contiguous(cast(upstream, x.dtype).reshape(tokens, rows))
    return Call(flat, weight, lora_a, lora_b, bias, drops, dy, x.shape[:-1])


def base_product(
    x: Array, weight: Array | CodebookArray, bias: Array | None, transposed: bool
) -> Array:
    """x Wᵀ + bias or, transposed, x W: in float32, float64 for float64; packed, in the type of x."""
    if isinstance(weight, CodebookArray):
        return packed_product(x, weight, bias, transposed)
    wide = accumulator(x.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        w = weight.astype(wide, copy=False)
        y = np.matmul(x.astype(wide, copy=False), w if transposed else w.T)
        return y if bias is None else y + bias.astype(wide, copy=False)


def factor_of(factor: Array) -> tuple[Array, int, int, int]:
    """(rank, columns), of strides that are whole elements."""
    size = factor.dtype.itemsize
    if not factor.flags.aligned or any(stride % size for stride in factor.strides):
        factor = contiguous(factor)
    return factor, DTYPES[factor.dtype], factor.strides[0] // size, factor.strides[1] // size


def shrink(
    x: Array,
    factor: Array | None,
    scale: float,
    g: Array | None = None,
    outer_scale: float = 1.0,
    dropout: Any = NO_DROPOUT,
) -> tuple[Any, Any]:
    """(scale·D(x)·factorᵀ, outer_scale·gᵀ·D(x)); without a factor or g, None."""
    tokens, columns = x.shape
    wide, h, outer = accumulator(x.dtype), None, None
    rank = len(factor) if factor is not None else g.shape[1] if g is not None else 0
    if factor is not None:
        h = np.empty((tokens, rank), wide)
    if g is not None:
        outer = np.empty((rank, columns), wide)
    _C.lora_shrink(
        x, DTYPES[x.dtype], tokens, columns, rank,
        *(factor_of(factor) if factor is not None else (None, 0, 0, 0)), h, scale, g, outer, outer_scale,
        *dropout, get_num_threads(),
    )  # fmt: skip
    return h, outer


def onto(
    y: Array,
    h: Array,
    factor: Array,
    scale: float,
    dtype: np.dtype[Any],
    dropout: Any = NO_DROPOUT,
) -> Array:
    """y + D(scale·h·factor), over the memory of y, as `dtype`."""
    y = contiguous(y)
    _C.lora_expand(
        h, *y.shape, h.shape[1], *factor_of(factor), scale, None, True, y, DTYPES[y.dtype], *dropout,
        get_num_threads(),
    )  # fmt: skip
    return cast(y, dtype)
