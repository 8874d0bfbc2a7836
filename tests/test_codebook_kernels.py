"""The CPU kernels of `codebook` against SPEC section 1, byte for byte, on every ISA level.

`finefuse._C` is called with NumPy arrays: no torch here. Whatever is a format (codes, absmax, decoded
elements) must equal the reference exactly; sums of products follow the error rule.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import pytest
from codebook_arrays import (
    BF16,
    CODES,
    DTYPES,
    EDGES,
    Nested,
    bits,
)
from finefuse import _C
from finefuse.reference import codebook as reference
from guards import between_guards
from tolerances import check

ids = {"ids": str}
# 16: less than a vector of codes. 64, 256, 4096: what is used. 20 and 7: no power of two; with 7,
# blocks begin inside bytes.
BLOCKSIZES = [16, 32, 64, 256, 4096, 20, 7]


def quantize(x, code, blocksize, threads=1, put=lambda a: a):
    """Outputs are filled with rubbish before."""
    rule = int(reference.is_fp4(code))
    codes = put(np.full(reference.packed_bytes(x.size, reference.BITS[code.size]), 0xA5, np.uint8))
    absmax = put(np.full(-(-x.size // blocksize), -7, np.float32))
    _C.quantize(
        put(x), DTYPES[x.dtype], x.size, put(code), code.size, rule, blocksize, codes, absmax,
        threads,
    )  # fmt: skip
    return codes, absmax


def dequantize(codes, count, code, scales, blocksize, dtype, threads=1, out=None):
    if isinstance(scales, np.ndarray):
        scales = Nested(scales)
    if out is None:
        out = np.full(count, 7, dtype)
    _C.dequantize(
        codes, count, code, code.size, *scales, blocksize, out, DTYPES[np.dtype(dtype)], threads
    )
    return out


def linear(x, codes, code, scales, blocksize, shape, *, transposed=False, bias=None, threads=1):
    if isinstance(scales, np.ndarray):
        scales = Nested(scales)
    y = np.full((x.shape[0], shape[1] if transposed else shape[0]), 7, x.dtype)
    _C.codebook_linear(
        x, DTYPES[x.dtype], x.shape[0], codes, code, code.size, *scales, blocksize, *shape,
        transposed, bias, y, threads,
    )  # fmt: skip
    return y


def assert_quantized(x, code, blocksize, **options):
    codes, absmax = quantize(x, code, blocksize, **options)
    want_codes, want_absmax = reference.quantize(x, code, blocksize)
    np.testing.assert_array_equal(bits(absmax), bits(want_absmax), "absmax")
    np.testing.assert_array_equal(codes, want_codes, "codes")
    return codes, absmax


def assert_dequantized(codes, count, code, scales, blocksize, want=None, **options):
    if want is None:
        want = reference.dequantize(codes, count, code, scales, blocksize)
    for dtype in DTYPES:
        out = dequantize(codes, count, code, scales, blocksize, dtype, **options)
        with np.errstate(over="ignore", invalid="ignore"):
            np.testing.assert_array_equal(bits(out), bits(want.astype(dtype)), str(dtype))


# ---- the tables ----------------------------------------------------------------------------------


def test_dynamic8_is_bitsandbytes():
    table = reference.DYNAMIC8.astype("<f4").tobytes()
    want = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(table).hexdigest() == want
    assert reference.DYNAMIC8[127] == 0


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 24, 101])
def test_pack_and_unpack(width, count):
    codes = np.random.default_rng(0).integers(0, 2**width, count).astype(np.uint8)
    packed = reference.pack(codes, width, pad=1)
    assert packed.size == reference.packed_bytes(count, width)
    np.testing.assert_array_equal(reference.unpack(packed, width, count), codes)
    if width == 4 and count == 7:
        assert packed[3] == codes[6] << 4 | 1  # first element high; padded


# ---- quantise and dequantise ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", CODES)
def test_bytes(isa, name, blocksize, dtype):
    # 1, 3: less than a byte's worth or a group's. 4099: odd, a short last block.
    for count in (1, 3, 64, 513, 4099):
        x = np.random.default_rng(count).standard_normal(count).astype(dtype)
        codes, absmax = assert_quantized(x, CODES[name], blocksize)
        if dtype == np.float32:
            assert_dequantized(codes, count, CODES[name], absmax, blocksize)


def test_empty(isa):
    for code in CODES.values():
        codes, absmax = quantize(np.zeros(0, np.float32), code, 64)
        assert codes.size == absmax.size == 0
        assert dequantize(codes, 0, code, absmax, 64, np.float32).size == 0


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], **ids)
@pytest.mark.parametrize("name", ["nf4", "fp4", "dynamic8", "3 bits", "dense"])
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-40, 3e38])
def test_every_16_bit_number(isa, name, dtype, scale):
    """All finite numbers of a type as x' of one block, whose absmax is `scale` or the largest of them."""
    x = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    x = x[np.isfinite(x)]
    assert_quantized(x, CODES[name], x.size)
    x = np.concatenate([x[np.abs(x) <= 1], [1.0]]).astype(np.float32) * np.float32(scale)
    assert_quantized(x, CODES[name], x.size)
    if scale == 1.0:
        assert_quantized(x.astype(dtype), CODES[name], 4096)


@pytest.mark.parametrize("name", CODES)
def test_thresholds(isa, name):
    """Ties go to the lower index: the float32 numbers at and beside every threshold."""
    m = reference.FP4_THRESHOLDS if name == "fp4" else reference.thresholds(CODES[name])
    m = m[np.abs(m) <= 1]
    near = [m, np.nextafter(m, np.float32(9)), np.nextafter(m, np.float32(-9))]
    x = np.concatenate([*near, *(-n for n in near), [0.0, -0.0, 1.0, -1.0]]).astype(np.float32)
    x = x[np.abs(x) <= 1]
    assert_quantized(x, CODES[name], x.size)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", CODES)
def test_edge_blocks(isa, name, edge):
    """An odd block between ordinary ones, which it must not touch; a full one, a short one."""
    random = np.random.default_rng(1).standard_normal(64 * 3).astype(np.float32)
    for size in (64, 64 * 2 + 5):
        x = random[: size + 64 - size % 64].copy()[: max(size, 64)]
        start = (size - 1) // 64 * 64
        x[start:] = np.resize(np.array(EDGES[edge], np.float32), x.size - start)
        with np.errstate(all="ignore"):
            codes, absmax = assert_quantized(x, CODES[name], 64)
            assert_dequantized(codes, x.size, CODES[name], absmax, 64)


def test_edge_blocks_as_the_specification_says(isa):
    def decoded(x):
        codes, absmax = quantize(np.array(x, np.float32), reference.NF4, 64)
        out = dequantize(codes, len(x), reference.NF4, absmax, 64, np.float32)
        return reference.unpack(codes, 4, len(x)), absmax[0], out

    codes, absmax, out = decoded([0.0, -0.0])
    assert (codes == 7).all()
    assert absmax == 0
    assert (bits(out) == 0).all()
    codes, absmax, out = decoded([0.0, np.nan])
    assert (codes == 15).all()
    assert np.isnan(absmax)
    assert np.isnan(out).all()
    codes, absmax, out = decoded([np.inf, -np.inf, 1.0])
    assert codes.tolist() == [15, 0, 7]
    assert absmax == np.inf
    np.testing.assert_array_equal(out, [np.inf, -np.inf, np.nan])


@pytest.mark.parametrize("name", CODES)
def test_every_scale(isa, name):
    """Products that are denormal or overflow the narrower types, and infinite or NaN absmax."""
    code = CODES[name]
    codes = reference.pack(np.arange(64) % code.size, reference.BITS[code.size])
    exponents = np.arange(-149, 128, 1, dtype=np.float64)
    scales = np.concatenate([2.0**exponents * 1.37, [0, -0.0, np.inf, np.nan, 3.4e38, -1.5]])
    scales = np.minimum(scales, 3.4028235e38, where=np.isfinite(scales), out=scales)
    scales = scales.astype(np.float32)
    assert_dequantized(np.tile(codes, scales.size), 64 * scales.size, code, scales, 64)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", ["nf4", "fp4", "dynamic8", "2 bits", "3 bits"])
def test_double_quantisation(isa, name, blocksize):
    count = 300 * blocksize + 5  # 301 blocks: two nested blocks, the second short
    x = np.random.default_rng(2).standard_normal(count).astype(np.float32)
    codes, absmax = reference.quantize(x, CODES[name], blocksize)
    for nested_blocksize in (256, 100):
        nested, scales, offset = reference.double_quantize(absmax, nested_blocksize)
        ours = quantize(absmax - offset, reference.DYNAMIC8, nested_blocksize)
        np.testing.assert_array_equal(ours[0], nested)
        np.testing.assert_array_equal(ours[1], scales)
        args = (nested, reference.DYNAMIC8, scales, nested_blocksize, float(offset))
        want = reference.dequantize(
            codes, count, CODES[name], reference.nested_absmax(*args), blocksize
        )
        given = Nested(None, *args)
        assert_dequantized(codes, count, CODES[name], given, blocksize, want=want)


@pytest.mark.parametrize("name", ["nf4", "dynamic8", "3 bits"])
def test_large_and_threads(isa, name):
    """Beyond what is written past the caches (16 MB); the same bits from any number of threads."""
    count = (1 << 22) + 4096 + 77
    x = np.random.default_rng(3).standard_normal(count).astype(np.float32)
    codes, absmax = quantize(x, CODES[name], 64)
    again = quantize(x, CODES[name], 64, threads=3)
    np.testing.assert_array_equal(codes, again[0])
    np.testing.assert_array_equal(absmax, again[1])
    sample = slice(0, 64 * 1000)
    want, _ = reference.quantize(x[sample], CODES[name], 64)
    np.testing.assert_array_equal(codes[: want.size], want)
    want = reference.dequantize(codes, count, CODES[name], absmax, 64)
    memory = np.zeros(count * 4 + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][: count * 4].view(np.float32)
    for threads in (1, 3):
        for out in (aligned, np.zeros(count + 1, np.float32)[1:]):
            out[:] = 7
            dequantize(codes, count, CODES[name], absmax, 64, np.float32, threads, out=out)
            np.testing.assert_array_equal(out, want)


# ---- linear --------------------------------------------------------------------------------------


def assert_linear(x, codes, code, scales, blocksize, shape, bias, absmax):
    rows, columns = shape
    weight = reference.dequantize(codes, rows * columns, code, absmax, blocksize).reshape(shape)
    wide = weight.astype(np.float64)
    # eager: the decoded weight rounded to x's type, products and sums in float32
    eager = weight.astype(x.dtype).astype(np.float32)
    truth = reference.codebook_linear(x, codes, code, absmax, blocksize, shape, bias)
    for threads in (1, 3):
        y = linear(x, codes, code, scales, blocksize, shape, bias=bias, threads=threads)
        got = x.astype(np.float32) @ eager.T
        got = got if bias is None else got + bias.astype(np.float32)
        check("y", y, got.astype(x.dtype), truth, x.dtype)
    dy = np.random.default_rng(5).standard_normal((x.shape[0], rows)).astype(x.dtype)
    first = linear(dy, codes, code, scales, blocksize, shape, transposed=True)
    got = (dy.astype(np.float32) @ eager).astype(x.dtype)
    check("dx", first, got, dy.astype(np.float64) @ wide, x.dtype)
    again = linear(dy, codes, code, scales, blocksize, shape, transposed=True, threads=3)
    np.testing.assert_array_equal(bits(first), bits(again))


@functools.cache
def quantized(name, blocksize, shape):
    """By the reference, which takes longer, block by block, than what is tested: once for all cases."""
    weight = np.random.default_rng(shape[1]).standard_normal(shape).astype(np.float32)
    return reference.quantize(weight, CODES[name], blocksize)


# tokens: each number of accumulators and its remainders. columns: 512 has rows of whole groups; 4224
# more than one chunk; 64·17.5 = 1120 shares blocks between rows; 129, 7 and 1: rows begin inside bytes.
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("columns", [512, 4224, 1120, 129, 7, 1])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 16])
def test_linear(isa, tokens, columns, dtype):
    rng = np.random.default_rng(tokens)
    shape = (37, columns)  # two panels of rows and a part
    for name, blocksize in (("nf4", 64), ("fp4", 16), ("nf4", 4096), ("nf4", 24)):
        codes, absmax = quantized(name, blocksize, shape)
        x = rng.standard_normal((tokens, columns)).astype(dtype)
        bias = rng.standard_normal(shape[0]).astype(dtype) if blocksize != 16 else None
        assert_linear(x, codes, CODES[name], absmax, blocksize, shape, bias, absmax)


@pytest.mark.parametrize("name", ["2 bits", "3 bits", "dynamic8", "int4"])
def test_linear_of_other_widths_and_nested(isa, name):
    rng = np.random.default_rng(9)
    for shape in ((19, 384), (5, 333)):
        weight, blocksize = rng.standard_normal(shape).astype(np.float32), 32
        codes, absmax = reference.quantize(weight, CODES[name], blocksize)
        nested, scales, offset = reference.double_quantize(absmax)
        args = (nested, reference.DYNAMIC8, scales, 256, float(offset))
        x = rng.standard_normal((3, shape[1])).astype(np.float32)
        given, absmax = Nested(None, *args), reference.nested_absmax(*args)
        assert_linear(x, codes, CODES[name], given, blocksize, shape, None, absmax)


@pytest.mark.parametrize("columns", [512, 130])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_linear_with_a_bad_block(isa, tokens, columns, bad):
    """inf and NaN in one block reach that row alone, as in the decoded weight; an inf in x every row."""
    weight = np.random.default_rng(4).standard_normal((6, columns)).astype(np.float32)
    codes, absmax = reference.quantize(weight, reference.NF4, 32)
    absmax[columns // 32] = bad  # in row 1 (and 0, where they share it)
    x = np.abs(np.random.default_rng(5).standard_normal((tokens, columns)).astype(np.float32))
    x[2:, 5] = np.inf
    with np.errstate(invalid="ignore"):
        truth = reference.codebook_linear(x, codes, reference.NF4, absmax, 32, (6, columns))
    y = linear(x, codes, reference.NF4, absmax, 32, (6, columns))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(truth))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(truth))


@pytest.mark.parametrize("tokens", [1, 16])
def test_linear_of_many_rows(isa, tokens):
    """dx is a sum over the rows, of which no chain of float32 additions may be that long."""
    weight = np.random.default_rng(4).standard_normal((4099, 66)).astype(np.float32)
    codes, absmax = reference.quantize(weight, reference.NF4, 64)
    x = np.random.default_rng(5).standard_normal((tokens, 66)).astype(np.float32)
    assert_linear(x, codes, reference.NF4, absmax, 64, (4099, 66), None, absmax)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_linear_of_large_numbers(isa, tokens):
    """x·code overflows before absmax makes it small, or cancels as inf - inf; the product is finite."""
    weight = np.random.default_rng(4).standard_normal((6, 512)).astype(np.float32) * 1e-4
    codes, absmax = reference.quantize(weight, reference.NF4, 64)
    x = np.clip(np.random.default_rng(5).standard_normal((tokens, 512)) * 1e38, -3e38, 3e38)
    assert_linear(x.astype(np.float32), codes, reference.NF4, absmax, 64, (6, 512), None, absmax)


def test_linear_of_nothing(isa):
    codes, absmax = reference.quantize(np.ones(0, np.float32), reference.NF4, 64)
    for shape in ((0, 8), (8, 0)):
        bias = np.arange(shape[0], dtype=np.float32)
        y = linear(
            np.zeros((2, shape[1]), np.float32), codes, reference.NF4, absmax, 64, shape, bias=bias
        )
        np.testing.assert_array_equal(y, np.tile(bias, (2, 1)))
        dx = linear(
            np.zeros((2, shape[0]), np.float32), codes, reference.NF4, absmax, 64, shape,
            transposed=True,
        )  # fmt: skip
        np.testing.assert_array_equal(dx, np.zeros((2, shape[1])))


# ---- bounds and arguments ------------------------------------------------------------------------


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("name", ["nf4", "fp4", "dynamic8", "2 bits", "3 bits", "dense"])
def test_nothing_out_of_bounds(isa, name, dtype, at_end):
    def put(array):
        return between_guards(array, at_end)

    code = CODES[name]
    for shape, blocksize in (((1, 1), 16), ((3, 43), 16), ((2, 128), 64), ((4, 256), 128)):
        x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        codes, absmax = quantize(x.ravel(), code, blocksize, put=put)
        out = put(np.zeros(x.size, dtype))
        dequantize(codes, x.size, put(code), absmax, blocksize, dtype, out=out)
        assert np.isfinite(out.astype(np.float32)).all()
        nested = Nested(None, *(put(a) for a in (np.zeros(absmax.size, np.uint8), reference.DYNAMIC8,
                                                 np.ones(1, np.float32))), 256, 2.0)  # fmt: skip
        dequantize(codes, x.size, put(code), nested, blocksize, dtype, out=out)
        for scales in (absmax, nested):
            linear(put(x), codes, put(code), scales, blocksize, shape, bias=put(out[: shape[0]]))
            linear(
                put(out[: shape[0]].reshape(1, -1)), codes, put(code), scales, blocksize, shape,
                transposed=True,
            )  # fmt: skip


def test_wrong_arguments():
    x, code = np.zeros(64, np.float32), reference.NF4
    codes, absmax = np.zeros(32, np.uint8), np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="code: 5 entries"):
        _C.quantize(x, 0, 64, code, 5, 0, 64, codes, absmax, 1)
    with pytest.raises(ValueError, match="blocksize"):
        _C.quantize(x, 0, 64, code, 16, 0, 0, codes, absmax, 1)
    with pytest.raises(TypeError, match="float64"):
        _C.quantize(x, 3, 64, code, 16, 0, 64, codes, absmax, 1)
    with pytest.raises(TypeError, match="absmax_codes"):
        _C.dequantize(codes, 64, code, 16, None, None, None, None, 0, 0.0, 64, x, 0, 1)


# ---- the reference itself ------------------------------------------------------------------------


def test_learned_codebook_beats_nf4_where_weights_are_not_normal():
    x = np.random.default_rng(6).laplace(size=64 * 500).astype(np.float32)

    def error(code):
        codes, absmax = reference.quantize(x, code, 64)
        return np.square(x - reference.dequantize(codes, x.size, code, absmax, 64)).mean()

    code = reference.learn_codebook(x, bits=4, blocksize=64)
    assert code.shape == (16,)
    assert (np.diff(code) >= 0).all()
    assert error(code) < 0.95 * error(reference.NF4)
    uniform = np.linspace(-1, 1, 8, dtype=np.float32)
    assert error(reference.learn_codebook(x, bits=3)) < error(uniform)


# ---- bitsandbytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_bytes_of_bitsandbytes(isa, quant_type, blocksize):
    torch = pytest.importorskip("torch", reason="bitsandbytes needs torch")
    peer = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    x = torch.randn(130, 256, generator=torch.Generator().manual_seed(0))
    x[3, :5] = 0
    theirs, state = peer.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    code, flat = reference.CODES[quant_type], x.numpy().ravel()
    np.testing.assert_array_equal(code, state.code.numpy())
    codes, absmax = quantize(flat, code, blocksize)
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    if quant_type == "nf4":
        np.testing.assert_array_equal(codes, theirs.numpy().ravel())
    else:  # its CPU path swaps the two zeros, and has thresholds a few units in the last place off
        ours, want = (reference.unpack(c, 4, x.numel()) for c in (codes, theirs.numpy().ravel()))
        scaled = np.abs(flat / np.repeat(absmax, blocksize))
        near = np.abs(scaled[:, None] - reference.FP4_THRESHOLDS).min(axis=1) < 1e-6
        np.testing.assert_array_equal(code[ours][~near], code[want][~near])
    for dtype in DTYPES:
        state.dtype = getattr(torch, str(dtype))
        want = peer.dequantize_4bit(theirs, state).float().numpy().ravel()
        ours = dequantize(theirs.numpy(), x.numel(), code, absmax, blocksize, dtype)
        np.testing.assert_array_equal(ours.astype(np.float32), want)
    # nested: their offset given, where their 8-bit code is the nearest
    theirs, state = peer.quantize_4bit(
        x, blocksize=blocksize, quant_type=quant_type, compress_statistics=True
    )
    inner = state.state2
    np.testing.assert_array_equal(inner.code.numpy(), reference.DYNAMIC8)
    offset = np.float32(state.offset.item())
    nested, scales = quantize(absmax - offset, reference.DYNAMIC8, 256)
    np.testing.assert_array_equal(scales, inner.absmax.numpy())
    assert (nested == state.absmax.numpy()).mean() > 0.99
    given = Nested(
        None, state.absmax.numpy(), inner.code.numpy(), inner.absmax.numpy(), 256, float(offset)
    )
    state.dtype = torch.float32
    want = peer.dequantize_4bit(theirs, state).numpy().ravel()
    ours = dequantize(theirs.numpy(), x.numel(), code, given, blocksize, np.float32)
    np.testing.assert_array_equal(ours, want)
