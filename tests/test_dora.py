"""DoRA on CPU tensors: lora_linear with a magnitude, dora_norm, merging: errors, autograd, arguments."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from dora_cases import compare, peft_norm, problem
from finefuse import _C, _low_rank, dora
from finefuse._codebook_tensor import fields
from finefuse.eager.lora import keep_mask
from finefuse.reference import dora as reference
from guards import between_guards
from low_rank_cases import DTYPES, check_together, grads, numbers, opcheck_of
from tolerances import check
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

RAW = torch.ops.finefuse


def check_all(*problems, **options):
    """The error rule; over several problems of one shape together where sums are few."""
    check_together(("y", "dx", "dA", "dB", "dm", "db"), [compare(*p, **options) for p in problems])


# ---- the error rule ----------------------------------------------------------------------------


# tokens: none, one, a block of 64 whose columns' sums are added with a rest. rank 64: the library's norms.
# Sizes: odd, less than a vector; more than a span of 512 columns and a task of 64 rows, with rests.
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("tokens", [0, 1, 3, 131])
def test_shapes(isa, tokens, rank):
    for rows, columns in ((19, 75), (1, 5), (1100, 32), (67, 1637)):
        seeds = range(8 if 0 < tokens * rank < 64 else 1)
        check_all(*(problem(tokens, rows, columns, rank, seed=seed) for seed in seeds))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", DTYPES, ids=str)
def test_types(isa, dtype, factors):
    if factors is torch.float64 and dtype is not torch.float64:
        with pytest.raises(TypeError, match="lora_a: dtype torch.float64; x has"):
            ff.lora_linear(*problem(5, 40, 96, 3, dtype, factors)[:4])
        return
    for tokens, rank in ((5, 3), (33, 8)):
        check_all(*(problem(tokens, 40, 96, rank, dtype, factors, seed) for seed in range(4)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(isa, dtype, p):
    """The dropped x enters the base product too; the mask is that of lora_linear."""
    problems = [problem(33, 40, 130, 8, dtype, seed=seed) for seed in range(4)]
    mask = keep_mask(problems[0][0].double(), p, torch.tensor([7]))
    check_all(*problems, mask=mask, dropout=p, seed=7)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weight(dtype, tokens, double_quant):
    for p in (0.0, 0.3):
        problems = []
        for seed in range(4):
            x, w, *rest = problem(tokens, 40, 96, 8, dtype, seed=seed)
            q = ff.quantize(w.float(), double_quant=double_quant).to(dtype)
            problems.append((q, (x, ff.dequantize(q, torch.float32), *rest)))
        mask = keep_mask(problems[0][1][0].double(), p, torch.tensor([7])) if p else None
        results = [compare(*v, weight=q, mask=mask, dropout=p, seed=7) for q, v in problems]
        for i, what in enumerate(("y", "dx", "dA", "dB", "dm", "db")):
            check(what, *(torch.stack([r[side][i] for r in results]) for side in range(3)))


def test_packed_weight_wide_x():
    """float64 x over a packed weight: the norms are as exact as the rest, whatever the factors' type."""
    import finefuse.numpy as ffn

    x, w, a, b, m, *_ = problem(5, 40, 96, 8)
    q, x = ff.quantize(w), x.double()
    arrays = [t.numpy() for t in (x, ff.dequantize(q), a, b, m)]
    truth = reference.dora_linear(*arrays)
    for factors in ((a, b), (a.double(), b.double())):
        y = ff.lora_linear(x, q, *factors, magnitude=m)
        check("y", y, truth, truth)
        ours = ffn.lora_linear(
            x.numpy(), ffn.quantize(w.numpy()), *(f.numpy() for f in factors), magnitude=m.numpy()
        )
        check("numpy", ours, truth, truth)


def test_against_the_reference():
    x, w, a, b, m, bias, dy = problem(7, 19, 75, 3)
    for p in (0.0, 0.3):
        ours = grads(
            lambda x, a, b, m, p=p: ff.lora_linear(
                x, w, a, b, scale=1.7, bias=bias, dropout=p, seed=-12345, magnitude=m
            ),
            x, a, b, m, upstream=dy,
        )  # fmt: skip
        arrays = [t.numpy() for t in (x, w, a, b, m)]
        truth = (
            reference.dora_linear(*arrays, 1.7, bias.numpy(), p, -12345),
            *reference.gradients(dy.numpy(), *arrays, 1.7, p, -12345),
        )
        for o, t in zip(ours, truth, strict=True):
            check("reference", o, t, t)


# ---- norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 16, 47, 48, 384])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(isa, dtype, rank):
    """Also where the update all but cancels the weight: ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖² would lose all of it."""
    factors = dtype if dtype is torch.float64 else torch.float32
    a, b = numbers(rank, 530, dtype=factors), numbers(70, rank, dtype=factors, seed=1)
    update = 0.5 * (b.double() @ a.double())
    for near, cancels in ((numbers(70, 530, seed=2), False), (-update, True)):
        w = (near + 1e-3 * numbers(70, 530, seed=3)).to(dtype)
        truth = torch.linalg.norm(w.double() + update, dim=1)
        wide = w.to(factors)
        ours = ff.dora_norm(w, a, b, 0.5)
        assert ours.dtype is factors
        if not cancels:
            eager = torch.linalg.norm(wide + 0.5 * (b @ a), dim=1)
            check("norm", ours, eager, truth)
            with ff.backend("eager"):
                check("eager", ff.dora_norm(w, a, b, 0.5), eager, truth)
            continue
        squares = wide.square().sum(1) + ((wide @ a.T) * b).sum(1)
        squares += 0.25 * ((b @ (a @ a.T)) * b).sum(1)
        expanded = squares.clamp(min=0).sqrt()
        assert (ours - truth).abs().max() < (expanded - truth).abs().max() / 20


@pytest.mark.parametrize("panel", [1, 4 << 20])
def test_norm_of_packed_weights(monkeypatch, panel):
    """Decoded in one piece and in many, which begin where blocks do."""
    monkeypatch.setattr(dora._matmul, "PANEL_BYTES", panel)
    monkeypatch.setattr("finefuse.codebook.PANEL_BYTES", panel)
    for rank in (4, 64):
        a, b, w = numbers(rank, 96), numbers(300, rank, seed=1), numbers(300, 96, seed=2)
        q = ff.quantize(w, double_quant=True)
        plain = ff.dequantize(q)
        truth = torch.linalg.norm(plain.double() + 2 * (b.double() @ a.double()), dim=1)
        eager = torch.linalg.norm(plain + 2 * (b @ a), dim=1)
        check("norm", ff.dora_norm(q, a, b, 2.0), eager, truth)


def test_norm_as_magnitude_is_plain_lora():
    x, w, a, b, *_ = problem(9, 24, 64, 4)
    m = ff.dora_norm(w, a, b, 0.5)
    torch.testing.assert_close(
        ff.lora_linear(x, w, a, b, scale=0.5, magnitude=m),
        ff.lora_linear(x, w, a, b, scale=0.5),
    )


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_rows_of_zeros(p):
    """Pruned rows have no direction: the bias alone, no NaN, and no gradient of m."""
    x, w, a, b, m, bias, dy = problem(9, 24, 64, 4)
    w[5], b[5], m[5] = 0, 0, 0
    m[6] = 0
    for name in ("auto", "eager"):
        with ff.backend(name):
            y, dx, _, db, dm = grads(
                lambda x, a, b, m: ff.lora_linear(
                    x, w, a, b, bias=bias, magnitude=m, dropout=p, seed=3
                ),
                x, a, b, m, upstream=dy,
            )  # fmt: skip
        assert all(t.isfinite().all() for t in (y, dx, db, dm))
        assert dm[5] == 0
        if p == 0:
            torch.testing.assert_close(y[:, 5:7], bias[5:7].expand(9, 2))


@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_same_bits_for_any_thread_count(tokens):
    """Of our own passes; the base product is a library's."""
    w, a, b = numbers(300, 1300), numbers(5, 1300), numbers(300, 5)
    dy, z, factor = numbers(tokens, 1300), numbers(tokens, 1300, seed=1), numbers(1300)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        dz, total, y = torch.empty_like(dy), torch.empty(1300), torch.empty_like(dy)
        dora._SCALE_BACKWARD(dy, z, 0, tokens, 1300, factor, dz, total)
        dora._SCALE(z, 0, tokens, 1300, factor, None, False, y)
        results.append([ff.dora_norm(w, a, b, 2.0), dz, total, y])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_touches_nothing_outside(isa, dtype, at_end):
    """Arrays that begin or end at a page that must not be touched."""
    rng = np.random.default_rng(0)
    code = {"float32": 0, "float16": 2, "float64": 3}[dtype]
    wide = "float64" if dtype == "float64" else "float32"

    def guarded(*shape, dtype=dtype):
        return between_guards(rng.standard_normal(shape).astype(dtype), at_end)

    for tokens, columns, rank in ((1, 3, 1), (7, 75, 3), (69, 545, 9)):
        weight, a, b = guarded(tokens, columns), guarded(rank, columns), guarded(rank, tokens)
        norm = guarded(tokens, dtype=wide)
        _C.dora_norm(
            weight,
            code,
            tokens,
            columns,
            rank,
            b,
            code,
            tokens,
            1,
            a,
            code,
            columns,
            1,
            0.5,
            norm,
            2,
        )
        want = np.linalg.norm(
            weight.astype(float) + 0.5 * b.T.astype(float) @ a.astype(float), axis=1
        )
        np.testing.assert_allclose(norm, want, rtol=1e-3)
        z, dz = guarded(tokens, columns), guarded(tokens, columns)
        factor, total = guarded(columns, dtype=wide), guarded(columns, dtype=wide)
        _C.dora_scale(z, code, tokens, columns, factor, guarded(columns), True, dz, 2)
        _C.dora_scale_backward(weight, z, code, tokens, columns, factor, dz, total, 2)
        np.testing.assert_allclose(dz, (factor * weight).astype(dtype), rtol=1e-3)
        want = (weight.astype(float) * z).sum(0)
        np.testing.assert_allclose(total, want, rtol=1e-3, atol=1e-3)
        seed = np.array([5], np.int64)
        _C.lora_dropout(z, code, z.size, True, dz, between_guards(seed, at_end), 2**31, 2.0, 2)


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p):
    """Of what the norm does not depend on; of A and B the error rule has the detached norm's."""
    x, w, a, b, m, bias, _ = problem(5, 6, 10, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (x, m, bias)]
    assert torch.autograd.gradcheck(
        lambda x, m, bias: ff.lora_linear(
            x, w, a, b, scale=0.7, bias=bias, magnitude=m, dropout=p, seed=1
        ),
        leaves,
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_weights_gradient(p):
    x, w, a, b, m, _, dy = problem(33, 24, 40, 4, torch.float64)
    mask = keep_mask(x, p, torch.tensor([3])) if p else torch.ones(())
    norm = peft_norm(w, a, b, 0.7)

    def formula(w):
        c, dropped = m / norm, x * mask
        update = 0.7 * functional.linear(functional.linear(dropped, a), b)
        return functional.linear(x, w) + (c - 1) * functional.linear(dropped, w) + c * update

    ours = grads(
        lambda w: ff.lora_linear(x, w, a, b, scale=0.7, magnitude=m, dropout=p, seed=3),
        w, upstream=dy,
    )  # fmt: skip
    for o, t in zip(ours, grads(formula, w, upstream=dy), strict=True):
        check("dW", o, t, t)


@pytest.mark.parametrize("asked", [(), *[(n,) for n in "xwabm"], ("bias",), ("a", "b"), ("x", "m")])
def test_only_what_is_asked_for(asked):
    names = ("x", "w", "a", "b", "m", "bias")
    x, w, a, b, m, bias, dy = problem(9, 24, 40, 3)
    values = (x, w, a, b, m, bias)

    def function(x, w, a, b, m, bias):
        return ff.lora_linear(x, w, a, b, bias=bias, magnitude=m, dropout=0.5, seed=1)

    whole = grads(function, *values, upstream=dy)
    leaves = [t.clone().requires_grad_(n in asked) for n, t in zip(names, values, strict=True)]
    y = function(*leaves)
    assert y.requires_grad == bool(asked)
    if asked:
        y.backward(dy)
    for n, leaf, want in zip(names, leaves, whole[1:], strict=True):
        assert (leaf.grad is None) == (n not in asked), n
        if n in asked:
            torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-5)


def test_what_is_kept():
    """z where m trains; else nothing of the size of y."""
    x, w, a, b, m, _, _ = problem(64, 512, 256, 4)
    for trains in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t
        ):
            ff.lora_linear(
                x, w, a.detach().requires_grad_(), b, magnitude=m.detach().requires_grad_(trains)
            )
        theirs = {t.data_ptr() for t in (x, w, a, b, m)}
        extra = sum(t.nbytes for t in saved if t.data_ptr() not in theirs)
        assert extra == 64 * 4 * 4 + 512 * 4 + trains * 64 * 512 * 4


def test_double_backward_raises():
    x, w, a, b, m, *_ = problem(5, 8, 16, 2)
    y = ff.lora_linear(x.requires_grad_(), w, a, b, magnitude=m)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    x, w, a, b, m, _, dy = problem(40, 24, 96, 3)

    def function(x, a, b, m):
        return ff.lora_linear(x, w, a, b, magnitude=m, dropout=0.5)

    results = []
    for call in (function, lambda *t: checkpoint(function, *t, use_reentrant=reentrant)):
        torch.manual_seed(1)
        leaves = [t.clone().requires_grad_() for t in (x, a, b, m)]
        y = call(*leaves)
        y.backward(dy)
        results.append([y.detach(), *(t.grad for t in leaves)])
    assert all(map(torch.equal, *results))


# ---- torch's machinery ---------------------------------------------------------------------------


def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        check_op = opcheck_of(dtype)
        x, w, a, b, m, bias, dy = problem(9, 24, 64, 3, dtype)
        q = ff.quantize(w.float())
        for weight, values in ((w, _low_rank.NO_FIELDS), (None, fields(q))):
            check_op(RAW.dora_norm_forward.default, (weight, *values, a, b, 0.5))
            for seed, p in ((None, 0.0), (torch.tensor([5]), 0.5)):
                for keep in (False, True):
                    arguments = (x, weight, *values, a, b, m, bias, seed, 0.5, p, keep)
                    check_op(RAW.dora_linear_forward.default, arguments)
                _, *made = RAW.dora_linear_forward(*arguments)
                for needs in (31, 1, 2, 4, 16):
                    check_op(
                        RAW.dora_linear_backward.default,
                        (dy, x, *made, weight, *values, a, b, m, seed, 0.5, p, needs),
                    )  # fmt: skip
    torch.library.opcheck(
        RAW.lora_linear.default, (x, w, a.requires_grad_(), b), {"magnitude": m, "bias": bias}
    )


def test_compile(counter):
    """One graph for all scales and all p above 0."""
    x, w, a, b, m, bias, dy = problem(40, 24, 96, 3)

    def function(x, a, b, m, scale, p, seed):
        return ff.lora_linear(x, w, a, b, scale=scale, bias=bias, dropout=p, seed=seed, magnitude=m)

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for i in range(1, 4):
        rest = (torch.tensor(0.3 * i), torch.tensor(0.1 * i), torch.tensor([i]))
        got = grads(lambda *t, rest=rest: compiled(*t, *rest), x, a, b, m, upstream=dy)
        want = grads(lambda *t, rest=rest: function(*t, *rest), x, a, b, m, upstream=dy)
        for g, v in zip(got, want, strict=True):
            torch.testing.assert_close(g, v)
    assert counter.graphs == 1
    norm = torch.compile(ff.dora_norm, backend=counter, fullgraph=True)
    torch.testing.assert_close(norm(w, a, b, 0.5), ff.dora_norm(w, a, b, 0.5))


def test_autocast():
    x, w, a, b, m, bias, _ = problem(9, 24, 64, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = ff.lora_linear(x, w, a, b, bias=bias, magnitude=m)
    want = ff.lora_linear(x.bfloat16(), w.bfloat16(), a, b, bias=bias.bfloat16(), magnitude=m)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, want)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_eager_backend(p):
    x, w, a, b, m, bias, dy = problem(40, 24, 96, 3)

    def function(x, a, b, m):
        return ff.lora_linear(x, w, a, b, bias=bias, magnitude=m, dropout=p, seed=2)

    ours = grads(function, x, a, b, m, upstream=dy)
    with ff.backend("eager"):
        plain = grads(function, x, a, b, m, upstream=dy)
    for o, e in zip(ours, plain, strict=True):
        torch.testing.assert_close(o, e, rtol=1e-5, atol=1e-5)


# ---- beside PEFT -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_pefts_layer(training):
    """Equal outputs and gradients: a layer in training without dropout, and one that does not train."""
    peft = pytest.importorskip("peft", reason="the peer")
    x, w, a, b, m, bias, dy = problem(24, 32, 48, 4)
    linear = torch.nn.Linear(48, 32)
    linear.weight.data.copy_(w), linear.bias.data.copy_(bias)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True)
    layer = peft.get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
    layer.train(training)
    vector = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(vector.detach(), torch.linalg.norm(w, dim=1))
    for parameter, value in (
        (layer.lora_A["default"].weight, a), (layer.lora_B["default"].weight, b), (vector, m)
    ):  # fmt: skip
        parameter.data.copy_(value)
    leaf = x.clone().requires_grad_()
    theirs = layer(leaf)
    theirs.backward(dy)
    ours = grads(
        lambda x, a, b, m: ff.lora_linear(x, w, a, b, scale=1.5, bias=bias, magnitude=m),
        x, a, b, m, upstream=dy,
    )  # fmt: skip
    for o, t in zip(
        ours,
        (theirs.detach(), leaf.grad, layer.lora_A["default"].weight.grad,
         layer.lora_B["default"].weight.grad, vector.grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-5)


# ---- merging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(dtype):
    _, w, a, b, m, *_ = problem(1, 24, 75, 3, dtype)
    m[3] = 0
    merged, error = ff.merge_lora(w, a, b, 0.5, m, return_error=True)
    truth = reference.merge_dora(*(t.double().numpy() for t in (w, a, b, m)), 0.5)
    total = (w.double() + 0.5 * (b.double() @ a.double())).to(dtype)
    eager = total * (m.to(dtype) / torch.linalg.norm(total.double(), dim=1).to(dtype))[:, None]
    check("merged", merged, eager, truth)
    assert merged.dtype is dtype
    assert error <= np.abs(merged.double().numpy() - truth).max() * 1.001 + 1e-15
    norm = ff.dora_norm(w, a, b, 0.5)
    back = ff.unmerge_lora(merged, a, b, 0.5, m, norm=norm)
    kept = [i for i in range(24) if i != 3]
    unit = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2.0**-6)
    torch.testing.assert_close(back[kept], w[kept], rtol=unit, atol=4 * unit * w.abs().max().item())
    same = w.clone()
    assert ff.merge_lora(same, a, b, 0.5, m, same) is same
    assert torch.equal(same, merged)
    with ff.backend("eager"):
        torch.testing.assert_close(ff.merge_lora(w, a, b, 0.5, m), merged)


def test_merge_packed():
    _, w, a, b, m, *_ = problem(9, 24, 96, 3)
    q = ff.quantize(w, double_quant=True)
    merged, error = ff.merge_lora(q, a, b, 0.5, m, return_error=True)
    truth = reference.merge_dora(ff.dequantize(q).numpy(), a.numpy(), b.numpy(), m.numpy(), 0.5)
    want = ff.quantize(torch.from_numpy(truth).float(), double_quant=True)
    torch.testing.assert_close(ff.dequantize(merged), ff.dequantize(want))
    assert error == pytest.approx(np.abs(ff.dequantize(merged).numpy() - truth).max(), rel=1e-4)


def test_merged_is_the_layer():
    x, w, a, b, m, bias, _ = problem(9, 24, 96, 3)
    merged = ff.merge_lora(w, a, b, 0.5, m)
    torch.testing.assert_close(
        functional.linear(x, merged, bias),
        ff.lora_linear(x, w, a, b, scale=0.5, bias=bias, magnitude=m),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


# ---- arguments ---------------------------------------------------------------------------------


def test_wrong_arguments():
    x, w, a, b, m, *_ = problem(3, 8, 16, 2)
    for error, message, function in (
        (ValueError, r"magnitude: shape \(7,\)", lambda: ff.lora_linear(x, w, a, b, magnitude=m[:7])),
        (TypeError, "magnitude: a tensor, not float", lambda: ff.lora_linear(x, w, a, b, magnitude=1.0)),
        (TypeError, "magnitude: dtype torch.int64",
         lambda: ff.lora_linear(x, w, a, b, magnitude=m.long())),
        (TypeError, "weight: a tensor, not list", lambda: ff.dora_norm([1.0], a, b)),
        (TypeError, "weight: dtype torch.int64", lambda: ff.dora_norm(w.long(), a, b)),
        (TypeError, "lora_a: dtype torch.float64", lambda: ff.dora_norm(w, a.double(), b)),
        (ValueError, r"lora_b: shape \(7, 2\)", lambda: ff.dora_norm(w, a, b[:7])),
        (ValueError, "norm: None with a magnitude", lambda: ff.unmerge_lora(w, a, b, 1.0, m)),
        (ValueError, "norm: of use only with a magnitude",
         lambda: ff.unmerge_lora(w, a, b, 1.0, norm=m)),
        (ValueError, r"magnitude: shape \(7,\)", lambda: ff.merge_lora(w, a, b, 1.0, m[:7])),
        (ValueError, "out: torch.float32", lambda: ff.merge_lora(w, a, b, 1.0, m, w[:7])),
        (TypeError, "out: a tensor, not str", lambda: ff.merge_lora(w, a, b, 1.0, m, "w")),
        (ValueError, "dropout: 2.0; allowed: 0 to 1",
         lambda: ff.lora_linear(x, w, a, b, magnitude=m, dropout=2)),
    ):  # fmt: skip
        for name in ("auto", "eager"):
            with ff.backend(name), pytest.raises(error, match=message):
                function()


# ---- NumPy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_numpy(dtype, p):
    """The reference, at torch's errors."""
    import finefuse.numpy as ffn

    values = problem(33, 19, 75, 3, getattr(torch, dtype), seed=1)
    x, w, a, b, m, bias, dy = (t.numpy() for t in values)
    ours = ffn.lora_linear(
        x, w, a, b, scale=0.7, bias=bias, dropout=p, seed=5, magnitude=m, return_grad=True, upstream=dy
    )  # fmt: skip
    truth = (
        reference.dora_linear(x, w, a, b, m, 0.7, bias, p, 5),
        *reference.gradients(dy, x, w, a, b, m, 0.7, p, 5),
    )
    mask = keep_mask(values[0].double(), p, torch.tensor([5])) if p else None
    plain = compare(*values, mask=mask)[1]
    for o, e, t in zip(ours, plain, truth, strict=False):
        assert str(o.dtype) == dtype
        check("numpy", o, e, t)
    check("norm", ffn.dora_norm(w, a, b, 0.7), *2 * [reference.dora_norm(w, a, b, 0.7)])


def test_numpy_packed_and_wrong_arguments():
    import finefuse.numpy as ffn

    x, w, a, b, m, *_ = (t.numpy() for t in problem(33, 24, 64, 3))
    q = ffn.quantize(w)
    y = ffn.lora_linear(x, q, a, b, magnitude=m)
    want = reference.dora_linear(x, ffn.dequantize(q), a, b, m)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    check("norm", ffn.dora_norm(q, a, b), *2 * [reference.dora_norm(ffn.dequantize(q), a, b)])
    for error, message, function in (
        (
            ValueError,
            r"magnitude: shape \(7,\)",
            lambda: ffn.lora_linear(x, w, a, b, magnitude=m[:7]),
        ),
        (TypeError, "magnitude", lambda: ffn.lora_linear(x, w, a, b, magnitude=[1.0])),
        (TypeError, "lora_a: dtype float64", lambda: ffn.dora_norm(w, a.astype(float), b)),
        (ValueError, r"lora_b: shape \(7, 3\)", lambda: ffn.dora_norm(w, a, b[:7])),
    ):
        with pytest.raises(error, match=message):
            function()
