"""The kernels of `dora` for GPUs, CUDA and Triton: norms and scaled columns follow the error rule.

Without a GPU the CUDA kernels run thread by thread on the CPU and Triton's in its interpreter, which
truncates when it stores bfloat16.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")

import dora_cases as layer
import finefuse as ff
from conftest import GPU
from finefuse.eager.lora import keep_mask
from low_rank_cases import DTYPES, grads, numbers
from low_rank_kernels import CODES, Kernels, guarded, module_of
from tolerances import check

# NumPy's, from Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def wide_of(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


class DoraKernels(Kernels):
    """A backend's kernels on CPU tensors; outputs are filled with rubbish before."""

    def norm(self, w, b, a, scale):
        """b (rows, rank) and a (rank, columns) of any strides."""
        out = self.rubbish(len(w), dtype=wide_of(w.dtype))
        row_stride, b_rank_stride = b.stride()
        self.module.dora_norm(
            self.put(w), CODES[w.dtype], *w.shape, len(a), self.put(b), CODES[b.dtype], b_rank_stride,
            row_stride, self.put(a), CODES[a.dtype], *a.stride(), scale, out, self.place(),
        )  # fmt: skip
        return out.cpu()

    def scale(self, z, factor, bias=None, y=None):
        out = self.rubbish(*z.shape, dtype=z.dtype) if y is None else self.put(y)
        self.module.dora_scale(
            self.put(z), CODES[z.dtype], *z.shape, self.put(factor),
            None if bias is None else self.put(bias), y is not None, out, self.place(),
        )  # fmt: skip
        return out.cpu()

    def backward(self, dy, z, factor, dz=True, sums=True):
        dz = self.rubbish(*dy.shape, dtype=dy.dtype) if dz else None
        sums = self.rubbish(dy.shape[1], dtype=wide_of(dy.dtype)) if sums else None
        self.module.dora_scale_backward(
            self.put(dy), None if sums is None else self.put(z), CODES[dy.dtype], *dy.shape,
            None if dz is None else self.put(factor), dz, sums, self.place(),
        )  # fmt: skip
        return [None if t is None else t.cpu() for t in (dz, sums)]


@pytest.fixture(params=["cuda", "triton"])
def kernels(request) -> DoraKernels:
    return DoraKernels(request.param, module_of("dora", request))


def norms(w, b, a, scale, dtype):
    return torch.linalg.vector_norm(w.to(dtype) + scale * (b.to(dtype) @ a.to(dtype)), dim=1)


# rows: one, a block of CUDA's and a rest, a program of Triton's and a rest. columns 75: no row is aligned;
# 264: a span and a rest; 8: less than a warp. ranks: one, whole blocks of 16, a rest of four and of fewer.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(1, 8, 1), (33, 264, 16), (35, 75, 3), (7, 520, 22), (3, 40, 36)]
)
def test_norm(kernels, rows, columns, rank, dtype):
    w = numbers(rows, columns, dtype=dtype)
    factor_dtypes = {dtype, torch.float32 if dtype is torch.bfloat16 else dtype}
    for factor_dtype in DTYPES if kernels.backend == "cuda" else factor_dtypes:
        b = numbers(rows, rank, dtype=factor_dtype, seed=1)
        a = numbers(rank, columns, dtype=factor_dtype, seed=2)
        for one, other in ((b, a), (b.t().contiguous().t(), a.t().contiguous().t())):
            ours = kernels.norm(w, one, other, 0.3)
            truth = norms(w, b, a, 0.3, torch.float64)
            check("norm", ours, norms(w, b, a, 0.3, wide_of(dtype)), truth)
            relative = (ours.double() - truth).abs() / truth
            assert relative.max() < (1e-13 if dtype is torch.float64 else 1e-6)


def test_norm_of_a_cancelled_weight(kernels):
    """W close to -s·B A: the sum of ‖W‖², the product and ‖B A‖² would keep no digit."""
    b, a = numbers(5, 4), numbers(4, 264, seed=1)
    w = (-0.5 * (b.double() @ a.double()) + 1e-3 * numbers(5, 264, seed=2)).float()
    truth = norms(w, b, a, 0.5, torch.float64)
    assert ((kernels.norm(w, b, a, 0.5) - truth).abs() / truth).max() < 1e-3


def test_norm_is_never_tf32(kernels):
    """Whatever torch's setting for its own products."""
    before = torch.get_float32_matmul_precision()
    w, b, a = numbers(3, 64), numbers(3, 16, seed=1), numbers(16, 64, seed=2)
    want = kernels.norm(w, b, a, 1.0)
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(kernels.norm(w, b, a, 1.0), want)
    finally:
        torch.set_float32_matmul_precision(before)


# tokens: none, one, a rest of a thread's four, of a block's 128 rows and of two of these. columns 75: not
# aligned; 40: a strip of 32 and a rest; 520: a tile of Triton's and a rest.
SHAPES = [(0, 40), (1, 8), (7, 75), (6, 520)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "columns"), SHAPES)
def test_scale(kernels, tokens, columns, dtype):
    z, factor = (
        numbers(tokens, columns, dtype=dtype),
        numbers(columns, dtype=wide_of(dtype), seed=1),
    )
    bias, y = numbers(columns, dtype=dtype, seed=2), numbers(tokens, columns, dtype=dtype, seed=3)
    for b, before in ((None, None), (bias, None), (None, y), (bias, y)):

        def formula(to, b=b, before=before):
            out = factor.to(to) * z.to(to)
            out = out if b is None else out + b.to(to)
            return out if before is None else out + before.to(to)

        ours = kernels.scale(z, factor, b, None if before is None else before.clone())
        check("y", ours, formula(wide_of(dtype)).to(dtype), formula(torch.float64))
    same = kernels.put(z.clone())
    kernels.module.dora_scale(  # in place
        same, CODES[dtype], tokens, columns, kernels.put(factor), None, False, same, kernels.place()
    )
    assert torch.equal(same.cpu(), kernels.scale(z, factor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [*SHAPES, (261, 40)])
def test_scale_backward(kernels, tokens, columns, dtype):
    wide = wide_of(dtype)
    dy, z = numbers(tokens, columns, dtype=dtype), numbers(tokens, columns, dtype=dtype, seed=1)
    factor = numbers(columns, dtype=wide, seed=2)
    plain_dz, plain_sums = (factor * dy.to(wide)).to(dtype), (dy.to(wide) * z.to(wide)).sum(0)
    truth_dz, truth_sums = factor.double() * dy.double(), (dy.double() * z.double()).sum(0)
    for has_dz, has_sums in ((True, True), (True, False), (False, True)):
        dz, sums = kernels.backward(dy, z, factor, has_dz, has_sums)
        assert (dz is not None, sums is not None) == (has_dz, has_sums)
        if has_dz:
            check("dz", dz, plain_dz, truth_dz)
        if has_sums:
            check("sum", sums, plain_sums, truth_sums)
    same, sums = kernels.put(dy.clone()), kernels.rubbish(columns, dtype=wide)
    kernels.module.dora_scale_backward(  # in place
        same, kernels.put(z), CODES[dtype], tokens, columns, kernels.put(factor), same, sums,
        kernels.place(),
    )  # fmt: skip
    for ours, want in zip((same, sums), kernels.backward(dy, z, factor), strict=True):
        assert torch.equal(ours.cpu(), want)


@pytest.mark.skipif(GPU, reason="guard pages are the CPU's; on a GPU compute-sanitizer looks")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nothing_out_of_bounds(kernels, dtype, at_end):
    guards = DoraKernels(kernels.backend, kernels.module, lambda t: guarded(t, at_end))
    for tokens, columns, rank in ((1, 1, 1), (5, 43, 3), (33, 264, 17)):
        w, b = numbers(tokens, columns, dtype=dtype), numbers(tokens, rank, dtype=dtype, seed=1)
        a = numbers(rank, columns, dtype=dtype, seed=2)
        factor = numbers(columns, dtype=wide_of(dtype), seed=3)
        for one, other in ((b, a), (b.t().contiguous().t(), a.t().contiguous().t())):
            assert torch.isfinite(guards.norm(w, one, other, 0.5)).all()
        for bias, y in ((None, None), (w[0].clone(), w.clone())):
            assert torch.isfinite(guards.scale(w, factor, bias, y)).all()
        for has_dz, has_sums in ((True, True), (True, False), (False, True)):
            for array in guards.backward(w, w, factor, has_dz, has_sums):
                assert array is None or torch.isfinite(array).all()


def test_same_bits_every_time(kernels):
    w, b, a = numbers(40, 264), numbers(40, 9, seed=1), numbers(9, 264, seed=2)
    factor = numbers(264, seed=3)
    assert torch.equal(kernels.norm(w, b, a, 0.5), kernels.norm(w, b, a, 0.5))
    first, second = (kernels.backward(w, w, factor) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# ---- the public function -----------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer(place, dtype, p, packed):
    """lora_linear with a magnitude: y and all gradients by the error rule."""
    if place.backend == "eager" and packed:
        pytest.skip("eager decodes, and is then the same")
    x, w, a, b, m, bias, dy = layer.problem(20, 40, 64, 5, dtype)
    weight = ff.quantize(w.float()).to(dtype) if packed else w
    plain_weight = ff.dequantize(weight, torch.float32) if packed else w
    mask = keep_mask(x.double(), p, torch.tensor([7])) if p else None
    with ff.backend("auto"):
        _, plain, truth = layer.compare(
            x, plain_weight, a, b, m, bias, dy, mask=mask, weight=weight, dropout=p, seed=7
        )
    on_place = place.put(weight)[0]
    ours = grads(
        lambda x, a, b, m, bias: ff.lora_linear(
            x, on_place, a, b, scale=0.7, bias=bias, magnitude=m, dropout=p, seed=7
        ),
        *place.put(x, a, b, m, bias), upstream=place.put(dy)[0],
    )  # fmt: skip
    for what, o, e, t in zip(("y", "dx", "dA", "dB", "dm", "db"), ours, plain, truth, strict=True):
        check(what, o.cpu(), e, t)
