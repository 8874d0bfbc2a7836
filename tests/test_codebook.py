"""quantize, dequantize, codebook_linear, CodebookTensor and nn.CodebookLinear: bits against the reference,
errors against float64, and what a tensor subclass must survive."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import pickle
import threading
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import MACHINE_LEVELS
from finefuse import _codebooks
from finefuse import codebook as module
from finefuse.reference import codebook as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import check
from torch.utils.checkpoint import checkpoint

RAW = torch.ops.finefuse
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TABLES = {
    "2 bits": torch.tensor([-1.0, -0.2, 0.3, 1.0]),
    "3 bits": torch.tensor([-1.0, -0.6, -0.3, -0.1, 0.0, 0.2, 0.55, 1.0]),
    "4 bits": torch.linspace(-1, 1, 16) ** 3,
    "8 bits": torch.linspace(-1, 1, 256),
}
CODES = [*_codebooks.NAMED, *TABLES]
# 1, 3, 17: one short block, odd counts; 64·5: whole blocks; 37·75: rows that do not fill blocks.
SHAPES = [(1,), (3,), (17,), (5, 64), (37, 75), (3, 5, 7)]


def code_of(name):
    return TABLES.get(name, name)


def table_of(name):
    return TABLES[name].numpy() if name in TABLES else _codebooks.NAMED[name]


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def truth_absmax(q):
    if q.nested is None:
        return q.absmax.numpy()
    n = q.nested
    return reference.nested_absmax(
        q.absmax.numpy(), n.code.numpy(), n.absmax.numpy(), n.blocksize, n.offset.item()
    )


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


# ---- codebook_linear ---------------------------------------------------------------------------

# 1 and 7: from the bytes, one token and an odd number; the others on either side of the crossovers.
TOKENS = [
    1,
    7,
    module.KERNEL_TOKENS,
    module.KERNEL_TOKENS_BACKWARD,
    module.KERNEL_TOKENS_BACKWARD + 1,
]


def layer(rows, columns, name="nf4", blocksize=64, double_quant=False):
    return ff.quantize(
        numbers(rows, columns, seed=1) / columns**0.5, code_of(name), blocksize, double_quant
    )


def grads(function, *tensors, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_linear(isa, dtype, tokens, double_quant):
    """(40, 96): rows of one and a half blocks; (33, 75): odd, blocks run over ends of rows; (1, 5): tiny."""
    for rows, columns in ((40, 96), (33, 75), (1, 5)):
        for name in ("nf4", "fp4", "dynamic8", "3 bits"):
            q = layer(rows, columns, name, double_quant=double_quant)
            x, bias = numbers(tokens, columns, dtype=dtype), numbers(rows, dtype=dtype, seed=2)
            dy = numbers(tokens, rows, dtype=dtype, seed=3)
            weight = ff.dequantize(q, torch.float32).double()
            ours = grads(lambda x, b: ff.codebook_linear(x, q, b), x, bias, upstream=dy)
            eager = grads(
                lambda x, b: torch.nn.functional.linear(x, weight.to(dtype), b),
                x,
                bias,
                upstream=dy,
            )
            truth = grads(
                lambda x, b: torch.nn.functional.linear(x, weight, b),
                x.double(), bias.double(), upstream=dy.double(),
            )  # fmt: skip
            for what, a, e, t in zip(("y", "dx", "db"), ours, eager, truth, strict=True):
                assert a.dtype is dtype
                check(f"{what} {name} {rows}x{columns}", a, e, t)
            y = ff.codebook_linear(x, q)
            check("no bias", y, eager[0] - bias, x.double() @ weight.t())
            want = reference.codebook_linear(
                x.double().numpy(), q.codes.numpy(), q.code.numpy(), truth_absmax(q), 64,
                (rows, columns),
            )  # fmt: skip
            check("reference", y, eager[0] - bias, want)


@pytest.mark.parametrize("engine", ["torch", "oneDNN"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_in_panels(monkeypatch, dtype, engine):
    """A panel is one row, or what bytes, blocks and blocks of blocks make of it; the last may be short."""
    monkeypatch.setattr(module._matmul, "_onednn_is_faster", lambda: engine == "oneDNN")
    monkeypatch.setattr(module, "PANEL_BYTES", 1)
    tokens = module.KERNEL_TOKENS + 1
    for rows, columns, double_quant, panel in (
        (40, 96, False, 2), (33, 75, False, 33), (7, 128, False, 1), (40, 1024, True, 16), (5, 33, True, 5)
    ):  # fmt: skip
        for name in ("nf4", "dynamic8", "3 bits", "2 bits"):
            q = layer(rows, columns, name, double_quant=double_quant)
            assert module._panel_rows(module.fields(q), rows, columns, dtype) == panel
            x, bias = numbers(tokens, columns, dtype=dtype), numbers(rows, dtype=dtype, seed=2)
            weight = ff.dequantize(q, torch.float32)
            truth = x.double() @ weight.double().t()
            eager = torch.nn.functional.linear(x, weight.to(dtype), bias)
            check("y", ff.codebook_linear(x, q, bias), eager, truth + bias.double())
            check("no bias", ff.codebook_linear(x, q), x @ weight.to(dtype).t(), truth)


def test_linear_shapes():
    q = layer(24, 64)
    x = numbers(4, 3, 5, 64)
    want = ff.codebook_linear(x.reshape(-1, 64), q).view(4, 3, 5, 24)
    assert torch.equal(ff.codebook_linear(x, q), want)
    torch.testing.assert_close(ff.codebook_linear(x[0, 0, 0], q), want[0, 0, 0])
    strided = numbers(64, 5).t()
    assert torch.equal(ff.codebook_linear(strided, q), ff.codebook_linear(strided.contiguous(), q))
    for shape in ((0, 64), (3, 0, 64)):
        x = torch.zeros(shape, requires_grad=True)
        bias = torch.zeros(24, requires_grad=True)
        y = ff.codebook_linear(x, q, bias)
        assert y.shape == (*shape[:-1], 24)
        y.sum().backward()
        assert x.grad.shape == shape
        assert (bias.grad == 0).all()
    for rows, columns in ((0, 5), (5, 0)):
        q = ff.quantize(torch.zeros(rows, columns))
        for tokens in (2, 100):
            x = torch.zeros(tokens, columns, requires_grad=True)
            bias = numbers(rows).requires_grad_()
            y = ff.codebook_linear(x, q, bias)
            assert torch.equal(y, bias.expand(tokens, rows))
            y.sum().backward()
            assert x.grad.shape == x.shape


def test_call_within_a_call():
    """A mode (or a finaliser) that multiplies between decoding and the product has a workspace of its own."""
    q, other = layer(32, 64), layer(32, 64, "fp4")
    x = numbers(100, 64)
    want, inner = ff.codebook_linear(x, q), []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.mm and not inner:
                inner.append(None)
                inner.append(ff.codebook_linear(x, other))
            return function(*args, **(kwargs or {}))

    with Mode():
        assert torch.equal(ff.codebook_linear(x, q), want)
    assert torch.equal(inner[1], ff.codebook_linear(x, other))


@pytest.mark.parametrize("tokens", [3, 50])
def test_nothing_of_the_weights_size_is_kept(tokens):
    """The graph holds the bytes themselves; the decoded weight is one memory for every call."""
    q = layer(256, 128, double_quant=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = ff.codebook_linear(numbers(tokens, 128).requires_grad_(), q)
    assert sum(t.numel() * t.element_size() for t in saved) < 256 * 128 * 0.6 + 1100
    assert q.codes.data_ptr() in [t.data_ptr() for t in saved]
    y.sum().backward()
    if tokens > module.KERNEL_TOKENS:
        before = module.workspace.memory[torch.float32].data_ptr()
        ff.codebook_linear(numbers(tokens, 64), layer(64, 64))
        assert module.workspace.memory[torch.float32].data_ptr() == before


def test_weight_changed_in_place_before_the_backward():
    q, other = layer(8, 64), ff.quantize(numbers(8, 64, seed=9))
    y = ff.codebook_linear(numbers(2, 64).requires_grad_(), q)
    q.copy_(other)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradcheck(isa):
    """float64 is decoded to float64 and multiplied in it."""
    for double_quant in (False, True):
        q = layer(6, 20, blocksize=16, double_quant=double_quant)
        x = numbers(3, 20, dtype=torch.float64).requires_grad_()
        bias = numbers(6, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, b: ff.codebook_linear(x, q, b), (x, bias))


def test_only_what_is_asked_for():
    q = layer(8, 64)
    bias = torch.zeros(8, requires_grad=True)
    ff.codebook_linear(numbers(5, 64), q, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 5.0))
    with torch.no_grad():
        assert not ff.codebook_linear(numbers(5, 64), q, bias).requires_grad
    frozen = numbers(5, 64).requires_grad_()
    assert ff.codebook_linear(frozen, q, bias.detach()).requires_grad


def test_bias_of_another_type():
    q = layer(8, 64)
    bias = numbers(8).requires_grad_()
    y = ff.codebook_linear(numbers(5, 64, dtype=torch.bfloat16), q, bias)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert bias.grad.dtype is torch.float32


@pytest.mark.parametrize("tokens", [3, 50])
def test_autocast(tokens):
    """As torch's own linear: x and bias are cast, gradients come back in their own types."""
    q = layer(8, 64)
    x, bias = numbers(tokens, 64).requires_grad_(), numbers(8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ff.codebook_linear(x, q, bias)
        assert ff.codebook_linear(x.double(), q).dtype is torch.float64
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, ff.codebook_linear(x.bfloat16(), q, bias.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype is bias.grad.dtype is torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    q = layer(8, 64)
    a, b = (numbers(5, 64).requires_grad_() for _ in range(2))

    def function(x):
        return ff.codebook_linear(x * 1.0, q).square().sum()

    checkpoint(function, a, use_reentrant=use_reentrant).backward()
    function(b).backward()
    assert torch.equal(a.grad, b.grad)


def test_second_derivatives_and_forward_mode_raise():
    q = layer(8, 64)
    x = numbers(3, 64).requires_grad_()
    (g,) = torch.autograd.grad(ff.codebook_linear(x, q).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(numbers(3, 64), torch.ones(3, 64))
        with pytest.raises(RuntimeError, match="forward-mode"):
            ff.codebook_linear(dual, q)


@pytest.mark.parametrize("tokens", [1, 7])
def test_same_bits_for_any_thread_count(tokens):
    q = layer(300, 1300, double_quant=True)
    x, dy = numbers(tokens, 1300), numbers(tokens, 300)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        again = layer(300, 1300, double_quant=True)
        results.append([
            ff.dequantize(q), again.codes, again.absmax,
            *grads(lambda x: ff.codebook_linear(x, q), x, upstream=dy),
        ])  # fmt: skip
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_concurrent_python_threads():
    """Each has a workspace of its own."""
    cases = [(layer(30 + i, 64), numbers(40, 64, seed=i)) for i in range(6)]
    want = [ff.codebook_linear(x, q) for q, x in cases]
    wrong = []

    def work(i):
        q, x = cases[i]
        wrong.extend(i for _ in range(30) if not torch.equal(ff.codebook_linear(x, q), want[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []


# ---- torch's own checks, compile, the other backends -------------------------------------------


def raw_calls(grad=False):
    for double_quant in (False, True):
        q = layer(8, 64, double_quant=double_quant)
        values = module.fields(q)
        x, bias = numbers(3, 64), numbers(8)
        x.requires_grad_(grad)
        yield RAW.quantize_forward.default, (x, q.code, 0, 64)
        yield RAW.dequantize_forward.default, (*values, [8, 64], torch.bfloat16)
        yield RAW.dequantize_out.default, (*values, torch.empty(8, 64))
        for b in (None, bias):
            yield RAW.codebook_linear_forward.default, (x, *values, 8, b)
        yield (
            RAW.codebook_linear_backward.default,
            (numbers(40, 8).requires_grad_(grad), *values, 64),
        )


@pytest.mark.parametrize("case", range(len(list(raw_calls()))))
def test_opcheck_raw(case):
    op, args = list(raw_calls())[case]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck_public(double_quant):
    q = layer(8, 64, double_quant=double_quant)
    nested = {"blocksize": 64}
    if double_quant:
        nested |= {
            "nested_code": q.nested.code,
            "nested_absmax": q.nested.absmax,
            "nested_offset": q.nested.offset,
            "nested_blocksize": 256,
        }
    x, bias = numbers(3, 64).requires_grad_(), numbers(8).requires_grad_()
    parts = (q.codes, q.code, q.absmax, [8, 64])
    torch.library.opcheck(RAW.quantize.default, (x.detach(), q.code), {"blocksize": 32})
    torch.library.opcheck(RAW.dequantize.default, (*parts, torch.float16), nested)
    torch.library.opcheck(RAW.codebook_linear.default, (x, *parts, bias), nested)
    assert torch.equal(
        RAW.codebook_linear(x, *parts, bias, **nested), ff.codebook_linear(x, q, bias)
    )
    assert torch.equal(RAW.dequantize(*parts, torch.float16, **nested), ff.dequantize(q.half()))
    for a, b in zip(RAW.quantize(x, q.code), ff.quantize(x).__tensor_flatten__()[0], strict=False):
        assert torch.equal(a, getattr(ff.quantize(x), b))


def test_backward_through_a_raw_op_raises():
    for op, args in raw_calls(grad=True):
        out = (
            op(*args)
            if any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
            else None
        )
        if isinstance(out, torch.Tensor):
            with pytest.raises(RuntimeError, match="is a raw op"):
                out.sum().backward()


def test_compile(counter):
    """One graph for layers of one shape, whatever their bytes and offsets; gradients are eager's."""

    def step(x, q, bias):
        return ff.codebook_linear(x, q, bias).square().sum()

    layers = [ff.quantize(numbers(48, 64, seed=i) * (i + 1), double_quant=True) for i in range(10)]
    counted = torch.compile(step, backend=counter, fullgraph=True)
    compiled = torch.compile(step, fullgraph=True)
    for i, q in enumerate(layers):
        x, bias = numbers(2, 3, 64, seed=i), numbers(48)
        want = grads(lambda x, b: step(x, q, b), x, bias, upstream=None)
        got = grads(lambda x, b: counted(x, q, b), x, bias, upstream=None)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        if i < 2:  # Inductor's code for it
            got = grads(lambda x, b: compiled(x, q, b), x, bias, upstream=None)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
    assert counter.graphs == 1


def test_compile_modules_and_dequantize():
    """The graphs and their gradients; test_compile has Inductor's code for them."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        ff.nn.CodebookLinear.from_linear(torch.nn.Linear(64, 48)),
        torch.nn.ReLU(),
        ff.nn.CodebookLinear.from_linear(torch.nn.Linear(48, 8), "fp4", 32, True),
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (2, 5, 40):  # the number of tokens becomes a symbol
        x = numbers(tokens, 64)
        torch.testing.assert_close(compiled(x), model(x))
    q = layer(8, 64, double_quant=True)
    out = torch.empty(8, 64)
    decode = torch.compile(
        lambda q, out: (ff.dequantize(q, out=out), ff.dequantize(q.half()))[1] * 2, fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    assert torch.equal(decode(q, out), ff.dequantize(q.half()) * 2)
    assert torch.equal(out, ff.dequantize(q))
    # breaks the graph, works
    made = torch.compile(lambda x: ff.dequantize(ff.quantize(x * 2)), backend="aot_eager")
    assert torch.equal(made(out), ff.dequantize(ff.quantize(out * 2)))


@pytest.mark.parametrize("name", CODES)
def test_eager_backend(name):
    """Plain torch operations: the same bytes and bits."""
    x = numbers(7, 75)
    x[2] = 0.0
    x[3] *= 1e-41
    for double_quant in (False, True):
        q = ff.quantize(x, code_of(name), 16, double_quant)
        w = ff.dequantize(q, torch.bfloat16)
        with ff.backend("eager"):
            e = ff.quantize(x, code_of(name), 16, double_quant)
            for part in q.__tensor_flatten__()[0]:
                assert torch.equal(getattr(q, part), getattr(e, part)), part
            assert torch.equal(ff.dequantize(e, torch.bfloat16), w)
            out = torch.empty(7, 75, dtype=torch.bfloat16)
            assert torch.equal(ff.dequantize(e, out=out), w)
            z = numbers(3, 75, dtype=torch.float64).requires_grad_()
            y = ff.codebook_linear(z, e)
        torch.testing.assert_close(ff.codebook_linear(z, q), y)


@pytest.mark.parametrize("name", ["nf4", "fp4", "dynamic8"])
def test_backends(place, name):
    """The public functions on every backend: the CPU's bytes and bits, and products as near as its own."""
    x = numbers(70, 96)
    with ff.backend("cpu"):
        q = [ff.quantize(x, code_of(name), 64, double_quant) for double_quant in (False, True)]
        w = [ff.dequantize(p) for p in q]
    for cpu, want, double_quant in zip(q, w, (False, True), strict=True):
        there = ff.quantize(x.to(place.device), code_of(name), 64, double_quant)
        for part in cpu.__tensor_flatten__()[0]:
            assert torch.equal(getattr(cpu, part), getattr(there, part).cpu()), part
        assert torch.equal(ff.dequantize(there).cpu(), want)
        for tokens in (1, 5, 40):
            z = numbers(tokens, 96).to(place.device).requires_grad_()
            y = ff.codebook_linear(z, there)
            y.sum().backward()
            exact = z.detach().cpu().double() @ want.double().t()
            check("y", y.detach().cpu(), z.detach().cpu() @ want.t(), exact)
            check(
                "dx",
                z.grad.cpu(),
                want.sum(0).expand(tokens, 96),
                want.double().sum(0).expand(tokens, 96),
            )


def test_eager_differentiates_twice():
    q, x = layer(3, 5), numbers(2, 5, dtype=torch.float64).requires_grad_()
    with ff.backend("eager"):
        assert torch.autograd.gradgradcheck(lambda x: ff.codebook_linear(x, q).square(), (x,))


def test_backward_runs_where_its_forward_ran():
    q, x = layer(8, 64), numbers(3, 64).requires_grad_()
    with ff.backend("cpu"):
        y = ff.codebook_linear(x, q)
    with ff.backend("eager"):
        y.sum().backward()
    assert x.grad is not None


# ---- CodebookTensor ----------------------------------------------------------------------------


def same(a, b, dtype=None):
    assert type(a) is type(b) is ff.CodebookTensor
    assert a.shape == b.shape
    assert a.dtype is (dtype or b.dtype)
    for name in b.__tensor_flatten__()[0]:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.__tensor_flatten__()[1][1:] == b.__tensor_flatten__()[1][1:]
    return True


def through_torch_save(q, **options):
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.fixture(params=["nf4", "fp4 double", "dynamic8", "3 bits double"])
def q(request):
    name, double = request.param.removesuffix(" double"), request.param.endswith("double")
    return ff.quantize(numbers(9, 75), code_of(name), 32, double)


def test_copies_keep_the_bytes(q):
    copies = {
        "clone": q.clone(),
        "deepcopy": copy.deepcopy(q),
        "pickle": pickle.loads(pickle.dumps(q)),
        "torch.save": through_torch_save(q, weights_only=True),
        "map_location": through_torch_save(q, weights_only=True, map_location="cpu"),
        "to copy": q.to("cpu", copy=True),
        "empty and copy": torch.empty_like(q).copy_(q),
    }
    for name, other in copies.items():
        assert same(other, q), name
        assert other.codes.data_ptr() != q.codes.data_ptr(), name
    for name, other in {
        "detach": q.detach(),
        "view": q.view(9, 75),
        "view -1": q.view(-1, 75),
        "reshape": q.reshape(9, -1),
        "view_as": q.view_as(ff.dequantize(q)),
        "contiguous": q.contiguous(),
        "to": q.to("cpu"),
        "requires_grad_": q.requires_grad_(False),
    }.items():
        assert same(other, q), name
        assert other.codes.data_ptr() == q.codes.data_ptr(), name
    flat = ff.quantize(numbers(75))
    assert same(flat.view(-1), flat)


def test_type_and_device(q):
    for other, dtype in (
        (q.half(), torch.float16),
        (q.to(torch.bfloat16), torch.bfloat16),
        (q.double(), torch.float64),
        (q.half().float(), torch.float32),
    ):
        assert same(other, q, dtype)
        assert ff.dequantize(other).dtype is dtype
        assert torch.equal(ff.dequantize(other, torch.float32), ff.dequantize(q))
    meta = q.to("meta")
    assert meta.device.type == meta.codes.device.type == "meta"
    assert meta.shape == q.shape
    assert q.nested is None or meta.nested.offset.device.type == "cpu"
    with pytest.raises(TypeError, match=r"dtype: torch.int8; a CodebookTensor decodes to"):
        q.to(torch.int8)


def test_parameter(q):
    p = torch.nn.Parameter(q, requires_grad=False)
    assert isinstance(p, torch.nn.Parameter)
    for other in (copy.deepcopy(p), pickle.loads(pickle.dumps(p)), through_torch_save(p)):
        assert isinstance(other, torch.nn.Parameter)
        assert not other.requires_grad
        assert same(other, q)
    for function in (lambda: torch.nn.Parameter(q), q.requires_grad_):
        with pytest.raises(RuntimeError, match="has no gradient: requires_grad=False"):
            function()


def test_share_memory(q):
    assert not q.is_shared()
    before = ff.dequantize(q)
    assert q.share_memory_() is q
    assert q.is_shared()
    assert torch.equal(ff.dequantize(q), before)


def test_copy_into(q):
    other = ff.quantize(
        numbers(9, 75, seed=5),
        q.code if q.quant_type is None else q.quant_type,
        32,
        q.nested is not None,
    )
    pointer = q.codes.data_ptr()
    assert q.copy_(other) is q
    assert same(q, other)
    assert q.codes.data_ptr() == pointer
    for a, b in (
        (q, torch.zeros(9, 75)),
        (torch.zeros(9, 75), q),
        (q, ff.quantize(numbers(9, 75), "int4", 32)),
        (q, ff.quantize(numbers(9, 75), blocksize=16)),
    ):
        with pytest.raises(
            NotImplementedError, match="allowed between CodebookTensors of one shape"
        ):
            a.copy_(b)


def test_other_operations_say_what_to_call(q):
    x = numbers(2, 75)
    for function in (
        lambda: q + 1,
        lambda: q.t(),
        lambda: q[0],
        lambda: q.sum(),
        lambda: torch.nn.functional.linear(x, q),
        lambda: x @ q.t(),
        lambda: torch.cat([q, q]),
        lambda: q.mul_(2),
        lambda: q.view(3, 225),
        lambda: q.view(-1) + 1,
        lambda: q.view(-1)[:10],
        lambda: q.view(-1).view(3, 225),
    ):
        with pytest.raises(NotImplementedError, match="finefuse.dequantize|from the middle"):
            function()
    with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
        q.numpy()


def test_repr(q):
    text = repr(q)
    assert text.startswith("CodebookTensor(")
    assert "shape=(9, 75)" in text
    assert "blocksize=32" in text
    assert ("double_quant=True" in text) == (q.nested is not None)
    assert "_Bucket" in repr(q.view(-1))


def distributed(rank, file):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)

    def agree(*tensors):
        both = [None, None]
        dist.all_gather_object(both, tensors)
        for a, b in zip(*both, strict=True):
            assert torch.equal(a, b)

    q = ff.quantize(torch.randn(8, 64), double_quant=True)
    dist.broadcast(q, 1)
    agree(ff.dequantize(q))
    dist.broadcast(q, 0, async_op=True).wait()
    agree(ff.dequantize(q))
    # Several in one bucket, with parameters of their type among them.
    layers = [
        ff.nn.CodebookLinear.from_linear(torch.nn.Linear(16, 16), code, 16, double)
        for code, double in (("nf4", True), ("dynamic8", False))
    ]
    model = torch.nn.Sequential(layers[0], torch.nn.Linear(16, 16), layers[1])
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    agree(*model.state_dict().values(), ddp(torch.ones(2, 16)))
    ddp(torch.randn(2, 16)).sum().backward()
    agree(model[0].bias.grad, model[1].weight.grad)
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed(tmp_path):
    torch.multiprocessing.spawn(distributed, (str(tmp_path / "store"),), nprocs=2)


# ---- bitsandbytes ------------------------------------------------------------------------------


def about(state):
    (key,) = (k for k in state if k.startswith("quant_state."))
    return key, json.loads(bytes(state[key].tolist()))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_of_bitsandbytes(kind, double_quant):
    q = ff.quantize(numbers(5, 13, dtype=torch.bfloat16), kind, 32, double_quant)
    codes, state = q.to_bitsandbytes()
    assert codes.shape == (33, 1)
    assert codes.data_ptr() == q.codes.data_ptr()
    nested = ["nested_absmax", "nested_quant_map"] if double_quant else []
    assert list(state) == ["absmax", "quant_map", *nested, f"quant_state.bitsandbytes__{kind}"]
    values = about(state)[1]
    tail = ["nested_blocksize", "nested_dtype", "nested_offset"] if double_quant else []
    assert list(values) == ["quant_type", "blocksize", "dtype", "shape", *tail]
    assert values["dtype"] == "bfloat16"
    assert values["shape"] == [5, 13]
    assert state["quant_map"].data_ptr() != q.code.data_ptr()
    unpacked = {k: v for k, v in state.items() if "quant_state" not in k} | values
    for form in (
        state,
        {f"model.0.weight.{k}": v for k, v in state.items()},
        unpacked,
        unpacked | {"dtype": torch.bfloat16, "shape": torch.Size([5, 13])},
    ):
        assert same(ff.CodebookTensor.from_bitsandbytes(codes, form), q)
    other_storage = torch.cat([codes.flatten(), codes.new_zeros(0)])[:32].view(torch.bfloat16)
    with pytest.raises(ValueError, match="codes: 32 elements; 65 codes of 4 bits take 33"):
        ff.CodebookTensor.from_bitsandbytes(other_storage, state)
    even = ff.quantize(numbers(4, 16), kind)
    codes, state = even.to_bitsandbytes()
    for dtype in (torch.bfloat16, torch.float32):
        assert same(ff.CodebookTensor.from_bitsandbytes(codes.flatten().view(dtype), state), even)


def test_no_bitsandbytes_form():
    for q in (
        ff.quantize(numbers(4, 16), "int4"),
        ff.quantize(numbers(4, 16), "dynamic8"),
        ff.quantize(numbers(4, 16), blocksize=16),
        ff.quantize(numbers(4, 16), TABLES["2 bits"]),
    ):
        with pytest.raises(
            ValueError, match="to_bitsandbytes: CodebookTensor.*has no bitsandbytes form"
        ):
            q.to_bitsandbytes()


def test_corrupted_state():
    q = ff.quantize(numbers(20, 64), "nf4", 64, True)
    codes, state = q.to_bitsandbytes()
    key, values = about(state)

    def packed(**changes):
        new = {k: v for k, v in (values | changes).items() if v is not ...}
        return {key: torch.tensor(list(json.dumps(new).encode()), dtype=torch.uint8)}

    cases = [
        (TypeError, "codes: a tensor, not list", [1], {}),
        (ValueError, "codes: 639 elements; 1280 codes of 4 bits take 640", codes[1:], {}),
        (TypeError, "quant_state: a dict, not list", codes, []),
        (ValueError, "absmax: missing in quant_state", codes, {"absmax": None}),
        (ValueError, "absmax: 19 elements; 1280 elements in blocks of 64 have 20", codes,
         {"absmax": state["absmax"][:19]}),
        (TypeError, "absmax: dtype torch.float32; allowed: torch.uint8", codes,
         {"absmax": state["absmax"].float()}),
        (TypeError, "absmax: a tensor, not float", codes, {"absmax": 1.0}),
        (ValueError, "quant_map: missing", codes, {"quant_map": None}),
        (ValueError, "quant_map: 8 entries; nf4 has 16", codes, {"quant_map": state["quant_map"][:8]}),
        (TypeError, "quant_map: dtype torch.float16", codes, {"quant_map": state["quant_map"].half()}),
        (ValueError, "quant_map: an entry is not finite", codes,
         {"quant_map": state["quant_map"] * float("nan")}),
        (ValueError, "nested_absmax: 2 elements; 20 elements in blocks of 256 have 1", codes,
         {"nested_absmax": state["nested_absmax"].repeat(2)}),
        (ValueError, "nested_absmax: an entry is not finite", codes,
         {"nested_absmax": state["nested_absmax"] * float("inf")}),
        (ValueError, "nested_quant_map: 16 elements; 8 bits index 256", codes,
         {"nested_quant_map": state["quant_map"]}),
        (ValueError, "nested_quant_map: missing", codes, {"nested_quant_map": None}),
        (ValueError, f"{key}: not JSON", codes, {key: state[key][:30]}),
        (ValueError, f"{key}: not JSON", codes, {key: state[key] | 128}),
        (ValueError, f"{key}: a JSON object", codes, {key: torch.tensor([49], dtype=torch.uint8)}),
        (TypeError, f"{key}: a uint8 tensor, not 'x'", codes, {key: "x"}),
        (ValueError, f"{key}: its quant_type is 'fp4'", codes, packed(quant_type="fp4")),
        (ValueError, "blocksize: 65; allowed: powers of two", codes, packed(blocksize=65)),
        (TypeError, "blocksize: an int, not '64'", codes, packed(blocksize="64")),
        (ValueError, "absmax: 20 elements; 1280 elements in blocks of 32 have 40", codes,
         packed(blocksize=32)),
        (ValueError, "dtype: 'int8'; allowed: float32", codes, packed(dtype="int8")),
        (ValueError, "dtype: missing", codes, packed(dtype=...)),
        (ValueError, "codes: 640 elements; 1300 codes", codes, packed(shape=[20, 65])),
        (ValueError, "shape: 1280; allowed: sizes", codes, packed(shape=1280)),
        (ValueError, r"shape: \[-20, -64\]; allowed", codes, packed(shape=[-20, -64])),
        (ValueError, "shape: missing", codes, packed(shape=None)),
        (ValueError, "shape: ''; allowed: sizes", codes, packed(shape="")),
        (ValueError, "shape: .* more than any memory", codes, packed(shape=[2**40, 2**40])),
        (ValueError, "shape: .* more than any memory", codes, packed(shape=[10**30, 1, 0])),
        (ValueError, "nested_offset: 1e.39; allowed", codes, packed(nested_offset=1e39)),
        (ValueError, "nested_offset: 10+; allowed", codes, packed(nested_offset=10**400)),
        (ValueError, "nested_absmax: missing", codes, {"nested_absmax": None}),
        (ValueError, f"{key}: not JSON", codes,
         {key: torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)}),
        (ValueError, "codes: a scalar", torch.tensor(1.0), {}),
        (ValueError, "absmax: of more than one tensor", codes, {"other.absmax": state["absmax"]}),
        (ValueError, "quant_state: .* and .*; allowed: one", codes,
         {"quant_state.bitsandbytes__fp4": state[key]}),
        (ValueError, "nested_offset: nan; allowed: a number", codes,
         packed(nested_offset=float("nan"))),
        (ValueError, "nested_offset: missing", codes, packed(nested_offset=...)),
        (ValueError, "nested_blocksize: 100; allowed", codes, packed(nested_blocksize=100)),
        (ValueError, "nested_dtype: 'float16'; allowed", codes, packed(nested_dtype="float16")),
    ]  # fmt: skip
    for error, message, first, changes in cases:
        changed = changes if isinstance(changes, list) else state | changes
        with pytest.raises(error, match=message):
            ff.CodebookTensor.from_bitsandbytes(first, changed)
    without = {k: v for k, v in state.items() if k != key}
    with pytest.raises(ValueError, match="shape: missing in quant_state"):
        ff.CodebookTensor.from_bitsandbytes(codes, without)
    with pytest.raises(ValueError, match="quant_type: 'int8'; allowed: 'nf4', 'fp4'"):
        ff.CodebookTensor.from_bitsandbytes(codes, without | values | {"quant_type": "int8"})


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "bitsandbytes", reason="bitsandbytes is not installed"
        ).functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_of_bitsandbytes(bnb, kind, double_quant, blocksize, dtype):
    """Full blocks: its CPU path rounds a short one otherwise."""
    x = numbers(32, 512, dtype=dtype)
    codes, theirs = bnb.quantize_4bit(
        x, blocksize=blocksize, quant_type=kind, compress_statistics=double_quant
    )
    q = ff.quantize(x, kind, blocksize, double_quant)
    ours, state = q.to_bitsandbytes()
    want = theirs.as_dict(packed=True)
    assert list(state) == list(want)
    assert torch.equal(state["quant_map"], want["quant_map"])
    if kind == "nf4":
        assert torch.equal(ours, codes)
    if not double_quant:
        assert all(torch.equal(state[k], want[k]) for k in state)
    else:  # its mean, and with it the last bit of its offset, depends on its threads
        _, values = about(state)
        _, their_values = about(want)
        assert values.pop("nested_offset") == pytest.approx(
            their_values.pop("nested_offset"), rel=1e-6
        )
        assert list(values.items()) == list(their_values.items())
        assert torch.equal(state["nested_quant_map"], want["nested_quant_map"])
    # what they wrote, read here; what we write, read there
    theirs_here = ff.CodebookTensor.from_bitsandbytes(codes, want)
    torch.testing.assert_close(
        ff.dequantize(theirs_here), bnb.dequantize_4bit(codes, theirs), rtol=0, atol=0
    )
    assert same(ff.CodebookTensor.from_bitsandbytes(*theirs_here.to_bitsandbytes()), theirs_here)
    ours_there = bnb.QuantState.from_dict(dict(state), torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(ours, ours_there), ff.dequantize(q))


# ---- nn.CodebookLinear -------------------------------------------------------------------------


def linear(rows=24, columns=64, bias=True, **options):
    torch.manual_seed(0)
    return ff.nn.CodebookLinear.from_linear(torch.nn.Linear(columns, rows, bias=bias), **options)


FORMATS = [
    {},
    {"code": "fp4", "blocksize": 32},
    {"double_quant": True},
    {"code": "dynamic8", "blocksize": 256},
    {"code": "int4", "double_quant": True},
    {"blocksize": 16},
    {"code": TABLES["3 bits"]},
]


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_module(options, bias):
    plain = torch.nn.Linear(64, 24, bias=bias).eval()
    layer = ff.nn.CodebookLinear.from_linear(plain, **options)
    assert not layer.training
    assert layer.bias is plain.bias
    x = numbers(3, 64).requires_grad_()
    y = layer(x)
    assert torch.equal(y, ff.codebook_linear(x, ff.quantize(plain.weight, **options), plain.bias))
    y.sum().backward()
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"] * bias
    assert dict(layer.named_parameters())["weight"] is layer.weight
    text = repr(layer)
    for part in ("in_features=64, out_features=24", f"bias={bias}", "blocksize=", "double_quant="):
        assert part in text


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_state_dict(options, tmp_path):
    layer = linear(**options)
    state = layer.state_dict()
    nested = ["weight.nested_absmax", "weight.nested_quant_map"]
    last = list(state)[-1]
    assert list(state) == [
        "weight", "bias", "weight.absmax", "weight.quant_map",
        *(nested if options.get("double_quant") else []), last,
    ]  # fmt: skip
    theirs = layer.weight.quant_type in ("nf4", "fp4")
    kind = layer.weight.quant_type or "custom"
    assert last == f"weight.quant_state.{'bitsandbytes' if theirs else 'finefuse'}__{kind}"
    assert all(type(v) is torch.Tensor and not v.requires_grad for v in state.values())
    assert list(layer.state_dict(prefix="a.b.")) == [f"a.b.{k}" for k in state]
    x = numbers(2, 64)
    for target in (ff.nn.CodebookLinear(64, 24), linear(**options)):
        assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
        assert torch.equal(target(x), layer(x))
        assert same(target.weight, layer.weight)
        assert target.weight.codes.data_ptr() != layer.weight.codes.data_ptr()
    two = torch.nn.Sequential(layer, linear(8, 24, **options))
    meta = torch.nn.Sequential(
        ff.nn.CodebookLinear(64, 24, device="meta"), ff.nn.CodebookLinear(24, 8, device="meta")
    )
    meta.load_state_dict(two.state_dict(), assign=True)
    assert torch.equal(meta(x), two(x))
    assert torch.equal(copy.deepcopy(two)(x), two(x))
    file = io.BytesIO()
    torch.save(two.state_dict(), file)
    file.seek(0)
    blank = torch.nn.Sequential(ff.nn.CodebookLinear(64, 24), ff.nn.CodebookLinear(24, 8))
    blank.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(blank(x), two(x))
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(two.state_dict(), tmp_path / "two.safetensors")
    blank = torch.nn.Sequential(ff.nn.CodebookLinear(64, 24), ff.nn.CodebookLinear(24, 8))
    blank.load_state_dict(safetensors.load_file(tmp_path / "two.safetensors"))
    assert torch.equal(blank(x), two(x))


def test_module_type_and_device():
    layer = linear(double_quant=True)
    before = layer.weight.codes.clone()
    absmax = layer.weight.absmax.clone()
    for change, dtype in (
        (lambda: layer.half(), torch.float16),
        (lambda: layer.to(torch.bfloat16), torch.bfloat16),
        (lambda: layer.float(), torch.float32),
        (lambda: layer.to("cpu", torch.float64), torch.float64),
    ):
        module = change()
        assert module.weight.dtype is module.bias.dtype is dtype
        assert isinstance(module.weight, torch.nn.Parameter)
        assert torch.equal(module.weight.codes, before)
        assert torch.equal(module.weight.absmax, absmax)
        assert module(numbers(2, 64, dtype=dtype)).dtype is dtype
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.codes.is_meta
    state = layer.state_dict()
    meta.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(meta(torch.ones(64).double()), layer(torch.ones(64).double()))
    layer.half().load_state_dict(state)
    assert layer.weight.dtype is torch.float16  # a module keeps its type
    layer.share_memory()
    assert layer.weight.is_shared()


def test_state_dict_that_does_not_fit():
    state = linear(double_quant=True).state_dict()

    def load(state, module=None):
        (module or ff.nn.CodebookLinear(64, 24)).load_state_dict(state)

    for key in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            load({k: v for k, v in state.items() if k != key})
    for key in ("weight.absmax", "weight.quant_map", "weight.nested_absmax"):
        with pytest.raises(RuntimeError, match=rf"weight: {key.split('.')[1]}: "):
            load({k: v[:-1] if k == key else v for k, v in state.items()})
    with pytest.raises(RuntimeError, match="weight: quant_map: missing"):
        load({k: v for k, v in state.items() if k != "weight.quant_map"})
    with pytest.raises(
        RuntimeError, match=r"weight: without weight.absmax; this layer takes packed"
    ):
        load(torch.nn.Linear(64, 24).state_dict())
    with pytest.raises(RuntimeError, match='Unexpected key.*"gain"'):
        load(state | {"gain": torch.ones(1)})
    with pytest.raises(RuntimeError, match='Unexpected key.*"bias"'):
        load(state, ff.nn.CodebookLinear(64, 24, bias=False))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        load(state, ff.nn.CodebookLinear(64, 25))
    with pytest.raises(TypeError, match=r"linear: a torch.nn.Linear, not Conv1d"):
        ff.nn.CodebookLinear.from_linear(torch.nn.Conv1d(3, 3, 1))
    layer = ff.nn.CodebookLinear(64, 24)
    layer.load_state_dict({"bias": torch.ones(24)}, strict=False)
    assert torch.equal(layer(torch.ones(64)), torch.ones(24))


def test_unexpected_keys():
    layer = ff.nn.CodebookLinear(64, 8)
    state = layer.state_dict() | {"weight.SCB": torch.ones(1)}
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight.SCB"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).unexpected_keys == ["weight.SCB"]
    stale = layer.state_dict() | {"weight.nested_quant_map": torch.ones(256)}
    with pytest.raises(
        RuntimeError, match="weight: absmax: dtype torch.float32; allowed: torch.uint8"
    ):
        layer.load_state_dict(stale)


def test_module_is_freed():
    layer = linear()
    layer(numbers(2, 64).requires_grad_()).sum().backward()
    codes = layer.weight.codes
    references = len(gc.get_referrers(codes))
    del layer
    gc.collect()
    assert len(gc.get_referrers(codes)) < references


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


# ---- wrong arguments ---------------------------------------------------------------------------


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
