"""finefuse.numpy's preference losses from sequence log-probabilities: the reference, torch's bits, layouts.
Needs no torch."""

from __future__ import annotations

import decimal
import inspect
import itertools
import math
import subprocess
import sys

import finefuse.numpy as ffn
import numpy as np
import pytest
from concurrency import at_once
from finefuse._args.preference import DIVERGENCES
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from finefuse.reference import preference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_cases import (
    BFLOAT16,
    TYPES,
    Subclass,
    assert_same,
    bits,
    in_a_struct,
    misaligned,
    read_only,
    same,
    slope,
    swapped,
    wide,
    wide_of,
)
from numpy_preference_cases import (
    DIVERGING,
    NUMBERS,
    batch,
    check_loss,
    smoothing,
    vectors,
)
from tolerances import ScalarErrors, check

UNPAIRED = [name for name, named in LOSSES.items() if named.unpaired]
HAVE_NLL = [name for name, named in LOSSES.items() if named.nll]


def lengths_of(n):
    return dict(zip(("chosen_lengths", "rejected_lengths"), n, strict=True))


def truth_of(lp, **options):
    plain = {k: wide(v) for k, v in options.items()}
    if options.get("chosen_nll") is not None:
        plain["chosen_nll"] = float(np.asarray(options["chosen_nll"], np.float64).reshape(()))
    return reference.preference_loss(*map(wide, lp), **plain)


def compare(lp, **options):
    """A call against the reference, whose sums are the kernel's own, in float64: no licence for an eager."""
    out, gradients = ffn.preference_loss(*lp, return_grad=True, **options)
    truth = truth_of(lp, **options)
    dtype = wide_of("float64" if any(x.dtype == np.float64 for x in lp) else "float32")
    assert {x.dtype for x in (*bits(out), *gradients)} == {np.dtype(dtype)}
    check_loss(out.loss, truth)
    for name, ours in zip(("d_chosen", "d_rejected"), gradients, strict=True):
        want = getattr(truth, name)
        check(name, ours, want, want, terms=getattr(truth, f"{name}_terms"))
    for name in ("chosen_rewards", "rejected_rewards", "margins"):
        want = getattr(truth, name)
        check(name, getattr(out, name), want, want)
    assert out.accuracy == pytest.approx(truth.accuracy)
    assert_same(out, ffn.preference_loss(*lp, **options))
    return out, gradients


# ---- from sequence log-probabilities -----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pairs", [1, 2, 7, 300])
def test_preference_loss(isa, loss, pairs, dtype):
    lp, n = vectors(pairs, dtype)
    kl = (np.random.default_rng(1).standard_normal(3) + 2).astype(dtype)
    weights = np.random.default_rng(2).random(2 * pairs if loss in UNPAIRED else pairs)
    weights = weights.astype(dtype)
    for beta, eps, refs, weighted, reduction in (
        (0.1, 0.0, True, None, "mean"), (0.5, 0.1, True, weights, "sum"),
        (2.0, 0.3, False, weights, "none"), (0.2, 0.2, True, None, "none"),
    ):  # fmt: skip
        compare(
            lp if refs else lp[:2], loss=loss, beta=beta, label_smoothing=smoothing(loss, eps),
            reduction=reduction, kl=kl, pair_weights=weighted, **lengths_of(n), **NUMBERS,
        )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_over_seeds(loss):
    """Scalars over seeds; the eager is the reference rounded to float32."""
    errors = ScalarErrors(loss, "float32")
    for seed in range(40):
        lp, n = vectors(16, seed=seed)
        options = {"loss": loss, "label_smoothing": smoothing(loss, 0.1), **lengths_of(n)}
        truth = truth_of(lp, **options)
        ours = ffn.preference_loss(*lp, **options).loss
        errors.add(ours, np.float32(truth.loss), float(truth.loss), truth.terms)
    errors.check()


@pytest.mark.parametrize("normalize_lengths", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_normalize_lengths(loss, normalize_lengths):
    """True: every loss divides. False: none does, and the NLL is a sequence's."""
    lp, n = vectors(9, "float64")
    n[0][2] = n[1][5] = 0  # counts as one token
    lengths = lengths_of(n) if normalize_lengths else {}
    for reduction in ("mean", "none"):
        compare(
            lp, reduction=reduction, loss=loss, label_smoothing=0.1,
            normalize_lengths=normalize_lengths, **lengths, **NUMBERS,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_lists(reduction, dtype):
    lp, n = vectors(13, dtype)
    names = ["sigmoid", "aot", "sft", "ipo", "orpo", "aot_unpaired", "slic", "sigmoid"]
    weights = [0.8, 1.5, -0.25, 0.01, 2.0, 0.5, 0.3, 0.1]
    if reduction != "none":
        names, weights = [*names, "kto", "apo_zero_unpaired"], [*weights, 0.7, 1.3]
    options = {"label_smoothing": 0.1, "reduction": reduction, **lengths_of(n), **NUMBERS}
    out, _ = compare(lp, loss=names, loss_weights=weights, **options)
    compare(lp, loss=names, **options)
    arrays = tuple(np.array(w) for w in weights)
    assert_same(out, ffn.preference_loss(*lp, loss=tuple(names), loss_weights=arrays, **options))
    one = ffn.preference_loss(*lp, loss=["hinge"], loss_weights=[1], reduction=reduction)
    assert_same(one, ffn.preference_loss(*lp, loss="hinge", reduction=reduction))
    compare(lp, loss=UNPAIRED, loss_weights=[0.5, 2], reduction=reduction)


@pytest.mark.parametrize("f_divergence", DIVERGENCES)
@pytest.mark.parametrize("loss", DIVERGING)
def test_f_divergence(loss, f_divergence):
    for dtype, alpha in (("float32", 0.5), ("float64", 1.0), ("float64", 1.3)):
        lp, n = vectors(11, dtype, scale=4.0)
        for reduction, normalize in (("mean", None), ("none", True)):
            compare(
                lp, reduction=reduction, loss=loss, label_smoothing=0.1, f_divergence=f_divergence,
                alpha=alpha, normalize_lengths=normalize, **lengths_of(n),
            )  # fmt: skip


@pytest.mark.parametrize("counts", [(3, 5), (5, 3), (0, 4), (4, 0), (1, 700)], ids=str)
@pytest.mark.parametrize("loss", UNPAIRED)
def test_unpaired_numbers(loss, counts):
    lp = [vectors(n, "float64", seed)[0][0] for seed, n in enumerate(counts * 2)]
    kl = np.array([[0.5, 2.0], [-0.25, 1.0]])
    n = [np.arange(count) % 7 for count in counts]
    weights = np.random.default_rng(0).random(sum(counts))
    for reduction, weighted in itertools.product(("mean", "sum", "none"), (None, weights)):
        out, (d_w, d_l) = compare(
            lp, reduction=reduction, loss=loss, beta=0.3, kl=kl, pair_weights=weighted,
            desirable_weight=1.5, undesirable_weight=0.6,
        )  # fmt: skip
        assert type(out.margins) is np.float64
        assert np.shape(out.loss) == ((sum(counts),) if reduction == "none" else ())
        assert (d_w.shape, d_l.shape) == ((counts[0],), (counts[1],))
    compare(lp, loss=UNPAIRED, normalize_lengths=True, **lengths_of(n))


def test_kl():
    lp, _ = vectors(4, "float64")
    kl = np.array([3.0, -1.0])
    loss = "kto"
    z = ffn.preference_loss(*lp, loss=loss, kl=kl).loss
    assert z == ffn.preference_loss(*lp, loss=loss, kl=np.ones(7)).loss
    none = ffn.preference_loss(*lp, loss=loss).loss
    assert z != none
    for low in (-kl, np.zeros(0), np.zeros(()), np.float64(-2)):  # at least 0
        assert none == ffn.preference_loss(*lp, loss=loss, kl=low).loss
    assert np.isnan(ffn.preference_loss(*lp, loss=loss, kl=kl * np.nan).loss)
    # of no consequence to the others
    assert_same(ffn.preference_loss(*lp, kl=kl), ffn.preference_loss(*lp))


def test_apo_down_keeps_its_digits(isa):
    """S'(beta·r_w) - S'(beta·d), all but equal for a small beta or r_l and where r_l is near 2·r_w, to a
    relative 1e-14 for each pair by itself: against 60 digits."""

    def slope(x):
        e = (-abs(x)).exp()
        return e / (1 + e) ** 2

    w = np.array([-0.75, 3.0, 1e-3, 40.0, -800.0, 5.0])
    for l in (w * 1e-12, w * 2 * (1 + 1e-9), -w * 2 * (1 - 1e-3), w * 0.3, w * 1e3, -w[::-1] / 7):
        for beta in (2.0**-9, 0.1, 2.0):
            for scale in (2.0**-7, 1.0):
                r_w, r_l = w * scale, l * scale
                _, (ours, _) = ffn.preference_loss(
                    r_w, r_l, loss="apo_down", beta=beta, normalize_lengths=False, reduction="none",
                    return_grad=True,
                )  # fmt: skip
                with decimal.localcontext(prec=60):
                    d = decimal.Decimal
                    truth = [
                        float(d(beta) * (slope(d(beta) * d(x)) - slope(d(beta) * (d(x) - d(y)))))
                        for x, y in zip(r_w.tolist(), r_l.tolist(), strict=True)
                    ]
                # beta·r_w and beta·d are rounded: what the exponential makes of it
                size = 1 + beta * (np.abs(r_w) + np.abs(r_l))
                np.testing.assert_array_less(
                    np.abs(ours - truth), 1e-14 * size * np.abs(truth) + 1e-300
                )


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_aot_sorts(loss):
    rng = np.random.default_rng(1)
    lp = [rng.integers(-3, 0, 40).astype(np.float64) for _ in range(4)]  # many ties
    for reduction in ("mean", "none"):
        compare(lp, loss=loss, beta=0.7, reduction=reduction)
    lp = vectors(40, "float64")[0]
    out = ffn.preference_loss(*lp, loss=loss, reduction="none").loss
    p = rng.permutation(40)
    q = rng.permutation(40) if loss == "aot_unpaired" else p
    shuffled = (lp[0][p], lp[1][q], lp[2][p], lp[3][q])
    assert same(out, ffn.preference_loss(*shuffled, loss=loss, reduction="none").loss)
    lp[0][3] = lp[2][3] = -np.inf  # -inf - -inf, without a warning
    assert np.isnan(ffn.preference_loss(*lp, loss=loss).loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", HAVE_NLL)
def test_chosen_nll(loss, reduction):
    for dtype, nll in (("float32", np.float32(1.7)), ("float64", np.full((1, 1), 1.7))):
        lp, n = vectors(6, dtype)
        lengths = lengths_of(n) if LOSSES[loss].by_length else {}
        compare(lp, loss=loss, chosen_nll=nll, reduction=reduction, **lengths, **NUMBERS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pairs", [0, 1, 7])
def test_reward_loss(isa, pairs, dtype):
    rng = np.random.default_rng(0)
    w, l, m = rng.standard_normal((3, pairs)).astype(dtype)
    for reduction, center, margin in (
        ("mean", 0.0, None), ("sum", 0.3, m), ("none", 0.3, m), ("mean", 0.3, 0.5),
    ):  # fmt: skip
        options = {"margin": margin, "center_coef": center, "reduction": reduction}
        loss, (d_w, d_l) = ffn.reward_loss(w, l, return_grad=True, **options)
        given = 0.0 if margin is None else wide(margin)
        want = reference.reward_loss(wide(w), wide(l), given, center, reduction)
        for name, ours, truth in zip(("loss", "d w", "d l"), (loss, d_w, d_l), want, strict=False):
            check(name, ours, truth, truth)
        assert_same(loss, ffn.reward_loss(w, l, **options))
    x = rng.standard_normal((2, 3)).astype(dtype)
    assert ffn.reward_loss(x, x.T.copy().T, reduction="none").shape == (2, 3)
    full = ffn.reward_loss(x, x, margin=np.full((2, 3), 0.3, dtype), return_grad=True)
    assert_same(ffn.reward_loss(x, x, margin=0.3, return_grad=True), full)
    assert_same(ffn.reward_loss(x, x, margin=np.float32(0.5)), ffn.reward_loss(x, x, margin=0.5))
    assert type(ffn.reward_loss(x[0, 0], x[0, 1], margin=1, reduction="none")) is x.dtype.type


def test_values_by_hand():
    """Small numbers, worked out by hand; the others are in test_preference.py."""
    w, l = np.array([-1.0, -2.0]), np.array([-3.0, -2.0])
    refs, n = np.full((2, 2), -2.0), {"reduction": "none"}
    # d = 2 and 0, β = 0.5
    out = ffn.dpo_loss(w, l, *refs, beta=0.5, **n)
    assert out.loss.tolist() == pytest.approx([0.3132616875, math.log(2)])
    assert out.margins.tolist() == [1.0, 0.0]
    assert out.accuracy == 0.5
    # r = (1, 0), (-1, 0), z = ½, β = 2: 1 - S(1), 1 - S(-1), 1 - S(3), 1 - S(1)
    kto = ffn.kto_loss(w, l, *refs, beta=2.0, kl=np.array([0.25, 0.75]), **n).loss
    want = [0.2689414214, 0.7310585786, 0.0474258732, 0.2689414214]
    assert kto.tolist() == pytest.approx(want)
    # x = 0: ln 2 + 0.1·16
    two = np.array([2.0])
    assert ffn.reward_loss(two, two, center_coef=0.1) == pytest.approx(math.log(2) + 1.6)


def named_doors():
    lp, n = vectors(6)
    lengths = lengths_of(n)
    nll = np.float32(0.5)
    return lp, (
        ("dpo", "sigmoid", False, {"label_smoothing": 0.1, "f_divergence": "js"}),
        ("dpo", "sigmoid", True, {"f_divergence": "alpha", "alpha": 0.7}),
        ("ipo", "ipo", False, lengths),
        ("ipo", "ipo", False, {"normalize_lengths": False}),
        ("spin", "spin", False, {}),
        ("orpo", "orpo", True, lengths),
        ("orpo", "orpo", True, {**lengths, "chosen_nll": nll}),
        ("simpo", "simpo", True, {**lengths, "gamma": 1.0, "sft_weight": 0.5}),
        ("cpo", "cpo", True, {"sft_weight": 0.5, "chosen_lengths": n[0]}),
        ("cpo", "cpo", True, {"sft_weight": 0.5, "chosen_nll": nll}),
        ("kto", "kto", False, {"kl": np.ones(2, np.float32), "desirable_weight": 2.0,
                               "undesirable_weight": 0.5}),
    )  # fmt: skip


def test_named_doors():
    lp, doors = named_doors()
    for door, loss, free, options in doors:
        call, given = getattr(ffn, f"{door}_loss"), lp[:2] if free else lp
        weights = np.random.default_rng(0).random(12 if loss == "kto" else 6).astype(np.float32)
        for reduction in ("mean", "none"):
            options = {**options, "beta": 0.3, "reduction": reduction, "pair_weights": weights}
            want = ffn.preference_loss(*given, loss=loss, return_grad=True, **options)
            assert_same(call(*given, return_grad=True, **options), want, door)
            assert_same(call(*given, **options), want[0], door)


def test_losses_without_a_reference():
    """They do not read a given one; the rewards do."""
    lp, n = vectors(5)
    for loss in ("cpo", "simpo", "slic", "orpo", "sft"):
        a, d_a = ffn.preference_loss(*lp, loss=loss, return_grad=True, **lengths_of(n))
        b, d_b = ffn.preference_loss(*lp[:2], loss=loss, return_grad=True, **lengths_of(n))
        assert_same((a.loss, d_a), (b.loss, d_b))
        assert same(a.margins, ffn.preference_loss(*lp).margins)


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16])
def test_narrow_and_mixed_types(dtype):
    """16-bit log-probabilities are widened exactly; one float64 makes it all float64."""
    lp, (n_w, n_l) = vectors(9, dtype)
    single = [x.astype(np.float32) for x in lp]
    odd = lengths_of((n_w.astype(np.uint8), n_l.astype(">f4")))
    for loss in LOSSES:
        options = {"loss": loss, "label_smoothing": 0.1, "return_grad": True, **NUMBERS}
        a = ffn.preference_loss(*lp, kl=lp[0], chosen_nll=lp[1][:1], **odd, **options)
        b = ffn.preference_loss(
            *single, kl=single[0], chosen_nll=single[1][:1], **lengths_of((n_w, n_l)), **options
        )
        assert_same(a, b, loss)
        assert a[0].loss.dtype == np.float32
    mixed = [*lp[:2], lp[2].astype(np.float64), single[3]]
    out, gradients = ffn.preference_loss(*mixed, pair_weights=lp[0], return_grad=True)
    assert {x.dtype for x in (*bits(out), *gradients)} == {np.dtype(np.float64)}
    all_wide = [x.astype(np.float64) for x in lp]
    want = ffn.preference_loss(*all_wide, pair_weights=all_wide[0], return_grad=True)
    assert_same((out, gradients), want)
    # other inputs do not widen
    out = ffn.preference_loss(*single, pair_weights=np.ones(9), loss="sft", chosen_nll=np.ones(1))
    assert out.loss.dtype == np.float32
    a = ffn.reward_loss(lp[0], lp[1], margin=lp[2], return_grad=True)
    assert_same(a, ffn.reward_loss(*single[:2], margin=single[2], return_grad=True))
    a = ffn.reward_loss(lp[0], lp[1], margin=0.3)  # the number is not rounded to 16 bits
    assert_same(a, ffn.reward_loss(*single[:2], margin=0.3))
    assert ffn.reward_loss(lp[0], all_wide[1]).dtype == np.float64


def test_arrays_of_every_kind():
    lp, n = vectors(6)
    weights, kl = np.linspace(0, 1, 6, dtype=np.float32), np.array([1.0, 2.0], np.float32)
    changes = (
        swapped, misaligned, read_only, in_a_struct, lambda x: np.repeat(x, 2)[::2],
        lambda x: x[::-1].copy()[::-1], lambda x: x.view(Subclass),
    )  # fmt: skip
    for loss in ("ipo", "aot", "orpo", ["simpo", "aot_unpaired"]):
        options = {"loss": loss, "reduction": "none", "return_grad": True}
        want = ffn.preference_loss(*lp, pair_weights=weights, kl=kl, **lengths_of(n), **options)
        for change in changes:
            args = [change(x) for x in lp]
            got = ffn.preference_loss(
                *args, pair_weights=change(weights), kl=change(kl), **options,
                **lengths_of(map(change, n)),
            )  # fmt: skip
            assert_same(got, want)
            assert all(type(x) is np.ndarray for x in got[1])
        shaped = [x.reshape(2, 3).T for x in lp]  # "aot" sorts in the shape's order
        if isinstance(loss, str) and loss != "aot":
            out, (d_w, d_l) = ffn.preference_loss(
                *shaped, pair_weights=weights.reshape(2, 3).T, **options,
                **lengths_of(x.reshape(2, 3).T for x in n),
            )  # fmt: skip
            np.testing.assert_allclose(out.loss, want[0].loss.reshape(2, 3).T, rtol=1e-6)
            for a, b in zip((d_w, d_l, out.margins), (*want[1], want[0].margins), strict=True):
                np.testing.assert_allclose(a, b.reshape(2, 3).T, rtol=1e-6, atol=1e-9)
    shaped = [x.reshape(2, 3) for x in lp]
    for loss in ("aot", "aot_unpaired"):
        a = ffn.preference_loss(*shaped, loss=loss, reduction="none").loss
        assert same(a.reshape(-1), ffn.preference_loss(*lp, loss=loss, reduction="none").loss)


def test_scalars_where_there_are_no_dimensions():
    lp, _ = vectors(4)
    out = ffn.preference_loss(*lp)
    assert type(out.loss) is type(out.accuracy) is np.float32
    for loss in ("sigmoid", "aot", "aot_unpaired"):
        one, (d_w, _) = ffn.preference_loss(lp[0][0], lp[1][0], loss=loss, return_grad=True)
        assert all(type(x) is np.float32 for x in one)
        assert d_w.shape == ()
    for beta in (np.float64(0.5), np.array(0.5)):
        assert_same(ffn.preference_loss(*lp, beta=beta), ffn.preference_loss(*lp, beta=0.5))
    assert_same(ffn.preference_loss(*lp, beta=1), ffn.preference_loss(*lp, beta=1.0))


@pytest.mark.parametrize("loss", LOSSES)
def test_empty(loss):
    options = {"loss": loss, "label_smoothing": smoothing(loss, 0.1), **NUMBERS}
    for shape in ((0,), (2, 0)):
        x = np.zeros(shape, np.float32)
        for reduction in ("mean", "sum", "none"):
            out, gradients = ffn.preference_loss(
                x, x, reduction=reduction, return_grad=True, **lengths_of((x, x)), **options
            )
            assert np.sum(out.loss) == out.accuracy == 0
            assert all(g.shape == shape for g in gradients)
    for shape in ((0, 5, 33), (4, 0, 33)):
        z, y = np.zeros(shape), np.zeros(shape[:2], int)
        for ld_alpha in (None, 0.5):
            out, dz = ffn.preference_loss_from_logits(
                z, y, return_grad=True, ld_alpha=ld_alpha, **options
            )
            assert out.loss == 0 or shape[0]
            assert np.isfinite(out.loss)
            assert dz.shape == shape
    assert ffn.reward_loss(x, x) == 0


def test_any_thread_count():
    before = ffn.get_num_threads()
    lp, n = vectors(9000)
    logits, targets, ref = batch(3, 7, 301)
    results = []
    try:
        for threads in (1, 2, 5):
            ffn.set_num_threads(threads)
            results.append((
                ffn.preference_loss(
                    *lp, loss=["ipo", "aot", "simpo"], return_grad=True, **lengths_of(n)
                ),
                ffn.preference_loss_from_logits(
                    logits, targets, ref_logprobs=ref, ld_alpha=0.5, return_grad=True
                ),
            ))  # fmt: skip
    finally:
        ffn.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


def test_concurrent_calls():
    lps = [vectors(50, seed=i)[0] for i in range(6)]
    want = [ffn.preference_loss(*lp, return_grad=True) for lp in lps]

    def work(i):
        for _ in range(30):
            assert_same(ffn.preference_loss(*lps[i], return_grad=True), want[i])

    at_once(work)


# ---- derivatives against differences -----------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(1, 5),
    vocab=st.integers(2, 40),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    loss=st.sampled_from([name for name in LOSSES if name not in ("hinge", "slic")]),
    ld_alpha=st.sampled_from([None, 0.0, 0.4]),
    seed=st.integers(0, 2**31),
)
def test_gradients_are_slopes(pairs, vocab, reduction, loss, ld_alpha, seed):
    """Every return_grad against central differences along a random direction, in float64.

    With step h the difference itself is off by about h² and by 1e-16/h of the function's value.
    """
    rng = np.random.default_rng(seed)

    def agree(gradient, direction, f, x):
        near = pytest.approx(slope(f, x, direction), rel=1e-5, abs=1e-6 * max(1, abs(f(x))))
        assert np.sum(gradient * direction) == near

    p = {"loss": loss, "beta": 0.5, "label_smoothing": smoothing(loss, 0.1), "reduction": reduction}
    p.update(NUMBERS)
    n = lengths_of(rng.integers(1, 9, (2, pairs)))
    (w, l), (dw, dl) = -5 * rng.random((2, pairs)) - 0.1, rng.standard_normal((2, pairs))
    _, (d_chosen, d_rejected) = ffn.preference_loss(w, l, return_grad=True, **p, **n)
    agree(d_chosen, dw, lambda x: np.sum(ffn.preference_loss(x, l, **p, **n).loss), w)
    agree(d_rejected, dl, lambda x: np.sum(ffn.preference_loss(w, x, **p, **n).loss), l)
    logits, targets, ref = batch(pairs, 5, vocab, "float64", seed=seed)
    direction = rng.standard_normal(logits.shape)
    p.update(ref_logprobs=ref, ld_alpha=ld_alpha)
    agree(
        ffn.preference_loss_from_logits(logits, targets, return_grad=True, **p)[1], direction,
        lambda x: np.sum(ffn.preference_loss_from_logits(x, targets, **p).loss), logits,
    )  # fmt: skip


# ---- torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", BFLOAT16])
@pytest.mark.parametrize("loss", [*LOSSES, ("sigmoid", "aot", "orpo", "discopop")], ids=str)
def test_the_same_bits_as_torch(loss, dtype):
    torch = pytest.importorskip("torch", reason="compares with the torch functions")
    import finefuse as ff

    def to_torch(x):
        if not isinstance(x, np.ndarray):
            return x
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    def to_numpy(x):
        x = x.detach()
        if x.dtype is torch.bfloat16:
            return x.view(torch.int16).numpy().view(TYPES["bfloat16"])
        return x.numpy()

    def leaf(x):
        return to_torch(x.copy()).requires_grad_()

    def both(name, leaves, rest, **options):
        x = [leaf(v) for v in leaves]
        options = {"label_smoothing": 0.1, **options} if name != "reward_loss" else options
        out = getattr(ff, name)(
            *x, *map(to_torch, rest), **{k: to_torch(v) for k, v in options.items()}
        )
        value = out if name == "reward_loss" else out.loss
        value.sum().backward()
        ours, gradients = getattr(ffn, name)(*leaves, *rest, return_grad=True, **options)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        values = to_numpy(out) if name == "reward_loss" else tuple(map(to_numpy, out))
        # an untouched leaf has no gradient in torch
        theirs = tuple(np.zeros_like(g) if v.grad is None else to_numpy(v.grad)
                       for v, g in zip(x, gradients, strict=True))  # fmt: skip
        assert_same((ours, gradients), (values, theirs), f"{name} {options}")

    lp, n = vectors(9, dtype)
    kind = wide_of(dtype)
    lp = [x.astype(kind) for x in lp[:2]] + lp[2:]
    unpaired = isinstance(loss, str) and loss in UNPAIRED
    weights = np.random.default_rng(0).random(18 if unpaired else 9)
    every = {"loss": loss, "kl": lp[3], "pair_weights": weights.astype(kind), **NUMBERS}
    if isinstance(loss, str) and loss in DIVERGING:
        every.update(f_divergence="js")
    for reduction in ("mean", "sum", "none"):
        both("preference_loss", lp[:2], lp[2:], loss=loss, reduction=reduction, **lengths_of(n))
        both("preference_loss", lp[:2], lp[2:], reduction=reduction, **every, **lengths_of(n))
    logits, targets, ref = batch(3, 7, 301, dtype)
    for ld_alpha, refs in itertools.product(
        (None, 0.3), ({"ref_logprobs": ref}, {"ref_logits": logits[::-1].copy()}, {"ref_logprobs": None})
    ):  # fmt: skip
        both(
            "preference_loss_from_logits", [logits], [targets], loss=loss, ld_alpha=ld_alpha,
            **refs, **NUMBERS,
        )  # fmt: skip
    both("reward_loss", lp[:2], [], margin=lp[2], center_coef=0.1)
    both("reward_loss", lp[:2], [], margin=0.3, reduction="none")


def test_the_same_arguments_as_torch():
    pytest.importorskip("torch", reason="compares with the torch functions")
    import finefuse as ff

    doors = ("dpo", "ipo", "spin", "orpo", "simpo", "cpo", "kto", "reward", "preference")
    for name in (*(f"{door}_loss" for door in doors), "preference_loss_from_logits"):
        theirs, ours = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(ff, name), getattr(ffn, name))
        )
        only_ours = ("return_grad", "grad_out")
        assert [p for p in ours if p[0] not in only_ours] == [
            p for p in theirs if p[0] != "inplace"
        ]
    assert ffn.PreferenceOutput._fields == ff.PreferenceOutput._fields


def test_without_torch():
    code = """
import sys
sys.modules["torch"] = None  # an import of it would raise
import numpy as np
import finefuse.numpy as ffn
from finefuse._args.preference import PREFERENCE_LOSSES
x = -np.ones(3)
for loss in PREFERENCE_LOSSES:
    ffn.preference_loss(x, x, loss=loss, label_smoothing=0.1, normalize_lengths=False, return_grad=True)
ffn.reward_loss(x, x)
ffn.preference_loss_from_logits(np.zeros((2, 3, 4)), np.zeros((2, 3), int), ld_alpha=0.5)
assert sys.modules["torch"] is None
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


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
        lp, loss=loss, beta=beta, label_smoothing=smoothing(loss, eps), normalize_lengths=False,
        reduction="none",
    )  # fmt: skip
