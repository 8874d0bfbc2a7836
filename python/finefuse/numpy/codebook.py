"""Codebook quantisation (NF4, FP4, 8-bit, learnt) of NumPy arrays and the product with packed weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _C
from .._args import require
from .._codebooks import (
    BITS,
    KERNEL_TOKENS,
    KERNEL_TOKENS_BACKWARD,
    About,
    Fields,
    Nested,
    blocks,
    check_bitsandbytes_form,
    check_blocksize,
    check_fields,
    check_state_fields,
    codebook,
    pack_about,
    packed_bytes,
    read_state,
)
from ._array import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    Array,
    accumulator,
    array,
    cast,
    check_out,
    contiguous,
    dtype_named,
    float_array,
    float_dtype,
    get_num_threads,
    product_gradient,
)


@dataclass(frozen=True, eq=False, repr=False)
class CodebookArray:
    """An array of any shape kept as codes of a codebook: element i is code[c_i] · absmax[i / blocksize].

    Made by `quantize` and `CodebookArray.from_bitsandbytes`; read by `dequantize` and `codebook_linear`.
    The fields are those of finefuse.CodebookTensor, the bytes the same.
    """

    codes: Array
    """uint8 (bytes,), packed over the flattened array, most significant bits first (bitsandbytes' order:
    element 2i is the high nibble of byte i)."""
    absmax: Array
    """(blocks,) float32, the largest absolute value of each block; with double quantisation its uint8
    codes."""
    code: Array
    """float32 (entries,), the codebook: 4, 8, 16 or 256 entries."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """What it decodes to by default."""
    blocksize: int
    """Consecutive elements, rows ignored, that share an absmax."""
    quant_type: str | None = None
    """The codebook's name ("nf4", "fp4", "dynamic8", "int4") or None."""
    nested: Nested | None = None
    """None or, with double quantisation, the (code, absmax, offset, blocksize) that decode absmax."""

    def __repr__(self) -> str:
        kind = self.quant_type or f"{self.code.size} entries"
        double = ", double_quant=True" if self.nested else ""
        return (
            f"CodebookArray({kind}, shape={self.shape}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}{double})"
        )

    @staticmethod
    def from_bitsandbytes(codes: Array, quant_state: Mapping[str, Any]) -> CodebookArray:
        """The 4-bit array that bitsandbytes keeps as `codes` and a quant state. No bytes change.

        Args:
            codes: its packed weight, ((n + 1) / 2, 1) uint8, or the same bytes in another type
                (bitsandbytes' quant_storage).
            quant_state: what `QuantState.as_dict` gives, `packed` or not, as arrays, or those keys of a
                state dict with their prefix ("model.layer.weight.absmax"), as safetensors.numpy reads them.

        Raises:
            TypeError, ValueError: naming the field that is missing, of another type or size, or out of
                range. ImportError: bfloat16 without ml_dtypes.
        """
        packed = contiguous(array("codes", codes)).reshape(-1).view(np.uint8)
        about, absmax, code, nested_absmax, nested_code = read_state(
            quant_state, ("bitsandbytes",), _bytes, _table
        )
        nested = None
        if about.nested_blocksize:
            offset = np.float32(about.nested_offset)
            nested = Nested(nested_code, nested_absmax, offset, about.nested_blocksize)
        q = CodebookArray(
            packed,
            absmax,
            code,
            about.shape,
            dtype_named(about.dtype),
            about.blocksize,
            about.quant_type,
            nested,
        )
        check_state_fields(_fields(q), math.prod(q.shape), _check_array)
        return q

    def to_bitsandbytes(self) -> tuple[Array, dict[str, Array]]:
        """(codes of shape ((n + 1) / 2, 1), bitsandbytes' quant state as a dict of plain arrays).

        The keys and their order are those of `QuantState.as_dict(packed=True)`: "absmax", "quant_map", with
        double quantisation "nested_absmax" and "nested_quant_map", and "quant_state.bitsandbytes__nf4"
        (or "__fp4"): JSON as uint8.

        Raises:
            ValueError: for what has no bitsandbytes form: codebooks other than "nf4" and "fp4", and a
                blocksize of 16.
        """
        check_bitsandbytes_form(self.quant_type, self.blocksize, self)
        about = About(self.quant_type, self.blocksize, self.dtype.name, self.shape)
        state = {"absmax": self.absmax, "quant_map": self.code}
        if self.nested is not None:
            state |= {"nested_absmax": self.nested.absmax, "nested_quant_map": self.nested.code}
            about = about._replace(
                nested_blocksize=self.nested.blocksize, nested_offset=float(self.nested.offset)
            )
        key, packed = pack_about(about)
        return self.codes.reshape(-1, 1), state | {key: np.frombuffer(packed, np.uint8)}


def _bytes(name: str, value: Any) -> bytes:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        raise TypeError(f"{name}: a uint8 array, not {value!r}")
    return value.tobytes()


def _table(name: str, value: Any, dtype: str, finite: bool) -> Array:
    value = array(name, value)
    if value.dtype.name != dtype:
        raise TypeError(f"{name}: dtype {value.dtype}; allowed: {dtype}")
    value = contiguous(value, dtype).reshape(-1)
    if finite and not np.isfinite(value).all():
        raise ValueError(f"{name}: an entry is not finite")
    return value


def _check_array(name: str, value: Any, dtype: str, count: int, of: str) -> None:
    value = array(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name}: dtype {value.dtype}; allowed: {dtype}")
    if value.size != count:
        raise ValueError(f"{name}: {value.size} elements; {of} {count}")


def _fields(q: CodebookArray) -> Fields:
    nested = q.nested or Nested(None, None, None, 0)
    return (
        q.codes, q.code, q.absmax, nested.code, nested.absmax, nested.offset, nested.blocksize,
        q.blocksize,
    )  # fmt: skip


# ---- quantize and dequantize -------------------------------------------------------------------


def quantize(
    x: Array,
    code: str | Array = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    nested_blocksize: int = 256,
) -> CodebookArray:
    """Quantise an array block by block to the nearest entries of a codebook.

        absmax[b] = max |x| over block b        c[i] = argmin_c |code[c] - x[i] / absmax[b]|

    Blocks are `blocksize` consecutive elements of the flattened array; the last may be short. The
    nearest entry is exact for every codebook, a tie goes to the lower index. Double quantisation
    (QLoRA, arXiv:2305.14314, section 3) keeps absmax, less its mean, in 8 bits. Bytes are bitsandbytes' own.

    Args:
        x: any shape, also (), and strides; float32, bfloat16, float16 or float64 (first rounded to
            float32).
        code: "nf4" (normal float), "fp4", "int4" (i/7 for i = -8..7), "dynamic8", or a table: 4, 8, 16
            or 256 numbers, finite and in ascending order, for x scaled to [-1, 1].
        blocksize: a power of two from 16 to 4096.
        double_quant: quantise absmax too, with "dynamic8" in blocks of `nested_blocksize`.
        nested_blocksize: a power of two from 16 to 4096.

    Returns:
        A CodebookArray of the shape and type of x. If the table has a 0, a block of zeros
        decodes to exact zeros; one that holds NaN, to NaN; one that holds ±inf, to ±inf there and to NaN
        elsewhere.

    Raises:
        TypeError, ValueError: naming the argument; NaN or inf in x with `double_quant`, where they would
            spread to every block.
    """
    x = float_array("x", x)
    check_blocksize("blocksize", blocksize)
    check_blocksize("nested_blocksize", nested_blocksize)
    entries, rule, name = codebook(
        code if isinstance(code, str) else _narrowed(float_array("code", code))
    )
    entries = entries.copy()
    codes, absmax = _quantized(x, entries, rule, blocksize)
    nested = None
    if double_quant:
        offset = np.float32(absmax.mean(dtype=FLOAT64) if absmax.size else 0)
        if not np.isfinite(offset):
            raise ValueError(
                "x: NaN or inf; with double_quant=True their block would spoil the mean of all blocks"
            )
        table, nested_rule, _ = codebook("dynamic8")
        table = table.copy()
        absmax, scales = _quantized(absmax - offset, table, nested_rule, nested_blocksize)
        nested = Nested(table, scales, offset, nested_blocksize)
    return CodebookArray(codes, absmax, entries, x.shape, x.dtype, blocksize, name, nested)


def _quantized(x: Array, code: Array, rule: int, blocksize: int) -> tuple[Array, Array]:
    """Packed codes (bytes,) and absmax (blocks,)."""
    x = contiguous(_narrowed(x) if x.dtype == FLOAT64 else x)
    codes = np.empty(packed_bytes(x.size, BITS[code.size]), np.uint8)
    absmax = np.empty(blocks(x.size, blocksize), FLOAT32)
    _C.quantize(
        x, DTYPES[x.dtype], x.size, code, code.size, rule, blocksize, codes, absmax,
        get_num_threads(),
    )  # fmt: skip
    return codes, absmax


def _narrowed(x: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(FLOAT32)


def dequantize(q: CodebookArray, dtype: Any = None, out: Array | None = None) -> Array:
    """The array that codes stand for.

        w[i] = round_to_dtype(float32(code[c[i]] · absmax[i / blocksize]))

    With double quantisation absmax is first decoded in the same way, and the offset added.

    Args:
        q: what `quantize` returned.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 numbers). None: that of
            `out`, else of `q`.
        out: where to write it, any strides; without it fresh memory.

    Returns:
        `out`, or a contiguous array of the shape of `q`.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is written.
    """
    _check_weight("q", q)
    if dtype is not None:
        dtype = float_dtype("dtype:", dtype)
    if out is None:
        out = np.empty(q.shape, dtype or q.dtype)
    else:
        check_out("out", out)
        native = float_dtype("out: dtype", out.dtype)
        if out.shape != q.shape:
            raise ValueError(f"out: shape {out.shape}; q has {q.shape}")
        if dtype is not None and dtype != native:
            raise TypeError(f"dtype: {dtype}; out has {out.dtype}")
    check_packed(q)
    for name, part in zip(
        ("codes", "code", "absmax", "nested.code", "nested.absmax"), _fields(q), strict=False
    ):
        if isinstance(part, np.ndarray) and np.may_share_memory(out, part):
            raise ValueError(f"out: shares memory with q.{name}")
    if out.flags.carray and out.dtype in DTYPES and out.dtype != FLOAT64:
        _decode(q, out)
    else:  # float64, strides or another byte order
        wide = out.dtype.newbyteorder("=")
        fresh = np.empty(q.shape, FLOAT32 if wide == FLOAT64 else wide)
        _decode(q, fresh)
        out[...] = fresh
    return out


def _check_weight(name: str, q: Any) -> None:
    if not isinstance(q, CodebookArray):
        raise TypeError(f"{name}: a CodebookArray (quantize makes one), not {type(q).__name__}")


def _for_kernel(q: CodebookArray) -> tuple[Any, ...]:
    """(codes, code, entries, absmax, absmax_codes, nested_code, nested_absmax, nested_blocksize, offset,
    blocksize): contiguous, with absmax as numbers or as codes."""
    codes, code, absmax = contiguous(q.codes), contiguous(q.code), contiguous(q.absmax)
    if q.nested is None:
        return codes, code, code.size, absmax, None, None, None, 0, 0.0, q.blocksize
    return (
        codes, code, code.size, None, absmax, contiguous(q.nested.code), contiguous(q.nested.absmax),
        q.nested.blocksize, float(q.nested.offset), q.blocksize,
    )  # fmt: skip


def check_packed(q: CodebookArray) -> None:
    """What kernels rely on: arrays of the sizes that the shape asks for."""
    check_fields(_fields(q), math.prod(q.shape), _check_array)


def _decode(q: CodebookArray, out: Array) -> None:
    """Into `out`, contiguous, of a type that kernels write."""
    if out.size:
        codes, *rest = _for_kernel(q)
        _C.dequantize(codes, out.size, *rest, out, DTYPES[out.dtype], get_num_threads())


# ---- codebook_linear ---------------------------------------------------------------------------


class _Workspace(threading.local):
    """Memory for a decoded weight, kept for the next one; a thread has its own.

    Fresh memory would cost more than the decoding: the system clears it page by page.
    """

    def __init__(self) -> None:
        self.memory = np.empty(0, FLOAT32)

    def get(self, count: int) -> Array:
        """At least so many numbers; assign them to `memory` when done. A call in between has others."""
        memory, self.memory = self.memory, np.empty(0, FLOAT32)
        return memory if memory.size >= count else np.empty(count, FLOAT32)


_workspace = _Workspace()


def codebook_linear(
    x: Array,
    q: CodebookArray,
    bias: Array | None = None,
    *,
    return_grad: bool = False,
    upstream: Array | None = None,
) -> Any:
    """A linear layer on packed weights (QLoRA, arXiv:2305.14314, section 3).

        y = x Wᵀ + bias        dx = dy W        W = dequantize(q)

    A few tokens (16) are multiplied from the packed bytes, which are all that is read of W; more are
    multiplied by NumPy, after W is decoded to float32 into memory that every call of the thread reuses.
    Then its threads are those of NumPy's BLAS, and so is the last bit. 16-bit arrays are multiplied as
    float32.

    Args:
        x: (…, in) float32, bfloat16, float16 or float64 (then all in float64), any strides.
        q: the weight (out, in).
        bias: (out,); another type than that of x is cast to it.
        return_grad: also return dx, the gradient of Σ dy·y.
        upstream: dy (…, out), None for ones.

    Returns:
        (…, out) in the type of x. With `return_grad` (that, dx), dx of the shape and type of x.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_weight("q", q)
    if len(q.shape) != 2:
        raise ValueError(f"q: shape {q.shape}; allowed: (out, in)")
    rows, columns = q.shape
    x = float_array("x", x)
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x: shape {x.shape}; a weight of ({rows}, {columns}) takes (…, {columns})"
        )
    if bias is not None:
        bias = float_array("bias", bias)
        if bias.shape != (rows,):
            raise ValueError(f"bias: shape {bias.shape}; allowed: ({rows},)")
        bias = cast(bias, x.dtype)
    shape = (*x.shape[:-1], rows)
    upstream = product_gradient(upstream, shape, return_grad)
    check_packed(q)
    y = packed_product(x, q, bias, False)
    if not return_grad:
        return y
    dy = np.ones(shape, x.dtype) if upstream is None else cast(upstream, x.dtype)
    return y, packed_product(dy, q, None, True)


def packed_product(x: Array, q: CodebookArray, bias: Array | None, transposed: bool) -> Array:
    """x Wᵀ + bias (…, rows) or, transposed, x W (…, columns)."""
    rows, columns = q.shape
    shape = (*x.shape[:-1], columns if transposed else rows)
    tokens = math.prod(x.shape[:-1])
    most = KERNEL_TOKENS_BACKWARD if transposed else KERNEL_TOKENS
    if 0 < tokens <= most and rows * columns > 0 and x.dtype != FLOAT64:
        y = np.empty(shape, x.dtype)
        codes, *rest = _for_kernel(q)
        _C.codebook_linear(
            contiguous(x), DTYPES[x.dtype], tokens, codes, *rest, rows, columns, transposed, bias, y,
            get_num_threads(),
        )  # fmt: skip
        return y
    wide = accumulator(x.dtype)
    memory = _workspace.get(rows * columns)
    weight = memory[: rows * columns].reshape(rows, columns)
    _decode(q, weight)
    with np.errstate(over="ignore", invalid="ignore"):
        a = x.reshape(tokens, x.shape[-1]).astype(wide, copy=False)
        w = weight.astype(wide, copy=False)
        y = np.matmul(a, w if transposed else w.T)
        if bias is not None:
            y += bias.astype(wide, copy=False)
        _workspace.memory = memory
        return y.astype(x.dtype, copy=False).reshape(shape)


# ---- learn_codebook ----------------------------------------------------------------------------


def learn_codebook(x: Array, bits: int = 4, blocksize: int = 64, iterations: int = 100) -> Array:
    """The codebook that fits an array: Lloyd-Max (k-means in one dimension) on its scaled values.

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
    x = float_array("x", x)
    require(type(bits) is int and bits in BITS.values(), "bits", bits, "2, 3, 4, 8")
    check_blocksize("blocksize", blocksize)
    require(type(iterations) is int and iterations >= 0, "iterations", iterations, "0 and above")
    x = _narrowed(x)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"x: shape {x.shape}; allowed: one element or more, all finite in float32")
    values = np.sort(_scaled(x.ravel(), blocksize)).astype(FLOAT64)
    entries, count = 2**bits, values.size
    # Quantiles between neighbours, as a line.
    place = (np.arange(entries) + 0.5) / entries * (count - 1)
    low = place.astype(np.int64)
    high = np.minimum(low + 1, count - 1)
    code = values[low] + (values[high] - values[low]) * (place - low)
    sums = np.concatenate([[0.0], values.cumsum()])
    for _ in range(iterations):
        ends = np.searchsorted(values, (code[:-1] + code[1:]) / 2, side="right")
        edges = np.concatenate([[0], ends, [count]])
        counts = np.diff(edges)
        moved = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), code)
        if np.array_equal(moved, code):
            break
        code = moved
    return code.astype(FLOAT32)


def _scaled(flat: Array, blocksize: int) -> Array:
    """x' of finite x, (n,)."""
    padded = np.pad(flat, (0, -flat.size % blocksize)).reshape(-1, blocksize)
    absmax = np.abs(padded).max(-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        reciprocal = FLOAT32.type(1) / absmax
        x = padded * reciprocal
        tiny = np.isinf(reciprocal)[:, 0]  # a denormal absmax
        x[tiny] = padded[tiny].astype(FLOAT64) / absmax[tiny]
    x[absmax[:, 0] == 0] = 0
    return x.reshape(-1)[: flat.size]
