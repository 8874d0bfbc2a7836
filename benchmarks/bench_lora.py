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
from torch import Tensor, nn
from torch.nn import functional

from . import peers, roofline
from .measure import Row, Size, compare_outputs, forward
from .peers import BITSANDBYTES, OURS, PEFT, TORCH

SIZE, QUICK_SIZE, RANK, ALPHA = 4096, 256, 16, 32
BLOCKSIZE = 64
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


class Problem:
    """A layer, its input and an upstream gradient."""

    def __init__(self, device: str, tokens: int, size: int, dtype: torch.dtype) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device) / shape[-1] ** 0.5

        self.weight = draw(size, size).to(dtype)
        self.a, self.b = (
            draw(*shape).to(dtype).requires_grad_() for shape in ((RANK, size), (size, RANK))
        )
        self.x = (draw(tokens, size) * size**0.5).to(dtype).requires_grad_()
        self.dy = draw(tokens, size).to(dtype)
        self.scale = ALPHA / RANK
        self.moved = (size * size + 2 * tokens * size) * dtype.itemsize

    def peft(self, base: nn.Module) -> nn.Module:
        """PEFT's layer around a base layer, with these factors."""
        from peft import LoraConfig, inject_adapter_in_model

        holder = nn.Sequential(base)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
        inject_adapter_in_model(config, holder)
        layer = holder[0]
        with torch.no_grad():
            for name, factor in (("lora_A", self.a), ("lora_B", self.b)):
                module = getattr(layer, name)["default"]
                module.weight = nn.Parameter(factor.detach().clone())
        return layer

    def linear(self) -> nn.Linear:
        size = self.weight.shape[0]
        layer = nn.Linear(size, size, bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        return layer


def eager(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    h = functional.linear(x, a)
    return torch.addmm(functional.linear(x, weight), h, b.t(), alpha=scale)


def with_backward(
    p: Problem, function: Callable[[], Tensor], *leaves: Tensor
) -> Callable[[], Tensor]:
    """Forward, then the gradients of the leaves; dx, the first, is what is compared."""
    return lambda: torch.autograd.grad(function(), leaves, p.dy)[0]


def layer(device: str, tokens: int, size: int, dtype: torch.dtype, backward: bool) -> list[Row]:
    p = Problem(device, tokens, size, dtype)
    compiled = peers.compiled(eager)

    def peft() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        module = p.peft(p.linear())
        factors = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        return (lambda: module(p.x)), factors

    # function, what else has a gradient
    makers: dict[str, tuple[str, Callable[[], Any]]] = {
        "finefuse": (
            OURS,
            lambda: ((lambda: ff.lora_linear(p.x, p.weight, p.a, p.b, scale=p.scale)), (p.a, p.b)),
        ),
        "the bare product": (TORCH, lambda: ((lambda: functional.linear(p.x, p.weight)), ())),
        "eager": (TORCH, lambda: ((lambda: eager(p.x, p.weight, p.a, p.b, p.scale)), (p.a, p.b))),
        "torch.compile": (
            TORCH,
            lambda: ((lambda: compiled(p.x, p.weight, p.a, p.b, p.scale)), (p.a, p.b)),
        ),
        "PEFT": (PEFT, peft),
    }
    if roofline.takes_onednn(p.x) and not backward:
        makers["the bare product by oneDNN"] = (
            TORCH,
            lambda: (
                lambda: roofline.onednn_product(p.x, p.weight), (),
            ),
        )  # fmt: skip
    runs = {}
    for name, make in peers.load(makers, device).items():
        function, factors = make()
        runs[name] = with_backward(p, function, p.x, *factors) if backward else forward(function)
    x, w, a, b = (t.detach().double() for t in (p.x, p.weight, p.a, p.b))
    dy = p.dy.double()
    truth = (
        dy @ w + p.scale * (dy @ b) @ a if backward else x @ w.t() + p.scale * (x @ a.t()) @ b.t()
    )
    what = "forward + backward" if backward else "forward"
    case = f"LoRA {tokens} x {size}x{size} rank {RANK} {str(dtype)[6:]}, {what}"
    rows = compare_outputs(case, runs, truth, p.moved * (2 if backward else 1))
    for row in rows:
        if row.name.startswith("the bare"):
            row.error = None
    return rows


def packed(tokens: int, size: int, dtype: torch.dtype) -> list[Row]:
    """QLoRA: an NF4 base, forward and backward."""
    p = Problem("cpu", tokens, size, dtype)
    q = ff.quantize(p.weight, blocksize=BLOCKSIZE)

    def bitsandbytes() -> Callable[[], Tensor]:
        import bitsandbytes as bnb

        base = bnb.nn.Linear4bit(size, size, bias=False, quant_type="nf4", compute_dtype=dtype)
        base.weight = bnb.nn.Params4bit(
            p.weight.detach().clone(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=False,
        )
        module = p.peft(base.to("cpu"))
        factors = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        return with_backward(p, lambda: module(p.x), p.x, *factors)

    makers: dict[str, tuple[str, Callable[[], Any]]] = {
        "finefuse": (
            OURS,
            lambda: with_backward(
                p, lambda: ff.lora_linear(p.x, q, p.a, p.b, scale=p.scale), p.x, p.a, p.b
            ),
        ),
        "finefuse, not quantised": (
            OURS,
            lambda: with_backward(
                p, lambda: ff.lora_linear(p.x, p.weight, p.a, p.b, scale=p.scale), p.x, p.a, p.b
            ),
        ),
    }
    runs = {name: make() for name, make in peers.load(makers, "cpu").items()}
    if peers.load({"PEFT and bitsandbytes": (PEFT, bitsandbytes)}, "cpu") and peers.load(
        {"PEFT and bitsandbytes": (BITSANDBYTES, bitsandbytes)}, "cpu"
    ):
        runs["PEFT and bitsandbytes"] = bitsandbytes()
    w, a, b = (t.detach().double() for t in (ff.dequantize(q, torch.float32), p.a, p.b))
    dy = p.dy.double()
    rows = compare_outputs(
        f"QLoRA {tokens} x {size}x{size} NF4 rank {RANK} {str(dtype)[6:]}, forward + backward",
        runs,
        dy @ w + p.scale * (dy @ b) @ a,
        2 * p.moved,
    )
    for row in rows:
        if row.name == "finefuse, not quantised":
            row.error = None  # of another weight
    return rows


def half(tokens: int, size: int) -> list[Row]:
    """float16, in which torch's own products take seconds to minutes: beside the same in float32."""
    p, single = (Problem("cpu", tokens, size, t) for t in (torch.float16, torch.float32))
    runs = {
        name: forward(lambda q=q: ff.lora_linear(q.x, q.weight, q.a, q.b, scale=q.scale))
        for name, q in (("finefuse, float16", p), ("finefuse, float32", single))
    }
    x, w, a, b = (t.detach().double() for t in (p.x, p.weight, p.a, p.b))
    truth = x @ w.t() + p.scale * (x @ a.t()) @ b.t()
    rows = compare_outputs(f"LoRA {tokens} x {size}x{size} float16, forward", runs, truth, p.moved)
    rows[1].error = None
    return rows


def group(device: str, tokens: int, size: int, dtype: torch.dtype) -> list[Row]:
    """q, k and v: three layers of one input, forward and backward, with dropout."""
    parts = [Problem(device, tokens, size, dtype) for _ in range(3)]
    x, dys, leaves = parts[0].x, [p.dy for p in parts], [t for p in parts for t in (p.a, p.b)]
    layers = [p.peft(p.linear()) for p in parts] if peers.load({"": (PEFT, eager)}, device) else []

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
        for module in layers:
            module.lora_dropout["default"] = nn.Dropout(0.05)
        theirs = [m.weight for v in layers for m in (v.lora_A["default"], v.lora_B["default"])]
        runs["PEFT"] = lambda: torch.autograd.grad([v(x) for v in layers], (x, *theirs), dys)[0]
    rows = compare_outputs(
        f"LoRA of q, k and v {tokens} x {size}x{size} {str(dtype)[6:]}, forward + backward",
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
