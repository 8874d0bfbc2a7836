"""Losses from hidden states for the tests: inputs, the formulas in plain torch and in float64, the error rule
of products."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import finefuse as ff
import numpy as np
import torch
from finefuse import _linear_gradients, _linear_loss, _linear_preference
from finefuse.reference import linear as reference
from logprobs_cases import eager_stats
from tolerances import as_float64
from tolerances import check as check_one

F = torch.nn.functional
IGNORE = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("hidden", "weight", "bias")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 4.0},
    "both": {"softcap": 2.5, "temperature": 1.6},
}


class Case(NamedTuple):
    hidden: Any
    weight: Any
    bias: Any
    targets: Any


def make(rows, width, vocab, dtype=torch.float32, *, bias=True, ignore=True, spread=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    hidden = normal(rows, width).to(dtype)
    weight = (normal(vocab, width) * spread / math.sqrt(width)).to(dtype)
    b = normal(vocab).to(dtype) if bias else None
    targets = torch.randint(0, vocab, (rows,), generator=g)
    if ignore and rows > 1:
        targets[rows // 2 :: 4] = IGNORE
    return Case(hidden, weight, b, targets)


def spoilt(case, value=math.nan):
    """NaN in the rows that are ignored: nobody may read them."""
    return case._replace(hidden=case.hidden.masked_fill((case.targets == IGNORE)[:, None], value))


def head_of(weight, bias=None, softcap=None):
    return reference.Head(
        weight.detach().double().numpy(),
        None if bias is None else bias.detach().double().numpy(),
        softcap,
    )


def array(x):
    return x if x is None else x.detach().double().numpy()


# ---- the error rule --------------------------------------------------------------------------------


class Both(NamedTuple):
    """What plain torch gives with products summed up from either end."""

    one: Any
    other: Any


def check(name, ours, eager, truth, dtype=None, terms=None):
    """The error rule. A product's rounding is a library's, and in a handful of numbers luck: element by
    element the worse of two orders in which it may add is what ours is measured by."""
    if isinstance(eager, Both):
        one, other, t = (as_float64(x) for x in (*eager, truth))
        with np.errstate(invalid="ignore"):
            eager = np.where(np.abs(other - t) > np.abs(one - t), other, one)
    if terms is not None:
        terms = np.full(np.shape(truth), terms)
    check_one(name, ours, eager, truth, dtype, terms)


def in_both_orders(call):
    """[of results] Both, leaf by leaf; None where there is none."""
    global _from_the_end
    results = []
    try:
        for _from_the_end in (False, True):
            results.append(call())
    finally:
        _from_the_end = False
    return _paired(*results)


def _paired(a, b):
    if isinstance(a, (list, tuple)):
        return [_paired(x, y) for x, y in zip(a, b, strict=True)]
    return None if a is None else Both(a, b)


# ---- the formulas, in the type of their input ------------------------------------------------------


_from_the_end = False


def plain_logits(hidden, weight, bias=None, softcap=None):
    if _from_the_end:
        hidden, weight = hidden.flip(-1), weight.flip(-1)
    z = F.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain_stats(hidden, weight, targets, *, bias=None, softcap=None, temperature=1.0):
    return eager_stats(plain_logits(hidden, weight, bias, softcap), targets, temperature)


def plain_cross_entropy(
    hidden, weight, targets, *, bias=None, softcap=None, temperature=1.0, **options
):
    return F.cross_entropy(
        plain_logits(hidden, weight, bias, softcap) / temperature, targets, **options
    )


def ours_stats(*args, **options):
    return ff.linear_token_logprobs(*args, stats=True, **options)


def run(function, case, upstream, wanted=(True, True, True), device="cpu", **options):
    """(outputs, gradients of hidden, weight and bias; None where not wanted), back on the CPU."""
    leaves = [
        None if x is None else x.detach().to(device, copy=True).requires_grad_(w)
        for x, w in zip(case[:3], wanted, strict=True)
    ]
    out = function(leaves[0], leaves[1], case.targets.to(device), bias=leaves[2], **options)
    outputs = out if isinstance(out, tuple) else (out,)
    sum(
        (o * u.to(o)).sum() for o, u in zip(outputs, upstream, strict=True) if u is not None
    ).backward()
    gradients = [None if x is None or x.grad is None else x.grad.cpu() for x in leaves]
    return [o.detach().cpu() for o in outputs], gradients


def run_plain(*args, **options):
    return in_both_orders(lambda: run(*args, **options))


def truth_stats(case, softcap=None, temperature=1.0):
    return reference.token_logprobs(
        array(case.hidden), head_of(*case[1:3], softcap), case.targets.numpy(), temperature
    )


def truth_stats_gradients(case, upstream, softcap=None, temperature=1.0):
    zero = np.zeros(len(case.targets))
    g, h, l = (zero if u is None else array(u) for u in upstream)
    return reference.token_logprobs_gradients(
        array(case.hidden), head_of(*case[1:3], softcap), case.targets.numpy(), g, h, l, temperature
    )


def truth_cross_entropy(case, softcap=None, upstream=1.0, **options):
    return reference.cross_entropy(
        array(case.hidden), head_of(*case[1:3], softcap), case.targets.numpy(),
        upstream=array(upstream) if isinstance(upstream, torch.Tensor) else upstream, **options,
    )  # fmt: skip


def check_gradients(name, ours, eager, truth, cancels=False):
    """cancels: where sums may come to nothing, the scale is that of their absolute terms."""
    for i, (of, a, e, t) in enumerate(zip(NAMES, ours, eager, truth, strict=True)):
        if a is None:
            continue
        terms = truth.terms[i] if cancels else None
        check(f"{name}: d {of}", a, t if e is None else e, t, terms=terms)


def compare_stats(
    case, upstream=None, only=True, device="cpu", logits=None, cancels=False, **options
):
    """Values and gradients by the error rule; each output also by itself, so that no term hides another.

    logits: their type, where its tolerance counts.
    """
    g = torch.Generator().manual_seed(1)
    n = len(case.targets)
    upstream = upstream or [torch.randn(n, generator=g) for _ in range(3)]
    truth = truth_stats(case, **options)
    terms = None
    if cancels:  # differences of numbers as large as lse
        terms = 2 * np.abs(truth[2]).max(initial=0.0) + np.abs(truth[0]).max(initial=0.0)
    for ups in [upstream, *([u if i == j else None for j, u in enumerate(upstream)]
                            for i in range(3 if only else 0))]:  # fmt: skip
        ours, gradients = run(ours_stats, spoilt(case), ups, device=device, **options)
        eager, eager_gradients = run_plain(plain_stats, case, ups, **options)
        for name, a, e, t in zip(("lp", "entropy", "lse"), ours, eager, truth, strict=True):
            check(name, a, e, t, logits, terms)
        by = truth_stats_gradients(case, ups, **options)
        check_gradients("stats", gradients, eager_gradients, by, cancels)
        ignored = case.targets == IGNORE
        assert all((x[ignored] == 0).all() for x in (*ours, gradients[0]))


def compare_cross_entropy(case, factor=1.0, device="cpu", cancels=False, **options):
    none = options.get("reduction") == "none"
    g = torch.Generator().manual_seed(2)
    upstream = torch.randn(len(case.targets), generator=g) if none else torch.tensor(factor)
    (loss,), gradients = run(
        ff.linear_cross_entropy, spoilt(case), [upstream], device=device, **options
    )
    (eager,), eager_gradients = run_plain(plain_cross_entropy, case, [upstream], **options)
    truth, truth_gradients = truth_cross_entropy(case, upstream=upstream, **options)
    check("loss", loss, eager, truth)
    check_gradients("cross-entropy", gradients, eager_gradients, truth_gradients, cancels)
    ignored = case.targets == IGNORE
    assert (gradients[0][ignored] == 0).all()
    if none:
        assert (loss[ignored] == 0).all()


def use_chunks(patch, size):
    """`size` rows of logits exist at a time; returns the list of what will have been asked for."""
    counts = []

    def rows(count, *_):
        counts.append(count)
        return max(min(size, count), 1)

    for module in (_linear_gradients, _linear_preference):
        patch.setattr(module, "chunk_rows", rows)
    return counts


# ---- what has no gradient ----------------------------------------------------------------------


class Counts:
    """How often the driver takes a product for each gradient."""

    def __init__(self, monkeypatch):
        self.hidden = self.weight = 0
        add_outer, hidden_gradient = _linear_loss.add_outer, _linear_loss.Head.hidden_gradient

        def outer(*args):
            self.weight += 1
            return add_outer(*args)

        def by_hidden(*args):
            self.hidden += 1
            return hidden_gradient(*args)

        monkeypatch.setattr(_linear_loss, "add_outer", outer)
        monkeypatch.setattr(_linear_loss.Head, "hidden_gradient", by_hidden)


FUNCTIONS: list[tuple[Any, dict[str, Any]]] = [
    (ours_stats, {}),
    (ff.linear_token_logprobs, {"softcap": 3.0}),
    (ff.linear_cross_entropy, {"label_smoothing": 0.1}),
    (ff.linear_cross_entropy, {"reduction": "none", "softcap": 3.0}),
]


def upstream_of(function, options, rows):
    g = torch.Generator().manual_seed(4)
    if function is ff.linear_cross_entropy and "reduction" not in options:
        return [torch.tensor(1.0)]
    return [torch.randn(rows, generator=g) for _ in range(3 if function is ours_stats else 1)]


# ---- chunks, batches, threads ----------------------------------------------------------------------


def on_one_thread(function):
    def call(*args):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(threads)

    return call
