"""DoRA layers, 4096×4096 of rank 16 and 384, beside plain LoRA and the bare base product.

Candidates' times are divided by that of `finefuse`. "eager" is PEFT's formula without its detours: the norm
of W + s·BA formed in full, and torch's own products. Bytes at least: the weight twice (the norms), x and y,
and as many again for the gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import peers
from .bench_lora import ALPHA, BLOCKSIZE, QUICK_SIZE, SIZE
from .measure import Row, Size, compare_outputs, forward
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
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device) / shape[-1] ** 0.5

    weight, dy = draw(size, size).to(dtype), draw(tokens, size).to(dtype)
    a, b = (draw(*shape).to(dtype).requires_grad_() for shape in ((rank, size), (size, rank)))
    m = (torch.rand(size, device=device) + 0.5).to(dtype).requires_grad_()
    x = (draw(tokens, size) * size**0.5).to(dtype).requires_grad_()
    scale, compiled = ALPHA / rank, peers.compiled(eager)
    base = ff.quantize(weight, blocksize=BLOCKSIZE) if packed else weight

    def peft() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        from peft import LoraConfig, get_peft_model

        linear: nn.Module = nn.Linear(size, size, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if packed:
            import bitsandbytes as bnb

            linear = bnb.nn.Linear4bit(size, size, False, quant_type="nf4", compute_dtype=dtype)
            linear.weight = bnb.nn.Params4bit(
                weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
            )
            linear = linear.to(device)
        config = LoraConfig(
            r=rank, lora_alpha=ALPHA, target_modules=["0"], use_dora=True, lora_dropout=p
        )
        layer = get_peft_model(nn.Sequential(linear), config).base_model.model[0]
        values = [
            (layer.lora_A["default"], a), (layer.lora_B["default"], b),
            (layer.lora_magnitude_vector["default"], m),
        ]  # fmt: skip
        for module, value in values:
            module.weight = nn.Parameter(value.detach().clone())
        return (lambda: layer(x)), tuple(module.weight for module, _ in values)

    def ours(**options: Any) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        def function() -> Tensor:
            return ff.lora_linear(x, base, a, b, scale=scale, dropout=p, **options)

        return function, (a, b, *options.values())

    # function, what else has a gradient
    makers: dict[str, tuple[str, Callable[[], Any]]] = {
        "finefuse": (OURS, lambda: ours(magnitude=m)),
        "finefuse, plain LoRA": (OURS, ours),
    }
    if not packed:
        makers["the bare product"] = (TORCH, lambda: ((lambda: functional.linear(x, weight)), ()))
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
    runs = {}
    for name, make in peers.load(makers, device).items():
        function, leaves = make()
        if backward:
            runs[name] = lambda f=function, leaves=leaves: torch.autograd.grad(
                f(), (x, *leaves), dy
            )[0]
        else:
            runs[name] = forward(function)
    plain = ff.dequantize(base, torch.float32) if packed else weight
    x_, w_, a_, b_, m_, dy_ = (t.detach().double() for t in (x, plain, a, b, m, dy))
    c = m_ / torch.linalg.norm(w_ + scale * b_ @ a_, dim=1)
    if backward:
        dz = c * dy_
        truth = dz @ w_ + scale * (dz @ b_) @ a_
    else:
        truth = c * (x_ @ w_.t() + scale * (x_ @ a_.t()) @ b_.t())
    moved = (2 * size * size + 2 * tokens * size) * dtype.itemsize
    what = "forward + backward" if backward else "forward"
    details = f"rank {rank} {str(dtype)[6:]}{f', dropout {p}' if p else ''}"
    rows = compare_outputs(
        f"DoRA {tokens} x {size}x{size}{' NF4' if packed else ''} {details}, {what}",
        runs, truth, moved * (2 if backward else 1),
    )  # fmt: skip
    for row in rows:
        if p or row.name in ("the bare product", "finefuse, plain LoRA"):
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
