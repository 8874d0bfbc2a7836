"""Policy-gradient losses, value loss and advantages as plain torch operations; SPEC section 5."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._args.policy import IMPORTANCE, KL, POLICY_REDUCTIONS, SURROGATES
from . import widest

_FARTHEST = 60.0  # beyond e^±60 a ratio is clamped


def _name(codes: dict[str, int], code: int) -> str:
    return next(name for name, number in codes.items() if number == code)


def _ratio(x: Tensor) -> Tensor:
    return x.clamp(-_FARTHEST, _FARTHEST).exp()


def _kl(kind: str, lp: Tensor, ref: Tensor) -> Tensor:
    d = ref - lp
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    d = d.clamp(max=_FARTHEST)
    return torch.expm1(d) - d


def _surrogate(
    kind: str, lp: Tensor, x: Tensor, rho: Tensor, A: Tensor, low: Any, high: Any, dual_clip: Any,
    delta: Any, tau_pos: Any, tau_neg: Any,
) -> Tensor:  # fmt: skip
    zero = torch.zeros_like(lp)
    if kind == "clipped":
        value = -torch.minimum(rho.clamp(max=delta) * A, rho.clamp(1 - low, 1 + high) * A)
        return torch.where(A < 0, value.clamp(max=-A * dual_clip), value)
    if kind == "reinforce":
        return torch.where(A == 0, zero, -A * lp)
    if kind == "cispo":
        c = rho.clamp(max=high).detach() * A
        return torch.where(c == 0, zero, -c * lp)
    if kind == "sapo":
        tau = torch.where(A > 0, tau_pos + zero, tau_neg + zero)
        return -A * torch.sigmoid(tau * (rho - 1)) * 4 / tau
    k, lam = torch.where(A >= 0, 2.0, 3.0), torch.where(A >= 0, 3.0, 2.0)
    log_w = x.clamp(math.log(1e-8), 20).detach()
    c = torch.exp(lam + k * log_w - lam * log_w.exp()) * A
    return torch.where(c == 0, zero, -c * lp)


def _clipped(kind: str, rho: Tensor, A: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    nothing = torch.zeros_like(rho)
    if kind == "clipped":
        return (rho < 1 - low) & (A < 0), (rho > 1 + high) & (A > 0)
    return nothing, (rho > high) & (A > 0) if kind == "cispo" else nothing


def policy_loss(logprobs: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """The loss and (clipped low, clipped high, approximate KL); computed in float64 as the kernels do."""
    old, ref, weights, advantages, cu_seqlens = rest[:5]
    low, high, dual_clip, delta, kl_beta, tau_pos, tau_neg, divisor = rest[5:13]
    kind, whose, kl = (
        _name(codes, code)
        for codes, code in zip((SURROGATES, IMPORTANCE, KL), rest[13:16], strict=True)
    )
    kl_times_ratio, how = rest[16], _name(POLICY_REDUCTIONS, rest[17])
    shape, dtype = logprobs.shape, logprobs.dtype
    if cu_seqlens is None:
        length = max(shape[-1], 1)
        count = shape[:-1].numel()
        sequence = torch.arange(shape.numel(), device=logprobs.device) // length
    else:
        count = len(cu_seqlens) - 1
        places = torch.arange(shape[0], device=logprobs.device)
        sequence = torch.searchsorted(cu_seqlens[1:].long(), places, right=True)
        sequence = sequence.clamp(max=max(count - 1, 0))
    live = torch.ones_like(sequence, dtype=torch.bool) if mask is None else mask.reshape(-1)

    def tokens(v: Tensor) -> Tensor:  # what is masked out becomes 0 before anything is computed
        return torch.where(live, widest(v.reshape(-1)), 0)

    def sums(v: Tensor) -> Tensor:
        return v.new_zeros(count).index_add(0, sequence, v)

    lp = tokens(logprobs)
    A = tokens(advantages if advantages.shape == shape else advantages.reshape(-1)[sequence])
    n = sums(live.to(lp.dtype))
    each = n.clamp(min=1)[sequence]
    total, batch = n.sum().clamp(min=1), max(count, 1)
    if old is None:
        same = torch.isfinite(lp)  # -inf - -inf is no 0
        x = torch.where(same, lp - torch.where(same, lp, 0).detach(), 0)
        x = torch.where(same, x, 0)
    else:
        x = lp - tokens(old)
    approx_kl = _kl("k3", lp, tokens(old)).sum() / total if old is not None else lp.new_zeros(())
    own = _ratio(x)
    if whose != "token":
        x = sums(x.clamp(-20, 20) if kind == "vespo" else x)
        x = (x / n.clamp(min=1) if whose == "mean" else x)[sequence]
    rho = _ratio(x)
    used, weight = A, None
    if weights is not None:  # at 0 nothing of the advantage is left, NaN neither
        weight = tokens(weights)
        used = torch.where(weight == 0, 0, A)
    value = _surrogate(kind, lp, x, rho, used, low, high, dual_clip, delta, tau_pos, tau_neg)
    if weight is not None:
        value = torch.where(weight == 0, 0, weight * value)
    if whose == "whole":
        value = value / each
    if ref is not None:
        term = kl_beta * _kl(kl, lp, tokens(ref))
        # by the token's own ratio where that of the sequence is vespo's w
        factor = own if whose == "sum" else rho
        value = value + (term * factor if kl_times_ratio else term)
    value = torch.where(live, value, 0)
    sides = torch.stack(_clipped(kind, rho, A, low, high)).to(lp.dtype) * live
    share = 1 / total if whose == "token" else 1 / (each * batch)
    metrics = torch.stack([*(sides * share).sum(-1), approx_kl]).detach().to(dtype)
    if how == "none":
        return value.reshape(shape).to(dtype), metrics
    if how == "sequences":
        value = value / each
    if how in ("sequences", "sequence_sums"):
        value = value / batch
    if how == "tokens":
        value = value / total
    if how == "divisor":
        over = divisor if isinstance(divisor, Tensor) else lp.new_tensor(divisor)
        value = torch.where(over == 0, 0, value / torch.where(over == 0, 1, over))
    return value.sum().to(dtype), metrics


def value_loss(
    clip: Any, values: Tensor, returns: Tensor, old_values: Tensor | None, mask: Tensor | None
) -> Tensor:
    live = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    v, r = (torch.where(live, widest(x), 0) for x in (values, returns))
    square = (v - r) ** 2
    if old_values is not None:
        old = torch.where(live, widest(old_values), 0)
        held = (torch.minimum(torch.maximum(v, old - clip), old + clip) - r) ** 2
        square = torch.where(held <= square, square, held)  # NaN among the old values passes
    loss = 0.5 * torch.where(live, square, 0).sum() / live.sum().clamp(min=1)
    return loss.to(values.dtype)


def group_advantages(rewards: Tensor, group_size: int, scale: str, baseline: str) -> Tensor:
    groups = widest(rewards.reshape(-1, group_size))

    def deviation(x: Tensor) -> Tensor:
        keep = ~torch.isnan(x)
        count = keep.sum(-1, keepdim=True)
        x = torch.where(keep, x, 0)
        spread = torch.where(keep, x - x.sum(-1, keepdim=True) / count.clamp(min=1), 0)
        return ((spread**2).sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()

    keep = ~torch.isnan(groups)
    count = keep.sum(-1, keepdim=True)
    mean = torch.where(keep, groups, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    out = groups - mean
    if baseline == "leave_one_out":
        out = torch.where(count > 1, out * count / (count - 1).clamp(min=1), 0)
    if scale != "none":
        out = out / (deviation(groups if scale == "group" else groups.reshape(1, -1)) + 1e-4)
    return torch.where(keep, out, 0).to(rewards.dtype).reshape(rewards.shape)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: Any, lam: Any
) -> tuple[Tensor, Tensor]:
    r, v = widest(rewards), widest(values)
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    length = rewards.shape[-1]
    following = v[..., length] if v.shape[-1] > length else torch.zeros_like(v[..., :1].sum(-1))
    advantage, advantages = torch.zeros_like(following), []
    for t in range(length - 1, -1, -1):
        new = r[..., t] + gamma * following - v[..., t] + gamma * lam * advantage
        advantage = torch.where(live[..., t], new, advantage)
        following = torch.where(live[..., t], v[..., t], following)
        advantages.append(torch.where(live[..., t], new, 0))
    A = torch.stack(advantages[::-1], -1) if advantages else torch.zeros_like(r)
    returns = torch.where(live, A + v[..., :length], 0)
    return A.to(rewards.dtype), returns.to(rewards.dtype)
