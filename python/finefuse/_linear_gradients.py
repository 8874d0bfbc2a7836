"""The gradients of a loss from hidden states: made in its forward, or again in its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._linear_loss import Head, Rows, chunk_rows, chunks, gradient_shapes, rows_that_count
from ._op import accumulator, gradient_in_forward, is_compiling, row_gradient, scalar_gradient
from .logprobs import SCALE, sequence_logprobs

WANTED = "bool want_hidden, bool want_weight, bool want_bias"
GRADIENTS = "Tensor, Tensor, Tensor"


def rows_of(
    head: Head, keep: Tensor, hidden: Tensor, *others: Tensor, row: int = 0
) -> tuple[tuple[Tensor, ...], list[Rows]]:
    """(hidden states, the rows that count in chunks); row: other numbers of a row than its logits."""
    counted, given = rows_that_count(keep, hidden, *others)
    count = len(hidden) if counted is None else len(counted)
    size = chunk_rows(
        count, head.vocab * (2 if head.capped else 1) + row, head.dtype, hidden.is_cpu
    )
    return given, chunks(counted, count, size)


def weights_of(
    g: Tensor | None, counts: Tensor, dtype: torch.dtype, reduction: int
) -> tuple[Tensor, Tensor]:
    """(a row's share of the loss, float64; the upstream gradient of each row's loss) of rows that count (N,);
    g: upstream, (N,) for "none", else one; None: 1."""
    share = torch.ones((), dtype=torch.float64, device=counts.device)
    if reduction == 2:
        share = share / counts.sum().clamp(min=1)
    if g is not None and reduction == 0:
        by_row = row_gradient("g", g, counts, dtype)
        assert by_row is not None
        return share, by_row
    upstream = share if g is None else share * scalar_gradient(g, counts, dtype).reshape(())
    return share, upstream.to(dtype).expand(len(counts))


def reduced(losses: Tensor, share: Tensor, reduction: int) -> Tensor:
    """Added in order, whatever the number of threads."""
    return losses if reduction == 0 else share * sequence_logprobs(losses)


def gradients_fake(hidden: Tensor, vocab: Any, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(shape) for shape in gradient_shapes(hidden, vocab, wanted))


def made_in_forward(hidden: Tensor) -> bool:
    """As `gradient_in_forward`, and while compiling too: the gradients are outputs of the op there."""
    return gradient_in_forward(hidden) or (is_compiling() and hidden.dtype is not torch.float16)


def only_wanted(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [x if want else None for x, want in zip(gradients, wanted, strict=True)]


def save_gradients(ctx: Any, tensors: Sequence[Tensor | None], made: Sequence[Tensor]) -> None:
    """For `scaled_gradients`: the tensors that the backward reads, the gradients if the forward made them."""
    ctx.gradients = None if is_compiling() else made
    ctx.count, ctx.backend = len(tensors), _backend.chosen
    ctx.save_for_backward(*tensors, *(made if is_compiling() else ()))


def scaled_gradients(
    ctx: Any, g: Tensor, rows_with_gradient: Any, recompute: Any
) -> list[Tensor | None]:
    """The gradients that the forward made, times g; where it made none, and the second time, those that
    recompute(*saved) makes. rows_with_gradient(*saved): (targets, ignore_index) of the rows that have one."""
    gradients, ctx.gradients = ctx.gradients, None
    wanted = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors  # once: under checkpointing there is no second time
    tensors = saved[: ctx.count]
    gradients = gradients or saved[ctx.count :]
    if not gradients:
        return only_wanted(recompute(*tensors), wanted)
    if is_compiling():
        wide = accumulator(gradients[0].dtype)
        return only_wanted([(x.to(wide) * g).to(x.dtype) for x in gradients], wanted)
    dx, dw, db = gradients
    if wanted[0]:
        targets, ignore_index = rows_with_gradient(*tensors)
        SCALE(dx, targets, g, ignore_index)
    for x in (dw, db.view(1, -1)):
        if x.numel():
            SCALE(x, torch.zeros(x.shape[0], dtype=torch.int32, device=x.device), g, -100)
    return only_wanted(gradients, wanted)
