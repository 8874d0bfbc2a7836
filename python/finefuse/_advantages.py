"""What a policy loss takes of rewards and values: the value loss, advantages of groups and of time steps."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._args import choice, require
from ._args.policy import (
    ADVANTAGE_SCALES,
    BASELINES,
    VALUE_BLOCK,
    check_discounts,
    check_gae,
    check_group_size,
)
from ._op import (
    WIDE,
    accumulator,
    composite,
    contiguous,
    float_tensor,
    is_compiling,
    kernel,
    mask_of,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
    scaled,
    wants_gradient,
)
from .eager import policy as _eager

_VALUE_LOSS = kernel("policy", "value_loss")
_GROUP_ADVANTAGES = kernel("policy", "group_advantages")
_GAE = kernel("policy", "gae")


def _real(name: str, value: Any) -> Tensor:
    """float32 or float64; integers and bool, as of rewards that are right or wrong, too."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: a tensor, not {type(value).__name__}")
    if value.is_complex():
        raise TypeError(f"{name}: dtype {value.dtype}; allowed: float, integer or bool")
    value = value.detach()
    return value if value.dtype in WIDE else value.float()


# ---- value_loss ------------------------------------------------------------------------------------


def _check_values(values: Tensor, returns: Tensor, old_values: Any, mask: Any) -> None:
    if values.dtype not in WIDE:
        raise TypeError(f"values: dtype {values.dtype}; allowed: float32, float64")
    for name, x in (("returns", returns), ("old_values", old_values), ("mask", mask)):
        if x is None:
            continue
        wanted = torch.bool if name == "mask" else values.dtype
        if x.shape != values.shape or x.dtype is not wanted:
            raise ValueError(
                f"{name}: {tuple(x.shape)} {x.dtype}; allowed: {tuple(values.shape)} {wanted}"
            )
        same_device(name, x, "values", values)


def _value_forward(
    values: Tensor, returns: Tensor, old_values: Tensor | None, mask: Tensor | None, clip: float
) -> tuple[Tensor, Tensor]:
    _check_values(values, returns, old_values, mask)
    require(clip >= 0.0, "clip", clip, "0 and above, or None")
    out, total = values.new_empty(()), values.numel()
    gradient = torch.empty_like(values, memory_format=torch.contiguous_format)
    blocks = (total + VALUE_BLOCK - 1) // VALUE_BLOCK
    scratch = values.new_empty((2 * blocks,), dtype=torch.float64)
    given = contiguous(values, returns, old_values, mask)
    _VALUE_LOSS(
        given[0], values.dtype is torch.float64, total, *given[1:], clip, out, gradient, scratch
    )
    return out, gradient


def _value_fake(values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check_values(values, *rest[:3])
    return values.new_empty(()), values.new_empty(values.shape)


_VALUE_FORWARD = raw_op(
    "value_loss_forward(Tensor values, Tensor returns, Tensor? old_values, Tensor? mask, float clip)"
    " -> (Tensor, Tensor)",
    run=_value_forward,
    fake=_value_fake,
)


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, *rest: Any) -> Tensor:
        out, gradient = _VALUE_FORWARD(values, *rest)
        ctx.save_for_backward(gradient, rest[2], values)
        ctx.backend = _backend.chosen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        gradient, mask, _ = ctx.saved_tensors
        return scaled(gradient, mask, g), None, None, None, None


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    *,
    clip: float | Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The value function's loss in PPO, its mean over the tokens that count.

        ½·max((v - R)², (clip(v, v_old - c, v_old + c) - R)²)       without `clip`: ½·(v - R)²

    Args:
        values: v, any shape and float type, computed in float64. The only argument that gets a gradient.
        returns: R, in the shape of values. old_values: v_old, the same; needed by `clip`.
        clip: c ≥ 0, a number or a 0-d tensor. None: not clipped.
        mask: in the shape of values, bool or a number that is not 0 where a token counts. The others are
            not read and pass exactly 0 back.

    Returns:
        A scalar, float32 (float64 for float64 values); 0 where no token counts.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: the PPO reference implementation; arXiv:2006.05990 has both forms.
    """
    values = float_tensor("values", values)
    if clip is not None and old_values is None:
        raise ValueError("clip: it needs old_values")
    dtype = accumulator(values.dtype)
    mask = mask_of(mask, "values", values, values.shape)
    given: Any = [values.to(dtype)]
    for name, x in (("returns", returns), ("old_values", None if clip is None else old_values)):
        if x is not None or name == "returns":
            x = float_tensor(name, x).detach().to(dtype)
            same_device(name, x, "values", values)
        given.append(x)
    given.append(mask)
    limit = scalar("clip", inf if clip is None else clip)
    _check_values(*given)
    if runs_eagerly("policy", values):
        if not is_compiling():
            require(limit >= 0.0, "clip", limit, "0 and above, or None")
        return _eager.value_loss(limit, *given)
    if wants_gradient(values):
        return _ValueLoss.apply(*given, limit)
    return _VALUE_FORWARD(*given, limit)[0]


composite(
    "value_loss(Tensor values, Tensor returns, Tensor? old_values=None, *, float? clip=None, "
    "Tensor? mask=None) -> Tensor",
    value_loss,
)


# ---- group_advantages ------------------------------------------------------------------------------


def _advantages_forward(rewards: Tensor, group_size: int, scale: int, baseline: int) -> Tensor:
    if rewards.dtype not in WIDE:
        raise TypeError(f"rewards: dtype {rewards.dtype}; allowed: float32, float64")
    check_group_size(rewards.numel(), group_size)
    require(scale in ADVANTAGE_SCALES.values(), "scale", scale, "0 to 2")
    require(baseline in BASELINES.values(), "baseline", baseline, "0, 1")
    out = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    _GROUP_ADVANTAGES(
        rewards.contiguous(), rewards.dtype is torch.float64, rewards.numel() // group_size, group_size,
        scale, baseline == BASELINES["leave_one_out"], out,
    )  # fmt: skip
    return out


_ADVANTAGES_FORWARD = raw_op(
    "group_advantages_forward(Tensor rewards, int group_size, int scale, int baseline) -> Tensor",
    run=_advantages_forward,
    fake=lambda rewards, *rest: rewards.new_empty(rewards.shape),
)


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: str = "group", baseline: str = "mean"
) -> Tensor:
    """Advantages of completions relative to the others of the same prompt: GRPO, RLOO.

        A = (r - mean of the group) / (standard deviation + 1e-4)

    Args:
        rewards: groups of `group_size` in a row, any shape; a reward that is NaN is left out and gets 0.
        group_size: completions a prompt.
        scale: "group" (by the standard deviation of the group, one degree of freedom removed; 0 for a
            single reward), "batch" (by that of all rewards) or "none" (Dr. GRPO: not divided).
        baseline: "mean" of the group, or "leave_one_out": the mean of the others (RLOO); a group of one
            gets 0.

    Returns:
        In the shape of rewards, float32 (float64 for float64); no gradient.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: arXiv:2402.03300 section 4.1; arXiv:2402.14740 eq. 7; arXiv:2503.20783.
    """
    rewards = _real("rewards", rewards)
    check_group_size(rewards.numel(), group_size)
    codes = choice("scale", scale, ADVANTAGE_SCALES), choice("baseline", baseline, BASELINES)
    if runs_eagerly("policy", rewards):
        return _eager.group_advantages(rewards, group_size, scale, baseline)
    return _ADVANTAGES_FORWARD(rewards, group_size, *codes)


composite(
    "group_advantages(Tensor rewards, int group_size, *, str scale='group', str baseline='mean') -> "
    "Tensor",
    group_advantages,
)


# ---- gae -------------------------------------------------------------------------------------------


def _check_gae(rewards: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    if rewards.dtype not in WIDE or values.dtype is not rewards.dtype:
        raise TypeError(
            f"rewards, values: {rewards.dtype}, {values.dtype}; allowed: both float32 or float64"
        )
    same_device("values", values, "rewards", rewards)
    if mask is not None:
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask: dtype {mask.dtype}; allowed: bool")
        same_device("mask", mask, "rewards", rewards)
    return check_gae(rewards.shape, values.shape, None if mask is None else mask.shape)


def _gae_forward(
    rewards: Tensor, values: Tensor, mask: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    bootstrap = _check_gae(rewards, values, mask)
    check_discounts(gamma, lam)
    given = contiguous(rewards, values, mask)
    advantages, returns = torch.empty_like(given[0]), torch.empty_like(given[0])
    _GAE(
        given[0], rewards.dtype is torch.float64, rewards.shape[:-1].numel(), rewards.shape[-1],
        given[1], bootstrap, given[2], gamma, lam, advantages, returns,
    )  # fmt: skip
    return advantages, returns


def _gae_fake(rewards: Tensor, values: Tensor, mask: Tensor | None, *rest: Any) -> Any:
    _check_gae(rewards, values, mask)
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


_GAE_FORWARD = raw_op(
    "gae_forward(Tensor rewards, Tensor values, Tensor? mask, float gamma, float lam) -> "
    "(Tensor, Tensor)",
    run=_gae_forward,
    fake=_gae_fake,
)


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns.

        δ_t = r_t + γ·v_{t+1} - v_t,    A_t = δ_t + γλ·A_{t+1},    return_t = A_t + v_t

    Args:
        rewards: (…, T). values: (…, T), with v after the end 0, or (…, T + 1), which has it.
        gamma, lam: γ and λ in [0, 1], numbers or 0-d tensors.
        mask: (…, T), bool or a number that is not 0 where a token counts. The others are left out, as if
            their neighbours stood side by side: not read, and 0 in both results.

    Returns:
        (advantages, returns), (…, T), float32 (float64 where one of the two inputs is); no gradient.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: arXiv:1506.02438 eq. 16.
    """
    rewards, values = _real("rewards", rewards), _real("values", values)
    if rewards.dtype is not values.dtype:
        rewards, values = rewards.double(), values.double()
    mask = mask_of(mask, "rewards", rewards, rewards.shape)
    _check_gae(rewards, values, mask)
    numbers = scalar("gamma", gamma), scalar("lam", lam)
    if runs_eagerly("policy", rewards):
        if not is_compiling():
            check_discounts(*numbers)
        return _eager.gae(rewards, values, mask, *numbers)
    advantages, returns = _GAE_FORWARD(rewards, values, mask, *numbers)
    return advantages, returns


composite(
    "gae(Tensor rewards, Tensor values, *, float gamma, float lam, Tensor? mask=None) -> "
    "(Tensor, Tensor)",
    gae,
)
