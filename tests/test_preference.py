"""Preference losses against float64: from log-probabilities and from logits."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args.preference import DIVERGENCES
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from finefuse.reference import logprobs as reference_logprobs
from finefuse.reference import preference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ScalarErrors, check

RAW = torch.ops.finefuse
IGNORE = -100
F = torch.nn.functional
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


def test_every_loss_has_a_reference():
    for name in LOSSES:
        out = reference.preference_loss(
            np.array([-1.0]), np.array([-2.0]), loss=name, label_smoothing=0.1
        )
        assert np.isfinite(out.loss), name


# 1: a sum of one, in float64, where it shows; 7: odd, in both types; 1024: a long sum, of rounded inputs. A
# kernel computes in float64 whatever the type, so that not all lengths need both.
@pytest.mark.parametrize(
    ("pairs", "dtype"),
    [(1, torch.float64), (7, torch.float32), (7, torch.float64), (1024, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(isa, loss, pairs, dtype):
    lp, (n_w, n_l) = vectors(pairs, dtype)
    kl = torch.randn(3, dtype=dtype) + 2
    for beta, eps, refs, reduction in (
        (0.1, 0.0, True, "mean"), (0.5, 0.1, True, "sum"), (2.0, 0.3, False, "none"),
        (0.2, 0.2, True, "none"),
    ):  # fmt: skip
        compare(
            lp, reduction, refs=refs, loss=loss, beta=beta, label_smoothing=smoothing(loss, eps),
            chosen_lengths=n_w, rejected_lengths=n_l, kl=kl, **NUMBERS,
        )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_scalar_over_seeds(loss):
    errors = ScalarErrors(loss, torch.float32)
    for seed in range(32):
        lp, (n_w, n_l) = vectors(16, seed=seed)
        eps = smoothing(loss, 0.1)
        n = {"chosen_lengths": n_w, "rejected_lengths": n_l}
        ours = ff.preference_loss(*lp, loss=loss, label_smoothing=eps, **n).loss
        e = eager(*lp, loss=loss, label_smoothing=eps, **n)
        t = reference.preference_loss(
            *(x.double().numpy() for x in lp), loss=loss, label_smoothing=eps,
            **{k: v.numpy() for k, v in n.items()},
        )  # fmt: skip
        errors.add(ours, e, float(t.loss), t.terms)
    errors.check()


@pytest.mark.parametrize("normalize_lengths", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_normalize_lengths(loss, normalize_lengths):
    """True: every loss divides. False: none does, and the NLL is a sequence's."""
    lp, (n_w, n_l) = vectors(9, torch.float64)
    n = {"chosen_lengths": n_w, "rejected_lengths": n_l} if normalize_lengths else {}
    for reduction in ("mean", "none"):
        compare(
            lp, reduction, loss=loss, label_smoothing=0.1, normalize_lengths=normalize_lengths, **n,
            **NUMBERS,
        )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lists(isa, dtype, reduction):
    """A weighted sum, in one call, is the sum of the losses."""
    lp, (n_w, n_l) = vectors(13, dtype)
    names = ["sigmoid", "aot", "sft", "ipo", "orpo", "aot_unpaired", "slic", "sigmoid"]
    weights = [0.8, 1.5, -0.25, 0.01, 2.0, 0.5, 0.3, 0.1]
    if reduction != "none":
        names, weights = [*names, "kto", "apo_zero_unpaired"], [*weights, 0.7, 1.3]
    n = {"chosen_lengths": n_w, "rejected_lengths": n_l}
    compare(
        lp, reduction, loss=names, loss_weights=weights, label_smoothing=0.1, **n, **NUMBERS,
    )  # fmt: skip
    compare(lp, reduction, loss=names, label_smoothing=0.1, **n, **NUMBERS)
    tensors = [torch.tensor(w) for w in weights]
    a = ff.preference_loss(*lp, loss=tuple(names), loss_weights=tensors, reduction=reduction, **n)
    b = ff.preference_loss(
        *lp, loss=names, loss_weights=[t.item() for t in tensors], reduction=reduction, **n
    )
    assert torch.equal(a.loss, b.loss)
    one = ff.preference_loss(*lp, loss=["hinge"], loss_weights=[1], reduction=reduction)
    assert torch.equal(one.loss, ff.preference_loss(*lp, loss="hinge", reduction=reduction).loss)
    if reduction == "none":
        both = ff.preference_loss(*lp, loss=UNPAIRED, loss_weights=[0.5, 2], reduction="none").loss
        parts = [ff.preference_loss(*lp, loss=x, reduction="none").loss.double() for x in UNPAIRED]
        want = 0.5 * parts[0] + 2 * parts[1]
        check("unpaired", both, want, want)


@pytest.mark.parametrize("loss", LOSSES)
def test_pair_weights(isa, loss):
    lp, (n_w, n_l) = vectors(9)
    count = 18 if LOSSES[loss].unpaired else 9
    weights = torch.rand(count, generator=torch.Generator().manual_seed(3))
    weights[2] = 0
    for reduction in ("mean", "sum", "none"):
        compare(
            lp, reduction, loss=loss, label_smoothing=0.1, pair_weights=weights,
            chosen_lengths=n_w, rejected_lengths=n_l, **NUMBERS,
        )  # fmt: skip
    wanted = weights.clone().requires_grad_()
    out = ff.preference_loss(
        *lp, loss=loss, label_smoothing=0.1, pair_weights=wanted, normalize_lengths=False
    )
    assert not out.loss.requires_grad


@pytest.mark.parametrize("f_divergence", DIVERGENCES)
@pytest.mark.parametrize("loss", DIVERGING)
def test_f_divergence(isa, loss, f_divergence):
    cases = [(torch.float32, 0.5, "mean", None), (torch.float64, 1.3, "none", True)]
    if f_divergence == "alpha":  # the others do not read it
        cases.append((torch.float64, 1.0, "mean", True))
    for dtype, alpha, reduction, normalize in cases:
        lp, (n_w, n_l) = vectors(11, dtype, scale=4.0)
        compare(
            lp, reduction, loss=loss, label_smoothing=0.1, f_divergence=f_divergence, alpha=alpha,
            chosen_lengths=n_w, rejected_lengths=n_l, normalize_lengths=normalize,
        )  # fmt: skip


def test_f_divergence_of_huge_ratios():
    """Exponents stop at 80, where the gradient does, too: no inf - inf."""
    huge = torch.tensor([1e4, -1e4, -81.0, -79.0], dtype=torch.float64)
    for f_divergence, alpha in (("forward_kl", 0.5), ("alpha", 0.5), ("alpha", 2.0)):
        w, l = huge.clone().requires_grad_(), huge.flip(0).clone().requires_grad_()
        options = {"f_divergence": f_divergence, "alpha": alpha, "beta": 1e-3}
        out = ff.preference_loss(w, l, reduction="none", **options)
        out.loss.sum().backward()
        t = reference.preference_loss(
            huge.numpy(), huge.flip(0).numpy(), reduction="none", **options
        )
        for name, a, b in (
            ("loss", out.loss, t.loss), ("d w", w.grad, t.d_chosen), ("d l", l.grad, t.d_rejected),
        ):  # fmt: skip
            assert torch.isfinite(a).all()
            check(name, a, b, b)
    near = ff.preference_loss(huge * 1e-4, huge * 0, f_divergence="alpha", alpha=1 + 1e-12).loss
    assert near.item() == pytest.approx(ff.preference_loss(huge * 1e-4, huge * 0).loss.item())


@pytest.mark.parametrize("counts", [(3, 5), (5, 3), (0, 4), (4, 0), (1, 700)], ids=str)
@pytest.mark.parametrize("loss", UNPAIRED)
def test_unpaired_numbers(isa, loss, counts):
    lp = [vectors(n, torch.float64, seed)[0][0] for seed, n in enumerate(counts * 2)]
    kl = torch.tensor([[0.5, 2.0], [-0.25, 1.0]], dtype=torch.float64)
    weights = torch.rand(sum(counts), dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        for weighted in (None, weights):
            out = compare(
                lp, reduction, loss=loss, beta=0.3, kl=kl, pair_weights=weighted,
                desirable_weight=1.5, undesirable_weight=0.6,
            )  # fmt: skip
        assert out.margins.shape == ()
        assert out.loss.shape == ((sum(counts),) if reduction == "none" else ())
    both = ff.preference_loss(*lp, loss=UNPAIRED).loss
    parts = sum(ff.preference_loss(*lp, loss=x).loss for x in UNPAIRED)
    check("sum", both, parts, parts)


def test_kl():
    lp, _ = vectors(4, torch.float64)
    kl = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss = "kto"
    z = ff.preference_loss(*lp, loss=loss, kl=kl).loss
    assert not z.requires_grad
    assert torch.equal(z, ff.preference_loss(*lp, loss=loss, kl=kl.new_ones(7)).loss)
    none = ff.preference_loss(*lp, loss=loss).loss
    assert not torch.equal(z, none)
    for low in (-kl.detach(), kl.new_zeros(0), kl.new_zeros(())):  # at least 0
        assert torch.equal(none, ff.preference_loss(*lp, loss=loss, kl=low).loss)
    assert torch.isnan(ff.preference_loss(*lp, loss=loss, kl=kl * torch.nan).loss)
    # of no consequence to the others
    assert torch.equal(ff.preference_loss(*lp, kl=kl).loss, ff.preference_loss(*lp).loss)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_aot_sorts(loss):
    g = torch.Generator().manual_seed(1)
    lp = [torch.randint(-3, 0, (40,), generator=g).double() for _ in range(4)]  # many ties
    for reduction in ("mean", "none"):
        compare(lp, reduction, loss=loss, beta=0.7)
    # the pairs' order is of no consequence, and for aot_unpaired neither is who belongs to whom
    lp = vectors(40, torch.float64)[0]
    out = ff.preference_loss(*lp, loss=loss, reduction="none").loss
    p = torch.randperm(40, generator=g)
    q = torch.randperm(40, generator=g) if loss == "aot_unpaired" else p
    shuffled = (lp[0][p], lp[1][q], lp[2][p], lp[3][q])
    assert torch.equal(out, ff.preference_loss(*shuffled, loss=loss, reduction="none").loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", HAVE_NLL)
def test_chosen_nll(isa, loss, reduction):
    for dtype, shape in ((torch.float32, ()), (torch.float64, (1,))):
        lp, (n_w, n_l) = vectors(6, dtype)
        for n in ((n_w, n_l), (torch.ones(6), torch.ones(6))):
            nll = torch.full((), 1.7, dtype=dtype)
            compare(
                lp, reduction, nll=nll, loss=loss, chosen_lengths=n[0], rejected_lengths=n[1],
                **NUMBERS,
            )  # fmt: skip
        nll = torch.full(shape, 1.7, dtype=torch.float64, requires_grad=True)
        given = {"chosen_lengths": n_w, "rejected_lengths": n_l} if divides(loss) else {}
        ff.preference_loss(*lp, loss=loss, chosen_nll=nll, **given, **NUMBERS).loss.backward()
        assert nll.grad.item() == pytest.approx(1 if loss in ("sft", "orpo") else 0.7)
        assert nll.grad.shape == shape


def test_values_by_hand():
    """Small numbers, worked out by hand."""
    log2, t = math.log(2), torch.tensor
    w, l, ref_w, ref_l = t([-1.0, -2.0]), t([-3.0, -2.0]), t([-2.0, -2.0]), t([-2.0, -2.0])
    zero = t([0.0, 0.0])

    def close(out, want):
        loss = out if isinstance(out, torch.Tensor) else out.loss
        assert loss.tolist() == pytest.approx(want, rel=1e-6, abs=1e-9)

    n = {"reduction": "none"}
    # d = 2 and 0; β = 0.5: ln(1 + e^{-1}) and ln 2
    close(ff.dpo_loss(w, l, ref_w, ref_l, beta=0.5, **n), [0.3132616875, log2])
    close(ff.spin_loss(w, l, ref_w, ref_l, beta=0.5, **n), [0.3132616875, log2])
    # ε = 0.1: 0.9·0.31326 + 0.1·1.31326
    close(ff.dpo_loss(w, l, ref_w, ref_l, beta=0.5, label_smoothing=0.1, **n), [0.4132616875, log2])
    # (2 - 1)² and (0 - 1)²; with lengths 2 and 4: (1/2 + 1/4 - 1)²
    close(ff.ipo_loss(w, l, ref_w, ref_l, beta=0.5, normalize_lengths=False, **n), [1.0, 1.0])
    lengths = {"chosen_lengths": t([2, 2]), "rejected_lengths": t([4, 4])}
    close(ff.ipo_loss(w, l, ref_w, ref_l, beta=0.5, **lengths, **n), [0.0625, 1.0])
    # β = 2, γ = 0.5: x = 2(-1/2 + 3/4) - 0.5 = 0 and 2(-1 + 1/2) - 0.5 = -1.5
    close(ff.simpo_loss(w, l, beta=2.0, gamma=0.5, **lengths, **n), [log2, 1.7014132780])
    # d = 2 and 0, λ = 0.5, NLL = 3/4
    cpo = ff.cpo_loss(w, l, beta=0.5, sft_weight=0.5, chosen_lengths=t([2, 2]), **n)
    close(cpo, [0.3132616875 + 0.375, log2 + 0.375])
    # a = ln ½ and ln ¼: odds 1 and 1/3; -L(ln 3) = ln(4/3); NLL = ln 2
    half = t([math.log(0.5)])
    orpo = {"chosen_lengths": t([1]), "rejected_lengths": t([2])}
    close(ff.orpo_loss(half, 4 * half, beta=1.0, **orpo), log2 + math.log(4 / 3))
    # r = (1, 0), (-1, 0), z = ½, β = 2: 1 - S(1), 1 - S(-1), 1 - S(3), 1 - S(1)
    kto = ff.kto_loss(w, l, ref_w, ref_l, beta=2.0, kl=t([0.25, 0.75]), **n)
    close(kto, [0.2689414214, 0.7310585786, 0.0474258732, 0.2689414214])
    # x = 0: ln 2 + 0.1·16, and x = -1
    close(ff.reward_loss(t([2.0]), t([2.0]), center_coef=0.1), log2 + 1.6)
    close(ff.reward_loss(t([2.0]), t([2.0]), margin=1.0), 1.3132616875)

    def family(loss, **options):
        return ff.preference_loss(w, l, ref_w, ref_l, loss=loss, beta=0.5, **options, **n)

    s, L1, Lm1 = 1 / (1 + math.exp(-0.5)), -0.3132616875, -1.3132616875  # S(½), L(1), L(-1)
    half, other = math.log(s), math.log(1 - s)  # L(½), L(-½)
    close(family("hinge"), [0.0, 1.0])
    close(family("robust", label_smoothing=0.1), [(-0.9 * L1 + 0.1 * Lm1) / 0.8, log2])
    p = 0.7310585786
    exo = p * (L1 - math.log(0.75)) + (1 - p) * (Lm1 - math.log(0.25))
    close(family("exo_pair", label_smoothing=0.25), [exo, -log2 - math.log(0.1875) / 2])
    close(family("nca_pair"), [-half - 0.5 * other - 0.5 * half, 2 * log2])
    close(family("bco_pair"), [-2 * half, 2 * log2])
    close(family("bco_pair", delta=0.5), [log2 - L1, -half - other])
    close(family("sppo_hard"), [0.0, 2.0])
    close(family("aot"), [log2, 0.3132616875])  # sorted: 0 and 2
    close(family("aot_unpaired"), [math.log(1 + math.exp(-0.5))] * 2)  # (0, 1) - (-1, 0)
    close(family("apo_zero"), [2 - 2 * s, 1.0])
    close(family("apo_down"), [s + 1 - p, 1.0])
    close(family("apo_zero_unpaired"), [1 - s, 0.5, 1 - s, 0.5])
    m = 1 / (1 + math.exp(-2))  # x = 1, τ = ½
    disco = (1 - m) * 0.3132616875 + m * math.exp(-1)
    close(family("discopop", tau=0.5), [disco, 0.5 * log2 + 0.5])
    close(family("sigmoid_norm", **lengths), [math.log(1 + math.exp(-0.375)), log2])
    close(family("sft", **lengths), [0.75, 0.75])
    close(family("slic"), [0.0, 0.5])
    close(ff.preference_loss(w, l, zero, zero, loss="slic", beta=3.0, **n), [1.0, 3.0])


def test_margin_is_not_rounded():
    """A number beside rewards of 16 bits keeps its own."""
    zero = torch.zeros(3, dtype=torch.bfloat16)
    out = ff.reward_loss(zero, zero, margin=0.3)
    truth = np.log1p(np.exp(0.3))
    check("margin", out, truth, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pairs", [0, 1, 7])
def test_reward_loss(isa, pairs, dtype):
    g = torch.Generator().manual_seed(0)
    for reduction, center, margins in (
        ("mean", 0.0, False),
        ("sum", 0.3, True),
        ("none", 0.3, True),
    ):
        w, l, m = (torch.randn(pairs, generator=g).to(dtype) for _ in range(3))
        given = [[x.clone().requires_grad_() for x in (w, l, m)] for _ in range(2)]
        upstream = torch.randn((pairs,) if reduction == "none" else (), generator=g).to(dtype)
        out = ff.reward_loss(
            *given[0][:2], margin=given[0][2] if margins else None, center_coef=center,
            reduction=reduction,
        )  # fmt: skip
        out.backward(upstream)
        a, b, c = given[1]
        e = -F.logsigmoid(a - b - (c if margins else 0)) + center * (a + b) ** 2
        if pairs:
            e = e if reduction == "none" else getattr(e, reduction)()
            e.backward(upstream)
        w, l, m = (x.double().numpy() for x in (w, l, m))
        t = reference.reward_loss(
            w, l, m if margins else 0.0, center, reduction,
            upstream.double().numpy() if reduction == "none" else None,
        )  # fmt: skip
        check("loss", out, e if pairs else t[0], t[0])
        scale = 1 if reduction == "none" else upstream.item()
        for x, y, truth in zip(*given, t[1:], strict=True):
            if x.grad is not None:
                check(
                    "gradient", x.grad, scale * truth if y.grad is None else y.grad, scale * truth
                )
    x = torch.randn(2, 3)
    assert ff.reward_loss(x, x, reduction="none").shape == (2, 3)
    number = ff.reward_loss(x, x, margin=0.5)
    assert torch.equal(number, ff.reward_loss(x, x, margin=torch.full((2, 3), 0.5)))


def test_named_doors():
    lp, (n_w, n_l) = vectors(6)
    n = {"chosen_lengths": n_w, "rejected_lengths": n_l}
    weights = torch.rand(6)
    for door, loss, free, options in (
        (ff.dpo_loss, "sigmoid", False, {"label_smoothing": 0.1, "f_divergence": "js"}),
        (ff.dpo_loss, "sigmoid", True, {}),
        (ff.ipo_loss, "ipo", False, n),
        (ff.ipo_loss, "ipo", False, {"normalize_lengths": False}),
        (ff.spin_loss, "spin", False, {}),
        (ff.orpo_loss, "orpo", True, n),
        (ff.orpo_loss, "orpo", True, {**n, "chosen_nll": torch.tensor(0.5)}),
        (ff.simpo_loss, "simpo", True, {**n, "gamma": 1.0, "sft_weight": 0.5}),
        (ff.cpo_loss, "cpo", True, {"sft_weight": 0.5, "chosen_lengths": n_w}),
        (ff.cpo_loss, "cpo", True, {"sft_weight": 0.5, "chosen_nll": torch.tensor(0.5)}),
        (ff.kto_loss, "kto", False, {"kl": torch.ones(2), "desirable_weight": 2.0}),
    ):
        given = lp[:2] if free else lp
        if loss != "kto":
            options = {**options, "pair_weights": weights}
        for reduction in ("mean", "none"):
            a = door(*given, beta=0.3, reduction=reduction, **options)
            b = ff.preference_loss(*given, loss=loss, beta=0.3, reduction=reduction, **options)
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y)


def test_losses_without_a_reference():
    """They do not read a given one; the rewards do."""
    lp, (n_w, n_l) = vectors(5)
    for loss in ("cpo", "simpo", "slic", "orpo", "sft"):
        n = {"chosen_lengths": n_w, "rejected_lengths": n_l}
        x = [v.clone().requires_grad_() for v in lp]
        a = ff.preference_loss(*x, loss=loss, **n)
        b = ff.preference_loss(*lp[:2], loss=loss, **n)
        assert torch.equal(a.loss, b.loss)
        a.loss.backward()
        assert not x[2].grad.any()
        assert not x[3].grad.any()
        assert torch.equal(a.margins, ff.preference_loss(*lp).margins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_and_mixed_types(dtype):
    """16-bit log-probabilities are widened exactly; one float64 makes it all float64."""
    lp, (n_w, n_l) = vectors(9, dtype)
    wide = [x.float() for x in lp]
    a = ff.preference_loss(*lp, loss="ipo", chosen_lengths=n_w, rejected_lengths=n_l.float())
    b = ff.preference_loss(*wide, loss="ipo", chosen_lengths=n_w, rejected_lengths=n_l)
    assert a.loss.dtype is torch.float32
    assert torch.equal(a.loss, b.loss)
    x = lp[0].clone().requires_grad_()
    mixed = ff.preference_loss(x, wide[1], wide[2].double(), wide[3]).loss
    assert mixed.dtype is torch.float64
    mixed.backward()
    assert x.grad.dtype is dtype


def test_any_shape():
    lp, _ = vectors(6)
    flat = ff.preference_loss(*lp, reduction="none")
    shaped = [v.view(2, 3).t() for v in lp]
    out = ff.preference_loss(*shaped, reduction="none")
    assert torch.equal(out.loss, flat.loss.view(2, 3).t())
    assert torch.equal(out.margins, flat.margins.view(2, 3).t())
    x = shaped[0].clone().requires_grad_()
    ff.preference_loss(x, *shaped[1:], reduction="none").loss.sum().backward()
    y = lp[0].clone().requires_grad_()
    ff.preference_loss(y, *lp[1:], reduction="none").loss.sum().backward()
    assert torch.equal(x.grad, y.grad.view(2, 3).t())


def test_gradient_of_the_reference():
    lp, _ = vectors(5, torch.float64)
    x = [v.clone().requires_grad_() for v in lp]
    ff.preference_loss(*x).loss.backward()
    assert torch.equal(x[2].grad, -x[0].grad)
    assert torch.equal(x[3].grad, -x[1].grad)


def test_extremes():
    inf = float("inf")
    big = torch.tensor([1e30, -1e30, 0.0, -inf, 3.0])
    zero = torch.zeros(5)
    out = ff.preference_loss(big, zero, reduction="none")
    assert out.loss[0] == 0
    assert out.loss[1] == pytest.approx(1e29)
    assert out.loss[2] == pytest.approx(np.log(2))
    assert out.loss[3] == inf
    assert (
        ff.preference_loss(zero, -torch.full((5,), inf), reduction="none").loss.tolist() == [0] * 5
    )
    empty = torch.zeros(0, requires_grad=True)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        out = ff.preference_loss(empty, empty, reduction=reduction)
        assert out.loss.shape == shape
        assert out.loss.sum() == 0
        assert out.accuracy == 0
        out.loss.sum().backward()
    # strided vectors
    lp, _ = vectors(8)
    a = ff.preference_loss(lp[0][::2], lp[1][::2], lp[2][::2], lp[3][::2])
    b = ff.preference_loss(*(x[::2].contiguous() for x in lp))
    assert torch.equal(a.loss, b.loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_extremes_of_every_loss(isa, loss):
    inf, nan = math.inf, math.nan
    options = {"loss": loss, "label_smoothing": smoothing(loss, 0.1), "normalize_lengths": False}
    # certain, impossible and huge: the gradient is a number wherever the loss is one
    values = torch.tensor(
        [0.0, -1e-300, -1e-20, -1.0, -800.0, -1e6, -1e30, -inf], dtype=torch.float64
    )
    w, l = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    zero = torch.zeros_like(w)
    for beta, alone in ((0.1, False), (3.0, True)):
        for first, second in zip(w, l, strict=True) if alone else [(w, l)]:
            x = [
                v.reshape(-1).clone().requires_grad_()
                for v in (first, second, zero[: first.numel()])
            ]
            x.append(x[2].detach().clone().requires_grad_())
            out = ff.preference_loss(*x, beta=beta, reduction="none", **options).loss
            with np.errstate(all="ignore"):
                t = reference.preference_loss(
                    *(v.detach().numpy() for v in x), beta=beta, reduction="none", **options
                )
            check("loss", out, t.loss, t.loss)
            if np.isfinite(t.loss).all():
                out.sum().backward()
                grads = (t.d_chosen, t.d_rejected, t.d_ref_chosen, t.d_ref_rejected)
                for v, truth in zip(x, grads, strict=True):
                    assert torch.isfinite(v.grad).all()
                    check("gradient", v.grad, truth, truth)
    # NaN is not swallowed
    one, nans = zero[:1] - 1, torch.full((1,), nan, dtype=torch.float64)
    reads = (True, loss != "sft")
    for i, read in enumerate(reads):
        given = [one, one]
        given[i] = nans
        out = ff.preference_loss(*given, **options).loss
        assert bool(torch.isnan(out)) is read
    # an empty batch, of any shape
    for shape in ((0,), (2, 0)):
        x = torch.zeros(shape, requires_grad=True)
        lengths = {"chosen_lengths": x.detach(), "rejected_lengths": x.detach()}
        for reduction in ("mean", "sum", "none"):
            out = ff.preference_loss(x, x, reduction=reduction, **lengths, **options)
            assert out.loss.sum() == 0
            assert out.accuracy == 0
            out.loss.sum().backward()
            assert x.grad.shape == shape


def test_certain_completions_of_orpo():
    """log-odds end at a = -2^-53, and so does the gradient: empty completions cost β·ln 2."""
    lp = torch.tensor([0.0, -0.0, -1e-20], dtype=torch.float64, requires_grad=True)
    n = torch.tensor([0, 3, 1])
    out = ff.preference_loss(
        lp, lp.detach(), loss="orpo", chosen_lengths=n, rejected_lengths=n, reduction="none",
        chosen_nll=torch.tensor(0.0), beta=1.0,
    )  # fmt: skip
    out.loss.sum().backward()
    assert out.loss.tolist() == pytest.approx([math.log(2)] * 3)
    assert not lp.grad.any()


def test_lengths():
    lp, (n_w, n_l) = vectors(6)
    plain = ff.preference_loss(*lp, loss="ipo", normalize_lengths=False)
    ones = torch.ones(6)
    assert torch.equal(
        plain.loss,
        ff.preference_loss(*lp, loss="ipo", chosen_lengths=ones, rejected_lengths=ones).loss,
    )
    # lengths are of no consequence to a loss that does not divide by them, unless it is told to
    a = ff.preference_loss(*lp, chosen_lengths=n_w, rejected_lengths=n_l).loss
    assert torch.equal(a, ff.preference_loss(*lp).loss)
    b = ff.preference_loss(
        *lp, chosen_lengths=n_w, rejected_lengths=n_l, normalize_lengths=True
    ).loss
    t = reference.preference_loss(
        *(x.double().numpy() for x in lp), chosen_lengths=n_w.numpy(), rejected_lengths=n_l.numpy(),
        normalize_lengths=True,
    )  # fmt: skip
    check("normalized", b, t.loss, t.loss)


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


# The pass over the logits knows no loss, and the losses no logits: every loss once, and all types and shapes
# with one that takes sums, one that divides by lengths and one with an NLL. 2: the least vocabulary; 257: an
# odd tail; 3001: beyond a block.
_LOGITS = [(loss, torch.float32, (2, 5, 257)) for loss in LOSSES]
_LOGITS += [
    (loss, dtype, shape)
    for loss in ("sigmoid", "ipo", "orpo")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for shape in ((1, 3, 2), (2, 5, 257), (3, 7, 3001))
    if (dtype, shape) != (torch.float32, (2, 5, 257))
]


@pytest.mark.parametrize(("loss", "dtype", "shape"), _LOGITS, ids=str)
def test_from_logits(isa, loss, dtype, shape):
    logits, targets, ref = batch(*shape, dtype)
    beta, eps, numbers = 0.1, 0.05, {"gamma": 0.8, "sft_weight": 0.7}
    results = []
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        out = ff.preference_loss_from_logits(
            x, targets, ref_logprobs=ref, loss=loss, beta=beta, label_smoothing=eps, inplace=inplace,
            **numbers,
        )  # fmt: skip
        out.loss.backward()
        results.append((out, x.grad))
        assert (x.grad.data_ptr() == x.data_ptr()) is inplace
    y = logits.clone().requires_grad_()
    e = eager_from_logits(y, targets, ref.to(dtype), loss, beta, eps, **numbers)
    e.backward()
    t, dz = truth_from_logits(logits, targets, ref, loss, beta, eps, **numbers)
    (out, grad), (out2, grad2) = results
    check("loss", out.loss, e, t.loss)
    check("gradient", grad, y.grad, dz)
    assert torch.equal(grad, grad2)
    assert torch.equal(out.loss, out2.loss)
    assert out.accuracy.item() == pytest.approx(t.accuracy)


@pytest.mark.parametrize("normalize_lengths", [None, False])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sft", "simpo", "orpo", "kto"])
def test_ld_alpha(loss, normalize_lengths):
    """Tokens past the shorter answer's length count less, but not in lengths and NLL."""
    logits, targets, ref = batch(3, 7, 21, torch.float64)
    assert len(set(kept(targets)[1].tolist())) > 1
    for ld_alpha in (0.0, 0.3, 1.0):
        x = logits.clone().requires_grad_()
        out = ff.preference_loss_from_logits(
            x, targets, ref_logprobs=ref.double(), loss=loss, ld_alpha=ld_alpha, sft_weight=0.5,
            normalize_lengths=normalize_lengths,
        )  # fmt: skip
        out.loss.backward()
        if normalize_lengths is None:
            t, dz = truth_from_logits(
                logits, targets, ref, loss, 0.1, 0.0, ld_alpha, sft_weight=0.5
            )
            check("loss", out.loss, t.loss, t.loss)
            check("gradient", x.grad, dz, dz)
    plain = ff.preference_loss_from_logits(
        logits, targets, ref_logprobs=ref.double(), loss=loss, sft_weight=0.5,
        normalize_lengths=normalize_lengths,
    )  # fmt: skip
    check("at 1", out.loss, plain.loss, plain.loss)
    tensor = ff.preference_loss_from_logits(
        logits, targets, ref_logits=logits, loss="sigmoid", ld_alpha=torch.tensor(0.3)
    )
    assert tensor.loss.item() == pytest.approx(math.log(2))  # the reference's logits count alike


def test_options_from_logits():
    logits, targets, ref = batch(2, 5, 33, torch.float32)
    s = ff.sequence_logprobs(ff.token_logprobs(logits, targets))
    n = kept(targets)[1]
    options = {
        "loss": ["simpo", "bco_pair", "discopop", "sft"], "loss_weights": [1.0, 0.5, 2.0, 0.1],
        "pair_weights": torch.tensor([0.5, 2.0]), "gamma": 0.8, "sft_weight": 0.7, "delta": 0.3,
        "tau": 0.4, "beta": 0.3,
    }  # fmt: skip
    kto = {
        "loss": "kto", "kl": torch.ones(2), "desirable_weight": 1.5, "undesirable_weight": 0.5,
        "reduction": "none",
    }  # fmt: skip
    other = {"f_divergence": "alpha", "alpha": 0.3, "label_smoothing": 0.1}
    nll = {"loss": "orpo", "chosen_nll": torch.tensor(1.5)}
    for each in (options, kto, other, nll):
        a = ff.preference_loss_from_logits(logits, targets, ref_logprobs=ref, **each)
        b = ff.preference_loss(
            *s.chunk(2), *ref.chunk(2), chosen_lengths=n[:2], rejected_lengths=n[2:], **each
        )
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_reference_logits_and_none():
    logits, targets, _ = batch(2, 5, 33, torch.float32)
    ref_logits = torch.randn_like(logits)
    s = ff.sequence_logprobs(ff.token_logprobs(ref_logits, targets))
    a = ff.preference_loss_from_logits(logits, targets, ref_logits=ref_logits.requires_grad_())
    b = ff.preference_loss_from_logits(logits, targets, ref_logprobs=s)
    assert torch.equal(a.loss, b.loss)
    assert not a.loss.requires_grad
    free = ff.preference_loss_from_logits(logits, targets)
    zero = ff.preference_loss_from_logits(logits, targets, ref_logprobs=torch.zeros(4))
    assert torch.equal(free.loss, zero.loss)
    empty = ff.preference_loss_from_logits(torch.zeros(0, 5, 33), targets[:0])
    assert empty.loss == 0


def test_prompt_logits_are_not_read():
    logits, targets, ref = batch(2, 6, 19, torch.float32)
    logits[targets == IGNORE] = float("nan")
    x = logits.requires_grad_()
    out = ff.preference_loss_from_logits(x, targets, ref_logprobs=ref)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert (x.grad[targets == IGNORE] == 0).all()
    assert torch.isfinite(x.grad).all()


# ---- autograd, compile, torch's own checks -----------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, reduction):
    lp, (n_w, n_l) = vectors(4, torch.float64, scale=3.0)
    x = [v.requires_grad_() for v in lp]
    options = {**NUMBERS, "loss": loss, "label_smoothing": 0.1, "reduction": reduction}

    def f(*v):
        return ff.preference_loss(
            *v, beta=0.7, chosen_lengths=n_w, rejected_lengths=n_l, **options
        ).loss

    assert torch.autograd.gradcheck(f, x)
    if LOSSES[loss].nll:
        nll = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda v: (
                ff.preference_loss(
                    *lp, chosen_lengths=n_w, rejected_lengths=n_l, chosen_nll=v, **options
                ).loss
            ),
            (nll,),
        )
    logits, targets, ref = batch(2, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: (
            ff.preference_loss_from_logits(
                z, targets, ref_logprobs=ref, ld_alpha=0.4, **options
            ).loss
        ),
        (logits.requires_grad_(),),
    )


def raw_arguments(
    lp, lengths=(None, None), others=(None,) * 5, loss_weights=None, beta=0.1, codes=(0,),
    by_length=(False,), reduction=2, want_ref=False, number=float,
):  # fmt: skip
    numbers = [number(v) for v in (beta, 0.1, 0.5, 0.5, 0.0, 0.05, 1.0, 1.0, 0.5, 0.0)]
    return (
        *lp, *lengths, *others, loss_weights, *numbers, list(codes), list(by_length), 0, True,
        reduction, want_ref,
    )  # fmt: skip


def test_opcheck():
    lp, (n_w, n_l) = vectors(4)
    n = (n_w.float(), n_l.float())
    order = torch.stack([torch.randperm(4), torch.randperm(4)])
    everything = (torch.rand(4), torch.tensor(0.5), torch.rand(3), order, order)
    weights = torch.rand(3, dtype=torch.float64)
    mix = {"codes": (8, 9, 18), "by_length": (False, False, True), "loss_weights": weights}
    unpaired = [lp[0], lp[1][:3], lp[2], lp[3][:3]]
    opcheck = torch.library.opcheck
    forward, backward = RAW.preference_forward, RAW.preference_backward
    for args in (  # the plainest are those of the composites, below
        raw_arguments([*lp[:2], None, None], n, codes=(1,), by_length=(True,), reduction=0),
        raw_arguments(lp, n, everything, want_ref=True, **mix),
        raw_arguments(unpaired, codes=(19,), reduction=0, want_ref=True),
        raw_arguments(unpaired, codes=(19,), reduction=2),
    ):
        opcheck(forward.default, args)
    tensors = raw_arguments(lp, n, everything, want_ref=True, number=torch.tensor, **mix)
    opcheck(forward.tensor, tensors)
    opcheck(
        backward.default,
        (torch.rand(4), *raw_arguments(lp, n, everything, want_ref=True, reduction=0, **mix)),
    )
    opcheck(backward.default, (torch.rand(7), *raw_arguments(unpaired, codes=(20,), reduction=0)))
    x = [v.clone().requires_grad_() for v in lp[:2]]
    opcheck(RAW.preference_loss.default, (*x, *lp[2:]))
    opcheck(RAW.reward_loss.default, tuple(x))
    logits, targets, ref = batch(2, 3, 11, torch.float32)
    opcheck(
        RAW.preference_loss_from_logits.default,
        (logits.requires_grad_(), targets),
        {"ref_logprobs": ref, "loss": "cpo", "sft_weight": 0.5},
    )


def test_backward_through_the_raw_op_raises():
    lp, _ = vectors(3)
    x = lp[0].requires_grad_()
    out = RAW.preference_forward(*raw_arguments([x, *lp[1:]]))
    with pytest.raises(RuntimeError, match="preference_forward is a raw op"):
        out[0].backward()
    x.grad = None
    (g,) = torch.autograd.grad(ff.preference_loss(x, *lp[1:]).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.functional.hessian(
            lambda v: ff.preference_loss(v, *lp[1:]).loss, lp[0].detach()
        )


def test_compile(counter):
    logits, targets, ref = batch(2, 4, 21, torch.float32)

    def step(x, beta):
        return ff.preference_loss_from_logits(
            x, targets, ref_logprobs=ref, beta=beta, label_smoothing=beta / 2
        ).loss

    compiled = torch.compile(step, fullgraph=True)
    counted = torch.compile(step, backend=counter, fullgraph=True)
    for i in range(12):
        beta = 0.05 + 0.01 * i
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = compiled(x, beta), step(y, beta)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x.grad, y.grad)
        counted(x, beta)
    assert 1 <= counter.graphs <= 2


def test_compile_of_numbers(counter):
    """Values of beta, gamma, weights change without new graphs; aot sorts in the graph."""
    lp, (n_w, n_l) = vectors(5)

    def step(w, l, ref_w, ref_l, number):
        out = ff.preference_loss(
            w, l, ref_w, ref_l, loss=["simpo", "aot", "discopop"], beta=number, gamma=2 * number,
            tau=number, loss_weights=[number, 1.0, 0.5], chosen_lengths=n_w, rejected_lengths=n_l,
            reduction="none",
        )  # fmt: skip
        return out.loss.sum() + ff.reward_loss(w, l, margin=ref_w, center_coef=number)

    # The graphs and their gradients are what is asked for; test_compile has Inductor's code for them.
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    counted = torch.compile(step, backend=counter, fullgraph=True)
    for i in range(4):
        number = 0.05 + 0.01 * i
        x, y = ([v.clone().requires_grad_() for v in lp] for _ in range(2))
        a, b = compiled(*x, number), step(*y, number)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        for v, w in zip(x, y, strict=True):
            torch.testing.assert_close(v.grad, w.grad)
        counted(*x, number)
    assert 1 <= counter.graphs <= 2


def test_autocast():
    layer = torch.nn.Linear(8, 33)
    x = torch.randn(4, 5, 8)
    targets = torch.randint(0, 33, (4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        out = ff.preference_loss_from_logits(layer(x), targets)
    assert out.loss.dtype is torch.float32
    out.loss.backward()
    assert layer.weight.grad is not None


# ---- wrong arguments ---------------------------------------------------------------------------


def test_wrong_arguments():
    lp, (n_w, _) = vectors(3)
    a, b = lp[:2]
    with pytest.raises(ValueError, match="loss: 'dpo'; allowed: 'sigmoid', 'ipo', 'hinge'"):
        ff.preference_loss(a, b, loss="dpo")
    with pytest.raises(ValueError, match="give both or neither"):
        ff.preference_loss(a, b, a)
    with pytest.raises(ValueError, match="divides by the completions' lengths"):
        ff.preference_loss(a, b, loss="ipo")
    with pytest.raises(ValueError, match="divides by the completions' lengths"):
        ff.preference_loss(a, b, loss="ipo", chosen_lengths=n_w)
    with pytest.raises(ValueError, match="loss='simpo' divides by"):
        ff.preference_loss(a, b, loss=["sigmoid", "simpo"])
    for names in ([], ["sigmoid"] * 33):
        with pytest.raises(ValueError, match="loss: .*allowed: a name, or a list of 1 to 32"):
            ff.preference_loss(a, b, loss=names)
    for loss in (None, 3, {"sigmoid"}, ["sigmoid", None], ["sigmoid", ["ipo"]], "reward"):
        with pytest.raises(ValueError, match="loss: .*allowed: 'sigmoid'"):
            ff.preference_loss(a, b, loss=loss)
    with pytest.raises(ValueError, match="loss_weights: 1 numbers; allowed: 2, one a loss"):
        ff.preference_loss(a, b, loss=["sigmoid", "hinge"], loss_weights=[1.0])
    with pytest.raises(TypeError, match="loss_weights: a list of numbers, not float"):
        ff.preference_loss(a, b, loss_weights=1.0)
    with pytest.raises(TypeError, match="loss_weights: a number"):
        ff.preference_loss(a, b, loss_weights=["1"])
    with pytest.raises(ValueError, match="loss_weights: inf; allowed: finite"):
        ff.preference_loss(a, b, loss_weights=[math.inf])
    for loss in ("sft", "orpo"):
        with pytest.raises(ValueError, match=f"chosen_lengths.*loss='{loss}'"):
            ff.preference_loss(a, b, loss=loss)
    for loss in ("cpo", "slic"):
        assert ff.preference_loss(a, b, loss=loss).loss.isfinite()
        with pytest.raises(ValueError, match=f"chosen_lengths: loss='{loss}' has the NLL"):
            ff.preference_loss(a, b, loss=loss, sft_weight=0.1)
    for loss in LOSSES:
        if loss not in DIVERGING:
            with pytest.raises(
                ValueError, match=f"f_divergence: 'js' with loss='{loss}'; allowed with"
            ):
                ff.preference_loss(a, b, loss=loss, f_divergence="js", normalize_lengths=False)
    with pytest.raises(ValueError, match="f_divergence: 'kl'; allowed: 'reverse_kl', 'forward_kl'"):
        ff.preference_loss(a, b, f_divergence="kl")
    with pytest.raises(
        ValueError, match="label_smoothing: 0.0; allowed: above 0 with loss='exo_pair'"
    ):
        ff.preference_loss(a, b, loss="exo_pair")
    with pytest.raises(
        ValueError, match="label_smoothing: 0.5; allowed: below 0.5 with loss='robust'"
    ):
        ff.preference_loss(a, b, loss="robust", label_smoothing=0.5)
    for name, bad in (
        ("tau", (0.0, -1.0, math.nan, math.inf)), ("gamma", (math.inf, math.nan)),
        ("delta", (math.inf, math.nan)), ("alpha", (math.inf, math.nan)),
        ("sft_weight", (-0.1, math.inf, math.nan)), ("desirable_weight", (-0.1, math.nan)),
        ("undesirable_weight", (-0.1, math.inf)),
    ):  # fmt: skip
        for value in bad:
            with pytest.raises(ValueError, match=f"^{name}: .*allowed"):
                ff.preference_loss(a, b, **{name: value})
        with pytest.raises(TypeError, match=f"^{name}: a number"):
            ff.preference_loss(a, b, **{name: "1"})
    with pytest.raises(ValueError, match="reduction: 'none' of sigmoid, kto"):
        ff.preference_loss(a, b, loss=["sigmoid", "kto"], reduction="none")
    with pytest.raises(ValueError, match="pair_weights: with losses of pairs and"):
        ff.preference_loss(a, b, loss=["sigmoid", "kto"], pair_weights=a)
    with pytest.raises(ValueError, match=r"pair_weights: shape \(2,\); allowed: \(3,\)"):
        ff.preference_loss(a, b, pair_weights=a[:2])
    with pytest.raises(ValueError, match=r"pair_weights: shape \(3,\); allowed: \(6,\)"):
        ff.preference_loss(a, b, loss="kto", pair_weights=a)
    with pytest.raises(ValueError, match=r"rejected: shape \(2,\); chosen has \(3,\)"):
        ff.preference_loss(a, b[:2], loss=["kto", "aot"])
    with pytest.raises(ValueError, match=r"ref_rejected: shape \(3,\); rejected has \(2,\)"):
        ff.preference_loss(a, b[:2], a, b, loss="kto")
    with pytest.raises(ValueError, match=r"chosen_nll: shape \(3,\); allowed: one element"):
        ff.preference_loss(a, b, loss="sft", chosen_nll=a)
    for name in ("pair_weights", "kl", "chosen_nll"):
        with pytest.raises(TypeError, match=f"{name}: a tensor, not list"):
            ff.preference_loss(a, b, loss="orpo", normalize_lengths=False, **{name: [1.0]})
        with pytest.raises(TypeError, match=f"{name}: dtype torch.int64"):
            ff.preference_loss(a, b, loss="sft", normalize_lengths=False, **{name: torch.tensor(1)})
    with pytest.raises(
        ValueError, match=r"rejected_rewards: shape \(2,\); chosen_rewards has \(3,\)"
    ):
        ff.reward_loss(a, b[:2])
    with pytest.raises(ValueError, match=r"margin: shape \(2,\); chosen_rewards has"):
        ff.reward_loss(a, b, margin=a[:2])
    with pytest.raises(TypeError, match="margin: a number"):
        ff.reward_loss(a, b, margin="1")
    with pytest.raises(TypeError, match="chosen_rewards: a tensor"):
        ff.reward_loss(None, b)
    with pytest.raises(ValueError, match="center_coef: -1.0; allowed: 0 and above"):
        ff.reward_loss(a, b, center_coef=-1.0)
    with pytest.raises(ValueError, match="reduction: 'avg'"):
        ff.reward_loss(a, b, reduction="avg")
    with pytest.raises(ValueError, match="rejected_lengths: element 1 is -2.0"):
        ff.preference_loss(
            a, b, loss="ipo", chosen_lengths=n_w, rejected_lengths=torch.tensor([1, -2, 3])
        )
    with pytest.raises(ValueError, match=r"rejected: shape \(2,\); chosen has \(3,\)"):
        ff.preference_loss(a, b[:2])
    for pair, name in (((a, None), "rejected"), ((None, b), "chosen")):
        with pytest.raises(TypeError, match=f"{name}: a tensor, not None"):
            ff.preference_loss(*pair)
    with pytest.raises(TypeError, match="rejected: a tensor, not list"):
        ff.preference_loss(a, [1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="chosen: dtype torch.int64"):
        ff.preference_loss(a.long(), b)
    with pytest.raises(ValueError, match="rejected: on meta; chosen is on cpu"):
        ff.preference_loss(a, b.to("meta"))
    for beta in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta: .*positive and finite"):
            ff.preference_loss(a, b, beta=beta)
        with pytest.raises(ValueError, match="beta: .*positive and finite"):
            ff.preference_loss(a, b, beta=torch.tensor(beta))
    for eps in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing"):
            ff.preference_loss(a, b, label_smoothing=eps)
    with pytest.raises(ValueError, match="reduction: 'avg'"):
        ff.preference_loss(a, b, reduction="avg")
    logits, targets, ref = batch(2, 3, 7, torch.float32)
    f = ff.preference_loss_from_logits
    with pytest.raises(ValueError, match="pairs: 'interleaved'; allowed: 'halves'"):
        f(logits, targets, pairs="interleaved")
    with pytest.raises(ValueError, match=r"logits: shape \(3, 3, 7\); allowed: \(2·pairs, T, V\)"):
        f(logits[:3], targets[:3])
    with pytest.raises(ValueError, match="give one of the two"):
        f(logits, targets, ref_logprobs=ref, ref_logits=logits)
    with pytest.raises(ValueError, match=r"ref_logprobs: shape \(2,\); allowed: \(4,\)"):
        f(logits, targets, ref_logprobs=ref[:2])
    with pytest.raises(ValueError, match="ref_logits: shape"):
        f(logits, targets, ref_logits=logits[:2])
    with pytest.raises(TypeError, match="ref_logprobs: a tensor, not list"):
        f(logits, targets, ref_logprobs=[0.0] * 4)
    with pytest.raises(TypeError, match="ref_logprobs: dtype torch.int64"):
        f(logits, targets, ref_logprobs=ref.long())
    with pytest.raises(ValueError, match="targets: element 0 is 7"):
        f(logits, targets.clone().fill_(7))
    with pytest.raises(TypeError, match="logits: a tensor"):
        f(None, targets)


def test_wrong_arguments_of_the_raw_op():
    lp, _ = vectors(3)
    f = RAW.preference_forward
    with pytest.raises(TypeError, match="rejected: dtype torch.float64; chosen has torch.float32"):
        f(*raw_arguments([lp[0], lp[1].double(), None, None]))
    for codes, name in (
        ((22,), "losses"),
        ((-1,), "losses"),
        ((), "losses"),
        ((0, 1), "by_length"),
    ):
        with pytest.raises(ValueError, match=f"{name}: "):
            f(*raw_arguments(lp, codes=codes))
    with pytest.raises(ValueError, match="reduction: 3"):
        f(*raw_arguments(lp, reduction=3))
    with pytest.raises(ValueError, match="chosen_lengths, rejected_lengths: None"):
        f(*raw_arguments(lp, codes=(1,), by_length=(True,)))
    with pytest.raises(TypeError, match="aot_order: a tensor, not None"):
        f(*raw_arguments(lp, codes=(8,)))
    order = torch.arange(6).view(2, 3)
    with pytest.raises(ValueError, match=r"aot_order: \(2, 2\) torch.int64; allowed: \(2, 3\)"):
        f(*raw_arguments(lp, codes=(8,), others=(None, None, None, order[:, :2], None)))
    # an index out of range is not followed
    out = f(*raw_arguments(lp, codes=(8,), others=(None, None, None, order, None)))
    assert torch.isnan(out[0])
    with pytest.raises(ValueError, match=r"g: \(2,\) torch.float32; allowed: \(3,\)"):
        RAW.preference_backward(torch.ones(2), *raw_arguments(lp, reduction=0))
    with pytest.raises(ValueError, match="reduction: 2; allowed: 0"):
        RAW.preference_backward(torch.ones(3), *raw_arguments(lp))


def test_mixed_losses_have_no_single_elements():
    lp, _ = vectors(4)
    with pytest.raises(ValueError, match="reduction: 'none'"):
        RAW.preference_forward(
            *raw_arguments(lp, codes=(0, 19), by_length=(False, False), reduction=0)
        )


def test_tokens_of_weight_0():
    """ld_alpha = 0: an impossible token past the shorter answer's end adds nothing."""
    logits, targets = torch.randn(2, 4, 5), torch.tensor([[1, 2, -100, -100], [3, 1, 0, 2]])
    logits[1, 3, 2] = -torch.inf
    x = logits.clone().requires_grad_()
    out = ff.preference_loss_from_logits(x, targets, ld_alpha=0.0)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(x.grad).all()
    targets[1, 2:] = -100
    assert torch.equal(out.loss, ff.preference_loss_from_logits(logits, targets).loss)


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.integers(0, 9),
    loss=st.sampled_from(sorted(LOSSES)),
    beta=st.floats(1e-3, 10),
    eps=st.floats(0, 0.49),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_random(pairs, loss, beta, eps, scale, seed):
    lp, _ = vectors(pairs, seed=seed, scale=scale)
    compare(
        lp, "none", seed, loss=loss, beta=beta, label_smoothing=smoothing(loss, eps),
        normalize_lengths=False,
    )  # fmt: skip
