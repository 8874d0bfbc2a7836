"""finefuse.numpy's lora_linear, with magnitudes too, and lora_linear_segmented: the reference, torch's bits,
layouts, arguments. Needs no torch."""

from __future__ import annotations

import numpy as np
import pytest

try:
    import ml_dtypes

    BFLOAT16 = [np.dtype(ml_dtypes.bfloat16)]
except ImportError:
    BFLOAT16 = []

import finefuse.numpy as ffn
from finefuse.reference import dora as dora_reference
from finefuse.reference import lora as reference
from finefuse.reference import segmented as segmented_reference
from tolerances import check

NARROW = [np.dtype(np.float32), *BFLOAT16, np.dtype(np.float16)]
DTYPES = [*NARROW, np.dtype(np.float64)]


def numbers(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def problem(tokens, rows, columns, rank, dtype=np.float32, adapters=None):
    adapters = dtype if adapters is None else adapters
    return (
        numbers(tokens, columns, dtype=dtype, seed=1),
        (numbers(rows, columns, seed=2) / columns**0.5).astype(dtype),
        (numbers(rank, columns, seed=3) / columns**0.5).astype(adapters),
        (numbers(rows, rank, seed=4) / rank**0.5).astype(adapters),
        numbers(rows, dtype=dtype, seed=5),
        numbers(tokens, rows, dtype=dtype, seed=6),
    )


def eager(x, w, a, b, bias, dy, scale, mask):
    """float32 (float64) products of the stored numbers, each result rounded to its type."""
    wide = np.float64 if x.dtype == np.float64 else np.float32
    X, W, A, B, DY = (v.astype(wide) for v in (x, w, a, b, dy))
    dropped, g = X * mask.astype(wide), wide(scale) * (DY @ B)
    h = dropped @ A.T
    y = X @ W.T + wide(scale) * (h @ B.T) + bias.astype(wide)
    return (
        y.astype(x.dtype),
        (DY @ W + mask.astype(wide) * (g @ A)).astype(x.dtype),
        (g.T @ dropped).astype(a.dtype),
        (wide(scale) * (DY.T @ h)).astype(b.dtype),
    )


def check_all(x, w, a, b, bias, dy, p=0.0, weight=None, scale=0.7, seed=5):
    ours = ffn.lora_linear(
        x, w if weight is None else weight, a, b, scale=scale, bias=bias, dropout=p, seed=seed,
        return_grad=True, upstream=dy,
    )  # fmt: skip
    mask = reference.keep_mask(x.shape, p, seed) if p else np.ones(1)
    plain = eager(x, w, a, b, bias, dy, scale, mask)
    truth = (
        reference.lora_linear(x, w, a, b, scale, bias, p, seed),
        *reference.gradients(dy, x, w, a, b, scale, p, seed),
    )
    for name, o, e, t in zip(("y", "dx", "dA", "dB"), ours, plain, truth, strict=True):
        assert o.dtype == e.dtype, name
        check(name, o, e, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_reference(dtype, p):
    for tokens, rank in ((0, 2), (33, 5), (300, 3)):
        check_all(*problem(tokens, 19, 75, rank, dtype), p=p)
    check_all(*problem(33, 40, 96, 8, dtype, np.float32), p=p)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("tokens", [7, 40])
def test_packed(dtype, tokens):
    x, w, a, b, bias, dy = problem(tokens, 40, 96, 5, dtype)
    q = ffn.quantize(w, double_quant=True)
    check_all(x, ffn.dequantize(q, np.float32), a, b, bias, dy, weight=q)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_magnitude(p):
    """DoRA, dense and packed."""
    x, w, a, b, bias, dy = problem(33, 40, 96, 5)
    m = np.abs(numbers(40, seed=7)) + np.float32(0.5)
    q = ffn.quantize(w)
    for weight, plain in ((w, w), (q, ffn.dequantize(q))):
        ours = ffn.lora_linear(
            x, weight, a, b, scale=0.7, bias=bias, dropout=p, seed=5, magnitude=m, return_grad=True,
            upstream=dy,
        )  # fmt: skip
        truth = (
            dora_reference.dora_linear(x, plain, a, b, m, 0.7, bias, p, 5),
            *dora_reference.gradients(dy, x, plain, a, b, m, 0.7, p, 5),
        )
        for name, o, t in zip(("y", "dx", "dA", "dB", "dm"), ours, truth, strict=True):
            check(name, o, t, t)
        norm = dora_reference.dora_norm(plain, a, b, 0.7)
        check("norm", ffn.dora_norm(weight, a, b, 0.7), norm, norm)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_segmented(dtype, p):
    x, w, _, _, bias, dy = problem(33, 40, 96, 5, dtype)
    a, b = numbers(3, 5, 96, seed=3) / np.float32(10), numbers(3, 40, 5, seed=4)
    adapter, scale = np.random.default_rng(0).integers(-1, 3, 33), np.array([0.5, 1, 2], np.float32)
    ours = ffn.lora_linear_segmented(
        x,
        w,
        a,
        b,
        adapter,
        scale=scale,
        bias=bias,
        dropout=p,
        seed=5,
        return_grad=True,
        upstream=dy,
    )
    arrays = (x, w, a, b, adapter, scale)
    truth = (
        segmented_reference.lora_linear_segmented(*arrays, bias, p, 5),
        *segmented_reference.gradients(dy, *arrays, p, 5),
    )
    for name, o, t in zip(("y", "dx", "dA", "dB"), ours, truth, strict=True):
        check(name, o, t.astype(o.dtype), t)


def test_the_same_mask_and_bits_as_torch():
    torch = pytest.importorskip("torch")
    import finefuse as ff

    x, w, a, b, *_ = problem(9, 24, 75, 4)
    zero = np.zeros_like(w)
    y = ffn.lora_linear(x, zero, a, b, dropout=0.4, seed=17)
    arrays = [torch.from_numpy(v) for v in (x, zero, a, b)]
    theirs = ff.lora_linear(*arrays, dropout=0.4, seed=17)
    np.testing.assert_array_equal(y, theirs.numpy())
    del w


def test_layouts_and_shapes():
    x, w, a, b, bias, _ = problem(24, 24, 40, 4)
    want = ffn.lora_linear(x, w, a, b, bias=bias)
    np.testing.assert_array_equal(
        ffn.lora_linear(x.reshape(2, 3, 4, 40), w, a, b, bias=bias), want.reshape(2, 3, 4, 24)
    )
    np.testing.assert_allclose(ffn.lora_linear(x[0], w, a, b, bias=bias), want[0], rtol=1e-5)
    changes = (
        np.asfortranarray,
        lambda v: v[::-1][::-1],
        lambda v: v.astype(v.dtype.newbyteorder()),
    )
    for change in changes:
        got = ffn.lora_linear(*map(change, (x, w, a, b)), bias=bias)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    y, *gradients = ffn.lora_linear(x, w, a, b, return_grad=True)
    ones = ffn.lora_linear(x, w, a, b, return_grad=True, upstream=np.ones_like(y))[1:]
    for one, other in zip(gradients, ones, strict=True):
        np.testing.assert_array_equal(one, other)


def test_wrong_arguments():
    x, w, a, b, bias, dy = problem(3, 8, 16, 2)
    for error, message, args, options in (
        (TypeError, "x: a numpy.ndarray, not list", ([1.0], w, a, b), {}),
        (TypeError, "weight: dtype float64; x has float32", (x, w.astype(float), a, b), {}),
        (TypeError, "lora_a: dtype float64; x has float32", (x, w, a.astype(float), b), {}),
        (TypeError, "lora_b: dtype int64", (x, w, a, b.astype(int)), {}),
        (ValueError, r"x: shape \(3, 15\); a weight of", (x[:, :15], w, a, b), {}),
        (ValueError, r"lora_a: shape \(2, 15\); allowed", (x, w, a[:, :15], b), {}),
        (ValueError, r"lora_a: shape \(0, 16\); the rank", (x, w, a[:0], b[:, :0]), {}),
        (ValueError, r"lora_b: shape \(8, 1\); allowed", (x, w, a, b[:, :1]), {}),
        (ValueError, r"bias: shape \(7,\)", (x, w, a, b), {"bias": bias[:7]}),
        (ValueError, "upstream: of use only", (x, w, a, b), {"upstream": dy}),
        (ValueError, r"upstream: shape \(2, 8\)", (x, w, a, b),
         {"upstream": dy[:2], "return_grad": True}),
        (ValueError, "dropout: 2.0; allowed: 0 to 1", (x, w, a, b), {"dropout": 2}),
        (ValueError, "seed: None; with dropout", (x, w, a, b), {"dropout": 0.5}),
        (TypeError, "seed: an int, not 1.5", (x, w, a, b), {"dropout": 0.5, "seed": 1.5}),
        (TypeError, "scale: a number", (x, w, a, b), {"scale": "1"}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            ffn.lora_linear(*args, **options)
    q = ffn.quantize(np.ones((4, 4), np.float32))
    wide = np.ones((2, 32768), np.float32)
    lies = ffn.CodebookArray(q.codes, q.absmax, q.code, (32768, 32768), q.dtype, q.blocksize, "nf4")
    one = np.ones((1, 32768), np.float32)
    with pytest.raises(ValueError, match="codes: "):
        ffn.lora_linear(wide, lies, one, one.T)
    with pytest.raises(ValueError, match="codes: "):
        ffn.lora_linear_segmented(wide, lies, one[None], one.T[None], np.zeros(2, np.int64))
    for scale in ("1", ["1"], None):
        with pytest.raises(TypeError, match="scale: a number"):
            ffn.lora_linear_segmented(x, w, a[None], b[None], np.zeros(3, np.int64), scale=scale)
