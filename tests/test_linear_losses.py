"""linear_policy_loss, linear_preference_loss and linear_distill_loss against float64.

The formulas of the losses are tested from log-probabilities and from logits; here every loss once, and what
comes with hidden states: the head, its gradients, chunks, and which losses make their gradient at once.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
import policy_cases
import preference_cases
from finefuse import _linear_loss, _linear_preference, codebook
from finefuse._args.distill import DISTILL_KINDS
from finefuse._args.policy import POLICY_LOSSES
from finefuse._args.preference import PREFERENCE_LOSSES
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    DTYPES,
    IGNORE,
    NAMES,
    Counts,
    array,
    check,
    make,
    on_one_thread,
    plain_logits,
    use_chunks,
)
from linear_problems import (
    METRICS,
    PROBLEMS,
    check_loss,
    compare,
    differentiate,
    distill,
    loss_of,
    plainly,
    policy,
    preference,
    upstream_of,
)
from tolerances import ScalarErrors

pytestmark = pytest.mark.usefixtures("one_thread")

# Made in the forward: its logits are made once, and no second time by the backward.
AT_ONCE = {
    "policy", "policy of actions", "preference", "preference with a reference", "preference, one head",
    "preference with an NLL", "preference, short tails", "distill", "distill and cross-entropy",
}  # fmt: skip


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients(name, dtype):
    for size in (
        {},
        {"width": 1, "vocab": 2},
        {"width": 40, "vocab": 131, "bias": False, "seed": 3},
    ):
        compare(PROBLEMS[name](dtype, **size))


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_level(isa, name):
    compare(PROBLEMS[name](vocab=257))


@pytest.mark.parametrize("options", policy_cases.OPTIONS)
@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_policy_losses(loss, options):
    if "importance" in policy_cases.OPTIONS[options] and loss in ("rloo", "vespo"):
        options = "k2"
    for reduction in (None, "none", "sum"):
        problem = policy(loss=loss, options=options, reduction=reduction, entropy_coef=0.05)
        out, (t, entropy) = compare(problem)
        check("entropy", out.entropy, np.asarray(entropy), np.asarray(entropy))
        for name in METRICS:
            value = np.asarray(getattr(t, name))
            check(name, getattr(out, name), value, value)
            assert not getattr(out, name).requires_grad


def test_packed_sequences():
    """cu_seqlens: rows of all sequences in one dimension, as of a batch without its masked tokens."""
    for loss in ("ppo", "grpo", "gspo"):
        problem = policy(torch.float64, loss=loss, entropy_coef=0.1, shape=(2, 6))
        mask = problem.keep
        h, w, b = (x.clone().requires_grad_() for x in (problem.spoilt(), *problem[1:3]))
        want = problem.ours(h, w, b)
        want.loss.backward()
        calls = []
        original, ff.linear_policy_loss = (
            ff.linear_policy_loss,
            lambda *a, **k: calls.append((a, k)),
        )
        try:
            problem.ours(h, w, b)
        finally:
            ff.linear_policy_loss = original
        ((_, _, actions), kwargs) = calls[0]
        flat = {
            k: x[mask] if isinstance(x, torch.Tensor) and x.shape == mask.shape else x
            for k, x in kwargs.items()
        }
        flat |= {"mask": None, "bias": None}
        ends = torch.tensor([0, *mask.sum(-1).cumsum(0).tolist()])
        x, v, c = (t.detach().clone().requires_grad_() for t in (problem.hidden[mask], w, b))
        out = ff.linear_policy_loss(x, v, actions[mask], cu_seqlens=ends, **{**flat, "bias": c})
        out.loss.backward()
        for name, a, e in zip(out._fields, out, want, strict=True):
            check(f"{loss}: {name}", a, e, e)
        for name, a, e in zip(
            NAMES, (x.grad, v.grad, c.grad), (h.grad[mask], w.grad, b.grad), strict=True
        ):
            check(f"{loss}: d {name}", a, e, e)


@pytest.mark.parametrize("ref", ["logprobs", "own head", "same head", "none"])
@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_preference_losses(chunk, loss, ref):
    numbers = {"gamma": 0.8, "sft_weight": 0.7, "delta": 0.3, "tau": 0.4}
    eps = preference_cases.smoothing(loss, 0.05)
    for size, reduction in ((1000, "mean"), (11, "sum"), (2, "mean"), (1000, "none")):
        chunk(size)
        problem = preference(pairs=3, loss=loss, ref=ref, eps=eps, reduction=reduction, **numbers)
        if reduction == "none" and PREFERENCE_LOSSES[loss].nll:
            continue  # in plain torch below, a number of the whole batch
        out, t = compare(problem)
        for name in ("chosen_rewards", "rejected_rewards", "margins"):
            value = getattr(t, name)
            a, v = (np.append(np.ravel(array(x) if isinstance(x, torch.Tensor) else x), 20.0)
                    for x in (getattr(out, name), value))  # fmt: skip
            check(name, a, v, v, torch.float32)  # differences of sums of some 20 nats
            assert not getattr(out, name).requires_grad
        assert out.accuracy.item() == pytest.approx(t.accuracy)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sft", "simpo", "orpo", "kto"])
def test_ld_alpha(chunk, loss):
    """The weight of tokens past the shorter answer, in the policy's log-probabilities and the reference's."""
    for ld_alpha in (0.0, 0.3, 1.0):
        for ref in ("logprobs", "own head"):
            for size in (1000, 2):
                chunk(size)
                compare(
                    preference(
                        pairs=3, tokens=7, loss=loss, ref=ref, ld_alpha=ld_alpha, sft_weight=0.5
                    )
                )


def test_options_of_preference():
    """A mix of losses, weights of pairs, an NLL of the caller's, divergences: as from logits."""
    problem = preference(torch.float64, pairs=3)
    z = plain_logits(problem.hidden, problem.weight, problem.bias)
    _, targets, ref = preference_cases.batch(3, 5, 40, torch.float64, 0)
    ref = ref.double()
    for options in (
        {
            "loss": ["simpo", "bco_pair", "discopop", "sft"], "loss_weights": [1.0, 0.5, 2.0, 0.1],
            "pair_weights": torch.tensor([0.5, 2.0, 1.0]), "sft_weight": 0.7, "delta": 0.3, "tau": 0.4,
        },
        {"loss": "kto", "kl": torch.ones(2), "desirable_weight": 1.5, "reduction": "none"},
        {"f_divergence": "alpha", "alpha": 0.3, "label_smoothing": 0.1},
        {"f_divergence": "js"},
        {"loss": "orpo", "chosen_nll": torch.tensor(1.5)},
        {"normalize_lengths": True},
        {"loss": "sft", "normalize_lengths": False},
    ):  # fmt: skip
        want_z = z.clone().requires_grad_()
        want = ff.preference_loss_from_logits(
            want_z, targets, ref_logprobs=ref, beta=0.3, **options
        )
        want.loss.sum().backward()
        by = want_z.grad.reshape(-1, 40)
        (h, w, b) = (x.clone().requires_grad_() for x in (problem.spoilt(), *problem[1:3]))
        out = problem.ours(h, w, b, **options)
        out.loss.sum().backward()
        check("loss", out.loss, want.loss, want.loss)
        expected = (by @ w, by.t() @ problem.hidden.reshape(-1, 9), by.sum(0))
        for name, x, e in zip(NAMES, (h, w, b), expected, strict=True):
            check(f"d {name}", x.grad.reshape(e.shape), e, e)


def test_gradients_of_preference_s_other_arguments():
    """chosen_nll and ref_logprobs may have a gradient, as from logits; the reference's hidden states none."""
    problem = preference(torch.float64, pairs=2)
    _, targets, ref = preference_cases.batch(2, 5, 40, torch.float64, 0)
    results = []
    for linear in (False, True):
        r = ref.double().requires_grad_()
        nll = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        options = {"ref_logprobs": r, "chosen_nll": nll, "loss": "cpo", "sft_weight": 0.5}
        options = [options, {"ref_logprobs": r, "loss": "ipo", "beta": 0.3}]
        h = problem.hidden.clone().requires_grad_()
        for o in options:
            if linear:
                out = problem.ours(h, problem.weight, problem.bias, **o)
            else:
                out = ff.preference_loss_from_logits(
                    plain_logits(h, problem.weight, problem.bias), targets, **{"beta": 0.3, **o}
                )
            out.loss.backward()
        results.append((r.grad, nll.grad, h.grad))
    for name, a, e in zip(
        ("ref_logprobs", "chosen_nll", "hidden"), *reversed(results), strict=True
    ):
        check(f"d {name}", a, e, e)
    problem = preference(ref="own head")
    states = torch.randn(4, 5, 6, requires_grad=True)
    weight = torch.randn(40, 6, requires_grad=True)
    h = problem.hidden.clone().requires_grad_()
    problem.ours(
        h, problem.weight, None, ref_hidden=states, ref_weight=weight, ref_bias=None
    ).loss.backward()
    assert h.grad is not None
    assert states.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("kind", DISTILL_KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distillation(chunk, kind, reduction):
    chunk(4)
    for options in (
        {},
        {"temperature": 1.7, "beta": 0.3, "temperature_squared": True, "softcap": 4.0},
        {"alpha": 0.3, "targets": True, "mask": False},
        {"alpha": 0.6, "targets": True, "beta": 0.0, "teacher_softcap": 2.0, "temperature": 0.6},
        {"alpha": 0.0, "targets": True, "beta": 1.0},
    ):
        compare(distill(kind=kind, reduction=reduction, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extra", [(7, 0), (0, 5), (3, 8)], ids=str)
def test_vocab_size(dtype, extra):
    """Leading rows that both heads share: the gradient of the others is 0."""
    for kind in DISTILL_KINDS:
        problem = distill(dtype, extra=extra, kind=kind, alpha=0.5, targets=True, temperature=1.2)
        compare(problem)
        _, gradients, _ = differentiate(problem.ours, problem.hidden, *problem[1:3])
        assert gradients[1].shape == (40 + extra[0], 9)
        assert (gradients[1][40:] == 0).all()
        assert (gradients[2][40:] == 0).all()
        packed = ff.quantize(problem.weight.float(), blocksize=16)
        compare(problem, packed, ff.dequantize(packed, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_types_of_the_teacher(dtype, teacher_dtype):
    problem = distill(dtype, teacher_dtype=teacher_dtype, alpha=0.5, targets=True)
    out, _ = compare(problem)
    assert out.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_packed_teacher():
    case, other = make(12, 9, 40, ignore=False), make(12, 16, 40, ignore=False, seed=1)
    packed = ff.quantize(other.weight, double_quant=True)
    results = []
    for weight in (packed, ff.dequantize(packed, torch.float32)):
        h = case.hidden.clone().requires_grad_()
        loss = ff.linear_distill_loss(h, case.weight, other.hidden, weight)
        loss.backward()
        results.append((loss, h.grad))
    for a, b in zip(*results, strict=True):
        check("packed teacher", a, b, b)


@pytest.mark.parametrize("name", sorted(AT_ONCE))
def test_scalar_over_seeds(name):
    errors = ScalarErrors(name, torch.float32)
    for seed in range(32):
        problem = PROBLEMS[name](seed=seed)
        loss, _, terms, _ = problem.truth(problem.weight)
        eager = problem.plain(*problem[:3])
        errors.add(loss_of(problem.ours(*problem[:3])), eager, float(loss), terms)
    errors.check()


# ---- how much work, how much memory --------------------------------------------------------------


class Rows:
    """How many rows of logits were made, and how many at a time at most."""

    def __init__(self, patch):
        self.total = self.most = 0
        logits = _linear_loss.Head.logits

        def counting(head, x):
            self.total += len(x)
            self.most = max(self.most, len(x))
            return logits(head, x)

        patch.setattr(_linear_loss.Head, "logits", counting)


@pytest.mark.parametrize("name", PROBLEMS)
def test_work(monkeypatch, chunk, name):
    """Rows that count are multiplied once where the gradient is made in the forward, else twice."""
    chunk(8)
    problem = PROBLEMS[name]()
    rows = Rows(monkeypatch)
    counts = Counts(monkeypatch)
    loss = loss_of(problem.ours(*(x.requires_grad_() for x in (problem.spoilt(), *problem[1:3]))))
    beside = "distill" in name or "a reference" in name or "one head" in name
    n = int(problem.keep.sum())
    assert rows.total == n * (2 if beside else 1)
    assert (counts.weight > 0) == (name in AT_ONCE)
    loss.sum().backward()
    again = (2 if "distill" in name else 1) if name not in AT_ONCE else 0
    assert rows.total == n * ((2 if beside else 1) + again)
    assert counts.weight > 0
    assert rows.most <= 10
    rows.total = 0
    with torch.no_grad():
        problem.ours(problem.spoilt(), *problem[1:3])
    assert rows.total == n * (2 if beside else 1)


def test_pairs_that_are_too_long(monkeypatch, chunk):
    """A pair that is more than a quarter of the batch, and than a chunk: logits twice, a chunk at a time."""
    chunk(3)
    problem = preference(pairs=2, tokens=9)
    rows = Rows(monkeypatch)
    h = problem.spoilt().requires_grad_()
    loss = problem.ours(h, *problem[1:3]).loss
    assert rows.total == 2 * int(problem.keep.sum())
    assert rows.most <= 3
    loss.backward()
    assert rows.total == 2 * int(problem.keep.sum())
    compare(problem)


def test_pairs_in_chunks():
    """Each row that counts once, both halves of a pair in the same chunk, no chunk beyond the size."""
    g = torch.Generator().manual_seed(0)
    chunks = _linear_preference.pair_chunks
    for pairs, tokens, size in ((1, 1, 2), (5, 4, 8), (7, 3, 9), (6, 5, 30), (3, 2, 100)):
        keep = torch.rand(2 * pairs, tokens, generator=g) < 0.7
        keep[0] = False
        parts = chunks(keep, size, size)
        seen = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
        assert seen.sort()[0].tolist() == keep.reshape(-1).nonzero()[:, 0].tolist()
        chunk_of = torch.full((keep.numel(),), -1)
        for i, part in enumerate(parts):
            assert len(part) <= size
            chunk_of[part] = i
        for pair in range(pairs):
            both = chunk_of.view(2, pairs, tokens)[:, pair]
            assert len(set(both[both >= 0].tolist())) <= 1
    assert chunks(torch.ones(4, 5, dtype=torch.bool), 9, 9) is None
    assert [len(part) for part in chunks(torch.ones(8, 5, dtype=torch.bool), 9, 10)] == [10] * 4
    assert chunks(torch.zeros(4, 5, dtype=torch.bool), 9, 9) == []


def test_sizes_of_chunks_of_pairs(monkeypatch):
    """A quarter beyond other chunks on a CPU; a pair may have a quarter of all rows, up to 512 MB."""
    use_chunks(monkeypatch, 8)
    sizes = _linear_preference.chunk_sizes
    assert sizes(20, 40, torch.float32, True) == (10, 10)
    assert sizes(100, 40, torch.float32, True) == (10, 25)
    assert sizes(100, 40, torch.float32, False) == (8, 25)
    assert sizes(10**6, 1 << 20, torch.float32, True) == (10, 128)


# ---- rows that do not count ------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [math.nan, math.inf, 7.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_that_do_not_count_are_not_read(chunk, name, fill):
    """The same bits whatever stands there."""
    chunk(8)
    problem = PROBLEMS[name]()
    assert not problem.keep.all()
    want, want_gradients, _ = differentiate(problem.ours, problem.hidden, *problem[1:3])
    out, gradients, _ = differentiate(problem.ours, problem.spoilt(fill), *problem[1:3])
    assert torch.equal(loss_of(out), loss_of(want))
    for a, b in zip(gradients, want_gradients, strict=True):
        assert torch.equal(a, b)
    assert (gradients[0][~problem.keep] == 0).all()


def test_no_row_counts():
    """All masked or ignored, or no rows at all: 0, with zero gradients."""
    w, b = torch.randn(7, 4), torch.randn(7)
    nothing = torch.full((2, 3), IGNORE)
    wild = torch.full((2, 3, 4), math.nan)
    empty = torch.zeros(0, 3, 4), torch.zeros(0, 3, dtype=torch.long)

    def by_policy(h, y, w, b, **k):
        return ff.linear_policy_loss(
            h, w, y, advantages=torch.ones(len(h)), bias=b, entropy_coef=0.1, **k
        ).loss

    def by_preference(h, y, w, b, **k):
        return ff.linear_preference_loss(h, w, y, bias=b, loss="sft", **k).loss

    def by_distill(h, y, w, b, **k):
        return ff.linear_distill_loss(h, w, h, w, student_bias=b, targets=y, alpha=0.5, **k)

    for function in (by_policy, by_preference, by_distill):
        for h, y in ((wild, nothing), empty):
            for reduction in ("mean", "sum", "none"):
                leaves = [x.clone().requires_grad_() for x in (h, w, b)]
                loss = function(leaves[0], y, *leaves[1:], reduction=reduction)
                assert (loss == 0).all()
                loss.sum().backward()
                for x in leaves:
                    assert x.grad.shape == x.shape
                    assert (x.grad == 0).all()


# ---- what has no gradient, tied and packed weights -------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("name", PROBLEMS)
def test_frozen(monkeypatch, name, wanted):
    problem = PROBLEMS[name]()
    args = (problem.ours, problem.spoilt(), *problem[1:3])
    want, want_gradients, _ = differentiate(*args)
    counts = Counts(monkeypatch)
    out, gradients, _ = differentiate(*args, wanted)
    assert (counts.hidden > 0, counts.weight > 0) == wanted[:2]
    assert torch.equal(loss_of(out), loss_of(want))
    for a, b, w in zip(gradients, want_gradients, wanted, strict=True):
        assert (a is not None) == w
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_packed_weight(monkeypatch, name, dtype):
    """As the dense weight that it stands for, in panels that end inside."""
    monkeypatch.setattr(codebook, "PANEL_BYTES", 2048)
    problem = PROBLEMS[name](dtype, width=64, vocab=300)
    packed = ff.quantize(problem.weight.float(), "nf4", 64, double_quant=True, nested_blocksize=16)
    dense = ff.dequantize(packed, torch.float32)
    panels = []
    decode = codebook._decode
    monkeypatch.setattr(
        codebook, "_decode", lambda v, out: (panels.append(len(out)), decode(v, out))[1]
    )
    compare(problem, packed, dense)
    assert max(panels) == 16


@pytest.mark.parametrize("name", PROBLEMS)
def test_layouts(name):
    """A slice of longer hidden states; a transposed weight, and a slice of a larger one."""
    problem = PROBLEMS[name]()
    eager, eager_gradients = plainly(problem)
    b, t, width = problem.hidden.shape
    longer = torch.full((b, t + 1, width), math.nan)
    longer[:, :-1] = problem.spoilt()
    turned = problem.weight.t().contiguous().t()
    larger = torch.full((50, 31), math.nan)
    larger[3:43, 5 : 5 + width] = problem.weight
    for weight in (turned, larger[3:43, 5 : 5 + width]):
        h, w = longer[:, :-1].detach().requires_grad_(), weight.detach().requires_grad_()
        c = problem.bias.clone().requires_grad_()
        loss = loss_of(problem.ours(h, w, c))
        up = upstream_of(loss)
        (loss if up is None else (loss * up).sum()).backward()
        value, truth, terms, _ = problem.truth(problem.weight, array(up))
        check_loss(loss.detach(), eager, value, terms)
        for of, x, e, want in zip(NAMES, (h, w, c), eager_gradients, truth, strict=True):
            check(f"d {of}", x.grad.reshape(want.shape), e, want)


def test_tied_weight():
    """The weight is that of the embedding below: both parts add up."""
    for name in ("policy", "preference", "distill"):
        problem = PROBLEMS[name]()
        tokens = torch.arange(problem.keep.numel()).view(problem.keep.shape) % 40
        results = []
        for function in (problem.ours, problem.plain):
            weight = torch.nn.Parameter(problem.weight.clone())
            loss = loss_of(
                function(torch.nn.functional.embedding(tokens, weight), weight, problem.bias)
            )
            loss.backward()
            results.append(weight.grad)
        double = [problem.weight.double().requires_grad_(), problem.bias.double()]
        hidden = torch.nn.functional.embedding(tokens, double[0])
        truth = _double(problem, hidden, *double)
        truth.backward()
        check(f"{name}: d weight", *results, double[0].grad)


def _double(problem, hidden, weight, bias):
    """The plain formula in float64: plain torch's own derivative is the truth of what has two parts."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return problem.plain(hidden, weight, bias).double()
    finally:
        torch.set_default_dtype(default)


# ---- chunks and threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_size_of_chunks(chunk, size, dtype):
    for name in PROBLEMS:
        counts = chunk(size)
        compare(PROBLEMS[name](dtype))
        assert counts, name


@pytest.mark.parametrize("name", PROBLEMS)
def test_threads(monkeypatch, chunk, name):
    """Products on one thread, all else on any number: the same bits."""
    chunk(30)
    for product in ("linear", "add_outer"):
        monkeypatch.setattr(_linear_loss, product, on_one_thread(getattr(_linear_loss, product)))
    size = {"pairs": 6, "tokens": 9} if "preference" in name else {"shape": (6, 13)}
    problem = PROBLEMS[name](vocab=300, **size)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out, gradients, _ = differentiate(problem.ours, problem.spoilt(), *problem[1:3])
        results.append([loss_of(out).detach(), *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- random inputs -----------------------------------------------------------------------------------


# Not float32, whose digits of log-probabilities are more than the tolerance where ratios near 1 are taken of
# them: there products that are nearer are luck. float64 has the slack, 16 bits ours' wider products.
@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(PROBLEMS)),
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.float16]),
    width=st.integers(1, 20),
    vocab=st.integers(2, 60),
    bias=st.booleans(),
    size=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
def test_random(name, dtype, width, vocab, bias, size, seed):
    with pytest.MonkeyPatch.context() as patch:
        use_chunks(patch, size)
        compare(PROBLEMS[name](dtype, width=width, vocab=vocab, bias=bias, seed=seed), cancels=True)


def test_a_reference_on_meta():
    """Shapes alone, where autocast has no type to ask for."""
    hidden, weight = torch.empty(4, 5, 8, device="meta"), torch.empty(20, 8, device="meta")
    targets = torch.empty(4, 5, dtype=torch.int64, device="meta")
    out = ff.linear_preference_loss(hidden, weight, targets, ref_hidden=hidden)
    assert out.loss.shape == ()
    assert out.margins.shape == (2,)
