"""finefuse.numpy's distill_loss: the reference, torch's bits, layouts, arguments. Needs no torch."""

from __future__ import annotations

import finefuse.numpy as ffn
import numpy as np
import pytest
from finefuse._args.distill import DISTILL_KINDS
from finefuse.reference import distill as reference
from numpy_cases import (
    DTYPES,
    IGNORE,
    TYPES,
    assert_same,
    softmax_parts,
    swapped,
)
from tolerances import check

KINDS = list(DISTILL_KINDS)
# 1: one class, loss 0; 31: below one vector at most levels; 2077: an odd tail after a block of 2048.
VOCABS = [1, 31, 2077]


def make(rows, vocab, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    student = 3 * rng.standard_normal((rows, vocab))
    teacher = student + rng.standard_normal((rows, vocab))
    return student.astype(TYPES[dtype]), teacher.astype(TYPES[dtype])


def top_k(teacher, k, temperature=1.0):
    """(log-probabilities, indices) of the k most likely columns."""
    logp, _ = softmax_parts(teacher.astype(np.float64), temperature)
    indices = np.argsort(-logp, -1)[:, :k]
    return np.take_along_axis(logp, indices, -1), indices


def plain(student, teacher, kind, beta=0.5, temperature=1.0):
    """(loss, gradient) of the mean, of whole distributions, in the student's type (at least float32)."""
    (log_p, _), (log_q, _) = (softmax_parts(z, temperature) for z in (student, teacher))
    p, q = np.exp(log_p), np.exp(log_q)
    if kind == "forward_kl":
        rows, dz = (q * (log_q - log_p)).sum(-1), p - q
    elif kind == "reverse_kl":
        rows = (p * (log_p - log_q)).sum(-1)
        dz = p * (log_p - log_q - rows[:, None])
    else:
        log_m = np.logaddexp(
            log_q + log_q.dtype.type(np.log(beta)), log_p + log_p.dtype.type(np.log1p(-beta))
        )
        of_p = (p * (log_p - log_m)).sum(-1)
        rows = beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * of_p
        dz = (1 - beta) * p * (log_p - log_m - of_p[:, None])
    return rows.mean(), (dz / temperature / len(student)).astype(student.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(isa, kind, vocab, dtype):
    student, teacher = make(5, vocab, dtype)
    for temperature in (1.0, 1.7):
        options = {"kind": kind, "temperature": temperature}
        loss, dz = ffn.distill_loss(student, teacher, return_grad=True, **options)
        eager, eager_dz = plain(student, teacher, **options)
        want, want_dz = reference.distill_loss(student, teacher, **options)
        check("loss", loss, eager, want, loss.dtype)
        check("gradient", dz, eager_dz, want_dz, dtype)
        assert_same(loss, ffn.distill_loss(student, teacher, **options))
        assert loss.dtype == (np.float64 if dtype == "float64" else np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_options(isa, kind):
    """All of them in float64: masks, targets, alpha, T², columns, a top-K teacher, reductions."""
    student, teacher = make(6, 300, "float64")
    values, indices = top_k(teacher, 7, 1.4)
    mask, targets = np.array([1, 1, 0, 1, 1, 1]), np.array([0, 299, 1, IGNORE, 5, 6])
    for more in (
        {"teacher": teacher},
        {"teacher": teacher, "mask": mask, "vocab_size": 280, "beta": 0.1},
        {"teacher": teacher[:, :290], "vocab_size": 290},
        {"teacher": values, "teacher_indices": indices},
        {"teacher": values, "teacher_indices": indices.astype(np.int32), "mask": mask > 0},
        {"teacher": teacher, "targets": targets, "alpha": 0.3, "temperature_squared": True},
        {
            "teacher": values,
            "teacher_indices": indices,
            "targets": targets,
            "alpha": 0.3,
            "mask": mask,
        },
    ):
        options = {"kind": kind, "temperature": 1.4, **more}
        t = options.pop("teacher")
        for reduction in ("mean", "sum", "none"):
            ours, dz = ffn.distill_loss(
                student, t, reduction=reduction, return_grad=True, **options
            )
            want, want_dz = reference.distill_loss(student, t, reduction=reduction, **options)
            check("loss", ours, want, want)
            check("gradient", dz, want_dz, want_dz)


def test_same_bits_as_torch():
    torch = pytest.importorskip("torch", reason="the torch door needs torch")
    import finefuse as ff

    student, teacher = make(5, 700)
    values, indices = top_k(teacher, 9)
    targets = np.array([0, 1, IGNORE, 3, 699])
    for kind in KINDS:
        for t, more in ((teacher, {}), (values.astype(np.float32), {"teacher_indices": indices})):
            ours = ffn.distill_loss(
                student, t, kind=kind, alpha=0.4, targets=targets, return_grad=True, **more
            )
            x = torch.tensor(student, requires_grad=True)
            tensors = {k: torch.from_numpy(v) for k, v in more.items()}
            loss = ff.distill_loss(
                x,
                torch.from_numpy(t),
                kind=kind,
                alpha=0.4,
                targets=torch.from_numpy(targets),
                **tensors,
            )
            loss.backward()
            assert_same(ours, (loss.detach().numpy()[()], x.grad.numpy()))


def test_layouts_and_where_the_gradient_goes():
    student, teacher = make(12, 90)
    want = ffn.distill_loss(student, teacher, kind="jsd", return_grad=True)
    wide = np.zeros((12, 100), np.float32)
    wide[:, 5:95] = student
    for x in (swapped(student), np.asfortranarray(student), wide[:, 5:95]):
        assert_same(ffn.distill_loss(x, swapped(teacher), kind="jsd", return_grad=True), want)
    out = np.empty_like(student)
    loss, dz = ffn.distill_loss(student, teacher, kind="jsd", return_grad=True, grad_out=out)
    assert dz is out
    assert_same((loss, dz), want)
    x = student.copy()
    loss, dz = ffn.distill_loss(x, teacher, kind="jsd", return_grad=True, grad_out=x)
    assert dz is x
    assert_same((loss, dz), want)
    for here, there in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        memory = student.copy()  # of which the gradient overwrites the teacher
        want_of = ffn.distill_loss(student[here], teacher[here], return_grad=True)
        memory[there] = teacher[here]
        got = ffn.distill_loss(
            student[here].copy(), memory[there], return_grad=True, grad_out=memory[here]
        )
        assert_same(got, want_of)
    cube = ffn.distill_loss(
        student.reshape(3, 4, 90), teacher.reshape(3, 4, 90), kind="jsd", return_grad=True
    )
    assert_same((cube[0], cube[1].reshape(12, 90)), want)
    for shape in ((0, 7), (2, 0, 7)):
        loss, dz = ffn.distill_loss(np.zeros(shape), np.zeros(shape), return_grad=True)
        assert loss == 0.0
        assert dz.shape == shape


def test_threads():
    student, teacher = make(40, 3001)
    results = []
    for threads in (1, 2, 5):
        ffn.set_num_threads(threads)
        results.append(ffn.distill_loss(student, teacher, kind="jsd", return_grad=True))
    for other in results[1:]:
        assert_same(results[0], other)


def test_wrong_arguments():
    x, t = make(3, 5)
    index, few = np.array([[0, 1], [2, 3], [4, 0]]), np.full((3, 2), -2.0, np.float32)
    for error, match, call in (
        (TypeError, "student_logits: a numpy.ndarray", lambda: ffn.distill_loss([[1.0]], t)),
        (TypeError, "teacher_logits: dtype int64", lambda: ffn.distill_loss(x, index)),
        (ValueError, "give vocab_size", lambda: ffn.distill_loss(x, t[:, :4])),
        (ValueError, "vocab_size: 6", lambda: ffn.distill_loss(x, t, vocab_size=6)),
        (ValueError, "kind: 'kl'", lambda: ffn.distill_loss(x, t, kind="kl")),
        (ValueError, "mask: shape", lambda: ffn.distill_loss(x, t, mask=np.ones(2))),
        (ValueError, "targets: shape", lambda: ffn.distill_loss(x, t, targets=np.zeros(2, int))),
        (ValueError, "targets: element 1 is 5", lambda: ffn.distill_loss(x, t, targets=np.array([0, 5, 1]))),
        (ValueError, "alpha: 0.5; below 1 it needs targets", lambda: ffn.distill_loss(x, t, alpha=0.5)),
        (ValueError, "beta: 2.0", lambda: ffn.distill_loss(x, t, kind="jsd", beta=2.0)),
        (ValueError, "temperature", lambda: ffn.distill_loss(x, t, temperature=0.0)),
        (TypeError, "temperature: a number", lambda: ffn.distill_loss(x, t, temperature="1")),
        (ValueError, "grad_out: of use only", lambda: ffn.distill_loss(x, t, grad_out=x)),
        (ValueError, "row 2 has an index that is not in",
         lambda: ffn.distill_loss(x, few, teacher_indices=index, vocab_size=4)),
        (ValueError, "row 0 has an index twice",
         lambda: ffn.distill_loss(x, few, teacher_indices=index * 0)),
        (ValueError, "row 0 add up to more than 1",
         lambda: ffn.distill_loss(x, few + 3, teacher_indices=index)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
