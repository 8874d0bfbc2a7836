"""The Triton kernels by themselves, against float64: on a GPU compiled, elsewhere in Triton's interpreter.

The interpreter is slow and runs a reduced grid of shapes. Its bfloat16 stores truncate where a GPU rounds;
that is an error of up to one unit in the last place instead of half of one, and within the rule of
tolerances.py, which allows one unit beside eager's own error.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py turns the interpreter on

import compile_triton
from finefuse import _C
from finefuse._args import DTYPES as CODES
from finefuse._args import PREFERENCE_LOSSES as LOSSES
from finefuse._args import REDUCTIONS
from finefuse.kernels import logprobs as kernels
from finefuse.kernels import preference as preference_kernels
from finefuse.reference import logprobs as reference
from finefuse.reference import preference as preference_reference
from tolerances import check

# NumPy's, from the interpreter, at what a GPU does silently: -inf - -inf, overflow to inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 1: one class, loss 0; 257: an odd tail; 3001: more than a block of the kernel with entropy, 5003: and of the
# one without. 20000 and 20001 take the tiles of long rows that are read twice, aligned and not.
SHAPES = [(3, 1), (2, 2), (4, 257), (3, 3001), (2, 5003)]
IGNORE = -100
NAN, INF = float("nan"), float("inf")


@functools.cache
def compiled_pairs():
    """Every choice of a kernel with the type it computes on, among what compile_triton.py compiles."""
    return set().union(*map(compile_triton.pairs, compile_triton.all_variants()))


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Nothing is launched here that compile_triton.py does not know."""
    known = compiled_pairs()

    def see(variant):
        unknown = compile_triton.pairs(variant) - known
        assert not unknown, f"compile_triton.py does not compile {unknown}"

    for module in compile_triton.MODULES:
        monkeypatch.setattr(module, "launch", compile_triton.recording(see, call=True))


def accumulator(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def layout_of(logits):
    """Of contiguous rows, or of (outer, inner, V) with contiguous classes."""
    code = CODES[str(logits.dtype).removeprefix("torch.")]
    vocab = logits.shape[-1]
    if logits.ndim == 2:
        return code, len(logits), vocab, len(logits), 0, vocab
    return code, logits.shape[0] * logits.shape[1], vocab, logits.shape[1], *logits.stride()[:2]


def make(rows, vocab, dtype, *, spread=3.0, ignore=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=g) * spread).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    if ignore:
        targets[rows // 2] = IGNORE
    return logits, targets


def new(shape, dtype):
    """Full of what no kernel may leave behind."""
    return torch.full(
        (shape,) if isinstance(shape, int) else shape, 77.0, dtype=dtype, device=DEVICE
    )


def on(*tensors):
    return [x if x is None else x.to(DEVICE) for x in tensors]


class Flags:
    def __init__(self):
        self.tensor = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        self.place = (0, self.tensor)

    def __eq__(self, other):
        return self.tensor.tolist() == other


# ---- token_logprobs ----------------------------------------------------------------------------


def forward(logits, targets, temperature=1.0, stats=True, flags=None):
    """lp, entropy, lse, saved."""
    rows, dtype = targets.numel(), accumulator(logits.dtype)
    lp = new(rows, dtype)
    entropy, lse = (new(rows, dtype), new(rows, dtype)) if stats else (None, None)
    saved = new((3 if stats else 2, rows), torch.float64)
    flags = flags or Flags()
    z, y = on(logits, targets)
    kernels.token_logprobs(
        z, layout_of(logits), y, y.dtype is torch.int32, IGNORE, temperature,
        lp, entropy, lse, saved, flags.place,
    )  # fmt: skip
    return [x if x is None else x.cpu() for x in (lp, entropy, lse, saved)]


def backward(logits, targets, saved, upstream, temperature=1.0, inplace=False, flags=None):
    z, y, saved, *upstream = on(logits, targets, saved, *upstream)
    out = z.clone() if inplace else new(logits.shape, logits.dtype)
    layout = layout_of(out)
    flags = flags or Flags()
    kernels.token_logprobs_backward(
        out if inplace else z, layout if inplace else layout_of(logits), out, layout,
        y, y.dtype is torch.int32, IGNORE, temperature, saved, *upstream, flags.place,
    )  # fmt: skip
    return out.cpu()


def eager_stats(logits, targets, temperature):
    logp = torch.log_softmax(logits / temperature, -1)
    keep = targets != IGNORE
    lp = logp.gather(-1, torch.where(keep, targets, 0).long()[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    lse = torch.logsumexp(logits / temperature, -1)
    return [torch.where(keep, x, x.new_zeros(())) for x in (lp, entropy, lse)]


def eager_gradient(logits, targets, upstream, temperature):
    x = logits.clone().requires_grad_()
    outputs = eager_stats(x, targets, temperature)
    loss = sum((o * u).sum() for o, u in zip(outputs, upstream, strict=True) if u is not None)
    loss.backward()
    return x.grad


def truth_gradient(logits, targets, upstream, temperature):
    zero = torch.zeros(len(targets))
    g, h, l = ((zero if u is None else u).double().numpy() for u in upstream)
    return reference.token_logprobs_gradient(
        logits.double().numpy(), targets.numpy(), g, h, l, temperature
    )


def truth_stats(logits, targets, temperature=1.0):
    return reference.token_logprobs(logits.double().numpy(), targets.numpy(), temperature)


def check_stats(logits, targets, temperature=1.0):
    ours = forward(logits, targets, temperature)
    eager = eager_stats(logits, targets, temperature)
    truth = truth_stats(logits, targets, temperature)
    for name, a, e, t in zip(("lp", "entropy", "lse"), ours, eager, truth, strict=False):
        check(name, a, e, t)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats_and_gradients(shape, dtype):
    logits, targets = make(*shape, dtype)
    temperature = 0.7
    saved = check_stats(logits, targets, temperature)[3]
    lp, _, _, plain_saved = forward(logits, targets.int(), temperature, stats=False)
    check("lp alone", lp, eager_stats(logits, targets, temperature)[0],
          truth_stats(logits, targets, temperature)[0])  # fmt: skip
    g = torch.Generator().manual_seed(1)
    all_three = [torch.randn(shape[0], generator=g, dtype=accumulator(dtype)) for _ in range(3)]
    for only in ((0,), (1,), (2,), (0, 1, 2)):
        upstream = [u if i in only else None for i, u in enumerate(all_three)]
        needed = saved if 1 in only else plain_saved
        ours = backward(logits, targets, needed, upstream, temperature)
        eager = eager_gradient(logits, targets, upstream, temperature)
        check(f"{only}", ours, eager, truth_gradient(logits, targets, upstream, temperature))
        assert torch.equal(
            ours, backward(logits, targets.int(), needed, upstream, temperature, inplace=True)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_backward_agrees(dtype):
    """`saved` means the same on both sides, forward here and backward there or the other way."""
    logits, targets = make(4, 700, dtype)
    upstream = [torch.randn(4, dtype=accumulator(dtype)) for _ in range(3)]
    layout, eager = layout_of(logits), eager_gradient(logits, targets, upstream, 0.7)
    truth = truth_gradient(logits, targets, upstream, 0.7)
    saved, out = forward(logits, targets, 0.7)[3], torch.empty_like(logits)
    _C.token_logprobs_backward(
        logits, layout, out, layout, targets, False, IGNORE, 0.7, saved, *upstream, 1
    )
    check("forward here, backward on the CPU", out, eager, truth)
    lp, entropy, lse = (torch.empty(4, dtype=accumulator(dtype)) for _ in range(3))
    _C.token_logprobs(logits, layout, targets, False, IGNORE, 0.7, lp, entropy, lse, saved, 1)
    check("the other way", backward(logits, targets, saved, upstream, 0.7), eager, truth)


@pytest.mark.parametrize("temperature", [1.0, 0.01, 100.0])
@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
def test_large_logits(spread, temperature):
    """Flat, peaked and far from zero: where a float32 lse would lose the probabilities."""
    for shift in (0.0, -1e4, 1e4):
        logits, targets = make(2, 2100, torch.float32, spread=spread, ignore=False)
        logits += shift
        saved = check_stats(logits, targets, temperature)[3]
        upstream = [torch.ones(2), torch.ones(2), None]
        check(
            "gradient", backward(logits, targets, saved, upstream, temperature),
            eager_gradient(logits, targets, upstream, temperature),
            truth_gradient(logits, targets, upstream, temperature),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 1023, 5000])
def test_peaked_rows_keep_their_digits(dtype, position):
    """A gap of 40: log-probability and entropy about 1e-17, which a sum of 1 + 1e-17 would lose."""
    logits = torch.zeros(2, 5003, dtype=dtype)
    logits[0, 17] = 40.0  # a maximum of its own, which the next rises above
    logits[:, position] = 80.0
    targets = torch.tensor([position, position])
    lp, entropy, _, saved = forward(logits, targets)
    t_lp, t_entropy, _ = truth_stats(logits, targets)
    assert -1e-16 < t_lp[0] < -1e-18
    np.testing.assert_allclose(lp.double(), t_lp, rtol=1e-5)
    np.testing.assert_allclose(entropy.double(), t_entropy, rtol=1e-5)
    dz = backward(logits, targets, saved, [torch.ones(2, dtype=lp.dtype), None, None])
    if dtype is not torch.float16:  # which has nothing between 0 and 6e-8
        at = dz[:, position].double().numpy()
        np.testing.assert_allclose(at, -t_lp, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_ties_at_the_maximum():
    """Counted exactly wherever they are: in one lane, in several, in later blocks."""
    for places in ([0, 1], [0, 2048, 4096], [5, 4097, 5002], list(range(5003))):
        logits = torch.full((1, 5003), -INF)
        logits[0, places] = 3.0
        for stats in (False, True):
            lp = forward(logits, torch.tensor([places[-1]]), stats=stats)[0]
            assert lp.item() == pytest.approx(-np.log(len(places)), rel=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(dtype):
    """-inf: probability 0, no part in entropy and gradient; as a target lp = -inf, gradient g/T."""
    logits, targets = make(5, 3001, dtype, ignore=False)
    logits[:, ::3] = -INF
    logits[3] = -INF
    logits[4] = torch.finfo(dtype).min  # a mask, not -inf: a row of equal logits
    targets[:] = torch.tensor([1, 4, 3, 7, 9])
    for stats in (False, True):
        lp, entropy, lse, saved = forward(logits, targets, stats=stats)
        truth = truth_stats(logits, targets)
        check("lp", lp, truth[0], truth[0])
        assert lp[2] == -INF
        assert torch.isnan(lp[3])
        assert lp[4] == pytest.approx(-np.log(3001))
    keep = [0, 1, 2, 4]
    check("entropy", entropy[keep], truth[1][keep], truth[1][keep])
    check("lse", lse, truth[2], truth[2])
    upstream = [torch.tensor(u, dtype=lp.dtype) for u in ([2.0, -1.0, 0.5], [1.0, 1.0, 1.0])]
    z, y = logits[:3].contiguous(), targets[:3]
    saved = forward(z, y, 2.0)[3]
    dz = backward(z, y, saved, [*upstream, None], 2.0)
    truth = truth_gradient(z, y, [*upstream, None], 2.0)
    check("gradient", dz, truth, truth)
    masked = z == -INF
    masked[2, 3] = False
    assert (dz[masked] == 0).all()
    assert dz[2, 3] == 0.25  # g/T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinity(dtype, bad):
    """In a row that counts they show, in that row; in an ignored row, or without upstream, not."""
    for column in (0, 50, 2500):
        logits, targets = make(4, 2600, dtype, ignore=False)
        logits[1:, column] = bad
        targets[2] = IGNORE
        lp, entropy, _, saved = forward(logits, targets)
        g = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=lp.dtype)
        dz = backward(logits, targets, saved, [g, g, g])
        for x in (lp, entropy, dz.float().amax(1)):
            assert torch.isfinite(x[0])
            assert torch.isnan(x[1])
            assert x[2] == 0
        assert torch.isnan(dz[1]).all()
        assert (dz[2:] == 0).all()


def test_targets_out_of_range():
    """Never followed: the row is NaN, its gradient 0, the flag is set; others are as they were."""
    logits, _ = make(5, 300, torch.float32, ignore=False)
    for dtype in (torch.int64, torch.int32):
        targets = torch.tensor([7, 300, -1, IGNORE, 2**31 - 1], dtype=dtype)
        flags = Flags()
        lp, entropy, lse, saved = forward(logits, targets, flags=flags)
        assert flags == [1, 0, 0]
        for x in (lp, entropy, lse):
            assert torch.isnan(x[[1, 2, 4]]).all()
            assert torch.isfinite(x[0])
            assert x[3] == 0
        flags = Flags()
        dz = backward(logits, targets, saved, [torch.ones(5)] * 3, flags=flags)
        assert flags == [1, 0, 0]
        assert (dz[1:] == 0).all()
        assert (dz[0] != 0).any()
        for reduction in REDUCTIONS:
            flags = Flags()
            loss, dz = cross_entropy(logits, targets, reduction=reduction, flags=flags)
            assert flags == [1, 0, 0]
            assert torch.isnan(loss[[1, 2, 4]] if reduction == "none" else loss).all()
            assert (dz[1:] == 0).all()
    flags = Flags()
    forward(logits, torch.tensor([0, 299, IGNORE, 1, 2]), flags=flags)
    assert flags == [0, 0, 0]


def test_strides():
    """Rows of a slice, as logits[:, :-1]; the gradient contiguous, and in place."""
    base, _ = make(3 * 6, 65, torch.float32, ignore=False)
    cube, targets = base.view(3, 6, 65), torch.randint(0, 65, (15,))
    part = cube[:, :-1]
    plain = part.reshape(15, 65)
    ours, want = forward(part, targets), forward(plain, targets)
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
    g = torch.randn(15)
    want_dz = backward(plain, targets, want[3], [g, g, None])
    z, y, saved, g = on(cube.clone(), targets, want[3], g)
    place, slot = Flags().place, z[:, :-1]
    layout = layout_of(slot)
    out = new((15, 65), torch.float32)
    for gradient, its_layout in ((out, layout_of(out)), (slot, layout)):
        kernels.token_logprobs_backward(
            slot, layout, gradient, its_layout, y, False, IGNORE, 1.0, saved, g, g, None, place
        )
        assert torch.equal(gradient.reshape(15, 65).cpu(), want_dz)
    assert torch.equal(z[:, -1].cpu(), cube[:, -1])  # what lies between the rows is untouched


# ---- cross_entropy -----------------------------------------------------------------------------


def cross_entropy(
    logits, targets, eps=0.0, reduction="mean", upstream=None, gradient="new", want_loss=True,
    flags=None,
):  # fmt: skip
    """(loss, gradient); gradient: "new", "inplace" or None."""
    code, rows = REDUCTIONS[reduction], targets.numel()
    dtype = accumulator(logits.dtype)
    z, y, upstream = on(logits.clone(), targets, upstream)
    out = {"new": new(logits.shape, logits.dtype), "inplace": z, None: None}[gradient]
    loss = new(rows if code == 0 else (), dtype) if want_loss else None
    scratch = new(rows + 1, torch.float64) if code else None
    layout, place = layout_of(z), (flags or Flags()).place
    kernels.cross_entropy(
        z, layout, out, layout, y, y.dtype is torch.int32, IGNORE, eps, code,
        loss, scratch, upstream, place,
    )  # fmt: skip
    return [x if x is None else x.cpu() for x in (loss, out)]


def eager_cross_entropy(logits, targets, eps, reduction):
    x = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        x, targets, reduction=reduction, label_smoothing=eps, ignore_index=IGNORE
    )
    loss.sum().backward()
    return loss.detach(), x.grad


# (2, 8200): read twice, one block of the common tile and more; long rows in float16 are as in bfloat16
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(s, d) for s in SHAPES for d in DTYPES]
    + [(s, d) for s in [(2, 8200), (2, 20000), (2, 20001)] for d in DTYPES if d != torch.float16],
    ids=str,
)
def test_cross_entropy(shape, dtype):
    logits, targets = make(*shape, dtype)
    flat = logits.double().numpy()
    for eps in (0.0, 0.1):
        for reduction in REDUCTIONS if eps == 0.0 else ("none", "mean"):
            loss, dz = cross_entropy(logits, targets, eps, reduction)
            e_loss, e_dz = eager_cross_entropy(logits, targets, eps, reduction)
            truth, truth_dz = reference.cross_entropy(flat, targets.numpy(), eps, IGNORE, reduction)
            check(f"loss {reduction} {eps}", loss, e_loss, truth)
            check(f"gradient {reduction} {eps}", dz, e_dz, truth_dz)
            if shape[1] < 8200 and (eps == 0.0) == (reduction == "mean"):
                alone, _ = cross_entropy(logits, targets.int(), eps, reduction, gradient=None)
                check(f"loss alone {reduction} {eps}", alone, e_loss, truth)
        again, in_place = cross_entropy(logits, targets, eps, reduction, gradient="inplace")
        assert torch.equal(again, loss)
        assert torch.equal(in_place, dz)


@pytest.mark.parametrize("upstream", [0.0, 1.0, 2.5])
def test_cross_entropy_upstream(upstream):
    """In the row kernel, and afterwards in place: 0 is 0, 1 changes nothing."""
    for dtype in DTYPES:
        logits, targets = make(3, 300, dtype)
        u = torch.tensor(upstream, dtype=accumulator(dtype))
        for reduction in REDUCTIONS:
            per_row = u.expand(3).contiguous() if reduction == "none" else u
            _, dz = cross_entropy(logits, targets, 0.1, reduction, per_row, want_loss=False)
            _, truth = reference.cross_entropy(
                logits.double().numpy(), targets.numpy(), 0.1, IGNORE, reduction
            )
            _, eager = eager_cross_entropy(logits, targets, 0.1, reduction)
            check("gradient", dz, upstream * eager.double(), upstream * truth)
        _, before = cross_entropy(logits, targets)
        after = before.clone().to(DEVICE)
        kernels.scale_gradient(
            after, layout_of(after), *on(targets), False, IGNORE, *on(u), Flags().place
        )
        want = (before.to(u.dtype) * u).to(dtype)
        check("scaled", after.cpu(), want, want)
        if upstream == 1.0:
            assert torch.equal(after.cpu(), before)
    # an ignored row stays 0 and a factor of 0 is 0, whatever meets them
    for factor, filled in ((NAN, 0.0), (0.0, NAN)):
        gradient = torch.full((2, 9), filled, device=DEVICE)
        kernels.scale_gradient(
            gradient, layout_of(gradient), *on(torch.tensor([IGNORE, IGNORE])), False, IGNORE,
            *on(torch.tensor(factor)), Flags().place,
        )  # fmt: skip
        assert (gradient == 0).all()


def test_cross_entropy_of_what_does_not_count():
    logits = torch.full((3, 40), NAN)
    targets = torch.full((3,), IGNORE)
    for reduction in REDUCTIONS:
        loss, dz = cross_entropy(logits, targets, 0.1, reduction)
        assert (loss == 0).all()
        assert (dz == 0).all()
        targets_one = torch.tensor([IGNORE, 3, IGNORE])
        mixed = logits.clone()
        mixed[1] = torch.randn(40)
        loss, dz = cross_entropy(mixed, targets_one, 0.1, reduction)
        assert torch.isfinite(loss).all()
        assert (dz[[0, 2]] == 0).all()
    # a row that counts shows its NaN
    loss, dz = cross_entropy(logits, torch.zeros(3, dtype=torch.long))
    assert torch.isnan(loss)
    assert torch.isnan(dz).all()


def test_smoothing_far_from_zero():
    """lse - mean z of large logits that differ little."""
    logits, targets = make(3, 5000, torch.float32, spread=1.0)
    logits += 3e4
    loss, dz = cross_entropy(logits, targets, 0.3, "none")
    e_loss, e_dz = eager_cross_entropy(logits, targets, 0.3, "none")
    truth, truth_dz = reference.cross_entropy(
        logits.double().numpy(), targets.numpy(), 0.3, IGNORE, "none"
    )
    check("loss", loss, e_loss, truth)
    check("gradient", dz, e_dz, truth_dz)
    logits[0, 5] = -INF  # no probability, but a part in the mean
    assert cross_entropy(logits, targets, 0.3, "none")[0][0] == INF


# ---- sequence sums -----------------------------------------------------------------------------


def sequence_sums(lp, mask=None, offsets=None, average=False):
    """(sums, flags)"""
    flags = Flags()
    segments = len(offsets) - 1 if offsets is not None else lp.shape[0]
    length = lp.numel() // max(segments, 1)
    sums = new(segments, lp.dtype)
    int32 = offsets is not None and offsets.dtype is torch.int32
    lp, mask, offsets = on(lp, mask, offsets)
    kernels.sequence_sums(
        lp, lp.dtype is torch.float64, mask, offsets, int32, segments, length, lp.numel(), average,
        sums, flags.place,
    )  # fmt: skip
    return sums.cpu(), flags


def sequence_sums_backward(g, shape, mask=None, offsets=None, average=False):
    flags = Flags()
    out = new(shape, g.dtype)
    int32 = offsets is not None and offsets.dtype is torch.int32
    length = out.numel() // max(len(g), 1)
    g, mask, offsets = on(g, mask, offsets)
    kernels.sequence_sums_backward(
        g, g.dtype is torch.float64, mask, offsets, int32, len(g), length, out.numel(), average,
        out, flags.place,
    )  # fmt: skip
    return out.cpu(), flags


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_sequence_sums(dtype, average):
    lp = -torch.rand(3, 1500, dtype=dtype)
    mask = torch.rand(3, 1500) < 0.5
    mask[1] = False  # an empty answer: 0, and 0 back
    for m in (None, mask):
        sums, flags = sequence_sums(lp, m, average=average)
        truth = reference.sequence_logprobs(
            lp.double().numpy(), None if m is None else m.numpy(), average=average
        )
        check("sums", sums, truth, truth)
        assert flags == [0, 0, 0]
        g = torch.randn(3, dtype=dtype)
        out, _ = sequence_sums_backward(g, lp.shape, m, average=average)
        keep = torch.ones(3, 1500, dtype=torch.bool) if m is None else m
        want = keep * g[:, None].double()
        if average:
            want /= keep.sum(1).clamp(min=1)[:, None]
        check("gradient", out, want, want)
    flat = lp.reshape(-1)
    for offsets in ([0, 0, 1, 1800, 4500, 4500], [0, 4500]):
        for ends in (torch.tensor(offsets), torch.tensor(offsets, dtype=torch.int32)):
            sums, flags = sequence_sums(flat, None, ends, average)
            truth = reference.sequence_logprobs(
                flat.double().numpy(), cu_seqlens=np.array(offsets), average=average
            )
            check("sums", sums, truth, truth)
            assert flags == [0, 0, 0]
            lengths = np.diff(offsets)
            g = torch.randn(len(lengths), dtype=dtype)
            out, flags = sequence_sums_backward(g, flat.shape, None, ends, average)
            share = g.double().numpy() / (np.maximum(lengths, 1) if average else 1)
            want = np.repeat(share, lengths)
            check("gradient", out, want, want)
            assert flags == [0, 0, 0]


@pytest.mark.parametrize(
    ("offsets", "bad"),
    [
        ([0, 4, 2, 5], [1]), ([1, 3, 5], [0]), ([0, 4], [0]), ([0, 6], [0]), ([-3, 5], [0]),
        ([0, 2**40, 5], [0, 1]), ([0, -(2**40), 5], [0, 1]),
    ],
)  # fmt: skip
def test_bad_offsets(offsets, bad):
    """Their segments are NaN and the flag is set; every token gets a gradient, none outside is read."""
    guarded = torch.full((15,), NAN)
    guarded[5:10] = torch.arange(1.0, 6.0)
    lp = guarded[5:10]
    sums, flags = sequence_sums(lp, None, torch.tensor(offsets))
    assert flags == [0, 1, 0]
    assert torch.isnan(sums).nonzero()[:, 0].tolist() == bad
    memory = new(15, torch.float32)
    flags = Flags()
    segments = len(offsets) - 1
    kernels.sequence_sums_backward(
        *on(torch.ones(segments)), False, None, *on(torch.tensor(offsets)), False, segments, 5, 5,
        False, memory[5:10], flags.place,
    )  # fmt: skip
    assert flags == [0, 1, 0]
    assert (memory[:5] == 77).all()
    assert (memory[10:] == 77).all()
    assert (memory[5:10] != 77).all()
    if offsets[1:-1] != [4, 2]:  # there a segment in order covers the ones that are not
        assert torch.isnan(memory[5:10]).any()


# ---- preference --------------------------------------------------------------------------------


def preference(vectors, loss, beta=0.1, eps=0.0, reduction="mean"):
    """(out, rewards…, margins, accuracy, gradient), flags; vectors: six, any but the first two None."""
    pairs, dtype = vectors[0].numel(), vectors[0].dtype
    code, flags = REDUCTIONS[reduction], Flags()
    outputs = [
        new(pairs if code == 0 else (), dtype), *(new(pairs, dtype) for _ in range(3)),
        new((), dtype), new((2, pairs), dtype),
    ]  # fmt: skip
    preference_kernels.preference(
        *on(*vectors), dtype is torch.float64, pairs, LOSSES[loss], beta, eps, code, *outputs,
        flags.place,
    )  # fmt: skip
    return [x.cpu() for x in outputs], flags


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pairs", [1, 7, 1030])
def test_preference(loss, dtype, pairs):
    g = torch.Generator().manual_seed(0)
    lp = [(-torch.rand(pairs, generator=g) * 30).to(dtype) for _ in range(4)]
    lengths = [torch.randint(0, 50, (pairs,), generator=g).to(dtype) for _ in range(2)]
    for beta, eps, refs, with_lengths, reduction in (
        (0.1, 0.0, True, True, "mean"), (0.5, 0.1, True, False, "sum"), (2.0, 0.3, False, True, "none"),
    ):  # fmt: skip
        vectors = [*lp[:2], *(lp[2:] if refs else [None] * 2)]
        vectors += lengths if with_lengths else [None] * 2
        outputs, flags = preference(vectors, loss, beta, eps, reduction)
        plain = [None if v is None else v.double().numpy() for v in vectors]
        t = preference_reference.preference_loss(
            *plain[:2], *(plain[2:4] if refs else ()), loss=loss, beta=beta, label_smoothing=eps,
            reduction=reduction,
            **({"chosen_lengths": plain[4], "rejected_lengths": plain[5]} if with_lengths else {}),
        )  # fmt: skip
        truth = (*t[:4], t.accuracy, np.stack([t.d_chosen, t.d_rejected]))
        for name, a, b in zip((*t._fields[:5], "gradient"), outputs, truth, strict=True):
            check(f"{name} {reduction}", a, b, b)
        assert flags == [0, 0, 0]


@pytest.mark.parametrize("loss", LOSSES)
def test_preference_bad_lengths(loss):
    """Negative or NaN: that pair is NaN, and with it a reduced loss; the flag is set."""
    ones = torch.ones(4)
    for n_w, n_l in ((torch.tensor([1, -1, 2, NAN]), ones), (ones, torch.tensor([1, NAN, 2, -3]))):
        vectors = [-ones, -2 * ones, None, None, n_w, n_l]
        (value, *vectors_out, accuracy, gradient), flags = preference(
            vectors, loss, reduction="none"
        )
        assert flags == [0, 0, 1]
        for x in (value, *vectors_out, *gradient):
            assert torch.isnan(x).tolist() == [False, True, False, True]
        assert accuracy == 0.5
        (value, *_), _ = preference(vectors, loss, reduction="mean")
        assert torch.isnan(value)


def test_preference_extremes():
    big = torch.tensor([1e30, -1e30, 0.0, -INF, 3.0])
    zero = torch.zeros(5)
    for eps in (0.0, 0.1):
        (value, *_, gradient), _ = preference(
            [big, zero, None, None, None, None], "sigmoid", eps=eps, reduction="none"
        )
        beta = 0.1
        x = beta * big.double().numpy()
        with np.errstate(over="ignore"):
            truth = np.logaddexp(0, -x) * (1 - eps) + (eps * np.logaddexp(0, x) if eps else 0)
        np.testing.assert_allclose(value.double(), truth, rtol=1e-6)
        assert torch.isfinite(gradient).all()


# ---- nothing, and what is compiled -------------------------------------------------------------


def test_empty():
    """No rows, no pairs, no segments: nothing is launched, a reduced loss is 0."""
    for dtype in DTYPES:
        logits, targets = torch.zeros(0, 7, dtype=dtype), torch.zeros(0, dtype=torch.long)
        lp, *_, saved = forward(logits, targets)
        assert lp.shape == (0,)
        backward(logits, targets, saved, [lp, lp, lp])
        for reduction in REDUCTIONS:
            loss, _ = cross_entropy(logits, targets, reduction=reduction)
            assert (loss == 0).all()
    none = torch.zeros(0)
    for loss in LOSSES:
        for reduction in REDUCTIONS:
            outputs, _ = preference([none, none, *[None] * 4], loss, reduction=reduction)
            value, *_, accuracy, _ = outputs
            assert (value == 0).all()
            assert accuracy == 0
    assert sequence_sums(torch.zeros(0, 5))[0].shape == (0,)
    assert (sequence_sums(torch.zeros(3, 0), average=True)[0] == 0).all()
    assert sequence_sums_backward(torch.ones(3), (3, 0), average=True)[0].shape == (3, 0)
    assert sequence_sums(torch.zeros(5), None, torch.tensor([0]))[1] == [0, 1, 0]
    out, flags = sequence_sums_backward(none, (5,), None, torch.tensor([0]))
    assert torch.isnan(out).all()
    assert flags == [0, 1, 0]


def test_no_variant_is_left_out():
    """What is compiled by default has every choice of what can be launched, with every type."""
    variants = compile_triton.all_variants()
    chosen = list(compile_triton.chosen(variants))
    assert len(chosen) < len(variants)
    assert set().union(*map(compile_triton.pairs, chosen)) == compiled_pairs()
    assert {v.name for v in variants} >= set(compile_triton.HOT)


def test_a_variant_compiles():
    """One cubin for each architecture, without a device; .ci/run compiles them all."""
    code = """
import compile_triton as c
v = next(c.all_variants().__iter__())
for architecture in c.ARCHITECTURES:
    usage = v.compile(architecture)
    assert usage["registers"] > 0 and usage["local"] == 0, usage
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=environment, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
