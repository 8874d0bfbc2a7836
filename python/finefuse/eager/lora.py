"""Low-rank updates as plain torch operations; SPEC section 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _product(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(upper, lower 32 bits) of 32-bit numbers in int64 times a 32-bit number, without its sign."""
    upper, lower = a * (m >> 16), a * (m & 0xFFFF)  # below 2^48
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def keep_mask(like: Tensor, p: float, seed: Tensor) -> Tensor:
    """What dropout multiplies by, of the shape of `like`: csrc/ops/lora.h has the rule."""
    count = like.numel()
    counter = torch.arange((count + 3) // 4, device=like.device)
    zero = torch.zeros_like(counter)
    c = [counter & _LOW, counter >> 32, zero, zero]
    key = [seed.to(like.device) & _LOW, seed.to(like.device) >> 32 & _LOW]
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = (
            _product(c[0], _MULTIPLIERS[0]),
            _product(c[2], _MULTIPLIERS[1]),
        )
        c = [b_high ^ c[1] ^ key[0], b_low, a_high ^ c[3] ^ key[1], a_low]
        key = [k + step & _LOW for k, step in zip(key, _KEY_STEPS, strict=True)]
    words = torch.stack(c, -1).flatten()[:count].view(like.shape)
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return torch.where(words >= round(p * 2**32), scale, 0.0).to(like.dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Any,
    bias: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    dropped = x if seed is None else x * keep_mask(x, p, seed)
    h = functional.linear(dropped.to(lora_a.dtype), lora_a)
    update = functional.linear(h.to(lora_b.dtype), lora_b) * scale
    return functional.linear(x, weight, bias) + update.to(x.dtype)
