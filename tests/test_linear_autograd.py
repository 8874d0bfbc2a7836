"""linear_token_logprobs and linear_cross_entropy under autograd and torch.compile; the memory they take."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse import _linear_loss, _matmul, codebook
from linear_cases import (
    DTYPES,
    FUNCTIONS,
    IGNORE,
    NAMES,
    OPTIONS,
    Case,
    Counts,
    check,
    make,
    ours_stats,
    plain_cross_entropy,
    plain_stats,
    run,
    run_plain,
    spoilt,
    truth_cross_entropy,
    truth_stats,
    truth_stats_gradients,
    upstream_of,
)
from torch.utils.checkpoint import checkpoint

RAW = torch.ops.finefuse
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- autograd, compile, torch's own checks -------------------------------------------------------


@pytest.mark.parametrize("size", [2, 100])
def test_gradcheck(chunk, size):
    chunk(size)
    case = make(6, 4, 5, torch.float64)
    leaves = [x.clone().requires_grad_() for x in case[:3]]

    def checks(function, **options):
        assert torch.autograd.gradcheck(
            lambda x, w, b: function(x, w, case.targets, bias=b, **options), leaves
        )

    for options in OPTIONS.values():
        checks(ours_stats, **options)
        for reduction in ("mean", "sum", "none"):
            checks(ff.linear_cross_entropy, reduction=reduction, label_smoothing=0.2, **options)
    checks(ff.linear_token_logprobs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retain_graph(dtype):
    """A second backward gives the same bits, and another upstream gradient's where there is one."""
    case = make(9, 7, 30, dtype)
    for function, options in FUNCTIONS:
        ups = upstream_of(function, options, 9)
        leaves = [x.clone().requires_grad_() for x in case[:3]]
        out = function(leaves[0], leaves[1], case.targets, bias=leaves[2], **options)
        out = out if isinstance(out, tuple) else (out,)
        value = sum((o * u.to(o.dtype)).sum() for o, u in zip(out, ups, strict=True))
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        kept = [x.clone() for x in first]
        second = torch.autograd.grad(value, leaves, retain_graph=True)
        for a, b, c in zip(first, kept, second, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(b, c)
        two = torch.tensor(2.0, dtype=value.dtype)
        for a, b in zip(kept, torch.autograd.grad(value, leaves, two), strict=True):
            check("twice as much", b, 2 * a, 2 * a)


def test_gradients_are_not_shared():
    """What one backward returned, the next does not write into."""
    case = make(9, 7, 30)
    leaves = [x.clone().requires_grad_() for x in case[:3]]
    loss = ff.linear_cross_entropy(leaves[0], leaves[1], case.targets, bias=leaves[2])
    loss.backward(torch.tensor(3.0), retain_graph=True)
    kept = [x.grad.clone() for x in leaves]
    loss.backward(torch.tensor(3.0))
    for x, once in zip(leaves, kept, strict=True):
        check("twice", x.grad, 2 * once, 2 * once)


def test_double_backward_raises():
    case = make(4, 3, 6, bias=False)
    for function, options in FUNCTIONS:
        x, w = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        out = function(x, w, case.targets, **options)
        value = sum(o.sum() for o in (out if isinstance(out, tuple) else (out,)))
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.square().sum().backward()
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.functional.hessian(
                lambda x, f=function, o=options, w=w: (
                    f(x, w, case.targets, reduction="sum")
                    if f is ff.linear_cross_entropy
                    else sum(v.sum() for v in _tuple(f(x, w, case.targets, **o)))
                ),
                case.hidden,
            )


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


def test_forward_mode_raises():
    case = make(3, 4, 8)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        x = forward_ad.make_dual(case.hidden, torch.ones_like(case.hidden))
        for function, options in FUNCTIONS:
            with pytest.raises(RuntimeError, match="forward-mode"):
                function(x, case.weight, case.targets, **options)


def raw_calls(grad=False):
    case = make(6, 4, 9)
    packed = ff.quantize(torch.randn(9, 4), blocksize=16, double_quant=True, nested_blocksize=16)
    none = (None, None, None, None, None, None, 0, 0)
    x = case.hidden.requires_grad_(grad)
    dense, bare, coded = (
        (case.weight, case.bias, *none, 9),
        (case.weight, None, *none, 9),
        (None, case.bias, *codebook.fields(packed), 9),
    )
    y, n = case.targets, 6
    g, every = torch.ones(n), (True, True, True)

    def t(v):
        return torch.tensor(v, dtype=torch.float64)

    forward, backward = RAW.linear_token_logprobs_forward, RAW.linear_token_logprobs_backward
    yield forward.default, (x, *dense, math.inf, y, 0.9, IGNORE, True)
    yield forward.default, (x, *coded, 3.0, y, 1.0, IGNORE, False)
    yield forward.tensor, (x, *bare, t(2.0), y, t(0.9), IGNORE, False)
    yield backward.default, (g, g, g, x, *dense, math.inf, y, 0.9, IGNORE, *every)
    yield backward.default, (
        g, None, None, x, *coded, 2.0, y, 0.9, IGNORE, True, False, False,
    )  # fmt: skip
    yield backward.tensor, (
        g, None, g, x, *dense, t(2.0), y, t(0.9), IGNORE, False, True, True,
    )  # fmt: skip
    ce = RAW.linear_cross_entropy_forward
    yield ce.default, (x, *dense, math.inf, y, 0.9, 0.1, IGNORE, 0)
    yield ce.default, (x, *coded, math.inf, y, 1.0, 0.0, IGNORE, 2)
    yield ce.tensor, (x, *bare, t(2.0), y, t(0.9), t(0.1), IGNORE, 1)
    both = RAW.linear_cross_entropy_forward_backward
    yield both.default, (x, *dense, math.inf, y, 0.9, 0.1, IGNORE, 2, *every)
    yield both.tensor, (x, *bare, t(2.0), y, t(0.9), t(0.1), IGNORE, 1, True, False, False)
    back = RAW.linear_cross_entropy_backward
    yield back.default, (g, x, *dense, 2.0, y, 0.9, 0.1, IGNORE, 0, *every)
    yield back.tensor, (t(2.0), x, *dense, t(math.inf), y, t(0.9), t(0.1), IGNORE, 2, *every)


@pytest.mark.parametrize("case", range(len(list(raw_calls()))))
def test_opcheck_raw(case):
    op, args = list(raw_calls())[case]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    "name", ["linear_token_logprobs", "linear_token_logprobs_stats", "linear_cross_entropy"]
)
def test_opcheck_public(name):
    """torch.ops.finefuse.<name> differentiates, and is the public function."""
    case = make(4, 5, 9)
    op = getattr(RAW, name).default
    leaves = [x.clone().requires_grad_() for x in case[:3]]
    options = {"bias": leaves[2], "softcap": 4.0, "temperature": 0.8}
    torch.library.opcheck(op, (*leaves[:2], case.targets), options)
    public = ours_stats if name.endswith("stats") else getattr(ff, name)
    want = public(*leaves[:2], case.targets, **options)
    got = op(*leaves[:2], case.targets, **options)
    for a, b in zip(_tuple(got), _tuple(want), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad


def test_backward_through_a_raw_op_raises():
    seen = 0
    for op, args in raw_calls(grad=True):
        out = op(*args)
        value = sum(o.sum() for o in (out if isinstance(out, (tuple, list)) else [out]))
        seen += 1
        with pytest.raises(RuntimeError, match="is a raw op"):
            value.backward()
    assert seen == len(list(raw_calls()))


@pytest.mark.parametrize("which", range(len(FUNCTIONS)))
def test_compile(which, counter):
    """Numbers that change are no constants of the graph: two graphs serve them all."""
    function, options = FUNCTIONS[which]
    smoothing = "label_smoothing" in options

    def step(x, w, b, targets, t, c):
        kwargs = {**options, "temperature": t, "softcap": c}
        if smoothing:
            kwargs["label_smoothing"] = t / 10
        out = function(x, w, targets, bias=b, **kwargs)
        return sum((o * o).sum() for o in _tuple(out))

    counter.backend = "aot_eager"
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    case = spoilt(make(9, 6, 20))
    for i in range(8):
        t, c = 0.5 + 0.13 * i, 2.0 + 0.4 * i
        a, b = ([x.clone().requires_grad_() for x in case[:3]] for _ in range(2))
        one, two = compiled(*a, case.targets, t, c), step(*b, case.targets, t, c)
        one.backward()
        two.backward()
        check("compiled", one, two, two)
        for name, x, y in zip(NAMES, a, b, strict=True):
            check(f"compiled: d {name}", x.grad, y.grad, y.grad)
    assert 1 <= counter.graphs <= 2
    before, counter.backend = counter.graphs, "eager"
    for i in range(4):  # as 0-d tensors numbers never recompile
        t, c = torch.tensor(0.5 + 0.1 * i), torch.tensor(2.0 + i)
        compiled(*a, case.targets, t, c)
    assert counter.graphs <= before + 1


def test_compile_inductor():
    """With the compiler that users get, forward and backward; hidden comes from a layer before."""
    torch._dynamo.reset()
    case = make(9, 6, 20)

    def step(x, w, b, t):
        h = torch.tanh(x)
        loss = ff.linear_cross_entropy(h, w, case.targets, bias=b, temperature=t)
        return loss - ff.linear_token_logprobs(h, w, case.targets, bias=b, softcap=5.0).mean()

    compiled = torch.compile(step, fullgraph=True)
    for t in (0.7, 1.9):
        a, b = ([x.clone().requires_grad_() for x in case[:3]] for _ in range(2))
        one, two = compiled(*a, t), step(*b, t)
        one.backward()
        two.backward()
        check("compiled", one, two, two)
        for name, x, y in zip(NAMES, a, b, strict=True):
            check(f"compiled: d {name}", x.grad, y.grad, y.grad)


def test_compile_with_a_changing_number_of_rows(counter):
    step = torch.compile(
        lambda x, w, y: ff.linear_cross_entropy(x, w, y), backend=counter, fullgraph=True
    )
    for rows in (5, 8, 13, 21):
        case = make(rows, 6, 20)
        want = ff.linear_cross_entropy(case.hidden, case.weight, case.targets)
        check("loss", step(case.hidden, case.weight, case.targets), want, want)
    assert counter.graphs <= 2


def test_autocast():
    """hidden and weight are cast as F.linear casts them, and gradients come back in their own types."""
    case = make(9, 8, 33)
    for function, options in FUNCTIONS:
        plain = plain_cross_entropy if function is ff.linear_cross_entropy else plain_stats
        ups = upstream_of(function, options, 9)
        padded = [*ups, None, None][:3] if plain is plain_stats else ups

        def cast(hidden, weight, targets, *, bias, f=function, **options):
            with torch.autocast("cpu", torch.bfloat16):
                return f(hidden, weight, targets, bias=bias, **options)

        outputs, gradients = run(cast, case, ups, **options)
        low = Case(*(x.bfloat16() for x in case[:3]), case.targets)
        eager, eager_gradients = run_plain(plain, low, padded, **options)
        if plain is plain_stats:
            truth = truth_stats(low, **options)
            by = truth_stats_gradients(low, padded, **options)
        else:
            loss, by = truth_cross_entropy(low, upstream=ups[0] if ups[0].ndim else 1.0, **options)
            truth = (loss,)
        assert {x.dtype for x in (*outputs, *gradients)} == {torch.float32}
        for a, e, t in zip(outputs, eager, truth, strict=False):
            check("under autocast", a, e, t, torch.bfloat16)
        for name, a, e, t in zip(NAMES, gradients, eager_gradients, by, strict=True):
            check(f"under autocast: d {name}", a, e, t, torch.bfloat16)
    x, w = case.hidden.half(), case.weight  # of another type each, as F.linear takes them there
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ff.linear_token_logprobs(x, w, case.targets)
        same = ff.linear_token_logprobs(x.bfloat16(), w.bfloat16(), case.targets)
        wide = ff.linear_token_logprobs(x.double(), w.double(), case.targets)
    assert torch.equal(mixed, same)
    assert wide.dtype is torch.float64


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoint(use_reentrant, dtype):
    """A loss under activation checkpointing, and one of a layer that is: the same bits."""
    case = spoilt(make(14, 7, 30, dtype))
    for function, options in FUNCTIONS:

        def value(x, w, b, f=function, o=options):
            return sum((v * v).sum() for v in _tuple(f(x, w, case.targets, bias=b, **o)))

        grads = []
        for call in (
            lambda *args, v=value: checkpoint(v, *args, use_reentrant=use_reentrant),
            lambda *args, v=value: v(*args),
        ):
            leaves = [x.detach().clone().requires_grad_() for x in case[:3]]
            call(*leaves).backward()
            grads.append([x.grad for x in leaves])
        for name, a, b in zip(NAMES, *grads, strict=True):
            check(f"d {name}", a, b, b)
            assert torch.isfinite(a).all()


def test_saved_tensor_hooks(monkeypatch):
    """Where hooks want less to be kept, the gradient is made in the backward, and nothing of the size of the
    logits or of a gradient is saved."""
    case = make(64, 4, 50)
    for function, options in FUNCTIONS:
        ups = upstream_of(function, options, 64)
        _, want = run(function, case, ups, **options)
        saved = []
        counts = Counts(monkeypatch)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: (s.append(t.shape), t.clone())[1], lambda t: t
        ):
            leaves = [x.clone().requires_grad_() for x in case[:3]]
            out = _tuple(function(leaves[0], leaves[1], case.targets, bias=leaves[2], **options))
            before = counts.weight
            value = sum((o * u).sum() for o, u in zip(out, ups, strict=True))
        value.backward()
        assert before == 0
        assert counts.weight == 1
        assert torch.Size((64, 50)) not in saved
        assert torch.Size((64, 4)) in saved
        for a, b in zip(leaves, want, strict=True):
            check("with hooks", a.grad, b, b)


def test_saved_tensors_are_versioned():
    """A hidden state that is overwritten between forward and backward is an error, not a wrong gradient."""
    case = make(6, 5, 9)
    for function, options in (FUNCTIONS[0], FUNCTIONS[1], FUNCTIONS[3]):
        x = (case.hidden.clone().requires_grad_() * 1.0).clone()
        value = sum(o.sum() for o in _tuple(function(x, case.weight, case.targets, **options)))
        with torch.no_grad():
            x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


# ---- memory ----------------------------------------------------------------------------------------


_PEAK = """
import sys, torch, finefuse as ff
from finefuse import _linear_loss
rows, width, vocab = 512, 96, 10000
torch.manual_seed(0)
_linear_loss._CPU_BYTES = 1 << 20  # not 16 MB: here that would be nearly all of them
targets = torch.randint(0, vocab, (rows,))
def step(function, hidden, weight, softcap):
    if function == "cross-entropy":
        return ff.linear_cross_entropy(hidden, weight, targets, softcap=softcap)
    if function == "log-probabilities":
        return ff.linear_token_logprobs(hidden, weight, targets, softcap=softcap).sum()
    pairs, y = hidden.view(8, 64, width), targets.view(8, 64)
    if function == "policy":
        return ff.linear_policy_loss(pairs, weight, y, advantages=torch.ones(8), softcap=softcap).loss
    if function == "preference":
        return ff.linear_preference_loss(pairs, weight, y, softcap=softcap).loss
    if function == "distill":
        teacher = hidden.detach(), weight.detach()
        return ff.linear_distill_loss(hidden, weight, *teacher, softcap=softcap)
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight), targets)
for case in sys.argv[1:]:
    function, dtype, softcap = case.split("/")
    dtype = getattr(torch, dtype)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        step(function, hidden, weight, float(softcap) or None).backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    print(peak)
"""


def test_peak_memory():
    """The gradients and one chunk of logits (two with a softcap), by torch's own account; with a 16-bit
    weight also the float32 sum of its gradient and the panel in which it is widened."""
    rows, width, vocab = 512, 96, 10000
    cases = [
        (function, dtype, softcap)
        for function in ("cross-entropy", "log-probabilities")
        for dtype, softcap in (("float32", 0.0), ("float32", 5.0), ("bfloat16", 0.0))
    ] + [(function, "float32", 0.0) for function in ("policy", "preference", "distill")]
    names = ["full/float32/0.0", *("/".join(map(str, case)) for case in cases)]
    out = subprocess.run([sys.executable, "-c", _PEAK, *names], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    full, *found = map(int, out.stdout.split())
    assert (
        full > 2 * rows * vocab * 4
    )  # what is measured is there: logits and their gradient, 40 MB
    for (function, dtype, softcap), peak in zip(cases, found, strict=True):
        size = 4 if dtype == "float32" else 2
        row = vocab * (2 if softcap != 0.0 or function == "distill" else 1)
        chunk = (128 if function == "preference" else _chunk_of(rows, row)) * row * 4  # a pair
        gradients = (rows + vocab) * width * size
        beside = 0 if dtype == "float32" else vocab * width * 4 + min(4 << 20, vocab * width * 4)
        if _matmul._onednn_is_faster():  # whose products are not added to what is there
            beside += vocab * width * 4
        case = function, dtype, softcap
        assert gradients <= peak <= 1.3 * (gradients + chunk + beside), case
        assert peak < 0.5 * full, case


def _chunk_of(rows, numbers):
    before, _linear_loss._CPU_BYTES = _linear_loss._CPU_BYTES, 1 << 20
    try:
        return _linear_loss.chunk_rows(rows, numbers, torch.float32, True)
    finally:
        _linear_loss._CPU_BYTES = before
