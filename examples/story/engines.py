"""Plain PyTorch and finefuse side by side: all that changes in your own training.

Both engines have the same functions of the same arguments: hidden (batch, T, dim), the head that makes
logits of them (weight, bias, softcap), targets (batch, T) with IGNORE where no loss is taken. In preference
losses the first half of the batch is chosen, the second rejected.

finefuse has every loss in two forms. From hidden states the logits are never built, and prompts and padding
are not multiplied: what is used here, but for distillation, which shows the other. From logits with
inplace=True the gradient overwrites the logits and nothing else of their size is ever allocated.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol

import finefuse as ff
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import IGNORE
from .model import Head

# What is not 0.1 (beta) or the function's own default.
PREFERENCES: dict[str, dict[str, float]] = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sigmoid_norm": {"beta": 2.0},
    "sft": {},
    "spin": {},
    "cpo": {"sft_weight": 1.0},
    "simpo": {"beta": 2.0, "sft_weight": 0.0},
    "slic": {"beta": 40.0, "sft_weight": 0.0},  # more nats than true answers are ahead at first
    "orpo": {},
    "kto": {},
    "apo_zero_unpaired": {},
}
REFERENCE_FREE = ("sft", "cpo", "simpo", "slic", "orpo")
POLICIES = (
    "ppo", "grpo", "dapo", "dr_grpo", "bnpo", "gspo", "luspo", "rloo", "reinforce", "cispo", "sapo", "vespo",
)  # fmt: skip


VALUE_CLIP = 0.2  # how far a value may move from the old one


class Rollouts(NamedTuple):
    """Of sampled answers, each (batch, T)."""

    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor  # or (batch,): one an answer
    kl_beta: float


class Engine(Protocol):
    """What an engine can do; PLAIN and FINEFUSE below."""

    name: str

    def cross_entropy(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor: ...
    def token_logprobs(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor: ...
    def preference(
        self, hidden: Tensor, head: Head, targets: Tensor, ref: Tensor, loss: str
    ) -> Tensor: ...
    def reward(self, rewards: Tensor) -> Tensor: ...
    def policy(
        self, hidden: Tensor, head: Head, targets: Tensor, rollouts: Rollouts, loss: str
    ) -> Tensor: ...
    def value(self, values: Tensor, returns: Tensor, old: Tensor, mask: Tensor) -> Tensor: ...
    def distill(
        self, hidden: Tensor, head: Head, targets: Tensor, teacher: Tensor, teacher_head: Head
    ) -> Tensor: ...
    def quantize(self, weight: Tensor) -> Any: ...
    def qlora(self, model: nn.Module) -> nn.Module: ...
    def prune_mask(self, weight: Tensor, pattern: str) -> Tensor: ...


# ---- finefuse --------------------------------------------------------------------------------------


class Finefuse:
    name = "finefuse"

    def cross_entropy(self, hidden, head, targets):
        return ff.linear_cross_entropy(
            hidden, head.weight, targets, bias=head.bias, softcap=head.softcap
        )

    def token_logprobs(self, hidden, head, targets):
        return ff.linear_token_logprobs(
            hidden, head.weight, targets, bias=head.bias, softcap=head.softcap
        )

    def preference(self, hidden, head, targets, ref, loss):
        return ff.linear_preference_loss(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            softcap=head.softcap,
            ref_logprobs=None if loss in REFERENCE_FREE else ref,
            loss=loss,
            **PREFERENCES[loss],
        ).loss

    def reward(self, rewards):
        return ff.reward_loss(*rewards.chunk(2), center_coef=0.01)

    def policy(self, hidden, head, targets, rollouts, loss):
        return ff.linear_policy_loss(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            softcap=head.softcap,
            mask=targets != IGNORE,
            loss=loss,
            **rollouts._asdict(),
        ).loss

    def value(self, values, returns, old, mask):
        return ff.value_loss(values, returns, old, clip=VALUE_CLIP, mask=mask)

    def distill(self, hidden, head, targets, teacher, teacher_head):
        with torch.no_grad():
            teacher = teacher_head.logits(teacher)
        return ff.distill_loss(
            head.logits(hidden), teacher, targets=targets, alpha=DISTILL_ALPHA, inplace=True
        )

    def quantize(self, weight):
        return ff.quantize(weight, "nf4")

    def qlora(self, model):
        """The model of `ff.nn.add_lora(model.body, …, quantize="nf4")` as it is."""
        return copy.deepcopy(model)

    def prune_mask(self, weight, pattern):
        if pattern == "2:4":
            return ff.prune_mask(weight, n=2, m=4)
        return ff.prune_mask(weight, sparsity=0.5)


# ---- plain PyTorch ---------------------------------------------------------------------------------


class Plain:
    name = "PyTorch"

    def cross_entropy(self, hidden, head, targets):
        return F.cross_entropy(head.logits(hidden).flatten(0, 1), targets.flatten())

    def token_logprobs(self, hidden, head, targets):
        logprobs = head.logits(hidden).log_softmax(dim=-1)
        taken = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return taken.masked_fill(targets == IGNORE, 0.0)

    def preference(self, hidden, head, targets, ref, loss):
        sequences = self.token_logprobs(hidden, head, targets).sum(dim=-1)
        return plain_preference(loss, sequences, ref, (targets != IGNORE).sum(dim=-1))

    def reward(self, rewards):
        chosen, rejected = rewards.chunk(2)
        return (-F.logsigmoid(chosen - rejected) + 0.01 * (chosen + rejected) ** 2).mean()

    def policy(self, hidden, head, targets, rollouts, loss):
        logprobs = self.token_logprobs(hidden, head, targets)
        return plain_policy(loss, logprobs, rollouts, targets != IGNORE)

    def value(self, values, returns, old, mask):
        clipped = old + (values - old).clamp(-VALUE_CLIP, VALUE_CLIP)
        errors = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
        return errors[mask].mean()

    def distill(self, hidden, head, targets, teacher, teacher_head):
        student = head.logits(hidden).flatten(0, 1)
        with torch.no_grad():
            teacher = teacher_head.logits(teacher).flatten(0, 1).log_softmax(dim=-1)
        divergence = F.kl_div(
            student.log_softmax(dim=-1), teacher, log_target=True, reduction="batchmean"
        )
        return DISTILL_ALPHA * divergence + (1 - DISTILL_ALPHA) * F.cross_entropy(
            student, targets.flatten()
        )

    def quantize(self, weight):
        return plain_quantize(weight)

    def qlora(self, model):
        """The same codes and factors under PlainQLoRA, which decodes in every forward and backward."""
        model = copy.deepcopy(model)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, ff.nn.LoRALinear):
                    setattr(parent, name, PlainQLoRA(child))
        return model

    def prune_mask(self, weight, pattern):
        rows = weight.abs().view(-1, 4) if pattern == "2:4" else weight.abs().flatten()[None]
        gone = rows.topk(rows.shape[1] // 2, dim=1, largest=False).indices
        return torch.ones_like(rows, dtype=torch.bool).scatter_(1, gone, False).view_as(weight)


DISTILL_ALPHA = 0.8  # of the divergence; the rest is cross-entropy
BLOCK = 64  # elements that share an absmax


def plain_preference(loss: str, lp: Tensor, ref: Tensor, lengths: Tensor) -> Tensor:
    """docs/preference.md has the formulas: w chosen, l rejected."""
    options = PREFERENCES[loss]
    beta, eps = options.get("beta", 0.1), options.get("label_smoothing", 0.0)
    nll = -lp.chunk(2)[0].sum() / lengths.chunk(2)[0].sum()
    ratios = lp if loss in REFERENCE_FREE else lp - ref
    if loss in ("ipo", "sigmoid_norm", "simpo", "orpo"):
        ratios = ratios / lengths
    w, l = ratios.chunk(2)
    if loss == "aot":
        (lp_w, lp_l), (ref_w, ref_l) = lp.chunk(2), ref.chunk(2)
        w, l = (lp_w - lp_l).sort().values, (ref_w - ref_l).sort().values
    if loss == "aot_unpaired":
        w, l = w.sort().values, l.sort().values
    x, up = beta * (w - l), F.logsigmoid
    match loss:
        case "sigmoid" | "spin" | "aot" | "aot_unpaired" | "sigmoid_norm":
            value = -up(x)
        case "ipo":
            value = (w - l - 1 / (2 * beta)) ** 2
        case "hinge":
            value = (1 - x).relu()
        case "robust":
            value = (-(1 - eps) * up(x) + eps * up(-x)) / (1 - 2 * eps)
        case "exo_pair":
            log_keep, log_swap = torch.tensor([1 - eps, eps]).log()
            value = x.sigmoid() * (up(x) - log_keep) + (-x).sigmoid() * (up(-x) - log_swap)
        case "nca_pair":
            value = -up(beta * w) - 0.5 * up(-beta * w) - 0.5 * up(-beta * l)
        case "bco_pair":
            value = -up(beta * w) - up(-beta * l)
        case "sppo_hard":
            value = (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2
        case "apo_zero":
            value = (-beta * w).sigmoid() + (beta * l).sigmoid()
        case "apo_down":
            value = (beta * w).sigmoid() + (-x).sigmoid()
        case "discopop":
            mixed = (x / 0.05).sigmoid()
            value = -(1 - mixed) * up(x) + mixed * (-x).exp()
        case "sft":
            value = nll
        case "cpo":
            value = -up(x) + options["sft_weight"] * nll
        case "simpo":
            value = -up(x - 0.5)
        case "slic":
            value = (beta - (w - l)).relu()
        case "orpo":
            odds = [side - torch.log1p(-side.exp()) for side in (w, l)]
            value = nll - beta * up(odds[0] - odds[1])
        case "kto" | "apo_zero_unpaired":
            value = torch.cat([(-beta * w).sigmoid(), (beta * l).sigmoid()])
    return value.mean()


def plain_policy(loss: str, lp: Tensor, rollouts: Rollouts, mask: Tensor) -> Tensor:
    """docs/policy.md has the formulas."""
    old, ref, advantages, kl_beta = rollouts
    advantages = advantages.view(len(lp), -1)  # a column, or one a token
    lengths = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    x = (lp - old).masked_fill(~mask, 0.0)
    if loss in ("gspo", "luspo"):
        x = x.sum(dim=-1, keepdim=True) / lengths
    if loss == "rloo":
        x = x.sum(dim=-1, keepdim=True)
    ratio = x.exp()
    match loss:
        case "reinforce":
            value = -advantages * lp
        case "cispo":
            value = -ratio.clamp(max=5.0).detach() * advantages * lp
        case "sapo":
            tau = torch.where(advantages > 0, 1.0, 1.05)
            value = -advantages * (tau * (ratio - 1)).sigmoid() * 4 / tau
        case "vespo":
            k, scale = (
                torch.where(advantages >= 0, 2.0, 3.0),
                torch.where(advantages >= 0, 3.0, 2.0),
            )
            log_w = x.clamp(-20, 20).sum(dim=-1, keepdim=True).detach().clamp(-18.420681, 20)
            value = -(scale + k * log_w - scale * log_w.exp()).exp() * advantages * lp
        case _:
            value = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    if loss == "rloo":
        value = value / lengths
    distance = ref - lp
    value = value + kl_beta * (distance.exp() - distance - 1)
    value = value.expand_as(lp).masked_fill(~mask, 0.0)
    if loss in ("grpo", "gspo", "sapo"):
        return (value / lengths).sum() / len(lp)
    if loss in ("rloo", "luspo"):
        return value.sum() / len(lp)
    return value.sum() / (lp.numel() if loss == "dr_grpo" else mask.sum())


class Packed(NamedTuple):
    """NF4 as plain tensors; the bytes are those of `ff.quantize`."""

    codes: Tensor  # uint8, two elements each
    absmax: Tensor  # of each BLOCK of elements
    code: Tensor  # (16,)
    shape: tuple[int, ...]


def plain_quantize(weight: Tensor) -> Packed:
    code = ff.quantize(torch.zeros(1), "nf4").code
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp(min=1e-30)[:, None]
    indices = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8).flatten()
    indices = F.pad(indices[: weight.numel()], (0, weight.numel() % 2), value=7)  # 7: zero
    return Packed(indices[::2] << 4 | indices[1::2], absmax, code, tuple(weight.shape))


def plain_dequantize(packed: Packed) -> Tensor:
    codes, count = packed.codes.flatten(), torch.Size(packed.shape).numel()
    indices = torch.stack((codes >> 4, codes & 15), dim=1).flatten().int()
    values = packed.code[indices[:count]]
    blocks = F.pad(values, (0, -count % BLOCK)).view(-1, BLOCK) * packed.absmax.view(-1, 1)
    return blocks.flatten()[:count].view(packed.shape)


class DecodedLinear(torch.autograd.Function):
    """x Wᵀ on packed W, which is decoded again for the backward, as in bitsandbytes' MatMul4Bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return F.linear(x, plain_dequantize(packed), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ plain_dequantize(ctx.packed), None, None


class PlainQLoRA(nn.Module):
    """QLoRA as PEFT on bitsandbytes has it, the decoding in torch's operations."""

    def __init__(self, layer: ff.nn.LoRALinear) -> None:
        super().__init__()
        q, name = layer.weight, layer.active
        self.packed = Packed(q.codes, q.absmax, q.code, tuple(q.shape))
        self.bias, self.scale = layer.bias, layer.scaling[name]
        self.lora_a = nn.Parameter(layer.lora_A[name].detach().clone())
        self.lora_b = nn.Parameter(layer.lora_B[name].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = DecodedLinear.apply(x, self.packed, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


FINEFUSE, PLAIN = Finefuse(), Plain()
