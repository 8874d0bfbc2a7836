"""finefuse.numpy's policy losses from log-probabilities, value loss, advantages: the reference, torch's bits,
layouts. Needs no torch."""

from __future__ import annotations

import math

import finefuse.numpy as ffn
import numpy as np
import pytest
from finefuse._args.policy import POLICY_LOSSES as LOSSES
from finefuse.reference import policy as reference_policy
from numpy_cases import (
    DTYPES,
    TYPES,
    Subclass,
    assert_same,
    in_a_struct,
    misaligned,
    read_only,
    same,
    swapped,
    wide,
    wide_of,
)
from numpy_policy_cases import (
    BY_SEQUENCE,
    batch,
    check_metrics,
    check_scalar,
    mask_of,
    tokens,
    truth_of,
)
from tolerances import check


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
