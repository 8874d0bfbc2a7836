"""Preference losses from sequence log-probabilities against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args.preference import DIVERGENCES
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from finefuse.reference import preference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_cases import (
    DIVERGING,
    HAVE_NLL,
    NUMBERS,
    UNPAIRED,
    compare,
    divides,
    eager,
    smoothing,
    vectors,
)
from tolerances import ScalarErrors, check

F = torch.nn.functional


# ---- the formulas in plain torch ---------------------------------------------------------------


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


# ---- random inputs -----------------------------------------------------------------------------------


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
