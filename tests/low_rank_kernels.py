"""The kernels of a stem for GPUs, CUDA's and Triton's, as the tests of layers with adapters call them."""

from __future__ import annotations

import mmap
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from conftest import GPU, unavailable
from finefuse._args.lora import dropout_numbers
from finefuse._backend import FLAGS
from guards import tensor_between_guards
from low_rank_cases import DTYPES
from tolerances import check

DEVICE = "cuda" if GPU else "cpu"
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # csrc/core/dtype.h
NO_DROPOUT = (None, 0, 1.0)


class Kernels(NamedTuple):
    """A backend's kernels on CPU tensors; outputs are filled with rubbish before."""

    backend: str
    module: Any
    put: Any = lambda t: t.to(DEVICE)

    def place(self) -> tuple[int, Any]:
        stream = torch.cuda.current_stream().cuda_stream if GPU else 0
        return stream, torch.zeros(len(FLAGS), dtype=torch.int32, device=DEVICE)

    def rubbish(self, *shape: int, dtype: Any = torch.float32) -> Any:
        return self.put(torch.full(shape, float("nan"), dtype=dtype))

    def dropout(self, seed: int | None, p: float) -> tuple[Any, int, float]:
        return NO_DROPOUT if seed is None else (self.put(torch.tensor([seed])), *dropout_numbers(p))

    def shrink(self, x, factor, g, seed=None, p=0.0):
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        rank = factor.shape[0]
        h = self.rubbish(x.shape[0], rank, dtype=wide)
        outer = self.rubbish(rank, x.shape[1], dtype=wide)
        self.module.lora_shrink(
            self.put(x), CODES[x.dtype], *x.shape, rank, self.put(factor), CODES[factor.dtype],
            *factor.stride(), h, 2.0, self.put(g), outer, 0.5, *self.dropout(seed, p), self.place(),
        )  # fmt: skip
        return h.cpu(), outer.cpu()

    def expand(self, h, factor, dtype, y=None, bias=None, seed=None, p=0.0):
        rank, columns = factor.shape
        out = self.rubbish(h.shape[0], columns, dtype=dtype) if y is None else self.put(y)
        self.module.lora_expand(
            self.put(h), h.shape[0], columns, rank, self.put(factor), CODES[factor.dtype],
            *factor.stride(), 0.5, None if bias is None else self.put(bias), y is not None, out,
            CODES[dtype], *self.dropout(seed, p), self.place(),
        )  # fmt: skip
        return out.cpu()

    def shrink_group(self, x, members):
        """Members: (factor or None, g or None, seed), p = 0.5; (h, outer) of each, None where absent."""
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        given, results = [], []
        for factor, g, seed in members:
            rank = len(factor) if g is None else g.shape[1]
            h = None if factor is None else self.rubbish(len(x), rank, dtype=wide)
            outer = None if g is None else self.rubbish(rank, x.shape[1], dtype=wide)
            turned = (None, 0, 0, 0)
            if factor is not None:
                turned = (self.put(factor), CODES[factor.dtype], *factor.stride())
            put_g = None if g is None else self.put(g)
            given.append(
                (
                    rank,
                    *turned,
                    h,
                    2.0,
                    put_g,
                    outer,
                    0.5,
                    *self.dropout(seed, 0.5 if seed else 0.0),
                )
            )
            results.append((h, outer))
        self.module.lora_shrink_group(self.put(x), CODES[x.dtype], *x.shape, given, self.place())
        return [[None if t is None else t.cpu() for t in pair] for pair in results]

    def dropped(self, x, seed, p, y=None):
        out = self.rubbish(*x.shape, dtype=x.dtype) if y is None else self.put(y)
        self.module.lora_dropout(
            self.put(x), CODES[x.dtype], x.numel(), y is not None, out, *self.dropout(seed, p),
            self.place(),
        )  # fmt: skip
        return out.cpu()

    def linear(self, x, w, a, b, bias):
        """CUDA: a few tokens, h included. Triton: the fused product, of h given."""
        (tokens, columns), (rows, rank) = x.shape, b.shape
        y, b = self.rubbish(tokens, rows, dtype=x.dtype), b.t()
        if self.backend == "cuda":
            h = self.rubbish(tokens, rank)
            self.module.lora_linear(
                self.put(x), CODES[x.dtype], tokens, columns, rank, self.put(w), rows, self.put(a),
                CODES[a.dtype], *a.stride(), self.put(b.t()), CODES[b.dtype], *b.stride(), 0.7,
                self.put(bias), h, y, self.place(),
            )  # fmt: skip
            check("h", h.cpu(), x.float() @ a.float().t(), x.double() @ a.double().t())
        else:
            h = self.put(
                (x.double() @ a.double().t()).to(
                    y.dtype if y.dtype is torch.float64 else torch.float32
                )
            )
            self.module.lora_product(
                self.put(x), CODES[x.dtype], tokens, columns, self.put(w), *w.stride(), rows, h, rank,
                self.put(b.t()), CODES[b.dtype], *b.stride(), 0.7, self.put(bias), y, *NO_DROPOUT,
                self.place(),
            )  # fmt: skip
        return y.cpu()


def module_of(stem: str, request: Any) -> Any:
    """A stem's kernels in the backend that the fixture's parameter names."""
    backend = request.param
    why = unavailable(backend)
    if why:
        pytest.skip(why)
    if backend == "cuda":
        return import_module("finefuse._CUDA")
    request.getfixturevalue("triton_kernels")
    return import_module(f"finefuse.kernels.{stem}")


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """Between pages that must not be touched, with the strides it has."""
    if not tensor.is_contiguous():
        return guarded(tensor.mT, at_end).mT
    return tensor_between_guards(tensor, at_end) if tensor.nbytes < mmap.PAGESIZE * 64 else tensor
