"""Rows of logits for the tests: inputs, the formulas in plain torch and in float64, gradients."""

from __future__ import annotations

import torch
from finefuse.reference import logprobs as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IGNORE = -100


def make(rows, vocab, dtype=torch.float32, *, spread=3.0, ignore=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=g) * spread).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    if ignore and rows > 1:
        targets[rows // 2] = IGNORE
    return logits, targets


def eager_stats(logits, targets, temperature=1.0):
    """The plain torch formulas, in the logits' type; what ignored rows give is zeroed."""
    logp = torch.log_softmax(logits / temperature, -1)
    keep = targets != IGNORE
    safe = torch.where(keep, targets, 0)
    lp = logp.gather(-1, safe[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    lse = torch.logsumexp(logits / temperature, -1)
    zero = lp.new_zeros(())
    return tuple(torch.where(keep, x, zero) for x in (lp, entropy, lse))


def truth_stats(logits, targets, temperature=1.0):
    flat = logits.detach().double().reshape(-1, logits.shape[-1]).numpy()
    values = reference.token_logprobs(flat, targets.reshape(-1).numpy(), temperature)
    return tuple(v.reshape(targets.shape) for v in values)


def truth_gradient(logits, targets, upstream, temperature=1.0):
    flat = logits.detach().double().reshape(-1, logits.shape[-1]).numpy()
    ups = [None if u is None else u.double().reshape(-1).numpy() for u in upstream]
    return reference.token_logprobs_gradient(
        flat, targets.reshape(-1).numpy(), *ups, temperature=temperature
    ).reshape(logits.shape)


def gradients(function, logits, targets, upstream, **options):
    x = logits.detach().clone().requires_grad_()
    outputs = function(x, targets, **options)
    loss = sum(
        (o * u.to(o.dtype)).sum() for o, u in zip(outputs, upstream, strict=True) if u is not None
    )
    loss.backward()
    return [o.detach() for o in outputs], x.grad
