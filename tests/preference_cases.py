"""Preference losses for the tests: inputs, the formulas in plain torch and float64, how to compare them."""

from __future__ import annotations

import math

import finefuse as ff
import numpy as np
import pytest
import torch
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from finefuse.reference import logprobs as reference_logprobs
from finefuse.reference import preference as reference
from tolerances import check

F = torch.nn.functional
IGNORE = -100
UNPAIRED = [name for name, named in LOSSES.items() if named.unpaired]
DIVERGING = [name for name, named in LOSSES.items() if named.divergence]
HAVE_NLL = [name for name, named in LOSSES.items() if named.nll]
NUMBERS = {
    "gamma": 0.8, "sft_weight": 0.7, "delta": 0.3, "tau": 0.4, "desirable_weight": 1.5,
    "undesirable_weight": 0.6,
}  # fmt: skip


def smoothing(loss, eps):
    """What exo_pair and robust allow."""
    return max(eps, 0.05) if loss == "exo_pair" else min(eps, 0.4)


# ---- the formulas in plain torch ---------------------------------------------------------------


def eager_score(r, f_divergence, alpha):
    if f_divergence == "forward_kl":
        return 1 - torch.exp(-r)
    if f_divergence == "js":
        return math.log(2) + F.logsigmoid(r)
    if f_divergence == "alpha" and alpha != 1:
        return (torch.exp((alpha - 1) * r) - 1) / (alpha - 1)
    return r


def eager_log1mexp(a):
    return torch.where(a > -math.log(2), torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))


def eager_loss(
    loss, lp_w, lp_l, ref_w, ref_l, n_w=1, n_l=1, *, beta=0.1, eps=0.0, nll=0.0, z=0.0, gamma=0.5,
    sft_weight=0.0, delta=0.0, tau=0.05, desirable_weight=1.0, undesirable_weight=1.0,
    f_divergence="reverse_kl", alpha=0.5,
):  # fmt: skip
    """Per pair (kto, apo_zero_unpaired: per example), as TRL writes it; n_w and n_l where it divides."""

    def smoothed(x):
        other = F.logsigmoid(-x) if eps else 0
        return -(1 - eps) * F.logsigmoid(x) - eps * other

    r_w, r_l = lp_w - ref_w, lp_l - ref_l
    a, b = beta * r_w / n_w, beta * r_l / n_l
    w, l = (eager_score(r, f_divergence, alpha) / n for r, n in ((r_w, n_w), (r_l, n_l)))
    S, L = torch.sigmoid, F.logsigmoid
    if loss == "kto":
        return torch.cat(
            [desirable_weight * (1 - S(a - beta * z)), undesirable_weight * (1 - S(beta * z - b))]
        )
    if loss == "apo_zero_unpaired":
        return torch.cat([1 - S(a), S(b)])
    x, free = beta * (w - l), beta * (lp_w / n_w - lp_l / n_l)
    if loss in ("sigmoid", "spin"):
        return smoothed(x)
    if loss == "ipo":
        return (w - l - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return torch.relu(1 - x)
    if loss == "robust":
        return (-(1 - eps) * L(x) + eps * L(-x)) / (1 - 2 * eps)
    if loss == "exo_pair":
        return S(x) * (L(x) - math.log(1 - eps)) + S(-x) * (L(-x) - math.log(eps))
    if loss == "nca_pair":
        return -L(a) - 0.5 * L(-a) - 0.5 * L(-b)
    if loss == "bco_pair":
        return -L(a - delta) - L(-(b - delta))
    if loss == "sppo_hard":
        return (r_w / n_w - 0.5 / beta) ** 2 + (r_l / n_l + 0.5 / beta) ** 2
    if loss == "aot":
        first, second = lp_w / n_w - lp_l / n_l, ref_w / n_w - ref_l / n_l
        return smoothed(beta * (first.sort(stable=True)[0] - second.sort(stable=True)[0]))
    if loss == "aot_unpaired":
        first, second = r_w / n_w, r_l / n_l
        return smoothed(beta * (first.sort(stable=True)[0] - second.sort(stable=True)[0]))
    if loss == "apo_zero":
        return 1 - S(a) + S(b)
    if loss == "apo_down":
        return S(a) + 1 - S(x)
    if loss == "discopop":
        m = S(x / tau)
        return (1 - m) * -L(x) + m * torch.exp(-x)
    if loss == "sigmoid_norm":
        return -L(x)
    if loss == "sft":
        return nll + 0 * lp_w
    if loss == "cpo":
        return smoothed(free) + sft_weight * nll
    if loss == "simpo":
        return smoothed(free - gamma) + sft_weight * nll
    if loss == "slic":
        return torch.relu(beta - lp_w / n_w + lp_l / n_l) + sft_weight * nll
    assert loss == "orpo", loss
    p, q = lp_w / n_w, lp_l / n_l
    return nll - beta * L(p - q - (eager_log1mexp(p) - eager_log1mexp(q)))


def divides(loss, normalize_lengths=None):
    return LOSSES[loss].by_length if normalize_lengths is None else normalize_lengths


def eager(
    chosen, rejected, ref_chosen=None, ref_rejected=None, *, loss, chosen_lengths=None,
    rejected_lengths=None, normalize_lengths=None, loss_weights=None, pair_weights=None,
    chosen_nll=None, kl=None, label_smoothing=0.0, reduction="mean", **numbers,
):  # fmt: skip
    """preference_loss(...).loss in the type of the vectors."""
    names = [loss] if isinstance(loss, str) else loss
    ref_chosen = torch.zeros_like(chosen) if ref_chosen is None else ref_chosen
    ref_rejected = torch.zeros_like(rejected) if ref_rejected is None else ref_rejected
    if chosen_nll is None and any(LOSSES[name].nll for name in names):
        tokens = len(chosen) if normalize_lengths is False else chosen_lengths.sum()
        chosen_nll = -chosen.sum() / tokens
    z = 0 if kl is None else kl.mean().clamp(min=0)
    total = 0
    for name, weight in zip(names, loss_weights or [1] * len(names), strict=True):
        n = (chosen_lengths, rejected_lengths) if divides(name, normalize_lengths) else (1, 1)
        value = eager_loss(
            name, chosen, rejected, ref_chosen, ref_rejected, *n, eps=label_smoothing,
            nll=chosen_nll, z=z, **numbers,
        )  # fmt: skip
        value = value if pair_weights is None else value * pair_weights
        total = total + weight * (value if reduction == "none" else getattr(value, reduction)())
    return total


def vectors(pairs, dtype=torch.float32, seed=0, scale=30.0):
    g = torch.Generator().manual_seed(seed)
    lp = [(-torch.rand(pairs, generator=g) * scale).to(dtype) for _ in range(4)]
    lengths = [torch.randint(1, 50, (pairs,), generator=g) for _ in range(2)]
    return lp, lengths


def compare(lp, reduction="mean", seed=0, refs=True, nll=None, device="cpu", **options):
    """Ours, computed on the device, against truth and eager: values, gradients (references' too), metrics."""
    g = torch.Generator().manual_seed(seed)
    given = lp[: 4 if refs else 2]
    leaves = [[x.to(d, copy=True).requires_grad_() for x in given] for d in (device, "cpu")]
    nlls = [None if nll is None else nll.to(d, copy=True).requires_grad_() for d in (device, "cpu")]
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = ff.preference_loss(*leaves[0], reduction=reduction, chosen_nll=nlls[0], **there)
    upstream = torch.randn(out.loss.shape, generator=g, dtype=torch.float64).to(lp[0].dtype)
    out.loss.backward(upstream.to(device))
    assert not any(x.requires_grad for x in out[1:])
    out = type(out)(*(x.detach().cpu() for x in out))
    e = eager(*leaves[1], reduction=reduction, chosen_nll=nlls[1], **options)
    e.backward(upstream)
    plain = {
        k: v.double().numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()
    }
    t = reference.preference_loss(
        *(x.double().numpy() for x in lp[: 4 if refs else 2]), reduction=reduction,
        upstream=upstream.double().numpy() if reduction == "none" else None,
        chosen_nll=None if nll is None else nll.item(), **plain,
    )  # fmt: skip
    scale = 1.0 if reduction == "none" else upstream.item()
    check("loss", out.loss, e, t.loss, terms=t.loss_terms)
    truths = [scale * d for d in (t.d_chosen, t.d_rejected, t.d_ref_chosen, t.d_ref_rejected)]
    terms = [scale * d for d in (t.d_chosen_terms, t.d_rejected_terms)] * 2
    for name, a, b, truth, size in zip(
        ("chosen", "rejected", "ref_chosen", "ref_rejected"), *leaves, truths, terms, strict=False
    ):
        other = truth if b.grad is None else b.grad  # a loss that does not read the reference
        # in plain torch, what a loss does not read has none
        ours = torch.zeros_like(b) if a.grad is None else a.grad.cpu()
        check(f"d {name}", ours, other, truth, terms=size if truth.any() else None)
    if nll is not None:
        check("d chosen_nll", nlls[0].grad.cpu(), nlls[1].grad, np.asarray(scale * t.d_nll))
    for name in ("chosen_rewards", "rejected_rewards", "margins"):
        check(name, getattr(out, name), getattr(t, name), getattr(t, name))
    assert out.accuracy.item() == pytest.approx(t.accuracy)
    return out


# ---- from logits -------------------------------------------------------------------------------


def batch(pairs, tokens, vocab, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2 * pairs, tokens, vocab, generator=g) * 2).to(dtype)
    targets = torch.randint(0, vocab, (2 * pairs, tokens), generator=g)
    for b in range(2 * pairs):
        targets[b, : b % 3] = IGNORE  # prompts of different lengths
        if b % 2:
            targets[b, tokens - 1 - b % 2 :] = IGNORE  # padding
    ref = -torch.rand(2 * pairs, generator=g) * 10
    return logits, targets, ref


def kept(targets):
    """Whether a token is kept, and how many of a sequence."""
    keep = targets != IGNORE
    return keep, keep.sum(-1)


def tail_weights(targets, ld_alpha):
    keep, n = kept(targets)
    shorter = torch.minimum(*n.chunk(2)).repeat(2)
    weight = torch.tensor(ld_alpha, dtype=torch.float64)
    return torch.where(keep.cumsum(-1) > shorter[:, None], weight, 1.0)


def eager_from_logits(logits, targets, ref, loss, beta, eps, ld_alpha=1.0, **options):
    keep, n = kept(targets)
    lp = torch.log_softmax(logits, -1).gather(-1, torch.where(keep, targets, 0)[..., None])[..., 0]
    lp = torch.where(keep, lp, 0)
    n = n.clamp(min=1)
    half = len(lp) // 2
    if ld_alpha != 1 and LOSSES[loss].nll:
        options["chosen_nll"] = -lp[:half].sum() / n[:half].sum()
    s = (lp * tail_weights(targets, ld_alpha).to(lp.dtype)).sum(-1)
    return eager(
        s[:half], s[half:], ref[:half], ref[half:], loss=loss, beta=beta, label_smoothing=eps,
        chosen_lengths=n[:half], rejected_lengths=n[half:], **options,
    )  # fmt: skip


def truth_from_logits(logits, targets, ref, loss, beta, eps, ld_alpha=1.0, **options):
    b, t, v = logits.shape
    flat, y = logits.double().reshape(-1, v).numpy(), targets.reshape(-1).numpy()
    lp, _, _ = reference_logprobs.token_logprobs(flat, y)
    lp, n = lp.reshape(b, t), kept(targets)[1].clamp(min=1).numpy()
    h = b // 2
    tail = tail_weights(targets, ld_alpha).numpy()
    s, r = (lp * tail).sum(-1), ref.double().numpy()
    own_nll = ld_alpha != 1 and bool(LOSSES[loss].nll)
    if own_nll:
        options["chosen_nll"] = -lp[:h].sum() / n[:h].sum()
    out = reference.preference_loss(
        s[:h], s[h:], r[:h], r[h:], loss=loss, beta=beta, label_smoothing=eps,
        chosen_lengths=n[:h], rejected_lengths=n[h:], **options,
    )  # fmt: skip
    g = np.concatenate([out.d_chosen, out.d_rejected])[:, None] * tail
    if own_nll:
        g[:h] -= out.d_nll / n[:h].sum()
    return out, reference_logprobs.token_logprobs_gradient(flat, y, g.reshape(-1)).reshape(b, t, v)


# ---- autograd, compile, torch's own checks -----------------------------------------------------


def raw_arguments(
    lp, lengths=(None, None), others=(None,) * 5, loss_weights=None, beta=0.1, codes=(0,),
    by_length=(False,), reduction=2, want_ref=False, number=float,
):  # fmt: skip
    numbers = [number(v) for v in (beta, 0.1, 0.5, 0.5, 0.0, 0.05, 1.0, 1.0, 0.5, 0.0)]
    return (
        *lp, *lengths, *others, loss_weights, *numbers, list(codes), list(by_length), 0, True,
        reduction, want_ref,
    )  # fmt: skip
