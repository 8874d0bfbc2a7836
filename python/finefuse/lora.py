"""Low-rank updates: LoRA and QLoRA linear layers, merging and unmerging."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _backend, _matmul
from ._args import check_dropout, check_lora_shapes, dropout_numbers
from ._codebook_tensor import CodebookTensor, check_fields, fields
from ._op import (
    DTYPES,
    accumulator,
    composite,
    consumed,
    float_tensor,
    kernel,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
    wants_gradient,
)
from .codebook import dequantize, packed_product, quantize
from .eager import lora as _eager

__all__ = ["lora_linear", "merge_lora", "unmerge_lora"]

_SHRINK = kernel("lora", "lora_shrink")
_EXPAND = kernel("lora", "lora_expand")

# Up to so many tokens one CUDA kernel has all of a forward on a dense weight, up to such a rank
# (csrc/ops/lora.h, kLoraLinearRank). Not measured yet.
CUDA_LINEAR_TOKENS, CUDA_LINEAR_RANK = 64, 256

_NO_DROPOUT = (None, 0, 1.0)

# From this rank on a library's product is faster on CPUs, where it does: without dropout, all of one type.
# 4096 columns, 2048 rows, float32, one thread of an AVX2 machine, ms of ours and the library's: h 5.9 and
# 6.2 at rank 16, 18.5 and 14.8 at 64; g and dB in one visit 13 and 16, 59 and 40; onto y 8.2 and 7.1, 26
# and 17.
LIBRARY_RANK = 48
_NEEDS_X, _NEEDS_A, _NEEDS_B, _NEEDS_WEIGHT = 1, 2, 4, 8


# ---- the narrow products -----------------------------------------------------------------------


def _dropout(p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, scale) as kernels take them."""
    if seed is None:
        return _NO_DROPOUT
    return seed, *dropout_numbers(p)


def _factor(factor: Tensor) -> tuple[Tensor, int, int, int]:
    """(rank, columns), of any strides."""
    return factor, DTYPES[factor.dtype], factor.stride(0), factor.stride(1)


def _library_serves(x: Tensor, rank: int, dropout: Any, *others: Tensor | None) -> bool:
    return (
        rank >= LIBRARY_RANK
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and dropout is _NO_DROPOUT
        and all(o is None or o.dtype is x.dtype for o in others)
        and _backend.in_force() in ("auto", "cpu")
    )


def _shrink(
    x: Tensor,
    factor: Tensor | None,
    scale: float,
    g: Tensor | None = None,
    outer_scale: float = 1.0,
    rank: int = 0,
    dropout: Any = _NO_DROPOUT,
) -> tuple[Tensor | None, Tensor | None]:
    """(scale·D(x)·factorᵀ, outer_scale·gᵀ·D(x)) in one visit of x; without a factor or g, None."""
    tokens, columns = x.shape
    dtype, h, outer = accumulator(x.dtype), None, None
    rank = rank if factor is None else factor.shape[0]
    if tokens and columns and _library_serves(x, rank, dropout, factor):
        if factor is not None:
            h = _matmul.linear(x, factor)
            h = h if scale == 1 else h.mul_(scale)
        if g is not None:
            outer = _matmul.linear(g.t(), x.t())
            outer = outer if outer_scale == 1 else outer.mul_(outer_scale)
        return h, outer
    if factor is not None:
        h = x.new_empty((tokens, rank), dtype=dtype)
    if g is not None:
        outer = x.new_empty((rank, columns), dtype=dtype)
    _SHRINK(
        x, DTYPES[x.dtype], tokens, columns, rank, *(_factor(factor) if factor is not None else
        (None, 0, 0, 0)), h, scale, g, outer, outer_scale, *dropout,
    )  # fmt: skip
    return h, outer


def _expand(
    h: Tensor,
    factor: Tensor,
    scale: float,
    y: Tensor,
    accumulate: bool,
    bias: Tensor | None = None,
    dropout: Any = _NO_DROPOUT,
) -> None:
    """y = [y +] [bias +] D(scale·h·factor), y (tokens, columns) contiguous."""
    tokens, columns = y.shape
    if tokens and columns and _library_serves(y, h.shape[1], dropout, factor):
        if not accumulate:
            y.zero_()
        if bias is not None:
            y += bias
        total = _matmul.linear_onto(y, h * scale, factor.t())
        if total is not y:
            y.copy_(total)
        return
    _EXPAND(
        h, tokens, columns, h.shape[1], *_factor(factor), scale, bias, accumulate, y, DTYPES[y.dtype],
        *dropout,
    )  # fmt: skip


# ---- with the base product ---------------------------------------------------------------------


def _onto_product(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    factor: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: Any = _NO_DROPOUT,
) -> Tensor:
    """x·weightᵀ [+ bias] + D(scale·h·factor), x (tokens, K) contiguous, weight (columns, K)."""
    columns = factor.shape[1]
    if _fuses(x):
        y = x.new_empty((x.shape[0], columns))
        _backend.launch("lora", "lora_product", x, (
            DTYPES[x.dtype], *x.shape, weight, *weight.stride(), columns, h, h.shape[1],
            *_factor(factor), scale, None if bias is None else bias.contiguous(), y, *dropout,
        ))  # fmt: skip
        return y
    dtype = _matmul.product_dtype(x)
    y = x.new_empty((x.shape[0], columns), dtype=dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    _expand(h, factor, scale, y, False, bias, dropout)
    return _matmul.linear_onto(y, x, weight).to(x.dtype)


def _fuses(x: Tensor) -> bool:
    """Whether Triton takes the base product too: its own of float32 and float64 are not worth it."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and _backend.resolve("lora", x.device, _backend.in_force()) == "triton"
    )


def _linear_kernel(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x Wᵀ + bias + scale·h·lora_bᵀ and h = x·lora_aᵀ of a few tokens, in one launch."""
    (tokens, columns), (rows, rank) = x.shape, lora_b.shape
    y, h = x.new_empty((tokens, rows)), x.new_empty((tokens, rank), dtype=torch.float32)
    _backend.launch("lora", "lora_linear", x, (
        DTYPES[x.dtype], tokens, columns, rank, weight, rows, *_factor(lora_a), *_factor(lora_b.t()),
        scale, None if bias is None else bias.contiguous(), h, y,
    ))  # fmt: skip
    return y, h


def _has_linear_kernel(x: Tensor, weight: Tensor, rank: int) -> bool:
    return (
        0 < x.shape[0] <= CUDA_LINEAR_TOKENS
        and rank <= CUDA_LINEAR_RANK
        and x.dtype is not torch.float64
        and weight.numel() > 0
        and weight.is_contiguous()
        and _backend.resolve("lora", x.device, _backend.in_force()) == "cuda"
    )


# ---- raw ops -----------------------------------------------------------------------------------

_WEIGHT = (
    "Tensor? weight, Tensor? codes, Tensor? code, Tensor? absmax, Tensor? nested_code, "
    "Tensor? nested_absmax, Tensor? nested_offset, int nested_blocksize, int blocksize"
)
_NO_FIELDS = (None, None, None, None, None, None, 0, 0)


def _check(
    x: Tensor,
    columns: Any,
    weight: Tensor | None,
    values: Any,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
) -> None:
    """What kernels rely on; x is (…, columns)."""
    float_tensor("x", x)
    rows, rank = lora_b.shape
    if lora_a.shape != (rank, columns):
        raise ValueError(f"lora_a: shape {tuple(lora_a.shape)}; allowed: ({rank}, {columns})")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        float_tensor(name, tensor)
        same_device(name, tensor, "x", x)
        if tensor.dtype is torch.float64 and x.dtype is not torch.float64:
            raise TypeError(f"{name}: dtype torch.float64; x has {x.dtype}")
    if weight is not None:
        same_device("weight", weight, "x", x)
        if weight.dtype is not x.dtype:
            raise TypeError(f"weight: dtype {weight.dtype}; x has {x.dtype}")
        if weight.shape != (rows, columns):
            raise ValueError(f"weight: shape {tuple(weight.shape)}; allowed: ({rows}, {columns})")
    else:
        same_device("codes", values[0], "x", x)
        check_fields(values, rows * columns)
    if bias is not None:
        same_device("bias", bias, "x", x)
        if bias.dtype is not x.dtype:
            raise TypeError(f"bias: dtype {bias.dtype}; x has {x.dtype}")
        if bias.shape != (rows,):
            raise ValueError(f"bias: shape {tuple(bias.shape)}; allowed: ({rows},)")
    if seed is not None:
        same_device("seed", seed, "x", x)
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: {seed.dtype} {tuple(seed.shape)}; allowed: int64, one number")


def _forward(x: Tensor, weight: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """y (…, out) and h (tokens, rank)."""
    values, (lora_a, lora_b, bias, seed, scale, p) = args[:8], args[8:]
    _check(x, x.shape[-1], weight, values, lora_a, lora_b, bias, seed)
    check_dropout(p)
    if seed is None and p != 0:
        raise ValueError("seed: None with dropout; allowed: int64, one number")
    rows, columns = lora_b.shape[0], x.shape[-1]
    shape = (*x.shape[:-1], rows)
    x = x.reshape(math.prod(x.shape[:-1]), columns).contiguous()
    if weight is not None and seed is None and _has_linear_kernel(x, weight, lora_a.shape[0]):
        y, h_of_few = _linear_kernel(x, weight, lora_a, lora_b, scale, bias)
        return y.view(shape), h_of_few
    h, _ = _shrink(x, lora_a, 1.0, dropout=_dropout(p, seed))
    assert h is not None
    if weight is None:
        y = packed_product(x, values, rows, columns, False, bias)
        _expand(h, lora_b.t(), scale, y, accumulate=True)
        return y.view(shape), h
    return _onto_product(x, weight, h, lora_b.t(), scale, bias).view(shape), h


def _forward_fake(x: Tensor, weight: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    values, (lora_a, lora_b, bias, seed, *_) = args[:8], args[8:]
    _check(x, x.shape[-1], weight, values, lora_a, lora_b, bias, seed)
    tokens = math.prod(x.shape[:-1])
    h = x.new_empty((tokens, lora_b.shape[1]), dtype=accumulator(x.dtype))
    return x.new_empty((*x.shape[:-1], lora_b.shape[0])), h


def _backward(
    dy: Tensor, x: Tensor, h: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB and dW; what `needs` does not ask for is empty. Without dA or dW x is not read."""
    values, (lora_a, lora_b, seed, scale, p, needs) = args[:8], args[8:]
    _check_backward(dy, x, h, weight, values, lora_a, lora_b, seed, needs)
    check_dropout(p)
    rows, columns = lora_b.shape[0], lora_a.shape[1]
    shape = (*dy.shape[:-1], columns)
    dy = dy.reshape(h.shape[0], rows).contiguous()
    h = h.contiguous()
    dropout = _dropout(p, seed)
    dx, da, db, dw = (dy.new_empty(0) for _ in range(4))
    g = None
    if needs & (_NEEDS_X | _NEEDS_A | _NEEDS_B):
        factor = lora_b.t() if needs & (_NEEDS_X | _NEEDS_A) else None
        g, outer = _shrink(
            dy, factor, scale, h if needs & _NEEDS_B else None, scale, rank=h.shape[1]
        )
        if outer is not None:
            db = outer.t().contiguous().to(lora_b.dtype)
    if needs & (_NEEDS_A | _NEEDS_WEIGHT):
        x = x.reshape(h.shape[0], columns).contiguous()
    if needs & _NEEDS_A:
        _, outer = _shrink(x, None, 1.0, g, 1.0, rank=h.shape[1], dropout=dropout)
        assert outer is not None
        da = outer.to(lora_a.dtype)
    if needs & _NEEDS_WEIGHT:
        dw = _matmul.linear(dy.t(), x.t())
    if needs & _NEEDS_X:
        assert g is not None
        if weight is None:
            dx = packed_product(dy, values, rows, columns, True, None)
            _expand(g, lora_a, 1.0, dx, accumulate=True, dropout=dropout)
        else:
            dx = _onto_product(dy, weight.t(), g, lora_a, 1.0, dropout=dropout)
        dx = dx.view(shape)
    return dx, da, db, dw


def _check_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    values: Any,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor | None,
    needs: int,
) -> None:
    if dy.shape[-1:] != lora_b.shape[:1]:
        raise ValueError(f"dy: shape {tuple(dy.shape)}; allowed: (…, {lora_b.shape[0]})")
    _check(dy, lora_a.shape[1], weight, values, lora_a, lora_b, None, seed)
    tokens = math.prod(dy.shape[:-1])
    if h.dtype is not accumulator(dy.dtype) or h.shape != (tokens, lora_b.shape[1]):
        raise ValueError(f"h: {h.dtype} {tuple(h.shape)}; not what the forward made")
    same_device("h", h, "dy", dy)
    if needs & (_NEEDS_A | _NEEDS_WEIGHT):
        same_device("x", x, "dy", dy)
        if x.dtype is not dy.dtype or x.shape != (*dy.shape[:-1], lora_a.shape[1]):
            raise ValueError(f"x: {x.dtype} {tuple(x.shape)}; not what the forward took")


def _backward_fake(
    dy: Tensor, x: Tensor, h: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, (lora_a, lora_b, seed, _, _, needs) = args[:8], args[8:]
    _check_backward(dy, x, h, weight, values, lora_a, lora_b, seed, needs)
    return (
        dy.new_empty((*dy.shape[:-1], lora_a.shape[1])) if needs & _NEEDS_X else dy.new_empty(0),
        lora_a.new_empty(lora_a.shape) if needs & _NEEDS_A else dy.new_empty(0),
        lora_b.new_empty(lora_b.shape) if needs & _NEEDS_B else dy.new_empty(0),
        dy.new_empty((lora_b.shape[0], lora_a.shape[1]))
        if needs & _NEEDS_WEIGHT
        else dy.new_empty(0),
    )


_FORWARD = raw_op(
    f"lora_linear_forward(Tensor x, {_WEIGHT}, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, "
    "float scale, float dropout) -> (Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
)
_BACKWARD = raw_op(
    f"lora_linear_backward(Tensor dy, Tensor x, Tensor h, {_WEIGHT}, Tensor lora_a, Tensor lora_b, "
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
        needs = _NEEDS_X * x_ | _NEEDS_A * a_ | _NEEDS_B * b_ | _NEEDS_WEIGHT * w_
        dx = da = db = dw = None
        if needs:
            dx, da, db, dw = _BACKWARD(
                dy, x, h, weight, *rest[:6], *ctx.blocksizes, lora_a, lora_b, seed, scale, dropout, needs
            )  # fmt: skip
        dbias = None
        if bias_:
            dbias = dy.sum(tuple(range(dy.ndim - 1))) if dy.ndim > 1 else dy
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

    Returns:
        (…, out) in the type of x.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    x = float_tensor("x", x)
    if isinstance(x, CodebookTensor):
        raise TypeError("x: a tensor of numbers, not a CodebookTensor")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: a tensor, not {type(weight).__name__}")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        if not isinstance(weight, CodebookTensor) and weight.dtype is not torch.float64:
            weight = weight.to(dtype)
    _check_factors(weight, lora_a, lora_b)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: shape {tuple(x.shape)}; a weight of {tuple(weight.shape)} takes (…, in) with (out, in)"
        )
    if bias is not None:
        bias = float_tensor("bias", bias).to(x.dtype)
    dense, values = (
        (None, fields(weight)) if isinstance(weight, CodebookTensor) else (weight, _NO_FIELDS)
    )
    drops = isinstance(dropout, Tensor) or dropout != 0
    scale, dropout = scalar("scale", scale), scalar("dropout", dropout)
    seed = _seed(seed, x) if drops else None
    args = (dense, bias, lora_a, lora_b, seed, scale, dropout, *values)
    if runs_eagerly("lora", x):
        plain = dequantize(weight, x.dtype) if isinstance(weight, CodebookTensor) else weight
        _check(x, x.shape[-1], plain, None, lora_a, lora_b, bias, seed)
        p: Any = dropout
        if not is_compiling():
            check_dropout(p)
        return _eager.lora_linear(x, plain, lora_a, lora_b, scale, bias, p, seed)
    if wants_gradient(x, *args[:4]):
        return _LoraLinear.apply(x, *args)
    return _FORWARD(x, dense, *values, lora_a, lora_b, bias, seed, scale, dropout)[0]


def _check_factors(weight: Tensor, lora_a: Any, lora_b: Any) -> None:
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        if isinstance(float_tensor(name, value), CodebookTensor):
            raise TypeError(f"{name}: a tensor of numbers, not a CodebookTensor")
    check_lora_shapes(weight.shape, lora_a.shape, lora_b.shape)


def _seed(seed: int | Tensor | None, x: Tensor) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: {seed.dtype} {tuple(seed.shape)}; allowed: int64, one number")
        return seed.reshape(1)
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise TypeError(f"seed: a 64-bit int, not {seed!r}")
    return torch.full((1,), seed, dtype=torch.int64, device=x.device)


def _composite(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Any = None,
    seed: Any = None,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    return lora_linear(
        x, weight, lora_a, lora_b, scale=scale, bias=bias, dropout=dropout, seed=seed
    )


composite(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, *, Tensor? bias=None, "
    "Tensor? seed=None, float scale=1.0, float dropout=0.0) -> Tensor",
    _composite,
)


# ---- merging -----------------------------------------------------------------------------------


def merge_lora(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    *,
    out: Tensor | None = None,
    return_error: bool = False,
) -> Any:
    """The weight with its low-rank update in it: W + s·B A, computed in float32 and rounded once.

    Args:
        weight: W (out, in): a tensor of any float type (float64: computed in it), or a CodebookTensor, which
            is decoded, merged and quantised again with its own code, blocksize and double quantisation.
        lora_a, lora_b: A (r, in) and B (out, r).
        scale: s.
        out: where to write it: `weight` itself, or a tensor of its shape and type. None: a new one.
        return_error: also return the largest absolute difference between the result, decoded, and
            W + s·B A: what quantising again costs, or rounding.

    Returns:
        The merged weight, of the kind of `weight`; with `return_error` (that, a Python float). No gradient
        passes.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: a tensor, not {type(weight).__name__}")
    _check_factors(weight, lora_a, lora_b)
    same_device("lora_a", lora_a, "weight", weight)
    same_device("lora_b", lora_b, "weight", weight)
    scale = scalar("scale", scale)
    if out is not None and out is not weight:
        if isinstance(weight, CodebookTensor) and not isinstance(out, CodebookTensor):
            raise TypeError("out: a CodebookTensor, as weight is")
        if out.shape != weight.shape or out.dtype is not weight.dtype:
            raise ValueError(
                f"out: {out.dtype} {tuple(out.shape)}; weight is {weight.dtype} {tuple(weight.shape)}"
            )
        same_device("out", out, "weight", weight)
    lora_a, lora_b = lora_a.detach(), lora_b.detach()
    merged, exact = (
        _merged_codes(weight, lora_a, lora_b, scale, out)
        if isinstance(weight, CodebookTensor)
        else _merged(weight.detach(), lora_a, lora_b, scale, out, return_error)
    )
    if not return_error:
        return merged
    assert exact is not None
    plain = dequantize(merged, exact.dtype) if isinstance(merged, CodebookTensor) else merged
    return merged, float((plain.to(exact.dtype) - exact).abs().max()) if exact.numel() else 0.0


def unmerge_lora(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    *,
    out: Tensor | None = None,
    return_error: bool = False,
) -> Any:
    """`merge_lora` with -s: W - s·B A. What rounding took at the merge does not come back."""
    scale = -scalar("scale", scale)
    return merge_lora(weight, lora_a, lora_b, scale, out=out, return_error=return_error)


def _copy(weight: Tensor) -> Tensor:
    return weight.clone(memory_format=torch.contiguous_format)


def _sum(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W + s·B A over the memory of W, which is contiguous."""
    dtype = accumulator(weight.dtype)
    if weight.numel() == 0:
        return weight
    if runs_eagerly("lora", weight):
        with _eager.no_autocast(weight):
            update = scale * (lora_b.to(dtype) @ lora_a.to(dtype))
        return weight.copy_(weight.to(dtype) + update)
    _expand(lora_b.to(dtype).contiguous(), lora_a, scale, weight, accumulate=True)
    return weight


def _merged(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    out: Tensor | None,
    return_error: bool,
) -> tuple[Tensor, Tensor | None]:
    """(the rounded sum, in `out` if that is given, and the sum itself where it is asked for)."""
    exact = None
    if return_error:
        exact = _sum(_copy(weight).to(torch.float64), lora_a, lora_b, scale)
    if out is None:
        return _sum(_copy(weight), lora_a, lora_b, scale), exact
    same = out.data_ptr() == weight.data_ptr() and out.stride() == weight.stride()
    if same and out.is_contiguous():
        _sum(weight, lora_a, lora_b, scale)
    else:
        out.detach().copy_(_sum(_copy(weight), lora_a, lora_b, scale))
    consumed(out)
    return out, exact


def _merged_codes(
    q: CodebookTensor, lora_a: Tensor, lora_b: Tensor, scale: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    exact = _sum(dequantize(q, torch.float32), lora_a, lora_b, scale)
    merged = quantize(exact, q.code, q.blocksize, q.nested is not None, q.nested_blocksize or 256)
    return merged.to(q.dtype) if out is None else out.copy_(merged), exact
