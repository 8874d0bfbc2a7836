"""token_logprobs, cross_entropy and sequence_logprobs against float64, on every ISA level."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from concurrency import at_once
from finefuse import _C
from finefuse.reference import logprobs as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from logprobs_cases import (
    DTYPES,
    IGNORE,
    eager_stats,
    gradients,
    make,
    truth_gradient,
    truth_stats,
)
from tolerances import ScalarErrors, check

RAW = torch.ops.finefuse
# 1: one class, loss 0; 2, 31: below one vector at every level; 257, 32001: odd tails, several blocks
# of 2048; 151936: Qwen's vocabulary, a row larger than most L2 caches in float32.
VOCABS = [1, 2, 31, 257, 32001, 151936]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_stats_and_gradients(isa, vocab, dtype):
    rows = 3 if vocab > 100_000 else 7
    logits, targets = make(rows, vocab, dtype)
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(rows, generator=g) for _ in range(3)]
    temperature = 0.7
    ours, ours_dz = gradients(
        ff.token_logprobs, logits, targets, upstream, stats=True, temperature=temperature
    )
    eager, eager_dz = gradients(eager_stats, logits, targets, upstream, temperature=temperature)
    truth = truth_stats(logits, targets, temperature)
    for name, a, e, t in zip(("lp", "entropy", "lse"), ours, eager, truth, strict=True):
        check(f"{name} V={vocab}", a, e, t)
    check(
        f"gradient V={vocab}", ours_dz, eager_dz,
        truth_gradient(logits, targets, upstream, temperature),
    )  # fmt: skip
    # each output by itself, so that no term hides behind another
    for i in range(3):
        only = [u if i == j else None for j, u in enumerate(upstream)]
        _, ours_dz = gradients(
            ff.token_logprobs, logits, targets, only, stats=True, temperature=temperature
        )
        _, eager_dz = gradients(eager_stats, logits, targets, only, temperature=temperature)
        zero = [torch.zeros(rows) if u is None else u for u in only]
        check(
            f"gradient of output {i} V={vocab}", ours_dz, eager_dz,
            truth_gradient(logits, targets, zero, temperature),
        )  # fmt: skip


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, -1e4, 3e4])
def test_extreme_logits(isa, spread, shift):
    """Flat, peaked and far from zero: where a float32 lse would lose the probabilities."""
    logits, targets = make(5, 3000, spread=spread)
    logits = logits + shift
    upstream = [torch.ones(5), None, None]
    ours, dz = gradients(ff.token_logprobs, logits, targets, upstream, stats=True)
    eager, eager_dz = gradients(eager_stats, logits, targets, upstream)
    for name, a, e, t in zip(
        ("lp", "entropy", "lse"), ours, eager, truth_stats(logits, targets), strict=True
    ):
        check(name, a, e, t)
    zero = torch.zeros(5)
    check("gradient", dz, eager_dz, truth_gradient(logits, targets, [torch.ones(5), zero, zero]))


@pytest.mark.parametrize("position", [0, 2047, 2048, 5000])
def test_maximum_rises_late(isa, position):
    """The running reference must follow a maximum that appears in any block."""
    logits, targets = make(2, 6001, spread=1.0, ignore=False)
    logits[:, position] += 500.0
    targets[0] = position
    ours = ff.token_logprobs(logits, targets, stats=True)
    for name, a, e, t in zip(
        ("lp", "entropy", "lse"),
        ours,
        eager_stats(logits, targets),
        truth_stats(logits, targets),
        strict=True,
    ):
        check(name, a, e, t)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 3.0, 100.0])
def test_temperature(isa, temperature):
    logits, targets = make(6, 1000)
    upstream = [torch.randn(6), torch.randn(6), torch.randn(6)]
    ours, dz = gradients(
        ff.token_logprobs, logits, targets, upstream, stats=True, temperature=temperature
    )
    eager, eager_dz = gradients(eager_stats, logits, targets, upstream, temperature=temperature)
    for name, a, e, t in zip(
        ("lp", "entropy", "lse"),
        ours,
        eager,
        truth_stats(logits, targets, temperature),
        strict=True,
    ):
        check(name, a, e, t)
    check("gradient", dz, eager_dz, truth_gradient(logits, targets, upstream, temperature))
    as_tensor = ff.token_logprobs(
        logits, targets, temperature=torch.tensor(temperature, dtype=torch.float64)
    )
    assert torch.equal(as_tensor, ff.token_logprobs(logits, targets, temperature=temperature))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(isa, dtype):
    """Slices, transposes, expanded and 4-D logits; int32, narrow and strided targets."""
    base, _ = make(6 * 9, 65, dtype, ignore=False)
    cube = base.view(6, 9, 65)
    targets = torch.randint(0, 65, (6, 9))
    targets[2, 3] = IGNORE
    cases = {
        "shifted": (cube[:, :-1], targets[:, 1:]),
        "every other": (cube[::2, ::3], targets[::2, ::3]),
        "classes strided": (base[:, :64].view(6, 9, 64)[..., ::2], targets % 32),
        "transposed rows": (cube.transpose(0, 1), targets.t()),
        "transposed classes": (cube.transpose(1, 2)[:, :, :9], targets.new_full((6, 65), 4)),
        "expanded": (cube[:1].expand(6, 9, 65), targets),
        "4-D uneven": (
            base[: 2 * 3 * 4].view(2, 3, 4, 65)[:, :2, :3],
            targets.view(-1)[:12].view(2, 2, 3),
        ),
        "int32": (cube, targets.int()),
        "int16": (cube, targets.short()),
        "one row": (cube[0, 0], targets[0, 0]),
    }
    for name, (logits, y) in cases.items():
        vocab = logits.shape[-1]
        y = torch.where(y == IGNORE, y, y % vocab) if y.numel() else y
        plain, plain_y = logits.contiguous(), y.contiguous().long()
        x = logits.detach().requires_grad_()
        lp = ff.token_logprobs(x, y)
        assert torch.equal(lp.detach(), ff.token_logprobs(plain, plain_y)), name
        assert lp.shape == y.shape, name
        (lp * torch.arange(1.0, lp.numel() + 1).view(lp.shape)).sum().backward()
        z = plain.clone().requires_grad_()
        out = ff.token_logprobs(z, plain_y)
        (out * torch.arange(1.0, lp.numel() + 1).view(lp.shape)).sum().backward()
        assert torch.equal(x.grad, z.grad), name
        a = ff.cross_entropy(x.detach(), y)
        assert torch.equal(a, ff.cross_entropy(plain, plain_y)), name


def test_empty():
    logits, targets = torch.zeros(0, 7, requires_grad=True), torch.zeros(0, dtype=torch.long)
    for stats in (False, True):
        out = ff.token_logprobs(logits, targets, stats=stats)
        total = sum(o.sum() for o in out) if stats else out.sum()
        total.backward()
        assert total.item() == 0.0
    for reduction, value in (("mean", 0.0), ("sum", 0.0), ("none", 0.0)):
        loss = ff.cross_entropy(logits, targets, reduction=reduction).sum()
        loss.backward()
        assert loss.item() == value
    assert logits.grad.shape == (0, 7)
    assert ff.token_logprobs(torch.zeros(2, 0, 7), torch.zeros(2, 0, dtype=torch.long)).shape == (
        2,
        0,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(isa, dtype):
    """-inf: probability 0, no part in entropy and gradient; as a target lp = -inf, gradient g/T."""
    logits, targets = make(4, 3001, dtype, ignore=False)
    inf = float("inf")
    logits[:, ::3] = -inf
    targets[:] = torch.tensor([1, 4, 3, 7])  # row 2: the target is masked
    logits[3] = -inf  # a whole row
    lp, entropy, lse = ff.token_logprobs(logits, targets, stats=True)
    truth = truth_stats(logits, targets)
    eager = eager_stats(logits, targets)
    check("lp", lp, eager[0], truth[0])
    assert lp[2] == -inf
    assert torch.isnan(lp[3])
    check("entropy", entropy[:3], eager[1][:3], truth[1][:3])
    check("lse", lse, eager[2], truth[2])
    upstream = [torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 1.0]), None]
    _, dz = gradients(
        ff.token_logprobs, logits[:3], targets[:3], upstream, stats=True, temperature=2.0
    )
    up = [*upstream[:2], torch.zeros(3)]
    t = truth_gradient(logits[:3], targets[:3], up, temperature=2.0)
    check("gradient", dz, t, t)
    masked = logits[:3] == -inf
    masked[2, 3] = False
    assert (dz[masked] == 0).all()
    assert dz[2, 3] == 0.25  # g/T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_ignored_rows_are_not_read(isa, dtype, fill):
    logits, targets = make(6, 100, dtype, ignore=False)
    clean = logits.clone()
    targets[[1, 4]] = IGNORE
    logits[[1, 4]] = fill
    upstream = [torch.randn(6)] * 3
    ours, dz = gradients(ff.token_logprobs, logits, targets, upstream, stats=True)
    want, want_dz = gradients(ff.token_logprobs, clean, targets, upstream, stats=True)
    for a, b in zip([*ours, dz], [*want, want_dz], strict=True):
        assert torch.equal(a, b)
    assert (dz[[1, 4]] == 0).all()
    assert all((o[[1, 4]] == 0).all() for o in ours)
    for reduction in ("mean", "sum", "none"):
        x = logits.clone().requires_grad_()
        ff.cross_entropy(x, targets, reduction=reduction, label_smoothing=0.1).sum().backward()
        assert torch.isfinite(x.grad).all()
        assert (x.grad[[1, 4]] == 0).all()


def test_all_rows_ignored():
    x = torch.full((3, 9), float("nan"), requires_grad=True)
    y = torch.full((3,), IGNORE)
    for reduction in ("mean", "sum", "none"):
        x.grad = None
        loss = ff.cross_entropy(x, y, reduction=reduction)
        loss.sum().backward()
        assert (loss == 0).all()
        assert (x.grad == 0).all()
    assert (ff.token_logprobs(x, y) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_in_a_row_that_counts(isa, dtype):
    """They show, and only in their own row, in the value and in every element of its gradient."""
    for bad in (float("nan"), float("inf")):
        for column in (0, 50, 2500):
            logits, targets = make(3, 2600, dtype, ignore=False)
            logits[1, column] = bad
            outputs, dz = gradients(
                ff.token_logprobs, logits, targets, [torch.ones(3)] * 3, stats=True
            )
            assert all(torch.isnan(o[1]) for o in outputs[:2])
            assert all(torch.isfinite(o[[0, 2]]).all() for o in outputs)
            assert torch.isnan(dz[1]).all()
            assert torch.isfinite(dz[[0, 2]]).all()
            x = logits.clone().requires_grad_()
            ff.cross_entropy(x, targets, reduction="sum").backward()
            assert torch.isnan(x.grad[1]).all()
            assert torch.isfinite(x.grad[[0, 2]]).all()


def test_zero_upstream_is_zero_back():
    """A token masked out later passes exactly 0, whatever its logits."""
    x = torch.full((2, 5), float("nan"), requires_grad=True)
    lp = ff.token_logprobs(x, torch.tensor([1, 2]))
    ff.sequence_logprobs(lp, mask=torch.tensor([False, False])).backward()
    assert (x.grad == 0).all()


# ---- cross_entropy -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(isa, vocab, dtype, smoothing):
    rows = 3 if vocab > 100_000 else 7
    logits, targets = make(rows, vocab, dtype)
    flat = logits.double().numpy()
    for reduction in ("mean", "sum", "none"):
        ours, eager = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a = ff.cross_entropy(ours, targets, reduction=reduction, label_smoothing=smoothing)
        e = torch.nn.functional.cross_entropy(
            eager, targets, reduction=reduction, label_smoothing=smoothing
        )
        a.sum().backward()
        e.sum().backward()
        truth, truth_dz = reference.cross_entropy(
            flat, targets.numpy(), smoothing, reduction=reduction
        )
        check(f"loss {reduction}", a, e, truth)
        check(f"gradient {reduction}", ours.grad, eager.grad, truth_dz)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_scalar_over_seeds(dtype):
    errors = ScalarErrors("cross_entropy", dtype)
    for seed in range(40):
        logits, targets = make(17, 501, dtype, seed=seed)
        truth, _ = reference.cross_entropy(logits.double().numpy(), targets.numpy())
        eager = torch.nn.functional.cross_entropy(logits, targets)
        errors.add(ff.cross_entropy(logits, targets), eager, truth, truth)
    errors.check()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 0.0, -2.5])
def test_cross_entropy_upstream(inplace, upstream):
    logits, targets = make(9, 300)
    x = logits.clone().requires_grad_()
    (ff.cross_entropy(x, targets, inplace=inplace) * upstream).backward()
    _, want = reference.cross_entropy(logits.double().numpy(), targets.numpy())
    check("gradient", x.grad, want * upstream, want * upstream)
    if inplace:
        assert x.grad.data_ptr() == x.data_ptr()


def test_retain_graph():
    """A second backward is right, with another upstream gradient too; in place it raises."""
    logits, targets = make(9, 300)
    for reduction in ("mean", "none"):
        x = logits.clone().requires_grad_()
        loss = ff.cross_entropy(x, targets, reduction=reduction).sum()
        (first,) = torch.autograd.grad(loss, x, torch.tensor(2.0), retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(loss, x, torch.tensor(-1.0))
        assert torch.equal(first, kept)
        torch.testing.assert_close(second, kept / -2, rtol=1e-6, atol=0)
    for function in (
        lambda x: ff.cross_entropy(x, targets, inplace=True),
        lambda x: ff.cross_entropy(x, targets, inplace=True, reduction="none").sum(),
        lambda x: ff.token_logprobs(x, targets, inplace=True).sum(),
    ):
        loss = function(logits.clone().requires_grad_())
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"consumed|modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_gradient(isa, dtype):
    """The same bits as out of place, in the logits' own storage, also through strided views."""
    logits, targets = make(4 * 6, 129, dtype)
    g = torch.randn(24)
    x = logits.clone().requires_grad_()
    (ff.token_logprobs(x, targets) * g).sum().backward()
    y = logits.clone().requires_grad_()
    (ff.token_logprobs(y, targets, inplace=True) * g).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert y.grad.data_ptr() == y.data_ptr()
    # a slice of a larger tensor: the rest is left alone
    base = logits.view(4, 6, 129)
    for view in (lambda t: t[:, :-1], lambda t: t.transpose(0, 1), lambda t: t[..., ::2]):
        part = view(base)
        t = torch.where(targets == IGNORE, targets, targets % part.shape[-1])
        t = t[: part[..., 0].numel()].view(part.shape[:-1])
        plain = part.contiguous().requires_grad_()
        ff.token_logprobs(plain, t).sum().backward()
        storage = base.clone()
        x = view(storage).detach().requires_grad_()
        ff.token_logprobs(x, t, inplace=True).sum().backward()
        assert torch.equal(x.grad, plain.grad)
        assert torch.equal(view(storage), plain.grad)
    x = logits[:1].expand(24, 129).detach().requires_grad_()
    lp = ff.token_logprobs(x, targets, inplace=True).sum()
    with pytest.raises(ValueError, match="inplace=True"):
        lp.backward()
    storage = torch.randn(400)
    x = storage.unfold(0, 129, 1)[:24].detach().requires_grad_()  # rows that overlap
    with pytest.raises(ValueError, match="inplace=True"):
        ff.cross_entropy(x, targets, inplace=True)


def test_inplace_is_seen_by_autograd():
    """Whoever saved the logits before they were consumed raises instead of using the gradient."""
    logits, targets = make(3, 10)
    x = logits.clone().requires_grad_() * 1.0
    other = x.square().sum()
    loss = ff.cross_entropy(x, targets, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


# ---- sequence_logprobs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprobs(isa, dtype, average):
    lp = -torch.rand(3, 5, 11).to(dtype) * 9
    mask = torch.rand(3, 5, 11) > 0.4
    mask[1, 2] = False
    lp[~mask] = float("nan")
    x = lp.clone().requires_grad_()
    s = ff.sequence_logprobs(x, mask=mask, average=average)
    t = reference.sequence_logprobs(lp.double().numpy(), mask.numpy(), average=average)
    zeroed = torch.where(mask, lp, 0)
    eager = zeroed.sum(-1) / (mask.sum(-1).clamp(min=1) if average else 1)
    check("masked", s, eager, t)
    assert torch.equal(s, ff.sequence_logprobs(lp, mask=mask.int() * 3, average=average))
    g = torch.randn(3, 5)
    (s * g).sum().backward()
    want = mask * g[..., None] / (mask.sum(-1, keepdim=True).clamp(min=1) if average else 1)
    assert (x.grad[~mask] == 0).all()
    torch.testing.assert_close(x.grad, want.to(dtype))
    flat = torch.where(mask, lp, -1.0).reshape(-1)
    for index in (torch.int32, torch.int64):
        ends = torch.tensor([0, 4, 4, 100, 165], dtype=index)
        x = flat.clone().requires_grad_()
        s = ff.sequence_logprobs(x, cu_seqlens=ends, average=average)
        t = reference.sequence_logprobs(flat.double().numpy(), None, ends.numpy(), average)
        parts = flat.split([4, 0, 96, 65])
        eager = torch.stack([p.sum() / (max(len(p), 1) if average else 1) for p in parts])
        check("cu_seqlens", s, eager, t)
        (s * torch.arange(1.0, 5.0)).sum().backward()
        counts = [max(len(p), 1) if average else 1 for p in parts]
        want = torch.cat([torch.full((len(p),), (i + 1) / counts[i]) for i, p in enumerate(parts)])
        torch.testing.assert_close(x.grad, want.to(dtype))


def test_sequence_logprobs_in_parallel():
    """Long enough for several threads; the same bits as on one."""
    lp, mask = torch.randn(40, 5000), torch.rand(40, 5000) > 0.3
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        x = lp.clone().requires_grad_()
        s = ff.sequence_logprobs(x, mask=mask, average=True)
        (s * torch.arange(1.0, 41.0)).sum().backward()
        results.append((s.detach(), x.grad))
    t = reference.sequence_logprobs(lp.double().numpy(), mask.numpy(), average=True)
    check("sums", results[0][0], t, t)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_sequence_logprobs_empty():
    assert ff.sequence_logprobs(torch.zeros(4, 0), average=True).tolist() == [0.0] * 4
    assert ff.sequence_logprobs(torch.zeros(0), cu_seqlens=torch.tensor([0])).shape == (0,)
    assert ff.sequence_logprobs(torch.zeros(0)).item() == 0.0


# ---- autograd, compile, torch's own checks -----------------------------------------------------


def test_gradcheck(isa):
    logits, targets = make(5, 13, torch.float64)
    x = logits.requires_grad_()
    for temperature in (1.0, 0.6):
        assert torch.autograd.gradcheck(
            lambda z: ff.token_logprobs(z, targets, temperature=temperature, stats=True), (x,)
        )
    for reduction in ("mean", "sum", "none"):
        for eps in (0.0, 0.2):
            assert torch.autograd.gradcheck(
                lambda z: ff.cross_entropy(z, targets, reduction=reduction, label_smoothing=eps),
                (x,),
            )
    lp = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 6) > 0.5
    for average in (False, True):
        assert torch.autograd.gradcheck(
            lambda z: ff.sequence_logprobs(z, mask=mask, average=average), (lp,)
        )


def raw_calls(grad=False):
    logits, targets = make(4, 9)
    saved = torch.zeros(3, 4, dtype=torch.float64)
    one, out = torch.ones(4), torch.empty(4, 9)
    t = torch.tensor(0.9)
    z = torch.tensor(0.1)
    lp, mask = torch.randn(2, 5), torch.rand(2, 5) > 0.5
    ends = torch.tensor([0, 2, 3])
    logits.requires_grad_(grad)
    lp.requires_grad_(grad)
    for op in (
        RAW.token_logprobs_inference,
        RAW.token_logprobs_forward,
        RAW.token_logprobs_stats_inference,
        RAW.token_logprobs_stats_forward,
    ):
        yield op.default, (logits, targets, 0.9, IGNORE)
        yield op.tensor, (logits, targets, t, IGNORE)
    back = (logits, targets, saved, one, one, None, out)
    yield RAW.token_logprobs_backward.default, (*back, 0.9, IGNORE)
    yield RAW.token_logprobs_backward.tensor, (*back, t, IGNORE)
    yield RAW.cross_entropy_forward_backward.default, (logits, targets, out, 0.1, IGNORE, 2)
    yield RAW.cross_entropy_forward_backward.tensor, (logits, targets, out, z, IGNORE, 2)
    yield RAW.cross_entropy_forward.default, (logits, targets, 0.1, IGNORE, 0)
    yield RAW.cross_entropy_forward.tensor, (logits, targets, z, IGNORE, 1)
    yield RAW.cross_entropy_backward.default, (logits, targets, one, out, 0.1, IGNORE, 0)
    yield RAW.cross_entropy_backward.tensor, (logits, targets, t, out, z, IGNORE, 2)
    yield RAW.sequence_logprobs_forward.default, (lp, mask, None, True)
    yield RAW.sequence_logprobs_forward.default, (lp[0, :3].detach(), None, ends, False)
    yield RAW.sequence_logprobs_backward.default, (torch.ones(2), mask, None, [2, 5], True)
    yield RAW.scale_gradient.default, (out.clone(), targets, torch.tensor(2.0), IGNORE)


@pytest.mark.parametrize("case", range(len(list(raw_calls()))))
def test_opcheck_raw(case):
    op, args = list(raw_calls())[case]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    "name", ["token_logprobs", "token_logprobs_stats", "cross_entropy", "sequence_logprobs"]
)
def test_opcheck_public(name):
    """torch.ops.finefuse.<name> differentiates, and is the public function."""
    logits, targets = make(4, 9)
    op = getattr(RAW, name).default
    x = (
        torch.randn(2, 5, requires_grad=True)
        if name == "sequence_logprobs"
        else logits.requires_grad_()
    )
    args = (x,) if name == "sequence_logprobs" else (x, targets)
    torch.library.opcheck(op, args)
    public = getattr(ff, name.removesuffix("_stats"))
    want = public(*args, **({"stats": True} if name.endswith("_stats") else {}))
    got = op(*args)
    for a, b in zip(got, want, strict=True) if isinstance(got, (tuple, list)) else [(got, want)]:
        assert torch.equal(a, b)
        assert a.requires_grad


def test_backward_through_a_raw_op_raises():
    """At the backward; at the call already where the op writes into an argument."""

    def differentiate(op, args):
        out = op(*args)
        sum(o.sum() for o in (out if isinstance(out, (tuple, list)) else [out])).backward()

    seen = 0
    for op, args in raw_calls(grad=True):
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            seen += 1
            with pytest.raises(RuntimeError, match="is a raw op"):
                differentiate(op, args)
    assert seen >= 10


def test_double_backward_raises():
    """Also through autograd.grad to a weight behind the logits, and through functional.hessian."""
    _, targets = make(3, 8)
    functions = (
        lambda x: ff.token_logprobs(x, targets).sum(),
        lambda x: sum(o.sum() for o in ff.token_logprobs(x, targets, stats=True)),
        lambda x: ff.cross_entropy(x, targets),
        lambda x: ff.cross_entropy(x, targets, reduction="none").sum(),
    )
    for function in functions:
        hidden, weight = (
            torch.randn(3, 5, requires_grad=True),
            torch.randn(5, 8, requires_grad=True),
        )
        (g,) = torch.autograd.grad(function(hidden @ weight), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(g.square().sum(), weight)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.functional.hessian(function, torch.randn(3, 8))
    x = torch.randn(3, 8, requires_grad=True)
    (g,) = torch.autograd.grad(
        ff.sequence_logprobs(x.square()).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_forward_mode_raises():
    logits, targets = make(3, 8)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        x = forward_ad.make_dual(logits, torch.ones_like(logits))
        for function in (
            lambda: ff.token_logprobs(x, targets),
            lambda: ff.cross_entropy(x, targets),
            lambda: ff.sequence_logprobs(x),
            lambda: ff.preference_loss(x[:, 0], x[:, 1]),
        ):
            with pytest.raises(RuntimeError, match="forward-mode"):
                function()
        assert ff.token_logprobs(logits, targets).shape == (3,)


def test_lazy_negatives_and_zero_tensors():
    """Tensors that are not what their memory says go through torch's dispatcher."""
    lazy = torch.randn(3, 5, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    assert torch.equal(ff.sequence_logprobs(lazy), ff.sequence_logprobs(lazy.clone()))
    y = torch.tensor([0, 1, 2])
    assert torch.equal(ff.token_logprobs(lazy, y), ff.token_logprobs(lazy.clone(), y))
    zero = torch._efficientzerotensor((3, 5))
    with contextlib.suppress(RuntimeError, TypeError):  # refused is as good; a crash is not
        assert torch.equal(ff.sequence_logprobs(zero), torch.zeros(3))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    logits, targets = make(9, 300)
    for inplace in (False, True):
        for function in (
            lambda x, i=inplace: ff.cross_entropy(x * 1.0, targets, inplace=i),
            lambda x, i=inplace: ff.token_logprobs(x * 1.0, targets, inplace=i).sum(),
        ):
            a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            torch.utils.checkpoint.checkpoint(function, a, use_reentrant=use_reentrant).backward()
            function(b).backward()
            assert torch.equal(a.grad, b.grad)


def test_narrow_cu_seqlens_and_their_device():
    lp, offsets = torch.randn(6), torch.tensor([0, 2, 6])
    want = ff.sequence_logprobs(lp, cu_seqlens=offsets)
    for dtype in (torch.int8, torch.int16, torch.uint8, torch.int32):
        assert torch.equal(ff.sequence_logprobs(lp, cu_seqlens=offsets.to(dtype)), want)
    with pytest.raises(ValueError, match="cu_seqlens: on meta; token_lp is on cpu"):
        ff.sequence_logprobs(lp, cu_seqlens=offsets.to("meta"))
    with pytest.raises(ValueError, match="cu_seqlens: on meta; logprobs is on cpu"):
        ff.policy_loss(lp, advantages=torch.ones(2), cu_seqlens=offsets.to("meta"))


def test_create_graph_under_checkpointing():
    """A gradient that may be differentiated again, of activations that are recomputed: these can be read
    once. Ops of several families, each with a backward of its own."""
    logits, targets = make(9, 300)
    q = ff.quantize(torch.randn(300, 300))
    a, b, weight = torch.randn(4, 300), torch.randn(300, 4), torch.randn(300, 300)
    for function in (
        lambda x: ff.cross_entropy(x * 1.0, targets),
        lambda x: ff.token_logprobs(x * 1.0, targets).sum(),
        lambda x: ff.distill_loss(x * 1.0, weight[:9]),
        lambda x: ff.codebook_linear(x * 1.0, q).square().sum(),
        lambda x: ff.lora_linear(x * 1.0, weight, a, b).square().sum(),
    ):
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
        (got,) = torch.autograd.grad(out, x, create_graph=True)
        (want,) = torch.autograd.grad(function(y), y)
        assert torch.equal(got, want)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            got.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loss_scaling(dtype):
    """A loss scaler's factor must reach small gradients before they are rounded to 16 bits.

    Rows of a gradient sum to 0; where small elements were lost they do not.
    """
    logits, targets = make(64, 32001, dtype, ignore=False)
    x = logits.clone().requires_grad_()
    (ff.cross_entropy(x, targets) * 16384.0).backward()
    rows = x.grad.double().sum(-1).abs()
    at_target = x.grad.double().gather(-1, targets[:, None])[:, 0].abs()
    assert (
        rows <= 0.004 * at_target
    ).all()  # eager's is 0.001; 0.2 was seen where zeros were stored


def test_upstream_that_is_not_finite():
    """Ignored rows pass exactly 0 back whatever comes from above; 0 from above is 0 everywhere."""
    x = torch.randn(3, 5)
    x[0] = float("nan")
    y = torch.tensor([1, IGNORE, 2])
    for reduction in ("mean", "sum", "none"):
        for inplace in (False, True):
            z = x.clone().requires_grad_()
            (
                ff.cross_entropy(z, y, reduction=reduction, inplace=inplace).sum() * float("inf")
            ).backward()
            assert (z.grad[1] == 0).all()
            z = x.clone().requires_grad_()
            loss = ff.cross_entropy(z, y, reduction=reduction, inplace=inplace).sum()
            loss.backward(torch.tensor(0.0))
            assert (z.grad == 0).all()


@pytest.mark.parametrize("stats", [False, True])
def test_compile_token_logprobs(stats, counter):
    def step(x, targets, t):
        out = ff.token_logprobs(x, targets, temperature=t, stats=stats)
        return sum(o.sum() for o in out) if stats else out.sum()

    # Inductor once: with statistics there are more outputs of the same opaque ops
    counter.backend = "aot_eager" if stats else "inductor"
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    logits, targets = make(5, 40)
    for i in range(12):
        t = 0.5 + 0.13 * i
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = compiled(x, targets, t), step(y, targets, t)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-7)
    assert 1 <= counter.graphs <= 2
    before, counter.backend = counter.graphs, "eager"
    for i in range(12):  # as a 0-d tensor a scalar never recompiles
        compiled(x, targets, torch.tensor(0.5 + 0.13 * i))
    assert counter.graphs <= before + 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_cross_entropy(reduction):
    torch._dynamo.reset()

    def step(x, targets, eps, inplace):
        return ff.cross_entropy(
            x * 1.0, targets, label_smoothing=eps, reduction=reduction, inplace=inplace
        ).sum()

    # Inductor once, for gradients in place; the other reduction differs in what the opaque ops are told
    backend = "inductor" if reduction == "mean" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    logits, targets = make(5, 40)
    for eps, inplace in ((0.1, False), (0.2, True)):
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = compiled(x, targets, eps, inplace), step(y, targets, eps, False)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-7)


def test_autocast():
    """Ops take what they are given: bf16 logits stay bf16, statistics are float32."""
    layer = torch.nn.Linear(8, 33)
    x, targets = torch.randn(6, 8), torch.randint(0, 33, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(x)
        assert logits.dtype is torch.bfloat16
        lp = ff.token_logprobs(logits, targets)
        loss = ff.cross_entropy(logits, targets)
        assert lp.dtype is loss.dtype is torch.float32
    (loss - lp.mean()).backward()
    assert layer.weight.grad.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.nn.functional.cross_entropy(layer(x).float(), targets)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)


# ---- determinism and threads -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_thread_count(dtype):
    logits, targets = make(70, 3001, dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        x = logits.clone().requires_grad_()
        out = ff.token_logprobs(x, targets, stats=True)
        sum(o.sum() for o in out).backward()
        z = logits.clone().requires_grad_()
        loss = ff.cross_entropy(z, targets, label_smoothing=0.1)
        loss.backward()
        results.append([*(o.detach() for o in out), x.grad, loss.detach(), z.grad])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_streamed_gradient_has_the_same_bits():
    """Above 16 MiB the gradient is written past the caches; odd row lengths start unaligned."""
    rows, vocab = 700, 6151
    logits, targets = make(rows, vocab)
    x = logits.requires_grad_()
    ff.token_logprobs(x, targets).sum().backward()
    for part in (slice(0, 3), slice(350, 353), slice(697, 700)):
        y = logits.detach()[part].clone().requires_grad_()
        ff.token_logprobs(y, targets[part]).sum().backward()
        assert torch.equal(x.grad[part], y.grad)


def test_concurrent_python_threads():
    cases = [make(20, 500 + 37 * i, seed=i) for i in range(6)]
    want = [ff.cross_entropy(*c) for c in cases]
    want_grads = []
    for logits, targets in cases:
        x = logits.clone().requires_grad_()
        ff.cross_entropy(x, targets).backward()
        want_grads.append(x.grad)

    def work(i):
        for _ in range(30):
            x = cases[i][0].clone().requires_grad_()
            loss = ff.cross_entropy(x, cases[i][1])
            loss.backward()
            assert torch.equal(loss.detach(), want[i])
            assert torch.equal(x.grad, want_grads[i])

    at_once(work)


# ---- wrong arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 7, 2**31, -(2**31) - 5])
@pytest.mark.parametrize("where", [0, 3, 5])
def test_target_out_of_range(bad, where):
    logits = torch.randn(6, 7)
    targets = torch.zeros(6, dtype=torch.long)
    targets[where] = bad
    out = torch.full((6, 7), 5.0)
    saved = torch.zeros(2, 6, dtype=torch.float64)
    message = rf"targets: element {where} is {bad}; allowed are 0 to 6 and ignore_index \(-100\)"
    for call in (
        lambda: ff.token_logprobs(logits, targets),
        lambda: ff.token_logprobs(logits, targets, stats=True),
        lambda: ff.cross_entropy(logits, targets),
        lambda: ff.cross_entropy(logits.clone().requires_grad_(), targets),
        lambda: RAW.token_logprobs_backward(
            logits, targets, saved, torch.ones(6), None, None, out, 1.0, IGNORE
        ),
        lambda: RAW.cross_entropy_forward_backward(logits, targets, out, 0.0, IGNORE, 2),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert (out == 5).all()
    assert ff.token_logprobs(logits, targets.clamp(0, 6), ignore_index=3).shape == (6,)
    if -(2**31) <= bad < 2**31:
        with pytest.raises(ValueError, match=message):
            ff.token_logprobs(logits, targets.int())


def test_wrong_arguments():
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    fns = (ff.token_logprobs, ff.cross_entropy)
    for f in fns:
        with pytest.raises(TypeError, match="logits: a tensor"):
            f([[1.0]], y)
        with pytest.raises(TypeError, match=r"logits: dtype torch.int64; allowed: float32"):
            f(torch.ones(3, 5, dtype=torch.long), y)
        with pytest.raises(TypeError, match="targets: a tensor"):
            f(x, [0, 1, 2])
        with pytest.raises(TypeError, match=r"targets: dtype torch.float32"):
            f(x, y.float())
        with pytest.raises(TypeError, match=r"targets: dtype torch.bool"):
            f(x, y.bool())
        with pytest.raises(
            ValueError, match=r"targets: shape \(2,\); logits of shape \(3, 5\) need \(3,\)"
        ):
            f(x, y[:2])
        with pytest.raises(ValueError, match=r"targets: shape \(3, 1\)"):
            f(x, y[:, None])
        with pytest.raises(ValueError, match="at least one class"):
            f(x[:, :0], y)
        with pytest.raises(ValueError, match="targets: shape"):
            f(torch.tensor(1.0), torch.tensor(0))
        with pytest.raises(ValueError, match="targets: on meta; logits is on cpu"):
            f(x, y.to("meta"))
    for t in (0.0, -1.0, float("nan"), float("inf")):
        for value in (t, torch.tensor(t)):
            with pytest.raises(ValueError, match="temperature: .*positive and finite"):
                ff.token_logprobs(x, y, temperature=value)
    with pytest.raises(TypeError, match="temperature: a number"):
        ff.token_logprobs(x, y, temperature="hot")
    with pytest.raises(
        ValueError, match=r"temperature: a number or a 0-d tensor, not of shape \(2,\)"
    ):
        ff.token_logprobs(x, y, temperature=torch.ones(2))
    with pytest.raises(ValueError, match="temperature: has no gradient"):
        ff.token_logprobs(x, y, temperature=torch.tensor(1.0, requires_grad=True))
    for eps in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing"):
            ff.cross_entropy(x, y, label_smoothing=eps)
    with pytest.raises(ValueError, match="reduction: 'avg'; allowed: 'none', 'sum', 'mean'"):
        ff.cross_entropy(x, y, reduction="avg")
    for index in (None, 1.5, 2**70):
        for f in fns:
            with pytest.raises(TypeError, match="ignore_index: an int"):
                f(x, y, ignore_index=index)
    with pytest.raises(ValueError, match="temperature"):
        ff.token_logprobs(x, y, temperature=1e38)
    with pytest.raises(TypeError, match="temperature: a number"):
        ff.token_logprobs(x, y, temperature="1.0")
    lp = torch.zeros(3, 5)
    with pytest.raises(TypeError, match="mask: a tensor, not list"):
        ff.sequence_logprobs(lp, mask=[True])
    with pytest.raises(ValueError, match="mask: on meta; token_lp is on cpu"):
        ff.sequence_logprobs(lp, mask=torch.ones(3, 5, device="meta"))
    with pytest.raises(ValueError, match="one of the two"):
        ff.sequence_logprobs(lp, mask=lp > 0, cu_seqlens=y)
    with pytest.raises(ValueError, match=r"mask: shape \(3,\)"):
        ff.sequence_logprobs(lp, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="cu_seqlens: shape"):
        ff.sequence_logprobs(lp, cu_seqlens=torch.tensor([0, 15]))
    with pytest.raises(TypeError, match="cu_seqlens: dtype"):
        ff.sequence_logprobs(lp[0], cu_seqlens=torch.tensor([0.0, 5.0]))
    for ends in ([0, 6], [1, 5], [0, 4, 2, 5], [0, 4], [-1, 5]):
        with pytest.raises(ValueError, match="cu_seqlens: element"):
            ff.sequence_logprobs(lp[0], cu_seqlens=torch.tensor(ends))
    with pytest.raises(TypeError, match="token_lp"):
        ff.sequence_logprobs(y)
    with pytest.raises(ValueError, match="token_lp: a scalar"):
        ff.sequence_logprobs(torch.tensor(1.0))


def test_isa_levels():
    with pytest.raises(ValueError, match="isa: 'sse9'; allowed are"):
        _C._set_isa("sse9")
    levels = ["baseline", "avx2", "avx512", "avx512bf16"]
    above = levels[levels.index(_C.machine_isa()) + 1 :]
    for level in above:
        with pytest.raises(ValueError, match="this machine runs up to"):
            _C._set_isa(level)
    assert _C.isa() in levels


# ---- random inputs -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    spread=st.floats(0.01, 50.0),
    temperature=st.floats(0.05, 20.0),
    seed=st.integers(0, 2**31),
)
def test_random(rows, vocab, dtype, spread, temperature, seed):
    logits, targets = make(rows, vocab, dtype, spread=spread, seed=seed)
    if seed % 3 == 0:
        logits[torch.rand(logits.shape) < 0.2] = -float("inf")
        logits[:, 0] = 0.0
    upstream = [torch.randn(rows) for _ in range(3)]
    ours, dz = gradients(
        ff.token_logprobs, logits, targets, upstream, stats=True, temperature=temperature
    )
    truth = truth_stats(logits, targets, temperature)
    eager = eager_stats(logits, targets, temperature)
    for name, a, e, t in zip(("lp", "entropy", "lse"), ours, eager, truth, strict=True):
        check(name, a, e, t)
    keep = np.isfinite(truth[0])
    t = truth_gradient(logits, targets, upstream, temperature)
    if keep.all() and seed % 3:
        _, eager_dz = gradients(eager_stats, logits, targets, upstream, temperature=temperature)
    else:
        eager_dz = t  # eager's entropy gradient is NaN at -inf: no licence taken from it
    check("gradient", dz, eager_dz, t)
