"""Matrix products on the fastest engine that this CPU has for their type.

A fixed table, from what the CPU is and never from a timing, so that results do not change between runs:

| type | engine |
|---|---|
| float32 on AMD with AVX-512 | oneDNN: MKL, torch's own choice, keeps off AVX-512 there; 2.4× |
| float32 elsewhere (AMD with AVX2: 0.9 to 1.1×), float64, and any type on a GPU | torch |
| bfloat16 where oneDNN has a product for it | torch, which calls that |
| bfloat16 elsewhere, float16 | as float32; a product of torch's own takes 5 times as long and more |
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _onednn_is_faster() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_amd()


def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:
        return False


@functools.cache
def _has_bfloat16_product() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which products of this tensor are taken: float32 where its own would crawl."""
    if x.is_cpu and (
        x.dtype is torch.float16 or (x.dtype is torch.bfloat16 and not _has_bfloat16_product())
    ):
        return torch.float32
    return x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times weight (N, K)ᵀ, plus bias (N,): (M, N) in the type of x.

    Any strides: dy (M, N) times a weight (N, K) is linear(dy, weight.t()). The weight has the type of x
    or `product_dtype(x)`. For inside of ops: neither differentiable nor traceable.
    """
    if torch.is_autocast_enabled(x.device.type):  # it would choose the type itself
        with torch.autocast(x.device.type, enabled=False):
            return linear(x, weight, bias)
    dtype = product_dtype(x)
    a, w = x.to(dtype), weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    if _takes_onednn(a, w):
        y = torch.ops.mkldnn._linear_pointwise(a, w, b, "none", [], "")
    else:
        y = torch.mm(a, w.t()) if b is None else torch.addmm(b, a, w.t())
    return y.to(x.dtype)


def linear_onto(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x·weightᵀ, over the memory of y where the engine can; y has the type `product_dtype(x)`."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return linear_onto(y, x, weight)
    a, w = x.to(y.dtype), weight.to(y.dtype)
    if y.numel() == 0 or a.numel() == 0:
        return y
    if _takes_onednn(a, w):
        return torch.ops.mkldnn._linear_pointwise.binary(a, y, w, None, "add")
    return y.addmm_(a, w.t())


def columns_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Some columns y (M, R) of a linear layer from its rows (R, K) of the weight and (R,) of the bias.

    x and weight have the type `product_dtype(y)`. Taken as weight · xᵀ: the product's threads then share out
    the weight as those that have just decoded it did, and it is read by the core in whose cache it lies
    (AVX2, two threads, panels of 4 MB: 0.8 times what x · weightᵀ takes at 64 rows, 0.5 times at 16).
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return columns_into(y, x, weight, bias)
    column = None if bias is None else bias.to(x.dtype)[:, None]
    if _takes_onednn(weight, x):
        product = torch.ops.mkldnn._linear_pointwise(weight, x, None, "none", [], "")
        if column is not None:
            product += column
    elif column is None:
        product = torch.mm(weight, x.t())
    else:
        product = torch.addmm(column, weight, x.t())
    y.copy_(product.t())


def _takes_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype is torch.float32
        and a.is_cpu
        and a.numel() > 0
        and b.numel() > 0
        and _onednn_is_faster()
    )
