"""Codebook quantisation as plain torch operations; SPEC section 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._codebooks import BITS, FP4
from . import widest

_FP4_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
_FP4_CODES = (0, 1, 6, 7, 4, 5, 2, 3)  # in the order of their magnitudes
_GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits: codes in bytes


def pack(codes: Tensor, bits: int, fill: Tensor) -> Tensor:
    """Codes (n,) as bytes, most significant bits first; `fill` completes the last group."""
    per_group, size = _GROUPS[bits]
    missing = -codes.numel() % per_group
    groups = torch.cat([codes, fill.expand(missing)]).int().view(-1, per_group)
    word = groups[:, 0]
    for i in range(1, per_group):
        word = word << bits | groups[:, i]
    parts = [word >> 8 * (size - 1 - i) & 255 for i in range(size)]
    return torch.stack(parts, -1).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (count,), int64, of packed bytes."""
    per_group, size = _GROUPS[bits]
    groups = packed.int().view(-1, size)
    word = groups[:, 0]
    for i in range(1, size):
        word = word << 8 | groups[:, i]
    parts = [word >> bits * (per_group - 1 - i) & (2**bits - 1) for i in range(per_group)]
    return torch.stack(parts, -1).flatten()[:count].long()


def scaled(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """(x' of the blocks (blocks, blocksize), the last one padded with 0; absmax (blocks,))."""
    blocks = functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(-1) if len(blocks) else flat.new_empty(0)
    scale = absmax[:, None]
    x = blocks * (1 / scale)
    x = torch.where((1 / scale).isinf(), (widest(blocks) / widest(scale)).float(), x)
    x = torch.where(scale == 0, 0, x)
    x = torch.where(scale.isinf(), torch.where(blocks.isinf(), blocks, 0), x)
    return torch.where(scale.isnan(), torch.nan, x), absmax


def nearest(x: Tensor, code: Tensor, rule: int) -> Tensor:
    """The index of the nearest entry, a tie to the lower one; NaN: the top code."""
    if rule == FP4:
        thresholds = x.new_tensor(_FP4_THRESHOLDS)
        magnitude = torch.where(x.isnan(), torch.inf, x.abs())
        codes = torch.tensor(_FP4_CODES, device=x.device)[torch.bucketize(magnitude, thresholds)]
        return codes + 8 * (x < 0)
    wide = widest(code)
    return torch.bucketize(x, ((wide[:-1] + wide[1:]) / 2).float())


def quantize(x: Tensor, code: Tensor, rule: int, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed codes, absmax of the blocks)."""
    flat = x.float().flatten()
    values, absmax = scaled(flat, blocksize)
    codes = nearest(values, code, rule).flatten()[: flat.numel()]
    zero = nearest(flat.new_zeros(1), code, rule)
    return pack(codes, BITS[code.numel()], zero), absmax


def decode(
    codes: Tensor, code: Tensor, absmax: Tensor, bits: int, blocksize: int, count: int
) -> Tensor:
    values = code[unpack(codes, bits, count)]
    return values * absmax.repeat_interleave(blocksize)[:count]


def dequantize(fields: Any, count: int) -> Tensor:
    """float32(code[c]·absmax), (count,)."""
    codes, code, absmax, nested_code, nested_absmax, nested_offset, nested_blocksize, blocksize = (
        fields
    )
    if nested_absmax is not None:
        absmax = decode(absmax, nested_code, nested_absmax, 8, nested_blocksize, absmax.numel())
        absmax = absmax + nested_offset.to(absmax.device)
    return decode(codes, code, absmax, BITS[code.numel()], blocksize, count)


def codebook_linear(x: Tensor, fields: Any, rows: int, columns: int, bias: Tensor | None) -> Tensor:
    weight = dequantize(fields, rows * columns).view(rows, columns)
    return functional.linear(x, weight.to(x.dtype), bias)
