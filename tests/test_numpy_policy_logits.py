"""finefuse.numpy's policy losses from logits: the reference, layouts. Needs no torch."""

from __future__ import annotations

import finefuse.numpy as ffn
import numpy as np
import pytest
from finefuse._args.policy import POLICY_LOSSES as LOSSES
from finefuse.reference import logprobs as reference
from numpy_cases import (
    DTYPES,
    IGNORE,
    TYPES,
    Subclass,
    assert_same,
    eager_gradient,
    eager_stats,
    layouts,
    misaligned,
    read_only,
    swapped,
    wide_of,
)
from numpy_policy_cases import (
    BY_SEQUENCE,
    batch,
    check_metrics,
    check_scalar,
    mask_of,
    truth_of,
)
from tolerances import ScalarErrors, check


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
