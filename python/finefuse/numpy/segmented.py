"""Low-rank updates of many adapters in one batch, on NumPy arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import _C
from .._args.lora import check_segmented_shapes
from ._array import (
    DTYPES,
    Array,
    contiguous,
    float_array,
    get_num_threads,
    index_array,
    is_int32,
    scalar,
)
from ._low_rank import NO_DROPOUT, accumulator, base_product, call_of, cast
from .codebook import CodebookArray


def lora_linear_segmented(
    x: Array,
    weight: Array | CodebookArray,
    lora_a: Array,
    lora_b: Array,
    adapter: Array,
    *,
    scale: float | Array = 1.0,
    bias: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_grad: bool = False,
    upstream: Array | None = None,
) -> Any:
    """A linear layer where each row of a batch has a low-rank update of its own choice, or none.

        y_t = x_t Wᵀ + bias + s_a·(D(x_t) A_aᵀ) B_aᵀ        a = adapter_t; -1: no update

    Args:
        x: (…, in) float32, bfloat16, float16 or float64, any strides.
        weight: W (out, in), an array of the type of x or a CodebookArray.
        lora_a, lora_b: A (adapters, r, in), B (adapters, out, r), of any float type (float64 only if x is).
        adapter: integers in [-1, adapters): one for each row, of the shape of x but for `in` or flat, or
            one for each entry of x's leading dimensions, which its rows share.
        scale: s, a number or (adapters,) of them.
        bias, dropout, seed, return_grad, upstream: as for `lora_linear`.

    Returns:
        (…, out) in the type of x. With `return_grad` (that, dx, dA, dB).

    Raises:
        TypeError, ValueError: naming the argument; an id out of range before anything is read.
    """
    call = call_of(
        x,
        weight,
        lora_a,
        lora_b,
        check_segmented_shapes,
        bias,
        dropout,
        seed,
        return_grad,
        upstream,
    )
    x, weight, lora_a, lora_b, bias, drops, dy, leading = call
    tokens, adapters, wide = len(x), len(lora_a), accumulator(x.dtype)
    if isinstance(scale, (list, tuple)):
        scale = np.asarray([scalar("scale", one) for one in scale], wide)
    elif not isinstance(scale, np.ndarray):
        scale = np.asarray(scalar("scale", scale), wide)
    scale = float_array("scale", scale)
    if scale.shape not in ((), (adapters,)):
        raise ValueError(f"scale: shape {scale.shape}; allowed: a number, ({adapters},)")
    scale = np.full(adapters, scale, wide)
    ids = _row_adapters(adapter, leading)
    order, begins = np.empty(tokens, np.int64), np.empty(adapters + 1, np.int64)
    _C.segment_rows(ids, is_int32(ids), tokens, adapters, order, begins)
    segments = order, begins, adapters
    h = np.empty((tokens, lora_a.shape[1]), wide)
    _shrink(x, segments, lora_a, h, None, None, None, None, False, drops)
    y = _expand(base_product(x, weight, bias, False), segments, h, lora_b.transpose(0, 2, 1), scale)
    y = cast(y, x.dtype).reshape(*leading, lora_b.shape[1])
    if dy is None:
        return y
    g, db = np.empty_like(h), np.empty(lora_b.shape, wide)
    _shrink(dy, segments, lora_b.transpose(0, 2, 1), g, scale, h, db, scale, True)
    da = np.empty(lora_a.shape, wide)
    _shrink(x, segments, None, None, None, g, da, None, False, drops)
    dx = _expand(base_product(dy, weight, None, True), segments, g, lora_a, None, drops)
    dx = cast(dx, x.dtype).reshape(*leading, x.shape[1])
    return y, dx, cast(da, lora_a.dtype), cast(db, lora_b.dtype)


def _row_adapters(adapter: Any, leading: tuple[int, ...]) -> Array:
    """One for each row, flat."""
    ids = index_array("adapter", adapter)
    tokens = math.prod(leading)
    if ids.shape in (leading, (tokens,)):
        return contiguous(ids.reshape(tokens))
    if ids.ndim == 0 or ids.shape != leading[: ids.ndim]:
        raise ValueError(
            f"adapter: shape {ids.shape}; allowed: {leading}, ({tokens},), or the first of these dimensions"
        )
    rest = (1,) * (len(leading) - ids.ndim)
    return contiguous(np.broadcast_to(ids.reshape(ids.shape + rest), leading).reshape(tokens))


def _factor(factor: Array | None) -> tuple[Any, ...]:
    """(adapters, rank, columns), of strides that are whole elements."""
    if factor is None:
        return None, 0, 0, 0, 0
    size = factor.dtype.itemsize
    if not factor.flags.aligned or any(stride % size for stride in factor.strides):
        factor = contiguous(factor)
    return factor, DTYPES[factor.dtype], *(stride // size for stride in factor.strides)


def _shrink(
    x: Array, segments: Any, factor: Any, h: Any, h_scale: Any, g: Any, outer: Any, outer_scale: Any,
    turned: bool, dropout: Any = NO_DROPOUT,
) -> None:  # fmt: skip
    rank = (g if h is None else h).shape[1]
    _C.segmented_shrink(
        x, DTYPES[x.dtype], *x.shape, rank, *segments, *_factor(factor), h, h_scale, g, outer, outer_scale,
        turned, *dropout, get_num_threads(),
    )  # fmt: skip


def _expand(
    y: Array, segments: Any, h: Array, factor: Array, scale: Any, dropout: Any = NO_DROPOUT
) -> Array:
    y = contiguous(y)
    _C.segmented_expand(
        h, *y.shape, h.shape[1], *segments, *_factor(factor), scale, y, DTYPES[y.dtype], *dropout,
        get_num_threads(),
    )  # fmt: skip
    return y
