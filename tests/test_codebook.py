"""quantize, dequantize and learn_codebook: bits against the reference."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from codebook_cases import (
    CODES,
    DTYPES,
    TABLES,
    code_of,
    numbers,
    same,
    truth_absmax,
)
from conftest import MACHINE_LEVELS
from finefuse import _codebooks
from finefuse import codebook as module
from finefuse.reference import codebook as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import check

# 1, 3, 17: one short block, odd counts; 64·5: whole blocks; 37·75: rows that do not fill blocks.
SHAPES = [(1,), (3,), (17,), (5, 64), (37, 75), (3, 5, 7)]


def table_of(name):
    return TABLES[name].numpy() if name in TABLES else _codebooks.NAMED[name]


def truth_of(q):
    """float32, as a torch tensor."""
    flat = reference.dequantize(
        q.codes.numpy(), q.numel(), q.code.numpy(), truth_absmax(q), q.blocksize
    )
    return torch.from_numpy(np.asarray(flat)).view(q.shape)


# ---- quantize and dequantize -------------------------------------------------------------------


def test_named_tables():
    """SPEC's bits; and the reference's, which were written down by another hand."""
    for name, table in reference.CODES.items():
        assert table.tobytes() == _codebooks.NAMED[name].tobytes(), name
    digest = hashlib.sha256(_codebooks.NAMED["dynamic8"].tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    int4 = _codebooks.NAMED["int4"]
    np.testing.assert_array_equal(int4 * np.float32(7), np.arange(-8, 8))


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_reference(isa, name, dtype):
    for shape in SHAPES:
        for blocksize in (16, 64, 4096):
            x = numbers(*shape, dtype=dtype)
            q = ff.quantize(x, code_of(name), blocksize)
            codes, absmax = reference.quantize(x.float().numpy(), table_of(name), blocksize)
            np.testing.assert_array_equal(q.codes.numpy(), codes)
            np.testing.assert_array_equal(q.absmax.numpy(), absmax)
            assert q.shape == x.shape
            assert q.dtype is dtype
            assert q.blocksize == blocksize
            assert q.nested is None
            assert q.code.numpy().tobytes() == table_of(name).tobytes()
            assert q.quant_type == (name if name in _codebooks.NAMED else None)
            for out_dtype in (None, *DTYPES):
                w = ff.dequantize(q, out_dtype)
                assert w.dtype is (out_dtype or dtype)
                assert torch.equal(w, truth_of(q).to(out_dtype or dtype))


@pytest.mark.parametrize("nested_blocksize", [16, 256])
@pytest.mark.parametrize("name", CODES)
def test_double_quantisation(isa, name, nested_blocksize):
    for shape in (*SHAPES, (70, 129)):
        x = numbers(*shape) * 0.02
        q = ff.quantize(x, code_of(name), 16, True, nested_blocksize)
        codes, absmax = reference.quantize(x.numpy(), table_of(name), 16)
        nested, nested_absmax, offset = reference.double_quantize(absmax, nested_blocksize)
        np.testing.assert_array_equal(q.codes.numpy(), codes)
        np.testing.assert_array_equal(q.absmax.numpy(), nested)
        np.testing.assert_array_equal(q.nested.absmax.numpy(), nested_absmax)
        assert q.absmax.dtype is torch.uint8
        assert q.nested.blocksize == nested_blocksize
        assert q.nested.offset.item() == offset
        for dtype in DTYPES:
            assert torch.equal(ff.dequantize(q, dtype), truth_of(q).to(dtype))


def test_any_shape_and_strides():
    base = numbers(6, 9, 66)
    cases = {
        "0-d": torch.tensor(-3.0),
        "transposed": base[0].t(),
        "slice": base[:, 1:8:3, :64],
        "expanded": base[:1].expand(6, 9, 66),
        "lazy negative": torch.randn(3, 5, dtype=torch.complex64).conj().imag,
    }
    for name, x in cases.items():
        q = ff.quantize(x, blocksize=16)
        assert q.shape == x.shape, name
        assert q.is_contiguous(), name
        plain = ff.quantize(x.clone(memory_format=torch.contiguous_format), blocksize=16)
        assert torch.equal(q.codes, plain.codes), name
        assert torch.equal(ff.dequantize(q), ff.dequantize(plain)), name
    assert ff.dequantize(ff.quantize(torch.tensor(-3.0))).item() == -3.0
    for shape in ((0,), (0, 7), (3, 0, 2)):
        for double in (False, True):
            q = ff.quantize(torch.zeros(shape), "dynamic8", double_quant=double)
            assert ff.dequantize(q).shape == shape
            assert q.codes.numel() == q.absmax.numel() == 0


@pytest.mark.parametrize("name", CODES)
def test_exact_where_the_codebook_is(name):
    """Entries times a power of two come back bit for bit, zeros too; nothing is further than the nearest."""
    table = torch.from_numpy(table_of(name).copy())
    x = torch.cat([table.clamp(-1, 1), torch.ones(1)]).repeat_interleave(3) * 4
    w = ff.dequantize(ff.quantize(x, code_of(name), 1024))
    inside = torch.cat([table.abs() <= 1, torch.ones(1, dtype=torch.bool)]).repeat_interleave(3)
    assert torch.equal(w[inside], x[inside])
    y = numbers(64)
    scaled = y / y.abs().max()
    best = (scaled[:, None] - table).abs().amin(-1)
    got = (scaled - ff.dequantize(ff.quantize(y, code_of(name))) / y.abs().max()).abs()
    assert (got <= best + 2e-3 if name == "fp4" else got <= best + 1e-6).all()


@pytest.mark.parametrize("name", CODES)
def test_blocks_at_the_edge(isa, name):
    """Zeros, NaN, infinities and denormals stay in their own block."""
    x = numbers(6, 16)
    x[0] = 0.0
    x[1, 5] = float("nan")
    x[2, 3], x[2, 4] = float("inf"), -float("inf")
    x[3] = torch.linspace(-1, 1, 16) * 1e-41
    x[4, 0] = -0.0
    q = ff.quantize(x, code_of(name), 16)
    codes, absmax = reference.quantize(x.numpy(), table_of(name), 16)
    np.testing.assert_array_equal(q.codes.numpy(), codes)
    np.testing.assert_array_equal(q.absmax.numpy(), absmax)
    w = ff.dequantize(q)
    np.testing.assert_array_equal(w.numpy(), truth_of(q).numpy())
    assert (w[0] == 0).all()
    assert torch.isnan(w[1]).all()
    assert w[2, 3] == float("inf")
    assert torch.isfinite(w[3:]).all()
    for spoilt in (x[1], x[2]):
        with pytest.raises(ValueError, match="x: NaN or inf; with double_quant=True"):
            ff.quantize(spoilt, code_of(name), 16, double_quant=True)


def test_out():
    q = ff.quantize(numbers(37, 75))
    for dtype in DTYPES:
        want = ff.dequantize(q, dtype)
        out = torch.full((37, 75), 7.0, dtype=dtype)
        assert ff.dequantize(q, out=out) is out
        assert torch.equal(out, want)
        wide = torch.full((37, 160), 7.0, dtype=dtype)
        ff.dequantize(q, dtype, out=wide[:, 3:153:2])
        assert torch.equal(wide[:, 3:153:2], want)
        assert (wide[:, 4::2] == 7).all()
        turned = torch.empty(75, 37, dtype=dtype).t()
        assert torch.equal(ff.dequantize(q, out=turned), want)
    x = torch.ones(37, 75, requires_grad=True) * 1.0
    loss = (x.square()).sum()
    ff.dequantize(q, out=x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_that_shares_memory():
    """Of what is read, or with itself: an error, and nothing is written."""
    made = ff.quantize(numbers(64, 128), double_quant=True)
    for name, part in made._parts().items():
        if name == "nested_offset":
            continue
        memory = torch.zeros(64 * 128 + 8)
        place = memory.view(part.dtype)[8 : 8 + part.numel()].copy_(part.flatten())
        q = made.clone()
        setattr(q, name, place)
        before = memory.clone()
        with pytest.raises(ValueError, match=f"out: shares memory with q.{name}"):
            ff.dequantize(q, out=memory[: 64 * 128].view(64, 128))
        assert torch.equal(memory, before)
    with pytest.raises(ValueError, match="out: its elements share memory"):
        ff.dequantize(made, out=torch.empty(64 * 128).as_strided((64, 128), (100, 1)))


def test_default_device():
    """Only new weights follow it: what belongs on the CPU does, and tensors stay where they are."""
    x = numbers(40, 64)
    q = ff.quantize(numbers(32, 64), double_quant=True)
    codes, state = q.to_bitsandbytes()
    want = ff.codebook_linear(x, q)
    module.workspace.memory.clear()
    with torch.device("meta"):
        assert torch.equal(ff.codebook_linear(x, q), want)
        again = ff.CodebookTensor.from_bitsandbytes(codes, state)
        layer = ff.nn.CodebookLinear(64, 32, double_quant=True)
        assert layer(torch.empty(3, 64)).shape == (3, 32)
    assert torch.equal(ff.codebook_linear(x, again), want)
    assert again.nested.offset.is_cpu
    assert layer.weight.is_meta
    q.nested_offset = q.nested_offset.to("meta")
    with pytest.raises(ValueError, match="nested_offset: on meta; allowed: the CPU"):
        ff.dequantize(q)


def test_table_of_the_raw_op():
    """torch.ops.finefuse.quantize takes what finefuse.quantize takes."""
    x, nf4 = numbers(64), torch.from_numpy(_codebooks.NAMED["nf4"])
    with pytest.raises(ValueError, match="ascending"):
        torch.ops.finefuse.quantize(x, nf4.flip(0))
    with pytest.raises(ValueError, match="not finite"):
        torch.ops.finefuse.quantize(x, nf4 * float("nan"))
    with pytest.raises(ValueError, match="rule: 1; allowed: 0"):
        torch.ops.finefuse.quantize(x, nf4, rule=1)


# ---- learn_codebook ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits_of_a_code", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_learn_codebook(bits_of_a_code, dtype):
    x = numbers(50, 33, dtype=dtype)
    code = ff.learn_codebook(x, bits_of_a_code, 64, 20)
    want = reference.learn_codebook(x.float().numpy(), bits_of_a_code, 64, 20)
    assert code.dtype is torch.float32
    check("code", code, want, want)
    q = ff.quantize(x, code, 64)
    assert q.code.numel() == 2**bits_of_a_code


def test_learnt_codebooks_fit_better():
    for x in (numbers(64, 64), numbers(64, 64).abs(), numbers(64, 64) ** 3, torch.rand(4096)):
        code = ff.learn_codebook(x, 4, 64)

        def error(code, x=x):
            q = ff.quantize(x, code)
            scale = q.absmax.repeat_interleave(64).view(x.shape)
            return ((ff.dequantize(q) - x) / scale).square().mean()

        assert error(code) < error("nf4")
        assert error(code) <= error(ff.learn_codebook(x, 4, 64, iterations=0))
    few = torch.tensor([1.0, -1.0, 0.5, 1.0, 1.0])
    assert torch.equal(ff.dequantize(ff.quantize(few, ff.learn_codebook(few, 2))), few)


# ---- random inputs -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    name=st.sampled_from(CODES),
    dtype=st.sampled_from(DTYPES[:3]),
    blocksize=st.sampled_from([16, 32, 64, 512]),
    double_quant=st.booleans(),
    spread=st.floats(1e-30, 1e4),
    level=st.sampled_from(MACHINE_LEVELS),
    seed=st.integers(0, 2**31),
)
def test_random(shape, name, dtype, blocksize, double_quant, spread, level, seed):
    before = ff._C._set_isa(level)
    try:
        x = (numbers(*shape, seed=seed) * spread).to(dtype)
        q = ff.quantize(x, code_of(name), blocksize, double_quant)
        codes, absmax = reference.quantize(x.float().numpy(), table_of(name), blocksize)
        np.testing.assert_array_equal(q.codes.numpy(), codes)
        if double_quant:
            absmax, nested_absmax, _ = reference.double_quantize(absmax)
            np.testing.assert_array_equal(q.nested.absmax.numpy(), nested_absmax)
        np.testing.assert_array_equal(q.absmax.numpy(), absmax)
        for out in (torch.float32, dtype):
            np.testing.assert_array_equal(
                ff.dequantize(q, out).double().numpy(), truth_of(q).to(out).double().numpy()
            )
        assert same(pickle.loads(pickle.dumps(q)), q)
    finally:
        ff._C._set_isa(before)
