"""Token log-probabilities from hidden states in Triton: tiles of logits on the chip, and no others.

    kernel                         reads + writes                       bound by
    linear_token_logprobs_kernel   hidden a time for COLUMNS columns,   the product's arithmetic; by the bytes
                                   the weight for GROUP tiles of rows   of the weight where rows are few
    linear_combine_kernel          16 bytes for a row and a split       the launch

A program of the first has TOKENS rows and walks through one split of the vocabulary, COLUMNS logits at a
time: a product over the whole inner dimension, then what is made of it while it is in registers. It leaves
four numbers a row in `partial`, which the second adds up. Programs side by side read the same columns of the
weight, and GROUP of them the same rows as those of the next split: both come from L2.

Products of 16-bit numbers are exact, of float32 multiplied as such; they, the logits and what is made of a
tile are float32, sums over tiles and splits float64. No atomics: the same inputs give the same bits, and how
many splits there are follows from the shape. Sums lack the 1 of the maximum's own term, as in
kernels/_softmax_row.py, and the target's logit is the one that is in the sums: log-probabilities near 0 keep
their digits. `saved` has the meaning that it has in csrc/ops/logprobs.h.

`place` is (stream, flags). The host function allocates nothing and waits for nothing: `partial` comes from
the caller. A row that is ignored is not read. A target out of range is never followed: its row becomes NaN
and a flag is set. Tiles have not been measured yet.
"""

import triton
import triton.language as tl

from ._common import BAD_TARGETS, integer, launch, log1p, number
from ._softmax_row import FAR, LN2, LOG2E, LOWEST_32, LOWEST_64, MINUS_INF
from .logprobs import store_outputs
from .lora import _load, shared_memory

# Tiles of rows that walk through the same columns.
GROUP = tl.constexpr(16)
# A split is so many times this many columns: whole tiles, whatever the tile.
UNIT = tl.constexpr(256)
# Columns of which something is made at a time: it takes registers beside the whole tile's.
PIECE = tl.constexpr(64)
# A row's numbers in a split: its maximum m; Σ e - 1 with e = 2^{(z - m)·c}, c = log2(e)/T, which is -1 of no
# terms; Σ (m - z)·c·e; the target's logit, or 0.
NUMBERS = tl.constexpr(4)


@triton.jit
def _tanh(x):
    """float32, to two units in the last place: Cephes' polynomial, and 1 - 2/(e^{2|x|} + 1) beyond it."""
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    x2 = x * x
    p = -5.70498872745e-3 * x2 + 2.06390887954e-2
    p = p * x2 - 5.37397155531e-2
    p = p * x2 + 1.33314422036e-1
    p = p * x2 - 3.33332819422e-1
    return tl.where(a < 0.625, p * x2 * x + x, tl.where(x < 0.0, -far, far))


@triton.jit
def _add_logits(
    z, start, columns, y, c, softcap, before, excess, dot, z_y,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row's numbers (see NUMBERS), those of COLUMNS logits from `start` on added."""
    lane = tl.arange(0, COLUMNS)
    if SOFTCAP:
        z = _tanh(z * (1.0 / number(softcap)).to(tl.float32)) * number(softcap).to(tl.float32)
    z = tl.where((lane < columns - start)[None, :], z, MINUS_INF)
    m = tl.maximum(before, tl.max(z, 1))
    a = (m[:, None] - z) * c
    e = tl.exp2(-a)
    at_top = z == m[:, None]
    # a rising maximum moves the sums to itself, and is a term without its own 1
    up = m > before
    fall = (m - before) * c
    shift = tl.where(up, tl.exp2(-fall), 1.0).to(tl.float64)
    if ENTROPY:
        moved = tl.where(up, tl.minimum(fall, FAR).to(tl.float64) * (1.0 + excess), 0.0)
        dot = (dot + moved) * shift
        dot += tl.sum(tl.minimum(a, FAR) * e, 1).to(tl.float64)
    ties = tl.sum(at_top.to(tl.float32), 1) - up.to(tl.float32)
    excess = tl.where(up, (1.0 + excess) * shift, excess)
    excess += tl.sum(tl.where(at_top, 0.0, e), 1).to(tl.float64) + ties.to(tl.float64)
    at_y = (y - start).to(tl.int32)[:, None] == lane[None, :]
    z_y += tl.sum(tl.where(at_y, z, 0.0), 1)
    return m, excess, dot, z_y


@triton.jit
def _add_tile(
    z, start, columns, y, c, softcap, m, excess, dot, z_y,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same for a whole tile, PIECE columns at a time."""
    if COLUMNS > PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        halves = tl.permute(tl.reshape(z, (z.shape[0], 2, HALF)), (0, 2, 1))
        left, right = tl.split(halves)
        m, excess, dot, z_y = _add_tile(
            left, start, columns, y, c, softcap, m, excess, dot, z_y, SOFTCAP, ENTROPY, HALF
        )
        m, excess, dot, z_y = _add_tile(
            right, start + HALF, columns, y, c, softcap, m, excess, dot, z_y, SOFTCAP, ENTROPY, HALF
        )
    else:
        m, excess, dot, z_y = _add_logits(
            z, start, columns, y, c, softcap, m, excess, dot, z_y, SOFTCAP, ENTROPY, COLUMNS
        )
    return m, excess, dot, z_y


@triton.jit
def _split(columns, splits):
    """Columns of a split."""
    units = tl.cdiv(integer(columns), UNIT)
    return tl.cdiv(units, splits) * UNIT


@triton.jit(do_not_specialize=["rows", "columns", "ignore_index", "splits"])
def linear_token_logprobs_kernel(
    hidden, hidden_step, weight, weight_step, rows, inner, columns, bias, targets, ignore_index,
    temperature: tl.float64, softcap: tl.float64, splits, partial,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """EVEN: INNER divides the length of the products. Rows and columns that are not there repeat others."""
    tiles = tl.cdiv(integer(rows), TOKENS)
    program, across = tl.program_id(0).to(tl.int64), GROUP * integer(splits)
    top = program // across * GROUP
    height = tl.minimum(tiles - top, GROUP)
    r = (top + program % across % height) * TOKENS + tl.arange(0, TOKENS)
    split = program % across // height

    y = tl.load(targets + r, mask=r < rows, other=0).to(tl.int64)
    kept = (r < rows) & (y != ignore_index) & (y >= 0) & (y < columns)
    first = tl.min(tl.where(kept, r, integer(rows)), 0)
    if first < rows:
        k = integer(inner)
        i = tl.arange(0, INNER)
        lane = tl.arange(0, COLUMNS)
        x_rows = hidden + tl.where(kept, r, first)[:, None] * integer(hidden_step) + i[None, :]
        c = (1.0 / number(temperature) * LOG2E).to(tl.float32)
        m = tl.full((TOKENS,), LOWEST_32, tl.float32)
        excess = tl.full((TOKENS,), -1.0, tl.float64)
        dot = tl.zeros((TOKENS,), tl.float64)
        z_y = tl.zeros((TOKENS,), tl.float32)
        length = _split(columns, splits)
        begin = split * length
        for start in range(begin, tl.minimum(begin + length, columns), COLUMNS):
            inside = lane < columns - start
            column = tl.where(inside, start + lane, start)
            if bias is not None:
                b = tl.load(bias + column).to(tl.float32)
                z = tl.broadcast_to(b[None, :], (TOKENS, COLUMNS))
            else:
                z = tl.zeros((TOKENS, COLUMNS), tl.float32)
            from_x = x_rows
            from_weight = weight + column[None, :] * integer(weight_step) + i[:, None]
            for done in range(0, k, INNER):
                if EVEN:
                    v, w = _load(from_x, None), _load(from_weight, None)
                else:
                    there = i < k - done
                    v, w = _load(from_x, there[None, :]), _load(from_weight, there[:, None])
                z = tl.dot(v, w, z, input_precision="ieee")
                from_x += INNER
                from_weight += INNER
            m, excess, dot, z_y = _add_tile(
                z, start, columns, y, c, softcap, m, excess, dot, z_y, SOFTCAP, ENTROPY, COLUMNS
            )

        out = partial + (split * rows + r) * NUMBERS
        tl.store(out, m, mask=kept)
        tl.store(out + 1, excess.to(tl.float32), mask=kept)
        tl.store(out + 2, dot.to(tl.float32), mask=kept)
        tl.store(out + 3, z_y, mask=kept)


@triton.jit(do_not_specialize=["splits", "rows", "columns", "ignore_index"])
def linear_combine_kernel(
    partial, splits, rows, columns, targets, ignore_index, temperature: tl.float64,
    logprobs, entropy, lse, saved, flags, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the splits of a row left, and its outputs: as row_stats and token_logprobs_kernel end."""
    r = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + r).to(tl.int64)
    kept = y != ignore_index
    inside = (y >= 0) & (y < columns)
    ref = number(0.0)
    log_sum = number(0.0)
    logp = number(0.0)
    lse_r = number(0.0)
    entropy_r = number(0.0)
    if kept & inside:
        inverse_t = 1.0 / number(temperature)
        lane = tl.arange(0, BLOCK)
        row = partial + r * NUMBERS
        step = integer(rows) * NUMBERS
        m = tl.full((BLOCK,), LOWEST_64, tl.float64)
        for start in range(0, integer(splits), BLOCK):
            there = lane < splits - start
            m_s = tl.load(row + (start + lane) * step, mask=there, other=LOWEST_32)
            m = tl.maximum(m, m_s.to(tl.float64))
        top = tl.max(m, 0)
        excess = tl.zeros((BLOCK,), tl.float64)
        dot = tl.zeros((BLOCK,), tl.float64)
        ties = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, integer(splits), BLOCK):
            there = lane < splits - start
            of_split = row + (start + lane) * step
            m_s = tl.load(of_split, mask=there, other=LOWEST_32).to(tl.float64)
            s = tl.load(of_split + 1, mask=there, other=-1.0).to(tl.float64)
            d = tl.load(of_split + 2, mask=there, other=0.0).to(tl.float64)
            a = (top - m_s) * (inverse_t * LOG2E)
            e = tl.exp2(-a)
            at_top = (m_s == top) & there
            excess += tl.where(at_top, s, (1.0 + s) * e)
            ties += at_top.to(tl.int32)
            dot += (d + tl.minimum(a, FAR) * (1.0 + s)) * e
        total = tl.sum(excess, 0) + (tl.sum(ties, 0) - 1)
        total = tl.where(top == -MINUS_INF, float("nan"), total)
        ref = tl.where(total == -1.0, MINUS_INF, top)  # nothing but -inf
        z_y = tl.load(row + y // _split(columns, splits) * step + 3).to(tl.float64)
        log_sum = log1p(total)
        lse_r = ref * inverse_t + log_sum
        logp = (z_y - ref) * inverse_t - log_sum  # all -inf: -inf + inf, NaN
        if entropy is not None:
            entropy_r = log_sum + tl.sum(dot, 0) * LN2 / (1.0 + total)
    elif kept:
        logp = number(float("nan"))
        lse_r = number(float("nan"))
        entropy_r = number(float("nan"))
        tl.store(flags + BAD_TARGETS, 1)
    store_outputs(r, rows, logp, entropy_r, lse_r, ref, log_sum, logprobs, entropy, lse, saved)


def splits(rows, vocab, inner):
    """How many programs share the vocabulary of a tile of rows: enough to fill a GPU some times over, and 8
    where there are, so that those at work at once have few rows between them and find them in L2."""
    units = max(triton.cdiv(vocab, UNIT.value), 1)
    wanted = min(max(1024 // max(triton.cdiv(rows, 128), 1), 8), units)
    return triton.cdiv(units, triton.cdiv(units, wanted))  # none without columns


def partial_shape(rows, vocab, inner=0):
    """Of the float32 scratch of linear_token_logprobs."""
    return splits(rows, vocab, inner), rows, NUMBERS.value


def _tile(rows, whole, itemsize, device):
    """(rows, columns, inner, warps, stages) of a tile; `whole`: see _depth."""
    depth = _depth(itemsize)
    if not whole:
        return 16, 64, 32, 4, 2
    if itemsize == 4:
        return (16, 64, depth, 4, 3) if rows <= 16 else (64, 64, depth, 4, 2)
    if rows <= 64:
        return (16 if rows <= 16 else 64), 128, depth, 4, 4
    if shared_memory(device) >= 200 << 10:  # sm_90; the registers of sm_80 would not do
        return 128, 256, depth, 8, 3
    return 128, 128, depth, 8, 3


def _depth(itemsize):
    """Steps of a product. A row that is no whole number of them, or not aligned, is read number by number:
    that takes registers of its own, and a small tile."""
    return 32 if itemsize == 4 else 64


def _aligned(x):
    """Whether rows begin at multiples of what Triton takes 16 bytes at a time of."""
    return x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0


def linear_token_logprobs(
    hidden, weight, bias, targets, ignore_index, temperature, softcap,
    logprobs, entropy, lse, saved, partial, place,
):  # fmt: skip
    """hidden (N, H), weight (V, H), rows of any stride; softcap 0: none; partial: see partial_shape."""
    rows, inner = hidden.shape
    vocab, count = weight.shape[0], partial.shape[0]
    if rows == 0:
        return
    itemsize = hidden.element_size()
    whole = inner % _depth(itemsize) == 0 and _aligned(hidden) and _aligned(weight)
    together, block, depth, warps, stages = _tile(rows, whole, itemsize, hidden.device)
    launch(
        linear_token_logprobs_kernel, triton.cdiv(rows, together) * count, hidden, hidden.stride(0),
        weight, weight.stride(0), rows, inner, vocab, bias, targets, ignore_index, float(temperature),
        float(softcap), count, partial, SOFTCAP=softcap != 0.0, ENTROPY=entropy is not None,
        EVEN=whole, TOKENS=together, COLUMNS=block, INNER=depth, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    launch(
        linear_combine_kernel, rows, partial, count, rows, vocab, targets, ignore_index,
        float(temperature), logprobs, entropy, lse, saved, place[1], BLOCK=128, num_warps=1,
    )  # fmt: skip
