"""What we are measured against: the framework, its compiler, and the libraries people use.

Each function maps its inputs (logits and targets, packed codes) to what its users get, as they write it.
A candidate that cannot run here is left out with a message.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any

import finefuse as ff
import torch
from finefuse import _C
from torch import Tensor
from torch.nn import functional

Loss = Callable[..., Tensor]
Candidates = dict[
    str, tuple[str, Callable[..., Any]]
]  # what each needs, see `load`, and what is run


def dpo_from_sums(sums: Tensor, ref: Tensor, beta: float) -> Tensor:
    half = sums.shape[0] // 2
    return dpo_from_vectors(sums[:half], sums[half:], ref[:half], ref[half:], beta)


def dpo_from_vectors(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    d = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -functional.logsigmoid(beta * d).mean()


def dpo_from_vectors_liger(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    both = torch.empty(2 * chosen.shape[0], device="meta")  # it counts the pairs of its targets
    return LigerFusedLinearDPOFunction.preference_loss_fn(
        chosen, rejected, both, ref_chosen, ref_rejected, beta=beta
    )[0]


# Of chosen, rejected, their references and lengths; as TRL's trainers have them.


def simpo(w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor) -> Tensor:
    return -functional.logsigmoid(0.1 * (w / n_w - l / n_l) - 0.5).mean()


def orpo(w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor) -> Tensor:
    a, b = w / n_w, l / n_l
    log_odds = (a - b) - (torch.log1p(-torch.exp(a)) - torch.log1p(-torch.exp(b)))
    return -w.sum() / n_w.sum() - 0.1 * functional.logsigmoid(log_odds).mean()


def kto(w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor) -> Tensor:
    gains, losses = 1 - torch.sigmoid(0.1 * (w - ref_w)), 1 - torch.sigmoid(0.1 * (ref_l - l))
    return torch.cat([gains, losses]).mean()


def discopop(
    w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor
) -> Tensor:
    x = 0.1 * ((w - ref_w) - (l - ref_l))
    modulation = torch.sigmoid(x / 0.05)
    return (-functional.logsigmoid(x) * (1 - modulation) + torch.exp(-x) * modulation).mean()


def simpo_liger(
    w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor
) -> Tensor:
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

    counted = torch.empty(2 * w.shape[0], device="meta")
    return LigerFusedLinearSimPOFunction.preference_loss_fn(w / n_w, l / n_l, counted)[0]


def orpo_liger(
    w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor
) -> Tensor:
    """Its NLL is of the fused layer: added here."""
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction

    counted = torch.empty(2 * w.shape[0], device="meta")
    ratio = LigerFusedLinearORPOFunction.preference_loss_fn(w / n_w, l / n_l, counted)[0]
    return ratio - w.sum() / n_w.sum()


def kto_liger(
    w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor
) -> Tensor:
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction

    labels = torch.arange(2 * w.shape[0], device=w.device) < w.shape[0]
    return LigerFusedLinearKTOFunction.preference_loss_fn(
        torch.cat([w, l]), labels, labels, torch.cat([ref_w, ref_l])
    )[0]


def discopop_liger(
    w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor
) -> Tensor:
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    counted = torch.empty(2 * w.shape[0], device="meta")
    return LigerFusedLinearDPOFunction.preference_loss_fn(
        w, l, counted, ref_w, ref_l, loss_type="discopop"
    )[0]


PREFERENCES = {"simpo": simpo, "orpo": orpo, "kto": kto, "discopop": discopop}
PREFERENCES_LIGER = {
    "simpo": simpo_liger, "orpo": orpo_liger, "kto": kto_liger, "discopop": discopop_liger,
}  # fmt: skip


def dpo_eager(logits: Tensor, targets: Tensor, ref: Tensor, beta: float = 0.1) -> Tensor:
    return dpo_from_sums(logprobs_eager(logits, targets).sum(-1), ref, beta)


def dpo_cross_entropy(logits: Tensor, targets: Tensor, ref: Tensor, beta: float = 0.1) -> Tensor:
    nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return dpo_from_sums(-nll.view(targets.shape).sum(-1), ref, beta)


def dpo_trl(logits: Tensor, targets: Tensor, ref: Tensor, beta: float = 0.1) -> Tensor:
    return dpo_from_sums(logprobs_trl(logits, targets).sum(-1), ref, beta)


def logprobs_eager(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def logprobs_trl(logits: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets)


def cross_entropy_liger(logits: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, targets)


# ---- policy gradients: log-probabilities and entropies of the tokens, then the clipped loss -----

Scores = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (log-probability, entropy) of tokens


def ppo(scores: Scores) -> Loss:
    """PPO with an entropy bonus from logits; advantages by token."""

    def loss(logits: Tensor, actions: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        logprobs, entropy = scores(logits, actions)
        return clipped(logprobs - old, advantages).mean() - 0.01 * entropy.mean()

    return loss


def grpo(logprobs: Loss, sequence: bool = False) -> Loss:
    """GRPO with its KL or, by the ratio of a sequence, GSPO, from logits; advantages by sequence."""

    def loss(logits: Tensor, actions: Tensor, *rest: Tensor) -> Tensor:
        return grpo_from_logprobs(logprobs(logits, actions), *rest, sequence=sequence)

    return loss


def in_float32(loss: Loss) -> Loss:
    """For logits in 16 bits: compiled, it is often faster or more accurate; in eager it copies them."""

    def widened(*inputs: Tensor) -> Tensor:
        return loss(*(t.float() if t.is_floating_point() else t for t in inputs))

    return widened


def clipped(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def grpo_from_logprobs(
    logprobs: Tensor,
    old: Tensor,
    ref: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sequence: bool = False,
) -> Tensor:
    """As TRL's trainer has it; GSPO without the KL."""
    x = logprobs - old
    if sequence:
        x = ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1)).unsqueeze(-1)
    loss = clipped(x, advantages.unsqueeze(-1))
    if not sequence:
        d = ref - logprobs
        loss = loss + 0.04 * (d.exp() - d - 1)
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def scores_eager(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    every = torch.log_softmax(logits, -1)
    logprobs = every.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(every.exp() * every).sum(-1)


def scores_categorical(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    policy = torch.distributions.Categorical(logits=logits)
    return policy.log_prob(actions), policy.entropy()


def scores_trl(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, actions)


def grpo_liger(
    logits: Tensor, actions: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """It leaves the last logits of a sequence out by itself; the mask must leave out the same."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    old, ref, actions, mask = (t[:, :-1].contiguous() for t in (old, ref, actions, mask))
    return triton_grpo_loss(
        logits, old, ref, actions, advantages, mask, temperature=1.0, beta=0.04, eps_low=0.2,
        eps_high=0.2, loss_type="grpo", reduce=True,
    )[0]  # fmt: skip


def value_loss(values: Tensor, returns: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """As TRL's PPO trainer had it."""
    held = torch.clamp(values, old - 0.2, old + 0.2)
    worse = torch.max(torch.square(values - returns), torch.square(held - returns))
    return 0.5 * (worse * mask).sum() / mask.sum()


def gae(rewards: Tensor, values: Tensor) -> Tensor:
    """As TRL's PPO trainer had it; the advantages."""
    last, length, backwards = 0.0, rewards.shape[1], []
    for t in reversed(range(length)):
        following = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + 0.99 * following - values[:, t]
        last = delta + 0.99 * 0.95 * last
        backwards.append(last)
    advantages = torch.stack(backwards[::-1], dim=1)
    advantages + values  # the returns
    return advantages


# ---- distillation: divergences of log-softmaxes, the mean over rows -----------------------------


def both(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    return torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)


def kl(other: Tensor, weighting: Tensor) -> Tensor:
    """KL(weighting | other) of log-probabilities."""
    return functional.kl_div(other, weighting, reduction="batchmean", log_target=True)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(*both(student, teacher))


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = both(student, teacher)
    return kl(q, p)


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """With equal shares."""
    p, q = both(student, teacher)
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (kl(middle, q) + kl(middle, p))


def kl_and_cross_entropy(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Hinton's: equal shares, the KL at temperature 2 times its square."""
    return 0.5 * 4 * kl(*both(student, teacher, 2.0)) + 0.5 * functional.cross_entropy(
        student, targets
    )


def kl_top_k(student: Tensor, logprobs: Tensor, indices: Tensor) -> Tensor:
    """The teacher's K best and a bucket of the rest."""
    p, q = torch.log_softmax(student, -1).gather(-1, indices), logprobs.to(student.dtype)
    p_rest, q_rest = (torch.log1p(-x.exp().sum(-1, keepdim=True)) for x in (p, q))
    return kl(torch.cat([p, p_rest], -1), torch.cat([q, q_rest], -1))


def gkd_trl(beta: float) -> Loss:
    """beta 0: the forward, 1: the reverse KL."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        from trl.experimental.gkd import GKDTrainer

        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta)

    return loss


def kl_liger(student: Tensor, teacher: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(*both(student, teacher))


def jsd_liger(beta: float) -> Loss:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        from liger_kernel.transformers import LigerJSD

        return LigerJSD(beta=beta)(*both(student, teacher))

    return loss


# ---- from hidden states: of (hidden, weight, ...); logits in full, or in chunks --------------------


def from_hidden(loss: Loss) -> Loss:
    """A loss from logits on top of the linear layer."""

    def whole(hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return loss(functional.linear(hidden, weight), *rest)

    return whole


def from_both_hidden(loss: Loss) -> Loss:
    """The same of a student and a teacher, which has no gradient."""

    def whole(
        hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        with torch.no_grad():
            teacher = functional.linear(teacher_hidden, teacher_weight)
        return loss(functional.linear(hidden, weight), teacher)

    return whole


def weighted(logprobs: Loss) -> Loss:
    """A scalar with an upstream gradient, the last input."""

    def loss(*inputs: Tensor) -> Tensor:
        return (logprobs(*inputs[:-1]) * inputs[-1]).sum()

    return loss


def linear_cross_entropy_chunked(rows: int | None = None, reduction: str = "mean") -> Loss:
    """torch's own, with chunks of so many rows or as it chooses. "none": the log-probabilities."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = functional.linear_cross_entropy(
            hidden.flatten(0, -2), weight, targets.flatten(), reduction=reduction,
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows),
        )  # fmt: skip
        return found if reduction == "mean" else -found.view(targets.shape)

    return loss


def linear_cross_entropy_liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def _scores_trl_chunked(
    hidden: Tensor, weight: Tensor, actions: Tensor, outputs: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """As TRL's language-model heads call it, in tiles of their size."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    found = ChunkedLogProbFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, None, actions.reshape(-1), 1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs,
    )  # fmt: skip
    return tuple(x.view(actions.shape) for x in found if x is not None)


def logprobs_trl_chunked(hidden: Tensor, weight: Tensor, actions: Tensor) -> Tensor:
    return _scores_trl_chunked(hidden, weight, actions, ())[0]


def linear_cross_entropy_trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -logprobs_trl_chunked(hidden, weight, targets).mean()


def linear_ppo_trl(
    hidden: Tensor, weight: Tensor, actions: Tensor, old: Tensor, advantages: Tensor
) -> Tensor:
    logprobs, entropy = _scores_trl_chunked(hidden, weight, actions, ("entropy",))
    return clipped(logprobs - old, advantages).mean() - 0.01 * entropy.mean()


def linear_grpo_trl(hidden: Tensor, weight: Tensor, actions: Tensor, *rest: Tensor) -> Tensor:
    return grpo_from_logprobs(logprobs_trl_chunked(hidden, weight, actions), *rest)


def linear_dpo_trl(hidden: Tensor, weight: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
    return dpo_from_sums(logprobs_trl_chunked(hidden, weight, targets).sum(-1), ref, beta=0.1)


def linear_gkd_trl(beta: float) -> Loss:
    """As TRL's trainer of distillation; beta as in `gkd_trl`."""

    def loss(
        hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, beta
        )[0].mean()

    return loss


def logprobs_liger_chunked(hidden: Tensor, weight: Tensor, actions: Tensor) -> Tensor:
    """What its GRPO starts with; of (sequences, tokens, hidden)."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden, weight, actions)


def linear_grpo_liger(
    hidden: Tensor, weight: Tensor, actions: Tensor, old: Tensor, ref: Tensor, advantages: Tensor,
    mask: Tensor,
) -> Tensor:  # fmt: skip
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(beta=0.04, loss_type="grpo")(
        hidden, weight, actions, mask, advantages, ref_per_token_logps=ref, old_per_token_logps=old
    )[0]


def linear_dpo_liger(hidden: Tensor, weight: Tensor, targets: Tensor, ref: Tensor) -> Tensor:
    """It takes the reference's hidden states or, as here, none: `ref` must be 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False)(weight, hidden, targets)[0]


def linear_jsd_liger(beta: float) -> Loss:
    """Its soft loss alone; beta 0: the forward KL."""

    def loss(
        hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        counted = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
        return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)(
            hidden, weight, teacher_hidden, teacher_weight, counted
        )

    return loss


# ---- pruning: masks, True where an element is kept -----------------------------------------------


def keep_topk(weight: Tensor, drop: int) -> Tensor:
    """Of the tensor: as torch.nn.utils.prune, which also sorts what it drops."""
    keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[weight.abs().flatten().topk(drop, largest=False, sorted=False).indices] = False
    return keep.view(weight.shape)


def keep_kthvalue(weight: Tensor, drop: int) -> Tensor:
    """Of the tensor: a threshold, which takes all elements that equal it."""
    score = weight.abs()
    return score > score.flatten().kthvalue(drop).values


def keep_sorted_rows(weight: Tensor, norm: Tensor, drop: int) -> Tensor:
    """As Wanda's own code."""
    order = torch.sort(weight.abs() * norm, dim=-1, stable=True).indices
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, order[:, :drop], False)


def keep_topk_rows(weight: Tensor, norm: Tensor, drop: int) -> Tensor:
    score = weight.abs() * norm
    least = score.topk(drop, dim=-1, largest=False, sorted=False).indices
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, least, False)


def keep_topk_of_4(weight: Tensor) -> Tensor:
    groups = weight.abs().view(-1, 4)
    best = groups.topk(2, dim=-1, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view(weight.shape)


def keep_counted_of_4(weight: Tensor) -> Tensor:
    """The place of each among its neighbours, for the compiler."""
    a = weight.abs().view(-1, 4)
    i = torch.arange(4, device=weight.device)
    ours, theirs = a.unsqueeze(-1), a.unsqueeze(-2)
    below = (theirs < ours) | ((theirs == ours) & (i < i.unsqueeze(-1)))
    return (below.sum(-1) >= 2).view(weight.shape)


def nf4_decoded(
    codes: Tensor, table: Tensor, absmax: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    """Packed 4-bit codes by table look-up."""
    high_low = torch.stack([codes >> 4, codes & 15], -1)
    values = table[high_low.int()].view(-1, blocksize) * absmax[:, None]
    return values.to(dtype).flatten()


def nf4_quantized(x: Tensor, thresholds: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed codes, absmax); `thresholds` lie between neighbours of the table."""
    blocks = x.view(-1, blocksize).float()
    absmax = blocks.abs().amax(-1)
    codes = torch.bucketize(blocks / absmax[:, None], thresholds).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], absmax


def dequantize_in_c(codes: Tensor, absmax: Tensor, out: Tensor, blocksize: int) -> Tensor:
    """bitsandbytes' own C function for NF4 to bfloat16 into memory that is there; out (rows, columns)."""
    from bitsandbytes.cextension import lib

    long = ctypes.c_longlong
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (codes, absmax, out)]
    lib.cdequantize_blockwise_cpu_nf4_bf16(*pointers, long(blocksize), *map(long, out.shape))
    return out


def frozen_linear(weight: Tensor) -> torch.nn.Linear:
    rows, columns = weight.shape
    layer = torch.nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def linear4bit(weight: Tensor, compute_dtype: torch.dtype | None = None) -> torch.nn.Module:
    """bitsandbytes' layer on the weight in NF4."""
    import bitsandbytes as bnb

    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=False, quant_type="nf4", compute_dtype=compute_dtype
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    return layer.to(weight.device)


def from_logits(
    ours: Callable[..., Loss],
    plain: Loss,
    others: Candidates,
    dtype: torch.dtype,
    inplace: bool = True,
) -> Candidates:
    """Who takes part in a loss from logits; `ours` makes our loss, `plain` is torch's own."""
    found: Candidates = {"finefuse": (OURS, ours())}
    if inplace:
        found["finefuse in place"] = (OURS, ours(inplace=True))
    found["torch.compile"] = (TORCH, compiled(plain))
    if dtype is not torch.float32:
        found["torch.compile in float32"] = (TORCH, compiled(in_float32(plain)))
    return {**found, "eager": (TORCH, plain), **others}


def compiled(function: Loss) -> Loss:
    """torch.compile at its best: fixed shapes, one graph."""
    torch._dynamo.reset()  # no limit on recompilations carried over from the case before
    return torch.compile(function, dynamic=False, fullgraph=True)


CRAWLS = "this CPU has no bfloat16 product, and torch's own takes minutes"


def crawls(device: str, dtype: torch.dtype, size: int) -> bool:
    """Whether a product of this type, with a weight of so many rows, is one to leave out."""
    slow = device == "cpu" and _C.machine_isa() != "avx512bf16"
    return slow and dtype is torch.bfloat16 and size > 512


# ---- who takes part ----------------------------------------------------------------------------

TORCH = ""  # needs nothing more
OURS = "finefuse"  # runs once under each backend of a GPU
TRL = "trl"
LIGER = "liger_kernel"
BITSANDBYTES = "bitsandbytes"
PEFT = "peft"
TORCHAO = "torchao"
LIGER_TRITON = "liger_kernel on a GPU"


@functools.cache
def left_out(name: str, why: str) -> None:
    """Says so once."""
    print(f"{name} is left out: {why}", file=sys.stderr, flush=True)


@functools.cache
def backends() -> list[str]:
    found = []
    for name in ("cuda", "triton"):
        try:
            with ff.backend(name):
                found.append(name)
        except RuntimeError as error:
            left_out(f"finefuse under {name}", str(error))
    return found


def under(backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Tensor) -> Any:
        with ff.backend(backend):
            return run(*inputs)

    return call


def load(candidates: Candidates, device: str) -> dict[str, Callable[..., Any]]:
    """Those that can run, by name; each comes with what it needs, one of the names above."""
    found = {}
    for name, (needs, run) in candidates.items():
        package, _, gpu = needs.partition(" ")
        if package and importlib.util.find_spec(package) is None:
            left_out(name, f"{package} is not installed")
        elif gpu and device == "cpu":
            left_out(name, "its kernel is Triton and needs a GPU")
        elif needs == OURS and device == "cuda":
            found |= {f"{name} ({backend})": under(backend, run) for backend in backends()}
        else:
            found[name] = run
    return found
