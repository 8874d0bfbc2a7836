"""Distillation from logits in Triton: what csrc/bindings/distill.h has on GPUs.

    kernel           reads + writes a column           bound by
    distill          sizeof(T) + sizeof(teacher's)     memory; each of the two or three passes reads both
                     + sizeof(T)                       rows, the later ones from L2 if there still
    distill_top      sizeof(T) + sizeof(T), and the    memory; the student's row is read three times
                     teacher's K entries
    distill_count    1 (mask) + 4, 8 (target) a row    the launch

A program per row (kernels/_softmax_row.py): the statistics of both softmaxes, the sums of the divergence (not
for the forward KL, whose gradient does not need them), the gradient. Elements and the sums of one lane are
float32 (float64 for a float64 student); lanes are added up, and all that a row has only one of is computed,
in float64, in a fixed order, without atomics. The mixture of jsd is formed relative to the larger of p and q.

The host functions have names, arguments and meaning of csrc/bindings/distill.h; `place` is (stream, flags).
They allocate nothing and wait for nothing. A target out of range is never followed: its row's loss is NaN,
its gradient 0, and a flag is set. So with a top-K teacher that has an index out of range or too much
probability, or an index twice. The last is found where the gradient is written; a loss without one is that
of K buckets, two of which are one column.
"""

import triton
import triton.language as tl

from ._common import (
    BAD_TARGETS,
    BAD_TEACHER,
    REDUCE_MEAN,
    REDUCE_NONE,
    REDUCE_SUM,
    expm1,
    integer,
    launch,
    log1p,
    number,
    with_presence,
)
from ._softmax_row import (
    LN2,
    LOG2E,
    MINUS_INF,
    logit,
    row_of,
    row_stats,
    tile,
    write_zeros,
)
from .logprobs import cross_entropy_sum_kernel

# csrc/ops/distill.h, enum DistillKind.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)

# Where 2^-x is 0, and a number.
FARTHEST = tl.constexpr(1e4)
# The most columns that a teacher may name: they stay in registers.
MOST = 4096


# ---- one column, or a block of them ------------------------------------------------------------


@triton.jit
def _mixture(ratio, beta, rest):
    """(log2(p/m), log2(q/m)), given log2(q/p): may be infinite, or NaN where p = q = 0."""
    ratio = tl.where(ratio > -FARTHEST, ratio, -FARTHEST)
    ratio = tl.where(ratio < FARTHEST, ratio, FARTHEST)
    x = tl.exp2(-tl.abs(ratio))  # of the smaller beside the larger
    up = ratio > 0
    log_m = tl.log2(tl.where(up, beta + rest * x, beta * x + rest))
    return -tl.where(up, ratio, 0.0) - log_m, tl.where(up, 0.0, ratio) - log_m


@triton.jit
def _times(x, y):
    """x·y, and 0 where x is 0: not 0·inf."""
    return tl.where(x == 0.0, 0.0, x * tl.where(x == 0.0, 0.0, y))


@triton.jit
def _columns(z, t, lane, left, ref_s, ref_t, c, ratio, DTYPE):
    """(z - ref, e of the student, e of the teacher, log2(q/p)) of a block."""
    inside = lane < left
    d = tl.load(z + lane, mask=inside, other=MINUS_INF).to(DTYPE) - ref_s
    u = tl.load(t + lane, mask=inside, other=MINUS_INF).to(DTYPE) - ref_t
    return d, tl.exp2(d * c), tl.exp2(u * c), (u - d) * c + ratio


@triton.jit
def _terms(es, et, ratio, beta, rest, KIND):
    """What D and KL(p‖·) are the sums of, in bits and relative to the softmaxes' sums."""
    if KIND == FORWARD_KL:
        value = _times(et, ratio)
        of_p = value
    elif KIND == REVERSE_KL:
        value = -_times(es, ratio)
        of_p = value
    else:
        log_p, log_q = _mixture(ratio, beta, rest)
        value = et * log_q
        of_p = es * log_p
    return value, of_p


# ---- what a row has one of ---------------------------------------------------------------------


@triton.jit
def _counts(mask, targets, ignore_index, r, inside):
    """Whether rows r count, and their targets."""
    y = r * 0
    if targets is not None:
        y = tl.load(targets + r, mask=inside, other=0).to(tl.int64)
    counts = inside
    if targets is not None:
        counts = counts & (y != ignore_index)
    if mask is not None:
        counts = counts & (tl.load(mask + r, mask=inside, other=0) != 0)
    return counts, y


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def distill_count_kernel(scratch, mask, targets, ignore_index, rows, BLOCK: tl.constexpr):
    """The share of a row in the mean, left where its loss will be. One program."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int64)
    n = integer(rows)
    for start in range(0, n, BLOCK):
        counts, _ = _counts(
            mask, targets, ignore_index, start + lane.to(tl.int64), lane < n - start
        )
        count += counts.to(tl.int64)
    share = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    for start in range(0, n, BLOCK):
        tl.store(
            scratch + start + lane, share + tl.zeros((BLOCK,), tl.float64), mask=lane < n - start
        )


@triton.jit
def _weights(scratch, upstream, has_upstream, reduction, r):
    """(the row's share of the loss, the upstream gradient of the row's loss)."""
    share = tl.load(scratch + r, mask=reduction == REDUCE_MEAN, other=1.0).to(tl.float64)
    at = tl.where(reduction == REDUCE_NONE, r, 0)
    up = tl.load(upstream + at, mask=has_upstream != 0, other=1.0).to(tl.float64)
    return share, share * up


@triton.jit
def _put_loss(scratch, loss, has_loss, reduction, r, share, value):
    if reduction == REDUCE_NONE:
        tl.store(loss + r, value, mask=has_loss != 0)
    else:
        tl.store(scratch + r, share * value)


@triton.jit
def _finite(ref, excess):
    """Whether a row is neither all -inf nor has a NaN or +inf."""
    return (ref > MINUS_INF) & (excess < -MINUS_INF)


@triton.jit
def _hard(logp, at_target):
    """softmax(z)[y] - 1[y is the target], given its log-probability."""
    p = tl.exp(logp)
    return tl.where(at_target, expm1(logp, p), p)


# ---- whole distributions -----------------------------------------------------------------------


_RUNTIME = [
    "inner", "teacher_inner", "gradient_inner", "width", "ignore_index", "reduction", "has_loss",
    "has_upstream",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def distill_kernel(
    logits, inner, outer_stride, inner_stride,
    teacher, teacher_inner, teacher_outer_stride, teacher_inner_stride,
    gradient, gradient_inner, gradient_outer_stride, gradient_inner_stride, width,
    mask, targets, ignore_index, vocab, beta: tl.float64, temperature: tl.float64,
    kl_weight: tl.float64, ce_weight: tl.float64, reduction, scratch, loss, has_loss,
    upstream, has_upstream, flags,
    KIND: tl.constexpr, HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HARD: with a cross-entropy whose temperature, 1, is not the divergence's."""
    WIDE: tl.constexpr = logits.dtype.element_ty == tl.float64
    DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
    WIDE_T: tl.constexpr = WIDE or teacher.dtype.element_ty == tl.float64
    # the forward KL's gradient does not wait for its value
    AT_ONCE: tl.constexpr = KIND == FORWARD_KL and not HARD and gradient is not None
    r = tl.program_id(0).to(tl.int64)
    n = integer(vocab)
    counts, y = _counts(mask, targets, ignore_index, r, r >= 0)
    good = (y >= 0) & (y < n)
    value = number(0.0)
    share = number(1.0)
    w = number(0.0)
    if counts & good:
        z = row_of(logits, r, inner, outer_stride, inner_stride)
        t = row_of(teacher, r, teacher_inner, teacher_outer_stride, teacher_inner_stride)
        inverse_t = 1.0 / number(temperature)
        c = (inverse_t * LOG2E).to(DTYPE)
        ref_s, excess_s, _, _ = row_stats(z, 0.0, n, c, False, False, BLOCK, "evict_last", WIDE)
        c_t = (inverse_t * LOG2E).to(tl.float64 if WIDE_T else tl.float32)
        ref_t, excess_t, _, _ = row_stats(t, 0.0, n, c_t, False, False, BLOCK, "evict_last", WIDE)
        fine = _finite(ref_s, excess_s) & _finite(ref_t, excess_t)
        log_s = log1p(excess_s)
        log_t = log1p(excess_t)
        ratio0 = ((log_s - log_t) * LOG2E).to(DTYPE)
        # a beta below float32's numbers would make a logarithm of 0
        b = number(beta)
        share_q = tl.where(b > 1e-37, b, 1e-37).to(DTYPE)
        share_p = (1.0 - b).to(DTYPE)
        one_c = number(LOG2E).to(DTYPE)
        a_s = ref_s.to(DTYPE)
        a_t = ref_t.to(DTYPE)
        lane = tl.arange(0, BLOCK)
        values = tl.zeros((BLOCK,), DTYPE)
        of_p = tl.zeros((BLOCK,), DTYPE)
        hard = tl.zeros((BLOCK,), DTYPE)
        ties = tl.zeros((BLOCK,), tl.int32)
        if not AT_ONCE:
            for start in range(0, n, BLOCK):
                d, es, et, ratio = _columns(
                    z + start, t + start, lane, n - start, a_s, a_t, c, ratio0, DTYPE
                )
                term, term_p = _terms(es, et, ratio, share_q, share_p, KIND)
                values += term
                of_p += term_p
                if HARD:
                    hard += tl.where(d == 0.0, 0.0, tl.exp2(d * one_c))
                    ties += (d == 0.0).to(tl.int32)
        sum_s = 1.0 + excess_s
        sum_t = 1.0 + excess_t
        kl_p = tl.sum(of_p.to(tl.float64), 0) * LN2 / sum_s
        kl_q = tl.sum(values.to(tl.float64), 0) * LN2 / sum_t
        divergence = kl_q
        if KIND == REVERSE_KL:
            divergence = kl_p
        if KIND == JSD:
            divergence = b * kl_q + (1.0 - b) * kl_p
        # the cross-entropy's log-sum-exp, at temperature 1, beside the largest logit
        hard_log = log_s
        if HARD:
            hard_log = log1p(tl.sum(hard.to(tl.float64), 0) + (tl.sum(ties, 0) - 1))
        k = number(kl_weight)
        h = number(ce_weight)
        logp = number(0.0)
        z_y = number(0.0)
        t_y = number(0.0)
        if targets is not None:
            z_y = logit(z + y)
            t_y = logit(t + y)
            logp = z_y - ref_s - hard_log
        share, w = _weights(scratch, upstream, has_upstream, reduction, r)
        if gradient is not None:
            tl.debug_barrier()  # in place, a warp that is ahead would overwrite what others read
            out = row_of(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
            write_zeros(out + n, integer(width) - n, BLOCK)
            scale = w * k * inverse_t
            lp = (z_y - ref_s) * inverse_t - log_s
            lq = (t_y - ref_t) * inverse_t - log_t
            p = tl.exp(lp)
            if KIND == FORWARD_KL:
                a = scale / sum_s
                g_b = -scale / sum_t
                at_y = scale * (p - tl.exp(lq))
            elif KIND == REVERSE_KL:
                nan = divergence - divergence  # of inf
                a = nan - scale * divergence / sum_s
                g_b = nan - scale * LN2 / sum_s
                at_y = nan + scale * _times(p, lp - lq - divergence)
            else:
                side = scale * (1.0 - b)
                a = -side * kl_p / sum_s
                g_b = side * LN2 / sum_s
                log_y = _mixture((lq - lp) * LOG2E, b, 1.0 - b)[0]
                at_y = side * p * (log_y * LN2 - kl_p)
            if targets is not None:
                at_y += w * h * _hard(logp, True)
            g_c = w * h * tl.exp(-hard_log)
            if not HARD:
                a += g_c
            a = tl.where(fine, a, float("nan")).to(DTYPE)
            g_b = g_b.to(DTYPE)
            g_c = g_c.to(DTYPE)
            target = y
            if targets is None:
                target = integer(-1)
            at_y = tl.where(fine, at_y, float("nan")).to(DTYPE)
            last = (n - 1) // BLOCK * BLOCK
            for step in range(0, n, BLOCK):
                start = last - step  # from the row's end, of which the most is still in L2
                d, es, et, ratio = _columns(
                    z + start, t + start, lane, n - start, a_s, a_t, c, ratio0, DTYPE
                )
                if KIND == FORWARD_KL:
                    g = a * es + g_b * et
                    if AT_ONCE:
                        values += _times(et, ratio)
                elif KIND == REVERSE_KL:
                    g = es * (a + tl.where(es == 0.0, 0.0, g_b * ratio))
                else:
                    g = es * (a + g_b * _mixture(ratio, share_q, share_p)[0])
                if HARD:
                    g += g_c * tl.exp2(d * one_c)
                g = tl.where(lane == target - start, at_y, g)
                g = tl.where(w == 0.0, 0.0, g)  # also of NaN
                tl.store(out + start + lane, g.to(out.dtype.element_ty), mask=lane < n - start)
            if AT_ONCE:
                divergence = tl.sum(values.to(tl.float64), 0) * LN2 / sum_t
        value = k * tl.where(fine, divergence, float("nan"))
        if targets is not None:
            value -= tl.where(h == 0.0, number(0.0), h * logp)
    else:
        if gradient is not None:
            out = row_of(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
            write_zeros(out, integer(width), BLOCK)
        if counts:
            value = number(float("nan"))
            tl.store(flags + BAD_TARGETS, 1)
    _put_loss(scratch, loss, has_loss, reduction, r, share, value)


# ---- the teacher's K most likely columns, and all others as one --------------------------------


@triton.jit
def _buckets(lp, lq, beta, KIND):
    """(terms of D, p·dD/dp) of buckets with these log-probabilities."""
    p = tl.exp(lp)
    q = tl.exp(lq)
    if KIND == FORWARD_KL:
        value = _times(q, lq - lp)
        weighted = -q
    elif KIND == REVERSE_KL:
        value = _times(p, lp - lq)
        weighted = value + p
    else:
        log_p, log_q = _mixture((lq - lp) * LOG2E, beta, 1.0 - beta)
        weighted = (1.0 - beta) * p * (log_p * LN2)
        value = beta * q * (log_q * LN2) + weighted
    return value, weighted


@triton.jit
def _log(x):
    return tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), MINUS_INF)


@triton.jit(do_not_specialize=[*_RUNTIME, "top"])
def distill_top_kernel(
    logits, inner, outer_stride, inner_stride,
    teacher, teacher_inner, teacher_outer_stride, teacher_inner_stride, indices, top,
    gradient, gradient_inner, gradient_outer_stride, gradient_inner_stride, width,
    mask, targets, ignore_index, vocab, beta: tl.float64, temperature: tl.float64,
    kl_weight: tl.float64, ce_weight: tl.float64, reduction, scratch, loss, has_loss,
    upstream, has_upstream, flags, most: tl.float64,
    KIND: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K columns stay in registers. What is in a row beside them is the difference of two sums, of which
    the one over the row keeps what its additions round away: it is right to 2^-45 of the row's sum."""
    WIDE: tl.constexpr = logits.dtype.element_ty == tl.float64
    DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
    BITS: tl.constexpr = (
        tl.int64 if WIDE else tl.int32 if logits.dtype.element_ty == tl.float32 else tl.int16
    )
    r = tl.program_id(0).to(tl.int64)
    n = integer(vocab)
    counts, y = _counts(mask, targets, ignore_index, r, r >= 0)
    good = (y >= 0) & (y < n)
    value = number(0.0)
    share = number(1.0)
    w = number(0.0)
    wrong = integer(0)
    if counts & good:
        z = row_of(logits, r, inner, outer_stride, inner_stride)
        t = row_of(teacher, r, teacher_inner, teacher_outer_stride, teacher_inner_stride)
        k = tl.arange(0, TOP)
        count = integer(top)
        has = k < count
        at = tl.load(indices + r * count + k, mask=has, other=0).to(tl.int64)
        lq = tl.load(t + k, mask=has, other=MINUS_INF)
        lq = (lq if lq.dtype == tl.float64 else lq.to(tl.float32)).to(tl.float64)
        named = has & (at >= 0) & (at < n)
        mass = tl.sum(tl.exp(lq), 0)
        wrong = tl.sum((has & (named == 0)).to(tl.int64), 0) + (mass > number(most)).to(tl.int64)
        inverse_t = 1.0 / number(temperature)
        c = (inverse_t * LOG2E).to(DTYPE)
        one_c = number(LOG2E).to(DTYPE)
        ref, excess, _, _ = row_stats(z, 0.0, n, c, False, False, BLOCK, "evict_last", WIDE)
        fine = _finite(ref, excess)
        log_sum = log1p(excess)
        ref_d = ref.to(DTYPE)
        x = tl.load(z + at, mask=named, other=MINUS_INF).to(DTYPE)
        lane = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), DTYPE)
        lost = tl.zeros((BLOCK,), DTYPE)
        hard = tl.zeros((BLOCK,), DTYPE)
        ties = tl.zeros((BLOCK,), tl.int32)
        some = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, n, BLOCK):
            d = tl.load(z + start + lane, mask=lane < n - start, other=MINUS_INF).to(DTYPE) - ref_d
            e = tl.exp2(d * c)
            s = total + e
            back = s - total
            lost += (total - (s - back)) + (e - back)
            total = s
            some += (e > 0.0).to(tl.int32)
            ties += (d == 0.0).to(tl.int32)
            hard += tl.where(d == 0.0, 0.0, tl.exp2(d * one_c))
        e_named = tl.exp2((x - ref_d) * c)
        rest = tl.sum(total.to(tl.float64) + lost.to(tl.float64), 0)
        rest = rest - tl.sum(e_named.to(tl.float64), 0)
        empty = tl.sum(some, 0) == tl.sum((e_named > 0.0).to(tl.int32), 0)
        rest = tl.where(empty, number(0.0), tl.where(rest > 1e-15, rest, 1e-15))
        hard_log = log1p(tl.sum(hard.to(tl.float64), 0) + (tl.sum(ties, 0) - 1))
        logp = number(0.0)
        z_y = number(0.0)
        target = integer(-1)
        if targets is not None:
            target = y
            z_y = logit(z + y)
            logp = z_y - ref - hard_log
        b = number(beta)
        h = number(ce_weight)
        lp = (x.to(tl.float64) - ref) * inverse_t - log_sum
        terms, weighted = _buckets(lp, lq, b, KIND)
        all_named = count == n
        log_rest = tl.where(all_named, MINUS_INF, _log(rest) - log_sum)
        below = tl.where(all_named | (mass > 1.0), number(0.0), 1.0 - mass)
        rest_term, rest_weighted = _buckets(log_rest, _log(below), b, KIND)
        divergence = tl.sum(terms, 0) + rest_term
        both = tl.sum(weighted, 0) + rest_weighted
        divergence = tl.where(fine, divergence, float("nan"))
        share, w = _weights(scratch, upstream, has_upstream, reduction, r)
        if gradient is not None:
            out = row_of(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
            # a column that is named twice remembers one of them
            claims = out.to(tl.pointer_type(BITS), bitcast=True)
            tl.debug_barrier()
            tl.store(claims + at, k.to(BITS), mask=named)
            tl.debug_barrier()
            first = tl.load(claims + at, mask=named, other=0)
            wrong += tl.sum((named & (first != k.to(BITS))).to(tl.int64), 0)
            tl.debug_barrier()
            if (wrong > 0) | (w == 0.0):
                write_zeros(out, integer(width), BLOCK)
            else:
                write_zeros(out + n, integer(width) - n, BLOCK)
                scale = w * number(kl_weight) * inverse_t
                if KIND == FORWARD_KL:
                    scale = tl.where(divergence == divergence, scale, float("nan"))
                else:
                    scale += divergence - divergence  # NaN of inf
                p_scale = tl.exp(-log_sum)
                others = tl.where(rest > 0.0, rest_weighted / tl.where(rest > 0.0, rest, 1.0), 0.0)
                others = scale * (others - both * p_scale)
                g_c = w * h * tl.exp(-hard_log)
                a = others.to(DTYPE)
                g_h = g_c.to(DTYPE)
                at_y = others * tl.exp((z_y - ref) * inverse_t) + w * h * _hard(logp, True)
                at_y = at_y.to(DTYPE)
                last = (n - 1) // BLOCK * BLOCK
                for step in range(0, n, BLOCK):
                    start = last - step
                    inside = lane < n - start
                    d = tl.load(z + start + lane, mask=inside, other=MINUS_INF).to(DTYPE) - ref_d
                    g = a * tl.exp2(d * c) + g_h * tl.exp2(d * one_c)
                    g = tl.where(lane == target - start, at_y, g)
                    tl.store(out + start + lane, g.to(out.dtype.element_ty), mask=inside)
                tl.debug_barrier()
                g = scale * (weighted - both * tl.exp(lp))
                x_logp = x.to(tl.float64) - ref - hard_log
                g += w * h * _hard(x_logp, at == target)
                tl.store(out + at, g.to(DTYPE).to(out.dtype.element_ty), mask=named)
        value = number(kl_weight) * divergence
        if targets is not None:
            value -= tl.where(h == 0.0, number(0.0), h * logp)
        if wrong > 0:
            value = number(float("nan"))
            tl.store(flags + BAD_TEACHER, 1)
    else:
        if gradient is not None:
            out = row_of(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
            write_zeros(out, integer(width), BLOCK)
        if counts:
            value = number(float("nan"))
            tl.store(flags + BAD_TARGETS, 1)
    _put_loss(scratch, loss, has_loss, reduction, r, share, value)


def distill(
    student, layout, width, gradient, gradient_layout, teacher, teacher_layout, teacher_indices,
    indices_int32, kind, numbers, mask, targets, int32, ignore_index, reduction, loss, scratch,
    upstream, place,
):  # fmt: skip
    _, rows, vocab, *strides = layout
    beta, temperature, kl_weight, ce_weight = map(float, numbers)
    by_row = reduction == REDUCE_NONE.value
    if rows == 0:
        if loss is not None and not by_row:
            loss.zero_()
        return
    if kl_weight == 0.0:  # the teacher is not looked at: the student's divergence from itself
        teacher, teacher_layout, teacher_indices, kind = student, layout, None, FORWARD_KL.value
    if reduction == REDUCE_MEAN.value:
        launch(
            distill_count_kernel, 1, scratch, mask, targets, ignore_index, rows,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
    some = next((x for x in (loss, upstream) if x is not None), scratch)
    before = student, *strides, teacher, *teacher_layout[3:]
    after = (
        gradient, *gradient_layout[3:], width, mask, targets, ignore_index, vocab, beta, temperature,
        kl_weight, ce_weight, reduction, some if scratch is None else scratch,
        *with_presence((loss, upstream), some), place[1],
    )  # fmt: skip
    block, warps = tile(layout, student.element_size(), 3, gradient is not None)
    if teacher_indices is None:
        launch(
            distill_kernel, rows, *before, *after,
            KIND=kind, HARD=ce_weight != 0.0 and temperature != 1.0, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    else:
        top = teacher_layout[2]
        if top > MOST:
            raise ValueError(
                f"teacher_indices: {top} columns a row; Triton's kernel takes up to {MOST}"
            )
        columns = max(16, triton.next_power_of_2(top))
        most = 1.0 + {"bfloat16": 5e-2, "float16": 1e-2}.get(str(teacher.dtype)[6:], 1e-3)
        launch(
            distill_top_kernel, rows, *before, teacher_indices, top, *after, most,
            KIND=kind, TOP=columns, BLOCK=block, num_warps=max(warps, columns // 128),
        )  # fmt: skip
    if loss is not None and not by_row:
        launch(
            cross_entropy_sum_kernel, 1, scratch, rows, REDUCE_SUM.value, loss,
            BLOCK=4096, num_warps=8,
        )  # fmt: skip
