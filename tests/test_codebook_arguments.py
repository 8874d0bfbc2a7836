"""Wrong arguments of quantize, dequantize, codebook_linear and their ops."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from codebook_cases import (
    TABLES,
    layer,
    numbers,
)
from finefuse import codebook as module

RAW = torch.ops.finefuse


def test_wrong_arguments():
    x, q = numbers(4, 64), layer(8, 64)
    with pytest.raises(TypeError, match="x: a tensor, not list"):
        ff.quantize([1.0])
    with pytest.raises(TypeError, match=r"x: dtype torch.int64; allowed: float32"):
        ff.quantize(torch.ones(3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"x: a tensor of numbers, not a CodebookTensor"):
        ff.quantize(q)
    for name in ("nf5", "", "NF4"):
        with pytest.raises(ValueError, match=f"code: '{name}'; allowed: 'nf4', 'fp4', 'dynamic8'"):
            ff.quantize(x, name)
    with pytest.raises(TypeError, match="code: a tensor, not int"):
        ff.quantize(x, 4)
    for code in (torch.zeros(5), torch.zeros(4, 4), torch.tensor(1.0), torch.zeros(0)):
        with pytest.raises(
            ValueError, match=r"code: shape .*; allowed: \(4, 8, 16, 256 entries,\)"
        ):
            ff.quantize(x, code)
    for entries in (
        [0.0, 1.0, 0.5, 2.0],
        [0.0, 1.0, float("nan"), 2.0],
        [0.0, 1.0, 2.0, float("inf")],
    ):
        with pytest.raises(ValueError, match="code: entries that are not finite and in ascending"):
            ff.quantize(x, torch.tensor(entries))
    for size in (0, -64, 8, 15, 100, 8192):
        for call in (
            lambda: ff.quantize(x, blocksize=size),
            lambda: ff.quantize(x, nested_blocksize=size, double_quant=True),
            lambda: ff.learn_codebook(x, blocksize=size),
            lambda: RAW.quantize_forward(x, q.code, 0, size),
        ):
            with pytest.raises(
                ValueError, match=f"blocksize: {size}; allowed: powers of two from 16"
            ):
                call()
    for size in (64.0, None, "64"):
        with pytest.raises(TypeError, match="blocksize: an int, not"):
            ff.quantize(x, blocksize=size)
    with pytest.raises(ValueError, match="rule: 1; allowed"):
        RAW.quantize_forward(x, TABLES["8 bits"], 1, 64)
    with pytest.raises(TypeError, match="code: dtype torch.float64"):
        RAW.quantize_forward(x, q.code.double(), 0, 64)
    # dequantize
    with pytest.raises(TypeError, match="q: a CodebookTensor .*, not Tensor"):
        ff.dequantize(x)
    with pytest.raises(TypeError, match=r"dtype: torch.int8; allowed: float32"):
        ff.dequantize(q, torch.int8)
    with pytest.raises(ValueError, match=r"out: shape \(4, 64\); q has \(8, 64\)"):
        ff.dequantize(q, out=x)
    with pytest.raises(TypeError, match=r"dtype: torch.float16; out has torch.float32"):
        ff.dequantize(q, torch.float16, out=torch.empty(8, 64))
    with pytest.raises(TypeError, match=r"out: dtype torch.int32; allowed"):
        ff.dequantize(q, out=torch.empty(8, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="out: on meta; q is on cpu"):
        ff.dequantize(q, out=torch.empty(8, 64, device="meta"))
    with pytest.raises(ValueError, match="out: requires a gradient"):
        ff.dequantize(q, out=torch.empty(8, 64, requires_grad=True))
    with pytest.raises(TypeError, match="out: a tensor of numbers"):
        ff.dequantize(q, out=q.clone())
    # codebook_linear
    for backend in ("auto", "eager"):
        with ff.backend(backend):
            with pytest.raises(TypeError, match="q: a CodebookTensor"):
                ff.codebook_linear(x, x)
            with pytest.raises(TypeError, match="x: a tensor of numbers"):
                ff.codebook_linear(q, q)
            with pytest.raises(TypeError, match="x: dtype torch.int64"):
                ff.codebook_linear(x.long(), q)
            with pytest.raises(
                ValueError, match=r"x: shape \(4, 63\); a weight of \(8, 64\) takes"
            ):
                ff.codebook_linear(x[:, :63], q)
            with pytest.raises(ValueError, match=r"x: shape \(\); a weight"):
                ff.codebook_linear(torch.tensor(1.0), q)
            with pytest.raises(ValueError, match=r"q: shape \(64,\); allowed: \(out, in\)"):
                ff.codebook_linear(x, ff.quantize(x[0]))
            with pytest.raises(ValueError, match=r"bias: shape \(7,\); allowed: \(8,\)"):
                ff.codebook_linear(x, q, torch.zeros(7))
            with pytest.raises(TypeError, match="bias: a tensor, not float"):
                ff.codebook_linear(x, q, 1.0)
            with pytest.raises(ValueError, match="bias: on meta; x is on cpu"):
                ff.codebook_linear(x, q, torch.zeros(8, device="meta"))
            with pytest.raises(ValueError, match="codes: on meta; x is on cpu"):
                ff.codebook_linear(x, q.to("meta"))
    # learn_codebook
    for bad in (1, 5, 16, 4.0, True):
        with pytest.raises(ValueError, match="bits: .*; allowed: 2, 3, 4, 8"):
            ff.learn_codebook(x, bad)
    with pytest.raises(ValueError, match="iterations: -1; allowed: 0 and above"):
        ff.learn_codebook(x, iterations=-1)
    for bad in (torch.zeros(0), torch.tensor([1.0, float("nan")]), torch.tensor(float("inf"))):
        with pytest.raises(ValueError, match="x: shape .*one element or more, all finite"):
            ff.learn_codebook(bad)


def test_ops_check_what_kernels_rely_on():
    """A CodebookTensor put together wrongly, or a raw op called so, raises; nothing is read past an end."""
    q = layer(8, 64, double_quant=True)
    good = dict(zip(
        ("codes", "code", "absmax", "nested_code", "nested_absmax", "nested_offset", "nested_blocksize",
         "blocksize"), module.fields(q), strict=True,
    ))  # fmt: skip
    x = numbers(2, 64)
    for name, value, error in (
        ("codes", q.codes[1:], ValueError),
        ("codes", q.codes.int(), TypeError),
        ("code", q.code[:12], ValueError),
        ("code", q.code.double(), TypeError),
        ("absmax", q.absmax[1:], ValueError),
        ("absmax", q.absmax.float(), TypeError),
        ("nested_code", q.code, ValueError),
        ("nested_code", None, TypeError),
        ("nested_offset", None, TypeError),
        ("nested_absmax", q.nested.absmax[1:], ValueError),
        ("nested_absmax", q.nested.absmax.half(), TypeError),
        ("nested_blocksize", 0, ValueError),
        ("blocksize", 48, ValueError),
        ("codes", q.codes.to("meta"), ValueError),
    ):
        values = tuple((good | {name: value}).values())
        for call in (
            lambda: RAW.dequantize_out(*values, torch.empty(8, 64)),
            lambda: RAW.dequantize_forward(*values, [8, 64], torch.float32),
            lambda: RAW.codebook_linear_forward(x, *values, 8, None),
            lambda: RAW.codebook_linear_backward(x[:, :8], *values, 64),
        ):
            with pytest.raises(
                error, match=rf"^{name}: |^code: on cpu; codes is on meta|^codes: on"
            ):
                call()
    with pytest.raises(ValueError, match="codes: 256 elements"):
        RAW.codebook_linear_forward(x, *good.values(), 9, None)
