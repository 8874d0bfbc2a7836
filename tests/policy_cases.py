"""Policy losses for the tests: inputs, the formulas in plain torch and float64, how to compare them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import finefuse as ff
import numpy as np
import torch
from finefuse.reference import logprobs as reference_logprobs
from finefuse.reference import policy as reference
from tolerances import as_float64, check

IGNORE = -100
METRICS = ("clip_fraction_low", "clip_fraction_high", "approx_kl")
# Each option in some set; what a loss has no use for it must not mind.
OPTIONS = {
    "plain": {},
    "kl": {"kl_beta": 0.3, "kl": "k3", "dual_clip": 1.5},
    "kl times ratio": {"kl_beta": 0.2, "kl": "k1", "kl_times_ratio": True, "delta": 1.4},
    "k2": {"kl_beta": 0.5, "kl": "k2", "clip_low": 0.1, "clip_high": 0.4, "weighted": True},
    "sequence": {"importance": "sequence", "by_token": True, "weighted": True},
    "temperatures": {"tau_pos": 0.7, "tau_neg": 1.6, "num_tokens": 11.0, "max_length": 23},
}


def vectors(sequences, length, dtype=torch.float32, seed=0, spread=0.3, by_token=False):
    """Log-probabilities, of now, old and of the reference, advantages, mask, weights."""
    g = torch.Generator().manual_seed(seed)
    shape = (sequences, length)
    lp = -torch.rand(shape, generator=g) * 4
    old = lp + torch.randn(shape, generator=g) * spread
    ref = lp + torch.randn(shape, generator=g) * spread
    advantages = torch.randn(shape if by_token else shape[:1], generator=g)
    mask = torch.rand(shape, generator=g) < 0.8
    if sequences > 2:
        mask[1] = False  # a sequence without tokens
    weights = torch.rand(shape, generator=g) * (torch.rand(shape, generator=g) < 0.9)
    floats = (t.to(dtype) for t in (lp, old, ref, advantages, weights))
    lp, old, ref, advantages, weights = floats
    return SimpleNamespace(
        lp=lp, old=old, ref=ref, advantages=advantages, mask=mask, weights=weights
    )


def arguments(v, options, mask=True):
    """Keyword arguments of both ff.policy_loss and the reference, but for advantages."""
    options = dict(options)
    weighted, _ = options.pop("weighted", False), options.pop("by_token", False)
    kwargs = {"old_logprobs": v.old, "mask": v.mask if mask else None, **options}
    if weighted:
        kwargs["weights"] = v.weights
    if "kl_beta" in options:
        kwargs["ref_logprobs"] = v.ref
    return kwargs


def numpy(kwargs):
    return {
        k: x.double().numpy() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in kwargs.items()
    }


def check_scalar(name, ours, eager, truth, terms):
    """The error rule for a sum that may cancel: the scale is that of its absolute terms."""
    if np.ndim(truth):  # a number a token
        check(name, ours, eager, truth)
        return
    check(
        name,
        *(np.array([as_float64(x).item(), terms]) for x in (ours, eager, truth)),
        dtype=ours.dtype,
    )


def close(ours, other):
    """Two ways to the same number, each rounded to float32 on its way."""
    scale = other.abs().max().item()
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6 * scale)


def truth(lp, advantages, kwargs, upstream=None):
    return reference.policy_loss(
        lp.double().numpy(), advantages.double().numpy(), upstream=upstream, **numpy(kwargs)
    )


# ---- the formulas, as TRL writes them, in the type of their input ----------------------------------


def eager(lp, advantages, *, loss, old_logprobs=None, mask=None, weights=None, ref_logprobs=None,
          clip_low=0.2, clip_high=None, dual_clip=None, delta=None, kl_beta=0.0, kl="k3",
          kl_times_ratio=False, importance=None, reduction=None, max_length=None, num_tokens=None,
          tau_pos=1.0, tau_neg=1.05):  # fmt: skip
    mask = torch.ones_like(lp) if mask is None else mask.to(lp.dtype)
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    old = lp.detach() if old_logprobs is None else old_logprobs
    log_ratio = lp - old
    high = clip_high if clip_high is not None else (5.0 if loss == "cispo" else 0.2)
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    whole = loss == "rloo"
    if whole:
        log_weights = (log_ratio * mask).sum(-1, keepdim=True)
    elif importance == "sequence" or (importance is None and loss in ("gspo", "luspo")):
        log_weights = (log_ratio * mask).sum(-1, keepdim=True) / n
    else:
        log_weights = log_ratio
    ratio = torch.exp(log_weights)
    if loss == "cispo":
        value = -ratio.clamp(max=high).detach() * A * lp
    elif loss == "reinforce":
        value = -A * lp
    elif loss == "sapo":
        tau = torch.full_like(A, tau_neg).masked_fill(A > 0, tau_pos)
        value = -A * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    elif loss == "vespo":
        log_w = (log_ratio.clamp(-20, 20) * mask).sum(-1, keepdim=True)
        log_w = log_w.clamp(math.log(1e-8), 20.0)
        k, lam = torch.where(A >= 0, 2.0, 3.0), torch.where(A >= 0, 3.0, 2.0)
        value = -torch.exp(lam + k * log_w - lam * torch.exp(log_w)).detach() * A * lp
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + high)
        capped = ratio if delta is None else ratio.clamp(max=delta)
        value = -torch.min(capped * A, clipped * A)
        if dual_clip is not None:
            value = torch.where(A < 0, torch.min(value, -A * dual_clip), value)
    if weights is not None:
        value = value * weights
    if whole:
        value = value / n
    if kl_beta != 0.0:
        d = ref_logprobs - lp
        per_token = {"k1": -d, "k2": 0.5 * d**2, "k3": torch.exp(d) - d - 1}[kl]
        value = value + kl_beta * (per_token * ratio if kl_times_ratio else per_token)
    value = value * mask  # (B, 1) where all of it is a sequence's
    how = reduction or loss
    if how == "none":
        return value
    if how == "sum":
        return value.sum()
    if how in ("grpo", "gspo", "sapo"):
        return (value.sum(-1) / n[:, 0]).mean()
    if how in ("ppo", "bnpo", "reinforce", "mean"):
        return value.sum() / mask.sum().clamp(min=1.0)
    if how == "dr_grpo":
        return value.sum() / (lp.size(0) * (max_length or lp.size(1)))
    if how in ("dapo", "cispo", "vespo"):
        return value.sum() / (num_tokens or mask.sum().clamp(min=1.0))
    assert how in ("luspo", "rloo")
    return value.sum(-1).mean()


def run(function, lp, advantages, kwargs, upstream=None):
    """(what it returned, gradient by lp)."""
    x = lp.clone().requires_grad_()
    out = function(x, advantages, **kwargs)
    loss = getattr(out, "loss", out)
    (loss if upstream is None else (loss * upstream).sum()).backward()
    return out, x.grad


def ours(lp, advantages, **kwargs):
    return ff.policy_loss(lp, advantages=advantages, **kwargs)


# ---- from logits ------------------------------------------------------------------------------------


def batch(sequences, tokens, vocab, dtype=torch.float32, seed=0, spread=2.0):
    """Logits, actions, and vectors whose ratios are near 1."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(sequences, tokens, vocab, generator=g) * spread).to(dtype)
    actions = torch.randint(0, vocab, (sequences, tokens), generator=g)
    v = vectors(sequences, tokens, torch.float64 if dtype is torch.float64 else torch.float32, seed)
    lp = torch.log_softmax(logits.double(), -1).gather(-1, actions[..., None])[..., 0]
    noise = v.old - v.lp, v.ref - v.lp
    v.old, v.ref = (lp + n for n in noise)
    v.lp = None
    return logits, actions, v


def eager_from_logits(logits, actions, advantages, *, entropy_coef=0.0, temperature=1.0, **kwargs):
    """In the type of the logits, as a user of torch writes it."""
    mask = kwargs["mask"]
    logp = torch.log_softmax(logits / temperature, -1)
    lp = logp.gather(-1, actions[..., None])[..., 0]
    kwargs = {
        k: x.to(lp.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in kwargs.items()
    }
    loss = eager(lp, advantages.to(lp.dtype), **kwargs)
    entropy = -(logp.exp() * logp).sum(-1)
    if kwargs.get("reduction") == "none":
        return loss - entropy_coef * entropy * mask
    return loss - entropy_coef * (entropy * mask).sum() / mask.sum().clamp(min=1)


def truth_from_logits(logits, actions, advantages, *, entropy_coef=0.0, temperature=1.0, **kwargs):
    """(loss, gradient of the logits, entropy, the reference's output; its terms with the entropy's)."""
    b, t, v = logits.shape
    flat = logits.double().reshape(-1, v).numpy()
    mask = kwargs["mask"]
    y = torch.where(mask, actions, IGNORE).reshape(-1).numpy()
    lp, entropy, _ = reference_logprobs.token_logprobs(flat, y, temperature)
    out = truth(torch.from_numpy(lp).reshape(b, t), advantages, kwargs)
    n = max(int(mask.sum()), 1)
    none = kwargs.get("reduction") == "none"
    h = np.full(len(y), -entropy_coef * (1 if none else 1 / n))
    dz = reference_logprobs.token_logprobs_gradient(
        flat, y, out.gradient.reshape(-1), h, temperature=temperature
    )
    bonus = entropy_coef * (entropy.reshape(b, t) if none else entropy.sum() / n)
    out = out._replace(terms=out.terms + abs(entropy_coef) * entropy.sum() / n)
    return out.loss - bonus, dz.reshape(b, t, v), entropy.sum() / n, out


def ours_from_logits(logits, actions, advantages, **kwargs):
    return ff.policy_loss_from_logits(logits, actions, advantages=advantages, **kwargs)
