"""finefuse.numpy's preference losses from logits: the reference, layouts. Needs no torch."""

from __future__ import annotations

import itertools

import finefuse.numpy as ffn
import numpy as np
import pytest
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from finefuse.reference import logprobs as reference_logprobs
from finefuse.reference import preference as reference
from numpy_cases import (
    DTYPES,
    IGNORE,
    assert_same,
    eager_gradient,
    eager_stats,
    layouts,
    same,
    wide_of,
)
from numpy_preference_cases import (
    NUMBERS,
    batch,
    check_loss,
    smoothing,
)
from tolerances import check


def tail_weights(targets, ld_alpha):
    keep = targets != IGNORE
    n = keep.sum(-1)
    h = len(n) // 2
    shorter = np.concatenate([np.minimum(n[:h], n[h:])] * 2)
    return np.where(keep.cumsum(-1) > shorter[:, None], ld_alpha, 1.0)


def formula(lp, targets, ref, ld_alpha, **options):
    """(the reference's output, the derivatives by token), from token log-probabilities (2·pairs, T)."""
    h, n = len(lp) // 2, np.maximum((targets != IGNORE).sum(-1), 1)
    lp, weight = lp.astype(np.float64), tail_weights(targets, 1.0 if ld_alpha is None else ld_alpha)
    s, own_nll = (lp * weight).sum(-1), ld_alpha is not None and bool(LOSSES[options["loss"]].nll)
    by_sequence = options.get("normalize_lengths") is False
    tokens = h if by_sequence else n[:h].sum()
    if own_nll:
        options["chosen_nll"] = -lp[:h].sum() / tokens
    refs = () if ref is None else (ref[:h].astype(np.float64), ref[h:].astype(np.float64))
    out = reference.preference_loss(
        s[:h], s[h:], *refs, chosen_lengths=n[:h], rejected_lengths=n[h:], **options
    )
    g = np.concatenate([out.d_chosen, out.d_rejected])[:, None] * weight
    if own_nll:
        g[:h] -= out.d_nll / tokens
    return out, g


def compare_from_logits(logits, targets, ref=None, ld_alpha=None, **options):
    out, dz = ffn.preference_loss_from_logits(
        logits, targets, ref_logprobs=ref, ld_alpha=ld_alpha, return_grad=True, **options
    )
    b, t, v = logits.shape
    flat, y = logits.reshape(-1, v), targets.reshape(-1)
    lp = reference_logprobs.token_logprobs(flat, y)[0].reshape(b, t)
    truth, g = formula(lp, targets, ref, ld_alpha, **options)
    want = reference_logprobs.token_logprobs_gradient(flat, y, g.reshape(-1)).reshape(b, t, v)
    # the plain softmax in the logits' type, 16-bit types in float32
    lp = eager_stats(flat, y)[0].astype(wide_of(logits.dtype.name)).reshape(b, t)
    eager, g = formula(lp, targets, ref, ld_alpha, **options)
    g = g.reshape(-1)
    eager_dz = eager_gradient(flat, y, g, 0 * g, 0 * g).reshape(b, t, v)
    check_loss(out.loss, truth, eager.loss)
    check("gradient", dz, eager_dz, want)
    check("margins", out.margins, eager.margins, truth.margins)
    assert dz.dtype == logits.dtype
    assert_same(
        out,
        ffn.preference_loss_from_logits(
            logits, targets, ref_logprobs=ref, ld_alpha=ld_alpha, **options
        ),
    )
    return out, dz


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(1, 4, 2), (3, 7, 257)], ids=str)
def test_from_logits(isa, loss, dtype, shape):
    logits, targets, ref = batch(*shape, dtype)
    ref = ref.astype(wide_of(dtype))
    options = {"loss": loss, "beta": 0.1, "label_smoothing": smoothing(loss, 0.05), **NUMBERS}
    want = compare_from_logits(logits, targets, ref, **options)
    compare_from_logits(logits, targets, reduction="none", **options)
    consumed = logits.copy()
    out, dz = ffn.preference_loss_from_logits(
        consumed, targets, ref_logprobs=ref, return_grad=True, grad_out=consumed, **options
    )
    assert dz is consumed
    assert_same((out, dz), want)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_ld_alpha(loss, ld_alpha):
    """Tokens past the shorter answer weigh ld_alpha; the NLL and its gradient are of all in full."""
    options = {"loss": loss, "label_smoothing": smoothing(loss, 0.1), **NUMBERS}
    for dtype in ("float32", "float64"):
        logits, targets, ref = batch(3, 7, 65, dtype)
        ref = ref.astype(dtype)
        for normalize, reduction in itertools.product((None, False), ("mean", "none")):
            compare_from_logits(
                logits, targets, ref, ld_alpha, normalize_lengths=normalize, reduction=reduction,
                **options,
            )  # fmt: skip
    ref_logits = np.random.default_rng(3).standard_normal(logits.shape)
    given = {"return_grad": True, "ld_alpha": ld_alpha, **options}
    weight = tail_weights(targets, ld_alpha)
    ref = ffn.sequence_logprobs(ffn.token_logprobs(ref_logits, targets) * weight)
    a = ffn.preference_loss_from_logits(logits, targets, ref_logits=ref_logits, **given)
    assert_same(a, ffn.preference_loss_from_logits(logits, targets, ref_logprobs=ref, **given))
    # a given NLL is a constant
    a = ffn.preference_loss_from_logits(logits, targets, chosen_nll=np.ones(1), **given)[1]
    b = ffn.preference_loss_from_logits(logits, targets, chosen_nll=np.zeros(1), **given)[1]
    assert same(a, b)


def test_ld_alpha_of_impossible_tokens():
    """A token of weight 0 adds 0, also where it is impossible, as in torch; and no warning."""
    logits, targets, _ = batch(1, 4, 5, "float64")
    targets[:] = 1
    targets[1, 2:] = IGNORE
    possible = ffn.preference_loss_from_logits(logits, targets, ld_alpha=0.0).loss
    logits[0, 3, 1] = -np.inf
    assert ffn.preference_loss_from_logits(logits, targets, ld_alpha=0.0).loss == possible
    assert ffn.preference_loss_from_logits(logits, targets, ld_alpha=0.5).loss == np.inf


def test_from_logits_reference():
    logits, targets, _ = batch(2, 5, 33)
    ref_logits = np.random.default_rng(5).standard_normal(logits.shape)
    s = ffn.sequence_logprobs(ffn.token_logprobs(ref_logits, targets))
    a = ffn.preference_loss_from_logits(logits, targets, ref_logits=ref_logits, return_grad=True)
    b = ffn.preference_loss_from_logits(logits, targets, ref_logprobs=s, return_grad=True)
    assert_same(a, b)
    assert a[0].loss.dtype == np.float64
    assert a[1].dtype == np.float32
    free = ffn.preference_loss_from_logits(logits, targets)
    assert_same(
        free, ffn.preference_loss_from_logits(logits, targets, ref_logprobs=np.zeros(4, "f4"))
    )
    logits[targets == IGNORE] = np.nan
    for ld_alpha in (None, 1.0):
        out, dz = ffn.preference_loss_from_logits(
            logits, targets, return_grad=True, ld_alpha=ld_alpha
        )
        assert_same(out, free)
        assert (dz[targets == IGNORE] == 0).all()
        assert np.isfinite(dz).all()


def test_lists_from_logits():
    logits, targets, ref = batch(3, 6, 65, "float64")
    names, weights = ["sigmoid", "sft", "kto"], [0.8, 0.3, 1.2]
    options = {"ref_logprobs": ref, "return_grad": True, "ld_alpha": 0.4}
    out, dz = ffn.preference_loss_from_logits(
        logits, targets, loss=names, loss_weights=weights, kl=np.ones(2), **options
    )
    parts = [
        ffn.preference_loss_from_logits(logits, targets, loss=name, kl=np.ones(2), **options)
        for name in names
    ]
    value = sum(w * o.loss for w, (o, _) in zip(weights, parts, strict=True))
    want = sum(w * d for w, (_, d) in zip(weights, parts, strict=True))
    check("loss", out.loss, value, np.asarray(value))
    check("gradient", dz, want, want)


@pytest.mark.parametrize("name", layouts(np.zeros((6, 9, 2), np.float32)))
def test_layouts(name):
    """The same bits as the contiguous array, nothing written to the argument."""
    cube = batch(3, 9, 65)[0]
    logits = layouts(cube)[name]
    before = logits.tobytes()
    plain = np.array(logits, cube.dtype, order="C", subok=False)
    targets = np.asarray(np.random.default_rng(2).integers(0, plain.shape[-1], plain.shape[:-1]))
    if plain.ndim != 3 or len(plain) % 2:
        with pytest.raises(ValueError, match="logits: shape"):
            ffn.preference_loss_from_logits(logits, targets)
        return
    targets[..., 3:4] = IGNORE
    options = {"loss": "cpo", "sft_weight": 0.5, "ld_alpha": 0.5, "return_grad": True}
    assert_same(
        ffn.preference_loss_from_logits(logits, np.asfortranarray(targets), **options),
        ffn.preference_loss_from_logits(plain, targets, **options),
    )
    assert logits.tobytes() == before
