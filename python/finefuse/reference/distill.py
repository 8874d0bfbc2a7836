"""Distillation from logits in float64: SPEC section 6, term by term."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .logprobs import log_softmax

Array = NDArray[np.float64]


def _times(x: Array, y: Array) -> Array:
    """x·y where x is not 0, else 0: 0·log 0 is 0."""
    return np.where(x == 0, 0.0, x * np.where(x == 0, 0.0, y))


def divergence(kind: str, log_p: Array, log_q: Array, beta: float) -> tuple[float, Array]:
    """(D, p·∂D/∂p) of the student's log p and the teacher's log q.

    forward_kl   Σ q·(log q - log p)                  -q
    reverse_kl   Σ p·(log p - log q)                  p·(log p - log q + 1)
    jsd          β·KL(q‖m) + (1-β)·KL(p‖m)            (1-β)·p·log(p/m)
    """
    p, q = np.exp(log_p), np.exp(log_q)
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse_kl" if beta else "forward_kl"
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if kind == "forward_kl":
            return float(_times(q, log_q - log_p).sum()), -q
        if kind == "reverse_kl":
            terms = _times(p, log_p - log_q)
            return float(terms.sum()), terms + p
        log_m = np.logaddexp(log_q + np.log(beta), log_p + np.log1p(-beta))
        apart = log_q - log_p  # of equal distributions m is p, to the last digit
        near = log_p + np.log1p(beta * np.expm1(np.where(np.abs(apart) < 1, apart, 0.0)))
        log_m = np.where(np.abs(apart) < 1, near, log_m)
        terms = _times(p, log_p - log_m)
        value = beta * _times(q, log_q - log_m).sum() + (1 - beta) * terms.sum()
        return float(value), (1 - beta) * terms


def _row(
    z: Array, teacher: Array, indices: Any, kind: str, beta: float, temperature: float
) -> tuple[float, Array]:
    """(D, dD/dz) of one row."""
    log_p = log_softmax(z / temperature)
    p = np.exp(log_p)
    if indices is None:
        value, weighted = divergence(kind, log_p, log_softmax(teacher / temperature), beta)
        gradient = weighted - weighted.sum() * p
    else:  # the rest is one bucket; it does not exist where the teacher names every column
        rest = np.ones(len(z), bool)
        rest[indices] = False
        below = max(0.0, 1 - np.exp(teacher).sum())
        with np.errstate(divide="ignore"):
            log_p_rest = np.logaddexp.reduce(log_p[rest], initial=-np.inf)
            log_buckets = np.append(log_p[indices], log_p_rest)
            log_q = np.append(teacher, np.log(below))
        keep = slice(None) if rest.any() else slice(-1)
        value, weighted = divergence(kind, log_buckets[keep], log_q[keep], beta)
        gradient = -weighted.sum() * p
        gradient[indices] += weighted[: len(indices)]
        if rest.any() and log_p_rest > -np.inf:  # p_j·G = (p_j/p_rest)·(p_rest·G)
            gradient[rest] += weighted[-1] * np.exp(log_p[rest] - log_p_rest)
    if not np.isfinite(value) and not (kind == "forward_kl" or (kind == "jsd" and beta == 0)):
        gradient[:] = np.nan
    if np.isnan(value):
        gradient[:] = np.nan
    return value, gradient / temperature


def distill_loss(
    student: Array,
    teacher: Array,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: NDArray[np.bool_] | None = None,
    alpha: float = 1.0,
    targets: NDArray[np.int64] | None = None,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    teacher_indices: NDArray[np.int64] | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> tuple[Any, Array]:
    """(loss, gradient of the reduced loss; of the sum of losses for "none") of student (N, V)."""
    count, width = np.shape(student)
    vocab = width if vocab_size is None else vocab_size
    losses, gradient = np.zeros(count), np.zeros((count, width))
    keep = np.ones(count, bool) if mask is None else np.array(mask, bool)
    if targets is not None:
        keep &= targets != ignore_index
    factor = alpha * (temperature**2 if temperature_squared else 1.0)
    for i in np.flatnonzero(keep):
        z = np.asarray(student[i, :vocab], np.float64)
        if teacher_indices is None:
            row, indices = np.asarray(teacher[i, :vocab], np.float64), None
        else:
            row, indices = np.asarray(teacher[i], np.float64), teacher_indices[i]
        if alpha > 0:
            with np.errstate(invalid="ignore"):  # inf·0, of a gradient that is NaN
                value, dz = _row(z, row, indices, kind, beta, temperature)
            losses[i] = factor * value
            gradient[i, :vocab] = factor * dz
        if alpha < 1:
            assert targets is not None
            logp = log_softmax(z)
            losses[i] -= (1 - alpha) * logp[targets[i]]
            gradient[i, :vocab] += (1 - alpha) * np.exp(logp)
            gradient[i, targets[i]] -= 1 - alpha
    if reduction == "none":
        return losses, gradient
    share = max(int(keep.sum()), 1) if reduction == "mean" else 1
    return losses.sum() / share, gradient / share
