"""Preference losses on every backend beside the CPU's: CUDA, Triton, plain torch.

On a reduced grid: what is common to all backends, the arguments and the autograd, is in test_preference*.py.
Few pairs and calls: one takes Triton's interpreter some hundredths of a second.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import GPU
from finefuse._args.preference import DIVERGENCES
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from finefuse.reference import preference as reference
from preference_cases import (
    DIVERGING,
    HAVE_NLL,
    NUMBERS,
    UNPAIRED,
    batch,
    compare,
    divides,
    eager_from_logits,
    smoothing,
    truth_from_logits,
    vectors,
)
from tolerances import check

F = torch.nn.functional

# NumPy's, from Triton's interpreter, at what a GPU does silently: -inf - -inf, overflow to inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---- from log-probabilities --------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(place, loss):
    """Every loss: both types, the reductions, with a reference and without, weighted."""
    for dtype, reduction, refs, weighted in (
        (torch.float32, "mean", True, False),
        (torch.float64, "none", True, True),
        (torch.float32, "sum", False, True),
    ):
        lp, (n_w, n_l) = vectors(5, dtype)
        weights = torch.rand(10 if LOSSES[loss].unpaired else 5, dtype=dtype)
        weights[2] = 0
        compare(
            lp, reduction, refs=refs, device=place.device, loss=loss, beta=0.3,
            label_smoothing=smoothing(loss, 0.1), chosen_lengths=n_w, rejected_lengths=n_l,
            kl=torch.randn(3, dtype=dtype) + 2, pair_weights=weights if weighted else None,
            **NUMBERS,
        )  # fmt: skip


def test_apo_down_keeps_its_digits(place):
    """Each pair by itself, as in test_numpy_preference.py, where the truth has 60 digits."""
    if place.backend == "eager":
        pytest.skip("plain torch: autograd subtracts the two slopes, and digits cancel")
    w = torch.tensor([-0.75, 3.0, 1e-3, 40.0, -800.0], dtype=torch.float64)
    l = torch.cat([w * 1e-12, w * 2 * (1 + 1e-9), w * 0.3, w * 1e3])
    w = w.repeat(4)
    for beta in (2.0**-9, 2.0):
        leaf = w.to(place.device, copy=True).requires_grad_()
        out = ff.preference_loss(
            leaf, l.to(place.device), loss="apo_down", beta=beta, normalize_lengths=False,
            reduction="none",
        )  # fmt: skip
        out.loss.sum().backward()
        t = reference.preference_loss(
            w.numpy(), l.numpy(), loss="apo_down", beta=beta, reduction="none"
        )
        for ours, truth in zip(leaf.grad.cpu(), t.d_chosen, strict=True):
            check("d chosen", ours, truth, truth)


# Those that differ in what of the batch they need: nothing, the sort, the NLL, other numbers of elements.
OF_THE_BATCH = ["sigmoid", "aot", "sft", "orpo", "aot_unpaired"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_several_rounds_of_the_block(place, dtype):
    lp, (n_w, n_l) = vectors(700, dtype)
    n = {"chosen_lengths": n_w, "rejected_lengths": n_l, "device": place.device}
    for reduction in ("mean", "none"):
        names = OF_THE_BATCH + (["kto", "apo_zero_unpaired"] if reduction == "mean" else [])
        kl = torch.randn(300, dtype=dtype) + 1
        compare(lp, reduction, loss=names, kl=kl, label_smoothing=0.1, **n, **NUMBERS)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_lists(place, reduction):
    """A weighted sum, one loss of it twice; losses of pairs beside losses of an example at a time."""
    lp, (n_w, n_l) = vectors(6)
    names, weights = ["ipo", *OF_THE_BATCH, "sigmoid"], [0.01, 0.8, 1.5, -0.25, 2.0, 0.5, 0.1]
    pair_weights = torch.rand(6)
    if reduction != "none":
        names, weights, pair_weights = [*names, *UNPAIRED], [*weights, 0.7, 1.3], None
    compare(
        lp, reduction, device=place.device, loss=names, loss_weights=weights, label_smoothing=0.1,
        chosen_lengths=n_w, rejected_lengths=n_l, pair_weights=pair_weights, **NUMBERS,
    )  # fmt: skip
    both = {"loss": UNPAIRED, "loss_weights": [0.5, 2.0], "pair_weights": torch.rand(12)}
    compare(lp, reduction, device=place.device, **both)


@pytest.mark.parametrize("normalize_lengths", [True, False])
@pytest.mark.parametrize("loss", ["sigmoid", "nca_pair", *OF_THE_BATCH[1:], "simpo", "kto"])
def test_normalize_lengths(place, loss, normalize_lengths):
    lp, (n_w, n_l) = vectors(5, torch.float64)
    n_w[3] = n_l[1] = 0  # an empty completion counts as one token
    at_least = {"chosen_lengths": n_w.clamp(min=1), "rejected_lengths": n_l.clamp(min=1)}
    compare(
        lp, device=place.device, loss=loss, normalize_lengths=normalize_lengths,
        **(at_least if normalize_lengths else {}), **NUMBERS,
    )  # fmt: skip
    if normalize_lengths:
        results = [
            ff.preference_loss(
                *place.put(*lp), loss=loss, normalize_lengths=True,
                chosen_lengths=a.to(place.device), rejected_lengths=b.to(place.device),
            ).loss
            for a, b in ((n_w, n_l), at_least.values())
        ]  # fmt: skip
        assert torch.equal(*results)


@pytest.mark.parametrize("loss", HAVE_NLL)
def test_chosen_nll(place, loss):
    """It stands for the NLL and has a gradient, of "none" the sum of the upstream ones."""
    for dtype, reduction in ((torch.float32, "mean"), (torch.float64, "none")):
        lp, (n_w, n_l) = vectors(5, dtype)
        n = {"chosen_lengths": n_w, "rejected_lengths": n_l} if divides(loss) else {}
        compare(
            lp, reduction, nll=torch.full((), 1.7, dtype=dtype), device=place.device, loss=loss,
            pair_weights=torch.rand(5, dtype=dtype), **n, **NUMBERS,
        )  # fmt: skip


@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (300, 2)], ids=str)
@pytest.mark.parametrize("loss", UNPAIRED)
def test_unpaired_numbers(place, loss, counts):
    """The margin is of the means, and a reward is right or wrong by its sign."""
    lp = [vectors(n, torch.float64, seed)[0][0] for seed, n in enumerate(counts * 2)]
    kl = torch.tensor([[0.5, 2.0], [-0.25, 1.0]], dtype=torch.float64)
    for reduction, weights in (("mean", None), ("none", torch.rand(sum(counts)).double())):
        out = compare(
            lp, reduction, device=place.device, loss=loss, beta=0.3, kl=kl, pair_weights=weights,
            desirable_weight=1.5, undesirable_weight=0.6,
        )  # fmt: skip
        assert out.margins.shape == ()
        assert out.loss.shape == ((sum(counts),) if reduction == "none" else ())


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_aot_of_ties(place, loss):
    g = torch.Generator().manual_seed(1)
    lp = [torch.randint(-3, 0, (40,), generator=g).double() for _ in range(4)]
    compare(lp, "none", device=place.device, loss=loss, beta=0.7, label_smoothing=0.1)


@pytest.mark.parametrize("f_divergence", [d for d in DIVERGENCES if d != "reverse_kl"])
def test_f_divergence(place, f_divergence):
    """Each with each loss, every other call in float64; the score is divided by lengths after f'."""
    for i, loss in enumerate(DIVERGING):
        lp, (n_w, n_l) = vectors(5, (torch.float32, torch.float64)[i % 2], scale=4.0)
        compare(
            lp, "none", device=place.device, loss=loss, label_smoothing=0.1, alpha=1.3,
            f_divergence=f_divergence, chosen_lengths=n_w, rejected_lengths=n_l,
        )  # fmt: skip


def test_f_divergence_of_huge_ratios(place):
    """Exponents stop at 80, where the gradient does, too: no inf - inf."""
    huge = torch.tensor([1e4, -1e4, -1.0, -81.0, -79.0], dtype=torch.float64)
    for f_divergence, alpha in (("forward_kl", 0.5), ("alpha", 2.0), ("alpha", 1.0)):
        options = {"f_divergence": f_divergence, "alpha": alpha, "beta": 1e-3}
        w, l = (x.requires_grad_() for x in place.put(huge.clone(), huge.flip(0)))
        out = ff.preference_loss(w, l, reduction="none", **options).loss
        out.sum().backward()
        t = reference.preference_loss(
            huge.numpy(), huge.flip(0).numpy(), reduction="none", **options
        )
        for name, a, b in (
            ("loss", out, t.loss), ("d w", w.grad, t.d_chosen), ("d l", l.grad, t.d_rejected),
        ):  # fmt: skip
            check(name, a.cpu(), b, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reward_loss(place, reduction):
    g = torch.Generator().manual_seed(0)
    for dtype, margins, center in ((torch.float32, True, 0.3), (torch.float64, False, 0.0)):
        given = [torch.randn(7, generator=g).to(dtype) for _ in range(3 if margins else 2)]
        upstream = torch.randn((7,) if reduction == "none" else (), generator=g).to(dtype)
        ours = [x.clone().requires_grad_() for x in place.put(*given)]
        margin = ours[2] if margins else None
        out = ff.reward_loss(*ours[:2], margin=margin, center_coef=center, reduction=reduction)
        out.backward(upstream.to(place.device))
        leaves = [x.clone().requires_grad_() for x in given]
        a, b = leaves[:2]
        e = -F.logsigmoid(a - b - (leaves[2] if margins else 0)) + center * (a + b) ** 2
        e = e if reduction == "none" else getattr(e, reduction)()
        e.backward(upstream)
        truth = [x.double().numpy() for x in given]
        t = reference.reward_loss(
            *(truth if margins else (*truth, 0.0)), center, reduction,
            upstream.double().numpy() if reduction == "none" else None,
        )  # fmt: skip
        check("loss", out.detach().cpu(), e, t[0])
        scale = 1 if reduction == "none" else upstream.item()
        for x, y, d in zip(ours, leaves, t[1:], strict=False):
            check("gradient", x.grad.cpu(), y.grad, scale * d)


@pytest.mark.parametrize("loss", LOSSES)
def test_extremes(place, loss):
    """Certain, impossible and huge log-probabilities of every loss."""
    inf = math.inf
    options = {"loss": loss, "label_smoothing": smoothing(loss, 0.1), "normalize_lengths": False}

    def both(values, gradients):
        v = torch.tensor(values, dtype=torch.float64)
        w, l = (x.flatten() for x in torch.meshgrid(v, v, indexing="ij"))
        a, b = (x.clone().requires_grad_() for x in place.put(w, l))
        out = ff.preference_loss(a, b, reduction="none", **options).loss
        with np.errstate(all="ignore"):
            t = reference.preference_loss(w.numpy(), l.numpy(), reduction="none", **options)
        check("loss", out.detach().cpu(), t.loss, t.loss)
        if gradients:
            out.sum().backward()
            for x, d in ((a, t.d_chosen), (b, t.d_rejected)):
                check("gradient", torch.zeros_like(w) if x.grad is None else x.grad.cpu(), d, d)

    both([0.0, -1e-300, -1e-20, -1.0, -800.0], gradients=True)
    both([0.0, -1.0, -1e30, -inf], gradients=False)  # here some losses are inf
    # NaN is not swallowed; sft does not read the rejected
    nan, one = place.put(torch.tensor([math.nan]), -torch.ones(1))
    assert torch.isnan(ff.preference_loss(nan, one, **options).loss)
    assert torch.isnan(ff.preference_loss(one, nan, **options).loss) == (loss != "sft")


def test_empty(place):
    for names in ("sigmoid", "aot", "orpo", "kto", [*OF_THE_BATCH, "kto"]):
        for reduction in ("mean", "sum", "none"):
            if reduction == "none" and "kto" in names and names != "kto":
                continue  # losses of pairs and of an example at a time: no such shape
            empty = torch.zeros(0, device=place.device, requires_grad=True)
            out = ff.preference_loss(
                empty, empty, loss=names, reduction=reduction, normalize_lengths=False
            )
            assert out.loss.sum() == 0
            assert out.accuracy == 0
            out.loss.sum().backward()
            assert empty.grad.shape == (0,)


def test_negative_lengths_are_flagged(place):
    lp, (n_w, n_l) = vectors(3)
    n_w[1] = -2
    *x, a, b = place.put(*lp, n_w, n_l)

    def call():
        return ff.preference_loss(
            *x, loss="ipo", chosen_lengths=a, rejected_lengths=b, reduction="none"
        )

    if place.backend == "eager":
        if not GPU:
            with pytest.raises(ValueError, match="chosen_lengths: element 1 is -2"):
                call()
        return
    out = call()
    assert torch.isnan(out.loss).tolist() == [False, True, False]
    with pytest.raises(
        ValueError, match="chosen_lengths, rejected_lengths: an element was negative"
    ):
        ff.check()


# ---- from logits -------------------------------------------------------------------------------


# One of each kind; the logits are token_logprobs' work, whose backends have tests of their own.
@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "orpo", "kto", "aot"])
def test_from_logits(place, loss):
    for dtype, inplace in ((torch.float32, False), (torch.bfloat16, True)):
        logits, targets, ref = batch(2, 5, 301, dtype)
        z, y, r = place.put(logits.clone(), targets, ref)
        z.requires_grad_()
        out = ff.preference_loss_from_logits(
            z, y, ref_logprobs=r, loss=loss, label_smoothing=0.05, inplace=inplace
        )
        out.loss.backward()
        leaf = logits.clone().requires_grad_()
        e = eager_from_logits(leaf, targets, ref.to(dtype), loss, 0.1, 0.05)
        e.backward()
        t, dz = truth_from_logits(logits, targets, ref, loss, 0.1, 0.05)
        check("loss", out.loss.detach().cpu(), e, t.loss)
        check("gradient", z.grad.cpu(), leaf.grad, dz)
        assert out.accuracy.item() == pytest.approx(t.accuracy)
