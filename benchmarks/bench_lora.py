"""LoRA and QLoRA linear layers, 4096×4096 of rank 16, beside the bare base product.

Candidates' times are divided by that of `finefuse`; what the update costs is read against "the bare
product", which has none: F.linear, with its dx where there is a backward. Bytes at least: the weight, x and
y, and as many again for dx.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor
from torch.nn import functional

from . import peers
from .low_rank import BLOCKSIZE, QUICK_SIZE, RANK, SIZE, Made, Makers, Problem, trained
from .measure import Row, Size, compare_outputs, forward, name_of, phases
from .peers import BITSANDBYTES, OURS, PEFT, TORCH

# tokens, type, whether with a backward
CASES = {
    "cpu": (
        (2048, torch.bfloat16, False),
        (2048, torch.bfloat16, True),
        (64, torch.bfloat16, False),
        (2048, torch.float32, False),
        (2048, torch.float32, True),
        (64, torch.float32, False),
        (64, torch.float32, True),
    ),
    "cuda": (
        (8192, torch.bfloat16, False),
        (8192, torch.bfloat16, True),
        (16, torch.bfloat16, False),
    ),
}


def eager(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    h = functional.linear(x, a)
    return torch.addmm(functional.linear(x, weight), h, b.t(), alpha=scale)


def layer(device: str, tokens: int, size: int, dtype: torch.dtype, backward: bool) -> list[Row]:
    p = Problem(device, tokens, size, dtype)
    compiled = peers.compiled(eager)

    def peft() -> Made:
        module = p.peft(peers.frozen_linear(p.weight))
        return (lambda: module(p.x)), trained(module)

    makers: Makers = {
        "finefuse": (
            OURS,
            lambda: ((lambda: ff.lora_linear(p.x, p.weight, p.a, p.b, scale=p.scale)), (p.a, p.b)),
        ),
        "eager": (TORCH, lambda: ((lambda: eager(p.x, p.weight, p.a, p.b, p.scale)), (p.a, p.b))),
        "torch.compile": (
            TORCH,
            lambda: ((lambda: compiled(p.x, p.weight, p.a, p.b, p.scale)), (p.a, p.b)),
        ),
        "PEFT": (PEFT, peft),
    }
    x, dy, w, a, b = p.double()
    truth = (
        dy @ w + p.scale * (dy @ b) @ a if backward else x @ w.t() + p.scale * (x @ a.t()) @ b.t()
    )
    case = f"LoRA {tokens} x {size}x{size} rank {RANK} {name_of(dtype)}, {phases(backward)}"
    moved = p.moved * (2 if backward else 1)
    runs = p.runs(makers, backward) | p.bare(p.weight, backward)
    rows = compare_outputs(case, runs, truth, moved)
    for row in rows:
        if row.name.startswith("the bare"):
            row.error = None
    return rows


def packed(tokens: int, size: int, dtype: torch.dtype) -> list[Row]:
    """QLoRA: an NF4 base, forward and backward; the bare products, of y and dx, are of decoded weights."""
    p = Problem("cpu", tokens, size, dtype)
    q = ff.quantize(p.weight, blocksize=BLOCKSIZE)
    decoded = ff.dequantize(q, torch.float32)

    def ours(weight: Any) -> Callable[[], Made]:
        return lambda: (lambda: ff.lora_linear(p.x, weight, p.a, p.b, scale=p.scale), (p.a, p.b))

    def bitsandbytes() -> Made:
        module = p.peft(peers.linear4bit(p.weight, dtype))
        return (lambda: module(p.x)), trained(module)

    makers: Makers = {
        "finefuse": (OURS, ours(q)),
        "finefuse, not quantised": (OURS, ours(p.weight)),
    }
    if peers.load({"PEFT and bitsandbytes": (BITSANDBYTES, bitsandbytes)}, "cpu"):
        makers["PEFT and bitsandbytes"] = (PEFT, bitsandbytes)
    runs = p.runs(makers, backward=True) | p.bare(decoded, backward=True)
    _, dy, _, a, b = p.double()
    rows = compare_outputs(
        f"QLoRA {tokens} x {size}x{size} NF4 rank {RANK} {name_of(dtype)}, forward + backward",
        runs,
        dy @ decoded.double() + p.scale * (dy @ b) @ a,
        2 * p.moved,
    )
    for row in rows:
        if row.name in ("finefuse, not quantised", "the bare products"):
            row.error = None  # of another weight, or without the update
    return rows


def half(tokens: int, size: int) -> list[Row]:
    """float16, in which torch's own products take seconds to minutes: beside the same in float32."""
    p, single = (Problem("cpu", tokens, size, t) for t in (torch.float16, torch.float32))
    runs = {
        name: forward(lambda q=q: ff.lora_linear(q.x, q.weight, q.a, q.b, scale=q.scale))
        for name, q in (("finefuse, float16", p), ("finefuse, float32", single))
    }
    x, _, w, a, b = p.double()
    truth = x @ w.t() + p.scale * (x @ a.t()) @ b.t()
    rows = compare_outputs(f"LoRA {tokens} x {size}x{size} float16, forward", runs, truth, p.moved)
    rows[1].error = None
    return rows


def group(device: str, tokens: int, size: int, dtype: torch.dtype) -> list[Row]:
    """q, k and v: three layers of one input, forward and backward, with dropout."""
    parts = [Problem(device, tokens, size, dtype) for _ in range(3)]
    x, dys, leaves = parts[0].x, [p.dy for p in parts], [t for p in parts for t in (p.a, p.b)]
    layers = []
    if peers.load({"PEFT": (PEFT, eager)}, device):
        layers = [p.peft(peers.frozen_linear(p.weight), lora_dropout=0.05) for p in parts]

    def together() -> list[Tensor]:
        return ff.lora_linear_group(
            x, [p.weight for p in parts], [p.a for p in parts], [p.b for p in parts],
            scale=parts[0].scale, dropout=0.05,
        )  # fmt: skip

    def one_by_one() -> list[Tensor]:
        return [ff.lora_linear(x, p.weight, p.a, p.b, scale=p.scale, dropout=0.05) for p in parts]

    runs = {
        name: lambda f=function: torch.autograd.grad(f(), (x, *leaves), dys)[0]
        for name, function in (("finefuse", together), ("finefuse, one by one", one_by_one))
    }
    runs["the bare products"] = lambda: torch.autograd.grad(
        [functional.linear(x, p.weight) for p in parts], x, dys
    )[0]
    if layers:
        theirs = [weight for module in layers for weight in trained(module)]
        runs["PEFT"] = lambda: torch.autograd.grad([v(x) for v in layers], (x, *theirs), dys)[0]
    rows = compare_outputs(
        f"LoRA of q, k and v {tokens} x {size}x{size} {name_of(dtype)}, forward + backward",
        runs, torch.zeros_like(x, dtype=torch.float64), 6 * parts[0].moved,
    )  # fmt: skip
    for row in rows:
        row.error = None  # each has masks of its own
    return rows


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    warnings.filterwarnings("ignore", module="bitsandbytes|peft")
    width = QUICK_SIZE if quick else SIZE
    if size == "standard":
        yield layer(device, 256, width, torch.float32, True)
        yield packed(256, width, torch.float32)
        return
    for tokens, dtype, backward in CASES[device]:
        if peers.crawls(device, dtype, width):
            peers.left_out("LoRA in bfloat16", peers.CRAWLS)
            continue
        yield layer(device, min(tokens, width) if quick else tokens, width, dtype, backward)
    if device == "cpu":
        slow = peers.crawls("cpu", torch.bfloat16, SIZE)
        dtype = torch.float32 if slow else torch.bfloat16
        yield packed(64 if quick else 512, width, dtype)
        yield half(64 if quick else 512, width)
    dtype = torch.float32 if peers.crawls(device, torch.bfloat16, SIZE) else torch.bfloat16
    yield group(device, 64 if quick else 2048, width, dtype)
