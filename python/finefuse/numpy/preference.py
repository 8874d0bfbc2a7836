"""Preference losses of NumPy arrays, from sequence log-probabilities and from logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _C
from .._args import (
    REDUCTIONS,
    check_beta,
    check_halves,
    check_label_smoothing,
    check_reference,
    choice,
)
from ._array import (
    ACCUMULATOR,
    FLOAT32,
    FLOAT64,
    Array,
    contiguous,
    float_array,
    get_num_threads,
    gradient_rows,
    integer,
    logit_rows,
    number_array,
    result,
    scalar,
)
from .logprobs import sequence_logprobs, token_logprobs


class PreferenceOutput(NamedTuple):
    """What a preference loss returns."""

    loss: Any
    """A scalar or, with reduction="none", (pairs,)."""
    chosen_rewards: Array
    """β·r_w, (pairs,)."""
    rejected_rewards: Array
    """β·r_l, (pairs,)."""
    margins: Array
    """β·(r_w - r_l), (pairs,)."""
    accuracy: Any
    """The share of pairs with a positive margin, a scalar."""


_NAMES = (
    "chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths",
)  # fmt: skip


def _vectors(*values: Any) -> list[Array | None]:
    """All of one shape, in the widest type of the log-probabilities, at least float32."""
    vectors: list[Any] = []
    wide, shape = False, None
    for i, value in enumerate(values):
        if value is not None or i < 2:
            read = float_array if i < 4 else number_array
            value = read(_NAMES[i], value)
            wide = wide or (i < 4 and value.dtype == FLOAT64)
            if shape is None:
                shape = value.shape
            elif value.shape != shape:
                raise ValueError(f"{_NAMES[i]}: shape {value.shape}; chosen has {shape}")
        vectors.append(value)
    dtype = FLOAT64 if wide else FLOAT32
    return [None if v is None else contiguous(v, dtype) for v in vectors]


def preference_loss(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array | None = None,
    ref_rejected: Array | None = None,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Array | None = None,
    rejected_lengths: Array | None = None,
    normalize_lengths: bool | None = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """A preference loss from sequence log-probabilities: DPO, IPO or hinge.

    With r = lp - ref (the log-ratio to the reference; lp itself without one), d = r_w - r_l, β beta,
    ε label_smoothing, L log-sigmoid:

        sigmoid   -(1 - ε)·L(βd) - ε·L(-βd)             DPO, arXiv:2305.18290 eq. 7; cDPO
        ipo       (r_w/n_w - r_l/n_l - 1/(2β))²         IPO, arXiv:2310.12036 eq. 17
        hinge     max(0, 1 - βd)                        SLiC as a DPO loss, arXiv:2309.06657

    Args:
        chosen, rejected: (pairs,) or any other shape: sequence log-probabilities under the policy, in
            nats; any float type, computed in float64.
        ref_chosen, ref_rejected: (pairs,), the same under the reference; both or neither.
        loss: the name above.
        beta: β > 0.
        label_smoothing: ε in [0, 1), used by `sigmoid` alone.
        chosen_lengths, rejected_lengths: (pairs,), completion lengths n in tokens; an empty completion
            counts as one token.
        normalize_lengths: divide each log-ratio by its length. None: the loss's own convention (`ipo`
            divides).
        reduction: "mean", "sum" or "none" over the pairs.
        return_grad: also return the gradients of the loss, for "none" of its sum.

    Returns:
        PreferenceOutput(loss, chosen_rewards, rejected_rewards, margins, accuracy), or with `return_grad`
        (that, (d_chosen, d_rejected)). The gradients by ref_chosen and ref_rejected are the negatives of
        the two. All float32, or float64 where a log-probability is.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    code, chosen_lengths, rejected_lengths = preference_options(
        loss, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, normalize_lengths
    )
    vectors = _vectors(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    beta = scalar("beta", beta)
    check_beta(beta)
    label_smoothing = scalar("label_smoothing", label_smoothing)
    check_label_smoothing(label_smoothing, "below 1")
    how = choice("reduction", reduction, REDUCTIONS)
    first: Any = vectors[0]
    shape, dtype = first.shape, first.dtype
    out, accuracy = np.empty(() if how else shape, dtype), np.empty((), dtype)
    rewards = [np.empty(shape, dtype) for _ in range(3)]
    gradient = np.empty((2, *shape), dtype)
    _C.preference(
        *vectors, dtype == FLOAT64, first.size, code, beta, label_smoothing, how,
        out, *rewards, accuracy, gradient, get_num_threads(),
    )  # fmt: skip
    output = PreferenceOutput(*map(result, (out, *rewards, accuracy)))
    return (output, (gradient[0], gradient[1])) if return_grad else output


def preference_loss_from_logits(
    logits: Array,
    targets: Array,
    *,
    ref_logprobs: Array | None = None,
    ref_logits: Array | None = None,
    pairs: str = "halves",
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    normalize_lengths: bool | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    """A preference loss from logits, without a float32 copy of them or of their softmax.

        lp_b = Σ_t log softmax(logits[b, t])[targets[b, t]]    over the targets that are not ignored

    and then `preference_loss` of the two halves of the batch. The logits are read once for the loss and
    once more for their gradient.

    Args:
        logits: (2·pairs, T, V) float32, bfloat16, float16 or float64, any strides.
        targets: (2·pairs, T), aligned with the logits. `ignore_index` marks the prompt and the padding;
            completion lengths are counted from the rest.
        ref_logprobs: (2·pairs,) sequence log-probabilities under the reference, or
        ref_logits: (2·pairs, T, V) logits of the reference. With neither the loss is reference-free.
        pairs: "halves": the first half of the batch is chosen, the second rejected, in order.
        loss, beta, label_smoothing, normalize_lengths, reduction: as in `preference_loss`.
        return_grad: also return the gradient of the loss by the logits, for "none" of its sum.
        grad_out: where the gradient goes, as in `token_logprobs`; may be the logits.

    Returns:
        PreferenceOutput, as `preference_loss`, or (that, gradient), the gradient of the logits' dtype and
        shape.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is written.
    """
    rows, layout, y, int32 = logit_rows(logits, targets)
    check_halves(pairs, logits.shape, ref_logprobs, ref_logits)
    if ref_logprobs is not None:
        ref_logprobs = float_array("ref_logprobs", ref_logprobs)
    if ref_logits is not None:
        ref_logits = float_array("ref_logits", ref_logits)
    check_reference(
        logits.shape,
        None if ref_logprobs is None else ref_logprobs.shape,
        None if ref_logits is None else ref_logits.shape,
    )
    ignore_index = integer("ignore_index", ignore_index)
    saved = None
    if return_grad:
        gradient, out, out_layout = gradient_rows(logits, rows, layout, grad_out)
        saved = np.empty((2, *y.shape), FLOAT64)
    elif grad_out is not None:
        raise ValueError("grad_out: of use only with return_grad=True")
    lp, threads = np.empty(y.shape, ACCUMULATOR[layout[0]]), get_num_threads()
    _C.token_logprobs(rows, layout, y, int32, ignore_index, 1.0, lp, None, None, saved, threads)
    if ref_logits is not None:
        ref_logprobs = sequence_logprobs(token_logprobs(ref_logits, y, ignore_index=ignore_index))
    chosen, rejected = np.split(sequence_logprobs(lp), 2)
    ref_chosen = ref_rejected = chosen_lengths = rejected_lengths = None
    if ref_logprobs is not None:
        ref_chosen, ref_rejected = np.split(ref_logprobs, 2)
    if divides_by_length(loss, normalize_lengths):
        chosen_lengths, rejected_lengths = np.split((y != ignore_index).sum(-1), 2)
    output, halves = preference_loss(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        loss=loss,
        beta=beta,
        label_smoothing=label_smoothing,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        normalize_lengths=normalize_lengths,
        reduction=reduction,
        return_grad=True,
    )
    if not return_grad:
        return output
    g = np.empty(y.shape, lp.dtype)
    g[...] = np.concatenate(halves)[:, None]
    _C.token_logprobs_backward(
        rows, layout, out, out_layout, y, int32, ignore_index, 1.0, saved, g, None, None, threads
    )
    if out is not gradient:
        gradient[...] = out
    return output, gradient
