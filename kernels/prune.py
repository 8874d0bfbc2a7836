"""Pruning in Triton: what csrc/ops/prune.h has.

    kernel            reads + writes an element                     bound by
    prune_histogram   the weight, for each of 2 to 8 digits         memory
    prune_ties        the weight, where some of the equals go       memory
    prune_apply       the weight + its mask, or its zeros           memory
    prune_row         the same in one kernel                        L2, but for the first pass
    prune_group       the weight + its mask, or its zeros           memory; comparisons in long groups
    prune_codes       the packed codes, the mask + the codes        memory

As in csrc/ops/prune.cu, with digits of 8 bits: a score's key is its bits, all NaN have the highest; after the
digits the key of the last that goes is known, and how many of its equals go; the place of the last of these
is searched for, and an element is kept where its key is higher, or the same and its place beyond. Counts are
integers, whose sums do not depend on their order: the same result every time.

The host functions have names, arguments and meaning of csrc/bindings/prune.h; `place` is (stream, flags).
They allocate nothing and wait for nothing. Tiles have not been measured yet.
"""

import torch
import triton
import triton.language as tl

from ._common import integer, launch

# csrc/core/dtype.h, enum DType; csrc/ops/prune.h, enum PruneScope
_BF16, _F16, _F64 = 1, 2, 3
_TENSOR, _ROW = 0, 1

# Numbers of the workspace (csrc/ops/prune.h): what is known of the last that goes, counts, one of each tile.
KEY = tl.constexpr(0)  # as far as its digits are known
REST = tl.constexpr(1)  # how many of those that share these digits go
EQUAL = tl.constexpr(2)  # how many of them there are
LAST = tl.constexpr(3)  # the places of those that go are before this
BINS = tl.constexpr(4)
TIES = tl.constexpr(4 + 2048)
DIGITS = tl.constexpr(256)  # values of a digit

TILE = tl.constexpr(4096)  # elements for one number of ties, kPruneTile
BLOCK = tl.constexpr(2048)  # elements at a time
_WARPS = 8
_COUNTING_PROGRAMS = 1024  # more of them add up more histograms
_PAIRS = 32  # the longest group of which all are compared with all
# Up to so many rows, where they are long, are selected from by the whole device, one after the other.
_FEW_ROWS, _LONG_ROW, _LONGEST_ROW = 16, 65536, 2**31

_SIZES = ["first", "length", "columns", "drop", "shift", "digits", "group"]


# ---- keys --------------------------------------------------------------------------------------


@triton.jit
def _keys(w, scale):
    """The bits of |w·scale| as integers, their order that of the scores; NaN above all."""
    if w.dtype == tl.float64:
        if scale is not None:
            w = w * scale
        bits = w.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        key = tl.where(bits > 0x7FF0000000000000, 0x7FF8000000000000, bits)
    else:
        if w.dtype == tl.bfloat16:  # by its bits: the interpreter's own conversion loses denormals
            w = (w.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        w = w.to(tl.float32)
        if scale is not None:
            w = w * scale
        bits = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        key = tl.where(bits > 0x7F800000, 0x7FC00000, bits)
    return key


@triton.jit
def _load_keys(weight, at, norm, column, there):
    """Of elements of the whole weight and their columns; 0 where nothing is."""
    scale = None
    if norm is not None:
        scale = tl.load(norm + column, mask=there, other=0.0)
    return _keys(tl.load(weight + at, mask=there, other=0.0), scale)


@triton.jit
def _column(at, columns, norm):
    """Of elements of the whole weight, where somebody asks."""
    if norm is None:
        return at
    else:
        return at % columns


# ---- steps of a selection ----------------------------------------------------------------------


@triton.jit
def _count(key, prefix, shift, there):
    """How often each digit above `shift` comes where those before it are the prefix's."""
    inside = there & (((key ^ prefix.to(key.dtype)) >> shift >> 8) == 0)
    digit = ((key >> shift) & 255).to(tl.int32)
    bins = tl.histogram(tl.where(inside, digit, 0), DIGITS)
    outside = tl.sum(1 - inside.to(tl.int32))  # have been counted as 0
    return bins - tl.where(tl.arange(0, DIGITS) == 0, outside, 0)


@triton.jit
def _pick(bins, key, rest, shift):
    """(key, rest, equal) after the digit that element number `rest`, counted from 1, has."""
    d = tl.arange(0, DIGITS)
    digit = tl.sum((tl.cumsum(bins) < rest).to(tl.int64))
    rest -= tl.sum(tl.where(d < digit, bins, 0))
    return key | (digit << shift), rest, tl.sum(tl.where(d == digit, bins, 0))


@triton.jit
def _before(counts, seen, rest, there):
    """How many come before the one by which `rest` are counted, and how many are counted up to the end."""
    upto = seen + tl.cumsum(counts)
    return tl.sum(((upto < rest) & there).to(tl.int64)), seen + tl.sum(counts)


@triton.jit
def _last(weight, begin, end, first, norm, columns, threshold, rest):
    """Behind equal number `rest` of the threshold's from place `begin` on, which is before `end`."""
    last = begin + 1
    seen = integer(0)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < end
        key = _load_keys(weight, first + i, norm, _column(first + i, columns, norm), there)
        equal = (key == threshold.to(key.dtype)) & there
        before, seen = _before(equal.to(tl.int64), seen, rest, there)
        last += before
    return last


@triton.jit
def _apply(weight, first, i, length, norm, columns, mask, threshold, last, ZERO: tl.constexpr):
    there = i < length
    at = first + i
    key = _load_keys(weight, at, norm, _column(at, columns, norm), there)
    threshold = threshold.to(key.dtype)
    keep = (key > threshold) | ((key == threshold) & (i >= last))
    _write(weight, at, mask, keep, there, ZERO)


@triton.jit
def _write(weight, at, mask, keep, there, ZERO: tl.constexpr):
    if mask is not None:
        tl.store(mask + at, keep, mask=there)
    if ZERO:
        tl.store(weight + at, tl.zeros(at.shape, weight.dtype.element_ty), mask=there & (keep == 0))


# ---- tensor ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def prune_begin_kernel(words, drop):
    """Until something is counted all are kept."""
    tl.store(words + KEY, integer(0))
    tl.store(words + REST, integer(drop))
    tl.store(words + EQUAL, integer(0))
    tl.store(words + LAST, integer(0))
    tl.store(words + BINS + tl.arange(0, DIGITS), tl.zeros((DIGITS,), tl.int64))


@triton.jit(do_not_specialize=_SIZES)
def prune_histogram_kernel(weight, words, first, length, columns, norm, shift):
    n, columns = integer(length), integer(columns)
    prefix = tl.load(words + KEY)
    bins = tl.zeros((DIGITS,), tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = first + i
        key = _load_keys(weight, at, norm, _column(at, columns, norm), i < n)
        bins += _count(key, prefix, shift, i < n)
    d = tl.arange(0, DIGITS)
    tl.atomic_add(words + BINS + d, bins.to(tl.int64), mask=bins != 0, sem="relaxed")


@triton.jit(do_not_specialize=_SIZES)
def prune_pick_kernel(words, shift):
    d = tl.arange(0, DIGITS)
    bins = tl.load(words + BINS + d)
    key, rest, equal = _pick(bins, tl.load(words + KEY), tl.load(words + REST), shift)
    tl.debug_barrier()
    tl.store(words + KEY, key)
    tl.store(words + REST, rest)
    tl.store(words + EQUAL, equal)
    tl.store(words + BINS + d, tl.zeros((DIGITS,), tl.int64))


@triton.jit(do_not_specialize=_SIZES)
def prune_ties_kernel(weight, words, first, length, columns, norm):
    n, columns = integer(length), integer(columns)
    if tl.load(words + REST) < tl.load(words + EQUAL):
        threshold = tl.load(words + KEY)
        begin = tl.program_id(0).to(tl.int64) * TILE
        count = integer(0)
        for start in range(begin, begin + TILE, BLOCK):
            i = start + tl.arange(0, BLOCK)
            at = first + i
            key = _load_keys(weight, at, norm, _column(at, columns, norm), i < n)
            count += tl.sum(((key == threshold.to(key.dtype)) & (i < n)).to(tl.int64))
        tl.store(words + TIES + tl.program_id(0), count)


@triton.jit(do_not_specialize=_SIZES)
def prune_last_kernel(weight, words, first, length, columns, norm):
    n, columns = integer(length), integer(columns)
    rest = tl.load(words + REST)
    last = n
    if rest < tl.load(words + EQUAL):
        tiles = tl.cdiv(n, TILE)
        tile, seen, passed = integer(0), integer(0), integer(0)
        for start in range(0, tiles, BLOCK):
            t = start + tl.arange(0, BLOCK)
            count = tl.load(words + TIES + t, mask=t < tiles, other=0)
            short = (seen + tl.cumsum(count) < rest) & (t < tiles)
            tile += tl.sum(short.to(tl.int64))
            passed += tl.sum(tl.where(short, count, 0))
            seen += tl.sum(count)
        begin = tile * TILE
        end = tl.minimum(begin + TILE, n)
        threshold = tl.load(words + KEY)
        last = _last(weight, begin, end, first, norm, columns, threshold, rest - passed)
    tl.store(words + LAST, last)


@triton.jit(do_not_specialize=_SIZES)
def prune_apply_kernel(weight, words, first, length, columns, norm, mask, ZERO: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, columns = integer(length), integer(columns)
    threshold, last = tl.load(words + KEY), tl.load(words + LAST)
    _apply(weight, integer(first), i, n, norm, columns, mask, threshold, last, ZERO)


def _shifts(dtype, norm):
    """Of the digits of a key, from the top; 16-bit elements without a norm leave the low ones at 0."""
    if dtype == _F64:
        return range(56, -8, -8)
    lowest = {_BF16: 16, _F16: 8}.get(dtype, 0) if norm is None else 0
    return range(24, lowest - 8, -8)


def _select(weight, dtype, first, length, columns, drop, norm, mask, zero, workspace):
    """Of one range."""
    words = workspace.view(torch.int64)
    given = (weight, words, first, length, columns, norm)
    launch(prune_begin_kernel, 1, words, drop, num_warps=_WARPS)
    if drop > 0:
        programs = min(triton.cdiv(length, BLOCK.value), _COUNTING_PROGRAMS)
        for shift in _shifts(dtype, norm):
            launch(prune_histogram_kernel, programs, *given, shift, num_warps=_WARPS)
            launch(prune_pick_kernel, 1, words, shift, num_warps=_WARPS)
        launch(prune_ties_kernel, triton.cdiv(length, TILE.value), *given, num_warps=_WARPS)
        launch(prune_last_kernel, 1, *given, num_warps=_WARPS)
    launch(
        prune_apply_kernel, triton.cdiv(length, BLOCK.value), *given, mask, ZERO=zero, num_warps=_WARPS
    )  # fmt: skip


# ---- row ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def prune_row_kernel(
    weight, length, columns, norm, mask, drop, shift, digits, ZERO: tl.constexpr
):  # fmt: skip
    """Of ranges that follow each other: rows, or long groups. `shift`: of the first of the digits."""
    n, columns = integer(length), integer(columns)
    first = tl.program_id(0).to(tl.int64) * n
    key, rest, equal = integer(0), integer(drop), integer(0)
    for _ in range(digits):
        bins = tl.zeros((DIGITS,), tl.int32)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            at = first + i
            k = _load_keys(weight, at, norm, _column(at, columns, norm), i < n)
            bins += _count(k, key, shift, i < n)
        key, rest, equal = _pick(bins.to(tl.int64), key, rest, shift)
        shift -= 8
    last = n
    if rest < equal:
        last = _last(weight, integer(0), n, first, norm, columns, key, rest)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _apply(weight, first, i, n, norm, columns, mask, key, last, ZERO)


def _rows(weight, dtype, count, length, columns, drop, norm, mask, zero, workspace):
    ranges = count // length
    if ranges == 1 or length >= _LONGEST_ROW or (ranges <= _FEW_ROWS and length >= _LONG_ROW):
        for first in range(0, count, length):
            _select(weight, dtype, first, length, columns, drop, norm, mask, zero, workspace)
        return
    shifts = _shifts(dtype, norm)
    launch(
        prune_row_kernel, ranges, weight, length, columns, norm, mask, drop, shifts[0], len(shifts),
        ZERO=zero, num_warps=_WARPS,
    )  # fmt: skip


# ---- group -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def prune_group_kernel(
    weight, length, columns, norm, mask, drop, group,
    ZERO: tl.constexpr, PLACES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Short groups, each padded to PLACES: how many of its group go before an element is counted."""
    p = tl.arange(0, PLACES)
    g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = g[:, None] * group + p[None, :]
    there = (at < length) & (p < group)[None, :]
    key = _load_keys(weight, at, norm, _column(at, integer(columns), norm), there)
    other = tl.where(there, key, 0x7FFFFFFF if key.dtype == tl.int32 else 0x7FFFFFFFFFFFFFFF)
    mine, other = key[:, :, None], other[:, None, :]
    before = (other < mine) | ((other == mine) & (p[None, :] < p[:, None])[None, :, :])
    keep = tl.sum(before.to(tl.int32), 2) >= drop
    _write(weight, at, mask, keep, there, ZERO)


def prune(
    weight, dtype, rows, columns, scope, drop, group, norm, mask, zero, workspace, place
):  # fmt: skip
    count = rows * columns
    if count == 0 or (mask is None and not zero):
        return
    if scope == _TENSOR or drop == 0:
        _select(weight, dtype, 0, count, columns, drop, norm, mask, zero, workspace)
    elif scope == _ROW or group > _PAIRS:
        length = columns if scope == _ROW else group
        _rows(weight, dtype, count, length, columns, drop, norm, mask, zero, workspace)
    else:
        places = max(4, triton.next_power_of_2(group))
        together = 4096 // places**2  # of all pairs of elements of a group a program has 4096
        launch(
            prune_group_kernel, triton.cdiv(count // group, together), weight, count, columns, norm,
            mask, drop, group, ZERO=zero, PLACES=places, GROUPS=together, num_warps=4,
        )  # fmt: skip


# ---- packed codes ------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "zero"])
def prune_codes_kernel(codes, mask, count, zero, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Whole bytes of any number of bits: 8 codes a line, the first in the highest bits."""
    k = tl.arange(0, 8)
    line = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    i = line[:, None] * 8 + k[None, :]
    gone = tl.load(mask + i, mask=i < count, other=1).to(tl.int32) == 0
    shift = (7 - k).to(tl.int64) * BITS
    ones = tl.full((8,), 2**BITS - 1, tl.int64) << shift
    changed = tl.sum(tl.where(gone, ones[None, :], 0), 1)
    zeros = tl.sum(integer(zero) << shift)
    for b in tl.static_range(BITS):
        those = ((changed >> (8 * (BITS - 1 - b))) & 255).to(tl.int32)
        at = codes + line * BITS + b
        byte = tl.load(at, mask=those != 0, other=0).to(tl.int32)
        new = (byte & (255 - those)) | (
            ((zeros >> (8 * (BITS - 1 - b))) & 255).to(tl.int32) & those
        )
        tl.store(at, new.to(tl.uint8), mask=those != 0)


def prune_codes(codes, count, bits, zero, mask, place):
    if count > 0:
        launch(
            prune_codes_kernel, triton.cdiv(count, 8 * 256), codes, mask, count, zero, BITS=bits,
            SIZE=256, num_warps=4,
        )  # fmt: skip
