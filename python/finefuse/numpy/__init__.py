"""finefuse on NumPy arrays: the same kernels, names, arguments and errors, without torch.

    import finefuse.numpy as ffn
    lp = ffn.token_logprobs(logits, targets)
    loss, gradient = ffn.cross_entropy(logits, targets, return_grad=True)
    q = ffn.quantize(weight, "nf4")
    y = ffn.codebook_linear(x, q)

Every function takes any strides, byte order and alignment (what a kernel cannot walk is copied), float32,
float16, float64 and `ml_dtypes.bfloat16`, and integers of 32 or 64 bits (narrower ones are
widened). Losses are float32, float64 for float64; results without dimensions are NumPy scalars.
`return_grad=True` returns (value, gradient). The GIL is released while a kernel runs.
"""

from . import bandit
from ._array import get_num_threads, set_num_threads
from .codebook import (
    CodebookArray,
    codebook_linear,
    dequantize,
    learn_codebook,
    quantize,
)
from .distill import distill_loss
from .dora import dora_norm
from .logprobs import cross_entropy, sequence_logprobs, token_logprobs
from .lora import lora_linear
from .policy import (
    PolicyOutput,
    gae,
    group_advantages,
    policy_loss,
    policy_loss_from_logits,
    value_loss,
)
from .preference import (
    PreferenceOutput,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    preference_loss,
    preference_loss_from_logits,
    reward_loss,
    simpo_loss,
    spin_loss,
)
from .prune import prune_, prune_mask
from .segmented import lora_linear_segmented

__all__ = [
    "CodebookArray",
    "PolicyOutput",
    "PreferenceOutput",
    "bandit",
    "codebook_linear",
    "cpo_loss",
    "cross_entropy",
    "dequantize",
    "distill_loss",
    "dora_norm",
    "dpo_loss",
    "gae",
    "get_num_threads",
    "group_advantages",
    "ipo_loss",
    "kto_loss",
    "learn_codebook",
    "lora_linear",
    "lora_linear_segmented",
    "orpo_loss",
    "policy_loss",
    "policy_loss_from_logits",
    "preference_loss",
    "preference_loss_from_logits",
    "prune_",
    "prune_mask",
    "quantize",
    "reward_loss",
    "sequence_logprobs",
    "set_num_threads",
    "simpo_loss",
    "spin_loss",
    "token_logprobs",
    "value_loss",
]
