"""Rows with different adapters for the tests: tensors, who has which, the formula as PEFT computes it."""

from __future__ import annotations

import low_rank_cases
import numpy as np
import torch
from low_rank_cases import numbers
from torch.nn import functional


def split(kind, tokens, adapters, seed=0):
    """Ids by popularity; some rows without an adapter, some adapters without rows."""
    rng = np.random.default_rng(seed)
    if kind == "distinct":
        ids = np.arange(tokens) % adapters
    elif kind == "uniform":
        ids = rng.integers(-1, adapters, tokens)
    elif kind == "zipf":
        ids = np.minimum(rng.zipf(1.5, tokens) - 2, adapters - 1)
    elif kind == "same":
        ids = np.full(tokens, adapters - 1)
    else:
        assert kind == "none"
        ids = np.full(tokens, -1)
    return torch.from_numpy(rng.permutation(ids).astype(np.int64))


def problem(tokens, rows, columns, rank, adapters, dtype=torch.float32, factors=None, seed=0):
    x, w, _, _, bias, dy = low_rank_cases.problem(tokens, rows, columns, rank, dtype, factors, seed)
    a = numbers(adapters, rank, columns, dtype=factors or dtype, seed=10 * seed + 3) / columns**0.5
    b = numbers(adapters, rows, rank, dtype=factors or dtype, seed=10 * seed + 4) / rank**0.5
    return x, w, a, b, bias, dy


def scales(adapters):
    return torch.linspace(0.5, 2.0, adapters)


def loop(x, w, a, b, bias, adapter, scale, mask):
    """As PEFT computes it: an adapter's rows at a time, x in the adapters' type, the update in the base's."""
    y = functional.linear(x, w, bias)
    for i in range(len(a)):
        rows = (adapter == i).nonzero()[:, 0]
        h = functional.linear((x * mask)[rows].to(a.dtype), a[i])
        update = functional.linear(h, b[i]) * scale[i].to(a.dtype)
        y = y.index_add(0, rows, update.to(x.dtype))
    return y
