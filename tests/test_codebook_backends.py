"""The kernels of `codebook` for GPUs, CUDA and Triton, against SPEC section 1: codes, absmax and decoded
elements are the reference's bit for bit, sums of products follow the error rule.

Without a GPU the CUDA kernels run thread by thread on the CPU and Triton's in its interpreter, which
truncates when it stores bfloat16, and wrongly where that is denormal: one unit in the last place is allowed
there, and denormal ones are not compared.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")

from codebook_arrays import BF16, CODES, DTYPES, EDGES, Nested, bits
from conftest import GPU, unavailable
from finefuse._backend import FLAGS
from finefuse.reference import codebook as reference
from guards import between_guards
from tolerances import check

# NumPy's, from Triton's interpreter, at what a GPU does silently: 1/0, 0·inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if GPU else "cpu"
F32 = np.dtype(np.float32)
RULES = ["nf4", "fp4", "dynamic8", "2 bits", "3 bits"]  # a kernel each
# 16 to 256: lanes of one warp; 512, 4096: several warps. 20 and 7: no power of two; with 7, blocks
# begin inside bytes.
BLOCKSIZES = [16, 64, 256, 512, 4096, 20, 7]
ids = {"ids": str}


class Kernels(NamedTuple):
    """A backend's kernels, from NumPy arrays to NumPy arrays."""

    backend: str
    module: Any

    def put(self, array: Any, misaligned: bool = False) -> Any:
        """A tensor on the device; of the array's own memory where that is the CPU's."""
        if array is None:
            return None
        raw = array.view(np.int16) if array.dtype == BF16 else array
        tensor = torch.from_numpy(raw).to(DEVICE)
        if array.dtype == BF16:
            tensor = tensor.view(torch.bfloat16)
        if misaligned:
            moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)
            tensor = moved[1:].copy_(tensor.reshape(-1)).view(tensor.shape)
        return tensor

    def get(self, tensor: Any, dtype: Any) -> np.ndarray:
        tensor = tensor.cpu()
        if dtype == BF16:
            return tensor.view(torch.int16).numpy().view(BF16)
        return tensor.numpy()

    def place(self) -> tuple[int, Any]:
        stream = torch.cuda.current_stream().cuda_stream if GPU else 0
        return stream, torch.zeros(len(FLAGS), dtype=torch.int32, device=DEVICE)

    def quantize(self, x, code, blocksize, put=lambda a: a, misaligned=False):
        """Outputs are filled with rubbish before."""
        rule = int(reference.is_fp4(code))
        size = reference.packed_bytes(x.size, reference.BITS[code.size])
        codes = self.put(put(np.full(size, 0xA5, np.uint8)), misaligned)
        absmax = self.put(put(np.full(-(-x.size // blocksize), -7, np.float32)), misaligned)
        self.module.quantize(
            self.put(put(x), misaligned), DTYPES[x.dtype], x.size, self.put(put(code)), code.size,
            rule, blocksize, codes, absmax, self.place(),
        )  # fmt: skip
        return self.get(codes, np.uint8), self.get(absmax, F32)

    def dequantize(
        self, codes, count, code, scales, blocksize, dtype, put=lambda a: a, misaligned=False
    ):
        out = self.put(put(np.full(count, 7, dtype)), misaligned)
        self.module.dequantize(
            self.put(put(codes), misaligned), count, self.put(put(code)), code.size,
            *self.scales(scales, put), blocksize, out, DTYPES[np.dtype(dtype)], self.place(),
        )  # fmt: skip
        return self.get(out, dtype)

    def linear(
        self, x, codes, code, scales, blocksize, shape, transposed=False, bias=None,
        put=lambda a: a, misaligned=False,
    ):  # fmt: skip
        y = np.full((x.shape[0], shape[1] if transposed else shape[0]), 7, x.dtype)
        y = self.put(put(y), misaligned)
        self.module.codebook_linear(
            self.put(put(x), misaligned), DTYPES[x.dtype], x.shape[0], self.put(put(codes), misaligned),
            self.put(put(code)), code.size, *self.scales(scales, put), blocksize, *shape, transposed,
            None if bias is None else self.put(put(bias)), y, self.place(),
        )  # fmt: skip
        return self.get(y, x.dtype)

    def scales(self, scales: Any, put: Any) -> list[Any]:
        if isinstance(scales, np.ndarray):
            scales = Nested(scales)
        return [self.put(put(s)) if isinstance(s, np.ndarray) else s for s in scales]


@pytest.fixture(params=["cuda", "triton"])
def kernels(request) -> Kernels:
    why = unavailable(request.param)
    if why:
        pytest.skip(why)
    if request.param == "cuda":
        return Kernels("cuda", import_module("finefuse._CUDA"))
    request.getfixturevalue("triton_kernels")
    return Kernels("triton", import_module("finefuse.kernels.codebook"))


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_bits(kernels: Kernels, ours: np.ndarray, want: np.ndarray) -> None:
    if ours.dtype == BF16 and kernels.backend == "triton" and not GPU:
        a, b = (bits(v).astype(np.int32) for v in (ours, want))
        value = np.abs(want.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(ours.astype(np.float32)), np.isnan(value))
        assert np.abs(a - b)[value >= 2.0**-126].max(initial=0) <= 1
        return
    np.testing.assert_array_equal(bits(ours), bits(want), str(ours.dtype))


def assert_quantized(kernels, x, code, blocksize, **options):
    codes, absmax = kernels.quantize(x, code, blocksize, **options)
    want_codes, want_absmax = reference.quantize(x, code, blocksize)
    np.testing.assert_array_equal(bits(absmax), bits(want_absmax), "absmax")
    np.testing.assert_array_equal(codes, want_codes, "codes")
    return codes, absmax


def assert_dequantized(
    kernels, codes, count, code, scales, blocksize, dtypes=DTYPES, want=None, **options
):
    if want is None:
        want = reference.dequantize(codes, count, code, scales, blocksize)
    for dtype in dtypes:
        out = kernels.dequantize(codes, count, code, scales, blocksize, dtype, **options)
        with np.errstate(over="ignore", invalid="ignore"):
            assert_bits(kernels, out, want.astype(dtype))


# ---- quantise and dequantise ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocksize", "dtype"),
    [*((b, F32) for b in BLOCKSIZES), *((b, d) for b in (64, 512) for d in list(DTYPES)[1:])],
    **ids,
)
@pytest.mark.parametrize("name", RULES)
def test_bytes(kernels, name, blocksize, dtype):
    # 3: less than a byte's worth or a lane's. 4096: whole. 4355: odd, a short last block, several blocks
    # of threads.
    for count in (3, 4096, 4355):
        x = rng(count).standard_normal(count).astype(dtype)
        codes, absmax = assert_quantized(kernels, x, CODES[name], blocksize)
        assert_dequantized(kernels, codes, count, CODES[name], absmax, blocksize, [dtype])


@pytest.mark.parametrize("name", CODES)
def test_codebooks(kernels, name):
    """Repeated, dense, denormal entries; entries beyond 1."""
    x = rng(0).standard_normal(1003).astype(np.float32)
    x[:64] = np.geomspace(1e-30, 1, 64)
    codes, absmax = assert_quantized(kernels, x, CODES[name], 64)
    assert_dequantized(kernels, codes, x.size, CODES[name], absmax, 64)


@pytest.mark.parametrize("name", [*RULES, "int4", "dense"])
def test_thresholds(kernels, name):
    """Ties go to the lower index: the float32 numbers at and beside every threshold."""
    m = reference.FP4_THRESHOLDS if name == "fp4" else reference.thresholds(CODES[name])
    m = m[np.abs(m) <= 1]
    near = [m, np.nextafter(m, np.float32(9)), np.nextafter(m, np.float32(-9))]
    x = np.concatenate([*near, *(-n for n in near), [0.0, -0.0]]).astype(np.float32)
    x = np.append(x[np.abs(x) <= 1], np.float32(1))
    for blocksize in (4096, 5000):
        assert_quantized(kernels, x, CODES[name], blocksize)


@pytest.mark.parametrize("blocksize", [16, 64, 512, 20])
@pytest.mark.parametrize("name", RULES)
def test_edge_blocks(kernels, name, blocksize):
    """Odd blocks, each between ordinary ones, which it must not touch; the last is short."""
    parts = []
    for edge in EDGES.values():
        parts += [
            rng(1).standard_normal(blocksize),
            np.resize(np.array(edge, np.float32), blocksize),
        ]
    x = np.concatenate(parts)[: -blocksize // 2].astype(np.float32)
    with np.errstate(all="ignore"):
        codes, absmax = assert_quantized(kernels, x, CODES[name], blocksize)
        assert_dequantized(kernels, codes, x.size, CODES[name], absmax, blocksize)
        if GPU or kernels.backend == "cuda":  # the interpreter loads denormal bfloat16 wrongly
            assert_quantized(kernels, x.astype(BF16), CODES[name], blocksize)


@pytest.mark.parametrize("name", RULES)
def test_every_scale(kernels, name):
    """Products that are denormal or overflow the narrower types, and infinite or NaN absmax."""
    code = CODES[name]
    codes = reference.pack(np.arange(16) % code.size, reference.BITS[code.size])
    scales = np.concatenate([2.0 ** np.arange(-149, 128) * 1.37, [0, np.inf, np.nan, -1.5]])
    scales = np.minimum(scales, 3.4028235e38, where=np.isfinite(scales), out=scales)
    scales = scales.astype(np.float32)
    assert_dequantized(kernels, np.tile(codes, scales.size), 16 * scales.size, code, scales, 16)


@pytest.mark.parametrize("nested_blocksize", [256, 100])
@pytest.mark.parametrize("blocksize", [16, 64, 7])
@pytest.mark.parametrize("name", RULES)
def test_double_quantisation(kernels, name, blocksize, nested_blocksize):
    count = 300 * blocksize + 5  # 301 blocks: several nested blocks, the last one short
    x = rng(2).standard_normal(count).astype(np.float32)
    codes, absmax = reference.quantize(x, CODES[name], blocksize)
    nested, scales, offset = reference.double_quantize(absmax, nested_blocksize)
    ours = kernels.quantize(absmax - offset, reference.DYNAMIC8, nested_blocksize)
    np.testing.assert_array_equal(ours[0], nested)
    np.testing.assert_array_equal(ours[1], scales)
    args = (nested, reference.DYNAMIC8, scales, nested_blocksize, float(offset))
    absmax = reference.nested_absmax(*args)
    want = reference.dequantize(codes, count, CODES[name], absmax, blocksize)
    given = Nested(None, *args)
    assert_dequantized(kernels, codes, count, CODES[name], given, blocksize, want=want)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("name", RULES)
def test_misaligned(kernels, name, dtype):
    x = rng(3).standard_normal(2047).astype(dtype)
    codes, absmax = assert_quantized(kernels, x, CODES[name], 64, misaligned=True)
    assert_dequantized(kernels, codes, x.size, CODES[name], absmax, 64, [dtype], misaligned=True)


def test_empty(kernels):
    for code in CODES.values():
        codes, absmax = kernels.quantize(np.zeros(0, np.float32), code, 64)
        assert codes.size == absmax.size == 0
        assert kernels.dequantize(codes, 0, code, absmax, 64, F32).size == 0


# ---- linear --------------------------------------------------------------------------------------


def assert_linear(kernels, x, codes, code, scales, blocksize, shape, bias, absmax, **options):
    rows, columns = shape
    weight = reference.dequantize(codes, rows * columns, code, absmax, blocksize).reshape(shape)
    # eager: the decoded weight rounded to x's type, products and sums in float32
    eager = weight.astype(x.dtype).astype(np.float32)
    y = kernels.linear(x, codes, code, scales, blocksize, shape, bias=bias, **options)
    got = x.astype(np.float32) @ eager.T
    got = got if bias is None else got + bias.astype(np.float32)
    truth = reference.codebook_linear(x, codes, code, absmax, blocksize, shape, bias)
    check("y", y, got.astype(x.dtype), truth, x.dtype)
    dy = rng(5).standard_normal((x.shape[0], rows)).astype(x.dtype)
    dx = kernels.linear(dy, codes, code, scales, blocksize, shape, transposed=True, **options)
    got = (dy.astype(np.float32) @ eager).astype(x.dtype)
    check("dx", dx, got, dy.astype(np.float64) @ weight.astype(np.float64), x.dtype)


# tokens: 7 = 4 + 2 + 1, every number that a CUDA kernel takes at a time. columns: 512 is whole, 2304
# split over warps; 608 shares blocks between rows and ends inside a warp's load; 129 and 7: rows begin
# inside bytes. rows: 37, 18 and 70 are no multiples of a warp's; 70 more than a block's in one step; 3 less
# than a warp's.
@pytest.mark.parametrize(
    "shape", [(37, 512), (6, 2304), (18, 608), (70, 72), (5, 129), (3, 64), (5, 7)], **ids
)
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(1, BF16), (7, F32), (7, BF16), (7, np.dtype(np.float16)), (8, F32)],
    **ids,
)
def test_linear(kernels, tokens, shape, dtype):
    code, blocksize = CODES["nf4"], 64
    weight = rng(tokens).standard_normal(shape).astype(np.float32)
    codes, absmax = reference.quantize(weight, code, blocksize)
    x = rng(4).standard_normal((tokens, shape[1])).astype(dtype)
    bias = rng(6).standard_normal(shape[0]).astype(dtype) if tokens > 1 else None
    assert_linear(kernels, x, codes, code, absmax, blocksize, shape, bias, absmax)


@pytest.mark.parametrize("blocksize", [8, 16, 4096, 24])
@pytest.mark.parametrize("name", [*RULES, "int4"])
def test_linear_of_other_codes_and_nested(kernels, name, blocksize):
    for shape in ((19, 384), (6, 333)):
        weight = rng(9).standard_normal(shape).astype(np.float32)
        codes, absmax = reference.quantize(weight, CODES[name], blocksize)
        nested, scales, offset = reference.double_quantize(absmax)
        args = (nested, reference.DYNAMIC8, scales, 256, float(offset))
        x = rng(4).standard_normal((3, shape[1])).astype(np.float32)
        given, absmax = Nested(None, *args), reference.nested_absmax(*args)
        assert_linear(kernels, x, codes, CODES[name], given, blocksize, shape, None, absmax)


def test_linear_misaligned(kernels):
    shape = (8, 512)
    codes, absmax = reference.quantize(rng(0).standard_normal(shape), reference.NF4, 64)
    x = rng(1).standard_normal((3, 512)).astype(np.float32)
    assert_linear(
        kernels, x, codes, reference.NF4, absmax, 64, shape, None, absmax, misaligned=True
    )


@pytest.mark.parametrize("columns", [512, 130])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_linear_with_a_bad_block(kernels, columns, bad):
    """inf and NaN in one block reach that row alone, as in the decoded weight; an inf in x every row."""
    codes, absmax = reference.quantize(rng(4).standard_normal((6, columns)), reference.NF4, 32)
    absmax[columns // 32] = bad  # in row 1 (and 0, where they share it)
    x = np.abs(rng(5).standard_normal((3, columns)).astype(np.float32))
    x[2, 5] = np.inf
    dy = rng(5).standard_normal((3, 6)).astype(np.float32)
    dy[1] = 0
    with np.errstate(invalid="ignore"):
        weight = reference.dequantize(codes, 6 * columns, reference.NF4, absmax, 32)
        truth = x.astype(np.float64) @ weight.reshape(6, columns).astype(np.float64).T
        dx = dy.astype(np.float64) @ weight.reshape(6, columns).astype(np.float64)
    for transposed, argument, want in ((False, x, truth), (True, dy, dx)):
        y = kernels.linear(
            argument, codes, reference.NF4, absmax, 32, (6, columns), transposed=transposed
        )
        np.testing.assert_array_equal(np.isnan(y), np.isnan(want))
        np.testing.assert_array_equal(y[np.isinf(want)], want[np.isinf(want)])


def test_linear_of_nothing(kernels):
    codes, absmax = reference.quantize(np.ones(0, np.float32), reference.NF4, 64)
    for shape in ((0, 8), (8, 0)):
        for tokens in (0, 2):
            bias = np.arange(shape[0], dtype=np.float32)
            x = np.zeros((tokens, shape[1]), np.float32)
            y = kernels.linear(x, codes, reference.NF4, absmax, 64, shape, bias=bias)
            np.testing.assert_array_equal(y, np.tile(bias, (tokens, 1)))
            dy = np.zeros((tokens, shape[0]), np.float32)
            dx = kernels.linear(dy, codes, reference.NF4, absmax, 64, shape, transposed=True)
            np.testing.assert_array_equal(dx, np.zeros((tokens, shape[1])))


# ---- bounds --------------------------------------------------------------------------------------


@pytest.mark.skipif(GPU, reason="guard pages are the CPU's; on a GPU compute-sanitizer looks")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("name", RULES)
def test_nothing_out_of_bounds(kernels, name, dtype, at_end):
    def put(array):
        return between_guards(np.ascontiguousarray(array), at_end)

    code = CODES[name]
    for shape, blocksize in (((1, 1), 16), ((3, 43), 16), ((5, 128), 64), ((4, 264), 24)):
        x = rng(0).standard_normal(shape).astype(dtype)
        codes, absmax = kernels.quantize(x.ravel(), code, blocksize, put=put)
        nested = Nested(
            None, np.zeros(absmax.size, np.uint8), reference.DYNAMIC8,
            np.ones(-(-absmax.size // 16), np.float32), 16, 2.0,
        )  # fmt: skip
        for scales in (absmax, nested):
            count = shape[0] * shape[1]
            out = kernels.dequantize(codes, count, code, scales, blocksize, dtype, put=put)
            assert np.isfinite(out.astype(np.float32)).all()
            for transposed in (False, True):
                x = rng(1).standard_normal((3, shape[not transposed])).astype(dtype)
                bias = None if transposed else np.ones(shape[0], dtype)
                y = kernels.linear(
                    x, codes, code, scales, blocksize, shape, transposed, bias, put=put
                )
                assert np.isfinite(y.astype(np.float32)).all()
