"""Low-rank layers (lora, dora, segmented): the shapes of their factors, and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import require


def check_lora_shapes(weight: Sequence[int], lora_a: Sequence[int], lora_b: Sequence[int]) -> None:
    """W (out, in), A (r, in) and B (out, r), r at least 1."""
    if len(weight) != 2:
        raise ValueError(f"weight: shape {tuple(weight)}; allowed: (out, in)")
    for name, shape in (("lora_a", lora_a), ("lora_b", lora_b)):
        if len(shape) != 2:
            raise ValueError(f"{name}: shape {tuple(shape)}; allowed: two dimensions")
    rank = lora_a[0]
    if rank == 0:
        raise ValueError(f"lora_a: shape {tuple(lora_a)}; the rank is at least 1")
    if lora_a[1] != weight[1]:
        raise ValueError(f"lora_a: shape {tuple(lora_a)}; allowed: (r, {weight[1]})")
    if tuple(lora_b) != (weight[0], rank):
        raise ValueError(f"lora_b: shape {tuple(lora_b)}; allowed: ({weight[0]}, {rank})")


def check_segmented_shapes(
    weight: Sequence[int], lora_a: Sequence[int], lora_b: Sequence[int]
) -> None:
    """W (out, in), A (adapters, r, in) and B (adapters, out, r), adapters and r at least 1."""
    for name, shape in (("lora_a", lora_a), ("lora_b", lora_b)):
        if len(shape) != 3 or shape[0] == 0:
            raise ValueError(
                f"{name}: shape {tuple(shape)}; allowed: three dimensions, of which the first is the "
                "adapters, at least one"
            )
    if lora_a[0] != lora_b[0]:
        raise ValueError(f"lora_b: shape {tuple(lora_b)}; lora_a has {lora_a[0]} adapters")
    check_lora_shapes(weight, lora_a[1:], lora_b[1:])


def check_dropout(p: Any) -> None:
    require(0.0 <= p <= 1.0, "dropout", p, "0 to 1")


def dropout_numbers(p: float) -> tuple[int, float]:
    """(threshold of the 32-bit words, what survives is multiplied by), as csrc/ops/lora.h has them."""
    return round(p * 2**32), 0.0 if p == 1 else 1 / (1 - p)
