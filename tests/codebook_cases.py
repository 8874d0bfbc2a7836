"""Packed codes for the tests: tables, numbers, layers, the bits of the reference."""

from __future__ import annotations

import finefuse as ff
import torch
from finefuse import _codebooks
from finefuse.reference import codebook as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TABLES = {
    "2 bits": torch.tensor([-1.0, -0.2, 0.3, 1.0]),
    "3 bits": torch.tensor([-1.0, -0.6, -0.3, -0.1, 0.0, 0.2, 0.55, 1.0]),
    "4 bits": torch.linspace(-1, 1, 16) ** 3,
    "8 bits": torch.linspace(-1, 1, 256),
}
CODES = [*_codebooks.NAMED, *TABLES]


def code_of(name):
    return TABLES.get(name, name)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def truth_absmax(q):
    if q.nested is None:
        return q.absmax.numpy()
    n = q.nested
    return reference.nested_absmax(
        q.absmax.numpy(), n.code.numpy(), n.absmax.numpy(), n.blocksize, n.offset.item()
    )


def layer(rows, columns, name="nf4", blocksize=64, double_quant=False):
    return ff.quantize(
        numbers(rows, columns, seed=1) / columns**0.5, code_of(name), blocksize, double_quant
    )


def same(a, b, dtype=None):
    assert type(a) is type(b) is ff.CodebookTensor
    assert a.shape == b.shape
    assert a.dtype is (dtype or b.dtype)
    for name in b.__tensor_flatten__()[0]:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.__tensor_flatten__()[1][1:] == b.__tensor_flatten__()[1][1:]
    return True
