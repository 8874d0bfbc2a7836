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


def check_row_shapes(logits: Sequence[int], targets: Sequence[int]) -> None:
    """The shapes of logits (…, V), V at least 1, and of targets (…)."""
    if len(logits) == 0 or tuple(logits[:-1]) != tuple(targets):
        raise ValueError(
            f"targets: shape {tuple(targets)}; logits of shape {tuple(logits)} need "
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
    shape: Sequence[int], mask: Sequence[int] | None, cu_seqlens: Sequence[int] | None
) -> tuple[list[int], int]:
    """(shape of the sums, length of a segment, for cu_seqlens their mean) from the three shapes."""
    if mask is not None and tuple(mask) != tuple(shape):
        raise ValueError(f"mask: shape {tuple(mask)}; allowed: {tuple(shape)}")
    if cu_seqlens is None:
        if len(shape) == 0:
            raise ValueError("token_lp: a scalar; allowed: (…, tokens)")
        return list(shape[:-1]), shape[-1]
    if len(shape) != 1 or len(cu_seqlens) != 1 or cu_seqlens[0] < 1:
        raise ValueError(
            f"cu_seqlens: shape {tuple(cu_seqlens)} with token_lp of shape {tuple(shape)}; "
            "allowed: (sequences + 1,) with (tokens,)"
        )
    count = cu_seqlens[0] - 1
    if count == 0 and shape[0] != 0:
        raise ValueError(f"cu_seqlens: one element, no sequence, with {shape[0]} tokens")
    return [count], shape[0] // max(count, 1)


def divides_by_length(loss: str, normalize_lengths: bool | None) -> bool:
    return loss in LENGTH_NORMALIZED if normalize_lengths is None else normalize_lengths


def preference_options(
    loss: str,
    ref_chosen: Any,
    ref_rejected: Any,
    chosen_lengths: Any,
    rejected_lengths: Any,
    normalize_lengths: bool | None,
) -> tuple[int, Any, Any]:
    """(the loss's number, the lengths to divide by: None where it does not divide)."""
    code = choice("loss", loss, PREFERENCE_LOSSES)
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("ref_chosen and ref_rejected: give both or neither")
    if not divides_by_length(loss, normalize_lengths):
        return code, None, None
    if chosen_lengths is None or rejected_lengths is None:
        raise ValueError(
            f"chosen_lengths, rejected_lengths: loss={loss!r} divides by the completions' lengths; "
            "give both, or normalize_lengths=False"
        )
    return code, chosen_lengths, rejected_lengths


def check_halves(pairs: Any, logits: Sequence[int], ref_logprobs: Any, ref_logits: Any) -> None:
    """What preference losses from logits ask of their batch; `logits` is a shape."""
    if pairs != "halves":
        raise ValueError(f"pairs: {pairs!r}; allowed: 'halves'")
    if len(logits) != 3 or logits[0] % 2:
        raise ValueError(f"logits: shape {tuple(logits)}; allowed: (2·pairs, T, V)")
    if ref_logprobs is not None and ref_logits is not None:
        raise ValueError("ref_logprobs and ref_logits: give one of the two")


def check_reference(
    logits: Sequence[int], ref_logprobs: Sequence[int] | None, ref_logits: Sequence[int] | None
) -> None:
    """The shapes of the reference of a batch of pairs."""
    if ref_logits is not None and (
        len(ref_logits) != 3 or tuple(ref_logits[:2]) != tuple(logits[:2])
    ):
        raise ValueError(f"ref_logits: shape {tuple(ref_logits)}; logits have {tuple(logits)}")
    if ref_logprobs is not None and tuple(ref_logprobs) != (logits[0],):
        raise ValueError(f"ref_logprobs: shape {tuple(ref_logprobs)}; allowed: ({logits[0]},)")


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
