"""Preference losses in NumPy for the tests: inputs, the reference, how to compare with it. Needs no torch."""

from __future__ import annotations

import numpy as np
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from numpy_cases import IGNORE, TYPES
from tolerances import check

DIVERGING = [name for name, named in LOSSES.items() if named.divergence]
NUMBERS = {
    "gamma": 0.8, "sft_weight": 0.7, "delta": 0.3, "tau": 0.4, "desirable_weight": 1.5,
    "undesirable_weight": 0.6,
}  # fmt: skip


def smoothing(loss, eps):
    """What exo_pair and robust allow; the KL of exo_pair does not all but vanish in the tests' pairs."""
    return eps + 0.02 if loss == "exo_pair" else min(eps, 0.4)


def vectors(pairs, dtype="float32", seed=0, scale=30.0):
    rng = np.random.default_rng(seed)
    lp = [(-scale * rng.random(pairs)).astype(TYPES[dtype]) for _ in range(4)]
    return lp, [rng.integers(1, 50, pairs) for _ in range(2)]


def check_loss(ours, truth, eager=None):
    """What was added up sets a scalar's scale."""
    other = truth.loss if eager is None else eager
    if np.ndim(ours):
        check("loss", ours, other, truth.loss, terms=truth.loss_terms)
    else:
        scale = truth.terms
        check("loss", np.array([ours, scale]), [other, scale], [truth.loss, scale], ours.dtype)


def batch(pairs, tokens, vocab, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((2 * pairs, tokens, vocab))).astype(TYPES[dtype])
    targets = rng.integers(0, vocab, (2 * pairs, tokens))
    for b in range(2 * pairs):
        targets[b, : b % 3] = IGNORE  # prompts of different lengths
        if b % 2:
            targets[b, tokens - 1 - b % 2 :] = IGNORE  # padding
    return logits, targets, -10 * rng.random(2 * pairs)
