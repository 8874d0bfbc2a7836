"""lora_linear_segmented on CPU tensors: errors, who has which adapter, autograd, compile, arguments."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse import _C, _low_rank, segmented
from finefuse.eager.lora import keep_mask
from finefuse.reference import segmented as reference
from guards import between_guards
from low_rank_cases import DTYPES, check_together, grads, numbers, opcheck_of
from segmented_cases import loop, problem, scales, split
from tolerances import check
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

RAW = torch.ops.finefuse
SPLITS = ["distinct", "uniform", "zipf", "same", "none"]


def check_all(x, w, a, b, bias, dy, adapter, weight=None, mask=None, **options):
    """The error rule on y, dx, dA, dB, db."""
    weight, scale = w if weight is None else weight, scales(len(a))
    mask = torch.ones(()) if mask is None else mask
    ours = grads(
        lambda x, a, b, bias: ff.lora_linear_segmented(
            x, weight, a, b, adapter, scale=scale, bias=bias, **options
        ),
        x, a, b, bias, upstream=dy,
    )  # fmt: skip
    plain = grads(
        lambda x, a, b, bias: loop(x, w.to(x.dtype), a, b, bias, adapter, scale, mask.to(x.dtype)),
        x, a, b, bias, upstream=dy,
    )  # fmt: skip
    truth = grads(
        lambda x, a, b, bias: loop(x, w.double(), a, b, bias, adapter, scale.double(), mask.double()),
        *(t.double() for t in (x, a, b, bias)), upstream=dy.double(),
    )  # fmt: skip
    check_together(("y", "dx", "dA", "dB", "db"), [(ours, plain, truth)])


# ---- the error rule ----------------------------------------------------------------------------


# tokens: none, one, blocks of 16 and tasks of 32 rows with a rest. ranks: less than a tile, a rest, more than
# the 32 whose factor is at hand. Sizes: odd, less than a vector; more than a span of 512 and a group of
# 1024 columns.
@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("tokens", [0, 1, 77])
def test_shapes(isa, tokens, kind):
    for rank in (1, 3, 8, 40):
        for rows, columns in ((19, 75), (1100, 33), (40, 1637)):
            check_all(*problem(tokens, rows, columns, rank, 5), split(kind, tokens, 5))


def test_many_rows_of_one_adapter(isa):
    check_all(*problem(700, 48, 96, 4, 3), split("zipf", 700, 3))


def test_many_adapters():
    check_all(*problem(300, 24, 40, 2, 1000), split("uniform", 300, 1000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", DTYPES, ids=str)
def test_types(isa, dtype, factors):
    arguments = problem(37, 40, 96, 3, 4, dtype, factors)
    adapter = split("uniform", 37, 4)
    if factors is torch.float64 and dtype is not torch.float64:
        with pytest.raises(TypeError, match="lora_a: dtype torch.float64; x has"):
            ff.lora_linear_segmented(*arguments[:4], adapter)
        return
    check_all(*arguments, adapter)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 40])
def test_packed_weight(dtype, tokens):
    x, w, *rest = problem(tokens, 40, 96, 3, 4, dtype)
    q = ff.quantize(w.float(), double_quant=True).to(dtype)
    check_all(x, ff.dequantize(q, torch.float32), *rest, split("uniform", tokens, 4), weight=q)


def test_against_the_reference():
    x, w, a, b, bias, dy = problem(33, 19, 75, 3, 4)
    adapter, scale, p, seed = split("uniform", 33, 4), scales(4), 0.3, -12345
    ours = grads(
        lambda x, a, b: ff.lora_linear_segmented(
            x, w, a, b, adapter, scale=scale, bias=bias, dropout=p, seed=seed
        ),
        x, a, b, upstream=dy,
    )  # fmt: skip
    arrays = [t.numpy() for t in (x, w, a, b, adapter, scale)]
    want = reference.lora_linear_segmented(*arrays, bias.numpy(), p, seed)
    truth = [want, *reference.gradients(dy.numpy(), *arrays, p, seed)]
    for o, t in zip(ours, truth, strict=True):
        check("reference", o, t, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(isa, dtype):
    """The mask of lora_linear: a function of the seed and of each element's place, sorted or not."""
    arguments = problem(70, 40, 615, 3, 4, dtype)
    mask = keep_mask(arguments[0].double(), 0.4, torch.tensor([7]))
    check_all(*arguments, split("uniform", 70, 4), mask=mask, dropout=0.4, seed=7)


# ---- whose rows --------------------------------------------------------------------------------


def test_one_adapter_is_lora_linear():
    x, w, a, b, bias, dy = problem(70, 40, 96, 8, 1)
    for p in (0.0, 0.5):
        ours = grads(
            lambda x, a, b, p=p: ff.lora_linear_segmented(
                x, w, a[None], b[None], torch.zeros(70, dtype=torch.int64), scale=0.7, bias=bias,
                dropout=p, seed=3,
            ),
            x, a[0], b[0], upstream=dy,
        )  # fmt: skip
        plain = grads(
            lambda x, a, b, p=p: ff.lora_linear(
                x, w, a, b, scale=0.7, bias=bias, dropout=p, seed=3
            ),
            x, a[0], b[0], upstream=dy,
        )  # fmt: skip
        for o, e in zip(ours, plain, strict=True):
            torch.testing.assert_close(o, e, rtol=1e-5, atol=1e-5)


def test_mixed_ranks_by_zeros():
    """Ranks 2, 5 and 8 padded to 8: each row as its own adapter alone gives; zeros get the gradients that
    zeros have, which the padding's owner drops."""
    x, w, a, b, _, dy = problem(40, 24, 96, 8, 3)
    ranks, adapter = (2, 5, 8), split("uniform", 40, 3)
    for i, rank in enumerate(ranks):
        a[i, rank:], b[i, :, rank:] = 0, 0
    y, _, da, db = grads(
        lambda x, a, b: ff.lora_linear_segmented(x, w, a, b, adapter, scale=scales(3)),
        x, a, b, upstream=dy,
    )  # fmt: skip
    for i, rank in enumerate(ranks):
        rows = adapter == i
        own = grads(
            lambda x, a, b, i=i: ff.lora_linear(x, w, a, b, scale=scales(3)[i].item()),
            x[rows], a[i, :rank], b[i, :, :rank], upstream=dy[rows],
        )  # fmt: skip
        torch.testing.assert_close(y[rows], own[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(da[i, :rank], own[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(db[i, :, :rank], own[3], rtol=1e-5, atol=1e-5)
        assert not da[i, rank:].any()
        assert not db[i, :, rank:].any()


def test_rows_without_an_adapter_and_adapters_without_rows():
    x, w, a, b, bias, dy = problem(40, 24, 96, 3, 6)
    adapter = torch.full((40,), -1)
    adapter[3::7] = 4
    a[:4], b[5] = float("nan"), float("inf")  # nobody may read them
    y, dx, da, db = grads(
        lambda x, a, b: ff.lora_linear_segmented(x, w, a, b, adapter, bias=bias),
        x, a, b, upstream=dy,
    )  # fmt: skip
    none = adapter < 0
    torch.testing.assert_close(y[none], functional.linear(x, w, bias)[none])
    torch.testing.assert_close(dx[none], (dy @ w)[none])
    assert not torch.equal(y[~none], functional.linear(x, w, bias)[~none])
    idle = [0, 1, 2, 3, 5]
    assert not da[idle].any()
    assert not db[idle].any()
    assert da[4].any()
    assert db[4].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_ids(dtype):
    """In any order and integer type; one a row, flat or not, or one for all rows of a sequence."""
    x, w, a, b, bias, _ = problem(24, 24, 96, 3, 4)
    adapter = split("uniform", 24, 4)
    want = ff.lora_linear_segmented(x, w, a, b, adapter, bias=bias)
    rows = x.view(2, 3, 4, 96)
    for ids in (adapter, adapter.view(2, 3, 4), torch.stack([adapter, adapter], 1)[:, 0]):
        got = ff.lora_linear_segmented(rows, w, a, b, ids.to(dtype), bias=bias)
        assert got.shape == (2, 3, 4, 24)
        assert torch.equal(got.view(24, 24), want)
    few = torch.tensor([[2, -1, 0], [3, 3, 1]])
    want = ff.lora_linear_segmented(x, w, a, b, few.flatten().repeat_interleave(4), bias=bias)
    got = ff.lora_linear_segmented(rows, w, a, b, few.to(dtype), bias=bias)
    assert torch.equal(got.view(24, 24), want)
    one = ff.lora_linear_segmented(x[3], w, a, b, adapter[3].to(dtype), bias=bias)
    torch.testing.assert_close(
        one, ff.lora_linear_segmented(x[3:4], w, a, b, adapter[3:4], bias=bias)[0]
    )


@pytest.mark.parametrize("bad", [-2, 4, 2**40, -(2**63)])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_id_out_of_range_reads_nothing(bad, backend):
    x, w, a, b, *_ = problem(6, 8, 16, 2, 4)
    adapter = torch.tensor([0, 1, bad, 2, 3, -1])
    calls = []
    with (
        ff.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (calls.append(t), t)[1], lambda t: t),
        pytest.raises(ValueError, match=f"adapter: element 2 is {bad}; allowed are 0 to 3 and -1"),
    ):
        ff.lora_linear_segmented(x.requires_grad_(), w, a, b, adapter)
    assert not calls


def test_strides():
    x, w, a, b, bias, dy = problem(40, 24, 96, 8, 3)
    adapter = split("uniform", 40, 3)
    want = grads(
        lambda x, a, b: ff.lora_linear_segmented(x, w, a, b, adapter, bias=bias),
        x, a, b, upstream=dy,
    )  # fmt: skip

    def turn(t):
        return t.mT.contiguous().mT

    got = grads(
        lambda x, a, b: ff.lora_linear_segmented(
            turn(x), turn(w), turn(a), torch.stack([b, b], -1)[..., 1], adapter.flip(0).flip(0), bias=bias
        ),
        x, a, b, upstream=turn(dy),
    )  # fmt: skip
    for g, v in zip(got, want, strict=True):
        torch.testing.assert_close(g, v, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_2_to_31_elements():
    """Two adapters 2^31 + 5 elements apart: pages in between are never touched, and need no memory."""
    apart, rank, columns = 2**31 + 5, 2, 40
    memory = mmap.mmap(-1, 2 * (apart + rank * columns))
    flat = torch.frombuffer(memory, dtype=torch.bfloat16)
    a = flat.as_strided((2, rank, columns), (apart, columns, 1))
    a.copy_(numbers(2, rank, columns))
    x, w, _, b, _, _ = problem(9, 24, columns, rank, 2, torch.bfloat16)
    adapter = split("distinct", 9, 2)
    want = ff.lora_linear_segmented(x, w, a.contiguous(), b, adapter)
    assert torch.equal(ff.lora_linear_segmented(x, w, a, b, adapter), want)


@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_same_bits_for_any_thread_count(tokens):
    """Of the narrow products; the base product is a library's."""
    x, _, a, b, _, dy = problem(tokens, 1100, 1300, 5, 7)
    segments = segmented.segment_rows(split("zipf", tokens, 7), 7)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        h, _ = segmented._shrink(x, segments, a, None)
        y = torch.zeros(tokens, 1100)
        segmented._expand(h, segments, b.mT, None, y)
        g = segmented._shrink(dy, segments, b.mT, None, h, None, turned=True)
        results.append([h, y, *g])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_touches_nothing_outside(isa, dtype, at_end):
    """Arrays that begin or end at a page that must not be touched."""

    def guarded(array):
        return between_guards(array, at_end)

    rng = np.random.default_rng(0)
    for tokens, columns, rank in ((7, 75, 3), (37, 545, 40)):
        x = guarded(rng.standard_normal((tokens, columns)).astype(dtype))
        factor = guarded(rng.standard_normal((3, rank, columns)).astype(dtype))
        wide = "float64" if dtype == "float64" else "float32"
        ids = guarded(rng.integers(-1, 3, tokens))
        order, begins = guarded(np.empty(tokens, np.int64)), guarded(np.empty(4, np.int64))
        _C.segment_rows(ids, False, tokens, 3, order, begins)
        code = {"float32": 0, "float16": 2, "float64": 3}[dtype]
        strides = tuple(s // factor.itemsize for s in factor.strides)
        for turned in (False, True):
            h, g = (guarded(rng.standard_normal((tokens, rank)).astype(wide)) for _ in range(2))
            outer, scale = guarded(np.empty((3, rank, columns), wide)), guarded(np.ones(3, wide))
            _C.segmented_shrink(
                x, code, tokens, columns, rank, order, begins, 3, factor, code, *strides, h, scale, g,
                outer, scale, turned, None, 0, 1.0, 2,
            )  # fmt: skip
            for i in range(3):
                want = g[ids == i].astype(float).T @ x[ids == i].astype(float)
                got = outer[i].reshape(columns, rank).T if turned else outer[i]
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
            _C.segmented_expand(
                h, tokens, columns, rank, order, begins, 3, factor, code, *strides, scale, x, code, None, 0,
                1.0, 2,
            )  # fmt: skip
            x[:] = 1


# ---- gradients ---------------------------------------------------------------------------------


def test_gradcheck():
    x, w, a, b, bias, _ = problem(7, 6, 10, 3, 4, torch.float64)
    adapter = split("uniform", 7, 4)
    leaves = [t.requires_grad_() for t in (x, w, a, b, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, a, b, bias: ff.lora_linear_segmented(
            x, w, a, b, adapter, scale=scales(4), bias=bias, dropout=0.3, seed=1
        ),
        leaves,
    )


@pytest.mark.parametrize("asked", ["x", "w", "a", "b", "bias", "xa", "ab", ""])
def test_only_what_is_asked_for(asked, monkeypatch):
    names = ("x", "w", "a", "b", "bias")
    x, w, a, b, bias, dy = problem(9, 24, 40, 3, 4)
    leaves = dict(zip(names, (x, w, a, b, bias), strict=True))
    asked = {n for n in names if n in (asked if asked != "bias" else ("bias",))} - (
        {"b"} if asked == "bias" else set()
    )
    whole = grads(
        lambda *t: ff.lora_linear_segmented(*t[:4], split("zipf", 9, 4), bias=t[4]),
        x, w, a, b, bias, upstream=dy,
    )  # fmt: skip
    leaves = {n: t.clone().requires_grad_(n in asked) for n, t in leaves.items()}
    y = ff.lora_linear_segmented(
        leaves["x"], leaves["w"], leaves["a"], leaves["b"], split("zipf", 9, 4), bias=leaves["bias"]
    )
    assert y.requires_grad == bool(asked)
    if asked:
        y.backward(dy)
    for n, want in zip(names, whole[1:], strict=True):
        assert (leaves[n].grad is None) == (n not in asked), n
        if n in asked:
            torch.testing.assert_close(leaves[n].grad, want, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_size_of_y_is_kept():
    x, w, a, b, _, _ = problem(64, 512, 256, 4, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ff.lora_linear_segmented(x, w, a.requires_grad_(), b, split("zipf", 64, 3))
    theirs = {t.data_ptr() for t in (x, w, a, b)}
    extra = sum(t.nbytes for t in saved if t.data_ptr() not in theirs)
    assert extra <= 64 * 4 * 4 + 64 * 8 + 100  # h, order, begins, scale


def test_double_backward_raises():
    x, w, a, b, *_ = problem(5, 8, 16, 2, 3)
    y = ff.lora_linear_segmented(x.requires_grad_(), w, a, b, split("distinct", 5, 3))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    x, w, a, b, _, dy = problem(40, 24, 96, 3, 3)
    adapter = split("zipf", 40, 3)

    def function(x, a, b):
        return ff.lora_linear_segmented(x, w, a, b, adapter, dropout=0.5)

    results = []
    for call in (function, lambda *t: checkpoint(function, *t, use_reentrant=reentrant)):
        torch.manual_seed(1)
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = call(*leaves)
        y.backward(dy)
        results.append([y.detach(), *(t.grad for t in leaves)])
    assert all(map(torch.equal, *results))


# ---- torch's machinery ---------------------------------------------------------------------------


def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        check_op = opcheck_of(dtype)
        x, w, a, b, bias, dy = problem(9, 24, 64, 3, 4, dtype)
        adapter, scale = split("uniform", 9, 4), scales(4).to(dtype)
        q = ff.quantize(w.float())
        fields = segmented.call_of(x, q, None, 0.0).values
        for weight, values in ((w, _low_rank.NO_FIELDS), (None, fields)):
            for seed, p in ((None, 0.0), (torch.tensor([5]), 0.5)):
                arguments = (x, weight, *values, a, b, adapter, scale, bias, seed, p)
                check_op(RAW.lora_linear_segmented_forward.default, arguments)
                _, *made = RAW.lora_linear_segmented_forward(*arguments)
                for needs in (15, 1, 2, 4):
                    check_op(
                        RAW.lora_linear_segmented_backward.default,
                        (dy, x, *made, weight, *values, a, b, scale, seed, p, needs),
                    )  # fmt: skip
    torch.library.opcheck(
        RAW.lora_linear_segmented.default,
        (x, w, a.requires_grad_(), b, adapter),
        {"scale": scale, "bias": bias},
    )


def test_raw_backward_follows_no_wild_index():
    x, w, a, b, _, dy = problem(9, 24, 64, 3, 4)
    _, *made = RAW.lora_linear_segmented_forward(
        x, w, *_low_rank.NO_FIELDS, a, b, split("uniform", 9, 4), scales(4), None, None, 0.0
    )
    h, order, begins = made
    for wrong in (
        (torch.full_like(order, 10**11), begins),
        (order - 1, begins),
        (order, begins + 1),
        (order, begins.flip(0)),
    ):
        with pytest.raises(ValueError, match="order, begins: not what the forward made"):
            RAW.lora_linear_segmented_backward(
                dy, x, h, *wrong, w, *_low_rank.NO_FIELDS, a, b, scales(4), None, 0.0, 15
            )


def test_compile(counter):
    """One graph for any ids, scales and dropout; the same numbers."""
    x, w, a, b, bias, dy = problem(40, 24, 96, 3, 4)

    def function(x, a, b, adapter, scale, p, seed):
        return ff.lora_linear_segmented(
            x, w, a, b, adapter, scale=scale, bias=bias, dropout=p, seed=seed
        )

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for i in range(4):
        rest = (
            split("uniform", 40, 4, seed=i),
            scales(4) * i,
            torch.tensor(0.1 * i),
            torch.tensor([i]),
        )
        got = grads(lambda *t, rest=rest: compiled(*t, *rest), x, a, b, upstream=dy)
        want = grads(lambda *t, rest=rest: function(*t, *rest), x, a, b, upstream=dy)
        for g, v in zip(got, want, strict=True):
            torch.testing.assert_close(g, v)
    assert counter.graphs == 1


def test_autocast():
    x, w, a, b, bias, _ = problem(9, 24, 64, 3, 4)
    adapter = split("uniform", 9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = ff.lora_linear_segmented(x, w, a, b, adapter, bias=bias)
    want = ff.lora_linear_segmented(x.bfloat16(), w.bfloat16(), a, b, adapter, bias=bias.bfloat16())
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, want)


def test_eager_backend():
    x, w, a, b, bias, dy = problem(40, 24, 96, 3, 4)
    adapter = split("uniform", 40, 4)

    def function(x, a, b):
        return ff.lora_linear_segmented(
            x, w, a, b, adapter, scale=scales(4), bias=bias, dropout=0.3, seed=2
        )

    ours = grads(function, x, a, b, upstream=dy)
    with ff.backend("eager"):
        plain = grads(function, x, a, b, upstream=dy)
    for o, e in zip(ours, plain, strict=True):
        torch.testing.assert_close(o, e, rtol=1e-5, atol=1e-5)


# ---- beside PEFT -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPLITS)
def test_pefts_mixed_batch(kind):
    """Equal outputs and gradients, ranks 4, 2 and 8, scales 2, 8 and 0.5."""
    peft = pytest.importorskip("peft", reason="the peer")
    x, w, a, b, _, dy = problem(24, 32, 48, 8, 3)
    ranks, alphas = (4, 2, 8), (8, 16, 4)
    linear = torch.nn.Linear(48, 32, bias=False)
    linear.weight.data.copy_(w)
    model = torch.nn.Sequential(linear)
    for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
        if i == 0:
            model = peft.get_peft_model(model, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
        a[i, rank:], b[i, :, rank:] = 0, 0
        layer = model.base_model.model[0]
        layer.lora_A[str(i)].weight.data.copy_(a[i, :rank])
        layer.lora_B[str(i)].weight.data.copy_(b[i, :, :rank])
    layer.requires_grad_(True).eval()
    adapter = split(kind, 24, 3)
    names = ["__base__" if i < 0 else str(i) for i in adapter.tolist()]
    leaf = x.clone().requires_grad_()
    theirs = layer(leaf, adapter_names=names)
    theirs.backward(dy)
    y, dx, da, db = grads(
        lambda x, a, b: ff.lora_linear_segmented(
            x, w, a, b, adapter, scale=torch.tensor(alphas) / torch.tensor(ranks)
        ),
        x, a, b, upstream=dy,
    )  # fmt: skip
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, theirs.detach(), **close)
    torch.testing.assert_close(dx, leaf.grad, **close)
    for i, rank in enumerate(ranks):
        for ours, parameter in (
            (da[i, :rank], layer.lora_A[str(i)].weight),
            (db[i, :, :rank], layer.lora_B[str(i)].weight),
        ):
            grad = torch.zeros(()) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(ours, grad.expand_as(ours), **close)


# ---- arguments ---------------------------------------------------------------------------------


def test_wrong_arguments():
    x, w, a, b, bias, _ = problem(3, 8, 16, 2, 4)
    ids = torch.tensor([0, 1, -1])
    for error, message, args, options in (
        (TypeError, "x: a tensor, not list", ([1.0], w, a, b, ids), {}),
        (TypeError, "weight: a tensor, not list", (x, [1.0], a, b, ids), {}),
        (TypeError, "lora_a: dtype torch.int64", (x, w, a.long(), b, ids), {}),
        (ValueError, r"lora_a: shape \(2, 16\); allowed: three", (x, w, a[0], b, ids), {}),
        (ValueError, r"lora_b: shape \(8, 2\); allowed: three", (x, w, a, b[0], ids), {}),
        (ValueError, r"lora_a: shape \(0, 2, 16\); allowed: three", (x, w, a[:0], b[:0], ids), {}),
        (ValueError, r"lora_b: shape \(3, 8, 2\); lora_a has 4", (x, w, a, b[:3], ids), {}),
        (ValueError, r"lora_a: shape \(2, 15\)", (x, w, a[..., :15], b, ids), {}),
        (ValueError, r"x: shape \(3, 15\); a weight", (x[:, :15], w, a, b, ids), {}),
        (TypeError, "adapter: a tensor of integers, not list", (x, w, a, b, [0, 1, 2]), {}),
        (TypeError, "adapter: dtype torch.float32", (x, w, a, b, ids.float()), {}),
        (TypeError, "adapter: dtype torch.bool", (x, w, a, b, ids > 0), {}),
        (ValueError, r"adapter: shape \(2,\); allowed: \(3,\)", (x, w, a, b, ids[:2]), {}),
        (ValueError, r"adapter: shape \(\); allowed", (x, w, a, b, ids[0]), {}),
        (ValueError, r"scale: torch.float32 \(3,\)", (x, w, a, b, ids), {"scale": scales(3)}),
        (ValueError, "scale: has no gradient", (x, w, a, b, ids),
         {"scale": scales(4).requires_grad_()}),
        (TypeError, "scale: a number", (x, w, a, b, ids), {"scale": "1"}),
        (ValueError, r"bias: shape \(7,\)", (x, w, a, b, ids), {"bias": bias[:7]}),
        (ValueError, "dropout: 2.0; allowed: 0 to 1", (x, w, a, b, ids), {"dropout": 2}),
    ):  # fmt: skip
        for name in ("auto", "eager"):
            with ff.backend(name), pytest.raises(error, match=message):
                ff.lora_linear_segmented(*args, **options)


# ---- NumPy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_numpy(dtype, p):
    """The reference, and torch's numbers."""
    import finefuse.numpy as ffn

    x, w, a, b, bias, dy = (
        t.numpy() for t in problem(33, 19, 75, 3, 4, getattr(torch, dtype), seed=1)
    )
    adapter, scale = split("uniform", 33, 4), scales(4)
    options = {"scale": scale.numpy(), "bias": bias, "dropout": p, "seed": 5}
    ours = ffn.lora_linear_segmented(
        x, w, a, b, adapter.numpy(), **options, return_grad=True, upstream=dy
    )
    arrays = (x, w, a, b, adapter.numpy(), scale.numpy())
    truth = (
        reference.lora_linear_segmented(*arrays, bias, p, 5),
        *reference.gradients(dy, *arrays, p, 5),
    )
    tensors = [torch.from_numpy(v) for v in (x, w, a, b, bias, dy)]
    plain = grads(
        lambda x, a, b: ff.lora_linear_segmented(
            x, tensors[1], a, b, adapter, scale=scale, bias=tensors[4], dropout=p, seed=5
        ),
        tensors[0], tensors[2], tensors[3], upstream=tensors[5],
    )  # fmt: skip
    for o, e, t in zip(ours, plain, truth, strict=True):
        assert str(o.dtype) == dtype
        check("numpy", o, e, t)
    few = ffn.lora_linear_segmented(
        x.reshape(3, 11, 75), w, a, b, np.array([1, -1, 3], np.int32), bias=bias
    )
    flat = ffn.lora_linear_segmented(x, w, a, b, np.repeat([1, -1, 3], 11), bias=bias)
    np.testing.assert_array_equal(few.reshape(33, 19), flat)


def test_numpy_wrong_arguments():
    import finefuse.numpy as ffn

    x, w, a, b, *_ = (t.numpy() for t in problem(3, 8, 16, 2, 4))
    ids = np.array([0, 1, -1])
    for error, message, args, options in (
        (ValueError, "adapter: element 1 is 4; allowed are 0 to 3", (x, w, a, b, ids + 3), {}),
        (ValueError, r"adapter: shape \(2,\)", (x, w, a, b, ids[:2]), {}),
        (TypeError, "adapter: ", (x, w, a, b, ids.astype(float)), {}),
        (ValueError, r"lora_a: shape \(2, 16\)", (x, w, a[0], b, ids), {}),
        (ValueError, r"scale: shape \(3,\)", (x, w, a, b, ids), {"scale": np.ones(3)}),
    ):
        with pytest.raises(error, match=message):
            ffn.lora_linear_segmented(*args, **options)
