"""distill_loss against float64, on every ISA level."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from distill_cases import (
    DTYPES,
    IGNORE,
    KINDS,
    F,
    make,
    plain,
    run,
    top_k,
    truth,
)
from finefuse.eager import distill as eager_distill
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import ScalarErrors, check

# 1: one class, loss 0; 2, 31: below one vector at every level; 257, 32001: odd tails, several blocks of 2048;
# 151936: Qwen's vocabulary, two rows of it larger than most L2 caches in float32.
VOCABS = [1, 2, 31, 257, 32001, 151936]


def sizes(student, teacher, *, kind, beta, temperature, alpha, targets, teacher_indices=None):
    """Of each row, the absolute terms of loss and gradient. A divergence is a sum of differences of
    log-probabilities, themselves differences of logits, which cancel in nearly equal rows and in few columns:
    each was rounded by itself."""
    student, teacher = student.detach().double() / temperature, teacher.double()
    log_p = student.log_softmax(-1)
    if teacher_indices is None:
        log_q = (teacher / temperature).log_softmax(-1)
        logs = student.abs() + teacher.abs() / temperature
    else:
        log_p, log_q = eager_distill._buckets(log_p, teacher, teacher_indices.long())
        logs = student.abs().amax(-1, keepdim=True)
    p, q = log_p.exp(), log_q.exp()
    weight = {"forward_kl": q, "reverse_kl": p, "jsd": beta * q + (1 - beta) * p}[kind]
    logs = logs + log_p.abs() + log_q.abs() - (np.log(beta * (1 - beta)) if kind == "jsd" else 0)
    logs = torch.where(weight == 0, 0, logs)
    nll = F.cross_entropy(student * temperature, targets, reduction="none")
    of_loss = alpha * (weight * logs).sum(-1) + (1 - alpha) * nll
    of_gradient = alpha / temperature * (p + weight * (1 + logs)) + (1 - alpha)
    return of_loss.numpy(), of_gradient.amax(-1, keepdim=True).expand(student.shape).numpy()


def compare(name, student, teacher, terms=(None, None), **options):
    """Loss and gradient by the error rule, against plain torch in the same type."""
    ours, dz = run(ff.distill_loss, student, teacher, **options)
    eager, eager_dz = run(plain, student, teacher, **options)
    want, want_dz = truth(student, teacher, **options)
    check(f"{name}: loss", ours, eager, want, ours.dtype, terms[0])
    check(f"{name}: gradient", dz, eager_dz, want_dz, terms=terms[1])


# Reductions differ only in what a row's gradient is multiplied by: of long rows one, another for each type.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(isa, kind, vocab, dtype):
    rows = 2 if vocab > 100_000 else 6
    student, teacher = make(rows, vocab, dtype)
    reductions = ("none", "mean", "sum")
    chosen = reductions if vocab < 1000 else (reductions[DTYPES.index(dtype) % 3],)
    for reduction in chosen:
        compare(f"{kind} V={vocab} {reduction}", student, teacher, kind=kind, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalar_over_seeds(dtype):
    for kind in KINDS:
        errors = ScalarErrors(kind, dtype)
        for seed in range(40):
            student, teacher = make(9, 301, dtype, seed=seed)
            want, _ = truth(student, teacher, kind=kind)
            errors.add(
                ff.distill_loss(student, teacher, kind=kind),
                plain(student, teacher, kind=kind),
                want,
                want,
            )
        errors.check()


# beta is of no effect but in jsd.
@pytest.mark.parametrize(
    ("kind", "beta"),
    [("forward_kl", 0.5), ("reverse_kl", 0.5), *(("jsd", b) for b in (0.0, 0.03, 0.5, 0.9, 1.0))],
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0, 20.0])
def test_beta_and_temperature(isa, kind, beta, temperature):
    student, teacher = make(5, 700)
    options = {"kind": kind, "beta": beta, "temperature": temperature}
    for squared in (False, True):
        compare("temperature", student, teacher, temperature_squared=squared, **options)
    as_tensors = {
        k: torch.tensor(v, dtype=torch.float64) for k, v in options.items() if k != "kind"
    }
    a = ff.distill_loss(student, teacher, kind=kind, **as_tensors)
    assert torch.equal(a, ff.distill_loss(student, teacher, **options))


def test_the_ends_of_jsd(isa):
    """By definition, and the default kind is the forward KL."""
    student, teacher = make(4, 90)
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        ours = run(ff.distill_loss, student, teacher, kind="jsd", beta=beta)
        for a, b in zip(ours, run(ff.distill_loss, student, teacher, kind=kind), strict=True):
            assert torch.equal(a, b)
    a = ff.distill_loss(student, teacher)
    assert torch.equal(a, ff.distill_loss(student, teacher, kind="forward_kl"))


@pytest.mark.parametrize("apart", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("kind", KINDS)
def test_nearly_equal_distributions(isa, kind, apart):
    """Where a KL is the small difference of large numbers: never below 0, and its digits."""
    for spread in (0.5, 3.0, 30.0):
        student, teacher = make(8, 5000, spread=spread, apart=apart)
        compare("near", student, teacher, kind=kind, reduction="none")
        loss = ff.distill_loss(student, teacher, kind=kind, reduction="none")
        assert (loss >= 0).all()
        if apart == 0.0:
            assert loss.max() < 1e-7


@pytest.mark.parametrize(("spread", "shift"), [(1e-3, 0.0), (30.0, -1e4), (30.0, 3e4), (1e4, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(isa, kind, spread, shift):
    student, teacher = make(5, 3000, spread=spread, apart=spread / 3)
    compare("extreme", student + shift, teacher - shift, kind=kind, reduction="none")


@pytest.mark.parametrize("position", [0, 2047, 2048, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_maximum_rises_late(isa, kind, position):
    """The running references must follow maxima that appear in any block, in either row."""
    student, teacher = make(3, 6001, spread=1.0)
    student[0, position] += 40.0
    teacher[1, position] += 40.0
    student[2, position] += 60.0
    teacher[2, 4100] += 50.0
    compare("late", student, teacher, kind=kind, reduction="none")


# ---- cross-entropy beside it, masks, columns ---------------------------------------------------


# Which passes a row goes through depends on alpha, T and kind, all of them in float32; the other types, which
# only load and store otherwise, where the row goes through most.
@pytest.mark.parametrize(
    ("alpha", "temperature", "dtype"),
    [
        *((alpha, t, torch.float32) for alpha in (0.0, 0.3, 1.0) for t in (1.0, 2.5)),
        *((0.3, 2.5, dtype) for dtype in DTYPES[1:]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_alpha(isa, kind, alpha, temperature, dtype):
    student, teacher = make(6, 2100, dtype)
    targets = torch.randint(0, 2100, (6,))
    targets[2] = IGNORE
    for squared, y in ((False, targets), (True, targets.int())):
        compare(
            "alpha", student, teacher, kind=kind, alpha=alpha, targets=y, temperature=temperature,
            temperature_squared=squared,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_count_are_not_read(isa, kind, fill, dtype):
    student, teacher = make(6, 300, dtype)
    dirty, dirty_teacher = student.clone(), teacher.clone()
    mask = torch.tensor([True, False, True, True, False, True])
    targets = torch.tensor([5, 7, IGNORE, 299, 1, 0])
    dead = ~mask | (targets == IGNORE)
    dirty[dead] = fill
    dirty_teacher[dead] = fill
    for options in ({"alpha": 1.0}, {"alpha": 0.5, "temperature": 2.0}):
        for reduction in ("mean", "sum", "none"):
            more = {"kind": kind, "targets": targets, "reduction": reduction, **options}
            ours, dz = run(ff.distill_loss, dirty, dirty_teacher, mask=mask, **more)
            want, want_dz = run(ff.distill_loss, student, teacher, mask=mask.int() * 3, **more)
            assert torch.equal(ours, want)
            assert torch.equal(dz, want_dz)
            assert (dz[dead] == 0).all()
            compare("mask", student, teacher, mask=mask, **more)
            # whatever comes from above
            x = dirty.clone().requires_grad_()
            loss = ff.distill_loss(x, dirty_teacher, mask=mask, **more)
            (loss.sum() * float("inf")).backward()
            assert (x.grad[dead] == 0).all()
    for reduction, value in (("mean", 0.0), ("sum", 0.0), ("none", 0.0)):
        none = torch.zeros(6, dtype=torch.bool)
        loss, dz = run(
            ff.distill_loss, dirty, dirty_teacher, kind=kind, mask=none, reduction=reduction
        )
        assert (loss == value).all()
        assert (dz == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(100, 128, 97), (128, 100, 100), (90, 90, 33), (64, 64, 64)])
def test_vocab_size(isa, widths, dtype):
    """Vocabularies padded to different widths: what is beyond is not read, and its gradient is 0."""
    width, teacher_width, vocab = widths
    wide, _ = make(5, 128, dtype)
    student, teacher = wide[:, :width].clone(), make(5, 128, dtype, seed=1)[0][:, :teacher_width]
    student[:, vocab:] = float("nan")
    teacher = teacher.clone()
    teacher[:, vocab:] = float("inf")
    for kind in KINDS:
        for reduction in ("mean", "none"):
            options = {"kind": kind, "vocab_size": vocab, "reduction": reduction}
            compare("vocab_size", student, teacher, **options)
            ours, dz = run(ff.distill_loss, student, teacher, **options)
            want, want_dz = run(
                ff.distill_loss,
                student[:, :vocab],
                teacher[:, :vocab],
                kind=kind,
                reduction=reduction,
            )
            assert torch.equal(ours, want)
            assert torch.equal(dz[:, :vocab], want_dz)
            assert (dz[:, vocab:] == 0).all()
            x = student.clone().requires_grad_()
            loss = ff.distill_loss(x, teacher, **options)
            (loss.sum() * float("inf")).backward()
            assert (x.grad[:, vocab:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_types_of_the_teacher(isa, dtype, teacher_dtype):
    """The same bits as a teacher of the accumulator's type, which holds the same values."""
    student, teacher = make(4, 2077, dtype, teacher_dtype=teacher_dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for kind in KINDS:
        ours, dz = run(ff.distill_loss, student, teacher, kind=kind)
        want, want_dz = run(ff.distill_loss, student, teacher.to(wide), kind=kind)
        assert torch.equal(ours, want)
        assert torch.equal(dz, want_dz)
        compare("types", student, teacher.to(wide), kind=kind)


# ---- a top-K teacher ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 3001])
@pytest.mark.parametrize("kind", KINDS)
def test_top_k(isa, kind, k, dtype):
    """K = V: the whole of it, and no bucket of what is left."""
    rows, vocab, temperature = 4, 3001, 1.5
    student, whole = make(rows, vocab, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    teacher, indices = top_k(whole, k, temperature, wide)
    for options in (
        {},
        {"alpha": 0.4, "targets": torch.tensor([1, IGNORE, 3000, int(indices[3, 0])])},
    ):
        for i in (indices, indices.int()):
            compare(
                f"top {k}", student, teacher, kind=kind, teacher_indices=i, temperature=temperature,
                **options,
            )  # fmt: skip
    if k == vocab:
        want, want_dz = truth(student, whole, kind=kind, temperature=temperature)
        ours, dz = run(
            ff.distill_loss,
            student,
            teacher,
            kind=kind,
            temperature=temperature,
            teacher_indices=indices,
        )
        check("the whole", ours, want, want)
        check("the whole", dz, want_dz, want_dz)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_top_k_at_the_edges(isa, kind):
    """A rest of which the student (or the teacher) has next to nothing, or nothing; columns padded."""
    student, whole = make(6, 500, spread=2.0)
    teacher, indices = top_k(whole, 4)
    student[0].scatter_(0, indices[0], 60.0)  # p of the rest: 1e-24
    student[1].scatter_(0, indices[1], 300.0)  # underflows
    teacher[2] += 0.5 - teacher[2].logsumexp(0)  # a little more than 1 once it is rounded
    teacher[2] -= 0.5
    student[3, :] = -float("inf")  # nothing but the rest, or nothing in it
    student[3, indices[3]] = 1.0
    teacher[4, 2] = -float("inf")
    student[5].scatter_(0, indices[5], -200.0)
    for options in ({}, {"vocab_size": 500}):
        compare(
            "edge",
            student,
            teacher,
            kind=kind,
            teacher_indices=indices,
            reduction="none",
            **options,
        )
    loss, dz = run(
        ff.distill_loss, student, teacher, kind=kind, teacher_indices=indices, reduction="none"
    )
    assert (loss[3] == float("inf")) == (kind == "forward_kl")
    assert torch.isfinite(dz).all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_infinite_reverse_kl(backend):
    """Its gradient is NaN in the whole row, and in no other; a student of probability 1 among them."""
    student, teacher = make(4, 300)
    teacher[1, 7] = student[2, ::2] = -float("inf")
    teacher[3, 299] = -float("inf")
    student[3, :299] = -float("inf")
    with ff.backend(backend):
        for reduction in ("none", "mean"):
            loss, dz = run(
                ff.distill_loss, student, teacher, kind="reverse_kl", reduction=reduction
            )
            assert torch.isnan(dz).all(-1).tolist() == [False, True, False, True]
            assert torch.isfinite(dz[[0, 2]]).all()
            infinite = loss == float("inf")
            assert infinite.tolist() == ([False, True, False, True] if loss.ndim else True)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_top_k_reverse_without_a_rest(isa, backend):
    """q of the rest is 0 and p is not: the reverse KL is infinite, as it is of whole distributions."""
    student, whole = make(3, 50)
    teacher, indices = top_k(whole, 4)
    teacher[1] = torch.tensor([0.0, -float("inf"), -float("inf"), -float("inf")])
    options = {"kind": "reverse_kl", "teacher_indices": indices, "reduction": "none"}
    with ff.backend(backend):
        loss, dz = run(ff.distill_loss, student, teacher, **options)
    assert loss[1] == float("inf")
    assert torch.isnan(dz[1]).all()
    assert torch.isfinite(dz[[0, 2]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounded_log_probabilities_are_probabilities(dtype):
    """What a type rounds must not be taken for logits: uniform, peaked, K = V and above it."""
    for vocab in (3, 50, 1000, 30000):
        for spread in (0.0, 1.0, 8.0):
            _, whole = make(4, vocab, spread=spread, apart=0.1)
            teacher, indices = top_k(whole, min(vocab, 1000), dtype=dtype)
            loss = ff.distill_loss(whole, teacher, teacher_indices=indices)
            assert torch.isfinite(loss)


# ---- -inf, NaN ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(isa, dtype):
    inf = float("inf")
    student, teacher = make(5, 3001, dtype)
    student[:, ::3] = -inf
    teacher[:, ::3] = -inf  # rows 0: in both alike
    teacher[1, 1::3] = -inf  # the student has weight where the teacher has none
    student[2, 2::3] = -inf  # and the other way round
    student[3] = -inf
    teacher[4] = -inf
    for kind in KINDS:
        ours, dz = run(ff.distill_loss, student, teacher, kind=kind, reduction="none")
        want, want_dz = truth(student, teacher, kind=kind, reduction="none")
        check(kind, ours, want, want)
        assert torch.isnan(ours[3:]).all()
        assert (ours[1] == inf) == (kind == "reverse_kl")
        assert (ours[2] == inf) == (kind == "forward_kl")
        check(kind, dz, want_dz, want_dz)
        if kind != "reverse_kl":
            assert torch.isfinite(dz[:3]).all()
        assert (dz[0, ::3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_a_row_that_counts(isa, kind, dtype):
    """It shows, and only in its own row, in the value and in every element of its gradient."""
    for bad in (float("nan"), float("inf")):
        for column in (0, 50, 2500):
            for which in (0, 1):
                logits = make(3, 2600, dtype)
                logits[which][1, column] = bad
                for temperature in (1.0, 2.0):
                    ours, dz = run(
                        ff.distill_loss, *logits, kind=kind, reduction="none", alpha=0.5,
                        targets=torch.tensor([0, 1, 2]), temperature=temperature,
                    )  # fmt: skip
                    assert torch.isnan(ours[1])
                    assert torch.isnan(dz[1]).all()
                    assert torch.isfinite(ours[[0, 2]]).all()
                    assert torch.isfinite(dz[[0, 2]]).all()


# ---- upstream gradients, in place, strides -----------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 0.0, -2.5])
def test_upstream(kind, inplace, upstream):
    student, teacher = make(7, 300)
    _, want = truth(student, teacher, kind=kind)
    x = student.clone().requires_grad_()
    (ff.distill_loss(x, teacher, kind=kind, inplace=inplace) * upstream).backward()
    check("gradient", x.grad, want * upstream, want * upstream)
    if inplace:
        assert x.grad.data_ptr() == x.data_ptr()
    rows = torch.randn(7)
    _, dz = run(
        ff.distill_loss, student, teacher, rows, kind=kind, reduction="none", inplace=inplace
    )
    _, want = truth(student, teacher, kind=kind, reduction="none")
    want = want * rows.double().numpy()[:, None]
    check("by row", dz, want, want)


def test_retain_graph():
    student, teacher = make(5, 100)
    for reduction in ("mean", "none"):
        x = student.clone().requires_grad_()
        loss = ff.distill_loss(x, teacher, reduction=reduction).sum()
        (first,) = torch.autograd.grad(loss, x, torch.tensor(2.0), retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(loss, x, torch.tensor(-1.0))
        assert torch.equal(first, kept)
        torch.testing.assert_close(second, kept / -2, rtol=1e-6, atol=1e-12)
        x = student.clone().requires_grad_()
        loss = ff.distill_loss(x, teacher, reduction=reduction, inplace=True).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"consumed|modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_inplace(isa, kind, dtype):
    """The same bits as out of place, in the student's own storage, also through views; K of a teacher too."""
    student, teacher = make(4 * 6, 2129, dtype)
    values, indices = top_k(teacher, 7, dtype=torch.float32)
    targets = torch.randint(0, 2000, (24,))
    for reduction in ("mean", "none"):
        for more in (
            {"teacher_logits": teacher},
            {"teacher_logits": teacher, "alpha": 0.4, "targets": targets, "temperature": 2.0},
            {"teacher_logits": values, "teacher_indices": indices},
            {
                "teacher_logits": values,
                "teacher_indices": indices,
                "alpha": 0.4,
                "targets": targets,
            },
        ):
            options = {"kind": kind, "reduction": reduction, **more}
            x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
            for z, inplace in ((x, False), (y, True)):
                ff.distill_loss(z, inplace=inplace, **options).sum().backward()
            assert torch.equal(x.grad, y.grad)
            assert y.grad.data_ptr() == y.data_ptr()
    base = student.view(4, 6, 2129)
    for view in (lambda t: t[:, :-1], lambda t: t.transpose(0, 1), lambda t: t[..., ::2]):
        part, t = view(base), view(teacher.view(4, 6, 2129))
        _, want = run(ff.distill_loss, part.contiguous(), t.contiguous(), kind=kind)
        storage = base.clone()
        x = view(storage).detach().requires_grad_()
        ff.distill_loss(x, t, kind=kind, inplace=True).backward()
        assert torch.equal(x.grad, want)
        assert torch.equal(view(storage), want)
    x = student[:1].expand(24, 2129).detach().requires_grad_()
    with pytest.raises(ValueError, match="inplace=True"):  # float16: in the backward
        ff.distill_loss(x, teacher, inplace=True).backward()


def test_strides(isa):
    student, teacher = make(6 * 9, 65)
    s, t = student.view(6, 9, 65), teacher.view(6, 9, 65)
    mask = torch.rand(6, 9) > 0.3
    targets = torch.randint(0, 30, (6, 9))
    cases = {
        "shifted": (s[:, :-1], t[:, 1:], mask[:, 1:], targets[:, 1:]),
        "every other": (s[::2, ::3], t[::2, ::3], mask[::2, ::3], targets[::2, ::3]),
        "classes": (s[..., ::2], t[..., 1::2], mask, targets),
        "transposed": (s.transpose(0, 1), t.transpose(0, 1), mask.t(), targets.t()),
        "expanded": (s, t[:1].expand(6, 9, 65), mask, targets),
        "one row": (s[0, 0], t[1, 1], mask[0, 0], targets[0, 0]),
    }
    for name, (x, y, m, z) in cases.items():
        if name == "classes":
            x = x[..., :32]
        for kind in KINDS:
            options = {"kind": kind, "reduction": "none", "alpha": 0.5}
            ours = run(ff.distill_loss, x, y, mask=m, targets=z, **options)
            want = run(
                ff.distill_loss, x.contiguous(), y.contiguous(), mask=m.contiguous(),
                targets=z.contiguous(), **options,
            )  # fmt: skip
            for a, b in zip(ours, want, strict=True):
                assert torch.equal(a, b), name


def test_empty():
    for shape in ((0, 7), (2, 0, 7)):
        student, teacher = torch.zeros(shape), torch.zeros(shape)
        for reduction in ("mean", "sum", "none"):
            for kind in KINDS:
                loss, dz = run(ff.distill_loss, student, teacher, kind=kind, reduction=reduction)
                assert loss.sum() == 0
                assert dz.shape == shape
        index = torch.zeros((*shape[:-1], 3), dtype=torch.long)
        assert ff.distill_loss(student, torch.zeros(index.shape), teacher_indices=index) == 0


# ---- what others compute -----------------------------------------------------------------------


def test_as_torch_kl_div():
    student, teacher = make(6, 400)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    for kind, want in (
        ("forward_kl", F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)),
        ("reverse_kl", F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)),
    ):
        torch.testing.assert_close(ff.distill_loss(student, teacher, kind=kind), want)


def test_as_trl():
    module = pytest.importorskip("trl.experimental.gkd", reason="trl is not installed")
    student, teacher = make(2 * 6, 90)
    student, teacher = student.view(2, 6, 90), teacher.view(2, 6, 90)
    labels = torch.randint(0, 90, (2, 6))
    labels[0, :2] = IGNORE
    for beta in (0.0, 0.3, 0.5, 1.0):
        for temperature in (1.0, 0.7):
            want = module.GKDTrainer.generalized_jsd_loss(
                student, teacher, labels=labels, beta=beta, temperature=temperature
            )
            ours = ff.distill_loss(
                student, teacher, kind="jsd", beta=beta, temperature=temperature, targets=labels
            )
            torch.testing.assert_close(ours, want)


# ---- eager -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_backend(kind, dtype):
    """Plain torch operations: the same numbers, masks and edges."""
    student, teacher = make(7, 200, dtype)
    values, indices = top_k(teacher, 6, dtype=torch.float32)
    mask = torch.tensor([True, True, False, True, True, True, True])
    targets = torch.tensor([1, 2, 3, IGNORE, 5, 199, 0])
    student[2] = teacher[2] = float("nan")
    inf = float("inf")
    student[0, ::3] = teacher[0, ::3] = -inf
    for t, more in ((teacher, {}), (values, {"teacher_indices": indices})):
        for alpha, reduction in ((1.0, "none"), (0.4, "mean"), (0.0, "sum")):
            options = {
                "kind": kind, "alpha": alpha, "targets": targets, "mask": mask, "reduction": reduction,
                "temperature": 1.3, **more,
            }  # fmt: skip
            with ff.backend("eager"):
                ours, dz = run(ff.distill_loss, student, t, **options)
            want, want_dz = truth(student, t, **options)
            torch.testing.assert_close(ours.double(), torch.as_tensor(want), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(dz, torch.as_tensor(want_dz).to(dtype))


# ---- random inputs -----------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    spread=st.floats(0.01, 30.0),
    apart=st.floats(0.01, 10.0),
    beta=st.floats(0.01, 0.99),
    temperature=st.floats(0.1, 20.0),
    alpha=st.floats(0.0, 1.0),
    k=st.integers(0, 70),
    seed=st.integers(0, 2**31),
)
def test_random(rows, vocab, dtype, kind, spread, apart, beta, temperature, alpha, k, seed):
    student, teacher = make(rows, vocab, dtype, spread=spread, apart=apart, seed=seed)
    options = {
        "kind": kind, "beta": beta, "temperature": temperature, "alpha": alpha,
        "targets": torch.randint(0, vocab, (rows,)), "reduction": "none",
    }  # fmt: skip
    if 1 <= k <= vocab:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        teacher, options["teacher_indices"] = top_k(teacher, k, temperature, wide)
        # what a teacher leaves to the rest is 1 - Σ q: the digits of that are the first that it loses
        assume(k == vocab or bool((teacher.double().exp().sum(-1) < 1 - 1e-3).all()))
    terms = {name: value for name, value in options.items() if name != "reduction"}
    compare("random", student, teacher, sizes(student, teacher, **terms), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.5, 2.0)])
def test_confident_target(isa, kind, alpha, temperature):
    """p - 1 of a target that is all but certain keeps its digits."""
    student = torch.zeros(1, 1000)
    student[0, 7] = 27.0
    targets = torch.tensor([7])
    x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
    ff.distill_loss(
        x, student, kind=kind, alpha=alpha, temperature=temperature, targets=targets
    ).backward()
    ((1 - alpha) * ff.cross_entropy(y, targets)).backward()  # of equal distributions D is 0
    assert y.grad[0, 7] < 0
    check("target", x.grad[:, 7], y.grad[:, 7], y.grad[:, 7])


@pytest.mark.parametrize("place", [10, 3000])
def test_underflow_wherever_it_stands(isa, place):
    """A weight of e^-100 beside the maximum's is 0, before it in the row or after, whatever it multiplies."""
    student, teacher = torch.zeros(1, 4096), torch.zeros(1, 4096)
    student[0, place] = teacher[0, place] = 100.0
    teacher[0, 0] = -torch.inf
    assert ff.distill_loss(student, teacher, kind="reverse_kl") == 0
