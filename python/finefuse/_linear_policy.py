"""Policy-gradient losses from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._args import check_temperature
from ._linear_gradients import (
    GRADIENTS,
    WANTED,
    gradients_fake,
    made_in_forward,
    rows_of,
    save_gradients,
    scaled_gradients,
)
from ._linear_head import HEAD, HEAD_ARGUMENTS, call_of, check_head, head_of
from ._linear_logprobs import BACKWARD, token_logprobs_of
from ._linear_loss import Rows, part_of, put, walk
from ._op import (
    accumulator,
    check_targets,
    composite,
    is_compiling,
    once_differentiable,
    raw_op,
    runs_eagerly,
    wants_gradient,
)
from .logprobs import logprobs_rows, logprobs_rows_backward
from .policy import (
    CODES,
    FLOATS,
    TOKENS,
    PolicyOutput,
    check_one_pass,
    check_tokens,
    mean_entropy,
    policy_of_rows,
    policy_tokens,
)

# ---- raw op ------------------------------------------------------------------------------------


def _split(args: Sequence[Any]) -> tuple[Any, ...]:
    """head, actions, the five of TOKENS, (temperature, entropy_coef), floats and codes, the rest."""
    head, actions, tokens = args[:HEAD_ARGUMENTS], args[HEAD_ARGUMENTS], args[HEAD_ARGUMENTS + 1 :]
    return head, actions, tokens[:5], tokens[5:7], tokens[7:20], tokens[20:]


def _vectors(hidden: Tensor, *args: Any) -> list[Tensor]:
    """Checked: loss, metrics; by lp and by entropy of each token. All but the gradients."""
    head, actions, tokens, *_ = _split(args)
    check_head(hidden, head)
    dtype, count = accumulator(hidden.dtype), actions.numel()
    if count != hidden.shape[0]:
        raise ValueError(
            f"actions: shape {tuple(actions.shape)}; hidden has {hidden.shape[0]} rows"
        )
    check_tokens(actions.shape, dtype, hidden, *tokens, name="actions")
    return [hidden.new_empty(shape, dtype=dtype) for shape in ((), (4,), (2, count))]


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    loss, metrics, coefficients = _vectors(hidden, *args)
    head, *_, (_, *wanted) = _split(args)
    return loss, metrics, *gradients_fake(hidden, head[-2], wanted), coefficients


def _forward_backward(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """loss, metrics, gradients; those by lp and by entropy of each token.

    A chunk's coefficients are those of the batch's loss from the log-probabilities known so far: a
    token's depends on its own alone.
    """
    head_args, actions, tokens, (temperature, entropy_coef), numbers, (ignore_index, *wanted) = (
        _split(args)
    )
    coefficients = _vectors(hidden, *args)[-1]
    head = head_of(hidden, head_args)
    check_one_pass(temperature, entropy_coef, numbers[8:])
    check_targets(actions, head.vocab, ignore_index, "actions")
    shape, flat = actions.shape, actions.reshape(-1)
    counts = flat != ignore_index
    mask = counts.view(shape)
    lp = coefficients.new_zeros(len(flat))
    entropy = torch.zeros_like(lp)
    coefficients[0] = 0
    coefficients[1] = counts * (-entropy_coef / counts.sum().clamp(min=1).double())
    (rows_hidden,), parts = rows_of(head, counts, hidden)

    def kernel(z: Tensor, rows: Rows) -> bool:
        y = part_of(flat, rows)
        logprob, h, _, stats = logprobs_rows(z, y, temperature, ignore_index, True, True)
        put(lp, rows, logprob)
        put(entropy, rows, h)
        by_lp = policy_tokens(None, lp.view(shape), mask, tokens, numbers, False)[2].view(-1)
        put(coefficients[0], rows, part_of(by_lp, rows))
        g, h = (part_of(c, rows) for c in coefficients)
        logprobs_rows_backward(
            z, y, stats, g, None if entropy_coef == 0.0 else h, None, z, temperature, ignore_index
        )
        return True

    gradients = walk(head, rows_hidden, parts, kernel, wanted)
    loss, metrics, _ = policy_tokens(None, lp.view(shape), mask, tokens, numbers, True)
    assert loss is not None
    assert metrics is not None
    mean = mean_entropy(entropy, counts)
    if entropy_coef != 0.0:
        loss = loss - entropy_coef * mean
    return loss, torch.cat((metrics, mean.reshape(1))), *gradients, coefficients


_FORWARD_BACKWARD = raw_op(
    f"linear_policy_forward_backward(Tensor hidden, {HEAD}, Tensor actions, {TOKENS}, "
    f"float temperature, float entropy_coef, {FLOATS}, {CODES}, int ignore_index, {WANTED}) -> "
    f"(Tensor, Tensor, {GRADIENTS}, Tensor)",
    run=_forward_backward,
    fake=_fake,
)


# ---- autograd and the public function ----------------------------------------------------------


class _Policy(torch.autograd.Function):
    """All gradients are made in the forward; a second backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
        loss, metrics, *made, coefficients = _FORWARD_BACKWARD(
            hidden, weight, bias, *rest, *ctx.needs_input_grad[:3]
        )
        save_gradients(ctx, (hidden, weight, bias, *rest[:6], rest[10], coefficients), made)
        ctx.numbers, (ctx.temperature, ctx.entropy_coef) = rest[6:10], rest[16:18]
        ctx.ignore_index, ctx.arguments = rest[-1], len(rest)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        nothing = (None,) * ctx.arguments
        if g is None:
            return (None, None, None, *nothing)

        def rows_with_gradient(*saved: Any) -> tuple[Tensor, int]:
            return saved[9].reshape(-1), ctx.ignore_index

        def recompute(*saved: Any) -> Any:
            *head, actions, coefficients = saved
            by_lp, by_entropy = coefficients * g
            bonus = isinstance(ctx.entropy_coef, Tensor) or ctx.entropy_coef != 0.0
            return BACKWARD(
                by_lp, by_entropy if bonus else None, None, *head, *ctx.numbers, actions.reshape(-1),
                ctx.temperature, ctx.ignore_index, *ctx.needs_input_grad[:3],
            )  # fmt: skip

        return (*scaled_gradients(ctx, g, rows_with_gradient, recompute), *nothing)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_coef: float | Tensor = 0.0,
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
    """A policy-gradient loss from hidden states; the logits never exist all at once.

        z = hidden Wᵀ + b,    with a softcap c·tanh(z/c);    then as `policy_loss_from_logits`

    Where a token's gradient depends on its own log-probability alone, all gradients are made in the
    forward, while a chunk of logits is there: 6·N·H·V operations in all for N tokens that count
    (4·N·H·V where the weight is frozen). Where a ratio is a sequence's (`gspo`, `luspo`, `rloo`, `vespo`,
    importance="sequence"), with reduction="none", in float16 and under checkpointing the backward makes
    the logits again: 8·N·H·V. Memory: the gradients and one chunk.

    Args:
        hidden: (…, T, H) or, with `cu_seqlens`, (tokens, H). hidden, weight, bias, softcap: as in
            `linear_token_logprobs`.
        actions: (…, T) or (tokens,), integers in [0, V) or `ignore_index`, aligned with hidden.
        the others: as in `policy_loss_from_logits`.

    Returns:
        PolicyOutput, as `policy_loss_from_logits`; `loss` is differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: naming the argument; an action outside [0, V) included.
    """
    call = call_of(hidden, weight, bias, softcap)
    actions = call.indices("actions", actions, ignore_index)

    def one_pass(actions: Tensor, numbers: tuple[Any, ...], *tokens: Any) -> tuple[Tensor, Tensor]:
        return _Policy.apply(
            call.hidden, *call.arguments(), actions, *tokens, *numbers, ignore_index
        )

    def statistics(actions: Tensor, temperature: Any) -> tuple[Tensor, Tensor]:
        if not is_compiling():
            check_temperature(temperature)
        lp, entropy, _ = token_logprobs_of(call, actions, temperature, ignore_index, True)
        return lp, entropy

    in_one = (
        wants_gradient(call.hidden, call.weight, call.bias)
        and not runs_eagerly("linear", call.hidden)
        and made_in_forward(call.hidden)
    )
    return policy_of_rows(
        "hidden", call.hidden, actions, one_pass if in_one else None, statistics, advantages=advantages,
        old_logprobs=old_logprobs, entropy_coef=entropy_coef, temperature=temperature, loss=loss, mask=mask,
        cu_seqlens=cu_seqlens, weights=weights, clip_low=clip_low, clip_high=clip_high,
        dual_clip=dual_clip, delta=delta, ref_logprobs=ref_logprobs, kl_beta=kl_beta, kl=kl,
        kl_times_ratio=kl_times_ratio, importance=importance, reduction=reduction,
        max_length=max_length, num_tokens=num_tokens, tau_pos=tau_pos, tau_neg=tau_neg,
        ignore_index=ignore_index,
    )  # fmt: skip


composite(
    "linear_policy_loss(Tensor hidden, Tensor weight, Tensor actions, *, Tensor advantages, "
    "Tensor? old_logprobs=None, Tensor? bias=None, float? softcap=None, float temperature=1.0, "
    "float entropy_coef=0.0, str loss='ppo', Tensor? mask=None, Tensor? cu_seqlens=None, "
    "Tensor? weights=None, float clip_low=0.2, float? clip_high=None, float? dual_clip=None, "
    "float? delta=None, Tensor? ref_logprobs=None, float kl_beta=0.0, str kl='k3', "
    "bool kl_times_ratio=False, str? importance=None, str? reduction=None, int? max_length=None, "
    "float? num_tokens=None, float tau_pos=1.0, float tau_neg=1.05, int ignore_index=-100) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    linear_policy_loss,
)
