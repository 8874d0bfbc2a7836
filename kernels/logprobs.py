"""Token log-probabilities, cross-entropy and sequence sums in Triton: what csrc/bindings/ops.h has on GPUs.

    kernel                    reads + writes an element   bound by
    token_logprobs            sizeof(T) + 0               memory; with entropy in 16 bits nearly by arithmetic
    token_logprobs_backward   sizeof(T) + sizeof(T)       memory
    cross_entropy             sizeof(T) + sizeof(T)       memory; the gradient's second read is from L2
    scale_gradient            sizeof(T) + sizeof(T)       memory; nothing is read where the factor is 1
    sequence_sums             4 (8) + 1 for a mask        memory, or the launch
    sequence_sums_backward    1 for a mask + 4 (8)        memory, or the launch

A program per row (or segment), in blocks of BLOCK elements; `_tile` is the one place that chooses them.
Elements and the sums of one lane are float32 (float64 for float64 logits); lanes are added up, and all that a
row has only one of is computed, in float64. No atomics: the same inputs give the same bits.

Numbers are kept as in csrc/core/softmax_row.h, relative to the row's maximum `ref`: z - ref is exact or
nearly so and `excess`, Σ e^{(z - ref)/T} - 1, lacks the 1 of the maximum's own term, so that
log-probabilities and entropies near 0 keep all their digits. `saved` has the same meaning as there: a forward
on a CPU and a backward here agree.

The host functions have the names, arguments and meaning of csrc/bindings/ops.h; `place` is (stream, flags).
They allocate nothing and wait for nothing. A target out of range is never followed: its row becomes NaN (its
gradient 0) and a flag is set, and so for offsets.
"""

import triton
import triton.language as tl

from ._common import (
    BAD_CU_SEQLENS,
    BAD_TARGETS,
    REDUCE_MEAN,
    REDUCE_NONE,
    expm1,
    integer,
    launch,
    log1p,
    number,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Beyond any exponent that leaves something of 2^-x, and finite: x·2^-x is 0 and not inf·0.
FAR = tl.constexpr(1e30)
MINUS_INF = tl.constexpr(float("-inf"))
NAN = tl.constexpr(float("nan"))
LOWEST_32 = tl.constexpr(-3.4028234663852886e38)
LOWEST_64 = tl.constexpr(-1.7976931348623157e308)


def _tile(layout, itemsize, sums=0, twice=False):
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


# ---- pieces ------------------------------------------------------------------------------------


@triton.jit
def _row(base, r, inner, outer_stride, inner_stride):
    """Where row r (int64) starts: LogitRows in csrc/ops/logprobs.h."""
    outer = r // inner
    return base + (outer * outer_stride + (r - outer * inner) * inner_stride)


@triton.jit
def _logit(address):
    """One logit as float64, by way of float32 from 16 bits."""
    x = tl.load(address)
    return (x if x.dtype == tl.float64 else x.to(tl.float32)).to(tl.float64)


@triton.jit
def _middle(address):
    """A finite number near a row's logits: sums of what they differ by keep their digits."""
    x = _logit(address)
    return tl.where(tl.abs(x) < -MINUS_INF, x, 0.0)


@triton.jit
def _statistics(z, middle, vocab, c, ENTROPY, LOGIT_SUM, BLOCK, EVICTION):
    """One pass: ref, excess, dot, logit_sum of a row, float64.

    ref        the maximum
    excess     Σ e - 1 with e = 2^{(z - ref)·c}, c = log2(e)/T
    dot        Σ (ref - z)·c·e  (ENTROPY), so that H = log1p(excess) + ln 2·dot/(1 + excess)
    logit_sum  Σ (z - middle)   (LOGIT_SUM)

    Each lane keeps its own running maximum m and sums relative to it, with one exponential an element: a new
    maximum moves the sums to itself by the e that its predecessor takes. An empty lane is m = the lowest
    number, s = -1 (no terms, not even the maximum's own), and nothing below needs a case for it.
    """
    WIDE: tl.constexpr = z.dtype.element_ty == tl.float64
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
    excess = tl.where(top == -MINUS_INF, NAN, excess)
    dot = tl.sum(((dot + tl.minimum(a, FAR) * (1.0 + s)) * e).to(tl.float64), 0)
    # nothing but -inf
    ref = tl.where(excess == -1.0, MINUS_INF, top.to(tl.float64))
    return ref, excess, dot, tl.sum(total.to(tl.float64), 0)


@triton.jit
def _write_gradient(z, out, vocab, y, at_y, ref, c, a, b, offset, ENTROPY, BLOCK, BACKWARDS):
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
def _write_zeros(out, vocab, BLOCK):
    lane = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
    for start in range(0, vocab, BLOCK):
        tl.store(out + start + lane, zeros, mask=lane < vocab - start)


# ---- token_logprobs ----------------------------------------------------------------------------

_RUNTIME = ["rows", "inner", "gradient_inner", "ignore_index"]  # numbers on which nothing depends


@triton.jit(do_not_specialize=_RUNTIME)
def token_logprobs_kernel(
    logits, inner, outer_stride, inner_stride, targets, ignore_index, rows, vocab,
    temperature: tl.float64, logprobs, entropy, lse, saved, flags, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + r).to(tl.int64)
    kept = y != ignore_index
    inside = (y >= 0) & (y < vocab)
    ref = number(0.0)
    log_sum = number(0.0)
    logp = number(0.0)
    lse_r = number(0.0)
    entropy_r = number(0.0)
    if kept & inside:
        inverse_t = 1.0 / number(temperature)
        z = _row(logits, r, inner, outer_stride, inner_stride)
        WIDE: tl.constexpr = logits.dtype.element_ty == tl.float64
        c = (inverse_t * LOG2E).to(tl.float64 if WIDE else tl.float32)
        ref, excess, dot, _ = _statistics(
            z, 0.0, integer(vocab), c, entropy is not None, False, BLOCK, "evict_first"
        )
        log_sum = log1p(excess)
        lse_r = ref * inverse_t + log_sum
        logp = (_logit(z + y) - ref) * inverse_t - log_sum  # all -inf: -inf + inf, NaN
        if entropy is not None:
            entropy_r = log_sum + dot * LN2 / (1.0 + excess)
    elif kept:
        logp = number(NAN)
        lse_r = number(NAN)
        entropy_r = number(NAN)
        tl.store(flags + BAD_TARGETS, 1)
    tl.store(logprobs + r, logp)
    if entropy is not None:
        tl.store(entropy + r, entropy_r)
    if lse is not None:
        tl.store(lse + r, lse_r)
    if saved is not None:
        tl.store(saved + r, ref)
        tl.store(saved + rows + r, log_sum)
        if entropy is not None:
            tl.store(saved + 2 * rows.to(tl.int64) + r, entropy_r)


@triton.jit(do_not_specialize=[*_RUNTIME, "has_g", "has_l"])
def token_logprobs_backward_kernel(
    logits, inner, outer_stride, inner_stride,
    gradient, gradient_inner, gradient_outer_stride, gradient_inner_stride,
    targets, ignore_index, rows, vocab, temperature: tl.float64,
    saved, g, has_g, h, l, has_l, flags, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + r).to(tl.int64)
    kept = y != ignore_index
    inside = (y >= 0) & (y < vocab)
    g_r = tl.load(g + r, mask=has_g != 0, other=0.0).to(tl.float64)
    l_r = tl.load(l + r, mask=has_l != 0, other=0.0).to(tl.float64)
    h_r = number(0.0)
    if h is not None:
        h_r = tl.load(h + r).to(tl.float64)
    out = _row(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
    if kept & inside & ((g_r != 0.0) | (h_r != 0.0) | (l_r != 0.0)):
        z = _row(logits, r, inner, outer_stride, inner_stride)
        z_y = _logit(z + y)
        tl.debug_barrier()  # in place, a warp that is ahead would overwrite it
        ref = tl.load(saved + r)
        log_sum = tl.load(saved + rows + r)
        inverse_t = 1.0 / number(temperature)
        p_scale = tl.exp(-log_sum) * inverse_t
        logp = (z_y - ref) * inverse_t - log_sum
        p = tl.exp(logp)
        a = l_r - g_r
        at_y = l_r * p - g_r * expm1(logp, p)
        if h is not None:
            # 0 where there was none: nothing of it is in a row without h
            entropy = tl.where(h_r == 0.0, 0.0, tl.load(saved + 2 * rows.to(tl.int64) + r))
            a -= h_r * (entropy - log_sum)
            at_y -= h_r * tl.where(p == 0.0, 0.0, p * (logp + entropy))
        WIDE: tl.constexpr = logits.dtype.element_ty == tl.float64
        c = (inverse_t * LOG2E).to(tl.float64 if WIDE else tl.float32)
        _write_gradient(
            z, out, integer(vocab), y, at_y * inverse_t, ref, c, a * p_scale,
            -h_r * p_scale * inverse_t, number(0.0), h is not None, BLOCK, False,
        )  # fmt: skip
    else:
        _write_zeros(out, integer(vocab), BLOCK)
        if kept & (inside == 0):
            tl.store(flags + BAD_TARGETS, 1)


def token_logprobs(
    logits, layout, targets, int32, ignore_index, temperature,
    logprobs, entropy, lse, saved, place,
):  # fmt: skip
    _, rows, vocab, *strides = layout
    if rows == 0:
        return
    block, warps = _tile(layout, logits.element_size(), 2 + (entropy is not None))
    launch(
        token_logprobs_kernel, rows, logits, *strides, targets, ignore_index, rows, vocab,
        temperature, logprobs, entropy, lse, saved, place[1], BLOCK=block, num_warps=warps,
    )  # fmt: skip


def token_logprobs_backward(
    logits, layout, gradient, gradient_layout, targets, int32, ignore_index, temperature,
    saved, g, h, l, place,
):  # fmt: skip
    _, rows, vocab, *strides = layout
    if rows == 0:
        return
    block, warps = _tile(layout, logits.element_size())
    # never read where absent: one kernel for all that may be absent without changing the loop
    some = next((x for x in (g, h, l) if x is not None), saved)
    launch(
        token_logprobs_backward_kernel, rows, logits, *strides, gradient, *gradient_layout[3:],
        targets, ignore_index, rows, vocab, temperature, saved,
        some if g is None else g, int(g is not None), h, some if l is None else l,
        int(l is not None), place[1], BLOCK=block, num_warps=warps,
    )  # fmt: skip


# ---- cross_entropy -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=_RUNTIME)
def cross_entropy_count_kernel(targets, ignore_index, rows, scratch, BLOCK: tl.constexpr):
    """scratch[rows] = 1 / the number of rows that count, 0 where none does. One program."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, integer(rows), BLOCK):
        inside = lane < rows - start
        y = tl.load(targets + start + lane, mask=inside, other=0)
        count += (inside & (y != ignore_index)).to(tl.int64)
    n = tl.sum(count, 0)
    tl.store(scratch + rows, tl.where(n == 0, 0.0, 1.0 / tl.maximum(n, 1).to(tl.float64)))


@triton.jit(do_not_specialize=[*_RUNTIME, "has_loss", "has_upstream", "reduction"])
def cross_entropy_kernel(
    logits, inner, outer_stride, inner_stride,
    gradient, gradient_inner, gradient_outer_stride, gradient_inner_stride,
    targets, ignore_index, rows, vocab, label_smoothing: tl.float64, reduction,
    loss, has_loss, scratch, upstream, has_upstream, flags,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + r).to(tl.int64)
    kept = y != ignore_index
    inside = (y >= 0) & (y < vocab)
    loss_r = number(0.0)
    # the upstream gradient of this row's loss
    w = number(0.0)
    if gradient is not None:
        one = reduction != REDUCE_NONE
        w = tl.load(upstream + tl.where(one, 0, r), mask=has_upstream != 0, other=1.0)
        w = w.to(tl.float64)
        if scratch is not None:
            w *= tl.load(scratch + rows, mask=reduction == REDUCE_MEAN, other=1.0)
    if kept & inside:
        WIDE: tl.constexpr = logits.dtype.element_ty == tl.float64
        DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
        z = _row(logits, r, inner, outer_stride, inner_stride)
        c = number(LOG2E).to(DTYPE)
        ref, excess, _, total = _statistics(
            z, _middle(z + y).to(DTYPE), integer(vocab), c, False, SMOOTHING, BLOCK,
            "evict_first" if gradient is None else "evict_last",
        )  # fmt: skip
        z_y = _logit(z + y)  # not before the loop: that would cost it registers
        log_sum = log1p(excess)
        logp = z_y - ref - log_sum  # all -inf: -inf + inf, NaN
        loss_r = -logp
        eps = number(0.0)
        if SMOOTHING:
            eps = number(label_smoothing)
            mean = _middle(z + y) + total / vocab
            loss_r = (1.0 - eps) * loss_r + eps * (ref + log_sum - mean)
        if gradient is not None:
            tl.debug_barrier()  # in place, a warp that is ahead would overwrite what others read
            out = _row(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
            if w == 0.0:
                _write_zeros(out, integer(vocab), BLOCK)
            else:
                offset = eps / vocab
                p = tl.exp(logp)
                _write_gradient(
                    z, out, integer(vocab), y, w * (expm1(logp, p) + eps - offset), ref, c,
                    w / (1.0 + excess), number(0.0), -w * offset, False, BLOCK, True,
                )  # fmt: skip
    else:
        if gradient is not None:
            out = _row(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
            _write_zeros(out, integer(vocab), BLOCK)
        if kept:
            loss_r = number(NAN)
            tl.store(flags + BAD_TARGETS, 1)
    if scratch is not None:
        tl.store(scratch + r, loss_r)
    else:
        tl.store(loss + r, loss_r, mask=has_loss != 0)


@triton.jit(do_not_specialize=["rows", "reduction"])
def cross_entropy_sum_kernel(scratch, rows, reduction, loss, BLOCK: tl.constexpr):
    """loss = the sum of scratch[:rows], times scratch[rows] for the mean. One program, in order."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, integer(rows), BLOCK):
        total += tl.load(scratch + start + lane, mask=lane < rows - start, other=0.0)
    share = tl.load(scratch + rows, mask=reduction == REDUCE_MEAN, other=1.0)
    tl.store(loss, share * tl.sum(total, 0))


def cross_entropy(
    logits, layout, gradient, gradient_layout, targets, int32, ignore_index, label_smoothing,
    reduction, loss, scratch, upstream, place,
):  # fmt: skip
    _, rows, vocab, *strides = layout
    by_row = reduction == REDUCE_NONE.value
    if rows == 0:
        if loss is not None and not by_row:
            loss.zero_()
        return
    if reduction == REDUCE_MEAN.value:
        launch(
            cross_entropy_count_kernel, 1, targets, ignore_index, rows, scratch,
            BLOCK=4096, num_warps=8,
        )  # fmt: skip
    smoothing = label_smoothing != 0.0
    block, warps = _tile(layout, logits.element_size(), 2 + smoothing, gradient is not None)
    some = next(
        (x for x in (loss, upstream) if x is not None), scratch
    )  # never followed where absent
    launch(
        cross_entropy_kernel, rows, logits, *strides, gradient, *gradient_layout[3:],
        targets, ignore_index, rows, vocab, label_smoothing, reduction,
        some if loss is None else loss, int(loss is not None), None if by_row else scratch,
        some if upstream is None else upstream, int(upstream is not None), place[1],
        SMOOTHING=smoothing, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if loss is not None and not by_row:
        launch(cross_entropy_sum_kernel, 1, scratch, rows, reduction, loss, BLOCK=4096, num_warps=8)


@triton.jit(do_not_specialize=_RUNTIME)
def scale_gradient_kernel(
    gradient, inner, outer_stride, inner_stride, targets, ignore_index, rows, vocab, upstream,
    BLOCK: tl.constexpr,
):  # fmt: skip
    w = tl.load(upstream)
    if w != 1.0:
        r = tl.program_id(0).to(tl.int64)
        out = _row(gradient, r, inner, outer_stride, inner_stride)
        n = integer(vocab)
        if (w == 0.0) | (tl.load(targets + r) == ignore_index):
            _write_zeros(out, n, BLOCK)
        else:
            lane = tl.arange(0, BLOCK)
            for start in range(0, n, BLOCK):
                inside = lane < n - start
                x = tl.load(out + start + lane, mask=inside, other=0.0).to(w.dtype) * w
                tl.store(out + start + lane, x.to(out.dtype.element_ty), mask=inside)


def scale_gradient(gradient, layout, targets, int32, ignore_index, upstream, place):
    _, rows, vocab, *strides = layout
    if rows == 0:
        return
    block, warps = _tile(layout, gradient.element_size())
    launch(
        scale_gradient_kernel, rows, gradient, *strides, targets, ignore_index, rows, vocab,
        upstream, BLOCK=block, num_warps=warps,
    )  # fmt: skip


# ---- sequence sums -----------------------------------------------------------------------------

_SEGMENT_BLOCK, _SEGMENT_WARPS = 1024, 4


@triton.jit
def _segment(offsets, i, segments, length, total, flags):
    """[begin, end) of segment i within [0, total), and whether the offsets there are in order.

    Where they are not, the range is widened to whatever lies between them, so that all segments together
    cover every token whatever the offsets are.
    """
    begin = i * length
    end = begin + length
    good = begin <= end
    if offsets is not None:
        first = tl.load(offsets + i).to(tl.int64)
        second = tl.load(offsets + i + 1).to(tl.int64)
        # as csrc/bindings/module.cpp, check_offsets: from 0, never falling, to total
        good = (first >= 0) & (first <= second) & (second <= total)
        good = good & ((i > 0) | (first == 0)) & ((i + 1 < segments) | (second == total))
        begin = tl.where(i == 0, 0, first)
        end = tl.where(i + 1 == segments, total, second)
        low = tl.minimum(begin, end)
        end = tl.minimum(tl.maximum(begin, end), total)
        begin = tl.maximum(low, 0)
        if good == 0:
            tl.store(flags + BAD_CU_SEQLENS, 1)
    return begin, end, good


@triton.jit(do_not_specialize=["segments", "length", "total", "average"])
def sequence_sums_kernel(
    logprobs, mask, offsets, segments, length, total, average, sums, flags, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    begin, end, good = _segment(offsets, i, segments, length, total, flags)
    lane = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int64)
    for t in range(begin, end, BLOCK):
        keep = lane < end - t
        if mask is not None:
            keep = keep & (tl.load(mask + t + lane, mask=keep, other=0) != 0)
        acc += tl.load(logprobs + t + lane, mask=keep, other=0.0).to(tl.float64)
        count += keep.to(tl.int64)
    kept = tl.where(average != 0, tl.maximum(tl.sum(count, 0), 1), 1)
    tl.store(sums + i, tl.where(good, tl.sum(acc, 0) / kept.to(tl.float64), NAN))


@triton.jit(do_not_specialize=["segments", "length", "total", "average"])
def sequence_sums_backward_kernel(
    gradient, mask, offsets, segments, length, total, average, out, flags, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    begin, end, good = _segment(offsets, i, segments, length, total, flags)
    lane = tl.arange(0, BLOCK)
    g = tl.where(good, tl.load(gradient + i).to(tl.float64), NAN)
    if average != 0:
        kept = end - begin
        if mask is not None:
            count = tl.zeros((BLOCK,), tl.int64)
            for t in range(begin, end, BLOCK):
                keep = tl.load(mask + t + lane, mask=lane < end - t, other=0) != 0
                count += keep.to(tl.int64)
            kept = tl.sum(count, 0)
        g /= tl.maximum(kept, 1).to(tl.float64)
    for t in range(begin, end, BLOCK):
        inside = lane < end - t
        keep = inside
        if mask is not None:
            keep = tl.load(mask + t + lane, mask=inside, other=0) != 0
        tl.store(out + t + lane, tl.where(keep, g, 0.0), mask=inside)


def _flag_tokens_of_no_sequence(total, place):
    """Without a segment no kernel sees the offsets; with tokens they cannot be right."""
    if total > 0:
        place[1][BAD_CU_SEQLENS.value].fill_(1)


def sequence_sums(
    logprobs, wide, mask, offsets, int32, segments, length, total, average, sums, place
):
    if segments == 0:
        _flag_tokens_of_no_sequence(total, place)
        return
    launch(
        sequence_sums_kernel, segments, logprobs, mask, offsets, segments, length, total,
        int(average), sums, place[1], BLOCK=_SEGMENT_BLOCK, num_warps=_SEGMENT_WARPS,
    )  # fmt: skip


def sequence_sums_backward(
    gradient, wide, mask, offsets, int32, segments, length, total, average, out, place
):
    if segments == 0:
        out.fill_(float("nan"))
        _flag_tokens_of_no_sequence(total, place)
        return
    launch(
        sequence_sums_backward_kernel, segments, gradient, mask, offsets, segments, length, total,
        int(average), out, place[1], BLOCK=_SEGMENT_BLOCK, num_warps=_SEGMENT_WARPS,
    )  # fmt: skip
