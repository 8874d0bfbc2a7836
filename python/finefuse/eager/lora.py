"""Low-rank updates as plain torch operations; SPEC section 2."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _product(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(upper, lower 32 bits) of 32-bit numbers in int64 times a 32-bit number, without its sign."""
    upper, lower = a * (m >> 16), a * (m & 0xFFFF)  # below 2^48
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox(counter: Tensor, seed: Tensor) -> Tensor:
    """The four 32-bit words (…, 4) of 64-bit counters."""
    zero = torch.zeros_like(counter)
    c = [counter & _LOW, counter >> 32 & _LOW, zero, zero]
    key = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        a_high, a_low = _product(c[0], _MULTIPLIERS[0])
        b_high, b_low = _product(c[2], _MULTIPLIERS[1])
        c = [b_high ^ c[1] ^ key[0], b_low, a_high ^ c[3] ^ key[1], a_low]
        key = [k + step & _LOW for k, step in zip(key, _KEY_STEPS, strict=True)]
    return torch.stack(c, -1)


def keep_mask(like: Tensor, p: Any, seed: Tensor) -> Tensor:
    """What dropout multiplies by, of the shape of `like`: csrc/ops/lora.h has the rule."""
    count = like.numel()
    counter = torch.arange((count + 3) // 4, device=like.device)
    words = philox(counter, seed.to(like.device)).flatten()[:count].view(like.shape)
    p = torch.as_tensor(p, dtype=torch.float32 if like.device.type == "mps" else torch.float64)
    threshold = (p * 2**32).round().to(like.device, torch.int64)
    scale = torch.where(p == 1, 0.0, 1 / (1 - p)).to(like.device, like.dtype)
    return torch.where(words >= threshold, scale, torch.zeros_like(scale))


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if not is_compiling() and not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def dropped(x: Tensor, p: Any, seed: Tensor | None) -> Tensor:
    """D(x) in float32, float64 for float64."""
    wide = x.to(torch.float64 if x.dtype is torch.float64 else torch.float32)
    return wide if seed is None else wide * keep_mask(wide, p, seed)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Any,
    bias: Tensor | None,
    p: Any,
    seed: Tensor | None,
) -> Tensor:
    """The update in float32 (float64 for float64), whatever types the factors have."""
    with no_autocast(x):
        d = dropped(x, p, seed)
        h = functional.linear(d, lora_a.to(d.dtype))
        update = functional.linear(h, lora_b.to(d.dtype)) * scale
        return functional.linear(x, weight, bias) + update.to(x.dtype)
