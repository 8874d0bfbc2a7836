"""The kernels of `lora` for GPUs, CUDA and Triton, against SPEC section 2: sums of products follow the error
rule, dropout's mask is the reference's bit for bit.

Without a GPU the CUDA kernels run thread by thread on the CPU and Triton's in its interpreter, which
truncates when it stores bfloat16.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")

import finefuse as ff
import low_rank_cases
from conftest import GPU, unavailable
from finefuse import _low_rank
from finefuse.reference import lora as reference
from low_rank_cases import DTYPES, check_together, eager, grads, group, numbers, problem
from low_rank_kernels import (
    CODES,
    Kernels,
    guarded,
    module_of,
)
from on_gpu import capture, needs_gpu
from tolerances import check

# NumPy's, from Triton's interpreter: the products of Philox overflow
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---- through the public function -----------------------------------------------------------------


def compare(place, *problems, **options):
    """The error rule for y, dx, dA, dB, db; over several problems together where sums are few."""
    results = [low_rank_cases.compare(*p, put=place.put, **options) for p in problems]
    check_together(("y", "dx", "dA", "dB", "db"), results)


# tokens: none, one, a rest of a tile; a tile and a rest of each kernel; on both sides of CUDA's kernel for a
# few tokens (16). ranks: less than a tile, a rest, whole ones. 19 × 75: no row is aligned; 264 × 40: more
# than a span of columns and a rest.
@pytest.mark.parametrize("rank", [1, 3, 8, 64])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 65, 257])
def test_shapes(place, tokens, rank):
    seeds = range(6 if 0 < tokens * rank < 9 else 1)
    compare(place, *(problem(tokens, 19, 75, rank, seed=seed) for seed in seeds))
    if rank == 3 and tokens in (17, 65):
        compare(place, problem(tokens, 264, 40, rank))


@pytest.mark.parametrize("adapters", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(place, dtype, adapters):
    if dtype is torch.float64 and adapters is not None:
        adapters = torch.bfloat16
    for tokens, rows, columns, rank in ((5, 72, 136, 4), (40, 24, 72, 20), (17, 19, 75, 5)):
        compare(
            place, *(problem(tokens, rows, columns, rank, dtype, adapters, s) for s in range(2))
        )


def test_many_tokens(place):
    """CUDA's kernels of tiles of tokens: 1029 is no multiple of one."""
    if place.backend != "cuda":
        pytest.skip("has the same ones for fewer")
    for rank, dtype in ((8, torch.float32), (17, torch.bfloat16)):
        compare(place, problem(1029, 24, 264, rank, dtype))


@pytest.mark.parametrize("p", [0.25, 1.0])
@pytest.mark.parametrize(("tokens", "columns"), [(5, 75), (70, 136), (1025, 40)])
def test_dropout(place, tokens, columns, p):
    """The values and gradients are those of an explicit mask, which is the reference's."""
    if tokens > 1000 and place.backend != "cuda":
        pytest.skip("has the same kernels for fewer tokens")
    for dtype in (torch.float32, torch.bfloat16):
        mask = torch.from_numpy(reference.keep_mask((tokens, columns), p, -77))
        compare(place, problem(tokens, 24, columns, 3, dtype), mask=mask, dropout=p, seed=-77)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 75), (5, 96), (1, 3), (40, 12)])
def test_mask(place, shape, p):
    """Bit for bit the reference's and the CPU's: read off dx with W = 0 and A = B = 1."""
    for seed in (0, 2**63 - 1, -3):
        want = reference.keep_mask(shape, p, seed).astype(np.float32)
        for backend in ("cpu", place.backend):
            device = "cpu" if backend == "cpu" else place.device
            x, w = torch.zeros(shape, device=device), torch.zeros(1, shape[1], device=device)
            x.requires_grad_()
            a, b = torch.ones(1, shape[1], device=device), torch.ones(1, 1, device=device)
            with ff.backend(backend):
                ff.lora_linear(x, w, a, b, dropout=p, seed=seed).sum().backward()
            np.testing.assert_array_equal(x.grad.cpu().numpy(), want)


def test_group_of_layers(place):
    """lora_linear_group: the numbers of calls one by one."""
    x, weights, lora_a, lora_b, biases, dys = group(tokens=20, columns=64)
    up = place.put(*dys)

    def grads_of(function):
        leaves = [t.requires_grad_() for t in place.put(x, *lora_a, *lora_b)]
        ys = function(leaves[0], leaves[1:4], leaves[4:])
        return [*ys, *torch.autograd.grad(ys, leaves, up)]

    w, c = place.put(*weights), place.put(*biases)
    seeds, p = (1, 2, 3), (0.0, 0.3, 0.5)
    ours = grads_of(lambda x, a, b: ff.lora_linear_group(x, w, a, b, bias=c, dropout=p, seed=seeds))
    alone = grads_of(
        lambda x, a, b: [
            ff.lora_linear(x, *layer, bias=bias, dropout=drop, seed=seed)
            for *layer, bias, drop, seed in zip(w, a, b, c, p, seeds, strict=True)
        ]
    )
    for o, e in zip(ours, alone, strict=True):
        torch.testing.assert_close(o, e, rtol=1e-5, atol=1e-4)


def test_strides(place):
    x, w, a, b, bias, dy = place.put(*problem(20, 24, 40, 4))

    def turned(t):
        return t.t().contiguous().t()

    def spaced(t):
        return torch.stack([t, t], -1)[..., 0]

    want = grads(lambda *t: ff.lora_linear(t[0], w, *t[1:], bias=bias), x, a, b, upstream=dy)
    for change in (turned, spaced):
        for tokens in (20, 5):
            got = grads(
                lambda *t, change=change: ff.lora_linear(
                    change(t[0]), change(w), *map(change, t[1:]), bias=spaced(bias)
                ),
                x[:tokens], a, b, upstream=change(dy[:tokens]),
            )  # fmt: skip
            if tokens == 20:
                for g, v in zip(got, want, strict=True):
                    torch.testing.assert_close(g, v, rtol=1e-5, atol=1e-5)
            else:
                torch.testing.assert_close(got[0], want[0][:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [3, 40])
def test_packed_weight(place, tokens, dtype):
    x, w, a, b, bias, dy = problem(tokens, 40, 96, 5, dtype)
    q = ff.quantize(w, "nf4", 64)
    compare(place, (x, ff.dequantize(q, torch.float32), a, b, bias, dy), weight=q)


def test_merge(place):
    for dtype in DTYPES[:3]:
        _, w, a, b, *_ = problem(1, 40, 75, 5, dtype)
        merged = ff.merge_lora(*place.put(w, a, b), 0.7)
        plain = (w.float() + 0.7 * b.float() @ a.float()).to(dtype)
        truth = reference.merge_lora(*(t.double().numpy() for t in (w, a, b)), 0.7)
        check("merged", merged.cpu(), plain, truth)


def test_same_bits_every_time(place):
    x, w, a, b, bias, dy = place.put(*problem(40, 40, 136, 5, torch.bfloat16))
    for tokens in (40, 4):
        first, second = (
            grads(
                lambda *t: ff.lora_linear(t[0], w, *t[1:], bias=bias, dropout=0.1, seed=3),
                x[:tokens], a, b, upstream=dy[:tokens],
            )
            for _ in range(2)
        )  # fmt: skip
        for f, s in zip(first, second, strict=True):
            assert torch.equal(f, s)


# ---- the kernels themselves ----------------------------------------------------------------------


@pytest.fixture(params=["cuda", "triton"])
def kernels(request) -> Kernels:
    return Kernels(request.param, module_of("lora", request))


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_types(kernels, dtype, factor_dtype):
    """Every type of the factor beside every other, also float64."""
    many = dtype is not torch.float64 and factor_dtype in (dtype, torch.float32)
    for tokens, columns in ((9, 75), (2049, 24)) if many else ((9, 75),):
        x, f = (
            numbers(tokens, columns, dtype=dtype),
            numbers(5, columns, dtype=factor_dtype, seed=1),
        )
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        g = numbers(tokens, 5, dtype=wide, seed=2)
        h, outer = kernels.shrink(x, f, g)
        check("h", h, 2 * x.to(wide) @ f.to(wide).t(), 2 * x.double() @ f.double().t())
        check("outer", outer, 0.5 * g.t() @ x.to(wide), 0.5 * g.double().t() @ x.double())
        y = kernels.expand(g, f, dtype, bias=x[0].contiguous())
        plain = (0.5 * g @ f.to(wide) + x[0].to(wide)).to(dtype)
        check("y", y, plain, 0.5 * g.double() @ f.double() + x[0].double())


# Members of ranks less than a tile of ranks, a rest, and more than one; with and without h, outer, dropout.
# 75: no row is aligned; 264: a span of columns and a rest; 1029 tokens: CUDA's kernels of tiles.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(5, 75), (18, 264), (1029, 24)])
def test_group(kernels, tokens, columns, dtype):
    if tokens > 1000 and (kernels.backend != "cuda" or dtype is torch.float64):
        pytest.skip("has the same kernels for fewer tokens")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x = numbers(tokens, columns, dtype=dtype)

    def member(rank, seed, has_h=True, has_outer=True, factor_dtype=dtype, turned=False):
        factor = numbers(rank, columns, dtype=factor_dtype, seed=rank)
        g = numbers(tokens, rank, dtype=wide, seed=rank + 1)
        if turned:
            factor = factor.t().contiguous().t()
        return (factor if has_h else None, g if has_outer else None, seed)

    groups = [
        [member(3, None), member(14, 7, factor_dtype=wide), member(1, None, has_outer=False)],
        [
            member(40, -9, has_h=False),
            member(16, 2**40, turned=True),
            member(8, None),
            member(4, 3),
        ],
        [member(9, None, factor_dtype=wide), member(2, None)],
        [member(5, 11)],
    ]
    if kernels.backend == "cuda":  # float64 beside another type has kernels of its own
        groups.append([member(6, 1, factor_dtype=torch.float64), member(6, 1)])
    for members in groups:
        for (factor, g, seed), (h, outer) in zip(
            members, kernels.shrink_group(x, members), strict=True
        ):
            mask = reference.keep_mask((tokens, columns), 0.5, seed) if seed else np.ones(())
            d = x.double() * torch.from_numpy(mask)
            if factor is not None:
                plain = 2 * d.to(wide) @ factor.to(wide).t()
                check("h", h, plain, 2 * d @ factor.double().t())
            if g is not None:
                check("outer", outer, 0.5 * g.t() @ d.to(wide), 0.5 * g.double().t() @ d)


def test_group_is_its_members(kernels):
    """Bit for bit, on CUDA: they share what they read and nothing else."""
    if kernels.backend != "cuda":
        pytest.skip("a launch each: there is nothing to share")
    for tokens in (6, 1029):
        x = numbers(tokens, 40, dtype=torch.bfloat16)
        members = [
            (numbers(rank, 40, seed=rank), numbers(tokens, rank, seed=rank), seed)
            for rank, seed in ((12, None), (9, 5))
        ]
        alone = [kernels.shrink_group(x, [m])[0] for m in members]
        for one, both in zip(alone, kernels.shrink_group(x, members), strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, both, strict=True))


# 1 to 3: less than a counter of Philox; 1029: a program of Triton's and a rest; offset: not aligned.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3, 8, 1029, 2051])
def test_dropout_alone(kernels, count, dtype):
    for seed, p in ((0, 0.25), (-(2**62), 0.5), (5, 1.0)):
        mask = torch.from_numpy(reference.keep_mask((count,), p, seed))
        for x in (numbers(count, dtype=dtype), numbers(count + 1, dtype=dtype)[1:]):
            truth = x.double() * mask
            check("y", kernels.dropped(x, seed, p), truth.to(dtype), truth)
            y = numbers(count, dtype=dtype, seed=1)
            want = truth + y.double()
            check("y", kernels.dropped(x, seed, p, y.clone()), want.to(dtype), want)
        z = kernels.put(numbers(count, dtype=dtype))
        kernels.module.lora_dropout(  # in place
            z, CODES[dtype], count, False, z, *kernels.dropout(seed, p), kernels.place()
        )
        assert torch.equal(z.cpu(), kernels.dropped(numbers(count, dtype=dtype), seed, p))
    x = torch.full((9,), float("nan"), dtype=dtype)
    assert kernels.dropped(x, 1, 0.5).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 13, 64])
def test_linear(kernels, tokens, dtype):
    for rows, columns, rank, adapters in (
        (45, 520, 16, dtype),
        (19, 75, 3, torch.float32),
        (70, 264, 40, torch.float32),
    ):
        x, w, a, b, bias, _ = problem(tokens, rows, columns, rank, dtype, adapters)
        y = kernels.linear(x, w, a, b, bias)
        truth = eager(*(t.double() for t in (x, w, a, b, bias)), 0.7)
        check("y", y, eager(x, w, a, b, bias, 0.7), truth)


def test_tiles_of_the_product(monkeypatch):
    """Triton's largest tile, which the interpreter's machine would not have room for."""
    if unavailable("triton"):
        pytest.skip(unavailable("triton"))
    kernels = import_module("finefuse.kernels.lora")
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 1 << 18)
    x, w, a, b, bias, _ = problem(1100, 300, 96, 5, torch.bfloat16)
    y = Kernels("triton", kernels).linear(x, w, a, b, bias)
    check(
        "y", y, eager(x, w, a, b, bias, 0.7), eager(*(t.double() for t in (x, w, a, b, bias)), 0.7)
    )


@pytest.mark.skipif(GPU, reason="guard pages are the CPU's; on a GPU compute-sanitizer looks")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nothing_out_of_bounds(kernels, dtype, at_end):
    kernels = kernels._replace(put=lambda t: guarded(t, at_end))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    shapes = [(1, 1, 1), (3, 43, 5), (5, 264, 4), (17, 72, 20)]
    if kernels.backend == "cuda" and dtype is not torch.float64:  # its kernels of tiles
        shapes.append((1027, 24, 9))
    for tokens, columns, rank in shapes:
        x, f = numbers(tokens, columns, dtype=dtype), numbers(rank, columns, dtype=dtype, seed=1)
        g = numbers(tokens, rank, dtype=wide, seed=2)
        for seed, factor in ((None, f), (7, f.t().contiguous().t())):
            for array in kernels.shrink(x, factor, g, seed, 0.5):
                assert torch.isfinite(array).all()
            for y, bias in ((None, f[0].clone()), (x.clone(), None)):
                assert torch.isfinite(kernels.expand(g, factor, dtype, y, bias, seed, 0.5)).all()
        for _, outer in kernels.shrink_group(
            x, [(f, g, None), (f[:1].clone(), g[:, :1].clone(), 7)]
        ):
            assert torch.isfinite(outer).all()
        for y in (None, x.clone()):
            assert torch.isfinite(kernels.dropped(x, 7, 0.5, y)).all()
        if dtype is not torch.float64 and tokens < 100:
            w, b = numbers(7, columns, dtype=dtype), numbers(7, rank, dtype=dtype)
            y = kernels.linear(x, w, f, b, numbers(7, dtype=dtype))
            assert torch.isfinite(y).all()


def test_empty(kernels):
    """No tokens: outer is zeros, nothing else is written."""
    for dtype in DTYPES:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        h, outer = kernels.shrink(
            torch.zeros(0, 40, dtype=dtype), torch.ones(3, 40), torch.zeros(0, 3, dtype=wide)
        )
        assert h.shape == (0, 3)
        assert (outer == 0).all()
        h, outer = kernels.shrink(
            torch.zeros(2, 0, dtype=dtype), torch.ones(3, 0), torch.zeros(2, 3, dtype=wide)
        )
        assert (h == 0).all()
        y = kernels.expand(torch.zeros(0, 3, dtype=wide), torch.ones(3, 40), dtype)
        assert y.shape == (0, 40)


# ---- on a GPU alone ------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("tokens", [8, 2048])
def test_cuda_graph(place, tokens):
    """No allocation outside of torch's pool, no synchronisation: forward and backward are captured."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    x, w, a, b, bias, dy = place.put(*problem(tokens, 512, 768, 16, torch.bfloat16))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    seed = torch.tensor([5], device="cuda")

    def step():
        y = ff.lora_linear(x, w, a, b, bias=bias, dropout=0.1, seed=seed)
        return y, *torch.autograd.grad(y, leaves, dy)

    graph, captured = capture(step)
    with torch.no_grad():
        x.copy_(numbers(tokens, 768, dtype=torch.bfloat16, seed=9))
        seed.fill_(6)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@needs_gpu
def test_current_stream(place):
    x, w, a, b, *_ = place.put(*problem(300, 512, 768, 16, torch.bfloat16))
    want = ff.lora_linear(x, w, a, b)
    late = torch.empty_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        y = ff.lora_linear(late, w, a, b)
    stream.synchronize()
    assert torch.equal(y, want)


@needs_gpu
def test_large(place):
    """The shapes of a model: every tile is whole, sums are long."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (1, 16, 4096):
            compare(place, problem(tokens, 1024, 2048, 16, dtype))


@needs_gpu
def test_more_than_2_to_31_elements(place):
    """64-bit offsets: the last rows of 2.2 G elements of x and of y."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    tokens, columns = 270_000, 8192
    x = torch.zeros(tokens, columns, dtype=torch.bfloat16, device="cuda")
    x[-1] = numbers(columns, dtype=torch.bfloat16).cuda()
    a, b = (t.to(torch.bfloat16).cuda() for t in (numbers(8, columns), numbers(columns, 8, seed=1)))
    h, _ = _low_rank.shrink(x, a, 1.0)
    want = x[-1].float() @ a.float().t()
    torch.testing.assert_close(h[-1], want, rtol=1e-4, atol=1e-2)
    _low_rank.expand(h, b.t(), 1.0, x, accumulate=True)
    assert (x[-2] == 0).all()
    assert (x[-1] != 0).any()
