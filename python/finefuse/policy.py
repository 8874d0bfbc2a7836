"""Policy-gradient losses (PPO, GRPO and their family); the value loss and advantages are in _advantages."""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backend
from ._advantages import gae, group_advantages, value_loss
from ._args import check_index, check_temperature, require, segments
from ._args.policy import (
    IMPORTANCE,
    KL,
    POLICY_REDUCTIONS,
    ROW_SUMS,
    SEQUENCE_SUMS,
    SURROGATES,
    TOKEN_NAMES,
    advantages_by_token,
    check_policy_numbers,
    policy_codes,
    policy_importance,
    policy_numbers,
    policy_reduction,
)
from ._op import (
    INDEX_DTYPES,
    SPENT,
    WIDE,
    accumulator,
    check_rows,
    composite,
    consumed,
    contiguous,
    float_tensor,
    gradient_buffer,
    gradient_in_forward,
    gradient_rows,
    index_tensor,
    is_compiling,
    kernel,
    mask_of,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
    scalar_gradient,
    scaled,
    wants_gradient,
    write_back,
)
from .eager import policy as _eager
from .logprobs import SCALE, check_offsets, sequence_logprobs, token_logprobs

__all__ = [
    "PolicyOutput",
    "gae",
    "group_advantages",
    "policy_loss",
    "policy_loss_from_logits",
    "value_loss",
]


class PolicyOutput(NamedTuple):
    """What a policy loss returns; only `loss` is differentiable."""

    loss: Tensor
    """() or, with reduction="none", the shape of the log-probabilities."""
    clip_fraction_low: Tensor
    """The share of tokens whose ratio was below the bounds with A < 0, ()."""
    clip_fraction_high: Tensor
    """The share of tokens whose ratio was above the bounds with A > 0, ()."""
    approx_kl: Tensor
    """The mean of e^{-x} + x - 1 with x = lp - old_logprobs, ()."""
    entropy: Tensor | None
    """The mean entropy of the tokens, (); None from log-probabilities."""


_POLICY = kernel("policy", "policy")
_POLICY_LOGITS = kernel("policy", "policy_logits")

_NONE = POLICY_REDUCTIONS["none"]


# ---- arguments that all forms of the loss share ------------------------------------------------

TOKENS = (
    "Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? weights, Tensor advantages, "
    "Tensor? cu_seqlens"
)
FLOATS = (
    "float clip_low, float clip_high, float dual_clip, float delta, float kl_beta, float tau_pos, "
    "float tau_neg, float divisor"
)
CODES = "int surrogate, int importance, int kl, bool kl_times_ratio, int reduction"


def check_tokens(
    shape: torch.Size,
    dtype: torch.dtype,
    like: Tensor,
    *tokens: Tensor | None,
    name: str = "logprobs",
) -> tuple[list[int], int, bool]:
    """(shape of the sequences, their length, whether advantages are by token); raises what is wrong."""
    *vectors, advantages, cu_seqlens = tokens
    if cu_seqlens is not None and cu_seqlens.dtype not in INDEX_DTYPES:
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype}; allowed: int32, int64")
    if advantages is None:
        raise TypeError("advantages: a tensor, not None")
    sequences, length = segments(
        shape, None, None if cu_seqlens is None else cu_seqlens.shape, name
    )
    for given, vector in zip(TOKEN_NAMES, (*vectors, advantages), strict=True):
        if vector is None:
            continue
        if vector.dtype is not dtype:
            raise TypeError(f"{given}: dtype {vector.dtype}; allowed: {dtype}")
        if vector is not advantages and vector.shape != shape:
            raise ValueError(f"{given}: shape {tuple(vector.shape)}; allowed: {tuple(shape)}")
        same_device(given, vector, name, like)
    same_device("cu_seqlens", cu_seqlens, name, like)
    by_token = advantages_by_token(
        shape, advantages.shape, None if cu_seqlens is None else sequences[0]
    )
    return sequences, length, by_token


def _check_codes(surrogate: int, importance: int, kl: int, reduction: int) -> None:
    for name, code, codes in (
        ("surrogate", surrogate, SURROGATES), ("importance", importance, IMPORTANCE), ("kl", kl, KL),
        ("reduction", reduction, POLICY_REDUCTIONS),
    ):  # fmt: skip
        require(code in codes.values(), name, code, f"0 to {len(codes) - 1}")


def _options(floats: Any, codes: Any, has_ref: bool) -> tuple[Any, ...]:
    """What the kernels take: see policy_options in csrc/bindings/policy.h."""
    surrogate, importance, kl, kl_times_ratio, reduction = codes
    _check_codes(surrogate, importance, kl, reduction)
    check_policy_numbers(has_ref, *floats)
    return (surrogate, importance, kl, kl_times_ratio, reduction, *floats)


def _token_vectors(
    shape: torch.Size, dtype: torch.dtype, like: Tensor, name_of_like: str, values: tuple[Any, ...],
    packed: bool,
) -> list[Tensor | None]:  # fmt: skip
    """old_logprobs, ref_logprobs, weights and advantages as the raw ops take them."""
    vectors: list[Tensor | None] = []
    for name, value in zip(TOKEN_NAMES, values, strict=True):
        if value is None and name != "advantages":
            vectors.append(None)
            continue
        value = float_tensor(name, value)
        same_device(name, value, name_of_like, like)
        value = value.detach()
        one_a_row = name == "weights" and value.shape != shape and not packed
        if one_a_row and not advantages_by_token(shape, value.shape, None, name):
            value = value.reshape(*shape[:-1], 1).expand(shape)
        vectors.append(value if value.dtype is dtype else value.to(dtype))
    return vectors


def _optional(name: str, value: Any) -> Any:
    return None if value is None else scalar(name, value)


def _check_cu_seqlens(cu_seqlens: Any, name: str, like: Tensor) -> Tensor | None:
    if cu_seqlens is None:
        return None
    return index_tensor("cu_seqlens", cu_seqlens, name, like)


# ---- from log-probabilities: raw ops -----------------------------------------------------------


def policy_tokens(
    upstream: Tensor | None,
    logprobs: Tensor,
    mask: Tensor | None,
    tokens: Any,
    numbers: Any,
    want_loss: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    floats, codes = numbers[:8], numbers[8:]
    if logprobs.dtype not in WIDE:
        raise TypeError(f"logprobs: dtype {logprobs.dtype}; allowed: float32, float64")
    shape, dtype = logprobs.shape, logprobs.dtype
    sequences, length, by_token = check_tokens(shape, dtype, logprobs, *tokens)
    options = _options(floats, codes, tokens[1] is not None)
    if mask is not None and (mask.shape != shape or mask.dtype is not torch.bool):
        raise ValueError(f"mask: {tuple(mask.shape)} {mask.dtype}; allowed: {tuple(shape)} bool")
    same_device("mask", mask, "logprobs", logprobs)
    old, ref, weights, advantages, offsets = contiguous(*tokens)
    count = torch.Size(sequences).numel()
    out = metrics = None
    if want_loss:
        out = logprobs.new_empty(shape if codes[-1] == _NONE else ())
        metrics = logprobs.new_empty((3,))
    gradient = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    scratch = logprobs.new_empty((count * SEQUENCE_SUMS,), dtype=torch.float64)
    logprobs, mask, upstream = contiguous(logprobs, mask, upstream)
    _POLICY(
        logprobs, dtype is torch.float64, mask, offsets,
        offsets is not None and offsets.dtype is torch.int32, count, length, logprobs.numel(), old, ref,
        weights, advantages, by_token, options, upstream, out, metrics, gradient, scratch,
    )  # fmt: skip
    return out, metrics, gradient


def _forward(logprobs: Tensor, mask: Tensor | None, *rest: Any) -> Any:
    return policy_tokens(None, logprobs, mask, rest[:5], rest[5:], True)


def _forward_fake(logprobs: Tensor, mask: Tensor | None, *rest: Any) -> Any:
    check_tokens(logprobs.shape, logprobs.dtype, logprobs, *rest[:5])
    shape = logprobs.shape if rest[-1] == _NONE else ()
    return (
        logprobs.new_empty(shape),
        logprobs.new_empty((3,)),
        logprobs.new_empty(logprobs.shape),
    )


def _backward(g: Tensor, logprobs: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    if g.shape != logprobs.shape or g.dtype is not logprobs.dtype:
        raise ValueError(
            f"g: {tuple(g.shape)} {g.dtype}; allowed: {tuple(logprobs.shape)} {logprobs.dtype}"
        )
    same_device("g", g, "logprobs", logprobs)
    return policy_tokens(g, logprobs, mask, rest[:5], rest[5:], False)[2]


_FORWARD = raw_op(
    f"policy_forward(Tensor logprobs, Tensor? mask, {TOKENS}, {FLOATS}, {CODES}) -> "
    "(Tensor, Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
)
# For reduction="none", whose upstream gradient has a number a token.
_BACKWARD = raw_op(
    f"policy_backward(Tensor g, Tensor logprobs, Tensor? mask, {TOKENS}, {FLOATS}, {CODES}) -> "
    "Tensor",
    run=_backward,
    fake=lambda g, logprobs, *rest: logprobs.new_empty(logprobs.shape),
)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, mask: Tensor | None, *rest: Any) -> Any:
        out, metrics, gradient = _FORWARD(logprobs, mask, *rest)
        ctx.numbers = rest[5:]
        ctx.by_token = rest[-1] == _NONE
        if ctx.by_token:
            ctx.save_for_backward(logprobs, mask, *rest[:5])
        else:
            ctx.save_for_backward(gradient, mask, logprobs)
        ctx.backend = _backend.chosen
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return out, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        nothing = (None,) * (6 + len(ctx.numbers))
        if g is None:
            return None, *nothing
        if ctx.by_token:
            return _BACKWARD(g, *ctx.saved_tensors, *ctx.numbers), *nothing
        gradient, mask, _ = ctx.saved_tensors
        return scaled(gradient, mask, g), *nothing


def policy_loss(
    logprobs: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    loss: str = "ppo",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor | None = None,
    dual_clip: float | Tensor | None = None,
    delta: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_beta: float | Tensor = 0.0,
    kl: str = "k3",
    kl_times_ratio: bool = False,
    importance: str | None = None,
    reduction: str | None = None,
    max_length: int | None = None,
    num_tokens: float | Tensor | None = None,
    tau_pos: float | Tensor = 1.0,
    tau_neg: float | Tensor = 1.05,
) -> PolicyOutput:
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
    e^20], and (k, λ) = (2, 3) for A ≥ 0, else (3, 2). Losses of sequences go over the tokens twice more.

    With n tokens that count in a sequence, N in the batch of B sequences, the losses add up to

        ppo bnpo reinforce   Σ / N                       dapo cispo vespo   Σ / num_tokens
        grpo gspo sapo       mean over B of Σ / n        dr_grpo            Σ / (B · max_length)
        rloo luspo           mean over B of Σ

    Args:
        logprobs: (…, T), a row a sequence, or flat (tokens,) with `cu_seqlens`; any float type, computed
            in float64. The only argument that gets a gradient.
        advantages: one a token, in the shape of logprobs, or one a sequence, (…) or (…, 1). Where packed
            tokens are as many as their sequences, (tokens,) is one a token.
        old_logprobs: in the shape of logprobs, of the policy that sampled. None: those of now, ρ = 1.
        loss: the name above.
        mask: in the shape of logprobs, bool or a number that is not 0 where a token counts. The others are
            not read (they may be NaN) and pass exactly 0 back.
        cu_seqlens: (sequences + 1,) integers, rising from 0 to the number of tokens.
        weights: a factor a token (importance correction, off-policy and entropy masks), in the shape of
            logprobs, or one a row; not on the KL.
        clip_low, clip_high: ε_l and ε_h. None: 0.2, and for `cispo`, whose cap it is, 5.
        dual_clip: c > 1. delta: the cap δ > 0 on the ratio that is not clipped.
        ref_logprobs, kl_beta, kl, kl_times_ratio: the KL term; ref_logprobs in the shape of logprobs.
        importance: "token" or "sequence"; None: the loss's own.
        reduction: None (the loss's own, above), another loss's name, "mean" (over tokens), "sum", or
            "none": a loss for each token (0 where masked).
        max_length: of `dr_grpo`; None: T. num_tokens: of `dapo`, `cispo` and `vespo`, a number or a 0-d
            tensor; None: N. At 0 the loss is 0. Other losses have no use for them.
        tau_pos, tau_neg: τ of `sapo` for A > 0 and for the others.

    Numbers may also be 0-d tensors. A log-ratio beyond ±60 (in k3, ref - lp beyond 60) is clamped there
    and passes no gradient. Sequences without tokens give 0; they count in B.

    Returns:
        PolicyOutput(loss, clip_fraction_low, clip_fraction_high, approx_kl, entropy=None), float32, or
        float64 where a log-probability is. Fractions are over tokens, or over sequences where the ratio is
        a sequence's; approx_kl is over tokens. They cost no pass of their own.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is written.
    """
    logprobs = float_tensor("logprobs", logprobs)
    wide = any(
        isinstance(v, Tensor) and v.dtype is torch.float64
        for v in (logprobs, old_logprobs, ref_logprobs)
    )
    dtype = torch.float64 if wide else torch.float32
    if logprobs.dtype is not dtype:
        logprobs = logprobs.to(dtype)
    shape, packed = logprobs.shape, cu_seqlens is not None
    mask = mask_of(mask, "logprobs", logprobs, shape)
    cu_seqlens = _check_cu_seqlens(cu_seqlens, "logprobs", logprobs)
    tokens = _token_vectors(
        shape,
        dtype,
        logprobs,
        "logprobs",
        (old_logprobs, ref_logprobs, weights, advantages),
        packed,
    )
    sequences, length, _ = check_tokens(shape, dtype, logprobs, *tokens, cu_seqlens)
    how, divisor = policy_reduction(
        loss, reduction, torch.Size(sequences).numel(), None if packed else length,
        _optional("max_length", max_length), _optional("num_tokens", num_tokens),
    )  # fmt: skip
    floats = policy_numbers(
        scalar, loss, clip_low, clip_high, dual_clip, delta, kl_beta, tau_pos, tau_neg, divisor
    )
    codes = policy_codes(loss, policy_importance(loss, importance), kl, kl_times_ratio, how)
    args = (logprobs, mask, *tokens, cu_seqlens, *floats, *codes)
    if runs_eagerly("policy", logprobs):
        if not is_compiling():
            check_policy_numbers(ref_logprobs is not None, *floats)
            if cu_seqlens is not None and logprobs.is_cpu:
                check_offsets(cu_seqlens.tolist(), shape[0])
        value, metrics = _eager.policy_loss(*args)
    elif wants_gradient(logprobs):
        value, metrics = _Policy.apply(*args)
    else:
        value, metrics, _ = _FORWARD(*args)
    low, high, approx_kl = metrics.unbind()
    return PolicyOutput(value, low, high, approx_kl, None)


# ---- from logits -------------------------------------------------------------------------------


def check_one_pass(temperature: float, entropy_coef: float, codes: Any) -> None:
    """What the loss in one pass over logits asks of its numbers; codes: those of CODES."""
    check_temperature(temperature)
    require(-inf < entropy_coef < inf, "entropy_coef", entropy_coef, "finite")
    require(codes[1] == IMPORTANCE["token"], "importance", codes[1], "0 (token): one pass")
    require(codes[-1] != _NONE, "reduction", codes[-1], "1 to 5: one pass")


def _policy_logits(
    g: Tensor | None,
    logits: Tensor,
    actions: Tensor,
    tokens: Any,
    out: Tensor,
    numbers: Any,
    ignore_index: int,
    want_loss: bool,
) -> Any:
    temperature, entropy_coef, *floats = numbers[:10]
    codes = numbers[10:]
    rows, layout, out_rows, out_layout = gradient_rows(logits, actions, out)
    dtype = accumulator(logits.dtype)
    sequences, length, by_token = check_tokens(
        actions.shape, dtype, logits, *tokens, name="actions"
    )
    options = _options(floats, codes, tokens[1] is not None)
    check_one_pass(temperature, entropy_coef, codes)
    old, ref, weights, advantages, offsets = contiguous(*tokens)
    count = torch.Size(sequences).numel()
    loss = metrics = None
    if want_loss:
        loss, metrics = (
            advantages.new_empty(()),
            advantages.new_empty((4,)),
        )
    scratch = actions.new_empty((count + ROW_SUMS * actions.numel(),), dtype=torch.float64)
    actions = actions.contiguous()
    _POLICY_LOGITS(
        rows, layout, out_rows, out_layout, actions, actions.dtype is torch.int32, ignore_index,
        temperature, entropy_coef, offsets, offsets is not None and offsets.dtype is torch.int32, count,
        length, old, ref, weights, advantages, by_token, options,
        None if g is None else scalar_gradient(g, logits, dtype), loss, metrics, scratch,
    )  # fmt: skip
    write_back(out, out_rows)
    return loss, metrics


def _logits_forward_backward(logits: Tensor, actions: Tensor, *rest: Any) -> Any:
    return _policy_logits(
        None, logits, actions, rest[:5], rest[5], rest[6:-1], rest[-1], want_loss=True
    )


def _logits_forward_backward_fake(logits: Tensor, actions: Tensor, *rest: Any) -> Any:
    check_rows(logits, actions)
    dtype = accumulator(logits.dtype)
    check_tokens(actions.shape, dtype, logits, *rest[:5])
    return logits.new_empty((), dtype=dtype), logits.new_empty((4,), dtype=dtype)


def _logits_backward(g: Tensor, logits: Tensor, actions: Tensor, *rest: Any) -> None:
    _policy_logits(g, logits, actions, rest[:5], rest[5], rest[6:-1], rest[-1], want_loss=False)


_LOGITS = (
    f"Tensor logits, Tensor actions, {TOKENS}, Tensor(a!) out, float temperature, "
    f"float entropy_coef, {FLOATS}, {CODES}, int ignore_index"
)
# The gradient of the loss goes to `out` in the same visit of each row.
_LOGITS_FORWARD_BACKWARD = raw_op(
    f"policy_logits_forward_backward({_LOGITS}) -> (Tensor, Tensor)",
    run=_logits_forward_backward,
    fake=_logits_forward_backward_fake,
)
_LOGITS_BACKWARD = raw_op(
    f"policy_logits_backward(Tensor g, {_LOGITS}) -> ()",
    run=_logits_backward,
    fake=lambda *args: None,
)


class _PolicyFromLogits(torch.autograd.Function):
    """The gradient is made in the forward, while the row is in the cache."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, actions: Tensor, *rest: Any) -> Any:
        *tokens_and_numbers, inplace = rest
        tokens, numbers = tokens_and_numbers[:5], tokens_and_numbers[5:]
        out = ctx.gradient = gradient_buffer(logits, inplace)
        loss, metrics = _LOGITS_FORWARD_BACKWARD(logits, actions, *tokens, out, *numbers)
        if inplace:
            consumed(logits)
        ctx.save_for_backward(logits, actions, *tokens)
        ctx.actions, ctx.numbers, ctx.inplace, ctx.spent = actions, numbers, inplace, False
        ctx.backend = _backend.chosen
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        nothing = (None,) * (7 + len(ctx.numbers))
        if g is None:
            return None, *nothing
        out, ctx.gradient = ctx.gradient, None
        if out is not None:
            ctx.spent = ctx.inplace
            SCALE(out, ctx.actions, g, ctx.numbers[-1])
            return out, *nothing
        if ctx.spent:
            raise RuntimeError(SPENT)
        logits, actions, *tokens = ctx.saved_tensors
        out = gradient_buffer(logits, ctx.inplace)
        _LOGITS_BACKWARD(g, logits, actions, *tokens, out, *ctx.numbers)
        return out, *nothing


def _renamed(function: Any, *args: Any) -> Any:
    """Calls a function whose `targets` are our `actions`; its errors say so."""
    if is_compiling():
        return function(*args)
    try:
        return function(*args)
    except ValueError as error:
        text = str(error)
        if not text.startswith("targets: "):
            raise
        raise ValueError(text.replace("targets", "actions", 1)) from None


def policy_loss_from_logits(
    logits: Tensor,
    actions: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    entropy_coef: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
    loss: str = "ppo",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor | None = None,
    dual_clip: float | Tensor | None = None,
    delta: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_beta: float | Tensor = 0.0,
    kl: str = "k3",
    kl_times_ratio: bool = False,
    importance: str | None = None,
    reduction: str | None = None,
    max_length: int | None = None,
    num_tokens: float | Tensor | None = None,
    tau_pos: float | Tensor = 1.0,
    tau_neg: float | Tensor = 1.05,
    ignore_index: int = -100,
) -> PolicyOutput:
    """A policy-gradient loss from logits, the loss and their gradient in one pass over them.

        lp_t = z_t[a_t]/T - lse(z_t/T),    H_t = lse(z_t/T) - Σ_v p[v]·z_t[v]/T
        loss = policy_loss(lp, …) - entropy_coef · mean of H over the tokens that count
        dz_t = (1/T)·[ g_t·(1[a_t] - p) + (entropy_coef/N)·p·(log p + H_t) ],   g_t = d loss / d lp_t

    A token's g_t depends on its own log-probability alone, so that its row's gradient is written while the
    row is in the cache: one read and one write of memory in all, no float32 copy, no softmax. The backward
    only scales it where the upstream gradient is not 1 (in bfloat16 a second rounding). Two passes are made
    where a ratio is a sequence's (`gspo`, `luspo`, `rloo`, `vespo`, importance="sequence"), with
    reduction="none", in float16, under checkpointing and under `torch.compile`: the logits are then read
    once more in the backward.

    Args:
        logits: (…, T, V) or, with `cu_seqlens`, (tokens, V); float32, bfloat16, float16 or float64, any
            strides.
        actions: (…, T) or (tokens,), integers in [0, V) or `ignore_index`, aligned with the logits.
        entropy_coef: of the entropy bonus, for reduction="none" subtracted token by token.
        temperature: T > 0; `old_logprobs` and `ref_logprobs` are those of z/T, too.
        inplace: the gradient takes the logits' own storage; in one pass already in the forward. Under
            `torch.compile` it has no effect.
        mask: in the shape of actions, as in `policy_loss`; what is masked, or has the action
            `ignore_index`, is not read (NaN there does not matter) and gets exactly 0.
        the others: as in `policy_loss`.

    Returns:
        PolicyOutput, as `policy_loss`, with the mean entropy of the tokens that count, in nats.

    Raises:
        TypeError, ValueError: naming the argument; an action outside [0, V) included. Nothing is written.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: a tensor, not {type(logits).__name__}")
    actions = index_tensor("actions", actions, "logits", logits)
    check_rows(logits, actions, "actions")
    check_index("ignore_index", ignore_index)

    def one_pass(actions: Tensor, numbers: tuple[Any, ...], *rest: Any) -> tuple[Tensor, Tensor]:
        return _PolicyFromLogits.apply(logits, actions, *rest, *numbers, ignore_index, inplace)

    def statistics(actions: Tensor, temperature: Any) -> tuple[Tensor, Tensor]:
        lp, entropy, _ = token_logprobs(
            logits, actions, temperature=temperature, ignore_index=ignore_index, stats=True,
            inplace=inplace,
        )  # fmt: skip
        return lp, entropy

    in_one = (
        wants_gradient(logits)
        and not runs_eagerly("policy", logits)
        and gradient_in_forward(logits)
    )
    return policy_of_rows(
        "logits", logits, actions, one_pass if in_one else None, statistics, advantages=advantages,
        old_logprobs=old_logprobs, entropy_coef=entropy_coef, temperature=temperature, loss=loss, mask=mask,
        cu_seqlens=cu_seqlens, weights=weights, clip_low=clip_low, clip_high=clip_high,
        dual_clip=dual_clip, delta=delta, ref_logprobs=ref_logprobs, kl_beta=kl_beta, kl=kl,
        kl_times_ratio=kl_times_ratio, importance=importance, reduction=reduction,
        max_length=max_length, num_tokens=num_tokens, tau_pos=tau_pos, tau_neg=tau_neg,
        ignore_index=ignore_index,
    )  # fmt: skip


def policy_of_rows(
    name: str, rows: Tensor, actions: Tensor, one_pass: Any, statistics: Any, *, advantages: Any,
    old_logprobs: Any, entropy_coef: Any, temperature: Any, loss: str, mask: Any, cu_seqlens: Any,
    weights: Any, clip_low: Any, clip_high: Any, dual_clip: Any, delta: Any, ref_logprobs: Any,
    kl_beta: Any, kl: Any, kl_times_ratio: Any, importance: Any, reduction: Any, max_length: Any,
    num_tokens: Any, tau_pos: Any, tau_neg: Any, ignore_index: int,
) -> PolicyOutput:  # fmt: skip
    """What the losses from logits and from hidden states, `rows` of this `name`, have in common.

    one_pass(actions, (temperature, entropy_coef, *floats, *codes), *tokens, cu_seqlens) gives the loss
    and the four metrics where a token's gradient depends on its own row alone; None: never.
    statistics(actions, temperature) gives log-probabilities and entropies.
    """
    shape, packed, dtype = actions.shape, cu_seqlens is not None, accumulator(rows.dtype)
    mask = mask_of(mask, name, rows, shape)
    if mask is not None:
        if actions.dtype is torch.int32 and not -(2**31) <= ignore_index < 2**31:
            actions = actions.long()
        actions = torch.where(mask, actions, ignore_index)
    cu_seqlens = _check_cu_seqlens(cu_seqlens, name, rows)
    tokens = _token_vectors(
        shape, dtype, rows, name, (old_logprobs, ref_logprobs, weights, advantages), packed
    )
    sequences, length, _ = check_tokens(shape, dtype, rows, *tokens, cu_seqlens, name="actions")
    how, divisor = policy_reduction(
        loss, reduction, torch.Size(sequences).numel(), None if packed else length,
        _optional("max_length", max_length), _optional("num_tokens", num_tokens),
    )  # fmt: skip
    whose = policy_importance(loss, importance)
    temperature, entropy_coef = (
        scalar("temperature", temperature),
        scalar("entropy_coef", entropy_coef),
    )
    if one_pass is not None and whose == "token" and how != "none":
        floats = policy_numbers(
            scalar, loss, clip_low, clip_high, dual_clip, delta, kl_beta, tau_pos, tau_neg, divisor
        )
        codes = policy_codes(loss, whose, kl, kl_times_ratio, how)
        numbers = (temperature, entropy_coef, *floats, *codes)
        value, metrics = one_pass(actions, numbers, *tokens, cu_seqlens)
        return PolicyOutput(value, *metrics.unbind())
    if not isinstance(entropy_coef, Tensor):
        require(-inf < entropy_coef < inf, "entropy_coef", entropy_coef, "finite")
    logprobs, entropy = _renamed(statistics, actions, temperature)
    old, ref, weights, advantages = tokens
    keep = actions != ignore_index
    out = policy_loss(
        logprobs, advantages=advantages, old_logprobs=old, loss=loss, mask=keep, cu_seqlens=cu_seqlens,
        weights=weights, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, delta=delta,
        ref_logprobs=ref, kl_beta=kl_beta, kl=kl, kl_times_ratio=kl_times_ratio, importance=importance,
        reduction=reduction, max_length=max_length, num_tokens=num_tokens, tau_pos=tau_pos,
        tau_neg=tau_neg,
    )  # fmt: skip
    mean = mean_entropy(entropy, keep)
    value = out.loss
    if isinstance(entropy_coef, Tensor) or entropy_coef != 0.0:
        value = value - entropy_coef * (entropy if how == "none" else mean)
    return PolicyOutput(value.to(dtype), *out[1:4], mean.detach())


def mean_entropy(entropy: Tensor, keep: Tensor) -> Tensor:
    """Over the tokens that count; in order and in float64, whatever the number of threads."""
    return sequence_logprobs(entropy.reshape(-1)) / keep.sum().clamp(min=1)


# ---- torch.ops.finefuse ------------------------------------------------------------------------

_OPTIONS = (
    "Tensor advantages, Tensor? old_logprobs=None, {logits}str loss='ppo', Tensor? mask=None, "
    "Tensor? cu_seqlens=None, Tensor? weights=None, float clip_low=0.2, float? clip_high=None, "
    "float? dual_clip=None, float? delta=None, Tensor? ref_logprobs=None, float kl_beta=0.0, "
    "str kl='k3', bool kl_times_ratio=False, str? importance=None, str? reduction=None, "
    "int? max_length=None, float? num_tokens=None, float tau_pos=1.0, float tau_neg=1.05"
)
composite(
    f"policy_loss(Tensor logprobs, *, {_OPTIONS.format(logits='')}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    lambda logprobs, **options: tuple(policy_loss(logprobs, **options))[:4],
)
composite(
    "policy_loss_from_logits(Tensor logits, Tensor actions, *, "
    + _OPTIONS.format(logits="float entropy_coef=0.0, float temperature=1.0, ")
    + ", int ignore_index=-100) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    policy_loss_from_logits,
)
