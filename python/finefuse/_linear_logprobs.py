"""Token log-probabilities and cross-entropy from hidden states."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend, _linear_parallel
from ._args import (
    REDUCTIONS,
    check_label_smoothing,
    check_temperature,
    choice,
    require,
)
from ._linear_gradients import (
    GRADIENTS,
    WANTED,
    gradients_fake,
    made_in_forward,
    only_wanted,
    reduced,
    rows_of,
    save_gradients,
    scaled_gradients,
    weights_of,
)
from ._linear_head import (
    HEAD,
    HEAD_ARGUMENTS,
    NARROW,
    HeadCall,
    call_of,
    check_head,
    head_of,
)
from ._linear_loss import (
    Gradients,
    Rows,
    part_of,
    put,
    walk,
)
from ._op import (
    INDEX_DTYPES,
    accumulator,
    check_targets,
    composite,
    is_compiling,
    once_differentiable,
    raw_op,
    row_gradient,
    runs_eagerly,
    scalar,
    wants_gradient,
)
from .eager import logprobs as _eager
from .logprobs import (
    cross_entropy_rows,
    logprobs_rows,
    logprobs_rows_backward,
)


def check_rows(hidden: Tensor, targets: Tensor, name: str = "targets") -> None:
    if targets.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: dtype {targets.dtype}; allowed: int64, int32")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{name}: shape {tuple(targets.shape)}; allowed: ({hidden.shape[0]},)")


# ---- token log-probabilities: raw ops ----------------------------------------------------------


def _forward_fake(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    targets, stats = args[HEAD_ARGUMENTS], args[-1]
    check_head(hidden, args[:HEAD_ARGUMENTS])
    check_rows(hidden, targets)
    dtype, shape = accumulator(hidden.dtype), targets.shape
    shapes = (shape, shape, shape) if stats else (shape, (0,), (0,))
    return tuple(hidden.new_empty(size, dtype=dtype) for size in shapes)


def _statistics(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """lp, entropy, lse (the last two empty without stats), and the rows' numbers in float64: see
    csrc/ops/logprobs.h."""
    head_args, (targets, temperature, ignore_index, stats) = (
        args[:HEAD_ARGUMENTS],
        args[HEAD_ARGUMENTS:],
    )
    saved = hidden.new_zeros((3 if stats else 2, *targets.shape), dtype=torch.float64)
    outputs = (*_forward_fake(hidden, *args), saved)
    head = head_of(hidden, head_args)
    check_temperature(temperature)
    check_targets(targets, head.vocab, ignore_index)
    targets = targets.contiguous()
    if _fused(hidden, head_args):
        _fused_forward(hidden, head_args, targets, temperature, ignore_index, stats, outputs)
        return outputs
    for x in outputs[:3]:
        x.zero_()
    (hidden,), parts = rows_of(head, targets != ignore_index, hidden)

    def kernel(z: Tensor, rows: Rows) -> bool:
        found = logprobs_rows(z, part_of(targets, rows), temperature, ignore_index, stats, True)
        for x, values in zip(outputs[: 3 if stats else 1], found, strict=False):
            put(x, rows, values)
        for x, values in zip(saved, found[-1], strict=True):
            put(x, rows, values)
        return False

    walk(head, hidden, parts, kernel, (False, False, False))
    return outputs


def _fused(hidden: Tensor, head_args: Sequence[Any]) -> bool:
    """Whether the Triton kernel runs that keeps tiles of logits on chip: Triton's, of a dense weight."""
    return (
        head_args[0] is not None
        and _backend.resolve("linear", hidden.device, _backend.in_force()) == "triton"
        and hidden.dtype in NARROW
        and hidden.numel() > 0
    )


def _fused_forward(
    hidden: Tensor, head_args: Sequence[Any], targets: Tensor, temperature: float, ignore_index: int,
    stats: bool, outputs: tuple[Tensor, ...],
) -> None:  # fmt: skip
    from .kernels.linear import partial_shape  # type: ignore[import-untyped]

    weight, bias = head_args[:2]
    x, w = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
    lp, *both, saved = outputs
    partial = x.new_empty(partial_shape(len(x), len(w)), dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    softcap = 0.0 if head_args[-1] == float("inf") else head_args[-1]
    entropy, lse = both if stats else (None, None)
    _backend.launch(
        "linear", "linear_token_logprobs", x,
        (w, bias, targets, ignore_index, temperature, softcap, lp, entropy, lse, saved, partial),
    )  # fmt: skip


def _backward(
    g: Tensor | None, h: Tensor | None, l: Tensor | None, hidden: Tensor, *args: Any,
    partial: bool = False, whole: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Of a shard of the vocabulary `partial` sums, and `whole` (2, N), the shard's log w and the H of all."""
    targets, temperature, ignore_index, *wanted = args[HEAD_ARGUMENTS:]
    head = head_of(hidden, args[:HEAD_ARGUMENTS])
    check_rows(hidden, targets)
    check_temperature(temperature)
    check_targets(targets, head.vocab, ignore_index)
    dtype = accumulator(hidden.dtype)
    upstream = [
        row_gradient(name, x, targets, dtype) for name, x in zip("ghl", (g, h, l), strict=True)
    ]
    (hidden,), parts = rows_of(head, targets != ignore_index, hidden)

    def kernel(z: Tensor, rows: Rows) -> bool:
        # of these logits: the forward's may have been rounded otherwise, and p would not add up to 1
        y = part_of(targets, rows)
        stats = logprobs_rows(z, y, temperature, ignore_index, h is not None, True)[-1]
        if whole is not None:
            stats = _linear_parallel.of_the_whole(stats, whole[:, rows])
        of_g, of_h, of_l = (x if x is None else part_of(x, rows) for x in upstream)
        logprobs_rows_backward(z, y, stats, of_g, of_h, of_l, z, temperature, ignore_index)
        return True

    return walk(head, hidden, parts, kernel, wanted, partial)


_ROWS = "Tensor targets, float temperature, int ignore_index"
_FORWARD = raw_op(
    f"linear_token_logprobs_forward(Tensor hidden, {HEAD}, {_ROWS}, bool stats) -> "
    "(Tensor, Tensor, Tensor)",
    run=lambda hidden, *args: _statistics(hidden, *args)[:3],
    fake=_forward_fake,
)
BACKWARD = raw_op(
    f"linear_token_logprobs_backward(Tensor? g, Tensor? h, Tensor? l, Tensor hidden, {HEAD}, "
    f"{_ROWS}, {WANTED}) -> ({GRADIENTS})",
    run=_backward,
    fake=lambda g, h, l, hidden, *args: gradients_fake(hidden, args[HEAD_ARGUMENTS - 2], args[-3:]),
)


_SHARD = _linear_parallel.Ops(_statistics, functools.partial(_backward, partial=True))


# ---- token log-probabilities: autograd and the public function ---------------------------------


class _TokenLogprobs(torch.autograd.Function):
    """Nothing of the size of the logits is kept: the backward makes them again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
        *head, targets, temperature, ignore_index, stats = rest
        outputs = _FORWARD(hidden, weight, bias, *head, targets, temperature, ignore_index, stats)
        ctx.save_for_backward(hidden, weight, bias, *head[:6], targets)
        ctx.numbers, ctx.options = head[6:], (temperature, ignore_index)
        ctx.backend = _backend.chosen
        ctx.set_materialize_grads(False)
        return outputs if stats else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Any, h: Any = None, l: Any = None) -> Any:
        nothing = (None,) * 14
        if g is None and h is None and l is None:
            return (None, None, None, *nothing)
        hidden, weight, bias, *codes, targets = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        gradients = BACKWARD(
            g, h, l, hidden, weight, bias, *codes, *ctx.numbers, targets, *ctx.options, *wanted
        )
        return (*only_wanted(gradients, wanted), *nothing)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    ignore_index: int = -100,
    stats: bool = False,
    vocab_size: int | None = None,
    group: Any = None,
) -> Any:
    """Token log-probabilities from hidden states; the logits never exist all at once.

        z = hidden Wᵀ + b,    with a softcap c·tanh(z/c)
        lp = z[y]/T - lse,    lse = log Σ_v e^{z[v]/T},    H = lse - Σ_v p[v]·z[v]/T

    The logits of a chunk of rows are made, reduced to their statistics and overwritten by those of the
    next; the backward makes them again, in place of which it puts their gradient. Work: 2·N·H·V forward,
    and 2·N·H·V backward for the logits, for the gradient of hidden, and for that of the weight where it has
    one. Rows that are ignored are not multiplied. Memory: the gradients and one chunk.

    With a `group` the weight is sharded over the vocabulary: rank r of R holds rows [r·V, (r + 1)·V) of the
    whole, and all else is the same on every rank. Of the shards' own lse_r, H_r and log p_r

        lse = log Σ_r e^{lse_r},    w_r = e^{lse_r - lse},    H = Σ_r w_r·(H_r - log w_r),
        lp = log p_r[y] + log w_r    of the rank whose row y is

    in float64, in the order of ranks: every rank has the same bits. The forward sends 3 doubles a row and
    rank (one all_gather), the backward N·H numbers (one all_reduce of the gradient of hidden, in float32, or
    float64): after it every rank has all of that gradient, and that of its own rows of weight and bias.
    Every rank must call forward and backward. Losses of log-probabilities follow from here, such as
    policy_loss(lp, …), preference_loss(sequence_logprobs(lp), …) or the cross-entropy -lp.sum()/count;
    `linear_cross_entropy` itself takes no group. After Megatron-LM's vocab-parallel cross-entropy,
    arXiv:1909.08053.

    Args:
        hidden: (…, H) float32, bfloat16, float16 or float64, any strides. Under autocast it is cast as
            torch.nn.functional.linear casts it.
        weight: (V, H) of the type of hidden (under autocast of any), or a CodebookTensor, which has no
            gradient. The gradient of a weight is summed up in float32 (float64 for float64): for a 16-bit
            weight a buffer of V·H·4 bytes.
        targets: (…) integers in [0, V) or `ignore_index`, aligned with hidden (shift by one before the
            call).
        bias: (V,). temperature: T > 0. softcap: c > 0. Numbers may also be 0-d tensors.
        ignore_index: rows with this target give exactly 0, pass exactly 0 back and are never read.
        stats: also return entropy and lse; all three are differentiable.
        vocab_size: how many rows of the weight count (with a group: of all shards, one after the other);
            those after them are padding, whose logits are never made and whose gradient is 0. None: all.
        group: a torch.distributed.ProcessGroup over which the weight is sharded: `weight` and `bias` are this
            rank's, with as many rows on every rank. `targets` are indices into the whole. Not with
            the backend "eager". Under torch.compile the graph breaks here.

    Returns:
        lp, or (lp, entropy, lse): float32 (float64 for float64), in the shape of `targets`, in nats.

    Raises:
        TypeError, ValueError: naming the argument; a target outside [0, V) or [0, vocab_size) included (with
            a group on every rank).
    """
    if group is not None and is_compiling():
        return torch.compiler.disable(linear_token_logprobs)(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
            ignore_index=ignore_index, stats=stats, vocab_size=vocab_size, group=group,
        )  # fmt: skip
    shard, rows = _shard(weight, vocab_size, group)
    call, targets, temperature = _checked(
        hidden, weight, targets, bias, temperature, softcap, ignore_index, rows
    )
    if shard is not None:
        if runs_eagerly("linear", call.hidden):
            raise ValueError("group: not with the backend 'eager'; allowed: None")
        found = _linear_parallel.token_logprobs(
            _SHARD, shard, call, targets.reshape(-1), temperature, ignore_index
        )
        lp, entropy, lse = (x.view(targets.shape) for x in found)
        return (lp, entropy, lse) if stats else lp
    return token_logprobs_of(call, targets, temperature, ignore_index, stats)


def token_logprobs_of(
    call: HeadCall, targets: Tensor, temperature: Any, ignore_index: int, stats: bool
) -> Any:
    """`linear_token_logprobs` of what was checked."""
    if runs_eagerly("linear", call.hidden):
        check_targets(targets, call.vocab, ignore_index)
        logits = call.logits(targets != ignore_index)
        return _eager.token_logprobs(logits, targets, temperature, ignore_index, stats)
    args = (call.hidden, *call.arguments(), targets.reshape(-1), temperature, ignore_index, stats)
    if wants_gradient(call.hidden, call.weight, call.bias):
        outputs = _TokenLogprobs.apply(*args)
        outputs = outputs if stats else (outputs,)
    else:
        outputs = _FORWARD(*args)[: 3 if stats else 1]
    outputs = tuple(x.view(targets.shape) for x in outputs)
    return outputs if stats else outputs[0]


def _shard(
    weight: Any, vocab_size: Any, group: Any
) -> tuple[_linear_parallel.Shard | None, int | None]:
    """(which one, how many of its rows count)"""
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None, None  # call_of says what is wrong
    if group is not None:
        shard = _linear_parallel.shard_of(weight, group, vocab_size)
        return shard, shard.real
    if vocab_size is not None:
        _linear_parallel.check_vocab_size(vocab_size, weight.shape[0])
    return None, vocab_size


def _checked(
    hidden: Any, weight: Any, targets: Any, bias: Any, temperature: Any, softcap: Any, ignore_index: Any,
    rows: int | None = None,
) -> tuple[HeadCall, Tensor, Any]:  # fmt: skip
    call = call_of(hidden, weight, bias, softcap, rows=rows)
    targets = call.indices("targets", targets, ignore_index)
    temperature = scalar("temperature", temperature)
    if not is_compiling():
        check_temperature(temperature)
    return call, targets, temperature


# ---- cross-entropy -----------------------------------------------------------------------------


def _cross_entropy(
    g: Tensor | None, want_loss: bool, hidden: Tensor, args: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """(loss, *gradients); g: upstream, (N,) for "none", else one; None: 1."""
    targets, temperature, label_smoothing, ignore_index, reduction = args[HEAD_ARGUMENTS:]
    head = head_of(hidden, args[:HEAD_ARGUMENTS])
    check_rows(hidden, targets)
    check_temperature(temperature)
    check_label_smoothing(label_smoothing)
    check_targets(targets, head.vocab, ignore_index)
    require(reduction in (0, 1, 2), "reduction", reduction, "0 (none), 1 (sum), 2 (mean)")
    dtype = accumulator(hidden.dtype)
    counts = targets != ignore_index
    share, upstream = weights_of(g, counts, dtype, reduction)
    losses = hidden.new_zeros(targets.shape, dtype=torch.float64)
    (rows_hidden,), parts = rows_of(head, counts, hidden)

    def kernel(z: Tensor, rows: Rows) -> bool:
        if temperature != 1.0:
            z.div_(temperature)
        y = part_of(targets, rows)
        out = z if any(wanted) else None
        w = part_of(upstream, rows).contiguous() if any(wanted) else None
        loss = cross_entropy_rows(z, y, out, w, label_smoothing, ignore_index, 0, True)
        assert loss is not None
        put(losses, rows, loss)
        if temperature != 1.0 and any(wanted):
            z.div_(temperature)
        return any(wanted)

    gradients = walk(head, rows_hidden, parts, kernel, wanted)
    if not want_loss:
        return gradients
    return reduced(losses, share, reduction).to(dtype), *gradients


def _ce_fake(hidden: Tensor, *args: Any) -> Tensor:
    targets, reduction = args[HEAD_ARGUMENTS], args[HEAD_ARGUMENTS + 4]
    check_head(hidden, args[:HEAD_ARGUMENTS])
    check_rows(hidden, targets)
    return hidden.new_empty(
        targets.shape if reduction == 0 else (), dtype=accumulator(hidden.dtype)
    )


_CE_ROWS = (
    "Tensor targets, float temperature, float label_smoothing, int ignore_index, int reduction"
)
_CE_FORWARD = raw_op(
    f"linear_cross_entropy_forward(Tensor hidden, {HEAD}, {_CE_ROWS}) -> Tensor",
    run=lambda hidden, *args: _cross_entropy(None, True, hidden, args, (False,) * 3)[0],
    fake=_ce_fake,
)
# The gradients of the loss, in the same visit of each chunk.
_CE_FORWARD_BACKWARD = raw_op(
    f"linear_cross_entropy_forward_backward(Tensor hidden, {HEAD}, {_CE_ROWS}, {WANTED}) -> "
    f"(Tensor, {GRADIENTS})",
    run=lambda hidden, *args: _cross_entropy(None, True, hidden, args[:-3], args[-3:]),
    fake=lambda hidden, *args: (
        _ce_fake(hidden, *args), *gradients_fake(hidden, args[HEAD_ARGUMENTS - 2], args[-3:])
    ),
)  # fmt: skip
_CE_BACKWARD = raw_op(
    f"linear_cross_entropy_backward(Tensor g, Tensor hidden, {HEAD}, {_CE_ROWS}, {WANTED}) -> "
    f"({GRADIENTS})",
    run=lambda g, hidden, *args: _cross_entropy(g, False, hidden, args[:-3], args[-3:]),
    fake=lambda g, hidden, *args: gradients_fake(hidden, args[HEAD_ARGUMENTS - 2], args[-3:]),
)


class _CrossEntropy(torch.autograd.Function):
    """With a scalar loss the gradients are made in the forward: see `linear_cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Any, bias: Any, *rest: Any) -> Tensor:
        args, made = (hidden, weight, bias, *rest), ()
        if rest[-1] != 0 and made_in_forward(hidden):
            loss, *made = _CE_FORWARD_BACKWARD(*args, *ctx.needs_input_grad[:3])
        else:
            loss = _CE_FORWARD(*args)
        save_gradients(ctx, (hidden, weight, bias, *rest[:6], rest[10]), made)
        ctx.numbers, ctx.options = rest[6:10], rest[11:]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        def rows_with_gradient(*saved: Any) -> tuple[Tensor, int]:
            return saved[9], ctx.options[2]

        def recompute(*saved: Any) -> Any:
            return _CE_BACKWARD(
                g, *saved[:9], *ctx.numbers, saved[9], *ctx.options, *ctx.needs_input_grad[:3]
            )

        return (*scaled_gradients(ctx, g, rows_with_gradient, recompute), *(None,) * 15)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy from hidden states; the logits never exist all at once.

        z = hidden Wᵀ + b,    with a softcap c·tanh(z/c),    p = softmax(z/T)
        loss = (1 - ε)·(-log p[y]) + ε·(-mean_v log p[v])

    For "mean" and "sum" all gradients are made in the forward, while a chunk of logits is there: 6·N·H·V
    operations in all (4·N·H·V where the weight is frozen); the backward only scales them where the upstream
    gradient is not 1. For "none", in float16 and under checkpointing the backward makes the logits again:
    8·N·H·V. Memory: the gradients and one chunk.

    Args:
        hidden … softcap: as in `linear_token_logprobs`.
        reduction: "mean" (over the rows not ignored; 0 with zero gradient if there are none), "sum" or
            "none" (the shape of `targets`, 0 where ignored).
        label_smoothing: ε in [0, 1]; a number or a 0-d tensor.
        ignore_index: rows with this target are never multiplied.

    Returns:
        float32 (float64 for float64), in nats.

    Raises:
        TypeError, ValueError: naming the argument; a target outside [0, V) included.
    """
    call, targets, temperature = _checked(
        hidden, weight, targets, bias, temperature, softcap, ignore_index
    )
    code = choice("reduction", reduction, REDUCTIONS)
    label_smoothing = scalar("label_smoothing", label_smoothing)
    if not is_compiling():
        check_label_smoothing(label_smoothing)
    if runs_eagerly("linear", call.hidden):
        check_targets(targets, call.vocab, ignore_index)
        z = call.logits(targets != ignore_index) / temperature
        return _eager.cross_entropy(z, targets, label_smoothing, ignore_index, reduction)
    args = (
        call.hidden, *call.arguments(), targets.reshape(-1), temperature, label_smoothing, ignore_index,
        code,
    )  # fmt: skip
    if wants_gradient(call.hidden, call.weight, call.bias):
        loss = _CrossEntropy.apply(*args)
    else:
        loss = _CE_FORWARD(*args)
    return loss.view(targets.shape) if code == 0 else loss


_OPTIONS = "Tensor? bias=None, float temperature=1.0, float? softcap=None, {}int ignore_index=-100"
composite(
    "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor targets, *, "
    + _OPTIONS.format("")
    + ", int? vocab_size=None) -> Tensor",
    linear_token_logprobs,
)
composite(
    "linear_token_logprobs_stats(Tensor hidden, Tensor weight, Tensor targets, *, "
    + _OPTIONS.format("")
    + ", int? vocab_size=None) -> (Tensor, Tensor, Tensor)",
    lambda hidden, weight, targets, **options: linear_token_logprobs(
        hidden, weight, targets, stats=True, **options
    ),
)
composite(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, *, "
    + _OPTIONS.format("str reduction='mean', float label_smoothing=0.0, ")
    + ") -> Tensor",
    linear_cross_entropy,
)
