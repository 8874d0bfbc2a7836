"""What the torch door and the NumPy door check in the same way. No torch here.

Numbers that stand for a type, a loss or a reduction are the contract with csrc/core/dtype.h and
csrc/ops/*.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import floor, inf, prod
from typing import Any, NamedTuple

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}

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

# csrc/ops/distill.h, enum DistillKind
DISTILL_KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}

# csrc/ops/policy.h, enums; csrc/ops/policy_table.h has the formulas.
SURROGATES = {"clipped": 0, "reinforce": 1, "cispo": 2, "sapo": 3, "vespo": 4}
IMPORTANCE = {"token": 0, "mean": 1, "sum": 2, "whole": 3}
KL = {"k1": 0, "k2": 1, "k3": 2}
POLICY_REDUCTIONS = {
    "none": 0, "sum": 1, "tokens": 2, "sequences": 3, "sequence_sums": 4, "divisor": 5,
}  # fmt: skip


class PolicyLoss(NamedTuple):
    """A policy-gradient loss: a surrogate of the ratio, what the ratio is over, how tokens add up."""

    surrogate: str
    importance: str
    reduction: str  # of POLICY_REDUCTIONS; the divisor: "max_length" or "num_tokens"
    clip_high: float = 0.2


POLICY_LOSSES = {
    "reinforce": PolicyLoss("reinforce", "token", "tokens"),
    "rloo": PolicyLoss("clipped", "whole", "sequence_sums"),
    "ppo": PolicyLoss("clipped", "token", "tokens"),
    "grpo": PolicyLoss("clipped", "token", "sequences"),
    "bnpo": PolicyLoss("clipped", "token", "tokens"),
    "dr_grpo": PolicyLoss("clipped", "token", "max_length"),
    "dapo": PolicyLoss("clipped", "token", "num_tokens"),
    "luspo": PolicyLoss("clipped", "mean", "sequence_sums"),
    "gspo": PolicyLoss("clipped", "mean", "sequences"),
    "cispo": PolicyLoss("cispo", "token", "num_tokens", clip_high=5.0),
    "sapo": PolicyLoss("sapo", "token", "sequences"),
    "vespo": PolicyLoss("vespo", "sum", "num_tokens"),
}

_COLDEST, _HOTTEST = 1e-30, 1e30  # beyond, z/T leaves float32

# (dtype, rows, vocab, inner, outer_stride, inner_stride), in elements: see row_strides.
Layout = tuple[int, int, int, int, int, int]


def require(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Raise the ValueError that names the argument, what it was and what is allowed."""
    if not ok:
        raise ValueError(f"{name}: {value!r}; allowed: {allowed}")


def choice(name: str, value: Any, allowed: dict[str, int]) -> int:
    """The number behind one of a few names."""
    number = allowed.get(value) if isinstance(value, str) else None
    if number is None:
        raise ValueError(f"{name}: {value!r}; allowed: {', '.join(map(repr, allowed))}")
    return number


def check_index(name: str, value: Any) -> None:
    if not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise TypeError(f"{name}: an int, not {value!r}")


def check_temperature(value: Any) -> None:
    ok = _COLDEST <= value <= _HOTTEST
    require(ok, "temperature", value, "positive and finite (1e-30 to 1e30)")


def check_beta(value: Any) -> None:
    require(0.0 < value < inf, "beta", value, "positive and finite")


def check_label_smoothing(value: Any, top: str = "1") -> None:
    """ε in [0, 1] or, where a loss divides labels between two answers, in [0, 1)."""
    ok = 0.0 <= value <= 1.0 and (top == "1" or value < 1.0)
    require(ok, "label_smoothing", value, f"0 to {top}")


def check_row_shapes(logits: Sequence[int], targets: Sequence[int], name: str = "targets") -> None:
    """The shapes of logits (…, V), V at least 1, and of targets (…)."""
    if len(logits) == 0 or tuple(logits[:-1]) != tuple(targets):
        raise ValueError(
            f"{name}: shape {tuple(targets)}; logits of shape {tuple(logits)} need "
            f"{tuple(logits[:-1])}"
        )
    if logits[-1] == 0:
        raise ValueError(f"logits: shape {tuple(logits)}; at least one class is needed")


def row_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int] | None:
    """(inner, outer_stride, inner_stride) of the rows of (…, V) with contiguous rows, or None.

    Row r starts at element (r // inner)·outer_stride + (r % inner)·inner_stride: enough for slices
    such as logits[:, :-1]. None where three or more leading dimensions are uneven.
    """
    merged: list[
        tuple[int, int]
    ] = []  # an outer dimension that steps over all of the inner is one with it
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    merged = [(1, 0)] * (2 - len(merged)) + merged
    (_, outer_stride), (inner, inner_stride) = merged
    return inner, outer_stride, inner_stride


def overlaps(shape: Sequence[int], strides: Sequence[int], itemsize: int = 1) -> bool:
    """Whether elements share memory, as in an expanded tensor; strides in units of which an element is
    `itemsize`."""
    extent = itemsize - 1  # of the elements that the dimensions of smaller stride reach
    for stride, size in sorted(zip(map(abs, strides), shape, strict=True)):
        if size > 1 and stride <= extent:
            return True
        extent += (size - 1) * stride
    return False


def segments(
    shape: Sequence[int],
    mask: Sequence[int] | None,
    cu_seqlens: Sequence[int] | None,
    name: str = "token_lp",
) -> tuple[list[int], int]:
    """(shape of the sums, length of a segment, for cu_seqlens their mean) from the three shapes."""
    if mask is not None and tuple(mask) != tuple(shape):
        raise ValueError(f"mask: shape {tuple(mask)}; allowed: {tuple(shape)}")
    if cu_seqlens is None:
        if len(shape) == 0:
            raise ValueError(f"{name}: a scalar; allowed: (…, tokens)")
        return list(shape[:-1]), shape[-1]
    if len(shape) != 1 or len(cu_seqlens) != 1 or cu_seqlens[0] < 1:
        raise ValueError(
            f"cu_seqlens: shape {tuple(cu_seqlens)} with {name} of shape {tuple(shape)}; "
            "allowed: (sequences + 1,) with (tokens,)"
        )
    count = cu_seqlens[0] - 1
    if count == 0 and shape[0] != 0:
        raise ValueError(f"cu_seqlens: one element, no sequence, with {shape[0]} tokens")
    return [count], shape[0] // max(count, 1)


class PreferenceTerms(NamedTuple):
    """What the names of a call say: the losses that are added up, and how."""

    names: tuple[str, ...]
    codes: tuple[int, ...]
    by_length: tuple[bool, ...]
    divergence: int
    nll_by_length: bool
    reduction: int
    unpaired: bool  # all losses are of an example at a time
    mixed: bool  # some are, others of pairs
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
    """The losses of a call, from a name or a tuple of names."""
    names = loss if isinstance(loss, tuple) else (loss,)
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
        normalize_lengths is None or bool(normalize_lengths), how, all(unpaired), mixed,
        any(named.nll for named in losses), any(by_length),
    )  # fmt: skip


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
    """What the kernels take (preference_options in csrc/bindings/ops.h), of numbers within their ranges;
    loss_weights a tuple or None."""
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


def distill_vocab(
    student: Sequence[int],
    teacher: Sequence[int],
    indices: Sequence[int] | None,
    mask: Sequence[int] | None,
    targets: Sequence[int] | None,
    vocab_size: Any,
) -> Any:
    """How many columns count, from the shapes of what distillation takes; raises what is wrong."""
    for name, shape in (("student_logits", student), ("teacher_logits", teacher)):
        if len(shape) == 0 or shape[-1] == 0:
            raise ValueError(f"{name}: shape {tuple(shape)}; allowed: (…, V), V at least 1")
    leading = tuple(student[:-1])
    if tuple(teacher[:-1]) != leading:
        raise ValueError(
            f"teacher_logits: shape {tuple(teacher)}; student_logits of shape {tuple(student)} need "
            f"{(*leading, '…')}"
        )
    for name, given in (("mask", mask), ("targets", targets)):
        if given is not None and tuple(given) != leading:
            raise ValueError(f"{name}: shape {tuple(given)}; allowed: {leading}")
    widest = student[-1]
    if indices is not None:
        if tuple(indices) != tuple(teacher):
            raise ValueError(
                f"teacher_indices: shape {tuple(indices)}; teacher_logits have {tuple(teacher)}"
            )
    else:
        if vocab_size is None and teacher[-1] != widest:
            raise ValueError(
                f"teacher_logits: {teacher[-1]} columns, student_logits {widest}; give vocab_size, the "
                "number of columns that both share"
            )
        widest = min(widest, teacher[-1])
    vocab = widest if vocab_size is None else vocab_size
    if not 1 <= vocab <= widest:
        raise ValueError(f"vocab_size: {vocab!r}; allowed: 1 to {widest}, or None")
    if indices is not None and not teacher[-1] <= vocab:
        raise ValueError(
            f"teacher_indices: shape {tuple(indices)}; at most {vocab} of the {vocab} columns"
        )
    return vocab


def check_vocab_size(value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"vocab_size: an int or None, not {value!r}")


def check_distill_numbers(beta: float, temperature: float, alpha: float, has_targets: bool) -> None:
    require(0.0 <= beta <= 1.0, "beta", beta, "0 to 1")
    check_temperature(temperature)
    require(0.0 <= alpha <= 1.0, "alpha", alpha, "0 to 1")
    if alpha < 1.0 and not has_targets:
        raise ValueError(f"alpha: {alpha!r}; below 1 it needs targets")


def distill_kind(kind: int, beta: float) -> int:
    """jsd with beta 0 is defined as the forward, with beta 1 as the reverse KL."""
    if kind == DISTILL_KINDS["jsd"] and beta in (0.0, 1.0):
        return DISTILL_KINDS["reverse_kl" if beta else "forward_kl"]
    return kind


def distill_numbers(
    beta: float, temperature: float, alpha: float, temperature_squared: bool
) -> tuple[float, float, float, float]:
    """(beta, temperature, weight of the divergence, weight of the cross-entropy), for the kernels."""
    factor = temperature * temperature if temperature_squared else 1.0
    return beta, temperature, alpha * factor, 1.0 - alpha


def policy_loss_named(loss: Any) -> PolicyLoss:
    if not isinstance(loss, str) or loss not in POLICY_LOSSES:
        choice("loss", loss, dict.fromkeys(POLICY_LOSSES, 0))
    return POLICY_LOSSES[loss]


def policy_importance(loss: str, importance: Any) -> str:
    """Whose ratio, of IMPORTANCE: the loss's own or what `importance` says."""
    own = policy_loss_named(loss).importance
    if importance is None:
        return own
    choice("importance", importance, {"token": 0, "sequence": 1})
    if own in ("sum", "whole"):
        if importance == "token":
            raise ValueError(f"importance: 'token'; loss={loss!r} is of the sequence's ratio")
        return own
    return "token" if importance == "token" else "mean"


def policy_reduction(
    loss: str, reduction: Any, sequences: int, length: int | None, max_length: Any, num_tokens: Any
) -> tuple[str, Any]:
    """(of POLICY_REDUCTIONS, divisor); `length` of the rows, None for packed sequences.

    The loss's own reduction (None), "none", "sum", "mean" (over tokens), or another loss's.
    """
    kind = policy_loss_named(loss).reduction
    if reduction is not None:
        own = {name: known.reduction for name, known in POLICY_LOSSES.items()}
        kinds = {"none": "none", "sum": "sum", "mean": "tokens", **own}
        choice("reduction", reduction, dict.fromkeys(kinds, 0))
        kind = kinds[reduction]
    for name, value in (("max_length", max_length), ("num_tokens", num_tokens)):
        if isinstance(value, (int, float)):
            require(0 <= value < inf, name, value, "0 and above, or None")
    if kind == "max_length":
        longest = length if max_length is None else max_length
        if longest is None:
            raise ValueError(
                f"max_length: None; reduction {reduction or loss!r} of packed sequences needs it"
            )
        return "divisor", longest * sequences
    if kind == "num_tokens":
        return ("tokens", 1.0) if num_tokens is None else ("divisor", num_tokens)
    return kind, 1.0


def policy_numbers(
    scalar: Callable[[str, Any], Any], loss: str, clip_low: Any, clip_high: Any, dual_clip: Any,
    delta: Any, kl_beta: Any, tau_pos: Any, tau_neg: Any, divisor: Any,
) -> list[Any]:  # fmt: skip
    """The numbers in the kernels' order, defaults filled in; `scalar` is the door's own."""
    named = {
        "clip_low": clip_low,
        "clip_high": policy_loss_named(loss).clip_high if clip_high is None else clip_high,
        "dual_clip": inf if dual_clip is None else dual_clip,
        "delta": inf if delta is None else delta,
        "kl_beta": kl_beta,
        "tau_pos": tau_pos,
        "tau_neg": tau_neg,
        "num_tokens, max_length": divisor,
    }
    return [scalar(name, value) for name, value in named.items()]


def policy_codes(
    loss: str, importance: str, kl: Any, kl_times_ratio: Any, reduction: str
) -> tuple[int, int, int, bool, int]:
    return (
        SURROGATES[policy_loss_named(loss).surrogate], IMPORTANCE[importance], choice("kl", kl, KL),
        bool(kl_times_ratio), POLICY_REDUCTIONS[reduction],
    )  # fmt: skip


def check_policy_numbers(
    has_ref: bool, clip_low: float, clip_high: float, dual_clip: float, delta: float, kl_beta: float,
    tau_pos: float, tau_neg: float, divisor: float,
) -> None:  # fmt: skip
    """The ranges of the numbers of a policy loss; dual_clip and delta are inf where there is none."""
    require(0.0 <= clip_low < inf, "clip_low", clip_low, "0 and above")
    require(0.0 <= clip_high < inf, "clip_high", clip_high, "0 and above")
    require(dual_clip > 1.0, "dual_clip", dual_clip, "above 1, or None")
    require(delta > 0.0, "delta", delta, "positive, or None")
    require(-inf < kl_beta < inf, "kl_beta", kl_beta, "finite")
    require(0.0 < tau_pos < inf, "tau_pos", tau_pos, "positive and finite")
    require(0.0 < tau_neg < inf, "tau_neg", tau_neg, "positive and finite")
    require(0.0 <= divisor < inf, "num_tokens, max_length", divisor, "0 and above")
    if kl_beta != 0.0 and not has_ref:
        raise ValueError(f"kl_beta: {kl_beta!r}; it needs ref_logprobs")


def advantages_by_token(
    shape: Sequence[int], advantages: Sequence[int], packed: int | None, name: str = "advantages"
) -> bool:
    """Whether there is one a token, rather than one a sequence; `packed`: the number of sequences."""
    shape, given = tuple(shape), tuple(advantages)
    if given == shape:
        return True
    sequences = shape[:-1] if packed is None else (packed,)
    if given not in (sequences, (*sequences, 1)):
        raise ValueError(
            f"{name}: shape {given}; allowed: {shape}, {sequences} or {(*sequences, 1)}"
        )
    return False


def check_group_size(count: int, group_size: Any) -> None:
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size: an int, not {group_size!r}")
    require(group_size >= 1, "group_size", group_size, "1 and above")
    if count % group_size:
        raise ValueError(f"group_size: {group_size}; {count} rewards are no multiple of it")


ADVANTAGE_SCALES = {"none": 0, "group": 1, "batch": 2}
BASELINES = {"mean": 0, "leave_one_out": 1}


def check_gae(rewards: Sequence[int], values: Sequence[int], mask: Sequence[int] | None) -> bool:
    """The shapes of rewards (…, T), values (…, T) or (…, T + 1), mask (…, T); whether the latter."""
    if len(rewards) == 0:
        raise ValueError("rewards: a scalar; allowed: (…, T)")
    longer = (*rewards[:-1], rewards[-1] + 1)
    if tuple(values) not in (tuple(rewards), longer):
        raise ValueError(
            f"values: shape {tuple(values)}; allowed: {tuple(rewards)} or, with the value after the "
            f"end, {longer}"
        )
    if mask is not None and tuple(mask) != tuple(rewards):
        raise ValueError(f"mask: shape {tuple(mask)}; allowed: {tuple(rewards)}")
    return tuple(values) == longer


def check_discounts(gamma: Any, lam: Any) -> None:
    require(0.0 <= gamma <= 1.0, "gamma", gamma, "0 to 1")
    require(0.0 <= lam <= 1.0, "lam", lam, "0 to 1")


def check_lora_shapes(weight: Sequence[int], lora_a: Sequence[int], lora_b: Sequence[int]) -> None:
    """W (out, in), A (r, in) and B (out, r), r at least 1."""
    if len(weight) != 2:
        raise ValueError(f"weight: shape {tuple(weight)}; allowed: (out, in)")
    for name, shape in (("lora_a", lora_a), ("lora_b", lora_b)):
        if len(shape) != 2:
            raise ValueError(f"{name}: shape {tuple(shape)}; allowed: two dimensions")
    rank = lora_a[0]
    if rank == 0:
        raise ValueError(f"lora_a: shape {tuple(lora_a)}; the rank is at least 1")
    if lora_a[1] != weight[1]:
        raise ValueError(f"lora_a: shape {tuple(lora_a)}; allowed: (r, {weight[1]})")
    if tuple(lora_b) != (weight[0], rank):
        raise ValueError(f"lora_b: shape {tuple(lora_b)}; allowed: ({weight[0]}, {rank})")


def check_segmented_shapes(
    weight: Sequence[int], lora_a: Sequence[int], lora_b: Sequence[int]
) -> None:
    """W (out, in), A (adapters, r, in) and B (adapters, out, r), adapters and r at least 1."""
    for name, shape in (("lora_a", lora_a), ("lora_b", lora_b)):
        if len(shape) != 3 or shape[0] == 0:
            raise ValueError(
                f"{name}: shape {tuple(shape)}; allowed: three dimensions, of which the first is the "
                "adapters, at least one"
            )
    if lora_a[0] != lora_b[0]:
        raise ValueError(f"lora_b: shape {tuple(lora_b)}; lora_a has {lora_a[0]} adapters")
    check_lora_shapes(weight, lora_a[1:], lora_b[1:])


def check_dropout(p: Any) -> None:
    require(0.0 <= p <= 1.0, "dropout", p, "0 to 1")


def dropout_numbers(p: float) -> tuple[int, float]:
    """(threshold of the 32-bit words, what survives is multiplied by), as csrc/ops/lora.h has them."""
    return round(p * 2**32), 0.0 if p == 1 else 1 / (1 - p)


# csrc/ops/prune.h
PRUNE_SCOPES = {"tensor": 0, "row": 1, "group": 2}
PRUNE_METHODS = {"magnitude": "tensor", "wanda": "row"}  # the scope that is each one's own


def prune_workspace(rows: int, columns: int, scope: int) -> int:
    """Bytes of scratch that prune takes on a GPU, for one selection after another: csrc/ops/prune.h."""
    count = rows * columns if scope == PRUNE_SCOPES["tensor"] else columns
    return 8 * (4 + 2048 + -(-count // 4096))


def prune_scope(
    sparsity: Any, n: Any, m: Any, scope: Any, method: Any, activation_norm: Any
) -> tuple[int, int, int]:
    """(the scope's number, n, m) of pruning; n and m are 0 where a sparsity is given."""
    if not isinstance(method, str) or method not in PRUNE_METHODS:
        choice("method", method, dict.fromkeys(PRUNE_METHODS, 0))
    if method == "wanda" and activation_norm is None:
        raise ValueError("activation_norm: None; method='wanda' needs it")
    if method == "magnitude" and activation_norm is not None:
        raise ValueError("activation_norm: only of use with method='wanda'")
    if n is None and m is None:
        if sparsity is None:
            raise ValueError("sparsity: None; give sparsity, or n and m")
        if scope is None:
            scope = PRUNE_METHODS[method]
        return choice("scope", scope, {"tensor": 0, "row": 1}), 0, 0
    if sparsity is not None:
        raise ValueError("sparsity: given together with n or m; give sparsity, or n and m")
    for name, value in (("n", n), ("m", m)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: an int, not {value!r}; n and m go together")
    if scope is not None:
        raise ValueError(f"scope: {scope!r}; with n and m it is the m neighbours: None")
    return PRUNE_SCOPES["group"], n, m


def prune_groups(
    shape: Sequence[int], count: int, sparsity: float, n: int, m: int, scope: int
) -> tuple[int, int]:
    """(elements among which one selects, how many of them go) from the shape of the weight."""
    columns = shape[-1] if len(shape) else 1
    if scope == PRUNE_SCOPES["group"]:
        require(m >= 1, "m", m, "1 and above")
        require(0 <= n <= m, "n", n, f"0 to m, {m}")
        if columns % m:
            raise ValueError(f"m: {m}; rows of {columns} elements are no multiple of it")
        return m, m - n
    require(scope in (0, 1), "scope", scope, "0 to 2")
    require(0.0 <= sparsity <= 1.0, "sparsity", sparsity, "0 to 1")
    group = count if scope == PRUNE_SCOPES["tensor"] else columns
    return group, min(floor(sparsity * group + 1e-9), group)


def check_activation_norm(shape: Sequence[int], norm: Sequence[int]) -> None:
    """Of weight (…, in) and ‖x‖₂ (in,)."""
    columns = shape[-1] if len(shape) else 1
    if tuple(norm) != (columns,):
        raise ValueError(f"activation_norm: shape {tuple(norm)}; allowed: ({columns},)")
