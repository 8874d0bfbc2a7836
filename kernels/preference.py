"""Preference losses in Triton: what csrc/bindings/preference.h has on GPUs.

    kernel                    reads + writes a pair       bound by
    preference_kernel         up to 64 + 56 bytes         the launch, and a chain of a few transcendental
    preference_sorted_kernel  up to 64 + 40 bytes         functions a block of pairs

One program a launch, in blocks of pairs: there are as many as sequences, and sums over them need no second
kernel. A launch a loss of the weighted sum: the first writes, the next ones add. All arithmetic is float64
whatever the input; sums are in a fixed order, without atomics. The formulas and their slopes are those of
csrc/ops/preference_table.h; which loss it is is a run-time number, so that one kernel serves all.

The host function has name, arguments and meaning of csrc/bindings/preference.h; `place` is (stream, flags).
A length that is negative or NaN makes its pair NaN and sets a flag.
"""

import triton
import triton.language as tl

from ._common import (
    BAD_LENGTHS,
    REDUCE_MEAN,
    REDUCE_NONE,
    expm1,
    launch,
    log1p,
    number,
    with_presence,
)

# csrc/ops/preference.h, enum PreferenceLoss; sigmoid (0) is what the others are told from.
IPO = tl.constexpr(1)
HINGE = tl.constexpr(2)
ROBUST = tl.constexpr(3)
EXO_PAIR = tl.constexpr(4)
NCA_PAIR = tl.constexpr(5)
BCO_PAIR = tl.constexpr(6)
SPPO_HARD = tl.constexpr(7)
AOT = tl.constexpr(8)
AOT_UNPAIRED = tl.constexpr(9)
APO_ZERO = tl.constexpr(10)
APO_DOWN = tl.constexpr(11)
DISCOPOP = tl.constexpr(12)
SIGMOID_NORM = tl.constexpr(13)
SFT = tl.constexpr(14)
CPO = tl.constexpr(15)
SIMPO = tl.constexpr(16)
SLIC = tl.constexpr(17)
ORPO = tl.constexpr(18)
KTO = tl.constexpr(19)
APO_ZERO_UNPAIRED = tl.constexpr(20)
REWARD = tl.constexpr(21)
NO_LOSS = tl.constexpr(-1)  # the metrics alone

# csrc/ops/preference.h, enum Divergence.
REVERSE_KL = tl.constexpr(0)
FORWARD_KL = tl.constexpr(1)
JS = tl.constexpr(2)
EXPONENT = tl.constexpr(80.0)  # divergences are clamped there

LN2 = tl.constexpr(0.6931471805599453)
SURE = tl.constexpr(-(2.0**-53))  # orpo's mean log-probability is at most this


@triton.jit
def _times(a, b):
    """a·b, 0 where either is, whatever the other."""
    return tl.where(a == 0.0, 0.0, tl.where(b == 0.0, 0.0, a * b))


@triton.jit
def _log_sigmoid(x):
    """(L(x), L(-x), S(x), S(-x)) by one exponential."""
    e = tl.exp(-tl.abs(x))
    low = log1p(e)
    up = x >= 0.0
    near = 1.0 / (1.0 + e)
    far = e / (1.0 + e)
    value = tl.where(x < 0.0, x, 0.0) - low
    opposite = tl.where(x > 0.0, -x, 0.0) - low
    return value, opposite, tl.where(up, near, far), tl.where(up, far, near)


@triton.jit
def _sigmoid(x):
    """(S(x), its slope)."""
    e = tl.exp(-tl.abs(x))
    s = 1.0 / (1.0 + e)
    return tl.where(x >= 0.0, s, e * s), e * s * s


@triton.jit
def _mixed_sigmoid(x, first, second):
    """-first·L(x) - second·L(-x) and its slope; a second of 0 is left out, not 0·inf."""
    value, opposite, up, down = _log_sigmoid(x)
    plain = second == 0.0
    loss = -first * value - tl.where(plain, 0.0, second * opposite)
    return loss, second * up - first * down


@triton.jit
def _exo_pair(x, eps):
    """Near the zero of the KL its two terms cancel: there by t, see csrc/ops/preference_table.h."""
    e = tl.exp(-tl.abs(x))
    s = 1.0 / (1.0 + e)
    near = -log1p(e)
    up = x >= 0.0
    p = tl.where(up, s, e * s)
    q = tl.where(up, e * s, s)
    log_p = tl.where(up, near, x + near)
    log_q = tl.where(up, near - x, near)
    log_keep = log1p(-eps)
    log_eps = tl.log(eps)
    value = _times(p, log_p - log_keep) + _times(q, log_q - log_eps)
    apart = x - log_keep + log_eps
    close = tl.abs(apart) < 1.0
    t = tl.where(close, tl.where(up, -apart, apart), 0.0)
    value = tl.where(close, e * s * t + log1p(e * s * expm1(-t, tl.exp(-t))), value)
    return tl.where(x == x, value, x), _times(p * q, apart)


@triton.jit
def _discopop(x, tau):
    """m·e^{-x} as e^{L(x / tau) - x}: no inf·0."""
    y = x / tau
    e = tl.exp(-tl.abs(y))
    s = 1.0 / (1.0 + e)
    up = y >= 0.0
    m = tl.where(up, s, e * s)
    rest = tl.where(up, e * s, s)
    z = tl.exp(tl.where(up, -x, _times(x, 1.0 / tau - 1.0)) - log1p(e))
    value, _, _, down = _log_sigmoid(x)
    slope = -rest * down + _times(m * rest / tau, value) + _times(z, rest / tau - 1.0)
    return z - _times(rest, value), slope


@triton.jit
def _apo_down(w, l, beta):
    """Its slope by w, S'(beta·w) - S'(beta·(w - l)), as a product: see csrc/ops/preference_table.h."""
    own, _ = _sigmoid(beta * w)
    lost, slope = _sigmoid(-beta * (w - l))
    a = tl.abs(beta * w)
    b = tl.abs(beta * (w - l))
    total = beta * (2.0 * w - l)
    gap = beta * l
    e = tl.exp(-tl.where(a < b, a, b))
    s = 1.0 / (1.0 + e)
    far = 1.0 / (1.0 + tl.exp(-tl.where(a < b, b, a)))
    below = -tl.abs(total)
    within = -tl.abs(gap)
    apart = e * s * s * far * far * expm1(below, tl.exp(below)) * expm1(within, tl.exp(within))
    apart = tl.where((total < 0.0) == (gap < 0.0), -apart, apart)
    return own + lost, beta * apart, beta * slope


@triton.jit
def _log_odds(a):
    """a - ln(1 - e^a) and its slope."""
    sure = a > SURE
    x = tl.where(sure, SURE, a)
    e = tl.exp(x)
    rest = -expm1(x, e)
    value = x - tl.where(x > -LN2, tl.log(rest), log1p(-e))
    return value, tl.where(sure, 0.0, 1.0 / rest)


@triton.jit
def _divergence(r, divergence, alpha):
    """What stands for the log-ratio r in d, f'(e^r) with f'(1) = 0, and its slope."""
    value = r
    slope = tl.full(r.shape, 1.0, tl.float64)
    if divergence == JS:
        log_sigmoid, _, _, down = _log_sigmoid(r)
        value = log_sigmoid + LN2
        slope = down
    elif divergence != REVERSE_KL:
        rate = tl.where(divergence == FORWARD_KL, -1.0, alpha - 1.0)
        straight = rate == 0.0  # r itself
        t = rate * r
        clamped = t > EXPONENT
        t = tl.where(clamped, EXPONENT, t)
        e = tl.exp(t)
        value = tl.where(straight, r, expm1(t, e) / tl.where(straight, 1.0, rate))
        slope = tl.where(straight, 1.0, tl.where(clamped, 0.0, e))
    return value, slope


@triton.jit
def _pair_loss(loss, w, l, beta, eps, gamma, delta, tau):
    """(value, slope by w, slope by l) of a pair; w and l are what stands for r_w and r_l, or the
    log-probabilities, divided by the lengths where that is asked for. Without the NLL."""
    d = w - l
    x = beta * d
    value = tl.zeros(w.shape, tl.float64)
    by_w = tl.zeros(w.shape, tl.float64)
    by_l = tl.zeros(w.shape, tl.float64)
    if loss == IPO:
        root = d - 1.0 / (2.0 * beta)
        value = root * root
        by_w = 2.0 * root
        by_l = -by_w
    elif loss == HINGE:
        flat = 1.0 - x <= 0.0  # NaN passes
        value = tl.where(flat, 0.0, 1.0 - x)
        by_w = tl.where(flat, 0.0, -beta)
        by_l = -by_w
    elif loss == SLIC:
        flat = beta - d <= 0.0
        value = tl.where(flat, 0.0, beta - d)
        by_w = tl.where(flat, number(0.0), -1.0)
        by_l = -by_w
    elif loss == EXO_PAIR:
        value, slope = _exo_pair(x, eps)
        by_w = beta * slope
        by_l = -by_w
    elif loss == DISCOPOP:
        value, slope = _discopop(x, tau)
        by_w = beta * slope
        by_l = -by_w
    elif loss == NCA_PAIR:
        log_w, log_not_w, up_w, down_w = _log_sigmoid(beta * w)
        _, log_not_l, up_l, _ = _log_sigmoid(beta * l)
        value = -log_w - 0.5 * log_not_w - 0.5 * log_not_l
        by_w = beta * (0.5 * up_w - down_w)
        by_l = beta * (0.5 * up_l)
    elif loss == BCO_PAIR:
        log_w, _, _, down_w = _log_sigmoid(beta * w - delta)
        _, log_not_l, up_l, _ = _log_sigmoid(beta * l - delta)
        value = -log_w - log_not_l
        by_w = -beta * down_w
        by_l = beta * up_l
    elif loss == SPPO_HARD:
        root_w = w - 1.0 / (2.0 * beta)
        root_l = l + 1.0 / (2.0 * beta)
        value = root_w * root_w + root_l * root_l
        by_w = 2.0 * root_w
        by_l = 2.0 * root_l
    elif loss == APO_ZERO:
        lost, slope_w = _sigmoid(-beta * w)
        won, slope_l = _sigmoid(beta * l)
        value = lost + won
        by_w = -beta * slope_w
        by_l = beta * slope_l
    elif loss == APO_DOWN:
        value, by_w, by_l = _apo_down(w, l, beta)
    elif loss == ORPO:
        odds_w, slope_w = _log_odds(w)
        odds_l, slope_l = _log_odds(l)
        log_sigmoid, _, _, down = _log_sigmoid(odds_w - odds_l)
        value = -beta * log_sigmoid
        by_w = -beta * down * slope_w
        by_l = beta * down * slope_l
    elif (loss != SFT) & (
        loss != NO_LOSS
    ):  # sigmoid, spin, robust, aot, sigmoid_norm, cpo, simpo, reward
        first = 1.0 - eps
        second = eps
        factor = beta
        if loss == ROBUST:
            rate = 1.0 / (1.0 - 2.0 * eps)
            first = rate * first
            second = -rate * second
        elif (loss == SIGMOID_NORM) | (loss == REWARD):
            first = number(1.0)
            second = number(0.0)
        if loss == SIMPO:
            x = x - gamma
        elif loss == REWARD:
            x = d
            factor = number(1.0)
        value, slope = _mixed_sigmoid(x, first, second)
        by_w = factor * slope
        by_l = -by_w
    return value, by_w, by_l


@triton.jit
def _real(pointer, at, mask, other):
    """One number a lane, float64."""
    return tl.load(pointer + at, mask=mask, other=other).to(tl.float64)


@triton.jit
def _length(lengths, at, mask):
    """An empty completion counts as one token; a length that is wrong as NaN, and it is said."""
    n = _real(lengths, at, mask, 1.0)
    return tl.where(n > 0.0, n, tl.where(n == 0.0, 1.0, float("nan")))


@triton.jit
def _add(pointer, at, value, mask, first):
    """The first loss writes, the next ones add."""
    if first == 0:
        value += tl.load(pointer + at, mask=mask, other=0.0)
    tl.store(pointer + at, value, mask=mask)


_OPTIONAL = [
    "has_ref_chosen", "has_ref_rejected", "has_chosen_lengths", "has_rejected_lengths",
    "has_weights", "has_chosen_nll", "kl_count", "has_upstream", "chosen_count", "rejected_count",
    "loss", "by_length", "divergence", "nll_by_length", "reduction", "first", "has_out",
    "has_ref_gradient", "has_nll_gradient",
]  # fmt: skip


@triton.jit(do_not_specialize=_OPTIONAL)
def preference_kernel(
    chosen, rejected, ref_chosen, has_ref_chosen, ref_rejected, has_ref_rejected,
    chosen_lengths, has_chosen_lengths, rejected_lengths, has_rejected_lengths,
    weights, has_weights, chosen_nll, has_chosen_nll, kl, kl_count, upstream, has_upstream,
    chosen_count, rejected_count, loss, by_length, term_weight: tl.float64, beta: tl.float64,
    label_smoothing: tl.float64, gamma: tl.float64, sft_weight: tl.float64, delta: tl.float64,
    tau: tl.float64, desirable: tl.float64, undesirable: tl.float64, alpha: tl.float64,
    center: tl.float64, divergence, nll_by_length, reduction, first, out, has_out, chosen_rewards,
    rejected_rewards, margins, accuracy, gradient, ref_gradient, has_ref_gradient, nll_gradient,
    has_nll_gradient, flags, BLOCK: tl.constexpr,
):  # fmt: skip
    beta = number(beta)
    eps = number(label_smoothing)
    gamma = number(gamma)
    delta = number(delta)
    tau = number(tau)
    center = number(center)
    alpha = number(alpha)
    n_chosen = chosen_count.to(tl.int64)
    n_rejected = rejected_count.to(tl.int64)
    same = n_chosen == n_rejected
    examples = (loss == KTO) | (loss == APO_ZERO_UNPAIRED)
    lane = tl.arange(0, BLOCK)

    # what a pair needs of the whole batch: the NLL, kto's z
    factor = number(0.0)
    if (loss == SFT) | (loss == ORPO):
        factor = number(1.0)
    elif (loss == CPO) | (loss == SIMPO) | (loss == SLIC):
        factor = number(sft_weight)
    summed = tl.where(factor != 0.0, n_chosen, 0)
    lp_sum = tl.zeros((BLOCK,), tl.float64)
    token_sum = tl.zeros((BLOCK,), tl.float64)
    share_sum = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, summed, BLOCK):
        at = start + lane
        inside = at < summed
        lp_sum += _real(chosen, at, inside, 0.0)
        n = _length(chosen_lengths, at, at < summed * has_chosen_lengths * nll_by_length)
        token_sum += tl.where(inside, n, 0.0)
        share = _real(weights, at, at < summed * has_weights, 1.0)
        share *= _real(upstream, at, at < summed * has_upstream, 1.0)
        share_sum += tl.where(inside, share, 0.0)
    pair_scale = number(1.0)
    example_scale = number(1.0)
    if reduction == REDUCE_MEAN:
        pair_scale = 1.0 / tl.maximum(n_chosen, 1).to(tl.float64)
        example_scale = 1.0 / tl.maximum(n_chosen + n_rejected, 1).to(tl.float64)
    tokens = tl.sum(token_sum, 0)
    tokens = tl.where(summed == 0, 1.0, tokens)
    nll = -tl.sum(lp_sum, 0) / tokens
    nll_slope = _times(number(term_weight) * factor * pair_scale, tl.sum(share_sum, 0))
    lp_slope = tl.where(nll_slope == 0.0, 0.0, -nll_slope / tokens)
    if has_chosen_nll != 0:
        nll = tl.load(chosen_nll).to(tl.float64)
        lp_slope = number(0.0)
    z_sum = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, kl_count, BLOCK):
        z_sum += _real(kl, start + lane, start + lane < kl_count, 0.0)
    z = tl.sum(z_sum, 0) / tl.maximum(kl_count, 1).to(tl.float64)
    z = tl.where(z <= 0.0, 0.0, z)  # NaN passes

    total = tl.zeros((BLOCK,), tl.float64)
    won = tl.zeros((BLOCK,), tl.int64)
    sum_w = tl.zeros((BLOCK,), tl.float64)
    sum_l = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tl.maximum(n_chosen, n_rejected), BLOCK):
        at = start + lane
        is_w = at < n_chosen
        is_l = at < n_rejected
        n_w = _length(chosen_lengths, at, at < n_chosen * has_chosen_lengths)
        n_l = _length(rejected_lengths, at, at < n_rejected * has_rejected_lengths)
        bad = (is_w & (n_w != n_w)) | (is_l & (n_l != n_l))
        tl.store(flags + BAD_LENGTHS + tl.zeros_like(lane), 1, mask=bad)
        n_w = tl.where(by_length != 0, n_w, 1.0)
        n_l = tl.where(by_length != 0, n_l, 1.0)
        lp_w = _real(chosen, at, is_w, 0.0)
        lp_l = _real(rejected, at, is_l, 0.0)
        r_w = lp_w - _real(ref_chosen, at, at < n_chosen * has_ref_chosen, 0.0)
        r_l = lp_l - _real(ref_rejected, at, at < n_rejected * has_ref_rejected, 0.0)

        value = tl.zeros((BLOCK,), tl.float64)  # of the pair or of the chosen
        value_l = tl.zeros((BLOCK,), tl.float64)  # of the rejected
        by_w = tl.zeros((BLOCK,), tl.float64)  # through the reference, too
        by_l = tl.zeros((BLOCK,), tl.float64)
        only_w = tl.zeros((BLOCK,), tl.float64)  # by the log-probabilities alone
        only_l = tl.zeros((BLOCK,), tl.float64)
        share = _real(weights, at, at < n_chosen * has_weights, 1.0)
        up = _real(upstream, at, at < n_chosen * has_upstream, 1.0)
        if examples:
            other = n_chosen + at
            share_l = _real(weights, other, at < n_rejected * has_weights, 1.0)
            up_l = _real(upstream, other, at < n_rejected * has_upstream, 1.0)
            x_w = r_w / n_w
            x_l = r_l / n_l
            u_w = number(1.0)
            u_l = number(1.0)
            if loss == KTO:
                x_w = x_w - z
                x_l = x_l - z
                u_w = number(desirable)
                u_l = number(undesirable)
            scale = number(term_weight) * example_scale * u_w * share
            scale_l = number(term_weight) * example_scale * u_l * share_l
            lost, slope_w = _sigmoid(-beta * x_w)
            held, slope_l = _sigmoid(beta * x_l)
            value = scale * lost
            value_l = scale_l * held
            by_w = -scale * up * beta * slope_w / n_w
            by_l = scale_l * up_l * beta * slope_l / n_l
        else:
            free = (loss == CPO) | (loss == SIMPO) | (loss == SLIC) | (loss == ORPO) | (loss == SFT)
            f_w, slope_w = _divergence(r_w, divergence, alpha)
            f_l, slope_l = _divergence(r_l, divergence, alpha)
            if free:
                f_w = lp_w
                f_l = lp_l
                slope_w = tl.full((BLOCK,), 1.0, tl.float64)
                slope_l = tl.full((BLOCK,), 1.0, tl.float64)
            value, d_w, d_l = _pair_loss(loss, f_w / n_w, f_l / n_l, beta, eps, gamma, delta, tau)
            scale = number(term_weight) * pair_scale * share
            by_w = scale * up * (d_w * (slope_w / n_w))
            by_l = scale * up * (d_l * (slope_l / n_l))
            if free:
                only_w = by_w
                only_l = by_l
                by_w = tl.zeros((BLOCK,), tl.float64)
                by_l = tl.zeros((BLOCK,), tl.float64)
            if factor != 0.0:
                value += factor * nll
                only_w += lp_slope
            if loss == REWARD:
                both = lp_w + lp_l
                value += _times(center, both * both)
                only_w += scale * up * 2.0 * _times(center, both)
                only_l += scale * up * 2.0 * _times(center, both)
            value = scale * value

        total += tl.where(is_w, value, 0.0) + tl.where(is_l, value_l, 0.0)
        _add(gradient, at, by_w + only_w, is_w, first)
        _add(gradient, n_chosen + at, by_l + only_l, is_l, first)
        _add(ref_gradient, at, -by_w, at < n_chosen * has_ref_gradient, first)
        _add(ref_gradient, n_chosen + at, -by_l, at < n_rejected * has_ref_gradient, first)
        each = tl.where(reduction == REDUCE_NONE, has_out, 0)
        _add(out, at, value, at < n_chosen * each, first)
        both = tl.where(examples, each, 0)
        _add(out, n_chosen + at, value_l, at < n_rejected * both, first)
        if same:
            won += (is_w & (r_w > r_l)).to(tl.int64)
        else:
            won += (is_w & (r_w > 0.0)).to(tl.int64) + (is_l & (r_l < 0.0)).to(tl.int64)
        sum_w += tl.where(is_w, r_w, 0.0)
        sum_l += tl.where(is_l, r_l, 0.0)
        metrics = has_out * first
        tl.store(chosen_rewards + at, beta * r_w, mask=at < n_chosen * metrics)
        tl.store(rejected_rewards + at, beta * r_l, mask=at < n_rejected * metrics)
        pairs = tl.where(same, n_chosen * metrics, 0)
        tl.store(margins + at, beta * (r_w - r_l), mask=at < pairs)

    if (reduction != REDUCE_NONE) & (has_out != 0):
        before = number(0.0)
        if first == 0:
            before = tl.load(out).to(tl.float64)
        tl.store(out, before + tl.sum(total, 0))
    if has_nll_gradient != 0:
        before = number(0.0)
        if first == 0:
            before = tl.load(nll_gradient).to(tl.float64)
        tl.store(nll_gradient, before + nll_slope)
    if (first != 0) & (has_out != 0):
        count = tl.where(same, n_chosen, n_chosen + n_rejected)
        tl.store(accuracy, tl.sum(won, 0).to(tl.float64) / tl.maximum(count, 1).to(tl.float64))
        if same == 0:
            mean_w = tl.sum(sum_w, 0) / tl.maximum(n_chosen, 1).to(tl.float64)
            mean_l = tl.sum(sum_l, 0) / tl.maximum(n_rejected, 1).to(tl.float64)
            tl.store(margins, beta * (mean_w - mean_l))


@triton.jit(
    do_not_specialize=[
        "has_ref_chosen", "has_ref_rejected", "has_chosen_lengths", "has_rejected_lengths",
        "has_weights", "has_upstream", "pairs", "differences", "by_length", "reduction", "has_out",
        "has_ref_gradient",
    ]
)  # fmt: skip
def preference_sorted_kernel(
    chosen, rejected, ref_chosen, has_ref_chosen, ref_rejected, has_ref_rejected,
    chosen_lengths, has_chosen_lengths, rejected_lengths, has_rejected_lengths,
    weights, has_weights, upstream, has_upstream, order, pairs, differences, by_length,
    term_weight: tl.float64, beta: tl.float64, label_smoothing: tl.float64, reduction, out, has_out,
    gradient, ref_gradient, has_ref_gradient, BLOCK: tl.constexpr,
):  # fmt: skip
    """aot (`differences`) and aot_unpaired: added to what preference_kernel left, along the order. No two
    pairs have an index in common."""
    beta = number(beta)
    eps = number(label_smoothing)
    n = pairs.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    scale = number(term_weight)
    if reduction == REDUCE_MEAN:
        scale = scale / tl.maximum(n, 1).to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        at = start + lane
        inside = at < n
        first = tl.load(order + at, mask=inside, other=0)
        second = tl.load(order + n + at, mask=inside, other=0)
        good = inside & (first >= 0) & (first < n) & (second >= 0) & (second < n)
        # lp_w, lp_l, ref_w, ref_l of d = lp_w - lp_l - (ref_w - ref_l)
        at_l = tl.where(differences != 0, first, second)
        at_ref = tl.where(differences != 0, second, first)
        lp_w = _real(chosen, first, good, 0.0)
        lp_l = _real(rejected, at_l, good, 0.0)
        ref_w = _real(ref_chosen, at_ref, good & (at < n * has_ref_chosen), 0.0)
        ref_l = _real(ref_rejected, second, good & (at < n * has_ref_rejected), 0.0)
        long_w = good & (at < n * has_chosen_lengths * by_length)
        long_l = good & (at < n * has_rejected_lengths * by_length)
        n_w = _length(chosen_lengths, first, long_w)
        n_l = _length(rejected_lengths, at_l, long_l)
        n_ref_w = _length(chosen_lengths, at_ref, long_w)
        n_ref_l = _length(rejected_lengths, second, long_l)
        one = tl.where(differences != 0, lp_w / n_w - lp_l / n_l, (lp_w - ref_w) / n_w)
        two = tl.where(differences != 0, ref_w / n_ref_w - ref_l / n_ref_l, (lp_l - ref_l) / n_l)
        value, slope = _mixed_sigmoid(beta * (one - two), 1.0 - eps, eps)
        share = scale * _real(weights, at, at < n * has_weights, 1.0)
        value = tl.where(good, share * value, float("nan"))
        slope = share * _real(upstream, at, at < n * has_upstream, 1.0) * beta * slope
        total += tl.where(inside, value, 0.0)
        _add(gradient, first, slope / n_w, good, 0)
        _add(gradient, n + at_l, -slope / n_l, good, 0)
        wanted = good & (at < n * has_ref_gradient)
        _add(ref_gradient, at_ref, -slope / n_ref_w, wanted, 0)
        _add(ref_gradient, n + second, slope / n_ref_l, wanted, 0)
        each = tl.where(reduction == REDUCE_NONE, has_out, 0)
        _add(out, at, value, at < n * each, 0)
    if (reduction != REDUCE_NONE) & (has_out != 0):
        tl.store(out, tl.load(out).to(tl.float64) + tl.sum(total, 0))


def preference(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, weights,
    chosen_nll, kl, kl_count, aot_order, aot_unpaired_order, wide, chosen_count, rejected_count,
    options, upstream, out, chosen_rewards, rejected_rewards, margins, accuracy, gradient,
    ref_gradient, nll_gradient, place,
):  # fmt: skip
    codes, by_length, term_weights, *numbers, divergence, nll_by_length, reduction = options
    beta, label_smoothing = numbers[:2]

    def given(*tensors):
        return with_presence(tensors, gradient)

    inputs = [
        chosen, rejected,
        *given(ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, weights),
    ]  # fmt: skip
    absent = gradient if out is None else None
    metrics = [
        absent if m is None else m for m in (chosen_rewards, rejected_rewards, margins, accuracy)
    ]
    sort = {AOT.value: aot_order, AOT_UNPAIRED.value: aot_unpaired_order}
    # the first launch writes everything, also where every loss sorts: then of no loss
    terms = [t for t in zip(codes, by_length, term_weights, strict=True) if t[0] not in sort]
    for i, (code, divides, weight) in enumerate(terms or [(NO_LOSS.value, False, 0.0)]):
        launch(
            preference_kernel, 1, *inputs, *given(chosen_nll), given(kl)[0], kl_count,
            *given(upstream), chosen_count, rejected_count, code, int(divides), float(weight),
            *map(float, numbers), divergence, int(nll_by_length), reduction, int(i == 0),
            *given(out), *metrics, gradient, *given(ref_gradient, nll_gradient), place[1],
            BLOCK=256, num_warps=4,
        )  # fmt: skip
    for code, divides, weight in zip(codes, by_length, term_weights, strict=True):
        if code not in sort:
            continue
        launch(
            preference_sorted_kernel, 1, *inputs, *given(upstream), sort[code], chosen_count,
            int(code == AOT.value), int(divides), float(weight), float(beta), float(label_smoothing),
            reduction, *given(out), gradient, *given(ref_gradient), BLOCK=256, num_warps=4,
        )  # fmt: skip
