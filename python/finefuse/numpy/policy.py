"""Policy-gradient losses, value loss and advantages of NumPy arrays."""

from __future__ import annotations

from math import inf, prod
from typing import Any, NamedTuple

import numpy as np

from .. import _C
from .._args import check_temperature, choice, require, segments
from .._args.policy import (
    ADVANTAGE_SCALES,
    BASELINES,
    ROW_SUMS,
    SEQUENCE_SUMS,
    TOKEN_NAMES,
    VALUE_BLOCK,
    advantages_by_token,
    check_discounts,
    check_gae,
    check_group_size,
    check_policy_numbers,
    policy_codes,
    policy_importance,
    policy_numbers,
    policy_reduction,
)
from ._array import (
    ACCUMULATOR,
    FLOAT32,
    FLOAT64,
    Array,
    contiguous,
    float_array,
    get_num_threads,
    gradient_rows,
    index_array,
    integer,
    is_int32,
    logit_rows,
    mask_array,
    number_array,
    result,
    scalar,
)


class PolicyOutput(NamedTuple):
    """What a policy loss returns."""

    loss: Any
    """A scalar or, with reduction="none", the shape of the log-probabilities."""
    clip_fraction_low: Any
    """The share of tokens whose ratio was below the bounds with A < 0, a scalar."""
    clip_fraction_high: Any
    """The share of tokens whose ratio was above the bounds with A > 0, a scalar."""
    approx_kl: Any
    """The mean of e^{-x} + x - 1 with x = lp - old_logprobs, a scalar."""
    entropy: Any
    """The mean entropy of the tokens, a scalar; None from log-probabilities."""


class _Tokens(NamedTuple):
    """What the kernels take of the tokens beside their log-probabilities."""

    sequences: tuple[Array | None, bool, int, int]
    """cu_seqlens, whether it is int32, the number of sequences, their length."""
    vectors: tuple[Any, ...]
    """old_logprobs, ref_logprobs, weights, advantages, whether these are by token."""


def _tokens(
    shape: tuple[int, ...], dtype: np.dtype[Any], name: str, cu_seqlens: Any, *values: Any
) -> _Tokens:
    """`name` is what the caller gave in that shape; the values are those of TOKEN_NAMES."""
    int32, packed = False, None
    if cu_seqlens is not None:
        cu_seqlens = index_array("cu_seqlens", cu_seqlens)
        int32 = is_int32(cu_seqlens)
    sequences, length = segments(
        shape, None, None if cu_seqlens is None else cu_seqlens.shape, name
    )
    count = prod(sequences)
    if cu_seqlens is not None:
        packed = count
    vectors: list[Array | None] = []
    by_token = False
    for what, value in zip(TOKEN_NAMES, values, strict=True):
        if value is None and what != "advantages":
            vectors.append(None)
            continue
        value = float_array(what, value)
        if what == "advantages":
            by_token = advantages_by_token(shape, value.shape, packed)
        elif what == "weights" and packed is None:
            if not advantages_by_token(shape, value.shape, None, what):  # one a row
                value = np.broadcast_to(value.reshape(*shape[:-1], 1), shape)
        elif value.shape != shape:
            raise ValueError(f"{what}: shape {value.shape}; allowed: {shape}")
        vectors.append(contiguous(value, dtype))
    return _Tokens((cu_seqlens, int32, count, length), (*vectors, by_token))


def _options(
    tokens: _Tokens, loss: str, importance: Any, kl: str, kl_times_ratio: bool, reduction: Any,
    max_length: Any, num_tokens: Any, numbers: Any,
) -> tuple[Any, str, str]:  # fmt: skip
    """(what the kernels take, whose ratio it is, how the tokens add up)."""
    cu_seqlens, _, count, length = tokens.sequences
    max_length, num_tokens = (
        None if value is None else scalar(name, value)
        for name, value in (("max_length", max_length), ("num_tokens", num_tokens))
    )
    how, divisor = policy_reduction(
        loss, reduction, count, length if cu_seqlens is None else None, max_length, num_tokens
    )
    whose = policy_importance(loss, importance)
    floats = policy_numbers(scalar, loss, *(*numbers, divisor))
    codes = policy_codes(loss, whose, kl, kl_times_ratio, how)
    check_policy_numbers(tokens.vectors[1] is not None, *floats)
    return (*codes, *floats), whose, how


def _policy(
    logprobs: Array, mask: Array | None, tokens: _Tokens, options: Any, how: str
) -> tuple[Array, Array, Array]:
    """(loss, the three metrics, gradient), of contiguous log-probabilities."""
    dtype, shape = logprobs.dtype, logprobs.shape
    loss, metrics = np.empty(shape if how == "none" else (), dtype), np.empty(3, dtype)
    gradient = np.empty(shape, dtype)
    scratch = np.empty(tokens.sequences[2] * SEQUENCE_SUMS, FLOAT64)
    _C.policy(
        logprobs, dtype == FLOAT64, mask, *tokens.sequences, logprobs.size, *tokens.vectors, options,
        None, loss, metrics, gradient, scratch, get_num_threads(),
    )  # fmt: skip
    return loss, metrics, gradient


def policy_loss(
    logprobs: Array,
    *,
    advantages: Array,
    old_logprobs: Array | None = None,
    loss: str = "ppo",
    mask: Array | None = None,
    cu_seqlens: Array | None = None,
    weights: Array | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    delta: float | None = None,
    ref_logprobs: Array | None = None,
    kl_beta: float = 0.0,
    kl: str = "k3",
    kl_times_ratio: bool = False,
    importance: str | None = None,
    reduction: str | None = None,
    max_length: int | None = None,
    num_tokens: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    return_grad: bool = False,
) -> Any:
    """A policy-gradient loss from token log-probabilities: PPO, GRPO and their family.

    With x = lp - old, ρ = e^x, A the advantage, sg stop-gradient, S sigmoid, a token's loss is

        reinforce                  -A·lp                                              Williams 1992
        ppo grpo bnpo dr_grpo      -min(min(ρ, δ)·A, clip(ρ, 1-ε_l, 1+ε_h)·A),        arXiv:1707.06347,
        dapo luspo gspo rloo       at most -c·A where A < 0 (c: dual_clip)            2402.03300, …
        cispo                      -sg(min(ρ, ε_h))·A·lp                              arXiv:2506.13585
        sapo                       -A·S(τ(ρ - 1))·4/τ, τ by the sign of A             arXiv:2511.20347
        vespo                      -sg(e^{λ + k·log w - λ·w})·A·lp                    arXiv:2602.10693

    times its weight, plus kl_beta times the KL to the reference (times ρ with `kl_times_ratio`):
    k1 = lp - ref, k2 = ½(lp - ref)², k3 = e^{ref-lp} - (ref-lp) - 1. ρ is a token's own; for `gspo`,
    `luspo` and importance="sequence" that of the mean x of its sequence; for `rloo` that of the sum, whose
    surrogate counts once a sequence; w of `vespo` is of the sum of x clamped to ±20, clamped to [1e-8,
    e^20], and (k, λ) = (2, 3) for A ≥ 0, else (3, 2).

    With n tokens that count in a sequence, N in the batch of B sequences, the losses add up to

        ppo bnpo reinforce   Σ / N                       dapo cispo vespo   Σ / num_tokens
        grpo gspo sapo       mean over B of Σ / n        dr_grpo            Σ / (B · max_length)
        rloo luspo           mean over B of Σ

    Args:
        logprobs: (…, T), a row a sequence, or flat (tokens,) with `cu_seqlens`; any float type, computed
            in float64.
        advantages: one a token, in the shape of logprobs, or one a sequence, (…) or (…, 1).
        old_logprobs: in the shape of logprobs, of the policy that sampled. None: those of now, ρ = 1.
        loss: the name above.
        mask: in the shape of logprobs, bool or a number that is not 0 where a token counts. The others are
            not read (they may be NaN) and have gradient 0.
        cu_seqlens: (sequences + 1,) integers, rising from 0 to the number of tokens.
        weights: a factor a token (importance correction, off-policy and entropy masks), in the shape of
            logprobs, or one a row; not on the KL.
        clip_low, clip_high: ε_l and ε_h. None: 0.2, and for `cispo`, whose cap it is, 5.
        dual_clip: c > 1. delta: the cap δ > 0 on the ratio that is not clipped.
        ref_logprobs, kl_beta, kl, kl_times_ratio: the KL term; ref_logprobs in the shape of logprobs.
        importance: "token" or "sequence"; None: the loss's own.
        reduction: None (the loss's own, above), another loss's name, "mean" (over tokens), "sum", or
            "none": a loss for each token (0 where masked).
        max_length: of `dr_grpo`; None: T. num_tokens: of `dapo`, `cispo` and `vespo`; None: N.
        tau_pos, tau_neg: τ of `sapo` for A > 0 and for the others.
        return_grad: also return the gradient of the loss by logprobs, for "none" of its sum.

    A log-ratio beyond ±60 (in k3, ref - lp beyond 60) is clamped there and passes no gradient. Sequences
    without tokens give 0; they count in B.

    Returns:
        PolicyOutput(loss, clip_fraction_low, clip_fraction_high, approx_kl, entropy=None), or with
        `return_grad` (that, gradient), all float32, or float64 where a log-probability is. Fractions are
        over tokens, or over sequences where the ratio is a sequence's; approx_kl is over tokens.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    logprobs = float_array("logprobs", logprobs)
    given = [logprobs]
    for name, value in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if value is not None:
            given.append(float_array(name, value))
    dtype = FLOAT64 if any(v.dtype == FLOAT64 for v in given) else FLOAT32
    mask = mask_array(mask, logprobs.shape)
    tokens = _tokens(
        logprobs.shape,
        dtype,
        "logprobs",
        cu_seqlens,
        old_logprobs,
        ref_logprobs,
        weights,
        advantages,
    )
    options, _, how = _options(
        tokens, loss, importance, kl, kl_times_ratio, reduction, max_length, num_tokens,
        (clip_low, clip_high, dual_clip, delta, kl_beta, tau_pos, tau_neg),
    )  # fmt: skip
    value, metrics, gradient = _policy(contiguous(logprobs, dtype), mask, tokens, options, how)
    low, high, approx_kl = metrics
    output = PolicyOutput(result(value), low, high, approx_kl, None)
    return (output, gradient) if return_grad else output


def policy_loss_from_logits(
    logits: Array,
    actions: Array,
    *,
    advantages: Array,
    old_logprobs: Array | None = None,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    loss: str = "ppo",
    mask: Array | None = None,
    cu_seqlens: Array | None = None,
    weights: Array | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    delta: float | None = None,
    ref_logprobs: Array | None = None,
    kl_beta: float = 0.0,
    kl: str = "k3",
    kl_times_ratio: bool = False,
    importance: str | None = None,
    reduction: str | None = None,
    max_length: int | None = None,
    num_tokens: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    ignore_index: int = -100,
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    """A policy-gradient loss from logits, the loss and their gradient in one pass over them.

        lp_t = z_t[a_t]/T - lse(z_t/T),    H_t = lse(z_t/T) - Σ_v p[v]·z_t[v]/T
        loss = policy_loss(lp, …) - entropy_coef · mean of H over the tokens that count
        dz_t = (1/T)·[ g_t·(1[a_t] - p) + (entropy_coef/N)·p·(log p + H_t) ],   g_t = d loss / d lp_t

    The gradient of a row is written while it is in the cache: one read and one write of memory in all.
    Where a ratio is a sequence's (`gspo`, `luspo`, `rloo`, `vespo`, importance="sequence") and with
    reduction="none" the logits are read once for the loss and once more for their gradient.

    Args:
        logits: (…, T, V) or, with `cu_seqlens`, (tokens, V); float32, bfloat16, float16 or float64, any
            strides.
        actions: (…, T) or (tokens,), integers in [0, V) or `ignore_index`, aligned with the logits.
        entropy_coef: of the entropy bonus, for reduction="none" subtracted token by token.
        temperature: T > 0; `old_logprobs` and `ref_logprobs` are those of z/T, too.
        mask: in the shape of actions, as in `policy_loss`; what is masked, or has the action
            `ignore_index`, is not read (NaN there does not matter) and gets exactly 0.
        return_grad: also return the gradient of the loss by the logits, for "none" of its sum.
        grad_out: where the gradient goes, as in `token_logprobs`; may be the logits.
        the others: as in `policy_loss`.

    Returns:
        PolicyOutput, as `policy_loss`, with the mean entropy of the tokens that count, in nats; float32
        (float64 for float64 logits). With `return_grad` (that, gradient), the gradient of the logits'
        dtype and shape.

    Raises:
        TypeError, ValueError: naming the argument; an action outside [0, V) included. Nothing is written.
    """
    actions = index_array("actions", actions)
    ignore_index = integer("ignore_index", ignore_index)
    mask = mask_array(mask, actions.shape)
    if mask is not None:
        actions = np.where(mask, actions, np.int64(ignore_index))
    rows, layout, y, int32 = logit_rows(logits, actions, "actions")
    shape, dtype, threads = y.shape, ACCUMULATOR[layout[0]], get_num_threads()
    tokens = _tokens(
        shape, dtype, "actions", cu_seqlens, old_logprobs, ref_logprobs, weights, advantages
    )
    options, whose, how = _options(
        tokens, loss, importance, kl, kl_times_ratio, reduction, max_length, num_tokens,
        (clip_low, clip_high, dual_clip, delta, kl_beta, tau_pos, tau_neg),
    )  # fmt: skip
    temperature = scalar("temperature", temperature)
    check_temperature(temperature)
    entropy_coef = scalar("entropy_coef", entropy_coef)
    require(-inf < entropy_coef < inf, "entropy_coef", entropy_coef, "finite")
    saved = None
    gradient, out, out_layout = gradient_rows(logits, rows, layout, return_grad, grad_out)
    if return_grad and whose == "token" and how != "none":
        value, metrics = np.empty((), dtype), np.empty(4, dtype)
        scratch = np.empty(tokens.sequences[2] + ROW_SUMS * y.size, FLOAT64)
        _C.policy_logits(
            rows, layout, out, out_layout, y, int32, ignore_index, temperature, entropy_coef,
            *tokens.sequences, *tokens.vectors, options, None, value, metrics, scratch, threads,
        )  # fmt: skip
        if out is not gradient:
            gradient[...] = out
        return PolicyOutput(result(value), *metrics), gradient
    if return_grad:
        saved = np.empty((3, *shape), FLOAT64)
    lp, entropy = np.empty(shape, dtype), np.empty(shape, dtype)
    try:
        _C.token_logprobs(
            rows, layout, y, int32, ignore_index, temperature, lp, entropy, None, saved, threads
        )
    except ValueError as error:  # an action out of range: there they are targets
        raise ValueError(str(error).replace("targets", "actions", 1)) from None
    keep = y != ignore_index
    value, metrics, g = _policy(lp, keep, tokens, options, how)
    count = dtype.type(max(int(np.count_nonzero(keep)), 1))
    mean = dtype.type(entropy.sum(dtype=FLOAT64)) / count
    if entropy_coef != 0.0:
        value = value - entropy_coef * (entropy if how == "none" else mean)
    low, high, approx_kl = metrics
    output = PolicyOutput(result(np.asarray(value, dtype)), low, high, approx_kl, mean)
    if not return_grad:
        return output
    h = None
    if entropy_coef != 0.0:
        h = np.full(shape, dtype.type(-entropy_coef) / (1 if how == "none" else count), dtype)
    _C.token_logprobs_backward(
        rows,
        layout,
        out,
        out_layout,
        y,
        int32,
        ignore_index,
        temperature,
        saved,
        g,
        h,
        None,
        threads,
    )
    if out is not gradient:
        gradient[...] = out
    return output, gradient


def value_loss(
    values: Array,
    returns: Array,
    old_values: Array | None = None,
    *,
    clip: float | None = None,
    mask: Array | None = None,
    return_grad: bool = False,
) -> Any:
    """The value function's loss in PPO, its mean over the tokens that count.

        ½·max((v - R)², (clip(v, v_old - c, v_old + c) - R)²)       without `clip`: ½·(v - R)²

    Args:
        values: v, any shape and float type, computed in float64.
        returns: R, in the shape of values. old_values: v_old, the same; needed by `clip`.
        clip: c ≥ 0. None: not clipped.
        mask: in the shape of values, bool or a number that is not 0 where a token counts. The others are
            not read and have gradient 0.
        return_grad: also return the gradient by values.

    Returns:
        A scalar, 0 where no token counts, or (that, gradient): float32 (float64 for float64 values).

    Raises:
        TypeError, ValueError: naming the argument.

    Source: the PPO reference implementation; arXiv:2006.05990 has both forms.
    """
    values = float_array("values", values)
    if clip is not None and old_values is None:
        raise ValueError("clip: it needs old_values")
    shape, dtype = values.shape, FLOAT64 if values.dtype == FLOAT64 else FLOAT32
    given: list[Array | None] = [contiguous(values, dtype)]
    for name, x in (("returns", returns), ("old_values", None if clip is None else old_values)):
        if x is None and name == "old_values":
            given.append(None)
            continue
        x = float_array(name, x)
        if x.shape != shape:
            raise ValueError(f"{name}: shape {x.shape}; allowed: {shape}")
        given.append(contiguous(x, dtype))
    mask = mask_array(mask, shape)
    limit = scalar("clip", inf if clip is None else clip)
    require(limit >= 0.0, "clip", limit, "0 and above, or None")
    loss, gradient = np.empty((), dtype), np.empty(shape, dtype) if return_grad else None
    blocks = (values.size + VALUE_BLOCK - 1) // VALUE_BLOCK
    _C.value_loss(
        given[0], dtype is FLOAT64, values.size, *given[1:], mask, limit, loss, gradient,
        np.empty(2 * blocks, FLOAT64), get_num_threads(),
    )  # fmt: skip
    return (result(loss), gradient) if return_grad else result(loss)


def _real(name: str, value: Any) -> Array:
    """Floats, integers, or bool, as of rewards that are right or wrong."""
    value = number_array(name, value)
    wide = value.dtype.kind == "f" and value.itemsize >= 8
    return contiguous(value, FLOAT64 if wide else FLOAT32)


def group_advantages(
    rewards: Array, group_size: int, *, scale: str = "group", baseline: str = "mean"
) -> Any:
    """Advantages of completions relative to the others of the same prompt: GRPO, RLOO.

        A = (r - mean of the group) / (standard deviation + 1e-4)

    Args:
        rewards: groups of `group_size` in a row, any shape, floats, integers or bool; a reward that is NaN
            is left out and gets 0.
        group_size: completions a prompt.
        scale: "group" (by the standard deviation of the group, one degree of freedom removed; 0 for a
            single reward), "batch" (by that of all rewards) or "none" (Dr. GRPO: not divided).
        baseline: "mean" of the group, or "leave_one_out": the mean of the others (RLOO); a group of one
            gets 0.

    Returns:
        In the shape of rewards, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument.

    Source: arXiv:2402.03300 section 4.1; arXiv:2402.14740 eq. 7; arXiv:2503.20783.
    """
    rewards = _real("rewards", rewards)
    group_size = integer("group_size", group_size)
    check_group_size(rewards.size, group_size)
    codes = choice("scale", scale, ADVANTAGE_SCALES), choice("baseline", baseline, BASELINES)
    out = np.empty(rewards.shape, rewards.dtype)
    _C.group_advantages(
        rewards, rewards.dtype == FLOAT64, rewards.size // group_size, group_size, codes[0],
        codes[1] == BASELINES["leave_one_out"], out, get_num_threads(),
    )  # fmt: skip
    return result(out)


def gae(
    rewards: Array, values: Array, *, gamma: float, lam: float, mask: Array | None = None
) -> tuple[Array, Array]:
    """Generalised advantage estimates and returns.

        δ_t = r_t + γ·v_{t+1} - v_t,    A_t = δ_t + γλ·A_{t+1},    return_t = A_t + v_t

    Args:
        rewards: (…, T). values: (…, T), with v after the end 0, or (…, T + 1), which has it. Floats,
            integers or bool.
        gamma, lam: γ and λ in [0, 1].
        mask: (…, T), bool or a number that is not 0 where a token counts. The others are left out, as if
            their neighbours stood side by side: not read, and 0 in both results.

    Returns:
        (advantages, returns), (…, T), float32 (float64 where one of the two inputs is).

    Raises:
        TypeError, ValueError: naming the argument.

    Source: arXiv:1506.02438 eq. 16.
    """
    rewards, values = _real("rewards", rewards), _real("values", values)
    dtype = FLOAT32 if rewards.dtype == values.dtype == FLOAT32 else FLOAT64
    shape = rewards.shape
    mask = mask_array(mask, shape)
    bootstrap = check_gae(shape, values.shape, None)
    gamma, lam = scalar("gamma", gamma), scalar("lam", lam)
    check_discounts(gamma, lam)
    advantages, returns = np.empty(shape, dtype), np.empty(shape, dtype)
    _C.gae(
        contiguous(rewards, dtype), dtype is FLOAT64, prod(shape[:-1]), shape[-1],
        contiguous(values, dtype), bootstrap, mask, gamma, lam, advantages, returns, get_num_threads(),
    )  # fmt: skip
    return advantages, returns
