"""Preference losses in Triton: what csrc/bindings/ops.h has on GPUs.

    kernel       reads + writes a pair       bound by
    preference   up to 24 + 24 bytes         the launch, and a chain of two transcendental functions a block

One program, in blocks of pairs: there are as many as sequences, and sums over them need no second kernel.
All arithmetic is float64 whatever the input; sums are in a fixed order, without atomics.

The host function has the name, arguments and meaning of csrc/bindings/ops.h; `place` is (stream, flags). A
length that is negative or NaN makes its pair NaN and sets a flag.
"""

import triton
import triton.language as tl

from ._common import BAD_LENGTHS, REDUCE_MEAN, REDUCE_NONE, launch, log1p, number

# csrc/ops/preference.h, enum PreferenceLoss.
SIGMOID = tl.constexpr(0)
IPO = tl.constexpr(1)
HINGE = tl.constexpr(2)


@triton.jit
def _log_sigmoid(x):
    """(L(x), L(-x), sigmoid(x), sigmoid(-x)) by one exponential."""
    e = tl.exp(-tl.abs(x))
    low = log1p(e)
    up = x >= 0.0
    near = 1.0 / (1.0 + e)
    far = e / (1.0 + e)
    value = tl.where(x < 0.0, x, 0.0) - low
    opposite = tl.where(x > 0.0, -x, 0.0) - low
    return value, opposite, tl.where(up, near, far), tl.where(up, far, near)


@triton.jit
def _pair_loss(d, beta, eps, LOSS):
    """(value, slope by d) of one loss, d = r_w - r_l: the table of csrc/ops/preference_table.h."""
    if LOSS == SIGMOID:
        value, opposite, up, down = _log_sigmoid(beta * d)
        # at eps = 0 the second term is left out, not 0·inf
        plain = eps == 0.0
        value = tl.where(plain, -value, -((1.0 - eps) * value) - eps * opposite)
        slope = beta * tl.where(plain, -down, eps * up - (1.0 - eps) * down)
    elif LOSS == IPO:
        root = d - 1.0 / (2.0 * beta)
        value = root * root
        slope = 2.0 * root
    else:
        tl.static_assert(LOSS == HINGE)
        x = 1.0 - beta * d
        flat = x <= 0.0  # NaN passes
        value = tl.where(flat, 0.0, x)
        slope = tl.where(flat, 0.0, -beta)
    return value, slope


@triton.jit
def _log_ratio(lp, ref, has_ref, at, n):
    r = tl.load(lp + at, mask=at < n, other=0.0).to(tl.float64)
    return r - tl.load(ref + at, mask=at < n * has_ref, other=0.0).to(tl.float64)


@triton.jit(
    do_not_specialize=[
        "has_ref_chosen", "has_ref_rejected", "has_chosen_lengths", "has_rejected_lengths",
        "pairs", "reduction",
    ]
)  # fmt: skip
def preference_kernel(
    chosen, rejected, ref_chosen, has_ref_chosen, ref_rejected, has_ref_rejected,
    chosen_lengths, has_chosen_lengths, rejected_lengths, has_rejected_lengths,
    pairs, beta: tl.float64, label_smoothing: tl.float64, reduction,
    out, chosen_rewards, rejected_rewards, margins, accuracy, gradient, flags,
    LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = number(beta)
    eps = number(label_smoothing)
    n = pairs.to(tl.int64)
    some = tl.maximum(n, 1).to(tl.float64)
    scale = tl.where(reduction == REDUCE_MEAN, 1.0 / some, number(1.0))
    each = tl.where(reduction == REDUCE_NONE, n, 0)  # losses to write
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    won = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n, BLOCK):
        at = start + lane
        inside = at < n
        n_w = tl.load(chosen_lengths + at, mask=at < n * has_chosen_lengths, other=1.0)
        n_l = tl.load(rejected_lengths + at, mask=at < n * has_rejected_lengths, other=1.0)
        good = (n_w >= 0.0) & (n_l >= 0.0)
        tl.store(flags + BAD_LENGTHS + tl.zeros_like(lane), 1, mask=inside & (good == 0))
        # an empty completion counts as one token; its log-probability is 0
        n_w = tl.where(n_w == 0.0, 1.0, n_w).to(tl.float64)
        n_l = tl.where(n_l == 0.0, 1.0, n_l).to(tl.float64)
        r_w = tl.where(good, _log_ratio(chosen, ref_chosen, has_ref_chosen, at, n), float("nan"))
        r_l = tl.where(
            good, _log_ratio(rejected, ref_rejected, has_ref_rejected, at, n), float("nan")
        )

        value, slope = _pair_loss(r_w / n_w - r_l / n_l, b, eps, LOSS)
        slope = tl.where(good, scale * slope, float("nan"))
        total += tl.where(inside, value, 0.0)
        won += (inside & (r_w > r_l)).to(tl.int64)
        tl.store(out + at, value, mask=at < each)
        tl.store(gradient + at, slope / n_w, mask=inside)
        tl.store(gradient + n + at, -slope / n_l, mask=inside)
        tl.store(chosen_rewards + at, b * r_w, mask=inside)
        tl.store(rejected_rewards + at, b * r_l, mask=inside)
        tl.store(margins + at, b * (r_w - r_l), mask=inside)
    tl.store(out, scale * tl.sum(total, 0), mask=reduction != REDUCE_NONE)
    tl.store(accuracy, tl.sum(won, 0).to(tl.float64) / some)


def preference(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, wide, pairs, loss,
    beta, label_smoothing, reduction, out, chosen_rewards, rejected_rewards, margins, accuracy,
    gradient, place,
):  # fmt: skip
    if pairs == 0:
        accuracy.zero_()
        if reduction != REDUCE_NONE.value:
            out.zero_()
        return
    optional = []  # never read where absent: one kernel whatever is there
    for vector in (ref_chosen, ref_rejected, chosen_lengths, rejected_lengths):
        optional += [chosen if vector is None else vector, int(vector is not None)]
    launch(
        preference_kernel, 1, chosen, rejected, *optional, pairs, beta, label_smoothing, reduction,
        out, chosen_rewards, rejected_rewards, margins, accuracy, gradient, place[1],
        LOSS=loss, BLOCK=512, num_warps=4,
    )  # fmt: skip
