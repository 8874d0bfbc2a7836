"""Token log-probabilities and cross-entropy in float64: SPEC section 3, term by term."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_softmax(z: Array) -> Array:
    """z - lse(z) of one row; a row that is all -inf gives NaN.

    The maximum's own term, 1, is kept out of the sum (log1p), or an entropy of 1e-17 would be lost.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        top = int(np.argmax(z))  # NaN counts as the largest
        d = z - z[top]
        return np.asarray(d - np.log1p(np.exp(np.delete(d, top)).sum()))


def token_logprobs(
    logits: Array, targets: NDArray[np.int64], temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Array, Array, Array]:
    """(lp, entropy, lse) for logits (N, V) and targets (N,); 0 where ignored."""
    lp, entropy, lse = (np.zeros(len(targets)) for _ in range(3))
    for i, y in enumerate(targets):
        if y == ignore_index:
            continue
        z = np.asarray(logits[i], np.float64) / temperature
        logp = log_softmax(z)
        p = np.exp(logp)
        lp[i] = logp[y]
        entropy[i] = -np.sum(p[p > 0] * logp[p > 0]) if not np.isnan(logp).any() else np.nan
        lse[i] = z.max() - logp.max() if np.isfinite(z.max()) else z.max()
    return lp, entropy, lse


def token_logprobs_gradient(
    logits: Array,
    targets: NDArray[np.int64],
    g: Array,
    h: Array | None = None,
    l: Array | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Array:
    """dz = (1/T)·[g·(1[y] - p) - h·p·(log p + H) + l·p], upstream g, h, l of lp, entropy, lse."""
    dz = np.zeros(np.shape(logits))
    _, entropy, _ = token_logprobs(logits, targets, temperature, ignore_index)
    for i, y in enumerate(targets):
        if y == ignore_index:
            continue
        logp = log_softmax(np.asarray(logits[i], np.float64) / temperature)
        p = np.exp(logp)
        plogp = np.where(p > 0, p * (np.where(p > 0, logp, 0) + entropy[i]), 0)
        dz[i] = -g[i] * p
        dz[i, y] += g[i]
        if h is not None:
            dz[i] -= h[i] * plogp
        if l is not None:
            dz[i] += l[i] * p
    return dz / temperature


def cross_entropy(
    logits: Array,
    targets: NDArray[np.int64],
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """(loss, gradient of the reduced loss; of the sum of losses for "none")."""
    rows, gradient = np.zeros(len(targets)), np.zeros(np.shape(logits))
    eps, vocab = label_smoothing, np.shape(logits)[-1]
    for i, y in enumerate(targets):
        if y == ignore_index:
            continue
        logp = log_softmax(np.asarray(logits[i], np.float64))
        rows[i] = -(1 - eps) * logp[y] - (eps * logp.mean() if eps else 0)
        gradient[i] = np.exp(logp) - eps / vocab
        gradient[i, y] -= 1 - eps
    if reduction == "none":
        return rows, gradient
    count = np.sum(targets != ignore_index) if reduction == "mean" else 1
    return rows.sum() / max(count, 1), gradient / max(count, 1)


def sequence_logprobs(
    token_lp: Array,
    mask: NDArray[np.bool_] | None = None,
    cu_seqlens: NDArray[np.int64] | None = None,
    average: bool = False,
) -> Array:
    """Sum or mean of each sequence's tokens that count."""
    if cu_seqlens is not None:
        parts = [token_lp[a:b] for a, b in pairwise(cu_seqlens)]
    else:
        flat = token_lp.reshape(-1, token_lp.shape[-1])
        keep = np.ones(flat.shape, bool) if mask is None else mask.reshape(flat.shape)
        parts = [row[k] for row, k in zip(flat, keep, strict=True)]
    sums = np.array([p.sum() / max(len(p), 1) if average else p.sum() for p in parts])
    return sums if cu_seqlens is not None else sums.reshape(token_lp.shape[:-1])
