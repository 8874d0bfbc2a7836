"""Token log-probabilities, cross-entropy and sequence log-probabilities of NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _C
from .._args import REDUCTIONS, check_label_smoothing, check_temperature, choice, segments
from ._array import (
    ACCUMULATOR,
    FLOAT32,
    FLOAT64,
    Array,
    contiguous,
    float_array,
    get_num_threads,
    gradient_rows,
    index_array,
    integer,
    is_int32,
    logit_rows,
    mask_array,
    result,
    row_gradient,
    scalar,
)

_empty = np.empty


def token_logprobs(
    logits: Array,
    targets: Array,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: bool = False,
    return_grad: bool = False,
    upstream: Any = None,
    grad_out: Array | None = None,
) -> Any:
    """Log-probability of each target token, and on request the entropy and log-sum-exp of its row.

        lp = z[y]/T - lse,    lse = log Σ_v e^{z[v]/T},    H = lse - Σ_v p[v]·z[v]/T
        dz = (1/T)·[g·(1[y] - p) - h·p·(log p + H) + l·p]

    One pass over the logits for the values, one for the gradient.

    Args:
        logits: (…, V) float32, bfloat16, float16 or float64, any strides.
        targets: (…) integers in [0, V) or `ignore_index`, aligned with the logits.
        temperature: T > 0.
        ignore_index: rows with this target give exactly 0, with gradient 0, and are never read.
        stats: also return entropy and lse.
        return_grad: also return dz, the gradient of Σ g·lp, with `stats` of Σ (g·lp + h·H + l·lse).
        upstream: g (…), None for ones; with `stats` also a tuple of up to three of g, h, l, in which
            None stands for zeros.
        grad_out: (…, V), of the logits' dtype: where the gradient goes. `grad_out=logits` consumes them
            and spares fresh memory.

    Returns:
        lp, or (lp, entropy, lse) with `stats`: float32 (float64 for float64 logits), (…), in nats. With
        `return_grad` (that, dz), dz of the logits' dtype and shape.

    Raises:
        TypeError, ValueError: naming the argument; a target outside [0, V) included. Nothing is written.
    """
    rows, layout, y, int32 = logit_rows(logits, targets)
    if type(temperature) is not float or temperature != 1.0:
        temperature = scalar("temperature", temperature)
        check_temperature(temperature)
    if type(ignore_index) is not int or ignore_index != -100:
        ignore_index = integer("ignore_index", ignore_index)
    shape, dtype, threads = y.shape, ACCUMULATOR[layout[0]], get_num_threads()
    lp, entropy, lse, saved = _empty(shape, dtype), None, None, None
    if stats:
        entropy, lse = _empty(shape, dtype), _empty(shape, dtype)
    if return_grad:
        g, h, l = _upstream(upstream, stats, shape, dtype)
        saved = _empty((3 if stats else 2, *shape), FLOAT64)
    elif upstream is not None:
        raise ValueError("upstream: of use only with return_grad=True")
    gradient, out, out_layout = gradient_rows(logits, rows, layout, return_grad, grad_out)
    _C.token_logprobs(
        rows, layout, y, int32, ignore_index, temperature, lp, entropy, lse, saved, threads
    )
    if return_grad:
        _C.token_logprobs_backward(
            rows, layout, out, out_layout, y, int32, ignore_index, temperature, saved, g, h, l,
            threads,
        )  # fmt: skip
        if out is not gradient:
            gradient[...] = out
    value: Any
    if entropy is None or lse is None:
        value = lp if shape else lp[()]
    else:
        value = (lp, entropy, lse) if shape else (lp[()], entropy[()], lse[()])
    return (value, gradient) if return_grad else value


def _upstream(
    upstream: Any, stats: bool, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> list[Array | None]:
    """g, h, l."""
    if upstream is None:
        return [np.ones(shape, dtype), None, None]
    if not stats or not isinstance(upstream, tuple):
        return [row_gradient("upstream", upstream, shape, dtype), None, None]
    if len(upstream) > 3:
        raise ValueError(f"upstream: {len(upstream)} arrays; allowed: up to 3 (lp, entropy, lse)")
    given = [
        None if u is None else row_gradient(f"upstream[{i}]", u, shape, dtype)
        for i, u in enumerate(upstream)
    ]
    return given + [None] * (3 - len(given))


def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    """Cross-entropy of the targets under softmax(logits).

        loss = (1 - ε)·(lse - z[y]) + ε·(lse - mean_v z[v]),    lse = log Σ_v e^{z[v]}
        dz   = w·(p - (1 - ε)·1[y] - ε/V)

    The gradient is written row by row while the row is in the cache: one read and one write in all.

    Args:
        logits: (…, V) float32, bfloat16, float16 or float64, any strides.
        targets: (…) integers in [0, V) or `ignore_index`.
        reduction: "mean" (over the rows not ignored; 0 with zero gradient if there are none), "sum" or
            "none" (0 where ignored).
        label_smoothing: ε in [0, 1].
        ignore_index: rows with this target are never read.
        return_grad: also return dz, the gradient of the loss, for "none" of its sum.
        grad_out: where the gradient goes, as in `token_logprobs`; may be the logits.

    Returns:
        The loss, or (loss, dz): the loss float32 (float64 for float64 logits), in nats; dz of the logits'
        dtype and shape.

    Raises:
        TypeError, ValueError: naming the argument; a target outside [0, V) included. Nothing is written.
    """
    rows, layout, y, int32 = logit_rows(logits, targets)
    code = choice("reduction", reduction, REDUCTIONS)
    if type(label_smoothing) is not float or label_smoothing != 0.0:
        label_smoothing = scalar("label_smoothing", label_smoothing)
        check_label_smoothing(label_smoothing)
    if type(ignore_index) is not int or ignore_index != -100:
        ignore_index = integer("ignore_index", ignore_index)
    gradient, out, out_layout = gradient_rows(logits, rows, layout, return_grad, grad_out)
    loss = _empty(() if code else y.shape, ACCUMULATOR[layout[0]])
    scratch = _empty(layout[1] + 1, FLOAT64) if code else None
    _C.cross_entropy(
        rows, layout, out, out_layout, y, int32, ignore_index, label_smoothing, code, loss, scratch,
        None, get_num_threads(),
    )  # fmt: skip
    if gradient is None:
        return result(loss)
    if out is not gradient:
        gradient[...] = out
    return result(loss), gradient


def sequence_logprobs(
    token_lp: Array,
    *,
    mask: Array | None = None,
    cu_seqlens: Array | None = None,
    average: bool = False,
    return_grad: bool = False,
) -> Any:
    """Log-probability of each sequence: the sum (or mean) of its tokens' log-probabilities.

        s = Σ_t m_t·lp_t,    with average s = Σ_t m_t·lp_t / Σ_t m_t  (0 for an empty sequence)

    Summed in float64, in order; tokens that are masked out are not read.

    Args:
        token_lp: (…, T) with an optional `mask`, or flat (tokens,) with `cu_seqlens`; 16-bit types are
            widened to float32.
        mask: (…, T), bool or a number that is not 0 where a token counts. None: all count.
        cu_seqlens: (sequences + 1,) integers, rising from 0 to the number of tokens: sequence i is tokens
            [cu_seqlens[i], cu_seqlens[i + 1]). `mask` and `cu_seqlens` exclude each other.
        average: divide by the number of tokens that count.
        return_grad: also return the gradient of Σ s by token_lp.

    Returns:
        s (…) or (sequences,), or (s, gradient), the gradient in the shape of token_lp: float32 (float64
        for float64 input), in nats.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is written.
    """
    token_lp = float_array("token_lp", token_lp)
    dtype = FLOAT64 if token_lp.dtype == FLOAT64 else FLOAT32
    if mask is not None and cu_seqlens is not None:
        raise ValueError("mask and cu_seqlens: give one of the two")
    int32 = False
    mask = mask_array(mask, token_lp.shape)
    if cu_seqlens is not None:
        cu_seqlens = index_array("cu_seqlens", cu_seqlens)
        int32 = is_int32(cu_seqlens)
    shape, length = segments(
        token_lp.shape,
        None if mask is None else mask.shape,
        None if cu_seqlens is None else cu_seqlens.shape,
    )
    sums = _empty(shape, dtype)
    arguments = (
        dtype is FLOAT64, mask, cu_seqlens, int32, sums.size, length, token_lp.size, average,
    )  # fmt: skip
    _C.sequence_sums(contiguous(token_lp, dtype), *arguments, sums, get_num_threads())
    if not return_grad:
        return result(sums)
    gradient = _empty(token_lp.shape, dtype)
    ones = np.ones(shape, dtype)
    _C.sequence_sums_backward(ones, *arguments, gradient, get_num_threads())
    return result(sums), gradient
