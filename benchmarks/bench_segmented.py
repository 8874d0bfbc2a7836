"""Many adapters in one batch: a 4096×4096 layer, 64 adapters of rank 16.

Candidates' times are divided by that of `finefuse`; what the adapters cost is what each takes beyond "the
bare product", which has none. PEFT's mixed batch is a Python loop over the adapters in the batch, in which
names are compared row by row; "a loop" is the best that torch's operations make of it, with the rows of each
adapter found beforehand.
Bytes at least: the weight, x and y, every adapter that has rows, and as many again for the gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import finefuse as ff
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import peers
from .low_rank import ALPHA, QUICK_SIZE, RANK, SIZE, Made, Makers, Problem
from .measure import Row, Size, compare_outputs, name_of, phases
from .peers import OURS, PEFT, TORCH

ADAPTERS = 64
# tokens, type, which rows have which adapter, whether with a backward
CASES = {
    "cpu": (
        (512, torch.bfloat16, "uniform", False),
        (512, torch.bfloat16, "uniform", True),
        (512, torch.float32, "uniform", False),
        (512, torch.float32, "uniform", True),
        (512, torch.float32, "Zipf", True),
        (512, torch.float32, "all the same", True),
        (64, torch.float32, "all distinct", False),
    ),
    "cuda": (
        (8192, torch.bfloat16, "uniform", False),
        (8192, torch.bfloat16, "uniform", True),
        (64, torch.bfloat16, "all distinct", False),
    ),
}


def split(kind: str, tokens: int) -> Tensor:
    if kind == "all distinct":
        return torch.arange(tokens) % ADAPTERS
    if kind == "all the same":
        return torch.full((tokens,), ADAPTERS - 1)
    weights = 1 / torch.arange(1, ADAPTERS + 1) ** (1.0 if kind == "Zipf" else 0.0)
    return torch.multinomial(weights, tokens, replacement=True)


def loop(
    x: Tensor,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
    rows: dict[int, Tensor],
) -> Tensor:
    """As fast as torch's operations make it: rows sorted once, and added once."""
    order = torch.cat(list(rows.values()))
    parts = x[order].split([len(own) for own in rows.values()])
    updates = [
        functional.linear(functional.linear(part, a[i]), b[i])
        for i, part in zip(rows, parts, strict=True)
    ]
    return functional.linear(x, weight).index_add_(0, order, torch.cat(updates), alpha=scale)


def case(
    device: str, tokens: int, size: int, dtype: torch.dtype, kind: str, backward: bool
) -> list[Row]:
    p = Problem(device, tokens, size, dtype, adapters=ADAPTERS)
    x, weight, a, b, scale = p.x, p.weight, p.a, p.b, p.scale
    ids = split(kind, tokens)
    # each adapter's own parameters, as PEFT has them: a slice of a stack costs a gradient of all of it
    own = [[t.detach().clone().requires_grad_() for t in stack] for stack in (a, b)]
    present = {i: (ids == i).nonzero()[:, 0].to(device) for i in ids.unique().tolist()}
    adapter, names = ids.to(device), [str(i) for i in ids.tolist()]

    def peft() -> Made:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
        model = get_peft_model(nn.Sequential(peers.frozen_linear(weight)), config, adapter_name="0")
        for i in range(1, ADAPTERS):
            model.add_adapter(str(i), config)
        layer = model.base_model.model[0].eval()
        factors = []
        with torch.no_grad():
            for i in range(ADAPTERS):
                for part, stacked in ((layer.lora_A, a), (layer.lora_B, b)):
                    part[str(i)].weight = nn.Parameter(stacked[i].detach().clone())
                    if i in present:
                        factors.append(part[str(i)].weight)
        return (lambda: layer(x, adapter_names=names)), tuple(factors)

    makers: Makers = {
        "finefuse": (
            OURS,
            lambda: (
                (lambda: ff.lora_linear_segmented(x, weight, a, b, adapter, scale=scale)), (a, b),
            ),
        ),
        "a loop": (
            TORCH,
            lambda: (
                (lambda: loop(x, weight, *own, scale, present)),
                tuple(t for stack in own for i, t in enumerate(stack) if i in present),
            ),
        ),
        "PEFT": (PEFT, peft),
    }  # fmt: skip
    x_, dy_, w_, a_, b_ = p.double()
    truth = dy_ @ w_ if backward else x_ @ w_.t()
    for i, rows in present.items():
        left, right = (dy_ @ b_[i], a_[i]) if backward else (x_ @ a_[i].t(), b_[i].t())
        truth[rows] += scale * left[rows] @ right
    moved = size * size + 2 * tokens * size + 2 * len(present) * RANK * size
    rows = compare_outputs(
        f"{ADAPTERS} adapters, {kind}, {tokens} x {size}x{size} rank {RANK} {name_of(dtype)}, "
        f"{phases(backward)}",
        p.runs(makers, backward) | p.bare(weight, backward), truth,
        moved * dtype.itemsize * (2 if backward else 1),
    )  # fmt: skip
    for row in rows:
        if row.name.startswith("the bare"):
            row.error = None
    return rows


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    warnings.filterwarnings("ignore", module="peft")
    width = QUICK_SIZE if quick else SIZE
    if size == "standard":
        yield case(device, 256, width, torch.float32, "uniform", True)
        return
    for tokens, dtype, kind, backward in CASES[device]:
        if peers.crawls(device, dtype, width):
            peers.left_out("many adapters in bfloat16", peers.CRAWLS)
            continue
        yield case(device, min(tokens, width) if quick else tokens, width, dtype, kind, backward)
