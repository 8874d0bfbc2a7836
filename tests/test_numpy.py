"""The NumPy functions, with or without torch installed, against float64 and against torch's bits."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import finefuse.numpy as ffn
import numpy as np
import pytest
from concurrency import at_once
from finefuse.reference import logprobs as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_cases import (
    DTYPES,
    IGNORE,
    TYPES,
    Subclass,
    assert_same,
    eager_gradient,
    eager_stats,
    in_a_struct,
    layouts,
    misaligned,
    ml_dtypes,
    read_only,
    same,
    slope,
    softmax_parts,
    swapped,
)
from tolerances import ScalarErrors, check

# 1: one class, loss 0; 2, 31: below one vector at every level; 257, 32001: odd tails, several blocks
# of 2048.
VOCABS = [1, 2, 31, 257, 32001]


def make(rows, vocab, dtype="float32", *, spread=3.0, ignore=True, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, vocab)) * spread).astype(TYPES[dtype])
    targets = rng.integers(0, vocab, rows)
    if ignore and rows > 1:
        targets[rows // 2] = IGNORE
    return logits, targets


# ---- the plain NumPy formulas ------------------------------------------------------------------


def eager_cross_entropy(logits, targets, eps, reduction):
    """(loss, gradient of the reduced loss; of the sum for "none")."""
    logp, _ = softmax_parts(logits)
    keep, rows = targets != IGNORE, np.arange(len(targets))
    safe = np.where(keep, targets, 0)
    loss = np.where(keep, -(1 - eps) * logp[rows, safe] - eps * logp.mean(-1), 0)
    dz = np.exp(logp) - logp.dtype.type(eps / logits.shape[-1])
    dz[rows, safe] -= 1 - eps
    dz = np.where(keep[:, None], dz, 0)
    if reduction != "none":
        scale = logp.dtype.type(max(keep.sum(), 1) if reduction == "mean" else 1)
        loss, dz = loss.sum() / scale, dz / scale
    return loss.astype(logits.dtype), dz.astype(logits.dtype)


# ---- token_logprobs ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_token_logprobs(isa, vocab, dtype):
    logits, targets = make(7, vocab, dtype)
    upstream = np.random.default_rng(1).standard_normal((3, 7))
    t = 0.7
    names = ("lp", "entropy", "lse")
    truth = reference.token_logprobs(logits, targets, t)
    eager = eager_stats(logits, targets, t)
    values, dz = ffn.token_logprobs(
        logits, targets, temperature=t, stats=True, return_grad=True, upstream=tuple(upstream)
    )
    for name, a, e, x in zip(names, values, eager, truth, strict=True):
        check(name, a, e, x)
    assert_same(values, ffn.token_logprobs(logits, targets, temperature=t, stats=True))
    check("lp alone", ffn.token_logprobs(logits, targets, temperature=t), eager[0], truth[0])
    want = reference.token_logprobs_gradient(logits, targets, *upstream, temperature=t)
    check("gradient", dz, eager_gradient(logits, targets, *upstream, temperature=t), want)
    # each by itself, so that no term hides behind another
    for i in range(3):
        only = tuple(u if i == j else None for j, u in enumerate(upstream))[: i + 1]
        _, dz = ffn.token_logprobs(
            logits, targets, temperature=t, stats=True, return_grad=True, upstream=only
        )
        parts = [u * (i == j) for j, u in enumerate(upstream)]
        want = reference.token_logprobs_gradient(logits, targets, *parts, temperature=t)
        eager_dz = eager_gradient(logits, targets, *parts, temperature=t)
        check(f"gradient of {names[i]}", dz, eager_dz, want)
        assert dz.dtype == logits.dtype
    lp, dz = ffn.token_logprobs(logits, targets, return_grad=True)
    zero, one = np.zeros(7), np.ones(7)
    want = reference.token_logprobs_gradient(logits, targets, one)
    check("gradient of the sum", dz, eager_gradient(logits, targets, one, zero, zero), want)
    assert_same((lp, dz), ffn.token_logprobs(logits, targets, return_grad=True, upstream=one))
    stats = {"stats": True, "return_grad": True}
    summed = ffn.token_logprobs(logits, targets, **stats)
    for up in (one, (one,), (one, None, None), (one, zero, zero)):
        assert_same(summed, ffn.token_logprobs(logits, targets, upstream=up, **stats))
    assert not ffn.token_logprobs(
        logits, targets, stats=True, return_grad=True, upstream=(None, None)
    )[1].any()


def test_upstream_is_converted():
    logits, targets = make(5, 9)
    u = np.arange(5.0)
    want = ffn.token_logprobs(logits, targets, return_grad=True, upstream=u.astype(np.float32))
    for other in (u, u.astype(np.float16), u.astype(">f8"), np.repeat(u, 2)[::2]):
        assert_same(ffn.token_logprobs(logits, targets, return_grad=True, upstream=other), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity(isa, dtype):
    """-inf: probability 0, no part in entropy and gradient; as a target lp = -inf, gradient g/T."""
    logits, targets = make(4, 3001, dtype, ignore=False)
    logits[:, ::3] = -np.inf
    targets[:] = [1, 4, 3, 7]  # row 2: the target is masked
    logits[3] = -np.inf
    lp, entropy, lse = ffn.token_logprobs(logits, targets, stats=True)
    truth, eager = reference.token_logprobs(logits, targets), eager_stats(logits, targets)
    check("lp", lp, eager[0], truth[0])
    assert lp[2] == -np.inf
    assert np.isnan(lp[3])
    check("entropy", entropy[:3], truth[1][:3], truth[1][:3])
    check("lse", lse, eager[2], truth[2])
    up = (np.array([2.0, -1.0, 0.5]), np.ones(3))
    _, dz = ffn.token_logprobs(
        logits[:3], targets[:3], temperature=2.0, stats=True, return_grad=True, upstream=up
    )
    want = reference.token_logprobs_gradient(logits[:3], targets[:3], *up, temperature=2.0)
    check("gradient", dz, want, want)
    assert dz[2, 3] == 0.25  # g/T
    assert (np.delete(dz[:, ::3], 1, axis=1) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_ignored_rows_are_not_read(isa, dtype, fill):
    logits, targets = make(6, 100, dtype, ignore=False)
    clean = logits.copy()
    targets[[1, 4]] = IGNORE
    logits[[1, 4]] = fill
    up = (np.ones(6),) * 3
    a = ffn.token_logprobs(logits, targets, stats=True, return_grad=True, upstream=up)
    b = ffn.token_logprobs(clean, targets, stats=True, return_grad=True, upstream=up)
    assert_same(a, b)
    assert (a[1][[1, 4]] == 0).all()
    assert all((o[[1, 4]] == 0).all() for o in a[0])
    for reduction in ("mean", "sum", "none"):
        a = ffn.cross_entropy(logits, targets, reduction=reduction, return_grad=True)
        assert_same(a, ffn.cross_entropy(clean, targets, reduction=reduction, return_grad=True))
        assert (a[1][[1, 4]] == 0).all()
        a = ffn.cross_entropy(
            logits, np.full(6, IGNORE), reduction=reduction, label_smoothing=0.1, return_grad=True
        )
        assert (a[0] == 0).all()
        assert (a[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_stays_in_its_row(isa, dtype, bad):
    logits, targets = make(3, 2600, dtype, ignore=False)
    logits[1, 50] = bad
    (lp, entropy, _), dz = ffn.token_logprobs(logits, targets, stats=True, return_grad=True)
    _, ce = ffn.cross_entropy(logits, targets, reduction="sum", return_grad=True)
    for x in (lp, entropy, dz.astype(np.float64), ce.astype(np.float64)):
        assert np.isnan(x[1]).all()
        assert np.isfinite(x[[0, 2]]).all()


# ---- cross_entropy -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(isa, vocab, dtype, smoothing):
    logits, targets = make(7, vocab, dtype)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        loss, dz = ffn.cross_entropy(logits, targets, return_grad=True, **options)
        eager, eager_dz = eager_cross_entropy(logits, targets, smoothing, reduction)
        truth, want = reference.cross_entropy(logits, targets, smoothing, reduction=reduction)
        check(f"loss {reduction}", loss, eager, truth)
        check(f"gradient {reduction}", dz, eager_dz, want)
        assert same(loss, ffn.cross_entropy(logits, targets, **options))
        assert dz.dtype == logits.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_over_seeds(dtype):
    errors = ScalarErrors("cross_entropy", dtype)
    for seed in range(40):
        logits, targets = make(17, 501, dtype, seed=seed)
        truth, _ = reference.cross_entropy(logits, targets)
        eager, _ = eager_cross_entropy(logits, targets, 0.0, "mean")
        errors.add(ffn.cross_entropy(logits, targets), eager, truth, truth)
    errors.check()


# ---- sequence_logprobs -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprobs(isa, dtype, average):
    rng = np.random.default_rng(0)
    lp = (-9 * rng.random((3, 5, 11))).astype(TYPES[dtype])
    wide = np.float64 if dtype == "float64" else np.float32
    mask = rng.random((3, 5, 11)) > 0.4
    mask[1, 2] = False
    lp[~mask] = np.nan
    s, g = ffn.sequence_logprobs(lp, mask=mask, average=average, return_grad=True)
    assert s.dtype == g.dtype == wide
    truth = reference.sequence_logprobs(lp.astype(np.float64), mask, average=average)
    count = np.maximum(mask.sum(-1), 1) if average else np.ones((3, 5))
    eager = np.where(mask, lp.astype(wide), 0).sum(-1) / count.astype(wide)
    check("masked", s, eager, truth)
    want = mask / count[..., None]
    check("gradient", g, want.astype(wide), want)
    for other in (
        mask * 3,
        mask.astype(np.float16),
        mask.astype(">i4"),
        mask[..., ::-1][..., ::-1],
    ):
        assert same(s, ffn.sequence_logprobs(lp, mask=other, average=average))
    flat = np.where(mask, lp, TYPES[dtype](-1)).reshape(-1)
    ends = np.array([0, 4, 4, 100, 165])
    truth = reference.sequence_logprobs(flat.astype(np.float64), None, ends, average)
    parts = [p.astype(wide) for p in np.split(flat, [4, 4, 100])]
    sizes = [max(len(p), 1) if average else 1 for p in parts]
    eager = np.array([p.sum() / wide(n) for p, n in zip(parts, sizes, strict=True)], wide)
    want = np.concatenate([np.full(len(p), 1 / n) for p, n in zip(parts, sizes, strict=True)])
    for index in (np.int64, np.int32, np.uint8):
        s, g = ffn.sequence_logprobs(
            flat, cu_seqlens=ends.astype(index), average=average, return_grad=True
        )
        check("cu_seqlens", s, eager, truth)
        check("gradient", g, want.astype(wide), want)


# ---- arrays of every kind ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", layouts(np.zeros((6, 9, 2), np.float32)))
def test_layouts(isa, dtype, name):
    """The same bits as the contiguous array, nothing written to the argument."""
    cube = make(6 * 9, 65, dtype, ignore=False)[0].reshape(6, 9, 65)
    logits = layouts(cube)[name]
    before = logits.tobytes()
    plain = np.array(logits, cube.dtype, order="C", subok=False)
    targets = np.asarray(np.random.default_rng(2).integers(0, plain.shape[-1], plain.shape[:-1]))
    if targets.ndim:
        targets[..., 3:4] = IGNORE
    want = ffn.token_logprobs(plain, targets, stats=True, return_grad=True)
    got = ffn.token_logprobs(logits, targets, stats=True, return_grad=True)
    assert_same(got, want)
    assert type(got[1]) is np.ndarray
    for reduction in ("mean", "none"):
        assert_same(
            ffn.cross_entropy(logits, targets, reduction=reduction, return_grad=True),
            ffn.cross_entropy(plain, targets, reduction=reduction, return_grad=True),
        )
    if plain.ndim == 3 and len(plain):
        assert_same(
            ffn.sequence_logprobs(logits, return_grad=True),
            ffn.sequence_logprobs(plain, return_grad=True),
        )
    assert logits.tobytes() == before


def test_targets_of_every_kind():
    logits, targets = make(12, 65, ignore=False)
    want = ffn.token_logprobs(logits, targets)
    kinds = [targets.astype(t) for t in ("i4", "i2", "i1", "u1", "q", ">i8", ">i4", ">i2")]
    kinds += [
        misaligned(targets),
        in_a_struct(targets),
        read_only(targets),
        targets[::-1].copy()[::-1],
    ]
    kinds += [np.repeat(targets, 2)[::2], targets.view(Subclass)]
    for y in kinds:
        assert same(ffn.token_logprobs(logits, y), want)
    cube = np.asarray(logits.reshape(3, 4, 65))
    y = np.asfortranarray(targets.reshape(3, 4))
    assert same(ffn.token_logprobs(cube, y), want.reshape(3, 4))
    assert same(ffn.token_logprobs(cube.transpose(1, 0, 2), y.T), want.reshape(3, 4).T.copy())


def test_scalars_where_there_are_no_dimensions():
    logits, targets = make(4, 9, ignore=False)
    lp = ffn.token_logprobs(logits, targets)
    one = ffn.token_logprobs(logits[0], targets[0])  # targets[0] is a NumPy scalar
    assert type(one) is np.float32
    assert one == lp[0]
    assert all(type(x) is np.float32 for x in ffn.token_logprobs(logits[0], targets[0], stats=True))
    for reduction in ("mean", "sum"):
        loss, dz = ffn.cross_entropy(logits, targets, reduction=reduction, return_grad=True)
        assert type(loss) is np.float32
        assert dz.shape == (4, 9)
        wide = ffn.cross_entropy(logits.astype(np.float64), targets, reduction=reduction)
        assert type(wide) is np.float64
    assert type(ffn.cross_entropy(logits[0], targets[0], reduction="none")) is np.float32
    assert type(ffn.sequence_logprobs(lp)) is np.float32
    for t in (np.float32(0.5), np.float64(0.5), np.array(0.5)):
        assert same(ffn.token_logprobs(logits, targets, temperature=t),
                    ffn.token_logprobs(logits, targets, temperature=0.5))  # fmt: skip
    assert same(ffn.token_logprobs(logits, targets, temperature=1), lp)
    assert same(ffn.token_logprobs(logits, targets, ignore_index=np.int64(IGNORE)), lp)


def test_empty():
    logits, targets = np.zeros((0, 7), np.float32), np.zeros(0, int)
    values, dz = ffn.token_logprobs(logits, targets, stats=True, return_grad=True)
    assert [v.shape for v in values] == [(0,)] * 3
    assert dz.shape == (0, 7)
    for reduction in ("mean", "sum", "none"):
        loss, dz = ffn.cross_entropy(logits, targets, reduction=reduction, return_grad=True)
        assert np.sum(loss) == 0
        assert dz.shape == (0, 7)
    assert ffn.token_logprobs(np.zeros((2, 0, 7)), np.zeros((2, 0), int)).shape == (2, 0)
    assert ffn.sequence_logprobs(np.zeros((4, 0)), average=True).tolist() == [0.0] * 4
    s, g = ffn.sequence_logprobs(np.zeros(0), cu_seqlens=np.array([0]), return_grad=True)
    assert s.shape == g.shape == (0,)
    assert ffn.sequence_logprobs(np.zeros(0)) == 0.0


# ---- gradients in the caller's memory ----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_out(isa, dtype):
    """The same bits as in fresh memory, wherever `grad_out` lies, and nothing beside it is written."""
    base = make(24, 129, dtype, ignore=False)[0].reshape(4, 6, 129)
    targets = np.random.default_rng(1).integers(0, 43, (4, 6))
    targets[1, 2] = IGNORE
    calls = (
        lambda z, y, **o: ffn.token_logprobs(z, y, temperature=0.9, **o),
        ffn.cross_entropy,
        lambda z, y, **o: ffn.cross_entropy(z, y, reduction="none", label_smoothing=0.2, **o),
    )
    views = {
        "all": lambda x: x,
        "shifted": lambda x: x[:, :-1],
        "rows reversed": lambda x: x[::-1],
        "transposed": lambda x: x.transpose(1, 0, 2),
        "classes strided": lambda x: x[..., ::3],
        "Fortran": lambda x: x.transpose(2, 1, 0)[..., :43].transpose(1, 2, 0)[:, :, :43],
        "subclass": lambda x: x.view(Subclass),
    }
    for call, (name, view) in itertools.product(calls, views.items()):
        part = view(base)
        if name == "Fortran":
            base = np.asfortranarray(base)
            part = base
        y = np.resize(targets, part.shape[:-1])
        value, dz = call(np.array(part, order="C", subok=False), y, return_grad=True)
        # in place
        storage = base.copy(order="K")
        x = storage if name == "Fortran" else view(storage)
        got, out = call(x, y, return_grad=True, grad_out=x)
        assert out is x
        assert_same((got, np.asarray(out)), (value, dz), name)
        untouched = np.ones(base.shape, bool)
        (untouched if name == "Fortran" else view(untouched))[...] = False
        assert same(storage[untouched], base[untouched])
        # memory of its own that lies like the logits, and that does not
        for make_out in (np.empty_like, np.ascontiguousarray, misaligned):
            buffer = make_out(np.array(x, subok=False))
            got, out = call(part, y, return_grad=True, grad_out=buffer)
            assert out is buffer
            assert_same((got, out.copy()), (value, dz), name)


def test_grad_out_that_overlaps_the_logits():
    """Not the logits themselves but some of their memory: still right."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal(8 * 50).astype(np.float32)
    y = np.array([1, 2, 3, 4, 0])
    # behind, ahead, interleaved, backwards, transposed
    for logits_at, out_at in (
        (lambda d: d[:100].reshape(5, 20), lambda d: d[20:120].reshape(5, 20)),
        (lambda d: d[7:107].reshape(5, 20), lambda d: d[:100].reshape(5, 20)),
        (lambda d: d[:200].reshape(5, 40)[:, :20], lambda d: d[:200].reshape(5, 40)[:, 20:]),
        (lambda d: d[:100].reshape(5, 20), lambda d: d[:100].reshape(5, 20)[::-1]),
        (lambda d: d[:25].reshape(5, 5), lambda d: d[:25].reshape(5, 5).T),
    ):
        plain = logits_at(data).copy()
        want = ffn.cross_entropy(plain, y, return_grad=True)
        storage = data.copy()
        loss, out = ffn.cross_entropy(
            logits_at(storage), y, return_grad=True, grad_out=out_at(storage)
        )
        assert_same((loss, np.ascontiguousarray(out)), want)


def test_swapped_grad_out():
    logits, y = make(5, 20)
    loss, dz = ffn.cross_entropy(logits, y, return_grad=True)
    x = swapped(logits)
    got, out = ffn.cross_entropy(x, y, return_grad=True, grad_out=x)
    assert out is x
    assert got == loss
    np.testing.assert_array_equal(x, dz)
    fresh = ffn.cross_entropy(swapped(logits), y, return_grad=True)[1]
    assert same(fresh, dz)  # in native byte order


# ---- derivatives against differences -----------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 40),
    temperature=st.floats(0.3, 5.0),
    smoothing=st.floats(0.0, 1.0),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    average=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_gradients_are_slopes(rows, vocab, temperature, smoothing, reduction, average, seed):
    """Every return_grad against central differences along a random direction, in float64.

    With step h the difference itself is off by about h² and by 1e-16/h of the function's value.
    """
    rng = np.random.default_rng(seed)
    z, y = make(rows, vocab, "float64", spread=2.0, seed=seed)
    dz = rng.standard_normal(z.shape)
    up = tuple(rng.standard_normal((3, rows)))

    def agree(gradient, direction, f, x):
        near = pytest.approx(slope(f, x, direction), rel=1e-6, abs=1e-6 * max(1, abs(f(x))))
        assert np.sum(gradient * direction) == near

    t = {"temperature": temperature, "stats": True}
    agree(
        ffn.token_logprobs(z, y, return_grad=True, upstream=up, **t)[1], dz,
        lambda x: sum(np.sum(u * v) for u, v in zip(up, ffn.token_logprobs(x, y, **t), strict=True)), z,
    )  # fmt: skip
    c = {"reduction": reduction, "label_smoothing": smoothing}
    agree(
        ffn.cross_entropy(z, y, return_grad=True, **c)[1], dz,
        lambda x: np.sum(ffn.cross_entropy(x, y, **c)), z,
    )  # fmt: skip
    mask = rng.random(z.shape) > 0.3
    agree(
        ffn.sequence_logprobs(z, mask=mask, average=average, return_grad=True)[1], dz,
        lambda x: np.sum(ffn.sequence_logprobs(x, mask=mask, average=average)), z,
    )  # fmt: skip


# ---- the same bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_same_bits_as_torch(isa, dtype):
    torch = pytest.importorskip("torch", reason="compares with the torch functions")
    pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")
    import finefuse as ff

    def to_torch(x):
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    def to_numpy(x):
        x = x.detach()
        if x.dtype is torch.bfloat16:
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    def leaf(x):
        return to_torch(x.copy()).requires_grad_()

    logits, y = make(9, 1001, dtype)
    u = np.random.default_rng(3).standard_normal((3, 9)).astype(np.float32)
    x, ty = leaf(logits), torch.from_numpy(y)
    values = ff.token_logprobs(x, ty, temperature=0.7, stats=True)
    sum(
        (v * torch.from_numpy(w).to(v.dtype)).sum() for v, w in zip(values, u, strict=True)
    ).backward()
    ours = ffn.token_logprobs(
        logits, y, temperature=0.7, stats=True, return_grad=True, upstream=tuple(u)
    )
    assert_same(ours, (tuple(map(to_numpy, values)), to_numpy(x.grad)))
    for reduction, eps in itertools.product(("mean", "sum", "none"), (0.0, 0.1)):
        x, options = leaf(logits), {"reduction": reduction, "label_smoothing": eps}
        loss = ff.cross_entropy(x, ty, **options)
        loss.sum().backward()
        ours = ffn.cross_entropy(logits, y, return_grad=True, **options)
        assert_same(ours, (to_numpy(loss), to_numpy(x.grad)))
    wide = np.float64 if dtype == "float64" else np.float32
    for average in (False, True):
        x = leaf(logits.astype(wide))
        mask = np.random.default_rng(4).random(logits.shape) > 0.4
        s = ff.sequence_logprobs(x, mask=torch.from_numpy(mask), average=average)
        s.sum().backward()
        ours = ffn.sequence_logprobs(logits, mask=mask, average=average, return_grad=True)
        assert_same(ours, (to_numpy(s), to_numpy(x.grad)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_thread_count(dtype):
    logits, targets = make(70, 3001, dtype)
    lp = np.random.default_rng(0).standard_normal((40, 5000))
    results = []
    for threads in (1, 2, 5):
        ffn.set_num_threads(threads)
        assert ffn.get_num_threads() == threads
        results.append((
            ffn.token_logprobs(logits, targets, stats=True, return_grad=True),
            ffn.cross_entropy(logits, targets, label_smoothing=0.1, return_grad=True),
            ffn.sequence_logprobs(lp, average=True, return_grad=True),
        ))  # fmt: skip
    for other in results[1:]:
        assert_same(other, results[0])


def test_large_gradient():
    """Above 16 MiB the gradient is written past the caches, where its memory is advised to huge pages."""
    logits, targets = make(700, 6151)
    _, dz = ffn.token_logprobs(logits, targets, return_grad=True)
    for part in (slice(0, 3), slice(350, 353), slice(697, 700)):
        assert same(dz[part], ffn.token_logprobs(logits[part], targets[part], return_grad=True)[1])


def test_concurrent_calls():
    cases = [make(20, 500 + 37 * i, seed=i) for i in range(6)]
    want = [ffn.cross_entropy(*c, return_grad=True) for c in cases]

    def work(i):
        for _ in range(30):
            assert_same(ffn.cross_entropy(*cases[i], return_grad=True), want[i])

    at_once(work)


@pytest.mark.parametrize("variable", ["3", "4,2", "", "0", "many", None])
def test_threads_of_the_environment(variable):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if variable is not None:
        environment["OMP_NUM_THREADS"] = variable
    code = (
        "import os, sys; sys.modules['torch'] = None  # whose import takes 2 s\n"
        "import finefuse.numpy as f; print(f.get_num_threads(), len(os.sched_getaffinity(0)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    threads, cpus = map(int, out.stdout.split())
    assert threads == {"3": 3, "4,2": 4}.get(variable or "", cpus)


# ---- wrong arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 7, 2**31, -(2**31) - 5])
@pytest.mark.parametrize("where", [0, 3, 5])
def test_target_out_of_range(bad, where):
    logits = make(6, 7)[0]
    targets = np.zeros(6, np.int64)
    targets[where] = bad
    out = np.full((6, 7), 5, np.float32)
    message = rf"targets: element {where} is {bad}; allowed are 0 to 6 and ignore_index \(-100\)"
    for call in (
        lambda y: ffn.token_logprobs(logits, y),
        lambda y: ffn.token_logprobs(logits, y, stats=True),
        lambda y: ffn.token_logprobs(logits, y, return_grad=True, grad_out=out),
        lambda y: ffn.cross_entropy(logits, y),
        lambda y: ffn.cross_entropy(logits, y, return_grad=True, grad_out=out),
        lambda y: ffn.preference_loss_from_logits(
            logits[None].repeat(2, 0), np.stack([y, y]), return_grad=True
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(targets)
        if -(2**31) <= bad < 2**31:
            with pytest.raises(ValueError, match=message):
                call(targets.astype(np.int32))
    assert (out == 5).all()
    assert ffn.token_logprobs(logits, targets.clip(0, 6), ignore_index=3).shape == (6,)


def test_wrong_arguments():
    x, y = make(3, 5, ignore=False)
    out = np.full((3, 5), 5, np.float32)
    for f in (ffn.token_logprobs, ffn.cross_entropy):

        def g(*args, f=f, **options):
            f(*args, return_grad=True, grad_out=out, **options)

        with pytest.raises(TypeError, match=r"logits: a numpy.ndarray, not list"):
            g([[1.0]], y)
        with pytest.raises(TypeError, match=r"logits: a numpy.ndarray, not MaskedArray"):
            g(np.ma.masked_array(x), y)
        for dtype in ("int64", "complex64", "float128", "object", "S4", "M8[s]"):
            with pytest.raises(
                TypeError,
                match=rf"logits: dtype {re.escape(str(np.dtype(dtype)))}; allowed: float32, bfloat16",
            ):
                g(np.zeros((3, 5), dtype), y)
        with pytest.raises(TypeError, match=r"logits: dtype .*; allowed: float32"):
            g(np.zeros((3, 5), [("x", "f4")]), y)
        with pytest.raises(TypeError, match="targets: a numpy.ndarray, not list"):
            g(x, [0, 1, 2])
        for dtype in ("float32", "bool", "uint32", "uint64", "object"):
            with pytest.raises(TypeError, match=f"targets: dtype {dtype}; allowed: int64, int32"):
                g(x, y.astype(dtype))
        with pytest.raises(
            ValueError, match=r"targets: shape \(2,\); logits of shape \(3, 5\) need \(3,\)"
        ):
            g(x, y[:2])
        with pytest.raises(ValueError, match=r"targets: shape \(3, 1\)"):
            g(x, y[:, None])
        with pytest.raises(ValueError, match="at least one class"):
            g(x[:, :0], y)
        with pytest.raises(ValueError, match="targets: shape"):
            g(x[0, 0], y[0])
        for index in (None, 1.5, 2**70, np.float64(1)):
            with pytest.raises(TypeError, match="ignore_index: an int"):
                g(x, y, ignore_index=index)
        with pytest.raises(TypeError, match="grad_out: a numpy.ndarray, not list"):
            f(x, y, return_grad=True, grad_out=[1.0])
        with pytest.raises(
            ValueError,
            match=r"grad_out: \(3, 5\) float64; the logits are \(3, 5\) float32",
        ):
            f(x, y, return_grad=True, grad_out=np.empty((3, 5)))
        with pytest.raises(ValueError, match=r"grad_out: \(5, 3\) float32"):
            f(x, y, return_grad=True, grad_out=np.empty((5, 3), np.float32))
        with pytest.raises(ValueError, match="grad_out: a read-only array"):
            f(x, y, return_grad=True, grad_out=read_only(x))
        shared = np.lib.stride_tricks.as_strided(np.zeros(15, np.float32), (3, 5), (4, 4))
        with pytest.raises(ValueError, match="grad_out: its elements share memory"):
            f(x, y, return_grad=True, grad_out=shared)
        with pytest.raises(ValueError, match="grad_out: of use only with return_grad"):
            f(x, y, grad_out=out)
    for t in (0.0, -1.0, np.nan, np.inf, 1e38, np.array(0.0)):
        with pytest.raises(ValueError, match="temperature: .*positive and finite"):
            ffn.token_logprobs(x, y, temperature=t)
    for t in ("hot", None, np.ones(2), 1j, np.ones((), complex)):
        with pytest.raises(TypeError, match="temperature: a number or a 0-d array"):
            ffn.token_logprobs(x, y, temperature=t)
    with pytest.raises(ValueError, match=r"upstream: shape \(2,\); allowed: \(3,\)"):
        ffn.token_logprobs(x, y, return_grad=True, upstream=np.ones(2))
    with pytest.raises(TypeError, match="upstream: a numpy.ndarray, not float"):
        ffn.token_logprobs(x, y, return_grad=True, upstream=1.0)
    with pytest.raises(TypeError, match="upstream: a numpy.ndarray, not tuple"):
        ffn.token_logprobs(x, y, return_grad=True, upstream=(np.ones(3),))
    with pytest.raises(ValueError, match=r"upstream\[1\]: shape \(5,\)"):
        ffn.token_logprobs(x, y, stats=True, return_grad=True, upstream=(None, np.ones(5)))
    with pytest.raises(ValueError, match="upstream: 4 arrays"):
        ffn.token_logprobs(x, y, stats=True, return_grad=True, upstream=(None,) * 4)
    with pytest.raises(ValueError, match="upstream: of use only with return_grad"):
        ffn.token_logprobs(x, y, upstream=np.ones(3))
    for eps in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="label_smoothing"):
            ffn.cross_entropy(x, y, label_smoothing=eps)
    with pytest.raises(TypeError, match="label_smoothing: a number"):
        ffn.cross_entropy(x, y, label_smoothing=np.zeros(2))
    for reduction in ("avg", None, ["mean"]):
        with pytest.raises(ValueError, match="reduction: .*; allowed: 'none', 'sum', 'mean'"):
            ffn.cross_entropy(x, y, reduction=reduction)
    assert (out == 5).all()


def test_wrong_arguments_of_sequences():
    lp, y = np.zeros((3, 5)), np.array([0, 1, 2])
    f = ffn.sequence_logprobs
    with pytest.raises(TypeError, match="mask: a numpy.ndarray, not list"):
        f(lp, mask=[True])
    with pytest.raises(TypeError, match="mask: dtype complex128; allowed: bool"):
        f(lp, mask=lp.astype(complex))
    with pytest.raises(ValueError, match="one of the two"):
        f(lp, mask=lp > 0, cu_seqlens=y)
    with pytest.raises(ValueError, match=r"mask: shape \(3,\)"):
        f(lp, mask=np.ones(3, bool))
    with pytest.raises(ValueError, match="cu_seqlens: shape"):
        f(lp, cu_seqlens=np.array([0, 15]))
    with pytest.raises(ValueError, match="cu_seqlens: shape"):
        f(lp[0], cu_seqlens=np.array([], int))
    with pytest.raises(TypeError, match="cu_seqlens: dtype float64"):
        f(lp[0], cu_seqlens=np.array([0.0, 5.0]))
    for ends in ([0, 6], [1, 5], [0, 4, 2, 5], [0, 4], [-1, 5]):
        with pytest.raises(ValueError, match="cu_seqlens: element"):
            f(lp[0], cu_seqlens=np.array(ends))
    with pytest.raises(TypeError, match="token_lp: dtype int64"):
        f(y)
    with pytest.raises(ValueError, match="token_lp: a scalar"):
        f(np.float64(1.0))


def test_wrong_thread_counts():
    with pytest.raises(ValueError, match="threads: 0; allowed: 1 and above"):
        ffn.set_num_threads(0)
    with pytest.raises(TypeError, match=r"threads: an int, not 1\.5"):
        ffn.set_num_threads(1.5)


# ---- random inputs, the README -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from(sorted(TYPES)),
    spread=st.floats(0.01, 50.0),
    temperature=st.floats(0.05, 20.0),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random(rows, vocab, dtype, spread, temperature, masked, seed):
    logits, targets = make(rows, vocab, dtype, spread=spread, seed=seed)
    rng = np.random.default_rng(seed)
    if masked:
        logits[rng.random(logits.shape) < 0.2] = -np.inf
        logits[:, 0] = 0
    up = tuple(rng.standard_normal((3, rows)))
    values, dz = ffn.token_logprobs(
        logits, targets, temperature=temperature, stats=True, return_grad=True, upstream=up
    )
    truth = reference.token_logprobs(logits, targets, temperature)
    want = reference.token_logprobs_gradient(logits, targets, *up, temperature=temperature)
    eager = eager_stats(logits, targets, temperature)
    eager_dz = eager_gradient(logits, targets, *up, temperature=temperature)
    for name, a, e, t in zip(("lp", "entropy", "lse"), values, eager, truth, strict=True):
        check(name, a, e, t)
    check("gradient", dz, eager_dz, want)
