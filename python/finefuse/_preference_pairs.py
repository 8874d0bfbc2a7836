"""Preference losses from vectors of sequence log-probabilities: the raw ops and their autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._args import REDUCTIONS, require
from ._args.preference import (
    INPUT_NAMES,
    PREFERENCE_LOSSES,
    PREFERENCE_NUMBERS,
    SHAPED_LIKE,
    SORTING,
    PreferenceInputs,
    PreferenceOptions,
    preference_binding,
    preference_shapes,
)
from ._op import contiguous, kernel, once_differentiable, raw_op, same_device

_PREFERENCE = kernel("preference", "preference")

_ORDER_NAMES = PreferenceInputs._fields[len(INPUT_NAMES) :]
_INPUTS = len(PreferenceInputs._fields)
_UNPAIRED = {named.code for named in PREFERENCE_LOSSES.values() if named.unpaired}
NONE = REDUCTIONS["none"]


def check_inputs(inputs: Sequence[Tensor | None]) -> None:
    """Raise what is wrong with types, devices and the shapes of single inputs, if anything is."""
    chosen, rejected = inputs[0], inputs[1]
    if chosen is None or rejected is None:
        raise TypeError(f"{'chosen' if chosen is None else 'rejected'}: a tensor, not None")
    dtype = chosen.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        raise TypeError(f"chosen: dtype {dtype}; allowed: float32, float64")
    on_cpu = chosen.is_cpu
    for i in range(1, 9):
        value = inputs[i]
        if value is None:
            continue
        if value.dtype is not dtype:
            raise TypeError(f"{INPUT_NAMES[i]}: dtype {value.dtype}; chosen has {dtype}")
        if 1 < i < 6:
            like = rejected if SHAPED_LIKE[i] else chosen
            if value.shape != like.shape:
                raise ValueError(
                    f"{INPUT_NAMES[i]}: shape {tuple(value.shape)}; {INPUT_NAMES[SHAPED_LIKE[i]]} has "
                    f"{tuple(like.shape)}"
                )
        if not (on_cpu and value.is_cpu):
            same_device(INPUT_NAMES[i], value, "chosen", chosen)
    nll = inputs[7]
    if nll is not None and nll.numel() != 1:
        raise ValueError(f"chosen_nll: shape {tuple(nll.shape)}; allowed: one element")
    for name, order in zip(_ORDER_NAMES, inputs[9:], strict=True):
        if order is None:
            continue
        if order.dtype is not torch.int64 or order.shape != (2, chosen.numel()):
            raise ValueError(
                f"{name}: {tuple(order.shape)} {order.dtype}; allowed: (2, {chosen.numel()}) int64"
            )
        same_device(name, order, "chosen", chosen)


def _sizes(inputs: Sequence[Any], want_ref: bool) -> list[int]:
    """Of the gradients by chosen, by rejected, by their reference and by chosen_nll, in one array."""
    sizes = [inputs[0].numel(), inputs[1].numel()]
    if want_ref:
        sizes += sizes
    if inputs[7] is not None:
        sizes.append(1)
    return sizes


@lru_cache(maxsize=64)
def _bound(
    loss_weights: Any,
    has_lengths: tuple[bool, bool],
    has_nll: bool,
    codes: tuple[int, ...],
    *rest: Any,
) -> tuple[Any, bool]:
    """(options as the kernels take them, whether each loss is of pairs and has its tensors)."""
    by_length, divergence, nll_by_length, reduction, *numbers = rest
    options = PreferenceOptions._make(
        (codes, by_length, loss_weights, *numbers, divergence, nll_by_length, reduction)
    )
    simple = not any(code in codes for code in (*_UNPAIRED, *SORTING))
    return preference_binding(options, has_lengths, has_nll), simple


def preference_pairs(upstream: Tensor | None, args: Any, want_loss: bool) -> tuple[Any, ...]:
    """out, chosen_rewards, rejected_rewards, margins, accuracy, gradients (see _sizes)."""
    inputs, loss_weights = args[:_INPUTS], args[_INPUTS]
    codes, by_length, divergence, nll_by_length, reduction, want_ref = args[-6:]
    check_inputs(inputs)
    chosen, rejected, _, _, n_w, n_l, weights, nll, kl, *orders = inputs
    options, simple = _bound(
        None if loss_weights is None else tuple(loss_weights.tolist()),
        (n_w is not None, n_l is not None), nll is not None, tuple(codes), tuple(by_length), divergence,
        nll_by_length, reduction, *args[_INPUTS + 1 : -6],
    )  # fmt: skip
    shape = margins_shape = chosen.shape
    if not simple or weights is not None or rejected.shape != shape:
        of_weights = None if weights is None else weights.shape
        shape, margins_shape = preference_shapes(
            codes, reduction, shape, rejected.shape, of_weights
        )
        for code, name, order in zip(SORTING, _ORDER_NAMES, orders, strict=True):
            if order is None and code in codes:
                raise TypeError(f"{name}: a tensor, not None")
    given = contiguous(*inputs)
    count, other = chosen.numel(), rejected.numel()
    pairs = count + other
    gradient = chosen.new_empty(pairs * (2 if want_ref else 1) + (nll is not None))
    out = chosen_rewards = rejected_rewards = margins = accuracy = None
    if want_loss:
        accuracy = chosen.new_empty(())  # empty_like is the cheaper of the two
        out = torch.empty_like(accuracy) if reduction else chosen.new_empty(shape)
        chosen_rewards = torch.empty_like(given[0])
        rejected_rewards = torch.empty_like(given[1])
        margins = torch.empty_like(given[0] if margins_shape == chosen.shape else accuracy)
    _PREFERENCE(
        *given[:9], 0 if kl is None else kl.numel(), *given[9:],
        chosen.dtype is torch.float64, count, other, options, upstream, out, chosen_rewards,
        rejected_rewards, margins, accuracy, gradient, gradient[pairs:] if want_ref else None,
        None if nll is None else gradient[-1:],
    )  # fmt: skip
    return out, chosen_rewards, rejected_rewards, margins, accuracy, gradient


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return preference_pairs(None, args, True)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, codes, reduction, want_ref = args[:_INPUTS], args[-6], args[-2], args[-1]
    check_inputs(inputs)
    chosen, rejected, weights = inputs[0], inputs[1], inputs[6]
    shapes = preference_shapes(
        codes, reduction, chosen.shape, rejected.shape, None if weights is None else weights.shape
    )
    return (
        chosen.new_empty(shapes.out), chosen.new_empty(chosen.shape),
        chosen.new_empty(rejected.shape), chosen.new_empty(shapes.margins), chosen.new_empty(()),
        chosen.new_empty(sum(_sizes(inputs, want_ref))),
    )  # fmt: skip


def _backward(g: Tensor, *args: Any) -> Tensor:
    chosen, rejected = args[0], args[1]
    shapes = preference_shapes(args[-6], 0, chosen.shape, rejected.shape, None)
    if g.shape != shapes.out or g.dtype is not chosen.dtype:
        raise ValueError(f"g: {tuple(g.shape)} {g.dtype}; allowed: {shapes.out} {chosen.dtype}")
    same_device("g", g, "chosen", chosen)
    require(args[-2] == NONE, "reduction", args[-2], "0 (none)")
    return preference_pairs(g if g.is_contiguous() else g.contiguous(), args, False)[-1]


_ARGUMENTS = (
    "Tensor chosen, Tensor rejected, "
    + ", ".join(f"Tensor? {name}" for name in (*INPUT_NAMES[2:], *_ORDER_NAMES))
    + ", Tensor? loss_weights, "
    + ", ".join(f"float {name}" for name in PREFERENCE_NUMBERS)
    + ", int[] codes, bool[] by_length, int divergence, bool nll_by_length, int reduction, "
    "bool want_ref"
)
FORWARD = raw_op(
    f"preference_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
)
# For reduction="none", whose upstream gradient has a number an element: some losses couple the pairs.
_BACKWARD = raw_op(
    f"preference_backward(Tensor g, {_ARGUMENTS}) -> Tensor",
    run=_backward,
    fake=lambda g, *args: args[0].new_empty(sum(_sizes(args, args[-1]))),
)


_PLACES, _PLACES_WITH_REF = (0, 1, 7), (0, 1, 2, 3, 7)  # of the inputs with a gradient


class Preference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        inputs, ctx.rest = args[:_INPUTS], args[_INPUTS]  # in one: each argument costs
        *outputs, gradient = FORWARD(*inputs, *ctx.rest)
        ctx.sizes = _sizes(inputs, ctx.rest[-1])
        if ctx.rest[-2] == NONE:
            ctx.save_for_backward(*inputs)
        else:
            ctx.save_for_backward(*inputs[: 4 if ctx.rest[-1] else 2], inputs[7], gradient)
        ctx.backend = _backend.chosen
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, *metrics: Any) -> Any:
        grads: list[Any] = [None] * (_INPUTS + 1)
        if g is None:
            return tuple(grads)
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad
        places = _PLACES_WITH_REF if ctx.rest[-1] else _PLACES
        if ctx.rest[-2] == NONE:
            gradient = _BACKWARD(g, *saved, *ctx.rest)
            saved = [saved[i] for i in places]
        else:
            gradient = saved[-1] * g
        parts = gradient.split_with_sizes(
            ctx.sizes
        )  # without one for chosen_nll where that is None
        for i, like, part in zip(places, saved, parts, strict=False):
            if needed[i]:
                grads[i] = part if part.shape == like.shape else part.view(like.shape)
        return tuple(grads)
