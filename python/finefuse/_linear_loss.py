"""The chunk driver of the losses from hidden states: logits exist for some rows at a time.

    for some rows:    z = x Wᵀ + b        2·M·H·V     `linear`, panel by panel where W is packed or narrow
                      the row kernel      reads z, writes dz over it
                      dx = dz W           2·M·H·V
                      dW += dzᵀ x         2·M·H·V     a sum in float32 or wider

A *row kernel* is a function of (z, rows): it reads the logits z (m, V) of these rows of the batch, keeps
what it wants of them, and returns whether it has left their gradient in their place. The driver knows no
loss; the losses (`_linear_<family>.py`) know no products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C
from ._matmul import add_outer, linear, widened

Rows = slice | Tensor  # of the batch: a slice, or indices
RowKernel = Callable[[Tensor, Rows], bool]
# (first row, last row, these rows of the weight in the products' type)
Panels = Callable[[], Iterable[tuple[int, int, Tensor]]]


class Head(NamedTuple):
    """What makes logits of hidden states: z = c·tanh(y/c) of y = x Wᵀ + b, or y itself."""

    panels: Panels
    vocab: int
    dtype: torch.dtype  # of the products, of logits and of their gradient
    bias: Tensor | None
    softcap: float  # infinity: none

    @property
    def capped(self) -> bool:
        return self.softcap != float("inf")

    def logits(self, x: Tensor) -> Tensor:
        """(m, V) of x (m, H) of the products' type, before the softcap."""
        z: Tensor | None = None
        for first, last, part in self.panels():
            y = linear(x, part, None if self.bias is None else self.bias[first:last])
            if last - first == self.vocab:
                z = y
                continue  # to the end: the panels' memory is given back
            if z is None:
                z = x.new_empty((len(x), self.vocab))
            z[:, first:last] = y
        assert z is not None
        return z

    def cap(self, z: Tensor, keep: bool) -> Tensor | None:
        """z ← c·tanh(z/c), in place; tanh(z/c), if that is to be kept for the gradient."""
        if not self.capped:
            return None
        z.div_(self.softcap).tanh_()
        tanh = z.clone() if keep else None
        z.mul_(self.softcap)
        return tanh

    def hidden_gradient(self, dz: Tensor) -> Tensor:
        """dz W (m, H)."""
        dx: Tensor | None = None
        for first, last, part in self.panels():
            product = linear(dz[:, first:last], part.t())
            if last - first < self.vocab and product.dtype is not torch.float64:
                product = product.float()  # rounded once, however many panels there are
            dx = product if dx is None else dx.add_(product)
        assert dx is not None
        return dx


def dense_panels(weight: Tensor, dtype: torch.dtype) -> Panels:
    """Of a weight (V, H): itself, or widened piece by piece."""

    def panels() -> Iterator[tuple[int, int, Tensor]]:
        if weight.dtype is dtype:
            yield 0, weight.shape[0], weight
        else:
            yield from widened(weight, dtype)

    return panels


# ---- which rows together ------------------------------------------------------------------------

_CPU_ROWS = (64, 256)
_CPU_BYTES, _GPU_BYTES = 16 << 20, 512 << 20


def chunk_rows(rows: int, numbers: int, dtype: torch.dtype, on_cpu: bool) -> int:
    """How many rows of logits exist at a time.

    Each chunk reads the weight twice and reads and writes the sum of its gradient once: on a CPU 256 rows
    make that a tenth of the products' time. Fewer, so that the logits are a fifth of what they would be at
    once, but not fewer than 64, nor than 16 MB of them, which caches and allocators hold. On a GPU 512 MB.
    A row takes so many `numbers`: its logits, with a softcap twice, a teacher's.
    """
    row = numbers * dtype.itemsize
    if not on_cpu:
        return max(min(rows, _GPU_BYTES // row), 1)
    least, most = _CPU_ROWS
    wanted = max(min(-(-rows // 5), most), least, _CPU_BYTES // row)
    if wanted >= rows:
        return max(rows, 1)
    count = -(-rows // wanted)
    return -(-rows // count)  # of equal size


def chunks(counted: Tensor | None, rows: int, size: int) -> list[Rows]:
    """The rows that count (indices; None: all) in chunks."""
    if counted is None:
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
    return list(counted.split(size)) if len(counted) else []


def rows_that_count(keep: Tensor, *hidden: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """(indices of the rows that count, None for all; hidden (N, H)): others are never multiplied.

    On a GPU looking waits for the device. While a CUDA graph is captured all rows are taken, those that do
    not count as 0, and kernels pass over them.
    """
    if keep.is_cuda and torch.cuda.is_current_stream_capturing():
        return None, tuple(torch.where(keep[:, None], x, 0) for x in hidden)
    return (None if bool(keep.all()) else keep.nonzero().squeeze(1)), hidden


def part_of(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def put(x: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x.index_copy_(0, rows, values.to(x.dtype))


# ---- the walk -----------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """Of hidden (N, H), of the weight (V, H) and of the bias (V,); empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def gradient_shapes(hidden: Tensor, vocab: int, wanted: Sequence[bool]) -> list[tuple[int, ...]]:
    """Of Gradients; wanted: by hidden, by weight, by bias."""
    shapes = (tuple(hidden.shape), (vocab, hidden.shape[1]), (vocab,))
    return [shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True)]


def walk(
    head: Head, hidden: Tensor, parts: Sequence[Rows], kernel: RowKernel, wanted: Sequence[bool],
    partial: bool = False,
) -> Gradients:  # fmt: skip
    """Takes the rows of hidden (N, H) chunk by chunk through the row kernel; sums gradients up.

    wanted: by hidden, by weight, by bias. The sums of the last two are float32 (float64 for float64) until
    the last chunk. partial: the gradient of hidden is a term of a sum, and has the type of sums.
    """
    of_hidden, of_weight, of_bias = gradient_shapes(hidden, head.vocab, wanted)
    sums = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    complete = sum(_count(rows) for rows in parts) == len(hidden)
    make = hidden.new_empty if complete else hidden.new_zeros
    dx = make(of_hidden, dtype=sums if partial else hidden.dtype)
    dw = fresh(hidden, of_weight, sums)
    db = hidden.new_zeros(of_bias, dtype=sums)
    first = True
    for rows in parts:
        x = part_of(hidden, rows).to(head.dtype)
        z = head.logits(x)
        tanh = head.cap(z, keep=any(wanted))
        if not kernel(z, rows) or not any(wanted):
            del z, tanh  # before the next ones are made
            continue
        if tanh is not None:  # dy = dz·(1 - tanh²)
            torch.ops.aten.tanh_backward.grad_input(z, tanh, grad_input=z)
        del tanh
        if wanted[0]:
            put(dx, rows, head.hidden_gradient(z))
        if wanted[1]:
            add_outer(dw, z, x, first)
        if wanted[2]:
            db += z.sum(0, dtype=sums)
        first = False
        del z
    if first and wanted[1]:
        dw.zero_()
    return Gradients(dx, dw.to(hidden.dtype), db.to(hidden.dtype))


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def fresh(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """New memory, on a CPU advised to huge pages before it is first written."""
    memory = like.new_empty(shape, dtype=dtype)
    if memory.is_cpu:
        _C.advise_huge_pages(memory, memory.nbytes)
    return memory
