"""linear_policy_loss, linear_preference_loss and linear_distill_loss under autograd and torch.compile."""

from __future__ import annotations

import weakref

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse import _linear_distill, _linear_loss, _linear_preference
from linear_cases import (
    DTYPES,
    NAMES,
    Both,
    Counts,
    array,
    check,
    use_chunks,
)
from linear_problems import (
    PROBLEMS,
    differentiate,
    loss_of,
    of_five,
    plainly,
)
from torch.utils.checkpoint import checkpoint

RAW = torch.ops.finefuse
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- autograd, compile, torch's own checks -------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "preference, one head"])
def test_gradcheck(chunk, name):
    """The reference of "preference, one head" reads the weight too, and takes no part in its gradient."""
    chunk(8)
    size = {"pairs": 2, "tokens": 3} if "preference" in name else {"shape": (2, 3)}
    problem = PROBLEMS[name](torch.float64, width=3, vocab=5, **size)
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    assert torch.autograd.gradcheck(lambda *x: loss_of(problem.ours(*x)), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_upstream_and_retain_graph(name, dtype):
    """Another factor, and a second backward, which makes the logits again where the first did not."""
    problem = PROBLEMS[name](dtype)
    args = (problem.ours, problem.spoilt(), *problem[1:3])
    _, once, up = differentiate(*args)
    _, truth, _, _ = problem.truth(problem.weight, array(up))
    _, eager = plainly(problem)
    for factor in (-2.5, 0.0):
        _, gradients, _ = differentiate(*args, factor=factor)
        for of, a, e, t in zip(NAMES, gradients, eager, truth, strict=True):
            by = Both(*(factor * x for x in e))
            check(f"{factor}: d {of}", a.reshape(t.shape), by, factor * t)
            assert factor != 0.0 or (a == 0).all()
    leaves = [x.clone().requires_grad_() for x in (problem.spoilt(), *problem[1:3])]
    loss = loss_of(problem.ours(*leaves))
    value = loss if up is None else (loss * up.to(loss.dtype)).sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(value, leaves, retain_graph=True)
    third = torch.autograd.grad(value, leaves)
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
    for of, a, o, e, t in zip(NAMES, second, once, eager, truth, strict=True):
        check(f"again: d {of}", a.reshape(t.shape), e, t)
        check(f"again and once: d {of}", a, o, o)


@pytest.mark.parametrize("name", PROBLEMS)
def test_made_in_the_backward(monkeypatch, name):
    """Under saved-tensor hooks, the gradient of a loss that is otherwise made at once."""
    problem = PROBLEMS[name]()
    _, want, up = differentiate(problem.ours, problem.spoilt(), *problem[1:3])
    counts = Counts(monkeypatch)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.numel()), t)[1], lambda t: t
    ):
        leaves = [x.clone().requires_grad_() for x in (problem.spoilt(), *problem[1:3])]
        loss = loss_of(problem.ours(*leaves))
    assert counts.weight == 0
    assert problem.keep.numel() * 40 not in saved
    (loss if up is None else (loss * up).sum()).backward()
    for of, a, b in zip(NAMES, leaves, want, strict=True):
        check(f"d {of}", a.grad, b, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", PROBLEMS)
def test_checkpoint(name, use_reentrant):
    problem = PROBLEMS[name]()
    grads = []
    for wrap in (True, False):
        leaves = [x.clone().requires_grad_() for x in (problem.spoilt(), *problem[1:3])]

        def value(*x):
            loss = loss_of(problem.ours(*x))
            return (loss * loss).sum()

        (
            checkpoint(value, *leaves, use_reentrant=use_reentrant) if wrap else value(*leaves)
        ).backward()
        grads.append([x.grad for x in leaves])
    for of, a, b in zip(NAMES, *grads, strict=True):
        check(f"d {of}", a, b, b)


@pytest.mark.parametrize("name", PROBLEMS)
def test_double_backward_raises(name):
    problem = PROBLEMS[name]()
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    (g,) = torch.autograd.grad(loss_of(problem.ours(*leaves)).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


@pytest.mark.parametrize("name", PROBLEMS)
def test_autocast(name):
    """Hidden states and weights, the other model's too, are cast to bfloat16; gradients come back as the
    leaves are."""
    problem = PROBLEMS[name]()

    def cast(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return problem.ours(*x)

    leaves = (problem.spoilt(), *problem[1:3])
    out, gradients, _ = differentiate(cast, *leaves)
    low, low_gradients, _ = differentiate(cast, *(x.bfloat16() for x in leaves))
    full = problem.ours(*problem[:3])
    assert loss_of(out).dtype is torch.float32
    assert torch.equal(loss_of(out), loss_of(low))
    assert not torch.equal(loss_of(out), loss_of(full))  # in bfloat16 other numbers, if near
    for a, b in zip(gradients, low_gradients, strict=True):
        assert a.dtype is torch.float32
        assert b.dtype is torch.bfloat16
        assert torch.equal(a, b.float())


COMPILED = [
    "policy",
    "policy of sequences",
    "preference with a reference",
    "preference with an NLL",
    "distill",
]


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name, counter):
    """Numbers that change are no constants of the graph: two graphs serve them all."""
    problem = PROBLEMS[name]()

    def step(h, w, b, t, c):
        return loss_of(problem.ours(h, w, b, temperature=t, softcap=c)).sum()

    counter.backend = "aot_eager"
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for i in range(6):
        t, c = 0.6 + 0.2 * i, 2.0 + 0.7 * i
        one, two = ([x.clone().requires_grad_() for x in (problem.spoilt(), *problem[1:3])]
                    for _ in range(2))  # fmt: skip
        a, b = compiled(*one, t, c), step(*two, t, c)
        a.backward()
        b.backward()
        check("compiled", a, b, b)
        for of, x, y in zip(NAMES, one, two, strict=True):
            check(f"compiled: d {of}", x.grad, y.grad, y.grad)
    assert 1 <= counter.graphs <= 2


def test_compile_inductor():
    torch._dynamo.reset()
    problem = PROBLEMS["preference with a reference"]()

    def step(h, w, b, t):
        return problem.ours(torch.tanh(h), w, b, temperature=t).loss

    compiled = torch.compile(step, fullgraph=True)
    for t in (0.8, 1.3):
        one, two = ([x.clone().requires_grad_() for x in (problem.spoilt(), *problem[1:3])]
                    for _ in range(2))  # fmt: skip
        a, b = compiled(*one, t), step(*two, t)
        a.backward()
        b.backward()
        check("compiled", a, b, b)
        for of, x, y in zip(NAMES, one, two, strict=True):
            check(f"compiled: d {of}", x.grad, y.grad, y.grad)


def test_compile_none_and_sorted():
    torch._dynamo.reset()
    for name in (
        "policy of tokens",
        "preference, sorted",
        "preference, short tails",
        "distill of rows",
    ):
        problem = PROBLEMS[name]()
        compiled = torch.compile(
            lambda *x, p=problem: loss_of(p.ours(*x)), backend="aot_eager", fullgraph=True
        )
        one, two = ([x.clone().requires_grad_() for x in (problem.spoilt(), *problem[1:3])]
                    for _ in range(2))  # fmt: skip
        a, b = compiled(*one), loss_of(problem.ours(*two))
        a.sum().backward()
        b.sum().backward()
        check("compiled", a, b, b)
        for of, x, y in zip(NAMES, one, two, strict=True):
            check(f"compiled: d {of}", x.grad, y.grad, y.grad)


def recorded(module, name, problem):
    """The arguments with which the public function calls a raw op of its module."""
    calls = []
    original = getattr(module, name)

    def call(*args):
        calls.append(args)
        return original(*args)

    setattr(module, name, call)
    try:
        leaves = [x.clone().requires_grad_() for x in problem[:3]]
        loss_of(problem.ours(*leaves)).sum().backward()
    finally:
        setattr(module, name, original)
    assert calls
    return [a.detach() if isinstance(a, torch.Tensor) else a for a in calls[0]]


def with_tensors(args):
    """A raw op's floats as 0-d tensors."""
    return [torch.tensor(a, dtype=torch.float64) if type(a) is float else a for a in args]


def raw_calls():
    distill_of = PROBLEMS["distill and cross-entropy"]
    from finefuse import _linear_policy

    for module, name, op, problem in (
        (_linear_policy, "_FORWARD_BACKWARD", "linear_policy_forward_backward", PROBLEMS["policy"]()),
        (_linear_preference, "_FORWARD_BACKWARD", "linear_preference_forward_backward",
         PROBLEMS["preference, short tails"]()),
        (_linear_preference, "_FORWARD_BACKWARD", "linear_preference_forward_backward",
         PROBLEMS["preference with an NLL"]()),
        (_linear_distill, "_FORWARD_BACKWARD", "linear_distill_forward_backward", distill_of()),
        (_linear_distill, "_FORWARD", "linear_distill_forward", PROBLEMS["distill of rows"]()),
        (_linear_distill, "_BACKWARD", "linear_distill_backward", PROBLEMS["distill of rows"]()),
    ):  # fmt: skip
        args = recorded(module, name, problem)
        yield getattr(RAW, op).default, args
        yield getattr(RAW, op).tensor, with_tensors(args)


@pytest.mark.parametrize("case", range(12))
def test_opcheck_raw(case):
    op, args = list(raw_calls())[case]
    torch.library.opcheck(op, tuple(args))


@pytest.mark.parametrize("name", ["policy", "preference", "distill"])
def test_opcheck_public(name):
    """torch.ops.finefuse.<name> differentiates, and is the public function."""
    problem = PROBLEMS[name]()
    public = f"linear_{name}_loss"
    calls = []
    original = getattr(ff, public)
    setattr(ff, public, lambda *a, **k: (calls.append((a, k)), original(*a, **k))[1])
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    try:
        want = problem.ours(*leaves)
    finally:
        setattr(ff, public, original)
    ((args, options),) = calls
    options = {k: v for k, v in options.items() if v is not None}
    op = getattr(RAW, public).default
    got = op(*args, **options)
    for a, b in zip(got if isinstance(got, (tuple, list)) else (got,),
                    want if isinstance(want, tuple) else (want,), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    torch.library.opcheck(op, args, options)


def test_backward_through_a_raw_op_raises():
    seen = 0
    for op, args in raw_calls():
        place = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.ndim > 1)
        args[place] = args[place].clone().requires_grad_()
        out = op(*args)
        total = sum(o.sum() for o in (out if isinstance(out, (tuple, list)) else [out]))
        with pytest.raises(RuntimeError, match="is a raw op"):
            total.backward()
        seen += 1
    assert seen == 12


# ---- all five losses -----------------------------------------------------------------------------------


def five(h, w, t):
    """Each loss of the family, of hidden (B, T, H)."""
    b = t.shape[0]
    yield "cross-entropy", lambda h: ff.linear_cross_entropy(h, w, t)
    yield "log-probabilities", lambda h: ff.linear_token_logprobs(h, w, t).sum()
    yield "policy", lambda h: ff.linear_policy_loss(h, w, t, advantages=torch.ones(b)).loss
    yield "preference", lambda h: ff.linear_preference_loss(h, w, t).loss
    yield "distill", lambda h: ff.linear_distill_loss(h, w, h.detach().flip(0), w.detach())


def test_one_chunk_is_alive(monkeypatch):
    """Forward alone, too: the next logits are made when those before are gone."""
    made, most = [], []
    logits = _linear_loss.Head.logits

    def watched(self, x):
        most.append(sum(ref() is not None for ref in made))
        z = logits(self, x)
        made.append(weakref.ref(z))
        return z

    monkeypatch.setattr(_linear_loss.Head, "logits", watched)
    use_chunks(monkeypatch, 3)
    h, w, t = of_five()
    for name, loss in five(h, w, t):
        for gradient in (False, True):
            most.clear()
            value = loss(h.clone().requires_grad_(gradient))
            if gradient:
                value.backward()
            # a teacher's stand beside the student's
            assert len(most) > 2, name
            assert max(most) <= (1 if name == "distill" else 0), name


def test_an_upstream_gradient_is_not_rounded_first():
    """0.1 in bfloat16 is 0.2% too large: every element of a gradient would be."""
    h, w, t = of_five(dtype=torch.bfloat16)
    for name, loss in five(h, w, t):
        if name == "log-probabilities":  # scales before anything is made
            continue
        once, tenth = (
            torch.autograd.grad(factor * loss(x), x)[0]
            for factor, x in ((1.0, h.clone().requires_grad_()), (0.1, h.clone().requires_grad_()))
        )
        factor = torch.tensor(0.1).double()
        assert torch.equal(tenth, (once.double() * factor).to(torch.bfloat16)), name


def test_upstream_0_of_what_is_not_finite():
    h, w, t = of_five()
    h[1, 2, 3] = torch.inf
    for name, loss in five(h, w, t):
        x = h.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x, torch.tensor(0.0))
        assert not g.any(), name


def test_graphs_for_all_lengths():
    """No shape of a batch is burnt into a graph."""
    names = [name for name, _ in five(*of_five())]
    for k, name in enumerate(names):
        torch._dynamo.reset()
        graphs = []

        def backend(module, inputs, graphs=graphs):
            graphs.append(1)
            return module

        @torch.compile(fullgraph=True, backend=backend)
        def compiled(h, w, t, k=k):
            return [*five(h, w, t)][k][1](h)

        for tokens in (6, 9, 13, 17):
            h, w, t = of_five(tokens)
            x = h.clone().requires_grad_()
            check(name, compiled(x, w, t), [*five(x, w, t)][k][1](x), [*five(h, w, t)][k][1](h))
        assert len(graphs) <= 2, name
