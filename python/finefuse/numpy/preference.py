"""Preference losses of NumPy arrays, from sequence log-probabilities and from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _C
from .._args import REDUCTIONS, choice, require
from .._args.preference import (
    INPUT_NAMES,
    KTO,
    NUMBER_NAMES,
    REWARD,
    SHAPED_LIKE,
    SORTING,
    PreferenceOptions,
    PreferenceTerms,
    check_halves,
    check_loss_weights,
    check_reference,
    preference_binding,
    preference_lengths,
    preference_shapes,
    preference_terms,
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
    """A scalar; with reduction="none" (pairs,) or, for losses of an example at a time, the number of chosen
    and rejected."""
    chosen_rewards: Array
    """β·r_w, (pairs,)."""
    rejected_rewards: Array
    """β·r_l, (pairs,)."""
    margins: Array
    """β·(r_w - r_l), (pairs,); where the numbers differ, the difference of the mean rewards, a scalar."""
    accuracy: Any
    """The share of pairs with a positive margin; where the numbers of chosen and rejected differ, of
    rewards of the right sign, a scalar."""


# ---- from sequence log-probabilities -----------------------------------------------------------


def _vectors(*values: Any) -> list[Any]:
    """The first 9 inputs in the widest type of the log-probabilities, at least float32."""
    vectors: list[Any] = []
    dtype: np.dtype[Any] = FLOAT32
    for i, (name, value) in enumerate(zip(INPUT_NAMES, values, strict=True)):
        if value is not None or i < 2:
            value = (number_array if i in (4, 5) else float_array)(name, value)
            if i < 4 and value.dtype == FLOAT64:
                dtype = FLOAT64
            if 1 < i < 6:
                like = SHAPED_LIKE[i]
                if value.shape != vectors[like].shape:
                    raise ValueError(
                        f"{name}: shape {value.shape}; {INPUT_NAMES[like]} has {vectors[like].shape}"
                    )
            if i == 7 and value.size != 1:
                raise ValueError(f"{name}: shape {value.shape}; allowed: one element")
        vectors.append(value)
    return [None if v is None else contiguous(v, dtype) for v in vectors]


def _per_token(lp: Any, lengths: Any) -> Any:
    """In float64, divided by the lengths where a loss divides by them; 0 where there is no lp."""
    if lp is None:
        return FLOAT64.type(0)
    lp = lp.astype(FLOAT64)
    return lp if lengths is None else lp / np.where(lengths == 0, 1, lengths)


def _orders(losses: Any, by_length: Any, v: Sequence[Any]) -> list[Array | None]:
    """What sorts the differences of aot and of aot_unpaired: see csrc/ops/preference.h."""
    orders: list[Array | None] = [None, None]
    for i, code in enumerate(SORTING):
        if code not in losses:
            continue
        n = v[4:6] if by_length[losses.index(code)] else (None, None)
        with np.errstate(invalid="ignore"):  # -inf - -inf
            w, l, ref_w, ref_l = (_per_token(v[k], n[k % 2]) for k in range(4))
            two = (w - l, ref_w - ref_l) if i == 0 else (w - ref_w, l - ref_l)
        flat = (np.broadcast_to(x, v[0].shape).reshape(-1) for x in two)
        orders[i] = np.stack([x.argsort(kind="stable") for x in flat])
    return orders


def _loss_weights(weights: Any, count: int) -> tuple[float, ...] | None:
    """One a loss."""
    if weights is None:
        return None
    check_loss_weights(weights, count)
    return tuple(scalar("loss_weights", weight) for weight in weights)


class _Result(NamedTuple):
    output: PreferenceOutput
    gradient: tuple[Array, Array]
    """By chosen and by rejected."""
    nll_gradient: Any
    """By chosen_nll, (1,); None where it is not there."""


def _run(v: Sequence[Any], codes: Any, loss_weights: Any, numbers: Sequence[Any]) -> _Result:
    """`v` is of _vectors; codes: the losses, by_length, divergence, nll_by_length, reduction."""
    losses, by_length, divergence, nll_by_length, how = codes
    floats: list[Any] = [
        scalar(name, value) for name, value in zip(NUMBER_NAMES, numbers, strict=True)
    ]
    options = preference_binding(
        PreferenceOptions._make(
            (losses, by_length, loss_weights, *floats, divergence, nll_by_length, how)
        ),
        (v[4] is not None, v[5] is not None), v[7] is not None,
    )  # fmt: skip
    chosen, rejected, weights, kl = v[0], v[1], v[6], v[8]
    dtype, count = chosen.dtype, chosen.size
    shapes = preference_shapes(
        losses, how, chosen.shape, rejected.shape, None if weights is None else weights.shape
    )
    out, accuracy = np.empty(shapes.out, dtype), np.empty((), dtype)
    rewards = np.empty(chosen.shape, dtype), np.empty(rejected.shape, dtype)
    margins = np.empty(shapes.margins, dtype)
    gradient = np.empty(count + rejected.size, dtype)
    nll_gradient = None if v[7] is None else np.empty(1, dtype)
    _C.preference(
        *v, 0 if kl is None else kl.size, *_orders(losses, by_length, v), dtype == FLOAT64, count,
        rejected.size, options, None, out, *rewards, margins, accuracy, gradient, None, nll_gradient,
        get_num_threads(),
    )  # fmt: skip
    output = PreferenceOutput(*map(result, (out, *rewards, margins, accuracy)))
    halves = gradient[:count].reshape(chosen.shape), gradient[count:].reshape(rejected.shape)
    return _Result(output, halves, nll_gradient)


def _preference(
    terms: PreferenceTerms, chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any,
    chosen_lengths: Any, rejected_lengths: Any, pair_weights: Any, chosen_nll: Any, kl: Any,
    loss_weights: Any, numbers: Sequence[Any],
) -> _Result:  # fmt: skip
    chosen_lengths, rejected_lengths = preference_lengths(
        terms, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, chosen_nll
    )
    v = _vectors(
        chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, pair_weights,
        chosen_nll if terms.nll else None, kl,
    )  # fmt: skip
    if kl is not None:
        v[8] = v[8].reshape(-1) if KTO in terms.codes else None
    codes = (
        terms.codes, terms.by_length, terms.divergence, terms.nll_by_length, terms.reduction
    )  # fmt: skip
    weights = _loss_weights(loss_weights, len(terms.codes))
    return _run(v, codes, weights, (*numbers, 0.0))


def preference_loss(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array | None = None,
    ref_rejected: Array | None = None,
    *,
    loss: str | Sequence[str] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Array | None = None,
    rejected_lengths: Array | None = None,
    normalize_lengths: bool | None = None,
    loss_weights: Sequence[float] | None = None,
    pair_weights: Array | None = None,
    gamma: float = 0.5,
    sft_weight: float = 0.0,
    chosen_nll: Array | None = None,
    kl: Array | None = None,
    delta: float = 0.0,
    tau: float = 0.05,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """A preference loss from sequence log-probabilities: DPO and its family, or a weighted sum of them.

    With r = lp - ref (the log-ratio to the reference; lp itself without one), d = r_w - r_l, n the
    completion's length, β beta, ε label_smoothing, L log-sigmoid, S sigmoid, a pair's loss is

        sigmoid, spin   -(1 - ε)·L(βd) - ε·L(-βd)               DPO, arXiv:2305.18290; cDPO; 2401.01335
        ipo             (r_w/n_w - r_l/n_l - 1/(2β))²           arXiv:2310.12036 eq. 17
        hinge           max(0, 1 - βd)                          SLiC as a DPO loss, arXiv:2309.06657
        robust          [-(1 - ε)·L(βd) + ε·L(-βd)] / (1 - 2ε)  arXiv:2403.00409
        exo_pair        S(βd)·[L(βd) - ln(1 - ε)] + S(-βd)·[L(-βd) - ln ε], ε > 0     arXiv:2402.00856
        nca_pair        -L(βr_w) - ½L(-βr_w) - ½L(-βr_l)        arXiv:2402.05369
        bco_pair        -L(βr_w - δ) - L(-(βr_l - δ))           arXiv:2404.04656
        sppo_hard       (r_w - 1/(2β))² + (r_l + 1/(2β))²       arXiv:2405.00675
        aot             sigmoid of sort(lp_w - lp_l) - sort(ref_w - ref_l) for d      arXiv:2406.05882
        aot_unpaired    sigmoid of sort(r_w) - sort(r_l) for d; "none" is in sorted order for both
        apo_zero        1 - S(βr_w) + S(βr_l)                   arXiv:2408.06266
        apo_down        S(βr_w) + 1 - S(βd)
        discopop        (1 - m)·(-L(x)) + m·e^{-x}, x = βd, m = S(x/τ)                arXiv:2406.08414
        sigmoid_norm    -L(β(r_w/n_w - r_l/n_l))
        sft             NLL
        cpo             sigmoid of lp_w - lp_l for d, + λ·NLL   arXiv:2401.08417
        simpo           sigmoid of x = β(lp_w/n_w - lp_l/n_l) - γ for βd, + λ·NLL     arXiv:2405.14734
        slic            max(0, β - lp_w + lp_l) + λ·NLL         arXiv:2305.10425
        orpo            NLL - β·L(o_w - o_l), o = a - ln(1 - e^a), a = lp/n           arXiv:2403.07691

    and, of an example at a time, whose numbers may differ,

        kto             u_w·(1 - S(β(r - z))) of the chosen, u_l·(1 - S(β(z - r))) of the rejected,
                        z = max(0, mean of kl)                  arXiv:2402.01306
        apo_zero_unpaired   1 - S(βr) of the chosen, S(βr) of the rejected

    NLL = -Σ lp_w / Σ n_w of the whole batch is in the loss of each pair. An empty completion counts as one
    token; orpo's a is at most -2^-53, so that a certain or empty completion has finite log-odds (36.7) and
    passes no gradient back. `cpo`, `simpo`, `slic` and `orpo` do not read the reference; rewards do.

    f_divergence changes r within d (and r_w/n_w, r_l/n_l) into f'(e^r), f'(1) = 0 (arXiv:2309.16240):

        forward_kl  1 - e^{-r}      js  ln 2 + L(r)      alpha  (e^{(α-1)r} - 1)/(α - 1); r at α = 1

    Exponents are clamped to 80, beyond which there is no gradient. The constants cancel in d but where
    lengths divide.

    Args:
        chosen, rejected: (pairs,) or any other shape: sequence log-probabilities under the policy, in
            nats; any float type, computed in float64.
        ref_chosen, ref_rejected: the same under the reference; both or neither.
        loss: a name above, or a list of names, whose losses are added up.
        loss_weights: a number for each name of the list; None: 1 each.
        beta: β > 0. Every number may be a 0-d array.
        label_smoothing: ε in [0, 1), the share of pairs whose labels are taken as swapped; below ½ for
            `robust`. Of no use to `hinge`, `ipo`, `sigmoid_norm` and the losses without ε above.
        chosen_lengths, rejected_lengths: completion lengths n in tokens, bool or any number, in the shapes
            of chosen and rejected.
        normalize_lengths: divide lp, r by their lengths. None: the loss's own convention, above (`ipo`
            as TRL does). True: every loss divides. False: n = 1, and the NLL is a sequence's.
        pair_weights: a factor for each element of the unreduced loss (WPO, arXiv:2406.11827): (pairs,),
            or for losses of an example at a time (chosen + rejected,). Not normalised.
        gamma: γ of `simpo`. sft_weight: λ ≥ 0. delta: δ of `bco_pair`. tau: τ > 0 of `discopop`.
        chosen_nll: one element; stands for the NLL (`orpo`: over prompt and completion).
        kl: any number of log-ratios of mismatched prompts and completions. None: z = 0.
        desirable_weight, undesirable_weight: u_w and u_l of `kto`.
        f_divergence, alpha: above; other than "reverse_kl" for `sigmoid`, `spin`, `sigmoid_norm`, `hinge`,
            `ipo`, `exo_pair`, `robust`, `discopop` and `sft`.
        reduction: "mean", "sum" or "none" over the pairs; over all examples for `kto` and
            `apo_zero_unpaired`, for which "none" is flat, (chosen + rejected,).
        return_grad: also return the gradients of the loss, for "none" of its sum.

    Returns:
        PreferenceOutput(loss, chosen_rewards, rejected_rewards, margins, accuracy), or with `return_grad`
        (that, (d_chosen, d_rejected)). The gradients by the reference and by chosen_nll are not returned.
        All float32, or float64 where a log-probability is.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    output, gradient, _ = _preference(
        preference_terms(loss, normalize_lengths, f_divergence, reduction), chosen, rejected, ref_chosen,
        ref_rejected, chosen_lengths, rejected_lengths, pair_weights, chosen_nll, kl, loss_weights,
        (
            beta, label_smoothing, gamma, sft_weight, delta, tau, desirable_weight,
            undesirable_weight, alpha,
        ),
    )  # fmt: skip
    return (output, gradient) if return_grad else output


def reward_loss(
    chosen_rewards: Array,
    rejected_rewards: Array,
    *,
    margin: Array | float | None = None,
    center_coef: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """The Bradley-Terry loss of a reward model.

        -L(r_w - r_l - margin) + center_coef·(r_w + r_l)²

    Args:
        chosen_rewards, rejected_rewards: (pairs,) or any other shape, any float type.
        margin: how much better the chosen is, in the shape of the rewards or a number.
        center_coef: at least 0; pulls the rewards' mean to 0.
        reduction: "mean", "sum" or "none" over the pairs.
        return_grad: also return the gradients of the loss, for "none" of its sum.

    Returns:
        The loss, a scalar or in the shape of the rewards, or (loss, (d_chosen, d_rejected)), float32
        (float64 where an argument is).

    Raises:
        TypeError, ValueError: naming the argument.

    Source: arXiv:2203.02155 eq. 1; the margin arXiv:2307.09288 eq. 2; the centre arXiv:2312.09244.
    """
    how = choice("reduction", reduction, REDUCTIONS)
    names = ("chosen_rewards", "rejected_rewards", "margin")
    chosen = float_array(names[0], chosen_rewards)
    rejected: Any = float_array(names[1], rejected_rewards)
    given: Any = margin
    if margin is not None and not isinstance(margin, np.ndarray):
        dtype = FLOAT64 if chosen.dtype == FLOAT64 else FLOAT32
        given = np.full(chosen.shape, scalar("margin", margin), dtype)
    for name, value in zip(names[1:], (rejected, given), strict=True):
        if value is not None and float_array(name, value).shape != chosen.shape:
            raise ValueError(f"{name}: shape {value.shape}; chosen_rewards has {chosen.shape}")
    v = _vectors(chosen, rejected, given, *(None,) * 6)
    numbers = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, center_coef)
    codes = ((REWARD.code,), (False,), 0, False, how)
    output, gradient, _ = _run(v, codes, None, numbers)
    return (output.loss, gradient) if return_grad else output.loss


# ---- by name -----------------------------------------------------------------------------------


def dpo_loss(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array | None = None,
    ref_rejected: Array | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    pair_weights: Array | None = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """DPO: -(1 - ε)·L(βd) - ε·L(-βd), d = (lp_w - ref_w) - (lp_l - ref_l), L log-sigmoid.

    Without a reference d = lp_w - lp_l. `preference_loss(loss="sigmoid")`, which describes the arguments,
    what is returned and raised. Source: arXiv:2305.18290 eq. 7; ε arXiv:2403.00409.
    """
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing,
        f_divergence=f_divergence, alpha=alpha, pair_weights=pair_weights, reduction=reduction,
        return_grad=return_grad,
    )  # fmt: skip


def ipo_loss(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array | None = None,
    ref_rejected: Array | None = None,
    *,
    chosen_lengths: Array | None = None,
    rejected_lengths: Array | None = None,
    normalize_lengths: bool | None = None,
    beta: float = 0.1,
    pair_weights: Array | None = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """IPO: (r_w/n_w - r_l/n_l - 1/(2β))², r = lp - ref, n the completion's length in tokens.

    normalize_lengths=False is the original repository's form, n = 1. `preference_loss(loss="ipo")`, which
    describes the arguments, what is returned and raised. Source: arXiv:2310.12036 eq. 17.
    """
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, loss="ipo", beta=beta,
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
        normalize_lengths=normalize_lengths, pair_weights=pair_weights, reduction=reduction,
        return_grad=return_grad,
    )  # fmt: skip


def spin_loss(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float = 0.1,
    pair_weights: Array | None = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """SPIN: -L(β(r_w - r_l)) with the data as chosen and the model's own sample as rejected.

    r = lp - ref with the previous iterate as reference. `preference_loss(loss="spin")`, which describes the
    arguments, what is returned and raised. Source: arXiv:2401.01335 eq. 4.7.
    """
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, loss="spin", beta=beta,
        pair_weights=pair_weights, reduction=reduction, return_grad=return_grad,
    )  # fmt: skip


def orpo_loss(
    chosen: Array,
    rejected: Array,
    *,
    chosen_lengths: Array,
    rejected_lengths: Array,
    beta: float = 0.1,
    chosen_nll: Array | None = None,
    pair_weights: Array | None = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """ORPO: NLL - β·L(o_w - o_l), o = a - ln(1 - e^a) the log-odds of the mean token log-prob a = lp/n.

    NLL = -Σ lp_w / Σ n_w, or chosen_nll (the paper's is over prompt and completion).
    `preference_loss(loss="orpo")`, which describes the arguments, what is returned and raised. Source:
    arXiv:2403.07691 eq. 6; β is its λ.
    """
    return preference_loss(
        chosen, rejected, loss="orpo", beta=beta, chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths, chosen_nll=chosen_nll, pair_weights=pair_weights,
        reduction=reduction, return_grad=return_grad,
    )  # fmt: skip


def simpo_loss(
    chosen: Array,
    rejected: Array,
    *,
    chosen_lengths: Array,
    rejected_lengths: Array,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    pair_weights: Array | None = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """SimPO: -(1 - ε)·L(x) - ε·L(-x) + λ·NLL, x = β(lp_w/n_w - lp_l/n_l) - γ; no reference.

    The paper's β is 2 to 2.5. λ is sft_weight (CPO-SimPO). `preference_loss(loss="simpo")`, which describes
    the arguments, what is returned and raised. Source: arXiv:2405.14734 eq. 6.
    """
    return preference_loss(
        chosen, rejected, loss="simpo", beta=beta, gamma=gamma, label_smoothing=label_smoothing,
        sft_weight=sft_weight, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
        pair_weights=pair_weights, reduction=reduction, return_grad=return_grad,
    )  # fmt: skip


def cpo_loss(
    chosen: Array,
    rejected: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    chosen_lengths: Array | None = None,
    chosen_nll: Array | None = None,
    pair_weights: Array | None = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """CPO: -(1 - ε)·L(βd) - ε·L(-βd) + λ·NLL, d = lp_w - lp_l; no reference.

    λ is sft_weight (1 in the paper); above 0 it needs chosen_lengths or chosen_nll.
    `preference_loss(loss="cpo")`, which describes the arguments, what is returned and raised. Source:
    arXiv:2401.08417 eq. 6.
    """
    return preference_loss(
        chosen, rejected, loss="cpo", beta=beta, label_smoothing=label_smoothing,
        sft_weight=sft_weight, chosen_lengths=chosen_lengths, chosen_nll=chosen_nll,
        pair_weights=pair_weights, reduction=reduction, return_grad=return_grad,
    )  # fmt: skip


def kto_loss(
    chosen: Array,
    rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    kl: Array | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    pair_weights: Array | None = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """KTO: u_w·(1 - S(β(r - z))) of desirable, u_l·(1 - S(β(z - r))) of undesirable completions.

    r = lp - ref, z = max(0, mean of kl), S sigmoid; the numbers of chosen and rejected may differ, the mean
    is over all of them. `preference_loss(loss="kto")`, which describes the arguments, what is returned and
    raised. Source: arXiv:2402.01306 eq. 8.
    """
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, loss="kto", beta=beta, kl=kl,
        desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
        pair_weights=pair_weights, reduction=reduction, return_grad=return_grad,
    )  # fmt: skip


# ---- from logits -------------------------------------------------------------------------------


def _tail_weights(keep: Array, ld_alpha: float, dtype: np.dtype[Any]) -> Array:
    """1 up to the length of the pair's shorter answer, ld_alpha beyond, (2·pairs, T)."""
    shorter = np.tile(np.minimum(*np.split(keep.sum(-1), 2)), 2)
    tail = keep.cumsum(-1) > shorter[:, None]
    return np.where(tail, dtype.type(ld_alpha), dtype.type(1))


def preference_loss_from_logits(
    logits: Array,
    targets: Array,
    *,
    ref_logprobs: Array | None = None,
    ref_logits: Array | None = None,
    pairs: str = "halves",
    loss: str | Sequence[str] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    normalize_lengths: bool | None = None,
    loss_weights: Sequence[float] | None = None,
    pair_weights: Array | None = None,
    gamma: float = 0.5,
    sft_weight: float = 0.0,
    chosen_nll: Array | None = None,
    kl: Array | None = None,
    delta: float = 0.0,
    tau: float = 0.05,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    ld_alpha: float | None = None,
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
        loss … alpha, reduction: as in `preference_loss`.
        ld_alpha: a weight in [0, 1] on the tokens past the length of the pair's shorter answer
            (LD-DPO, arXiv:2409.06411), in the logits and in ref_logits; ref_logprobs are taken as they are.
            Lengths and the NLL are of all tokens. None: 1.
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
    terms = preference_terms(loss, normalize_lengths, f_divergence, reduction)
    if ld_alpha is not None:
        ld_alpha = scalar("ld_alpha", ld_alpha)
        require(0.0 <= ld_alpha <= 1.0, "ld_alpha", ld_alpha, "0 to 1, or None")
    saved = None
    if return_grad:
        saved = np.empty((2, *y.shape), FLOAT64)
    gradient, out, out_layout = gradient_rows(logits, rows, layout, return_grad, grad_out)
    half, dtype, threads = y.shape[0] // 2, ACCUMULATOR[layout[0]], get_num_threads()
    lp = np.empty(y.shape, dtype)
    _C.token_logprobs(rows, layout, y, int32, ignore_index, 1.0, lp, None, None, saved, threads)
    chosen_lengths: Any = None
    rejected_lengths = tail = tokens = None
    needs_nll = terms.nll and chosen_nll is None
    if ld_alpha is not None or terms.divides or (needs_nll and terms.nll_by_length):
        keep = y != ignore_index
        chosen_lengths, rejected_lengths = np.split(keep.sum(-1), 2)
    weighted = lp
    if ld_alpha is not None:
        tail = _tail_weights(keep, ld_alpha, dtype)
        if needs_nll:  # of all tokens in full
            tokens = max(half, 1)
            if terms.nll_by_length:
                tokens = max(int(chosen_lengths.clip(1).sum()), 1)
            chosen_nll = -sequence_logprobs(lp[:half]).sum(dtype=FLOAT64) / tokens
        weighted = _times(lp, tail)
    s = sequence_logprobs(weighted)
    if ref_logits is not None:
        ref_lp = token_logprobs(ref_logits, y, ignore_index=ignore_index)
        ref_logprobs = sequence_logprobs(ref_lp if tail is None else _times(ref_lp, tail))
    ref_chosen = ref_rejected = None
    if ref_logprobs is not None:
        ref_chosen, ref_rejected = ref_logprobs[:half], ref_logprobs[half:]
    output, halves, nll_gradient = _preference(
        terms, s[:half], s[half:], ref_chosen, ref_rejected, chosen_lengths, rejected_lengths,
        pair_weights, chosen_nll, kl, loss_weights,
        (
            beta, label_smoothing, gamma, sft_weight, delta, tau, desirable_weight,
            undesirable_weight, alpha,
        ),
    )  # fmt: skip
    if not return_grad:
        return output
    g = np.empty(y.shape, dtype)
    g[...] = np.concatenate(halves)[:, None]
    if tail is not None:
        g *= tail
    if tokens is not None:
        g[:half] -= dtype.type(float(nll_gradient[0]) / tokens)
    _C.token_logprobs_backward(
        rows, layout, out, out_layout, y, int32, ignore_index, 1.0, saved, g, None, None, threads
    )
    if out is not gradient:
        gradient[...] = out
    return output, gradient


def _times(lp: Array, tail: Array) -> Array:
    """A token of weight 0 adds 0, also where it is impossible."""
    product: Array = np.where(tail == 0, 0, lp).astype(lp.dtype) * tail
    return product
