"""What this machine can do, measured in the run that quotes it: memory bandwidth, product rates, and the
fastest form of one product."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from finefuse import _C, _matmul
from torch import Tensor

from .measure import timer

Work = dict[str, tuple[Callable[[], Any], float]]  # what is run, and its bytes or operations


def limits(device: str, quick: bool) -> dict[str, dict[str, float]]:
    """{"bandwidth": GB/s of read, fill, copy …, "products": GFLOP/s by type}; random data."""
    seconds = timer(device)

    def rates(work: Work) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in work}
        for done in range(6):
            for name, (call, _) in work.items():
                taken = seconds(call)
                if done > 0:  # the first is the warm-up
                    times[name].append(taken)
        return {name: round(n / median(times[name]) / 1e9, 1) for name, (_, n) in work.items()}

    return {
        "bandwidth": rates(memory(device, 64 if quick else 512 if device == "cpu" else 1024)),
        "products": rates(products(device, quick)),
    }


def memory(device: str, megabytes: int) -> Work:
    """read (a sum), fill, copy (read + write), on a CPU the first write to fresh memory; out of cache."""
    n = megabytes << 18
    a, b = torch.rand(n, device=device), torch.rand(n, device=device)
    size = 4.0 * n
    work: Work = {
        "read": (lambda: a.sum(), size),
        "fill": (lambda: b.fill_(1.0), size),
        "copy": (lambda: b.copy_(a), 2 * size),
    }
    if device == "cpu":
        work["fresh"] = (lambda: torch.empty(n).fill_(1.0), size)
    return work


def products(device: str, quick: bool) -> Work:
    """Square products. On CPUs no float16: torch takes minutes for it."""
    torch.set_float32_matmul_precision("highest")  # no tf32
    n = 512 if quick else 2048 if device == "cpu" else 8192
    # bf16 without instructions for it runs at a few GFLOP/s: a small product shows that as well
    few = n if device == "cuda" or _C.machine_isa() == "avx512bf16" else 512

    def pair(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]

    x, w = pair(n, torch.float32)
    x16, w16 = pair(few, torch.bfloat16)
    work: Work = {
        "float32": (lambda: torch.mm(x, w), 2.0 * n**3),
        "bfloat16": (lambda: torch.mm(x16, w16), 2.0 * few**3),
    }
    if takes_onednn(x):
        work["float32 oneDNN"] = (lambda: onednn_product(x, w), 2.0 * n**3)
    return work


def takes_onednn(x: Tensor) -> bool:
    return x.is_cpu and x.dtype is torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) · b (N, K)ᵀ by oneDNN, which is not what torch takes for float32."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def torch_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.t())


def bare_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """a (M, K) · b (N, K)ᵀ in the form that is the fastest here: by either library, as it stands or turned,
    as (b · aᵀ)ᵀ, which few rows of a may prefer. A type whose own product crawls is widened beforehand."""
    dtype, seconds = _matmul.product_dtype(a), timer(a.device.type)
    a, b = a.detach().to(dtype), b.detach().to(dtype)
    forms: list[Callable[[], Tensor]] = []
    for product in (torch_product, onednn_product) if takes_onednn(a) else (torch_product,):
        forms.append(functools.partial(product, a, b))
        forms.append(lambda product=product: product(b, a).t())
    return min(forms, key=lambda form: min(seconds(form) for _ in range(2)))
