"""distill_loss against float64, on every ISA level."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args.distill import DISTILL_KINDS
from finefuse.eager import distill as eager_distill
from finefuse.reference import distill as reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import ScalarErrors, check

RAW = torch.ops.finefuse
F = torch.nn.functional
IGNORE = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = list(DISTILL_KINDS)
# 1: one class, loss 0; 2, 31: below one vector at every level; 257, 32001: odd tails, several blocks of 2048;
# 151936: Qwen's vocabulary, two rows of it larger than most L2 caches in float32.
VOCABS = [1, 2, 31, 257, 32001, 151936]


def make(rows, vocab, dtype=torch.float32, *, teacher_dtype=None, spread=3.0, apart=1.0, seed=0):
    """A student and a teacher that agree in part."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=g) * spread
    teacher = student + torch.randn(rows, vocab, generator=g) * apart
    return student.to(dtype), teacher.to(teacher_dtype or dtype)


def top_k(teacher, k, temperature=1.0, dtype=None):
    """(log-probabilities, indices) of the k most likely columns, as an inference server returns them."""
    logp = (teacher.double() / temperature).log_softmax(-1)
    values, indices = logp.topk(k, -1)
    return values.to(dtype or teacher.dtype), indices


def truth(student, teacher, **options):
    arrays = {
        k: v.reshape(-1, *v.shape[student.ndim - 1 :]).numpy() if isinstance(v, torch.Tensor) else v
        for k, v in options.items()
    }
    loss, gradient = reference.distill_loss(
        student.detach().double().reshape(-1, student.shape[-1]).numpy(),
        teacher.detach().double().reshape(-1, teacher.shape[-1]).numpy(),
        **arrays,
    )
    if options.get("reduction") == "none":
        loss = loss.reshape(student.shape[:-1])
    return loss, gradient.reshape(student.shape)


def plain(student, teacher, *, kind="forward_kl", beta=0.5, temperature=1.0, mask=None, alpha=1.0,
          targets=None, temperature_squared=False, vocab_size=None, teacher_indices=None,
          reduction="mean", ignore_index=IGNORE):  # fmt: skip
    """Plain torch in the student's type, as a user writes it; rows that do not count are left out."""
    keep = torch.ones(student.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    if targets is not None:
        keep = keep & (targets != ignore_index)
    vocab = vocab_size or student.shape[-1]
    z, t = student[..., :vocab][keep], teacher.to(student.dtype)[keep]
    log_p = (z / temperature).log_softmax(-1)
    if teacher_indices is None:
        log_q = (t[..., :vocab] / temperature).log_softmax(-1)
    else:
        log_p, log_q = eager_distill._buckets(log_p, t, teacher_indices[keep].long())
    if kind == "jsd" and 0 < beta < 1:
        log_m = torch.logaddexp(log_q + np.log(beta), log_p + np.log1p(-beta))
        rows = beta * F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
        rows = rows + (1 - beta) * F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    elif kind == "forward_kl" or (kind == "jsd" and beta == 0):
        rows = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    else:
        rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    rows = alpha * (temperature**2 if temperature_squared else 1) * rows
    if alpha < 1:
        rows = rows + (1 - alpha) * F.cross_entropy(z, targets[keep].long(), reduction="none")
    if reduction == "none":
        return rows.new_zeros(keep.shape).masked_scatter(keep, rows)
    return rows.sum() / (max(int(keep.sum()), 1) if reduction == "mean" else 1)


def run(function, student, teacher, upstream=None, **options):
    x = student.detach().clone().requires_grad_()
    loss = function(x, teacher, **options)
    (loss.sum() if upstream is None else (loss * upstream.to(loss.dtype)).sum()).backward()
    return loss.detach(), x.grad


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
    backend = "inductor" if reduction == "mean" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    counted = torch.compile(step, backend=counter, fullgraph=True)
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
        counted(x, teacher, mask, targets, beta, t)
    assert 1 <= counter.graphs <= 3
    before = counter.graphs
    for i in range(6):  # as 0-d tensors they never recompile
        counted(x, teacher, mask, targets, torch.tensor(i / 5), torch.tensor(0.5 + 0.13 * i))
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


# ---- wrong arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True])
def test_wrong_teachers_and_targets(eager):
    student, teacher = make(6, 20)
    values, indices = top_k(teacher, 4)
    out = torch.full((6, 20), 5.0)

    def raises(match, **options):
        given = {"teacher": values, "teacher_indices": indices, **options}
        t = given.pop("teacher")
        with pytest.raises(ValueError, match=match), ff.backend("eager" if eager else "auto"):
            ff.distill_loss(student, t, **given)

    for bad in (-1, 20, 2**31 - 1):
        broken = indices.clone()
        broken[3, 2] = bad
        message = r"teacher_indices: row 3 has an index that is not in \[0, 20\)"
        raises(message, teacher_indices=broken)
        raises(message, teacher_indices=broken.int())
        mask = torch.ones(6, dtype=torch.bool)
        mask[3] = False  # a row that does not count is not looked at
        assert torch.isfinite(ff.distill_loss(student, values, teacher_indices=broken, mask=mask))
        with pytest.raises(ValueError, match=message):
            RAW.distill_forward_backward(
                student, values, out, broken, None, None, 0.5, 1.0, 1.0, 0, False, 20, IGNORE, 2
            )
    assert (out == 5).all()
    raises(
        "not in \\[0, 12\\)",
        vocab_size=12,
        teacher_indices=indices * 0 + torch.tensor([0, 1, 2, 12]),
    )
    broken = indices.clone()
    broken[2, 3] = broken[2, 0]
    raises("teacher_indices: row 2 has an index twice", teacher_indices=broken)
    broken = values.clone()
    broken[5] = torch.tensor([3.0, 2.0, 1.0, 0.0])  # logits
    raises("teacher_logits: the probabilities of row 5 add up to more than 1", teacher=broken)
    wrong = torch.zeros(6, dtype=torch.long)
    wrong[4] = 20
    for alpha in (1.0, 0.5):
        raises(r"targets: element 4 is 20; allowed are 0 to 19", targets=wrong, alpha=alpha)
    raises("targets: element 4 is 20", teacher=teacher, teacher_indices=None, targets=wrong)


def test_wrong_arguments():
    x, t = make(3, 5)
    index = torch.tensor([[0, 1], [2, 3], [4, 0]])
    few = torch.full((3, 2), -2.0)
    for error, match, call in (
        (TypeError, "student_logits: a tensor", lambda: ff.distill_loss([[1.0]], t)),
        (TypeError, "teacher_logits: a tensor", lambda: ff.distill_loss(x, None)),
        (TypeError, "student_logits: dtype torch.int64", lambda: ff.distill_loss(x.long(), t)),
        (TypeError, "teacher_logits: dtype torch.int64", lambda: ff.distill_loss(x, t.long())),
        (ValueError, r"teacher_logits: shape \(2, 5\)", lambda: ff.distill_loss(x, t[:2])),
        (ValueError, r"teacher_logits: 4 columns, student_logits 5; give vocab_size",
         lambda: ff.distill_loss(x, t[:, :4])),
        (ValueError, "vocab_size: 6; allowed: 1 to 5", lambda: ff.distill_loss(x, t, vocab_size=6)),
        (ValueError, "vocab_size: 0; allowed: 1 to 5", lambda: ff.distill_loss(x, t, vocab_size=0)),
        (TypeError, "vocab_size: an int", lambda: ff.distill_loss(x, t, vocab_size=5.0)),
        (ValueError, "student_logits: shape", lambda: ff.distill_loss(x[:, :0], t[:, :0])),
        (ValueError, "student_logits: shape", lambda: ff.distill_loss(x[0, 0], t[0, 0])),
        (ValueError, "kind: 'kl'; allowed: 'forward_kl'", lambda: ff.distill_loss(x, t, kind="kl")),
        (ValueError, "reduction: 'batchmean'", lambda: ff.distill_loss(x, t, reduction="batchmean")),
        (TypeError, "mask: a tensor", lambda: ff.distill_loss(x, t, mask=[True])),
        (ValueError, r"mask: shape \(2,\); allowed: \(3,\)",
         lambda: ff.distill_loss(x, t, mask=torch.ones(2))),
        (ValueError, r"targets: shape \(3, 1\)",
         lambda: ff.distill_loss(x, t, targets=index[:, :1])),
        (TypeError, "targets: dtype torch.float32", lambda: ff.distill_loss(x, t, targets=x[:, 0])),
        (TypeError, "teacher_indices: dtype",
         lambda: ff.distill_loss(x, few, teacher_indices=index.float())),
        (ValueError, r"teacher_indices: shape \(3, 2\); teacher_logits have \(3, 5\)",
         lambda: ff.distill_loss(x, t, teacher_indices=index)),
        (ValueError, "teacher_indices: shape .*at most 1",
         lambda: ff.distill_loss(x, few, teacher_indices=index, vocab_size=1)),
        (TypeError, "ignore_index: an int", lambda: ff.distill_loss(x, t, ignore_index=None)),
        (ValueError, "alpha: 0.5; below 1 it needs targets", lambda: ff.distill_loss(x, t, alpha=0.5)),
        (ValueError, "teacher_logits: on meta", lambda: ff.distill_loss(x, t.to("meta"))),
        (ValueError, "mask: on meta",
         lambda: ff.distill_loss(x, t, mask=torch.ones(3, device="meta") > 0)),
    ):  # fmt: skip
        for name in ("auto", "eager"):
            with pytest.raises(error, match=match), ff.backend(name):
                call()
    for name, values, allowed in (
        ("beta", (-0.1, 1.1, float("nan")), "0 to 1"),
        ("alpha", (-0.1, 1.1, float("nan")), "0 to 1"),
        ("temperature", (0.0, -1.0, float("inf"), float("nan"), 1e38), "positive and finite"),
    ):
        for value in values:
            for passed in (value, torch.tensor(value, dtype=torch.float64)):
                with pytest.raises(ValueError, match=f"{name}: .*{allowed}"):
                    ff.distill_loss(x, t, **{name: passed})
        with pytest.raises(TypeError, match=f"{name}: a number"):
            ff.distill_loss(x, t, **{name: "1"})


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
