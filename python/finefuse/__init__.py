"""Fused kernels for fine-tuning language models, fast on every machine that people have.

    import finefuse as ff
    lp = ff.token_logprobs(logits, targets)
    out = ff.preference_loss_from_logits(logits, targets, ref_logprobs=ref, beta=0.1)
    out.loss.backward()

Importing registers every `torch.ops.finefuse.*`. Without torch the package still imports; its torch
names then raise an ImportError that says what to install.
"""

import os as _os
import warnings as _warnings
from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec
from typing import Any

__version__ = _version("finefuse")

__all__ = [
    "CodebookTensor",
    "PolicyOutput",
    "PreferenceOutput",
    "backend",
    "bandit",
    "check",
    "codebook_linear",
    "cpo_loss",
    "cross_entropy",
    "dequantize",
    "distill_loss",
    "dora_norm",
    "dpo_loss",
    "gae",
    "group_advantages",
    "info",
    "ipo_loss",
    "kto_loss",
    "learn_codebook",
    "linear_cross_entropy",
    "linear_distill_loss",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_token_logprobs",
    "lora_linear",
    "lora_linear_group",
    "lora_linear_segmented",
    "merge_lora",
    "nn",
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
    "simpo_loss",
    "spin_loss",
    "token_logprobs",
    "unmerge_lora",
    "value_loss",
]

_ISA = _os.environ.get("FINEFUSE_ISA")
if _ISA is not None and _ISA not in ("baseline", "avx2", "avx512", "avx512bf16"):
    _warnings.warn(
        f"FINEFUSE_ISA={_ISA!r} is ignored; allowed: baseline, avx2, avx512, avx512bf16",
        stacklevel=2,
    )

if _find_spec("torch") is not None:
    # torch first: whichever OpenMP runtime loads first serves both.
    import torch as _torch  # noqa: F401

    from . import bandit, nn
    from ._backend import backend, check, info
    from .codebook import (
        CodebookTensor,
        codebook_linear,
        dequantize,
        learn_codebook,
        quantize,
    )
    from .distill import distill_loss
    from .dora import dora_norm
    from .linear import (
        linear_cross_entropy,
        linear_distill_loss,
        linear_policy_loss,
        linear_preference_loss,
        linear_token_logprobs,
    )
    from .logprobs import cross_entropy, sequence_logprobs, token_logprobs
    from .lora import lora_linear, lora_linear_group, merge_lora, unmerge_lora
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
else:
    from . import bandit
    from ._backend import info

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(
                f"finefuse.{name} works on torch tensors and torch is not installed: "
                "pip install 'torch>=2.6'"
            )
        raise AttributeError(f"module 'finefuse' has no attribute {name!r}")
