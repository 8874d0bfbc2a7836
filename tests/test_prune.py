"""Pruning: the very mask of a stable sort, whatever the type, scope, ties, strides and threads."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse import _C
from finefuse.reference import prune as reference
from guards import between_guards
from hypothesis import given, settings
from hypothesis import strategies as st

RAW = torch.ops.finefuse
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 1, 2, 31, 257: below a vector, odd tails; 33: above the small groups; 700: rows that guess from the row
# before; 5000: more than a chunk of 4096; (2, 3, 5, 64): leading dimensions.
SHAPES = [(1,), (2,), (31,), (257,), (7, 33), (60, 700), (3, 5000), (2, 3, 5, 64), ()]
LARGE = (131, 2003)  # from 2**18 elements on the cut is looked for in a sample
SPARSITIES = [0.0, 0.03, 0.5, 0.9, 1.0]


def numbers(shape, dtype=torch.float32, kind="normal", seed=0):
    """Weights; "ties": about ten values; "special": NaN of both signs, infinities, zeros of both signs."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == "ties":
        w = (w * 2).round() / 2
    if kind == "equal":
        w = torch.full_like(w, -3.0)
    if kind == "rows":  # of different sizes, some of them zeros, some tiny: no guess is right
        w = w * torch.tensor([1.0, 1.3, 1e-7, 0.0, 40.0])[torch.arange(w.shape[0]) % 5, None]
    w = w.to(dtype)
    if kind == "special":
        flat = w.view(-1)
        flat[::7], flat[3::7], flat[5::7] = math.nan, math.inf, -0.0
        flat[1::14], flat[2::14] = -flat[0], 0.0
    return w


def array(t):
    """What the reference takes: the same numbers in a type that NumPy has."""
    t = t.detach()
    return (t if t.dtype in (torch.float64, torch.float32) else t.float()).numpy()


def truth(weight, **options):
    norm = options.pop("activation_norm", None)
    method = options.pop("method", "magnitude")
    scope = options.pop("scope", None) or ("row" if method == "wanda" else "tensor")
    if norm is not None:
        norm = array(norm.to(torch.float64 if weight.dtype is torch.float64 else torch.float32))
    return torch.from_numpy(
        reference.prune_mask(array(weight), scope=scope, activation_norm=norm, **options)
    )


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def check(weight, **options):
    """The mask is the reference's; prune_ writes +0 where it is False and nothing elsewhere."""
    want = truth(weight, **options)
    mask = ff.prune_mask(weight, **options)
    assert mask.dtype is torch.bool
    assert mask.is_contiguous()
    assert not mask.requires_grad
    assert torch.equal(mask, want), f"{(mask != want).sum()} of {mask.numel()}, {options}"
    pruned = weight.detach().clone()
    assert ff.prune_(pruned, **options) is pruned
    assert torch.equal(bits(pruned), torch.where(want, bits(weight), 0)), options


def with_norm(shape, seed=1):
    columns = shape[-1] if shape else 1
    norm = torch.rand(columns, generator=torch.Generator().manual_seed(seed))
    norm[columns // 2] = 0.0
    return {"method": "wanda", "activation_norm": norm}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "special"])
def test_sparsity(isa, dtype, kind):
    # none and all ask nothing of the numbers; NaN is what the two ends must order
    some = SPARSITIES if kind in ("normal", "special") else SPARSITIES[1:-1:2]
    for shape in SHAPES:
        weight = numbers(shape, dtype, kind)
        for scope in ("tensor", "row"):
            for sparsity in some:
                check(weight, sparsity=sparsity, scope=scope)
            check(weight, sparsity=0.4, scope=scope, **with_norm(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_unlike_each_other(isa, dtype):
    for shape in ((25, 600), (9, 4097)):
        weight = numbers(shape, dtype, "rows")
        for sparsity in (0.02, 0.5, 0.97):
            check(weight, sparsity=sparsity, scope="row")
        check(weight, sparsity=0.5, **with_norm(shape))


# The sample is of keys of 16, 32 or 64 bits, in one code: every type with what is usual and with what is hard
# (equals, odd numbers), the rest with the shortest and the longest mantissa of 32 bits and less.
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *((d, k) for d in DTYPES for k in ("normal", "special")),
        *((d, k) for d in DTYPES[:2] for k in ("ties", "equal", "rows", "sorted")),
    ],
    ids=str,
)
def test_large(isa, dtype, kind):
    weight = numbers(LARGE, dtype, "normal" if kind == "sorted" else kind)
    if kind == "sorted":  # a sample of stretches sees all of it
        weight = weight.view(-1).sort().values.view(LARGE)
    for sparsity in (0.001, 0.6, 0.999):
        check(weight, sparsity=sparsity)
    check(weight, sparsity=0.5, scope="tensor", **with_norm(LARGE))


def test_one_long_row(isa):
    check(numbers((1, 300_007)), sparsity=0.5, scope="row")
    check(numbers((2, 270_001), torch.bfloat16), sparsity=0.3, scope="row")
    check(numbers((100_003,)), sparsity=0.5)
    check(numbers((1, 2 * 270_000)), n=100_000, m=270_000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_in_which_the_sample_is_misled(isa, dtype):
    """A sample that finds only zeros, or a cut in a crowd of equals: all is counted."""
    weight = torch.zeros(LARGE, dtype=dtype)
    weight[:, -1] = numbers(LARGE[:1], dtype)
    check(weight, sparsity=1 - 60 / weight.numel())
    half = numbers(LARGE, dtype)
    ff.prune_(half, sparsity=0.5)
    check(half, sparsity=0.4)
    check(half, sparsity=0.5)
    check(half, sparsity=0.6)


@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5), (1, 2), (2, 2), (0, 3), (7, 16), (20, 40)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_n_of_m(isa, dtype, n, m):
    # one group, an odd few, more than a vector's and a thread's; groups know nothing of each other, so that
    # the many hold enough of every kind
    for kind, rows, groups in (
        ("normal", 1, 1), ("normal", 3, 7), ("ties", 5, 211), ("special", 5, 211), ("ties", 2, 1100),
    ):  # fmt: skip
        weight = numbers((rows, groups * m), dtype, kind)
        check(weight, n=n, m=m)
        check(weight, n=n, m=m, **with_norm(weight.shape))
        mask = ff.prune_mask(weight, n=n, m=m)
        assert (mask.view(-1, m).sum(-1) == n).all()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 2**31))
def test_counts(count, sparsity, seed):
    weight = numbers((count,), seed=seed)
    pruned = int((~ff.prune_mask(weight, sparsity=sparsity)).sum())
    assert pruned == min(math.floor(sparsity * count + 1e-9), count)
    some = seed % (count + 1)  # a share that is some/count, rounded, takes that many
    assert int((~ff.prune_mask(weight, sparsity=some / count)).sum()) == some


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from(DTYPES))
    kind = data.draw(st.sampled_from(["normal", "ties", "special"]))
    weight = numbers(
        shape, dtype, kind if math.prod(shape) else "normal", data.draw(st.integers(0, 99))
    )
    options = {}
    if data.draw(st.booleans()) and shape[-1]:
        options |= with_norm(shape)
    if data.draw(st.booleans()):
        m = data.draw(st.sampled_from([m for m in range(1, 41) if shape[-1] % m == 0]))
        options |= {"n": data.draw(st.integers(0, m)), "m": m}
    else:
        options |= {"sparsity": data.draw(st.floats(0, 1))}
        options |= {"scope": data.draw(st.sampled_from(["tensor", "row", None]))}
    check(weight, **options)


def test_empty():
    for shape in ((0,), (3, 0), (0, 8)):
        for options in ({"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"n": 2, "m": 4}):
            weight = torch.empty(shape)
            assert ff.prune_mask(weight, **options).shape == shape
            assert ff.prune_(weight, **options) is weight
    q = ff.quantize(torch.empty(0, 8))
    assert ff.prune_mask(q, sparsity=0.5).shape == (0, 8)
    assert ff.prune_(q, sparsity=0.5) is q


def test_nothing_beyond_the_ends_is_touched(isa):
    for dtype in (np.float32, np.float16, np.float64):
        for shape in ((1, 1), (3, 37), (5, 4099), LARGE):
            for at_end in (False, True):
                w = between_guards(
                    np.random.default_rng(0).standard_normal(shape).astype(dtype), at_end
                )
                norm = between_guards(
                    np.ones(shape[-1], np.float64 if dtype is np.float64 else np.float32), at_end
                )
                mask = between_guards(np.zeros(shape, np.bool_), at_end)
                code = {np.float32: 0, np.float16: 2, np.float64: 3}[dtype]
                for scope, length in ((0, w.size), (1, shape[-1])):
                    for given_norm in (None, norm):
                        _C.prune(
                            w, code, *shape, scope, length // 2, 0, given_norm, mask, False, None, 2
                        )
                        assert int((mask == 0).sum()) == w.size // length * (length // 2)
                _C.prune(w, code, *shape, 1, shape[-1] // 2, 0, None, None, True, None, 2)
    for width in (2, 3, 4, 8):
        for count in (1, 7, 8, 4099):
            size = -(-count // 8) * 3 if width == 3 else -(-count * width // 8)
            codes = between_guards(np.full(size, 255, np.uint8), True)
            mask = between_guards(np.zeros(count, np.bool_), True)
            _C.prune_codes(codes, count, width, 0, mask, 2)
            assert sum(bin(b).count("1") for b in codes) == size * 8 - count * width


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype):
    weight = numbers((400, 1003), dtype, "ties")
    want = None
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        masks = [ff.prune_mask(weight, sparsity=0.5, scope=s) for s in ("tensor", "row")]
        masks += [
            ff.prune_mask(weight[:, :1000], n=2, m=4),
            ff.prune_(weight.clone(), sparsity=0.3) != 0,
        ]
        want = want or masks
        assert all(map(torch.equal, masks, want))


# ---- tensors as users have them ------------------------------------------------------------------


def test_strides(isa):
    base = numbers((12, 10, 64))
    for name, view in {
        "transposed": base[0].t(),
        "every other": base[::2, 1::3],
        "columns": base[..., ::2],
        "permuted": base.permute(2, 0, 1),
        "one of each": base[:, :1, 5:6],
        "offset": base[3:, 2:],
    }.items():
        for options in ({"sparsity": 0.4}, {"sparsity": 0.4, "scope": "row"}):
            assert torch.equal(ff.prune_mask(view, **options), truth(view, **options)), name
            whole = base.clone()
            again = torch.as_strided(whole, view.size(), view.stride(), view.storage_offset())
            want = torch.where(truth(view, **options), view, 0)
            assert ff.prune_(again, **options) is again
            assert torch.equal(again, want), name
            untouched = base.clone()
            torch.as_strided(untouched, view.size(), view.stride(), view.storage_offset()).copy_(
                want
            )
            assert torch.equal(whole, untouched), name


def test_shared_memory_is_refused():
    weight = torch.randn(8).expand(4, 8)
    assert ff.prune_mask(weight, sparsity=0.5).shape == (4, 8)
    for backend in ("auto", "eager"):
        with (
            ff.backend(backend),
            pytest.raises(ValueError, match="weight: its elements share memory"),
        ):
            ff.prune_(weight, sparsity=0.5)


def test_parameters_and_autograd():
    layer = torch.nn.Linear(16, 8)
    want = truth(layer.weight, sparsity=0.5)
    version = layer.weight._version
    assert ff.prune_(layer.weight, sparsity=0.5) is layer.weight
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    assert layer.weight._version > version
    assert torch.equal(layer.weight != 0, want)
    mask = ff.prune_mask(layer.weight, n=2, m=4)
    assert not mask.requires_grad
    assert mask.grad_fn is None
    w = torch.randn(4, 8, requires_grad=True)  # one that a graph has saved
    y = (w * w).sum()
    ff.prune_(w, sparsity=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    w = torch.randn(4, 8, requires_grad=True)  # a view of a leaf
    ff.prune_(w[1:], sparsity=0.5)
    assert int((w[1:] == 0).sum()) == 12
    assert int((w[0] == 0).sum()) == 0
    with torch.inference_mode():
        inference = torch.randn(4, 8)
        assert int((ff.prune_(inference, sparsity=0.5) == 0).sum()) == 16


def test_l1_unstructured():
    """torch's own pruning, where no two magnitudes are equal."""
    from torch.nn.utils import prune

    for sparsity in (0.1, 0.5, 0.83):
        layer = torch.nn.Linear(40, 25)
        mask = ff.prune_mask(layer.weight, sparsity=sparsity)
        prune.l1_unstructured(layer, "weight", amount=math.floor(sparsity * 1000 + 1e-9))
        assert torch.equal(mask, layer.weight_mask.bool())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_semi_structured(dtype):
    """What torch packs for sparse tensor cores, in its own conversion, which runs on CPUs too."""
    from torch.sparse import _semi_structured_conversions as conversions

    # n:m of bytes: in float32 torch packs one of two
    n, m = (1, 2) if dtype is torch.float32 else (2, 4)
    weight = ff.prune_(numbers((64, 128), dtype, "ties"), n=n, m=m)
    assert ((weight != 0).view(-1, m).sum(-1) <= n).all()
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert packed.shape == (64, 64)
    back = conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
    assert torch.equal(back, weight)


def test_wanda_is_the_papers_formula():
    """Random rows, as its repository sorts them; the norm of a batch of activations."""
    x, weight = numbers((3, 50, 64), seed=3), numbers((24, 64))
    norm = x.flatten(0, 1).norm(dim=0)
    metric = weight.abs() * norm
    theirs = torch.ones_like(weight, dtype=torch.bool)
    theirs.scatter_(1, metric.sort(stable=True, dim=-1)[1][:, :32], False)
    assert torch.equal(
        ff.prune_mask(weight, sparsity=0.5, method="wanda", activation_norm=norm), theirs
    )


def test_the_norms_type():
    weight, norm = numbers((5, 64)), torch.rand(64)
    want = ff.prune_mask(weight, sparsity=0.5, method="wanda", activation_norm=norm)
    for other in (norm.double(), norm.repeat_interleave(2)[::2], norm.clone().requires_grad_()):
        got = ff.prune_mask(weight, sparsity=0.5, method="wanda", activation_norm=other)
        assert torch.equal(got, want)


# ---- packed weights --------------------------------------------------------------------------------

CODES = {
    "nf4": "nf4", "fp4": "fp4", "dynamic8": "dynamic8", "int4": "int4",
    "2 bits": torch.tensor([-1.0, 0.0, 0.3, 1.0]),
    "3 bits": torch.tensor([-1.0, -0.6, -0.3, -0.1, 0.0, 0.2, 0.55, 1.0]),
}  # fmt: skip


# How absmax is kept is the decoder's business: once with it quantised.
@pytest.mark.parametrize(
    ("name", "double_quant"), [*((name, False) for name in CODES), ("nf4", True)]
)
def test_codebooks(isa, name, double_quant):
    # 37·75: an odd count, rows that do not fill bytes; 1: one code in a byte
    for shape in ((1,), (37, 75), (3, 5, 8), (60, 700)):
        for options in (
            {"sparsity": 0.6},
            {"sparsity": 0.3, "scope": "row"},
            with_norm(shape) | {"sparsity": 0.5},
        ):
            q = ff.quantize(numbers(shape), CODES[name], 32, double_quant)
            before, absmax = ff.dequantize(q), q.absmax.clone()
            want = truth(before, **options)
            assert torch.equal(ff.prune_mask(q, **options), want)
            version = q.codes._version
            assert ff.prune_(q, **options) is q
            assert q.codes._version > version
            assert torch.equal(ff.dequantize(q), torch.where(want, before, 0))
            assert torch.equal(q.absmax, absmax)
            fresh = ff.quantize(numbers(shape), CODES[name], 32, double_quant)
            with ff.backend("eager"):
                ff.prune_(fresh, **options)
            assert torch.equal(fresh.codes, q.codes)  # the padding too


def test_codebook_linear_layers():
    layer = ff.nn.CodebookLinear.from_linear(torch.nn.Linear(64, 32))
    ff.prune_(layer.weight, n=2, m=4)
    weight = ff.dequantize(layer.weight)
    assert ((weight != 0).view(-1, 4).sum(-1) <= 2).all()
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ weight.t() + layer.bias)


def test_a_codebook_without_a_zero():
    q = ff.quantize(numbers((4, 64)), torch.linspace(-1, 1, 16))
    before = q.codes.clone()
    for backend in ("auto", "eager"):
        with (
            ff.backend(backend),
            pytest.raises(ValueError, match="weight: its codebook has no exact 0"),
        ):
            ff.prune_(q, sparsity=0.5)
    assert torch.equal(q.codes, before)
    assert ff.prune_mask(q, sparsity=0.5).shape == (4, 64)


# ---- torch's own checks, compile, eager ------------------------------------------------------------


def raw_calls(grad=False):
    weight = numbers((6, 16)).requires_grad_(grad)
    norm = torch.rand(16)
    for given_norm, args in (
        (None, (0.5, 0, 0, 0)),
        (norm, (0.25, 0, 0, 1)),
        (norm, (0.0, 2, 4, 2)),
    ):
        yield RAW.prune_mask_forward.default, (weight, given_norm, *args)
        yield RAW.prune_zero.default, (weight, given_norm, *args)
    q = ff.quantize(numbers((6, 16)))
    yield RAW.prune_codes.default, (q.codes, q.code, numbers((6, 16)) > 0)


@pytest.mark.parametrize("case", range(len(list(raw_calls()))))
def test_opcheck(case):
    op, args = list(raw_calls())[case]
    torch.library.opcheck(op, args)


def test_raw_ops_have_no_gradient():
    for op, args in raw_calls(grad=True):
        if op is RAW.prune_zero.default:
            with pytest.raises(RuntimeError, match="is a raw op that writes"):
                op(*args)


def test_composites():
    weight, norm = numbers((6, 16)), torch.rand(16)
    options = {"sparsity": 0.5, "method": "wanda", "activation_norm": norm}
    torch.library.opcheck(RAW.prune_mask.default, (weight,), options)
    assert torch.equal(RAW.prune_mask(weight, **options), ff.prune_mask(weight, **options))
    again = weight.clone()
    assert RAW.prune_(again, n=2, m=4) is again
    assert torch.equal(again, ff.prune_(weight, n=2, m=4))


def test_compile(counter):
    def step(w, sparsity):
        return w * ff.prune_mask(w, sparsity=sparsity, scope="row")

    def in_place(w, norm):
        ff.prune_(w, n=2, m=4, method="wanda", activation_norm=norm)
        return w * 2

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for i in range(10):  # one graph, whatever the sparsity
        w, sparsity = numbers((6, 16), seed=i), torch.tensor(i / 10)
        assert torch.equal(compiled(w, sparsity), step(w, sparsity))
    assert counter.graphs == 1
    w, norm = numbers((6, 16)), torch.rand(16)
    want_w = w.clone()
    want = in_place(want_w, norm)
    got = torch.compile(in_place, fullgraph=True)(w, norm)
    assert torch.equal(got, want)
    assert torch.equal(w, want_w)


def test_compile_packed():
    torch._dynamo.reset()
    q, same = (ff.quantize(numbers((8, 64))) for _ in range(2))
    # the graphs are of raw ops alone: Inductor, as above, has nothing to add
    compiled = torch.compile(
        lambda q: ff.prune_mask(q, sparsity=0.5), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(q), ff.prune_mask(q, sparsity=0.5))

    def prune(q, x):
        ff.prune_(q, sparsity=0.5)
        return x + 1

    torch.compile(prune, backend="aot_eager", fullgraph=True)(q, torch.ones(1))
    assert torch.equal(q.codes, ff.prune_(same, sparsity=0.5).codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_backend(dtype):
    with ff.backend("eager"):
        for kind in ("normal", "ties", "special"):
            weight = numbers((12, 40), dtype, kind)
            for options in ({"sparsity": 0.3}, {"sparsity": 0.3, "scope": "row"}, {"n": 3, "m": 5}):
                check(weight, **options)
                check(weight, **options, **with_norm((12, 40)))
        check(numbers((0, 4), dtype), sparsity=0.5)
        compiled = torch.compile(
            lambda w, s: ff.prune_mask(w, sparsity=s), backend="eager", fullgraph=True
        )
        assert torch.equal(compiled(weight, torch.tensor(0.4)), truth(weight, sparsity=0.4))


def test_meta():
    assert ff.prune_mask(torch.empty(3, 8, device="meta"), n=2, m=4).is_meta


# ---- wrong arguments -------------------------------------------------------------------------------

W = torch.ones(2, 6)


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        ([1.0], {"sparsity": 0.5}, TypeError, "weight: a tensor, not list"),
        (torch.ones(3, dtype=torch.int64), {"sparsity": 0.5}, TypeError, "weight: dtype torch.int64"),
        (W, {}, ValueError, "sparsity: None; give sparsity, or n and m"),
        (W, {"sparsity": 0.5, "n": 2, "m": 3}, ValueError, "sparsity: given together with n or m"),
        (W, {"sparsity": 1.5}, ValueError, "sparsity: 1.5; allowed: 0 to 1"),
        (W, {"sparsity": -0.1}, ValueError, "sparsity: -0.1; allowed: 0 to 1"),
        (W, {"sparsity": math.nan}, ValueError, "sparsity: nan; allowed: 0 to 1"),
        (W, {"sparsity": "half"}, TypeError, "sparsity: a number or a 0-d tensor, not 'half'"),
        (W, {"n": 2}, TypeError, "m: an int, not None; n and m go together"),
        (W, {"m": 2}, TypeError, "n: an int, not None; n and m go together"),
        (W, {"n": 1.0, "m": 2}, TypeError, "n: an int, not 1.0"),
        (W, {"n": True, "m": 2}, TypeError, "n: an int, not True"),
        (W, {"n": 3, "m": 2}, ValueError, "n: 3; allowed: 0 to m, 2"),
        (W, {"n": -1, "m": 2}, ValueError, "n: -1; allowed: 0 to m, 2"),
        (W, {"n": 0, "m": 0}, ValueError, "m: 0; allowed: 1 and above"),
        (W, {"n": 2, "m": 4}, ValueError, "m: 4; rows of 6 elements are no multiple of it"),
        (W, {"n": 1, "m": 2, "scope": "row"}, ValueError, "scope: 'row'; with n and m"),
        (W, {"sparsity": 0.5, "scope": "group"}, ValueError, "scope: 'group'; allowed: 'tensor',"),
        (W, {"sparsity": 0.5, "method": "sparsegpt"}, ValueError, "method: 'sparsegpt'; allowed"),
        (W, {"sparsity": 0.5, "method": "wanda"}, ValueError, "activation_norm: None; method"),
        (W, {"sparsity": 0.5, "activation_norm": W[0]}, ValueError, "activation_norm: only of use with"),
    ],
)  # fmt: skip
def test_wrong_arguments(weight, options, error, message):
    for function in (ff.prune_mask, ff.prune_):
        with pytest.raises(error, match=re.escape(message)):
            function(weight, **options)
    assert (W == 1).all()


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        ([1.0], TypeError, "activation_norm: a tensor, not list"),
        (torch.ones(6, dtype=torch.int32), TypeError, "activation_norm: dtype torch.int32"),
        (torch.ones(5), ValueError, "activation_norm: shape (5,); allowed: (6,)"),
        (torch.ones(1, 6), ValueError, "activation_norm: shape (1, 6); allowed: (6,)"),
        (torch.tensor([1.0, 1, 1, 1, 1, -1]), ValueError, "activation_norm: an element is negative or NaN"),
        (torch.full((6,), math.nan), ValueError, "activation_norm: an element is negative or NaN"),
        (torch.ones(6, device="meta"), ValueError, "activation_norm: on meta; weight is on cpu"),
    ],
)  # fmt: skip
def test_wrong_norms(norm, error, message):
    for function in (ff.prune_mask, ff.prune_):
        with pytest.raises(error, match=re.escape(message)):
            function(W, sparsity=0.5, method="wanda", activation_norm=norm)
    assert (W == 1).all()


def test_wrong_codes():
    q = ff.quantize(numbers((4, 8)), blocksize=16)
    mask = torch.ones(4, 8, dtype=torch.bool)
    for args, error, message in (
        (
            (q.codes.int(), q.code, mask),
            TypeError,
            "codes: dtype torch.int32; allowed: torch.uint8",
        ),
        (
            (q.codes, q.code.double(), mask),
            TypeError,
            "code: dtype torch.float64; allowed: torch.float32",
        ),
        ((q.codes, q.code, mask.int()), TypeError, "mask: dtype torch.int32; allowed: torch.bool"),
        ((q.codes, q.code[:5], mask), ValueError, "code: 5; allowed: 4, 8, 16 or 256 entries"),
        ((q.codes, q.code, mask[:3]), ValueError, "codes: 16 bytes; 24 elements take 12"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            RAW.prune_codes(*args)


def test_a_norm_that_is_a_part_of_the_weight():
    weight = torch.rand(6, 64) + 0.1
    options = {"sparsity": 0.5, "method": "wanda"}
    want = torch.where(ff.prune_mask(weight, activation_norm=weight[0], **options), weight, 0)
    assert torch.equal(ff.prune_(weight, activation_norm=weight[0], **options), want)
