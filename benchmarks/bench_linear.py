"""From hidden states: cross-entropy, token log-probabilities, policy, preference and distillation losses on
top of a linear layer whose logits need not exist.

The least work is the layer's products: 2·M·H·V operations each for the logits of M tokens, for the gradient
of the hidden states (H) and for that of the weight (V rows); with a teacher 2·M·H·V more, for its logits.
They are measured alone in the same run, each by the library and in the order of its operands that are the
fastest here. Who computes the logits again in the backward does a third more.

finefuse also returns what is logged; the peers compute their loss alone. Liger's DPO takes hidden states of
the reference or none: the log-probabilities of all references are 0 here, which is the same work. Its GRPO
has no entropy bonus, its fused cross-entropy is a Triton kernel, its distillation takes the gradient of a
frozen weight too. TRL's losses are made of its chunked log-probabilities, as its trainers make them.

Without instructions for bfloat16 torch's products of it take minutes: whoever takes them is left out, and all
take part in a small case. There the bare products are those of float32, without conversions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import finefuse as ff
import torch
from torch import Tensor
from torch.nn import functional

from . import peers, roofline
from .bench_policy import old_and_ref
from .measure import Inputs, Row, Size, compare_products, name_of, phases
from .peers import LIGER, LIGER_TRITON, OURS, TORCH, TRL, Loss

Drawn = Callable[..., Inputs]


class Shape(NamedTuple):
    batch: int
    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens} tokens, {self.hidden} to {self.vocab}"


class Candidate(NamedTuple):
    needs: str
    loss: Loss
    widens: bool = False  # takes no product of bfloat16 where that would crawl
    accumulates: bool = False  # gathers the gradient of a 16-bit weight in float32


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
FULL, FEW = (Shape(8, n, 2048, 32000) for n in (128, 32))
LARGE_VOCABULARY = Shape(2, 64, 2048, 128256)
GPU = Shape(8, 1024, 4096, 131072)
QUICK = Shape(4, 16, 64, 500)
STANDARD = Shape(4, 16, 1024, 32000)
SMALL = Shape(4, 16, 256, 4096)  # where bfloat16 crawls, and of the errors


def in_float32(loss: Loss) -> Candidate:
    return Candidate(TORCH, peers.in_float32(loss), widens=True)


# ---- ours ---------------------------------------------------------------------------------------


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ff.linear_cross_entropy(hidden, weight, targets)


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ff.linear_token_logprobs(hidden, weight, targets)


def ppo(hidden: Tensor, weight: Tensor, actions: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return ff.linear_policy_loss(
        hidden, weight, actions, advantages=advantages, old_logprobs=old, entropy_coef=0.01
    ).loss


def grpo(
    hidden: Tensor, weight: Tensor, actions: Tensor, old: Tensor, ref: Tensor, advantages: Tensor,
    mask: Tensor,
) -> Tensor:  # fmt: skip
    return ff.linear_policy_loss(
        hidden, weight, actions, advantages=advantages, old_logprobs=old, mask=mask, loss="grpo",
        ref_logprobs=ref, kl_beta=0.04,
    ).loss  # fmt: skip


def dpo(hidden: Tensor, weight: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
    return ff.linear_preference_loss(hidden, weight, targets, ref_logprobs=ref, beta=0.1).loss


def distillation(**options: Any) -> Loss:
    def loss(
        hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        return ff.linear_distill_loss(hidden, weight, teacher_hidden, teacher_weight, **options)

    return loss


# ---- inputs: hidden states, weight, and what the loss takes ---------------------------------------


def draw_layer(device: str, shape: Shape, dtype: torch.dtype, frozen: bool = False) -> Inputs:
    """Logits with a standard deviation of 2."""
    lead = (shape.batch, shape.tokens)
    hidden = torch.randn(*lead, shape.hidden, dtype=dtype, device=device)
    weight = torch.randn(shape.vocab, shape.hidden, dtype=dtype, device=device)
    weight.mul_(2 / shape.hidden**0.5)
    return hidden.requires_grad_(), weight.requires_grad_(not frozen)


def draw_targets(device: str, shape: Shape) -> Tensor:
    return torch.randint(0, shape.vocab, (shape.batch, shape.tokens), device=device)


def flat(inputs: Inputs) -> Inputs:
    """Rows of tokens instead of sequences, for the losses that know none."""
    return tuple(t.detach().flatten(0, 1).requires_grad_(t.requires_grad) for t in inputs)


def draw_cross_entropy(
    device: str, shape: Shape, dtype: torch.dtype, frozen: bool = False
) -> Inputs:
    hidden, weight = draw_layer(device, shape, dtype, frozen)
    return *flat((hidden,)), weight, draw_targets(device, shape).flatten()


def draw_logprobs(device: str, shape: Shape, dtype: torch.dtype) -> Inputs:
    """With an upstream gradient."""
    targets = draw_targets(device, shape)
    upstream = torch.randn(targets.shape, device=device)
    return *draw_layer(device, shape, dtype), targets, upstream


def draw_scored(device: str, shape: Shape, dtype: torch.dtype) -> Inputs:
    """Without any gradient."""
    hidden, weight = draw_layer(device, shape, dtype)
    return hidden.detach(), weight.detach(), draw_targets(device, shape)


def draw_ppo(device: str, shape: Shape, dtype: torch.dtype) -> Inputs:
    hidden, weight = draw_layer(device, shape, dtype)
    actions = draw_targets(device, shape)
    with torch.no_grad():
        old, _ = old_and_ref(ff.linear_token_logprobs(hidden, weight, actions))
    return hidden, weight, actions, old, torch.randn_like(old)


def draw_grpo(device: str, shape: Shape, dtype: torch.dtype) -> Inputs:
    hidden, weight = draw_layer(device, shape, dtype)
    actions = draw_targets(device, shape)
    with torch.no_grad():
        old, ref = old_and_ref(ff.linear_token_logprobs(hidden, weight, actions))
    mask = torch.ones_like(actions, dtype=torch.bool)
    return hidden, weight, actions, old, ref, torch.randn(shape.batch, device=device), mask


def draw_dpo(device: str, shape: Shape, dtype: torch.dtype) -> Inputs:
    targets, ref = draw_targets(device, shape), torch.zeros(shape.batch, device=device)
    return *draw_layer(device, shape, dtype), targets, ref


def draw_distillation(device: str, shape: Shape, dtype: torch.dtype) -> Inputs:
    """A student that is near its teacher, as after some training."""
    hidden, weight = draw_layer(device, shape, dtype)
    with torch.no_grad():
        teacher_hidden = hidden + 0.3 * torch.randn_like(hidden)
        teacher_weight = weight + (0.3 * 2 / shape.hidden**0.5) * torch.randn_like(weight)
    (hidden,), (teacher_hidden,) = flat((hidden,)), flat((teacher_hidden,))
    return hidden, weight, teacher_hidden, teacher_weight


# ---- cases --------------------------------------------------------------------------------------


def products(inputs: Inputs, teacher: bool) -> Callable[[], None]:
    """The products of the layer alone, as many as the case needs; conversions are no part of them."""
    hidden, weight = inputs[:2]
    x = hidden.detach().flatten(0, -2)
    logits = roofline.bare_product(x, weight)
    y = logits().contiguous()
    needed = [logits, logits] if teacher else [logits]
    if hidden.requires_grad:
        needed.append(roofline.bare_product(y, weight.t()))
    if weight.requires_grad:
        needed.append(roofline.bare_product(y.t(), x.t()))

    def run() -> None:
        for product in needed:
            product()

    return run


def case(
    name: str,
    ours: Loss,
    plain: Loss,
    others: dict[str, Candidate],
    drawn: Drawn,
    device: str,
    shape: Shape,
    dtype: torch.dtype,
    teacher: bool = False,
    **options: Any,
) -> list[Row]:
    """One loss; `plain` is of the logits in full, `drawn` makes inputs."""
    candidates = {
        "finefuse": Candidate(OURS, ours, widens=True, accumulates=True),
        "torch.compile": Candidate(TORCH, peers.compiled(plain)),
        "eager": Candidate(TORCH, plain),
    }
    if shape == QUICK and dtype is not FLOAT32:
        del candidates["torch.compile"]  # most of the time
    if dtype is not FLOAT32:
        candidates["eager in float32"] = in_float32(plain)
    candidates |= others
    if peers.crawls(device, dtype, shape.vocab) and shape != SMALL:
        for who in [who for who, c in candidates.items() if not c.widens]:
            peers.left_out(f"{who} from hidden states in bfloat16", peers.CRAWLS)
            del candidates[who]
    inputs = drawn(device, shape, dtype, **options)
    runs = peers.load({who: (c.needs, c.loss) for who, c in candidates.items()}, device)
    backward = any(t.requires_grad for t in inputs)
    what = phases(backward)
    what += ", frozen weight" if backward and not inputs[1].requires_grad else ""
    sample = SMALL if shape != QUICK else QUICK
    return compare_products(
        f"{name}, {shape}, {name_of(dtype)}, {what}",
        runs,
        products(inputs, teacher),
        inputs,
        truth=plain,
        sample=drawn(device, sample, dtype, **options),
        accumulates=[
            who for who in runs if (c := candidates.get(who.split(" (")[0])) and c.accumulates
        ],
        turns=2 if shape == QUICK else 9,
    )


def chunked_by_torch(
    shape: Shape, reduction: str = "mean", wrapped: Callable[[Loss], Loss] = lambda loss: loss
) -> dict[str, Candidate]:
    """By its own choice it takes few rows at a time, and goes over the weight and its gradient often: 13
    times eager's time at 128 tokens. It takes part in small cases; 256 rows, as ours, in all."""
    if not hasattr(functional, "linear_cross_entropy"):
        return {}

    def candidate(rows: int | None) -> Candidate:
        loss = peers.linear_cross_entropy_chunked(rows, reduction)
        return Candidate(TORCH, wrapped(loss), widens=True, accumulates=True)

    found = {"linear_cross_entropy, 256 rows": candidate(256)}
    if shape in (SMALL, QUICK):
        found["linear_cross_entropy, chunked"] = candidate(None)
    return found


def of_cross_entropy(device: str, shape: Shape, dtype: torch.dtype, **options: Any) -> list[Row]:
    others = {
        **chunked_by_torch(shape),
        "TRL": Candidate(TRL, peers.linear_cross_entropy_trl, accumulates=True),
        "Liger": Candidate(LIGER_TRITON, peers.linear_cross_entropy_liger),
    }
    plain = peers.from_hidden(peers.cross_entropy)
    return case(
        "cross-entropy", cross_entropy, plain, others, draw_cross_entropy, device, shape, dtype,
        **options,
    )  # fmt: skip


def of_logprobs(device: str, shape: Shape, dtype: torch.dtype, backward: bool = True) -> list[Row]:
    def scalar(loss: Loss) -> Loss:
        return peers.weighted(loss) if backward else loss

    others = {
        **chunked_by_torch(shape, "none", scalar),
        "TRL": Candidate(TRL, scalar(peers.logprobs_trl_chunked), accumulates=True),
        "Liger": Candidate(LIGER, scalar(peers.logprobs_liger_chunked), accumulates=True),
    }
    return case(
        "token log-probabilities", scalar(logprobs), scalar(peers.from_hidden(peers.logprobs_eager)),
        others, draw_logprobs if backward else draw_scored, device, shape, dtype,
    )  # fmt: skip


def of_ppo(device: str, shape: Shape, dtype: torch.dtype) -> list[Row]:
    others = {"TRL": Candidate(TRL, peers.linear_ppo_trl, accumulates=True)}
    plain = peers.from_hidden(peers.ppo(peers.scores_eager))
    return case("PPO + entropy", ppo, plain, others, draw_ppo, device, shape, dtype)


def of_grpo(device: str, shape: Shape, dtype: torch.dtype) -> list[Row]:
    others = {
        "TRL": Candidate(TRL, peers.linear_grpo_trl, accumulates=True),
        "Liger": Candidate(LIGER, peers.linear_grpo_liger, accumulates=True),
    }
    plain = peers.from_hidden(peers.grpo(peers.logprobs_eager))
    return case("GRPO + KL", grpo, plain, others, draw_grpo, device, shape, dtype)


def of_dpo(device: str, shape: Shape, dtype: torch.dtype) -> list[Row]:
    others = {
        "TRL": Candidate(TRL, peers.linear_dpo_trl, accumulates=True),
        "Liger": Candidate(LIGER, peers.linear_dpo_liger),
    }
    plain = peers.from_hidden(peers.dpo_eager)
    return case("DPO", dpo, plain, others, draw_dpo, device, shape, dtype)


def of_distillation(
    name: str, beta: float, ours: Loss, plain: Loss, device: str, shape: Shape, dtype: torch.dtype
) -> list[Row]:
    others = {
        "TRL": Candidate(TRL, peers.linear_gkd_trl(beta), widens=True, accumulates=True),
        "Liger": Candidate(LIGER, peers.linear_jsd_liger(beta)),
    }
    plain = peers.from_both_hidden(plain)
    return case(
        name, ours, plain, others, draw_distillation, device, shape, dtype, teacher=True
    )  # fmt: skip


def of_jsd(device: str, shape: Shape, dtype: torch.dtype) -> list[Row]:
    ours = distillation(kind="jsd", beta=0.5)
    return of_distillation("JSD", 0.5, ours, peers.jsd, device, shape, dtype)


def of_kl(device: str, shape: Shape, dtype: torch.dtype) -> list[Row]:
    ours = distillation(kind="forward_kl")
    return of_distillation("forward KL", 0.0, ours, peers.forward_kl, device, shape, dtype)


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    if device == "cuda":
        shape = QUICK if quick else GPU
        for of in (of_cross_entropy, of_ppo, of_grpo, of_logprobs):
            yield of(device, shape, BFLOAT16)
        yield of_cross_entropy(device, shape, BFLOAT16, frozen=True)
        return

    if size == "standard":
        for of in (of_cross_entropy, of_dpo):
            yield of(device, STANDARD, FLOAT32)
        return
    every = (
        (of_cross_entropy, FULL), (of_dpo, FULL), (of_jsd, FEW), (of_grpo, FEW), (of_ppo, FEW),
        (of_logprobs, FEW), (of_kl, FEW),
    )  # fmt: skip
    if quick:  # one type each
        for i, (of, _) in enumerate(every):
            yield of(device, QUICK, (FLOAT32, BFLOAT16)[i % 2])
        yield of_cross_entropy(device, QUICK, BFLOAT16, frozen=True)
        yield of_logprobs(device, QUICK, BFLOAT16, backward=False)
        return
    for of, shape in every[:4]:
        yield of(device, shape, FLOAT32)
    for of in (of_jsd, of_cross_entropy):
        yield of(device, FEW, BFLOAT16)
    if peers.crawls(device, BFLOAT16, SMALL.vocab):
        for of in (of_cross_entropy, of_dpo):
            yield of(device, SMALL, BFLOAT16)
    else:
        yield of_dpo(device, FULL, BFLOAT16)
        yield of_cross_entropy(device, LARGE_VOCABULARY, BFLOAT16)
    for of, shape in every[4:]:
        yield of(device, shape, FLOAT32)
    yield of_cross_entropy(device, FEW, FLOAT32, frozen=True)
    yield of_logprobs(device, FEW, FLOAT32, backward=False)
