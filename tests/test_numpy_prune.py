"""finefuse.numpy's pruning: the reference's masks, torch's, layouts, arguments. Needs no torch."""

from __future__ import annotations

import re

import finefuse.numpy as ffn
import numpy as np
import pytest
from finefuse.reference import prune as reference
from numpy_cases import (
    BFLOAT16,
    DTYPES,
    TYPES,
    Subclass,
    in_a_struct,
    layouts,
    read_only,
    same,
    swapped,
)

NORM = {"method": "wanda"}


def numbers(shape, dtype="float32", seed=0):
    """Weights of which some are equal."""
    w = np.random.default_rng(seed).standard_normal(shape) * 3
    return np.where(np.abs(w) < 3, np.round(w * 8) / 8, w).astype(TYPES[dtype])


def truth(weight, **options):
    norm = options.pop("activation_norm", None)
    wide = weight.dtype == np.float64
    weight = np.asarray(weight, np.float64 if wide else np.float32)
    default = "row" if options.pop("method", None) == "wanda" else "tensor"
    scope = options.pop("scope", None) or default
    return reference.prune_mask(weight, scope=scope, activation_norm=norm, **options)


def some_options(columns):
    norm = np.random.default_rng(5).random(columns).astype(np.float32)
    yield {"sparsity": 0.4}
    yield {"sparsity": 0.4, "scope": "row"}
    yield {"sparsity": 0.7, "method": "wanda", "activation_norm": norm}
    for m in (2, 3, 4, 8):
        if columns % m == 0:
            yield {"n": 1, "m": m}
            yield {"n": 1, "m": m, "method": "wanda", "activation_norm": norm}


def check(weight, options):
    want = truth(weight, **options)
    mask = ffn.prune_mask(weight, **options)
    assert type(mask) is np.ndarray
    assert mask.dtype == np.bool_
    assert mask.flags.c_contiguous
    assert np.array_equal(mask, want), options
    return want


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_and_zeros(isa, dtype):
    # odd tails; a row beyond a chunk of 4096; from 2**18 elements on the cut is looked for in a sample
    for shape in ((), (1,), (31,), (257,), (7, 33), (2, 3, 64), (3, 5001), (131, 2004)):
        weight = numbers(shape, dtype)
        for options in some_options(shape[-1] if shape else 1):
            want = check(weight, options)
            pruned = weight.copy()
            assert ffn.prune_(pruned, **options) is pruned
            assert same(pruned, np.where(want, weight, weight.dtype.type(0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    for name, weight in layouts(numbers((6, 9, 24), dtype)).items():
        for options in some_options(weight.shape[-1]):
            if weight.size:
                check(weight, options)
            assert ffn.prune_mask(weight, **options).shape == weight.shape, name


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2, 1::3],
        lambda x: x[..., ::-2],
        lambda x: x.transpose(1, 2, 0),
        swapped,
        in_a_struct,
        lambda x: x.view(Subclass),
    ],
)
def test_in_place_whatever_the_layout(view):
    weight = view(numbers((6, 9, 24)))
    before = np.array(weight, np.float32)
    want = truth(before, sparsity=0.5)
    assert ffn.prune_(weight, sparsity=0.5) is weight
    assert np.array_equal(np.asarray(weight, np.float32), np.where(want, before, 0))


def test_threads():
    weight = numbers((400, 1003))
    masks = []
    for threads in (1, 2, 5):
        before = ffn.get_num_threads()
        ffn.set_num_threads(threads)
        masks.append([ffn.prune_mask(weight, sparsity=0.5, scope=s) for s in ("tensor", "row")])
        ffn.set_num_threads(before)
    for other in masks[1:]:
        assert all(map(np.array_equal, other, masks[0]))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("code", ["nf4", "fp4", "dynamic8", "int4", 2, 3])
def test_codebooks(isa, code, double_quant):
    if isinstance(code, int):
        code = np.array(
            [-1, -0.6, -0.3, -0.1, 0, 0.2, 0.55, 1] if code == 3 else [-1, 0, 0.3, 1], np.float32
        )
    for shape in ((1,), (37, 75)):
        for options in some_options(shape[-1]):
            q = ffn.quantize(numbers(shape), code, 32, double_quant)
            before, absmax = ffn.dequantize(q), q.absmax.copy()
            want = truth(before, **options)
            assert np.array_equal(ffn.prune_mask(q, **options), want)
            assert ffn.prune_(q, **options) is q
            assert np.array_equal(ffn.dequantize(q), np.where(want, before, 0))
            assert np.array_equal(q.absmax, absmax)


def test_packed_arguments():
    q = ffn.quantize(numbers((4, 64)), np.linspace(-1, 1, 16).astype(np.float32))
    with pytest.raises(ValueError, match="weight: its codebook has no exact 0"):
        ffn.prune_(q, sparsity=0.5)
    q = ffn.quantize(numbers((4, 64)))
    q.codes.flags.writeable = False
    with pytest.raises(ValueError, match=r"weight\.codes: a read-only array"):
        ffn.prune_(q, sparsity=0.5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", BFLOAT16])
def test_the_same_as_torch(dtype):
    torch = pytest.importorskip("torch", reason="compares with the torch door")
    import finefuse as ff

    weight = numbers((20, 48), dtype)
    as_torch = torch.from_numpy(np.asarray(weight, np.float64)).to(getattr(torch, dtype))
    for options in some_options(48):
        given = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()
        }
        assert np.array_equal(
            ffn.prune_mask(weight, **options), ff.prune_mask(as_torch, **given).numpy()
        )


W = np.ones((2, 6), np.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "sparsity: None; give sparsity, or n and m"),
        ({"sparsity": 1.5}, ValueError, "sparsity: 1.5; allowed: 0 to 1"),
        ({"sparsity": np.nan}, ValueError, "sparsity: nan; allowed: 0 to 1"),
        ({"sparsity": "half"}, TypeError, "sparsity: a number or a 0-d array"),
        ({"sparsity": 0.5, "n": 2, "m": 3}, ValueError, "sparsity: given together with n or m"),
        ({"n": 2}, TypeError, "m: an int, not None"),
        ({"n": 1.0, "m": 2}, TypeError, "n: an int, not 1.0"),
        ({"n": True, "m": 2}, TypeError, "n: an int, not True"),
        ({"n": 3, "m": 2}, ValueError, "n: 3; allowed: 0 to m, 2"),
        ({"n": 2, "m": 4}, ValueError, "m: 4; rows of 6 elements are no multiple of it"),
        ({"n": 1, "m": 2, "scope": "row"}, ValueError, "scope: 'row'; with n and m"),
        ({"sparsity": 0.5, "scope": 1}, ValueError, "scope: 1; allowed: 'tensor', 'row'"),
        (
            {"sparsity": 0.5, "method": "l1"},
            ValueError,
            "method: 'l1'; allowed: 'magnitude', 'wanda'",
        ),
        ({"sparsity": 0.5, **NORM}, ValueError, "activation_norm: None; method='wanda' needs it"),
        ({"sparsity": 0.5, "activation_norm": W[0]}, ValueError, "activation_norm: only of use"),
        (
            {"sparsity": 0.5, **NORM, "activation_norm": [1.0]},
            TypeError,
            "activation_norm: a numpy.ndarray",
        ),
        (
            {"sparsity": 0.5, **NORM, "activation_norm": W},
            ValueError,
            "activation_norm: shape (2, 6); allowed",
        ),
        (
            {"sparsity": 0.5, **NORM, "activation_norm": -W[0]},
            ValueError,
            "activation_norm: an element is",
        ),
    ],
)
def test_wrong_arguments(options, error, message):
    for function in (ffn.prune_mask, ffn.prune_):
        with pytest.raises(error, match=re.escape(message)):
            function(W, **options)
    assert (W == 1).all()


def test_wrong_weights():
    for weight, error, message in (
        ([1.0], TypeError, "weight: a numpy.ndarray, not list"),
        (np.ones(3, np.int64), TypeError, "weight: dtype int64; allowed"),
    ):
        for function in (ffn.prune_mask, ffn.prune_):
            with pytest.raises(error, match=re.escape(message)):
                function(weight, sparsity=0.5)
    with pytest.raises(ValueError, match="weight: a read-only array"):
        ffn.prune_(read_only(W), sparsity=0.5)
    with pytest.raises(ValueError, match="weight: its elements share memory"):
        ffn.prune_(np.lib.stride_tricks.as_strided(W.copy(), (2, 6), (0, 4)), sparsity=0.5)
