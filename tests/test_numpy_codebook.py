"""The NumPy functions on packed codes, with or without torch: bits against the reference and against torch,
products against float64."""

from __future__ import annotations

import dataclasses

import finefuse.numpy as ffn
import numpy as np
import pytest
from concurrency import at_once
from conftest import MACHINE_LEVELS
from finefuse import _C, _codebooks
from finefuse.numpy import codebook as module
from finefuse.reference import codebook as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_cases import DTYPES, TYPES, misaligned, ml_dtypes, same
from tolerances import check

TABLES = {
    "2 bits": np.array([-1.0, -0.2, 0.3, 1.0]),
    "3 bits": np.array([-1.0, -0.6, -0.3, -0.1, 0.0, 0.2, 0.55, 1.0]),
    "4 bits": np.linspace(-1, 1, 16) ** 3,
    "8 bits": np.linspace(-1, 1, 256),
}
CODES = [*_codebooks.NAMED, *TABLES]
# 0-d; 3, 17: one short block, odd counts; 5·64: whole blocks; 37·75: rows that do not fill blocks.
SHAPES = [(), (3,), (17,), (5, 64), (37, 75), (3, 5, 7)]


def code_of(name):
    return TABLES.get(name, name)


def table_of(name):
    return TABLES[name].astype(np.float32) if name in TABLES else _codebooks.NAMED[name]


def numbers(*shape, dtype="float32", seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(TYPES[dtype])


def layer(rows, columns, name="nf4", blocksize=64, double_quant=False):
    weight = numbers(rows, columns, seed=1) / np.float32(max(columns, 1) ** 0.5)
    return ffn.quantize(weight, code_of(name), blocksize, double_quant)


def all_same(a, b):
    return all(same(x, y) for x, y in zip(a, b, strict=True))


def arrays(q):
    nested = [] if q.nested is None else list(q.nested[:3])
    return [q.codes, q.absmax, q.code, *nested]


def same_array(a, b):
    about = [(q.shape, q.dtype, q.blocksize, q.quant_type) for q in (a, b)]
    return about[0] == about[1] and all_same(arrays(a), arrays(b))


def truth_absmax(q):
    if q.nested is None:
        return q.absmax
    return reference.nested_absmax(q.absmax, *q.nested[:2], q.nested.blocksize, q.nested.offset)


def truth_of(q, dtype=np.float32):
    count = int(np.prod(q.shape))
    flat = reference.dequantize(q.codes, count, q.code, truth_absmax(q), q.blocksize)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(flat, np.float32).reshape(q.shape).astype(dtype)


# ---- quantize and dequantize -------------------------------------------------------------------


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_reference(isa, name, dtype):
    for shape in SHAPES:
        for blocksize in (16, 64, 4096):
            x = numbers(*shape, dtype=dtype)
            q = ffn.quantize(x, code_of(name), blocksize)
            codes, absmax = reference.quantize(x, table_of(name), blocksize)
            assert same(q.codes, codes)
            assert same(q.absmax, absmax)
            assert same(q.code, table_of(name))
            assert (q.shape, q.dtype, q.blocksize, q.nested) == (x.shape, x.dtype, blocksize, None)
            assert q.quant_type == (name if name in _codebooks.NAMED else None)
            assert same(ffn.dequantize(q), truth_of(q, x.dtype))
            for wanted in TYPES.values():
                assert same(ffn.dequantize(q, wanted), truth_of(q, wanted))


@pytest.mark.parametrize("nested_blocksize", [16, 256])
@pytest.mark.parametrize("name", CODES)
def test_double_quantisation(isa, name, nested_blocksize):
    for shape in (*SHAPES, (70, 129)):
        x = numbers(*shape) * np.float32(0.02)
        q = ffn.quantize(x, code_of(name), 16, True, nested_blocksize)
        codes, absmax = reference.quantize(x, table_of(name), 16)
        nested, nested_absmax, offset = reference.double_quantize(absmax, nested_blocksize)
        assert same(q.codes, codes)
        assert same(q.absmax, nested)
        assert same(q.nested.absmax, nested_absmax)
        assert same(q.nested.offset, offset)
        assert same(q.nested.code, reference.DYNAMIC8)
        assert q.nested.blocksize == nested_blocksize
        for wanted in TYPES.values():
            assert same(ffn.dequantize(q, wanted), truth_of(q, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    """What a kernel cannot walk is copied; `out` is written wherever it lies, and nothing beside it."""
    base = numbers(6, 9, 66, dtype=dtype)
    views = {
        "transposed": base.T,
        "slice": base[:, 1:8:3, :64],
        "reversed": base[::-1, :, ::-1],
        "expanded": np.broadcast_to(base[:1], base.shape),
        "read-only": np.frombuffer(base.tobytes(), base.dtype),
        "misaligned": misaligned(base),
        "matrix": base[0].view(np.matrix),
        "scalar": base[0, 0, 0],
    }
    if dtype != "bfloat16":
        views["swapped"] = base.astype(base.dtype.newbyteorder(">"))
    for name, x in views.items():
        plain = np.array(x, x.dtype.newbyteorder("="), order="C", subok=False)
        q = ffn.quantize(x, blocksize=16)
        assert same_array(q, ffn.quantize(plain, blocksize=16)), name
        want = ffn.dequantize(q)
        if isinstance(x, np.generic) or name in ("read-only", "expanded"):
            continue
        storage = np.full_like(base, 7)
        out = {
            "transposed": storage.T,
            "slice": storage[:, 1:8:3, :64],
            "reversed": storage[::-1, :, ::-1],
        }.get(name, np.full_like(x, 7))
        assert ffn.dequantize(q, out=out) is out
        assert (np.asarray(out) == want).all(), name
        if name == "slice":
            storage[:, 1:8:3, :64] = 7
            assert (storage == 7).all()


def test_empty():
    for shape in ((0,), (0, 7), (3, 0, 2)):
        for double in (False, True):
            q = ffn.quantize(np.zeros(shape), "dynamic8", double_quant=double)
            assert ffn.dequantize(q).shape == shape
            assert q.codes.size == q.absmax.size == 0


@pytest.mark.parametrize("name", CODES)
def test_blocks_at_the_edge(isa, name):
    """Zeros, NaN, infinities and denormals stay in their own block."""
    x = numbers(6, 16)
    x[0] = 0.0
    x[1, 5] = np.nan
    x[2, 3], x[2, 4] = np.inf, -np.inf
    x[3] = np.linspace(-1, 1, 16) * 1e-41
    x[4, 0] = -0.0
    q = ffn.quantize(x, code_of(name), 16)
    codes, absmax = reference.quantize(x, table_of(name), 16)
    assert same(q.codes, codes)
    np.testing.assert_array_equal(q.absmax, absmax)
    np.testing.assert_array_equal(ffn.dequantize(q), truth_of(q))
    for spoilt in (x[1], x[2]):
        with pytest.raises(ValueError, match="x: NaN or inf; with double_quant=True"):
            ffn.quantize(spoilt, code_of(name), 16, double_quant=True)


# ---- codebook_linear ---------------------------------------------------------------------------

TOKENS = [1, 7, module.KERNEL_TOKENS, module.KERNEL_TOKENS + 1]  # both sides of the crossover


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_linear(isa, dtype, tokens, double_quant):
    """(40, 96): rows of one and a half blocks; (33, 75): odd, blocks run over ends of rows; (1, 5): tiny."""
    for rows, columns in ((40, 96), (33, 75), (1, 5)):
        for name in ("nf4", "fp4", "dynamic8", "3 bits"):
            q = layer(rows, columns, name, double_quant=double_quant)
            x, bias = numbers(tokens, columns, dtype=dtype), numbers(rows, dtype=dtype, seed=7)
            dy = numbers(tokens, rows, dtype=dtype, seed=3)
            wide = np.float64 if dtype == "float64" else np.float32
            eager_weight, weight = truth_of(q, x.dtype).astype(wide), truth_of(q, np.float64)
            y, dx = ffn.codebook_linear(x, q, bias, return_grad=True, upstream=dy)
            assert y.dtype == dx.dtype == x.dtype
            eager = (x.astype(wide) @ eager_weight.T).astype(x.dtype)
            eager_bias = (x.astype(wide) @ eager_weight.T + bias.astype(wide)).astype(x.dtype)
            truth = reference.codebook_linear(
                x, q.codes, q.code, truth_absmax(q), 64, (rows, columns)
            )
            check(f"y {name}", y, eager_bias, truth + np.asarray(bias, np.float64))
            check(f"no bias {name}", ffn.codebook_linear(x, q), eager, truth)
            eager_dx = (dy.astype(wide) @ eager_weight).astype(x.dtype)
            check(f"dx {name}", dx, eager_dx, dy.astype(np.float64) @ weight)
            assert same(ffn.codebook_linear(x, q, bias), y)
            ones = np.ones_like(dy)
            summed = ffn.codebook_linear(x, q, return_grad=True)[1]
            want = ffn.codebook_linear(x, q, return_grad=True, upstream=ones.astype(np.float64))[1]
            assert same(summed, want)


def test_linear_shapes():
    q = layer(24, 64)
    x = numbers(4, 3, 5, 64)
    y, dx = ffn.codebook_linear(x, q, return_grad=True)
    assert same(y, ffn.codebook_linear(x.reshape(-1, 64), q).reshape(4, 3, 5, 24))
    assert dx.shape == x.shape
    one = ffn.codebook_linear(x[0, 0, 0], q)
    assert one.shape == (24,)
    assert same(
        ffn.codebook_linear(numbers(64, 5).T, q), ffn.codebook_linear(numbers(64, 5).T.copy(), q)
    )
    assert same(
        ffn.codebook_linear(x, q, numbers(24, dtype="float64")),
        ffn.codebook_linear(x, q, numbers(24, dtype="float64").astype(np.float32)),
    )
    for shape in ((0, 64), (3, 0, 64)):
        y, dx = ffn.codebook_linear(np.zeros(shape), q, np.zeros(24), return_grad=True)
        assert y.shape == (*shape[:-1], 24)
        assert dx.shape == shape
    for rows, columns in ((0, 5), (5, 0)):
        bias = numbers(rows)
        for tokens in (2, 100):
            x = np.zeros((tokens, columns), np.float32)
            y, dx = ffn.codebook_linear(
                x, ffn.quantize(np.zeros((rows, columns))), bias, return_grad=True
            )
            assert same(y, np.broadcast_to(bias, (tokens, rows)).copy())
            assert same(dx, x)


def test_out_that_shares_memory():
    memory = np.zeros(8192, np.float32)
    made = ffn.quantize(numbers(64, 128))
    codes = memory.view(np.uint8)[: made.codes.size]
    codes[:] = made.codes
    q = dataclasses.replace(made, codes=codes)
    with pytest.raises(ValueError, match="out: shares memory with q.codes"):
        ffn.dequantize(q, out=memory.reshape(64, 128))


def test_workspace_is_reused():
    x = numbers(module.KERNEL_TOKENS + 1, 128)
    ffn.codebook_linear(x, layer(256, 128))
    memory = module._workspace.memory
    assert memory.size >= 256 * 128
    y = ffn.codebook_linear(x[:, :64], layer(64, 64))
    assert module._workspace.memory is memory
    assert not np.may_share_memory(y, memory)


# ---- bitsandbytes' form ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_form(kind, double_quant, dtype):
    q = ffn.quantize(numbers(5, 13, dtype=dtype), kind, 32, double_quant)
    codes, state = q.to_bitsandbytes()
    assert codes.shape == (33, 1)
    nested = ["nested_absmax", "nested_quant_map"] if double_quant else []
    assert list(state) == ["absmax", "quant_map", *nested, f"quant_state.bitsandbytes__{kind}"]
    prefixed = {f"model.0.weight.{k}": v for k, v in state.items()}
    for form in (state, prefixed):
        assert same_array(ffn.CodebookArray.from_bitsandbytes(codes, form), q)
    even = ffn.quantize(numbers(4, 16, dtype=dtype), kind)
    codes, state = even.to_bitsandbytes()
    assert same_array(
        ffn.CodebookArray.from_bitsandbytes(codes.reshape(-1).view("f4"), state), even
    )


def test_wrong_bitsandbytes_forms():
    for q in (
        ffn.quantize(numbers(4, 16), "dynamic8"),
        ffn.quantize(numbers(4, 16), blocksize=16),
        ffn.quantize(numbers(4, 16), TABLES["2 bits"]),
    ):
        with pytest.raises(
            ValueError, match="to_bitsandbytes: CodebookArray.*has no bitsandbytes form"
        ):
            q.to_bitsandbytes()
    codes, state = ffn.quantize(numbers(20, 64), "nf4", 64, True).to_bitsandbytes()
    key = list(state)[-1]
    for error, message, first, changes in (
        (TypeError, "codes: a numpy.ndarray, not list", [1], {}),
        (ValueError, "codes: 639 elements; 1280 codes of 4 bits take 640", codes[1:], {}),
        (ValueError, "absmax: missing in quant_state", codes, {"absmax": None}),
        (ValueError, "absmax: 19 elements; 1280 elements in blocks of 64 have 20", codes,
         {"absmax": state["absmax"][:19]}),
        (TypeError, "absmax: dtype float32; allowed: uint8", codes,
         {"absmax": state["absmax"].astype(np.float32)}),
        (ValueError, "quant_map: 8 entries; nf4 has 16", codes, {"quant_map": state["quant_map"][:8]}),
        (ValueError, "quant_map: an entry is not finite", codes,
         {"quant_map": state["quant_map"] * np.float32("nan")}),
        (ValueError, "nested_quant_map: 16 elements; 8 bits index 256", codes,
         {"nested_quant_map": state["quant_map"]}),
        (ValueError, f"{key}: not JSON", codes, {key: state[key][:30]}),
        (TypeError, f"{key}: a uint8 array, not 'x'", codes, {key: "x"}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            ffn.CodebookArray.from_bitsandbytes(first, state | changes)
    with pytest.raises(TypeError, match="quant_state: a dict, not list"):
        ffn.CodebookArray.from_bitsandbytes(codes, [])


# ---- the same bits as torch --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_same_bits_as_torch(isa, dtype):
    torch = pytest.importorskip("torch", reason="compares with the torch functions")
    pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")
    import finefuse as ff

    def to_torch(x):
        x = x.copy()
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    def to_numpy(x):
        x = x.detach()
        if x.dtype is torch.bfloat16:
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    x, bias, dy = numbers(7, 75, dtype=dtype), numbers(33, dtype=dtype), numbers(7, 33, dtype=dtype)
    for name in CODES:
        for double_quant in (False, True):
            weight = numbers(33, 75, dtype=dtype, seed=4)
            table = TABLES.get(name)
            code = name if table is None else torch.from_numpy(table)
            q = ffn.quantize(weight, code_of(name), 32, double_quant)
            t = ff.quantize(to_torch(weight), code, 32, double_quant)
            nested = [] if t.nested is None else list(t.nested[:3])
            theirs = [to_numpy(part) for part in (t.codes, t.absmax, t.code, *nested)]
            assert all_same(arrays(q), theirs), name
            assert same(ffn.dequantize(q), to_numpy(ff.dequantize(t)))
            if name in ("nf4", "fp4"):
                ours, their_state = q.to_bitsandbytes()[1], t.to_bitsandbytes()[1]
                assert list(ours) == list(their_state)
                assert all(same(ours[k], their_state[k].numpy()) for k in ours)
            if dtype == "float64":  # multiplied by NumPy's library and torch's
                continue
            leaf = to_torch(x).requires_grad_()
            y = ff.codebook_linear(leaf, t, to_torch(bias))
            y.backward(to_torch(dy))
            ours = ffn.codebook_linear(x, q, bias, return_grad=True, upstream=dy)
            assert same(ours[0], to_numpy(y)), name
            assert same(ours[1], to_numpy(leaf.grad)), name
    for bits in (2, 3, 4, 8):
        assert same(
            ffn.learn_codebook(x, bits, 32), ff.learn_codebook(to_torch(x), bits, 32).numpy()
        )


# ---- threads -----------------------------------------------------------------------------------


def test_any_thread_count():
    x, weight = numbers(9, 301), numbers(203, 301)
    results = []
    for threads in (1, 2, 5):
        ffn.set_num_threads(threads)
        q = ffn.quantize(weight, double_quant=True)
        y, dx = ffn.codebook_linear(x, q, return_grad=True)
        results.append([*arrays(q), ffn.dequantize(q), y, dx])
    for other in results[1:]:
        assert all_same(other, results[0])


def test_concurrent_calls():
    """Each thread decodes into a workspace of its own."""
    cases = [(numbers(30, 40 + 8 * i, seed=i), layer(50, 40 + 8 * i)) for i in range(6)]
    want = [ffn.codebook_linear(x, q) for x, q in cases]

    def work(i):
        for _ in range(30):
            np.testing.assert_array_equal(ffn.codebook_linear(*cases[i]), want[i])

    at_once(work)


# ---- learn_codebook ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_learn_codebook(bits, dtype):
    x = numbers(50, 33, dtype=dtype)
    x[:2] = 0
    x[2:4] = TYPES[dtype](1e-40)
    code = ffn.learn_codebook(x, bits, 64, 20)
    want = reference.learn_codebook(x, bits, 64, 20)
    check("code", code, want, want)
    assert code.dtype == np.float32
    assert ffn.quantize(x, code, 64).code.size == 2**bits


# ---- wrong arguments ---------------------------------------------------------------------------


def test_wrong_arguments():
    x, q = numbers(4, 64), layer(8, 64)
    read_only = np.zeros((8, 64), np.float32)
    read_only.flags.writeable = False
    shared = np.broadcast_to(np.zeros(64, np.float32), (8, 64))
    for error, message, call in (
        (TypeError, "x: a numpy.ndarray, not list", lambda: ffn.quantize([1.0])),
        (TypeError, "x: a numpy.ndarray, not CodebookArray", lambda: ffn.quantize(q)),
        (TypeError, "x: dtype int64; allowed: float32", lambda: ffn.quantize(np.ones(3, np.int64))),
        (ValueError, "code: 'nf5'; allowed: 'nf4', 'fp4'", lambda: ffn.quantize(x, "nf5")),
        (TypeError, "code: a numpy.ndarray, not int", lambda: ffn.quantize(x, 4)),
        (ValueError, r"code: shape \(5,\); allowed", lambda: ffn.quantize(x, np.zeros(5))),
        (ValueError, "code: entries that are not finite and in ascending order",
         lambda: ffn.quantize(x, np.array([0.0, 1, 0.5, 2]))),
        (ValueError, "^blocksize: 8; allowed: powers of two", lambda: ffn.quantize(x, blocksize=8)),
        (TypeError, "^blocksize: an int, not 64.0", lambda: ffn.quantize(x, blocksize=64.0)),
        (ValueError, "nested_blocksize: 0;", lambda: ffn.quantize(x, nested_blocksize=0)),
        (TypeError, "q: a CodebookArray .*, not ndarray", lambda: ffn.dequantize(x)),
        (TypeError, "dtype: int8; allowed: float32", lambda: ffn.dequantize(q, np.int8)),
        (TypeError, "dtype: 'nonsense'; allowed: float32", lambda: ffn.dequantize(q, "nonsense")),
        (TypeError, "out: a numpy.ndarray, not list", lambda: ffn.dequantize(q, out=[])),
        (TypeError, "out: dtype int32; allowed",
         lambda: ffn.dequantize(q, out=np.zeros((8, 64), np.int32))),
        (ValueError, r"out: shape \(4, 64\); q has \(8, 64\)", lambda: ffn.dequantize(q, out=x)),
        (TypeError, "dtype: float16; out has float32",
         lambda: ffn.dequantize(q, np.float16, np.zeros((8, 64), np.float32))),
        (ValueError, "out: a read-only array", lambda: ffn.dequantize(q, out=read_only)),
        (ValueError, "out: .*read-only|out: its elements share", lambda: ffn.dequantize(q, out=shared)),
        (TypeError, "q: a CodebookArray", lambda: ffn.codebook_linear(x, x)),
        (ValueError, r"q: shape \(64,\); allowed: \(out, in\)",
         lambda: ffn.codebook_linear(x, ffn.quantize(x[0]))),
        (TypeError, "x: dtype int64", lambda: ffn.codebook_linear(np.ones((1, 64), np.int64), q)),
        (ValueError, r"x: shape \(4, 63\); a weight of \(8, 64\) takes \(…, 64\)",
         lambda: ffn.codebook_linear(x[:, :63], q)),
        (ValueError, r"x: shape \(\); a weight", lambda: ffn.codebook_linear(np.float32(1), q)),
        (ValueError, r"bias: shape \(7,\); allowed: \(8,\)",
         lambda: ffn.codebook_linear(x, q, np.zeros(7))),
        (TypeError, "bias: a numpy.ndarray, not float", lambda: ffn.codebook_linear(x, q, 1.0)),
        (ValueError, "upstream: of use only with return_grad=True",
         lambda: ffn.codebook_linear(x, q, upstream=np.zeros((4, 8)))),
        (ValueError, r"upstream: shape \(4, 7\); allowed: \(4, 8\)",
         lambda: ffn.codebook_linear(x, q, return_grad=True, upstream=np.zeros((4, 7)))),
        (ValueError, "bits: 5; allowed: 2, 3, 4, 8", lambda: ffn.learn_codebook(x, 5)),
        (ValueError, "iterations: -1; allowed", lambda: ffn.learn_codebook(x, iterations=-1)),
        (ValueError, "x: shape .*all finite", lambda: ffn.learn_codebook(np.zeros(0))),
        (ValueError, "x: shape .*all finite", lambda: ffn.learn_codebook(np.array([1, np.inf]))),
        (ValueError, "x: shape .*all finite", lambda: ffn.learn_codebook(np.array([1, 1e300]))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert (x == numbers(4, 64)).all()


def test_arrays_put_together_wrongly():
    """An error and not a read past the end."""
    q = layer(8, 64, double_quant=True)
    for name, change, error in (
        ("codes", {"codes": q.codes[1:]}, ValueError),
        ("codes", {"codes": q.codes.astype(np.int32)}, TypeError),
        ("code", {"code": q.code[:12]}, ValueError),
        ("code", {"code": q.code.astype(np.float64)}, TypeError),
        ("absmax", {"absmax": q.absmax[1:]}, ValueError),
        ("absmax", {"nested": None}, TypeError),
        ("nested_code", {"nested": q.nested._replace(code=q.code)}, ValueError),
        ("nested_absmax", {"nested": q.nested._replace(absmax=q.absmax)}, TypeError),
        ("nested_offset", {"nested": q.nested._replace(offset=None)}, TypeError),
        ("nested_blocksize", {"nested": q.nested._replace(blocksize=0)}, ValueError),
        ("blocksize", {"blocksize": 48}, ValueError),
        ("codes", {"shape": (9, 64)}, ValueError),
    ):
        wrong = module.CodebookArray(**(vars(q) | change))
        for call in (ffn.dequantize, lambda q: ffn.codebook_linear(numbers(2, 64), q)):
            with pytest.raises(error, match=f"^{name}: "):
                call(wrong)


def test_repr():
    q = ffn.quantize(numbers(4, 16, dtype="float16"), double_quant=True)
    assert repr(q) == (
        "CodebookArray(nf4, shape=(4, 16), dtype=float16, blocksize=64, double_quant=True)"
    )


# ---- random inputs; the documentation ----------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    name=st.sampled_from(CODES),
    dtype=st.sampled_from([*TYPES]),
    blocksize=st.sampled_from([16, 32, 64, 512]),
    double_quant=st.booleans(),
    spread=st.floats(1e-30, 1e4),
    level=st.sampled_from(MACHINE_LEVELS),
    seed=st.integers(0, 2**31),
)
def test_random(shape, name, dtype, blocksize, double_quant, spread, level, seed):
    before = _C._set_isa(level)
    try:
        x = (np.random.default_rng(seed).standard_normal(shape) * spread).astype(TYPES[dtype])
        q = ffn.quantize(np.asarray(x), code_of(name), blocksize, double_quant)
        assert same(q.codes, reference.quantize(x, table_of(name), blocksize)[0])
        assert same(ffn.dequantize(q), truth_of(q, q.dtype))
    finally:
        _C._set_isa(before)
