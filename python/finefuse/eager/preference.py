"""Preference losses as plain torch operations; SPEC section 4, one line a loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._args.preference import PREFERENCE_LOSSES, REWARD, PreferenceInputs, PreferenceOptions
from . import widest

_NAMES = {loss.code: name for name, loss in PREFERENCE_LOSSES.items() if name != "spin"}
_NAMES[REWARD.code] = "reward"
_EXPONENT = 80  # divergences are clamped there
_SURE = -(2.0**-53)  # orpo's mean log-probability is at most this


def _mixed_sigmoid(x: Tensor, first: Any, second: Any) -> Tensor:
    """-first·L(x) - second·L(-x); a second of 0 is left out, not 0·inf."""
    loss = -first * logsigmoid(x)
    if not isinstance(second, Tensor):
        return loss if second == 0 else loss - second * logsigmoid(-x)
    # while compiling: a number within its range where it is not used
    finite = torch.where(second != 0, x, 0)
    return loss - second * logsigmoid(-finite)


def _scaled(nll: Tensor, weight: Any) -> Any:
    """weight·nll, of a weight of 0 nothing: no 0·inf."""
    if not isinstance(weight, Tensor):
        return weight * nll if weight else 0
    return weight * torch.where(weight != 0, nll, 0)


def _exo_pair(x: Tensor, eps: Any) -> Tensor:
    """0·inf is 0. Near the zero of the KL its two terms cancel: there by t, as the kernels."""
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    x = x.clamp(-1e300, 1e300)
    keep, swap = torch.log1p(-eps), torch.log(eps)
    far = torch.sigmoid(x) * (logsigmoid(x) - keep) + torch.sigmoid(-x) * (logsigmoid(-x) - swap)
    apart = x - keep + swap
    close, sign = apart.abs() < 1, torch.where(x >= 0, -1, 1)
    t, least = torch.where(close, sign * apart, 0), torch.sigmoid(sign * x)
    return torch.where(close, least * t + torch.log1p(least * torch.expm1(-t)), far)


def _discopop(x: Tensor, tau: Any) -> Tensor:
    """(1 - m)·(-L(x)) + m·e^{-x}, the second term as e^{L(x / τ) - x}: no inf·0."""
    finite = x.clamp(-1e300, 1e300)
    y = finite / tau
    # L(y) - x, for y far below 0 as x·(1/τ - 1) and what is left of L
    size = torch.where(y >= 0, y, -y)  # with abs's slope of 0 at 0 the gradient would be wrong
    log_second = torch.where(y >= 0, -finite, finite * (1 / tau - 1))
    log_second = log_second - torch.log1p(torch.exp(-size))
    value = torch.sigmoid(-y) * -logsigmoid(finite) + torch.exp(log_second)
    return torch.where(x > -math.inf, value, -x)  # NaN passes


def _log_odds(a: Tensor) -> Tensor:
    """a - ln(1 - e^a)."""
    a = a.clamp(max=_SURE)
    near = a > -math.log(2)
    log_rest = torch.log(-torch.expm1(torch.where(near, a, -1)))
    return a - torch.where(near, log_rest, torch.log1p(-torch.exp(torch.where(near, -1, a))))


def _divergence(r: Tensor, o: PreferenceOptions) -> Tensor:
    """What stands for the log-ratio r in d: f'(e^r), f'(1) = 0."""
    if o.divergence == 0:  # reverse_kl
        return r
    if o.divergence == 2:  # js
        return math.log(2) + logsigmoid(r)
    rate = -1.0 if o.divergence == 1 else o.alpha - 1
    if isinstance(rate, Tensor):
        other = torch.where(rate == 0, 1, rate)
        return torch.where(rate == 0, r, torch.expm1((other * r).clamp(max=_EXPONENT)) / other)
    return r if rate == 0 else torch.expm1((rate * r).clamp(max=_EXPONENT)) / rate


def pair_loss(loss: str, w: Tensor, l: Tensor, o: PreferenceOptions) -> Tensor:
    """The loss of each pair without its NLL. w and l: what stands for r_w and r_l, or for losses without
    a reference the log-probabilities, divided by lengths where that is asked for."""
    beta, eps = o.beta, o.label_smoothing
    d = w - l
    x = beta * d
    if loss in ("sigmoid", "aot", "aot_unpaired", "cpo"):
        return _mixed_sigmoid(x, 1 - eps, eps)
    if loss == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return torch.relu(1 - x)
    if loss == "robust":
        return _mixed_sigmoid(x, (1 - eps) / (1 - 2 * eps), -eps / (1 - 2 * eps))
    if loss == "exo_pair":
        return _exo_pair(x, eps)
    if loss == "nca_pair":
        half = 0.5 * logsigmoid(-beta * w) + 0.5 * logsigmoid(-beta * l)
        return -logsigmoid(beta * w) - half
    if loss == "bco_pair":
        return -logsigmoid(beta * w - o.delta) - logsigmoid(-(beta * l - o.delta))
    if loss == "sppo_hard":
        return (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2
    if loss == "apo_zero":
        return torch.sigmoid(-beta * w) + torch.sigmoid(beta * l)
    if loss == "apo_down":
        return torch.sigmoid(beta * w) + torch.sigmoid(-x)
    if loss == "discopop":
        return _discopop(x, o.tau)
    if loss == "sigmoid_norm":
        return -logsigmoid(x)
    if loss == "sft":
        return torch.zeros_like(w)
    if loss == "simpo":
        return _mixed_sigmoid(x - o.gamma, 1 - eps, eps)
    if loss == "slic":
        return torch.relu(beta - d)
    if loss == "orpo":
        return -beta * logsigmoid(_log_odds(w) - _log_odds(l))
    assert loss == "reward", loss
    return -logsigmoid(d)


def _lengths(n: Tensor | None) -> Any:
    """An empty completion counts as one token; a negative length makes its pair NaN."""
    if n is None:
        return 1
    n = widest(n)
    return torch.where(n > 0, n, torch.where(n == 0, 1, torch.nan))


def preference_loss(inputs: PreferenceInputs, options: PreferenceOptions) -> tuple[Tensor, ...]:
    """loss, chosen_rewards, rejected_rewards, margins, accuracy; computed in float64 as the kernels do."""
    i, o = inputs, options
    dtype = i.chosen.dtype
    lp_w, lp_l = widest(i.chosen), widest(i.rejected)
    ref_w = torch.zeros_like(lp_w) if i.ref_chosen is None else widest(i.ref_chosen)
    ref_l = torch.zeros_like(lp_l) if i.ref_rejected is None else widest(i.ref_rejected)
    r_w, r_l = lp_w - ref_w, lp_l - ref_l
    lengths = _lengths(i.chosen_lengths), _lengths(i.rejected_lengths)
    tokens = lengths[0] if o.nll_by_length else 1
    tokens = tokens.sum() if isinstance(tokens, Tensor) else max(lp_w.numel(), 1)
    if i.chosen_nll is not None:
        nll = widest(i.chosen_nll).reshape(())
    else:
        nll = -lp_w.sum() / (tokens if lp_w.numel() else 1)
    z: Any = 0.0
    if i.kl is not None and i.kl.numel():
        z = widest(i.kl).mean().clamp(min=0)

    weights: Any = [1.0] * len(o.codes) if o.loss_weights is None else o.loss_weights.unbind()
    total: Any = 0.0
    for code, by_length, weight in zip(o.codes, o.by_length, weights, strict=True):
        loss = _NAMES[code]
        n_w, n_l = lengths if by_length else (1, 1)
        if loss in ("kto", "apo_zero_unpaired"):
            x_w, x_l = r_w / n_w, r_l / n_l
            u_w, u_l = (o.desirable, o.undesirable) if loss == "kto" else (1, 1)
            shift = z if loss == "kto" else 0
            value = torch.cat([
                (u_w * torch.sigmoid(-o.beta * (x_w - shift))).flatten(),
                (u_l * torch.sigmoid(o.beta * (x_l - shift))).flatten(),
            ])  # fmt: skip
        elif loss in ("aot", "aot_unpaired"):
            if loss == "aot":
                one, two = lp_w / n_w - lp_l / n_l, ref_w / n_w - ref_l / n_l
            else:
                one, two = r_w / n_w, r_l / n_l
            order = i.aot_order if loss == "aot" else i.aot_unpaired_order
            value = pair_loss(loss, one.flatten()[order[0]], two.flatten()[order[1]], o)
            value = value.view(lp_w.shape)
        else:
            named = PREFERENCE_LOSSES.get(loss, REWARD)
            if named.reference:
                w, l = _divergence(r_w, o) / n_w, _divergence(r_l, o) / n_l
            else:
                w, l = lp_w / n_w, lp_l / n_l
            value = pair_loss(loss, w, l, o)
            if named.nll == "whole":
                value = value + nll
            elif named.nll:
                value = value + _scaled(nll, o.sft_weight)
            if loss == "reward":
                both = lp_w + lp_l
                value = value + torch.where(both.isfinite(), o.center * both**2, both**2)
        if i.weights is not None:
            value = value * widest(i.weights)
        if o.reduction != 0:
            value = value.sum() / (max(value.numel(), 1) if o.reduction == 2 else 1)
        total = total + weight * value

    beta = o.beta
    same = lp_w.numel() == lp_l.numel()
    if same:
        d = r_w - r_l.reshape(r_w.shape)  # examples one at a time may come in two shapes
        margins = beta * d
        won, count = (d > 0).sum(), r_w.numel()
    else:
        sums = r_w.sum() / max(r_w.numel(), 1), r_l.sum() / max(r_l.numel(), 1)
        margins = beta * (sums[0] - sums[1])
        won, count = (r_w > 0).sum() + (r_l < 0).sum(), r_w.numel() + r_l.numel()
    metrics = (beta * r_w, beta * r_l, margins, widest(won) / max(count, 1))
    return total.to(dtype), *(m.detach().to(dtype) for m in metrics)
