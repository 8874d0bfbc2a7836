"""linear_token_logprobs and linear_cross_entropy against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse import _linear_loss, _matmul, codebook
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    DTYPES,
    FUNCTIONS,
    IGNORE,
    OPTIONS,
    Case,
    Counts,
    check,
    check_gradients,
    compare_cross_entropy,
    compare_stats,
    make,
    on_one_thread,
    ours_stats,
    plain_cross_entropy,
    plain_stats,
    run,
    run_plain,
    spoilt,
    truth_cross_entropy,
    truth_stats,
    truth_stats_gradients,
    upstream_of,
    use_chunks,
)
from tolerances import ScalarErrors

pytestmark = pytest.mark.usefixtures("one_thread")

F = torch.nn.functional
# rows, width, vocabulary. One row of one column and two classes; fewer than a vector of each; a vocabulary
# that is no multiple of a vector; more rows than 64, the least of a chunk, and an odd width.
SHAPES = [(1, 1, 2), (7, 5, 2), (9, 70, 31), (67, 33, 300)]


# ---- the formulas, in the type of their input ------------------------------------------------------


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
    counts = chunk(50)
    compare_stats(make(*shape, dtype), **OPTIONS[options])
    assert counts


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
    counts = chunk(50)
    case = make(*shape, dtype)
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1):
            compare_cross_entropy(
                case, reduction=reduction, label_smoothing=smoothing, **OPTIONS[options]
            )
    assert counts


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
    counts = chunk(size)
    for case in (make(29, 12, 37, dtype), make(29, 12, 37, dtype, ignore=False)):
        compare_stats(case, softcap=3.0, temperature=1.2, only=False)
        compare_cross_entropy(case, label_smoothing=0.2, softcap=3.0)
        compare_cross_entropy(case, reduction="none", temperature=1.3)
    assert set(counts) == {29, 25}


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
    with pytest.MonkeyPatch.context() as patch:
        use_chunks(patch, size)
        compare_stats(case, only=False, cancels=True, softcap=softcap, temperature=temperature)
        if (case.targets != IGNORE).any():
            compare_cross_entropy(
                case, softcap=softcap, temperature=temperature, label_smoothing=0.1,
                reduction=("mean", "sum", "none")[seed % 3], cancels=True,
            )  # fmt: skip
