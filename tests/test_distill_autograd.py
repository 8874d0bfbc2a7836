"""distill_loss under autograd and torch.compile, torch's own checks; its threads and memory."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from distill_cases import (
    DTYPES,
    IGNORE,
    KINDS,
    RAW,
    make,
    plain,
    run,
    top_k,
    truth,
)
from tolerances import check

# ---- autograd, compile, torch's own checks -----------------------------------------------------


def test_gradcheck(isa):
    student, teacher = make(4, 11, torch.float64)
    values, indices = top_k(teacher, 3)
    targets = torch.tensor([1, IGNORE, 3, 10])
    mask = torch.tensor([True, True, False, True])
    for kind in KINDS:
        for options in (
            {"teacher_logits": teacher},
            {
                "teacher_logits": teacher,
                "temperature": 0.6,
                "alpha": 0.3,
                "targets": targets,
                "mask": mask,
            },
            {
                "teacher_logits": teacher,
                "alpha": 0.3,
                "targets": targets,
                "temperature_squared": True,
            },
            {"teacher_logits": values, "teacher_indices": indices, "temperature": 1.7},
            {
                "teacher_logits": values,
                "teacher_indices": indices,
                "alpha": 0.3,
                "targets": targets,
            },
            {"teacher_logits": teacher, "vocab_size": 8, "beta": 0.2},
        ):
            for reduction in ("mean", "sum", "none"):
                assert torch.autograd.gradcheck(
                    lambda z, o=options, k=kind, r=reduction: ff.distill_loss(
                        z, kind=k, reduction=r, **o
                    ),
                    (student.clone().requires_grad_(),),
                )


def raw_calls(grad=False):
    student, teacher = make(4, 9)
    values, indices = top_k(teacher, 3)
    student.requires_grad_(grad)
    mask, targets = torch.tensor([True, False, True, True]), torch.tensor([1, 2, IGNORE, 8])
    out, one, half = torch.empty(4, 9), torch.ones(4), torch.tensor(0.5)
    numbers, tensors = (0.5, 1.5, 0.5), (half, torch.tensor(1.5), half)
    whole, named = (None, mask, targets), (indices, None, targets)
    for floats, overload in ((numbers, "default"), (tensors, "tensor")):
        for rows, t in ((whole, teacher), (named, values)):
            yield getattr(RAW.distill_forward, overload), (
                student, t, *rows, *floats, 2, True, 9, IGNORE, 0,
            )  # fmt: skip
            yield getattr(RAW.distill_forward_backward, overload), (
                student, t, out, *rows, *floats, 1, False, 9, IGNORE, 2,
            )  # fmt: skip
            yield getattr(RAW.distill_backward, overload), (
                one, student, t, out, *rows, *floats, 0, False, 9, IGNORE, 0,
            )  # fmt: skip


@pytest.mark.parametrize("case", range(len(list(raw_calls()))))
def test_opcheck_raw(case):
    op, args = list(raw_calls())[case]
    torch.library.opcheck(op, args)


def test_opcheck_public():
    student, teacher = make(4, 9)
    torch.library.opcheck(RAW.distill_loss.default, (student.requires_grad_(), teacher))
    ours = RAW.distill_loss(student, teacher, kind="jsd", temperature=2.0)
    assert torch.equal(ours, ff.distill_loss(student, teacher, kind="jsd", temperature=2.0))


def test_backward_through_a_raw_op_raises():
    for op, args in raw_calls(grad=True):
        with pytest.raises(RuntimeError, match="is a raw op"):
            op(*args).sum().backward()


def test_only_the_student_has_a_gradient():
    student, teacher = make(3, 8)
    teacher.requires_grad_()
    assert not ff.distill_loss(student, teacher).requires_grad
    with ff.backend("eager"):
        assert not ff.distill_loss(student, teacher).requires_grad
    ff.distill_loss(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_double_backward_and_forward_mode_raise():
    student, teacher = make(3, 8)
    for reduction in ("mean", "none"):
        hidden, weight = (
            torch.randn(3, 5, requires_grad=True),
            torch.randn(5, 8, requires_grad=True),
        )
        loss = ff.distill_loss(hidden @ weight, teacher, reduction=reduction).sum()
        (g,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(g.square().sum(), weight)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        x = forward_ad.make_dual(student, torch.ones_like(student))
        with pytest.raises(RuntimeError, match="forward-mode"):
            ff.distill_loss(x, teacher)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place_with_a_teacher_in_the_same_memory(kind, reduction):
    """Rows that overlap, and two halves of the same rows."""
    rows, halves = torch.randn(7, 33), torch.randn(6, 64)
    for memory, student, teacher in (
        (rows, slice(1, None), slice(None, -1)),
        (rows.clone(), slice(None, -1), slice(1, None)),
        (halves, (slice(None), slice(32)), (slice(None), slice(32, None))),
    ):
        apart = memory.clone()[student].clone().requires_grad_()
        want = ff.distill_loss(apart, memory.clone()[teacher], kind=kind, reduction=reduction)
        want.sum().backward()
        shared = memory.clone().requires_grad_()
        x = (shared * 1.0)[student]
        x.retain_grad()
        t = x._base[teacher].detach()
        got = ff.distill_loss(x, t, kind=kind, reduction=reduction, inplace=True)
        got.sum().backward()
        assert torch.equal(got, want)
        assert torch.equal(x.grad, apart.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    student, teacher = make(5, 300)
    for inplace in (False, True):
        a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(
            lambda x, i=inplace: ff.distill_loss(x * 1.0, teacher, inplace=i),
            a,
            use_reentrant=use_reentrant,
        ).backward()
        ff.distill_loss(b, teacher).backward()
        assert torch.equal(a.grad, b.grad)


def test_loss_scaling():
    """In float16 a loss scaler's factor reaches small gradients before they are rounded."""
    student, teacher = make(64, 5000, torch.float16)
    x = student.clone().requires_grad_()
    (ff.distill_loss(x, teacher) * 16384.0).backward()
    _, want = truth(student, teacher)
    _, eager = run(plain, student.float(), teacher)
    check("scaled", x.grad, eager.double() * 16384, want * 16384)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction, counter):
    def step(x, teacher, mask, targets, beta, temperature):
        return ff.distill_loss(
            x, teacher, kind="jsd", beta=beta, temperature=temperature, mask=mask, targets=targets,
            alpha=0.7, reduction=reduction,
        ).sum()  # fmt: skip

    # Inductor once: the other reduction differs in what the opaque ops are told
    counter.backend = "inductor" if reduction == "mean" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    student, teacher = make(5, 40)
    mask, targets = torch.rand(5) > 0.3, torch.randint(0, 40, (5,))
    for i in range(6):  # beta 0, of the forward KL, and 1, of the reverse, among them
        beta, t = i / 5, 0.5 + 0.13 * i
        x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
        a, b = (
            compiled(x, teacher, mask, targets, beta, t),
            step(y, teacher, mask, targets, beta, t),
        )
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-7)
    assert 1 <= counter.graphs <= 3
    before, counter.backend = counter.graphs, "eager"
    for i in range(6):  # as 0-d tensors they never recompile
        compiled(x, teacher, mask, targets, torch.tensor(i / 5), torch.tensor(0.5 + 0.13 * i))
    assert counter.graphs <= before + 1


def test_compile_eager_backend():
    """Plain torch operations under compile, where beta is a tensor."""
    torch._dynamo.reset()
    student, teacher = make(5, 40)

    def step(x, beta):
        return ff.distill_loss(x, teacher, kind="jsd", beta=beta)

    with ff.backend("eager"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for beta in (0.0, 0.25, 1.0):
            x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
            a, b = compiled(x, torch.tensor(beta)), step(y, beta)
            a.backward()
            b.backward()
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(x.grad, y.grad)


def test_autocast():
    layer = torch.nn.Linear(8, 33)
    x, teacher = torch.randn(6, 8), torch.randn(6, 33)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(x)
        loss = ff.distill_loss(logits, teacher)
        assert logits.dtype is torch.bfloat16
        assert loss.dtype is torch.float32
    loss.backward()
    assert layer.weight.grad.dtype is torch.float32
    want, _ = truth(logits, teacher)
    check("autocast", loss, want, want)


# ---- determinism, threads, memory --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_thread_count(dtype):
    student, teacher = make(40, 3001, dtype)
    values, indices = top_k(teacher, 9, dtype=torch.float32)
    for kind in KINDS:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                [
                    *run(ff.distill_loss, student, teacher, kind=kind),
                    *run(ff.distill_loss, student, values, kind=kind, teacher_indices=indices),
                ]
            )
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 700), (torch.bfloat16, 1400)], ids=str)
def test_streamed_gradient_has_the_same_bits(dtype, rows):
    """Above 16 MiB the gradient is written past the caches; odd row lengths start unaligned."""
    student, teacher = make(rows, 6151, dtype)
    _, dz = run(ff.distill_loss, student, teacher, reduction="sum")
    for part in (slice(0, 3), slice(350, 353), slice(rows - 3, rows)):
        _, want = run(ff.distill_loss, student[part], teacher[part], reduction="sum")
        assert torch.equal(dz[part], want)


def test_peak_memory():
    """The gradient, and no scratch of the logits' size: 1 MB and 32 bytes a row at most."""
    student, teacher = make(64, 8000)

    class Allocated(torch.utils._python_dispatch.TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "empty" in str(function) or "zeros" in str(function):
                Allocated.bytes += out.numel() * out.element_size()
            return out

    x = student.requires_grad_()
    for kind in KINDS:
        Allocated.bytes = 0
        with Allocated():
            loss = ff.distill_loss(x, teacher, kind=kind)
        loss.backward()
        assert student.numel() * 4 <= Allocated.bytes <= student.numel() * 4 + 2**20 + 32 * 64
