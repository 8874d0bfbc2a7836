"""What we are measured against: the framework, its compiler, and the libraries people use.

Each function maps logits and targets to a scalar loss, as its users write it. A peer that is not
installed is left out with a message.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[..., Tensor]


def available(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def dpo_from_sums(sums: Tensor, ref: Tensor, beta: float) -> Tensor:
    half = sums.shape[0] // 2
    d = (sums[:half] - ref[:half]) - (sums[half:] - ref[half:])
    return -functional.logsigmoid(beta * d).mean()


def dpo_eager(logits: Tensor, targets: Tensor, ref: Tensor, beta: float = 0.1) -> Tensor:
    lp = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return dpo_from_sums(lp.sum(-1), ref, beta)


def dpo_cross_entropy(logits: Tensor, targets: Tensor, ref: Tensor, beta: float = 0.1) -> Tensor:
    nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return dpo_from_sums(-nll.view(targets.shape).sum(-1), ref, beta)


def dpo_trl(logits: Tensor, targets: Tensor, ref: Tensor, beta: float = 0.1) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return dpo_from_sums(selective_log_softmax(logits, targets).sum(-1), ref, beta)


def logprobs_eager(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def logprobs_trl(logits: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def compiled(function: Loss) -> Loss:
    """torch.compile at its best: fixed shapes, one graph."""
    torch._dynamo.reset()  # no limit on recompilations carried over from the case before
    return torch.compile(function, dynamic=False, fullgraph=True)


def load(candidates: dict[str, tuple[str | None, Loss]]) -> dict[str, Any]:
    """The candidates whose package is there; (package or None, function) by name."""
    found = {}
    for name, (package, function) in candidates.items():
        if package is not None and not available(package):
            warnings.warn(f"{package} is not installed: {name} is left out", stacklevel=2)
            continue
        found[name] = function
    return found
