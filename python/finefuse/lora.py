"""Low-rank updates: LoRA and QLoRA linear layers, merging and unmerging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _backend, _matmul
from ._args.lora import check_dropout
from ._codebook_tensor import CodebookTensor
from ._low_rank import (
    NEEDS_A,
    NEEDS_B,
    NEEDS_WEIGHT,
    NEEDS_X,
    WEIGHT,
    Member,
    adapted_product,
    bias_gradient,
    call_of,
    check_backward,
    check_call,
    check_factors,
    check_mask,
    dropout_of,
    expand,
    has_linear_kernel,
    linear_kernel,
    seed_of,
    shrink,
    shrink_group,
)
from ._op import (
    accumulator,
    composite,
    consumed,
    float_tensor,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
    shaped,
    wants_gradient,
    watched,
)
from .codebook import dequantize, quantize
from .dora import dora_linear, dora_norm, factor_from
from .eager import lora as _eager

__all__ = ["lora_linear", "lora_linear_group", "merge_lora", "unmerge_lora"]

# ---- raw ops -----------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """y (…, out) and h (tokens, rank)."""
    values, (lora_a, lora_b, bias, seed, scale, p) = args[:8], args[8:]
    check_call(x, x.shape[-1], weight, values, lora_a, lora_b, bias, seed)
    check_mask(p, seed)
    rows, columns = lora_b.shape[0], x.shape[-1]
    shape = (*x.shape[:-1], rows)
    x = x.reshape(math.prod(x.shape[:-1]), columns).contiguous()
    if weight is not None and seed is None and has_linear_kernel(x, weight, lora_a.shape[0]):
        y, h_of_few = linear_kernel(x, weight, lora_a, lora_b, scale, bias)
        return shaped(y, shape), h_of_few
    h, _ = shrink(x, lora_a, 1.0, dropout=dropout_of(p, seed))
    assert h is not None
    y = adapted_product(x, weight, values, rows, columns, h, lora_b.t(), scale, bias=bias)
    return shaped(y, shape), h


def _forward_fake(x: Tensor, weight: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    values, (lora_a, lora_b, bias, seed, *_) = args[:8], args[8:]
    check_call(x, x.shape[-1], weight, values, lora_a, lora_b, bias, seed)
    tokens = math.prod(x.shape[:-1])
    h = x.new_empty((tokens, lora_b.shape[1]), dtype=accumulator(x.dtype))
    return x.new_empty((*x.shape[:-1], lora_b.shape[0])), h


def _backward(
    dy: Tensor, x: Tensor, h: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB and dW; what `needs` does not ask for is empty. Without dA or dW x is not read."""
    values, (lora_a, lora_b, seed, scale, p, needs) = args[:8], args[8:]
    check_backward(dy, x, h, weight, values, lora_a, lora_b, seed, needs)
    check_dropout(p)
    rows, columns = lora_b.shape[0], lora_a.shape[1]
    shape = (*dy.shape[:-1], columns)
    dy = dy.reshape(h.shape[0], rows).contiguous()
    h = h.contiguous()
    dropout = dropout_of(p, seed)
    dx, da, db, dw = (dy.new_empty(0) for _ in range(4))
    g = None
    if needs & (NEEDS_X | NEEDS_A | NEEDS_B):
        factor = lora_b.t() if needs & (NEEDS_X | NEEDS_A) else None
        g, outer = shrink(dy, factor, scale, h if needs & NEEDS_B else None, scale, rank=h.shape[1])
        if outer is not None:
            db = outer.t().contiguous().to(lora_b.dtype)
    if needs & (NEEDS_A | NEEDS_WEIGHT):
        x = x.reshape(h.shape[0], columns).contiguous()
    if needs & NEEDS_A:
        _, outer = shrink(x, None, 1.0, g, 1.0, rank=h.shape[1], dropout=dropout)
        assert outer is not None
        da = outer.to(lora_a.dtype)
    if needs & NEEDS_WEIGHT:
        dw = _matmul.linear(dy.t(), x.t())
    if needs & NEEDS_X:
        assert g is not None
        dx = adapted_product(
            dy, weight, values, rows, columns, g, lora_a, 1.0, transposed=True, dropout=dropout
        ).view(shape)
    return dx, da, db, dw


def _backward_fake(
    dy: Tensor, x: Tensor, h: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, (lora_a, lora_b, seed, _, _, needs) = args[:8], args[8:]
    check_backward(dy, x, h, weight, values, lora_a, lora_b, seed, needs)
    return (
        dy.new_empty((*dy.shape[:-1], lora_a.shape[1])) if needs & NEEDS_X else dy.new_empty(0),
        lora_a.new_empty(lora_a.shape) if needs & NEEDS_A else dy.new_empty(0),
        lora_b.new_empty(lora_b.shape) if needs & NEEDS_B else dy.new_empty(0),
        dy.new_empty((lora_b.shape[0], lora_a.shape[1]))
        if needs & NEEDS_WEIGHT
        else dy.new_empty(0),
    )


_FORWARD = raw_op(
    f"lora_linear_forward(Tensor x, {WEIGHT}, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, "
    "float scale, float dropout) -> (Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
)
_BACKWARD = raw_op(
    f"lora_linear_backward(Tensor dy, Tensor x, Tensor h, {WEIGHT}, Tensor lora_a, Tensor lora_b, "
    "Tensor? seed, float scale, float dropout, int needs) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
)


# ---- autograd and the public function ----------------------------------------------------------


class _LoraLinear(torch.autograd.Function):
    """Keeps x (where A or the weight trains), A, B and h: nothing of the size of y or of the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        seed: Tensor | None,
        scale: Any,
        dropout: Any,
        *values: Any,
    ) -> Tensor:
        y, h = _FORWARD(x, weight, *values, lora_a, lora_b, bias, seed, scale, dropout)
        needs = ctx.needs_input_grad
        keeps_x = needs[3] or needs[1]
        tensors = [x if keeps_x else x.new_empty(0), weight, lora_a, lora_b, h, seed, *values[:6]]
        if isinstance(scale, Tensor):
            tensors += [scale, dropout]
        ctx.save_for_backward(*tensors)
        ctx.scalars, ctx.blocksizes, ctx.backend = (scale, dropout), values[6:], _backend.chosen
        if isinstance(scale, Tensor):
            ctx.scalars = None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, lora_a, lora_b, h, seed, *rest = ctx.saved_tensors
        scale, dropout = ctx.scalars or rest[6:]
        x_, w_, bias_, a_, b_, *_ = ctx.needs_input_grad
        needs = NEEDS_X * x_ | NEEDS_A * a_ | NEEDS_B * b_ | NEEDS_WEIGHT * w_
        dx = da = db = dw = None
        if needs:
            dx, da, db, dw = _BACKWARD(
                dy, x, h, weight, *rest[:6], *ctx.blocksizes, lora_a, lora_b, seed, scale, dropout, needs
            )  # fmt: skip
        dbias = bias_gradient(dy) if bias_ else None
        return (
            dx if x_ else None, dw if w_ else None, dbias, da if a_ else None, db if b_ else None,
            *(None for _ in range(11)),
        )  # fmt: skip


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank update (LoRA, arXiv:2106.09685; on packed weights QLoRA, 2305.14314).

        y = x Wᵀ + bias + s·h Bᵀ        h = D(x) Aᵀ        g = s·dy B
        dx = dy W + D'(g A)             dA = gᵀ D(x)       dB = s·dyᵀ h

    D is dropout: elements vanish with probability p, the others are divided by 1 - p. BA is never formed, the
    update is added inside the base product, and dy is visited once for dB and g. Kept for the backward: x, A,
    B, h. In the papers' notation W' = W + α·AB that A is our `lora_b` and that B our `lora_a`.

    Args:
        x: (…, in) float32, bfloat16, float16 or float64, any strides. Under autocast it is cast as
            torch.nn.functional.linear casts it.
        weight: W (out, in), a tensor of the type of x (under autocast of any) or a CodebookTensor.
            Differentiated if it is a tensor that requires a gradient.
        lora_a: A (r, in), r ≥ 1; any strides and any float type, also another than that of x (float64
            only if x is). It is read as it is: float32 adapters cost no copy of x.
        lora_b: B (out, r), likewise.
        scale: s, alpha / r or, for rank-stabilised LoRA, alpha / √r. A number or a 0-d tensor.
        bias: (out,); another type than that of x is cast to it.
        dropout: p in [0, 1]; 1 leaves the base product alone.
        seed: of the mask (int64): the mask is a function of it and of each element's index, nothing is
            stored. None: drawn from torch's generator, so that a recomputation (torch.utils.checkpoint)
            draws the same.
        magnitude: m (out,), of any float type: DoRA (arXiv:2402.09353). With c = m / ‖W + s·B A‖, norms of
            rows, 0 where a row is zero, and without a gradient of their own,

                y = x Wᵀ + bias + (c - 1)·D(x) Wᵀ + c·s·h Bᵀ        z = D(x) Wᵀ + s·h Bᵀ
                dm = Σ dy·z / ‖W + s·B A‖        dz = c·dy in the place of dy above

            D reaches the base product too, as in PEFT: a second one where there is dropout. Where m
            trains, z is kept for the backward.

    Returns:
        (…, out) in the type of x.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    call = call_of(x, weight, bias, dropout)
    check_factors(weight, lora_a, lora_b)
    scale, seed = scalar("scale", scale), seed_of(seed, call.x) if call.drops else None
    if magnitude is not None:
        return dora_linear(call, lora_a, lora_b, magnitude, scale, seed)
    x, dense, values, bias, dropout, *_ = call
    args = (dense, bias, lora_a, lora_b, seed, scale, dropout, *values)
    if runs_eagerly("lora", x):
        plain = call.plain_weight()
        check_call(x, x.shape[-1], plain, None, lora_a, lora_b, bias, seed)
        p: Any = dropout
        if not is_compiling():
            check_dropout(p)
        return _eager.lora_linear(x, plain, lora_a, lora_b, scale, bias, p, seed)
    if wants_gradient(x, *args[:4]):
        return _LoraLinear.apply(x, *args)
    return _FORWARD(x, dense, *values, lora_a, lora_b, bias, seed, scale, dropout)[0]


composite(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, *, Tensor? bias=None, "
    "Tensor? seed=None, float scale=1.0, float dropout=0.0, Tensor? magnitude=None) -> Tensor",
    lora_linear,
)


# ---- several layers of one input ---------------------------------------------------------------


class _LoraGroup(torch.autograd.Function):
    """`_LoraLinear` for several layers: x is read once for all h, and once for all dA; dx is one tensor.

    `tensors` are those of the layers' arguments that may have gradients, four each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[_Layer], *tensors: Any) -> tuple[Tensor, ...]:
        ys, hs = _group_forward(x, layers)
        keeps_x = any(ctx.needs_input_grad[2 + i] for i in range(len(tensors)) if i % 4 in (0, 2))
        ctx.save_for_backward(
            x if keeps_x else x.new_empty(0),
            *tensors,
            *hs,
            *(layer.seed for layer in layers),
            *(value for layer in layers for value in layer.values[:6]),
        )
        ctx.numbers = [(layer.scale, layer.dropout, layer.values[6:]) for layer in layers]
        ctx.shape = x.shape
        ctx.backend = _backend.chosen
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        x, *saved = ctx.saved_tensors
        count = len(dys)
        tensors, saved = saved[: 4 * count], saved[4 * count :]
        hs, seeds, values = saved[:count], saved[count : 2 * count], saved[2 * count :]
        layers = [
            _Layer(w, b, la, lb, seed, scale, dropout, (*values[6 * i : 6 * i + 6], *blocksizes))
            for i, ((scale, dropout, blocksizes), seed, w, b, la, lb) in enumerate(
                zip(ctx.numbers, seeds, *(tensors[k::4] for k in range(4)), strict=True)
            )
        ]
        dx, grads = _group_backward(
            dys, x, layers, hs, ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        )
        return None if dx is None else dx.view(ctx.shape), None, *grads


class _Layer(NamedTuple):
    """One of a group: its arguments, checked."""

    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    seed: Tensor | None
    scale: float
    dropout: float
    values: Any


def _group_forward(x: Tensor, layers: Sequence[_Layer]) -> tuple[list[Tensor], list[Tensor]]:
    columns = x.shape[-1]
    flat = x.reshape(math.prod(x.shape[:-1]), columns).contiguous()
    members = [
        Member(len(layer.lora_a), layer.lora_a, dropout_of(layer.dropout, layer.seed))
        for layer in layers
    ]
    hs: list[Any] = [h for h, _ in shrink_group(flat, members)]
    ys = []
    for layer, h in zip(layers, hs, strict=True):
        rows = len(layer.lora_b)
        y = adapted_product(
            flat, layer.weight, layer.values, rows, columns, h, layer.lora_b.t(), layer.scale,
            bias=layer.bias,
        )  # fmt: skip
        ys.append(shaped(y, (*x.shape[:-1], rows)))
    return ys, hs


def _group_backward(
    dys: Sequence[Tensor | None],
    x: Tensor,
    layers: Sequence[_Layer],
    hs: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx (tokens, in) and, for each layer, dW, dbias, dA and dB; `needs` is in the same order."""
    grads: list[Tensor | None] = [None] * len(needs)
    dx: Tensor | None = None
    members, places = [], []
    for i, (dy, layer, h) in enumerate(zip(dys, layers, hs, strict=True)):
        if dy is None:
            continue
        w_, bias_, a_, b_ = needs[4 * i : 4 * i + 4]
        rows, columns, rank = len(layer.lora_b), layer.lora_a.shape[1], h.shape[1]
        if bias_:
            grads[4 * i + 1] = bias_gradient(dy)
        dy = dy.reshape(len(h), rows).contiguous()
        factor = layer.lora_b.t() if needs_x or a_ else None
        g, outer = None, None
        if needs_x or a_ or b_:
            g, outer = shrink(dy, factor, layer.scale, h if b_ else None, layer.scale, rank)
        if outer is not None:
            grads[4 * i + 3] = outer.t().contiguous().to(layer.lora_b.dtype)
        dropout = dropout_of(layer.dropout, layer.seed)
        if a_:
            members.append(Member(rank, None, dropout, g))
            places.append(4 * i + 2)
        if w_:
            grads[4 * i] = _matmul.linear(dy.t(), x.reshape(len(h), columns).t())
        if needs_x:
            assert g is not None
            dx = adapted_product(
                dy, layer.weight, layer.values, rows, columns, g, layer.lora_a, 1.0, True, None, dropout,
                onto=dx,
            )  # fmt: skip
    if members:
        flat = x.reshape(len(hs[0]), x.shape[-1]).contiguous()
        for place, (_, outer) in zip(places, shrink_group(flat, members), strict=True):
            assert outer is not None
            grads[place] = outer.to(layers[place // 4].lora_a.dtype)
    return dx, grads


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *,
    scale: float | Sequence[float] = 1.0,
    bias: Sequence[Tensor | None] | None = None,
    dropout: float | Sequence[float] = 0.0,
    seed: Sequence[int | Tensor | None] | None = None,
) -> list[Tensor]:
    """`lora_linear` for several layers of the same input: a model's q, k and v, or gate and up.

    The same as calls one by one, to the bit on CPUs but for dx, whose terms are added in another order: x is
    read once for the updates of all, once more for the gradients of all A, and dx is summed in one tensor.
    Each layer has its own dropout mask. The outputs share a node of the graph: backward runs once for all.

    Args:
        x: (…, in).
        weights, lora_a, lora_b: of each layer, as for `lora_linear`, with the same `in`.
        scale, dropout: a number for all, or one for each.
        bias, seed: one for each, of which any may be None; None: none has one.

    Returns:
        y (…, out) of each layer.

    Raises:
        TypeError, ValueError: naming the argument.

    While torch.compile traces, on the backend "eager" and where torch's modes watch, it is calls one by one.
    """
    count = len(weights)

    def each(name: str, value: Any, one: Any) -> list[Any]:
        if isinstance(value, one) and not (isinstance(value, Tensor) and value.ndim):
            return [value] * count
        if not isinstance(value, (Sequence, Tensor)) or isinstance(value, str):
            raise TypeError(f"{name}: one for each weight, not {value!r}")
        if len(value) != count:
            raise ValueError(f"{name}: {len(value)} of them; there are {count} weights")
        return list(value)

    if count == 0:
        raise ValueError("weights: none; allowed: at least one")
    lora_a, lora_b = each("lora_a", lora_a, ()), each("lora_b", lora_b, ())
    scales, dropouts = (
        each("scale", scale, (Real, Tensor)),
        each("dropout", dropout, (Real, Tensor)),
    )
    biases, seeds = each("bias", bias, type(None)), each("seed", seed, type(None))
    arguments = list(zip(weights, lora_a, lora_b, scales, biases, dropouts, seeds, strict=True))
    alone = is_compiling() or watched() or runs_eagerly("lora", float_tensor("x", x))
    if alone or x.is_meta:
        return [
            lora_linear(x, w, a, b, scale=s, bias=c, dropout=p, seed=k)
            for w, a, b, s, c, p, k in arguments
        ]
    layers: list[_Layer] = []
    for w, a, b, s, c, p, k in arguments:
        call = call_of(x, w, c, p)
        check_factors(w, a, b)
        check_dropout(call.dropout)
        own_seed = seed_of(k, call.x) if call.drops else None
        check_call(call.x, x.shape[-1], call.weight, call.values, a, b, call.bias, own_seed)
        x = call.x  # as autocast has it
        layers.append(
            _Layer(
                call.weight,
                call.bias,
                a,
                b,
                own_seed,
                scalar("scale", s),
                call.dropout,
                call.values,
            )
        )
    tensors = [t for layer in layers for t in layer[:4]]
    if wants_gradient(x, *tensors):
        return list(_LoraGroup.apply(x, layers, *tensors))
    return _group_forward(x, layers)[0]


# ---- merging -----------------------------------------------------------------------------------


def merge_lora(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    magnitude: Tensor | None = None,
    out: Tensor | None = None,
    *,
    return_error: bool = False,
) -> Any:
    """The weight with its low-rank update in it, computed in float32 and rounded once.

        W + s·B A        or, with a magnitude,        m·(W + s·B A) / ‖W + s·B A‖, rows (DoRA)

    Args:
        weight: W (out, in): a tensor of any float type (float64: computed in it), or a CodebookTensor, which
            is decoded, merged and quantised again with its own code, blocksize and double quantisation.
        lora_a, lora_b: A (r, in) and B (out, r).
        scale: s.
        magnitude: m (out,); a row whose sum is zero stays zero.
        out: where to write it: `weight` itself, or a tensor of its shape and type. None: a new one.
        return_error: also return the largest absolute difference between the result, decoded, and
            the merged weight in float64 (packed: float32): what quantising again costs, or rounding.

    Returns:
        The merged weight, of the kind of `weight`; with `return_error` (that, a Python float). No gradient
        passes.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    scale = _check_merge(weight, lora_a, lora_b, scale, magnitude, None, out)
    factor = None
    if magnitude is not None:
        norm = dora_norm(weight, lora_a, lora_b, scale)
        factor = factor_from(magnitude.detach(), norm)
    return _merge(weight, lora_a, lora_b, scale, None, factor, out, return_error)


def unmerge_lora(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    magnitude: Tensor | None = None,
    out: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    return_error: bool = False,
) -> Any:
    """The weight before `merge_lora`. What rounding, or quantising, took at the merge does not come back.

        W' - s·B A        or, with a magnitude,        W'·norm / m - s·B A, rows (DoRA)

    Args:
        weight: W', what `merge_lora` returned.
        magnitude: m (out,). A row of which it is 0 is lost.
        norm: (out,), needed with a magnitude: `dora_norm(W, lora_a, lora_b, scale)` of before the merge,
            which the merged weight does not hold: its rows all have the norm |m|.

    The rest, and what is raised, as for `merge_lora`.
    """
    scale = _check_merge(weight, lora_a, lora_b, scale, magnitude, norm, out)
    factor = None
    if magnitude is not None:
        if norm is None:
            raise ValueError(
                "norm: None with a magnitude; allowed: dora_norm(weight, lora_a, lora_b, scale) of before "
                "the merge"
            )
        factor = factor_from(norm.detach(), magnitude.detach().to(norm.dtype))
    return _merge(weight, lora_a, lora_b, -scale, factor, None, out, return_error)


def _check_merge(
    weight: Any, lora_a: Any, lora_b: Any, scale: Any, magnitude: Any, norm: Any, out: Any
) -> Any:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: a tensor, not {type(weight).__name__}")
    check_factors(weight, lora_a, lora_b)
    same_device("lora_a", lora_a, "weight", weight)
    same_device("lora_b", lora_b, "weight", weight)
    for name, row in (("magnitude", magnitude), ("norm", norm)):
        if row is None:
            continue
        same_device(name, float_tensor(name, row), "weight", weight)
        if row.shape != weight.shape[:1]:
            raise ValueError(f"{name}: shape {tuple(row.shape)}; allowed: ({weight.shape[0]},)")
    if norm is not None and magnitude is None:
        raise ValueError("norm: of use only with a magnitude")
    if out is not None and out is not weight:
        if not isinstance(out, Tensor):
            raise TypeError(f"out: a tensor, not {type(out).__name__}")
        if isinstance(weight, CodebookTensor) and not isinstance(out, CodebookTensor):
            raise TypeError("out: a CodebookTensor, as weight is")
        if out.shape != weight.shape or out.dtype is not weight.dtype:
            raise ValueError(
                f"out: {out.dtype} {tuple(out.shape)}; weight is {weight.dtype} {tuple(weight.shape)}"
            )
        same_device("out", out, "weight", weight)
    return scalar("scale", scale)


def _merge(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    before: Tensor | None,
    after: Tensor | None,
    out: Tensor | None,
    return_error: bool,
) -> Any:
    """after·(before·W + s·B A), factors of rows; see `merge_lora`."""
    update = _Update(lora_a.detach(), lora_b.detach(), scale, before, after)
    merged, exact = (
        _merged_codes(weight, update, out)
        if isinstance(weight, CodebookTensor)
        else _merged(weight.detach(), update, out, return_error)
    )
    if not return_error:
        return merged
    assert exact is not None
    plain = dequantize(merged, exact.dtype) if isinstance(merged, CodebookTensor) else merged
    return merged, float((plain.to(exact.dtype) - exact).abs().max()) if exact.numel() else 0.0


class _Update(NamedTuple):
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    before: Tensor | None
    after: Tensor | None

    def onto(self, weight: Tensor) -> Tensor:
        """Over the memory of the weight, which is contiguous, rounded once."""
        dtype = accumulator(weight.dtype)
        if weight.numel() == 0:
            return weight
        rounded = self.before is None and self.after is None
        wide = weight if rounded else weight.to(dtype)
        if self.before is not None:
            wide *= self.before.to(dtype)[:, None]
        if runs_eagerly("lora", weight):
            with _eager.no_autocast(weight):
                update = self.scale * (self.lora_b.to(dtype) @ self.lora_a.to(dtype))
            wide.copy_(wide.to(dtype) + update)
        else:
            factor = self.lora_b.to(dtype).contiguous()
            expand(factor, self.lora_a, self.scale, wide, accumulate=True)
        if self.after is not None:
            wide *= self.after.to(dtype)[:, None]
        return weight if wide is weight else weight.copy_(wide)


def _copy(weight: Tensor) -> Tensor:
    return weight.clone(memory_format=torch.contiguous_format)


def _merged(
    weight: Tensor, update: _Update, out: Tensor | None, return_error: bool
) -> tuple[Tensor, Tensor | None]:
    """(the rounded sum, in `out` if that is given, and the sum itself where it is asked for)."""
    exact = update.onto(_copy(weight).to(torch.float64)) if return_error else None
    if out is None:
        return update.onto(_copy(weight)), exact
    same = out.data_ptr() == weight.data_ptr() and out.stride() == weight.stride()
    if same and out.is_contiguous():
        update.onto(weight)
    else:
        out.detach().copy_(update.onto(_copy(weight)))
    consumed(out)
    return out, exact


def _merged_codes(q: CodebookTensor, update: _Update, out: Tensor | None) -> tuple[Tensor, Tensor]:
    exact = update.onto(dequantize(q, torch.float32))
    merged = quantize(exact, q.code, q.blocksize, q.nested is not None, q.nested_blocksize or 256)
    return merged.to(q.dtype) if out is None else out.copy_(merged), exact
