"""The kernels of `segmented` for GPUs, CUDA and Triton: every row follows the error rule with its own
adapter, whatever the order of the rows, and no row touches another's.

Without a GPU the CUDA kernels run thread by thread on the CPU and Triton's in its interpreter, which
truncates when it stores bfloat16.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")

import finefuse as ff
import segmented_cases as layer
from conftest import GPU
from finefuse._backend import FLAGS
from finefuse.reference import lora as reference
from low_rank_cases import DTYPES, grads, numbers
from low_rank_kernels import CODES, Kernels, guarded, module_of
from tolerances import check

# NumPy's, from Triton's interpreter: the products of Philox overflow
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BAD_ADAPTER = 3  # csrc/core/place.h, enum Flag


def wide_of(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def segments(ids, adapters):
    """(order, begins) as on a GPU: rows without an adapter, by adapter, of adapters that are not there."""
    keys = torch.where((ids >= -1) & (ids < adapters), ids, adapters)
    keys, order = torch.sort(keys, stable=True)
    return order, torch.searchsorted(keys, torch.arange(adapters + 1))


class SegmentedKernels(Kernels):
    """A backend's kernels on CPU tensors; outputs are filled with rubbish before."""

    def shrink(
        self, x, ids, factor=None, h_scale=None, g=None, outer_scale=None, seed=None, p=0.0, turned=False
    ):  # fmt: skip
        """factor (adapters, rank, columns); (h, outer), each None where nothing was given for it."""
        adapters, rank = len(factor), factor.shape[1]
        wide, (tokens, columns) = wide_of(x.dtype), x.shape
        h = self.rubbish(tokens, rank, dtype=wide)
        outer = None if g is None else self.rubbish(adapters, rank, columns, dtype=wide)
        optional = [None if t is None else self.put(t) for t in (h_scale, g, outer_scale)]
        self.module.segmented_shrink(
            self.put(x), CODES[x.dtype], tokens, columns, rank, *map(self.put, segments(ids, adapters)),
            adapters, self.put(factor), CODES[factor.dtype], *factor.stride(), h, optional[0],
            optional[1], outer, optional[2], turned, *self.dropout(seed, p), self.place(),
        )  # fmt: skip
        if outer is not None and turned:
            outer = outer.view(adapters, columns, rank).transpose(1, 2)
        return h.cpu(), None if outer is None else outer.cpu()

    def expand(self, h, ids, factor, y, scale=None, seed=None, p=0.0):
        """(y after, flags); y is left as it was."""
        (adapters, rank, columns), place = factor.shape, self.place()
        out = self.put(y.clone())
        self.module.segmented_expand(
            self.put(h), len(h), columns, rank, *map(self.put, segments(ids, adapters)), adapters,
            self.put(factor), CODES[factor.dtype], *factor.stride(),
            None if scale is None else self.put(scale), out, CODES[y.dtype], *self.dropout(seed, p), place,
        )  # fmt: skip
        return out.cpu(), place[1].tolist()


@pytest.fixture(params=["cuda", "triton"])
def kernels(request) -> SegmentedKernels:
    return SegmentedKernels(request.param, module_of("segmented", request))


def same(kernels, ours, want):
    """Bit for bit; Triton's interpreter multiplies with NumPy: a row's bits depend on its neighbours."""
    if kernels.backend == "cuda" or GPU:
        assert torch.equal(ours, want)
    else:
        torch.testing.assert_close(ours, want)


def some_ids(tokens, adapters, seed=0):
    """A row in six has no adapter, a row in three the last one, so that some have none and one has many."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, adapters, (tokens,), generator=random)
    which = torch.randint(0, 6, (tokens,), generator=random)
    return torch.where(which == 0, -1, torch.where(which < 3, adapters - 1, ids))


def formulas(x, ids, factor, scales, g, h, y, mask, wide):
    """(h, outer, y) a row at a time; scales of each; the mask is D's on x as on the update of y."""
    adapters, rank, columns = factor.shape
    f, d = factor.to(wide), x.to(wide) * mask
    out_h = torch.zeros(len(x), rank, dtype=wide)
    outer = torch.zeros(adapters, rank, columns, dtype=wide)
    out_y = y.to(wide).clone()
    for t, a in enumerate(ids.tolist()):
        if a >= 0:
            h_scale, outer_scale, y_scale = (s[a].to(wide) for s in scales)
            out_h[t] = h_scale * (f[a] @ d[t])
            outer[a] += outer_scale * torch.outer(g[t].to(wide), d[t])
            out_y[t] += y_scale * (h[t].to(wide) @ f[a]) * mask[t]
    return out_h, outer, out_y


def compare(
    kernels, tokens, columns, adapters, rank, dtype, factor_dtype, seed=None, change=None, scaled=True,
    has_outer=True,
):  # fmt: skip
    """The error rule for h, outer and y."""
    wide, p = wide_of(dtype), 0.0 if seed is None else 0.5
    ids = some_ids(tokens, adapters)
    x, y = numbers(tokens, columns, dtype=dtype), numbers(tokens, columns, dtype=dtype, seed=1)
    factor = numbers(adapters, rank, columns, dtype=factor_dtype, seed=2)
    g, h = (numbers(tokens, rank, dtype=wide, seed=s) for s in (3, 4))
    scales = [numbers(adapters, dtype=wide, seed=s) if scaled else None for s in (5, 6, 7)]
    ones = [torch.ones(adapters, dtype=wide) if s is None else s for s in scales]
    mask = torch.ones(tokens, columns)
    if seed is not None:
        mask = torch.from_numpy(reference.keep_mask((tokens, columns), p, seed))
    plain, truth = (
        formulas(x, ids, factor, ones, g, h, y, mask.to(to), to) for to in (wide, torch.float64)
    )
    ours_factor = factor if change is None else change(factor)
    ours = (
        *kernels.shrink(
            x,
            ids,
            ours_factor,
            scales[0],
            g if has_outer else None,
            scales[1],
            seed,
            p,
            turned=scaled,
        ),
        kernels.expand(h, ids, ours_factor, y, scales[2], seed, p)[0],
    )
    for what, o, e, t in zip(("h", "outer", "y"), ours, plain, truth, strict=True):
        if o is not None:
            check(what, o, e.to(o.dtype), t)
    none = ids < 0
    assert (ours[0][none] == 0).all()
    assert torch.equal(ours[2][none], y[none])
    if has_outer:
        unused = torch.ones(adapters, dtype=torch.bool)
        unused[ids[~none]] = False
        assert (ours[1][unused] == 0).all()


# Few rows an adapter, more adapters than rows, and CUDA's tiles of many rows (33 and 70: a tile of 16 or
# 32 and a rest; 2 and 3 adapters). columns 75: no row is aligned; 264: a span of 256 and a rest; 40: whole
# lanes, less than a warp. Triton's tiles have 64, and its interpreter takes its time. ranks: one, whole
# eights and sixteens, a rest.
SHAPES = [(1, 40, 1, 1), (9, 264, 5, 36), (7, 75, 12, 3), (70, 24, 3, 9), (33, 264, 2, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "columns", "adapters", "rank"), SHAPES)
def test_shapes(kernels, tokens, columns, adapters, rank, dtype):
    if kernels.backend == "triton":
        columns = min(columns, 72)
        if dtype is torch.float16 and columns != 40:
            pytest.skip("bfloat16's kernels")
    compare(kernels, tokens, columns, adapters, rank, dtype, dtype)
    if dtype is torch.bfloat16:
        rank = min(rank, 16)  # more has lora's kernels
        compare(kernels, tokens, columns, adapters, rank, dtype, torch.float32, scaled=False)


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_types(kernels, dtype, factor_dtype):
    if kernels.backend != "cuda":
        pytest.skip("lora's products, which are tried there")
    compare(kernels, 40, 24, 2, 5, dtype, factor_dtype)
    compare(kernels, 4, 24, 2, 5, dtype, factor_dtype, scaled=False)


# More adapters than CUDA's search has threads, and than Triton's has numbers: fewer rows than adapters, where
# a program stands for a row; and more, where tiles of adapters without rows end at once.
@pytest.mark.parametrize(("tokens", "adapters"), [(5, 1100), (450, 300)])
def test_many_adapters(kernels, tokens, adapters):
    if tokens > 100 and kernels.backend != "cuda":
        pytest.skip("the same tiles with fewer rows in test_shapes")
    compare(kernels, tokens, 8, adapters, 2, torch.float32, torch.float32, has_outer=tokens > 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(5, 75), (40, 40)])
def test_dropout(kernels, tokens, columns, dtype):
    compare(kernels, tokens, columns, 2, 3, dtype, dtype, seed=-77)


def test_strides(kernels):
    """lora_b turned, adapters and columns with gaps between them."""

    def turned(f):
        return f.mT.contiguous().mT

    def spaced(f):
        return torch.stack([f, f], -1)[..., 0]

    def padded(f):
        return torch.cat([f, f, f], 1)[:, : f.shape[1]]

    for change in (turned, spaced, padded):
        for tokens in (5, 40):
            compare(kernels, tokens, 40, 2, 8, torch.bfloat16, torch.bfloat16, change=change)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(7, 75), (7, 264), (40, 24)])
def test_adapters_that_are_not_there(kernels, tokens, columns, dtype):
    """Their rows become NaN and are flagged; their neighbours are what they are without them."""
    if kernels.backend == "triton" and (columns == 264 or dtype is torch.float16):
        pytest.skip("the same kernels with fewer columns, and with bfloat16")
    adapters, rank, wide = 2, 5, wide_of(dtype)
    ids = some_ids(tokens, adapters)
    x, y = numbers(tokens, columns, dtype=dtype), numbers(tokens, columns, dtype=dtype, seed=1)
    factor, h = numbers(adapters, rank, columns, dtype=dtype), numbers(tokens, rank, dtype=wide)
    g = numbers(tokens, rank, dtype=wide, seed=2)
    want, flags = kernels.expand(h, ids, factor, y)
    assert flags == [0] * len(FLAGS)
    for bad in (adapters, -2) if tokens < 10 else (2**62, -(2**62)):
        wrong = ids.clone()
        wrong[[0, tokens // 2]] = bad
        right = ids.clone()
        right[[0, tokens // 2]] = -1
        got, flags = kernels.expand(h, wrong, factor, y)
        assert flags == [int(i == BAD_ADAPTER) for i in range(len(FLAGS))]
        assert got[[0, tokens // 2]].isnan().all()
        others = [t for t in range(tokens) if t not in (0, tokens // 2)]
        same(kernels, got[others], want[others])
        ours, outer = kernels.shrink(x, wrong, factor, g=g)
        assert (ours[[0, tokens // 2]] == 0).all()
        for o, w in zip((ours, outer), kernels.shrink(x, right, factor, g=g), strict=True):
            same(kernels, o, w)


def test_all_rows_alike(kernels):
    """One adapter has them all; none; all of them wrong; without rows, and with rows that have no columns."""
    x, y, h = numbers(40, 24), numbers(40, 24, seed=1), numbers(40, 3, seed=2)
    factor = numbers(3, 3, 24, seed=3)
    for adapter in (0, 2):
        ids = torch.full((40,), adapter)
        check("h", kernels.shrink(x, ids, factor)[0], x @ factor[adapter].t(),
              x.double() @ factor[adapter].double().t())  # fmt: skip
    none, flags = kernels.expand(h, torch.full((40,), -1), factor, y)
    assert torch.equal(none, y)
    assert not any(flags)
    wrong, flags = kernels.expand(h, torch.full((40,), 3), factor, y)
    assert wrong.isnan().all()
    assert flags[BAD_ADAPTER]
    nothing = torch.zeros(0, dtype=torch.int64)
    ours, outer = kernels.shrink(x[:0], nothing, factor, g=h[:0])
    assert ours.shape == (0, 3)
    assert (outer == 0).all()
    assert kernels.expand(h[:0], nothing, factor, y[:0])[0].shape == (0, 24)
    ours, outer = kernels.shrink(x[:2, :0], torch.tensor([0, -1]), factor[:, :, :0], g=h[:2])
    assert (ours == 0).all()
    empty = kernels.shrink(x[:2], torch.tensor([-1, 0]), factor[:0])[0]  # no adapter is there
    assert (empty == 0).all()
    spoilt, flags = kernels.expand(h[:2], torch.tensor([-1, 0]), factor[:0], y[:2])
    assert torch.equal(spoilt[0], y[0])
    assert spoilt[1].isnan().all()
    assert flags[BAD_ADAPTER]


@pytest.mark.skipif(GPU, reason="guard pages are the CPU's; on a GPU compute-sanitizer looks")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nothing_out_of_bounds(kernels, dtype, at_end):
    guards = SegmentedKernels(kernels.backend, kernels.module, lambda t: guarded(t, at_end))
    wide = wide_of(dtype)
    shapes = [(1, 1, 1, 1), (6, 43, 9, 5), (35, 264, 2, 9)]
    if kernels.backend == "triton":
        shapes[1:] = [(6, 43, 3, 5), (35, 66, 1, 9)]
    for tokens, columns, adapters, rank in shapes:
        x, factor = (
            numbers(tokens, columns, dtype=dtype),
            numbers(adapters, rank, columns, dtype=dtype),
        )
        h, scale = numbers(tokens, rank, dtype=wide), numbers(adapters, dtype=wide)
        ids = some_ids(tokens, adapters)
        ids[-1] = adapters
        there = ids < adapters
        for seed, f in ((None, factor), (7, factor.mT.contiguous().mT)):
            for array in guards.shrink(x, ids, f, scale, h, scale, seed, 0.5):
                assert torch.isfinite(array).all()
            y, _ = guards.expand(h, ids, f, x, scale, seed, 0.5)
            assert torch.isfinite(y[there]).all()
            assert y[~there].isnan().all()


def test_same_bits_every_time(kernels):
    for tokens in (7, 40) if kernels.backend == "cuda" else (7,):
        ids = some_ids(tokens, 2)
        x, factor = numbers(tokens, 72, dtype=torch.bfloat16), numbers(2, 9, 72)
        h = numbers(tokens, 9)
        first, second = (
            (*kernels.shrink(x, ids, factor, g=h), kernels.expand(h, ids, factor, x)[0])
            for _ in range(2)
        )
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_its_batch(kernels):
    """Nor on its place there: the same bits alone and among others of other adapters."""
    ids = torch.tensor([2, 0, 1, 1, -1, 2, 0])
    x, factor = numbers(7, 72, dtype=torch.bfloat16), numbers(3, 9, 72)
    h = numbers(7, 9)
    all_h, all_y = kernels.shrink(x, ids, factor)[0], kernels.expand(h, ids, factor, x)[0]
    for t in range(7):
        one = slice(t, t + 1)
        same(kernels, kernels.shrink(x[one], ids[one], factor)[0], all_h[one])
        same(kernels, kernels.expand(h[one], ids[one], factor, x[one])[0], all_y[one])


# ---- on a GPU alone ------------------------------------------------------------------------------


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(("tokens", "adapters"), [(8, 64), (2048, 4)])
def test_cuda_graph(kernels, tokens, adapters):
    """The launches follow from the sizes alone: a captured one serves another order of the rows."""
    x, factor = numbers(tokens, 768, dtype=torch.bfloat16).cuda(), numbers(adapters, 16, 768).cuda()
    h, y = torch.empty(tokens, 16, device="cuda"), torch.zeros_like(x)
    order, begins = (t.cuda() for t in segments(some_ids(tokens, adapters), adapters))
    flags = torch.zeros(len(FLAGS), dtype=torch.int32, device="cuda")

    def step():
        place = (torch.cuda.current_stream().cuda_stream, flags)
        rows, given = (order, begins, adapters), (factor, 0, *factor.stride())
        kernels.module.segmented_shrink(
            x, 1, tokens, 768, 16, *rows, *given, h, None, None, None, None, None, 0, 1.0, place
        )
        kernels.module.segmented_expand(
            h, tokens, 768, 16, *rows, *given, None, y, 1, None, 0, 1.0, place
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for into, other in zip(
        (order, begins), segments(some_ids(tokens, adapters, seed=1), adapters), strict=True
    ):
        into.copy_(other)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    got = h.clone(), y.clone()
    y.zero_()
    step()
    assert all(torch.equal(*pair) for pair in zip(got, (h, y), strict=True))


# ---- the public function -----------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer(place, dtype, p):
    """lora_linear_segmented: y and all gradients by the error rule."""
    x, w, a, b, bias, dy = layer.problem(20, 40, 64, 5, 3, dtype)
    adapter, scale = layer.split("uniform", 20, 3), layer.scales(3)
    mask = torch.ones(())
    if p:
        mask = torch.from_numpy(reference.keep_mask(tuple(x.shape), p, 7))
    plain, truth = (
        grads(
            lambda x, a, b, to=to: layer.loop(
                x, w.to(to), a, b, bias.to(to), adapter, scale.to(to), mask.to(to)
            ),
            *(t.to(to) for t in (x, a, b)), upstream=dy.to(to),
        )
        for to in (dtype, torch.float64)
    )  # fmt: skip
    weight, ids, scale, offset, up = place.put(w, adapter, scale, bias, dy)
    ours = grads(
        lambda x, a, b: ff.lora_linear_segmented(
            x, weight, a, b, ids, scale=scale, bias=offset, dropout=p, seed=7
        ),
        *place.put(x, a, b), upstream=up,
    )  # fmt: skip
    for what, o, e, t in zip(("y", "dx", "dA", "dB"), ours, plain, truth, strict=True):
        check(what, o.cpu(), e, t)
