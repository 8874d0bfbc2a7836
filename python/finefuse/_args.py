"""What the torch door and the NumPy door check in the same way. No torch here.

Numbers that stand for a type, a loss or a reduction are the contract with csrc/core/dtype.h and
csrc/ops/*.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}

# csrc/ops/preference_table.h has the formulas.
PREFERENCE_LOSSES = {"sigmoid": 0, "ipo": 1, "hinge": 2}
# Losses that divide each log-ratio by its completion's length unless told otherwise.
LENGTH_NORMALIZED = ("ipo",)

_COLDEST, _HOTTEST = 1e-30, 1e30  # beyond, z/T leaves float32

# (dtype, rows, vocab, inner, outer_stride, inner_stride), in elements: see row_strides.
Layout = tuple[int, int, int, int, int, int]


def require(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Raise the ValueError that names the argument, what it was and what is allowed."""
    if not ok:
        raise ValueError(f"{name}: {value!r}; allowed: {allowed}")


def choice(name: str, value: Any, allowed: dict[str, int]) -> int:
    """The number behind one of a few names."""
    number = allowed.get(value) if isinstance(value, str) else None
    if number is None:
        raise ValueError(f"{name}: {value!r}; allowed: {', '.join(map(repr, allowed))}")
    return number


def check_index(name: str, value: Any) -> None:
    if not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise TypeError(f"{name}: an int, not {value!r}")


def check_temperature(value: Any) -> None:
    ok = _COLDEST <= value <= _HOTTEST
    require(ok, "temperature", value, "positive and finite (1e-30 to 1e30)")


def check_beta(value: Any) -> None:
    require(0.0 < value < inf, "beta", value, "positive and finite")


def check_label_smoothing(value: Any, top: str = "1") -> None:
    """ε in [0, 1] or, where a loss divides labels between two answers, in [0, 1)."""
    ok = 0.0 <= value <= 1.0 and (top == "1" or value < 1.0)
    require(ok, "label_smoothing", value, f"0 to {top}")


def row_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int] | None:
    """(inner, outer_stride, inner_stride) of the rows of (…, V) with contiguous rows, or None.

    Row r starts at element (r // inner)·outer_stride + (r % inner)·inner_stride: enough for slices
    such as logits[:, :-1]. None where three or more leading dimensions are uneven.
    """
    merged: list[
        tuple[int, int]
    ] = []  # an outer dimension that steps over all of the inner is one with it
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    merged = [(1, 0)] * (2 - len(merged)) + merged
    (_, outer_stride), (inner, inner_stride) = merged
    return inner, outer_stride, inner_stride
