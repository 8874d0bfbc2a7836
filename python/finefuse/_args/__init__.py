"""What the torch door and the NumPy door check in the same way, a file a family. No torch here.

Numbers that stand for a type, a loss or a reduction are the contract with csrc/core/dtype.h and
csrc/ops/*.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
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
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise TypeError(f"{name}: an int, not {value!r}")


def check_temperature(value: Any) -> None:
    ok = _COLDEST <= value <= _HOTTEST
    require(ok, "temperature", value, "positive and finite (1e-30 to 1e30)")


def check_label_smoothing(value: Any, top: str = "1") -> None:
    """ε in [0, 1] or, where a loss divides labels between two answers, in [0, 1)."""
    ok = 0.0 <= value <= 1.0 and (top == "1" or value < 1.0)
    require(ok, "label_smoothing", value, f"0 to {top}")


def check_row_shapes(logits: Sequence[int], targets: Sequence[int], name: str = "targets") -> None:
    """The shapes of logits (…, V), V at least 1, and of targets (…)."""
    if len(logits) == 0 or tuple(logits[:-1]) != tuple(targets):
        raise ValueError(
            f"{name}: shape {tuple(targets)}; logits of shape {tuple(logits)} need "
            f"{tuple(logits[:-1])}"
        )
    if logits[-1] == 0:
        raise ValueError(f"logits: shape {tuple(logits)}; at least one class is needed")


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


def overlaps(shape: Sequence[int], strides: Sequence[int], itemsize: int = 1) -> bool:
    """Whether elements share memory, as in an expanded tensor; strides in units of which an element is
    `itemsize`."""
    extent = itemsize - 1  # of the elements that the dimensions of smaller stride reach
    for stride, size in sorted(zip(map(abs, strides), shape, strict=True)):
        if size > 1 and stride <= extent:
            return True
        extent += (size - 1) * stride
    return False


def segments(
    shape: Sequence[int],
    mask: Sequence[int] | None,
    cu_seqlens: Sequence[int] | None,
    name: str = "token_lp",
) -> tuple[list[int], int]:
    """(shape of the sums, length of a segment, for cu_seqlens their mean) from the three shapes."""
    if mask is not None and tuple(mask) != tuple(shape):
        raise ValueError(f"mask: shape {tuple(mask)}; allowed: {tuple(shape)}")
    if cu_seqlens is None:
        if len(shape) == 0:
            raise ValueError(f"{name}: a scalar; allowed: (…, tokens)")
        return list(shape[:-1]), shape[-1]
    if len(shape) != 1 or len(cu_seqlens) != 1 or cu_seqlens[0] < 1:
        raise ValueError(
            f"cu_seqlens: shape {tuple(cu_seqlens)} with {name} of shape {tuple(shape)}; "
            "allowed: (sequences + 1,) with (tokens,)"
        )
    count = cu_seqlens[0] - 1
    if count == 0 and shape[0] != 0:
        raise ValueError(f"cu_seqlens: one element, no sequence, with {shape[0]} tokens")
    return [count], shape[0] // max(count, 1)
