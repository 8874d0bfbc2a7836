"""Low-rank updates of many adapters as plain torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .lora import dropped, no_autocast


def lora_linear_segmented(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    p: Any,
    seed: Tensor | None,
) -> Tensor:
    """Each adapter over all rows, of which its own count: it compiles, for no shape depends on the ids."""
    with no_autocast(x):
        d = dropped(x, p, seed)
        wide = d.dtype
        ids = adapter.view(x.shape[:-1])[..., None]
        update = torch.zeros((*x.shape[:-1], weight.shape[0]), dtype=wide, device=x.device)
        for a in range(len(lora_a)):
            h = functional.linear(d, lora_a[a].to(wide))
            own = functional.linear(h, lora_b[a].to(wide)) * scale[a]
            update = torch.where(ids == a, own, update)
        return functional.linear(x, weight, bias) + update.to(x.dtype)
