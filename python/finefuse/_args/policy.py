"""Policy-gradient losses and advantages: their names, and what their arguments may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

from . import choice, require

# csrc/ops/policy.h, enums; csrc/ops/policy_table.h has the formulas.
SURROGATES = {"clipped": 0, "reinforce": 1, "cispo": 2, "sapo": 3, "vespo": 4}
IMPORTANCE = {"token": 0, "mean": 1, "sum": 2, "whole": 3}
KL = {"k1": 0, "k2": 1, "k3": 2}
POLICY_REDUCTIONS = {
    "none": 0, "sum": 1, "tokens": 2, "sequences": 3, "sequence_sums": 4, "divisor": 5,
}  # fmt: skip
# Of the scratch: numbers a sequence, numbers a row of logits, values that one number stands for.
SEQUENCE_SUMS, ROW_SUMS, VALUE_BLOCK = 5, 4, 4096

TOKEN_NAMES = ("old_logprobs", "ref_logprobs", "weights", "advantages")


class PolicyLoss(NamedTuple):
    """A policy-gradient loss: a surrogate of the ratio, what the ratio is over, how tokens add up."""

    surrogate: str
    importance: str
    reduction: str  # of POLICY_REDUCTIONS; the divisor: "max_length" or "num_tokens"
    clip_high: float = 0.2


POLICY_LOSSES = {
    "reinforce": PolicyLoss("reinforce", "token", "tokens"),
    "rloo": PolicyLoss("clipped", "whole", "sequence_sums"),
    "ppo": PolicyLoss("clipped", "token", "tokens"),
    "grpo": PolicyLoss("clipped", "token", "sequences"),
    "bnpo": PolicyLoss("clipped", "token", "tokens"),
    "dr_grpo": PolicyLoss("clipped", "token", "max_length"),
    "dapo": PolicyLoss("clipped", "token", "num_tokens"),
    "luspo": PolicyLoss("clipped", "mean", "sequence_sums"),
    "gspo": PolicyLoss("clipped", "mean", "sequences"),
    "cispo": PolicyLoss("cispo", "token", "num_tokens", clip_high=5.0),
    "sapo": PolicyLoss("sapo", "token", "sequences"),
    "vespo": PolicyLoss("vespo", "sum", "num_tokens"),
}


def policy_loss_named(loss: Any) -> PolicyLoss:
    if not isinstance(loss, str) or loss not in POLICY_LOSSES:
        choice("loss", loss, dict.fromkeys(POLICY_LOSSES, 0))
    return POLICY_LOSSES[loss]


def policy_importance(loss: str, importance: Any) -> str:
    """Whose ratio, of IMPORTANCE: the loss's own or what `importance` says."""
    own = policy_loss_named(loss).importance
    if importance is None:
        return own
    choice("importance", importance, {"token": 0, "sequence": 1})
    if own in ("sum", "whole"):
        if importance == "token":
            raise ValueError(f"importance: 'token'; loss={loss!r} is of the sequence's ratio")
        return own
    return "token" if importance == "token" else "mean"


def policy_reduction(
    loss: str, reduction: Any, sequences: int, length: int | None, max_length: Any, num_tokens: Any
) -> tuple[str, Any]:
    """(of POLICY_REDUCTIONS, divisor); `length` of the rows, None for packed sequences.

    The loss's own reduction (None), "none", "sum", "mean" (over tokens), or another loss's.
    """
    kind = policy_loss_named(loss).reduction
    if reduction is not None:
        own = {name: known.reduction for name, known in POLICY_LOSSES.items()}
        kinds = {"none": "none", "sum": "sum", "mean": "tokens", **own}
        choice("reduction", reduction, dict.fromkeys(kinds, 0))
        kind = kinds[reduction]
    for name, value in (("max_length", max_length), ("num_tokens", num_tokens)):
        if isinstance(value, (int, float)):
            require(0 <= value < inf, name, value, "0 and above, or None")
    if kind == "max_length":
        longest = length if max_length is None else max_length
        if longest is None:
            raise ValueError(
                f"max_length: None; reduction {reduction or loss!r} of packed sequences needs it"
            )
        return "divisor", longest * sequences
    if kind == "num_tokens":
        return ("tokens", 1.0) if num_tokens is None else ("divisor", num_tokens)
    return kind, 1.0


def policy_numbers(
    scalar: Callable[[str, Any], Any], loss: str, clip_low: Any, clip_high: Any, dual_clip: Any,
    delta: Any, kl_beta: Any, tau_pos: Any, tau_neg: Any, divisor: Any,
) -> list[Any]:  # fmt: skip
    """The numbers in the kernels' order, defaults filled in; `scalar` is the door's own."""
    named = {
        "clip_low": clip_low,
        "clip_high": policy_loss_named(loss).clip_high if clip_high is None else clip_high,
        "dual_clip": inf if dual_clip is None else dual_clip,
        "delta": inf if delta is None else delta,
        "kl_beta": kl_beta,
        "tau_pos": tau_pos,
        "tau_neg": tau_neg,
        "num_tokens, max_length": divisor,
    }
    return [scalar(name, value) for name, value in named.items()]


def policy_codes(
    loss: str, importance: str, kl: Any, kl_times_ratio: Any, reduction: str
) -> tuple[int, int, int, bool, int]:
    return (
        SURROGATES[policy_loss_named(loss).surrogate], IMPORTANCE[importance], choice("kl", kl, KL),
        bool(kl_times_ratio), POLICY_REDUCTIONS[reduction],
    )  # fmt: skip


def check_policy_numbers(
    has_ref: bool, clip_low: float, clip_high: float, dual_clip: float, delta: float, kl_beta: float,
    tau_pos: float, tau_neg: float, divisor: float,
) -> None:  # fmt: skip
    """The ranges of the numbers of a policy loss; dual_clip and delta are inf where there is none."""
    require(0.0 <= clip_low < inf, "clip_low", clip_low, "0 and above")
    require(0.0 <= clip_high < inf, "clip_high", clip_high, "0 and above")
    require(dual_clip > 1.0, "dual_clip", dual_clip, "above 1, or None")
    require(delta > 0.0, "delta", delta, "positive, or None")
    require(-inf < kl_beta < inf, "kl_beta", kl_beta, "finite")
    require(0.0 < tau_pos < inf, "tau_pos", tau_pos, "positive and finite")
    require(0.0 < tau_neg < inf, "tau_neg", tau_neg, "positive and finite")
    require(0.0 <= divisor < inf, "num_tokens, max_length", divisor, "0 and above")
    if kl_beta != 0.0 and not has_ref:
        raise ValueError(f"kl_beta: {kl_beta!r}; it needs ref_logprobs")


def advantages_by_token(
    shape: Sequence[int], advantages: Sequence[int], packed: int | None, name: str = "advantages"
) -> bool:
    """Whether there is one a token, rather than one a sequence; `packed`: the number of sequences."""
    shape, given = tuple(shape), tuple(advantages)
    if given == shape:
        return True
    sequences = shape[:-1] if packed is None else (packed,)
    if given not in (sequences, (*sequences, 1)):
        raise ValueError(
            f"{name}: shape {given}; allowed: {shape}, {sequences} or {(*sequences, 1)}"
        )
    return False


def check_group_size(count: int, group_size: Any) -> None:
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size: an int, not {group_size!r}")
    require(group_size >= 1, "group_size", group_size, "1 and above")
    if count % group_size:
        raise ValueError(f"group_size: {group_size}; {count} rewards are no multiple of it")


ADVANTAGE_SCALES = {"none": 0, "group": 1, "batch": 2}
BASELINES = {"mean": 0, "leave_one_out": 1}


def check_gae(rewards: Sequence[int], values: Sequence[int], mask: Sequence[int] | None) -> bool:
    """The shapes of rewards (…, T), values (…, T) or (…, T + 1), mask (…, T); whether the latter."""
    if len(rewards) == 0:
        raise ValueError("rewards: a scalar; allowed: (…, T)")
    longer = (*rewards[:-1], rewards[-1] + 1)
    if tuple(values) not in (tuple(rewards), longer):
        raise ValueError(
            f"values: shape {tuple(values)}; allowed: {tuple(rewards)} or, with the value after the "
            f"end, {longer}"
        )
    if mask is not None and tuple(mask) != tuple(rewards):
        raise ValueError(f"mask: shape {tuple(mask)}; allowed: {tuple(rewards)}")
    return tuple(values) == longer


def check_discounts(gamma: Any, lam: Any) -> None:
    require(0.0 <= gamma <= 1.0, "gamma", gamma, "0 to 1")
    require(0.0 <= lam <= 1.0, "lam", lam, "0 to 1")
