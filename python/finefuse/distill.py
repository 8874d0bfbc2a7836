"""Distillation: the divergence of a student's distribution from a teacher's, from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._args import REDUCTIONS, check_index, choice, require
from ._args.distill import (
    DISTILL_KINDS,
    check_distill_numbers,
    check_vocab_size,
    distill_kind,
    distill_numbers,
    distill_vocab,
)
from ._op import (
    INDEX_DTYPES,
    SPENT,
    accumulator,
    check_targets,
    composite,
    consumed,
    contiguous,
    float_rows,
    float_tensor,
    gradient_buffer,
    gradient_in_forward,
    index_tensor,
    is_compiling,
    kernel,
    mask_tensor,
    may_share_memory,
    once_differentiable,
    raw_op,
    row_gradient,
    runs_eagerly,
    same_device,
    scalar,
    scalar_gradient,
    wants_gradient,
    write_back,
)
from .eager import distill as _eager
from .logprobs import SCALE

_DISTILL = kernel("distill", "distill")


# ---- raw ops -----------------------------------------------------------------------------------


def _check(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    targets: Tensor | None,
    vocab: Any,
) -> Any:
    """Raise what is wrong with types, devices and shapes; how many columns count."""
    float_tensor("student_logits", student)
    float_tensor("teacher_logits", teacher)
    for name, value in (("teacher_indices", indices), ("targets", targets)):
        if value is not None and value.dtype not in INDEX_DTYPES:
            raise TypeError(f"{name}: dtype {value.dtype}; allowed: int64, int32")
    if mask is not None and mask.dtype is not torch.bool:
        raise TypeError(f"mask: dtype {mask.dtype}; allowed: bool")
    for name, value in (
        ("teacher_logits", teacher), ("teacher_indices", indices), ("mask", mask), ("targets", targets),
    ):  # fmt: skip
        same_device(name, value, "student_logits", student)
    of_indices, of_mask, of_targets = (
        None if t is None else t.shape for t in (indices, mask, targets)
    )
    return distill_vocab(student.shape, teacher.shape, of_indices, of_mask, of_targets, vocab)


def distill_rows(
    g: Tensor | None, out: Tensor | None, want_loss: bool,
    student: Tensor, teacher: Tensor, indices: Tensor | None, mask: Tensor | None,
    targets: Tensor | None, beta: float, temperature: float, alpha: float, kind: int,
    temperature_squared: bool, vocab: int, ignore_index: int, reduction: int,
) -> Tensor | None:  # fmt: skip
    _check(student, teacher, indices, mask, targets, vocab)
    check_distill_numbers(beta, temperature, alpha, targets is not None)
    require(reduction in (0, 1, 2), "reduction", reduction, "0 (none), 1 (sum), 2 (mean)")
    require(kind in (0, 1, 2), "kind", kind, "0 (forward_kl), 1 (reverse_kl), 2 (jsd)")
    leading, dtype = student.shape[:-1], accumulator(student.dtype)
    count = leading.numel()
    rows, layout = float_rows(student, count)
    teacher_rows, teacher_layout = float_rows(teacher, count)
    out_rows, out_layout = None, layout
    if out is not None:
        if out.shape != student.shape or out.dtype != student.dtype:
            raise ValueError(
                f"out: {tuple(out.shape)} {out.dtype}; student_logits are {tuple(student.shape)} "
                f"{student.dtype}"
            )
        same_device("out", out, "student_logits", student)
        if out.data_ptr() == student.data_ptr() and out.stride() == student.stride():
            out_rows = rows
        else:
            out_rows, out_layout = float_rows(out, count)
    loss = scratch = None
    if want_loss:
        loss = student.new_empty(leading if reduction == 0 else (), dtype=dtype)
    if g is not None:
        by_row = reduction == 0
        g = (
            row_gradient("g", g, student[..., 0], dtype)
            if by_row
            else scalar_gradient(g, student, dtype)
        )
    if reduction:
        scratch = student.new_empty((count + 1,), dtype=torch.float64)
    indices, mask, targets = contiguous(indices, mask, targets)
    _DISTILL(
        rows, (*layout[:2], vocab, *layout[3:]), layout[2], out_rows, out_layout,
        teacher_rows, teacher_layout, indices, indices is not None and indices.dtype is torch.int32,
        distill_kind(kind, beta), distill_numbers(beta, temperature, alpha, temperature_squared),
        mask, targets, targets is not None and targets.dtype is torch.int32, ignore_index, reduction,
        loss, scratch, g,
    )  # fmt: skip
    if out is not None and out_rows is not None:
        write_back(out, out_rows)
    return loss


def _forward(*args: Any) -> Any:
    return distill_rows(None, None, True, *args)


def _forward_backward(student: Tensor, teacher: Tensor, out: Tensor, *rest: Any) -> Any:
    return distill_rows(None, out, True, student, teacher, *rest)


def _backward(g: Tensor, student: Tensor, teacher: Tensor, out: Tensor, *rest: Any) -> None:
    if g is None:
        raise TypeError("g: a tensor, not None")
    distill_rows(g, out, False, student, teacher, *rest)


def _fake(student: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
    indices, mask, targets = rest[:3]
    _check(student, teacher, indices, mask, targets, rest[-3])
    shape = student.shape[:-1] if rest[-1] == 0 else ()
    return student.new_empty(shape, dtype=accumulator(student.dtype))


_LOGITS = "Tensor student, Tensor teacher"
_ROWS = "Tensor? teacher_indices, Tensor? mask, Tensor? targets"
_OPTIONS = (
    "float beta, float temperature, float alpha, int kind, bool temperature_squared, SymInt vocab, "
    "int ignore_index, int reduction"
)
_FORWARD = raw_op(
    f"distill_forward({_LOGITS}, {_ROWS}, {_OPTIONS}) -> Tensor", run=_forward, fake=_fake
)
# The gradient of the loss goes to `out` in the same visit of each row.
_FORWARD_BACKWARD = raw_op(
    f"distill_forward_backward({_LOGITS}, Tensor(a!) out, {_ROWS}, {_OPTIONS}) -> Tensor",
    run=_forward_backward,
    fake=lambda student, teacher, out, *rest: _fake(student, teacher, *rest),
)
_BACKWARD = raw_op(
    f"distill_backward(Tensor g, {_LOGITS}, Tensor(a!) out, {_ROWS}, {_OPTIONS}) -> ()",
    run=_backward,
    fake=lambda *args: None,
)


# ---- autograd and the public function ----------------------------------------------------------


def counted(student: Tensor, mask: Tensor | None, targets: Tensor | None, ignore: int) -> Tensor:
    """0 where a row counts, -100 elsewhere: what scale_gradient leaves alone."""
    counts = torch.zeros(student.shape[:-1], dtype=torch.int32, device=student.device)
    if mask is not None:
        counts.masked_fill_(~mask, -100)
    if targets is not None:
        counts.masked_fill_(targets == ignore, -100)
    return counts


class _Distill(torch.autograd.Function):
    """With a scalar loss the gradient is made in the forward, while the row is in the cache.

    Not in float16, where p/N underflows before a loss scaler's factor arrives, and not where saved-tensor
    hooks (checkpointing, offloading) would rather not keep it.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
        *rows, inplace = rest
        ctx.gradient = None
        if rows[-1] != 0 and gradient_in_forward(student):
            out = ctx.gradient = gradient_buffer(student, inplace)
            loss = _FORWARD_BACKWARD(student, teacher, out, *rows)
            if inplace:
                consumed(student)
        else:
            loss = _FORWARD(student, teacher, *rows)
        indices, mask, targets, *ctx.options = rows
        ctx.save_for_backward(student, teacher, indices, mask, targets)
        ctx.counts = mask, targets  # of a consumed student saved_tensors would raise
        ctx.inplace, ctx.spent, ctx.backend = inplace, False, _backend.chosen
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        none = (None,) * 13
        out, ctx.gradient = ctx.gradient, None
        if out is not None:
            ctx.spent = ctx.inplace
            vocab, ignore_index = ctx.options[-3:-1]
            mask, targets = ctx.counts
            # past the columns that count 0 stays 0, also times inf
            SCALE(out[..., :vocab], counted(out, mask, targets, ignore_index), g, -100)
            return out, *none
        if ctx.spent:
            raise RuntimeError(SPENT)
        student, teacher, *rows = ctx.saved_tensors
        out = gradient_buffer(student, ctx.inplace)
        _BACKWARD(g, student, teacher, out, *rows, *ctx.options)
        if ctx.inplace and not is_compiling():
            consumed(student)
            ctx.spent = True
        return out, *none


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    targets: Tensor | None = None,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    teacher_indices: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    inplace: bool = False,
) -> Tensor:
    """A divergence of the student's distribution from the teacher's, and cross-entropy beside it.

    With p = softmax(z_student/T), q = softmax(z_teacher/T), a row costs

        α·D + (1-α)·(-log softmax(z_student)[target]),    with temperature_squared α·T²·D

        forward_kl   KL(q‖p) = Σ q·log(q/p)               dD/dz = (p - q)/T
        reverse_kl   KL(p‖q)                              dD/dz = p·(log(p/q) - KL)/T
        jsd          β·KL(q‖m) + (1-β)·KL(p‖m)            dD/dz = (1-β)·p·(log(p/m) - KL(p‖m))/T

    m = β·q + (1-β)·p. By definition jsd with β = 0 is the forward, with β = 1 the reverse KL (generalised
    Jensen-Shannon divergence, arXiv:2306.13649, as TRL and Liger have it). The cross-entropy is at
    T = 1. Only the student has a gradient.

    For "mean" and "sum" the gradient is written in the forward, row by row while student and teacher are
    in the cache: each is read from memory once. The backward only scales it where the upstream gradient
    is not 1. In float16, and under checkpointing and `torch.compile`, the backward makes it.

    Args:
        student_logits: (…, V) float32, bfloat16, float16 or float64, any strides.
        teacher_logits: (…, V'), any of these types (read as the student's accumulator type, float32 or
            float64). With `teacher_indices` (…, K) log-probabilities at the temperature of this call.
        kind: "forward_kl" (covers the teacher's modes), "reverse_kl" (seeks one), "jsd".
        beta: the teacher's share of m, 0 to 1; of "jsd" alone. A number or a 0-d tensor, like
            `temperature` and `alpha`.
        temperature: T > 0.
        mask: (…) bool, or a number that is not 0 where a row counts. None: all count.
        alpha: the divergence's share, 0 to 1; below 1 it needs `targets`.
        targets: (…) integers in [0, V) or `ignore_index`, at which a row does not count, whatever α is.
        temperature_squared: multiply D by T², which keeps the size of its gradient as T changes.
        vocab_size: how many leading columns count; where V and V' differ (padding) it must be given. The
            gradient of the others is 0.
        teacher_indices: (…, K) integers: the columns that teacher_logits are of, each once, as inference
            servers return the teacher's K most likely tokens. All other columns are one bucket, of
            probability q_r = max(0, 1 - Σ_k q_k), and D is taken over K + 1 buckets; with K = V there is
            no such bucket, and D is that of whole distributions.
        reduction: "mean" (over the rows that count; 0 with zero gradient if there are none), "sum" or
            "none" (…).
        ignore_index: see `targets`.
        inplace: the gradient takes the student's own storage, which for "mean" and "sum" is overwritten
            by the forward already. Under `torch.compile` it has no effect.

    Returns:
        float32 (float64 for a float64 student), in nats. Rows that do not count are never read: loss 0,
        gradient 0. A logit of -inf has probability 0 (as has one that underflows): it adds 0 where it
        weighs, and where the other distribution has weight a KL is +inf. The gradient of such a forward
        KL is still (p - q)/T, of such a reverse KL NaN in its row; jsd is always finite. A row that is
        all -inf, or has a NaN or +inf, gives NaN.

    Raises:
        TypeError, ValueError: naming the argument; targets and teacher_indices out of range, an index
        twice in a row, or teacher_logits whose probabilities add up to more than 1 (by more than their
        type rounds) included. Nothing is written. On GPUs the row is NaN, and `finefuse.check()` raises; the
        Triton kernels find an index that is twice in a row only where a gradient is written.
    """
    float_tensor("student_logits", student_logits)
    float_tensor("teacher_logits", teacher_logits)
    code, reduce = choice("kind", kind, DISTILL_KINDS), choice("reduction", reduction, REDUCTIONS)
    numbers = (scalar("beta", beta), scalar("temperature", temperature), scalar("alpha", alpha))
    check_index("ignore_index", ignore_index)
    if not is_compiling():
        check_vocab_size(vocab_size)
    if teacher_indices is not None:
        teacher_indices = index_tensor(
            "teacher_indices", teacher_indices, "student_logits", student_logits
        )
    if targets is not None:
        targets = index_tensor("targets", targets, "student_logits", student_logits)
    mask = mask_tensor(mask)
    vocab = _check(student_logits, teacher_logits, teacher_indices, mask, targets, vocab_size)
    if not is_compiling():
        check_distill_numbers(*numbers, targets is not None)
    teacher = teacher_logits.detach()
    may_overwrite = inplace and wants_gradient(student_logits) and not is_compiling()
    if may_overwrite and may_share_memory(student_logits, teacher):
        teacher = teacher.clone()  # the gradient of one row would be another's teacher
    rows = (teacher_indices, mask, targets)
    if runs_eagerly("distill", student_logits):
        if student_logits.is_cpu and not is_compiling():
            if targets is not None:
                check_targets(targets, vocab, ignore_index)
            _eager.check(student_logits, teacher, *rows, vocab, ignore_index)
        return _eager.distill_loss(
            student_logits, teacher, *rows, *numbers, kind, bool(temperature_squared), vocab,
            ignore_index, reduction,
        )  # fmt: skip
    options = (*rows, *numbers, code, bool(temperature_squared), vocab, ignore_index, reduce)
    if wants_gradient(student_logits):
        return _Distill.apply(student_logits, teacher, *options, inplace)
    return _FORWARD(student_logits, teacher, *options)


composite(
    "distill_loss(Tensor student_logits, Tensor teacher_logits, *, str kind='forward_kl', float beta=0.5, "
    "float temperature=1.0, Tensor? mask=None, float alpha=1.0, Tensor? targets=None, "
    "bool temperature_squared=False, SymInt? vocab_size=None, Tensor? teacher_indices=None, "
    "str reduction='mean', int ignore_index=-100) -> Tensor",
    distill_loss,
)
