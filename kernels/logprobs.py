"""Token log-probabilities, cross-entropy and sequence sums in Triton: as csrc/bindings/logprobs.h has them.

    kernel                    reads + writes an element   bound by
    token_logprobs            sizeof(T) + 0               memory; with entropy in 16 bits nearly by arithmetic
    token_logprobs_backward   sizeof(T) + sizeof(T)       memory
    cross_entropy             sizeof(T) + sizeof(T)       memory; the gradient's second read is from L2
    scale_gradient            sizeof(T) + sizeof(T)       memory; nothing is read where the factor is 1
    sequence_sums             4 (8) + 1 for a mask        memory, or the launch
    sequence_sums_backward    1 for a mask + 4 (8)        memory, or the launch

A program per row (kernels/_softmax_row.py) or segment. Elements and the sums of one lane are float32 (float64
for float64 logits); lanes are added up, and all that a row has only one of is computed, in float64. No
atomics: the same inputs give the same bits. `saved` has the meaning that it has in csrc/ops/logprobs.h: a
forward on a CPU and a backward here agree.

The host functions have names, arguments and meaning of csrc/bindings/logprobs.h; `place` is (stream, flags).
They allocate nothing and wait for nothing. A target out of range is never followed: its row becomes NaN (its
gradient 0) and a flag is set, and so for offsets.
"""

import triton
import triton.language as tl

from ._common import (
    BAD_TARGETS,
    REDUCE_MEAN,
    REDUCE_NONE,
    expm1,
    flag_tokens_of_no_sequence,
    integer,
    launch,
    log1p,
    number,
    segment,
    with_presence,
)
from ._softmax_row import (
    LN2,
    LOG2E,
    logit,
    logprob_gradient,
    middle,
    row_of,
    row_stats,
    tile,
    write_gradient,
    write_zeros,
)

# ---- token_logprobs ----------------------------------------------------------------------------

_RUNTIME = ["rows", "inner", "gradient_inner", "ignore_index"]  # numbers on which nothing depends


@triton.jit
def store_outputs(r, rows, logp, entropy_r, lse_r, ref, log_sum, logprobs, entropy, lse, saved):
    """What token_logprobs leaves of row r, for whoever computed it; entropy, lse and saved may be absent."""
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
        z = row_of(logits, r, inner, outer_stride, inner_stride)
        WIDE: tl.constexpr = logits.dtype.element_ty == tl.float64
        c = (inverse_t * LOG2E).to(tl.float64 if WIDE else tl.float32)
        ref, excess, dot, _ = row_stats(
            z, 0.0, integer(vocab), c, entropy is not None, False, BLOCK, "evict_first"
        )
        log_sum = log1p(excess)
        lse_r = ref * inverse_t + log_sum
        logp = (logit(z + y) - ref) * inverse_t - log_sum  # all -inf: -inf + inf, NaN
        if entropy is not None:
            entropy_r = log_sum + dot * LN2 / (1.0 + excess)
    elif kept:
        logp = number(float("nan"))
        lse_r = number(float("nan"))
        entropy_r = number(float("nan"))
        tl.store(flags + BAD_TARGETS, 1)
    store_outputs(r, rows, logp, entropy_r, lse_r, ref, log_sum, logprobs, entropy, lse, saved)


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
    out = row_of(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
    if kept & inside & ((g_r != 0.0) | (h_r != 0.0) | (l_r != 0.0)):
        z = row_of(logits, r, inner, outer_stride, inner_stride)
        z_y = logit(z + y)
        tl.debug_barrier()  # in place, a warp that is ahead would overwrite it
        ref = tl.load(saved + r)
        log_sum = tl.load(saved + rows + r)
        inverse_t = 1.0 / number(temperature)
        logp = (z_y - ref) * inverse_t - log_sum
        entropy = number(0.0)
        if h is not None:
            entropy = tl.load(saved + 2 * rows.to(tl.int64) + r)
        a, b, at_y = logprob_gradient(
            g_r, h_r, l_r, logp, log_sum, entropy, inverse_t, h is not None
        )
        WIDE: tl.constexpr = logits.dtype.element_ty == tl.float64
        c = (inverse_t * LOG2E).to(tl.float64 if WIDE else tl.float32)
        write_gradient(
            z, out, integer(vocab), y, at_y, ref, c, a, b, number(0.0), h is not None, BLOCK, False
        )
    else:
        write_zeros(out, integer(vocab), BLOCK)
        if kept & (inside == 0):
            tl.store(flags + BAD_TARGETS, 1)


def token_logprobs(
    logits, layout, targets, int32, ignore_index, temperature,
    logprobs, entropy, lse, saved, place,
):  # fmt: skip
    _, rows, vocab, *strides = layout
    if rows == 0:
        return
    block, warps = tile(layout, logits.element_size(), 2 + (entropy is not None))
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
    block, warps = tile(layout, logits.element_size())
    # h changes the loop: a kernel with it, and one without
    some = next((x for x in (g, h, l) if x is not None), saved)
    launch(
        token_logprobs_backward_kernel, rows, logits, *strides, gradient, *gradient_layout[3:],
        targets, ignore_index, rows, vocab, temperature, saved,
        *with_presence((g,), some), h, *with_presence((l,), some), place[1],
        BLOCK=block, num_warps=warps,
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
        z = row_of(logits, r, inner, outer_stride, inner_stride)
        c = number(LOG2E).to(DTYPE)
        ref, excess, _, total = row_stats(
            z, middle(z + y).to(DTYPE), integer(vocab), c, False, SMOOTHING, BLOCK,
            "evict_first" if gradient is None else "evict_last",
        )  # fmt: skip
        z_y = logit(z + y)  # not before the loop: that would cost it registers
        log_sum = log1p(excess)
        logp = z_y - ref - log_sum  # all -inf: -inf + inf, NaN
        loss_r = -logp
        eps = number(0.0)
        if SMOOTHING:
            eps = number(label_smoothing)
            mean = middle(z + y) + total / vocab
            loss_r = (1.0 - eps) * loss_r + eps * (ref + log_sum - mean)
        if gradient is not None:
            tl.debug_barrier()  # in place, a warp that is ahead would overwrite what others read
            out = row_of(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
            if w == 0.0:
                write_zeros(out, integer(vocab), BLOCK)
            else:
                offset = eps / vocab
                p = tl.exp(logp)
                write_gradient(
                    z, out, integer(vocab), y, w * (expm1(logp, p) + eps - offset), ref, c,
                    w / (1.0 + excess), number(0.0), -w * offset, False, BLOCK, True,
                )  # fmt: skip
    else:
        if gradient is not None:
            out = row_of(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
            write_zeros(out, integer(vocab), BLOCK)
        if kept:
            loss_r = number(float("nan"))
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
    block, warps = tile(layout, logits.element_size(), 2 + smoothing, gradient is not None)
    some = next((x for x in (loss, upstream) if x is not None), scratch)
    launch(
        cross_entropy_kernel, rows, logits, *strides, gradient, *gradient_layout[3:],
        targets, ignore_index, rows, vocab, label_smoothing, reduction,
        *with_presence((loss,), some), None if by_row else scratch,
        *with_presence((upstream,), some), place[1],
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
        out = row_of(gradient, r, inner, outer_stride, inner_stride)
        n = integer(vocab)
        if (w == 0.0) | (tl.load(targets + r) == ignore_index):
            write_zeros(out, n, BLOCK)
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
    block, warps = tile(layout, gradient.element_size())
    launch(
        scale_gradient_kernel, rows, gradient, *strides, targets, ignore_index, rows, vocab,
        upstream, BLOCK=block, num_warps=warps,
    )  # fmt: skip


# ---- sequence sums -----------------------------------------------------------------------------

_SEGMENT_BLOCK, _SEGMENT_WARPS = 1024, 4


@triton.jit(do_not_specialize=["segments", "length", "total", "average"])
def sequence_sums_kernel(
    logprobs, mask, offsets, segments, length, total, average, sums, flags, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    begin, end, good = segment(offsets, i, segments, length, total, flags)
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
    tl.store(sums + i, tl.where(good, tl.sum(acc, 0) / kept.to(tl.float64), float("nan")))


@triton.jit(do_not_specialize=["segments", "length", "total", "average"])
def sequence_sums_backward_kernel(
    gradient, mask, offsets, segments, length, total, average, out, flags, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    begin, end, good = segment(offsets, i, segments, length, total, flags)
    lane = tl.arange(0, BLOCK)
    g = tl.where(good, tl.load(gradient + i).to(tl.float64), float("nan"))
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


def sequence_sums(
    logprobs, wide, mask, offsets, int32, segments, length, total, average, sums, place
):
    if segments == 0:
        flag_tokens_of_no_sequence(total, place)
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
        flag_tokens_of_no_sequence(total, place)
        return
    launch(
        sequence_sums_backward_kernel, segments, gradient, mask, offsets, segments, length, total,
        int(average), out, place[1], BLOCK=_SEGMENT_BLOCK, num_warps=_SEGMENT_WARPS,
    )  # fmt: skip
