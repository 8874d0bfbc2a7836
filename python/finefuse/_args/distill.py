"""Distillation: what its arguments may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import check_temperature, require

# csrc/ops/distill.h, enum DistillKind
DISTILL_KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def distill_vocab(
    student: Sequence[int],
    teacher: Sequence[int],
    indices: Sequence[int] | None,
    mask: Sequence[int] | None,
    targets: Sequence[int] | None,
    vocab_size: Any,
) -> Any:
    """How many columns count, from the shapes of what distillation takes; raises what is wrong."""
    for name, shape in (("student_logits", student), ("teacher_logits", teacher)):
        if len(shape) == 0 or shape[-1] == 0:
            raise ValueError(f"{name}: shape {tuple(shape)}; allowed: (…, V), V at least 1")
    leading = tuple(student[:-1])
    if tuple(teacher[:-1]) != leading:
        raise ValueError(
            f"teacher_logits: shape {tuple(teacher)}; student_logits of shape {tuple(student)} need "
            f"{(*leading, '…')}"
        )
    for name, given in (("mask", mask), ("targets", targets)):
        if given is not None and tuple(given) != leading:
            raise ValueError(f"{name}: shape {tuple(given)}; allowed: {leading}")
    widest = student[-1]
    if indices is not None:
        if tuple(indices) != tuple(teacher):
            raise ValueError(
                f"teacher_indices: shape {tuple(indices)}; teacher_logits have {tuple(teacher)}"
            )
    else:
        if vocab_size is None and teacher[-1] != widest:
            raise ValueError(
                f"teacher_logits: {teacher[-1]} columns, student_logits {widest}; give vocab_size, the "
                "number of columns that both share"
            )
        widest = min(widest, teacher[-1])
    vocab = widest if vocab_size is None else vocab_size
    if not 1 <= vocab <= widest:
        raise ValueError(f"vocab_size: {vocab!r}; allowed: 1 to {widest}, or None")
    if indices is not None and not teacher[-1] <= vocab:
        raise ValueError(
            f"teacher_indices: shape {tuple(indices)}; at most {vocab} of the {vocab} columns"
        )
    return vocab


def check_vocab_size(value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"vocab_size: an int or None, not {value!r}")


def check_distill_numbers(beta: float, temperature: float, alpha: float, has_targets: bool) -> None:
    require(0.0 <= beta <= 1.0, "beta", beta, "0 to 1")
    check_temperature(temperature)
    require(0.0 <= alpha <= 1.0, "alpha", alpha, "0 to 1")
    if alpha < 1.0 and not has_targets:
        raise ValueError(f"alpha: {alpha!r}; below 1 it needs targets")


def distill_kind(kind: int, beta: float) -> int:
    """jsd with beta 0 is defined as the forward, with beta 1 as the reverse KL."""
    if kind == DISTILL_KINDS["jsd"] and beta in (0.0, 1.0):
        return DISTILL_KINDS["reverse_kl" if beta else "forward_kl"]
    return kind


def distill_numbers(
    beta: float, temperature: float, alpha: float, temperature_squared: bool
) -> tuple[float, float, float, float]:
    """(beta, temperature, weight of the divergence, weight of the cross-entropy), for the kernels."""
    factor = temperature * temperature if temperature_squared else 1.0
    return beta, temperature, alpha * factor, 1.0 - alpha
