"""Losses from hidden states on every backend beside the CPU's: CUDA, Triton, plain torch.

On a reduced grid: what is common to all backends, the head, the arguments and the autograd, is in
test_linear*.py. Few rows: one takes Triton's interpreter some hundredths of a
second.
"""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import GPU
from linear_cases import (
    DTYPES,
    FUNCTIONS,
    IGNORE,
    compare_cross_entropy,
    compare_stats,
    make,
    plain_cross_entropy,
    run,
    spoilt,
    truth_cross_entropy,
    upstream_of,
    use_chunks,
)
from linear_problems import PROBLEMS, compare, differentiate, loss_of
from tolerances import ScalarErrors, check

# NumPy's, from Triton's interpreter, at what a GPU does silently: -inf - -inf, overflow to inf
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=[3, 1000], ids=["chunks", "at once"])
def chunk(request, monkeypatch):
    """Several chunks, and one."""
    return use_chunks(monkeypatch, request.param)


# An odd vocabulary and width; and whole vectors and tiles of both.
SHAPES = [(5, 33, 70), (4, 64, 128)]


def narrow_and_plain(place, dtype):
    """Whether it is plain torch with 16-bit logits, whose errors it has: no row's better than another's."""
    return place.backend == "eager" and dtype in (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats_and_gradients(place, chunk, shape, dtype):
    case = make(*shape, dtype)
    there = {"device": place.device, "only": False}
    if narrow_and_plain(place, dtype):
        there["logits"] = dtype
    compare_stats(case, **there, temperature=0.7)
    compare_stats(case._replace(bias=None), **there, softcap=2.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(place, chunk, shape, dtype):
    if narrow_and_plain(place, dtype):
        pytest.skip("one number against one of plain torch's: see test_scalar_over_seeds")
    case = make(*shape, dtype)
    there = {"device": place.device}
    compare_cross_entropy(case, **there, label_smoothing=0.1, softcap=2.5, temperature=0.7)
    compare_cross_entropy(case._replace(bias=None), -2.5, **there, reduction="sum")
    compare_cross_entropy(case, **there, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalar_over_seeds(place, dtype):
    errors = ScalarErrors("linear_cross_entropy", dtype)
    for seed in range(32):
        case = make(5, 16, 31, dtype, seed=seed)
        truth, _ = truth_cross_entropy(case)
        eager = plain_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias)
        h, w, b, y = place.put(*case)
        loss = ff.linear_cross_entropy(h, w, y, bias=b).cpu()
        errors.add(loss, eager, truth.item(), truth.item())
    errors.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_losses(place, monkeypatch, name, dtype):
    if narrow_and_plain(place, dtype):
        pytest.skip("plain torch in 16 bits is the yardstick itself")
    use_chunks(monkeypatch, 6)
    size = {"pairs": 2, "tokens": 4} if "preference" in name else {"shape": (3, 3)}
    compare(PROBLEMS[name](dtype, vocab=70, **size), device=place.device)


@pytest.mark.parametrize("name", ["policy", "preference", "distill"])
def test_packed_weight(place, name):
    problem = PROBLEMS[name](width=64, vocab=70)
    packed = ff.quantize(problem.weight, "nf4", 64, double_quant=True)
    compare(problem, packed, ff.dequantize(packed, torch.float32), place.device)


def test_packed_weight_of_log_probabilities(place):
    case = make(4, 64, 70, ignore=False)
    packed = ff.quantize(case.weight, "nf4", 64, double_quant=True)
    h, w, y = place.put(case.hidden, packed, case.targets)
    dense = ff.dequantize(w, torch.float32)
    for function, options in FUNCTIONS:
        x, z = h.clone().requires_grad_(), h.clone().requires_grad_()
        got, want = function(x, w, y, **options), function(z, dense, y, **options)
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        ups = upstream_of(function, options, 4)
        total = 0
        for (a, b), u in zip(pairs, ups, strict=True):
            check("packed", a.cpu(), b.cpu(), b.cpu())
            total = total + ((a + b) * u.to(a)).sum()
        total.backward()
        check("d hidden", x.grad.cpu(), z.grad.cpu(), z.grad.cpu())


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_ignored_rows_are_not_read(place, fill):
    case = make(7, 20, 40)
    wild, ignored = spoilt(case, fill), case.targets == IGNORE
    for function, options in FUNCTIONS:
        ups = upstream_of(function, options, 7)
        want, want_gradients = run(function, case, ups, device=place.device, **options)
        outputs, gradients = run(function, wild, ups, device=place.device, **options)
        for a, b in zip((*outputs, *gradients), (*want, *want_gradients), strict=True):
            assert torch.equal(a, b)
        assert (gradients[0][ignored] == 0).all()


def test_no_row_counts(place):
    for rows in (0, 3):
        case = make(rows, 4, 7)._replace(targets=torch.full((rows,), IGNORE))
        case = case._replace(hidden=torch.full_like(case.hidden, math.nan))
        for function, options in FUNCTIONS:
            ups = upstream_of(function, options, rows)
            outputs, gradients = run(function, case, ups, device=place.device, **options)
            assert all((x == 0).all() for x in (*outputs, *gradients))


def test_target_out_of_range(place):
    """On a CPU an error before anything is done; on a GPU a row of NaN and a flag."""
    case = make(4, 8, 11, ignore=False)
    for bad in (-1, 11, 2**31):
        y = case.targets.clone()
        y[2] = bad
        h, w, y = place.put(case.hidden, case.weight, y)
        for function in (ff.linear_token_logprobs, ff.linear_cross_entropy):
            options = {"reduction": "none"} if function is ff.linear_cross_entropy else {}
            if GPU:
                out = function(h, w, y, **options)
                assert torch.isnan(out[2])
                assert torch.isfinite(out[[0, 1, 3]]).all()
                with pytest.raises(ValueError, match="target"):
                    ff.check()
            else:
                with pytest.raises(ValueError, match=f"targets: element 2 is {bad}"):
                    function(h, w, y, **options)


@pytest.mark.parametrize("name", ["policy of sequences", "preference of pairs", "distill of rows"])
def test_the_backward_runs_where_the_forward_did(place, name):
    """Also when the choice has changed in between."""
    problem = PROBLEMS[name]()
    leaves = [
        x.to(place.device, copy=True).requires_grad_() for x in (problem.spoilt(), *problem[1:3])
    ]
    loss = loss_of(problem.ours(*leaves)).sum()
    with ff.backend("auto"):
        loss.backward()
    again = [x.detach().clone().requires_grad_() for x in leaves]
    loss_of(problem.ours(*again)).sum().backward()
    for a, b in zip(leaves, again, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", ["policy", "preference", "distill"])
def test_upstream_and_retain_graph(place, name):
    problem = PROBLEMS[name]()
    args = (problem.ours, problem.spoilt(), *problem[1:3])
    _, once, _ = differentiate(*args, device=place.device)
    _, scaled, _ = differentiate(*args, factor=-2.0, device=place.device)
    leaves = [x.to(place.device, copy=True).requires_grad_() for x in args[1:]]
    loss = loss_of(problem.ours(*leaves))
    loss.backward(retain_graph=True)
    loss.backward()
    for a, b, x in zip(once, scaled, leaves, strict=True):
        check("times -2", b, -2 * a, -2 * a)
        check("twice", x.grad.cpu(), 2 * a, 2 * a)


def test_autocast(place):
    if GPU and place.backend == "eager":
        pytest.skip("a GPU's plain product under autocast is torch's own to promise")
    case = make(5, 16, 33)
    h, w, y = place.put(case.hidden, case.weight, case.targets)
    with torch.autocast(place.device, torch.bfloat16):
        lp = ff.linear_token_logprobs(h, w, y)
    low = ff.linear_token_logprobs(h.bfloat16(), w.bfloat16(), y)
    assert torch.equal(lp, low)
    assert not torch.equal(lp, ff.linear_token_logprobs(h, w, y))
