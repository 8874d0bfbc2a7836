"""Pruning by magnitude and by Wanda's score: which elements are kept."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


def scores(weight: Array, activation_norm: Array | None = None) -> Array:
    """|w|, or |w|·‖x‖₂ with one rounding: to float32, or to float64 for a float64 weight.

    Not in float64 throughout: the score's own rounding decides what is a tie.
    """
    wide = np.float64 if weight.dtype == np.float64 else np.float32
    magnitude = np.abs(weight.astype(wide))
    if activation_norm is None:
        return magnitude
    with np.errstate(invalid="ignore", over="ignore"):
        return magnitude * activation_norm.astype(wide)


def pruned_count(sparsity: float, count: int) -> int:
    return min(math.floor(sparsity * count + 1e-9), count)


def keep_largest(score: Array, pruned: int) -> NDArray[np.bool_]:
    """Of each row (…, count) all but the `pruned` smallest: NaN is the largest; of equals the first goes."""
    order = np.argsort(score, axis=-1, kind="stable")
    mask = np.ones(score.shape, bool)
    np.put_along_axis(mask, order[..., :pruned], False, -1)
    return mask


def prune_mask(
    weight: Array,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    scope: str = "tensor",
    activation_norm: Array | None = None,
) -> NDArray[np.bool_]:
    """True where an element is kept, in the shape of weight (…, in)."""
    score = scores(weight, activation_norm)
    if n is not None and m is not None:
        grouped = score.reshape(-1, m)
        pruned = m - n
    else:
        assert sparsity is not None
        columns = weight.shape[-1] if weight.ndim else 1
        grouped = (
            score.reshape(1, -1)
            if scope == "tensor" or columns == 0
            else score.reshape(-1, columns)
        )
        pruned = pruned_count(sparsity, grouped.shape[-1])
    return keep_largest(grouped, pruned).reshape(weight.shape)
