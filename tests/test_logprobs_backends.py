"""The same operations on every backend beside the CPU's: CUDA, Triton, plain torch.

Without a GPU the CUDA kernels run thread by thread on the CPU and Triton's in its interpreter, which
truncates when it stores bfloat16: its unit in the last place is in the error rule already.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import GPU, unavailable
from finefuse.reference import logprobs as reference
from guards import tensor_between_guards
from logprobs_cases import (
    DTYPES,
    IGNORE,
    eager_stats,
    gradients,
    make,
    truth_gradient,
    truth_stats,
)
from on_gpu import capture, needs_gpu
from tolerances import check

# NumPy's, from Triton's interpreter, at what a GPU does silently: -inf - -inf, overflow to inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# 1 and 2: less than a vector. 257: an odd tail. 3001: several blocks of threads, in shared memory.
# 33001: longer than what is kept there, several blocks of Triton's loop.
SHAPES = [(3, 1), (2, 2), (5, 257), (3, 3001), (2, 33001)]
if GPU:
    SHAPES += [(64, 32000), (1000, 50257), (7, 151936), (3, 300001)]


def run(place, function, logits, targets, upstream, **options):
    """`gradients` on the place, results back on the CPU."""
    logits, targets, *upstream = place.put(logits, targets, *upstream)
    outputs, dz = gradients(function, logits, targets, upstream, **options)
    return [o.cpu() for o in outputs], dz.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats_and_gradients(place, shape, dtype):
    logits, targets = make(*shape, dtype)
    upstream = [torch.randn(shape[0]) for _ in range(3)]
    t = 0.7
    ours, dz = run(place, ff.token_logprobs, logits, targets, upstream, stats=True, temperature=t)
    eager, eager_dz = gradients(eager_stats, logits, targets, upstream, temperature=t)
    truth = truth_stats(logits, targets, t)
    for name, a, e, want in zip(("lp", "entropy", "lse"), ours, eager, truth, strict=True):
        check(name, a, e, want)
    check("gradient", dz, eager_dz, truth_gradient(logits, targets, upstream, t))
    for i in range(3):  # no term hides behind another
        only = [u if i == j else None for j, u in enumerate(upstream)]
        _, dz = run(place, ff.token_logprobs, logits, targets, only, stats=True, temperature=t)
        _, eager_dz = gradients(eager_stats, logits, targets, only, temperature=t)
        zero = [torch.zeros(shape[0]) if u is None else u for u in only]
        check(f"gradient of output {i}", dz, eager_dz, truth_gradient(logits, targets, zero, t))
    lp = ff.token_logprobs(*place.put(logits, targets), temperature=t)
    assert torch.equal(lp.cpu(), ours[0]) or torch.isnan(ours[0]).any()


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, -1e4, 3e4])
def test_extreme_logits(place, spread, shift):
    logits, targets = make(4, 1200, spread=spread)
    logits = logits + shift
    upstream = [torch.ones(4), None, None]
    ours, dz = run(place, ff.token_logprobs, logits, targets, upstream, stats=True)
    eager, eager_dz = gradients(eager_stats, logits, targets, upstream)
    truth = truth_stats(logits, targets)
    for name, a, e, t in zip(("lp", "entropy", "lse"), ours, eager, truth, strict=True):
        check(name, a, e, t)
    zero = torch.zeros(4)
    check("gradient", dz, eager_dz, truth_gradient(logits, targets, [torch.ones(4), zero, zero]))


def test_certainty_keeps_its_digits(place):
    """logp of 1e-12 and its entropy, not 0: the row's own 1 stays out of the sum."""
    if place.backend == "eager":
        pytest.skip("plain torch has 0 there; only the kernels promise more")
    logits, targets = torch.zeros(4, 3000), torch.tensor([0, 700, 2999, 5])
    logits[torch.arange(4), targets] = torch.tensor([35.0, 40.0, 45.0, 30.0])
    ours, dz = run(
        place, ff.token_logprobs, logits, targets, [torch.ones(4), None, None], stats=True
    )
    truth = truth_stats(logits, targets)
    for name, a, t in zip(("lp", "entropy"), ours, truth, strict=False):
        # relative: 65 = 45·log2(e), the exponent, is rounded to float32 before 2^x
        np.testing.assert_allclose(a.double().numpy(), t, rtol=65 * 2.0**-23, err_msg=name)
    zero = torch.zeros(4)
    want = truth_gradient(logits, targets, [torch.ones(4), zero, zero])
    want[np.arange(4), targets.numpy()] = -np.expm1(truth[0])  # 1 - p itself loses them
    np.testing.assert_allclose(
        dz.double().numpy(), want, rtol=2 * 65 * 2.0**-23, err_msg="gradient"
    )


def test_ties_at_the_maximum(place):
    """Counted exactly wherever they are: in one thread's elements, in several, in later blocks."""
    for places in ([0, 1], [0, 2048, 4096], [5, 4097, 5002], list(range(5003))):
        logits = torch.full((1, 5003), -float("inf"))
        logits[0, places] = 3.0
        x, y = place.put(logits, torch.tensor([places[-1]]))
        for lp in (ff.token_logprobs(x, y), ff.token_logprobs(x, y, stats=True)[0]):
            assert lp.item() == pytest.approx(-np.log(len(places)), rel=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masked_by_the_lowest_number(place, dtype):
    """As attention masks are made: no probability, no NaN in entropy or gradient."""
    logits, targets = make(3, 3000, dtype, ignore=False)
    logits[:, :2000] = torch.finfo(dtype).min
    logits[1] = torch.finfo(dtype).min
    logits[1, 2999] = -torch.finfo(dtype).min
    targets[:] = torch.tensor([2500, 2999, 2600])
    upstream = [torch.ones(3)] * 3
    ours, dz = run(place, ff.token_logprobs, logits, targets, upstream, stats=True)
    truth = truth_stats(logits, targets)
    eager, eager_dz = gradients(eager_stats, logits, targets, upstream)
    for name, a, e, t in zip(("lp", "entropy", "lse"), ours, eager, truth, strict=True):
        check(name, a[[0, 2]], e[[0, 2]], t[[0, 2]])
    assert ours[0][1] == ours[1][1] == 0
    check("gradient", dz, eager_dz, truth_gradient(logits, targets, upstream))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_in_a_row_that_counts(place, bad):
    """They show in that row, in every element of its gradient; without upstream they do not."""
    for column in (0, 50, 2500):
        logits, targets = make(3, 2600, ignore=False)
        logits[1:, column] = bad
        upstream = torch.tensor([1.0, 1.0, 0.0])
        (lp, entropy, _), dz = run(
            place, ff.token_logprobs, logits, targets, [upstream] * 3, stats=True
        )
        assert torch.isnan(lp[1:]).all()
        assert torch.isnan(entropy[1:]).all()
        assert torch.isfinite(dz[0]).all()
        assert torch.isnan(dz[1]).all()
        assert (dz[2] == 0).all() or place.backend == "eager"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_and_nan(place, dtype):
    inf, nan = float("inf"), float("nan")
    logits, targets = make(7, 1501, dtype, ignore=False)
    logits[:3, ::3] = -inf
    targets[:] = torch.tensor([1, 4, 3, 7, 8, 9, 10])  # row 2: the target is masked
    logits[3] = -inf  # a whole row
    logits[4, 700] = nan
    targets[5] = IGNORE
    logits[5] = nan
    upstream = [torch.randn(7) for _ in range(3)]
    (lp, entropy, lse), dz = run(place, ff.token_logprobs, logits, targets, upstream, stats=True)
    truth = truth_stats(logits, targets)
    rows = [0, 1, 2, 5, 6]
    eager = eager_stats(logits, targets)
    check("lp", lp[rows], eager[0][rows], truth[0][rows])
    check("entropy", entropy[rows], eager[1][rows], truth[1][rows])
    check("lse", lse[rows], eager[2][rows], truth[2][rows])
    assert lp[2] == -inf
    assert torch.isnan(lp[[3, 4]]).all()
    assert lp[5] == entropy[5] == lse[5] == 0
    assert (dz[5] == 0).all()
    assert torch.isnan(dz[4]).all()
    kept = [0, 1, 6]
    want = truth_gradient(logits[kept], targets[kept], [u[kept] for u in upstream])
    check("gradient", dz[kept], want, want)
    for reduction in ("mean", "sum", "none"):
        x, y = place.put(logits[[0, 5, 6]], targets[[0, 5, 6]])
        x.requires_grad_()
        ff.cross_entropy(x, y, reduction=reduction).sum().backward()
        assert torch.isfinite(x.grad).all()
        assert (x.grad[1] == 0).all()


def test_strides(place):
    """Rows that start anywhere: slices without a copy, misaligned storage, int32 targets."""
    base = torch.randn(6, 9, 65) * 3
    targets = torch.randint(0, 64, (6, 9))
    targets[2, 3] = IGNORE
    moved, y = place.put(base, targets)
    views = {
        "shifted": (lambda x: x[:, :-1], lambda t: t[:, 1:]),
        "every other": (lambda x: x[::2, ::3], lambda t: t[::2, ::3]),
        "misaligned": (lambda x: x[..., 1:], lambda t: t),
        "classes strided": (lambda x: x[..., ::1][..., :64:1].transpose(0, 1), lambda t: t.t()),
        "int32": (lambda x: x, lambda t: t.int()),
    }
    for name, (view, of_targets) in views.items():
        logits, t = view(moved), of_targets(y)
        plain, plain_t = logits.contiguous(), t.contiguous().long()
        g = torch.arange(1.0, t.numel() + 1, device=place.device).view(t.shape)
        results = []
        for a, b, inplace in ((logits, t, False), (plain, plain_t, False), (plain, plain_t, True)):
            x = a.detach().clone(memory_format=torch.preserve_format)
            x = (view(base.to(place.device)) if a is logits else x).detach().requires_grad_()
            lp = ff.token_logprobs(x, b, inplace=inplace)
            (lp * g).sum().backward()
            results.append((lp.detach().cpu(), x.grad.cpu()))
        for lp, dz in results[1:]:
            torch.testing.assert_close(lp, results[0][0], rtol=1e-6, atol=1e-6, msg=name)
            torch.testing.assert_close(dz, results[0][1], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(place, shape, dtype, smoothing):
    logits, targets = make(*shape, dtype)
    flat = logits.double().numpy()
    for reduction, inplace in (("mean", False), ("sum", True), ("none", False)):
        ours, y = place.put(logits.clone(), targets)
        ours.requires_grad_()
        a = ff.cross_entropy(
            ours, y, reduction=reduction, label_smoothing=smoothing, inplace=inplace
        )
        eager = logits.clone().requires_grad_()
        e = torch.nn.functional.cross_entropy(
            eager, targets, reduction=reduction, label_smoothing=smoothing
        )
        a.sum().backward()
        e.sum().backward()
        truth, truth_dz = reference.cross_entropy(
            flat, targets.numpy(), smoothing, reduction=reduction
        )
        check(f"loss {reduction}", a.cpu(), e, truth)
        check(f"gradient {reduction}", ours.grad.cpu(), eager.grad, truth_dz)
        with torch.no_grad():
            x = logits.to(place.device)
            plain = ff.cross_entropy(x, y, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(plain, a.detach(), rtol=1e-6, atol=0)


def test_smoothing_far_from_zero(place):
    """lse - mean z of large logits that differ little."""
    logits, targets = make(3, 5000, spread=1.0)
    logits += 3e4
    loss = ff.cross_entropy(*place.put(logits, targets), label_smoothing=0.3, reduction="none")
    eager = torch.nn.functional.cross_entropy(
        logits, targets, label_smoothing=0.3, reduction="none"
    )
    truth, _ = reference.cross_entropy(
        logits.double().numpy(), targets.numpy(), 0.3, reduction="none"
    )
    check("loss", loss.cpu(), eager, truth)
    logits[0, 5] = -float("inf")  # no probability, but a part in the mean
    x, y = place.put(logits, targets)
    assert ff.cross_entropy(x, y, label_smoothing=0.3, reduction="none")[0] == float("inf")


@pytest.mark.parametrize("upstream", [1.0, 0.0, -2.5, float("inf")])
def test_cross_entropy_upstream(place, upstream):
    logits, targets = make(6, 300)
    _, want = reference.cross_entropy(logits.double().numpy(), targets.numpy())
    for reduction in ("mean", "none"):
        x, y = place.put(logits.clone(), targets)
        x.requires_grad_()
        loss = ff.cross_entropy(x, y, reduction=reduction)
        if reduction == "none":
            loss = loss.sum() / (targets != IGNORE).sum().item()
        (loss * upstream).backward()
        if np.isfinite(upstream):
            check(reduction, x.grad.cpu(), want * upstream, want * upstream)
        assert (x.grad[3] == 0).all()  # the ignored row


def test_empty(place):
    logits = torch.zeros(0, 7, device=place.device, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long, device=place.device)
    assert ff.token_logprobs(logits, targets).shape == (0,)
    for reduction in ("mean", "sum", "none"):
        loss = ff.cross_entropy(logits, targets, reduction=reduction).sum()
        loss.backward()
        assert loss.item() == 0.0
    ignored = torch.full((3,), IGNORE, device=place.device)
    x = torch.full((3, 5), float("nan"), device=place.device, requires_grad=True)
    for reduction in ("mean", "sum"):
        x.grad = None
        loss = ff.cross_entropy(x, ignored, reduction=reduction)
        loss.backward()
        assert loss.item() == 0.0
        assert (x.grad == 0).all()
    lp = torch.zeros(4, 0, device=place.device)
    assert ff.sequence_logprobs(lp, average=True).tolist() == [0.0] * 4


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sequence_logprobs(place, average, dtype):
    lp = -torch.rand(3, 5, 301).to(dtype) * 9
    mask = torch.rand(3, 5, 301) > 0.4
    mask[1, 2] = False
    lp[~mask] = float("nan")
    x, m = place.put(lp.clone(), mask)
    x.requires_grad_()
    s = ff.sequence_logprobs(x, mask=m, average=average)
    t = reference.sequence_logprobs(lp.double().numpy(), mask.numpy(), average=average)
    zeroed = torch.where(mask, lp, 0)
    check("masked", s.cpu(), zeroed.sum(-1) / (mask.sum(-1).clamp(min=1) if average else 1), t)
    g = torch.randn(3, 5, dtype=dtype)
    (s * g.to(place.device)).sum().backward()
    want = mask * g[..., None] / (mask.sum(-1, keepdim=True).clamp(min=1) if average else 1)
    assert (x.grad.cpu()[~mask] == 0).all()
    torch.testing.assert_close(x.grad.cpu(), want)
    flat = torch.where(mask, lp, -1.0).reshape(-1)[:900]
    for index in (torch.int32, torch.int64):
        ends = torch.tensor([0, 4, 4, 600, 900], dtype=index)
        x, e = place.put(flat.clone(), ends)
        x.requires_grad_()
        s = ff.sequence_logprobs(x, cu_seqlens=e, average=average)
        t = reference.sequence_logprobs(flat.double().numpy(), None, ends.numpy(), average)
        check("cu_seqlens", s.cpu(), t, t)
        (s * torch.arange(1.0, 5.0, device=place.device)).sum().backward()
        counts = [4, 0, 596, 300]
        want = [
            torch.full((n,), (i + 1) / (max(n, 1) if average else 1)) for i, n in enumerate(counts)
        ]
        torch.testing.assert_close(x.grad.cpu(), torch.cat(want).to(dtype))


def test_out_of_range_is_flagged(place):
    """Never followed: the row becomes NaN, the others are right, and check() says which argument."""
    logits, targets = make(4, 50, ignore=False)
    want = ff.token_logprobs(*place.put(logits, targets)).cpu()
    for bad in (-1, 50, 2**31, -(2**40)):
        targets[2] = bad
        x, y = place.put(logits.clone(), targets)
        if place.backend == "eager" and place.device == "cpu":
            with pytest.raises(ValueError, match=f"targets: element 2 is {bad}"):
                ff.token_logprobs(x, y)
            continue
        x.requires_grad_()
        lp = ff.token_logprobs(x, y)
        assert torch.isnan(lp[2])
        torch.testing.assert_close(lp[[0, 1, 3]].detach().cpu(), want[[0, 1, 3]])
        lp.nansum().backward()
        assert (x.grad[2] == 0).all() or torch.isnan(x.grad[2]).all()
        for reduction in ("mean", "none"):
            x.grad = None
            loss = ff.cross_entropy(x, y, reduction=reduction)
            assert torch.isnan(loss).any()
            loss.sum().backward()
        if place.backend != "eager":
            with pytest.raises(ValueError, match="targets: an element"):
                ff.check()
            ff.check()  # it is reported once


def test_bad_offsets_are_flagged(place):
    for ends in ([0, 5, 3, 9], [1, 2, 3, 9], [0, 2, 3, 8], [0, -4, 3, 9], [0, 2, 400, 9]):
        lp, e = place.put(-torch.rand(9), torch.tensor(ends))
        lp.requires_grad_()
        if place.backend == "eager" and place.device == "cpu":
            with pytest.raises(ValueError, match="cu_seqlens: element"):
                ff.sequence_logprobs(lp, cu_seqlens=e)
            continue
        s = ff.sequence_logprobs(lp, cu_seqlens=e)
        assert torch.isnan(s).any(), ends
        s.sum().backward()
        assert (torch.isnan(lp.grad) | (lp.grad == 1)).all()  # nothing left unwritten
        if place.backend != "eager":
            with pytest.raises(ValueError, match="cu_seqlens: did not rise"):
                ff.check()
    with pytest.raises(ValueError, match="cu_seqlens: one element, no sequence, with 9 tokens"):
        ff.sequence_logprobs(*place.put(-torch.rand(9)), cu_seqlens=e[:1] * 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_on_different_backends(place, dtype):
    """What the forward leaves for the backward is the same everywhere."""
    if place.backend == "eager":
        pytest.skip("plain torch keeps its own graph")
    raw = torch.ops.finefuse
    logits, targets = make(4, 900, dtype)
    g = torch.randn(4)
    x, y, up = place.put(logits, targets, g)
    outs = []
    for forward, backward in ((True, False), (False, True), (False, False)):
        with ff.backend(place.backend if forward else "cpu"):
            saved = raw.token_logprobs_stats_forward(
                *((x, y) if forward else (logits, targets)), 0.8, IGNORE
            )[3]
        out = torch.empty_like(x if backward else logits)
        with ff.backend(place.backend if backward else "cpu"):
            arguments = (x, y, saved.to(x.device), up, up, up, out)
            if not backward:
                arguments = (logits, targets, saved.cpu(), g, g, g, out)
            raw.token_logprobs_backward(*arguments, 0.8, IGNORE)
        outs.append(out.cpu())
    check("there, cpu", outs[0], outs[2], outs[2])
    check("cpu, there", outs[1], outs[2], outs[2])


def test_same_bits_every_time(place):
    logits, targets = make(6, 5000, torch.bfloat16)
    results = [
        run(place, ff.token_logprobs, logits, targets, [torch.ones(6)] * 3, stats=True)
        for _ in range(2)
    ]
    for a, b in zip([*results[0][0], results[0][1]], [*results[1][0], results[1][1]], strict=True):
        assert torch.equal(a, b)


def test_nothing_is_left_unwritten(place):
    """Outputs start as NaN: what a kernel forgets shows."""
    raw = torch.ops.finefuse
    logits, targets = place.put(*make(5, 777))
    if place.backend == "eager":
        pytest.skip("has no raw op")
    saved = raw.token_logprobs_forward(logits, targets, 1.0, IGNORE)[1]
    out = torch.full_like(logits, float("nan"))
    one = torch.ones(5, device=place.device)
    raw.token_logprobs_backward(logits, targets, saved, one, None, None, out, 1.0, IGNORE)
    assert torch.isfinite(out).all()
    out.fill_(float("nan"))
    raw.cross_entropy_forward_backward(logits, targets, out, 0.0, IGNORE, 2)
    assert torch.isfinite(out).all()


@pytest.mark.skipif(GPU, reason="compute-sanitizer looks at that on a GPU")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 31, 257, 2051])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_nothing_out_of_bounds(backend, vocab, dtype, at_end):
    if backend == "cuda" and unavailable("cuda"):
        pytest.skip(unavailable("cuda"))
    raw = torch.ops.finefuse
    logits, targets = make(3, vocab, dtype, ignore=False)
    logits = tensor_between_guards(logits, at_end)
    out = tensor_between_guards(torch.zeros_like(logits), at_end)
    one = torch.ones(3)
    with ff.backend(backend):
        saved = raw.token_logprobs_stats_forward(logits, targets, 1.0, IGNORE)[3]
        raw.token_logprobs_backward(logits, targets, saved, one, one, one, out, 1.0, IGNORE)
        raw.cross_entropy_forward_backward(logits, targets, out, 0.1, IGNORE, 2)
        raw.scale_gradient(out, targets, torch.tensor(2.0), IGNORE)
    assert torch.isfinite(out).all()


# ---- on a GPU alone ------------------------------------------------------------------------------


@needs_gpu
def test_cuda_graph(place):
    """No allocation, no synchronisation: forward and backward are captured and replayed."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    logits, targets = (t.cuda() for t in make(40, 3001, torch.bfloat16))
    x = logits.clone().requires_grad_()

    def step():
        x.grad = None
        ff.cross_entropy(x, targets).backward()
        lp = ff.token_logprobs(x, targets)
        return lp, x.grad

    graph, (lp, grad) = capture(step)
    other = make(40, 3001, torch.bfloat16, seed=5)[0].cuda()
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    y = other.clone().requires_grad_()
    ff.cross_entropy(y, targets).backward()
    assert torch.equal(grad, y.grad)
    assert torch.equal(lp, ff.token_logprobs(y, targets))


@needs_gpu
def test_current_stream(place):
    """Work goes to torch's current stream, behind what is queued there."""
    source, targets = (t.cuda() for t in make(200, 32000))
    want = ff.token_logprobs(source, targets)
    logits = torch.empty_like(source)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        logits.copy_(source)
        lp = ff.token_logprobs(logits, targets)
    stream.synchronize()
    assert torch.equal(lp, want)


@needs_gpu
def test_compile(place):
    logits, targets = (t.cuda() for t in make(30, 1000))

    def step(x, temperature):
        return ff.token_logprobs(x, targets, temperature=temperature).sum() + ff.cross_entropy(
            x, targets
        )

    compiled = torch.compile(step, fullgraph=True)
    for temperature in (1.0, 0.7, 0.9):
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = compiled(x, temperature), step(y, temperature)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x.grad, y.grad)


@needs_gpu
def test_more_than_2_to_31_elements(place):
    """64-bit offsets: the last rows of 4.3 G elements."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    rows, vocab = 33_600, 128_256
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    targets = torch.zeros(rows, dtype=torch.long, device="cuda")
    logits[-1] = torch.randn(vocab, device="cuda")
    lp = ff.token_logprobs(logits, targets)
    want = torch.log_softmax(logits[-1].double(), -1)[0]
    assert abs(lp[-1].item() - want.item()) < 1e-4
    out = torch.ops.finefuse.token_logprobs_forward(logits, targets, 1.0, IGNORE)
    g = torch.ones(rows, device="cuda")
    torch.ops.finefuse.token_logprobs_backward(
        logits, targets, out[1], g, None, None, logits, 1.0, IGNORE
    )
    p = torch.softmax(torch.zeros(vocab), -1)[1].item()
    assert abs(logits[-2, 1].item() + p) < 1e-7
