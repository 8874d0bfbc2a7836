"""Policy losses in NumPy for the tests: inputs, the reference, how to compare with it. Needs no torch."""

from __future__ import annotations

import math

import numpy as np
from finefuse._args.policy import POLICY_LOSSES as LOSSES
from finefuse.reference import logprobs as reference
from finefuse.reference import policy as reference_policy
from numpy_cases import IGNORE, TYPES, wide, wide_of
from tolerances import check

# Those whose ratio is a sequence's: two passes over logits.
BY_SEQUENCE = [name for name, loss in LOSSES.items() if loss.importance != "token"]


def tokens(shape=(4, 7), dtype="float32", *, seed=0, spread=0.4):
    """(logprobs, old, ref, weights, advantages a sequence); both sides of every clip are there."""
    rng = np.random.default_rng(seed)
    lp = -3 * rng.random(shape)
    old, ref = lp + spread * rng.standard_normal((2, *shape))
    weights = rng.random(shape) * (rng.random(shape) > 0.2)
    vectors = (lp, old, ref, weights, rng.standard_normal(shape[:-1]))
    return tuple(v.astype(TYPES[dtype]) for v in vectors)


def mask_of(shape, seed=9):
    mask = np.random.default_rng(seed).random(shape) > 0.3
    mask.reshape(-1, shape[-1])[1] = False  # a sequence without a token
    return mask


def truth_of(lp, advantages, **options):
    """The reference, and the sum of the absolute terms of its loss."""
    arrays = ("old_logprobs", "ref_logprobs", "weights")
    options = {k: wide(v) if k in arrays else v for k, v in options.items()}
    weights = options.get("weights")
    if weights is not None and weights.shape != lp.shape:
        options["weights"] = np.broadcast_to(weights.reshape(*lp.shape[:-1], 1), lp.shape)
    lp, advantages = wide(lp), wide(advantages)
    out = reference_policy.policy_loss(lp, advantages, **options)
    each = reference_policy.policy_loss(lp, advantages, **{**options, "reduction": "none"}).loss
    how = ("mask", "cu_seqlens", "max_length", "num_tokens")
    share = -reference_policy.policy_loss(
        -np.ones(lp.shape), np.ones(lp.shape), loss="reinforce",
        reduction=options.get("reduction") or options.get("loss", "ppo"),
        **{k: options[k] for k in how if k in options},
    ).gradient  # fmt: skip
    return out, float(np.sum(share * np.abs(each)))


def check_scalar(name, ours, eager, truth, terms):
    """The rule for a scalar: what was added up sets the scale."""
    array = np.array([ours, terms])
    check(name, array, [eager, terms], [truth, terms], np.asarray(ours).dtype)


def check_metrics(out, truth, eager=None):
    eager = truth if eager is None else eager
    for name in ("clip_fraction_low", "clip_fraction_high", "approx_kl"):
        ours = getattr(out, name)
        check(name, ours, getattr(eager, name), np.asarray(getattr(truth, name)))


def batch(shape=(3, 5, 33), dtype="float32", seed=0):
    """(logits, actions, what policy_loss takes beside); some actions are ignored."""
    rng = np.random.default_rng(seed)
    logits = (2 * rng.standard_normal(shape)).astype(TYPES[dtype])
    actions = rng.integers(0, shape[-1], shape[:-1])
    actions[..., 2:3] = IGNORE
    lp = -math.log(shape[-1]) + rng.standard_normal(shape[:-1])
    lp = reference.token_logprobs(logits.reshape(-1, shape[-1]), actions.reshape(-1))[0]
    old = lp.reshape(shape[:-1]) + 0.3 * rng.standard_normal(shape[:-1])
    ref = old + 0.3 * rng.standard_normal(shape[:-1])
    A = 1 + rng.standard_normal(shape[:-2])
    vectors = {"old_logprobs": old, "ref_logprobs": ref, "advantages": A}
    return logits, actions, {k: v.astype(wide_of(dtype)) for k, v in vectors.items()}
