"""Token log-probabilities, cross-entropy and sequence log-probabilities from logits."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _backend
from ._args import (
    REDUCTIONS,
    check_index,
    check_label_smoothing,
    check_temperature,
    choice,
    require,
    segments,
)
from ._op import (
    INDEX_DTYPES,
    SPENT,
    accumulator,
    check_rows,
    check_targets,
    composite,
    consumed,
    float_tensor,
    gradient_buffer,
    gradient_in_forward,
    gradient_rows,
    index_tensor,
    is_compiling,
    kernel,
    logit_rows,
    mask_tensor,
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
from .eager import logprobs as _eager

_int32 = torch.int32
_float64 = torch.float64


_LOGPROBS = kernel("logprobs", "token_logprobs")
_LOGPROBS_BACKWARD = kernel("logprobs", "token_logprobs_backward")
_CROSS_ENTROPY = kernel("logprobs", "cross_entropy")
_SCALE_GRADIENT = kernel("logprobs", "scale_gradient")
_SEQUENCE_SUMS = kernel("logprobs", "sequence_sums")
_SEQUENCE_SUMS_BACKWARD = kernel("logprobs", "sequence_sums_backward")


# ---- token_logprobs: raw ops -------------------------------------------------------------------


def logprobs_rows(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int, stats: bool, keep: bool
) -> Any:
    """lp, with stats entropy and lse, with keep what the backward reads."""
    logits, layout = logit_rows(logits, targets)
    check_temperature(temperature)
    if not targets.is_contiguous():
        targets = targets.contiguous()
    dtype = accumulator(logits.dtype)
    logprobs = torch.empty_like(targets, dtype=dtype)
    entropy = lse = saved = None
    if stats:
        entropy, lse = (
            torch.empty_like(targets, dtype=dtype),
            torch.empty_like(targets, dtype=dtype),
        )
    if keep:
        saved = _saved_like(targets, stats)
    _LOGPROBS(
        logits, layout, targets, targets.dtype is _int32, ignore_index, temperature,
        logprobs, entropy, lse, saved,
    )  # fmt: skip
    if stats:
        return (logprobs, entropy, lse, saved) if keep else (logprobs, entropy, lse)
    return (logprobs, saved) if keep else logprobs


def logprobs_rows_fake(
    logits: Tensor, targets: Tensor, temperature: Any, ignore_index: int, stats: bool, keep: bool
) -> Any:
    check_rows(logits, targets)
    dtype = accumulator(logits.dtype)
    outputs = [targets.new_empty(targets.shape, dtype=dtype) for _ in range(3 if stats else 1)]
    if keep:
        outputs.append(_saved_like(targets, stats))
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _saved_like(targets: Tensor, stats: bool) -> Tensor:
    """What the backward reads of each row: its reference logit, log-sum and, with stats, entropy."""
    return targets.new_empty((3 if stats else 2, *targets.shape), dtype=_float64)


def _check_saved(saved: Tensor, targets: Tensor, entropy: bool) -> None:
    """(2, …) or, with entropy, (3, …), as the forward returned it."""
    same_device("saved", saved, "logits", targets)
    shape, wanted = saved.shape, targets.shape
    if (
        saved.ndim == 0
        or shape[1:] != wanted
        or not (shape[0] == 3 or (shape[0] == 2 and not entropy))
        or saved.dtype is not _float64
        or not saved.is_contiguous()
    ):
        raise ValueError(
            f"saved: {tuple(shape)} {saved.dtype}; allowed: ({'3' if entropy else '2 or 3'}, "
            f"*{tuple(wanted)}) float64, contiguous"
        )


def logprobs_rows_backward(
    logits: Tensor,
    targets: Tensor,
    saved: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    l: Tensor | None,
    out: Tensor,
    temperature: float,
    ignore_index: int,
) -> None:
    rows, layout, out_rows, out_layout = gradient_rows(logits, targets, out)
    check_temperature(temperature)
    _check_saved(saved, targets, entropy=h is not None)
    dtype = accumulator(logits.dtype)
    targets = targets.contiguous()
    _LOGPROBS_BACKWARD(
        rows, layout, out_rows, out_layout, targets, targets.dtype is _int32, ignore_index,
        temperature, saved, row_gradient("g", g, targets, dtype),
        row_gradient("h", h, targets, dtype), row_gradient("l", l, targets, dtype),
    )  # fmt: skip
    write_back(out, out_rows)


_ROWS = "Tensor logits, Tensor targets"


def _forward_op(name: str, returns: str, stats: bool, keep: bool) -> Any:
    return raw_op(
        f"{name}({_ROWS}, float temperature, int ignore_index) -> {returns}",
        run=functools.partial(logprobs_rows, stats=stats, keep=keep),
        fake=functools.partial(logprobs_rows_fake, stats=stats, keep=keep),
    )


_INFERENCE = _forward_op("token_logprobs_inference", "Tensor", False, False)
_FORWARD = _forward_op("token_logprobs_forward", "(Tensor, Tensor)", False, True)
_STATS_INFERENCE = _forward_op(
    "token_logprobs_stats_inference", "(Tensor, Tensor, Tensor)", True, False
)
_STATS_FORWARD = _forward_op(
    "token_logprobs_stats_forward", "(Tensor, Tensor, Tensor, Tensor)", True, True
)
_BACKWARD = raw_op(
    f"token_logprobs_backward({_ROWS}, Tensor saved, Tensor? g, Tensor? h, Tensor? l, "
    "Tensor(a!) out, float temperature, int ignore_index) -> ()",
    run=logprobs_rows_backward,
    fake=lambda *args: None,
)


def _check_eager(logits: Tensor, targets: Tensor, ignore_index: int) -> None:
    """What the raw op checks, and on the CPU the targets, which kernels check there too."""
    check_rows(logits, targets)
    check_targets(targets, logits.shape[-1], ignore_index)


# ---- token_logprobs: autograd and the public function ------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: Any,
        options: tuple[int, bool, bool],
    ) -> Any:
        ignore_index, stats, _ = options
        raw = _STATS_FORWARD if stats else _FORWARD
        *outputs, saved = raw(logits, targets, temperature, ignore_index)
        ctx.save_for_backward(logits, targets, saved)
        ctx.options, ctx.spent = (temperature, options), False
        ctx.backend = _backend.chosen
        ctx.set_materialize_grads(False)
        return tuple(outputs) if stats else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Any, h: Any = None, l: Any = None) -> Any:
        if g is None and h is None and l is None:
            return None, None, None, None
        logits, targets, saved = ctx.saved_tensors
        temperature, (ignore_index, _, inplace) = ctx.options
        if ctx.spent:
            raise RuntimeError(SPENT)
        out = gradient_buffer(logits, inplace)
        _BACKWARD(logits, targets, saved, g, h, l, out, temperature, ignore_index)
        if inplace and not is_compiling():
            consumed(logits)
            ctx.spent = True
        return out, None, None, None


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    ignore_index: int = ...,
    stats: Literal[False] = ...,
    inplace: bool = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    ignore_index: int = ...,
    stats: Literal[True],
    inplace: bool = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    stats: bool = False,
    inplace: bool = False,
) -> Any:
    """Log-probability of each target token, and on request the entropy and log-sum-exp of its row.

        lp = z[y]/T - lse,    lse = log Σ_v e^{z[v]/T},    H = lse - Σ_v p[v]·z[v]/T

    One pass over the logits forward (they are read once, nothing of their size is written), one
    backward. Statistics and accumulations are float32 and wider whatever the type of the logits.

    Args:
        logits: (…, V) float32, bfloat16, float16 or float64, any strides. Slices such as
            `logits[:, :-1]` are not copied.
        targets: (…) integers in [0, V) or `ignore_index`, aligned with the logits (shift by one before
            the call).
        temperature: T > 0; a number or a 0-d tensor.
        ignore_index: rows with this target give exactly 0, pass exactly 0 back and are never read.
        stats: also return entropy and lse; all three are differentiable.
        inplace: the backward writes the gradient over the logits' own storage instead of fresh memory.
            Reading the logits afterwards is the caller's error (autograd raises where it sees it, also
            at a second backward). Under `torch.compile` it has no effect.

    Returns:
        lp, or (lp, entropy, lse): float32 (float64 for float64 logits), in the shape of `targets`, in
        nats. -inf logits have probability 0; as the target they give -inf. A row that is all -inf
        gives NaN. A row whose upstream gradients are all 0 passes exactly 0 back.

    Raises:
        TypeError, ValueError: naming the argument; a target outside [0, V) included. Nothing is written.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: a tensor, not {type(logits).__name__}")
    targets = index_tensor("targets", targets, "logits", logits)
    temperature = scalar("temperature", temperature)
    check_index("ignore_index", ignore_index)
    if runs_eagerly("logprobs", logits):
        _check_eager(logits, targets, ignore_index)
        if not is_compiling():
            check_temperature(temperature)
        return _eager.token_logprobs(logits, targets, temperature, ignore_index, stats)
    if logits.requires_grad and torch.is_grad_enabled():
        options = (ignore_index, stats, inplace)
        return _TokenLogprobs.apply(logits, targets, temperature, options)
    if stats:
        return _STATS_INFERENCE(logits, targets, temperature, ignore_index)
    return _INFERENCE(logits, targets, temperature, ignore_index)


composite(
    f"token_logprobs({_ROWS}, *, float temperature=1.0, int ignore_index=-100) -> Tensor",
    token_logprobs,
)
composite(
    f"token_logprobs_stats({_ROWS}, *, float temperature=1.0, int ignore_index=-100)"
    " -> (Tensor, Tensor, Tensor)",
    lambda logits, targets, **options: token_logprobs(logits, targets, stats=True, **options),
)


# ---- cross_entropy -----------------------------------------------------------------------------


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    out: Tensor | None,
    upstream: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    want_loss: bool,
) -> Tensor | None:
    check_label_smoothing(label_smoothing)
    require(reduction in (0, 1, 2), "reduction", reduction, "0 (none), 1 (sum), 2 (mean)")
    dtype = accumulator(logits.dtype)
    out_rows: Tensor | None = None
    if out is not None:
        rows, layout, out_rows, out_layout = gradient_rows(logits, targets, out)
    else:
        rows, layout = logit_rows(logits, targets)
        out_layout = layout
    targets = targets.contiguous()
    loss = scratch = None
    if want_loss:
        loss = targets.new_empty(targets.shape if reduction == 0 else (), dtype=dtype)
    if upstream is not None:
        upstream = (
            row_gradient("g", upstream, targets, dtype)
            if reduction == 0
            else scalar_gradient(upstream, logits, dtype)
        )
    if reduction != 0:
        scratch = targets.new_empty((targets.numel() + 1,), dtype=_float64)
    _CROSS_ENTROPY(
        rows, layout, out_rows, out_layout, targets, targets.dtype is _int32, ignore_index,
        label_smoothing, reduction, loss, scratch, upstream,
    )  # fmt: skip
    if out is not None and out_rows is not None:
        write_back(out, out_rows)
    return loss


def _ce_forward(
    logits: Tensor, targets: Tensor, label_smoothing: float, ignore_index: int, reduction: int
) -> Any:
    return cross_entropy_rows(
        logits, targets, None, None, label_smoothing, ignore_index, reduction, True
    )


def _scale(gradient: Tensor, targets: Tensor, g: Tensor, ignore_index: int) -> None:
    rows, layout = logit_rows(gradient, targets)
    targets = targets.contiguous()
    _SCALE_GRADIENT(
        rows, layout, targets, targets.dtype is _int32, ignore_index,
        scalar_gradient(g, gradient, accumulator(gradient.dtype)),
    )  # fmt: skip
    write_back(gradient, rows)


def _ce_forward_backward(
    logits: Tensor,
    targets: Tensor,
    out: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
) -> Any:
    return cross_entropy_rows(
        logits, targets, out, None, label_smoothing, ignore_index, reduction, True
    )


def _ce_fake(logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
    check_rows(logits, targets)
    shape = targets.shape if options[-1] == 0 else ()
    return targets.new_empty(shape, dtype=accumulator(logits.dtype))


def _ce_backward(
    logits: Tensor,
    targets: Tensor,
    g: Tensor,
    out: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
) -> None:
    if g is None:
        raise TypeError("g: a tensor, not None")
    cross_entropy_rows(logits, targets, out, g, label_smoothing, ignore_index, reduction, False)


_CE_OPTIONS = "float label_smoothing, int ignore_index, int reduction"
_CE_FORWARD = raw_op(
    f"cross_entropy_forward({_ROWS}, {_CE_OPTIONS}) -> Tensor", run=_ce_forward, fake=_ce_fake
)
# The gradient of the loss goes to `out` in the same visit of each row.
_CE_FORWARD_BACKWARD = raw_op(
    f"cross_entropy_forward_backward({_ROWS}, Tensor(a!) out, {_CE_OPTIONS}) -> Tensor",
    run=_ce_forward_backward,
    fake=_ce_fake,
)
# The gradient that the forward made meets its upstream gradient, in place; skipped at 1.
SCALE = raw_op(
    "scale_gradient(Tensor(a!) gradient, Tensor targets, Tensor g, int ignore_index) -> ()",
    run=_scale,
    fake=lambda *args: None,
)
_CE_BACKWARD = raw_op(
    f"cross_entropy_backward({_ROWS}, Tensor g, Tensor(a!) out, {_CE_OPTIONS}) -> ()",
    run=_ce_backward,
    fake=lambda *args: None,
)


class _CrossEntropy(torch.autograd.Function):
    """With a scalar loss the gradient is made in the forward, while the row is in the cache.

    Not in float16, where p/N underflows before a loss scaler's factor arrives, and not where
    saved-tensor hooks (checkpointing, offloading) would rather not keep it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        label_smoothing: Any,
        ignore_index: int,
        reduction: int,
        inplace: bool,
    ) -> Tensor:
        options = (label_smoothing, ignore_index, reduction)
        ctx.gradient = None
        if reduction != 0 and gradient_in_forward(logits):
            out = ctx.gradient = gradient_buffer(logits, inplace)
            loss = _CE_FORWARD_BACKWARD(logits, targets, out, *options)
            if inplace:
                consumed(logits)
        else:
            loss = _CE_FORWARD(logits, targets, *options)
        ctx.save_for_backward(logits, targets)
        ctx.targets = targets
        ctx.options, ctx.inplace, ctx.spent = options, inplace, False
        ctx.backend = _backend.chosen
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        out, ctx.gradient = ctx.gradient, None
        if out is not None:
            ctx.spent = ctx.inplace
            SCALE(out, ctx.targets, g, ctx.options[1])
            return out, None, None, None, None, None
        if ctx.spent:
            raise RuntimeError(SPENT)
        logits, targets = ctx.saved_tensors
        out = gradient_buffer(logits, ctx.inplace)
        _CE_BACKWARD(logits, targets, g, out, *ctx.options)
        if ctx.inplace and not is_compiling():
            consumed(logits)
            ctx.spent = True
        return out, None, None, None, None, None


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
    inplace: bool = False,
) -> Tensor:
    """Cross-entropy of the targets under softmax(logits), as `torch.nn.functional.cross_entropy`.

        loss = (1 - ε)·(lse - z[y]) + ε·(lse - mean_v z[v]),    lse = log Σ_v e^{z[v]}
        dz   = w·(p - (1 - ε)·1[y] - ε/V),                      w the upstream gradient of the row

    For "mean" and "sum" the gradient is written in the forward, row by row while the row is in the
    cache (one read and one write of memory in all); the backward only scales it where the upstream
    gradient is not 1 (in bfloat16 a second rounding). In float16, and under checkpointing, the backward
    makes it.

    Args:
        logits: (…, V) float32, bfloat16, float16 or float64, any strides; the classes come last.
        targets: (…) integers in [0, V) or `ignore_index`.
        reduction: "mean" (over the rows not ignored; 0 with zero gradient if there are none), "sum" or
            "none" (the shape of `targets`, 0 where ignored).
        label_smoothing: ε in [0, 1]; a number or a 0-d tensor.
        ignore_index: rows with this target are never read.
        inplace: the gradient takes the logits' own storage, which for "mean" and "sum" is overwritten
            by the forward already. Under `torch.compile` it has no effect.

    Returns:
        float32 (float64 for float64 logits), in nats.

    Raises:
        TypeError, ValueError: naming the argument; a target outside [0, V) included. Nothing is written.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: a tensor, not {type(logits).__name__}")
    targets = index_tensor("targets", targets, "logits", logits)
    label_smoothing = scalar("label_smoothing", label_smoothing)
    code = choice("reduction", reduction, REDUCTIONS)
    check_index("ignore_index", ignore_index)
    if runs_eagerly("logprobs", logits):
        _check_eager(logits, targets, ignore_index)
        if not is_compiling():
            check_label_smoothing(label_smoothing)
        return _eager.cross_entropy(logits, targets, label_smoothing, ignore_index, reduction)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, targets, label_smoothing, ignore_index, code, inplace)
    return _CE_FORWARD(logits, targets, label_smoothing, ignore_index, code)


composite(
    f"cross_entropy({_ROWS}, *, str reduction='mean', float label_smoothing=0.0, "
    "int ignore_index=-100) -> Tensor",
    cross_entropy,
)


# ---- sequence_logprobs -------------------------------------------------------------------------


def _segments(shape: Any, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[list[int], int]:
    """(shape of the sums, length of a segment, for cu_seqlens their mean); raises what is wrong."""
    if mask is not None and mask.dtype is not torch.bool:
        raise TypeError(f"mask: dtype {mask.dtype}; allowed: bool")
    if cu_seqlens is not None and cu_seqlens.dtype not in INDEX_DTYPES:
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype}; allowed: int32, int64")
    return segments(
        shape,
        None if mask is None else mask.shape,
        None if cu_seqlens is None else cu_seqlens.shape,
    )


def _sequence_forward(
    token_lp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, average: bool
) -> Tensor:
    shape, length = _segments(token_lp.shape, mask, cu_seqlens)
    if token_lp.dtype not in (torch.float32, _float64):
        raise TypeError(f"token_lp: dtype {token_lp.dtype}; allowed: float32, float64")
    sums = token_lp.new_empty(shape)
    _SEQUENCE_SUMS(
        token_lp.contiguous(), token_lp.dtype is _float64,
        None if mask is None else mask.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        cu_seqlens is not None and cu_seqlens.dtype is _int32,
        sums.numel(), length, token_lp.numel(), average, sums,
    )  # fmt: skip
    return sums


def _sequence_forward_fake(
    token_lp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, average: bool
) -> Tensor:
    return token_lp.new_empty(_segments(token_lp.shape, mask, cu_seqlens)[0])


def _sequence_backward(
    g: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, shape: list[int], average: bool
) -> Tensor:
    sums, length = _segments(torch.Size(shape), mask, cu_seqlens)
    if list(g.shape) != sums:
        raise ValueError(f"g: shape {tuple(g.shape)}; allowed: {tuple(sums)}")
    if g.dtype not in (torch.float32, _float64):
        raise TypeError(f"g: dtype {g.dtype}; allowed: float32, float64")
    out = g.new_empty(shape)
    _SEQUENCE_SUMS_BACKWARD(
        g.contiguous(), g.dtype is _float64, None if mask is None else mask.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        cu_seqlens is not None and cu_seqlens.dtype is _int32,
        g.numel(), length, out.numel(), average, out,
    )  # fmt: skip
    return out


_SEQUENCE_FORWARD = raw_op(
    "sequence_logprobs_forward(Tensor token_lp, Tensor? mask, Tensor? cu_seqlens, bool average)"
    " -> Tensor",
    run=_sequence_forward,
    fake=_sequence_forward_fake,
)
_SEQUENCE_BACKWARD = raw_op(
    "sequence_logprobs_backward(Tensor g, Tensor? mask, Tensor? cu_seqlens, SymInt[] shape, "
    "bool average) -> Tensor",
    run=_sequence_backward,
    fake=lambda g, mask, cu_seqlens, shape, average: g.new_empty(shape),
)


def check_offsets(offsets: list[int], total: int) -> None:
    """What kernels check on the CPU."""
    for i, (before, offset) in enumerate(zip([0, *offsets[:-1]], offsets, strict=True)):
        if (
            not before <= offset <= total
            or (i == 0 and offset)
            or (i == len(offsets) - 1 and offset != total)
        ):
            raise ValueError(
                f"cu_seqlens: element {i} is {offset}; it must rise from 0 to the {total} tokens given"
            )


class _SequenceLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token_lp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, average: bool
    ) -> Tensor:
        ctx.save_for_backward(mask, cu_seqlens)
        ctx.shape, ctx.average, ctx.backend = token_lp.shape, average, _backend.chosen
        return _SEQUENCE_FORWARD(token_lp, mask, cu_seqlens, average)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        mask, cu_seqlens = ctx.saved_tensors
        return _SEQUENCE_BACKWARD(g, mask, cu_seqlens, ctx.shape, ctx.average), None, None, None


def sequence_logprobs(
    token_lp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
) -> Tensor:
    """Log-probability of each sequence: the sum (or mean) of its tokens' log-probabilities.

        s = Σ_t m_t·lp_t,    with average s = Σ_t m_t·lp_t / Σ_t m_t  (0 for an empty sequence)

    Summed in float64, in order. Tokens that are masked out are not read: what stands there (NaN,
    -inf) does not matter, and they pass exactly 0 back.

    Args:
        token_lp: (…, T) with an optional `mask`, or flat (tokens,) with `cu_seqlens`; bfloat16 and
            float16 are widened to float32.
        mask: (…, T), bool or a number that is not 0 where a token counts. None: all count.
        cu_seqlens: (sequences + 1,) int32 or int64, rising from 0 to the number of tokens: sequence i is
            tokens [cu_seqlens[i], cu_seqlens[i + 1]). `mask` and `cu_seqlens` exclude each other.
        average: divide by the number of tokens that count.

    Returns:
        (…) or (sequences,), float32 (float64 for float64 input), in nats.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is written.
    """
    token_lp = float_tensor("token_lp", token_lp)
    if token_lp.dtype in (torch.bfloat16, torch.float16):
        token_lp = token_lp.float()
    mask = mask_tensor(mask)
    same_device("mask", mask, "token_lp", token_lp)
    if cu_seqlens is not None:
        cu_seqlens = index_tensor("cu_seqlens", cu_seqlens, "token_lp", token_lp)
    if mask is not None and cu_seqlens is not None:
        raise ValueError("mask and cu_seqlens: give one of the two")
    if runs_eagerly("logprobs", token_lp):
        _segments(token_lp.shape, mask, cu_seqlens)
        if token_lp.is_cpu and cu_seqlens is not None and not is_compiling():
            check_offsets(cu_seqlens.tolist(), token_lp.shape[0])
        return _eager.sequence_logprobs(token_lp, mask, cu_seqlens, average)
    if wants_gradient(token_lp):
        return _SequenceLogprobs.apply(token_lp, mask, cu_seqlens, average)
    return _SEQUENCE_FORWARD(token_lp, mask, cu_seqlens, average)


composite(
    "sequence_logprobs(Tensor token_lp, *, Tensor? mask=None, Tensor? cu_seqlens=None, "
    "bool average=False) -> Tensor",
    sequence_logprobs,
)
