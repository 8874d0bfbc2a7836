"""Preference losses (DPO, IPO, hinge) from sequence log-probabilities and from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backend
from ._args import (
    PREFERENCE_LOSSES,
    REDUCTIONS,
    check_beta,
    check_halves,
    check_label_smoothing,
    check_reference,
    choice,
    divides_by_length,
    preference_options,
    require,
)
from ._op import (
    DTYPES,
    composite,
    float_tensor,
    index_tensor,
    is_compiling,
    kernel,
    once_differentiable,
    raw_op,
    runs_eagerly,
    same_device,
    scalar,
    wants_gradient,
)
from .eager import preference as _eager
from .logprobs import sequence_logprobs, token_logprobs


class PreferenceOutput(NamedTuple):
    """What a preference loss returns; only `loss` is differentiable."""

    loss: Tensor
    """() or, with reduction="none", (pairs,)."""
    chosen_rewards: Tensor
    """β·r_w, (pairs,)."""
    rejected_rewards: Tensor
    """β·r_l, (pairs,)."""
    margins: Tensor
    """β·(r_w - r_l), (pairs,)."""
    accuracy: Tensor
    """The share of pairs with a positive margin, ()."""


_PREFERENCE = kernel("preference", "preference")


# ---- raw op ------------------------------------------------------------------------------------

_Vectors = Sequence[Tensor | None]
_VECTOR_NAMES = (
    "chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths",
)  # fmt: skip


def _check(vectors: _Vectors) -> None:
    """Raise what is wrong with the vectors, if anything is."""
    chosen = vectors[0]
    if chosen is None or vectors[1] is None:
        raise TypeError(f"{'chosen' if chosen is None else 'rejected'}: a tensor, not None")
    if chosen.dtype is not torch.float32 and chosen.dtype is not torch.float64:
        raise TypeError(f"chosen: dtype {chosen.dtype}; allowed: float32, float64")
    for name, vector in zip(_VECTOR_NAMES[1:], vectors[1:], strict=True):
        if vector is None:
            continue
        if vector.dtype is not chosen.dtype:
            raise TypeError(f"{name}: dtype {vector.dtype}; chosen has {chosen.dtype}")
        if vector.shape != chosen.shape:
            raise ValueError(
                f"{name}: shape {tuple(vector.shape)}; chosen has {tuple(chosen.shape)}"
            )
        same_device(name, vector, "chosen", chosen)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    """out, chosen_rewards, rejected_rewards, margins, accuracy, gradient (2, pairs)."""
    vectors: Any = args[:6]
    beta, label_smoothing, loss, reduction = args[6:]
    _check(vectors)
    check_beta(beta)
    check_label_smoothing(label_smoothing, "below 1")
    require(loss in PREFERENCE_LOSSES.values(), "loss", loss, f"0 to {len(PREFERENCE_LOSSES) - 1}")
    require(reduction in (0, 1, 2), "reduction", reduction, "0 (none), 1 (sum), 2 (mean)")
    vectors = [v if v is None or v.is_contiguous() else v.contiguous() for v in vectors]
    chosen = vectors[0]
    accuracy = chosen.new_empty(())
    out = torch.empty_like(chosen if reduction == 0 else accuracy)
    chosen_rewards, rejected_rewards = torch.empty_like(chosen), torch.empty_like(chosen)
    margins, gradient = torch.empty_like(chosen), chosen.new_empty((2, *chosen.shape))
    _PREFERENCE(
        *vectors, chosen.dtype is torch.float64, chosen.numel(), loss, beta, label_smoothing, reduction,
        out, chosen_rewards, rejected_rewards, margins, accuracy, gradient,
    )  # fmt: skip
    return out, chosen_rewards, rejected_rewards, margins, accuracy, gradient


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    _check(args[:6])
    chosen, reduction = args[0], args[-1]
    out = chosen.new_empty(chosen.shape if reduction == 0 else ())
    rewards = [chosen.new_empty(chosen.shape) for _ in range(3)]
    return out, *rewards, chosen.new_empty(()), chosen.new_empty((2, *chosen.shape))


_FORWARD = raw_op(
    "preference_forward(Tensor chosen, Tensor rejected, Tensor? ref_chosen, Tensor? ref_rejected, "
    "Tensor? chosen_lengths, Tensor? rejected_lengths, float beta, float label_smoothing, int loss, "
    "int reduction) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
)


class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *outputs, gradient = _FORWARD(*args)
        ctx.save_for_backward(gradient, *args[:4])
        ctx.backend = _backend.chosen
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, *metrics: Any) -> Any:
        if g is None:
            return (None,) * 10
        w, l = (ctx.saved_tensors[0] * g).unbind()
        _, _, ref_w, ref_l, *_ = ctx.needs_input_grad
        return w, l, -w if ref_w else None, -l if ref_l else None, *(None,) * 6


def _check_eager(*args: Any) -> None:
    """What the raw op checks, and on the CPU the lengths, which kernels check there too."""
    _check(args[:6])
    if is_compiling():
        return
    check_beta(args[6])
    check_label_smoothing(args[7], "below 1")
    for name, lengths in zip(_VECTOR_NAMES[4:], args[4:6], strict=True):
        if lengths is not None and lengths.is_cpu and not (lengths >= 0).all():
            i = int((~(lengths >= 0)).flatten().nonzero()[0])
            value = lengths.flatten()[i].item()
            raise ValueError(f"{name}: element {i} is {value:f}; allowed are 0 and above")


def _vectors(*values: Any) -> Sequence[Tensor | None]:
    """The vectors in the widest of their types, at least float32."""
    for name, value in zip(_VECTOR_NAMES, values, strict=True):
        if value is None and name not in ("chosen", "rejected"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: a tensor, not {type(value).__name__}")
        if value.dtype not in DTYPES and not name.endswith("_lengths"):
            float_tensor(name, value)
    wide = any(v is not None and v.dtype is torch.float64 for v in values[:4])
    dtype = torch.float64 if wide else torch.float32
    return [v if v is None or v.dtype is dtype else v.to(dtype) for v in values]


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss: str = "sigmoid",
    beta: float | Tensor = 0.1,
    label_smoothing: float | Tensor = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    normalize_lengths: bool | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
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
        beta: β > 0; a number or a 0-d tensor.
        label_smoothing: ε in [0, 1), the share of pairs whose labels are taken as swapped; used by
            `sigmoid` alone. A number or a 0-d tensor.
        chosen_lengths, rejected_lengths: (pairs,), completion lengths n in tokens; an empty completion
            counts as one token.
        normalize_lengths: divide each log-ratio by its length. None: the loss's own convention (`ipo`
            divides, as TRL does; the original repository is `normalize_lengths=False`).
        reduction: "mean", "sum" or "none" over the pairs.

    Returns:
        PreferenceOutput(loss, chosen_rewards, rejected_rewards, margins, accuracy), float32, or float64
        where a log-probability is. Only `loss` is differentiable.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    code, chosen_lengths, rejected_lengths = preference_options(
        loss, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, normalize_lengths
    )
    vectors = _vectors(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    beta, label_smoothing = scalar("beta", beta), scalar("label_smoothing", label_smoothing)
    args = (*vectors, beta, label_smoothing, code, choice("reduction", reduction, REDUCTIONS))
    if runs_eagerly("preference", chosen):
        _check_eager(*args)
        return PreferenceOutput(
            *_eager.preference_loss(vectors, loss, beta, label_smoothing, reduction)
        )
    outputs = _Preference.apply(*args) if wants_gradient(*vectors[:4]) else _FORWARD(*args)[:5]
    return PreferenceOutput(*outputs)


def preference_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    ref_logits: Tensor | None = None,
    pairs: str = "halves",
    loss: str = "sigmoid",
    beta: float | Tensor = 0.1,
    label_smoothing: float | Tensor = 0.0,
    normalize_lengths: bool | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    inplace: bool = False,
) -> PreferenceOutput:
    """A preference loss from logits, without a float32 copy of them or of their softmax.

        lp_b = Σ_t log softmax(logits[b, t])[targets[b, t]]    over the targets that are not ignored

    and then `preference_loss` of the two halves of the batch. The logits are read once forward; the
    backward reads them once more and writes their gradient.

    Args:
        logits: (2·pairs, T, V), any of the four float types, any strides.
        targets: (2·pairs, T), aligned with the logits (shift by one before the call). `ignore_index`
            marks the prompt and the padding; completion lengths are counted from the rest.
        ref_logprobs: (2·pairs,) sequence log-probabilities under the reference, or
        ref_logits: (2·pairs, T, V) logits of the reference; its gradient is not taken. With neither the
            loss is reference-free.
        pairs: "halves": the first half of the batch is chosen, the second rejected, in order.
        loss, beta, label_smoothing, normalize_lengths, reduction: as in `preference_loss`.
        inplace: the gradient takes the logits' own storage, as in `token_logprobs`.

    Returns:
        PreferenceOutput, as `preference_loss`.

    Raises:
        TypeError, ValueError: naming the argument. Nothing is written.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: a tensor, not {type(logits).__name__}")
    check_halves(pairs, logits.shape, ref_logprobs, ref_logits)
    for name, value in (("ref_logprobs", ref_logprobs), ("ref_logits", ref_logits)):
        if value is not None:
            float_tensor(name, value)
            same_device(name, value, "logits", logits)
    targets = index_tensor("targets", targets, logits)
    check_reference(
        logits.shape,
        None if ref_logprobs is None else ref_logprobs.shape,
        None if ref_logits is None else ref_logits.shape,
    )
    lp = sequence_logprobs(
        token_logprobs(logits, targets, ignore_index=ignore_index, inplace=inplace)
    )
    if ref_logits is not None:
        with torch.no_grad():
            ref_logprobs = sequence_logprobs(
                token_logprobs(ref_logits, targets, ignore_index=ignore_index)
            )
    half = logits.shape[0] // 2
    ref_chosen = ref_rejected = None
    if ref_logprobs is not None:
        ref_chosen, ref_rejected = ref_logprobs[:half], ref_logprobs[half:]
    chosen_lengths = rejected_lengths = None
    if divides_by_length(loss, normalize_lengths):
        lengths = (targets != ignore_index).sum(-1)
        chosen_lengths, rejected_lengths = lengths[:half], lengths[half:]
    return preference_loss(
        lp[:half],
        lp[half:],
        ref_chosen,
        ref_rejected,
        loss=loss,
        beta=beta,
        label_smoothing=label_smoothing,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        normalize_lengths=normalize_lengths,
        reduction=reduction,
    )


_OPTIONS = (
    "str loss='sigmoid', float beta=0.1, float label_smoothing=0.0, "
    "{lengths}bool? normalize_lengths=None, str reduction='mean'"
)
_OUTPUT = "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
composite(
    "preference_loss(Tensor chosen, Tensor rejected, Tensor? ref_chosen=None, "
    "Tensor? ref_rejected=None, *, "
    + _OPTIONS.format(lengths="Tensor? chosen_lengths=None, Tensor? rejected_lengths=None, ")
    + f") {_OUTPUT}",
    preference_loss,
)
composite(
    "preference_loss_from_logits(Tensor logits, Tensor targets, *, Tensor? ref_logprobs=None, "
    "Tensor? ref_logits=None, str pairs='halves', "
    + _OPTIONS.format(lengths="")
    + f", int ignore_index=-100) {_OUTPUT}",
    preference_loss_from_logits,
)
