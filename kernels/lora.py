"""Low-rank updates in Triton: what csrc/ops/lora.h has, and the base product with the update inside it.

    kernel                reads + writes                     bound by
    shrink_kernel         x; the factor from L2              memory
    outer_kernel          x a time for RANKS ranks           memory; few programs
    expand_kernel         y, twice if it accumulates         memory
    dropout_kernel        x, y, y before                     memory
    product_kernel        x, the weight, y; h, the factor    the base product's arithmetic: the update is a
                                                             few more columns of its sum

Sums are float32 (float64 where x is), in an order that depends on the shape alone. A program of shrink owns
tokens over all columns, one of outer columns over all tokens: no workspace, and nothing is added atomically.

Products keep what their factors have: of 16-bit numbers of one type they are exact; a float32 beside a
bfloat16 is a sum of three of these, or of two where the result is rounded to 16 bits; other float32 is
multiplied as such, or as TF32 where torch's setting for its own products says so. Triton's interpreter, which
has no products of bfloat16, multiplies float32. An infinite float32 that is taken apart gives NaN.

The host functions have names, arguments and meaning of csrc/bindings/lora.h; `place` is (stream, flags).
They allocate nothing and wait for nothing. Tiles follow from the shape, the type and the shared memory of a
multiprocessor; they have not been measured yet.
"""

import functools

import torch
import triton
import triton.language as tl

from ._common import INTERPRETED, integer, launch, number

_F32, _BF16, _F16, _F64 = range(4)  # csrc/core/dtype.h, enum DType


# ---- dropout -----------------------------------------------------------------------------------


@triton.jit
def _words(counter, key):
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(key, low, high, zero, zero)


@triton.jit
def _survivors(
    x, seed, threshold, rows, columns, first, COLUMNS: tl.constexpr, QUADS: tl.constexpr
):
    """x (rows, COLUMNS), columns from `first` on, with 0 for what dropout takes. What is left is not scaled.

    Element i draws word i % 4 of counter i / 4. QUADS: rows begin at multiples of 4, so that one counter
    serves four elements.
    """
    if seed is not None:
        key = tl.load(seed)
        row = rows[:, None] * columns + first
        if QUADS:
            w0, w1, w2, w3 = _words((row >> 2) + tl.arange(0, COLUMNS // 4)[None, :], key)
            word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        else:
            i = row + tl.arange(0, COLUMNS)[None, :]
            w0, w1, w2, w3 = _words(i >> 2, key)
            k = i & 3
            word = tl.where(k == 0, w0, tl.where(k == 1, w1, tl.where(k == 2, w2, w3)))
        x = tl.where(word.to(tl.int64) >= threshold, x, x * 0)  # NaN stays, as in x·mask
    return x


# ---- products ----------------------------------------------------------------------------------


@triton.jit
def _load(p, mask):
    """A tile, 0 outside of the mask; the interpreter, which has no bfloat16 products, gets float32."""
    x = tl.load(p) if mask is None else tl.load(p, mask=mask, other=0.0)
    if INTERPRETED and x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b; see the module's docstring."""
    if acc.dtype == tl.float64:
        acc = tl.dot(a.to(tl.float64), b.to(tl.float64), acc, out_dtype=tl.float64)
    elif a.dtype == b.dtype:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    elif a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        for _ in tl.static_range(3):
            part = b.to(tl.bfloat16)
            acc = tl.dot(a, part, acc)
            b -= part.to(tl.float32)
    elif a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        for _ in tl.static_range(3):
            part = a.to(tl.bfloat16)
            acc = tl.dot(part, b, acc)
            a -= part.to(tl.float32)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def _dot_rounded(a, b, acc):
    """acc + a·b, a float32, of a result that will have 16 bits: float32 taken as two bfloat16, to 2^-16."""
    if INTERPRETED:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision="ieee")
    else:
        a_high = a.to(tl.bfloat16)
        a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
        if b.dtype == tl.bfloat16:
            acc = tl.dot(a_low, b, tl.dot(a_high, b, acc))
        else:
            w = b.to(tl.float32)
            b_high = w.to(tl.bfloat16)
            b_low = (w - b_high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(a_low, b_high, tl.dot(a_high, b_low, tl.dot(a_high, b_high, acc)))
    return acc


def _precision():
    """Of products of float32: as torch is set for its own."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


_SIZES = ["tokens", "threshold"]


# ---- shrink ------------------------------------------------------------------------------------


@triton.jit
def _add_h(
    acc, x, t, c, columns, first, factor, r, rank, rank_stride, column_stride, seed, threshold,
    QUADS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """acc + D(x)·factorᵀ of columns c, which begin at `first`, and ranks r."""
    v = _survivors(x, seed, threshold, t, columns, first, COLUMNS, QUADS)
    w = _load(
        factor + c[:, None] * column_stride + r[None, :] * rank_stride,
        (c < columns)[:, None] & (r < rank)[None, :],
    )
    return _dot(v, w, acc, PRECISION)


@triton.jit
def _store_h(h, acc, t, tokens, r, rank, scale):
    there = (t < tokens)[:, None] & (r < rank)[None, :]
    acc *= number(scale).to(acc.dtype)
    tl.store(h + t[:, None] * rank + r[None, :], acc, mask=there)


@triton.jit
def _add_outer(
    acc, x, t, tokens, columns, first, g, r, rank, seed, threshold,
    QUADS: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """acc + gᵀ·D(x) of tokens t and ranks r."""
    v = _survivors(x, seed, threshold, t, columns, first, COLUMNS, QUADS)
    w = _load(g + t[None, :] * rank + r[:, None], (t < tokens)[None, :] & (r < rank)[:, None])
    return _dot(w, v, acc, PRECISION)


@triton.jit
def _store_outer(outer, acc, r, rank, c, columns, r_stride, c_stride, scale):
    there = (r < rank)[:, None] & (c < columns)[None, :]
    acc *= number(scale).to(acc.dtype)
    tl.store(outer + r[:, None] * r_stride + c[None, :] * c_stride, acc, mask=there)


@triton.jit(do_not_specialize=_SIZES)
def shrink_kernel(
    x, tokens, columns, factor, rank, rank_stride, column_stride, h, scale: tl.float64, seed, threshold,
    QUADS: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """h = scale·D(x)·factorᵀ: TOKENS tokens and RANKS ranks a program."""
    n = integer(columns)
    groups = tl.cdiv(integer(rank), RANKS)
    program = tl.program_id(0).to(tl.int64)
    r = program % groups * RANKS + tl.arange(0, RANKS)
    t = program // groups * TOKENS + tl.arange(0, TOKENS)
    acc = tl.zeros((TOKENS, RANKS), h.dtype.element_ty)
    for first in range(0, n, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = c < n
        v = _load(x + t[:, None] * n + c[None, :], (t < tokens)[:, None] & inside[None, :])
        acc = _add_h(
            acc, v, t, c, n, first, factor, r, rank, rank_stride, column_stride, seed, threshold, QUADS,
            PRECISION, COLUMNS,
        )  # fmt: skip
    _store_h(h, acc, t, tokens, r, rank, scale)


@triton.jit(do_not_specialize=_SIZES)
def outer_kernel(
    x, tokens, columns, g, rank, outer, scale: tl.float64, seed, threshold,
    QUADS: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """outer = scale·gᵀ·D(x): COLUMNS columns and RANKS ranks a program, all tokens."""
    n = integer(columns)
    groups = tl.cdiv(integer(rank), RANKS)
    program = tl.program_id(0).to(tl.int64)
    r = program % groups * RANKS + tl.arange(0, RANKS)
    first = program // groups * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    acc = tl.zeros((RANKS, COLUMNS), outer.dtype.element_ty)
    for start in range(0, integer(tokens), TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = t < tokens
        v = _load(x + t[:, None] * n + c[None, :], inside[:, None] & (c < n)[None, :])
        acc = _add_outer(
            acc, v, t, tokens, n, first, g, r, rank, seed, threshold, QUADS, PRECISION, COLUMNS
        )
    _store_outer(outer, acc, r, rank, c, n, n, 1, scale)


def _ranks(rank, most):
    return min(max(triton.next_power_of_2(rank), 16), most)


def _narrow_tile(rank, dtype, other):
    """(tokens, columns, ranks) of a tile of a narrow product: small where it is one of float32 itself."""
    if (dtype, other) in ((_BF16, _BF16), (_F16, _F16)):
        return 64, 64, _ranks(rank, 64)
    if (dtype, other) == (_BF16, _F32):
        return 64, 64, _ranks(rank, 32)
    return 32, 32, _ranks(rank, 32)


def _shrink_tile(tokens, rank, dtype, other):
    """The same, of few tokens a program where there are few, so that there are many programs."""
    most, block, ranks = _narrow_tile(rank, dtype, other)
    return 16 if tokens <= 2048 else most, block, ranks


def _dropped(block, ranks, columns, seed):
    """(columns, ranks) of a tile of at most 64 tokens: where rows do not begin at multiples of 4, dropout
    makes all four words of a counter for each element, and those of more do not fit the registers."""
    if seed is None or columns % 4 == 0:
        return block, ranks
    return min(block, 32), min(ranks, 32)


def lora_shrink(
    x, dtype, tokens, columns, rank, factor, factor_dtype, rank_stride, column_stride, h, h_scale,
    g, outer, outer_scale, seed, threshold, keep_scale, place,
):  # fmt: skip
    constants = {"QUADS": columns % 4 == 0, "PRECISION": _precision(), "num_warps": 4}
    if h is not None and tokens > 0:
        together, block, ranks = _shrink_tile(tokens, rank, dtype, factor_dtype)
        block, ranks = _dropped(block, ranks, columns, seed)
        programs = triton.cdiv(tokens, together) * triton.cdiv(rank, ranks)
        launch(
            shrink_kernel, programs, x, tokens, columns, factor, rank, rank_stride, column_stride, h,
            float(h_scale * keep_scale), seed, threshold,
            **constants, TOKENS=together, COLUMNS=block, RANKS=ranks,
        )  # fmt: skip
    if outer is not None and columns > 0:
        together, _, ranks = _narrow_tile(rank, dtype, _F32)
        programs = triton.cdiv(columns, 32) * triton.cdiv(rank, ranks)
        launch(
            outer_kernel, programs, x, tokens, columns, g, rank, outer, float(outer_scale * keep_scale),
            seed, threshold, **constants, TOKENS=together, COLUMNS=32, RANKS=ranks,
        )  # fmt: skip


def lora_shrink_group(x, dtype, tokens, columns, members, place):
    """Members are what `lora_shrink` takes beside x, as tuples in the same order.

    A launch each: in one program, the tiles and the dropout of four members do not fit the registers.
    """
    for member in members:
        lora_shrink(x, dtype, tokens, columns, *member, place)


# ---- expand ------------------------------------------------------------------------------------


@triton.jit
def _update(
    h, t, tokens, factor, c, columns, first, rank, rank_stride, column_stride, scale, seed, threshold,
    ROUNDED: tl.constexpr, QUADS: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """D(scale·h·factor) of tokens t and columns c, in the accumulator's type; scale has D's in it.

    ROUNDED: to 16 bits, at the end.
    """
    acc = tl.zeros((TOKENS, COLUMNS), h.dtype.element_ty)
    for start in range(0, rank, RANKS):
        r = start + tl.arange(0, RANKS)
        inside = r < rank
        v = _load(h + t[:, None] * rank + r[None, :], (t < tokens)[:, None] & inside[None, :])
        w = _load(
            factor + r[:, None] * rank_stride + c[None, :] * column_stride,
            inside[:, None] & (c < columns)[None, :],
        )
        acc = _dot_rounded(v, w, acc) if ROUNDED else _dot(v, w, acc, PRECISION)
    acc *= number(scale).to(acc.dtype)
    return _survivors(acc, seed, threshold, t, columns, first, COLUMNS, QUADS)


@triton.jit(do_not_specialize=_SIZES)
def expand_kernel(
    y, tokens, columns, h, rank, factor, rank_stride, column_stride, scale: tl.float64, bias, seed,
    threshold, ACCUMULATE: tl.constexpr, QUADS: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y = [y +] [bias +] D(scale·h·factor): TOKENS tokens and COLUMNS columns a program."""
    n = integer(columns)
    groups = tl.cdiv(n, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    first = program % groups * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    t = program // groups * TOKENS + tl.arange(0, TOKENS)
    value = _update(
        h, t, tokens, factor, c, n, first, integer(rank), rank_stride, column_stride, scale, seed,
        threshold, y.dtype.element_ty.primitive_bitwidth == 16, QUADS, PRECISION, TOKENS, COLUMNS, RANKS,
    )  # fmt: skip
    if bias is not None:
        value += tl.load(bias + c, mask=c < n, other=0.0).to(value.dtype)[None, :]
    to = y + t[:, None] * n + c[None, :]
    there = (t < tokens)[:, None] & (c < n)[None, :]
    if ACCUMULATE:
        value += tl.load(to, mask=there, other=0.0).to(value.dtype)
    tl.store(to, value.to(y.dtype.element_ty), mask=there)


def lora_expand(
    h, tokens, columns, rank, factor, factor_dtype, rank_stride, column_stride, scale, bias, accumulate,
    y, dtype, seed, threshold, keep_scale, place,
):  # fmt: skip
    if tokens == 0 or columns == 0:
        return
    together, block = (16, 32) if dtype == _F64 else (16 if tokens <= 64 else 64, 64)
    launch(
        expand_kernel, triton.cdiv(tokens, together) * triton.cdiv(columns, block), y, tokens, columns, h,
        rank, factor, rank_stride, column_stride, float(scale * keep_scale), bias, seed, threshold,
        ACCUMULATE=accumulate, QUADS=columns % 4 == 0, PRECISION=_precision(), TOKENS=together,
        COLUMNS=block, RANKS=16, num_warps=4,
    )  # fmt: skip


# ---- dropout -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "accumulate", "threshold"])
def dropout_kernel(
    x, count, accumulate, y, scale: tl.float64, seed, threshold, BLOCK: tl.constexpr
):
    """y = [y +] D(x): BLOCK elements a program, in one row of their own."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    i = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = i < count
    v = tl.load(x + i, mask=there, other=0.0)
    if v.dtype != tl.float64:
        v = v.to(tl.float32)
    v = _survivors(v, seed, threshold, row, BLOCK, 0, BLOCK, True) * number(scale).to(v.dtype)
    if accumulate != 0:
        v += tl.load(y + i, mask=there, other=0.0).to(v.dtype)
    tl.store(y + i, v.to(y.dtype.element_ty), mask=there)


def lora_dropout(x, dtype, count, accumulate, y, seed, threshold, keep_scale, place):
    if count > 0:
        launch(
            dropout_kernel, triton.cdiv(count, 1024), x, count, int(accumulate), y,
            float(keep_scale), seed, threshold, BLOCK=1024, num_warps=4,
        )  # fmt: skip


# ---- the base product with the update inside ---------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def product_kernel(
    x, tokens, inner, weight, column_step, inner_step, columns, h, rank, factor, rank_stride,
    column_stride, scale: tl.float64, bias, y, seed, threshold,
    EVEN: tl.constexpr, QUADS: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y = D(scale·h·factor) + x·weightᵀ + bias: the sum begins with the update.

    A tile of TOKENS × COLUMNS a program, 8 tiles of tokens together, so that they find the weight in L2.
    EVEN: INNER divides the length of the sum. Tokens and columns that are not there repeat others.
    """
    n, k = integer(columns), integer(inner)
    tiles = tl.cdiv(integer(tokens), TOKENS)
    program, across = tl.program_id(0).to(tl.int64), 8 * tl.cdiv(n, COLUMNS)
    top = program // across * 8
    height = tl.minimum(tiles - top, 8)
    t = (top + program % across % height) * TOKENS + tl.arange(0, TOKENS)
    first = program % across // height * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    acc = _update(
        h, t, tokens, factor, c, n, first, integer(rank), rank_stride, column_stride, scale, seed,
        threshold, y.dtype.element_ty.primitive_bitwidth == 16, QUADS, PRECISION, TOKENS, COLUMNS, RANKS,
    )  # fmt: skip
    i = tl.arange(0, INNER)
    from_x = x + tl.where(t < tokens, t, 0)[:, None] * k + i[None, :]
    from_weight = (
        weight + tl.where(c < n, c, 0)[None, :] * column_step + i[:, None] * integer(inner_step)
    )
    for start in range(0, k, INNER):
        if EVEN:
            v, w = _load(from_x, None), _load(from_weight, None)
        else:
            inside = i + start < k
            v, w = _load(from_x, inside[None, :]), _load(from_weight, inside[:, None])
        acc = _dot(v, w, acc, PRECISION)
        from_x += INNER
        from_weight += INNER * integer(inner_step)
    if bias is not None:
        acc += tl.load(bias + c, mask=c < n, other=0.0).to(acc.dtype)[None, :]
    there = (t < tokens)[:, None] & (c < n)[None, :]
    tl.store(y + t[:, None] * n + c[None, :], acc.to(y.dtype.element_ty), mask=there)


@functools.cache
def shared_memory(device):
    """Bytes that a program may have of it."""
    if device.type == "cpu":
        return 0
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _tile(tokens, dtype, device):
    """(tokens, columns, inner, warps, stages) of a tile of the product."""
    if dtype == _F64:
        return 32, 32, 16, 4, 2
    if dtype == _F32:
        return (64, 64, 32, 4, 2) if _precision() == "ieee" else (128, 64, 32, 4, 3)
    if tokens <= 64:
        return max(triton.next_power_of_2(tokens), 16), 64, 64, 4, 4
    if shared_memory(device) >= 160 << 10:
        return 128, 256, 64, 8, 3
    return 128, 128, 32, 8, 3


def lora_product(
    x, dtype, tokens, inner, weight, column_step, inner_step, columns, h, rank, factor, factor_dtype,
    rank_stride, column_stride, scale, bias, y, seed, threshold, keep_scale, place,
):  # fmt: skip
    """y = x·weightᵀ [+ bias] + D(scale·h·factor): x (tokens, inner), weight (columns, inner) of any strides.

    The forward with h and B; the backward's dx with dy, Wᵀ, g and A.
    """
    if tokens == 0 or columns == 0:
        return
    together, block, depth, warps, stages = _tile(tokens, dtype, x.device)
    launch(
        product_kernel, triton.cdiv(tokens, together) * triton.cdiv(columns, block), x, tokens, inner,
        weight, column_step, inner_step, columns, h, rank, factor, rank_stride, column_stride,
        float(scale * keep_scale), bias, y, seed, threshold, EVEN=inner % depth == 0,
        QUADS=columns % 4 == 0, PRECISION=_precision(), TOKENS=together, COLUMNS=block, INNER=depth,
        RANKS=16, num_warps=warps, num_stages=stages,
    )  # fmt: skip
