"""Distillation from logits, of NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _C
from .._args import REDUCTIONS, choice
from .._args.distill import (
    DISTILL_KINDS,
    check_distill_numbers,
    check_vocab_size,
    distill_kind,
    distill_numbers,
    distill_vocab,
)
from ._array import (
    ACCUMULATOR,
    FLOAT64,
    Array,
    float_array,
    float_rows,
    get_num_threads,
    gradient_rows,
    index_array,
    integer,
    is_int32,
    mask_array,
    result,
    scalar,
)

_empty = np.empty


def distill_loss(
    student_logits: Array,
    teacher_logits: Array,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Array | None = None,
    alpha: float = 1.0,
    targets: Array | None = None,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    teacher_indices: Array | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    """A divergence of the student's distribution from the teacher's, and cross-entropy beside it.

    With p = softmax(z_student/T), q = softmax(z_teacher/T), a row costs

        α·D + (1-α)·(-log softmax(z_student)[target]),    with temperature_squared α·T²·D

        forward_kl   KL(q‖p) = Σ q·log(q/p)               dD/dz = (p - q)/T
        reverse_kl   KL(p‖q)                              dD/dz = p·(log(p/q) - KL)/T
        jsd          β·KL(q‖m) + (1-β)·KL(p‖m)            dD/dz = (1-β)·p·(log(p/m) - KL(p‖m))/T

    m = β·q + (1-β)·p; by definition jsd with β = 0 is the forward, with β = 1 the reverse KL. The gradient
    is written row by row while both rows are in the cache.

    Args:
        student_logits: (…, V) float32, bfloat16, float16 or float64, any strides.
        teacher_logits: (…, V'), any of these types. With `teacher_indices` (…, K) log-probabilities at
            the temperature of this call.
        kind: "forward_kl", "reverse_kl" or "jsd".
        beta: the teacher's share of m, 0 to 1; of "jsd" alone.
        temperature: T > 0.
        mask: (…) bool, or a number that is not 0 where a row counts. None: all count.
        alpha: the divergence's share, 0 to 1; below 1 it needs `targets`.
        targets: (…) integers in [0, V) or `ignore_index`, at which a row does not count.
        temperature_squared: multiply D by T².
        vocab_size: how many leading columns count; where V and V' differ it must be given. The gradient of
            the others is 0.
        teacher_indices: (…, K) integers: the columns that teacher_logits are of, each once. All others
            are one bucket of probability max(0, 1 - Σ_k q_k); with K = V there is none.
        reduction: "mean" (over the rows that count; 0 with zero gradient if there are none), "sum" or
            "none" (…).
        ignore_index: see `targets`.
        return_grad: also return dz, the gradient of the loss by student_logits, for "none" of its sum.
        grad_out: where the gradient goes; `grad_out=student_logits` consumes them.

    Returns:
        The loss, or (loss, dz): the loss float32 (float64 for a float64 student), in nats; dz of the
        student's dtype and shape. Rows that do not count are never read. What -inf and NaN give:
        finefuse.distill_loss.

    Raises:
        TypeError, ValueError: naming the argument; targets and teacher_indices out of range, an index
        twice in a row, or teacher_logits whose probabilities add up to more than 1 included. Nothing is
        written.
    """
    student = float_array("student_logits", student_logits)
    teacher = float_array("teacher_logits", teacher_logits)
    code, reduce = choice("kind", kind, DISTILL_KINDS), choice("reduction", reduction, REDUCTIONS)
    beta, temperature = scalar("beta", beta), scalar("temperature", temperature)
    alpha, ignore_index = scalar("alpha", alpha), integer("ignore_index", ignore_index)
    check_vocab_size(vocab_size)
    indices = None if teacher_indices is None else index_array("teacher_indices", teacher_indices)
    y = None if targets is None else index_array("targets", targets)
    mask = mask_array(mask, student.shape[:-1])
    vocab = distill_vocab(
        student.shape,
        teacher.shape,
        None if indices is None else indices.shape,
        None if mask is None else mask.shape,
        None if y is None else y.shape,
        vocab_size,
    )
    check_distill_numbers(beta, temperature, alpha, y is not None)
    leading = student.shape[:-1]
    count = int(np.prod(leading))
    rows, layout = float_rows(student, count)
    teacher_rows, teacher_layout = float_rows(teacher, count)
    gradient, out, out_layout = gradient_rows(
        student, rows, layout, return_grad, grad_out, [teacher_rows]
    )
    loss = _empty(() if reduce else leading, ACCUMULATOR[layout[0]])
    scratch = _empty(count + 1, FLOAT64) if reduce else None
    code = distill_kind(code, beta)
    numbers = distill_numbers(beta, temperature, alpha, bool(temperature_squared))
    _C.distill(
        rows, (*layout[:2], vocab, *layout[3:]), layout[2], out, out_layout, teacher_rows,
        teacher_layout, indices, indices is not None and is_int32(indices), code, numbers, mask, y,
        y is not None and is_int32(y), ignore_index, reduce, loss, scratch, None, get_num_threads(),
    )  # fmt: skip
    if gradient is None:
        return result(loss)
    if out is not gradient:
        gradient[...] = out
    return result(loss), gradient
