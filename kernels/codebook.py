"""Codebook quantisation in Triton: what csrc/bindings/codebook.h has on GPUs. SPEC section 1, bit for bit.

    kernel                       reads + writes an element (16 bits, NF4)   bound by
    quantize                     2 + 0.56                                   comparisons, 15 an element
    absmax, encode               4 + 0.56                                   comparisons; any block size
    dequantize                   0.56 + 2                                   memory
    codebook_linear              0.56 for up to 8 tokens                    look-ups, then memory
    codebook_linear_transposed   0.56 for up to 8 tokens                    look-ups; few programs

A block costs 4 bytes more, 1.02 where its absmax is itself quantised: decoded in the same pass. 4-bit codes
are handled as bytes, two elements each; other widths, and rows or blocks that begin inside a byte, element by
element. The table is looked up in memory: it stays in L1.

Where bits are promised no a·b + c is fused (`fuse=False`) and divisions are div_rn; products in
codebook_linear are summed in float32, in an order that depends on the shape alone.

The host functions have names, arguments and meaning of csrc/bindings/codebook.h; `place` is (stream, flags).
They allocate nothing and wait for nothing.
"""

import triton
import triton.language as tl

from ._common import integer, launch

INF = tl.constexpr(float("inf"))
INF_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
TWO_TO_64 = tl.constexpr(2.0**64)
FP4_RULE = 1  # csrc/ops/codebook.h, enum CodeRule

_BITS = {4: 2, 8: 3, 16: 4, 256: 8}
_TILE, _WARPS = 2048, 4  # elements a program


def _log2(n):
    """(log2, True) of a power of two, else (n, False): what a kernel's _divide takes."""
    return (n.bit_length() - 1, True) if n > 0 and n & (n - 1) == 0 else (n, False)


@triton.jit
def _divide(i, n, SHIFT: tl.constexpr):
    return i >> n if SHIFT else i // n


# ---- quantise ----------------------------------------------------------------------------------


@triton.jit
def _magnitude(x):
    """|x| as an integer: its order, with NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scaled(x, absmax):
    """x' = x·(1/absmax), and at the edges: 0, infinite, and denormal, where 1/absmax is infinite.

    There SPEC divides in float64 and rounds to float32, which for two float32 numbers is what one division
    gives; 2^64 takes both out of the denormals.
    """
    reciprocal = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), absmax)
    edge = (reciprocal == INF) | (absmax == INF)
    y = x * reciprocal
    if tl.max(tl.ravel(edge.to(tl.int32)), 0) != 0:
        zero = tl.zeros_like(x)
        wide = tl.div_rn(x * TWO_TO_64, tl.where(absmax == 0.0, 1.0, absmax * TWO_TO_64) + zero)
        y = tl.where(reciprocal == INF, wide, y)
        y = tl.where(absmax == INF, tl.where(tl.abs(x) == INF, x, zero), y)
        y = tl.where(absmax == 0.0, zero, y)
    return y


@triton.jit
def _above(x, threshold):
    """1 where x lies above it, or is NaN."""
    return 1 - (x <= threshold).to(tl.int32)


@triton.jit
def _threshold(code, i):
    total = tl.load(code + i).to(tl.float64) + tl.load(code + i + 1).to(tl.float64)
    return (total * 0.5).to(tl.float32)


@triton.jit
def _nearest(x, code, BITS: tl.constexpr, FP4: tl.constexpr):
    """The codes of x'."""
    if FP4:
        y = tl.abs(x)
        rank = _above(y, 0.00260417) + _above(y, 0.0859375) + _above(y, 0.20833333)
        rank += _above(y, 0.29166667) + _above(y, 0.4166667) + _above(y, 0.583333)
        rank += _above(y, 0.8333333)
        by_rank = tl.full(x.shape, 0x32547610, tl.int32)  # SPEC: 0 1 6 7 4 5 2 3
        rank = ((by_rank >> (4 * rank)) & 15) + 8 * (x < 0.0).to(tl.int32)
    else:
        rank = tl.zeros(x.shape, tl.int32)
        if BITS <= 4:
            for i in tl.static_range(2**BITS - 1):
                rank += _above(x, _threshold(code, i))
        else:
            for i in tl.static_range(BITS):
                step = 2 ** (BITS - 1 - i)
                rank += step * _above(x, _threshold(code, rank + (step - 1)))
    return rank


@triton.jit
def _store_codes(c, codes, first, count, BITS: tl.constexpr, SIZE: tl.constexpr):
    """SIZE codes of the elements from `first` (a multiple of 8) on, most significant bits first."""
    if BITS == 3:
        k = tl.arange(0, 8)
        word = tl.sum(tl.reshape(c, (SIZE // 8, 8)) << (21 - 3 * k)[None, :], 1)
        group = first // 8 + tl.arange(0, SIZE // 8)
        inside = group * 8 < count
        tl.store(codes + group * 3, (word >> 16).to(tl.uint8), mask=inside)
        tl.store(codes + group * 3 + 1, ((word >> 8) & 255).to(tl.uint8), mask=inside)
        tl.store(codes + group * 3 + 2, (word & 255).to(tl.uint8), mask=inside)
    else:
        PER: tl.constexpr = 8 // BITS
        k = tl.arange(0, PER)
        byte = tl.sum(tl.reshape(c, (SIZE // PER, PER)) << ((PER - 1 - k) * BITS)[None, :], 1)
        i = first // PER + tl.arange(0, SIZE // PER)
        tl.store(codes + i, byte.to(tl.uint8), mask=i * PER < count)


@triton.jit
def _absmax_of_bits(bits):
    return tl.where(bits > INF_BITS, NAN_BITS, bits).to(tl.float32, bitcast=True)


@triton.jit
def quantize_kernel(
    x, count, code, codes, absmax,
    BITS: tl.constexpr, FP4: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    n = integer(count)
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = at < n
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = _absmax_of_bits(tl.max(_magnitude(v), 1))
    tl.store(absmax + block, scale, mask=block * BLOCKSIZE < n)
    y = _scaled(v, scale[:, None])
    c = _nearest(tl.where(inside, y, 0.0), code, BITS, FP4)
    _store_codes(c, codes, first * BLOCKSIZE, n, BITS, BLOCKS * BLOCKSIZE)


@triton.jit(do_not_specialize=["blocksize"])
def absmax_kernel(x, count, absmax, blocksize, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    n = integer(count)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    top = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for i in range(0, integer(blocksize), BLOCK):
        within = i + tl.arange(0, BLOCK)
        at = block[:, None] * blocksize + within[None, :]
        inside = (at < n) & (within < blocksize)[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, _magnitude(v))
    scale = _absmax_of_bits(tl.max(top, 1))
    tl.store(absmax + block, scale, mask=block * blocksize < n)


@triton.jit(do_not_specialize=["blocksize"])
def encode_kernel(
    x, count, code, codes, absmax, blocksize,
    BITS: tl.constexpr, FP4: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = integer(count)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < n
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y = _scaled(v, tl.load(absmax + at // blocksize, mask=inside, other=1.0))
    c = _nearest(tl.where(inside, y, 0.0), code, BITS, FP4)
    _store_codes(c, codes, first, n, BITS, BLOCK)


def quantize(x, dtype, count, code, entries, rule, blocksize, codes, absmax, place):
    if count == 0:
        return
    constants = {"BITS": _BITS[entries], "FP4": rule == FP4_RULE}
    if blocksize in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        blocks = max(1, _TILE // blocksize)
        launch(
            quantize_kernel, triton.cdiv(count, blocks * blocksize), x, count, code, codes, absmax,
            **constants, BLOCKSIZE=blocksize, BLOCKS=blocks, num_warps=_WARPS, fuse=False,
        )  # fmt: skip
        return
    launch(
        absmax_kernel, triton.cdiv(triton.cdiv(count, blocksize), 32), x, count, absmax, blocksize,
        BLOCKS=32, BLOCK=_TILE // 32, num_warps=_WARPS, fuse=False,
    )  # fmt: skip
    launch(
        encode_kernel, triton.cdiv(count, _TILE), x, count, code, codes, absmax, blocksize,
        **constants, BLOCK=_TILE, num_warps=_WARPS, fuse=False,
    )  # fmt: skip


# ---- dequantise --------------------------------------------------------------------------------


@triton.jit
def _absmax(
    block, mask, absmax, absmax_codes, nested_code, nested_absmax, nested_blocksize, offset,
    NESTED_SHIFT: tl.constexpr,
):  # fmt: skip
    """The absmax of blocks, 0 outside of the mask."""
    if absmax is not None:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    else:
        q = tl.load(absmax_codes + block, mask=mask, other=0).to(tl.int32)
        nested = _divide(block, nested_blocksize, NESTED_SHIFT)
        product = tl.load(nested_code + q) * tl.load(nested_absmax + nested, mask=mask, other=0.0)
        scale = tl.where(mask, product + tl.full((), offset, tl.float32), 0.0)
    return scale


@triton.jit
def _code_at(codes, i, mask, BITS: tl.constexpr):
    """The codes of elements, one by one; 0 outside of the mask."""
    if BITS == 3:
        p = codes + i // 8 * 3
        high = tl.load(p, mask=mask, other=0).to(tl.int32) << 16
        middle = tl.load(p + 1, mask=mask, other=0).to(tl.int32) << 8
        word = high | middle | tl.load(p + 2, mask=mask, other=0).to(tl.int32)
        c = (word >> (21 - 3 * (i % 8).to(tl.int32))) & 7
    else:
        PER: tl.constexpr = 8 // BITS
        byte = tl.load(codes + i // PER, mask=mask, other=0).to(tl.int32)
        c = (byte >> ((PER - 1 - (i % PER).to(tl.int32)) * BITS)) & (2**BITS - 1)
    return c


_SIZES = ["blocksize", "nested_blocksize"]


@triton.jit(do_not_specialize=_SIZES)
def dequantize_kernel(
    out, count, codes, code, absmax, absmax_codes, nested_code, nested_absmax, nested_blocksize,
    offset, blocksize,
    BITS: tl.constexpr, PAIRS: tl.constexpr, SHIFT: tl.constexpr, NESTED_SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = integer(count)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    if PAIRS:
        byte = first // 2 + tl.arange(0, BLOCK // 2)
        some = byte * 2 < n
        packed = tl.load(codes + byte, mask=some, other=0).to(tl.int32)
        scale = _absmax(
            _divide(byte * 2, blocksize, SHIFT), some, absmax, absmax_codes, nested_code,
            nested_absmax, nested_blocksize, offset, NESTED_SHIFT,
        )  # fmt: skip
        high = tl.load(code + (packed >> 4)) * scale
        low = tl.load(code + (packed & 15)) * scale
        value = tl.interleave(high, low)
    else:
        inside = at < n
        scale = _absmax(
            _divide(at, blocksize, SHIFT), inside, absmax, absmax_codes, nested_code,
            nested_absmax, nested_blocksize, offset, NESTED_SHIFT,
        )  # fmt: skip
        value = tl.load(code + _code_at(codes, at, inside, BITS)) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


def dequantize(
    codes, count, code, entries, absmax, absmax_codes, nested_code, nested_absmax,
    nested_blocksize, offset, blocksize, out, dtype, place,
):  # fmt: skip
    if count == 0:
        return
    size, shift = _log2(blocksize)
    nested, nested_shift = _log2(nested_blocksize)
    launch(
        dequantize_kernel, triton.cdiv(count, _TILE), out, count, codes, code, absmax, absmax_codes,
        nested_code, nested_absmax, nested, float(offset), size,
        BITS=_BITS[entries], PAIRS=entries == 16 and blocksize % 2 == 0, SHIFT=shift,
        NESTED_SHIFT=nested_shift, BLOCK=_TILE, num_warps=_WARPS, fuse=False,
    )  # fmt: skip


# ---- linear ------------------------------------------------------------------------------------


@triton.jit
def _outer(acc, w, x):
    """acc (T, R, C) + w (R, C)·x (T, C)"""
    return acc + w[None, :, :] * x[:, None, :]


@triton.jit(do_not_specialize=["tokens", "rows", *_SIZES])
def codebook_linear_kernel(
    x, tokens, codes, code, absmax, absmax_codes, nested_code, nested_absmax, nested_blocksize,
    offset, blocksize, rows, columns, bias, y,
    BITS: tl.constexpr, PAIRS: tl.constexpr, SHIFT: tl.constexpr, NESTED_SHIFT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + bias: ROWS rows and TOKENS tokens a program, the sums of each lane added up at the end."""
    n = integer(columns)
    groups = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    r = (program % groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t = (program // groups).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    STEP: tl.constexpr = 2 if PAIRS else 1
    acc = tl.zeros((TOKENS, ROWS, BLOCK), tl.float32)
    for start in range(0, n, STEP * BLOCK):
        c = start + STEP * tl.arange(0, BLOCK)
        inside = (r < rows)[:, None] & (c < n)[None, :]
        i = r[:, None] * n + c[None, :]
        scale = _absmax(
            _divide(i, blocksize, SHIFT), inside, absmax, absmax_codes, nested_code,
            nested_absmax, nested_blocksize, offset, NESTED_SHIFT,
        )  # fmt: skip
        from_x = x + t[:, None] * n + c[None, :]
        known = (t < tokens)[:, None] & (c < n)[None, :]
        x_c = tl.load(from_x, mask=known, other=0.0).to(tl.float32)
        if PAIRS:
            packed = tl.load(codes + i // 2, mask=inside, other=0).to(tl.int32)
            acc = _outer(acc, tl.load(code + (packed >> 4)) * scale, x_c)
            x_c = tl.load(from_x + 1, mask=known, other=0.0).to(tl.float32)
            acc = _outer(acc, tl.load(code + (packed & 15)) * scale, x_c)
        else:
            acc = _outer(acc, tl.load(code + _code_at(codes, i, inside, BITS)) * scale, x_c)
    total = tl.sum(acc, 2)
    if bias is not None:
        total += tl.load(bias + r, mask=r < rows, other=0.0).to(tl.float32)[None, :]
    to = y + t[:, None] * rows + r[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (r < rows)[None, :])


@triton.jit
def _inner(acc, w, g):
    """acc (T, R, C) + g (T, R)·w (R, C)"""
    return acc + g[:, :, None] * w[None, :, :]


@triton.jit(do_not_specialize=["tokens", "rows", *_SIZES])
def codebook_linear_transposed_kernel(
    x, tokens, codes, code, absmax, absmax_codes, nested_code, nested_absmax, nested_blocksize,
    offset, blocksize, rows, columns, y,
    BITS: tl.constexpr, PAIRS: tl.constexpr, SHIFT: tl.constexpr, NESTED_SHIFT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dy W: BLOCK columns (pairs of them) and TOKENS tokens a program, all rows."""
    n = integer(columns)
    STEP: tl.constexpr = 2 if PAIRS else 1
    groups = tl.cdiv(n, STEP * BLOCK)
    program = tl.program_id(0).to(tl.int64)
    c = program % groups * (STEP * BLOCK) + STEP * tl.arange(0, BLOCK)
    t = program // groups * TOKENS + tl.arange(0, TOKENS)
    high = tl.zeros((TOKENS, ROWS, BLOCK), tl.float32)
    low = tl.zeros((TOKENS, ROWS, BLOCK), tl.float32)
    for start in range(0, integer(rows), ROWS):
        r = start + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & (c < n)[None, :]
        i = r[:, None] * n + c[None, :]
        scale = _absmax(
            _divide(i, blocksize, SHIFT), inside, absmax, absmax_codes, nested_code,
            nested_absmax, nested_blocksize, offset, NESTED_SHIFT,
        )  # fmt: skip
        known = (t < tokens)[:, None] & (r < rows)[None, :]
        dy = tl.load(x + t[:, None] * rows + r[None, :], mask=known, other=0.0).to(tl.float32)
        if PAIRS:
            packed = tl.load(codes + i // 2, mask=inside, other=0).to(tl.int32)
            high = _inner(high, tl.load(code + (packed >> 4)) * scale, dy)
            low = _inner(low, tl.load(code + (packed & 15)) * scale, dy)
        else:
            high = _inner(high, tl.load(code + _code_at(codes, i, inside, BITS)) * scale, dy)
    to = y + t[:, None] * n + c[None, :]
    there = (t < tokens)[:, None] & (c < n)[None, :]
    tl.store(to, tl.sum(high, 1).to(y.dtype.element_ty), mask=there)
    if PAIRS:
        tl.store(to + 1, tl.sum(low, 1).to(y.dtype.element_ty), mask=there)


def codebook_linear(
    x, dtype, tokens, codes, code, entries, absmax, absmax_codes, nested_code, nested_absmax,
    nested_blocksize, offset, blocksize, rows, columns, transposed, bias, y, place,
):  # fmt: skip
    if tokens == 0 or (columns if transposed else rows) == 0:
        return
    size, shift = _log2(blocksize)
    nested, nested_shift = _log2(nested_blocksize)
    pairs = entries == 16 and blocksize % 2 == 0 and columns % 2 == 0
    together = min(8, triton.next_power_of_2(tokens))
    args = (
        x, tokens, codes, code, absmax, absmax_codes, nested_code, nested_absmax, nested,
        float(offset), size, rows, columns,
    )  # fmt: skip
    constants = {
        "BITS": _BITS[entries], "PAIRS": pairs, "SHIFT": shift, "NESTED_SHIFT": nested_shift,
        "TOKENS": together, "num_warps": _WARPS,
    }  # fmt: skip
    times = triton.cdiv(tokens, together)
    if transposed:  # 16 sums a lane and half of a pair
        block = 32
        programs = triton.cdiv(columns, block * (1 + pairs)) * times
        launch(
            codebook_linear_transposed_kernel, programs, *args, y,
            **constants, ROWS=64 // together, BLOCK=block,
        )  # fmt: skip
    else:  # 16 sums a lane: the addresses of 32 would spill
        group = 8 // together
        programs = triton.cdiv(rows, group) * times
        launch(
            codebook_linear_kernel, programs, *args, bias, y,
            **constants, ROWS=group, BLOCK=256,
        )  # fmt: skip
