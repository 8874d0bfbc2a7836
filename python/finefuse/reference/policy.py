"""Policy-gradient losses, value loss and advantages in float64: SPEC section 5, a token at a time."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The surrogate, whose ratio, and how tokens add up.
LOSSES = {
    "reinforce": ("reinforce", "token", "tokens"),
    "rloo": ("clipped", "whole", "sequence_sums"),
    "ppo": ("clipped", "token", "tokens"),
    "grpo": ("clipped", "token", "sequences"),
    "bnpo": ("clipped", "token", "tokens"),
    "dr_grpo": ("clipped", "token", "max_length"),
    "dapo": ("clipped", "token", "num_tokens"),
    "luspo": ("clipped", "mean", "sequence_sums"),
    "gspo": ("clipped", "mean", "sequences"),
    "cispo": ("cispo", "token", "num_tokens"),
    "sapo": ("sapo", "token", "sequences"),
    "vespo": ("vespo", "sum", "num_tokens"),
}


def ratio(x: float) -> tuple[float, float]:
    """e^x and its derivative; clamped beyond ±60."""
    return math.exp(min(max(x, -60), 60)), (math.exp(x) if abs(x) <= 60 else 0.0)


def surrogate(
    kind: str, lp: float, x: float, A: float, low: float, high: float, dual_clip: float, delta: float,
    tau_pos: float, tau_neg: float,
) -> tuple[float, float, float]:  # fmt: skip
    """(value, derivative by the log-ratio x, derivative by lp)."""
    rho, slope = ratio(x)
    if kind == "clipped":
        inside = 1 - low <= rho <= 1 + high
        plain = min(rho, delta) * A
        clipped = min(max(rho, 1 - low), 1 + high) * A
        value = -min(plain, clipped)
        by_x = -A * slope * (float(rho <= delta) if plain <= clipped else float(inside))
        if A < 0 and value > -A * dual_clip:
            return -A * dual_clip, 0.0, 0.0
        return value, by_x, 0.0
    if kind == "reinforce":
        return -A * lp, 0.0, -A
    if kind == "cispo":
        return -min(rho, high) * A * lp, 0.0, -min(rho, high) * A
    if kind == "sapo":
        tau = tau_pos if A > 0 else tau_neg
        gate = 1 / (1 + math.exp(-tau * (rho - 1)))
        return -A * gate * 4 / tau, -A * 4 * gate * (1 - gate) * slope, 0.0
    assert kind == "vespo", kind
    k, lam = (2, 3) if A >= 0 else (3, 2)
    log_w = min(max(x, math.log(1e-8)), 20)
    phi = math.exp(lam + k * log_w - lam * math.exp(log_w))
    return -phi * A * lp, 0.0, -phi * A


def kl_term(kind: str, lp: float, ref: float) -> tuple[float, float]:
    """(value, derivative by lp)."""
    if kind == "k1":
        return lp - ref, 1.0
    if kind == "k2":
        return 0.5 * (lp - ref) ** 2, lp - ref
    d = min(ref - lp, 60)
    return math.expm1(d) - d, (-math.expm1(d) if ref - lp <= 60 else 0.0)


class Output(NamedTuple):
    loss: Array
    clip_fraction_low: float
    clip_fraction_high: float
    approx_kl: float
    gradient: Array
    terms: float
    """Σ of the absolute terms of the loss: the scale of its rounding errors."""


def sequences_of(shape: tuple[int, ...], cu_seqlens: Any) -> list[range]:
    if cu_seqlens is not None:
        return [range(a, b) for a, b in pairwise(map(int, cu_seqlens))]
    return [range(i * shape[-1], (i + 1) * shape[-1]) for i in range(math.prod(shape[:-1]))]


def policy_loss(
    logprobs: Array,
    advantages: Array,
    old_logprobs: Array | None = None,
    *,
    loss: str = "ppo",
    mask: Any = None,
    cu_seqlens: Any = None,
    weights: Array | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    delta: float | None = None,
    ref_logprobs: Array | None = None,
    kl_beta: float = 0.0,
    kl: str = "k3",
    kl_times_ratio: bool = False,
    importance: str | None = None,
    reduction: str | None = None,
    max_length: float | None = None,
    num_tokens: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    upstream: Array | None = None,
) -> Output:
    """The loss, its metrics and its gradient by logprobs (for "none" of Σ upstream·loss)."""
    kind, whose, how = LOSSES[loss]
    if importance is not None and whose in ("token", "mean"):
        whose = {"token": "token", "sequence": "mean"}[importance]
    if reduction is not None:
        how = {"mean": "tokens"}.get(
            reduction, LOSSES[reduction][2] if reduction in LOSSES else reduction
        )
    high = clip_high if clip_high is not None else (5.0 if kind == "cispo" else 0.2)
    numbers = (
        clip_low, high, math.inf if dual_clip is None else dual_clip,
        math.inf if delta is None else delta, tau_pos, tau_neg,
    )  # fmt: skip
    shape = np.shape(logprobs)
    flat = {
        name: None if v is None else np.asarray(v, np.float64).reshape(-1)
        for name, v in (
            ("lp", logprobs),
            ("old", old_logprobs),
            ("ref", ref_logprobs),
            ("w", weights),
        )
    }
    lp, old, ref, w = flat["lp"], flat["old"], flat["ref"], flat["w"]
    assert lp is not None
    live = np.ones(len(lp), bool) if mask is None else np.asarray(mask).reshape(-1) != 0
    sequences = sequences_of(shape, cu_seqlens)
    total, batch = max(int(live.sum()), 1), max(len(sequences), 1)
    if how == "max_length":
        divisor = float(batch * (shape[-1] if max_length is None else max_length))
    elif how == "num_tokens":
        divisor = float(total if num_tokens is None else num_tokens)
    values, gradient = np.zeros(len(lp)), np.zeros(len(lp))
    result, terms, metrics = 0.0, 0.0, np.zeros(3)
    for b, span in enumerate(sequences):
        kept = [t for t in span if live[t]]
        n = len(kept)
        xs = {t: 0.0 if old is None else lp[t] - old[t] for t in kept}
        own = dict(xs)
        if kind == "vespo":
            xs = {t: min(max(x, -20), 20) for t, x in xs.items()}
        if whose != "token" and n:
            x = sum(xs.values()) / (n if whose == "mean" else 1)
            xs = dict.fromkeys(kept, x)
        share = {
            "none": 1.0, "sum": 1.0, "tokens": 1 / total, "sequences": 1 / (max(n, 1) * batch),
            "sequence_sums": 1 / batch,
        }.get(how)  # fmt: skip
        if share is None:
            share = 1 / divisor if divisor else 0.0
        by_x = 0.0
        for t in kept:
            A = float(np.asarray(advantages).reshape(-1)[t if np.shape(advantages) == shape else b])
            value, d_x, d_lp = surrogate(kind, lp[t], xs[t], A, *numbers)
            factor = (1.0 if w is None else w[t]) / (n if whose == "whole" else 1)
            value, d_x, d_lp = factor * value, factor * d_x, factor * d_lp
            rho, slope = ratio(xs[t])
            if ref is not None:
                k, d_k = kl_term(kl, lp[t], ref[t])
                # the KL's ratio is a token's where that of the sequence is vespo's w
                by, by_slope = ratio(own[t]) if kind == "vespo" else (rho, slope)
                value += kl_beta * k * (by if kl_times_ratio else 1)
                d_lp += kl_beta * d_k * (by if kl_times_ratio else 1)
                if kl_times_ratio and kind == "vespo":
                    d_lp += kl_beta * k * by_slope
                elif kl_times_ratio:
                    d_x += kl_beta * k * by_slope
            g = share * (1.0 if upstream is None else np.asarray(upstream).reshape(-1)[t])
            values[t] = value
            result += share * value
            terms += share * abs(value)
            gradient[t] = g * (d_lp + (d_x if whose == "token" else 0))
            by_x += g * d_x
            each = 1 / total if whose == "token" else 1 / (n * batch)
            if kind == "clipped":
                metrics[0] += each * (A < 0 and rho < 1 - clip_low)
                metrics[1] += each * (A > 0 and rho > 1 + high)
            elif kind == "cispo":
                metrics[1] += each * (A > 0 and rho > high)
            if old is not None:
                metrics[2] += kl_term("k3", lp[t], old[t])[0] / total
        if whose != "token":
            for t in kept:
                gradient[t] += by_x / (n if whose == "mean" else 1)
    out = values.reshape(shape) if how == "none" else np.asarray(result)
    low, high_share, approx_kl = map(float, metrics)
    return Output(out, low, high_share, approx_kl, gradient.reshape(shape), terms)


def value_loss(
    values: Array, returns: Array, old_values: Array | None = None, clip: float | None = None,
    mask: Any = None,
) -> tuple[float, Array]:  # fmt: skip
    """(loss, gradient by values)."""
    live = np.ones(np.shape(values), bool) if mask is None else np.asarray(mask) != 0
    total = max(int(live.sum()), 1)
    gradient, loss = np.zeros(np.shape(values)), 0.0
    for at in zip(*np.nonzero(live), strict=True):
        v, r = float(values[at]), float(returns[at])
        used, slope = v - r, v - r
        if clip is not None:
            assert old_values is not None
            held = min(max(v, old_values[at] - clip), old_values[at] + clip)
            if not (held - r) ** 2 <= used**2:
                used, slope = held - r, (held - r if held == v else 0.0)
        loss += 0.5 * used**2 / total
        gradient[at] = slope / total
    return loss, gradient


def group_advantages(
    rewards: Array, group_size: int, scale: str = "group", baseline: str = "mean"
) -> Array:
    def deviation(r: Array) -> float:
        r = r[~np.isnan(r)]
        return float(np.std(r, ddof=1)) if len(r) > 1 else 0.0

    groups = np.asarray(rewards, np.float64).reshape(-1, group_size)
    out = np.zeros(groups.shape)
    for g, group in enumerate(groups):
        for i, r in enumerate(group):
            if np.isnan(r):
                continue
            others = np.delete(group, i) if baseline == "leave_one_out" else group
            others = others[~np.isnan(others)]
            out[g, i] = r - others.mean() if len(others) else 0.0
        if scale != "none":
            out[g] /= deviation(group if scale == "group" else groups.reshape(-1)) + 1e-4
    return out.reshape(np.shape(rewards))


def gae(
    rewards: Array, values: Array, gamma: float, lam: float, mask: Any = None
) -> tuple[Array, Array]:
    """(advantages, returns); a masked token is as if it were not there."""
    r = np.asarray(rewards, np.float64)
    v = np.asarray(values, np.float64)
    live = np.ones(r.shape, bool) if mask is None else np.asarray(mask) != 0
    advantages, returns = np.zeros(r.shape), np.zeros(r.shape)
    length = r.shape[-1]
    for row in np.ndindex(r.shape[:-1]):
        following = v[row][length] if v.shape[-1] > length else 0.0
        A = 0.0
        for t in np.nonzero(live[row])[0][::-1]:
            A = r[row][t] + gamma * following - v[row][t] + gamma * lam * A
            following = v[row][t]
            at = (*row, t)
            advantages[at], returns[at] = A, A + following
    return advantages, returns
