"""What the benchmarks of `lora`, `dora` and `segmented` share: a layer with its input, PEFT's form of it, and
the runs of the candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import peers, roofline
from .measure import forward, gradients

SIZE, QUICK_SIZE, RANK, ALPHA = 4096, 256, 16, 32
BLOCKSIZE = 64

Function = Callable[[], Tensor]
Made = tuple[Function, tuple[Tensor, ...]]  # of x, and what else has a gradient: what it trains
Makers = dict[
    str, tuple[str, Callable[[], Made]]
]  # what a candidate needs (`peers.load`) and what makes it


class Problem:
    """A square layer with low-rank factors (or, with `adapters`, that many stacked), its input x and an
    upstream gradient dy."""

    def __init__(
        self,
        device: str,
        tokens: int,
        size: int,
        dtype: torch.dtype,
        rank: int = RANK,
        adapters: int | None = None,
    ) -> None:
        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)

        stacked = () if adapters is None else (adapters,)
        self.device, self.rank, self.scale = device, rank, ALPHA / rank
        self.weight = draw(size, size)
        self.a = draw(*stacked, rank, size).requires_grad_()
        self.b = draw(*stacked, size, rank).requires_grad_()
        self.x = torch.randn(tokens, size, device=device).to(dtype).requires_grad_()
        self.dy = draw(tokens, size)
        self.moved = (size * size + 2 * tokens * size) * dtype.itemsize

    def double(self) -> tuple[Tensor, ...]:
        """x, dy, weight, a and b in float64, for what is true."""
        every = (self.x, self.dy, self.weight, self.a, self.b)
        return tuple(t.detach().double() for t in every)

    def peft(self, base: nn.Module, magnitude: Tensor | None = None, **config: Any) -> nn.Module:
        """PEFT's layer around a base layer, with these factors and, for DoRA, this magnitude."""
        from peft import LoraConfig, inject_adapter_in_model

        holder = nn.Sequential(base)
        config = {"r": self.rank, "lora_alpha": ALPHA, "target_modules": ["0"], **config}
        inject_adapter_in_model(LoraConfig(use_dora=magnitude is not None, **config), holder)
        layer = holder[0]
        for module, value in zip(peft_parameters(layer), (self.a, self.b, magnitude), strict=False):
            module.weight = nn.Parameter(value.detach().clone())
        return layer

    def runs(self, makers: Makers, backward: bool) -> dict[str, Function]:
        """Of the candidates that can run, with a backward the gradients of x and of what each trains."""
        found = {}
        for name, make in peers.load(makers, self.device).items():
            function, leaves = make()
            found[name] = (
                gradients(function, (self.x, *leaves), self.dy) if backward else forward(function)
            )
        return found

    def bare(self, weight: Tensor, backward: bool) -> dict[str, Function]:
        """The products without an update, of y and with a backward of dx, as fast as a library has them."""
        of_y = roofline.bare_product(self.x, weight)
        if not backward:
            return {"the bare product": of_y}
        of_dx = roofline.bare_product(self.dy, weight.t())
        return {"the bare products": lambda: (of_y(), of_dx())[1]}


def peft_parameters(layer: Any) -> list[Any]:
    """The modules with the trained weights of PEFT's layer: A, B and, of DoRA, the magnitude."""
    parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [part["default"] for part in parts if "default" in part]


def trained(layer: Any) -> tuple[Tensor, ...]:
    return tuple(module.weight for module in peft_parameters(layer))
