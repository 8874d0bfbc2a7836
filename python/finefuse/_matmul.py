"""Matrix products on the fastest engine that this CPU has for their type.

A fixed table, from what the CPU is and never from a timing, so that results do not change between runs:

| type | engine |
|---|---|
| float32 on AMD with AVX-512 | oneDNN: MKL, torch's own choice, keeps off AVX-512 there; 2.4× |
| float32 elsewhere (AMD with AVX2: 0.9 to 1.1×), float64, and any type on a GPU | torch |
| float32 of 4 to 384 rows, wide ones, on AMD with AVX2 | torch, turned (`_turned`): 1.1 to 2× |
| bfloat16 where oneDNN has a product for it | torch, which calls that |
| bfloat16 elsewhere, float16 | as float32: torch's own product, but for one row, takes 5 times as long |
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

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
    elif _turns(a, w):
        y = a.new_empty((len(a), len(w)))
        for columns, product in _turned(a, w, b):
            y[:, columns] = product
            del product  # before the next is made
    else:
        y = torch.mm(a, w.t()) if b is None else torch.addmm(b, a, w.t())
    return y.to(x.dtype)


class _Workspace(threading.local):
    """On a CPU, memory of each type for a decoded or widened weight or panel; a thread has its own.

    Fresh memory would cost more than the decoding: the system clears it page by page.
    """

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}

    def take(self, like: Tensor, dtype: torch.dtype, count: int) -> Tensor:
        """At least so many elements; `give_back` when done. A call in between has others."""
        if not like.is_cpu:  # torch keeps memory there itself, and knows of streams
            return like.new_empty(count, dtype=dtype)
        memory = self.memory.pop(dtype, None)
        if memory is None or memory.numel() < count:
            with torch.inference_mode(False):
                memory = torch.empty(count, dtype=dtype, device=like.device)
        return memory

    def give_back(self, memory: Tensor) -> None:
        if memory.is_cpu:
            self.memory[memory.dtype] = memory


workspace = _Workspace()

# Weights that are decoded or widened for a product are so in panels of about this size: they stay in a cache,
# and beyond the caches the bytes that they are made from are all the traffic.
PANEL_BYTES = 4 << 20


def widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, last row, these rows of the weight (N, K) in another type), in memory that is reused."""
    rows, columns = weight.shape
    panel = min(rows, max(PANEL_BYTES // (columns * dtype.itemsize), 1))
    memory = workspace.take(weight, dtype, panel * columns)
    turned = weight.stride(0) < weight.stride(1)  # rows of the panel as those of the weight lie
    for first in range(0, rows, panel):
        last = min(first + panel, rows)
        part = memory[: (last - first) * columns]
        part = part.view(columns, -1).t() if turned else part.view(-1, columns)
        yield first, last, part.copy_(weight[first:last])
    workspace.give_back(memory)


def linear_onto(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x·weightᵀ, over the memory of y where the engine can; y has the type `product_dtype(x)`."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return linear_onto(y, x, weight)
    if y.numel() == 0 or x.numel() == 0:
        return y
    if weight.dtype is not y.dtype and y.is_cpu:
        if len(x) == 1 and weight.stride(1) == 1:  # torch's own matrix-vector product is fast
            return y.add_(torch.mm(x, weight.t()))
        a = x.to(y.dtype)
        for first, last, part in widened(weight, y.dtype):
            y[:, first:last] += _turned_product(a, part).t()
        return y
    a, w = x.to(y.dtype), weight.to(y.dtype)
    if _takes_onednn(a, w):
        return torch.ops.mkldnn._linear_pointwise.binary(a, y, w, None, "add")
    if _turns(a, w):
        for columns, product in _turned(a, w):
            y[:, columns] += product
            del product  # before the next is made
        return y
    return y.addmm_(a, w.t())


# Rows of x for which a product is turned, and elements of the weight; the fewest of both, and of the
# product's columns, where the weight lies column by column (that of a dx). Narrower rows do not pay for
# writing the product twice, nor do outer products, whose x lies column by column; nor float64: 0.6 times.
_ROWS, _ELEMENTS, _WIDTH = (4, 384), 1 << 20, 1024
_STRIDED_ROWS, _STRIDED_ELEMENTS, _STRIDED_COLUMNS = 16, 1 << 22, 2048
_PIECE = 2048  # rows of the weight


@functools.cache
def _turning_is_faster() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and _is_amd()


def _turns(x: Tensor, weight: Tensor) -> bool:
    """Whether MKL is faster at weight · xᵀ than at x · weightᵀ, by more than turning it back costs."""
    fewest, elements, columns = _ROWS[0], _ELEMENTS, 1
    if weight.stride(1) != 1:
        fewest, elements, columns = _STRIDED_ROWS, _STRIDED_ELEMENTS, _STRIDED_COLUMNS
    return (
        x.is_cpu
        and fewest <= len(x) <= _ROWS[1]
        and x.shape[1] >= _WIDTH
        and x.stride(1) == 1
        and weight.numel() >= elements
        and len(weight) >= columns
        and x.dtype is torch.float32
        and not _takes_onednn(x, weight)
        and _turning_is_faster()
    )


def _turned(
    x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(columns of the product, these columns (M, R)) of x · weightᵀ + bias, taken as weight · xᵀ.

    In pieces, which are turned back while they are in a cache; each waits for the slowest of its threads, so
    that smaller ones lose on a busy machine what they gain on a quiet one.
    """
    for first in range(0, len(weight), _PIECE):
        columns = slice(first, first + _PIECE)
        part = None if bias is None else bias[columns]
        yield columns, _turned_product(x, weight[columns], part).t()


def columns_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Some columns y (M, R) of a linear layer from its rows (R, K) of the weight and (R,) of the bias.

    x and weight have the type `product_dtype(y)`. Taken as weight · xᵀ: the product's threads then share out
    the weight as those that have just decoded it did, and it is read by the core in whose cache it lies
    (AVX2, two threads, panels of 4 MB: 0.8 times what x · weightᵀ takes at 64 rows, 0.5 times at 16).
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return columns_into(y, x, weight, bias)
    y.copy_(_turned_product(x, weight, bias).t())


def _turned_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight · xᵀ (R, M), plus bias (R,)."""
    column = None if bias is None else bias.to(x.dtype)[:, None]
    if _takes_onednn(weight, x):
        product = torch.ops.mkldnn._linear_pointwise(weight, x, None, "none", [], "")
        return product if column is None else product.add_(column)
    if column is None:
        return torch.mm(weight, x.t())
    return torch.addmm(column, weight, x.t())


# Of a sum of outer products: rows of a piece, where the engine cannot add to what is there.
_SUM_BYTES = 8 << 20


@functools.cache
def _keeps_wide_products() -> bool:
    """Whether CUDA's product of 16-bit matrices can be had in float32: torch from 2.8 on, not on ROCm."""
    return hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None


def add_outer(total: Tensor, y: Tensor, x: Tensor, first: bool) -> None:
    """total (N, K) += y (M, N)ᵀ · x (M, K), or where it is the `first` term =; y and x have one type.

    The total may be wider: then products are rounded to their own type before they are added, but for those
    of CUDA.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return add_outer(total, y, x, first)
    onednn = _takes_onednn(y, x)
    if total.dtype is y.dtype and not onednn:
        if first:
            torch.mm(y.t(), x, out=total)
        else:
            total.addmm_(y.t(), x)
        return
    step = max(_SUM_BYTES // max(x.shape[1] * total.itemsize, 1), 1)
    if not x.is_cpu:
        step *= 16
    for n in range(0, total.shape[0], step):
        part, of = total[n : n + step], y[:, n : n + step].t()
        if onednn:
            product = torch.ops.mkldnn._linear_pointwise(of, x.t(), None, "none", [], "")
        elif x.is_cuda and total.dtype is torch.float32 and _keeps_wide_products():
            product = torch.mm(of, x, out_dtype=torch.float32)
        else:
            product = torch.mm(of, x)
        if first:
            part.copy_(product)
        else:
            part += product


def _takes_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype is torch.float32
        and a.is_cpu
        and a.numel() > 0
        and b.numel() > 0
        and _onednn_is_faster()
    )
