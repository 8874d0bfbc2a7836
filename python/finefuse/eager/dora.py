"""Weight-decomposed updates as plain torch operations; SPEC section 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .lora import dropped, no_autocast


def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Any) -> Tensor:
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    with torch.no_grad(), no_autocast(weight):
        update = lora_b.to(wide) @ lora_a.to(wide)
        return torch.linalg.vector_norm(weight.to(wide) + scale * update, dim=1)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: Any,
    bias: Tensor | None,
    p: Any,
    seed: Tensor | None,
) -> Tensor:
    """y = x Wᵀ + b + (c - 1)·D(x) Wᵀ + c·s·(D(x) Aᵀ) Bᵀ with c = m / ‖W + s·B A‖, norms detached."""
    norm = dora_norm(weight, lora_a, lora_b, scale)
    zero = norm == 0  # a quotient by it would have NaN for a gradient
    c = torch.where(zero, 0.0, magnitude.to(norm.dtype) / torch.where(zero, 1.0, norm))
    with no_autocast(x):
        d = dropped(x, p, seed)
        wide = d.dtype
        update = functional.linear(functional.linear(d, lora_a.to(wide)), lora_b.to(wide))
        base = functional.linear(x, weight)
        again = base if seed is None else functional.linear(d.to(x.dtype), weight)
        y = base.to(wide) + (c - 1) * again.to(wide) + c * scale * update
        return (y if bias is None else y + bias.to(wide)).to(x.dtype)
