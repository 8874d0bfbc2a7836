"""Codebook quantisation (NF4, FP4, 8-bit, learnt) and the linear layer on packed weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _backend, _matmul
from ._args import overlaps, require
from ._codebook_tensor import CodebookTensor, check_fields, fields
from ._codebooks import (
    BITS,
    FP4,
    KERNEL_TOKENS,
    KERNEL_TOKENS_BACKWARD,
    SORTED,
    Fields,
    Nested,
    blocks,
    check_blocksize,
    codebook,
    packed_bytes,
)
from ._matmul import PANEL_BYTES, workspace
from ._op import (
    DTYPES,
    autocast_dtype,
    composite,
    consumed,
    float_tensor,
    is_compiling,
    kernel,
    may_share_memory,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    shaped,
    wants_gradient,
)
from .eager import codebook as _eager

__all__ = [
    "CodebookTensor",
    "codebook_linear",
    "dequantize",
    "learn_codebook",
    "quantize",
]

_QUANTIZE = kernel("codebook", "quantize")
_DEQUANTIZE = kernel("codebook", "dequantize")
_LINEAR = kernel("codebook", "codebook_linear")

# What kernels read and write; float64 goes by way of float32, which holds every decoded number.
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


# ---- quantize ----------------------------------------------------------------------------------


def _quantize(x: Tensor, code: Tensor, rule: int, blocksize: int) -> tuple[Tensor, Tensor]:
    """Packed codes (bytes,) and absmax (blocks,)."""
    if x.dtype not in _NARROW:
        raise TypeError(f"x: dtype {x.dtype}; allowed: float32, bfloat16, float16")
    if code.dtype is not torch.float32:
        raise TypeError(f"code: dtype {code.dtype}; allowed: float32")
    same_device("code", code, "x", x)
    _check_quantize(code, rule, blocksize)
    codes, absmax = _quantize_fake(x, code, rule, blocksize)
    _QUANTIZE(
        x.contiguous(), DTYPES[x.dtype], x.numel(), code.contiguous(), code.numel(), rule, blocksize,
        codes, absmax,
    )  # fmt: skip
    return codes, absmax


def _check_quantize(code: Tensor, rule: int, blocksize: int) -> None:
    check_blocksize("blocksize", blocksize)
    if code.ndim != 1 or int(code.numel()) not in BITS:
        raise ValueError(f"code: shape {tuple(code.shape)}; allowed: (4, 8, 16 or 256,)")
    fp4 = rule == FP4 and code.numel() == 16
    require(rule == SORTED or fp4, "rule", rule, "0 (a sorted code), 1 (FP4, of 16 entries)")


def _quantize_fake(x: Tensor, code: Tensor, rule: int, blocksize: int) -> tuple[Tensor, Tensor]:
    count = x.numel()
    return (
        x.new_empty((packed_bytes(count, BITS[int(code.numel())]),), dtype=torch.uint8),
        x.new_empty((blocks(count, blocksize),), dtype=torch.float32),
    )


_QUANTIZE_FORWARD = raw_op(
    "quantize_forward(Tensor x, Tensor code, int rule, int blocksize) -> (Tensor, Tensor)",
    run=_quantize,
    fake=_quantize_fake,
)


def _quantized(x: Tensor, code: Tensor, rule: int, blocksize: int) -> tuple[Tensor, Tensor]:
    x = x.float() if x.dtype is torch.float64 else x
    if runs_eagerly("codebook", x):
        _check_quantize(code, rule, blocksize)
        return _eager.quantize(x, code, rule, blocksize)
    return _QUANTIZE_FORWARD(x, code, rule, blocksize)


def quantize(
    x: Tensor,
    code: str | Tensor = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    nested_blocksize: int = 256,
) -> CodebookTensor:
    """Quantise a tensor block by block to the nearest entries of a codebook.

        absmax[b] = max |x| over block b        c[i] = argmin_c |code[c] - x[i] / absmax[b]|

    Blocks are `blocksize` consecutive elements of the flattened tensor; the last may be short. The
    nearest entry is exact for every codebook, a tie goes to the lower index. Double quantisation
    (QLoRA, arXiv:2305.14314, section 3) keeps absmax, less its mean, in 8 bits. Bytes are bitsandbytes' own.

    Args:
        x: any shape, also (), and strides; float32, bfloat16, float16 or float64 (first rounded to
            float32). Not differentiated.
        code: "nf4" (normal float), "fp4", "int4" (i/7 for i = -8..7), "dynamic8", or a table: 4, 8, 16
            or 256 numbers, finite and in ascending order, for x scaled to [-1, 1].
        blocksize: a power of two from 16 to 4096.
        double_quant: quantise absmax too, with "dynamic8" in blocks of `nested_blocksize`.
        nested_blocksize: a power of two from 16 to 4096.

    Returns:
        A CodebookTensor of the shape, type and device of x. If the table has a 0, a block of zeros
        decodes to exact zeros; one that holds NaN, to NaN; one that holds ±inf, to ±inf there and to NaN
        elsewhere.

    Raises:
        TypeError, ValueError: naming the argument; NaN or inf in x with `double_quant`, where they would
            spread to every block (torch.compile does not look).
    """
    x = float_tensor("x", x).detach()
    if isinstance(x, CodebookTensor):
        raise TypeError(
            "x: a tensor of numbers, not a CodebookTensor; finefuse.dequantize(x) decodes it"
        )
    check_blocksize("blocksize", blocksize)
    check_blocksize("nested_blocksize", nested_blocksize)
    table, rule, name = codebook(
        code if isinstance(code, str) else float_tensor("code", code).detach().float().cpu().numpy()
    )
    entries = torch.from_numpy(table).to(x.device, copy=True)
    codes, absmax = _quantized(x, entries, rule, blocksize)
    nested = None
    if double_quant:
        absmax, nested = _double_quantized(absmax, nested_blocksize)
    return CodebookTensor(
        codes,
        absmax,
        entries,
        shape=x.shape,
        dtype=x.dtype,
        blocksize=blocksize,
        quant_type=name,
        nested=nested,
    )


def _double_quantized(absmax: Tensor, blocksize: int) -> tuple[Tensor, Nested]:
    """(codes of absmax, what decodes them)."""
    offset = _eager.widest(absmax).mean().float() if absmax.numel() else absmax.new_zeros(())
    kept = torch.zeros((), device="cpu") if offset.is_meta else offset.cpu()
    if not is_compiling() and not kept.isfinite():
        raise ValueError(
            "x: NaN or inf; with double_quant=True their block would spoil the mean of all blocks"
        )
    table, rule, _ = codebook("dynamic8")
    code = torch.from_numpy(table).to(absmax.device, copy=True)
    codes, nested_absmax = _quantized(absmax - offset, code, rule, blocksize)
    return codes, Nested(code, nested_absmax, kept, blocksize)


def _composite_quantize(
    x: Tensor, code: Tensor, rule: int = SORTED, blocksize: int = 64
) -> tuple[Tensor, Tensor]:
    if not is_compiling() and type(code) is Tensor and code.is_cpu:  # elsewhere looking costs time
        known = codebook(float_tensor("code", code).detach().float().numpy())[1]
        require(rule == known, "rule", rule, f"{known} for this code")
    return _quantized(x, code, rule, blocksize)


composite(
    "quantize(Tensor x, Tensor code, *, int rule=0, int blocksize=64) -> (Tensor, Tensor)",
    _composite_quantize,
)


# ---- dequantize --------------------------------------------------------------------------------

_FIELDS = (
    "Tensor codes, Tensor code, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax, "
    "Tensor? nested_offset, int nested_blocksize, int blocksize"
)


def _for_kernel(values: Fields) -> tuple[Any, ...]:
    """(codes, code, entries, absmax, absmax_codes, nested_code, nested_absmax, nested_blocksize, offset,
    blocksize): contiguous, with absmax as numbers or as codes."""
    codes, code, absmax, nested_code, nested_absmax, nested_offset, nested_blocksize, blocksize = (
        values
    )
    codes, code, absmax = codes.contiguous(), code.contiguous(), absmax.contiguous()
    if nested_code is None or nested_absmax is None or nested_offset is None:
        return codes, code, code.numel(), absmax, None, None, None, 0, 0.0, blocksize
    return (
        codes, code, code.numel(), None, absmax, nested_code.contiguous(), nested_absmax.contiguous(),
        nested_blocksize, nested_offset.item(), blocksize,
    )  # fmt: skip


def _decode(values: Fields, out: Tensor) -> None:
    """Into `out`, contiguous, of a type that kernels write."""
    if out.numel() == 0:
        return
    codes, *rest = _for_kernel(values)
    _DEQUANTIZE(codes, out.numel(), *rest, out, DTYPES[out.dtype])


def _check_out(*args: Any) -> None:
    out, values = args[-1], args[:-1]
    check_fields(values, out.numel())
    float_tensor("out", out)
    same_device("out", out, "codes", values[0])


def _dequantize_out(*args: Any) -> None:
    _check_out(*args)
    out, values = args[-1], args[:-1]
    if out.is_contiguous() and out.dtype in _NARROW:
        _decode(values, out)
        return
    fresh = out.new_empty(
        out.shape, dtype=torch.float32 if out.dtype is torch.float64 else out.dtype
    )
    _decode(values, fresh)
    out.copy_(fresh)


def _dequantize_fake(*args: Any) -> Tensor:
    *values, shape, dtype = args
    check_fields(tuple(values), math.prod(shape))
    return values[0].new_empty(shape, dtype=dtype)


def _dequantize(*args: Any) -> Tensor:
    out = _dequantize_fake(*args)
    _dequantize_out(*args[:-2], out)
    return out


_DEQUANTIZE_FORWARD = raw_op(
    f"dequantize_forward({_FIELDS}, SymInt[] shape, ScalarType dtype) -> Tensor",
    run=_dequantize,
    fake=_dequantize_fake,
)
_DEQUANTIZE_OUT = raw_op(
    f"dequantize_out({_FIELDS}, Tensor(a!) out) -> ()",
    run=_dequantize_out,
    fake=_check_out,
)


def dequantize(
    q: CodebookTensor, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The tensor that codes stand for.

        w[i] = round_to_dtype(float32(code[c[i]] · absmax[i / blocksize]))

    With double quantisation absmax is first decoded in the same way, and the offset added.

    Args:
        q: what `finefuse.quantize` returned.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 numbers). None: that of
            `out`, else of `q`.
        out: where to write it, any strides; without it fresh memory.

    Returns:
        `out`, or a contiguous tensor of the shape of `q`. No gradient passes.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is written.
    """
    _check_weight("q", q)
    if out is None:
        dtype = q.dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype: {dtype}; allowed: float32, bfloat16, float16, float64")
        return _dequantized(fields(q), q.shape, dtype)
    if isinstance(float_tensor("out", out), CodebookTensor):
        raise TypeError("out: a tensor of numbers, not a CodebookTensor")
    if out.shape != q.shape:
        raise ValueError(f"out: shape {tuple(out.shape)}; q has {tuple(q.shape)}")
    if dtype is not None and dtype is not out.dtype:
        raise TypeError(f"dtype: {dtype}; out has {out.dtype}")
    same_device("out", out, "q", q)
    if wants_gradient(out):
        raise ValueError("out: requires a gradient; dequantize passes none")
    if not is_compiling():
        _check_memory(out, q)
    if runs_eagerly("codebook", out):
        out.copy_(_dequantized(fields(q), q.shape, torch.float32))
    else:
        _DEQUANTIZE_OUT(*fields(q), out)
        if not is_compiling():
            consumed(out)
    return out


def _check_memory(out: Tensor, q: CodebookTensor) -> None:
    """Raise where writing `out` would change what is read, or some of `out` twice."""
    if not out.is_contiguous() and overlaps(out.shape, out.stride()):
        raise ValueError("out: its elements share memory")
    for name in ("codes", "absmax", "code", "nested_code", "nested_absmax"):
        part = getattr(q, name)
        if part is not None and may_share_memory(out, part):
            raise ValueError(f"out: shares memory with q.{name}")


def _check_weight(name: str, q: Any) -> None:
    if not isinstance(q, CodebookTensor):
        raise TypeError(
            f"{name}: a CodebookTensor (finefuse.quantize makes one), not {type(q).__name__}"
        )


def _dequantized(values: Fields, shape: Any, dtype: torch.dtype) -> Tensor:
    if runs_eagerly("codebook", values[0]):
        count = math.prod(shape)
        check_fields(values, count)
        return _eager.dequantize(values, count).view(shape).to(dtype)
    return _DEQUANTIZE_FORWARD(*values, shape, dtype)


_COMPOSITE_FIELDS = (
    "*, int blocksize, Tensor? nested_code=None, Tensor? nested_absmax=None, "
    "Tensor? nested_offset=None, int nested_blocksize=0"
)


def _composite_fields(
    codes: Tensor,
    code: Tensor,
    absmax: Tensor,
    blocksize: int,
    nested_code: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 0,
) -> Fields:
    return (
        codes, code, absmax, nested_code, nested_absmax, nested_offset, nested_blocksize, blocksize
    )  # fmt: skip


composite(
    "dequantize(Tensor codes, Tensor code, Tensor absmax, SymInt[] shape, ScalarType dtype, "
    f"{_COMPOSITE_FIELDS}) -> Tensor",
    lambda codes, code, absmax, shape, dtype, **nested: _dequantized(
        _composite_fields(codes, code, absmax, **nested), shape, dtype
    ),
)


# ---- codebook_linear: raw ops ------------------------------------------------------------------


def packed_product(
    x: Tensor, values: Fields, rows: int, columns: int, transposed: bool, bias: Tensor | None
) -> Tensor:
    """x Wᵀ + bias (…, rows) or, transposed, x W (…, columns)."""
    inner, outer = (rows, columns) if transposed else (columns, rows)
    shape, tokens = (*x.shape[:-1], outer), math.prod(x.shape[:-1])
    x = x.reshape(tokens, inner)
    most = KERNEL_TOKENS_BACKWARD if transposed and x.is_cpu else KERNEL_TOKENS
    y: Tensor | None = None
    if 0 < tokens <= most and inner * outer > 0 and x.dtype in _NARROW:
        y = x.new_empty(shape)
        codes, *rest = _for_kernel(values)
        _LINEAR(
            x.contiguous(), DTYPES[x.dtype], tokens, codes, *rest, rows, columns, transposed,
            None if bias is None else bias.contiguous(), y,
        )  # fmt: skip
        return y
    dtype = _matmul.product_dtype(x)
    decoded = dtype if dtype in _NARROW else torch.float32
    for first, last, weight in decoded_rows(x, values, rows, columns, decoded, whole=transposed):
        if last - first == rows:
            y = _matmul.linear(x, weight.t() if transposed else weight, bias)
            continue
        if y is None:
            y, x = x.new_empty((tokens, rows)), x.to(dtype)
        b = None if bias is None else bias[first:last]
        _matmul.columns_into(y[:, first:last], x, weight.to(dtype), b)
    assert y is not None
    return shaped(y, shape)


def decoded_rows(
    like: Tensor, values: Fields, rows: int, columns: int, dtype: torch.dtype, whole: bool = False
) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, last row, these rows of a packed weight (rows, columns) decoded), in memory that is reused.

    On a CPU, unless `whole`, in pieces that stay in a cache.
    """
    panel = rows if whole or not like.is_cpu else _panel_rows(values, rows, columns, dtype)
    memory = workspace.take(like, dtype, panel * columns)
    for first in range(0, max(rows, 1), max(panel, 1)):
        last = min(first + panel, rows)
        part = memory[: (last - first) * columns].view(last - first, columns)
        _decode(values if panel == rows else _rows(values, first * columns, last * columns), part)
        yield first, last, part
    workspace.give_back(memory)


def _panel_rows(values: Fields, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Of a weight that is decoded in pieces which stay in a cache: rows of a piece.

    A piece begins where a byte, a block and a block of blocks do; where none does, it is all of them.
    """
    unit = values[-1] * max(values[-2], 1)
    step = unit // math.gcd(columns, unit) if columns else 1
    return min(rows, max(PANEL_BYTES // max(columns * dtype.itemsize, 1) // step, 1) * step)


def _rows(values: Fields, begin: int, end: int) -> Fields:
    """The elements [begin, end), that begin as `_panel_rows` says."""
    codes, code, absmax, nested_code, nested_absmax, nested_offset, nested_blocksize, blocksize = (
        values
    )
    bits, first, last = BITS[code.numel()], begin // blocksize, blocks(end, blocksize)
    if nested_absmax is not None:
        nested_absmax = nested_absmax[first // nested_blocksize : blocks(last, nested_blocksize)]
    return (
        codes[packed_bytes(begin, bits) : packed_bytes(end, bits)], code, absmax[first:last],
        nested_code, nested_absmax, nested_offset, nested_blocksize, blocksize,
    )  # fmt: skip


def first_rows(values: Fields, rows: Any, columns: Any) -> Fields:
    """The first rows of a packed weight of so many columns: what begins at 0 can end anywhere."""
    return _rows(values, 0, rows * columns)


def _check_product(x: Tensor, values: Fields, rows: Any, columns: Any, bias: Tensor | None) -> None:
    float_tensor("x", x)
    same_device("codes", values[0], "x", x)
    check_fields(values, rows * columns)
    if bias is None:
        return
    same_device("bias", bias, "x", x)
    if bias.dtype is not x.dtype:
        raise TypeError(f"bias: dtype {bias.dtype}; x has {x.dtype}")
    if bias.shape != (rows,):
        raise ValueError(f"bias: shape {tuple(bias.shape)}; allowed: ({rows},)")


def _forward_arguments(
    x: Tensor, *args: Any
) -> tuple[Tensor, Fields, int, int, bool, Tensor | None]:
    """Checked, and as `_product` takes them."""
    values, (rows, bias) = args[:8], args[8:]
    _check_product(x, values, rows, x.shape[-1], bias)
    return x, values, rows, x.shape[-1], False, bias


def _backward_arguments(
    dy: Tensor, *args: Any
) -> tuple[Tensor, Fields, int, int, bool, Tensor | None]:
    values, columns = args[:8], args[8]
    _check_product(dy, values, dy.shape[-1], columns, None)
    return dy, values, dy.shape[-1], columns, True, None


def _product_fake(
    x: Tensor, values: Fields, rows: Any, columns: Any, transposed: bool, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns if transposed else rows))


_LINEAR_FORWARD = raw_op(
    f"codebook_linear_forward(Tensor x, {_FIELDS}, SymInt rows, Tensor? bias) -> Tensor",
    run=lambda *args: packed_product(*_forward_arguments(*args)),
    fake=lambda *args: _product_fake(*_forward_arguments(*args)),
)
_LINEAR_BACKWARD = raw_op(
    f"codebook_linear_backward(Tensor dy, {_FIELDS}, SymInt columns) -> Tensor",
    run=lambda *args: packed_product(*_backward_arguments(*args)),
    fake=lambda *args: _product_fake(*_backward_arguments(*args)),
)


# ---- codebook_linear: autograd and the public function -----------------------------------------


class _CodebookLinear(torch.autograd.Function):
    """Keeps the packed bytes alone; the backward decodes them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, rows: int, *values: Any) -> Tensor:
        ctx.save_for_backward(*values[:6])
        ctx.blocksizes, ctx.columns, ctx.backend = values[6:], x.shape[-1], _backend.chosen
        return _LINEAR_FORWARD(x, *values, rows, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = _LINEAR_BACKWARD(dy, *ctx.saved_tensors, *ctx.blocksizes, ctx.columns)
        if ctx.needs_input_grad[1]:
            db = dy.sum(tuple(range(dy.ndim - 1))) if dy.ndim > 1 else dy
        return (dx, db, None, *(None for _ in range(8)))


def codebook_linear(x: Tensor, q: CodebookTensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on packed weights (QLoRA, arXiv:2305.14314, section 3).

        y = x Wᵀ + bias        dx = dy W        db = Σ dy        W = dequantize(q) in the type of x

    A few tokens (16; 32 in a backward on a CPU) are multiplied from the packed bytes, which are all that
    is read of W; more are multiplied by the fastest product of this machine, after W is decoded into
    memory that every call of the thread reuses: on a CPU, panels of 4 MB in the forward, all of W in the
    backward. Nothing of the size of W is kept from one for the other. float16, and bfloat16 on CPUs that
    have no product for it, are multiplied as float32.

    Args:
        x: (…, in) float32, bfloat16, float16 or float64 (then all in float64), any strides. Under
            autocast it is cast as torch.nn.functional.linear casts it.
        q: the weight (out, in), which has no gradient.
        bias: (out,); another type than that of x is cast to it.

    Returns:
        (…, out) in the type of x; differentiable in x and bias.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is written.
    """
    _check_weight("q", q)
    if q.ndim != 2:
        raise ValueError(f"q: shape {tuple(q.shape)}; allowed: (out, in)")
    return _linear(x, fields(q), q.shape[0], q.shape[1], bias)


def _linear(x: Tensor, values: Fields, rows: Any, columns: Any, bias: Tensor | None) -> Tensor:
    x = float_tensor("x", x)
    if bias is not None:
        bias = float_tensor("bias", bias)
    for name, tensor in (("x", x), ("bias", bias)):
        if isinstance(tensor, CodebookTensor):
            raise TypeError(f"{name}: a tensor of numbers, not a CodebookTensor")
    autocast = autocast_dtype(x)
    if autocast is not None:
        x = x.to(autocast)
    same_device("bias", bias, "x", x)
    same_device("codes", values[0], "x", x)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x: shape {tuple(x.shape)}; a weight of ({rows}, {columns}) takes (…, {columns})"
        )
    if runs_eagerly("codebook", x):
        _check_product(x, values, rows, columns, bias)
        return _eager.codebook_linear(x, values, rows, columns, bias)
    if wants_gradient(x, bias):
        return _CodebookLinear.apply(x, bias, rows, *values)
    return _LINEAR_FORWARD(x, *values, rows, bias)


def _composite_linear(
    x: Tensor,
    codes: Tensor,
    code: Tensor,
    absmax: Tensor,
    shape: Any,
    bias: Any = None,
    **nested: Any,
) -> Tensor:
    if len(shape) != 2:
        raise ValueError(f"shape: {tuple(shape)}; allowed: (out, in)")
    return _linear(x, _composite_fields(codes, code, absmax, **nested), shape[0], shape[1], bias)


composite(
    "codebook_linear(Tensor x, Tensor codes, Tensor code, Tensor absmax, SymInt[] shape, "
    f"Tensor? bias=None, {_COMPOSITE_FIELDS}) -> Tensor",
    _composite_linear,
)


# ---- learn_codebook ----------------------------------------------------------------------------


def learn_codebook(x: Tensor, bits: int = 4, blocksize: int = 64, iterations: int = 100) -> Tensor:
    """The codebook that fits a tensor: Lloyd-Max (k-means in one dimension) on its scaled values.

        v[i] = x[i] / absmax[i / blocksize]        code = argmin Σ_i min_c (v[i] - code[c])²

    to a local minimum, from evenly spaced quantiles of v. Each iteration puts every entry at the mean of the
    values that are nearest to it; an entry that nothing is nearest to stays.

    Args:
        x: any shape, with at least one element, all finite; float32, bfloat16, float16 or float64.
        bits: 2, 3, 4 or 8.
        blocksize: that of the `quantize` to come: a power of two from 16 to 4096.
        iterations: at most so many; it ends where nothing moves.

    Returns:
        float32 (2^bits,) in ascending order, for `quantize(x, code=...)`.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28, 1982.
    """
    x = float_tensor("x", x).detach()
    if isinstance(x, CodebookTensor):
        raise TypeError("x: a tensor of numbers, not a CodebookTensor")
    require(type(bits) is int and bits in BITS.values(), "bits", bits, "2, 3, 4, 8")
    check_blocksize("blocksize", blocksize)
    require(type(iterations) is int and iterations >= 0, "iterations", iterations, "0 and above")
    x = x.float()
    if x.numel() == 0 or not x.isfinite().all():
        raise ValueError(
            f"x: shape {tuple(x.shape)}; allowed: one element or more, all finite in float32"
        )
    scaled, _ = _eager.scaled(x.flatten(), blocksize)
    values = _eager.widest(scaled.flatten()[: x.numel()]).sort().values
    entries, count = 2**bits, values.numel()
    # Quantiles between neighbours, as a line.
    place = (
        (torch.arange(entries, device=x.device, dtype=values.dtype) + 0.5) / entries * (count - 1)
    )
    low = place.floor().long()
    high = (low + 1).clamp(max=count - 1)
    code = values[low] + (values[high] - values[low]) * (place - low)
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    for _ in range(iterations):
        ends = torch.searchsorted(values, (code[:-1] + code[1:]) / 2, right=True)
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), count)])
        counts = edges.diff()
        moved = torch.where(counts > 0, sums[edges].diff() / counts.clamp(min=1), code)
        if torch.equal(moved, code):
            break
        code = moved
    return code.float()
