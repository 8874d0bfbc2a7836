"""Low-rank updates of many adapters in one batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _C, _backend, _matmul
from ._args.lora import check_dropout, check_segmented_shapes
from ._codebook_tensor import NO_FIELDS, CodebookTensor
from ._low_rank import (
    NEEDS_A,
    NEEDS_B,
    NEEDS_WEIGHT,
    NEEDS_X,
    NO_DROPOUT,
    WEIGHT,
    base_product,
    bias_gradient,
    call_of,
    check_call,
    check_mask,
    dropout_of,
    seed_of,
)
from ._op import (
    DTYPES,
    INDEX_DTYPES,
    accumulator,
    composite,
    float_tensor,
    index_tensor,
    kernel,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
    shaped,
    wants_gradient,
)
from .eager import segmented as _eager

__all__ = ["lora_linear_segmented"]

_SHRINK = kernel("segmented", "segmented_shrink")
_EXPAND = kernel("segmented", "segmented_expand")


# ---- the narrow products -----------------------------------------------------------------------


def segment_rows(adapter: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """(order, begins) of csrc/ops/segmented.h: which rows are whose.

    On a CPU an id out of range raises; on a GPU, where looking would synchronise, its rows come last and the
    kernels flag them.
    """
    adapter = adapter.contiguous()
    if adapter.is_cpu:
        order = torch.empty(adapter.numel(), dtype=torch.int64)
        begins = torch.empty(adapters + 1, dtype=torch.int64)
        int32 = adapter.dtype is torch.int32
        _C.segment_rows(adapter, int32, adapter.numel(), adapters, order, begins)
        return order, begins
    known = (adapter >= -1) & (adapter < adapters)
    ids, order = torch.where(known, adapter, adapters).to(torch.int64).sort(stable=True)
    return order, torch.searchsorted(ids, torch.arange(adapters + 1, device=ids.device))


def _factor(factor: Tensor) -> tuple[Any, ...]:
    """(adapters, rank, columns), of any strides."""
    return factor, DTYPES[factor.dtype], *factor.stride()


def _shrink(
    x: Tensor,
    segments: tuple[Tensor, Tensor],
    factor: Tensor | None,
    h_scale: Tensor | None,
    g: Tensor | None = None,
    outer_scale: Tensor | None = None,
    rank: int = 0,
    dropout: Any = NO_DROPOUT,
    turned: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """(h, outer) of csrc/ops/segmented.h; without a factor or g, None."""
    (tokens, columns), (order, begins) = x.shape, segments
    adapters, dtype, h, outer = begins.numel() - 1, accumulator(x.dtype), None, None
    rank = rank if factor is None else factor.shape[1]
    if factor is not None:
        h = x.new_empty((tokens, rank), dtype=dtype)
    if g is not None:
        shape = (adapters, columns, rank) if turned else (adapters, rank, columns)
        outer = x.new_empty(shape, dtype=dtype)
    _SHRINK(
        x, DTYPES[x.dtype], tokens, columns, rank, order, begins, adapters,
        *((None, 0, 0, 0, 0) if factor is None else _factor(factor)), h, h_scale, g, outer, outer_scale,
        turned, *dropout,
    )  # fmt: skip
    return h, outer


def _expand(
    h: Tensor,
    segments: tuple[Tensor, Tensor],
    factor: Tensor,
    scale: Tensor | None,
    y: Tensor,
    dropout: Any = NO_DROPOUT,
) -> None:
    """y[t] += D(scale[a]·h[t]·factor[a]) for each row t, of adapter a."""
    order, begins = segments
    _EXPAND(
        h, *y.shape, h.shape[1], order, begins, begins.numel() - 1, *_factor(factor), scale, y,
        DTYPES[y.dtype], *dropout,
    )  # fmt: skip


# ---- raw ops -----------------------------------------------------------------------------------


def _check(
    x: Tensor, columns: Any, weight: Tensor | None, values: Any, lora_a: Tensor, lora_b: Tensor,
    scale: Tensor, bias: Tensor | None, seed: Tensor | None,
) -> None:  # fmt: skip
    if lora_a.ndim != 3 or lora_b.ndim != 3:
        raise ValueError("lora_a, lora_b: allowed: (adapters, r, in) and (adapters, out, r)")
    check_call(x, columns, weight, values, lora_a, lora_b, bias, seed)
    same_device("scale", scale, "x", x)
    if scale.dtype is not accumulator(x.dtype) or scale.shape != lora_a.shape[:1]:
        raise ValueError(f"scale: {scale.dtype} {tuple(scale.shape)}; allowed: one an adapter")


def _check_adapter(adapter: Tensor, tokens: Any, x: Tensor) -> None:
    same_device("adapter", adapter, "x", x)
    if adapter.dtype not in INDEX_DTYPES:
        raise TypeError(f"adapter: dtype {adapter.dtype}; allowed: int64, int32")
    if adapter.shape != (tokens,):
        raise ValueError(f"adapter: shape {tuple(adapter.shape)}; allowed: ({tokens},)")


def _forward(x: Tensor, weight: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (…, out), h (tokens, rank), order and begins."""
    values, (lora_a, lora_b, adapter, scale, bias, seed, p) = args[:8], args[8:]
    _check(x, x.shape[-1], weight, values, lora_a, lora_b, scale, bias, seed)
    check_mask(p, seed)
    (adapters, rows, _), columns = lora_b.shape, x.shape[-1]
    shape, tokens = (*x.shape[:-1], rows), math.prod(x.shape[:-1])
    _check_adapter(adapter, tokens, x)
    segments = segment_rows(adapter, adapters)
    x = x.reshape(tokens, columns).contiguous()
    h, _ = _shrink(x, segments, lora_a, None, dropout=dropout_of(p, seed))
    assert h is not None
    y = base_product(x, weight, values, rows, columns, bias=bias)
    _expand(h, segments, lora_b.transpose(1, 2), scale.contiguous(), y)
    return shaped(y, shape), h, *segments


def _forward_fake(
    x: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, (lora_a, lora_b, adapter, scale, bias, seed, _) = args[:8], args[8:]
    _check(x, x.shape[-1], weight, values, lora_a, lora_b, scale, bias, seed)
    tokens = math.prod(x.shape[:-1])
    _check_adapter(adapter, tokens, x)
    return (
        x.new_empty((*x.shape[:-1], lora_b.shape[1])),
        x.new_empty((tokens, lora_b.shape[2]), dtype=accumulator(x.dtype)),
        x.new_empty(tokens, dtype=torch.int64),
        x.new_empty(lora_b.shape[0] + 1, dtype=torch.int64),
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    order: Tensor,
    begins: Tensor,
    weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB and dW; what `needs` does not ask for is empty. Without dA or dW x is not read."""
    values, (lora_a, lora_b, scale, seed, p, needs) = args[:8], args[8:]
    _check_backward(dy, x, h, order, begins, weight, values, lora_a, lora_b, scale, seed, needs)
    check_dropout(p)
    rows, columns, tokens, rank = lora_b.shape[1], lora_a.shape[2], *h.shape
    shape = (*dy.shape[:-1], columns)
    dy, h, scale = dy.reshape(tokens, rows).contiguous(), h.contiguous(), scale.contiguous()
    segments, dropout = (order.contiguous(), begins.contiguous()), dropout_of(p, seed)
    dx, da, db, dw = (dy.new_empty(0) for _ in range(4))
    g = None
    if needs & (NEEDS_X | NEEDS_A | NEEDS_B):
        factor = lora_b.transpose(1, 2) if needs & (NEEDS_X | NEEDS_A) else None
        g, outer = _shrink(
            dy, segments, factor, scale, h if needs & NEEDS_B else None, scale, rank, turned=True
        )
        if outer is not None:
            db = outer.to(lora_b.dtype)
    if needs & (NEEDS_A | NEEDS_WEIGHT):
        x = x.reshape(tokens, columns).contiguous()
    if needs & NEEDS_A:
        _, outer = _shrink(x, segments, None, None, g, None, rank, dropout)
        assert outer is not None
        da = outer.to(lora_a.dtype)
    if needs & NEEDS_WEIGHT:
        dw = _matmul.linear(dy.t(), x.t())
    if needs & NEEDS_X:
        assert g is not None
        dx = base_product(dy, weight, values, rows, columns, transposed=True)
        _expand(g, segments, lora_a, None, dx, dropout)
        dx = dx.view(shape)
    return dx, da, db, dw


def _check_backward(
    dy: Tensor, x: Tensor, h: Tensor, order: Tensor, begins: Tensor, weight: Tensor | None, values: Any,
    lora_a: Tensor, lora_b: Tensor, scale: Tensor, seed: Tensor | None, needs: int,
) -> None:  # fmt: skip
    if lora_a.ndim != 3 or dy.shape[-1:] != lora_b.shape[1:2]:
        raise ValueError(f"dy: shape {tuple(dy.shape)}; allowed: (…, {lora_b.shape[1]})")
    _check(dy, lora_a.shape[2], weight, values, lora_a, lora_b, scale, None, seed)
    tokens = math.prod(dy.shape[:-1])
    for name, made, dtype, shape in (
        ("h", h, accumulator(dy.dtype), (tokens, lora_b.shape[2])),
        ("order", order, torch.int64, (tokens,)),
        ("begins", begins, torch.int64, (lora_b.shape[0] + 1,)),
    ):
        same_device(name, made, "dy", dy)
        if made.dtype is not dtype or made.shape != shape:
            raise ValueError(f"{name}: {made.dtype} {tuple(made.shape)}; not what the forward made")
    if needs & (NEEDS_A | NEEDS_WEIGHT):
        same_device("x", x, "dy", dy)
        if x.dtype is not dy.dtype or x.shape != (*dy.shape[:-1], lora_a.shape[2]):
            raise ValueError(f"x: {x.dtype} {tuple(x.shape)}; not what the forward took")


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    order: Tensor,
    begins: Tensor,
    weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, (lora_a, lora_b, scale, seed, _, needs) = args[:8], args[8:]
    _check_backward(dy, x, h, order, begins, weight, values, lora_a, lora_b, scale, seed, needs)

    def made(need: int, like: Tensor, shape: Any) -> Tensor:
        return like.new_empty(shape) if needs & need else dy.new_empty(0)

    return (
        made(NEEDS_X, dy, (*dy.shape[:-1], lora_a.shape[2])),
        made(NEEDS_A, lora_a, lora_a.shape),
        made(NEEDS_B, lora_b, lora_b.shape),
        made(NEEDS_WEIGHT, dy, (lora_b.shape[1], lora_a.shape[2])),
    )


_FORWARD = raw_op(
    f"lora_linear_segmented_forward(Tensor x, {WEIGHT}, Tensor lora_a, Tensor lora_b, Tensor adapter, "
    "Tensor scale, Tensor? bias, Tensor? seed, float dropout) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
)
_BACKWARD = raw_op(
    f"lora_linear_segmented_backward(Tensor dy, Tensor x, Tensor h, Tensor order, Tensor begins, {WEIGHT}, "
    "Tensor lora_a, Tensor lora_b, Tensor scale, Tensor? seed, float dropout, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
)


# ---- autograd and the public function ----------------------------------------------------------


class _Segmented(torch.autograd.Function):
    """Keeps x (where A or the weight trains), A, B, h and which rows are whose."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        adapter: Tensor,
        scale: Tensor,
        seed: Tensor | None,
        dropout: Any,
        *values: Any,
    ) -> Tensor:
        y, h, order, begins = _FORWARD(
            x, weight, *values, lora_a, lora_b, adapter, scale, bias, seed, dropout
        )
        needs = ctx.needs_input_grad
        keeps_x = needs[3] or needs[1]
        tensors = [
            x if keeps_x else x.new_empty(0), weight, lora_a, lora_b, scale, h, order, begins, seed,
            *values[:6],
        ]  # fmt: skip
        ctx.dropout = None if isinstance(dropout, Tensor) else dropout
        if ctx.dropout is None:
            tensors.append(dropout)
        ctx.save_for_backward(*tensors)
        ctx.blocksizes, ctx.backend = values[6:], _backend.chosen
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, lora_a, lora_b, scale, h, order, begins, seed, *rest = ctx.saved_tensors
        dropout = rest[6] if ctx.dropout is None else ctx.dropout
        x_, w_, bias_, a_, b_, *_ = ctx.needs_input_grad
        needs = NEEDS_X * x_ | NEEDS_A * a_ | NEEDS_B * b_ | NEEDS_WEIGHT * w_
        dx = da = db = dw = None
        if needs:
            dx, da, db, dw = _BACKWARD(
                dy, x, h, order, begins, weight, *rest[:6], *ctx.blocksizes, lora_a, lora_b, scale, seed,
                dropout, needs,
            )  # fmt: skip
        dbias = bias_gradient(dy) if bias_ else None
        return (
            dx if x_ else None, dw if w_ else None, dbias, da if a_ else None, db if b_ else None,
            *(None for _ in range(12)),
        )  # fmt: skip


def lora_linear_segmented(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A linear layer where each row of a batch has a low-rank update of its own choice, or none.

        y_t = x_t Wᵀ + bias + s_a·(D(x_t) A_aᵀ) B_aᵀ        a = adapter_t; -1: no update

    The base product is one for all rows; no rows are moved, copied or padded for the others. The gradients
    are those of `lora_linear` over each adapter's rows; those of an adapter without rows are zero. (Punica,
    arXiv:2310.18547, and S-LoRA, 2311.03285, serve such batches; here they also train.)

    Args:
        x: (…, in) float32, bfloat16, float16 or float64, any strides.
        weight: W (out, in), a tensor of the type of x or a CodebookTensor, as for `lora_linear`.
        lora_a: A (adapters, r, in), of any strides and float type (float64 only if x is).
        lora_b: B (adapters, out, r), likewise. An adapter of a smaller rank has rows of zeros in A, or
            columns of zeros in B.
        adapter: integers in [-1, adapters), in any order: one for each row, of the shape of x but for `in` or
            flat, or one for each entry of x's leading dimensions, which its rows share: (B,) for (B, T, in).
        scale: s, a number or (adapters,) of them; no gradient passes.
        bias, dropout, seed: as for `lora_linear`.

    Returns:
        (…, out) in the type of x.

    Raises:
        TypeError, ValueError: naming the argument. An id out of range is found before anything is read; on a
            GPU its row becomes NaN and `finefuse.check()` raises.
    """
    call = call_of(x, weight, bias, dropout)
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        if isinstance(float_tensor(name, value), CodebookTensor):
            raise TypeError(f"{name}: a tensor of numbers, not a CodebookTensor")
    check_segmented_shapes(weight.shape, lora_a.shape, lora_b.shape)
    x, dense, values, bias, dropout, drops, _ = call
    adapter = _row_adapters(adapter, x)
    scale = _row_scales(scale, x, lora_a.shape[0])
    seed = seed_of(seed, x) if drops else None
    if runs_eagerly("segmented", x):
        plain = call.plain_weight()
        _check(x, x.shape[-1], plain, NO_FIELDS, lora_a, lora_b, scale, bias, seed)
        if not is_compiling():
            check_dropout(dropout)
            if x.is_cpu:
                segment_rows(adapter, lora_a.shape[0])  # raises
        return _eager.lora_linear_segmented(
            x, plain, lora_a, lora_b, adapter, scale, bias, dropout, seed
        )
    args = (dense, bias, lora_a, lora_b, adapter, scale, seed, dropout, *values)
    if wants_gradient(x, *args[:4]):
        return _Segmented.apply(x, *args)
    return _FORWARD(x, dense, *values, lora_a, lora_b, adapter, scale, bias, seed, dropout)[0]


def _row_adapters(adapter: Any, x: Tensor) -> Tensor:
    """One for each row of x, flat, int64 or int32."""
    adapter = index_tensor("adapter", adapter, "x", x)
    leading = x.shape[:-1]
    tokens = math.prod(leading)
    if adapter.shape == leading or adapter.shape == (tokens,):
        return adapter.reshape(tokens)
    if adapter.ndim == 0 or adapter.shape != leading[: adapter.ndim]:
        raise ValueError(
            f"adapter: shape {tuple(adapter.shape)}; allowed: {tuple(leading)}, ({tokens},), or the first "
            "of these dimensions"
        )
    wide = adapter.reshape(*adapter.shape, *(1 for _ in leading[adapter.ndim :]))
    return wide.expand(leading).reshape(tokens)


def _row_scales(scale: Any, x: Tensor, adapters: int) -> Tensor:
    """One for each adapter, as kernels take them."""
    dtype = accumulator(x.dtype)
    if isinstance(scale, Tensor) and scale.ndim == 1:
        if scale.requires_grad:
            raise ValueError("scale: has no gradient here; pass scale.detach()")
        same_device("scale", scale, "x", x)
        if not scale.is_floating_point() or scale.shape != (adapters,):
            raise ValueError(
                f"scale: {scale.dtype} {tuple(scale.shape)}; allowed: a number, floats ({adapters},)"
            )
        return scale.to(dtype)
    scale = scalar("scale", scale)
    if isinstance(scale, Tensor):
        return scale.to(x.device, dtype).expand(adapters)
    return x.new_full((adapters,), scale, dtype=dtype)


composite(
    "lora_linear_segmented(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor adapter, *, "
    "Tensor scale, Tensor? bias=None, Tensor? seed=None, float dropout=0.0) -> Tensor",
    lora_linear_segmented,
)
