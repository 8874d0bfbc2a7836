"""Pruning of NumPy arrays by magnitude and by Wanda's score: exact counts, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _C
from .._args.prune import check_activation_norm, prune_groups, prune_scope
from .._codebooks import BITS
from ._array import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    Array,
    check_out,
    contiguous,
    float_array,
    get_num_threads,
    integer,
    scalar,
)
from .codebook import CodebookArray, dequantize


def _select(
    weight: Array, norm: Any, sparsity: Any, n: int, m: int, scope: int, mask: Array | None
) -> None:
    """Into `mask` or, without one, into the weight, which is contiguous."""
    if norm is not None:
        norm = float_array("activation_norm", norm)
        check_activation_norm(weight.shape, norm.shape)
        norm = contiguous(norm, FLOAT64 if weight.dtype == FLOAT64 else FLOAT32)
        if not (norm >= 0).all():
            raise ValueError("activation_norm: an element is negative or NaN; allowed: 0 and above")
        if mask is None and np.may_share_memory(norm, weight):
            norm = norm.copy()  # the weight is written meanwhile
    sparsity = 0.0 if sparsity is None else scalar("sparsity", sparsity)
    group, drop = prune_groups(weight.shape, weight.size, sparsity, n, m, scope)
    if weight.size:
        columns = weight.shape[-1] if weight.ndim else 1
        _C.prune(
            weight, DTYPES[weight.dtype], weight.size // columns, columns, scope, drop, group, norm,
            mask, mask is None, None, get_num_threads(),
        )  # fmt: skip


def _arguments(options: Any) -> tuple[Any, Any, int, int, int]:
    """(norm, sparsity, n, m, the scope's number) of what callers give."""
    sparsity, n, m, scope, method, norm = options
    n, m = (
        v if v is None or isinstance(v, bool) else integer(k, v) for k, v in (("n", n), ("m", m))
    )
    number, n, m = prune_scope(sparsity, n, m, scope, method, norm)
    return norm, sparsity, n, m, number


def prune_mask(
    weight: Array | CodebookArray,
    *,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    scope: str | None = None,
    method: str = "magnitude",
    activation_norm: Array | None = None,
) -> Array:
    """Which elements of a weight to keep: all but the smallest scores, counted exactly.

        score = |w|  ("magnitude")          score = |w|·‖x‖₂ of its column  ("wanda")

    Of each array or row floor(sparsity · count + 1e-9) elements go; with n and m all but n of every m
    neighbours in a row. Of equal scores the lower index goes first. NaN is the largest score; -0 is 0.

    Args:
        weight: (…, in), any strides; a float type, or a CodebookArray, which is decoded to float32. A row
            is the last dimension; a scalar is a row of one.
        sparsity: the share that goes, 0 to 1. Give it, or both n and m.
        n, m: n stay of every m, 0 ≤ n ≤ m; `in` is a multiple of m.
        scope: "tensor" or "row": among which elements a score is small. None: the method's own,
            "tensor" for "magnitude", "row" for "wanda". With n and m None.
        method: "magnitude" or "wanda".
        activation_norm: ‖x‖₂ (in,), the norm over tokens of each input feature; 0 and above. "wanda" needs
            it; the product is rounded once, to float32 (float64 for float64).

    Returns:
        bool, contiguous, in the shape of weight, True where an element is kept.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Wanda, arXiv:2306.11695; docs/prune.md.
    """
    if isinstance(weight, CodebookArray):
        weight = dequantize(weight, FLOAT32)
    weight = float_array("weight", weight)
    args = _arguments((sparsity, n, m, scope, method, activation_norm))
    mask = np.empty(weight.shape, np.bool_)
    _select(contiguous(weight), *args, mask)
    return mask


def prune_(
    weight: Any,
    *,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    scope: str | None = None,
    method: str = "magnitude",
    activation_norm: Array | None = None,
) -> Any:
    """Set to 0, in place, what `prune_mask` would not keep.

    Args:
        weight: as in `prune_mask`, writeable, an element in each place. Of a CodebookArray the codes become
            the code of 0: it decodes to 0 there and to what it was elsewhere; absmax stays.
        the others: as in `prune_mask`.

    Returns:
        The same array.

    Raises:
        TypeError, ValueError: naming the argument; a codebook without an exact 0. Nothing is written.
    """
    args = _arguments((sparsity, n, m, scope, method, activation_norm))
    if isinstance(weight, CodebookArray):
        zero = np.flatnonzero(weight.code == 0)
        if not zero.size:
            raise ValueError("weight: its codebook has no exact 0 to prune to")
        check_out("weight.codes", weight.codes)
        decoded = dequantize(weight, FLOAT32)
        mask = np.empty(decoded.shape, np.bool_)
        _select(decoded, *args, mask)
        codes = contiguous(weight.codes)
        if mask.size:
            bits = BITS[weight.code.size]
            _C.prune_codes(codes, mask.size, bits, int(zero[0]), mask, get_num_threads())
        if codes is not weight.codes:
            weight.codes[...] = codes
        return weight
    values = float_array("weight", weight)
    check_out("weight", weight)
    if values is weight and values.flags.carray:
        _select(values, *args, None)
    else:
        fresh = np.array(values, order="C")
        _select(fresh, *args, None)
        weight[...] = fresh
    return weight
