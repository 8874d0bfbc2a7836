"""Policy gradients: PPO, GRPO and GSPO from logits; the losses from log-probabilities; values, GAE.

Bytes at least, of the logits: one pass reads them and writes the gradient, 2 x their bytes, which all
candidates are measured by, those too that go over them twice or more: GSPO, whose ratio needs all tokens of
a sequence first, reads them once more, 3 x. The cases from vectors lie in a cache and count calls.

finefuse also returns what is logged (clipped fractions, approximate KL, entropy); the peers compute their
loss alone. Liger has no entropy bonus: it takes part in GRPO. The loop of GAE is not compiled: 32 of its
steps take Inductor minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor

from . import peers
from .measure import Inputs, Row, Size, compare, compare_small, forward, gradient, name_of
from .peers import LIGER_TRITON, OURS, TORCH, TRL, Candidates, Loss

# sequences, tokens, vocabulary, type
PPO = {
    "cpu": (
        (8, 256, 32000, torch.float32),
        (8, 256, 32000, torch.bfloat16),
        (8, 128, 128256, torch.bfloat16),
    ),
    "cuda": (
        (8, 1024, 32000, torch.bfloat16),
        (8, 1024, 128256, torch.bfloat16),
        (8, 1024, 32000, torch.float32),
    ),
}
GRPO = {
    "cpu": (8, 256, 32000, torch.bfloat16),
    "cuda": (8, 1024, 128256, torch.bfloat16),
}


def ppo(inplace: bool = False) -> Loss:
    def loss(logits: Tensor, actions: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        return ff.policy_loss_from_logits(
            logits, actions, advantages=advantages, old_logprobs=old, entropy_coef=0.01, inplace=inplace
        ).loss  # fmt: skip

    return loss


def grpo(inplace: bool = False, **options: Any) -> Loss:
    def loss(
        logits: Tensor, actions: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        given: dict[str, Any] = {"loss": "grpo", "ref_logprobs": ref, "kl_beta": 0.04, **options}
        return ff.policy_loss_from_logits(
            logits, actions, advantages=advantages, old_logprobs=old, mask=mask, inplace=inplace, **given
        ).loss  # fmt: skip

    return loss


gspo = functools.partial(grpo, loss="gspo", ref_logprobs=None, kl_beta=0.0)


def old_and_ref(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Of a policy some steps ago, ratios on both sides of the clip, and of the reference.

    No ratio is near 0.8 or 1.2, where the rounding of a bfloat16 log-probability would decide the side and
    with it the whole gradient of a token.
    """
    x = 0.05 * (2 * torch.rand_like(logprobs) - 1)
    x += 0.35 * torch.randint_like(logprobs, -1, 2)
    return logprobs - x, logprobs + 0.1 * torch.randn_like(logprobs)


def draw(
    device: str, batch: int, tokens: int, vocab: int, dtype: torch.dtype, sequences: bool
) -> Inputs:
    """logits, actions, old, advantages by token; or by sequence, with the reference and a mask."""
    logits = torch.randn(batch, tokens, vocab, dtype=dtype, device=device).mul_(3)
    actions = torch.randint(0, vocab, (batch, tokens), device=device)
    old, ref = old_and_ref(ff.token_logprobs(logits, actions))
    logits.requires_grad_()
    if not sequences:
        return logits, actions, old, torch.randn_like(old)
    mask = torch.ones_like(actions, dtype=torch.bool)
    mask[:, -1] = False  # the last logits of a sequence predict nothing
    return logits, actions, old, ref, torch.randn(batch, device=device), mask


def from_logits(
    name: str,
    ours: Callable[..., Loss],
    plain: Loss,
    others: Candidates,
    passes: int,
    device: str,
    batch: int,
    tokens: int,
    vocab: int,
    dtype: torch.dtype,
) -> list[Row]:
    runs = peers.from_logits(ours, plain, others, dtype)
    sequences = name != "PPO + entropy"
    inputs = draw(device, batch, tokens, vocab, dtype, sequences)
    steps = {who: (needs, gradient(loss)) for who, (needs, loss) in runs.items()}
    return compare(
        f"{name} {batch}x{tokens}x{vocab} {name_of(dtype)}, forward + backward",
        peers.load(steps, device),
        inputs,
        truth=gradient(plain),
        samples=[draw(device, 2, 8, vocab, dtype, sequences) for _ in range(4)],
        moved=passes * inputs[0].nbytes,
    )


def calls(device: str) -> list[Row]:
    """PPO from logits, where calling is all."""
    plain = peers.ppo(peers.scores_eager)
    runs = {
        "finefuse": (OURS, gradient(ppo())),
        "torch.compile": (TORCH, gradient(peers.compiled(plain))),
        "eager": (TORCH, gradient(plain)),
    }
    inputs = draw(device, 4, 8, 32, torch.float32, sequences=False)
    return compare_small(
        "PPO + entropy, a call on 4x8x32, forward + backward",
        peers.load(runs, device), inputs, gradient(plain), calls=100,
    )  # fmt: skip


def from_logprobs(device: str, batch: int, tokens: int) -> list[Row]:
    def ours(lp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return ff.policy_loss(
            lp, advantages=advantages, old_logprobs=old, loss="grpo", mask=mask, ref_logprobs=ref,
            kl_beta=0.04,
        ).loss  # fmt: skip

    runs = {
        "finefuse": (OURS, gradient(ours)),
        "torch.compile": (TORCH, gradient(peers.compiled(peers.grpo_from_logprobs))),
        "eager, TRL's formula": (TORCH, gradient(peers.grpo_from_logprobs)),
    }
    logprobs = -5 * torch.rand(batch, tokens, device=device)
    old, ref = old_and_ref(logprobs)
    mask = torch.rand_like(logprobs) < 0.9
    inputs = (logprobs.requires_grad_(), old, ref, torch.randn(batch, device=device), mask)
    return compare_small(
        f"GRPO + KL from log-probabilities {batch}x{tokens}, forward + backward",
        peers.load(runs, device), inputs, gradient(peers.grpo_from_logprobs), calls=50,
    )  # fmt: skip


def values(device: str, batch: int, tokens: int) -> list[Row]:
    def ours(v: Tensor, returns: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        return ff.value_loss(v, returns, old, clip=0.2, mask=mask)

    runs = {
        "finefuse": (OURS, gradient(ours)),
        "torch.compile": (TORCH, gradient(peers.compiled(peers.value_loss))),
        "eager, TRL's formula": (TORCH, gradient(peers.value_loss)),
    }
    v, returns = (torch.randn(batch, tokens, device=device) for _ in range(2))
    old = v + 0.2 * torch.randn_like(v)
    inputs = (v.requires_grad_(), returns, old, torch.rand_like(v) < 0.9)
    return compare_small(
        f"value_loss {batch}x{tokens}, forward + backward",
        peers.load(runs, device), inputs, gradient(peers.value_loss), calls=50,
    )  # fmt: skip


def advantages(device: str, batch: int, tokens: int) -> list[Row]:
    def ours(rewards: Tensor, v: Tensor) -> Tensor:
        return ff.gae(rewards, v, gamma=0.99, lam=0.95)[0]

    runs = {"finefuse": (OURS, forward(ours)), "TRL's loop": (TORCH, forward(peers.gae))}
    inputs = tuple(torch.randn(batch, tokens, device=device) for _ in range(2))
    return compare_small(
        f"gae {batch}x{tokens}", peers.load(runs, device), inputs, forward(peers.gae), calls=4
    )


def run(device: str, size: Size) -> Iterator[list[Row]]:
    few = {"quick": (2, 32), "standard": (2, 256), "full": None}[size]
    others: Candidates = {
        "TRL": (TRL, peers.ppo(peers.scores_trl)),
        "Categorical": (TORCH, peers.ppo(peers.scores_categorical)),
    }
    plain = peers.ppo(peers.scores_eager)
    for shape in PPO[device]:
        yield from_logits(
            "PPO + entropy", ppo, plain, others, 2, device, *(few or shape[:2]), *shape[2:]
        )
        if size == "standard" and shape is PPO[device][1]:
            return
    shape = GRPO[device]
    shape = (*(few or shape[:2]), *shape[2:])
    others = {
        "TRL": (TRL, peers.grpo(peers.logprobs_trl)),
        "Liger in place": (LIGER_TRITON, peers.grpo_liger),
    }
    plain = peers.grpo(peers.logprobs_eager)
    yield from_logits("GRPO + KL", grpo, plain, others, 2, device, *shape)
    others = {"TRL": (TRL, peers.grpo(peers.logprobs_trl, sequence=True))}
    plain = peers.grpo(peers.logprobs_eager, sequence=True)
    yield from_logits("GSPO", gspo, plain, others, 3, device, *shape)
    yield calls(device)
    for batch, tokens in ((4, 32), (8, 1024), (64, 2048)):
        yield from_logprobs(device, batch, tokens)
    yield values(device, 64, 2048)
    yield advantages(device, 64, 2048)
