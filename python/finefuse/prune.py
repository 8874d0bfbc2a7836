"""Pruning by magnitude and by Wanda's score: exact counts, per tensor, per row or n of every m."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._args import overlaps, require
from ._args.prune import check_activation_norm, prune_groups, prune_scope, prune_workspace
from ._codebooks import BITS, packed_bytes
from ._op import (
    DTYPES,
    accumulator,
    composite,
    consumed,
    float_tensor,
    is_compiling,
    kernel,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
)
from .codebook import CodebookTensor, dequantize
from .eager import prune as _eager

__all__ = ["prune_", "prune_mask"]

_PRUNE = kernel("prune", "prune")
_PRUNE_CODES = kernel("prune", "prune_codes")


# ---- raw ops -----------------------------------------------------------------------------------


def _check(
    weight: Tensor, norm: Tensor | None, sparsity: float, n: int, m: int, scope: int
) -> tuple[int, int]:
    """(elements among which one selects, how many of them go)."""
    float_tensor("weight", weight)
    if norm is not None:
        wide = accumulator(weight.dtype)
        if norm.dtype is not wide:
            raise TypeError(f"activation_norm: dtype {norm.dtype}; allowed: {wide}")
        same_device("activation_norm", norm, "weight", weight)
        check_activation_norm(weight.shape, norm.shape)
        if norm.is_cpu and not bool((norm >= 0).all()):
            raise ValueError("activation_norm: an element is negative or NaN; allowed: 0 and above")
    return prune_groups(weight.shape, weight.numel(), sparsity, n, m, scope)


def _workspace(weight: Tensor, rows: int, columns: int, scope: int) -> Tensor | None:
    """Scratch of GPU kernels; those of the CPU keep their own."""
    if weight.is_cpu and _backend.in_force() in ("auto", "cpu"):
        return None
    return weight.new_empty((prune_workspace(rows, columns, scope),), dtype=torch.uint8)


def _select(
    weight: Tensor, norm: Tensor | None, scope: int, group: int, drop: int, mask: Tensor | None
) -> None:
    """Into `mask` or, without one, into the weight; both contiguous."""
    columns = weight.shape[-1] if weight.ndim else 1
    rows = weight.numel() // columns
    if norm is not None and mask is None:
        norm = norm.clone()  # may be a part of the weight, which is written meanwhile
    _PRUNE(
        weight, DTYPES[weight.dtype], rows, columns, scope, drop, group,
        None if norm is None else norm.contiguous(), mask, mask is None,
        _workspace(weight, rows, columns, scope),
    )  # fmt: skip


def _mask(
    weight: Tensor, norm: Tensor | None, sparsity: float, n: int, m: int, scope: int
) -> Tensor:
    group, drop = _check(weight, norm, sparsity, n, m, scope)
    mask = _mask_fake(weight)
    if mask.numel():
        _select(weight.contiguous(), norm, scope, group, drop, mask)
    return mask


def _mask_fake(weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.bool)


_PRUNE_MASK = raw_op(
    "prune_mask_forward(Tensor weight, Tensor? norm, float sparsity, int n, int m, int scope) -> Tensor",
    run=_mask,
    fake=_mask_fake,
)


def _zero(weight: Tensor, norm: Tensor | None, sparsity: float, n: int, m: int, scope: int) -> None:
    group, drop = _check(weight, norm, sparsity, n, m, scope)
    contiguous = weight.is_contiguous()
    if not contiguous and overlaps(weight.shape, weight.stride()):
        raise ValueError("weight: its elements share memory; allowed: an element each")
    if weight.numel():
        values = weight if contiguous else weight.contiguous()
        _select(values, norm, scope, group, drop, None)
        if not contiguous:
            weight.copy_(values)


_PRUNE_ZERO = raw_op(
    "prune_zero(Tensor(a!) weight, Tensor? norm, float sparsity, int n, int m, int scope) -> ()",
    run=_zero,
    fake=lambda *args: None,
)


def _code_of_zero(code: Tensor) -> int:
    zero = [i for i, entry in enumerate(code.tolist()) if entry == 0.0]
    if not zero:
        raise ValueError("weight: its codebook has no exact 0 to prune to")
    return zero[0]


def _check_codes(codes: Tensor, code: Tensor, mask: Tensor) -> None:
    for name, value, dtype in (
        ("codes", codes, torch.uint8),
        ("code", code, torch.float32),
        ("mask", mask, torch.bool),
    ):
        if value.dtype is not dtype:
            raise TypeError(f"{name}: dtype {value.dtype}; allowed: {dtype}")
        same_device(name, value, "codes", codes)
    entries = int(code.numel())  # never a symbol
    require(entries in BITS, "code", entries, "4, 8, 16 or 256 entries")
    size = packed_bytes(mask.numel(), BITS[entries])
    if codes.numel() != size:
        raise ValueError(f"codes: {codes.numel()} bytes; {mask.numel()} elements take {size}")


def _zero_codes(codes: Tensor, code: Tensor, mask: Tensor) -> None:
    _check_codes(codes, code, mask)
    zero = _code_of_zero(code)
    if mask.numel():
        packed = codes.contiguous()
        _PRUNE_CODES(packed, mask.numel(), BITS[code.numel()], zero, mask.contiguous())
        if packed is not codes:
            codes.copy_(packed)


_PRUNE_CODES_ = raw_op(
    "prune_codes(Tensor(a!) codes, Tensor code, Tensor mask) -> ()",
    run=_zero_codes,
    fake=_check_codes,
)


# ---- the public two ----------------------------------------------------------------------------


def _arguments(
    weight: Tensor,
    sparsity: Any,
    n: Any,
    m: Any,
    scope: Any,
    method: Any,
    activation_norm: Any,
) -> tuple[Tensor | None, Any, int, int, int]:
    """What raw ops take after the weight."""
    number, n, m = prune_scope(sparsity, n, m, scope, method, activation_norm)
    norm = None
    if activation_norm is not None:
        norm = float_tensor("activation_norm", activation_norm).detach()
        same_device("activation_norm", norm, "weight", weight)
        norm = norm.to(accumulator(weight.dtype))
    return norm, scalar("sparsity", 0.0 if sparsity is None else sparsity), n, m, number


def _eager_mask(weight: Tensor, norm: Tensor | None, sparsity: Any, *rest: int) -> Tensor:
    drop: Any
    if isinstance(sparsity, Tensor):  # while compiling; its range is not looked at
        group, _ = _check(weight, norm, 0.0, *rest)
        drop = torch.floor(sparsity * group + 1e-9)
    else:
        group, drop = _check(weight, norm, sparsity, *rest)
    return _eager.prune_mask(weight, norm, group, drop)


def prune_mask(
    weight: Tensor,
    *,
    sparsity: float | Tensor | None = None,
    n: int | None = None,
    m: int | None = None,
    scope: str | None = None,
    method: str = "magnitude",
    activation_norm: Tensor | None = None,
) -> Tensor:
    """Which elements of a weight to keep: all but the smallest scores, counted exactly.

        score = |w|  ("magnitude")          score = |w|·‖x‖₂ of its column  ("wanda")

    Of each tensor or row floor(sparsity · count + 1e-9) elements go; with n and m all but n of every m
    neighbours in a row. Of equal scores the lower index goes first. NaN is the largest score; -0 is 0.

    Args:
        weight: (…, in), any strides; float32, bfloat16, float16, float64, or a CodebookTensor, which is
            decoded to float32. A row is the last dimension; a scalar is a row of one.
        sparsity: the share that goes, 0 to 1, a number or a 0-d tensor. Give it, or both n and m.
        n, m: n stay of every m, 0 ≤ n ≤ m; `in` is a multiple of m. `n=2, m=4` is what sparse tensor cores
            take.
        scope: "tensor" or "row": among which elements a score is small. None: the method's own,
            "tensor" for "magnitude", "row" for "wanda". With n and m None.
        method: "magnitude" or "wanda".
        activation_norm: ‖x‖₂ (in,), the norm over tokens of each input feature; 0 and above (looked at on a
            CPU). "wanda" needs it; the product is rounded once, to float32 (float64 for float64).

    Returns:
        bool, contiguous, in the shape of weight, True where an element is kept. No gradient passes.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Wanda, arXiv:2306.11695; docs/prune.md.
    """
    if isinstance(weight, CodebookTensor):
        weight = dequantize(weight, torch.float32)
    weight = float_tensor("weight", weight).detach()
    args = _arguments(weight, sparsity, n, m, scope, method, activation_norm)
    if runs_eagerly("prune", weight):
        return _eager_mask(weight, *args)
    return _PRUNE_MASK(weight, *args)


def prune_(
    weight: Tensor,
    *,
    sparsity: float | Tensor | None = None,
    n: int | None = None,
    m: int | None = None,
    scope: str | None = None,
    method: str = "magnitude",
    activation_norm: Tensor | None = None,
) -> Tensor:
    """Set to 0, in place, what `prune_mask` would not keep.

    Args:
        weight: as in `prune_mask`; a parameter too, without `no_grad`. Strides do not matter, but elements
            may not share memory. Of a CodebookTensor the codes become the code of 0: it decodes to 0
            there and to what it was elsewhere; absmax stays.
        the others: as in `prune_mask`.

    Returns:
        The same tensor.

    Raises:
        TypeError, ValueError: naming the argument; a codebook without an exact 0. Nothing is written.
    """
    options: Any = (sparsity, n, m, scope, method, activation_norm)
    if isinstance(weight, CodebookTensor):
        return _prune_packed(weight, options)
    values = float_tensor("weight", weight).detach()
    args = _arguments(values, *options)
    if runs_eagerly("prune", values):
        if not is_compiling() and overlaps(values.shape, values.stride()):
            raise ValueError("weight: its elements share memory; allowed: an element each")
        values.masked_fill_(~_eager_mask(values, *args), 0.0)
        return weight
    _PRUNE_ZERO(values, *args)
    if not is_compiling():
        consumed(weight)
    return weight


def _prune_packed(q: CodebookTensor, options: Any) -> CodebookTensor:
    if not is_compiling():
        _code_of_zero(q.code)  # before the work
    decoded = dequantize(q, torch.float32)
    args = _arguments(decoded, *options)
    if runs_eagerly("prune", decoded):
        mask = _eager_mask(decoded, *args)
        q.codes.copy_(_eager.prune_codes(q.codes, q.code, _code_of_zero(q.code), mask))
        return q
    _PRUNE_CODES_(q.codes, q.code, _PRUNE_MASK(decoded, *args))
    if not is_compiling():
        consumed(q.codes)
    return q


# ---- torch.ops.finefuse ------------------------------------------------------------------------

_OPTIONS = (
    "*, float? sparsity=None, int? n=None, int? m=None, str? scope=None, str method='magnitude', "
    "Tensor? activation_norm=None"
)
composite(f"prune_mask(Tensor weight, {_OPTIONS}) -> Tensor", prune_mask)
composite(f"prune_(Tensor(a!) weight, {_OPTIONS}) -> Tensor(a!)", prune_)
