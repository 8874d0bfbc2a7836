"""Policy-gradient losses, value loss and advantages in Triton: what csrc/bindings/policy.h has on GPUs.

    kernel               reads + writes                         bound by
    policy_logits        sizeof(T) + sizeof(T) a logit          memory; the gradient's second read is from L2
    policy               up to 6 + 1 numbers a token            float64 exponentials, two or three a token
    policy_count         1 (4, 8) a token + 32 bytes a row      memory, or the launch
    policy_share         8 + 16 bytes a sequence, or a row      the launch
    policy_sums          32 bytes a sequence, or a row          the launch
    value_loss           3 + 1 numbers a token, read twice      memory, or the launch
    group_advantages     1 + 1 numbers a reward                 the launch
    gae                  2 + 2 numbers a token, read twice      the scan's latency, a block after another

From logits a program per row (kernels/_softmax_row.py): statistics with the entropy, the token's term, and
the gradient while most of the row is in L2. From log-probabilities a program per sequence, in blocks of
tokens. What all tokens depend on, how many count, is added up before by two small kernels, and the results
after by one: four launches. All arithmetic of a token is float64 (the table of csrc/ops/policy_table.h); sums
are in a fixed order, without atomics. What is masked out is never read.

The host functions have names, arguments and meaning of csrc/bindings/policy.h; `place` is (stream, flags).
They allocate nothing and wait for nothing. An action out of range is never followed: its row's loss is NaN,
its gradient 0, and a flag is set. Bad offsets lead nowhere: a flag is set, and loss, metrics and gradients
are NaN.
"""

import triton
import triton.language as tl

from ._common import (
    BAD_TARGETS,
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
    row_of,
    row_stats,
    tile,
    write_gradient,
    write_zeros,
)

# csrc/ops/policy.h: enums Surrogate, Importance, Kl, PolicyReduction, AdvantageScale.
CLIPPED = tl.constexpr(0)
REINFORCE = tl.constexpr(1)
CISPO = tl.constexpr(2)
SAPO = tl.constexpr(3)
VESPO = tl.constexpr(4)
BY_TOKEN = tl.constexpr(0)
BY_MEAN = tl.constexpr(1)
BY_SUM = tl.constexpr(2)
BY_WHOLE = tl.constexpr(3)
K1 = tl.constexpr(0)
K2 = tl.constexpr(1)
K3 = tl.constexpr(2)
REDUCE_NONE = tl.constexpr(0)
REDUCE_TOKENS = tl.constexpr(2)
REDUCE_SEQUENCES = tl.constexpr(3)
REDUCE_SEQUENCE_SUMS = tl.constexpr(4)
REDUCE_DIVISOR = tl.constexpr(5)
SCALE_NONE = tl.constexpr(0)
SCALE_BATCH = tl.constexpr(2)

# Scratch, float64. Of a sequence (policy): n, loss, low, high, KL; before the losses are in their places,
# n, share, 1/all. Of a row (policy_logits), behind the sequences' n: loss, side, KL, entropy; before, n,
# share, 1/all, sequence.
SUMS = tl.constexpr(5)
ROW_SUMS = tl.constexpr(4)
VALUE_BLOCK = tl.constexpr(4096)  # tokens a partial sum is over

# Beyond e^±60 a ratio is clamped, and no gradient goes through it.
FARTHEST = tl.constexpr(60.0)
LOWEST_LOG_W = tl.constexpr(-18.420680743952367)  # ln 1e-8


# ---- the table: one token, or a block of them --------------------------------------------------


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))  # NaN passes


@triton.jit
def _optional(pointer, has, at, keep, absent):
    """pointer[at] as float64, where it is there."""
    value = tl.full(at.shape, absent, tl.float64)
    if has != 0:
        value = tl.load(pointer + at, mask=keep, other=0.0).to(tl.float64)
    return value


@triton.jit
def _log_ratio(lp, old, has_old, SURROGATE):
    """Without old log-probabilities those of now stand for them."""
    x = lp - old
    if SURROGATE == VESPO:
        x = _clamp(x, -20.0, 20.0)
    return tl.where(has_old != 0, x, 0.0)


@triton.jit
def _ratio(x):
    """(e^x, its derivative)."""
    rho = tl.exp(_clamp(x, -FARTHEST, FARTHEST))
    return rho, tl.where((x < -FARTHEST) | (x > FARTHEST), 0.0, rho)


@triton.jit
def _kl(lp, ref, KL):
    """(value, derivative by lp)."""
    d = ref - lp
    if KL == K1:
        value = -d
        by_lp = tl.full(d.shape, 1.0, tl.float64)
    elif KL == K2:
        value = 0.5 * d * d
        by_lp = -d
    else:
        tl.static_assert(KL == K3)  # e^d - d - 1, without cancellation
        far = d > FARTHEST
        near = tl.where(far, FARTHEST, d)
        e = expm1(near, tl.exp(near))
        value = e - near
        by_lp = tl.where(far, 0.0, -e)
    return value, by_lp


@triton.jit
def _surrogate(
    lp, x, rho, slope, A, lowest, highest, dual_clip, delta, tau_pos, tau_neg, SURROGATE
):
    """(value, derivative by x, derivative by lp) of an objective of the ratio rho = e^x and A."""
    by_x = tl.full(lp.shape, 0.0, tl.float64)
    by_lp = by_x
    if SURROGATE == CLIPPED:  # -min(min(rho, delta)·A, clip(rho)·A), at most -c·A where A < 0
        capped = tl.where(rho > delta, delta, rho)
        clipped = _clamp(rho, lowest, highest)
        second = clipped * A < capped * A
        value = -tl.where(second, clipped, capped) * A
        by_x = -A * slope
        by_x = tl.where(
            second,
            tl.where(clipped != rho, 0.0, by_x),
            tl.where(rho > delta, 0.0, by_x),
        )
        bound = -A * dual_clip
        over = (A < 0.0) & (value > bound)
        value = tl.where(over, bound, value)
        by_x = tl.where(over, 0.0, by_x)
    elif SURROGATE == REINFORCE:
        value = tl.where(A == 0.0, 0.0, -A * lp)
        by_lp = -A
    elif SURROGATE == CISPO:  # -sg(min(rho, cap))·A·lp
        c = tl.where(rho > highest, highest, rho) * A
        value = tl.where(c == 0.0, 0.0, -c * lp)
        by_lp = -c
    elif SURROGATE == SAPO:  # -A·S(tau·(rho - 1))·4/tau
        tau = tl.where(A > 0.0, number(tau_pos), tau_neg)
        e = tl.exp(_clamp(-tau * (rho - 1.0), -700.0, 700.0))
        s = 1.0 / (1.0 + e)
        value = -A * s * 4.0 / tau
        by_x = -4.0 * A * s * (e * s) * slope
    else:
        tl.static_assert(SURROGATE == VESPO)  # -sg(e^{lambda + k·log w - lambda·w})·A·lp
        k = tl.where(A >= 0.0, number(2.0), 3.0)
        log_w = _clamp(x, LOWEST_LOG_W, 20.0)
        c = tl.exp(5.0 - k + k * log_w - (5.0 - k) * tl.exp(log_w)) * A
        value = tl.where(c == 0.0, 0.0, -c * lp)
        by_lp = -c
    return value, by_x, by_lp


@triton.jit
def _term(
    lp, x, A, weight, old, has_old, ref, with_kl, kl_times_ratio, kl_beta,
    lowest, highest, dual_clip, delta, tau_pos, tau_neg, own_kl, SURROGATE, KL,
):  # fmt: skip
    """(loss, by_x, by_lp, low, high, k3): a token's loss with its derivatives by the log-ratio x in force and
    by its own log-probability, whether its ratio was clipped, the approximate KL. own_kl: KL by the token's
    own ratio where that of the sequence is vespo's w."""
    rho, slope = _ratio(x)
    value, by_x, by_lp = _surrogate(
        lp, x, rho, slope, A, lowest, highest, dual_clip, delta, tau_pos, tau_neg, SURROGATE
    )
    none = weight == 0.0
    value = tl.where(none, 0.0, weight * value)
    by_x = tl.where(none, 0.0, weight * by_x)
    by_lp = tl.where(none, 0.0, weight * by_lp)
    if with_kl != 0:
        k, k_by_lp = _kl(lp, ref, KL)
        factor = tl.where(kl_times_ratio != 0, rho, 1.0)
        through = tl.where(kl_times_ratio != 0, k * slope, 0.0)
        if own_kl:
            own, own_slope = _ratio(tl.where(has_old != 0, lp - old, 0.0))
            factor = tl.where(kl_times_ratio != 0, own, 1.0)
            k_by_lp = factor * k_by_lp + tl.where(kl_times_ratio != 0, k * own_slope, 0.0)
            through = tl.zeros_like(through)
        else:
            k_by_lp = factor * k_by_lp
        value += kl_beta * (factor * k)
        by_lp += kl_beta * k_by_lp
        by_x += kl_beta * through
    k3 = tl.full(lp.shape, 0.0, tl.float64)
    if has_old != 0:
        k3, _ = _kl(lp, old, K3)
    return value, by_x, by_lp, (A < 0.0) & (rho < lowest), (A > 0.0) & (rho > highest), k3


def _table(options, ref):
    """(constexprs, numbers) of _term, with_kl first, and (importance, reduction, divisor)."""
    surrogate, importance, kl, kl_times_ratio, reduction, *floats = options
    clip_low, clip_high, dual_clip, delta, kl_beta, tau_pos, tau_neg, divisor = map(float, floats)
    # of the others no ratio counts as clipped
    bounds = {
        CLIPPED.value: (1.0 - clip_low, 1.0 + clip_high),
        CISPO.value: (0.0, clip_high),
    }.get(surrogate, (float("-inf"), float("inf")))
    with_kl = int(ref is not None and kl_beta != 0.0)
    constants = {"SURROGATE": surrogate, "KL": kl if with_kl else K3.value}
    numbers = with_kl, int(kl_times_ratio), kl_beta, *bounds, dual_clip, delta, tau_pos, tau_neg
    return constants, numbers, (importance, reduction, divisor)


# ---- counts and shares -------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignored", "sequences", "length", "total", "stride", "by_row"])
def policy_count_kernel(
    scratch, stride, by_row, marks, ignored, offsets, sequences, length, total, flags,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """n of a sequence: tokens whose mark (mask, action) is not `ignored`; NaN where the offsets are bad.
    by_row: n and the sequence's number in each of its rows too."""
    i = tl.program_id(0).to(tl.int64)
    begin, end, good = segment(offsets, i, sequences, length, total, flags)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int64)
    for t in range(begin, end, BLOCK):
        live = lane < end - t
        if marks is not None:
            mark = tl.load(marks + t + lane, mask=live, other=0).to(tl.int64)
            live = live & (mark != ignored)
        count += live.to(tl.int64)
    n = tl.where(good, tl.sum(count, 0).to(tl.float64), float("nan"))
    tl.store(scratch + i * stride, n)
    rows = scratch + sequences
    for t in range(begin, tl.where(by_row != 0, end, begin), BLOCK):
        inside = lane < end - t
        row = rows + (t + lane) * ROW_SUMS
        tl.store(row + tl.zeros((BLOCK,), tl.int64), n, mask=inside)
        tl.store(row + 3, i.to(tl.float64), mask=inside)


@triton.jit
def _sum(numbers, count, stride, BLOCK):
    """numbers[0] + numbers[stride] + ..., the same bits in every program."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = (start + lane) * stride
        total += tl.load(numbers + at, mask=lane < count - start, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _one_over(n):
    """1/n, 0 for 0, NaN for NaN."""
    return tl.where(n == 0.0, 0.0, 1.0 / tl.where(n == 0.0, 1.0, n))


@triton.jit(do_not_specialize=["stride", "sequences", "first", "items", "item_stride", "reduction"])
def policy_share_kernel(
    scratch, stride, sequences, first, items, item_stride, reduction, divisor: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """share and 1/all behind the n of each item, a sequence or a row: what a token's loss is multiplied by,
    and the tokens in all that count."""
    count = integer(sequences)
    each = _one_over(_sum(scratch, count, integer(stride), BLOCK))
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < items
    item = scratch + first + at * item_stride
    n = tl.load(item, mask=inside, other=0.0)
    one = tl.full((BLOCK,), 1.0, tl.float64)
    by_sequence = 1.0 / tl.maximum(count, 1).to(tl.float64)
    share = tl.where(reduction == REDUCE_TOKENS, each, one)
    share = tl.where(reduction == REDUCE_SEQUENCES, _one_over(n) * by_sequence, share)
    share = tl.where(reduction == REDUCE_SEQUENCE_SUMS, by_sequence, share)
    share = tl.where(reduction == REDUCE_DIVISOR, _one_over(number(divisor)), share)
    tl.store(item + 1, tl.where(each == each, share, float("nan")), mask=inside)
    tl.store(item + 2, each, mask=inside)


def _counts(
    scratch, stride, by_row, marks, ignored, offsets, sequences, length, total, share, place
):
    """Leaves n, share and 1/all in scratch, for each sequence or for each row."""
    reduction, divisor = share
    launch(
        policy_count_kernel, sequences, scratch, stride, int(by_row), marks, ignored, offsets,
        sequences, length, total, place[1], BLOCK=512, num_warps=4,
    )  # fmt: skip
    first, items, item_stride = (
        (sequences, total, ROW_SUMS.value) if by_row else (0, sequences, stride)
    )
    if items > 0:
        launch(
            policy_share_kernel, -(-items // 1024), scratch, stride, sequences, first, items,
            item_stride, reduction, divisor, BLOCK=1024, num_warps=4,
        )  # fmt: skip


# ---- from log-probabilities --------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "sequences", "length", "total", "has_old", "has_ref", "has_weights", "by_token",
        "importance", "with_kl", "kl_times_ratio", "has_upstream", "has_out",
    ]
)  # fmt: skip
def policy_kernel(
    scratch, logprobs, mask, offsets, sequences, length, total, old, has_old, ref, has_ref,
    weights, has_weights, advantages, by_token, importance, with_kl, kl_times_ratio,
    kl_beta: tl.float64, lowest: tl.float64, highest: tl.float64, dual_clip: tl.float64,
    delta: tl.float64, tau_pos: tl.float64, tau_neg: tl.float64,
    upstream, has_upstream, out, has_out, gradient, flags,
    SURROGATE: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence. Where the ratio is the sequence's, its log is added up first, and a token's gradient is
    in the losses of all: then the tokens are gone through once more to write it."""
    i = tl.program_id(0).to(tl.int64)
    begin, end, _ = segment(offsets, i, sequences, length, total, flags)
    sums = scratch + i * SUMS
    n = tl.load(sums)
    share = tl.load(sums + 1)
    each = tl.load(sums + 2)
    some = tl.where(n == 0.0, 1.0, n)
    own = importance == BY_TOKEN
    lane = tl.arange(0, BLOCK)

    log_ratio = tl.zeros((BLOCK,), tl.float64)
    for t in range(begin, tl.where(own, begin, end), BLOCK):
        at = t + lane
        keep = lane < end - t
        if mask is not None:
            keep = keep & (tl.load(mask + at, mask=keep, other=0) != 0)
        lp = tl.load(logprobs + at, mask=keep, other=0.0).to(tl.float64)
        x = _log_ratio(lp, _optional(old, has_old, at, keep, 0.0), has_old, SURROGATE)
        log_ratio += tl.where(keep, x, 0.0)
    x_all = tl.sum(log_ratio, 0)
    x_all = tl.where(importance == BY_MEAN, x_all / some, x_all)

    loss = tl.zeros((BLOCK,), tl.float64)
    low = tl.zeros((BLOCK,), tl.float64)
    high = tl.zeros((BLOCK,), tl.float64)
    kl = tl.zeros((BLOCK,), tl.float64)
    by_ratio = tl.zeros((BLOCK,), tl.float64)
    to_each = number(0.0)  # what the sequence's ratio passes to each token
    for visit in range(0, tl.where(own, 1, 2)):
        for t in range(begin, end, BLOCK):
            at = t + lane
            inside = lane < end - t
            keep = inside
            if mask is not None:
                keep = keep & (tl.load(mask + at, mask=keep, other=0) != 0)
            lp = tl.load(logprobs + at, mask=keep, other=0.0).to(tl.float64)
            before = _optional(old, has_old, at, keep, 0.0)
            x = tl.where(own, _log_ratio(lp, before, has_old, SURROGATE), x_all)
            A = tl.load(advantages + tl.where(by_token != 0, at, i), mask=keep, other=0.0)
            weight = _optional(weights, has_weights, at, keep, 1.0)
            weight = tl.where(importance == BY_WHOLE, weight / some, weight)
            value, by_x, by_lp, is_low, is_high, k3 = _term(
                lp, x, A.to(tl.float64), weight, before, has_old,
                _optional(ref, has_ref, at, keep, 0.0), with_kl, kl_times_ratio, kl_beta,
                lowest, highest, dual_clip, delta, tau_pos, tau_neg, importance == BY_SUM,
                SURROGATE, KL,
            )  # fmt: skip
            g = share * _optional(upstream, has_upstream, at, keep, 1.0)
            counted = keep & (lane < tl.where(visit == 0, end - t, 0))
            loss += tl.where(counted, value, 0.0)
            low += (counted & is_low).to(tl.float64)
            high += (counted & is_high).to(tl.float64)
            kl += tl.where(counted, k3, 0.0)
            by_ratio += tl.where(counted, g * by_x, 0.0)
            dz = g * (by_lp + tl.where(own, by_x, 0.0)) + to_each
            tl.store(gradient + at, tl.where(keep, dz, 0.0), mask=inside)
            value = tl.where(each == each, tl.where(keep, value, 0.0), float("nan"))
            tl.store(out + at, value, mask=lane < tl.where(has_out != 0, end - t, 0))
        to_each = tl.sum(by_ratio, 0)
        to_each = tl.where(importance == BY_MEAN, to_each / some, to_each)

    # a clipped token: a mean over the tokens or, where the ratio is a sequence's, over the sequences
    side = tl.where(own, each, 1.0 / (some * integer(sequences).to(tl.float64)))
    empty = n == 0.0
    tl.debug_barrier()  # all have read what is overwritten
    tl.store(sums + 1, tl.where(empty, 0.0, share * tl.sum(loss, 0)))
    tl.store(sums + 2, tl.where(empty, 0.0, side * tl.sum(low, 0)))
    tl.store(sums + 3, tl.where(empty, 0.0, side * tl.sum(high, 0)))
    tl.store(sums + 4, tl.where(empty, 0.0, each * tl.sum(kl, 0)))


@triton.jit(do_not_specialize=["sequences", "has_out", "has_metrics"])
def policy_sums_kernel(scratch, sequences, out, has_out, metrics, has_metrics, BLOCK: tl.constexpr):
    """The loss and the metrics of all sequences. One program, in order."""
    n = integer(sequences)
    tl.store(out, _sum(scratch + 1, n, SUMS, BLOCK), mask=has_out != 0)
    for k in tl.static_range(3):
        tl.store(metrics + k, _sum(scratch + 2 + k, n, SUMS, BLOCK), mask=has_metrics != 0)


def policy(
    logprobs, wide, mask, offsets, int32, sequences, length, total, old_logprobs, ref_logprobs,
    weights, advantages, by_token, options, upstream, out, metrics, gradient, scratch, place,
):  # fmt: skip
    constants, numbers, (importance, reduction, divisor) = _table(options, ref_logprobs)
    by_element = reduction == REDUCE_NONE.value
    if sequences == 0:
        wrong = float("nan") if total > 0 else 0.0
        for array in (out, metrics, gradient):
            if array is not None:
                array.fill_(wrong)
        flag_tokens_of_no_sequence(total, place)
        return
    _counts(
        scratch, SUMS.value, False, mask, 0, offsets, sequences, length, total,
        (reduction, divisor), place,
    )  # fmt: skip
    launch(
        policy_kernel, sequences, scratch, logprobs, mask, offsets, sequences, length, total,
        *with_presence((old_logprobs, ref_logprobs, weights), logprobs), advantages, int(by_token),
        importance, *numbers, *with_presence((upstream, out if by_element else None), logprobs), gradient,
        place[1], **constants, BLOCK=256, num_warps=4,
    )  # fmt: skip
    launch(
        policy_sums_kernel, 1, scratch, sequences, *with_presence((None if by_element else out,), logprobs),
        *with_presence((metrics,), logprobs), BLOCK=1024, num_warps=4,
    )  # fmt: skip


# ---- from logits -------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "inner", "gradient_inner", "ignore_index", "sequences", "has_old", "has_ref",
        "has_weights", "by_token", "with_kl", "kl_times_ratio", "has_upstream",
    ]
)  # fmt: skip
def policy_logits_kernel(
    scratch, logits, inner, outer_stride, inner_stride,
    gradient, gradient_inner, gradient_outer_stride, gradient_inner_stride,
    actions, ignore_index, vocab, temperature: tl.float64, entropy_coef: tl.float64, sequences,
    old, has_old, ref, has_ref, weights, has_weights, advantages, by_token,
    with_kl, kl_times_ratio, kl_beta: tl.float64, lowest: tl.float64, highest: tl.float64,
    dual_clip: tl.float64, delta: tl.float64, tau_pos: tl.float64, tau_neg: tl.float64,
    upstream, has_upstream, flags,
    SURROGATE: tl.constexpr, KL: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: what policy_table.h says of its token, and the gradient in the same visit."""
    r = tl.program_id(0).to(tl.int64)
    y = tl.load(actions + r).to(tl.int64)
    kept = y != ignore_index
    inside = (y >= 0) & (y < vocab)
    row = scratch + sequences + r * ROW_SUMS
    out = row_of(gradient, r, gradient_inner, gradient_outer_stride, gradient_inner_stride)
    none = number(0.0)
    loss = none
    side = none
    k3 = none
    entropy = none
    if kept & inside:
        WIDE: tl.constexpr = logits.dtype.element_ty == tl.float64
        z = row_of(logits, r, inner, outer_stride, inner_stride)
        inverse_t = 1.0 / number(temperature)
        c = (inverse_t * LOG2E).to(tl.float64 if WIDE else tl.float32)
        ref_z, excess, dot, _ = row_stats(
            z, 0.0, integer(vocab), c, True, False, BLOCK, "evict_last"
        )
        # nothing of the token before the loop: that would cost it registers
        log_sum = log1p(excess)
        lp = (logit(z + y) - ref_z) * inverse_t - log_sum  # all -inf: -inf + inf, NaN
        entropy = log_sum + dot * LN2 / (1.0 + excess)
        share = tl.load(row + 1)
        each = tl.load(row + 2)
        i = tl.load(row + 3).to(tl.int64)
        A = tl.load(advantages + tl.where(by_token != 0, r, i)).to(tl.float64)
        before = _optional(old, has_old, r, kept, 0.0)
        loss, by_x, by_lp, low, high, k3 = _term(
            lp, _log_ratio(lp, before, has_old, SURROGATE), A,
            _optional(weights, has_weights, r, kept, 1.0), before, has_old,
            _optional(ref, has_ref, r, kept, 0.0), with_kl, kl_times_ratio, kl_beta,
            lowest, highest, dual_clip, delta, tau_pos, tau_neg, False, SURROGATE, KL,
        )  # fmt: skip
        loss *= share
        side = tl.where(high, 1.0, tl.where(low, -1.0, none))
        up = tl.load(upstream, mask=has_upstream != 0, other=1.0).to(tl.float64)
        g = up * share * (by_lp + by_x)
        h = none
        if ENTROPY:
            h = -up * entropy_coef * each
        # in place, a warp that is ahead would overwrite what others read; and so this row's share
        tl.debug_barrier()
        if (g == 0.0) & (h == 0.0):
            write_zeros(out, integer(vocab), BLOCK)
        else:
            a, b, at_y = logprob_gradient(g, h, none, lp, log_sum, entropy, inverse_t, ENTROPY)
            write_gradient(
                z, out, integer(vocab), y, at_y, ref_z, c, a, b, none, ENTROPY, BLOCK, True
            )
    else:
        write_zeros(out, integer(vocab), BLOCK)
        if kept:
            loss = number(float("nan"))
            tl.store(flags + BAD_TARGETS, 1)
    tl.store(row, loss)
    tl.store(row + 1, side)
    tl.store(row + 2, k3)
    tl.store(row + 3, entropy)


@triton.jit(do_not_specialize=["sequences", "rows", "has_out", "has_metrics"])
def policy_logits_sums_kernel(
    scratch, sequences, rows, entropy_coef: tl.float64, out, has_out, metrics, has_metrics,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss and the metrics of all rows. One program, in order."""
    n = integer(rows)
    lane = tl.arange(0, BLOCK)
    total = _sum(scratch, integer(sequences), 1, BLOCK)
    each = _one_over(total)
    first = scratch + sequences
    low = tl.zeros((BLOCK,), tl.float64)
    high = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        side = tl.load(first + 1 + (start + lane) * ROW_SUMS, mask=lane < n - start, other=0.0)
        low += (side < 0.0).to(tl.float64)
        high += (side > 0.0).to(tl.float64)
    loss = _sum(first, n, ROW_SUMS, BLOCK)
    loss = tl.where(
        total == total, loss, float("nan")
    )  # bad offsets, also of a sequence without rows
    entropy = each * _sum(first + 3, n, ROW_SUMS, BLOCK)
    coef = number(entropy_coef)
    loss = tl.where(coef == 0.0, loss, loss - coef * entropy)
    tl.store(out, loss, mask=has_out != 0)
    tl.store(metrics, each * tl.sum(low, 0), mask=has_metrics != 0)
    tl.store(metrics + 1, each * tl.sum(high, 0), mask=has_metrics != 0)
    tl.store(metrics + 2, each * _sum(first + 2, n, ROW_SUMS, BLOCK), mask=has_metrics != 0)
    tl.store(metrics + 3, entropy, mask=has_metrics != 0)


def policy_logits(
    logits, layout, gradient, gradient_layout, actions, int32, ignore_index, temperature,
    entropy_coef, offsets, offsets_int32, sequences, length, old_logprobs, ref_logprobs, weights,
    advantages, by_token, options, upstream, out, metrics, scratch, place,
):  # fmt: skip
    _, rows, vocab, *strides = layout
    constants, numbers, (_, *share) = _table(options, ref_logprobs)
    if sequences == 0:
        wrong = float("nan") if rows > 0 else 0.0
        for array in (out, metrics, *([gradient] if rows > 0 else [])):
            if array is not None:
                array.fill_(wrong)
        flag_tokens_of_no_sequence(rows, place)
        return
    _counts(scratch, 1, True, actions, ignore_index, offsets, sequences, length, rows, share, place)
    block, warps = tile(layout, logits.element_size(), 3, twice=True)
    if rows > 0:
        launch(
            policy_logits_kernel, rows, scratch, logits, *strides, gradient, *gradient_layout[3:],
            actions, ignore_index, vocab, temperature, entropy_coef, sequences,
            *with_presence((old_logprobs, ref_logprobs, weights), advantages), advantages, int(by_token),
            *numbers, *with_presence((upstream,), advantages), place[1],
            **constants, ENTROPY=entropy_coef != 0.0, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    launch(
        policy_logits_sums_kernel, 1, scratch, sequences, rows, entropy_coef,
        *with_presence((out, metrics), advantages), BLOCK=1024, num_warps=4,
    )  # fmt: skip


# ---- the value loss ----------------------------------------------------------------------------


@triton.jit
def _value_term(values, returns, old_values, has_old, mask, clip, at, inside):
    """(loss, derivative by the value, whether it counts) of a block of tokens."""
    keep = inside
    if mask is not None:
        keep = keep & (tl.load(mask + at, mask=keep, other=0) != 0)
    v = tl.load(values + at, mask=keep, other=0.0).to(tl.float64)
    target = tl.load(returns + at, mask=keep, other=0.0).to(tl.float64)
    used = v - target
    slope = used
    if has_old != 0:
        old = tl.load(old_values + at, mask=keep, other=0.0).to(tl.float64)
        near = _clamp(v, old - clip, old + clip) + (old - old)  # NaN where old is
        held = near - target
        nearer = held * held <= used * used
        slope = tl.where(nearer, slope, tl.where(near == v, held, held - held))
        used = tl.where(nearer, used, held)
    return tl.where(keep, 0.5 * used * used, 0.0), tl.where(keep, slope, 0.0), keep


@triton.jit(do_not_specialize=["has_old", "total", "blocks"])
def value_loss_sums_kernel(
    scratch, values, returns, old_values, has_old, mask, clip: tl.float64, total, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int64)
    for k in range(0, VALUE_BLOCK, BLOCK):
        at = b * VALUE_BLOCK + k + lane
        value, _, keep = _value_term(
            values, returns, old_values, has_old, mask, clip, at, at < total
        )
        loss += value
        count += keep.to(tl.int64)
    tl.store(scratch + b, tl.sum(count, 0).to(tl.float64))
    tl.store(scratch + blocks + b, tl.sum(loss, 0))


@triton.jit(do_not_specialize=["has_old", "total", "blocks", "has_gradient"])
def value_loss_kernel(
    scratch, values, returns, old_values, has_old, mask, clip: tl.float64, total, blocks,
    out, gradient, has_gradient, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean, by the first program, and the gradient."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    n = integer(blocks)
    share = _one_over(_sum(scratch, n, 1, BLOCK))
    if b == 0:
        tl.store(out, share * _sum(scratch + n, n, 1, BLOCK))
    if has_gradient != 0:
        for k in range(0, VALUE_BLOCK, BLOCK):
            at = b * VALUE_BLOCK + k + lane
            _, slope, _ = _value_term(
                values, returns, old_values, has_old, mask, clip, at, at < total
            )
            tl.store(gradient + at, share * slope, mask=at < total)


def value_loss(values, wide, total, returns, old_values, mask, clip, out, gradient, scratch, place):
    if total == 0:
        out.zero_()
        return
    blocks = -(-total // VALUE_BLOCK.value)
    given = (
        scratch,
        values,
        returns,
        *with_presence((old_values,), values),
        mask,
        float(clip),
        total,
        blocks,
    )
    launch(value_loss_sums_kernel, blocks, *given, BLOCK=1024, num_warps=4)
    launch(
        value_loss_kernel, blocks if gradient is not None else 1, *given, out,
        *with_presence((gradient,), values), BLOCK=1024, num_warps=4,
    )  # fmt: skip


# ---- advantages --------------------------------------------------------------------------------


@triton.jit
def _moments(rewards, begin, end, BLOCK):
    """(count, mean, standard deviation with one degree of freedom removed) of what is not NaN."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for t in range(begin, end, BLOCK):
        r = tl.load(rewards + t + lane, mask=lane < end - t, other=float("nan")).to(tl.float64)
        count += (r == r).to(tl.float64)
        total += tl.where(r == r, r, 0.0)
    n = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.where(n == 0.0, 1.0, n)  # of equal rewards exactly they
    squares = tl.zeros((BLOCK,), tl.float64)
    for t in range(begin, end, BLOCK):
        r = tl.load(rewards + t + lane, mask=lane < end - t, other=float("nan")).to(tl.float64)
        squares += tl.where(r == r, (r - mean) * (r - mean), 0.0)
    deviation = tl.sqrt(tl.sum(squares, 0) / tl.where(n > 1.0, n - 1.0, 1.0))
    return n, mean, tl.where(n > 1.0, deviation, 0.0)


@triton.jit(do_not_specialize=["groups", "group_size", "scale", "leave_one_out"])
def group_advantages_kernel(
    rewards, groups, group_size, scale, leave_one_out, out, BLOCK: tl.constexpr
):
    """One group. Where the batch's deviation is asked for, each program adds it up: no scratch."""
    size = integer(group_size)
    begin = tl.program_id(0).to(tl.int64) * size
    n, mean, deviation = _moments(rewards, begin, begin + size, BLOCK)
    if scale == SCALE_BATCH:
        _, _, deviation = _moments(rewards, integer(0), groups * size, BLOCK)
    factor = tl.where(scale == SCALE_NONE, number(1.0), 1.0 / (deviation + 1e-4))
    # r - the mean of the n - 1 others = (r - mean)·n/(n - 1)
    others = tl.where(n > 1.0, n / tl.where(n > 1.0, n - 1.0, 1.0), 0.0)
    factor = tl.where(leave_one_out != 0, factor * others, factor)
    lane = tl.arange(0, BLOCK)
    for t in range(0, size, BLOCK):
        inside = lane < size - t
        at = begin + t + lane
        r = tl.load(rewards + at, mask=inside, other=0.0).to(tl.float64)
        tl.store(out + at, tl.where(r == r, factor * (r - mean), 0.0), mask=inside)


def group_advantages(rewards, wide, groups, group_size, scale, leave_one_out, out, place):
    if groups == 0 or group_size == 0:
        return
    launch(
        group_advantages_kernel, groups, rewards, groups, group_size, scale, int(leave_one_out),
        out, BLOCK=512, num_warps=4,
    )  # fmt: skip


@triton.jit
def _then(a, b, c, d):
    """x -> a·x + b, then x -> c·x + d."""
    return a * c, b * c + d


@triton.jit(do_not_specialize=["length", "bootstrap"])
def gae_kernel(
    rewards, values, mask, length, bootstrap, gamma: tl.float64, lam: tl.float64,
    advantages, returns, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, from its end, in blocks.

    A_t = r_t - v_t + p with p = gamma·(v + lam·A) of the next token that counts, and a token makes of its p
    the p before it by x -> gamma·lam·x + gamma·(v + lam·(r - v)); a masked one leaves it. A block's p are a
    scan of those maps, each lane with its right neighbour's.
    """
    i = tl.program_id(0).to(tl.int64)
    n = integer(length)
    first = i * n
    v_first = i * (n + bootstrap)
    discount = number(gamma)
    decay = discount * number(lam)
    lane = tl.arange(0, BLOCK)
    passed = number(0.0)
    if bootstrap != 0:
        passed = discount * tl.load(values + v_first + n).to(tl.float64)
    for step in range(0, n, BLOCK):
        t = (n - 1) // BLOCK * BLOCK - step + lane
        follows = t + 1 < n
        if mask is not None:
            follows = follows & (tl.load(mask + first + t + 1, mask=follows, other=0) != 0)
        r = tl.load(rewards + first + t + 1, mask=follows, other=0.0).to(tl.float64)
        v = tl.load(values + v_first + t + 1, mask=follows, other=0.0).to(tl.float64)
        slope = tl.where(follows, decay, 1.0)
        offset = tl.where(follows, discount * v + decay * (r - v), 0.0)
        slope, offset = tl.associative_scan((slope, offset), 0, _then, reverse=True)
        p = slope * passed + offset
        inside = t < n
        keep = inside
        if mask is not None:
            keep = keep & (tl.load(mask + first + t, mask=inside, other=0) != 0)
        r = tl.load(rewards + first + t, mask=keep, other=0.0).to(tl.float64)
        v = tl.load(values + v_first + t, mask=keep, other=0.0).to(tl.float64)
        advantage = r - v + p
        tl.store(advantages + first + t, tl.where(keep, advantage, 0.0), mask=inside)
        tl.store(returns + first + t, tl.where(keep, advantage + v, 0.0), mask=inside)
        passed = tl.sum(tl.where(lane == 0, p, 0.0), 0)


def gae(
    rewards, wide, sequences, length, values, bootstrap, mask, gamma, lam, advantages, returns,
    place,
):  # fmt: skip
    if sequences == 0 or length == 0:
        return
    launch(
        gae_kernel, sequences, rewards, values, mask, length, int(bootstrap), float(gamma),
        float(lam), advantages, returns, BLOCK=512, num_warps=4,
    )  # fmt: skip
