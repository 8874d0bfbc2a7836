"""lora_linear, merge_lora, unmerge_lora on CPU tensors: errors, dropout, autograd, compile, arguments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from concurrency import at_once
from finefuse import _C, _args, _low_rank, _matmul
from finefuse._codebook_tensor import fields
from finefuse.eager import lora as eager_form
from finefuse.eager.lora import keep_mask
from finefuse.reference import lora as reference
from guards import between_guards
from low_rank_cases import (
    DTYPES,
    check_together,
    compare,
    grads,
    group,
    numbers,
    problem,
)
from tolerances import check
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

RAW = torch.ops.finefuse


def check_all(*problems, **options):
    """The error rule; over several problems of one shape together where sums are few."""
    check_together(("y", "dx", "dA", "dB", "db"), [compare(*p, **options) for p in problems])


# ---- the error rule ----------------------------------------------------------------------------


# tokens: none, one, a rest of a tile, blocks and a rest, more than a task of 256, and than eight.
# ranks: less than a tile, a rest, whole tiles, many. Sizes: odd, less than a vector; more than a span of
# 512 and a group of 1024 columns, once with a rest.
@pytest.mark.parametrize("rank", [1, 3, 8, 64])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 257, 2049])
def test_shapes(isa, tokens, rank):
    for rows, columns in ((19, 75), (1, 5)) if tokens > 300 else ((19, 75), (1100, 32), (40, 1637)):
        seeds = range(8 if 0 < tokens * rank < 64 else 1)
        check_all(*(problem(tokens, rows, columns, rank, seed=seed) for seed in seeds))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapters", DTYPES, ids=str)
def test_types(isa, dtype, adapters):
    if adapters is torch.float64 and dtype is not torch.float64:
        with pytest.raises(TypeError, match="lora_a: dtype torch.float64; x has"):
            ff.lora_linear(*problem(5, 40, 96, 3, dtype, adapters)[:4])
        return
    for tokens, rank in ((5, 3), (33, 8)):
        check_all(*(problem(tokens, 40, 96, rank, dtype, adapters, seed) for seed in range(4)))


def test_against_the_reference():
    x, w, a, b, bias, dy = problem(7, 19, 75, 3)
    p, seed, scale = 0.3, -12345, 1.7
    ours = grads(
        lambda x, a, b: ff.lora_linear(x, w, a, b, scale=scale, bias=bias, dropout=p, seed=seed),
        x, a, b, upstream=dy,
    )  # fmt: skip
    arrays = [t.numpy() for t in (x, w, a, b)]
    want = reference.lora_linear(*arrays, scale, bias.numpy(), p, seed)
    truth = [want, *reference.gradients(dy.numpy(), *arrays, scale, p, seed)]
    for o, t in zip(ours, truth, strict=True):
        check("reference", o, t, t)


@pytest.mark.parametrize("engine", ["torch", "oneDNN"])
def test_engines(monkeypatch, engine):
    monkeypatch.setattr(_matmul, "_onednn_is_faster", lambda: engine == "oneDNN")
    for dtype in DTYPES:
        for rank in (8, 64):
            check_all(problem(33, 40, 96, rank, dtype))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weight(dtype, tokens, double_quant):
    """From the bytes, and decoded, on both sides of both crossovers."""
    x, w, a, b, bias, dy = problem(tokens, 40, 96, 5, dtype)
    q = ff.quantize(w, "nf4", 64, double_quant)
    check_all((x, ff.dequantize(q, torch.float32), a, b, bias, dy), weight=q)


def test_strides():
    x, w, a, b, _, dy = problem(6, 24, 40, 4)

    def turned(t):
        return t.t().contiguous().t()

    def spaced(t):
        return torch.stack([t, t], -1)[..., 0]

    want = grads(lambda *t: ff.lora_linear(t[0], w, *t[1:]), x, a, b, upstream=dy)
    for change in (turned, spaced):
        got = grads(
            lambda *t, change=change: ff.lora_linear(
                change(t[0]), change(w), *map(change, t[1:])
            ),
            x, a, b, upstream=change(dy),
        )  # fmt: skip
        for g, v in zip(got, want, strict=True):
            torch.testing.assert_close(g, v, rtol=1e-5, atol=1e-5)


def test_leading_shapes():
    x, w, a, b, bias, _ = problem(24, 24, 40, 4)
    want = ff.lora_linear(x, w, a, b, bias=bias)
    assert torch.equal(
        ff.lora_linear(x.view(2, 3, 4, 40), w, a, b, bias=bias), want.view(2, 3, 4, 24)
    )
    torch.testing.assert_close(ff.lora_linear(x[0], w, a, b, bias=bias), want[0])
    leaves = [t.clone().requires_grad_() for t in (x[:0].view(0, 7, 40)[:, :7], a, b, bias)]
    y = ff.lora_linear(leaves[0], w, leaves[1], leaves[2], bias=leaves[3])
    assert y.shape == (0, 7, 24)
    y.sum().backward()
    for leaf in leaves:
        assert (leaf.grad == 0).all()
        assert leaf.grad.shape == leaf.shape


def test_nothing_in_nothing_out():
    for rows, columns in ((0, 5), (5, 0)):
        x, a, b = torch.ones(3, columns), torch.ones(2, columns), torch.ones(rows, 2)
        leaves = [t.requires_grad_() for t in (x, a, b)]
        y = ff.lora_linear(x, torch.ones(rows, columns), a, b, bias=torch.arange(float(rows)))
        assert torch.equal(y, torch.arange(float(rows)).expand(3, rows))
        y.sum().backward()
        assert all((t.grad == 0).all() for t in leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_widened_panels(monkeypatch, dtype, tokens):
    """Types without a product of their own: the weight in panels, of one row and of some and a rest."""
    monkeypatch.setattr(_matmul, "_has_bfloat16_product", lambda: False)
    for size in (1, 7 * 4 * 96):
        monkeypatch.setattr(_matmul, "PANEL_BYTES", size)
        for engine in (False, True):
            monkeypatch.setattr(_matmul, "_onednn_is_faster", lambda engine=engine: engine)
            check_all(*(problem(tokens, 40, 96, 5, dtype, seed=seed) for seed in range(3)))


# ---- dropout -----------------------------------------------------------------------------------


def test_philox_known_answers():
    """The test vectors of Random123."""
    ones = 0xFFFFFFFF
    for counter, key, words in (
        ([0, 0, 0, 0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ones] * 4, (ones, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):  # fmt: skip
        got = reference.philox4x32([np.uint64(c) for c in counter], *key)
        assert " ".join(f"{w:08x}" for w in got) == words


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 75), (5, 96), (1, 3), (9, 1637)])
def test_mask(isa, shape, p):
    """Bit for bit the reference's: read off dx with W = 0, A = 1; and the eager form's."""
    for seed in (0, 2**63 - 1, -3):
        want = reference.keep_mask(shape, p, seed).astype(np.float32)
        x = torch.ones(shape, requires_grad=True)
        zero = torch.zeros(1, shape[1])
        y = ff.lora_linear(x, zero, torch.ones_like(zero), torch.ones(1, 1), dropout=p, seed=seed)
        y.sum().backward()
        np.testing.assert_array_equal(x.grad.numpy(), want)
        torch.testing.assert_close(y, torch.from_numpy(want).sum(1, keepdim=True))
        eager_mask = keep_mask(x, p, torch.tensor([seed]))
        np.testing.assert_array_equal(eager_mask.numpy(), want)


def test_mask_beyond_32_bits():
    """A counter has 64."""
    counters = np.array([2**32 + 5, 5, 2**40 - 1], np.uint64)
    words = reference.philox(counters, -7)
    assert (words[0] != words[1]).all()
    ours = eager_form.philox(torch.from_numpy(counters.astype(np.int64)), torch.tensor(-7))
    np.testing.assert_array_equal(ours.numpy(), words)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_with_an_explicit_mask(isa, dtype):
    for tokens, p in ((5, 0.25), (300, 0.5), (4, 1.0)):
        x, w, a, b, bias, dy = problem(tokens, 19, 75, 3, dtype)
        mask = torch.from_numpy(reference.keep_mask(x.shape, p, 11))
        check_all((x, w, a, b, bias, dy), mask=mask, dropout=p, seed=11)
        q = ff.quantize(w)
        plain = ff.dequantize(q, torch.float32)
        check_all((x, plain, a, b, bias, dy), mask=mask, weight=q, dropout=p, seed=11)


def test_statistics_of_the_mask():
    """Shares, means and correlations of neighbours, rows and seeds, each within five deviations."""
    n, p = 1 << 20, 0.3
    masks = [reference.keep_mask((1024, 1024), p, seed) > 0 for seed in (1, 2)]
    for mask in masks:
        assert abs(mask.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    centred = [m - (1 - p) for m in masks]
    for a, b in (
        (centred[0][:, 1:], centred[0][:, :-1]),
        (centred[0][1:], centred[0][:-1]),
        (centred[0], centred[1]),
        (centred[0][:, 4:], centred[0][:, :-4]),
    ):
        assert abs((a * b).mean()) < 5 * p * (1 - p) / a.size**0.5


def test_seeds_are_drawn():
    """A mask of its own for each call, the same after the same torch.manual_seed; p = 0 and p = 1."""
    x, w, a, b, *_ = problem(6, 24, 40, 4)
    torch.manual_seed(3)
    first, second = (ff.lora_linear(x, w, a, b, dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(ff.lora_linear(x, w, a, b, dropout=0.5), first)
    state = torch.get_rng_state()
    assert torch.equal(ff.lora_linear(x, w, a, b, dropout=0.0), ff.lora_linear(x, w, a, b))
    assert torch.equal(torch.get_rng_state(), state)  # nothing drawn
    torch.testing.assert_close(ff.lora_linear(x, w, a, b, dropout=1.0), functional.linear(x, w))
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    ff.lora_linear(x, w, *leaves, dropout=1.0).sum().backward()
    assert all((t.grad == 0).all() for t in leaves)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    """A recomputation draws the same masks, one for each of two layers."""
    x, w, *_ = problem(9, 40, 40, 4)
    results = []
    for recompute in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, *problem(9, 40, 40, 4)[2:4])]

        def two(x, a, b):
            y = ff.lora_linear(x * 1.0, w, a, b, dropout=0.4)
            return ff.lora_linear(y, w, a, b, dropout=0.4)

        torch.manual_seed(5)
        y = checkpoint(two, *leaves, use_reentrant=use_reentrant) if recompute else two(*leaves)
        y.square().sum().backward()
        results.append([t.grad for t in leaves])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- autograd ----------------------------------------------------------------------------------


def test_gradcheck(isa):
    x, w, a, b, bias, _ = problem(5, 6, 7, 2, torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, a, b, bias)]
    for p in (0.0, 0.4):
        assert torch.autograd.gradcheck(
            lambda x, w, a, b, bias, p=p: ff.lora_linear(
                x, w, a, b, scale=0.5, bias=bias, dropout=p, seed=1
            ),
            leaves,
        )


def test_only_what_is_asked_for(monkeypatch):
    """Each subset of x, W, bias, A, B: the gradients of the whole set, and no work for the others."""
    x, w, a, b, bias, dy = problem(5, 24, 40, 4)
    names = ("x", "w", "bias", "a", "b")
    tensors = dict(zip(names, (x, w, bias, a, b), strict=True))

    def run(asked):
        leaves = {n: t.clone().requires_grad_(n in asked) for n, t in tensors.items()}
        y = ff.lora_linear(leaves["x"], leaves["w"], leaves["a"], leaves["b"], bias=leaves["bias"])
        if asked:
            y.backward(dy)
        return {n: leaves[n].grad for n in names}

    whole = run(names)
    calls = []
    shrink, expand = _low_rank._SHRINK, _low_rank._EXPAND
    monkeypatch.setattr(_low_rank, "_SHRINK", lambda *s: (calls.append("shrink"), shrink(*s)))
    monkeypatch.setattr(_low_rank, "_EXPAND", lambda *s: (calls.append("expand"), expand(*s)))
    for count in range(len(names) + 1):
        for asked in itertools.combinations(names, count):
            calls.clear()
            got = run(asked)
            for n in names:
                assert (got[n] is None) == (n not in asked)
                if n in asked:
                    torch.testing.assert_close(got[n], whole[n])
            back = calls[2:]
            assert back.count("expand") == ("x" in asked)
            assert back.count("shrink") == (bool({"x", "a", "b"} & set(asked)) + ("a" in asked))


def test_what_is_kept():
    """x, A, B, h and the weight itself; without dA or dW not x."""
    x, w, a, b, _, _ = problem(64, 128, 256, 4)
    q = ff.quantize(w)

    def kept(weight, *train):
        saved = []
        leaves = [
            t.clone().requires_grad_(name in train)
            for name, t in zip("xab", (x, a, b), strict=True)
        ]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.append(t), t)[1], lambda t: t
        ):
            ff.lora_linear(leaves[0], weight, leaves[1], leaves[2])
        theirs = {t.data_ptr() for t in (weight if weight is w else q.codes, q.absmax, q.code)}
        return sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in theirs)

    adapters, h = a.nbytes + b.nbytes, 64 * 4 * 4
    for weight in (w, q):
        assert kept(weight, "x", "a", "b") == x.nbytes + adapters + h
        assert kept(weight, "x", "b") == adapters + h


def test_second_derivatives_and_forward_mode_raise():
    x, w, a, b, *_ = problem(3, 8, 16, 2)
    a.requires_grad_()
    (g,) = torch.autograd.grad(ff.lora_linear(x, w, a, b).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="forward-mode"):
            ff.lora_linear(dual, w, a.detach(), b)


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(packed):
    x, w, a, b, bias, dy = problem(5, 24, 64, 4)
    weight = ff.quantize(w) if packed else w
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    with torch.autocast("cpu", torch.bfloat16):
        y = ff.lora_linear(leaves[0], weight, leaves[1], leaves[2], bias=bias)
    assert y.dtype is torch.bfloat16
    y.backward(dy.bfloat16())
    assert all(t.grad.dtype is torch.float32 for t in leaves)
    low = weight if packed else w.bfloat16()
    want = ff.lora_linear(x.bfloat16(), low, a, b, bias=bias.bfloat16())
    assert torch.equal(y, want)


@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_same_bits_for_any_thread_count(tokens):
    """Of the narrow products; the base product is a library's."""
    x, _, a, b, _, dy = problem(tokens, 1100, 1300, 5)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        h, _ = _low_rank.shrink(x, a, 1.0)
        y = torch.zeros(tokens, 1100)
        _low_rank.expand(h, b.t(), 0.5, y, accumulate=True)
        results.append([h, y, *_low_rank.shrink(dy, b.t(), 0.5, h, 0.5)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_concurrent_python_threads():
    cases = [problem(20 + i, 30, 40 + i, 3) for i in range(6)]
    want = [ff.lora_linear(*c[:4]) for c in cases]

    def work(i):
        for _ in range(30):
            assert torch.equal(ff.lora_linear(*cases[i][:4]), want[i])

    at_once(work)


# ---- torch's own checks, compile, eager --------------------------------------------------------


def raw_calls(grad=False):
    x, w, a, b, bias, dy = problem(3, 8, 16, 2)
    for t in (x, a, b, dy):
        t.requires_grad_(grad)
    q = ff.quantize(w.detach(), double_quant=True)
    seed, h = torch.tensor([5]), torch.randn(3, 2)
    for weight, values in ((w, _low_rank.NO_FIELDS), (None, fields(q))):
        yield RAW.lora_linear_forward.default, (x, weight, *values, a, b, bias, seed, 0.5, 0.3)
        yield RAW.lora_linear_forward.default, (x, weight, *values, a, b, None, None, 0.5, 0.0)
        for needs in (15, 4):
            yield (
                RAW.lora_linear_backward.default,
                (dy, x, h, weight, *values, a, b, seed, 0.5, 0.3, needs),
            )


@pytest.mark.parametrize("case", range(8))
def test_opcheck_raw(case):
    op, args = list(raw_calls())[case]
    torch.library.opcheck(op, args)


def test_opcheck_public():
    x, w, a, b, bias, _ = problem(3, 8, 16, 2)
    for t in (x, a, b):
        t.requires_grad_()
    torch.library.opcheck(
        RAW.lora_linear.default,
        (x, w, a, b),
        {"bias": bias, "seed": torch.tensor([1]), "dropout": 0.2},
    )


def test_backward_through_a_raw_op_raises():
    for op, args in itertools.islice(raw_calls(grad=True), 2):
        y = op(*args)[0]
        with pytest.raises(RuntimeError, match="raw op and has no gradient"):
            y.sum().backward()


def test_compile(counter):
    """No graph break, at most two graphs over twelve scales, gradients equal."""
    counter.backend = "inductor"
    x, w, a, b, bias, dy = problem(9, 24, 40, 4)

    def function(x, a, b, scale):
        return ff.lora_linear(x, w, a, b, scale=scale, bias=bias) * 2

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for i in range(12):
        scale = 0.1 + i
        got = grads(lambda *t, s=scale: compiled(*t, s), x, a, b, upstream=dy)
        want = grads(lambda *t, s=scale: function(*t, s), x, a, b, upstream=dy)
        for g, v in zip(got, want, strict=True):
            torch.testing.assert_close(g, v)
    assert counter.graphs <= 2


def test_compile_dropout_and_packed(counter):
    x, w, a, b, *_ = problem(9, 24, 64, 4)
    q = ff.quantize(w)

    def function(x, a, b):
        return ff.lora_linear(x, q, a, b, dropout=0.5, seed=3)

    counter.backend = "aot_eager"
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    dy = numbers(9, 24)
    for g, v in zip(
        grads(compiled, x, a, b, upstream=dy), grads(function, x, a, b, upstream=dy), strict=True
    ):
        torch.testing.assert_close(g, v)
    with ff.backend("eager"):
        torch._dynamo.reset()
        # Inductor takes minutes over ten rounds of integer arithmetic (docs/lora.md)
        eagerly = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(eagerly(x, a, b), function(x, a, b))
        torch._dynamo.reset()
    drawing = torch.compile(
        lambda x: ff.lora_linear(x, q, a, b, dropout=0.5), backend=counter, fullgraph=True
    )
    assert not torch.equal(drawing(x), drawing(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_backend_takes_factors_as_they_are(dtype):
    """float32 x with bfloat16 factors: nothing is rounded to them; nor under autocast, while merging."""
    for factors in DTYPES if dtype is torch.float64 else DTYPES[:3]:
        problems = [problem(5, 24, 64, 4, dtype, factors, seed) for seed in range(4)]
        with ff.backend("eager"):
            check_all(*problems)
    with ff.backend("eager"), torch.autocast("cpu", torch.bfloat16):
        _, w, a, b, *_ = problem(1, 24, 64, 4)
        merged = ff.merge_lora(w, a, b, 0.5)
    torch.testing.assert_close(merged, ff.merge_lora(w, a, b, 0.5))


@pytest.mark.parametrize("packed", [False, True])
def test_eager_backend(packed):
    x, w, a, b, bias, dy = problem(5, 24, 64, 4, torch.float32)
    weight = ff.quantize(w) if packed else w
    options = {"scale": 0.3, "bias": bias, "dropout": 0.4, "seed": 9}
    ours = grads(lambda *t: ff.lora_linear(t[0], weight, *t[1:], **options), x, a, b, upstream=dy)
    with ff.backend("eager"):
        plain = grads(
            lambda *t: ff.lora_linear(t[0], weight, *t[1:], **options), x, a, b, upstream=dy
        )
    for o, e in zip(ours, plain, strict=True):
        check("eager", o, e, e)


# ---- several layers of one input ---------------------------------------------------------------


def group_grads(function, x, lora_a, lora_b, dys):
    leaves = [t.detach().clone().requires_grad_() for t in (x, *lora_a, *lora_b)]
    ys = function(leaves[0], leaves[1:4], leaves[4:])
    return [y.detach() for y in ys], torch.autograd.grad(ys, leaves, dys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, (0.0, 0.3, 0.5)])
def test_group(isa, dtype, p):
    """The bits of calls one by one, but for dx, whose three terms are added in another order."""
    x, weights, lora_a, lora_b, biases, dys = group(dtype)
    if dtype in (torch.float32, torch.float16):
        weights[2] = ff.quantize(weights[2].float()[:, :]).to(dtype)
    scales, seeds = (1.0, 0.5, 2.0), (1, 2, 3)

    def together(x, a, b):
        return ff.lora_linear_group(
            x, weights, a, b, scale=scales, bias=biases, dropout=p, seed=seeds
        )

    def one_by_one(x, a, b):
        drops = p if isinstance(p, tuple) else (p,) * 3
        return [
            ff.lora_linear(x, *layer[:3], scale=s, bias=c, dropout=d, seed=k)
            for *layer, s, c, d, k in zip(weights, a, b, scales, biases, drops, seeds, strict=True)
        ]

    ys, (dx, *rest) = group_grads(together, x, lora_a, lora_b, dys)
    ys_, (dx_, *rest_) = group_grads(one_by_one, x, lora_a, lora_b, dys)
    assert all(map(torch.equal, [*ys, *rest], [*ys_, *rest_]))
    with torch.no_grad():
        assert all(map(torch.equal, together(x, lora_a, lora_b), ys))
    unit = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2.0**-7)
    torch.testing.assert_close(dx, dx_, rtol=0, atol=2 * unit * dx_.abs().max().item())


def test_group_reads_x_once(monkeypatch):
    x, weights, lora_a, lora_b, _, dys = group(columns=96)
    calls = []
    names = {"_SHRINK": "shrink", "_SHRINK_GROUP": "group", "_EXPAND": "expand"}
    for name, short in names.items():
        kernel = getattr(_low_rank, name)
        monkeypatch.setattr(
            _low_rank,
            name,
            lambda *a, k=kernel, s=short: (calls.append((s, a[0].data_ptr())), k(*a)),
        )
    monkeypatch.setattr(_low_rank, "LIBRARY_RANK", 1000)
    leaves = [t.clone().requires_grad_() for t in (x, *lora_a, *lora_b)]
    ys = ff.lora_linear_group(leaves[0], weights, leaves[1:4], leaves[4:], dropout=0.5)
    torch.autograd.backward(ys, dys)
    ours = [name for name, pointer in calls if pointer == leaves[0].data_ptr()]
    assert ours == ["group", "group"]  # forward; backward


def test_group_of_five_and_parts_that_nobody_asked_for():
    """More members than one visit serves; outputs that are not used, layers that do not train."""
    x, weights, lora_a, lora_b, *_ = group(columns=96)
    weights, lora_a, lora_b = (v + v[:2] for v in (weights, lora_a, lora_b))
    leaves = [a.clone().requires_grad_(i != 1) for i, a in enumerate(lora_a)]
    ys = ff.lora_linear_group(x, weights, leaves, lora_b)
    (ys[0].sum() + ys[4].sum()).backward()
    for i, leaf in enumerate(leaves):
        if i not in (0, 4):
            assert leaf.grad is None, i
            continue
        own = lora_a[i].clone().requires_grad_()
        ff.lora_linear(x, weights[i], own, lora_b[i]).sum().backward()
        assert torch.equal(leaf.grad, own.grad)
    weight = weights[0].clone().requires_grad_()
    y, _ = ff.lora_linear_group(x, [weight, weights[1]], lora_a[:2], lora_b[:2])
    y.sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones_like(y).t() @ x)


def test_group_elsewhere(counter):
    """Traced, watched by a mode and on the backend "eager" it is calls one by one."""
    x, weights, lora_a, lora_b, _, dys = group(columns=96)

    def function(x, a, b):
        return ff.lora_linear_group(x, weights, a, b, scale=0.5)

    want = group_grads(function, x, lora_a, lora_b, dys)
    counter.backend = "aot_eager"
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    got = group_grads(compiled, x, lora_a, lora_b, dys)
    with ff.backend("eager"):
        plain = group_grads(function, x, lora_a, lora_b, dys)
    for other in (got, plain):
        for o, e in zip(itertools.chain(*other), itertools.chain(*want), strict=True):
            torch.testing.assert_close(o, e, rtol=1e-5, atol=1e-5)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [y.shape for y in function(torch.empty(7, 96), lora_a, lora_b)]
    assert shapes == [(7, 64), (7, 96), (7, 33)]
    leaves = [t.clone().requires_grad_() for t in (x, *lora_a, *lora_b)]
    again = checkpoint(lambda x, *t: tuple(function(x, t[:3], t[3:])), *leaves, use_reentrant=False)
    for o, e in zip(torch.autograd.grad(again, leaves, dys), want[1], strict=True):
        torch.testing.assert_close(o, e)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_may_be_written_into(shape, packed):
    """As those of torch.nn.Linear: a ReLU in place after a layer, whatever the shape of x."""
    _, w, a, b, *_ = problem(1, 24, 96, 4)
    x = numbers(*shape, 96).expand(8, *shape, 96)  # more than the tokens of the packed kernel
    weight = ff.quantize(w) if packed else w
    ids = torch.zeros(x.shape[:-1], dtype=torch.int64)

    def run(a, b):
        yield ff.lora_linear(x, weight, a, b)
        yield ff.lora_linear(x, weight, a, b, magnitude=torch.ones(24))
        yield ff.lora_linear_segmented(x, weight, a[None], b[None], ids)
        yield ff.lora_linear_group(x, [weight, weight], [a, a], [b, b])[1]
        if packed:
            yield ff.codebook_linear(x.clone().requires_grad_(), weight)

    for y in run(a.requires_grad_(), b.requires_grad_()):
        want = y.detach().clone().relu()
        y.relu_().sum().backward()
        assert torch.equal(y, want)


def test_group_on_meta_and_without_columns():
    x, weights, lora_a, lora_b, *_ = group(columns=96)
    meta = [[t.to("meta") for t in ts] for ts in (weights, lora_a, lora_b)]
    ys = ff.lora_linear_group(x.to("meta"), *meta)
    assert [(y.device.type, tuple(y.shape)) for y in ys] == [
        ("meta", (70, n)) for n in (64, 96, 33)
    ]
    nothing = [t[..., :0].requires_grad_() for t in lora_a]
    ys = ff.lora_linear_group(
        x[:, :0].requires_grad_(),
        [w[:, :0] for w in weights],
        nothing,
        lora_b,
        dropout=torch.tensor(0.1),
    )
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert all(a.grad.shape == a.shape for a in nothing)


def test_group_keeps_x_only_for_a():
    x, weights, lora_a, lora_b, *_ = group(columns=96)
    for trained, keeps in ((lora_a, True), (lora_b, False)):
        saved = []
        leaves = [t.detach().clone().requires_grad_() for t in trained]
        factors = (leaves, lora_b) if keeps else (lora_a, leaves)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.data_ptr()), t)[1], lambda t: t
        ):
            ff.lora_linear_group(x, weights, *factors)
        assert (x.data_ptr() in saved) == keeps


def test_group_wrong_arguments():
    x, weights, lora_a, lora_b, *_ = group(columns=96)
    for error, message, args, options in (
        (ValueError, "weights: none", ([], [], []), {}),
        (ValueError, "lora_a: 2 of them; there are 3", (weights, lora_a[:2], lora_b), {}),
        (ValueError, "scale: 2 of them", (weights, lora_a, lora_b), {"scale": (1.0, 2.0)}),
        (ValueError, r"x: shape \(70, 96\); a weight of \(64, 40\)",
         ([weights[0][:, :40], *weights[1:]], lora_a, lora_b), {}),
        (ValueError, "dropout: 2.0", (weights, lora_a, lora_b), {"dropout": 2}),
        (TypeError, "seed: one for each weight, not 3", (weights, lora_a, lora_b), {"seed": 3}),
        (TypeError, "lora_a: one for each weight, not None", (weights, None, lora_b), {}),
        (TypeError, "seed: a 64-bit int", (weights, lora_a, lora_b),
         {"dropout": 0.5, "seed": (1.5, 1, 1)}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            ff.lora_linear_group(x, *args, **options)


# ---- merging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(isa, dtype):
    """Within half a unit of the last place of W + s·BA, in place too; back, what rounding took is gone."""
    _, w, a, b, *_ = problem(1, 19, 75, 3, dtype)
    truth = reference.merge_lora(*(t.double().numpy() for t in (w, a, b)), 0.7)
    merged, error = ff.merge_lora(w, a, b, 0.7, return_error=True)
    plain = (w.double() + 0.7 * b.double() @ a.double()).to(dtype)
    check("merged", merged, plain, truth)
    if dtype in (
        torch.bfloat16,
        torch.float16,
    ):  # float32 sums of three terms hardly ever round elsewhere
        assert (merged == plain).double().mean() > 0.99
    assert abs(error - np.abs(merged.double().numpy() - truth).max()) <= 1e-6 * np.abs(truth).max()
    again = w.clone()
    assert ff.merge_lora(again, a, b, 0.7, out=again) is again
    assert torch.equal(again, merged)
    back = ff.unmerge_lora(merged, a, b, 0.7)
    limit = torch.finfo(dtype).eps * float(merged.abs().max()) * 2
    assert (back.double() - w.double()).abs().max() <= limit
    square = numbers(9, 9, dtype=dtype)  # the same memory, seen otherwise
    want = ff.merge_lora(square.t().clone(), a[:, :9], b[:9], 0.7)
    ff.merge_lora(square.t(), a[:, :9], b[:9], 0.7, out=square)
    assert torch.equal(square, want)
    strided = w.t().contiguous().t()
    assert torch.equal(ff.merge_lora(strided, a, b, 0.7), merged)
    assert ff.merge_lora(strided, a, b, 0.7, out=strided) is strided
    assert torch.equal(strided, merged)


@pytest.mark.parametrize("double_quant", [False, True])
def test_merge_packed(double_quant):
    _, w, a, b, *_ = problem(1, 40, 96, 3)
    q = ff.quantize(w.bfloat16(), "nf4", 64, double_quant)
    merged, error = ff.merge_lora(q, a, b, 0.7, return_error=True)
    exact = ff.dequantize(q, torch.float32).double() + 0.7 * b.double() @ a.double()
    assert isinstance(merged, ff.CodebookTensor)
    assert merged.dtype is torch.bfloat16
    assert (merged.nested is not None) == double_quant
    assert merged.quant_type == "nf4"
    want = ff.quantize(exact.float(), "nf4", 64, double_quant)
    torch.testing.assert_close(
        ff.dequantize(merged, torch.float32), ff.dequantize(want, torch.float32)
    )
    difference = (ff.dequantize(merged, torch.float64) - exact).abs().max()
    assert abs(error - difference) < 1e-5
    assert ff.merge_lora(q, a, b, 0.7, out=q) is q
    assert torch.equal(ff.dequantize(q), ff.dequantize(merged))


# ---- wrong arguments ---------------------------------------------------------------------------


def test_wrong_arguments():
    x, w, a, b, bias, _ = problem(3, 8, 16, 2)
    q = ff.quantize(w)
    cases = [
        (TypeError, "x: a tensor, not list", ([1.0], w, a, b), {}),
        (TypeError, "x: dtype torch.int64; allowed", (x.long(), w, a, b), {}),
        (TypeError, "x: a tensor of numbers, not a CodebookTensor", (q, w, a, b), {}),
        (TypeError, "weight: a tensor, not NoneType", (x, None, a, b), {}),
        (TypeError, "weight: dtype torch.bfloat16; x has torch.float32", (x, w.bfloat16(), a, b), {}),
        (TypeError, "lora_a: a tensor of numbers, not a CodebookTensor", (x, w, ff.quantize(a), b), {}),
        (TypeError, "lora_b: dtype torch.int64", (x, w, a, b.long()), {}),
        (ValueError, r"weight: shape \(16,\); allowed: \(out, in\)", (x, w[0], a, b), {}),
        (ValueError, r"x: shape \(3, 15\); a weight of \(8, 16\)", (x[:, :15], w, a, b), {}),
        (ValueError, r"x: shape \(\); a weight", (x[0, 0], w, a, b), {}),
        (ValueError, r"lora_a: shape \(2, 15\); allowed: \(r, 16\)", (x, w, a[:, :15], b), {}),
        (ValueError, r"lora_a: shape \(16,\); allowed: two", (x, w, a[0], b), {}),
        (ValueError, r"lora_a: shape \(0, 16\); the rank", (x, w, a[:0], b[:, :0]), {}),
        (ValueError, r"lora_b: shape \(8, 1\); allowed: \(8, 2\)", (x, w, a, b[:, :1]), {}),
        (ValueError, r"lora_b: shape \(7, 2\); allowed: \(8, 2\)", (x, w, a, b[:7]), {}),
        (ValueError, r"bias: shape \(7,\); allowed: \(8,\)", (x, w, a, b), {"bias": bias[:7]}),
        (TypeError, "bias: dtype torch.int64", (x, w, a, b), {"bias": bias.long()}),
        (ValueError, "dropout: 1.5; allowed: 0 to 1", (x, w, a, b), {"dropout": 1.5}),
        (ValueError, "dropout: nan; allowed: 0 to 1", (x, w, a, b), {"dropout": float("nan")}),
        (TypeError, "dropout: a number", (x, w, a, b), {"dropout": "1"}),
        (TypeError, "scale: a number", (x, w, a, b), {"scale": None}),
        (TypeError, "seed: a 64-bit int, not 1.5", (x, w, a, b), {"dropout": 0.5, "seed": 1.5}),
        (TypeError, "seed: a 64-bit int", (x, w, a, b), {"dropout": 0.5, "seed": 2**63}),
        (ValueError, "seed: torch.int32", (x, w, a, b),
         {"dropout": 0.5, "seed": torch.zeros(1, dtype=torch.int32)}),
        (ValueError, "lora_a: on meta; x is on cpu", (x, w, a.to("meta"), b), {}),
        (ValueError, "weight: on meta; x is on cpu", (x, w.to("meta"), a, b), {}),
        (ValueError, "bias: on meta; x is on cpu", (x, w, a, b), {"bias": bias.to("meta")}),
        (ValueError, "(codes|weight): on meta; x is on cpu", (x, q.to("meta"), a, b), {}),
    ]  # fmt: skip
    for error, message, args, options in cases:
        for name in ("auto", "eager"):
            with ff.backend(name), pytest.raises(error, match=message):
                ff.lora_linear(*args, **options)
    for error, message, args, options in (
        (TypeError, "weight: a tensor, not list", ([1], a, b), {}),
        (ValueError, r"lora_b: shape \(8, 1\)", (w, a, b[:, :1]), {}),
        (ValueError, "lora_a: on meta; weight is on cpu", (w, a.to("meta"), b), {}),
        (ValueError, "out: torch.float32", (w, a, b), {"out": w[:4].clone()}),
        (ValueError, "out: torch.bfloat16", (w, a, b), {"out": w.bfloat16()}),
        (TypeError, "out: a CodebookTensor, as weight is", (q, a, b), {"out": w.clone()}),
        (TypeError, "scale: a number", (w, a, b, "x"), {}),
    ):
        for function in (ff.merge_lora, ff.unmerge_lora):
            with pytest.raises(error, match=message):
                function(*args, **options)


def test_raw_op_checks_what_kernels_rely_on():
    x, w, a, b, bias, dy = problem(3, 8, 16, 2)
    h, none = torch.randn(3, 2), _low_rank.NO_FIELDS
    for message, args in (
        ("lora_a: shape", (x, w, *none, a[:, :15], b, None, None, 1.0, 0.0)),
        ("weight: shape", (x, w[:7], *none, a, b, None, None, 1.0, 0.0)),
        ("bias: shape", (x, w, *none, a, b, bias[:5], None, 1.0, 0.0)),
        ("seed: torch.float32", (x, w, *none, a, b, None, torch.ones(1), 1.0, 0.5)),
        ("seed: None with dropout", (x, w, *none, a, b, None, None, 1.0, 0.5)),
        ("dropout: -1.0", (x, w, *none, a, b, None, None, 1.0, -1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            RAW.lora_linear_forward(*args)
    for message, args in (
        ("dy: shape", (dy[:, :7], x, h, w, *none, a, b, None, 1.0, 0.0, 7)),
        ("h: torch.float32", (dy, x, h[:2], w, *none, a, b, None, 1.0, 0.0, 7)),
        ("x: torch.float32", (dy, x[:2], h, w, *none, a, b, None, 1.0, 0.0, 7)),
    ):
        with pytest.raises(ValueError, match=message):
            RAW.lora_linear_backward(*args)
    want = RAW.lora_linear_backward(dy, x, h, w, *none, a, b, None, 1.0, 0.0, 7)
    turned = h.t().contiguous().t()  # of any strides
    got = RAW.lora_linear_backward(dy, x, turned, w, *none, a, b, None, 1.0, 0.0, 7)
    assert all(map(torch.equal, got, want))


# ---- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64], ids=str)
def test_nothing_out_of_bounds(isa, dtype, at_end):
    """Every array lies against a page that may not be touched. Widths: less than a vector, a vector and one,
    a span of 512 and a rest, two groups of 1024."""
    wide = np.float64 if dtype is np.float64 else np.float32
    code, random = _args.DTYPES[np.dtype(dtype).name], np.random.default_rng(0)

    def guarded(*shape, dtype=dtype):
        return between_guards(random.standard_normal(shape).astype(dtype), at_end)

    for tokens, columns, rank in ((1, 1, 1), (3, 9, 2), (17, 545, 5), (2, 1057, 9), (258, 40, 3)):
        x, y, bias = guarded(tokens, columns), guarded(tokens, columns), guarded(columns)
        for turned in (False, True):
            factor = guarded(columns, rank).T if turned else guarded(rank, columns)
            strides = [s // factor.itemsize for s in factor.strides]
            h, g = guarded(tokens, rank, dtype=wide), guarded(tokens, rank, dtype=wide)
            outer = guarded(rank, columns, dtype=wide)
            seed = between_guards(np.array([5]), at_end)
            for drops in ((None, 0, 1.0), (seed, 2**31, 2.0)):
                _C.lora_shrink(
                    x, code, tokens, columns, rank, factor, code, *strides, h, 1.0, g, outer, 1.0, *drops, 2
                )  # fmt: skip
                mask = reference.keep_mask(x.shape, 0.5, 5) if drops[0] is not None else 1.0
                dropped = x.astype(np.float64) * mask
                narrow, exact = dropped.astype(wide), factor.astype(np.float64)
                check("h", h, narrow @ factor.astype(wide).T, dropped @ exact.T)
                check("outer", outer, g.T @ narrow, g.T.astype(np.float64) @ dropped)
                for accumulate in (False, True):
                    before = y.astype(np.float64) if accumulate else 0.0
                    _C.lora_expand(
                        g, tokens, columns, rank, factor, code, *strides, 0.5, bias, accumulate, y, code,
                        *drops, 2,
                    )  # fmt: skip
                    want = before + bias + mask * 0.5 * (g.astype(np.float64) @ exact)
                    check("y", y, want.astype(dtype), want)
