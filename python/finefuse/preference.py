"""Preference losses (DPO and its family) from sequence log-probabilities and from logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._args import REDUCTIONS, choice, require
from ._args.preference import (
    INPUT_NAMES,
    KTO,
    NUMBER_NAMES,
    REWARD,
    SORTING,
    PreferenceInputs,
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
from ._op import (
    DTYPES,
    accumulator,
    composite,
    float_tensor,
    index_tensor,
    is_compiling,
    runs_eagerly,
    same_device,
    scalar,
    wants_gradient,
)
from ._preference_pairs import FORWARD, NONE, Preference, check_inputs
from .eager import preference as _eager
from .logprobs import sequence_logprobs, token_logprobs


class PreferenceOutput(NamedTuple):
    """What a preference loss returns; only `loss` is differentiable."""

    loss: Tensor
    """(); with reduction="none" (pairs,) or, for losses of an example at a time, (chosen + rejected,)."""
    chosen_rewards: Tensor
    """β·r_w, (pairs,)."""
    rejected_rewards: Tensor
    """β·r_l, (pairs,)."""
    margins: Tensor
    """β·(r_w - r_l), (pairs,); where the numbers differ, the difference of the mean rewards, ()."""
    accuracy: Tensor
    """The share of pairs with a positive margin; where the numbers of chosen and rejected differ, of
    rewards of the right sign, ()."""


# ---- from sequence log-probabilities -----------------------------------------------------------

_cached_terms = lru_cache(maxsize=64)(preference_terms)


def _terms(
    loss: Any, normalize_lengths: bool | None, f_divergence: Any, reduction: Any
) -> PreferenceTerms:
    if isinstance(loss, list):  # to be looked up
        loss = tuple(loss)
    if is_compiling():
        return preference_terms(loss, normalize_lengths, f_divergence, reduction)
    try:
        return _cached_terms(loss, normalize_lengths, f_divergence, reduction)
    except TypeError:  # what cannot be hashed is no name
        return preference_terms(loss, normalize_lengths, f_divergence, reduction)


def _numbers(values: tuple[Any, ...]) -> Sequence[Any]:
    if not is_compiling() and {*map(type, values)} == {float}:
        return values
    return [scalar(name, value) for name, value in zip(NUMBER_NAMES, values, strict=True)]


def _loss_weights(weights: Any, count: int) -> Tensor | None:
    """One a loss, float64 on the CPU."""
    if weights is None:
        return None
    check_loss_weights(weights, count)
    numbers = [scalar("loss_weights", weight) for weight in weights]
    if is_compiling():
        return torch.stack([number.cpu() for number in numbers])
    return torch.tensor(numbers, dtype=torch.float64)


def _vectors(*values: Any) -> list[Any]:
    """The first 9 inputs in the widest type of the log-probabilities, at least float32."""
    dtype = float32 = torch.float32
    as_they_are = True
    for i, value in enumerate(values):
        if value is None and i > 1:
            continue
        if isinstance(value, Tensor) and value.dtype is float32:
            continue
        as_they_are = False
        if not isinstance(value, Tensor):
            raise TypeError(f"{INPUT_NAMES[i]}: a tensor, not {type(value).__name__}")
        # lengths may be integers
        if value.dtype not in DTYPES and (i not in (4, 5) or value.is_complex()):
            float_tensor(INPUT_NAMES[i], value)
        if i < 4 and value.dtype is torch.float64:
            dtype = torch.float64
    if as_they_are:
        return list(values)
    return [v if v is None or v.dtype is dtype else v.to(dtype) for v in values]


def _per_token(lp: Tensor, lengths: Tensor | None) -> Tensor:
    """In float64, divided by the lengths where a loss divides by them."""
    lp = lp.detach().double()
    return lp if lengths is None else lp / lengths.masked_fill(lengths == 0, 1)


def _orders(terms: PreferenceTerms, v: Sequence[Any]) -> list[Tensor | None]:
    """What sorts the differences of aot and of aot_unpaired: see csrc/ops/preference.h."""
    orders: list[Tensor | None] = [None, None]
    for i, code in enumerate(SORTING):
        if code not in terms.codes:
            continue
        by_length = terms.by_length[terms.codes.index(code)]
        n = v[4:6] if by_length else (None, None)
        w, l = _per_token(v[0], n[0]), _per_token(v[1], n[1])
        ref_w = torch.zeros_like(w) if v[2] is None else _per_token(v[2], n[0])
        ref_l = torch.zeros_like(l) if v[3] is None else _per_token(v[3], n[1])
        if w.shape != l.shape:
            raise ValueError(f"rejected: shape {tuple(l.shape)}; chosen has {tuple(w.shape)}")
        two = (w - l, ref_w - ref_l) if i == 0 else (w - ref_w, l - ref_l)
        orders[i] = torch.stack([x.flatten().argsort(stable=True) for x in two])
    return orders


def _check_eager(inputs: Any, options: PreferenceOptions) -> None:
    """What the raw op checks, and on the CPU the lengths, which kernels check there too."""
    check_inputs(inputs)
    weights = inputs[6]
    preference_shapes(
        options.codes, options.reduction, inputs[0].shape, inputs[1].shape,
        None if weights is None else weights.shape,
    )  # fmt: skip
    if is_compiling():
        return
    given = options.loss_weights
    preference_binding(
        options._replace(loss_weights=None if given is None else tuple(given.tolist())),
        (inputs[4] is not None, inputs[5] is not None),
        inputs[7] is not None,
    )
    for name, lengths in zip(INPUT_NAMES[4:6], inputs[4:6], strict=True):
        if lengths is not None and lengths.is_cpu and not (lengths >= 0).all():
            i = int((~(lengths >= 0)).flatten().nonzero()[0])
            value = lengths.flatten()[i].item()
            raise ValueError(f"{name}: element {i} is {value:f}; allowed are 0 and above")


def _apply(inputs: Sequence[Any], loss_weights: Any, numbers: Any, codes: Any) -> PreferenceOutput:
    """The inputs as the raw ops take them; codes: the losses, by_length, divergence, nll_by_length, how."""
    if runs_eagerly("preference", inputs[0]):
        losses, by_length, *others = codes
        given = PreferenceInputs(*inputs)
        options = PreferenceOptions(losses, by_length, loss_weights, *numbers, *others)
        _check_eager(given, options)
        return PreferenceOutput(*_eager.preference_loss(given, options))
    want_ref = wants_gradient(*inputs[2:4])
    rest = (loss_weights, *numbers, *codes, want_ref)
    if want_ref or wants_gradient(inputs[0], inputs[1], inputs[7]):
        return PreferenceOutput._make(Preference.apply(*inputs, rest))
    return PreferenceOutput._make(FORWARD(*inputs, *rest)[:5])


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss: str | Sequence[str] = "sigmoid",
    beta: float | Tensor = 0.1,
    label_smoothing: float | Tensor = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    normalize_lengths: bool | None = None,
    loss_weights: Sequence[float | Tensor] | None = None,
    pair_weights: Tensor | None = None,
    gamma: float | Tensor = 0.5,
    sft_weight: float | Tensor = 0.0,
    chosen_nll: Tensor | None = None,
    kl: Tensor | None = None,
    delta: float | Tensor = 0.0,
    tau: float | Tensor = 0.05,
    desirable_weight: float | Tensor = 1.0,
    undesirable_weight: float | Tensor = 1.0,
    f_divergence: str = "reverse_kl",
    alpha: float | Tensor = 0.5,
    reduction: str = "mean",
) -> PreferenceOutput:
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
        beta: β > 0. Every number may be a 0-d tensor.
        label_smoothing: ε in [0, 1), the share of pairs whose labels are taken as swapped; below ½ for
            `robust`. Of no use to `hinge`, `ipo`, `sigmoid_norm` and the losses without ε above.
        chosen_lengths, rejected_lengths: completion lengths n in tokens, in the shapes of chosen and
            rejected.
        normalize_lengths: divide lp, r by their lengths. None: the loss's own convention, above (`ipo`
            as TRL does). True: every loss divides. False: n = 1, and the NLL is a sequence's.
        pair_weights: a factor for each element of the unreduced loss (WPO, arXiv:2406.11827): (pairs,),
            or for losses of an example at a time (chosen + rejected,). Not normalised, no gradient.
        gamma: γ of `simpo`. sft_weight: λ ≥ 0. delta: δ of `bco_pair`. tau: τ > 0 of `discopop`.
        chosen_nll: one element, differentiable; stands for the NLL (`orpo`: over prompt and completion).
        kl: any number of log-ratios of mismatched prompts and completions; no gradient. None: z = 0.
        desirable_weight, undesirable_weight: u_w and u_l of `kto`.
        f_divergence, alpha: above; other than "reverse_kl" for `sigmoid`, `spin`, `sigmoid_norm`, `hinge`,
            `ipo`, `exo_pair`, `robust`, `discopop` and `sft`.
        reduction: "mean", "sum" or "none" over the pairs; over all examples for `kto` and
            `apo_zero_unpaired`, for which "none" is flat, (chosen + rejected,).

    Returns:
        PreferenceOutput(loss, chosen_rewards, rejected_rewards, margins, accuracy), float32, or float64
        where a log-probability is. Only `loss` is differentiable, by the log-probabilities, their
        references and chosen_nll.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return _apply(
        *prepared(
            chosen, rejected, ref_chosen, ref_rejected, loss=loss, beta=beta,
            label_smoothing=label_smoothing, chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths, normalize_lengths=normalize_lengths,
            loss_weights=loss_weights, pair_weights=pair_weights, gamma=gamma, sft_weight=sft_weight,
            chosen_nll=chosen_nll, kl=kl, delta=delta, tau=tau, desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight, f_divergence=f_divergence, alpha=alpha,
            reduction=reduction,
        )
    )  # fmt: skip


def prepared(
    chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any, *, loss: Any, beta: Any,
    label_smoothing: Any, chosen_lengths: Any, rejected_lengths: Any, normalize_lengths: bool | None,
    loss_weights: Any, pair_weights: Any, gamma: Any, sft_weight: Any, chosen_nll: Any, kl: Any, delta: Any,
    tau: Any, desirable_weight: Any, undesirable_weight: Any, f_divergence: str, alpha: Any, reduction: str,
) -> tuple[tuple[Any, ...], Any, Any, tuple[Any, ...]]:  # fmt: skip
    """A call of `preference_loss` as its raw ops take it: inputs, loss_weights, numbers, codes."""
    terms = _terms(loss, normalize_lengths, f_divergence, reduction)
    chosen_lengths, rejected_lengths = preference_lengths(
        terms, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, chosen_nll
    )
    if not terms.nll:
        chosen_nll = None
    inputs = _vectors(
        chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, pair_weights,
        chosen_nll, kl,
    )  # fmt: skip
    if inputs[6] is not None and inputs[6].requires_grad:
        inputs[6] = inputs[6].detach()
    if kl is not None:
        inputs[8] = inputs[8].detach().reshape(-1) if KTO in terms.codes else None
    aot: Any = (None, None)
    if sorts(terms.codes):
        aot = _orders(terms, inputs)
    numbers = _numbers((
        beta, label_smoothing, gamma, sft_weight, delta, tau, desirable_weight, undesirable_weight,
        alpha, 0.0,
    ))  # fmt: skip
    return (
        (*inputs, *aot),
        _loss_weights(loss_weights, len(terms.codes)),
        numbers,
        (terms.codes, terms.by_length, terms.divergence, terms.nll_by_length, terms.reduction),
    )


def sorts(codes: Sequence[int]) -> bool:
    """Whether a loss is among them whose gradient of a pair depends on the order of all of them."""
    return SORTING[0] in codes or SORTING[1] in codes


def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_coef: float | Tensor = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The Bradley-Terry loss of a reward model.

        -L(r_w - r_l - margin) + center_coef·(r_w + r_l)²

    Args:
        chosen_rewards, rejected_rewards: (pairs,) or any other shape, any float type.
        margin: how much better the chosen is, in the shape of the rewards (differentiable) or a number.
        center_coef: at least 0, a number or a 0-d tensor; pulls the rewards' mean to 0.
        reduction: "mean", "sum" or "none" over the pairs.

    Returns:
        The loss, () or in the shape of the rewards, float32 (float64 where an argument is).

    Raises:
        TypeError, ValueError: naming the argument.

    Source: arXiv:2203.02155 eq. 1; the margin arXiv:2307.09288 eq. 2; the centre arXiv:2312.09244.
    """
    how = choice("reduction", reduction, REDUCTIONS)
    names = ("chosen_rewards", "rejected_rewards", "margin")
    for name, value in zip(names[:2], (chosen_rewards, rejected_rewards), strict=True):
        float_tensor(name, value)
    given: Any = margin
    if margin is not None and not isinstance(margin, Tensor):
        ones = torch.ones_like(chosen_rewards, dtype=accumulator(chosen_rewards.dtype))
        given = ones * scalar("margin", margin)
    for name, value in zip(names[1:], (rejected_rewards, given), strict=True):
        if value is None:
            continue
        float_tensor(name, value)
        same_device(name, value, names[0], chosen_rewards)
        if value.shape != chosen_rewards.shape:
            raise ValueError(
                f"{name}: shape {tuple(value.shape)}; chosen_rewards has "
                f"{tuple(chosen_rewards.shape)}"
            )
    inputs = _vectors(chosen_rewards, rejected_rewards, given, *(None,) * 6)
    numbers = _numbers((1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, center_coef))
    codes = ((REWARD.code,), (False,), 0, False, how)
    return _apply((*inputs, None, None), None, numbers, codes).loss


# ---- by name -----------------------------------------------------------------------------------


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    label_smoothing: float | Tensor = 0.0,
    f_divergence: str = "reverse_kl",
    alpha: float | Tensor = 0.5,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """DPO: -(1 - ε)·L(βd) - ε·L(-βd), d = (lp_w - ref_w) - (lp_l - ref_l), L log-sigmoid.

    Without a reference d = lp_w - lp_l. `preference_loss(loss="sigmoid")`, which describes the arguments,
    what is returned and raised. Source: arXiv:2305.18290 eq. 7; ε arXiv:2403.00409.
    """
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing,
        f_divergence=f_divergence, alpha=alpha, pair_weights=pair_weights, reduction=reduction,
    )  # fmt: skip


def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    normalize_lengths: bool | None = None,
    beta: float | Tensor = 0.1,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """IPO: (r_w/n_w - r_l/n_l - 1/(2β))², r = lp - ref, n the completion's length in tokens.

    normalize_lengths=False is the original repository's form, n = 1. `preference_loss(loss="ipo")`, which
    describes the arguments, what is returned and raised. Source: arXiv:2310.12036 eq. 17.
    """
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, loss="ipo", beta=beta,
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
        normalize_lengths=normalize_lengths, pair_weights=pair_weights, reduction=reduction,
    )  # fmt: skip


def spin_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float | Tensor = 0.1,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """SPIN: -L(β(r_w - r_l)) with the data as chosen and the model's own sample as rejected.

    r = lp - ref with the previous iterate as reference. `preference_loss(loss="spin")`, which describes the
    arguments, what is returned and raised. Source: arXiv:2401.01335 eq. 4.7.
    """
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, loss="spin", beta=beta,
        pair_weights=pair_weights, reduction=reduction,
    )  # fmt: skip


def orpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float | Tensor = 0.1,
    chosen_nll: Tensor | None = None,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """ORPO: NLL - β·L(o_w - o_l), o = a - ln(1 - e^a) the log-odds of the mean token log-prob a = lp/n.

    NLL = -Σ lp_w / Σ n_w, or chosen_nll (the paper's is over prompt and completion).
    `preference_loss(loss="orpo")`, which describes the arguments, what is returned and raised. Source:
    arXiv:2403.07691 eq. 6; β is its λ.
    """
    return preference_loss(
        chosen, rejected, loss="orpo", beta=beta, chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths, chosen_nll=chosen_nll, pair_weights=pair_weights,
        reduction=reduction,
    )  # fmt: skip


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float | Tensor = 0.1,
    gamma: float | Tensor = 0.5,
    label_smoothing: float | Tensor = 0.0,
    sft_weight: float | Tensor = 0.0,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """SimPO: -(1 - ε)·L(x) - ε·L(-x) + λ·NLL, x = β(lp_w/n_w - lp_l/n_l) - γ; no reference.

    The paper's β is 2 to 2.5. λ is sft_weight (CPO-SimPO). `preference_loss(loss="simpo")`, which describes
    the arguments, what is returned and raised. Source: arXiv:2405.14734 eq. 6.
    """
    return preference_loss(
        chosen, rejected, loss="simpo", beta=beta, gamma=gamma, label_smoothing=label_smoothing,
        sft_weight=sft_weight, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
        pair_weights=pair_weights, reduction=reduction,
    )  # fmt: skip


def cpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float | Tensor = 0.1,
    label_smoothing: float | Tensor = 0.0,
    sft_weight: float | Tensor = 0.0,
    chosen_lengths: Tensor | None = None,
    chosen_nll: Tensor | None = None,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """CPO: -(1 - ε)·L(βd) - ε·L(-βd) + λ·NLL, d = lp_w - lp_l; no reference.

    λ is sft_weight (1 in the paper); above 0 it needs chosen_lengths or chosen_nll.
    `preference_loss(loss="cpo")`, which describes the arguments, what is returned and raised. Source:
    arXiv:2401.08417 eq. 6.
    """
    return preference_loss(
        chosen, rejected, loss="cpo", beta=beta, label_smoothing=label_smoothing,
        sft_weight=sft_weight, chosen_lengths=chosen_lengths, chosen_nll=chosen_nll,
        pair_weights=pair_weights, reduction=reduction,
    )  # fmt: skip


def kto_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    kl: Tensor | None = None,
    beta: float | Tensor = 0.1,
    desirable_weight: float | Tensor = 1.0,
    undesirable_weight: float | Tensor = 1.0,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
) -> PreferenceOutput:
    """KTO: u_w·(1 - S(β(r - z))) of desirable, u_l·(1 - S(β(z - r))) of undesirable completions.

    r = lp - ref, z = max(0, mean of kl), S sigmoid; the numbers of chosen and rejected may differ, the mean
    is over all of them. `preference_loss(loss="kto")`, which describes the arguments, what is returned and
    raised. Source: arXiv:2402.01306 eq. 8.
    """
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, loss="kto", beta=beta, kl=kl,
        desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
        pair_weights=pair_weights, reduction=reduction,
    )  # fmt: skip


# ---- from logits -------------------------------------------------------------------------------


def _tail_weights(keep: Tensor, ld_alpha: Any, dtype: torch.dtype) -> Tensor:
    """1 up to the length of the pair's shorter answer, ld_alpha beyond, (2·pairs, T)."""
    shorter = torch.minimum(*keep.sum(-1).chunk(2)).repeat(2)
    tail = keep.cumsum(-1) > shorter[:, None]
    ones = torch.ones((), dtype=dtype, device=keep.device)
    return torch.where(tail, ones * ld_alpha, ones).to(dtype)


def times_tail(lp: Tensor, tail: Tensor | None) -> Tensor:
    """A token of weight 0 adds 0, also where it is impossible."""
    return lp if tail is None else torch.where(tail == 0, 0, lp) * tail


def preference_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    ref_logits: Tensor | None = None,
    pairs: str = "halves",
    loss: str | Sequence[str] = "sigmoid",
    beta: float | Tensor = 0.1,
    label_smoothing: float | Tensor = 0.0,
    normalize_lengths: bool | None = None,
    loss_weights: Sequence[float | Tensor] | None = None,
    pair_weights: Tensor | None = None,
    gamma: float | Tensor = 0.5,
    sft_weight: float | Tensor = 0.0,
    chosen_nll: Tensor | None = None,
    kl: Tensor | None = None,
    delta: float | Tensor = 0.0,
    tau: float | Tensor = 0.05,
    desirable_weight: float | Tensor = 1.0,
    undesirable_weight: float | Tensor = 1.0,
    f_divergence: str = "reverse_kl",
    alpha: float | Tensor = 0.5,
    ld_alpha: float | Tensor | None = None,
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
        loss … alpha, reduction: as in `preference_loss`.
        ld_alpha: a weight in [0, 1] on the tokens past the length of the pair's shorter answer
            (LD-DPO, arXiv:2409.06411), in the logits and in ref_logits; ref_logprobs are taken as they are.
            Lengths and the NLL are of all tokens. None: 1.
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
    targets = index_tensor("targets", targets, "logits", logits)
    check_reference(
        logits.shape,
        None if ref_logprobs is None else ref_logprobs.shape,
        None if ref_logits is None else ref_logits.shape,
    )

    def token_lp() -> Tensor:
        return token_logprobs(logits, targets, ignore_index=ignore_index, inplace=inplace)

    def ref_token_lp() -> Tensor:
        assert ref_logits is not None
        return token_logprobs(ref_logits, targets, ignore_index=ignore_index)

    return preference_of_rows(
        targets, accumulator(logits.dtype), token_lp, None if ref_logits is None else ref_token_lp, None,
        ref_logprobs=ref_logprobs,
        loss=loss, beta=beta, label_smoothing=label_smoothing, normalize_lengths=normalize_lengths,
        loss_weights=loss_weights, pair_weights=pair_weights, gamma=gamma, sft_weight=sft_weight,
        chosen_nll=chosen_nll, kl=kl, delta=delta, tau=tau, desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight, f_divergence=f_divergence, alpha=alpha, ld_alpha=ld_alpha,
        reduction=reduction, ignore_index=ignore_index,
    )  # fmt: skip


def preference_of_rows(
    targets: Tensor, dtype: torch.dtype, token_lp: Any, ref_token_lp: Any, one_pass: Any, *,
    ref_logprobs: Tensor | None,
    loss: Any, normalize_lengths: bool | None, sft_weight: Any, chosen_nll: Any, f_divergence: str,
    ld_alpha: Any, reduction: str, ignore_index: int, **options: Any,
) -> PreferenceOutput:  # fmt: skip
    """What the losses from logits and from hidden states have in common; targets (2·pairs, T).

    token_lp() and ref_token_lp() give token log-probabilities of this dtype; one_pass(tail, prepared) the
    outputs where the coefficients of a pair depend on that pair alone; None: never.
    """
    terms = _terms(loss, normalize_lengths, f_divergence, reduction)
    if ld_alpha is not None:
        ld_alpha = scalar("ld_alpha", ld_alpha)
        if not isinstance(ld_alpha, Tensor):
            require(0.0 <= ld_alpha <= 1.0, "ld_alpha", ld_alpha, "0 to 1, or None")
    half = targets.shape[0] // 2
    chosen_lengths: Any = None
    rejected_lengths = tail = None
    needs_nll = terms.nll and chosen_nll is None
    if ld_alpha is not None or terms.divides or (needs_nll and terms.nll_by_length):
        keep = targets != ignore_index
        chosen_lengths, rejected_lengths = keep.sum(-1).chunk(2)
    one_pass = (
        one_pass
        if not (sorts(terms.codes) or terms.reduction == NONE)
        and not wants_gradient(chosen_nll, ref_logprobs)
        and not (ld_alpha is not None and needs_nll)
        else None
    )
    lp = None
    if one_pass is None:
        lp = token_lp()
    if ld_alpha is not None:
        tail = _tail_weights(keep, ld_alpha, dtype)
        if lp is not None and needs_nll:  # of all tokens in full
            count: Any = max(half, 1)
            if terms.nll_by_length:
                count = chosen_lengths.clamp(min=1).sum().clamp(min=1)
            chosen_nll = -sequence_logprobs(lp[:half]).double().sum() / count
    if ref_token_lp is not None:
        with torch.no_grad():
            ref_logprobs = sequence_logprobs(times_tail(ref_token_lp(), tail))
    ref_chosen = ref_rejected = None
    if ref_logprobs is not None:
        ref_chosen, ref_rejected = ref_logprobs[:half], ref_logprobs[half:]
    if lp is not None:
        seq = sequence_logprobs(times_tail(lp, tail))
    else:  # in the place of what is not known yet
        seq = torch.zeros(targets.shape[:1], dtype=dtype, device=targets.device)
    call = prepared(
        seq[:half], seq[half:], ref_chosen, ref_rejected, loss=loss, sft_weight=sft_weight,
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
        normalize_lengths=normalize_lengths, chosen_nll=chosen_nll, f_divergence=f_divergence,
        reduction=reduction, **options,
    )  # fmt: skip
    return _apply(*call) if one_pass is None else one_pass(tail, call)


# ---- torch.ops.finefuse ------------------------------------------------------------------------

# A name of a loss only: schemas have no defaults for lists of names.
_OPTIONS = (
    "str loss='sigmoid', float beta=0.1, float label_smoothing=0.0, {lengths}"
    "bool? normalize_lengths=None, Tensor? pair_weights=None, float gamma=0.5, float sft_weight=0.0, "
    "Tensor? chosen_nll=None, Tensor? kl=None, float delta=0.0, float tau=0.05, "
    "float desirable_weight=1.0, float undesirable_weight=1.0, str f_divergence='reverse_kl', "
    "float alpha=0.5, {ld_alpha}str reduction='mean'"
)
_OUTPUT = "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
composite(
    "preference_loss(Tensor chosen, Tensor rejected, Tensor? ref_chosen=None, "
    "Tensor? ref_rejected=None, *, "
    + _OPTIONS.format(
        lengths="Tensor? chosen_lengths=None, Tensor? rejected_lengths=None, ", ld_alpha=""
    )
    + f") {_OUTPUT}",
    preference_loss,
)
composite(
    "preference_loss_from_logits(Tensor logits, Tensor targets, *, Tensor? ref_logprobs=None, "
    "Tensor? ref_logits=None, str pairs='halves', "
    + _OPTIONS.format(lengths="", ld_alpha="float? ld_alpha=None, ")
    + f", int ignore_index=-100) {_OUTPUT}",
    preference_loss_from_logits,
)
composite(
    "reward_loss(Tensor chosen_rewards, Tensor rejected_rewards, *, Tensor? margin=None, "
    "float center_coef=0.0, str reduction='mean') -> Tensor",
    reward_loss,
)
