"""Layers with DoRA for the tests: tensors, the formula as PEFT computes it, three ways to it."""

from __future__ import annotations

import finefuse as ff
import low_rank_cases
import torch
from low_rank_cases import grads, numbers
from torch.nn import functional


def problem(tokens, rows, columns, rank, dtype=torch.float32, factors=None, seed=0):
    """x, W, A, B, m, bias, dy, of a size at which base and update weigh alike."""
    x, w, a, b, bias, dy = low_rank_cases.problem(tokens, rows, columns, rank, dtype, factors, seed)
    m = (numbers(rows, seed=10 * seed + 7).abs() + 0.5).to(a.dtype)
    return x, w, a, b, m, bias, dy


def peft_norm(w, a, b, scale):
    """B A and the sum in the base's type."""
    return torch.linalg.norm(w + scale * (b @ a).to(w.dtype), dim=1).detach()


def peft_linear(x, w, a, b, m, bias, scale, mask):
    """As PEFT computes it, without its product with an identity for B A: x to the adapters' type, the rest in
    the base's."""
    c = (m / peft_norm(w, a, b, scale)).to(x.dtype)
    dropped = x * mask
    h = functional.linear(dropped.to(a.dtype), a)
    update = functional.linear(h, b).to(x.dtype) * scale
    return functional.linear(x, w, bias) + (c - 1) * functional.linear(dropped, w) + c * update


def compare(x, w, a, b, m, bias, dy, scale=0.7, mask=None, weight=None, **options):
    """(ours, eager, float64) of y, dx, dA, dB, dm, db."""
    weight = w if weight is None else weight
    mask = torch.ones(()) if mask is None else mask
    ours = grads(
        lambda x, a, b, m, bias: ff.lora_linear(
            x, weight, a, b, scale=scale, bias=bias, magnitude=m, **options
        ),
        x, a, b, m, bias, upstream=dy,
    )  # fmt: skip
    plain = grads(
        lambda x, a, b, m, bias: peft_linear(
            x, w.to(x.dtype), a, b, m, bias, scale, mask.to(x.dtype)
        ),
        x, a, b, m, bias, upstream=dy,
    )  # fmt: skip
    truth = grads(
        lambda x, a, b, m, bias: peft_linear(x, w.double(), a, b, m, bias, scale, mask.double()),
        *(t.double() for t in (x, a, b, m, bias)), upstream=dy.double(),
    )  # fmt: skip
    return ours, plain, truth
