"""Below lora, dora and segmented: the narrow products beside a base product, and what is checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backend, _matmul
from ._args.lora import check_dropout, check_lora_shapes, dropout_numbers
from ._codebook_tensor import NO_FIELDS, CodebookTensor, check_fields, fields
from ._op import DTYPES, accumulator, autocast_dtype, float_tensor, kernel, same_device, scalar
from .codebook import dequantize, packed_product

_SHRINK = kernel("lora", "lora_shrink")
_SHRINK_GROUP = kernel("lora", "lora_shrink_group")
_EXPAND = kernel("lora", "lora_expand")
_DROPOUT = kernel("lora", "lora_dropout")

# Up to so many tokens one CUDA kernel has all of a forward on a dense weight, up to such a rank
# (csrc/ops/lora.h, kLoraLinearRank). Not measured yet.
CUDA_LINEAR_TOKENS, CUDA_LINEAR_RANK = 64, 256

NO_DROPOUT = (None, 0, 1.0)

# From this rank on a library's product is faster on CPUs, where it does: without dropout, all of one type.
# 4096 columns, 2048 rows, float32, one thread of an AVX2 machine, ms of ours and the library's: h 5.9 and
# 6.2 at rank 16, 18.5 and 14.8 at 64; g and dB in one visit 13 and 16, 59 and 40; onto y 8.2 and 7.1, 26
# and 17.
LIBRARY_RANK = 48

MEMBERS = 4  # of a group that one visit serves: csrc/ops/lora.h, kLoraMembers

# What a backward is asked for.
NEEDS_X, NEEDS_A, NEEDS_B, NEEDS_WEIGHT, NEEDS_MAGNITUDE = 1, 2, 4, 8, 16


# ---- the narrow products -----------------------------------------------------------------------


def dropout_of(p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, scale) as kernels take them."""
    if seed is None:
        return NO_DROPOUT
    return seed, *dropout_numbers(p)


def factor_of(factor: Tensor) -> tuple[Tensor, int, int, int]:
    """(rank, columns), of any strides."""
    return factor, DTYPES[factor.dtype], factor.stride(0), factor.stride(1)


def _library_serves(x: Tensor, rank: int, dropout: Any, *others: Tensor | None) -> bool:
    return (
        rank >= LIBRARY_RANK
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and dropout is NO_DROPOUT
        and all(o is None or o.dtype is x.dtype for o in others)
        and _backend.in_force() in ("auto", "cpu")
    )


def shrink(
    x: Tensor,
    factor: Tensor | None,
    scale: float,
    g: Tensor | None = None,
    outer_scale: float = 1.0,
    rank: int = 0,
    dropout: Any = NO_DROPOUT,
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
        x, DTYPES[x.dtype], tokens, columns, rank, *(factor_of(factor) if factor is not None else
        (None, 0, 0, 0)), h, scale, g, outer, outer_scale, *dropout,
    )  # fmt: skip
    return h, outer


class Member(NamedTuple):
    """One shrink of several of the same x: the arguments of `shrink` beside it."""

    rank: int
    factor: Tensor | None
    dropout: Any
    g: Tensor | None = None


def shrink_group(x: Tensor, members: Sequence[Member]) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each member what `shrink` returns, scales 1, to the bit; x is read once for all."""
    tokens, columns = x.shape
    served = [
        tokens and columns and _library_serves(x, m.rank, m.dropout, m.factor) for m in members
    ]
    results: list[Any] = [None] * len(members)
    together = []
    for i, m in enumerate(members):
        if served[i]:
            results[i] = shrink(x, m.factor, 1.0, m.g, 1.0, m.rank, m.dropout)
            continue
        dtype, h, outer = accumulator(x.dtype), None, None
        if m.factor is not None:
            h = x.new_empty((tokens, m.rank), dtype=dtype)
        if m.g is not None:
            outer = x.new_empty((m.rank, columns), dtype=dtype)
        factor = (None, 0, 0, 0) if m.factor is None else factor_of(m.factor)
        together.append((m.rank, *factor, h, 1.0, m.g, outer, 1.0, *m.dropout))
        results[i] = h, outer
    for first in range(0, len(together), MEMBERS):
        _SHRINK_GROUP(x, DTYPES[x.dtype], tokens, columns, together[first : first + MEMBERS])
    return results


def drop(x: Tensor, dropout: Any, onto: Tensor | None = None) -> Tensor:
    """D(x), or `onto` + D(x) over the memory of that; both contiguous."""
    y = torch.empty_like(x) if onto is None else onto
    _DROPOUT(x, DTYPES[x.dtype], x.numel(), onto is not None, y, *dropout)
    return y


def expand(
    h: Tensor,
    factor: Tensor,
    scale: float,
    y: Tensor,
    accumulate: bool,
    bias: Tensor | None = None,
    dropout: Any = NO_DROPOUT,
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
        h, tokens, columns, h.shape[1], *factor_of(factor), scale, bias, accumulate, y, DTYPES[y.dtype],
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
    dropout: Any = NO_DROPOUT,
) -> Tensor:
    """x·weightᵀ [+ bias] + D(scale·h·factor), x (tokens, K) contiguous, weight (columns, K)."""
    columns = factor.shape[1]
    if _fuses(x):
        y = x.new_empty((x.shape[0], columns))
        _backend.launch("lora", "lora_product", x, (
            DTYPES[x.dtype], *x.shape, weight, *weight.stride(), columns, h, h.shape[1],
            *factor_of(factor), scale, None if bias is None else bias.contiguous(), y, *dropout,
        ))  # fmt: skip
        return y
    dtype = _matmul.product_dtype(x)
    y = x.new_empty((x.shape[0], columns), dtype=dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    expand(h, factor, scale, y, False, bias, dropout)
    return _matmul.linear_onto(y, x, weight).to(x.dtype)


def base_product(
    x: Tensor, weight: Tensor | None, values: Any, rows: int, columns: int, transposed: bool = False,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x Wᵀ + bias or, transposed, x W; W (rows, columns) is `weight` or packed in `values`."""
    if weight is None:
        return packed_product(x, values, rows, columns, transposed, bias)
    return _matmul.linear(x, weight.t() if transposed else weight, bias)


def adapted_product(
    x: Tensor, weight: Tensor | None, values: Any, rows: int, columns: int, h: Tensor, factor: Tensor,
    scale: float, transposed: bool = False, bias: Tensor | None = None, dropout: Any = NO_DROPOUT,
    onto: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[onto +] the base product + D(scale·h·factor), over the memory of `onto`."""
    if onto is not None:
        if weight is None or _fuses(x) or _matmul.product_dtype(x) is not onto.dtype:
            return onto.add_(
                adapted_product(
                    x, weight, values, rows, columns, h, factor, scale, transposed, bias, dropout
                )
            )
        expand(h, factor, scale, onto, True, bias, dropout)
        return _matmul.linear_onto(onto, x, weight.t() if transposed else weight)
    if weight is None:
        y = packed_product(x, values, rows, columns, transposed, bias)
        expand(h, factor, scale, y, accumulate=True, dropout=dropout)
        return y
    return _onto_product(x, weight.t() if transposed else weight, h, factor, scale, bias, dropout)


def _fuses(x: Tensor) -> bool:
    """Whether Triton takes the base product too: its own of float32 and float64 are not worth it."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and _backend.resolve("lora", x.device, _backend.in_force()) == "triton"
    )


def linear_kernel(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x Wᵀ + bias + scale·h·lora_bᵀ and h = x·lora_aᵀ of a few tokens, in one launch."""
    (tokens, columns), (rows, rank) = x.shape, lora_b.shape
    y, h = x.new_empty((tokens, rows)), x.new_empty((tokens, rank), dtype=torch.float32)
    _backend.launch("lora", "lora_linear", x, (
        DTYPES[x.dtype], tokens, columns, rank, weight, rows, *factor_of(lora_a), *factor_of(lora_b.t()),
        scale, None if bias is None else bias.contiguous(), h, y,
    ))  # fmt: skip
    return y, h


def has_linear_kernel(x: Tensor, weight: Tensor, rank: int) -> bool:
    return (
        0 < x.shape[0] <= CUDA_LINEAR_TOKENS
        and rank <= CUDA_LINEAR_RANK
        and x.dtype is not torch.float64
        and weight.numel() > 0
        and weight.is_contiguous()
        and _backend.resolve("lora", x.device, _backend.in_force()) == "cuda"
    )


# ---- what every op checks ----------------------------------------------------------------------

WEIGHT = (
    "Tensor? weight, Tensor? codes, Tensor? code, Tensor? absmax, Tensor? nested_code, "
    "Tensor? nested_absmax, Tensor? nested_offset, int nested_blocksize, int blocksize"
)


def check_call(
    x: Tensor,
    columns: Any,
    weight: Tensor | None,
    values: Any,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
) -> None:
    """What kernels rely on; x is (…, columns), the factors (…, rank, columns) and (…, rows, rank)."""
    float_tensor("x", x)
    *many, rows, rank = lora_b.shape
    if lora_a.shape != (*many, rank, columns):
        raise ValueError(f"lora_a: shape {tuple(lora_a.shape)}; allowed: {(*many, rank, columns)}")
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


def check_backward(
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
    check_call(dy, lora_a.shape[1], weight, values, lora_a, lora_b, None, seed)
    tokens = math.prod(dy.shape[:-1])
    if h.dtype is not accumulator(dy.dtype) or h.shape != (tokens, lora_b.shape[1]):
        raise ValueError(f"h: {h.dtype} {tuple(h.shape)}; not what the forward made")
    same_device("h", h, "dy", dy)
    if needs & (NEEDS_A | NEEDS_WEIGHT):
        same_device("x", x, "dy", dy)
        if x.dtype is not dy.dtype or x.shape != (*dy.shape[:-1], lora_a.shape[1]):
            raise ValueError(f"x: {x.dtype} {tuple(x.shape)}; not what the forward took")


def check_factors(weight: Tensor, lora_a: Any, lora_b: Any) -> None:
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        if isinstance(float_tensor(name, value), CodebookTensor):
            raise TypeError(f"{name}: a tensor of numbers, not a CodebookTensor")
    check_lora_shapes(weight.shape, lora_a.shape, lora_b.shape)


def seed_of(seed: int | Tensor | None, x: Tensor) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: {seed.dtype} {tuple(seed.shape)}; allowed: int64, one number")
        return seed.reshape(1)
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise TypeError(f"seed: a 64-bit int, not {seed!r}")
    return torch.full((1,), seed, dtype=torch.int64, device=x.device)


def check_mask(p: float, seed: Tensor | None) -> None:
    check_dropout(p)
    if seed is None and p != 0:
        raise ValueError("seed: None with dropout; allowed: int64, one number")


def bias_gradient(dy: Tensor) -> Tensor:
    return dy.sum(tuple(range(dy.ndim - 1))) if dy.ndim > 1 else dy


class Call(NamedTuple):
    """What low-rank ops have in common, as their raw ops take it."""

    x: Tensor
    weight: Tensor | None  # where it is dense
    values: Any  # where it is packed
    bias: Tensor | None
    dropout: Any
    drops: bool
    packed: CodebookTensor | None

    def plain_weight(self) -> Tensor:
        """For the backend "eager"."""
        if self.packed is not None:
            return dequantize(self.packed, self.x.dtype)
        assert self.weight is not None
        return self.weight


def call_of(x: Any, weight: Any, bias: Any, dropout: Any) -> Call:
    """Checked but for the factors, and cast as torch.nn.functional.linear is under autocast."""
    x = float_tensor("x", x)
    if isinstance(x, CodebookTensor):
        raise TypeError("x: a tensor of numbers, not a CodebookTensor")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: a tensor, not {type(weight).__name__}")
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        if not isinstance(weight, CodebookTensor) and weight.dtype is not torch.float64:
            weight = weight.to(dtype)
    if weight.ndim != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)}; allowed: (out, in)")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: shape {tuple(x.shape)}; a weight of {tuple(weight.shape)} takes (…, in) with (out, in)"
        )
    if bias is not None:
        bias = float_tensor("bias", bias).to(x.dtype)
    packed = weight if isinstance(weight, CodebookTensor) else None
    drops = isinstance(dropout, Tensor) or dropout != 0
    return Call(
        x=x,
        weight=weight if packed is None else None,
        values=NO_FIELDS if packed is None else fields(packed),
        bias=bias,
        dropout=scalar("dropout", dropout),
        drops=drops,
        packed=packed,
    )
