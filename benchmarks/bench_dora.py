"""DoRA layers, 4096×4096 of rank 16 and 384, beside plain LoRA and the bare base product.

Candidates' times are divided by that of `finefuse`. "eager" is PEFT's formula without its detours: the norm
of W + s·BA formed in full, and torch's own products. Bytes at least: the weight twice (the norms), x and y,
and as many again for the gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor
from torch.nn import functional

from . import peers
from .low_rank import BLOCKSIZE, QUICK_SIZE, SIZE, Made, Makers, Problem, trained
from .measure import Row, Size, compare_outputs, name_of, phases
from .peers import BITSANDBYTES, OURS, PEFT, TORCH

# tokens, rank, type, p of dropout, whether packed, whether with a backward
CASES = {
    "cpu": (
        (512, 16, torch.bfloat16, 0.0, False, True),
        (512, 16, torch.float32, 0.0, False, False),
        (512, 16, torch.float32, 0.0, False, True),
        (512, 384, torch.float32, 0.0, False, True),
        (512, 16, torch.float32, 0.05, False, True),
        (512, 16, torch.float32, 0.0, True, True),
    ),
    "cuda": (
        (8192, 16, torch.bfloat16, 0.0, False, False),
        (8192, 16, torch.bfloat16, 0.0, False, True),
    ),
}


def eager(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, m: Tensor, scale: float) -> Tensor:
    norm = torch.linalg.norm(weight + scale * (b @ a), dim=1).detach()
    base, update = functional.linear(x, weight), functional.linear(functional.linear(x, a), b)
    return (m / norm) * (base + scale * update)


def case(
    device: str, tokens: int, size: int, rank: int, dtype: torch.dtype, p: float, packed: bool, backward: bool
) -> list[Row]:  # fmt: skip
    problem = Problem(device, tokens, size, dtype, rank)
    x, weight, a, b, scale = (problem.x, problem.weight, problem.a, problem.b, problem.scale)
    m = (torch.rand(size, device=device) + 0.5).to(dtype).requires_grad_()
    compiled = peers.compiled(eager)
    base = ff.quantize(weight, blocksize=BLOCKSIZE) if packed else weight

    def peft() -> Made:
        linear = peers.linear4bit(weight, dtype) if packed else peers.frozen_linear(weight)
        layer = problem.peft(linear, magnitude=m, lora_dropout=p)
        return (lambda: layer(x)), trained(layer)

    def ours(**options: Any) -> Made:
        def function() -> Tensor:
            return ff.lora_linear(x, base, a, b, scale=scale, dropout=p, **options)

        return function, (a, b, *options.values())

    makers: Makers = {
        "finefuse": (OURS, lambda: ours(magnitude=m)),
        "finefuse, plain LoRA": (OURS, ours),
    }
    if not packed and p == 0:
        makers |= {
            "eager": (TORCH, lambda: ((lambda: eager(x, weight, a, b, m, scale)), (a, b, m))),
            "torch.compile": (
                TORCH, lambda: ((lambda: compiled(x, weight, a, b, m, scale)), (a, b, m))
            ),
        }  # fmt: skip
    makers["PEFT and bitsandbytes" if packed else "PEFT"] = (PEFT, peft)
    if packed and not peers.load({"": (BITSANDBYTES, peft)}, device):
        makers.popitem()
    x_, dy_, w_, a_, b_ = problem.double()
    w_, m_ = ff.dequantize(base, torch.float64) if packed else w_, m.detach().double()
    c = m_ / torch.linalg.norm(w_ + scale * b_ @ a_, dim=1)
    if backward:
        dz = c * dy_
        truth = dz @ w_ + scale * (dz @ b_) @ a_
    else:
        truth = c * (x_ @ w_.t() + scale * (x_ @ a_.t()) @ b_.t())
    moved = (2 * size * size + 2 * tokens * size) * dtype.itemsize
    details = f"rank {rank} {name_of(dtype)}{f', dropout {p}' if p else ''}"
    runs = problem.runs(makers, backward)
    if not packed:
        runs |= problem.bare(weight, backward)
    rows = compare_outputs(
        f"DoRA {tokens} x {size}x{size}{' NF4' if packed else ''} {details}, {phases(backward)}",
        runs, truth, moved * (2 if backward else 1),
    )  # fmt: skip
    for row in rows:
        if p or row.name == "finefuse, plain LoRA" or row.name.startswith("the bare"):
            row.error = None  # other masks, or another function
    return rows


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    warnings.filterwarnings("ignore", module="bitsandbytes|peft")
    width = QUICK_SIZE if quick else SIZE
    if size == "standard":
        yield case(device, 256, width, 16, torch.float32, 0.0, False, True)
        return
    for tokens, rank, dtype, p, packed, backward in CASES[device]:
        if peers.crawls(device, dtype, width):
            peers.left_out("DoRA in bfloat16", peers.CRAWLS)
            continue
        if quick:
            tokens, rank = min(tokens, width), min(rank, 32)
        yield case(device, tokens, width, rank, dtype, p, packed, backward)
