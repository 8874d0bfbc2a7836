"""Token log-probabilities of a vocabulary that is sharded over ranks: what they tell each other.

Rank r makes the logits of its own rows of the weight. With lse_r, H_r and log p_r of that shard alone,

    lse = log Σ_r e^{lse_r},    log w_r = lse_r - lse,    H = Σ_r w_r·(H_r - log w_r),
    log p(v) = log p_r(v) + log w_r    for v of shard r

and a shard's own backward is that of the unsharded op with log p(v) and H of the whole: only the gradient
of hidden is a sum over ranks. After Megatron-LM's vocab-parallel cross-entropy, arXiv:1909.08053, which
exchanges maxima, sums and targets one after the other; here it is one message.

The ops of a shard come from the caller (`_linear_logprobs.py`), which knows them; this file knows ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _backend
from ._args import require
from ._linear_head import HEAD_ARGUMENTS, HeadCall
from ._linear_loss import Gradients
from ._op import accumulator, check_targets, once_differentiable, wants_gradient


class Shard(NamedTuple):
    """The rows [first, first + real) of the whole weight, and who holds the others."""

    group: Any
    ranks: int
    rank: int
    rows: int  # of every rank's weight, with padding
    real: int
    vocab: int  # of all ranks, without padding

    @property
    def first(self) -> int:
        return self.rank * self.rows


class Ops(NamedTuple):
    """Of a shard; the last argument of both but `stats` and `wanted` is its own ignore_index."""

    # (hidden, head, targets, temperature, ignore_index, stats) -> lp, entropy, lse, saved
    forward: Callable[..., tuple[Tensor, ...]]
    # (g, h, l, hidden, head, targets, temperature, ignore_index, wanted, whole=) -> partial sums
    backward: Callable[..., Gradients]


IGNORED = -1  # among a shard's own targets, where any number from 0 may be a target


def shard_of(weight: Any, group: Any, vocab_size: Any) -> Shard:
    """Checked, but for what depends on other ranks: a rank that raised alone would leave them waiting."""
    if not dist.is_available():
        raise ValueError("group: this torch was built without torch.distributed")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: a torch.distributed.ProcessGroup that this process is in, not {group!r}"
        )
    if not dist.is_initialized():
        raise ValueError("group: torch.distributed is not initialised (init_process_group)")
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = weight.shape[0]
    vocab = ranks * rows if vocab_size is None else vocab_size
    check_vocab_size(vocab)
    return Shard(group, ranks, rank, rows, min(max(vocab - rank * rows, 0), rows), vocab)


def check_vocab_size(value: Any, rows: int | None = None, whose: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"vocab_size: an int, not {value!r}")
    allowed = "1 or more" if rows is None else f"1 to {rows}{whose}"
    require(value >= 1 and (rows is None or value <= rows), "vocab_size", value, allowed)


# ---- forward -----------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """What the backward reads of the rows of hidden."""

    targets: Tensor  # of this shard, or 0, or IGNORED
    own: Tensor  # whether the target is of this shard
    whole: Tensor  # (2, N): see of_the_whole


def _forward(
    ops: Ops, shard: Shard, hidden: Tensor, head: Sequence[Any], targets: Tensor, temperature: float,
    ignore_index: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], _Rows]:  # fmt: skip
    """lp, entropy and lse, the same bits on every rank."""
    keep = targets != ignore_index
    valid = (targets >= 0) & (targets < shard.vocab)
    local = targets - shard.first
    own = keep & valid & (local >= 0) & (local < shard.real)
    local = torch.where(own, local, 0)
    if not targets.is_cpu:  # out of range in the shard's op, too, which flags it
        local = torch.where(valid, local, shard.real)
    local = torch.where(keep, local, IGNORED)

    if shard.real == 0:
        found = hidden.new_zeros((3, len(targets)), dtype=torch.float64)
        found[::2] = -torch.inf
        ref = log_sum = found[1]
        empty = torch.ones_like(keep)
    else:
        lp, _, _, saved = ops.forward(hidden, *head, local, temperature, IGNORED, True)
        ref, log_sum, entropy = saved
        empty = ref == -torch.inf  # every logit of the shard is -inf
        found = torch.stack(
            (
                ref / temperature + log_sum,
                entropy.masked_fill(empty, 0.0),
                lp.double().masked_fill(empty, -torch.inf),
            )
        )
    told = _exchange(shard, found)
    check_targets(targets, shard.vocab, ignore_index)  # here, so that no rank waits for another
    owner = (targets // shard.rows).clamp(0, shard.ranks - 1).long()
    lp, entropy, lse, log_w = _combine(told, owner)
    # what has no finite logit has p = 0, if the row has any
    dead = torch.where(lse.isfinite(), 0.0, torch.nan)
    whole = torch.stack((torch.where(empty, dead, log_w[shard.rank]), entropy))
    dtype, bad = accumulator(hidden.dtype), keep & ~valid
    lp, entropy, lse = (
        x.masked_fill(bad, torch.nan).masked_fill(~keep, 0.0).to(dtype) for x in (lp, entropy, lse)
    )
    return (lp, entropy, lse), _Rows(local, own, whole)


def _exchange(shard: Shard, found: Tensor) -> Tensor:
    """(ranks, 3, N) of every rank's (3, N); raises on all of them where their arguments do not fit."""
    about = found.new_tensor((shard.rows, shard.vocab))
    message = torch.cat((about, found.flatten()))
    told = message.new_empty((shard.ranks, len(message)))
    dist.all_gather(list(told.unbind(0)), message, group=shard.group)
    if not (told.is_cuda and torch.cuda.is_current_stream_capturing()):
        rows, vocab = (sorted({int(x) for x in column}) for column in told[:, :2].t().tolist())
        if len(rows) > 1:
            raise ValueError(
                f"weight: {rows} rows on the ranks of the group; allowed: as many on each"
            )
        if len(vocab) > 1:
            raise ValueError(f"vocab_size: {vocab} on the ranks of the group; allowed: one number")
    check_vocab_size(
        shard.vocab, shard.ranks * shard.rows, f" ({shard.ranks} ranks of {shard.rows} rows)"
    )
    return told[:, 2:].view(shard.ranks, *found.shape)


def _combine(told: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lp, entropy, lse, log w (ranks, N)), summed up in the order of ranks.

    Around the heaviest shard, whose log w is -log1p of the others' weight: where a row is all but certain,
    log-probabilities near 0 keep their digits.
    """
    lse, entropy, lp = told.unbind(1)
    heaviest = lse.argmax(0)
    top = lse.gather(0, heaviest[None])[0]
    excess = torch.zeros_like(top)
    for r, x in enumerate(lse):
        excess += torch.where(heaviest == r, 0.0, torch.exp(x - top))
    excess = torch.log1p(excess)
    log_w = lse - top - excess  # all shards -inf: NaN, and so lp and H
    total = torch.zeros_like(top)
    for x, h in zip(log_w, entropy, strict=True):
        w = torch.exp(x)
        total += torch.where(w == 0.0, 0.0, w * (h - x))
    lp = (lp + log_w).gather(0, owner[None])[0]
    return lp, total, torch.where(top == -torch.inf, top, top + excess), log_w


def of_the_whole(saved: Tensor, whole: Tensor) -> Tensor:
    """Of a shard's rows (reference logit, log-sum beyond it, …) those with which its backward is the whole's:
    log p(v) = (z[v] - ref)/T - log_sum + log w. For log w a row without a finite logit has 0, or NaN where
    it has one on no rank."""
    ref, log_sum = saved[:2]
    log_w, entropy = whole
    empty = ref == -torch.inf
    return torch.stack(
        (ref.masked_fill(empty, 0.0), torch.where(empty, 0.0, log_sum) - log_w, entropy)
    )


# ---- backward ----------------------------------------------------------------------------------


def _backward(
    ops: Ops, shard: Shard, g: Tensor | None, h: Tensor | None, l: Tensor | None, rows: _Rows,
    hidden: Tensor, head: Sequence[Any], temperature: float, wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Of hidden, complete on every rank; of the weight and the bias, the shard's own."""
    if g is not None:  # the rest of a row whose target is elsewhere: -g·p + l·p = (l - g)·p
        elsewhere = torch.where(rows.own, 0.0, -g)
        l = elsewhere if l is None else l + elsewhere
        g = torch.where(rows.own, g, 0.0)
    dx: Tensor | None
    if shard.real == 0:
        dx, dw, db = (torch.zeros_like(x) if x is not None else None for x in (hidden, *head[:2]))
        dx = None if dx is None else dx.to(accumulator(hidden.dtype))
    else:
        dx, dw, db = ops.backward(
            g, h, l, hidden, *head, rows.targets, temperature, IGNORED, *wanted, whole=rows.whole
        )
    if wanted[0] and dx is not None:
        # 16-bit types: added in float32 and rounded once, so that the sum is as good as the unsharded one
        dist.all_reduce(dx, group=shard.group)
        dx = dx.to(hidden.dtype)
    return [x if want else None for x, want in zip((dx, dw, db), wanted, strict=True)]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Ops, shard: Shard, hidden: Tensor, *args: Any) -> Any:
        *head, targets, temperature, ignore_index = args
        outputs, rows = _forward(ops, shard, hidden, head, targets, temperature, ignore_index)
        ctx.save_for_backward(hidden, *head[:8], *rows)
        ctx.ops, ctx.shard, ctx.numbers, ctx.temperature = ops, shard, head[8:], temperature
        ctx.backend = _backend.chosen
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Any, h: Any, l: Any) -> Any:
        tensors = ctx.saved_tensors  # once: under checkpointing there is no second time
        hidden, *head = tensors[:9]
        gradients: list[Tensor | None] = [None, None, None]
        if not (g is None and h is None and l is None):
            gradients = _backward(
                ctx.ops, ctx.shard, g, h, l, _Rows(*tensors[9:]), hidden,
                (*head, *ctx.numbers), ctx.temperature, ctx.needs_input_grad[2:5],
            )  # fmt: skip
        return (None, None, *gradients, *(None,) * (HEAD_ARGUMENTS + 1))


def token_logprobs(
    ops: Ops, shard: Shard, call: HeadCall, targets: Tensor, temperature: Any, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """lp, entropy, lse of flat targets; the head is the shard's real rows."""
    args = (call.hidden, *call.arguments(), targets, temperature, ignore_index)
    if wants_gradient(call.hidden, call.weight, call.bias):
        return _TokenLogprobs.apply(ops, shard, *args)
    return _forward(ops, shard, call.hidden, call.arguments(), *args[-3:])[0]
