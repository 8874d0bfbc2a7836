"""Preference losses: their names, and what their arguments may be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import inf, prod
from typing import Any, NamedTuple

from . import REDUCTIONS, check_label_smoothing, choice, require

DIVERGENCES = {"reverse_kl": 0, "forward_kl": 1, "js": 2, "alpha": 3}


class PreferenceLoss(NamedTuple):
    """A preference loss: its number in csrc/ops/preference.h and what it is of."""

    code: int
    by_length: bool = False  # divides by the completions' lengths unless told otherwise
    reference: bool = True  # of log-ratios, else of log-probabilities
    unpaired: bool = False  # of an example at a time: the numbers of chosen and rejected may differ
    divergence: bool = False  # takes another f_divergence than reverse_kl
    nll: str = ""  # the NLL of the chosen: "whole" (sft, orpo) or times "sft_weight"


# csrc/ops/preference_table.h has the formulas.
PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(0, divergence=True),
    "ipo": PreferenceLoss(1, by_length=True, divergence=True),
    "hinge": PreferenceLoss(2, divergence=True),
    "robust": PreferenceLoss(3, divergence=True),
    "exo_pair": PreferenceLoss(4, divergence=True),
    "nca_pair": PreferenceLoss(5),
    "bco_pair": PreferenceLoss(6),
    "sppo_hard": PreferenceLoss(7),
    "aot": PreferenceLoss(8),
    "aot_unpaired": PreferenceLoss(9),
    "apo_zero": PreferenceLoss(10),
    "apo_down": PreferenceLoss(11),
    "discopop": PreferenceLoss(12, divergence=True),
    "sigmoid_norm": PreferenceLoss(13, by_length=True, divergence=True),
    "sft": PreferenceLoss(14, reference=False, divergence=True, nll="whole"),
    "spin": PreferenceLoss(0, divergence=True),
    "cpo": PreferenceLoss(15, reference=False, nll="sft_weight"),
    "simpo": PreferenceLoss(16, by_length=True, reference=False, nll="sft_weight"),
    "slic": PreferenceLoss(17, reference=False, nll="sft_weight"),
    "orpo": PreferenceLoss(18, by_length=True, reference=False, nll="whole"),
    "kto": PreferenceLoss(19, unpaired=True),
    "apo_zero_unpaired": PreferenceLoss(20, unpaired=True),
}
REWARD = PreferenceLoss(21)  # reward_loss, no name of preference_loss
_PREFERENCE_CODES = {p.code: (name, p) for name, p in PREFERENCE_LOSSES.items() if name != "spin"}
_UNPAIRED = {p.code for p in PREFERENCE_LOSSES.values() if p.unpaired}
_PREFERENCE_TERMS = 32  # kPreferenceTerms

SORTING = tuple(PREFERENCE_LOSSES[name].code for name in ("aot", "aot_unpaired"))
KTO = PREFERENCE_LOSSES["kto"].code

# What a caller names the arrays of PreferenceInputs, but for the two orders, and the numbers of
# PREFERENCE_NUMBERS.
INPUT_NAMES = (
    "chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths",
    "pair_weights", "chosen_nll", "kl",
)  # fmt: skip
SHAPED_LIKE = (0, 0, 0, 1, 0, 1)  # the input, chosen or rejected, whose shape the first six have
NUMBER_NAMES = (
    "beta", "label_smoothing", "gamma", "sft_weight", "delta", "tau", "desirable_weight",
    "undesirable_weight", "alpha", "center_coef",
)  # fmt: skip


def check_beta(value: Any) -> None:
    require(0.0 < value < inf, "beta", value, "positive and finite")


class PreferenceTerms(NamedTuple):
    """What the names of a call say: the losses that are added up, and how."""

    names: tuple[str, ...]
    codes: tuple[int, ...]
    by_length: tuple[bool, ...]
    divergence: int
    nll_by_length: bool
    reduction: int
    nll: bool  # some loss has the NLL of the chosen, or with an sft_weight above 0 may have
    divides: bool  # some loss divides by the lengths


class PreferenceInputs(NamedTuple):
    """The arrays of csrc/ops/preference.h, contiguous or not, in the order of the kernels' arguments."""

    chosen: Any
    rejected: Any
    ref_chosen: Any
    ref_rejected: Any
    chosen_lengths: Any  # None: 1. Given only where a loss divides by it or the NLL needs it.
    rejected_lengths: Any
    weights: Any  # pair_weights
    chosen_nll: Any  # one number, stands for the NLL of the chosen
    kl: Any  # any number of log-ratios, flat
    aot_order: Any  # (2, pairs) int64, see csrc/ops/preference.h; None where the loss is not there
    aot_unpaired_order: Any


class PreferenceOptions(NamedTuple):
    """PreferenceOptions of csrc/ops/preference.h; the numbers may be 0-d tensors while compiling."""

    codes: tuple[int, ...]
    by_length: tuple[bool, ...]
    loss_weights: Any  # as many numbers; None: each 1. torch: a 1-d float64 tensor on the CPU
    beta: Any
    label_smoothing: Any
    gamma: Any
    sft_weight: Any
    delta: Any
    tau: Any
    desirable: Any
    undesirable: Any
    alpha: Any
    center: Any
    divergence: int
    nll_by_length: bool
    reduction: int


PREFERENCE_NUMBERS = PreferenceOptions._fields[3:13]


def preference_terms(
    loss: Any, normalize_lengths: bool | None, f_divergence: Any, reduction: Any
) -> PreferenceTerms:
    """The losses of a call, from a name or a list of names."""
    names = tuple(loss) if isinstance(loss, (list, tuple)) else (loss,)
    require(
        1 <= len(names) <= _PREFERENCE_TERMS, "loss", names,
        f"a name, or a list of 1 to {_PREFERENCE_TERMS}",
    )  # fmt: skip
    for name in names:
        if not isinstance(name, str) or name not in PREFERENCE_LOSSES:
            choice("loss", name, dict.fromkeys(PREFERENCE_LOSSES, 0))
    losses = [PREFERENCE_LOSSES[name] for name in names]
    divergence = choice("f_divergence", f_divergence, DIVERGENCES)
    if divergence:
        for name, named in zip(names, losses, strict=True):
            if not named.divergence:
                allowed = [n for n, other in PREFERENCE_LOSSES.items() if other.divergence]
                raise ValueError(
                    f"f_divergence: {f_divergence!r} with loss={name!r}; allowed with: "
                    + ", ".join(allowed)
                )
    how = choice("reduction", reduction, REDUCTIONS)
    unpaired = [named.unpaired for named in losses]
    mixed = any(unpaired) and not all(unpaired)
    if mixed and how == REDUCTIONS["none"]:
        raise ValueError(
            f"reduction: 'none' of {', '.join(names)}; losses of pairs and losses of an example at a "
            "time have different shapes"
        )
    by_length = tuple(
        named.by_length if normalize_lengths is None else bool(normalize_lengths)
        for named in losses
    )
    return PreferenceTerms(
        names, tuple(named.code for named in losses), by_length, divergence,
        normalize_lengths is None or bool(normalize_lengths), how,
        any(named.nll for named in losses), any(by_length),
    )  # fmt: skip


def check_loss_weights(weights: Any, count: int) -> None:
    """One a loss; the numbers themselves are the door's to look at."""
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"loss_weights: a list of numbers, not {type(weights).__name__}")
    if len(weights) != count:
        raise ValueError(f"loss_weights: {len(weights)} numbers; allowed: {count}, one a loss")


def preference_lengths(
    terms: PreferenceTerms,
    ref_chosen: Any,
    ref_rejected: Any,
    chosen_lengths: Any,
    rejected_lengths: Any,
    chosen_nll: Any,
) -> tuple[Any, Any]:
    """The lengths that the kernel reads; None where it has no use for them."""
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("ref_chosen and ref_rejected: give both or neither")
    if terms.divides:
        if chosen_lengths is None or rejected_lengths is None:
            divided = [n for n, yes in zip(terms.names, terms.by_length, strict=True) if yes]
            raise ValueError(
                f"chosen_lengths, rejected_lengths: loss={divided[0]!r} divides by the completions' "
                "lengths; give both, or normalize_lengths=False"
            )
        return chosen_lengths, rejected_lengths
    if not terms.nll or not terms.nll_by_length or chosen_nll is not None:
        return None, None
    if chosen_lengths is None:
        for name in terms.names:
            if PREFERENCE_LOSSES[name].nll == "whole":
                raise ValueError(_no_nll(name))
    return chosen_lengths, None


def _no_nll(name: str) -> str:
    return (
        f"chosen_lengths: loss={name!r} has the NLL of the chosen a token; give them, or chosen_nll, or "
        "normalize_lengths=False (a sequence)"
    )


class PreferenceShapes(NamedTuple):
    out: tuple[int, ...]
    margins: tuple[int, ...]


def preference_shapes(
    codes: Sequence[int],
    reduction: int,
    chosen: Sequence[int],
    rejected: Sequence[int],
    pair_weights: Sequence[int] | None,
    names: tuple[str, str] = ("chosen", "rejected"),
) -> PreferenceShapes:
    """The shapes of the loss and of the margins from those of the inputs."""
    chosen, rejected = tuple(chosen), tuple(rejected)
    unpaired = [code in _UNPAIRED for code in codes]
    if chosen != rejected and not all(unpaired):
        raise ValueError(f"{names[1]}: shape {rejected}; {names[0]} has {chosen}")
    one_by_one = all(unpaired)
    if any(unpaired) and not one_by_one and not reduction:
        raise ValueError("reduction: 'none' of losses of pairs and losses of an example at a time")
    counts = prod(chosen), prod(rejected)
    elements = (sum(counts),) if one_by_one else chosen
    if pair_weights is not None:
        if any(unpaired) and not one_by_one:
            raise ValueError(
                "pair_weights: with losses of pairs and losses of an example at a time"
            )
        if tuple(pair_weights) != elements:
            raise ValueError(f"pair_weights: shape {tuple(pair_weights)}; allowed: {elements}")
    return PreferenceShapes(() if reduction else elements, chosen if counts[0] == counts[1] else ())


@lru_cache(maxsize=64)  # a training step asks for the same again
def preference_binding(
    options: PreferenceOptions, has_lengths: tuple[bool, bool], has_nll: bool
) -> tuple[Any, ...]:
    """What the kernels take (preference_options in csrc/bindings/preference.h), of numbers within their
    ranges; loss_weights a tuple or None."""
    o = options
    known = [_PREFERENCE_CODES.get(code, ("", REWARD)) for code in o.codes]
    for code in o.codes:
        allowed = f"0 to {REWARD.code}"
        require(code in _PREFERENCE_CODES or code == REWARD.code, "losses", code, allowed)
    require(1 <= len(known) <= _PREFERENCE_TERMS, "losses", o.codes, f"1 to {_PREFERENCE_TERMS}")
    require(len(o.by_length) == len(known), "by_length", o.by_length, "one a loss")
    require(o.divergence in DIVERGENCES.values(), "divergence", o.divergence, "0 to 3")
    require(o.reduction in REDUCTIONS.values(), "reduction", o.reduction, "0 to 2")
    weights = (1.0,) * len(known) if o.loss_weights is None else o.loss_weights
    require(len(weights) == len(known), "loss_weights", weights, f"{len(known)} numbers")
    for weight in weights:
        require(-inf < weight < inf, "loss_weights", weight, "finite")
    check_beta(o.beta)
    check_label_smoothing(o.label_smoothing, "below 1")
    for name, _ in known:
        eps = o.label_smoothing
        if name == "exo_pair":
            require(eps > 0.0, "label_smoothing", eps, "above 0 with loss='exo_pair'")
        if name == "robust":
            require(eps < 0.5, "label_smoothing", eps, "below 0.5 with loss='robust'")
    require(0.0 < o.tau < inf, "tau", o.tau, "positive and finite")
    for name, value in (("gamma", o.gamma), ("delta", o.delta), ("alpha", o.alpha)):
        require(-inf < value < inf, name, value, "finite")
    for name, value in (
        ("sft_weight", o.sft_weight), ("desirable_weight", o.desirable),
        ("undesirable_weight", o.undesirable), ("center_coef", o.center),
    ):  # fmt: skip
        require(0.0 <= value < inf, name, value, "0 and above")
    if any(o.by_length) and not all(has_lengths):
        raise ValueError("chosen_lengths, rejected_lengths: None; a loss divides by them")
    if o.nll_by_length and not has_lengths[0] and not has_nll:
        for name, named in known:
            if named.nll == "whole" or (named.nll and o.sft_weight > 0):
                raise ValueError(_no_nll(name))
    return (
        list(o.codes), list(o.by_length), [float(w) for w in weights], *o[3:13], o.divergence,
        o.nll_by_length, o.reduction,
    )  # fmt: skip


def check_halves(pairs: Any, logits: Sequence[int], ref_logprobs: Any, ref_logits: Any) -> None:
    """What preference losses from logits ask of their batch; `logits` is a shape."""
    if pairs != "halves":
        raise ValueError(f"pairs: {pairs!r}; allowed: 'halves'")
    if len(logits) != 3 or logits[0] % 2:
        raise ValueError(f"logits: shape {tuple(logits)}; allowed: (2·pairs, T, V)")
    if ref_logprobs is not None and ref_logits is not None:
        raise ValueError("ref_logprobs and ref_logits: give one of the two")


def check_reference(
    logits: Sequence[int], ref_logprobs: Sequence[int] | None, ref_logits: Sequence[int] | None
) -> None:
    """The shapes of the reference of a batch of pairs."""
    if ref_logits is not None and (
        len(ref_logits) != 3 or tuple(ref_logits[:2]) != tuple(logits[:2])
    ):
        raise ValueError(f"ref_logits: shape {tuple(ref_logits)}; logits have {tuple(logits)}")
    if ref_logprobs is not None and tuple(ref_logprobs) != (logits[0],):
        raise ValueError(f"ref_logprobs: shape {tuple(ref_logprobs)}; allowed: ({logits[0]},)")
