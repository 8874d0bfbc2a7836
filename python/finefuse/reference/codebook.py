"""Codebook formats as a person writes them: SPEC section 1, bit for bit. NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

f32 = np.float32

NF4 = np.array(
    [
        0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
        0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
    ],
    np.uint32,
).view(np.float32)  # fmt: skip

# Bit 3 is the sign, and the table is not sorted: rule 1 below. Code 8 is +0.
_FP4_MAGNITUDES = [0.0, 0.005208333333, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
FP4 = np.array([*_FP4_MAGNITUDES, 0.0, *(-m for m in _FP4_MAGNITUDES[1:])], np.float32)
FP4_THRESHOLDS = np.array(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32
)
FP4_CODES = np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)  # in the order of their magnitudes


def _dynamic8() -> Floats:
    """±10^(i-6) times the midpoints of linspace(0.1, 1, 2^i + 1), i = 0..6, with 0 and 1; all in float32.

    linspace counts from both ends, and each entry is rounded once (a fused multiply-add, here float64).
    """
    entries = [f32(0), f32(1)]
    for i in range(7):
        n = 2**i + 1
        low, high = np.float64(f32(0.1)), np.float64(1)
        step = np.float64(f32(f32(high - low) / f32(n - 1)))
        k = np.arange(n)
        line = f32(np.where(k < n // 2, low + step * k, high - step * (n - 1 - k)))
        middles = (line[:-1] + line[1:]) / f32(2) * f32(10.0 ** (i - 6))
        entries += [*middles, *-middles]
    return np.sort(np.array(entries, np.float32))


DYNAMIC8 = _dynamic8()
CODES = {"nf4": NF4, "fp4": FP4, "dynamic8": DYNAMIC8}
BITS = {4: 2, 8: 3, 16: 4, 256: 8}  # entries: bits a code


def is_fp4(code: Floats) -> bool:
    return np.array_equal(code, FP4)


def thresholds(code: Floats) -> Floats:
    """m_i = float32((c_i + c_{i+1})/2)."""
    wide = code.astype(np.float64)
    return f32((wide[:-1] + wide[1:]) / 2) + f32(0)


# ---- packing -------------------------------------------------------------------------------------


def packed_bytes(count: int, bits: int) -> int:
    """2, 4 and 8 bits fill bytes; 3 bits fill groups of eight codes in three bytes."""
    return -(-count // 8) * 3 if bits == 3 else -(-count * bits // 8)


def pack(codes: NDArray[Any], bits: int, pad: int = 0) -> Bytes:
    """Most significant bits first; what is left of the last byte, or group of three, is filled with `pad`."""
    codes = np.asarray(codes, np.uint8).ravel()
    fill = packed_bytes(codes.size, bits) * 8 // bits - codes.size
    padded = np.concatenate([codes, np.full(fill, pad, np.uint8)])
    return np.packbits(np.unpackbits(padded[:, None], axis=1)[:, 8 - bits :])


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    spread = np.unpackbits(packed)[: count * bits].reshape(count, bits)
    return np.packbits(np.pad(spread, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]


# ---- quantise ------------------------------------------------------------------------------------


def nearest(x: Floats, code: Floats) -> Bytes:
    """The number of thresholds below x', so that a tie goes to the lower index; NaN: the top code."""
    if is_fp4(code):
        magnitude = np.where(np.isnan(x), f32(np.inf), np.abs(x))
        rank = np.searchsorted(FP4_THRESHOLDS, magnitude, side="left")
        return np.asarray(FP4_CODES[rank] + np.uint8(8) * (x < 0), np.uint8)
    return np.searchsorted(thresholds(code), x, side="left").astype(np.uint8)


def scaled(x: Floats, absmax: np.float32) -> Floats:
    """x' of one block."""
    if np.isinf(absmax):  # an infinity keeps its side, what is finite vanishes beside it
        return np.where(np.isinf(x), x, f32(0))
    if absmax == 0:
        return np.zeros_like(x)
    with np.errstate(over="ignore", invalid="ignore"):
        reciprocal = f32(1) / absmax
        if np.isinf(reciprocal):  # a denormal absmax
            return f32(x.astype(np.float64) / np.float64(absmax))
        return np.where(np.isnan(absmax), f32(np.nan), x * reciprocal)


def blocks(x: NDArray[Any], blocksize: int) -> list[NDArray[Any]]:
    return [x[i : i + blocksize] for i in range(0, x.size, blocksize)]


def quantize(x: NDArray[Any], code: Floats, blocksize: int) -> tuple[Bytes, Floats]:
    """(packed codes, absmax of every block) of x, flattened row by row."""
    flat = np.asarray(x).astype(np.float32).ravel()
    absmax = np.array([np.abs(b).max() for b in blocks(flat, blocksize)], np.float32)
    codes = [
        nearest(scaled(b, a), code) for b, a in zip(blocks(flat, blocksize), absmax, strict=True)
    ]
    zero = int(nearest(np.zeros(1, np.float32), code)[0])
    return pack(np.concatenate([np.zeros(0, np.uint8), *codes]), BITS[code.size], zero), absmax


def double_quantize(
    absmax: Floats, nested_blocksize: int = 256
) -> tuple[Bytes, Floats, np.float32]:
    """(codes of absmax, absmax of their blocks, offset); the offset is the mean."""
    offset = f32(np.mean(absmax, dtype=np.float64)) if absmax.size else f32(0)
    if not np.isfinite(offset):
        raise ValueError(
            "double quantisation: a block holds NaN or inf, and the mean would spread it"
        )
    codes, nested_absmax = quantize(absmax - offset, DYNAMIC8, nested_blocksize)
    return codes, nested_absmax, offset


# ---- dequantise ----------------------------------------------------------------------------------


def nested_absmax(
    codes: Bytes, code: Floats, absmax: Floats, blocksize: int, offset: float
) -> Floats:
    """float32(code[q]·absmax) + offset: two roundings."""
    return code[codes] * np.repeat(absmax, blocksize)[: codes.size] + f32(offset)


def dequantize(packed: Bytes, count: int, code: Floats, absmax: Floats, blocksize: int) -> Floats:
    """float32(code[c]·absmax), flat; the caller rounds it to a narrower type."""
    codes = unpack(packed, BITS[code.size], count)
    with np.errstate(invalid="ignore", over="ignore"):
        return code[codes] * np.repeat(absmax, blocksize)[:count]


def codebook_linear(
    x: NDArray[Any],
    packed: Bytes,
    code: Floats,
    absmax: Floats,
    blocksize: int,
    shape: tuple[int, int],
    bias: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """x Wᵀ + bias in float64 of W = float32(code[c]·absmax)."""
    weight = dequantize(packed, shape[0] * shape[1], code, absmax, blocksize).reshape(shape)
    y = np.asarray(x, np.float64) @ weight.astype(np.float64).T
    return y if bias is None else y + np.asarray(bias, np.float64)


# ---- learning a codebook -------------------------------------------------------------------------


def learn_codebook(
    x: NDArray[Any], bits: int = 4, blocksize: int = 64, iterations: int = 100
) -> Floats:
    """Lloyd-Max on x/absmax: means of what is nearest to each entry, from evenly spaced quantiles.

    An entry that nothing is nearest to stays; the iteration ends when nothing moves.
    """
    flat = np.asarray(x).astype(np.float32).ravel()
    values = np.sort(np.concatenate([scaled(b, np.abs(b).max()) for b in blocks(flat, blocksize)]))
    values = values.astype(np.float64)
    entries = 2**bits
    code = np.quantile(values, (np.arange(entries) + 0.5) / entries)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    for _ in range(iterations):
        ends = np.searchsorted(values, (code[:-1] + code[1:]) / 2, side="right")
        edges = np.concatenate([[0], ends, [values.size]])
        counts = np.diff(edges)
        moved = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), code)
        if np.array_equal(moved, code):
            break
        code = moved
    return code.astype(np.float32)
