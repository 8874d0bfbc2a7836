"""Layers with adapters for the tests: tensors, the formula as PEFT computes it, gradients, the error rule."""

from __future__ import annotations

from functools import partial

import finefuse as ff
import torch
from codebook_cases import numbers
from tolerances import check
from torch.nn import functional

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def problem(tokens, rows, columns, rank, dtype=torch.float32, adapters=None, seed=0):
    """x, W, A, B, bias, dy, of a size at which base and update weigh alike."""
    adapters = adapters or dtype
    seed *= 10
    return (
        numbers(tokens, columns, dtype=dtype, seed=seed + 1),
        numbers(rows, columns, dtype=dtype, seed=seed + 2) / columns**0.5,
        numbers(rank, columns, dtype=adapters, seed=seed + 3) / columns**0.5,
        numbers(rows, rank, dtype=adapters, seed=seed + 4) / rank**0.5,
        numbers(rows, dtype=dtype, seed=seed + 5),
        numbers(tokens, rows, dtype=dtype, seed=seed + 6),
    )


def grads(function, *tensors, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def eager(x, w, a, b, bias, scale, mask=1.0):
    """As PEFT computes it: x to the adapters' type, the update to the base's."""
    h = functional.linear((x * mask).to(a.dtype), a)
    return functional.linear(x, w, bias) + (functional.linear(h, b) * scale).to(x.dtype)


def compare(
    x, w, a, b, bias, dy, scale=0.7, mask=None, weight=None, put=lambda *tensors: tensors, **options
):
    """(ours, eager, float64) of y, dx, dA, dB, db; `weight` is what our function gets in place of W, `put`
    takes tensors to where it runs."""
    ours_weight, up = put(w if weight is None else weight, dy)
    ours = grads(
        lambda x, a, b, bias: ff.lora_linear(
            x, ours_weight, a, b, scale=scale, bias=bias, **options
        ),
        *put(x, a, b, bias), upstream=up,
    )  # fmt: skip
    mask = torch.ones(()) if mask is None else mask
    plain = grads(
        lambda x, a, b, bias: eager(x, w.to(x.dtype), a, b, bias, scale, mask.to(x.dtype)),
        x, a, b, bias, upstream=dy,
    )  # fmt: skip
    truth = grads(
        lambda x, a, b, bias: eager(x, w.double(), a, b, bias, scale, mask.double()),
        *(t.double() for t in (x, a, b, bias)), upstream=dy.double(),
    )  # fmt: skip
    return [t.cpu() for t in ours], plain, truth


def check_together(names, results):
    """The error rule for each of (ours, eager, float64); over several problems where sums are few."""
    ours, plain, truth = (
        [torch.stack(parts) for parts in zip(*side, strict=True)]
        for side in zip(*results, strict=True)
    )
    for what, o, e, t in zip(names, ours, plain, truth, strict=True):
        assert o.dtype is e.dtype, what
        check(what, o, e, t)


def opcheck_of(dtype):
    """torch.library.opcheck. Its last test, of an op traced with symbols for sizes, takes nine tenths of the
    time, and types take no part in it: for float32 alone. That of fake tensors sees what a type changes."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dtype is torch.float32:
        tests += ("test_aot_dispatch_dynamic",)
    return partial(torch.library.opcheck, test_utils=tests)


def group(dtype=torch.float32, tokens=70, columns=1100):
    """x and three layers: of different sizes, ranks (one a library's), types of factors and scales."""
    x = numbers(tokens, columns, dtype=dtype, seed=1)
    parts = [problem(1, rows, columns, rank, dtype, seed=i) for i, (rows, rank) in
             enumerate(((64, 3), (96, 8), (33, 64)))]  # fmt: skip
    _, weights, lora_a, lora_b, biases, _ = map(list, zip(*parts, strict=True))
    biases[1] = None
    dys = [numbers(tokens, len(w), dtype=dtype, seed=9) for w in weights]
    return x, weights, lora_a, lora_b, biases, dys
