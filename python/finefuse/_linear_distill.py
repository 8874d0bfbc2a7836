"""Distillation from hidden states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._args import REDUCTIONS, check_index, choice, require
from ._args.distill import DISTILL_KINDS, check_distill_numbers, check_vocab_size, distill_vocab
from ._linear_gradients import (
    GRADIENTS,
    WANTED,
    gradients_fake,
    made_in_forward,
    reduced,
    rows_of,
    save_gradients,
    scaled_gradients,
    weights_of,
)
from ._linear_head import HEAD, HEAD_ARGUMENTS, call_of, check_head, head_of
from ._linear_loss import Rows, part_of, put, walk
from ._op import (
    INDEX_DTYPES,
    accumulator,
    check_targets,
    composite,
    index_tensor,
    is_compiling,
    mask_tensor,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
    wants_gradient,
)
from .distill import counted, distill_loss, distill_rows

# ---- raw ops -----------------------------------------------------------------------------------

_TEACHER_HEAD = re.sub(r"(\w+)(,|$)", r"teacher_\1\2", HEAD)


def _split(args: Sequence[Any]) -> tuple[Any, ...]:
    """head, teacher_hidden, teacher's head, mask, targets, (beta, temperature, alpha), the rest."""
    n = HEAD_ARGUMENTS
    return args[:n], args[n], args[n + 1 : 2 * n + 1], *args[2 * n + 1 : 2 * n + 3], args[
        2 * n + 3 : 2 * n + 6
    ], args[2 * n + 6 :]  # fmt: skip


def _check_rows(hidden: Tensor, args: Sequence[Any]) -> None:
    head, teacher, teacher_head, mask, targets, _, _ = _split(args)
    check_head(hidden, head, "student_hidden")
    check_head(teacher, teacher_head, "teacher_hidden")
    for name, value in (("teacher_hidden", teacher), ("mask", mask), ("targets", targets)):
        if value is None:
            continue
        same_device(name, value, "student_hidden", hidden)
        if value.shape[0] != hidden.shape[0] or (name != "teacher_hidden" and value.ndim != 1):
            raise ValueError(f"{name}: shape {tuple(value.shape)}; allowed: ({hidden.shape[0]}, …)")
    if mask is not None and mask.dtype is not torch.bool:
        raise TypeError(f"mask: dtype {mask.dtype}; allowed: bool")
    if targets is not None and targets.dtype not in INDEX_DTYPES:
        raise TypeError(f"targets: dtype {targets.dtype}; allowed: int64, int32")


def _distill(
    g: Tensor | None, want_loss: bool, hidden: Tensor, args: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """(loss, *gradients); g: upstream, (N,) for "none", else one; None: 1."""
    _check_rows(hidden, args)
    head_args, teacher, teacher_args, mask, targets, numbers, rest = _split(args)
    kind, temperature_squared, vocab, ignore_index, reduction = rest
    beta, temperature, alpha = numbers
    check_distill_numbers(beta, temperature, alpha, targets is not None)
    require(reduction in (0, 1, 2), "reduction", reduction, "0 (none), 1 (sum), 2 (mean)")
    head, teacher_head = head_of(hidden, head_args), head_of(teacher, teacher_args)
    if not vocab <= min(head.vocab, teacher_head.vocab):
        raise ValueError(f"vocab: {vocab}; the heads have {head.vocab} and {teacher_head.vocab}")
    dtype = accumulator(hidden.dtype)
    counts = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    if mask is not None:
        counts &= mask
    if targets is not None:
        counts &= targets != ignore_index
        check_targets(targets.long().masked_fill(~counts, ignore_index), vocab, ignore_index)
    share, upstream = weights_of(g, counts, dtype, reduction)
    losses = hidden.new_zeros(len(hidden), dtype=torch.float64)
    teacher_row = teacher_head.vocab * teacher_head.dtype.itemsize // head.dtype.itemsize
    (hidden, teacher), parts = rows_of(head, counts, hidden, teacher, row=teacher_row)

    def kernel(z: Tensor, rows: Rows) -> bool:
        y = None if targets is None else part_of(targets, rows)
        teacher_z = teacher_head.logits(part_of(teacher, rows).to(teacher_head.dtype))
        teacher_head.cap(teacher_z, keep=False)
        out = z if any(wanted) else None
        w = part_of(upstream, rows).contiguous() if any(wanted) else None
        loss = distill_rows(
            w, out, True, z, teacher_z, None, part_of(counts, rows), y, beta, temperature, alpha, kind,
            temperature_squared, vocab, ignore_index, 0,
        )  # fmt: skip
        assert loss is not None
        put(losses, rows, loss)
        return any(wanted)

    gradients = walk(head, hidden, parts, kernel, wanted)
    if not want_loss:
        return gradients
    return reduced(losses, share, reduction).to(dtype), *gradients


def _fake(hidden: Tensor, *args: Any) -> Tensor:
    _check_rows(hidden, args)
    reduction = _split(args)[-1][4]
    return hidden.new_empty(
        hidden.shape[:1] if reduction == 0 else (), dtype=accumulator(hidden.dtype)
    )


_ARGUMENTS = (
    f"Tensor hidden, {HEAD}, Tensor teacher_hidden, {_TEACHER_HEAD}, Tensor? mask, Tensor? targets, "
    "float beta, float temperature, float alpha, int kind, bool temperature_squared, SymInt columns, "
    "int ignore_index, int reduction"
)
_FORWARD = raw_op(
    f"linear_distill_forward({_ARGUMENTS}) -> Tensor",
    run=lambda hidden, *args: _distill(None, True, hidden, args, (False,) * 3)[0],
    fake=_fake,
)
# The gradients of the loss, in the same visit of each chunk.
_FORWARD_BACKWARD = raw_op(
    f"linear_distill_forward_backward({_ARGUMENTS}, {WANTED}) -> (Tensor, {GRADIENTS})",
    run=lambda hidden, *args: _distill(None, True, hidden, args[:-3], args[-3:]),
    fake=lambda hidden, *args: (
        _fake(hidden, *args[:-3]), *gradients_fake(hidden, args[HEAD_ARGUMENTS - 2], args[-3:])
    ),
)  # fmt: skip
_BACKWARD = raw_op(
    f"linear_distill_backward(Tensor g, {_ARGUMENTS}, {WANTED}) -> ({GRADIENTS})",
    run=lambda g, hidden, *args: _distill(g, False, hidden, args[:-3], args[-3:]),
    fake=lambda g, hidden, *args: gradients_fake(hidden, args[HEAD_ARGUMENTS - 2], args[-3:]),
)


# ---- autograd and the public function ----------------------------------------------------------


class _Distill(torch.autograd.Function):
    """With a scalar loss the gradients are made in the forward: see `linear_distill_loss`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        made: Any = ()
        if args[-1] != 0 and made_in_forward(args[0]):
            loss, *made = _FORWARD_BACKWARD(*args, *ctx.needs_input_grad[:3])
        else:
            loss = _FORWARD(*args)
        # numbers, which are 0-d tensors while compiling, and None where a tensor stands
        ctx.others = [None if x is None or _is_array(x) else x for x in args]
        ctx.places = [i for i, x in enumerate(args) if _is_array(x)]
        save_gradients(ctx, [args[i] for i in ctx.places], made)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        def arguments(*saved: Any) -> list[Any]:
            args = list(ctx.others)
            for i, x in zip(ctx.places, saved, strict=True):
                args[i] = x
            return args

        def rows(*saved: Any) -> tuple[Tensor, int]:
            hidden, *rest = arguments(*saved)
            *_, mask, targets, _, (_, _, _, ignore_index, _) = _split(rest)
            return counted(hidden, mask, targets, ignore_index), -100

        def recompute(*saved: Any) -> Any:
            return _BACKWARD(g, *arguments(*saved), *ctx.needs_input_grad[:3])

        return (*scaled_gradients(ctx, g, rows, recompute), *(None,) * (len(ctx.others) - 3))


def _is_array(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0


def linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | Tensor | None = None,
    teacher_softcap: float | Tensor | None = None,
    kind: str = "forward_kl",
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    targets: Tensor | None = None,
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """A distillation loss from hidden states; the logits of neither model exist all at once.

        z = hidden Wᵀ + b,    with a softcap c·tanh(z/c),    of student and teacher; then as `distill_loss`

    For "mean" and "sum" all gradients are made in the forward, while a chunk of both models' logits is
    there: 6·N·H·V operations for the student (4·N·H·V where its weight is frozen) and 2·N·H'·V' for the
    teacher, which has no gradient. For "none", in float16 and under checkpointing the backward makes the
    logits again: 2·N·(H·V + H'·V') more. Memory: the gradients and one chunk of each.

    Args:
        student_hidden, student_weight, student_bias, softcap: as in `linear_token_logprobs`.
        teacher_hidden: (…, H') of any float type, with teacher_weight (V', H') of its type or a
            CodebookTensor, teacher_bias (V',) and teacher_softcap.
        mask: (…) bool, or a number that is not 0 where a row counts. Rows that do not are not multiplied.
        targets: (…) integers in [0, V) or `ignore_index`.
        vocab_size: how many leading rows of both weights count; where V and V' differ (padding) it must be
            given. The gradient of the others is 0.
        the others: as in `distill_loss`.

    Returns:
        float32 (float64 for a float64 student), in nats; differentiable in student_hidden, student_weight
        and student_bias.

    Raises:
        TypeError, ValueError: naming the argument; a target outside [0, V) included.
    """
    names = ("student_hidden", "student_weight", "student_bias", "softcap")
    teacher_names = ("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_softcap")
    if not is_compiling():
        check_vocab_size(vocab_size)
    rows = _rows(vocab_size, student_weight, teacher_weight)
    student = call_of(student_hidden, student_weight, student_bias, softcap, names, rows)
    with torch.no_grad():
        teacher = call_of(
            teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_names, rows
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_hidden: shape {tuple(teacher_hidden.shape)}; student_hidden of shape "
            f"{tuple(student_hidden.shape)} needs {(*student.shape, '…')}"
        )
    code, reduce = choice("kind", kind, DISTILL_KINDS), choice("reduction", reduction, REDUCTIONS)
    numbers = (scalar("beta", beta), scalar("temperature", temperature), scalar("alpha", alpha))
    check_index("ignore_index", ignore_index)
    if targets is not None:
        targets = index_tensor("targets", targets, "student_hidden", student_hidden)
    mask = mask_tensor(mask)
    if not is_compiling():
        check_distill_numbers(*numbers, targets is not None)
    if teacher.vocab != student.vocab:
        raise ValueError(
            f"teacher_weight: {teacher.vocab} rows, student_weight {student.vocab}; give vocab_size, the "
            "number of rows that both share"
        )
    logits = (*student.shape, student.vocab)
    of_mask, of_targets = (None if t is None else t.shape for t in (mask, targets))
    vocab = distill_vocab(logits, logits, None, of_mask, of_targets, None)
    if runs_eagerly("linear", student.hidden):
        keep = mask
        if targets is not None:
            keep = targets != ignore_index if mask is None else mask & (targets != ignore_index)
        return distill_loss(
            student.logits(keep), teacher.logits(keep).detach(), kind=kind, beta=beta,
            temperature=temperature, mask=mask, alpha=alpha, targets=targets,
            temperature_squared=temperature_squared, reduction=reduction, ignore_index=ignore_index,
        )  # fmt: skip
    args = (
        student.hidden, *student.arguments(), *_detached(teacher.hidden, *teacher.arguments()),
        *(None if t is None else t.reshape(-1) for t in (mask, targets)), *numbers, code,
        bool(temperature_squared), vocab, ignore_index, reduce,
    )  # fmt: skip
    if wants_gradient(student.hidden, student.weight, student.bias):
        loss = _Distill.apply(*args)
    else:
        loss = _FORWARD(*args)
    return loss.view(student.shape) if reduce == 0 else loss


def _rows(vocab_size: Any, *weights: Any) -> Any:
    """How many rows of both weights count."""
    if vocab_size is None or not all(isinstance(w, Tensor) and w.ndim == 2 for w in weights):
        return None  # call_of says what is wrong
    most = min(w.shape[0] for w in weights)
    require(1 <= vocab_size <= most, "vocab_size", vocab_size, f"1 to {most}, or None")
    return vocab_size


def _detached(*args: Any) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) else x for x in args]


composite(
    "linear_distill_loss(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, "
    "Tensor teacher_weight, *, Tensor? student_bias=None, Tensor? teacher_bias=None, float? softcap=None, "
    "float? teacher_softcap=None, str kind='forward_kl', float beta=0.5, float temperature=1.0, "
    "Tensor? mask=None, float alpha=1.0, Tensor? targets=None, bool temperature_squared=False, "
    "SymInt? vocab_size=None, str reduction='mean', int ignore_index=-100) -> Tensor",
    linear_distill_loss,
)
