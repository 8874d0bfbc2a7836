"""Pruning as plain torch operations: a stable sort of the scores; SPEC section 7."""

from __future__ import annotations

import torch
from torch import Tensor

from .._codebooks import BITS
from .codebook import pack, unpack


def prune_mask(weight: Tensor, norm: Tensor | None, group: int, drop: int | Tensor) -> Tensor:
    """True where an element is kept: all but the `drop` smallest of every `group` neighbours."""
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    score = weight.to(wide).abs()
    if norm is not None:
        score = score * norm
    score = score.reshape(-1, max(group, 1)).contiguous()
    order = score.sort(stable=True, dim=-1).indices  # NaN last, all NaN as equals
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank >= drop).view(weight.shape)


def prune_codes(codes: Tensor, code: Tensor, zero: int, mask: Tensor) -> Tensor:
    """The packed bytes with the code of 0 where an element is not kept."""
    bits, count = BITS[code.numel()], mask.numel()
    plain = torch.where(mask.flatten(), unpack(codes, bits, count), zero)
    # what completes the last group stays as it is
    per_group = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    rest = unpack(codes, bits, -(-count // per_group) * per_group)[count:]
    return pack(torch.cat([plain, rest]), bits, plain.new_full((1,), zero))
