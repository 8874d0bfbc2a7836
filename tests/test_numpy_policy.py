"""finefuse.numpy's policy losses, value loss and advantages: the reference, torch's bits, layouts, arguments.
Needs no torch."""

from __future__ import annotations

import math

import finefuse.numpy as ffn
import numpy as np
import pytest
from finefuse._args.policy import POLICY_LOSSES as LOSSES
from finefuse.reference import logprobs as reference
from finefuse.reference import policy as reference_policy
from test_numpy import (
    DTYPES,
    IGNORE,
    TYPES,
    Subclass,
    assert_same,
    eager_gradient,
    eager_stats,
    in_a_struct,
    layouts,
    read_only,
    same,
    swapped,
)
from tolerances import ScalarErrors, check

# Those whose ratio is a sequence's: two passes over logits.
BY_SEQUENCE = [name for name, loss in LOSSES.items() if loss.importance != "token"]


def misaligned(x):
    """The same values, one byte off a boundary where the type has one."""
    view = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def wide_of(dtype):
    return np.float64 if dtype == "float64" else np.float32


def tokens(shape=(4, 7), dtype="float32", *, seed=0, spread=0.4):
    """(logprobs, old, ref, weights, advantages a sequence); both sides of every clip are there."""
    rng = np.random.default_rng(seed)
    lp = -3 * rng.random(shape)
    old, ref = lp + spread * rng.standard_normal((2, *shape))
    weights = rng.random(shape) * (rng.random(shape) > 0.2)
    vectors = (lp, old, ref, weights, rng.standard_normal(shape[:-1]))
    return tuple(v.astype(TYPES[dtype]) for v in vectors)


def mask_of(shape, seed=9):
    mask = np.random.default_rng(seed).random(shape) > 0.3
    mask.reshape(-1, shape[-1])[1] = False  # a sequence without a token
    return mask


def wide(x):
    return None if x is None else x.astype(np.float64)


def truth_of(lp, advantages, **options):
    """The reference, and the sum of the absolute terms of its loss."""
    arrays = ("old_logprobs", "ref_logprobs", "weights")
    options = {k: wide(v) if k in arrays else v for k, v in options.items()}
    weights = options.get("weights")
    if weights is not None and weights.shape != lp.shape:
        options["weights"] = np.broadcast_to(weights.reshape(*lp.shape[:-1], 1), lp.shape)
    lp, advantages = wide(lp), wide(advantages)
    out = reference_policy.policy_loss(lp, advantages, **options)
    each = reference_policy.policy_loss(lp, advantages, **{**options, "reduction": "none"}).loss
    how = ("mask", "cu_seqlens", "max_length", "num_tokens")
    share = -reference_policy.policy_loss(
        -np.ones(lp.shape), np.ones(lp.shape), loss="reinforce",
        reduction=options.get("reduction") or options.get("loss", "ppo"),
        **{k: options[k] for k in how if k in options},
    ).gradient  # fmt: skip
    return out, float(np.sum(share * np.abs(each)))


def check_scalar(name, ours, eager, truth, terms):
    """The rule for a scalar: what was added up sets the scale."""
    array = np.array([ours, terms])
    check(name, array, [eager, terms], [truth, terms], np.asarray(ours).dtype)


def check_metrics(out, truth, eager=None):
    eager = truth if eager is None else eager
    for name in ("clip_fraction_low", "clip_fraction_high", "approx_kl"):
        ours = getattr(out, name)
        check(name, ours, getattr(eager, name), np.asarray(getattr(truth, name)))


def compare(name, lp, advantages, **options):
    """A call against the reference, whose sums are the kernels' own, in float64: no licence for an eager."""
    out, gradient = ffn.policy_loss(lp, advantages=advantages, return_grad=True, **options)
    dtype = wide_of(lp.dtype.name)
    truth, terms = truth_of(lp, advantages, **options)
    assert out.loss.dtype == gradient.dtype == dtype
    check(f"{name}: gradient", gradient, truth.gradient, truth.gradient)
    if truth.loss.ndim:
        check(f"{name}: loss", out.loss, truth.loss, truth.loss)
    else:
        assert type(out.loss) is dtype
        check_scalar(f"{name}: loss", out.loss, truth.loss, truth.loss, terms)
    check_metrics(out, truth)
    assert out.entropy is None
    assert_same(out[:4], ffn.policy_loss(lp, advantages=advantages, **options)[:4])
    return out, gradient


# ---- from log-probabilities --------------------------------------------------------------------


# The kernels know float32 and float64; what is narrower is widened (below).
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_policy_loss(isa, loss, dtype):
    lp, old, ref, weights, A = tokens(dtype=dtype)
    by_token = tokens(dtype=dtype, seed=1)[0] - A.dtype.type(-1)
    mask = mask_of(lp.shape)
    options = {"old_logprobs": old, "loss": loss}
    every = {"mask": mask, "weights": weights, "ref_logprobs": ref, "kl_beta": 0.1, **options}
    compare("all", lp, by_token, **every)
    compare("of sequences", lp, A, importance="sequence", reduction="none", **every)
    if dtype == "float64":
        return
    compare("plain", lp, A, **options)
    compare("no old", lp, A, loss=loss)
    compare("advantages (B, 1)", lp, A[:, None], **options)
    compare("advantages by token", lp, by_token, **options)
    compare("mask", lp, A, mask=mask, **options)
    compare("a weight a row", lp, A, mask=mask, weights=weights[:, 0], **options)
    for how in ("none", "sum", "mean", *LOSSES):
        compare(f"reduction {how}", lp, A, mask=mask, reduction=how, **options)
    if loss not in ("rloo", "vespo"):
        compare("of tokens", lp, A, mask=mask, importance="token", **options)
    compare("of sequences", lp, A, mask=mask, importance="sequence", **options)


def test_options(isa):
    """Each option by itself, where it bites."""
    lp, old, ref, _, A = tokens((5, 9), spread=1.0)
    mask, base = mask_of(lp.shape), {"old_logprobs": old}
    plain = compare("plain", lp, A, mask=mask, **base)[0].loss
    for options in (
        {"clip_low": 0.05}, {"clip_high": 0.9}, {"dual_clip": 1.1}, {"delta": 1.01},
        {"ref_logprobs": ref, "kl_beta": 0.3, "kl": "k1"}, {"ref_logprobs": ref, "kl_beta": -0.3, "kl": "k2"},
        {"ref_logprobs": ref, "kl_beta": 0.3}, {"ref_logprobs": ref, "kl_beta": 0.3, "kl_times_ratio": True},
        {"ref_logprobs": ref, "kl_beta": 0.3, "kl_times_ratio": True, "importance": "sequence"},
    ):  # fmt: skip
        assert compare(str(list(options)), lp, A, mask=mask, **options, **base)[0].loss != plain
    compare("cap", lp, A, loss="cispo", clip_high=1.1, **base)
    compare("τ", lp, A, loss="sapo", tau_pos=0.5, tau_neg=2.0, **base)
    for loss in ("dapo", "cispo", "vespo"):
        compare("num_tokens", lp, A, mask=mask, loss=loss, num_tokens=77, **base)
        compare("no tokens", lp, A, mask=mask, loss=loss, num_tokens=0, **base)
    compare("max_length", lp, A, loss="dr_grpo", max_length=100, **base)
    want = ffn.policy_loss(lp, advantages=A, loss="dapo", num_tokens=7.0, clip_low=0.1, **base)
    numbers = {"num_tokens": np.array(7), "clip_low": np.array(0.1)}
    assert_same(want[:4], ffn.policy_loss(lp, advantages=A, loss="dapo", **numbers, **base)[:4])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_ratios(isa, dtype):
    """Beyond e^±60 a ratio is clamped and passes no gradient; nothing overflows."""
    lp, old, ref, _, A = tokens((4, 6), dtype)
    old[:, ::2] += TYPES[dtype](200)
    old[:, 1::3] -= TYPES[dtype](500)
    for loss in LOSSES:
        for whose in ("token", "sequence")[loss in BY_SEQUENCE :]:
            out, gradient = ffn.policy_loss(
                lp, advantages=A, old_logprobs=old, loss=loss, importance=whose, reduction="none",
                return_grad=True,
            )  # fmt: skip
            truth, _ = truth_of(
                lp, A, old_logprobs=old, loss=loss, importance=whose, reduction="none"
            )
            check("loss", out.loss, truth.loss, truth.loss)
            check("gradient", gradient, truth.gradient, truth.gradient)
    ref[:, 0] += TYPES[dtype](300)
    compare("k3", lp, A, ref_logprobs=ref, kl_beta=0.1)


@pytest.mark.parametrize("loss", LOSSES)
def test_packed_sequences(isa, loss):
    lp, old, ref, weights, _ = tokens((24,))
    ends = np.array([0, 5, 5, 6, 17, 24])
    A = np.random.default_rng(3).standard_normal(5).astype(np.float32)
    mask = mask_of((2, 24))[0]
    mask[5] = False  # all of the third
    options = {
        "loss": loss,
        "old_logprobs": old,
        "weights": weights,
        "ref_logprobs": ref,
        "kl_beta": 0.2,
    }
    if loss == "dr_grpo":
        options["max_length"] = 12
    for advantages in (A, A[:, None], np.repeat(A, np.diff(ends))):
        want = compare("packed", lp, advantages, cu_seqlens=ends, mask=mask, **options)
    compare("not masked", lp, A, cu_seqlens=ends, **options)
    for index in (np.int32, np.uint8, ">i8"):
        got = ffn.policy_loss(
            lp, advantages=np.repeat(A, np.diff(ends)), cu_seqlens=ends.astype(index), mask=mask,
            return_grad=True, **options,
        )  # fmt: skip
        assert_same((got[0][:4], got[1]), (want[0][:4], want[1]))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_masked_is_not_read(isa, loss):
    lp, old, ref, weights, _ = tokens((3, 8))
    A, mask = tokens((3, 8), seed=2)[0] + 1, mask_of((3, 8))
    options = {
        "loss": loss,
        "mask": mask,
        "kl_beta": 0.1,
        "kl_times_ratio": True,
        "return_grad": True,
    }

    def call(lp, old, ref, weights, A, **more):
        out, gradient = ffn.policy_loss(
            lp, old_logprobs=old, ref_logprobs=ref, weights=weights, advantages=A, **options | more
        )
        return out[:4], gradient

    for how in (None, "none"):
        want = call(lp, old, ref, weights, A, reduction=how)
        assert not want[1][~mask].any()
        for fill in (np.nan, np.inf):
            odd = [np.where(mask, x, np.float32(fill)) for x in (lp, old, ref, weights, A)]
            assert_same(call(*odd, reduction=how), want)
    for other in (mask * 3, mask.astype(np.float16), mask.astype(">i4"), mask[:, ::-1][:, ::-1]):
        assert_same(call(lp, old, ref, weights, A, mask=other, reduction="none"), want)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_counts(isa, loss):
    """Empty batches, sequences without a token, masks that are False all over: 0 and no gradient."""
    for shape in ((3, 5), (0, 5), (3, 0), (0,), (5,), (2, 0, 3)):
        lp, old, ref, _, A = tokens(shape)
        for how in (None, "none", "sum", *LOSSES):
            out, gradient = ffn.policy_loss(
                lp, advantages=A, old_logprobs=old, ref_logprobs=ref, kl_beta=0.1, loss=loss,
                mask=np.zeros(shape, bool), reduction=how, return_grad=True,
            )  # fmt: skip
            assert out.loss.shape == (shape if how == "none" else ())
            assert gradient.shape == shape
            assert not any(np.any(x) for x in (*out[:4], gradient))
    for ends, count in (([0], 0), ([0, 0, 0], 0), ([0, 0, 4, 4], 4)):
        lp, old, _, _, _ = tokens((count,))
        options = {"loss": loss, "cu_seqlens": np.array(ends), "max_length": 3, "return_grad": True}
        A = np.ones(len(ends) - 1, np.float32)
        out, gradient = ffn.policy_loss(lp, advantages=A, old_logprobs=old, **options)
        assert np.isfinite(out.loss)
        assert gradient.shape == (count,)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in ("float32", "float64")])
def test_narrow_and_mixed_types(dtype):
    """16-bit numbers are widened exactly; a float64 log-probability makes it all float64."""
    lp, old, ref, weights, A = tokens(dtype=dtype)
    wide_ = [x.astype(np.float32) for x in (lp, old, ref, weights, A)]

    def call(lp, old, ref, weights, A):
        out, gradient = ffn.policy_loss(
            lp, old_logprobs=old, ref_logprobs=ref, kl_beta=0.1, weights=weights, advantages=A,
            return_grad=True,
        )  # fmt: skip
        return out[:4], gradient

    want = call(*wide_)
    assert_same(call(lp, old, ref, weights, A), want)
    assert_same(call(lp, *wide_[1:]), want)
    assert_same(call(*wide_[:3], weights.astype(np.float64), A.astype(np.float64)), want)
    for i in range(3):
        given = [x.astype(np.float64) if i == j else x for j, x in enumerate(wide_)]
        out, gradient = call(*given)
        assert {np.asarray(x).dtype for x in (*out, gradient)} == {np.dtype(np.float64)}


def test_arrays_of_every_kind():
    lp, old, ref, weights, A = tokens((5, 8))
    mask = mask_of((5, 8))

    def call(lp, old, ref, weights, A, mask):
        out, gradient = ffn.policy_loss(
            lp, old_logprobs=old, ref_logprobs=ref, kl_beta=0.1, weights=weights, advantages=A,
            mask=mask, loss="gspo", return_grad=True,
        )  # fmt: skip
        assert type(gradient) is np.ndarray
        return out[:4], gradient

    given = (lp, old, ref, weights, A, mask)
    want = call(*given)
    for change in (
        swapped, misaligned, in_a_struct, read_only, np.asfortranarray, lambda x: x.view(Subclass),
        lambda x: np.repeat(x, 2, -1)[..., ::2], lambda x: x[::-1].copy()[::-1],
    ):  # fmt: skip
        odd = [change(x) for x in given]
        before = [x.tobytes() for x in odd]
        assert_same(call(*odd), want)
        assert [x.tobytes() for x in odd] == before
    cube = np.stack([lp, lp]).transpose(1, 0, 2)  # (5, 2, 8), leading dimensions of any number
    out, gradient = ffn.policy_loss(cube, advantages=A[:, None].repeat(2, 1), return_grad=True)
    flat = ffn.policy_loss(lp.repeat(2, 0), advantages=A.repeat(2), return_grad=True)
    assert_same((out[:4], gradient.reshape(10, 8)), (flat[0][:4], flat[1]))
    one = ffn.policy_loss(lp[0], advantages=A[0])  # a sequence alone, a NumPy scalar
    assert_same(one[:4], ffn.policy_loss(lp[:1], advantages=A[:1])[:4])


@pytest.mark.parametrize("loss", ["reinforce", "rloo", "ppo", "grpo", "luspo", "gspo", "sapo"])
def test_gradients_are_slopes(loss):
    """Against central differences, in float64; cispo and vespo stop gradients on purpose."""
    for seed in range(5):
        lp, old, ref, weights, A = tokens((3, 6), "float64", seed=seed)
        direction = np.random.default_rng(seed).standard_normal(lp.shape)
        options = {
            "loss": loss, "old_logprobs": old, "ref_logprobs": ref, "weights": weights, "advantages": A,
            "kl_beta": 0.2, "kl_times_ratio": seed % 2 == 0, "mask": mask_of(lp.shape),
        }  # fmt: skip
        for how in (None, "none"):

            def f(x, options=options, how=how):
                return np.sum(ffn.policy_loss(x, reduction=how, **options).loss)

            _, gradient = ffn.policy_loss(lp, reduction=how, return_grad=True, **options)
            slope = (f(lp + 2e-6 * direction) - f(lp - 2e-6 * direction)) / 4e-6
            assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-6, abs=1e-6)


# ---- from logits -------------------------------------------------------------------------------


def batch(shape=(3, 5, 33), dtype="float32", seed=0):
    """(logits, actions, what policy_loss takes beside); some actions are ignored."""
    rng = np.random.default_rng(seed)
    logits = (2 * rng.standard_normal(shape)).astype(TYPES[dtype])
    actions = rng.integers(0, shape[-1], shape[:-1])
    actions[..., 2:3] = IGNORE
    lp = -math.log(shape[-1]) + rng.standard_normal(shape[:-1])
    lp = reference.token_logprobs(logits.reshape(-1, shape[-1]), actions.reshape(-1))[0]
    old = lp.reshape(shape[:-1]) + 0.3 * rng.standard_normal(shape[:-1])
    ref = old + 0.3 * rng.standard_normal(shape[:-1])
    A = 1 + rng.standard_normal(shape[:-2])
    vectors = {"old_logprobs": old, "ref_logprobs": ref, "advantages": A}
    return logits, actions, {k: v.astype(wide_of(dtype)) for k, v in vectors.items()}


def from_logits(stats, gradient_of, logits, actions, entropy_coef, temperature, options):
    """(loss, sum of absolute terms, mean entropy, gradient, Output), from statistics in float64 (the truth)
    or in the type of the logits (the eager form)."""
    flat, y = logits.reshape(-1, logits.shape[-1]), actions.reshape(-1)
    lp, entropy, _ = stats(flat, y, temperature)
    shape, keep = actions.shape, actions != IGNORE
    out, terms = truth_of(
        lp.reshape(shape), options["advantages"], mask=keep,
        **{k: v for k, v in options.items() if k != "advantages"},
    )  # fmt: skip
    by_token, count = options.get("reduction") == "none", max(np.count_nonzero(keep), 1)
    entropy = np.asarray(entropy, np.float64).reshape(shape)
    mean = entropy.sum() / count
    loss = out.loss - entropy_coef * (entropy if by_token else mean)
    h = np.full(len(y), -entropy_coef / (1 if by_token else count))
    dz = gradient_of(flat, y, out.gradient.reshape(-1), h, 0 * h, temperature=temperature)
    terms += abs(entropy_coef) * mean
    return loss, terms, mean, dz.reshape(logits.shape), out


def in_type(logits, actions, *rest):
    def stats(z, y, temperature):
        return eager_stats(z.astype(wide_of(z.dtype.name)), y, temperature)

    return from_logits(stats, eager_gradient, logits, actions, *rest)


def in_float64(*args):
    return from_logits(reference.token_logprobs, reference.token_logprobs_gradient, *args)


def compare_from_logits(logits, actions, entropy_coef=0.0, temperature=1.0, **options):
    more = {"entropy_coef": entropy_coef, "temperature": temperature}
    out, dz = ffn.policy_loss_from_logits(logits, actions, return_grad=True, **more, **options)
    loss, terms, entropy, gradient, truth = in_float64(
        logits, actions, entropy_coef, temperature, options
    )
    e_loss, _, e_entropy, e_gradient, eager = in_type(
        logits, actions, entropy_coef, temperature, options
    )
    assert dz.dtype == logits.dtype
    alone = ffn.policy_loss_from_logits(logits, actions, **more, **options)
    check("gradient", dz, e_gradient, gradient)
    for values in (out, alone):
        if np.ndim(loss):
            check("loss", values.loss, e_loss, loss)
        else:
            check_scalar("loss", values.loss, e_loss, loss, terms)
        check("entropy", values.entropy, e_entropy, entropy)
        check_metrics(values, truth, eager)
        assert {np.asarray(v).dtype for v in values} == {np.dtype(wide_of(logits.dtype.name))}
    return out, dz


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_from_logits(isa, loss, dtype):
    logits, actions, options = batch((2, 4, 19), dtype)
    del options["ref_logprobs"]
    options["loss"] = loss
    compare_from_logits(logits, actions, **options)
    compare_from_logits(logits, actions, 0.03, 0.7, **options)
    compare_from_logits(logits, actions, -0.5, **options, reduction="none")


# 1: one class, log-probability and entropy 0; 3001: odd tails, more than one block of 2048.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 31, 3001])
def test_from_logits_of_any_size(isa, vocab, dtype):
    logits, actions, options = batch((2, 4, vocab), dtype)
    options |= {"kl_beta": 0.1, "kl_times_ratio": True, "delta": 1.5}
    for importance in ("token", "sequence"):
        compare_from_logits(logits, actions, 0.1, 1.3, importance=importance, **options)


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "vespo"])
def test_from_logits_over_seeds(loss):
    errors = ScalarErrors(loss, "float32")
    for seed in range(32):
        logits, actions, options = batch((2, 4, 65), seed=seed)
        options = {k: options[k] for k in ("old_logprobs", "advantages")} | {"loss": loss}
        truth, terms = in_float64(logits, actions, 0.01, 1.0, options)[:2]
        eager = in_type(logits, actions, 0.01, 1.0, options)[0]
        ours = ffn.policy_loss_from_logits(
            logits, actions, entropy_coef=0.01, return_grad=True, **options
        )[0]
        errors.add(ours.loss, np.float64(eager), truth, terms)
    errors.check()


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_and_two(isa, loss):
    """From logits is the same as from their log-probabilities; two passes, bit for bit."""
    logits, actions, options = batch(dtype="float64")
    keep = actions != IGNORE
    options |= {"loss": loss, "kl_beta": 0.1}
    lp, entropy, _ = ffn.token_logprobs(logits, actions, stats=True)
    want, g = ffn.policy_loss(lp, mask=keep, return_grad=True, **options)
    dz = ffn.token_logprobs(logits, actions, return_grad=True, upstream=g)[1]
    out, got = ffn.policy_loss_from_logits(logits, actions, return_grad=True, **options)
    check("gradient", got, dz, dz)
    check("loss", out.loss, want.loss, want.loss)
    assert out.entropy == pytest.approx(entropy.sum() / keep.sum())
    if loss in BY_SEQUENCE:
        assert_same((out[:4], got), (want[:4], dz))
    alone = ffn.policy_loss_from_logits(logits, actions, **options)
    assert_same(alone[:4], want[:4])
    each, by_token = ffn.policy_loss(lp, mask=keep, reduction="none", return_grad=True, **options)
    out, got = ffn.policy_loss_from_logits(
        logits, actions, reduction="none", return_grad=True, **options
    )
    dz = ffn.token_logprobs(logits, actions, return_grad=True, upstream=by_token)[1]
    assert_same((out[:4], got), (each[:4], dz))


@pytest.mark.parametrize("loss", ["ppo", "gspo"])
@pytest.mark.parametrize("how", [None, "none"])
def test_masked_logits_are_not_read(isa, loss, how):
    logits, actions, options = batch()
    actions[actions == IGNORE] = 3
    mask = mask_of(actions.shape)
    options |= {
        "loss": loss,
        "reduction": how,
        "kl_beta": 0.1,
        "entropy_coef": 0.1,
        "return_grad": True,
    }
    f = ffn.policy_loss_from_logits
    ignored = np.where(mask, actions, IGNORE)
    want = f(logits, ignored, **options)
    assert not want[1][~mask].any()
    assert_same(f(logits, actions, mask=mask, **options), want)
    out_of_range = np.where(mask, actions, 2**31)
    for fill in (np.nan, np.inf):
        z = np.where(mask[..., None], logits, np.float32(fill))
        odd = {
            k: np.where(mask, options[k], np.float32(fill))
            for k in ("old_logprobs", "ref_logprobs")
        }
        A = options["advantages"]
        odd["advantages"] = np.where(mask, A[:, None], np.float32(fill))
        assert_same(f(z, actions, mask=mask, **options | odd), want)
        assert_same(f(z, out_of_range, mask=mask * 2, **options | odd), want)
        assert_same(f(z, actions, mask=mask, **options | odd | {"return_grad": False})[1:],
                    f(logits, ignored, **options | {"return_grad": False})[1:])  # fmt: skip
    # another ignore_index, beyond the actions' type, and masked beside it
    small = actions.astype(np.int32)
    assert_same(f(logits, small, mask=mask, ignore_index=2**40, **options), want)
    # nothing counts
    for nothing in ({"mask": np.zeros(actions.shape, bool)}, {}):
        y = actions if nothing else np.full(actions.shape, IGNORE)
        out, dz = f(logits * np.float32(np.nan), y, **nothing, **options)
        assert not any(np.any(x) for x in (*out, dz))


@pytest.mark.parametrize("loss", ["ppo", "dapo", "luspo"])
def test_from_packed_logits(isa, loss):
    logits, actions, options = batch((24, 33))
    ends = np.array([0, 5, 5, 6, 17, 24])
    rng = np.random.default_rng(2)
    actions = rng.integers(0, 33, 24)
    actions[5] = IGNORE
    options = {
        "old_logprobs": ffn.token_logprobs(logits, actions) + rng.normal(0, 0.3, 24).astype("f4"),
        "advantages": rng.standard_normal(5).astype(np.float32), "cu_seqlens": ends, "loss": loss,
    }  # fmt: skip
    compare_from_logits(logits, actions, 0.1, **options)


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (0, 7), (1, 1, 1)])
@pytest.mark.parametrize("loss", ["ppo", "rloo"])
def test_empty_logits(shape, loss):
    logits, actions, A = np.zeros(shape), np.zeros(shape[:-1], int), np.zeros(shape[:-2])
    for how in (None, "none"):
        options = {"advantages": A, "loss": loss, "reduction": how, "entropy_coef": 0.1}
        out, dz = ffn.policy_loss_from_logits(logits, actions, return_grad=True, **options)
        assert dz.shape == shape
        assert not any(np.any(x) for x in (*out, dz))
        assert_same(out, ffn.policy_loss_from_logits(logits, actions, **options))


CALLS = {
    "one pass": {"kl_beta": 0.1, "entropy_coef": 0.02},
    "sequences": {"loss": "gspo", "temperature": 0.8, "entropy_coef": 0.02},
    "none": {"loss": "cispo", "reduction": "none"},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_layouts(isa, call, dtype):
    """The same bits as the contiguous array, nothing written to the argument, in place too."""
    cube = np.random.default_rng(0).standard_normal((6, 9, 35)).astype(TYPES[dtype])
    for name, logits in layouts(cube).items():
        if logits.ndim < 2:
            continue
        plain = np.array(logits, cube.dtype, order="C", subok=False)
        rng = np.random.default_rng(2)
        actions = rng.integers(0, plain.shape[-1], plain.shape[:-1])
        actions[..., 3:4] = IGNORE
        old, ref = (-3 * rng.random((2, *actions.shape))).astype(wide_of(dtype))
        options = {
            "old_logprobs": old, "ref_logprobs": ref, "advantages": 1 + old[..., 0], "return_grad": True,
            **CALLS[call],
        }  # fmt: skip
        before = logits.tobytes()
        want = ffn.policy_loss_from_logits(plain, actions, **options)
        got = ffn.policy_loss_from_logits(logits, actions, **options)
        assert type(got[1]) is np.ndarray
        assert_same(got, want, name)
        odd = {k: swapped(options[k])[::-1].copy()[::-1] for k in ("old_logprobs", "ref_logprobs")}
        got = ffn.policy_loss_from_logits(logits, np.asfortranarray(actions), **options | odd)
        assert_same(got, want, name)
        assert logits.tobytes() == before
        # the gradient in memory of its own, and in the logits'
        for make in (np.empty_like, misaligned):
            out = make(plain.astype(logits.dtype))
            got = ffn.policy_loss_from_logits(logits, actions, grad_out=out, **options)
            assert got[1] is out
            assert_same((got[0], out.astype(plain.dtype)), want, name)
        if logits.flags.writeable:
            storage = logits.copy(order="K")
            got = ffn.policy_loss_from_logits(storage, actions, grad_out=storage, **options)
            assert got[1] is storage
            assert_same((got[0], np.array(storage, plain.dtype, subok=False)), want, name)


def test_actions_of_every_kind():
    logits, actions, options = batch()
    want = ffn.policy_loss_from_logits(logits, actions, return_grad=True, **options)
    kinds = [actions.astype(t) for t in ("i4", "i2", "i1", ">i8", ">i2")]
    kinds += [misaligned(actions), read_only(actions), actions.T.copy().T, actions.view(Subclass)]
    for y in kinds:
        assert_same(ffn.policy_loss_from_logits(logits, y, return_grad=True, **options), want)


@pytest.mark.parametrize("call", CALLS)
def test_logits_gradients_are_slopes(call):
    logits, actions, options = batch(dtype="float64")
    options |= {"loss": "ppo", **CALLS[call]}
    if call == "none":  # cispo stops gradients on purpose
        options["loss"] = "sapo"
    direction = np.random.default_rng(1).standard_normal(logits.shape)

    def f(z):
        return np.sum(ffn.policy_loss_from_logits(z, actions, **options).loss)

    _, dz = ffn.policy_loss_from_logits(logits, actions, return_grad=True, **options)
    slope = (f(logits + 2e-6 * direction) - f(logits - 2e-6 * direction)) / 4e-6
    assert np.sum(dz * direction) == pytest.approx(slope, rel=1e-6, abs=1e-6)


# ---- value loss, advantages --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [None, 0.0, 0.2, math.inf])
def test_value_loss(isa, dtype, clip):
    rng = np.random.default_rng(0)
    values, returns, old = rng.standard_normal((3, 4, 9)).astype(TYPES[dtype])
    mask = mask_of(values.shape)
    for m in (None, mask):
        loss, gradient = ffn.value_loss(values, returns, old, clip=clip, mask=m, return_grad=True)
        truth, want = reference_policy.value_loss(wide(values), wide(returns), wide(old), clip, m)
        check("loss", loss, truth, np.asarray(truth))
        check("gradient", gradient, want, want)
        assert type(loss) is wide_of(dtype)
        assert gradient.dtype == wide_of(dtype)
        assert same(loss, ffn.value_loss(values, returns, old, clip=clip, mask=m))
    odd = [np.where(mask, x, TYPES[dtype](np.nan)) for x in (values, returns, old)]
    want = (loss, gradient)
    for change in (lambda x: x, swapped, misaligned, lambda x: x.T.copy().T):
        changed = [change(x) for x in odd]
        assert_same(ffn.value_loss(*changed, clip=clip, mask=mask * 1.5, return_grad=True), want)
    if clip is None:
        assert_same(ffn.value_loss(*odd[:2], mask=mask, return_grad=True), want)
        unread = np.full_like(old, np.nan)  # without clip
        assert_same(ffn.value_loss(*odd[:2], unread, mask=mask, return_grad=True), want)
    for empty in (values[:0], values[:, :0]):
        loss, gradient = ffn.value_loss(empty, empty, empty, clip=clip, return_grad=True)
        assert loss == 0
        assert gradient.shape == empty.shape
    loss, gradient = ffn.value_loss(*odd, clip=clip, mask=mask & False, return_grad=True)
    assert loss == 0
    assert not gradient.any()
    assert ffn.value_loss(values[0, 0], returns[0, 0]).shape == ()


def test_value_loss_of_many_blocks():
    rng = np.random.default_rng(0)
    values, returns = rng.standard_normal((2, 3, 5000))
    loss, gradient = ffn.value_loss(values, returns, return_grad=True)
    truth = 0.5 * np.mean((values - returns) ** 2)
    check("loss", loss, truth, truth)
    check("gradient", gradient, (values - returns) / 15000, (values - returns) / 15000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_group_advantages(isa, dtype, scale, baseline):
    rewards = np.random.default_rng(0).standard_normal((4, 6)).astype(TYPES[dtype])
    rewards[1, 2] = rewards[2, 1:] = rewards[3] = np.nan
    rewards[0, 3:] = 1  # of one value all over, where groups have three
    options = {"scale": scale, "baseline": baseline}
    for size in (1, 3, 6, np.int64(24)):
        out = ffn.group_advantages(rewards, size, **options)
        want = reference_policy.group_advantages(wide(rewards), size, **options)
        assert out.dtype == wide_of(dtype)
        check("advantages", out, want, want)
        for x in (
            swapped(rewards),
            misaligned(rewards),
            rewards.T.copy().T,
            rewards.view(Subclass),
        ):
            assert same(ffn.group_advantages(x, size, **options), out)
    right = np.arange(12) % 3 == 0
    want = ffn.group_advantages(right.astype(np.float32), 4, **options)
    for t in (bool, np.int8, np.int64, ">u2", np.float16):
        assert same(ffn.group_advantages(right.astype(t), 4, **options), want)
    assert ffn.group_advantages(rewards[:0], 5, **options).shape == (0, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae(isa, dtype, bootstrap):
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal((2, 3, 9)).astype(TYPES[dtype])
    values = rng.standard_normal((2, 3, 9 + bootstrap)).astype(TYPES[dtype])
    mask = mask_of(rewards.shape)
    for gamma, lam, m in ((0.99, 0.95, None), (0.9, 1, mask), (np.float32(1), np.array(0.5), mask)):
        got = ffn.gae(rewards, values, gamma=gamma, lam=lam, mask=m)
        want = reference_policy.gae(wide(rewards), wide(values), float(gamma), float(lam), m)
        for name, a, w in zip(("advantages", "returns"), got, want, strict=True):
            check(name, a, w, w)
            assert a.dtype == wide_of(dtype)
    odd_r, odd_v = rewards.copy(), values.copy()
    odd_r[~mask] = odd_v[..., :9][~mask] = np.nan
    for change in (lambda x: x, swapped, misaligned, in_a_struct, np.asfortranarray):
        again = ffn.gae(change(odd_r), change(odd_v), gamma=1.0, lam=0.5, mask=change(mask * 2))
        assert_same(again, got)
    if dtype == "float32":
        mixed, _ = ffn.gae(rewards.astype(np.float64), values, gamma=1, lam=0.5, mask=mask)
        assert mixed.dtype == np.float64
        assert same(mixed.astype(np.float32), got[0])
        for t in (bool, np.int32):
            ints = (rewards > 0).astype(t)
            assert_same(ffn.gae(ints, values, gamma=1, lam=1),
                        ffn.gae(ints.astype(np.float32), values, gamma=1, lam=1))  # fmt: skip
    for r, v in ((rewards[:0], values[:0]), (rewards[..., :0], values[..., : int(bootstrap)])):
        assert all(x.shape == r.shape for x in ffn.gae(r, v, gamma=1, lam=1))


# ---- the same bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_same_bits_as_torch(isa, dtype):
    torch = pytest.importorskip("torch", reason="compares with the torch functions")
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")
    import finefuse as ff

    def to_torch(x):
        if isinstance(x, np.ndarray):
            if x.dtype.name == "bfloat16":
                return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(x.copy())
        return x

    def to_numpy(x):
        x = x.detach()
        if x.dtype is torch.bfloat16:
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    lp, old, ref, weights, A = tokens((6, 25), dtype)
    mask = mask_of(lp.shape)
    options = {
        "old_logprobs": old, "ref_logprobs": ref, "kl_beta": 0.1, "weights": weights, "advantages": A,
        "mask": mask,
    }  # fmt: skip
    logits, actions, small = batch((3, 7, 129), dtype)
    for loss in LOSSES:
        for how in (None, "none"):
            x = to_torch(lp.astype(wide_of(dtype))).requires_grad_()
            given = {k: to_torch(v) for k, v in options.items()}
            out = ff.policy_loss(x, loss=loss, reduction=how, **given)
            out.loss.sum().backward()
            ours, gradient = ffn.policy_loss(
                lp, loss=loss, reduction=how, return_grad=True, **options
            )
            assert_same((ours[:4], gradient), (tuple(map(to_numpy, out[:4])), to_numpy(x.grad)))
            # float16's one pass is torch's two: a loss scaler asks for them there, and nothing here
            one_pass = how is None and loss not in BY_SEQUENCE
            if one_pass and dtype == "float16":
                continue
            x = to_torch(logits).clone().requires_grad_()
            given = {k: to_torch(v) for k, v in small.items()} | {"loss": loss, "reduction": how}
            given["entropy_coef"] = 0.1
            out = ff.policy_loss_from_logits(x, to_torch(actions), **given)
            out.loss.sum().backward()
            ours, gradient = ffn.policy_loss_from_logits(
                logits,
                actions,
                loss=loss,
                reduction=how,
                entropy_coef=0.1,
                return_grad=True,
                **small,
            )
            assert same(gradient, to_numpy(x.grad))
            assert_same(ours[1:4], tuple(map(to_numpy, out[1:4])))
            theirs = [to_numpy(x) for x in (out.loss, out.entropy)]
            if one_pass:
                assert_same((ours.loss, ours.entropy), tuple(theirs))
            else:  # torch adds the entropies up in another order
                for a, b in zip((ours.loss, ours.entropy), theirs, strict=True):
                    check("loss, entropy", a, b, b)
    v, r, o = (to_torch(x.astype(wide_of(dtype))) for x in (lp, old, ref))
    v.requires_grad_()
    for clip in (None, 0.2):
        v.grad = None
        loss = ff.value_loss(v, r, o, clip=clip, mask=to_torch(mask))
        loss.backward()
        ours = ffn.value_loss(lp, old, ref, clip=clip, mask=mask, return_grad=True)
        assert_same(ours, (to_numpy(loss), to_numpy(v.grad)))
    for scale in ("group", "batch", "none"):
        for baseline in ("mean", "leave_one_out"):
            how = {"scale": scale, "baseline": baseline}
            theirs = ff.group_advantages(to_torch(lp), 5, **how)
            assert_same(ffn.group_advantages(lp, 5, **how), to_numpy(theirs))
    theirs = ff.gae(to_torch(lp), to_torch(old), gamma=0.9, lam=0.8, mask=to_torch(mask))
    assert_same(ffn.gae(lp, old, gamma=0.9, lam=0.8, mask=mask), tuple(map(to_numpy, theirs)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_thread_count(dtype):
    lp, old, ref, _, A = tokens((40, 100), dtype)
    ends = np.array([0, 10, 2000, 2000, 4000])
    logits, actions, options = batch((6, 9, 2001), dtype)
    before, results = ffn.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            ffn.set_num_threads(threads)
            results.append([
                *(
                    ffn.policy_loss(
                        lp, advantages=A, old_logprobs=old, loss=loss, ref_logprobs=ref, kl_beta=0.1,
                        return_grad=True,
                    )
                    for loss in LOSSES
                ),
                ffn.policy_loss(lp.reshape(-1), advantages=A[:4], cu_seqlens=ends, return_grad=True),
                *(
                    ffn.policy_loss_from_logits(
                        logits, actions, loss=loss, entropy_coef=0.1, return_grad=True, **options
                    )
                    for loss in ("ppo", "gspo")
                ),
                ffn.value_loss(lp, old, return_grad=True),
                ffn.gae(lp, old, gamma=0.9, lam=0.9),
                ffn.group_advantages(lp, 8, scale="batch"),
            ])  # fmt: skip
    finally:
        ffn.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            if isinstance(a, tuple) and isinstance(a[0], ffn.PolicyOutput) and a[0].entropy is None:
                a, b = (a[0][:4], a[1]), (b[0][:4], b[1])
            assert_same(a, b)


# ---- wrong arguments ---------------------------------------------------------------------------

NUMBERS = (
    ({"loss": "dpo"}, ValueError, "loss: 'dpo'; allowed: 'reinforce', 'rloo'"),
    ({"loss": None}, ValueError, "loss: None"),
    ({"kl": "k4"}, ValueError, "kl: 'k4'; allowed: 'k1', 'k2', 'k3'"),
    ({"importance": "row"}, ValueError, "importance: 'row'; allowed: 'token', 'sequence'"),
    ({"importance": "token", "loss": "vespo"}, ValueError, "importance: 'token'; loss='vespo'"),
    ({"reduction": "avg"}, ValueError, "reduction: 'avg'; allowed: 'none', 'sum', 'mean'"),
    ({"reduction": ["mean"]}, ValueError, "reduction: "),
    ({"clip_low": -0.1}, ValueError, "clip_low: -0.1"),
    ({"clip_high": np.inf}, ValueError, "clip_high: inf"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip: 1.0; allowed: above 1, or None"),
    ({"delta": 0.0}, ValueError, "delta: 0.0; allowed: positive, or None"),
    ({"kl_beta": 0.1}, ValueError, "kl_beta: 0.1; it needs ref_logprobs"),
    ({"kl_beta": np.nan}, ValueError, "kl_beta: nan; allowed: finite"),
    ({"tau_pos": 0}, ValueError, "tau_pos: 0.0"),
    ({"tau_neg": np.inf}, ValueError, "tau_neg: inf"),
    (
        {"loss": "dapo", "num_tokens": -1},
        ValueError,
        "num_tokens: -1.0; allowed: 0 and",
    ),
    ({"loss": "dr_grpo", "max_length": np.inf}, ValueError, "max_length: inf"),
    ({"clip_low": "0.2"}, TypeError, "clip_low: a number or a 0-d array, not '0.2'"),
    ({"clip_high": np.zeros(2)}, TypeError, "clip_high: a number"),
    ({"loss": "dapo", "num_tokens": [3]}, TypeError, "num_tokens: a number"),
)


def test_wrong_numbers():
    lp, _, _, _, A = tokens((2, 3))
    logits, actions = np.zeros((2, 3, 7), np.float32), np.zeros((2, 3), int)
    out = np.full(logits.shape, 5, np.float32)
    for bad, error, message in NUMBERS:
        with pytest.raises(error, match=message):
            ffn.policy_loss(lp, advantages=A, **bad)
        with pytest.raises(error, match=message):
            ffn.policy_loss_from_logits(
                logits, actions, advantages=A, return_grad=True, grad_out=out, **bad
            )
    for bad, error, message in (
        ({"temperature": 0.0}, ValueError, "temperature: 0.0"),
        ({"temperature": "1"}, TypeError, "temperature: a number"),
        ({"entropy_coef": np.inf}, ValueError, "entropy_coef: inf; allowed: finite"),
        ({"entropy_coef": None}, TypeError, "entropy_coef: a number"),
        ({"ignore_index": 1.5}, TypeError, r"ignore_index: an int, not 1\.5"),
    ):
        with pytest.raises(error, match=message):
            ffn.policy_loss_from_logits(
                logits, actions, advantages=A, return_grad=True, grad_out=out, **bad
            )
    assert (out == 5).all()


def test_wrong_arrays():
    lp, old, _, _, A = tokens((2, 3))
    f = ffn.policy_loss
    for bad, error, message in (
        ({"advantages": None}, TypeError, "advantages: a numpy.ndarray, not NoneType"),
        ({"advantages": [1.0]}, TypeError, "advantages: a numpy.ndarray, not list"),
        ({"advantages": A.astype(int)}, TypeError, "advantages: dtype int64"),
        (
            {"advantages": A[:1]},
            ValueError,
            r"advantages: shape \(1,\); allowed: \(2, 3\), \(2,\) or",
        ),
        ({"old_logprobs": old[:1]}, ValueError, r"old_logprobs: shape \(1, 3\); allowed: \(2, 3\)"),
        ({"old_logprobs": 0.0}, TypeError, "old_logprobs: a numpy.ndarray, not float"),
        ({"ref_logprobs": old.T}, ValueError, r"ref_logprobs: shape \(3, 2\)"),
        ({"ref_logprobs": old > 0}, TypeError, "ref_logprobs: dtype bool"),
        ({"weights": old[0]}, ValueError, r"weights: shape \(3,\); allowed: \(2, 3\), \(2,\) or"),
        ({"mask": old[0] > 0}, ValueError, r"mask: shape \(3,\); allowed: \(2, 3\)"),
        ({"mask": [True]}, TypeError, "mask: a numpy.ndarray, not list"),
        ({"mask": old.astype(complex)}, TypeError, "mask: dtype complex128; allowed: bool"),
        ({"mask": np.ma.masked_array(old)}, TypeError, "mask: a numpy.ndarray, not MaskedArray"),
        ({"cu_seqlens": np.array([0, 6])}, ValueError, "cu_seqlens: shape"),
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens: a numpy.ndarray, not list"),
        ({"cu_seqlens": np.array([0.0, 6.0])}, TypeError, "cu_seqlens: dtype float64"),
    ):
        with pytest.raises(error, match=message):
            f(lp, **{"advantages": A, **bad})
    with pytest.raises(TypeError, match="logprobs: dtype int64"):
        f(np.zeros((2, 3), int), advantages=A)
    with pytest.raises(TypeError, match="logprobs: a numpy.ndarray, not list"):
        f([0.0], advantages=A)
    with pytest.raises(ValueError, match="logprobs: a scalar"):
        f(np.float32(0), advantages=np.float32(0))
    flat, one = lp.reshape(-1), np.ones(1, np.float32)
    for ends in ([0, 7], [1, 6], [0, 4, 2, 6], [0, 5], [-1, 6]):
        with pytest.raises(ValueError, match="cu_seqlens: element"):
            f(flat, advantages=np.ones(len(ends) - 1, np.float32), cu_seqlens=np.array(ends))
    with pytest.raises(ValueError, match="cu_seqlens: one element, no sequence, with 6 tokens"):
        f(flat, advantages=one[:0], cu_seqlens=np.array([0]))
    packed = {"advantages": one, "cu_seqlens": np.array([0, 6])}
    with pytest.raises(ValueError, match=r"weights: shape \(1,\); allowed: \(6,\)"):
        f(flat, weights=one, **packed)
    with pytest.raises(ValueError, match=r"max_length: None; reduction 'dr_grpo' of packed"):
        f(flat, loss="dr_grpo", **packed)
    with pytest.raises(ValueError, match=r"advantages: shape \(2,\); allowed: \(6,\), \(1,\) or"):
        f(flat, **packed | {"advantages": A})


def test_wrong_logits():
    logits, actions, options = batch((2, 3, 7))
    out = np.full(logits.shape, 5, np.float32)
    f = ffn.policy_loss_from_logits

    def bad(error, message, *args, **more):
        with pytest.raises(error, match=message):
            f(*args, **{**options, "return_grad": True, "grad_out": out, **more})

    bad(TypeError, "logits: a numpy.ndarray, not list", [[0.0]], actions)
    bad(TypeError, "logits: dtype int64", logits.astype(int), actions)
    bad(ValueError, "logits: shape .*at least one class", logits[..., :0], actions)
    bad(TypeError, "actions: a numpy.ndarray, not list", logits, [1])
    bad(TypeError, "actions: dtype float64", logits, actions.astype(float))
    bad(TypeError, "actions: dtype uint64", logits, actions.astype(np.uint64))
    bad(ValueError, r"actions: shape \(1, 3\)", logits, actions[:1])
    bad(ValueError, r"mask: shape \(3,\)", logits, actions, mask=np.ones(3, bool))
    bad(
        ValueError,
        r"old_logprobs: shape \(3,\)",
        logits,
        actions,
        old_logprobs=options["old_logprobs"][0],
    )
    bad(ValueError, r"advantages: shape \(3,\)", logits, actions, advantages=np.ones(3, np.float32))
    bad(ValueError, "actions: a scalar", logits[0, 0], np.int64(1))
    bad(ValueError, r"grad_out: \(1, 3, 7\)", logits, actions, grad_out=out[:1])
    bad(ValueError, "grad_out: a read-only array", logits, actions, grad_out=read_only(out))
    bad(
        ValueError,
        "grad_out: of use only with return_grad=True",
        logits,
        actions,
        return_grad=False,
    )
    for loss, how, grad in (("ppo", None, True), ("gspo", None, True), ("ppo", "none", True),
                            ("ppo", None, False)):  # fmt: skip
        for y in (7, -1, 2**31 - 1):
            wrong = actions.copy()
            wrong[1, 0] = y
            more = {"loss": loss, "reduction": how}
            if not grad:
                more |= {"return_grad": False, "grad_out": None}
            message = rf"actions: element 3 is {y}; allowed are 0 to 6 and ignore_index \(-100\)"
            bad(ValueError, message, logits, wrong, **more)
            bad(ValueError, message, logits, wrong.astype(np.int32), **more)
    flat = {"advantages": np.ones(1, np.float32), "old_logprobs": None, "ref_logprobs": None}
    bad(ValueError, "cu_seqlens: element", logits.reshape(6, 7), actions.reshape(6),
        cu_seqlens=np.array([0, 5]), grad_out=out.reshape(6, 7), **flat)  # fmt: skip
    assert (out == 5).all()


def test_wrong_arguments_of_values_and_advantages():
    x = np.zeros((2, 3), np.float32)
    for args, more, error, message in (
        (([0.0], x), {}, TypeError, "values: a numpy.ndarray, not list"),
        ((x.astype(int), x), {}, TypeError, "values: dtype int64"),
        ((x, None), {}, TypeError, "returns: a numpy.ndarray, not NoneType"),
        ((x, x[0]), {}, ValueError, r"returns: shape \(3,\); allowed: \(2, 3\)"),
        ((x, x, x[0]), {"clip": 0.1}, ValueError, r"old_values: shape \(3,\)"),
        ((x, x), {"clip": 0.1}, ValueError, "clip: it needs old_values"),
        ((x, x, x), {"clip": -0.1}, ValueError, "clip: -0.1; allowed: 0 and above, or None"),
        ((x, x, x), {"clip": np.nan}, ValueError, "clip: nan"),
        ((x, x, x), {"clip": "1"}, TypeError, "clip: a number"),
        ((x, x), {"mask": x[0] > 0}, ValueError, r"mask: shape \(3,\)"),
    ):
        with pytest.raises(error, match=message):
            ffn.value_loss(*args, **more)
    for args, more, error, message in (
        (([1.0], 1), {}, TypeError, "rewards: a numpy.ndarray, not list"),
        ((x.astype(complex), 1), {}, TypeError, "rewards: dtype complex128"),
        ((x, 4), {}, ValueError, "group_size: 4; 6 rewards are no multiple of it"),
        ((x, 0), {}, ValueError, "group_size: 0; allowed: 1 and above"),
        ((x, 2.0), {}, TypeError, r"group_size: an int, not 2\.0"),
        ((x, True), {}, TypeError, "group_size: an int, not True"),
        ((x, 2), {"scale": "std"}, ValueError, "scale: 'std'; allowed: 'none', 'group', 'batch'"),
        (
            (x, 2),
            {"baseline": None},
            ValueError,
            "baseline: None; allowed: 'mean', 'leave_one_out'",
        ),
    ):
        with pytest.raises(error, match=message):
            ffn.group_advantages(*args, **more)
    for args, more, error, message in (
        (([1.0], x), {}, TypeError, "rewards: a numpy.ndarray, not list"),
        ((x, x.astype(complex)), {}, TypeError, "values: dtype complex128"),
        ((x, x[:, :2]), {}, ValueError, r"values: shape \(2, 2\); allowed: \(2, 3\) or, with"),
        ((np.float32(1), x), {}, ValueError, "rewards: a scalar"),
        ((x, x), {"mask": x[0] > 0}, ValueError, r"mask: shape \(3,\); allowed: \(2, 3\)"),
        ((x, x), {"gamma": 1.5}, ValueError, "gamma: 1.5; allowed: 0 to 1"),
        ((x, x), {"lam": np.nan}, ValueError, "lam: nan; allowed: 0 to 1"),
        ((x, x), {"gamma": None}, TypeError, "gamma: a number"),
    ):
        with pytest.raises(error, match=message):
            ffn.gae(*args, **{"gamma": 1.0, "lam": 1.0, **more})
