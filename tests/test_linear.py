"""linear_token_logprobs and linear_cross_entropy against float64."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse import _linear_logprobs, _linear_loss, _matmul, codebook
from finefuse.reference import linear as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logprobs import eager_stats
from tolerances import ScalarErrors, as_float64
from tolerances import check as check_one
from torch.utils.checkpoint import checkpoint

RAW = torch.ops.finefuse
F = torch.nn.functional
IGNORE = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("hidden", "weight", "bias")
# rows, width, vocabulary. One row of one column and two classes; fewer than a vector of each; a vocabulary
# that is no multiple of a vector; more rows than 64, the least of a chunk, and an odd width.
SHAPES = [(1, 1, 2), (7, 5, 2), (9, 70, 31), (67, 33, 300)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 4.0},
    "both": {"softcap": 2.5, "temperature": 1.6},
}


class Case(NamedTuple):
    hidden: Any
    weight: Any
    bias: Any
    targets: Any


def make(rows, width, vocab, dtype=torch.float32, *, bias=True, ignore=True, spread=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    hidden = normal(rows, width).to(dtype)
    weight = (normal(vocab, width) * spread / math.sqrt(width)).to(dtype)
    b = normal(vocab).to(dtype) if bias else None
    targets = torch.randint(0, vocab, (rows,), generator=g)
    if ignore and rows > 1:
        targets[rows // 2 :: 4] = IGNORE
    return Case(hidden, weight, b, targets)


def spoilt(case, value=math.nan):
    """NaN in the rows that are ignored: nobody may read them."""
    return case._replace(hidden=case.hidden.masked_fill((case.targets == IGNORE)[:, None], value))


def head_of(weight, bias=None, softcap=None):
    return reference.Head(
        weight.detach().double().numpy(),
        None if bias is None else bias.detach().double().numpy(),
        softcap,
    )


def array(x):
    return x if x is None else x.detach().double().numpy()


# ---- the error rule --------------------------------------------------------------------------------


class Both(NamedTuple):
    """What plain torch gives with products summed up from either end."""

    one: Any
    other: Any


def check(name, ours, eager, truth, dtype=None, terms=None):
    """The error rule. A product's rounding is a library's, and in a handful of numbers luck: element by
    element the worse of two orders in which it may add is what ours is measured by."""
    if isinstance(eager, Both):
        one, other, t = (as_float64(x) for x in (*eager, truth))
        with np.errstate(invalid="ignore"):
            eager = np.where(np.abs(other - t) > np.abs(one - t), other, one)
    if terms is not None:
        terms = np.full(np.shape(truth), terms)
    check_one(name, ours, eager, truth, dtype, terms)


def in_both_orders(call):
    """[of results] Both, leaf by leaf; None where there is none."""
    global _from_the_end
    results = []
    try:
        for _from_the_end in (False, True):
            results.append(call())
    finally:
        _from_the_end = False
    return _paired(*results)


def _paired(a, b):
    if isinstance(a, (list, tuple)):
        return [_paired(x, y) for x, y in zip(a, b, strict=True)]
    return None if a is None else Both(a, b)


# ---- the formulas, in the type of their input ------------------------------------------------------


_from_the_end = False


def plain_logits(hidden, weight, bias=None, softcap=None):
    if _from_the_end:
        hidden, weight = hidden.flip(-1), weight.flip(-1)
    z = F.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain_stats(hidden, weight, targets, *, bias=None, softcap=None, temperature=1.0):
    return eager_stats(plain_logits(hidden, weight, bias, softcap), targets, temperature)


def plain_cross_entropy(
    hidden, weight, targets, *, bias=None, softcap=None, temperature=1.0, **options
):
    return F.cross_entropy(
        plain_logits(hidden, weight, bias, softcap) / temperature, targets, **options
    )


def ours_stats(*args, **options):
    return ff.linear_token_logprobs(*args, stats=True, **options)


def run(function, case, upstream, wanted=(True, True, True), device="cpu", **options):
    """(outputs, gradients of hidden, weight and bias; None where not wanted), back on the CPU."""
    leaves = [
        None if x is None else x.detach().to(device, copy=True).requires_grad_(w)
        for x, w in zip(case[:3], wanted, strict=True)
    ]
    out = function(leaves[0], leaves[1], case.targets.to(device), bias=leaves[2], **options)
    outputs = out if isinstance(out, tuple) else (out,)
    sum(
        (o * u.to(o)).sum() for o, u in zip(outputs, upstream, strict=True) if u is not None
    ).backward()
    gradients = [None if x is None or x.grad is None else x.grad.cpu() for x in leaves]
    return [o.detach().cpu() for o in outputs], gradients


def run_plain(*args, **options):
    return in_both_orders(lambda: run(*args, **options))


def truth_stats(case, softcap=None, temperature=1.0):
    return reference.token_logprobs(
        array(case.hidden), head_of(*case[1:3], softcap), case.targets.numpy(), temperature
    )


def truth_stats_gradients(case, upstream, softcap=None, temperature=1.0):
    zero = np.zeros(len(case.targets))
    g, h, l = (zero if u is None else array(u) for u in upstream)
    return reference.token_logprobs_gradients(
        array(case.hidden), head_of(*case[1:3], softcap), case.targets.numpy(), g, h, l, temperature
    )


def truth_cross_entropy(case, softcap=None, upstream=1.0, **options):
    return reference.cross_entropy(
        array(case.hidden), head_of(*case[1:3], softcap), case.targets.numpy(),
        upstream=array(upstream) if isinstance(upstream, torch.Tensor) else upstream, **options,
    )  # fmt: skip


def check_gradients(name, ours, eager, truth, cancels=False):
    """cancels: where sums may come to nothing, the scale is that of their absolute terms."""
    for i, (of, a, e, t) in enumerate(zip(NAMES, ours, eager, truth, strict=True)):
        if a is None:
            continue
        terms = truth.terms[i] if cancels else None
        check(f"{name}: d {of}", a, t if e is None else e, t, terms=terms)


def compare_stats(
    case, upstream=None, only=True, device="cpu", logits=None, cancels=False, **options
):
    """Values and gradients by the error rule; each output also by itself, so that no term hides another.

    logits: their type, where its tolerance counts.
    """
    g = torch.Generator().manual_seed(1)
    n = len(case.targets)
    upstream = upstream or [torch.randn(n, generator=g) for _ in range(3)]
    truth = truth_stats(case, **options)
    terms = None
    if cancels:  # differences of numbers as large as lse
        terms = 2 * np.abs(truth[2]).max(initial=0.0) + np.abs(truth[0]).max(initial=0.0)
    for ups in [upstream, *([u if i == j else None for j, u in enumerate(upstream)]
                            for i in range(3 if only else 0))]:  # fmt: skip
        ours, gradients = run(ours_stats, spoilt(case), ups, device=device, **options)
        eager, eager_gradients = run_plain(plain_stats, case, ups, **options)
        for name, a, e, t in zip(("lp", "entropy", "lse"), ours, eager, truth, strict=True):
            check(name, a, e, t, logits, terms)
        by = truth_stats_gradients(case, ups, **options)
        check_gradients("stats", gradients, eager_gradients, by, cancels)
        ignored = case.targets == IGNORE
        assert all((x[ignored] == 0).all() for x in (*ours, gradients[0]))


def compare_cross_entropy(case, factor=1.0, device="cpu", cancels=False, **options):
    none = options.get("reduction") == "none"
    g = torch.Generator().manual_seed(2)
    upstream = torch.randn(len(case.targets), generator=g) if none else torch.tensor(factor)
    (loss,), gradients = run(
        ff.linear_cross_entropy, spoilt(case), [upstream], device=device, **options
    )
    (eager,), eager_gradients = run_plain(plain_cross_entropy, case, [upstream], **options)
    truth, truth_gradients = truth_cross_entropy(case, upstream=upstream, **options)
    check("loss", loss, eager, truth)
    check_gradients("cross-entropy", gradients, eager_gradients, truth_gradients, cancels)
    ignored = case.targets == IGNORE
    assert (gradients[0][ignored] == 0).all()
    if none:
        assert (loss[ignored] == 0).all()


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small are slower on several; test_threads sets its own numbers."""
    torch.set_num_threads(1)


@pytest.fixture
def chunk(monkeypatch):
    """chunk(n): n rows of logits exist at a time; chunk.sizes is what was asked for."""

    def use(size):
        def rows(count, *_):
            use.counts.append(count)
            return max(min(size, count), 1)

        monkeypatch.setattr(_linear_logprobs, "chunk_rows", rows)

    use.counts = []
    return use


@pytest.fixture(params=["own", "bfloat16 as it is"])
def products(request, monkeypatch):
    """What a CPU without bfloat16 products does with them, and what one that has them does."""
    if request.param != "own":
        monkeypatch.setattr(_matmul, "_has_bfloat16_product", lambda: True)


# ---- token log-probabilities -------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats_and_gradients(chunk, shape, dtype, options):
    chunk(50)
    compare_stats(make(*shape, dtype), **OPTIONS[options])
    assert chunk.counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level(isa, dtype):
    case = make(9, 33, 257, dtype)
    compare_stats(case, softcap=3.0, temperature=0.8, only=False)
    compare_cross_entropy(case, softcap=3.0, temperature=0.8, label_smoothing=0.1)
    compare_cross_entropy(case, reduction="none")


def test_bfloat16_products(products, chunk):
    chunk(7)
    case = make(30, 33, 257, torch.bfloat16)
    for options in OPTIONS.values():
        compare_stats(case, only=False, **options)
        compare_cross_entropy(case, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stats", [False, True])
def test_without_a_gradient(bias, stats):
    """The same bits as with one: no_grad, nothing that requires a gradient."""
    case = spoilt(make(20, 12, 40, bias=bias))
    args = (case.hidden, case.weight, case.targets)
    options = {"bias": case.bias, "stats": stats, "temperature": 1.2}
    want = ff.linear_token_logprobs(*args, **options)
    with torch.no_grad():
        off = ff.linear_token_logprobs(args[0].clone().requires_grad_(), *args[1:], **options)
    on = ff.linear_token_logprobs(args[0].clone().requires_grad_(), *args[1:], **options)
    for a, b, c in zip(*(x if stats else (x,) for x in (want, off, on)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert a.shape == case.targets.shape
        assert c.requires_grad
        assert not b.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_of_outputs(dtype):
    case = make(5, 6, 9, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    outputs, gradients = run(ours_stats, case, [torch.ones(5)] * 3)
    assert {x.dtype for x in outputs} == {wide}
    assert {x.dtype for x in gradients} == {dtype}
    (loss,), gradients = run(ff.linear_cross_entropy, case, [torch.ones(())])
    assert loss.dtype is wide
    assert loss.shape == ()
    assert {x.dtype for x in gradients} == {dtype}


# ---- cross-entropy -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(chunk, shape, dtype, options):
    chunk(50)
    case = make(*shape, dtype)
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1):
            compare_cross_entropy(
                case, reduction=reduction, label_smoothing=smoothing, **OPTIONS[options]
            )
    assert chunk.counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalar_over_seeds(dtype):
    errors = ScalarErrors("linear_cross_entropy", dtype)
    for seed in range(40):
        case = make(17, 24, 101, dtype, seed=seed)
        args = (case.hidden, case.weight, case.targets)
        truth, _ = truth_cross_entropy(case)
        errors.add(
            ff.linear_cross_entropy(*args, bias=case.bias),
            plain_cross_entropy(*args, bias=case.bias), truth.item(), truth.item(),
        )  # fmt: skip
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5, 64.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream(reduction, factor, dtype):
    case = make(11, 8, 30, dtype)
    compare_cross_entropy(case, factor, reduction=reduction)
    if factor == 0.0:
        _, gradients = run(ff.linear_cross_entropy, case, [torch.tensor(0.0)], reduction=reduction)
        assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("function", [ff.linear_token_logprobs, ff.linear_cross_entropy])
def test_zero_upstream_of_rows(function):
    """A token masked out afterwards passes exactly 0, whatever its logits."""
    case = make(6, 5, 9, ignore=False)
    options = {} if function is ff.linear_token_logprobs else {"reduction": "none"}
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5, 0.0])
    _, gradients = run(function, case, [upstream], **options)
    assert (gradients[0][upstream == 0] == 0).all()
    kept = Case(case.hidden[::2], case.weight, case.bias, case.targets[::2])
    _, want = run(function, kept, [upstream[::2]], **options)
    truth = truth_stats_gradients(kept, [upstream[::2], None, None])
    if options:
        truth = [-x for x in truth]
    check("d hidden", gradients[0][::2], want[0], truth[0])
    check("d weight", gradients[1], want[1], truth[1])
    check("d bias", gradients[2], want[2], truth[2])


@pytest.mark.parametrize("smoothing", [0.3, 1.0])
def test_label_smoothing(smoothing):
    for reduction in ("mean", "none"):
        compare_cross_entropy(
            make(9, 12, 40), reduction=reduction, label_smoothing=smoothing, temperature=0.5
        )
    case = make(9, 12, 40)
    args = (case.hidden, case.weight, case.targets)
    for options in (
        {"label_smoothing": smoothing},
        {"temperature": smoothing},
        {"softcap": smoothing},
    ):
        (name,) = options
        tensor = {name: torch.tensor(smoothing, dtype=torch.float64)}
        assert torch.equal(
            ff.linear_cross_entropy(*args, **options), ff.linear_cross_entropy(*args, **tensor)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loss_scaling(dtype):
    """A loss scaler's factor reaches gradients before they are rounded to 16 bits: a mean over many rows of
    small numbers, which float16 would store as 0."""
    case = make(130, 20, 300, dtype, ignore=False, spread=0.01)
    case = case._replace(hidden=case.hidden * 1e-3)
    _, gradients = run(ff.linear_cross_entropy, case, [torch.tensor(16384.0)])
    _, eager = run_plain(plain_cross_entropy, case, [torch.tensor(16384.0)])
    _, truth = truth_cross_entropy(case, upstream=16384.0)
    check_gradients("scaled", gradients, eager, truth)
    lost = (gradients[2] == 0) & (torch.from_numpy(truth.bias) != 0)
    assert not lost.any()


# ---- rows that do not count ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_ignored_rows_are_not_read(chunk, fill, dtype):
    """Bit for bit as if they were not there; exactly 0 come out and go back."""
    chunk(4)
    case = make(23, 9, 40, dtype)
    keep = case.targets != IGNORE
    assert not keep.all()
    left_out = Case(case.hidden[keep], *case[1:3], case.targets[keep])
    wild = spoilt(case, fill)
    upstream = torch.randn(23)
    for function, options, ups in (
        (ours_stats, {}, [upstream] * 3),
        (ff.linear_token_logprobs, {"softcap": 3.0}, [upstream]),
        (ff.linear_cross_entropy, {"label_smoothing": 0.1}, [torch.tensor(1.0)]),
        (ff.linear_cross_entropy, {"reduction": "sum"}, [torch.tensor(-0.5)]),
        (ff.linear_cross_entropy, {"reduction": "none"}, [upstream]),
    ):
        outputs, gradients = run(function, wild, ups, **options)
        ups = [u[keep] if u.ndim else u for u in ups]
        want, want_gradients = run(function, left_out, ups, **options)
        for a, b in zip(outputs, want, strict=True):
            assert torch.equal(a[keep] if a.ndim else a, b)
            assert a.ndim == 0 or (a[~keep] == 0).all()
        assert torch.equal(gradients[0][keep], want_gradients[0])
        assert (gradients[0][~keep] == 0).all()
        assert torch.equal(gradients[1], want_gradients[1])
        assert torch.equal(gradients[2], want_gradients[2])


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_no_row_counts(rows):
    """No rows at all, one, or all of them ignored: 0 with zero gradients."""
    case = make(rows, 4, 7)._replace(targets=torch.full((rows,), IGNORE))
    case = case._replace(hidden=torch.full_like(case.hidden, math.nan))
    upstream = torch.ones(rows)
    for function, options, ups in (
        (ours_stats, {}, [upstream] * 3),
        (ff.linear_token_logprobs, {}, [upstream]),
        *(
            (ff.linear_cross_entropy, {"reduction": r, "label_smoothing": 0.1, "softcap": 3.0}, [u])
            for r, u in (("mean", torch.ones(())), ("sum", torch.ones(())), ("none", upstream))
        ),
    ):
        outputs, gradients = run(function, case, ups, **options)
        assert all((x == 0).all() for x in (*outputs, *gradients))
        assert [x.shape for x in gradients] == [(rows, 4), (7, 4), (7,)]
        outputs = function(*case[:2], case.targets, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all((x == 0).all() for x in outputs)


def test_another_ignore_index():
    """3 is a target elsewhere; -100 is none here."""
    case = make(12, 6, 9, ignore=False)
    case.targets[[2, 7]] = 3
    ignored = case.targets == 3
    args = (case.hidden, case.weight, case.targets)
    lp = ff.linear_token_logprobs(*args, ignore_index=3)
    as_usual = ff.linear_token_logprobs(*args[:2], case.targets.masked_fill(ignored, IGNORE))
    assert torch.equal(lp, as_usual)
    assert (lp[ignored] == 0).all()
    loss = ff.linear_cross_entropy(*args, ignore_index=3)
    assert torch.equal(
        loss, ff.linear_cross_entropy(*args[:2], case.targets.masked_fill(ignored, IGNORE))
    )
    with pytest.raises(ValueError, match="targets: element 4 is -100"):
        ff.linear_token_logprobs(
            *args[:2], case.targets.index_fill(0, torch.tensor(4), IGNORE), ignore_index=3
        )


def test_nan_and_infinity_in_a_row_that_counts():
    """They show in that row and in the sums over rows, not in other rows."""
    for bad in (math.nan, math.inf):
        case = make(5, 6, 40, ignore=False)
        case.hidden[1, 2] = bad
        for function, options, ups in (
            (ours_stats, {}, [torch.ones(5)] * 3),
            (ff.linear_cross_entropy, {"reduction": "none"}, [torch.ones(5)]),
        ):
            outputs, gradients = run(function, case, ups, **options)
            others = torch.tensor([0, 2, 3, 4])
            assert all(torch.isnan(x[1]) for x in outputs[:2])
            assert all(torch.isfinite(x[others]).all() for x in outputs)
            assert torch.isnan(gradients[0][1]).all()
            assert torch.isfinite(gradients[0][others]).all()
            assert torch.isnan(gradients[1]).all()
            assert torch.isnan(gradients[2]).all()


# ---- layouts and types of the arguments ------------------------------------------------------------


def layouts(dtype):
    """hidden (…, H), targets (…), weight: strides that are not those of fresh memory."""
    g = torch.Generator().manual_seed(3)
    cube = torch.randn(4, 6, 10, generator=g).to(dtype)
    weight = torch.randn(17, 10, generator=g).to(dtype)
    large = torch.randn(40, 25, generator=g).to(dtype)
    y = torch.randint(0, 17, (4, 6), generator=g)
    y[1, 2] = y[3, 0] = IGNORE
    yield "shifted", cube[:, :-1], weight, y[:, 1:]
    yield "every other row", cube[::2, ::3], weight, y[::2, ::3]
    yield "transposed rows", cube.transpose(0, 1), weight, y.t()
    yield "transposed columns", cube[0].t().contiguous().t(), weight, y[0]
    yield "columns strided", large[:24, :20:2].view(4, 6, 10), weight, y
    yield "expanded", cube[:1].expand(4, 6, 10), weight, y
    yield "one row", cube[0, 0], weight, y[0, 0]
    yield "int32", cube, weight, y.int()
    yield "int16", cube, weight, y.short()
    yield "a slice of a weight", cube, large[3:20, 5:15], y
    yield "a transposed weight", cube, large[5:15, 3:20].t(), y
    yield "rows of a weight", cube, large[:34:2, :10], y
    yield "columns of a weight", cube, large[:17, :20:2], y
    yield "an expanded weight", cube, weight[:, :1].expand(17, 10), y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(chunk, dtype):
    chunk(5)
    for name, hidden, weight, targets in layouts(dtype):
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        lp = ff.linear_token_logprobs(x, w, targets)
        assert lp.shape == targets.shape, name
        up = torch.linspace(-1, 1, max(targets.numel(), 2))[: targets.numel()].view(targets.shape)
        (lp * up).sum().backward()
        case = Case(
            hidden.reshape(-1, 10).contiguous(),
            weight.contiguous(),
            None,
            targets.reshape(-1).long(),
        )
        ups = [up.reshape(-1), None, None]
        eager, eager_gradients = run_plain(plain_stats, case, ups)
        check(name, lp.reshape(-1), eager[0], truth_stats(case)[0])
        found = [x.grad.reshape(-1, 10), w.grad, None]
        check_gradients(name, found, eager_gradients, truth_stats_gradients(case, ups))
        x.grad = w.grad = None
        ff.linear_cross_entropy(x, w, targets).backward()
        _, eager_gradients = run_plain(plain_cross_entropy, case, [torch.tensor(1.0)])
        _, gradients = truth_cross_entropy(case)
        found = [x.grad.reshape(-1, 10), w.grad, None]
        if targets.numel() > 1 or targets.item() != IGNORE:
            check_gradients(name, found, eager_gradients, gradients)


def test_shapes_of_outputs():
    weight = torch.randn(7, 4)
    for shape in ((), (3,), (2, 3), (2, 0), (2, 1, 3)):
        hidden, targets = torch.randn(*shape, 4), torch.zeros(shape, dtype=torch.long)
        assert all(x.shape == shape for x in ours_stats(hidden, weight, targets))
        loss = ff.linear_cross_entropy(hidden, weight, targets, reduction="none")
        assert loss.shape == shape
        assert ff.linear_cross_entropy(hidden, weight, targets).shape == ()


# ---- what has no gradient ----------------------------------------------------------------------


class Counts:
    """How often the driver takes a product for each gradient."""

    def __init__(self, monkeypatch):
        self.hidden = self.weight = 0
        add_outer, hidden_gradient = _linear_loss.add_outer, _linear_loss.Head.hidden_gradient

        def outer(*args):
            self.weight += 1
            return add_outer(*args)

        def by_hidden(*args):
            self.hidden += 1
            return hidden_gradient(*args)

        monkeypatch.setattr(_linear_loss, "add_outer", outer)
        monkeypatch.setattr(_linear_loss.Head, "hidden_gradient", by_hidden)


FUNCTIONS: list[tuple[Any, dict[str, Any]]] = [
    (ours_stats, {}),
    (ff.linear_token_logprobs, {"softcap": 3.0}),
    (ff.linear_cross_entropy, {"label_smoothing": 0.1}),
    (ff.linear_cross_entropy, {"reduction": "none", "softcap": 3.0}),
]


def upstream_of(function, options, rows):
    g = torch.Generator().manual_seed(4)
    if function is ff.linear_cross_entropy and "reduction" not in options:
        return [torch.tensor(1.0)]
    return [torch.randn(rows, generator=g) for _ in range(3 if function is ours_stats else 1)]


@pytest.mark.parametrize("which", range(len(FUNCTIONS)))
@pytest.mark.parametrize(
    "wanted",
    [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True) if a or b or c],
    ids=str,
)
def test_frozen(monkeypatch, chunk, wanted, which):
    """What requires no gradient costs no product and gets none; the others are the same bits."""
    function, options = FUNCTIONS[which]
    chunk(5)
    case = spoilt(make(20, 6, 11))
    ups = upstream_of(function, options, 20)
    want_outputs, want = run(function, case, ups, **options)
    counts = Counts(monkeypatch)
    outputs, gradients = run(function, case, ups, wanted, **options)
    assert (counts.hidden, counts.weight) == (4 * wanted[0], 4 * wanted[1])  # 17 rows count
    for a, b in zip(outputs, want_outputs, strict=True):
        assert torch.equal(a, b)
    for a, b, w in zip(gradients, want, wanted, strict=True):
        assert (a is not None) == w
        assert a is None or torch.equal(a, b)


def test_tied_weight():
    """The Parameter of an embedding and of the head: both parts of its gradient add up."""
    case = make(15, 8, 20, bias=False)
    tokens = torch.arange(15) % 20
    for function, options in FUNCTIONS:
        ups = upstream_of(function, options, 15)
        results = []
        for f in (
            function,
            plain_stats if function is not ff.linear_cross_entropy else plain_cross_entropy,
        ):
            weight = torch.nn.Parameter(case.weight.clone())
            hidden = torch.tanh(F.embedding(tokens, weight))
            out = f(hidden, weight, case.targets, **options)
            out = out if isinstance(out, tuple) else (out,)
            sum((o * u).sum() for o, u in zip(out, ups, strict=False)).backward()
            results.append(weight.grad)
        hidden = torch.tanh(F.embedding(tokens, case.weight.double()))
        exact = Case(hidden, case.weight, None, case.targets)
        if function is ff.linear_cross_entropy:
            by = truth_cross_entropy(exact, upstream=ups[0] if ups[0].ndim else 1.0, **options)[1]
        else:
            by = truth_stats_gradients(exact, [*ups, None, None][:3], **options)
        truth = by.weight.copy()
        inner = by.hidden * (1 - hidden.numpy() ** 2)
        np.add.at(truth, tokens.numpy(), inner)
        check("d weight", *results, truth)


# ---- packed weights --------------------------------------------------------------------------------


# Panels of the weight begin where rows, bytes and blocks do. 64 columns: whole blocks to a row, 256 rows to a
# block of blocks. 70: blocks lie across rows, and with 16 to a block of blocks 512 rows pass before all end
# together; without double quantisation 32. 37·5: nothing ends before the last row, and its block is short.
PACKED = [(300, 64, 256), (300, 70, 16), (37, 5, 256)]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", PACKED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weight(monkeypatch, chunk, dtype, shape, double_quant):
    """As the dense weight that it stands for; the gradients of hidden and bias, none of the weight."""
    monkeypatch.setattr(codebook, "PANEL_BYTES", 4096)
    chunk(9)
    vocab, width, nested = shape
    case = make(21, width, vocab, dtype)
    packed = ff.quantize(
        case.weight.float(), "nf4", 64, double_quant=double_quant, nested_blocksize=nested
    )
    dense = ff.dequantize(packed, torch.float32)
    exact, rounded = case._replace(weight=dense), case._replace(weight=dense.to(dtype))
    panels = []
    decode = codebook._decode
    monkeypatch.setattr(
        codebook, "_decode", lambda v, out: (panels.append(len(out)), decode(v, out))[1]
    )
    for function, options in FUNCTIONS:
        ups = upstream_of(function, options, 21)
        wild = spoilt(case)
        x, b = wild.hidden.requires_grad_(), case.bias.clone().requires_grad_()
        out = function(x, packed, case.targets, bias=b, **options)
        out = out if isinstance(out, tuple) else (out,)
        sum((o * u.to(o.dtype)).sum() for o, u in zip(out, ups, strict=True)).backward()
        plain = plain_cross_entropy if function is ff.linear_cross_entropy else plain_stats
        padded = [*ups, None, None][:3] if plain is plain_stats else ups
        eager, eager_gradients = run_plain(plain, rounded, padded, **options)
        if plain is plain_stats:
            truth = truth_stats(exact, **options)
            gradients = truth_stats_gradients(exact, padded, **options)
        else:
            up = ups[0] if ups[0].ndim else 1.0
            loss, gradients = truth_cross_entropy(exact, upstream=up, **options)
            truth = (loss,)
        for a, e, t in zip(out, eager, truth, strict=False):
            check("packed", a, e, t)
        check("d hidden", x.grad, eager_gradients[0], gradients.hidden)
        check("d bias", b.grad, eager_gradients[2], gradients.bias)
    ends_inside = vocab == 300 and (width == 64 or not double_quant)
    assert (min(panels) < vocab) == ends_inside


# ---- chunks, batches, threads ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 7, 29])
def test_size_of_chunks(chunk, size, dtype):
    """No number of rows at a time leaves the error rule; outputs of a row do not depend on it in float64's
    digits either, which catches a row that is taken twice or not at all."""
    chunk(size)
    for case in (make(29, 12, 37, dtype), make(29, 12, 37, dtype, ignore=False)):
        compare_stats(case, softcap=3.0, temperature=1.2, only=False)
        compare_cross_entropy(case, label_smoothing=0.2, softcap=3.0)
        compare_cross_entropy(case, reduction="none", temperature=1.3)
    assert set(chunk.counts) == {29, 25}


def test_rows_of_a_chunk():
    """A fifth of the rows, 64 to 256, at least 16 MB; on a GPU 512 MB; a softcap takes twice as much."""
    rows = _linear_loss.chunk_rows
    f32, bf16 = torch.float32, torch.bfloat16
    wide = 16 << 20  # of which one row is more than 16 MB
    assert rows(0, 100, f32, True) == 1
    assert rows(1, wide, f32, True) == 1
    assert rows(50, wide, f32, True) == 50
    assert rows(400, wide, f32, True) == 80
    assert rows(100_000, wide, f32, True) in range(250, 257)
    assert rows(5, 100, f32, True) == 5
    assert rows(8192, 1024, f32, True) == 4096  # 16 MB of 4096 bytes
    assert rows(8192, 2 * 1024, f32, True) == 2048
    assert rows(8192, 1024, bf16, True) == 8192
    assert rows(10_000, 131_072, f32, False) == 1024
    assert rows(10_000, 2 * 131_072, f32, False) == 512
    assert rows(10_000, 131_072, bf16, False) == 2048
    assert rows(3, 131_072, f32, False) == 3
    assert rows(10, 1 << 30, f32, False) == 1
    for count in (65, 321, 1000, 1281):
        size = rows(count, wide, f32, True)
        assert -(-count // size) * size - count < -(-count // size)  # of equal size


def test_chunks_cover_each_row_once():
    for count in (0, 1, 5, 6, 7):
        parts = _linear_loss.chunks(None, count, 3)
        seen = torch.cat([torch.arange(count)[p] for p in parts]) if parts else torch.arange(0)
        assert seen.tolist() == list(range(count))
        some = torch.arange(count) * 2
        parts = _linear_loss.chunks(some, count, 3)
        seen = torch.cat(parts) if parts else some
        assert torch.equal(seen, some)


def test_halves_of_a_batch():
    """Rows by themselves and together: the same numbers, by the error rule."""
    case = make(40, 15, 33)
    ups = [torch.randn(40) for _ in range(3)]
    halves = []
    for part in (slice(0, 20), slice(20, 40)):
        piece = spoilt(Case(case.hidden[part], *case[1:3], case.targets[part]))
        halves.append(run(ours_stats, piece, [u[part] for u in ups]))
    outputs = [torch.cat(x) for x in zip(*(h[0] for h in halves), strict=True)]
    by_hidden = torch.cat([h[1][0] for h in halves])
    by_weight, by_bias = (halves[0][1][i] + halves[1][1][i] for i in (1, 2))
    eager, eager_gradients = run_plain(plain_stats, case, ups)
    for a, e, t in zip(outputs, eager, truth_stats(case), strict=True):
        check("halves", a, e, t)
    check_gradients(
        "halves", (by_hidden, by_weight, by_bias), eager_gradients, truth_stats_gradients(case, ups)
    )


def on_one_thread(function):
    def call(*args):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(threads)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(monkeypatch, dtype):
    """The error rule on any number; and the same bits where products, a library's, are taken on one."""
    case = make(70, 20, 300, dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        compare_stats(case, only=False)
        compare_cross_entropy(case, label_smoothing=0.1)
    for name in ("linear", "add_outer"):
        monkeypatch.setattr(_linear_loss, name, on_one_thread(getattr(_linear_loss, name)))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found = []
        for function, options in FUNCTIONS:
            ups = upstream_of(function, options, 70)
            outputs, gradients = run(function, spoilt(case), ups, **options)
            found += outputs + gradients
        results.append(found)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- autograd, compile, torch's own checks -------------------------------------------------------


@pytest.mark.parametrize("size", [2, 100])
def test_gradcheck(chunk, size):
    chunk(size)
    case = make(6, 4, 5, torch.float64)
    leaves = [x.clone().requires_grad_() for x in case[:3]]

    def checks(function, **options):
        assert torch.autograd.gradcheck(
            lambda x, w, b: function(x, w, case.targets, bias=b, **options), leaves
        )

    for options in OPTIONS.values():
        checks(ours_stats, **options)
        for reduction in ("mean", "sum", "none"):
            checks(ff.linear_cross_entropy, reduction=reduction, label_smoothing=0.2, **options)
    checks(ff.linear_token_logprobs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retain_graph(dtype):
    """A second backward gives the same bits, and another upstream gradient's where there is one."""
    case = make(9, 7, 30, dtype)
    for function, options in FUNCTIONS:
        ups = upstream_of(function, options, 9)
        leaves = [x.clone().requires_grad_() for x in case[:3]]
        out = function(leaves[0], leaves[1], case.targets, bias=leaves[2], **options)
        out = out if isinstance(out, tuple) else (out,)
        value = sum((o * u.to(o.dtype)).sum() for o, u in zip(out, ups, strict=True))
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        kept = [x.clone() for x in first]
        second = torch.autograd.grad(value, leaves, retain_graph=True)
        for a, b, c in zip(first, kept, second, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(b, c)
        two = torch.tensor(2.0, dtype=value.dtype)
        for a, b in zip(kept, torch.autograd.grad(value, leaves, two), strict=True):
            check("twice as much", b, 2 * a, 2 * a)


def test_gradients_are_not_shared():
    """What one backward returned, the next does not write into."""
    case = make(9, 7, 30)
    leaves = [x.clone().requires_grad_() for x in case[:3]]
    loss = ff.linear_cross_entropy(leaves[0], leaves[1], case.targets, bias=leaves[2])
    loss.backward(torch.tensor(3.0), retain_graph=True)
    kept = [x.grad.clone() for x in leaves]
    loss.backward(torch.tensor(3.0))
    for x, once in zip(leaves, kept, strict=True):
        check("twice", x.grad, 2 * once, 2 * once)


def test_double_backward_raises():
    case = make(4, 3, 6, bias=False)
    for function, options in FUNCTIONS:
        x, w = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        out = function(x, w, case.targets, **options)
        value = sum(o.sum() for o in (out if isinstance(out, tuple) else (out,)))
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.square().sum().backward()
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.functional.hessian(
                lambda x, f=function, o=options, w=w: (
                    f(x, w, case.targets, reduction="sum")
                    if f is ff.linear_cross_entropy
                    else sum(v.sum() for v in _tuple(f(x, w, case.targets, **o)))
                ),
                case.hidden,
            )


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


def test_forward_mode_raises():
    case = make(3, 4, 8)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        x = forward_ad.make_dual(case.hidden, torch.ones_like(case.hidden))
        for function, options in FUNCTIONS:
            with pytest.raises(RuntimeError, match="forward-mode"):
                function(x, case.weight, case.targets, **options)


def raw_calls(grad=False):
    case = make(6, 4, 9)
    packed = ff.quantize(torch.randn(9, 4), blocksize=16, double_quant=True, nested_blocksize=16)
    none = (None, None, None, None, None, None, 0, 0)
    x = case.hidden.requires_grad_(grad)
    dense, bare, coded = (
        (case.weight, case.bias, *none, 9),
        (case.weight, None, *none, 9),
        (None, case.bias, *codebook.fields(packed), 9),
    )
    y, n = case.targets, 6
    g, every = torch.ones(n), (True, True, True)

    def t(v):
        return torch.tensor(v, dtype=torch.float64)

    forward, backward = RAW.linear_token_logprobs_forward, RAW.linear_token_logprobs_backward
    yield forward.default, (x, *dense, math.inf, y, 0.9, IGNORE, True)
    yield forward.default, (x, *coded, 3.0, y, 1.0, IGNORE, False)
    yield forward.tensor, (x, *bare, t(2.0), y, t(0.9), IGNORE, False)
    yield backward.default, (g, g, g, x, *dense, math.inf, y, 0.9, IGNORE, *every)
    yield backward.default, (
        g, None, None, x, *coded, 2.0, y, 0.9, IGNORE, True, False, False,
    )  # fmt: skip
    yield backward.tensor, (
        g, None, g, x, *dense, t(2.0), y, t(0.9), IGNORE, False, True, True,
    )  # fmt: skip
    ce = RAW.linear_cross_entropy_forward
    yield ce.default, (x, *dense, math.inf, y, 0.9, 0.1, IGNORE, 0)
    yield ce.default, (x, *coded, math.inf, y, 1.0, 0.0, IGNORE, 2)
    yield ce.tensor, (x, *bare, t(2.0), y, t(0.9), t(0.1), IGNORE, 1)
    both = RAW.linear_cross_entropy_forward_backward
    yield both.default, (x, *dense, math.inf, y, 0.9, 0.1, IGNORE, 2, *every)
    yield both.tensor, (x, *bare, t(2.0), y, t(0.9), t(0.1), IGNORE, 1, True, False, False)
    back = RAW.linear_cross_entropy_backward
    yield back.default, (g, x, *dense, 2.0, y, 0.9, 0.1, IGNORE, 0, *every)
    yield back.tensor, (t(2.0), x, *dense, t(math.inf), y, t(0.9), t(0.1), IGNORE, 2, *every)


@pytest.mark.parametrize("case", range(len(list(raw_calls()))))
def test_opcheck_raw(case):
    op, args = list(raw_calls())[case]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    "name", ["linear_token_logprobs", "linear_token_logprobs_stats", "linear_cross_entropy"]
)
def test_opcheck_public(name):
    """torch.ops.finefuse.<name> differentiates, and is the public function."""
    case = make(4, 5, 9)
    op = getattr(RAW, name).default
    leaves = [x.clone().requires_grad_() for x in case[:3]]
    options = {"bias": leaves[2], "softcap": 4.0, "temperature": 0.8}
    torch.library.opcheck(op, (*leaves[:2], case.targets), options)
    public = ours_stats if name.endswith("stats") else getattr(ff, name)
    want = public(*leaves[:2], case.targets, **options)
    got = op(*leaves[:2], case.targets, **options)
    for a, b in zip(_tuple(got), _tuple(want), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad


def test_backward_through_a_raw_op_raises():
    seen = 0
    for op, args in raw_calls(grad=True):
        out = op(*args)
        value = sum(o.sum() for o in (out if isinstance(out, (tuple, list)) else [out]))
        seen += 1
        with pytest.raises(RuntimeError, match="is a raw op"):
            value.backward()
    assert seen == len(list(raw_calls()))


@pytest.mark.parametrize("which", range(len(FUNCTIONS)))
def test_compile(which, counter):
    """Numbers that change are no constants of the graph: two graphs serve them all."""
    function, options = FUNCTIONS[which]
    smoothing = "label_smoothing" in options

    def step(x, w, b, targets, t, c):
        kwargs = {**options, "temperature": t, "softcap": c}
        if smoothing:
            kwargs["label_smoothing"] = t / 10
        out = function(x, w, targets, bias=b, **kwargs)
        return sum((o * o).sum() for o in _tuple(out))

    counted = torch.compile(step, backend=counter, fullgraph=True)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    case = spoilt(make(9, 6, 20))
    for i in range(8):
        t, c = 0.5 + 0.13 * i, 2.0 + 0.4 * i
        a, b = ([x.clone().requires_grad_() for x in case[:3]] for _ in range(2))
        one, two = compiled(*a, case.targets, t, c), step(*b, case.targets, t, c)
        one.backward()
        two.backward()
        check("compiled", one, two, two)
        for name, x, y in zip(NAMES, a, b, strict=True):
            check(f"compiled: d {name}", x.grad, y.grad, y.grad)
        counted(*a, case.targets, t, c)
    assert 1 <= counter.graphs <= 2
    before = counter.graphs
    for i in range(4):  # as 0-d tensors numbers never recompile
        t, c = torch.tensor(0.5 + 0.1 * i), torch.tensor(2.0 + i)
        counted(*a, case.targets, t, c)
    assert counter.graphs <= before + 1


def test_compile_inductor():
    """With the compiler that users get, forward and backward; hidden comes from a layer before."""
    torch._dynamo.reset()
    case = make(9, 6, 20)

    def step(x, w, b, t):
        h = torch.tanh(x)
        loss = ff.linear_cross_entropy(h, w, case.targets, bias=b, temperature=t)
        return loss - ff.linear_token_logprobs(h, w, case.targets, bias=b, softcap=5.0).mean()

    compiled = torch.compile(step, fullgraph=True)
    for t in (0.7, 1.9):
        a, b = ([x.clone().requires_grad_() for x in case[:3]] for _ in range(2))
        one, two = compiled(*a, t), step(*b, t)
        one.backward()
        two.backward()
        check("compiled", one, two, two)
        for name, x, y in zip(NAMES, a, b, strict=True):
            check(f"compiled: d {name}", x.grad, y.grad, y.grad)


def test_compile_with_a_changing_number_of_rows(counter):
    step = torch.compile(
        lambda x, w, y: ff.linear_cross_entropy(x, w, y), backend=counter, fullgraph=True
    )
    for rows in (5, 8, 13, 21):
        case = make(rows, 6, 20)
        want = ff.linear_cross_entropy(case.hidden, case.weight, case.targets)
        check("loss", step(case.hidden, case.weight, case.targets), want, want)
    assert counter.graphs <= 2


def test_autocast():
    """hidden and weight are cast as F.linear casts them, and gradients come back in their own types."""
    case = make(9, 8, 33)
    for function, options in FUNCTIONS:
        plain = plain_cross_entropy if function is ff.linear_cross_entropy else plain_stats
        ups = upstream_of(function, options, 9)
        padded = [*ups, None, None][:3] if plain is plain_stats else ups

        def cast(hidden, weight, targets, *, bias, f=function, **options):
            with torch.autocast("cpu", torch.bfloat16):
                return f(hidden, weight, targets, bias=bias, **options)

        outputs, gradients = run(cast, case, ups, **options)
        low = Case(*(x.bfloat16() for x in case[:3]), case.targets)
        eager, eager_gradients = run_plain(plain, low, padded, **options)
        if plain is plain_stats:
            truth = truth_stats(low, **options)
            by = truth_stats_gradients(low, padded, **options)
        else:
            loss, by = truth_cross_entropy(low, upstream=ups[0] if ups[0].ndim else 1.0, **options)
            truth = (loss,)
        assert {x.dtype for x in (*outputs, *gradients)} == {torch.float32}
        for a, e, t in zip(outputs, eager, truth, strict=False):
            check("under autocast", a, e, t, torch.bfloat16)
        for name, a, e, t in zip(NAMES, gradients, eager_gradients, by, strict=True):
            check(f"under autocast: d {name}", a, e, t, torch.bfloat16)
    x, w = case.hidden.half(), case.weight  # of another type each, as F.linear takes them there
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ff.linear_token_logprobs(x, w, case.targets)
        same = ff.linear_token_logprobs(x.bfloat16(), w.bfloat16(), case.targets)
        wide = ff.linear_token_logprobs(x.double(), w.double(), case.targets)
    assert torch.equal(mixed, same)
    assert wide.dtype is torch.float64


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoint(use_reentrant, dtype):
    """A loss under activation checkpointing, and one of a layer that is: the same bits."""
    case = spoilt(make(14, 7, 30, dtype))
    for function, options in FUNCTIONS:

        def value(x, w, b, f=function, o=options):
            return sum((v * v).sum() for v in _tuple(f(x, w, case.targets, bias=b, **o)))

        grads = []
        for call in (
            lambda *args, v=value: checkpoint(v, *args, use_reentrant=use_reentrant),
            lambda *args, v=value: v(*args),
        ):
            leaves = [x.detach().clone().requires_grad_() for x in case[:3]]
            call(*leaves).backward()
            grads.append([x.grad for x in leaves])
        for name, a, b in zip(NAMES, *grads, strict=True):
            check(f"d {name}", a, b, b)
            assert torch.isfinite(a).all()


def test_saved_tensor_hooks(monkeypatch):
    """Where hooks want less to be kept, the gradient is made in the backward, and nothing of the size of the
    logits or of a gradient is saved."""
    case = make(64, 4, 50)
    for function, options in FUNCTIONS:
        ups = upstream_of(function, options, 64)
        _, want = run(function, case, ups, **options)
        saved = []
        counts = Counts(monkeypatch)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: (s.append(t.shape), t.clone())[1], lambda t: t
        ):
            leaves = [x.clone().requires_grad_() for x in case[:3]]
            out = _tuple(function(leaves[0], leaves[1], case.targets, bias=leaves[2], **options))
            before = counts.weight
            value = sum((o * u).sum() for o, u in zip(out, ups, strict=True))
        value.backward()
        assert before == 0
        assert counts.weight == 1
        assert torch.Size((64, 50)) not in saved
        assert torch.Size((64, 4)) in saved
        for a, b in zip(leaves, want, strict=True):
            check("with hooks", a.grad, b, b)


def test_saved_tensors_are_versioned():
    """A hidden state that is overwritten between forward and backward is an error, not a wrong gradient."""
    case = make(6, 5, 9)
    for function, options in (FUNCTIONS[0], FUNCTIONS[1], FUNCTIONS[3]):
        x = (case.hidden.clone().requires_grad_() * 1.0).clone()
        value = sum(o.sum() for o in _tuple(function(x, case.weight, case.targets, **options)))
        with torch.no_grad():
            x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


# ---- memory ----------------------------------------------------------------------------------------


_PEAK = """
import sys, torch, finefuse as ff
from finefuse import _linear_loss
rows, width, vocab = 512, 96, 10000
torch.manual_seed(0)
_linear_loss._CPU_BYTES = 1 << 20  # not 16 MB: here that would be nearly all of them
targets = torch.randint(0, vocab, (rows,))
def step(function, hidden, weight, softcap):
    if function == "cross-entropy":
        return ff.linear_cross_entropy(hidden, weight, targets, softcap=softcap)
    if function == "log-probabilities":
        return ff.linear_token_logprobs(hidden, weight, targets, softcap=softcap).sum()
    pairs, y = hidden.view(8, 64, width), targets.view(8, 64)
    if function == "policy":
        return ff.linear_policy_loss(pairs, weight, y, advantages=torch.ones(8), softcap=softcap).loss
    if function == "preference":
        return ff.linear_preference_loss(pairs, weight, y, softcap=softcap).loss
    if function == "distill":
        teacher = hidden.detach(), weight.detach()
        return ff.linear_distill_loss(hidden, weight, *teacher, softcap=softcap)
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight), targets)
for case in sys.argv[1:]:
    function, dtype, softcap = case.split("/")
    dtype = getattr(torch, dtype)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        step(function, hidden, weight, float(softcap) or None).backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    print(peak)
"""


def test_peak_memory():
    """The gradients and one chunk of logits (two with a softcap), by torch's own account; with a 16-bit
    weight also the float32 sum of its gradient and the panel in which it is widened."""
    rows, width, vocab = 512, 96, 10000
    cases = [
        (function, dtype, softcap)
        for function in ("cross-entropy", "log-probabilities")
        for dtype, softcap in (("float32", 0.0), ("float32", 5.0), ("bfloat16", 0.0))
    ] + [(function, "float32", 0.0) for function in ("policy", "preference", "distill")]
    names = ["full/float32/0.0", *("/".join(map(str, case)) for case in cases)]
    out = subprocess.run([sys.executable, "-c", _PEAK, *names], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    full, *found = map(int, out.stdout.split())
    assert (
        full > 2 * rows * vocab * 4
    )  # what is measured is there: logits and their gradient, 40 MB
    for (function, dtype, softcap), peak in zip(cases, found, strict=True):
        size = 4 if dtype == "float32" else 2
        row = vocab * (2 if softcap != 0.0 or function == "distill" else 1)
        chunk = (128 if function == "preference" else _chunk_of(rows, row)) * row * 4  # a pair
        gradients = (rows + vocab) * width * size
        beside = 0 if dtype == "float32" else vocab * width * 4 + min(4 << 20, vocab * width * 4)
        if _matmul._onednn_is_faster():  # whose products are not added to what is there
            beside += vocab * width * 4
        case = function, dtype, softcap
        assert gradients <= peak <= 1.3 * (gradients + chunk + beside), case
        assert peak < 0.5 * full, case


def _chunk_of(rows, numbers):
    before, _linear_loss._CPU_BYTES = _linear_loss._CPU_BYTES, 1 << 20
    try:
        return _linear_loss.chunk_rows(rows, numbers, torch.float32, True)
    finally:
        _linear_loss._CPU_BYTES = before


# ---- wrong arguments -------------------------------------------------------------------------------


BOTH = [ff.linear_token_logprobs, ff.linear_cross_entropy]


@pytest.mark.parametrize("bad", [-1, 7, 2**31, -(2**31) - 5])
@pytest.mark.parametrize("where", [0, 3, 5])
def test_target_out_of_range(monkeypatch, bad, where):
    """Before a product is taken or anything is written."""
    hidden, weight = torch.randn(6, 3), torch.randn(7, 3)
    targets = torch.zeros(6, dtype=torch.long)
    targets[where] = bad
    taken = []
    linear = _linear_loss.linear
    monkeypatch.setattr(_linear_loss, "linear", lambda *a: (taken.append(1), linear(*a))[1])
    message = rf"targets: element {where} is {bad}; allowed are 0 to 6 and ignore_index \(-100\)"
    none = (None, None, None, None, None, None, None, 0, 0, 7, math.inf)
    for call in (
        *(lambda f=f: f(hidden, weight, targets) for f in BOTH),
        *(lambda f=f: f(hidden.clone().requires_grad_(), weight, targets) for f in BOTH),
        *(lambda f=f: f(hidden.view(2, 3, 3), weight, targets.view(2, 3)) for f in BOTH),
        lambda: RAW.linear_token_logprobs_forward(
            hidden, weight, *none, targets, 1.0, IGNORE, False
        ),
        lambda: RAW.linear_token_logprobs_backward(
            torch.ones(6), None, None, hidden, weight, *none, targets, 1.0, IGNORE, True, True, True
        ),
        lambda: RAW.linear_cross_entropy_forward(
            hidden, weight, *none, targets, 1.0, 0.0, IGNORE, 2
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert not taken
    ff.linear_token_logprobs(hidden, weight, targets.clamp(0, 6))
    assert taken  # the count would have seen one
    if -(2**31) <= bad < 2**31:
        with pytest.raises(ValueError, match=message):
            ff.linear_token_logprobs(hidden, weight, targets.int())
    with ff.backend("eager"), pytest.raises(ValueError, match=message):
        ff.linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_wrong_arguments(function, backend):
    x, w, y, b = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([0, 1, 2]), torch.randn(6)
    packed = ff.quantize(w, blocksize=16)

    def wrong(error, message, hidden=x, weight=w, targets=y, **options):
        with ff.backend(backend), pytest.raises(error, match=message):
            function(hidden, weight, targets, **options)

    wrong(TypeError, "^hidden: a tensor, not list", hidden=[[1.0]])
    wrong(
        TypeError, r"^hidden: dtype torch.int64; allowed: float32", hidden=torch.ones(3, 4).long()
    )
    wrong(TypeError, "^hidden: a tensor of numbers, not a CodebookTensor", hidden=packed)
    wrong(TypeError, "^weight: a tensor, not None", weight=None)
    wrong(TypeError, r"^weight: dtype torch.int64; allowed: float32", weight=w.long())
    wrong(TypeError, r"^weight: dtype torch.float64; hidden has torch.float32", weight=w.double())
    wrong(
        TypeError, r"^weight: dtype torch.float32; hidden has torch.bfloat16", hidden=x.bfloat16()
    )
    wrong(ValueError, r"^weight: shape \(6,\)", weight=w[:, 0])
    wrong(ValueError, r"^weight: shape \(1, 6, 4\)", weight=w[None])
    wrong(ValueError, r"^weight: shape \(0, 4\)", weight=w[:0])
    wrong(ValueError, r"^weight: shape \(6, 0\)", weight=w[:, :0], hidden=x[:, :0])
    wrong(ValueError, r"^weight: on meta; hidden is on cpu", weight=w.to("meta"))
    wrong(ValueError, r"^hidden: shape \(3, 3\); a weight of \(6, 4\) takes", hidden=x[:, :3])
    wrong(ValueError, r"^hidden: shape \(\)", hidden=x[0, 0])
    wrong(TypeError, "^targets: a tensor of integers, not list", targets=[0, 1, 2])
    wrong(TypeError, r"^targets: dtype torch.float32", targets=y.float())
    wrong(TypeError, r"^targets: dtype torch.bool", targets=y.bool())
    wrong(ValueError, r"^targets: shape \(2,\); hidden is \(3, 4\): allowed: \(3,\)", targets=y[:2])
    wrong(ValueError, r"^targets: shape \(3, 1\)", targets=y[:, None])
    wrong(ValueError, "^targets: on meta", targets=y.to("meta"))
    wrong(TypeError, "^bias: a tensor, not list", bias=[1.0])
    wrong(TypeError, r"^bias: dtype torch.int64", bias=b.long())
    wrong(TypeError, "^bias: a tensor of numbers, not a CodebookTensor", bias=ff.quantize(b))
    wrong(ValueError, r"^bias: shape \(5,\); allowed: \(6,\)", bias=b[:5])
    wrong(ValueError, r"^bias: shape \(6, 1\)", bias=b[:, None])
    wrong(ValueError, "^bias: on meta; hidden is on cpu", bias=b.to("meta"))
    for t in (0.0, -1.0, math.nan, math.inf, 1e38):
        wrong(ValueError, "^temperature: ", temperature=t)
        wrong(ValueError, "^temperature: ", temperature=torch.tensor(t))
    for c in (0.0, -1.0, math.nan, math.inf):
        wrong(ValueError, "^softcap: ", softcap=c)
        wrong(ValueError, "^softcap: ", softcap=torch.tensor(c))
    for name in ("temperature", "softcap"):
        wrong(TypeError, f"^{name}: a number", **{name: "hot"})
        wrong(ValueError, rf"^{name}: a number or a 0-d tensor, not of shape \(2,\)",
              **{name: torch.ones(2)})  # fmt: skip
        wrong(ValueError, f"^{name}: has no gradient",
              **{name: torch.tensor(1.0, requires_grad=True)})  # fmt: skip
    for index in (None, 1.5, 2**70):
        wrong(TypeError, "^ignore_index: an int", ignore_index=index)
    if function is ff.linear_cross_entropy:
        for eps in (-0.1, 1.5, math.nan):
            wrong(ValueError, "^label_smoothing: ", label_smoothing=eps)
            wrong(ValueError, "^label_smoothing: ", label_smoothing=torch.tensor(eps))
        wrong(TypeError, "^label_smoothing: a number", label_smoothing="some")
        wrong(ValueError, "^reduction: 'avg'; allowed: 'none', 'sum', 'mean'", reduction="avg")
    with ff.backend(backend):
        assert function(x, packed, y, bias=b).isfinite().all()


def test_wrong_arguments_of_raw_ops():
    """What the public function makes sure of, a raw op checks itself."""
    x, w, b = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)
    y, none = torch.tensor([0, 1, 2]), (None, None, None, None, None, None, 0, 0)
    forward = RAW.linear_token_logprobs_forward

    def call(x=x, w=w, b=b, vocab=6, cap=math.inf, y=y, t=1.0):
        return forward(x, w, b, *none, vocab, cap, y, t, IGNORE, False)

    assert call()[0].shape == (3,)
    for message, args in (
        ("hidden: shape", {"x": x[None]}),
        ("weight: a tensor", {"w": None}),
        ("weight: ", {"vocab": 7, "b": None}),
        ("weight: ", {"w": w[:, :3]}),
        ("weight: ", {"w": w.double()}),
        ("bias: ", {"b": b[:5]}),
        ("bias: ", {"b": b.double()}),
        ("softcap: ", {"cap": 0.0}),
        ("softcap: ", {"cap": -1.0}),
        ("softcap: ", {"cap": math.nan}),
        ("temperature: ", {"t": 0.0}),
        ("targets: shape", {"y": y[:2]}),
        ("targets: dtype", {"y": y.short()}),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call(**args)
    head = (x, w, b, *none, 6, math.inf, y)
    for args, message in (
        ((1.0, 2.0, IGNORE, 2), "label_smoothing: "),
        ((1.0, 0.0, IGNORE, 3), "reduction: "),
        ((0.0, 0.0, IGNORE, 2), "temperature: "),
    ):
        with pytest.raises(ValueError, match=message):
            RAW.linear_cross_entropy_forward(*head, *args)


def test_wrong_numbers_while_compiling():
    """They are tensors there; the op still says what is wrong."""
    torch._dynamo.reset()
    case = make(3, 4, 6)

    def step(x, t, c):
        return ff.linear_cross_entropy(x, case.weight, case.targets, temperature=t, softcap=c)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    compiled(case.hidden, 1.5, 2.5)
    for t, c, name in ((0.0, 2.5, "temperature"), (1.5, -2.0, "softcap")):
        with pytest.raises(ValueError, match=name):
            compiled(case.hidden, t, c)


# ---- random inputs -----------------------------------------------------------------------------------


# z/T of some 20 at most: beyond, float32's own digits of z are more than the tolerance in p, and whose
# product is nearer is luck.
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    width=st.integers(1, 40),
    vocab=st.integers(2, 70),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    spread=st.floats(0.01, 3.0),
    temperature=st.floats(0.5, 10.0),
    softcap=st.one_of(st.none(), st.floats(0.5, 50.0)),
    size=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
def test_random(rows, width, vocab, dtype, bias, spread, temperature, softcap, size, seed):
    case = make(rows, width, vocab, dtype, bias=bias, spread=spread, seed=seed)
    with _chunks_of(size):
        compare_stats(case, only=False, cancels=True, softcap=softcap, temperature=temperature)
        if (case.targets != IGNORE).any():
            compare_cross_entropy(
                case, softcap=softcap, temperature=temperature, label_smoothing=0.1,
                reduction=("mean", "sum", "none")[seed % 3], cancels=True,
            )  # fmt: skip


@contextlib.contextmanager
def _chunks_of(size):
    before = _linear_logprobs.chunk_rows
    _linear_logprobs.chunk_rows = lambda count, *_: max(min(size, count), 1)
    try:
        yield
    finally:
        _linear_logprobs.chunk_rows = before
