"""A problem for each loss from hidden states: ours, plain torch, float64; and how to compare them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import distill_cases
import finefuse as ff
import numpy as np
import policy_cases
import preference_cases
import torch
from finefuse.reference import linear as reference
from linear_cases import (
    IGNORE,
    array,
    check,
    check_gradients,
    head_of,
    in_both_orders,
    make,
    plain_logits,
)

METRICS = policy_cases.METRICS


class Problem(NamedTuple):
    """A loss of hidden (…, H), weight and bias, in three hands; rows not in `keep` are NaN for ours."""

    hidden: Any
    weight: Any
    bias: Any
    keep: Any
    ours: Callable[..., Any]  # (hidden, weight, bias, **more) -> what the public function returns
    plain: Callable[..., Any]  # (hidden, weight, bias) -> loss
    truth: Callable[
        ..., Any
    ]  # (weight, upstream) -> (loss, gradients, Σ of absolute terms, output)

    def spoilt(self, value=math.nan):
        return self.hidden.masked_fill(~self.keep[..., None], value)


def on(device, options):
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in options.items()}


def numpy(options):
    return {
        k: x.double().numpy() if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x.numpy() if isinstance(x, torch.Tensor) else x
        for k, x in options.items()
    }  # fmt: skip


def policy(dtype=torch.float32, shape=(3, 5), width=9, vocab=40, seed=0, *, softcap=None, bias=True,
           by="mask", options="plain", loss="ppo", temperature=1.0, entropy_coef=0.0, **more):  # fmt: skip
    case = make(math.prod(shape), width, vocab, dtype, bias=bias, ignore=False, seed=seed)
    hidden, actions = case.hidden.view(*shape, width), case.targets.view(shape)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    given_options = dict(policy_cases.OPTIONS[options])
    v = policy_cases.vectors(*shape, wide, seed, by_token=bool(given_options.get("by_token")))
    head = head_of(case.weight, case.bias, softcap)
    lp = reference.token_logprobs(array(case.hidden), head, case.targets.numpy(), temperature)[0]
    noise = v.old - v.lp, v.ref - v.lp
    v.old, v.ref = ((torch.from_numpy(lp).view(shape) + n).to(wide) for n in noise)
    kwargs = {
        **policy_cases.arguments(v, given_options), "loss": loss, "temperature": temperature,
        "entropy_coef": entropy_coef, **more,
    }  # fmt: skip

    def ours(h, w, b, **changed):
        given_here = {
            "softcap": softcap, "advantages": v.advantages, **kwargs, **changed, "actions": actions,
        }  # fmt: skip
        if by == "actions":
            given_here["actions"] = actions.masked_fill(~given_here.pop("mask"), IGNORE)
        given_here = on(h.device, given_here)
        return ff.linear_policy_loss(h, w, given_here.pop("actions"), bias=b, **given_here)

    def plain(h, w, b):
        z = plain_logits(h, w, b, softcap)
        return policy_cases.eager_from_logits(z, actions, v.advantages, **kwargs)

    def truth(weight, upstream=None):
        loss, entropy, gradients, out = reference.policy_loss(
            array(case.hidden), head_of(weight, case.bias, softcap), actions.numpy(),
            array(v.advantages), upstream=upstream, **numpy(kwargs),
        )  # fmt: skip
        return loss, gradients, out.terms, (out, entropy)

    return Problem(hidden, case.weight, case.bias, v.mask, ours, plain, truth)


def preference(dtype=torch.float32, pairs=2, tokens=5, width=9, vocab=40, seed=0, *, softcap=None,
               bias=True, ref="logprobs", temperature=1.0, loss="sigmoid", beta=0.3, eps=0.0,
               ld_alpha=None, **more):  # fmt: skip
    shape = (2 * pairs, tokens)
    case = make(math.prod(shape), width, vocab, dtype, bias=bias, ignore=False, seed=seed)
    hidden = case.hidden.view(*shape, width)
    _, targets, ref_logprobs = preference_cases.batch(pairs, tokens, vocab, dtype, seed)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    other = make(math.prod(shape), 6, vocab, dtype, ignore=False, seed=seed + 1)
    ref_hidden = other.hidden.view(*shape, 6) if ref == "own head" else hidden + 0.1
    keep = targets != IGNORE
    lengths = preference_cases.kept(targets)[1]
    if ref == "logprobs":
        refs = {"ref_logprobs": ref_logprobs.to(wide)}
    elif ref == "none":
        refs = {}
    else:
        refs = {"ref_hidden": ref_hidden.masked_fill(~keep[..., None], math.nan)}
        if ref == "own head":
            refs |= {"ref_weight": other.weight, "ref_bias": other.bias}
    options = {"loss": loss, "beta": beta, **more}

    def ours(h, w, b, **changed):
        given_here = {
            **refs, **options, "label_smoothing": eps, "temperature": temperature, "softcap": softcap,
            "ld_alpha": ld_alpha, **changed,
        }  # fmt: skip
        return ff.linear_preference_loss(
            h, w, targets.to(h.device), bias=b, **on(h.device, given_here)
        )

    def plain(h, w, b):
        z = plain_logits(h, w, b, softcap) / temperature
        if ref in ("logprobs", "none"):
            r = ref_logprobs if ref == "logprobs" else torch.zeros(2 * pairs)
        else:
            with torch.no_grad():
                rw, rb = (other.weight, other.bias) if ref == "own head" else (w, b)
                rz = plain_logits(ref_hidden, rw, rb, softcap) / temperature
                lp = rz.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
                lp = torch.where(keep, lp, 0)
                if ld_alpha is not None:
                    lp = lp * preference_cases.tail_weights(targets, ld_alpha).to(lp.dtype)
                r = lp.sum(-1)
        return preference_cases.eager_from_logits(
            z, targets, r.to(dtype), loss, beta, eps, 1.0 if ld_alpha is None else ld_alpha, **more
        )

    def truth(weight, upstream=None):
        head = head_of(weight, case.bias, softcap)
        given_here = dict(more)
        if ref == "logprobs":
            given_here["ref_logprobs"] = array(ref_logprobs)
        elif ref != "none":
            given_here["ref_hidden"] = array(ref_hidden).reshape(-1, ref_hidden.shape[-1])
            own = head_of(other.weight, other.bias, softcap)
            given_here["ref_head"] = own if ref == "own head" else head
        out, gradients = reference.preference_loss(
            array(case.hidden), head, targets.numpy(), temperature=temperature, loss=loss, beta=beta,
            label_smoothing=eps, ld_alpha=1.0 if ld_alpha is None else ld_alpha, upstream=upstream,
            **numpy(given_here),
        )  # fmt: skip
        return out.loss, gradients, out.terms, out

    assert lengths.max() > 1
    return Problem(hidden, case.weight, case.bias, keep, ours, plain, truth)


def distill(dtype=torch.float32, shape=(3, 5), width=9, vocab=40, seed=0, *, softcap=None, bias=True,
            teacher_dtype=None, teacher_softcap=None, mask=True, targets=False, extra=(0, 0),
            **options):  # fmt: skip
    rows = math.prod(shape)
    # the student's head may have more rows than the teacher's, or fewer; vocab of them are shared
    case = make(rows, width, vocab + extra[0], dtype, bias=bias, seed=seed, ignore=False)
    other = make(rows, 6, vocab + extra[1], teacher_dtype or dtype, seed=seed + 1, ignore=False)
    hidden, teacher = case.hidden.view(*shape, width), other.hidden.view(*shape, 6)
    keep = torch.ones(shape, dtype=torch.bool)
    given_options = dict(options)
    if mask:
        keep.view(-1)[1::4] = False
        given_options["mask"] = keep.clone()
    if targets:
        y = case.targets.view(shape) % vocab
        y.view(-1)[3::7] = IGNORE
        given_options["targets"] = y
        keep = keep & (y != IGNORE)
    if extra != (0, 0):
        given_options["vocab_size"] = vocab

    def ours(h, w, b, **changed):
        given_here = {
            "softcap": softcap,
            "teacher_softcap": teacher_softcap,
            **given_options,
            **changed,
        }
        return ff.linear_distill_loss(
            h, w, teacher.masked_fill(~keep[..., None], math.nan).to(h.device), other.weight.to(h.device),
            student_bias=b, **on(h.device, {"teacher_bias": other.bias, **given_here}),
        )  # fmt: skip

    def plain(h, w, b):
        return distill_cases.plain(
            plain_logits(h, w, b, softcap),
            plain_logits(teacher, other.weight, other.bias, teacher_softcap), **given_options,
        )  # fmt: skip

    def truth(weight, upstream=None):
        flat = {
            k: x.reshape(-1).numpy() if isinstance(x, torch.Tensor) else x
            for k, x in given_options.items()
        }
        loss, gradients = reference.distill_loss(
            array(case.hidden), head_of(weight, case.bias, softcap), array(other.hidden),
            head_of(other.weight, other.bias, teacher_softcap),
            upstream=1.0 if upstream is None else upstream.reshape(-1), **flat,
        )  # fmt: skip
        loss = loss.reshape(shape) if loss.ndim else loss
        return loss, gradients, float(np.abs(loss).sum()), None

    return Problem(hidden, case.weight, case.bias, keep, ours, plain, truth)


# One of each way through the code: gradients in the forward and in the backward, with and without what a
# family has beside the log-probabilities.
PROBLEMS: dict[str, Callable[..., Problem]] = {
    "policy": lambda dtype=torch.float32, **k: policy(
        dtype, options="kl", entropy_coef=0.02, temperature=0.8, **k
    ),
    "policy of actions": lambda dtype=torch.float32, **k: policy(
        dtype, loss="grpo", by="actions", softcap=3.0, **k
    ),
    "policy of sequences": lambda dtype=torch.float32, **k: policy(
        dtype, loss="gspo", entropy_coef=0.01, softcap=4.0, **k
    ),
    "policy of tokens": lambda dtype=torch.float32, **k: policy(
        dtype, reduction="none", options="k2", entropy_coef=0.1, **k
    ),
    "preference": lambda dtype=torch.float32, **k: preference(dtype, temperature=0.8, **k),
    "preference with a reference": lambda dtype=torch.float32, **k: preference(
        dtype, ref="own head", softcap=3.0, **k
    ),
    "preference, one head": lambda dtype=torch.float32, **k: preference(
        dtype, ref="same head", loss="ipo", **k
    ),
    "preference with an NLL": lambda dtype=torch.float32, **k: preference(
        dtype, ref="none", loss="orpo", **k
    ),
    "preference, short tails": lambda dtype=torch.float32, **k: preference(dtype, ld_alpha=0.4, **k),
    "preference, sorted": lambda dtype=torch.float32, **k: preference(dtype, loss="aot", **k),
    "preference of pairs": lambda dtype=torch.float32, **k: preference(
        dtype, loss="robust", eps=0.1, reduction="none", **k
    ),
    "distill": lambda dtype=torch.float32, **k: distill(
        dtype, temperature=1.4, teacher_softcap=5.0, **k
    ),
    "distill and cross-entropy": lambda dtype=torch.float32, **k: distill(
        dtype, kind="jsd", alpha=0.4, targets=True, softcap=3.0, **k
    ),
    "distill of rows": lambda dtype=torch.float32, **k: distill(
        dtype, kind="reverse_kl", reduction="none", **k
    ),
}  # fmt: skip


def loss_of(out):
    return getattr(out, "loss", out)


def upstream_of(loss, seed=5):
    """None of a scalar, else a number for each."""
    if loss.ndim == 0:
        return None
    g = torch.Generator().manual_seed(seed)
    return torch.randn(loss.shape, generator=g)


def differentiate(
    function, hidden, weight, bias, wanted=(True, True, True), factor=None, device="cpu"
):
    """(what it returned, its gradients, upstream)."""
    leaves = [
        x if x is None else x.to(device) if isinstance(x, ff.CodebookTensor)
        else x.detach().to(device, copy=True).requires_grad_(w)
        for x, w in zip((hidden, weight, bias), wanted, strict=True)
    ]  # fmt: skip
    out = function(*leaves)
    loss = loss_of(out)
    up = upstream_of(loss)
    value = loss if up is None else (loss * up.to(loss)).sum()
    (value if factor is None else value * factor).backward()
    grads = [None if x is None or x.grad is None else x.grad.cpu() for x in leaves]
    return out, grads, up


def plainly(problem, weight=None):
    """(loss, gradients in the shapes of the truth) of plain torch."""

    def call():
        w = problem.weight if weight is None else weight
        loss, gradients, _ = differentiate(problem.plain, problem.hidden, w, problem.bias)
        of_hidden = gradients[0].reshape(-1, gradients[0].shape[-1])
        return loss.detach(), [of_hidden, *gradients[1:]]

    return in_both_orders(call)


def check_loss(ours, eager, truth, terms):
    """A sum that may cancel: the scale is that of its absolute terms."""
    check("loss", ours, eager, truth, terms=None if np.ndim(truth) else terms)


def compare(problem, weight=None, dense=None, device="cpu", cancels=False):
    """Loss and gradients by the error rule; `weight` in place of the problem's, the one that `dense` is."""
    dense = problem.weight if dense is None else dense
    out, ours, up = differentiate(
        problem.ours, problem.spoilt(), problem.weight if weight is None else weight, problem.bias,
        device=device,
    )  # fmt: skip
    eager, theirs = plainly(problem, dense.to(problem.weight.dtype))
    loss, truth, terms, output = problem.truth(dense, array(up))
    check_loss(loss_of(out).detach().cpu(), eager, loss, terms)
    flat = [x if x is None else x.reshape(t.shape) for x, t in zip(ours, truth, strict=True)]
    check_gradients("loss", flat, theirs, truth, cancels)
    assert ours[0] is not None
    assert (ours[1] is None) == (weight is not None)
    assert (ours[0][~problem.keep] == 0).all()
    return out, output


def of_five(tokens=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(4, tokens, 8, generator=g).to(dtype)
    w = (torch.randn(30, 8, generator=g) / 2).to(dtype)
    return h, w, torch.randint(30, (4, tokens), generator=g)
