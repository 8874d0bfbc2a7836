"""Pruning on every backend beside the CPU's: the mask is the reference's, element for element.

On a reduced grid: what is common to all backends, the arguments and the torch ops, is in test_prune.py.
Few rows: one takes Triton's interpreter some hundredths of a second. Beside the public functions the kernels
are called alone, for what these never ask of them.
"""

from __future__ import annotations

import itertools
import math
from importlib import import_module

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import GPU
from finefuse._args import DTYPES
from finefuse._args.prune import PRUNE_SCOPES, prune_workspace
from finefuse._backend import FLAGS
from finefuse.reference import codebook as codebooks
from finefuse.reference import prune as reference
from guards import between_guards
from on_gpu import capture, needs_gpu

# NumPy's, from Triton's interpreter, at what a GPU does silently: inf·0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TORCH = {getattr(torch, name): number for name, number in DTYPES.items()}
dtypes = pytest.mark.parametrize("dtype", TORCH, ids=str)
WIDE = {torch.float64: torch.float64}


def truth(w, activation_norm=None, scope=None, **options):
    """Of the exact values of a 16-bit weight, whose scores are float32 too."""
    wide = w if w.dtype == torch.float64 else w.float()
    if scope is None:
        scope = "tensor" if activation_norm is None else "row"
    norm = None if activation_norm is None else activation_norm.numpy()
    return torch.from_numpy(
        reference.prune_mask(wide.numpy(), scope=scope, activation_norm=norm, **options)
    )


def bits(w):
    return w.cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()])


def check(place, w, activation_norm=None, zeros=False, **options):
    """The mask and, with `zeros`, those in place: what is kept keeps its bits."""
    want = truth(w, activation_norm, **options)
    if activation_norm is not None:
        (norm,) = place.put(activation_norm)
        options |= {"activation_norm": norm, "method": "wanda"}
    (x,) = place.put(w.clone())
    mask = ff.prune_mask(x, **options)
    assert mask.dtype == torch.bool
    assert torch.equal(bits(x), bits(w))
    wrong = (mask.cpu() != want).nonzero()
    assert len(wrong) == 0, f"{options}: {len(wrong)} elements, the first {wrong[0].tolist()}"
    if not zeros:
        return
    assert ff.prune_(x, **options) is x
    assert torch.equal(bits(x), torch.where(want, bits(w), 0)), options


def tied(*shape, dtype=torch.float32):
    """Four magnitudes of either sign: nearly all elements are equals of others."""
    return torch.randint(-4, 4, shape).to(dtype) + 0.5


# ---- tensor and row --------------------------------------------------------------------------------

# (1,) and (3, 7): less than a lane's or one of its vectors. (2, 1001): rows begin anywhere. (2, 4104): whole
# lanes, and more than a tile of 4096.
SHAPES = {
    (1,): [torch.float32],
    (3, 7): TORCH,
    (2, 1001): [torch.float32, torch.bfloat16],
    (2, 4104): [torch.float16, torch.float64],
}


@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, d) for s, some in SHAPES.items() for d in some], ids=str
)
def test_magnitude(place, shape, dtype):
    check(place, torch.randn(shape).to(dtype), scope="tensor", sparsity=0.5, zeros=len(shape) == 1)
    check(place, tied(*shape, dtype=dtype), scope="row", sparsity=0.4, zeros=True)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*(((3, 7), d) for d in TORCH), *(((2, 4104), d) for d in (torch.float32, torch.bfloat16))],
    ids=str,
)
def test_wanda(place, shape, dtype):
    norm = torch.randn(shape[-1], dtype=WIDE.get(dtype, torch.float32)).abs()
    w = torch.randn(shape).to(dtype)
    check(place, w, norm, sparsity=0.5, zeros=True)
    check(place, w[:, :7], norm[:7], sparsity=0.3, scope="tensor", zeros=True)


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_ties(place, scope):
    """The lower index goes first, wherever in or between tiles of 4096 the last of them lies."""
    rows, columns = 2, 4608
    w = torch.ones(rows, columns)
    w[1, 700:] *= -1
    w[:, ::1000] = 0.25
    w[:, 5::1000] = 7.0
    count = rows * columns if scope == "tensor" else columns
    for drop in (4, 4101, 9210) if scope == "tensor" else (4, 4102):
        check(place, w, scope=scope, sparsity=drop / count)
    check(place, w.bfloat16(), scope=scope, sparsity=4097 / count)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, math.inf, -math.nan])
def test_all_equal(place, value):
    w = torch.full((2, 4099), value)
    check(place, w, sparsity=0.75)
    check(place, w[:, 4000:], scope="row", sparsity=0.75)
    check(place, w[:, :4096], n=1, m=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_none_and_all(place, dtype):
    w = torch.randn(3, 40).to(dtype)
    w[1, 3] = math.nan
    for sparsity, scope in itertools.product((0.0, 1.0), ("tensor", "row")):
        check(place, w, sparsity=sparsity, scope=scope, zeros=True)
    for n, m in ((0, 4), (4, 4), (0, 5), (40, 40), (1, 1)):
        check(place, w, n=n, m=m)


@dtypes
def test_odd_numbers(place, dtype):
    """NaN of any bits is the largest, and equal to all others; ±0 are equal; denormals have an order."""
    tiny = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype) / 4
    w = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0, torch.finfo(dtype).max])
    w = torch.cat([w.to(dtype), -tiny[None], tiny[None] / 2, tiny[None] / 4])
    nan = bits(w[4:5].clone()) + 1  # another NaN
    w = torch.cat([w, nan.view(dtype), -w, w]).repeat(2, 3)
    count = w.shape[1]
    check(place, w, sparsity=0.15, scope="row", zeros=True)
    check(place, w, sparsity=0.85, scope="tensor", zeros=True)
    check(place, w, sparsity=0.5, scope="tensor")
    check(place, w[:, : count // 4 * 4], n=2, m=4)
    norm = torch.full((count,), 0.5, dtype=WIDE.get(dtype, torch.float32))
    norm[::7], norm[1::7] = 0.0, math.inf  # inf·0 is NaN, |w|·0 is 0
    check(place, w, norm, sparsity=0.4)


def test_long_rows(place):
    """So few and long that the whole device selects from one after the other."""
    w = torch.cat([torch.randn(1, 65540), tied(1, 65540)]).bfloat16()
    check(place, w, sparsity=0.4, scope="row")


# ---- n of every m ----------------------------------------------------------------------------------

# Of 4 and 8: in a thread's lane. 33 and 130 are beyond what Triton and CUDA compare pair by pair.
GROUPS = [(2, 4), (4, 8), (3, 5), (1, 2), (7, 16), (9, 33), (50, 130)]


@pytest.mark.parametrize(("n", "m"), GROUPS)
def test_groups(place, n, m):
    for dtype, groups in itertools.islice(zip(TORCH, (3, 1, 2, 2), strict=True), 2 if m > 8 else 4):
        columns = groups * m
        check(place, tied(2, columns, dtype=dtype), n=n, m=m, zeros=True)
        norm = torch.rand(columns, dtype=WIDE.get(dtype, torch.float32))
        check(place, torch.randn(2, columns).to(dtype), norm, n=n, m=m)


@dtypes
def test_many_groups(place, dtype):
    """More than a block's, and some of the last block's."""
    for n, m in ((2, 4), (4, 8), (3, 5)):
        check(place, tied(11, 120 * m, dtype=dtype), n=n, m=m)


# ---- other weights ---------------------------------------------------------------------------------


def test_strides(place):
    base = torch.randn(6, 9)
    for w in (base.T, base[:, ::2], base[2:, 3:], base[:, 0], base.view(2, 3, 9).mT):
        check(place, w, sparsity=0.5)
        check(place, w, sparsity=0.5, scope="row")
    (x,) = place.put(base.clone())
    ff.prune_(x[:, ::2], n=1, m=5)
    want = base.clone()
    want[:, ::2] *= truth(base[:, ::2], n=1, m=5)
    assert torch.equal(x.cpu(), want)


def test_empty(place):
    for shape in ((0,), (0, 4), (4, 0), (2, 0, 8)):
        x = torch.zeros(shape, device=place.device)
        for options in ({"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"n": 2, "m": 4}):
            assert ff.prune_mask(x, **options).shape == shape
            assert ff.prune_(x, **options) is x


@pytest.mark.parametrize("code", ["nf4", "fp4", "dynamic8"])
def test_codebook(place, code):
    for shape in ((3, 43), (2, 512)):  # a byte or a lane that is not full; whole ones
        (x,) = place.put(torch.randn(shape))
        q = ff.quantize(x, code)
        before, w = q.codes.clone(), ff.dequantize(q, torch.float32).cpu()
        absmax = q.absmax.clone()
        for options in ({"sparsity": 0.5}, {"sparsity": 0.6, "scope": "row"}):
            q.codes.copy_(before)
            want = truth(w, **options)
            assert ff.prune_(q, **options) is q
            decoded = ff.dequantize(q, torch.float32).cpu()
            assert torch.equal(decoded, torch.where(want, w, 0.0))
        assert torch.equal(q.absmax, absmax)


# ---- the kernels alone -----------------------------------------------------------------------------


def kernels(place):
    if place.backend == "eager":
        pytest.skip("has no kernels")
    name = "finefuse._CUDA" if place.backend == "cuda" else "finefuse.kernels.prune"
    stream = torch.cuda.current_stream().cuda_stream if GPU else 0
    flags = torch.zeros(len(FLAGS), dtype=torch.int32, device=place.device)
    return import_module(name), (stream, flags)


def run(place, w, scope, drop, group=0, norm=None, mask=None, zero=False):
    """On tensors of the place; the workspace is just as long as it must be, and full of rubbish."""
    module, on = kernels(place)
    rows, columns = w.shape
    size = prune_workspace(rows, columns, PRUNE_SCOPES[scope])
    workspace = torch.full((size,), 0xA5, dtype=torch.uint8)
    if not GPU:
        workspace = torch.from_numpy(between_guards(workspace.numpy(), at_end=True))
    module.prune(
        w, TORCH[w.dtype], rows, columns, PRUNE_SCOPES[scope], drop, group, norm, mask, zero,
        workspace.to(place.device), on,
    )  # fmt: skip


@pytest.mark.parametrize("scope", PRUNE_SCOPES)
@pytest.mark.parametrize("columns", [520, 4100])
def test_mask_and_zeros_at_once(place, scope, columns):
    """And from any address: one element and one byte behind a whole vector."""
    count = {"tensor": 3 * columns, "row": columns, "group": 4}[scope]
    some = TORCH if columns == 520 else [torch.float32]
    for dtype, off in itertools.product(some, (0, 1) if place.backend == "cuda" else (1,)):
        w = tied(3, columns, dtype=dtype)
        norm = torch.rand(columns + 1, dtype=WIDE.get(dtype, torch.float32))[1 - off :][:columns]
        want = torch.from_numpy(
            reference.keep_largest(
                reference.scores(
                    (w if dtype == torch.float64 else w.float()).numpy(), norm.numpy()
                ).reshape(-1, count),
                count // 3,
            )
        ).view(3, columns)
        memory = torch.zeros(3 * columns + 1, dtype=dtype, device=place.device)
        x = memory[off:][: 3 * columns].view(3, columns).copy_(w)
        mask = torch.zeros(3 * columns + 1, dtype=torch.bool, device=place.device)
        mask = mask[off:][: 3 * columns].view(3, columns)
        scale = torch.zeros(columns + 1, dtype=norm.dtype, device=place.device)
        scale = scale[off:][:columns].copy_(norm)
        run(place, x, scope, count // 3, 4, scale, mask, zero=True)
        assert torch.equal(mask.cpu(), want)
        assert torch.equal(x.cpu(), w * want)


@pytest.mark.skipif(GPU, reason="guard pages are the CPU's; on a GPU compute-sanitizer looks")
@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_out_of_bounds(place, at_end):
    def put(tensor):
        raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        return torch.from_numpy(between_guards(raw.numpy(), at_end)).view(tensor.dtype)

    dtype = torch.bfloat16 if at_end else torch.float32
    for shape, scope, group in (
        ((1, 1), "tensor", 0),
        ((3, 4103), "tensor", 0),
        ((2, 43), "row", 0),
        ((2, 4100), "row", 0),
        ((3, 20), "group", 4),
        ((1, 24), "group", 8),
        ((7, 21), "group", 7),
    ):
        norm, mask = put(torch.rand(shape[1])), put(torch.zeros(shape, dtype=torch.bool))
        w = put(torch.randn(shape).to(dtype))
        run(place, w, scope, 1, group, None, mask)
        dropped = (~mask).sum().item()
        assert dropped == {"tensor": 1, "row": shape[0]}.get(scope, w.numel() // max(group, 1))
        run(place, w, scope, 1, group, norm, None, zero=True)
        assert (w == 0).sum().item() == dropped


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_codes(place, width):
    """Codes of any zero; what pads the last byte stays; any address; nothing out of bounds."""
    module, on = kernels(place)
    for count, zero, off in ((1, 1, 0), (43, 2, 0), (5003, 3, 1), (4096, 0, 0)):
        plain = np.random.default_rng(count).integers(0, 2**width, -(-count // 8) * 8)
        packed = codebooks.pack(plain, width)
        packed = packed[: codebooks.packed_bytes(count, width)]
        keep = torch.rand(count) < 0.6
        plain[:count][~keep.numpy()] = zero
        want = codebooks.pack(plain, width)[: packed.size]
        codes, mask = torch.zeros(packed.size + off, dtype=torch.uint8), torch.zeros(count + off)
        codes, mask = (
            t if GPU else torch.from_numpy(between_guards(t.numpy(), at_end=True))
            for t in (codes, mask.bool())
        )
        codes, mask = place.put(codes, mask)
        codes, mask = codes[off:], mask[off:]
        codes.copy_(torch.from_numpy(packed))
        mask.copy_(keep)
        module.prune_codes(codes, count, width, zero, mask, on)
        np.testing.assert_array_equal(codes.cpu().numpy(), want, f"{count} codes")
    nothing = torch.zeros(0, dtype=torch.uint8, device=place.device)
    module.prune_codes(nothing, 0, width, 0, nothing.bool(), on)


def test_same_every_time(place):
    w = torch.randn(2, 4097).bfloat16()
    (x,) = place.put(w)
    first, second = (ff.prune_mask(x, sparsity=0.5) for _ in range(2))
    assert torch.equal(first, second)


# ---- on GPUs alone -----------------------------------------------------------------------------------


@needs_gpu
def test_more_than_2_to_31_elements(place):
    """4.3 G elements of three magnitudes: what goes ends in the last row; rows beyond 2^31 elements too."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    for rows, columns in ((33_600, 128_256), (2, 2**31 + 64)):
        w = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
        w[:, 7] = 0.5
        w[-1, -5:] = 2.0
        drop = w.numel() - 10  # 5 equals stay: those before the last five
        mask = torch.zeros(w.shape, dtype=torch.bool, device="cuda")
        run(place, w, "tensor", drop, mask=mask)
        assert mask[-1, -10:].all()
        assert mask.sum().item() == 10
        run(place, w, "row", columns - 10, mask=mask)
        assert mask[:, -10:].all()
        assert mask.sum().item() == 10 * rows
        run(place, w, "group", 2, 4, mask=mask)
        assert mask.sum().item() == w.numel() // 2
        # 1 1 1 0.5: the last and the first of the equals went
        want = torch.tensor([False, True, True, False], device="cuda")
        assert (mask[:, 4:8] == want).all()
        del w, mask


@needs_gpu
def test_cuda_graph(place):
    """No allocation of ours, no synchronisation: captured and replayed on other values."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    x = torch.randn(64, 4096, device="cuda").bfloat16()
    other, norm = torch.randn_like(x), torch.rand(4096, device="cuda")
    q = ff.quantize(x.float(), "nf4")

    def step():
        y = x.clone()
        ff.prune_(y, sparsity=0.5)
        return (
            y,
            ff.prune_mask(x, sparsity=0.5, method="wanda", activation_norm=norm),
            ff.prune_mask(x, n=2, m=4),
            ff.prune_mask(q, sparsity=0.5),
        )

    graph, captured = capture(step)
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_semi_structured(place):
    """2:4 is what torch's sparse tensor cores take."""
    w = torch.randn(128, 256, device="cuda").half()
    ff.prune_(w, n=2, m=4)
    sparse = torch.sparse.to_sparse_semi_structured(w)
    assert torch.equal(sparse.to_dense(), w)
