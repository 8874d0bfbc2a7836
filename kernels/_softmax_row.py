"""What rows of logits share, in Triton, whatever the loss: one pass of statistics, one of gradient.

A program per row, in blocks of BLOCK elements; `tile` is the one place that chooses them. Elements and the
sums of one lane are float32 (float64 for float64 logits); lanes are added up, and all that a row has only one
of is computed, in float64. No atomics: the same inputs give the same bits.

Numbers are kept as in csrc/core/softmax_row.h, relative to the row's maximum `ref`: z - ref is exact or
nearly so and `excess`, Σ e^{(z - ref)/T} - 1, lacks the 1 of the maximum's own term, so that
log-probabilities and entropies near 0 keep all their digits.
"""

import triton
import triton.language as tl

from ._common import expm1

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Beyond any exponent that leaves something of 2^-x, and finite: x·2^-x is 0 and not inf·0.
FAR = tl.constexpr(1e30)
MINUS_INF = tl.constexpr(float("-inf"))
LOWEST_32 = tl.constexpr(-3.4028234663852886e38)
LOWEST_64 = tl.constexpr(-1.7976931348623157e308)


def tile(layout, itemsize, sums=0, twice=False):
    """(BLOCK, num_warps) for the rows of a layout: the one place where they are chosen.

    16 elements a thread keep enough loads in flight and the lanes' running sums in registers; 8 where a lane
    has three sums, an element 8 bytes, the row few elements, or where rows are not aligned and each element
    has an address of its own. `twice`: a long row that is read again for its gradient gets a whole
    multiprocessor's threads, so that few rows are under way and what was read is still in L2.
    """
    vocab = layout[2]
    aligned = all(n % 16 == 0 for n in (vocab, *layout[4:]))
    if vocab <= 2048:
        return 1024, 4
    if twice and vocab > 16384 and itemsize < 8:
        return (8192 if aligned else 4096), 32
    return (4096 if aligned and itemsize < 8 and sums <= 2 else 2048), 8


@triton.jit
def row_of(base, r, inner, outer_stride, inner_stride):
    """Where row r (int64) starts: LogitRows in csrc/core/logit_rows.h."""
    outer = r // inner
    return base + (outer * outer_stride + (r - outer * inner) * inner_stride)


@triton.jit
def logit(address):
    """One logit as float64, by way of float32 from 16 bits."""
    x = tl.load(address)
    return (x if x.dtype == tl.float64 else x.to(tl.float32)).to(tl.float64)


@triton.jit
def middle(address):
    """A finite number near a row's logits: sums of what they differ by keep their digits."""
    x = logit(address)
    return tl.where(tl.abs(x) < -MINUS_INF, x, 0.0)


@triton.jit
def row_stats(
    z, middle, vocab, c, ENTROPY, LOGIT_SUM, BLOCK, EVICTION, IN_64: tl.constexpr = False
):
    """One pass: ref, excess, dot, logit_sum of a row, float64.

    ref        the maximum
    excess     Σ e - 1 with e = 2^{(z - ref)·c}, c = log2(e)/T
    dot        Σ (ref - z)·c·e  (ENTROPY), so that H = log1p(excess) + ln 2·dot/(1 + excess)
    logit_sum  Σ (z - middle)   (LOGIT_SUM)

    Each lane keeps its own running maximum m and sums relative to it, with one exponential an element: a new
    maximum moves the sums to itself by the e that its predecessor takes. An empty lane is m = the lowest
    number, s = -1 (no terms, not even the maximum's own), and nothing below needs a case for it. IN_64: in
    float64 whatever the type of z; c is of the type that it is computed in.
    """
    WIDE: tl.constexpr = IN_64 or z.dtype.element_ty == tl.float64
    DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
    m = tl.full((BLOCK,), LOWEST_64 if WIDE else LOWEST_32, DTYPE)
    s = tl.full((BLOCK,), -1.0, DTYPE)
    dot = tl.zeros((BLOCK,), DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)
    lane = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        inside = lane < vocab - start
        x = tl.load(z + start + lane, mask=inside, other=MINUS_INF, eviction_policy=EVICTION)
        x = x.to(DTYPE)
        d = x - m
        a = tl.abs(d) * c
        e = tl.exp2(-a)
        up = d > 0
        shift = tl.where(up, e, 1.0)
        s = s * shift + e  # rising: (1 + s)·e
        if ENTROPY:
            # a rising maximum leaves all of them, its predecessor's 1 included, |d| further below
            dot = dot * shift + tl.minimum(a, FAR) * tl.where(up, s, e)
        m = tl.maximum(m, x)
        if LOGIT_SUM:
            total += tl.where(inside, x - middle, 0.0)

    top = tl.max(m, 0)
    a = tl.abs(m - top) * c
    e = tl.exp2(-a)
    at_top = m == top  # the first of these is the maximum itself, the others are ties, 1 each
    ties = tl.sum(at_top.to(tl.int32), 0) - 1
    excess = tl.sum(tl.where(at_top, s, (1.0 + s) * e).to(tl.float64), 0) + ties
    excess = tl.where(top == -MINUS_INF, float("nan"), excess)
    dot = tl.sum(((dot + tl.minimum(a, FAR) * (1.0 + s)) * e).to(tl.float64), 0)
    # nothing but -inf
    ref = tl.where(excess == -1.0, MINUS_INF, top.to(tl.float64))
    return ref, excess, dot, tl.sum(total.to(tl.float64), 0)


@triton.jit
def logprob_gradient(g, h, l, logp, log_sum, entropy, inverse_t, ENTROPY):
    """(a, b, at_y) for write_gradient, given g, h, l upstream of logp, entropy and lse.

    dz = (1/T)·[g·(1[y] - p) - h·p·(log p + H) + l·p]; h is used if ENTROPY.
    """
    p_scale = tl.exp(-log_sum) * inverse_t
    p = tl.exp(logp)
    a = l - g
    at_y = l * p - g * expm1(logp, p)
    if ENTROPY:
        entropy = tl.where(h == 0.0, 0.0, entropy)  # nothing of it is in a row without h
        a -= h * (entropy - log_sum)
        at_y -= h * tl.where(p == 0.0, 0.0, p * (logp + entropy))
    return a * p_scale, -h * p_scale * inverse_t, at_y * inverse_t


@triton.jit
def write_gradient(z, out, vocab, y, at_y, ref, c, a, b, offset, ENTROPY, BLOCK, BACKWARDS):
    """out = e·(a + b·d) + offset with d = z - ref, e = 2^{d·c}, and `at_y` at the target; z may be out.

    BACKWARDS: from the row's end, of which the most is still in L2.
    """
    WIDE: tl.constexpr = z.dtype.element_ty == tl.float64
    DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
    ref = ref.to(DTYPE)
    a = a.to(DTYPE)
    b = b.to(DTYPE)
    offset = offset.to(DTYPE)
    at_y = at_y.to(DTYPE)
    # far enough down for e to be 0, and a number: 0·b·d is 0
    floor = -1200.0 / c if WIDE else -200.0 / c
    lane = tl.arange(0, BLOCK)
    last = (vocab - 1) // BLOCK * BLOCK
    for step in range(0, vocab, BLOCK):
        start = last - step if BACKWARDS else step
        inside = lane < vocab - start
        x = tl.load(z + start + lane, mask=inside, other=0.0, eviction_policy="evict_first")
        d = x.to(DTYPE) - ref
        if ENTROPY:
            d = tl.where(d < floor, floor, d)  # NaN stays
            value = tl.exp2(d * c) * (b * d + a)
        else:
            value = tl.exp2(d * c) * a + offset
        value = tl.where(lane == y - start, at_y, value)
        tl.store(out + start + lane, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def write_zeros(out, vocab, BLOCK):
    lane = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
    for start in range(0, vocab, BLOCK):
        tl.store(out + start + lane, zeros, mask=lane < vocab - start)
