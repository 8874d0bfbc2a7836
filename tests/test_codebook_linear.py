"""codebook_linear against float64; its autograd, torch's own checks, torch.compile, the other backends."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from codebook_cases import (
    CODES,
    DTYPES,
    code_of,
    layer,
    numbers,
    truth_absmax,
)
from concurrency import at_once
from finefuse import codebook as module
from finefuse.reference import codebook as reference
from tolerances import check
from torch.utils.checkpoint import checkpoint

RAW = torch.ops.finefuse


# ---- codebook_linear ---------------------------------------------------------------------------


# 1 and 7: from the bytes, one token and an odd number; the others on either side of the crossovers.
TOKENS = [
    1,
    7,
    module.KERNEL_TOKENS,
    module.KERNEL_TOKENS_BACKWARD,
    module.KERNEL_TOKENS_BACKWARD + 1,
]


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

    def work(i):
        q, x = cases[i]
        for _ in range(30):
            assert torch.equal(ff.codebook_linear(x, q), want[i])

    at_once(work)


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
