"""Low-rank updates of many adapters in one batch, in Triton: what csrc/ops/segmented.h has.

    kernel                    reads + writes                         bound by
    segmented_shrink_kernel   x; a factor for TOKENS rows            memory
    segmented_outer_kernel    x a time for RANKS ranks; outer        memory; latency where one adapter has all
    segmented_expand_kernel   y twice; a factor for TOKENS rows      memory

A program has rows of one adapter, wherever they are: nothing moves, and nothing is padded to another
adapter's rows. The programs follow from the sizes alone, and `begins` is read by each: see _tile_of. Sums,
products and dropout are as in kernels/lora.py. No atomics: the same inputs give the same bits.

The host functions have names, arguments and meaning of csrc/bindings/segmented.h; `place` is (stream, flags).
They allocate nothing and wait for nothing. An adapter that is not there is never followed: its rows of y
become NaN and a flag is set. Tiles have not been measured yet.
"""

import triton
import triton.language as tl

from ._common import BAD_ADAPTER, integer, launch, number
from .lora import (
    _F32,
    _F64,
    _add_h,
    _add_outer,
    _dropped,
    _load,
    _narrow_tile,
    _precision,
    _store_h,
    _store_outer,
    _update,
)

_SIZES = ["tokens", "tiles", "adapters", "threshold"]


# ---- tiles of rows -----------------------------------------------------------------------------


def _tiles(tokens, adapters, rows):
    """Programs for tiles of `rows` rows: of each adapter whole ones and a rest, or one for each row."""
    return min(tokens, tokens // rows + adapters + 2)


@triton.jit
def _tile_of(begins, adapters, tokens, tiles, tile, ROWS: tl.constexpr):
    """(adapter, where its rows begin in order, how many): -1, or `adapters`, where there is no adapter.

    Rows of an adapter begin at tile begins/ROWS + adapter + 1, which leaves room for a rest; where a row has
    a tile of its own (`tiles` is `tokens`), at the row, and what does not begin a tile has no rows. Adapters
    that begin at the tile or before are counted, 1024 at a time.
    """
    count = integer(0)
    each = tiles == tokens
    for start in range(0, integer(adapters) + 1, 1024):
        k = start + tl.arange(0, 1024)
        begin = tl.load(begins + k, mask=k <= adapters, other=0)
        first = tl.where(each, begin, begin // ROWS + k + 1)
        count += tl.sum(((first <= tile) & (k <= adapters)).to(tl.int64))
    adapter = count - 1
    begin = tl.load(begins + adapter, mask=adapter >= 0, other=0)
    end = tl.load(begins + adapter + 1, mask=adapter < adapters, other=0)
    end = tl.where(adapter < adapters, end, integer(tokens))
    past = tl.where(each, tile - begin, (tile - (begin // ROWS + adapter + 1)) * ROWS)
    rows = tl.where(past % ROWS == 0, tl.minimum(end - begin - past, ROWS), 0)
    return adapter, begin + past, rows


@triton.jit
def _rows(order, first, rows, tokens, ROWS: tl.constexpr):
    """The rows of a tile; `tokens` where there are none."""
    i = tl.arange(0, ROWS)
    t = tl.load(order + first + i, mask=i < rows, other=0)
    return tl.where(i < rows, t, tokens)


@triton.jit
def _scale(scale, adapter, keep_scale):
    """An adapter's, with dropout's, float64."""
    result = number(keep_scale)
    if scale is not None:
        result *= tl.load(scale + adapter).to(tl.float64)
    return result


# ---- shrink ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def segmented_shrink_kernel(
    x, tokens, columns, rank, order, begins, tiles, adapters, factor, adapter_stride, rank_stride,
    column_stride, h, scale, keep_scale: tl.float64, seed, threshold,
    QUADS: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """h = scale·D(x)·factorᵀ: TOKENS rows of an adapter and RANKS ranks a program."""
    n = integer(columns)
    groups = tl.cdiv(integer(rank), RANKS)
    program = tl.program_id(0).to(tl.int64)
    r = program % groups * RANKS + tl.arange(0, RANKS)
    adapter, begin, rows = _tile_of(begins, adapters, tokens, tiles, program // groups, TOKENS)
    if rows > 0:
        t = _rows(order, begin, rows, tokens, TOKENS)
        acc = tl.zeros((TOKENS, RANKS), h.dtype.element_ty)
        if adapter < 0 or adapter >= adapters:
            _store_h(h, acc, t, tokens, r, rank, 1.0)
        else:
            factor += adapter * adapter_stride
            for first in range(0, n, COLUMNS):
                c = first + tl.arange(0, COLUMNS)
                v = _load(x + t[:, None] * n + c[None, :], (t < tokens)[:, None] & (c < n)[None, :])
                acc = _add_h(
                    acc, v, t, c, n, first, factor, r, rank, rank_stride, column_stride, seed,
                    threshold, QUADS, PRECISION, COLUMNS,
                )  # fmt: skip
            _store_h(h, acc, t, tokens, r, rank, _scale(scale, adapter, keep_scale))


@triton.jit(do_not_specialize=_SIZES)
def segmented_outer_kernel(
    x, tokens, columns, rank, order, begins, g, outer, r_stride, c_stride, scale, keep_scale: tl.float64,
    seed, threshold,
    QUADS: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """outer = scale·gᵀ·D(x): COLUMNS columns and RANKS ranks of an adapter a program, all its rows."""
    n = integer(columns)
    groups, spans = tl.cdiv(integer(rank), RANKS), tl.cdiv(n, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    r = program % groups * RANKS + tl.arange(0, RANKS)
    first = program // groups % spans * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    adapter = program // groups // spans
    begin, end = tl.load(begins + adapter), tl.load(begins + adapter + 1)
    acc = tl.zeros((RANKS, COLUMNS), outer.dtype.element_ty)
    for start in range(begin, end, TOKENS):
        t = _rows(order, start, end - start, tokens, TOKENS)
        v = _load(x + t[:, None] * n + c[None, :], (t < tokens)[:, None] & (c < n)[None, :])
        acc = _add_outer(
            acc, v, t, tokens, n, first, g, r, rank, seed, threshold, QUADS, PRECISION, COLUMNS
        )
    outer += adapter * rank * n
    scale = _scale(scale, adapter, keep_scale)
    _store_outer(outer, acc, r, rank, c, n, integer(r_stride), integer(c_stride), scale)


def segmented_shrink(
    x, dtype, tokens, columns, rank, order, begins, adapters, factor, factor_dtype, adapter_stride,
    rank_stride, column_stride, h, h_scale, g, outer, outer_scale, turned, seed, threshold, keep_scale,
    place,
):  # fmt: skip
    constants = {"QUADS": columns % 4 == 0, "PRECISION": _precision(), "num_warps": 4}
    if h is not None and tokens > 0:
        most, block, ranks = _narrow_tile(rank, dtype, factor_dtype)
        block, ranks = _dropped(block, ranks, columns, seed)
        together = most if tokens >= most * adapters else 16
        tiles = _tiles(tokens, adapters, together)
        launch(
            segmented_shrink_kernel, tiles * triton.cdiv(rank, ranks), x, tokens, columns, rank, order,
            begins, tiles, adapters, factor, adapter_stride, rank_stride, column_stride, h, h_scale,
            float(keep_scale), seed, threshold,
            **constants, TOKENS=together, COLUMNS=block, RANKS=ranks,
        )  # fmt: skip
    if outer is not None and adapters > 0 and columns > 0:
        most, _, ranks = _narrow_tile(rank, dtype, _F32)
        together = most if tokens >= most * adapters else 16
        block, ranks = _dropped(64, ranks, columns, seed)
        programs = adapters * triton.cdiv(columns, block) * triton.cdiv(rank, ranks)
        launch(
            segmented_outer_kernel, programs, x, tokens, columns, rank, order, begins, g, outer,
            *((1, rank) if turned else (columns, 1)), outer_scale, float(keep_scale), seed, threshold,
            **constants, TOKENS=together, COLUMNS=block, RANKS=ranks,
        )  # fmt: skip


# ---- expand ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def segmented_expand_kernel(
    y, tokens, columns, rank, order, begins, tiles, adapters, h, factor, adapter_stride, rank_stride,
    column_stride, scale, keep_scale: tl.float64, seed, threshold, flags,
    QUADS: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y += D(scale·h·factor): TOKENS rows of an adapter and COLUMNS columns a program."""
    n = integer(columns)
    groups = tl.cdiv(n, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    first = program % groups * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    adapter, begin, rows = _tile_of(begins, adapters, tokens, tiles, program // groups, TOKENS)
    if rows > 0 and adapter >= 0:
        t = _rows(order, begin, rows, tokens, TOKENS)
        there = (t < tokens)[:, None] & (c < n)[None, :]
        to = y + t[:, None] * n + c[None, :]
        if adapter >= adapters:
            nan = tl.full((TOKENS, COLUMNS), float("nan"), tl.float32)
            tl.store(to, nan.to(y.dtype.element_ty), mask=there)
            tl.store(flags + BAD_ADAPTER, 1)
        else:
            value = _update(
                h, t, tokens, factor + adapter * adapter_stride, c, n, first, integer(rank),
                rank_stride, column_stride, _scale(scale, adapter, keep_scale), seed, threshold,
                y.dtype.element_ty.primitive_bitwidth == 16, QUADS, PRECISION, TOKENS, COLUMNS, RANKS,
            )  # fmt: skip
            value += tl.load(to, mask=there, other=0.0).to(value.dtype)
            tl.store(to, value.to(y.dtype.element_ty), mask=there)


def segmented_expand(
    h, tokens, columns, rank, order, begins, adapters, factor, factor_dtype, adapter_stride, rank_stride,
    column_stride, scale, y, dtype, seed, threshold, keep_scale, place,
):  # fmt: skip
    if tokens == 0 or columns == 0:
        return
    most, block = (16, 32) if dtype == _F64 else (64, 64)
    together = most if tokens >= most * adapters else 16
    tiles = _tiles(tokens, adapters, together)
    launch(
        segmented_expand_kernel, tiles * triton.cdiv(columns, block), y, tokens, columns, rank, order,
        begins, tiles, adapters, h, factor, adapter_stride, rank_stride, column_stride, scale,
        float(keep_scale), seed, threshold, place[1], QUADS=columns % 4 == 0, PRECISION=_precision(),
        TOKENS=together, COLUMNS=block, RANKS=16, num_warps=4,
    )  # fmt: skip
