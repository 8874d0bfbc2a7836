"""Losses from hidden states: log-probabilities, policy, preference and distillation losses that never
build the logits. Each is its family's loss (same options, same numbers) with the language model's head in
front of it; one chunk driver serves all, `_linear_loss.py`."""

from ._linear_distill import linear_distill_loss
from ._linear_logprobs import linear_cross_entropy, linear_token_logprobs
from ._linear_policy import linear_policy_loss
from ._linear_preference import linear_preference_loss

__all__ = [
    "linear_cross_entropy",
    "linear_distill_loss",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_token_logprobs",
]
