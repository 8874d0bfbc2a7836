"""Preference losses in float64: SPEC section 4, a line a loss, value and derivatives by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Values = tuple[Array, Array, Array]  # a value, its derivatives by w and by l

LENGTH_NORMALIZED = ("ipo", "sigmoid_norm", "simpo", "orpo")
NO_REFERENCE = ("sft", "cpo", "simpo", "slic", "orpo")
ONE_BY_ONE = ("kto", "apo_zero_unpaired")
SORTED = ("aot", "aot_unpaired")
CLAMP = 80.0  # of the exponents of f-divergences
CERTAIN = -(2.0**-53)  # what orpo's mean log-probability is at most


def log_sigmoid(x: Array) -> Array:
    return np.asarray(np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))))


def sigmoid(x: Array) -> Array:
    return np.exp(log_sigmoid(x))


def product(a: Array, b: Array) -> Array:
    """0 where a factor is 0, of infinities too."""
    with np.errstate(invalid="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, a * b)


def smoothed(x: Array, first: float, second: float) -> tuple[Array, Array]:
    """-first·L(x) - second·L(-x) and its derivative."""
    value = -first * log_sigmoid(x) - (second * log_sigmoid(-x) if second else 0)
    return value, -first * sigmoid(-x) + second * sigmoid(x)


def log_odds(a: Array) -> tuple[Array, Array]:
    x = np.minimum(a, CERTAIN)
    return x - np.log(-np.expm1(x)), np.where(a > CERTAIN, 0.0, -1 / np.expm1(x))


def score(r: Array, f_divergence: str, alpha: float) -> tuple[Array, Array]:
    """What stands for r in d, and its slope."""
    if f_divergence == "reverse_kl" or (f_divergence == "alpha" and alpha == 1):
        return r, np.ones_like(r)
    if f_divergence == "js":
        return np.log(2) + log_sigmoid(r), sigmoid(-r)
    rate = -1.0 if f_divergence == "forward_kl" else alpha - 1
    t = np.minimum(rate * r, CLAMP)
    return np.expm1(t) / rate, np.where(rate * r > CLAMP, 0.0, np.exp(t))


def pair_loss(
    loss: str, w: Array, l: Array, beta: float, eps: float, gamma: float = 0.5, delta: float = 0.0,
    tau: float = 0.05,
) -> Values:  # fmt: skip
    """Per pair, without the NLL; w and l are the log-ratios, or log-probabilities without a reference,
    divided by length where wanted."""
    x = beta * (w - l)
    if loss == "nca_pair":
        a, b = beta * w, beta * l
        value = -log_sigmoid(a) - 0.5 * log_sigmoid(-a) - 0.5 * log_sigmoid(-b)
        return value, beta * (-sigmoid(-a) + 0.5 * sigmoid(a)), beta * 0.5 * sigmoid(b)
    if loss == "bco_pair":
        a, b = beta * w - delta, beta * l - delta
        return -log_sigmoid(a) - log_sigmoid(-b), -beta * sigmoid(-a), beta * sigmoid(b)
    if loss == "sppo_hard":
        a, b = w - 1 / (2 * beta), l + 1 / (2 * beta)
        return a**2 + b**2, 2 * a, 2 * b
    if loss == "apo_zero":
        a, b = sigmoid(beta * w), sigmoid(beta * l)
        by_w, by_l = -beta * a * sigmoid(-beta * w), beta * b * sigmoid(-beta * l)
        return sigmoid(-beta * w) + b, by_w, by_l
    if loss == "apo_down":
        # S'(a) - S'(x), of which few digits would be left, as a product; a^2 - x^2 sets its sign
        a, by_d = beta * w, beta * sigmoid(x) * sigmoid(-x)
        near, far = np.minimum(np.abs(a), np.abs(x)), np.maximum(np.abs(a), np.abs(x))
        total, gap = beta * (2 * w - l), beta * l
        apart = np.expm1(-np.abs(total)) * np.expm1(-np.abs(gap)) * sigmoid(far) ** 2
        by_w = -np.sign(total) * np.sign(gap) * beta * sigmoid(near) * sigmoid(-near) * apart
        return sigmoid(a) + sigmoid(-x), by_w, by_d
    if loss == "orpo":
        (o_w, slope_w), (o_l, slope_l) = log_odds(w), log_odds(l)
        by_o = -beta * sigmoid(-(o_w - o_l))
        return -beta * log_sigmoid(o_w - o_l), product(by_o, slope_w), -product(by_o, slope_l)
    if loss == "slic":
        value = np.maximum(0, beta - (w - l))
        slope = np.where(beta - (w - l) > 0, -1 / beta, 0.0)
    elif loss in ("sigmoid", "spin", "aot", "aot_unpaired", "cpo"):
        value, slope = smoothed(x, 1 - eps, eps)
    elif loss == "simpo":
        value, slope = smoothed(x - gamma, 1 - eps, eps)
    elif loss == "robust":
        value, slope = smoothed(x, (1 - eps) / (1 - 2 * eps), -eps / (1 - 2 * eps))
    elif loss == "sigmoid_norm":
        value, slope = smoothed(x, 1.0, 0.0)
    elif loss == "ipo":
        value = (w - l - 1 / (2 * beta)) ** 2
        slope = 2 * (w - l - 1 / (2 * beta)) / beta
    elif loss == "hinge":
        value = np.maximum(0, 1 - x)
        slope = np.where(x < 1, -1.0, 0.0)
    elif loss == "exo_pair":
        p, q = sigmoid(x), sigmoid(-x)
        value = product(p, log_sigmoid(x) - np.log1p(-eps))
        value = value + product(q, log_sigmoid(-x) - np.log(eps))
        # a KL divergence: near its zero the two cancel, and this form of it keeps the digits
        apart = x - np.log1p(-eps) + np.log(eps)
        t, least = np.clip(np.where(x >= 0, -apart, apart), -1, 1), np.minimum(p, q)
        close = least * t + np.log1p(least * np.expm1(-t))
        value = np.where(np.abs(apart) < 1, close, value)
        slope = product(p * q, apart)
    elif loss == "discopop":
        m, rest = sigmoid(x / tau), sigmoid(-x / tau)
        power = product(np.minimum(x, 0), np.asarray(1 / tau - 1)) - np.maximum(x, 0)
        z = np.exp(power - np.log1p(np.exp(-np.abs(x / tau))))
        value = product(rest, -log_sigmoid(x)) + z
        slope = product(m * rest / tau, log_sigmoid(x)) - rest * sigmoid(-x)
        slope = slope + product(z, rest / tau - 1)
    elif loss == "reward":
        value, slope = smoothed((w - l), 1.0, 0.0)
        slope = slope / beta
    elif loss == "sft":
        value = slope = np.zeros_like(x)
    else:
        raise ValueError(loss)
    return value, beta * slope, -beta * slope


def pair_terms(
    loss: str, w: Array, l: Array, values: Values, beta: float, eps: float, gamma: float = 0.5,
    delta: float = 0.0, tau: float = 0.05,
) -> Values:  # fmt: skip
    """What pair_loss's values are made of: the sum of the absolute terms where these cancel at some x; else
    the absolute values. There x is a rounded number already, or eps, so that of a value near 0 no formula
    has all digits: its error is of the size of the terms' last ones."""
    value, by_w, by_l = map(np.abs, values)
    x = beta * (w - l) - (gamma if loss == "simpo" else 0.0)
    if loss in ("sigmoid", "spin", "aot", "aot_unpaired", "cpo", "simpo"):
        by_w = by_l = beta * ((1 - eps) * sigmoid(-x) + eps * sigmoid(x))
    elif loss == "robust":
        value, _ = smoothed(x, (1 - eps) / (1 - 2 * eps), eps / (1 - 2 * eps))
    elif loss == "nca_pair":
        by_w = beta * (sigmoid(-beta * w) + 0.5 * sigmoid(beta * w))
    elif loss == "exo_pair":
        keep, swap = np.log1p(-eps), np.log(eps)
        p, q = sigmoid(x), sigmoid(-x)
        near = np.abs(x - keep + swap) < 1
        value = np.where(near, np.minimum(p, q) * np.abs(x - keep + swap), value)
        by_w = by_l = beta * product(p * q, np.abs(x) - keep - swap)
    elif loss == "discopop":
        m, rest = sigmoid(x / tau), sigmoid(-x / tau)
        z = value - product(rest, -log_sigmoid(x))
        slope = rest * sigmoid(-x) - product(m * rest / tau, log_sigmoid(x))
        by_w = by_l = beta * (slope + np.abs(product(z, rest / tau - 1)))
    return value, by_w, by_l


def example_loss(
    loss: str, r: Array, beta: float, z: float, weight: float, desirable: bool
) -> tuple[Array, Array]:
    if loss == "apo_zero_unpaired":
        z, weight = 0.0, 1.0
    sign = -1.0 if desirable else 1.0
    x = beta * (r - z)
    return weight * sigmoid(sign * x), weight * sign * beta * sigmoid(x) * sigmoid(-x)


class Output(NamedTuple):
    loss: Array
    chosen_rewards: Array
    rejected_rewards: Array
    margins: Array
    accuracy: float
    d_chosen: Array
    d_rejected: Array
    d_ref_chosen: Array
    d_ref_rejected: Array
    d_nll: float
    """By chosen_nll."""
    terms: float
    """Σ of the absolute terms of the loss: the scale of its rounding errors."""
    loss_terms: Array
    """The same for each element of the loss ("none"; else terms), of d_chosen and of d_rejected."""
    d_chosen_terms: Array
    d_rejected_terms: Array


def preference_loss(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array | float = 0.0,
    ref_rejected: Array | float = 0.0,
    *,
    loss: str | Sequence[str] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Array | float = 1.0,
    rejected_lengths: Array | float = 1.0,
    normalize_lengths: bool | None = None,
    loss_weights: Sequence[float] | None = None,
    pair_weights: Array | None = None,
    gamma: float = 0.5,
    sft_weight: float = 0.0,
    chosen_nll: float | None = None,
    kl: Array | None = None,
    delta: float = 0.0,
    tau: float = 0.05,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    reduction: str = "mean",
    upstream: Array | None = None,
) -> Output:
    """The loss, its metrics and its gradients (for "none" of Σ upstream·loss)."""
    names = [loss] if isinstance(loss, str) else list(loss)
    factors = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    lp = [np.asarray(v, np.float64) for v in (chosen, rejected)]
    count = [len(v) for v in lp]
    ref, n = (
        [np.broadcast_to(np.asarray(v, np.float64), (c,)) for v, c in zip(pair, count, strict=True)]
        for pair in ((ref_chosen, ref_rejected), (chosen_lengths, rejected_lengths))
    )
    n = [np.where(v == 0, 1.0, v) for v in n]  # an empty completion counts as one token
    r = [a - b for a, b in zip(lp, ref, strict=True)]
    one_by_one = all(name in ONE_BY_ONE for name in names)
    size = sum(count) if one_by_one else count[0]
    weights = np.ones(size) if pair_weights is None else np.asarray(pair_weights, np.float64)
    g = np.ones(size) if upstream is None else np.asarray(upstream, np.float64)
    tokens = count[0] if normalize_lengths is False else n[0].sum()
    nll = chosen_nll if chosen_nll is not None else -lp[0].sum() / (tokens if count[0] else 1)
    z = 0.0 if kl is None or np.size(kl) == 0 else max(0.0, float(np.mean(kl)))
    out, total, terms, d_nll = np.zeros(size), 0.0, 0.0, 0.0
    out_terms = np.zeros(size)
    d, d_ref, d_terms = ([np.zeros(c) for c in count] for _ in range(3))
    for name, factor in zip(names, factors, strict=True):
        by_length = name in LENGTH_NORMALIZED if normalize_lengths is None else normalize_lengths
        m = n if by_length else [np.ones(c) for c in count]
        elements = sum(count) if name in ONE_BY_ONE else count[0]
        scale = factor / (max(elements, 1) if reduction == "mean" else 1)
        if name in ONE_BY_ONE:
            both = [
                example_loss(name, x / k, beta, z, u, desirable)
                for x, k, u, desirable in zip(
                    r, m, (desirable_weight, undesirable_weight), (True, False), strict=True
                )
            ]
            value = np.concatenate([v for v, _ in both])
            value_terms = np.abs(value)
            w = weights if one_by_one else np.ones(elements)
            g_w = scale * w * (g if one_by_one else np.ones(elements))
            for side, part in enumerate((slice(0, count[0]), slice(count[0], None))):
                slope = g_w[part] * both[side][1] / m[side]
                d[side] += slope
                d_terms[side] += np.abs(slope)
                d_ref[side] -= slope
        elif name in SORTED:
            w, g_w = weights, scale * weights * g
            if name == "aot":
                first, second = (v[0] / m[0] - v[1] / m[1] for v in (lp, ref))
            else:
                first, second = r[0] / m[0], r[1] / m[1]
            i, j = (np.argsort(v, kind="stable") for v in (first, second))
            values = pair_loss(name, first[i], second[j], beta, label_smoothing)
            value_terms, by_terms, _ = pair_terms(
                name, first[i], second[j], values, beta, label_smoothing
            )
            value, by_w, by_l = values
            slope_w, slope_l = np.zeros(count[0]), np.zeros(count[0])
            slope_w[i], slope_l[j] = g_w * by_w, g_w * by_l
            size_w, size_l = np.zeros(count[0]), np.zeros(count[0])
            size_w[i] = size_l[j] = np.abs(g_w) * by_terms
            if name == "aot":
                for side, sign in enumerate((1, -1)):
                    d[side] += sign * slope_w / m[side]
                    d_terms[side] += size_w / m[side]
                    d_ref[side] += sign * slope_l / m[side]
            else:
                for side, (slope, terms_of) in enumerate(((slope_w, size_w), (slope_l, size_l))):
                    d[side] += slope / m[side]
                    d_terms[side] += terms_of / m[side]
                    d_ref[side] -= slope / m[side]
        else:
            w, g_w = weights, scale * weights * g
            scores = [
                (x, np.ones_like(x)) if name in NO_REFERENCE else score(y, f_divergence, alpha)
                for x, y in zip(lp, r, strict=True)
            ]
            w_l = scores[0][0] / m[0], scores[1][0] / m[1]
            numbers = beta, label_smoothing, gamma, delta, tau
            value, *by = values = pair_loss(name, *w_l, *numbers)
            value_terms, *both_terms = pair_terms(name, *w_l, values, *numbers)
            for side in (0, 1):
                slope = g_w * by[side] * scores[side][1] / m[side]
                d[side] += slope
                d_terms[side] += np.abs(g_w * both_terms[side] * scores[side][1] / m[side])
                if name not in NO_REFERENCE:
                    d_ref[side] -= slope
            share = {"sft": 1.0, "orpo": 1.0}.get(name, sft_weight if name in NO_REFERENCE else 0)
            if share:
                value = value + share * nll
                value_terms = value_terms + abs(share * nll)
                d_nll += share * g_w.sum()
        total += scale * float((w * value).sum())
        terms += abs(scale) * float(np.abs(w * value_terms).sum())
        if reduction == "none":
            out += factor * w * value
            out_terms += np.abs(factor * w * value_terms)
    if chosen_nll is None and count[0] and d_nll:
        d[0] -= d_nll / tokens
        d_terms[0] += abs(d_nll / tokens)
    rewards = [beta * x for x in r]
    if count[0] == count[1]:
        margins, wins = rewards[0] - rewards[1], r[0] > r[1]
    else:
        means = [x.mean() if len(x) else 0.0 for x in rewards]
        margins, wins = np.asarray(means[0] - means[1]), np.concatenate([r[0] > 0, r[1] < 0])
    return Output(
        out if reduction == "none" else np.asarray(total),
        rewards[0],
        rewards[1],
        margins,
        float(np.mean(wins)) if len(wins) else 0.0,
        d[0],
        d[1],
        d_ref[0],
        d_ref[1],
        d_nll,
        terms,
        out_terms if reduction == "none" else np.asarray(terms),
        *d_terms,
    )


def reward_loss(
    chosen: Array, rejected: Array, margin: Array | float = 0.0, center_coef: float = 0.0,
    reduction: str = "mean", upstream: Array | None = None,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """(loss, its derivatives by chosen, by rejected, by margin)."""
    value, by_x, _ = pair_loss("reward", chosen - margin, rejected, 1.0, 0.0)
    total = chosen + rejected
    value = value + center_coef * total**2
    g = np.ones_like(value) if upstream is None else upstream
    g = g / max(len(value), 1) if reduction == "mean" else g
    loss = value if reduction == "none" else np.asarray((g * value).sum())
    center = 2 * center_coef * total
    return loss, g * (by_x + center), g * (center - by_x), -g * by_x
