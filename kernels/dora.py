"""Weight-decomposed updates in Triton: what csrc/ops/dora.h has.

    kernel                reads + writes                  bound by
    dora_norm_kernel      the weight; A and B from L2     memory, or the products of the update
    dora_scale_kernel     z, y, y before                  memory
    dora_columns_kernel   dy, z; dz                       memory, if the columns fill the device

A program of norm owns ROWS rows over all columns: the update of a tile is summed over all ranks, the weight
is added and it is squared where it is; nothing is stored. One of columns owns COLUMNS columns over all
tokens. Sums are float32 (float64 where the input is), those of a tile's elements are added up in float64. The
update of norm is never multiplied as TF32, whatever torch's setting: see kernels/lora.py. No atomics: the
same inputs give the same bits.

The host functions have names, arguments and meaning of csrc/bindings/dora.h; `place` is (stream, flags).
They allocate nothing and wait for nothing. Tiles have not been measured yet.
"""

import triton
import triton.language as tl

from ._common import integer, launch, number
from .lora import _F64, _dot, _load


@triton.jit
def _wide(x):
    """A tile as it is computed on: 16 bits as float32."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


# ---- norm --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def dora_norm_kernel(
    weight, rows, columns, rank, b, b_rank_stride, b_row_stride, a, a_rank_stride, a_column_stride,
    scale: tl.float64, norm, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """norm = ‖W + scale·B A‖ of rows: ROWS rows a program."""
    n, ranks = integer(columns), integer(rank)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, COLUMNS), norm.dtype.element_ty)
    for first in range(0, n, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        w = tl.load(
            weight + row[:, None] * n + c[None, :],
            mask=(row < rows)[:, None] & (c < n)[None, :],
            other=0.0,
        )
        acc = tl.zeros((ROWS, COLUMNS), norm.dtype.element_ty)
        for start in range(0, ranks, RANKS):
            r = start + tl.arange(0, RANKS)
            left = _load(
                b + row[:, None] * b_row_stride + r[None, :] * b_rank_stride,
                (row < rows)[:, None] & (r < ranks)[None, :],
            )
            right = _load(
                a + r[:, None] * a_rank_stride + c[None, :] * a_column_stride,
                (r < ranks)[:, None] & (c < n)[None, :],
            )
            acc = _dot(left, right, acc, "ieee")
        v = _wide(w) + acc * number(scale).to(acc.dtype)
        squares += v * v
    total = tl.sqrt(tl.sum(squares.to(tl.float64), 1))
    tl.store(norm + row, total.to(norm.dtype.element_ty), mask=row < rows)


def dora_norm(
    weight, dtype, rows, columns, rank, lora_b, b_dtype, b_rank_stride, b_row_stride, lora_a, a_dtype,
    a_rank_stride, a_column_stride, scale, norm, place,
):  # fmt: skip
    if rows > 0:
        together, block = (16, 32) if dtype == _F64 else (32, 64)
        launch(
            dora_norm_kernel, triton.cdiv(rows, together), weight, rows, columns, rank, lora_b,
            b_rank_stride, b_row_stride, lora_a, a_rank_stride, a_column_stride, float(scale), norm,
            ROWS=together, COLUMNS=block, RANKS=16, num_warps=4,
        )  # fmt: skip


# ---- columns scaled ----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "accumulate"])
def dora_scale_kernel(
    z, tokens, columns, factor, bias, accumulate, y, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y = [y +] [bias +] factor·z: TOKENS tokens and COLUMNS columns a program."""
    n = integer(columns)
    groups = tl.cdiv(n, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    c = program % groups * COLUMNS + tl.arange(0, COLUMNS)
    t = program // groups * TOKENS + tl.arange(0, TOKENS)
    there = (t < tokens)[:, None] & (c < n)[None, :]
    i = t[:, None] * n + c[None, :]
    value = tl.load(factor + c, mask=c < n, other=0.0)[None, :] * _wide(
        tl.load(z + i, mask=there, other=0.0)
    )
    if bias is not None:
        value += _wide(tl.load(bias + c, mask=c < n, other=0.0))[None, :]
    if accumulate != 0:
        value += _wide(tl.load(y + i, mask=there, other=0.0))
    tl.store(y + i, value.to(y.dtype.element_ty), mask=there)


def dora_scale(z, dtype, tokens, columns, factor, bias, accumulate, y, place):
    programs = triton.cdiv(tokens, 4) * triton.cdiv(columns, 512)
    if programs > 0:
        launch(
            dora_scale_kernel, programs, z, tokens, columns, factor, bias,
            int(accumulate), y, TOKENS=4, COLUMNS=512, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def dora_columns_kernel(
    dy, z, tokens, columns, factor, dz, sums, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    """sums = Σ dy·z over tokens, and dz = factor·dy where it is wanted: COLUMNS columns a program."""
    n = integer(columns)
    c = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((TOKENS, COLUMNS), sums.dtype.element_ty)
    if dz is not None:
        scale = tl.load(factor + c, mask=c < n, other=0.0)[None, :]
    for start in range(0, integer(tokens), TOKENS):
        t = start + tl.arange(0, TOKENS)
        there = (t < tokens)[:, None] & (c < n)[None, :]
        i = t[:, None] * n + c[None, :]
        v = _wide(tl.load(dy + i, mask=there, other=0.0))
        acc += v * _wide(tl.load(z + i, mask=there, other=0.0))
        if dz is not None:
            tl.store(dz + i, (v * scale).to(dz.dtype.element_ty), mask=there)
    total = tl.sum(acc.to(tl.float64), 0).to(sums.dtype.element_ty)
    tl.store(sums + c, total, mask=c < n)


def dora_scale_backward(dy, z, dtype, tokens, columns, factor, dz, sums, place):
    if sums is None:
        if dz is not None:
            dora_scale(dy, dtype, tokens, columns, factor, None, False, dz, place)
    elif columns > 0:
        launch(
            dora_columns_kernel, triton.cdiv(columns, 32), dy, z, tokens, columns, factor, dz, sums,
            TOKENS=64, COLUMNS=32, num_warps=8,
        )  # fmt: skip
