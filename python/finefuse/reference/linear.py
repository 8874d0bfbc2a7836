"""Losses from hidden states in float64: the logits in full, then SPEC sections 3 to 6.

Hidden states are (N, H), a weight (V, H), a bias (V,). Rows that do not count are not multiplied: what
stands there reaches nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .distill import distill_loss as distill_from_logits
from .logprobs import cross_entropy as cross_entropy_from_logits
from .logprobs import token_logprobs as logprobs_from_logits
from .logprobs import token_logprobs_gradient
from .policy import Output as PolicyOutput
from .policy import policy_loss as policy_from_logprobs
from .preference import Output as PreferenceOutput
from .preference import preference_loss as preference_from_logprobs

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Head(NamedTuple):
    """What makes logits of hidden states."""

    weight: Array
    bias: Array | None = None
    softcap: float | None = None


class Gradients(tuple[Array, Array, Array]):
    """Of hidden, weight and bias."""

    terms: list[float]
    """The largest sum of absolute terms in each: the scale of its rounding errors."""

    @property
    def hidden(self) -> Array:
        return self[0]

    @property
    def weight(self) -> Array:
        return self[1]

    @property
    def bias(self) -> Array:
        return self[2]


def logits(hidden: Array, head: Head, keep: Mask) -> Array:
    """z = x Wᵀ + b, with a softcap c·tanh(z/c); 0 where a row does not count."""
    z = np.zeros((len(hidden), len(head.weight)))
    z[keep] = hidden[keep] @ head.weight.T
    if head.bias is not None:
        z[keep] += head.bias
    return z if head.softcap is None else head.softcap * np.tanh(z / head.softcap)


def gradients(dz: Array, z: Array, hidden: Array, head: Head, keep: Mask) -> Gradients:
    """Those of hidden, weight and bias from that of the logits z."""
    if head.softcap is not None:
        dz = dz * (1 - (z / head.softcap) ** 2)
    of_hidden = np.zeros(hidden.shape)
    of_hidden[keep] = dz[keep] @ head.weight
    found = Gradients((of_hidden, dz[keep].T @ hidden[keep], dz[keep].sum(0)))
    d, x = np.abs(dz[keep]), np.abs(hidden[keep])
    sums = d @ np.abs(head.weight), d.T @ x, d.sum(0)
    found.terms = [float(total.max(initial=0.0)) for total in sums]
    return found


# ---- token log-probabilities, cross-entropy ----------------------------------------------------


def token_logprobs(
    hidden: Array, head: Head, targets: Index, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Array, Array, Array]:
    """(lp, entropy, lse)."""
    z = logits(hidden, head, targets != ignore_index)
    return logprobs_from_logits(z, targets, temperature, ignore_index)


def token_logprobs_gradients(
    hidden: Array, head: Head, targets: Index, g: Array, h: Array | None = None, l: Array | None = None,
    temperature: float = 1.0, ignore_index: int = -100,
) -> Gradients:  # fmt: skip
    """Upstream g, h, l of lp, entropy, lse."""
    keep = targets != ignore_index
    z = logits(hidden, head, keep)
    dz = token_logprobs_gradient(z, targets, g, h, l, temperature, ignore_index)
    return gradients(dz, z, hidden, head, keep)


def cross_entropy(
    hidden: Array, head: Head, targets: Index, *, temperature: float = 1.0, label_smoothing: float = 0.0,
    ignore_index: int = -100, reduction: str = "mean", upstream: Array | float = 1.0,
) -> tuple[Array, Gradients]:  # fmt: skip
    """(loss, gradients of Σ upstream·loss)."""
    keep = targets != ignore_index
    z = logits(hidden, head, keep)
    loss, dz = cross_entropy_from_logits(
        z / temperature, targets, label_smoothing, ignore_index, reduction
    )
    dz = np.reshape(upstream, (-1, 1)) * dz / temperature
    return np.asarray(loss), gradients(dz, z, hidden, head, keep)


# ---- policy, preference, distillation ----------------------------------------------------------


def policy_loss(
    hidden: Array, head: Head, actions: Index, advantages: Array, *, temperature: float = 1.0,
    entropy_coef: float = 0.0, mask: Mask | None = None, ignore_index: int = -100,
    upstream: Array | None = None, **options: Any,
) -> tuple[Array, float, Gradients, PolicyOutput]:  # fmt: skip
    """(loss, mean entropy, gradients, the output of the log-probabilities' loss) of actions (B, T) or (N,).

    `terms` of that output have the entropy's added. upstream: of reduction "none".
    """
    shape = actions.shape
    keep = actions != ignore_index
    keep = keep if mask is None else keep & (np.asarray(mask) != 0)
    y, live = np.where(keep, actions, ignore_index).reshape(-1), keep.reshape(-1)
    z = logits(hidden, head, live)
    lp, entropy, _ = logprobs_from_logits(z, y, temperature, ignore_index)
    out = policy_from_logprobs(
        lp.reshape(shape), advantages, mask=keep, upstream=upstream, **options
    )
    count = max(int(live.sum()), 1)
    none = options.get("reduction") == "none"
    g = np.ones(len(y)) if upstream is None else np.reshape(upstream, -1)
    h = -entropy_coef * (g if none else np.full(len(y), 1 / count))
    dz = token_logprobs_gradient(
        z, y, out.gradient.reshape(-1), h, temperature=temperature, ignore_index=ignore_index
    )
    mean = float(entropy.sum() / count)
    bonus = entropy_coef * (entropy.reshape(shape) if none else mean)
    out = out._replace(terms=out.terms + abs(entropy_coef) * mean)
    return out.loss - bonus, mean, gradients(dz, z, hidden, head, live), out


def _tail_weights(keep: Mask, ld_alpha: float) -> Array:
    """1 of each token up to the length of the pair's shorter answer, ld_alpha after it."""
    lengths = keep.sum(-1)
    half = len(keep) // 2
    shorter = np.tile(np.minimum(lengths[:half], lengths[half:]), 2)
    return np.where(keep.cumsum(-1) > shorter[:, None], ld_alpha, 1.0)


def preference_loss(
    hidden: Array, head: Head, targets: Index, *, temperature: float = 1.0, ref_hidden: Array | None = None,
    ref_head: Head | None = None, ref_logprobs: Array | None = None, ld_alpha: float = 1.0,
    ignore_index: int = -100, **options: Any,
) -> tuple[PreferenceOutput, Gradients]:  # fmt: skip
    """(the output of the sequences' loss, gradients) of targets (2·pairs, T): chosen, then rejected."""
    shape = targets.shape
    keep, half = targets != ignore_index, len(targets) // 2
    y, live = targets.reshape(-1), keep.reshape(-1)
    lengths = np.maximum(keep.sum(-1), 1)
    tail = _tail_weights(keep, ld_alpha)
    z = logits(hidden, head, live)
    lp = logprobs_from_logits(z, y, temperature, ignore_index)[0].reshape(shape)
    if ref_hidden is not None:
        assert ref_head is not None
        ref = token_logprobs(ref_hidden, ref_head, y, temperature, ignore_index)[0]
        ref_logprobs = (ref.reshape(shape) * tail).sum(-1)
    ref_logprobs = np.zeros(len(targets)) if ref_logprobs is None else ref_logprobs
    own_nll = ld_alpha != 1 and "chosen_nll" not in options
    # with the NLL's own convention: all tokens in full
    by_length = options.get("normalize_lengths") is not False
    tokens = lengths[:half].sum() if by_length else half
    if own_nll:
        options["chosen_nll"] = -lp[:half].sum() / max(tokens, 1)
    s = (lp * tail).sum(-1)
    out = preference_from_logprobs(
        s[:half], s[half:], ref_logprobs[:half], ref_logprobs[half:], chosen_lengths=lengths[:half],
        rejected_lengths=lengths[half:], **options,
    )  # fmt: skip
    g = np.concatenate([out.d_chosen, out.d_rejected])[:, None] * tail
    if own_nll:
        g[:half] -= out.d_nll / max(tokens, 1)
    dz = token_logprobs_gradient(
        z, y, g.reshape(-1), temperature=temperature, ignore_index=ignore_index
    )
    return out, gradients(dz, z, hidden, head, live)


def distill_loss(
    student_hidden: Array, student: Head, teacher_hidden: Array, teacher: Head, *, mask: Mask | None = None,
    targets: Index | None = None, ignore_index: int = -100, upstream: Array | float = 1.0, **options: Any,
) -> tuple[Array, Gradients]:  # fmt: skip
    """(loss, gradients of the student's of Σ upstream·loss)."""
    keep = np.ones(len(student_hidden), bool) if mask is None else np.asarray(mask) != 0
    if targets is not None:
        keep = keep & (targets != ignore_index)
    z = logits(student_hidden, student, keep)
    loss, dz = distill_from_logits(
        z, logits(teacher_hidden, teacher, keep), mask=keep, targets=targets, ignore_index=ignore_index,
        **options,
    )  # fmt: skip
    dz = np.reshape(upstream, (-1, 1)) * dz
    return np.asarray(loss), gradients(dz, z, student_hidden, student, keep)
