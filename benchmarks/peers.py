"""What we are measured against: the framework, its compiler, and the libraries people use.

Each function maps logits (or log-probabilities) and targets to what its users get, as they write it.
A candidate that cannot run here is left out with a message.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import finefuse as ff
import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[..., Tensor]


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


def compiled(function: Loss) -> Loss:
    """torch.compile at its best: fixed shapes, one graph."""
    torch._dynamo.reset()  # no limit on recompilations carried over from the case before
    return torch.compile(function, dynamic=False, fullgraph=True)


# ---- who takes part ----------------------------------------------------------------------------

TORCH = ""  # needs nothing more
OURS = "finefuse"  # runs once under each backend of a GPU
TRL = "trl"
LIGER = "liger_kernel"
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


def load(
    candidates: dict[str, tuple[str, Callable[..., Any]]], device: str
) -> dict[str, Callable[..., Any]]:
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
