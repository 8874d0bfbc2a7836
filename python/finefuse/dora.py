"""Weight-decomposed updates (DoRA): the norms of an adapted weight's rows, and the layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _backend, _matmul
from ._args.lora import check_dropout
from ._codebook_tensor import NO_FIELDS, CodebookTensor, fields
from ._low_rank import (
    LIBRARY_RANK,
    NEEDS_A,
    NEEDS_B,
    NEEDS_MAGNITUDE,
    NEEDS_WEIGHT,
    NEEDS_X,
    WEIGHT,
    Call,
    adapted_product,
    base_product,
    bias_gradient,
    check_backward,
    check_call,
    check_factors,
    check_mask,
    drop,
    dropout_of,
    factor_of,
    shrink,
)
from ._op import (
    DTYPES,
    accumulator,
    float_tensor,
    kernel,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
    shaped,
    wants_gradient,
)
from .codebook import decoded_rows, dequantize
from .eager import dora as _eager

__all__ = ["dora_norm"]

_NORM = kernel("dora", "dora_norm")
_SCALE = kernel("dora", "dora_scale")
_SCALE_BACKWARD = kernel("dora", "dora_scale_backward")


# ---- norms -------------------------------------------------------------------------------------


def _norm(weight: Tensor | None, *args: Any) -> Tensor:
    """‖W + scale·B A‖ of each row; args are the packed fields, lora_a, lora_b, scale."""
    values, (lora_a, lora_b, scale) = args[:8], args[8:]
    _check_norm(weight, values, lora_a, lora_b)
    rows, columns, rank = lora_b.shape[0], lora_a.shape[1], lora_b.shape[1]
    norm = lora_a.new_empty(rows, dtype=_norm_dtype(weight, lora_a, lora_b))
    if weight is None:
        parts = decoded_rows(lora_a, values, rows, columns, torch.float32)
    else:
        parts = iter([(0, rows, weight.contiguous())])
    for first, last, part in parts:
        if norm.dtype is torch.float64:
            part = part.double()
        if _library_serves(part, rank):
            norm[first:last] = _norm_by_library(part, lora_a, lora_b[first:last], scale)
            continue
        _NORM(
            part, DTYPES[part.dtype], last - first, columns, rank, *factor_of(lora_b[first:last].t()),
            *factor_of(lora_a), scale, norm[first:last],
        )  # fmt: skip
    return norm


def _library_serves(weight: Tensor, rank: int) -> bool:
    return rank >= LIBRARY_RANK and weight.is_cpu and _backend.in_force() in ("auto", "cpu")


def _norm_by_library(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """With B A a library's product, in pieces that stay in a cache: faster from such a rank on."""
    dtype = accumulator(weight.dtype)
    rows, columns = weight.shape
    norm = weight.new_empty(rows, dtype=dtype)
    panel = max(_matmul.PANEL_BYTES // max(columns * dtype.itemsize, 1), 1)
    memory = _matmul.workspace.take(weight, dtype, min(panel, rows) * columns)
    turned, factor = lora_a.to(dtype).t(), lora_b.to(dtype) * scale
    for first in range(0, rows, panel):
        last = min(first + panel, rows)
        part = memory[: (last - first) * columns].view(last - first, columns)
        part.copy_(weight[first:last])
        total = _matmul.linear_onto(part, factor[first:last], turned)
        norm[first:last] = torch.linalg.vector_norm(total, dim=1, dtype=torch.float64)
    _matmul.workspace.give_back(memory)
    return norm


def _norm_dtype(weight: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> torch.dtype:
    """float64 for a float64 weight, or for float64 factors of a packed one."""
    if weight is not None:
        return accumulator(weight.dtype)
    wide = torch.float64 in (lora_a.dtype, lora_b.dtype)
    return torch.float64 if wide else torch.float32


def _check_norm(weight: Tensor | None, values: Any, lora_a: Tensor, lora_b: Tensor) -> None:
    dtype = _norm_dtype(weight, lora_a, lora_b) if weight is None else weight.dtype
    like = lora_a.new_empty(0, dtype=dtype)
    check_call(like, lora_a.shape[1], weight, values, lora_a, lora_b, None, None)


def _norm_fake(weight: Tensor | None, *args: Any) -> Tensor:
    values, (lora_a, lora_b, _) = args[:8], args[8:]
    _check_norm(weight, values, lora_a, lora_b)
    return lora_a.new_empty(lora_b.shape[0], dtype=_norm_dtype(weight, lora_a, lora_b))


_NORM_FORWARD = raw_op(
    f"dora_norm_forward({WEIGHT}, Tensor lora_a, Tensor lora_b, float scale) -> Tensor",
    run=_norm,
    fake=_norm_fake,
)


def dora_norm(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor = 1.0
) -> Tensor:
    """The norms of the rows of an adapted weight, which DoRA divides by (arXiv:2402.09353, equation 5).

        norm_j = ‖W_j + s·(B A)_j‖₂

    Neither B A nor the sum is stored. With this norm as its magnitude a DoRA layer is the plain LoRA layer.

    Args:
        weight: W (out, in), a tensor of any float type or a CodebookTensor.
        lora_a, lora_b: A (r, in) and B (out, r), of any float type (float64 only if W is, or packed).
        scale: s.

    Returns:
        (out,) float32, or float64 for a float64 weight or factor. No gradient passes, as in the paper.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: a tensor, not {type(weight).__name__}")
    float_tensor("weight", weight)
    check_factors(weight, lora_a, lora_b)
    scale = scalar("scale", scale)
    packed = weight if isinstance(weight, CodebookTensor) else None
    lora_a, lora_b = lora_a.detach(), lora_b.detach()
    if runs_eagerly("dora", weight):
        dtype = _norm_dtype(None if packed is not None else weight, lora_a, lora_b)
        plain = weight.detach() if packed is None else dequantize(packed, torch.float32).to(dtype)
        _check_norm(plain, None, lora_a, lora_b)
        return _eager.dora_norm(plain, lora_a, lora_b, scale)
    return _NORM_FORWARD(
        weight.detach() if packed is None else None, *(NO_FIELDS if packed is None else fields(packed)),
        lora_a, lora_b, scale,
    )  # fmt: skip


# ---- raw ops -----------------------------------------------------------------------------------


def factor_from(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / norm, and 0 where a row is zero: its direction is not defined, its product is 0."""
    return torch.where(norm == 0, 0.0, magnitude.to(norm.dtype) / norm)


def _check(
    x: Tensor, columns: Any, weight: Tensor | None, values: Any, lora_a: Tensor, lora_b: Tensor,
    magnitude: Tensor, bias: Tensor | None, seed: Tensor | None,
) -> None:  # fmt: skip
    check_call(x, columns, weight, values, lora_a, lora_b, bias, seed)
    float_tensor("magnitude", magnitude)
    same_device("magnitude", magnitude, "x", x)
    if magnitude.shape != lora_b.shape[:1]:
        raise ValueError(
            f"magnitude: shape {tuple(magnitude.shape)}; allowed: ({lora_b.shape[0]},)"
        )


def _forward(x: Tensor, weight: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (…, out), z (tokens, out) if it is to be kept, h (tokens, rank), norm (out,)."""
    values, (lora_a, lora_b, magnitude, bias, seed, scale, p, keep) = args[:8], args[8:]
    _check(x, x.shape[-1], weight, values, lora_a, lora_b, magnitude, bias, seed)
    check_mask(p, seed)
    rows, columns = lora_b.shape[0], x.shape[-1]
    shape, tokens = (*x.shape[:-1], rows), math.prod(x.shape[:-1])
    x = x.reshape(tokens, columns).contiguous()
    wide = weight is None and x.dtype is torch.float64  # what a packed weight's norms do not know
    norm = _norm(weight, *values, lora_a.double() if wide else lora_a, lora_b, scale)
    dropped = x if seed is None else drop(x, dropout_of(p, seed))
    h, _ = shrink(dropped, lora_a, 1.0)
    assert h is not None
    z = adapted_product(dropped, weight, values, rows, columns, h, lora_b.t(), scale)
    if seed is None:
        y = torch.empty_like(z) if keep else z
    else:
        y = base_product(x - dropped, weight, values, rows, columns)
    bias = None if bias is None else bias.contiguous()
    _SCALE(
        z, DTYPES[z.dtype], tokens, rows, factor_from(magnitude, norm), bias, seed is not None, y
    )
    return shaped(y, shape), z if keep else x.new_empty(0), h, norm


def _forward_fake(
    x: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, (lora_a, lora_b, magnitude, bias, seed, _, _, keep) = args[:8], args[8:]
    _check(x, x.shape[-1], weight, values, lora_a, lora_b, magnitude, bias, seed)
    (rows, rank), tokens, dtype = lora_b.shape, math.prod(x.shape[:-1]), accumulator(x.dtype)
    return (
        x.new_empty((*x.shape[:-1], rows)),
        x.new_empty((tokens, rows) if keep else 0),
        x.new_empty((tokens, rank), dtype=dtype),
        x.new_empty(rows, dtype=dtype),
    )


def _backward(
    dy: Tensor, x: Tensor, z: Tensor, h: Tensor, norm: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, dm and dW; what `needs` does not ask for is empty."""
    values, (lora_a, lora_b, magnitude, seed, scale, p, needs) = args[:8], args[8:]
    _check_backward(dy, x, z, h, norm, weight, values, lora_a, lora_b, magnitude, seed, needs)
    check_dropout(p)
    rows, columns = lora_b.shape[0], lora_a.shape[1]
    shape, tokens = (*dy.shape[:-1], columns), h.shape[0]
    dy, h = dy.reshape(tokens, rows).contiguous(), h.contiguous()
    dx, da, db, dm, dw = (dy.new_empty(0) for _ in range(5))
    dz = torch.empty_like(dy) if needs & ~NEEDS_MAGNITUDE else None
    total = torch.empty_like(norm) if needs & NEEDS_MAGNITUDE else None
    _SCALE_BACKWARD(
        dy, z.contiguous() if total is not None else None, DTYPES[dy.dtype], tokens, rows,
        factor_from(magnitude, norm), dz, total,
    )  # fmt: skip
    if total is not None:
        dm = torch.where(norm == 0, 0.0, total / norm).to(magnitude.dtype)
    if dz is None:
        return dx, da, db, dm, dw
    g = None
    if needs & (NEEDS_X | NEEDS_A | NEEDS_B):
        factor = lora_b.t() if needs & (NEEDS_X | NEEDS_A) else None
        g, outer = shrink(dz, factor, scale, h if needs & NEEDS_B else None, scale, h.shape[1])
        if outer is not None:
            db = outer.t().contiguous().to(lora_b.dtype)
    dropout = dropout_of(p, seed)
    if needs & (NEEDS_A | NEEDS_WEIGHT):
        x = x.reshape(tokens, columns).contiguous()
    if needs & NEEDS_A:
        _, outer = shrink(x, None, 1.0, g, 1.0, h.shape[1], dropout)
        assert outer is not None
        da = outer.to(lora_a.dtype)
    if needs & NEEDS_WEIGHT:
        dropped = x if seed is None else drop(x, dropout)
        dw = _matmul.linear(dz.t(), dropped.t())
        if seed is not None:
            dw += _matmul.linear(dy.t(), (x - dropped).t())
    if needs & NEEDS_X:
        assert g is not None
        dx = adapted_product(dz, weight, values, rows, columns, g, lora_a, 1.0, transposed=True)
        if seed is not None:
            plain = base_product(dy, weight, values, rows, columns, transposed=True)
            dx = drop(dx.sub_(plain), dropout, onto=plain)
        dx = dx.view(shape)
    return dx, da, db, dm, dw


def _check_backward(
    dy: Tensor, x: Tensor, z: Tensor, h: Tensor, norm: Tensor, weight: Tensor | None, values: Any,
    lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, seed: Tensor | None, needs: int,
) -> None:  # fmt: skip
    check_backward(dy, x, h, weight, values, lora_a, lora_b, seed, needs)
    _check(dy, lora_a.shape[1], weight, values, lora_a, lora_b, magnitude, None, seed)
    same_device("norm", norm, "dy", dy)
    if norm.dtype is not accumulator(dy.dtype) or norm.shape != lora_b.shape[:1]:
        raise ValueError(f"norm: {norm.dtype} {tuple(norm.shape)}; not what the forward made")
    if needs & NEEDS_MAGNITUDE:
        same_device("z", z, "dy", dy)
        if z.dtype is not dy.dtype or z.shape != (h.shape[0], lora_b.shape[0]):
            raise ValueError(f"z: {z.dtype} {tuple(z.shape)}; not what the forward made")


def _backward_fake(
    dy: Tensor, x: Tensor, z: Tensor, h: Tensor, norm: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values, (lora_a, lora_b, magnitude, seed, _, _, needs) = args[:8], args[8:]
    _check_backward(dy, x, z, h, norm, weight, values, lora_a, lora_b, magnitude, seed, needs)

    def made(need: int, like: Tensor, shape: Any) -> Tensor:
        return like.new_empty(shape) if needs & need else dy.new_empty(0)

    return (
        made(NEEDS_X, dy, (*dy.shape[:-1], lora_a.shape[1])),
        made(NEEDS_A, lora_a, lora_a.shape),
        made(NEEDS_B, lora_b, lora_b.shape),
        made(NEEDS_MAGNITUDE, magnitude, magnitude.shape),
        made(NEEDS_WEIGHT, dy, (lora_b.shape[0], lora_a.shape[1])),
    )


_FORWARD = raw_op(
    f"dora_linear_forward(Tensor x, {WEIGHT}, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
    "Tensor? bias, Tensor? seed, float scale, float dropout, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
)
_BACKWARD = raw_op(
    f"dora_linear_backward(Tensor dy, Tensor x, Tensor z, Tensor h, Tensor norm, {WEIGHT}, Tensor lora_a, "
    "Tensor lora_b, Tensor magnitude, Tensor? seed, float scale, float dropout, int needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_backward,
    fake=_backward_fake,
)


# ---- autograd ----------------------------------------------------------------------------------


class _DoraLinear(torch.autograd.Function):
    """Keeps x (where A or the weight trains), A, B, m, h, the norms and, where m trains, z."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        seed: Tensor | None,
        scale: Any,
        dropout: Any,
        *values: Any,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        y, z, h, norm = _FORWARD(
            x, weight, *values, lora_a, lora_b, magnitude, bias, seed, scale, dropout, needs[5]
        )
        keeps_x = needs[3] or needs[1]
        tensors = [
            x if keeps_x else x.new_empty(0), weight, lora_a, lora_b, magnitude, z, h, norm, seed,
            *values[:6],
        ]  # fmt: skip
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
        x, weight, lora_a, lora_b, magnitude, z, h, norm, seed, *rest = ctx.saved_tensors
        scale, dropout = ctx.scalars or rest[6:]
        x_, w_, bias_, a_, b_, m_, *_ = ctx.needs_input_grad
        needs = (
            NEEDS_X * x_ | NEEDS_A * a_ | NEEDS_B * b_ | NEEDS_WEIGHT * w_ | NEEDS_MAGNITUDE * m_
        )
        dx = da = db = dm = dw = None
        if needs:
            dx, da, db, dm, dw = _BACKWARD(
                dy, x, z, h, norm, weight, *rest[:6], *ctx.blocksizes, lora_a, lora_b, magnitude, seed,
                scale, dropout, needs,
            )  # fmt: skip
        dbias = bias_gradient(dy) if bias_ else None
        return (
            dx if x_ else None, dw if w_ else None, dbias, da if a_ else None, db if b_ else None,
            dm if m_ else None, *(None for _ in range(11)),
        )  # fmt: skip


def dora_linear(
    call: Call,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Any,
    scale: Any,
    seed: Any,
) -> Tensor:
    """What `lora_linear` is with a magnitude; the arguments are checked but for that."""
    x, dense, values, bias, dropout, *_ = call
    if isinstance(float_tensor("magnitude", magnitude), CodebookTensor):
        raise TypeError("magnitude: a tensor of numbers, not a CodebookTensor")
    if runs_eagerly("dora", x):
        plain = call.plain_weight()
        _check(x, x.shape[-1], plain, None, lora_a, lora_b, magnitude, bias, seed)
        if not is_compiling():
            check_dropout(dropout)
        return _eager.dora_linear(x, plain, lora_a, lora_b, magnitude, scale, bias, dropout, seed)
    args = (dense, bias, lora_a, lora_b, magnitude, seed, scale, dropout, *values)
    if wants_gradient(x, *args[:5]):
        return _DoraLinear.apply(x, *args)
    return _FORWARD(
        x, dense, *values, lora_a, lora_b, magnitude, bias, seed, scale, dropout, False
    )[0]
