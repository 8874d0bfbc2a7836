"""Distillation on every backend beside the CPU's.

On a reduced grid: what is common to all backends, the arguments and the autograd, is in test_distill*.py.
Few rows: one takes Triton's interpreter some hundredths of a second.
"""

from __future__ import annotations

import itertools
import math
import mmap

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import GPU
from distill_cases import DTYPES, IGNORE, KINDS, make, plain, top_k, truth
from on_gpu import capture, needs_gpu
from tolerances import check

# NumPy's, from Triton's interpreter, at what a GPU does silently: -inf - -inf, overflow to inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = math.inf
# With a cross-entropy at the divergence's temperature and not, with rows that do not count; jsd with a beta.
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 1.7, "beta": 0.3, "temperature_squared": True},
    "mix": {"alpha": 0.3, "targets": True},
    "mix at another temperature": {
        "alpha": 0.6, "targets": True, "temperature": 0.6, "mask": True, "beta": 0.9,
    },
}  # fmt: skip


def arguments(rows, vocab, options):
    given = dict(options)
    if "targets" in given:
        given["targets"] = torch.tensor([vocab - 1, 0, IGNORE, vocab // 2][:rows])
    if "mask" in given:
        given["mask"] = torch.tensor([True, True, True, False][:rows])
    return given


def put(place, options):
    return {k: place.put(x)[0] if isinstance(x, torch.Tensor) else x for k, x in options.items()}


def run(place, student, teacher, upstream=None, **options):
    """(loss, gradient) on the place, back on the CPU."""
    x, t, up = place.put(student.clone(), teacher, upstream)
    x.requires_grad_()
    loss = ff.distill_loss(x, t, **put(place, options))
    (loss.sum() if up is None else (loss * up).sum()).backward()
    return loss.detach().cpu(), x.grad.cpu()


def usual(student, teacher, upstream=None, **options):
    x = student.clone().requires_grad_()
    loss = plain(x, teacher, **options)
    (loss.sum() if upstream is None else (loss * upstream).sum()).backward()
    return loss.detach(), x.grad


def compare(place, name, student, teacher, inplace=False, **options):
    loss, dz = run(place, student, teacher, inplace=inplace, **options)
    e_loss, e_dz = usual(student, teacher, **options)
    t_loss, t_dz = truth(student, teacher, **options)
    check(f"{name}: loss", loss, e_loss, t_loss)
    check(f"{name}: gradient", dz, e_dz, t_dz)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(place, kind, dtype):
    for i, (name, options) in enumerate(OPTIONS.items()):
        student, teacher = make(4, 257, dtype, seed=i)  # an odd tail
        reduction = ("mean", "sum", "none", "mean")[i]
        compare(
            place, name, student, teacher, kind=kind, reduction=reduction, inplace=i % 2 == 1,
            **arguments(4, 257, options),
        )  # fmt: skip


# 1: no vocabulary to speak of. 513, 1031, 2049, 9001: on the CPU for clusters, of two blocks or more, and
# longer than they keep; of several blocks of threads and of Triton's loop. On a GPU the long ones are those.
@pytest.mark.parametrize(
    "vocab", [1, 513, 1031, 2049, 9001, *([151936, 262144, 1000003] if GPU else [])]
)
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows(place, kind, vocab):
    if place.backend == "eager":
        pytest.skip("plain torch has plain torch's errors")
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = make(2, vocab, dtype)
        options = {"alpha": 0.5, "targets": torch.tensor([vocab - 1, vocab // 2]), "kind": kind}
        compare(place, f"{dtype}", student, teacher, temperature=1.3, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_of_another_type_and_width(place, kind):
    """The rows of both begin anywhere in a vector; columns past vocab_size are never read."""
    pairs = [
        (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16),
        (torch.float64, torch.float32), (torch.float32, torch.float64),
    ]  # fmt: skip
    for dtype, other in pairs:
        student, teacher = make(3, 261, dtype, teacher_dtype=other)
        student[:, 257:] = math.nan
        teacher = torch.cat([teacher[:, :257], torch.full((3, 9), math.nan, dtype=other)], -1)
        options = {"kind": kind, "vocab_size": 257}
        loss, dz = run(place, student, teacher, **options)
        e_loss, e_dz = usual(student, teacher, **options)
        t_loss, t_dz = truth(student.nan_to_num(0.0), teacher.nan_to_num(0.0), **options)
        check(f"{dtype} {other}: loss", loss, e_loss, t_loss)
        check(f"{dtype} {other}: gradient", dz, e_dz, t_dz)
        assert (dz[:, 257:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_top_k(place, kind):
    for i, (dtype, other, k) in enumerate(
        [
            (torch.float32, torch.float32, 1), (torch.bfloat16, torch.float32, 20),
            (torch.float16, torch.bfloat16, 7), (torch.float64, torch.float64, 257),
            (torch.float32, torch.float32, 257),
        ]
    ):  # fmt: skip
        student, teacher = make(4, 257, dtype, teacher_dtype=other, seed=i)
        options = arguments(4, 257, list(OPTIONS.values())[i % 4])
        logq, indices = top_k(teacher, k, options.get("temperature", 1.0))
        if i % 2:
            indices = indices.int()
        compare(
            place, f"{k} of {dtype}", student, logq, kind=kind, teacher_indices=indices,
            inplace=i % 2 == 0, **options,
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinity(place, kind):
    """In the student alone, the teacher alone, and both; with a loss of +inf and without."""
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = make(6, 300, dtype)
        student[0, ::3] = -INF
        teacher[1, ::3] = -INF
        student[2:4, ::3] = teacher[2:4, ::3] = -INF
        student[4] = -INF
        teacher[5] = -INF
        options = {"kind": kind, "beta": 0.3, "reduction": "none"}
        loss, dz = run(place, student, teacher, **options)
        t_loss, t_dz = truth(student, teacher, **options)
        near = (x.nan_to_num(neginf=-1e4) for x in (student, teacher))
        e_loss, e_dz = usual(*near, **options)
        check(f"{dtype}: loss", loss, e_loss, t_loss)
        if place.backend == "eager" and kind == "reverse_kl":  # -inf and NaN, as autograd has it
            assert not torch.isfinite(dz[1]).any()
            dz[1] = math.nan
        check(f"{dtype}: gradient", dz, e_dz, t_dz)


def test_nan(place):
    """A row's own, and no other row's."""
    student, teacher = make(3, 300)
    for kind, (bad, side) in itertools.product(KINDS, ((math.nan, student), (INF, teacher))):
        kept = side[1, 7].clone()
        side[1, 7] = bad
        loss, dz = run(place, student, teacher, kind=kind)
        assert torch.isnan(loss)
        assert torch.isnan(dz[1]).all()
        assert torch.isfinite(dz[::2]).all()
        side[1, 7] = kept


def test_rows_that_do_not_count(place):
    """Never read: NaN there, indices out of range, and an upstream gradient of inf."""
    student, teacher = make(4, 70)
    mask = torch.tensor([True, False, True, True])
    targets = torch.tensor([3, 60, IGNORE, 5])
    student[1:3] = teacher[1:3] = math.nan
    upstream = torch.tensor([1.0, INF, INF, -2.0])
    options = {"mask": mask, "targets": targets, "alpha": 0.5, "reduction": "none"}
    for kind in KINDS:
        loss, dz = run(place, student, teacher, upstream, kind=kind, **options)
        t_loss, t_dz = truth(student, teacher, kind=kind, **options)
        t_dz *= upstream.nan_to_num(posinf=0.0).double().numpy()[:, None]
        check("loss", loss, t_loss, t_loss)
        check("gradient", dz, t_dz, t_dz)
    logq, indices = top_k(teacher.nan_to_num(0.0), 5)
    indices[1:3] = -7
    loss, dz = run(place, student, logq, upstream, teacher_indices=indices, **options)
    assert (loss[1:3] == 0).all()
    assert (dz[1:3] == 0).all()
    assert torch.isfinite(dz).all()


def test_nothing_counts(place):
    student, teacher = (x.fill_(math.nan) for x in make(3, 9))
    for kwargs in (
        {"mask": torch.zeros(3, dtype=torch.bool)},
        {"targets": torch.full((3,), IGNORE)},
    ):
        for reduction in ("mean", "sum"):
            loss, dz = run(place, student, teacher, reduction=reduction, **kwargs)
            assert loss == 0
            assert (dz == 0).all()
    for shape in ((0, 9), (2, 0, 9)):
        x = torch.zeros(shape, device=place.device, requires_grad=True)
        loss = ff.distill_loss(x, x.detach())
        loss.backward()
        assert loss == 0


def test_without_a_share_the_teacher_is_not_read(place):
    student, teacher = make(2, 40)
    options = {"alpha": 0.0, "targets": torch.tensor([3, 39]), "temperature": 2.0}
    compare(
        place, "cross-entropy", student, torch.zeros_like(teacher), kind="reverse_kl", **options
    )
    loss, dz = run(place, student, teacher.fill_(math.nan), kind="jsd", **options)
    if place.backend != "eager":
        assert torch.isfinite(loss)
        assert torch.isfinite(dz).all()


# ---- what is wrong with the input ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 50, 2**31, -(2**40)])
def test_bad_targets_are_flagged(place, bad):
    """Never followed: the row's loss is NaN, the other rows are right, and check() says so."""
    student, teacher = make(3, 50)
    targets = torch.tensor([1, 2, 3])
    options = {"alpha": 0.5, "reduction": "none"}
    want, want_dz = run(place, student, teacher, targets=targets, **options)
    targets[1] = bad
    if place.backend == "eager" and place.device == "cpu":
        with pytest.raises(ValueError, match=f"element 1 is {bad}"):
            run(place, student, teacher, targets=targets, **options)
        return
    loss, dz = run(place, student, teacher, targets=targets, **options)
    assert torch.isnan(loss[1])
    assert torch.equal(loss[::2], want[::2])
    assert torch.equal(dz[::2], want_dz[::2])
    assert (torch.isnan(dz[1]) | (dz[1] == 0)).all()
    if place.backend != "eager":
        with pytest.raises(ValueError, match="an element was neither in"):
            ff.check()
        ff.check()  # it is reported once


@pytest.mark.parametrize("fault", ["low", "high", "far", "twice", "mass"])
def test_bad_teachers_are_flagged(place, fault):
    student, teacher = make(3, 50)
    logq, indices = top_k(teacher, 4)
    want, want_dz = run(place, student, logq, teacher_indices=indices, reduction="none")
    if fault == "mass":
        logq[1] = teacher[1, :4].abs()
    else:
        indices[1, 2] = {"low": -1, "high": 50, "far": 2**40, "twice": int(indices[1, 0])}[fault]
    given = student, logq
    options = {"teacher_indices": indices, "reduction": "none"}
    if place.backend == "eager" and place.device == "cpu":
        with pytest.raises(ValueError, match="row 1"):
            run(place, *given, **options)
        return
    results = [run(place, *given, **options)]
    if place.backend != "eager":
        with pytest.raises(ValueError, match="teacher"):
            ff.check()
        results.append(run(place, *given, reduction="mean", teacher_indices=indices))
        with pytest.raises(ValueError, match="teacher"):
            ff.check()
        assert torch.isnan(results[1][0])
    loss, dz = results[0]
    if (place.backend, fault) != ("triton", "twice"):  # found where the gradient is written
        assert torch.isnan(loss[1])
    assert torch.equal(loss[::2], want[::2])
    assert torch.equal(dz[::2], want_dz[::2])
    assert (torch.isnan(dz[1]) | (dz[1] == 0)).all()


# ---- layout ----------------------------------------------------------------------------------------


def test_strides(place):
    """Slices without a copy, rows that are not aligned, a leading shape, int32 targets."""
    base, other = (x.reshape(2, 3, 258) for x in make(6, 258))
    targets = torch.randint(0, 257, (2, 2))
    moved, teacher, y = place.put(base, other, targets)
    results = []
    for z, t, index in (
        (moved[:, :-1, 1:].contiguous(), teacher[:, :-1, 1:].contiguous(), y),
        (moved[:, :-1, 1:], teacher[:, :-1, 1:], y),
        (moved[:, :-1, 1:].contiguous(), teacher[:, :-1, 1:], y.int()),
    ):
        x = z.detach().requires_grad_()
        loss = ff.distill_loss(x, t, kind="jsd", alpha=0.5, targets=index)
        loss.backward()
        results.append((loss.item(), x.grad.cpu()))
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(grad, results[0][1])


def test_same_bits_every_time(place):
    student, teacher = make(3, 5000, torch.bfloat16)
    logq, indices = top_k(teacher, 30, dtype=torch.float32)
    for t, options in ((teacher, {"kind": "jsd"}), (logq, {"teacher_indices": indices})):
        first, second = (run(place, student, t, **options) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_rows_far_apart(place):
    """64-bit offsets: two rows with 2^31 elements between them, in memory that is never touched."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    vocab, stride = 304, 2**31 + 16  # rows that are aligned alike: the same bits
    count = stride + vocab
    if GPU:
        memory = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.bfloat16)
    rows = memory.as_strided((2, vocab), (stride, 1))
    student, teacher = make(2, vocab, torch.bfloat16)
    logq, indices = top_k(teacher, 9, dtype=torch.float32)
    for t, options in ((teacher, {"kind": "jsd"}), (logq, {"teacher_indices": indices})):
        rows.copy_(student)
        z = rows.detach().requires_grad_()
        loss = ff.distill_loss(z, place.put(t)[0], inplace=True, **put(place, options))
        loss.backward()
        want, grad = run(place, student, t, **options)
        assert loss.item() == want.item()
        assert torch.equal(z.grad.cpu(), grad)
        rows.copy_(student)  # as the teacher
        if "teacher_indices" not in options:
            swapped = run(place, teacher, student, **options)
            z = place.put(teacher.clone())[0].requires_grad_()
            loss = ff.distill_loss(z, rows, **options)
            loss.backward()
            assert loss.item() == swapped[0].item()
            assert torch.equal(z.grad.cpu(), swapped[1])


@needs_gpu
def test_more_than_2_to_31_elements(place):
    """4.3 G elements, the last rows of which count; the teacher's are one row over and over."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    rows, vocab = 33_600, 128_256
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    tail, teacher = make(2, vocab, torch.bfloat16)
    logits[-2:] = tail.cuda()
    mask = torch.zeros(rows, dtype=torch.bool, device="cuda")
    mask[-2:] = True
    x = logits.requires_grad_()
    t = teacher[:1].cuda().expand(rows, vocab)
    loss = ff.distill_loss(x, t, kind="jsd", mask=mask, inplace=True)
    loss.backward()
    want, grad = run(place, tail, teacher[:1].expand(2, vocab), kind="jsd")
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(x.grad[-2:].cpu(), grad)
    assert (x.grad[:-2] == 0).all()


@needs_gpu
def test_cuda_graph(place):
    """No allocation of ours, no synchronisation: forward and backward are captured and replayed."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    student, teacher = (x.cuda() for x in make(8, 3001, torch.bfloat16))
    other = make(8, 3001, torch.bfloat16, seed=5)[0].cuda()
    logq, indices = (x.cuda() for x in top_k(teacher.cpu(), 30, dtype=torch.float32))
    targets = torch.arange(8, device="cuda")
    x = student.clone().requires_grad_()

    def step(x):
        x.grad = None
        loss = ff.distill_loss(x, logq, teacher_indices=indices)
        for kind in KINDS:
            loss = loss + ff.distill_loss(
                x, teacher, kind=kind, alpha=0.5, targets=targets, temperature=2.0
            )
        loss.backward()
        return loss.detach(), x.grad

    graph, captured = capture(lambda: step(x))
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(other.clone().requires_grad_()), strict=True):
        assert torch.equal(a, b)
