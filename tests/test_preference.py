"""Preference losses against float64: from log-probabilities and from logits."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args import PREFERENCE_LOSSES as LOSSES
from finefuse.reference import logprobs as reference_logprobs
from finefuse.reference import preference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ScalarErrors, check

RAW = torch.ops.finefuse
IGNORE = -100
F = torch.nn.functional


def eager_loss(loss, w, l, beta, eps):
    """Per pair, as TRL writes it; w and l are log-ratios, divided by length where wanted."""
    x = beta * (w - l)
    if loss == "sigmoid":
        return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)
    if loss == "ipo":
        return (w - l - 1 / (2 * beta)) ** 2
    return torch.relu(1 - x)


def eager(
    chosen, rejected, ref_chosen, ref_rejected, *, loss, beta, eps, n_w=1, n_l=1, reduction="mean"
):
    value = eager_loss(
        loss, (chosen - ref_chosen) / n_w, (rejected - ref_rejected) / n_l, beta, eps
    )
    return value if reduction == "none" else getattr(value, reduction)()


def vectors(pairs, dtype=torch.float32, seed=0, scale=30.0):
    g = torch.Generator().manual_seed(seed)
    lp = [(-torch.rand(pairs, generator=g) * scale).to(dtype) for _ in range(4)]
    lengths = [torch.randint(1, 50, (pairs,), generator=g) for _ in range(2)]
    return lp, lengths


def test_every_loss_has_a_reference():
    for name in LOSSES:
        reference.pair_loss(name, np.ones(1), np.zeros(1), 0.1, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pairs", [1, 2, 7, 1024])
def test_values_and_gradients(isa, loss, pairs, dtype):
    for beta, eps, with_ref, reduction in (
        (0.1, 0.0, True, "mean"), (0.5, 0.1, True, "sum"), (2.0, 0.3, False, "none"),
    ):  # fmt: skip
        lp, (n_w, n_l) = vectors(pairs, dtype)
        refs = lp[2:] if with_ref else [None, None]
        normalized = loss == "ipo"
        kwargs = {"chosen_lengths": n_w, "rejected_lengths": n_l} if normalized else {}
        ours = [x.clone().requires_grad_() for x in lp[:2]]
        out = ff.preference_loss(
            *ours, *refs, loss=loss, beta=beta, label_smoothing=eps, reduction=reduction, **kwargs
        )
        out.loss.sum().backward()
        theirs = [x.clone().requires_grad_() for x in lp[:2]]
        zero = torch.zeros(pairs, dtype=dtype)
        e = eager(
            *theirs, *(lp[2:] if with_ref else (zero, zero)), loss=loss, beta=beta, eps=eps,
            n_w=n_w if normalized else 1, n_l=n_l if normalized else 1, reduction=reduction,
        )  # fmt: skip
        e.sum().backward()
        t = reference.preference_loss(
            *(x.double().numpy() for x in lp[:2]),
            *((x.double().numpy() for x in lp[2:]) if with_ref else ()),
            loss=loss, beta=beta, label_smoothing=eps, reduction=reduction,
            **{k: v.double().numpy() for k, v in kwargs.items()},
        )  # fmt: skip
        check("loss", out.loss, e, t.loss)
        check("d chosen", ours[0].grad, theirs[0].grad, t.d_chosen)
        check("d rejected", ours[1].grad, theirs[1].grad, t.d_rejected)
        for name in ("chosen_rewards", "rejected_rewards", "margins"):
            check(name, getattr(out, name), getattr(t, name), getattr(t, name))
        assert out.accuracy.item() == pytest.approx(t.accuracy)
        assert not any(x.requires_grad for x in out[1:])


@pytest.mark.parametrize("loss", LOSSES)
def test_scalar_over_seeds(loss):
    errors = ScalarErrors(loss, torch.float32)
    for seed in range(40):
        lp, _ = vectors(16, seed=seed)
        ours = ff.preference_loss(*lp, loss=loss, normalize_lengths=False).loss
        e = eager(*lp, loss=loss, beta=0.1, eps=0.0)
        t = reference.preference_loss(*(x.double().numpy() for x in lp), loss=loss, beta=0.1)
        errors.add(ours, e, t.loss, t.loss)
    errors.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_and_mixed_types(dtype):
    """16-bit log-probabilities are widened exactly; one float64 makes it all float64."""
    lp, (n_w, n_l) = vectors(9, dtype)
    wide = [x.float() for x in lp]
    a = ff.preference_loss(*lp, loss="ipo", chosen_lengths=n_w, rejected_lengths=n_l.float())
    b = ff.preference_loss(*wide, loss="ipo", chosen_lengths=n_w, rejected_lengths=n_l)
    assert a.loss.dtype is torch.float32
    assert torch.equal(a.loss, b.loss)
    x = lp[0].clone().requires_grad_()
    mixed = ff.preference_loss(x, wide[1], wide[2].double(), wide[3]).loss
    assert mixed.dtype is torch.float64
    mixed.backward()
    assert x.grad.dtype is dtype


def test_any_shape():
    lp, _ = vectors(6)
    flat = ff.preference_loss(*lp, reduction="none")
    shaped = [v.view(2, 3).t() for v in lp]
    out = ff.preference_loss(*shaped, reduction="none")
    assert torch.equal(out.loss, flat.loss.view(2, 3).t())
    assert torch.equal(out.margins, flat.margins.view(2, 3).t())
    x = shaped[0].clone().requires_grad_()
    ff.preference_loss(x, *shaped[1:], reduction="none").loss.sum().backward()
    y = lp[0].clone().requires_grad_()
    ff.preference_loss(y, *lp[1:], reduction="none").loss.sum().backward()
    assert torch.equal(x.grad, y.grad.view(2, 3).t())


def test_gradient_of_the_reference():
    lp, _ = vectors(5, torch.float64)
    x = [v.clone().requires_grad_() for v in lp]
    ff.preference_loss(*x).loss.backward()
    assert torch.equal(x[2].grad, -x[0].grad)
    assert torch.equal(x[3].grad, -x[1].grad)


def test_extremes():
    inf = float("inf")
    big = torch.tensor([1e30, -1e30, 0.0, -inf, 3.0])
    zero = torch.zeros(5)
    out = ff.preference_loss(big, zero, reduction="none")
    assert out.loss[0] == 0
    assert out.loss[1] == pytest.approx(1e29)
    assert out.loss[2] == pytest.approx(np.log(2))
    assert out.loss[3] == inf
    assert (
        ff.preference_loss(zero, -torch.full((5,), inf), reduction="none").loss.tolist() == [0] * 5
    )
    nan = torch.full((1,), float("nan"))
    for loss in LOSSES:
        assert torch.isnan(
            ff.preference_loss(nan, zero[:1], loss=loss, normalize_lengths=False).loss
        )
    empty = torch.zeros(0, requires_grad=True)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        out = ff.preference_loss(empty, empty, reduction=reduction)
        assert out.loss.shape == shape
        assert out.loss.sum() == 0
        assert out.accuracy == 0
        out.loss.sum().backward()
    # strided vectors
    lp, _ = vectors(8)
    a = ff.preference_loss(lp[0][::2], lp[1][::2], lp[2][::2], lp[3][::2])
    b = ff.preference_loss(*(x[::2].contiguous() for x in lp))
    assert torch.equal(a.loss, b.loss)


def test_lengths():
    lp, (n_w, n_l) = vectors(6)
    plain = ff.preference_loss(*lp, loss="ipo", normalize_lengths=False)
    ones = torch.ones(6)
    assert torch.equal(
        plain.loss,
        ff.preference_loss(*lp, loss="ipo", chosen_lengths=ones, rejected_lengths=ones).loss,
    )
    # lengths are of no consequence to a loss that does not divide by them, unless it is told to
    a = ff.preference_loss(*lp, chosen_lengths=n_w, rejected_lengths=n_l).loss
    assert torch.equal(a, ff.preference_loss(*lp).loss)
    b = ff.preference_loss(
        *lp, chosen_lengths=n_w, rejected_lengths=n_l, normalize_lengths=True
    ).loss
    t = reference.preference_loss(
        *(x.double().numpy() for x in lp), chosen_lengths=n_w.numpy(), rejected_lengths=n_l.numpy()
    )
    check("normalized", b, t.loss, t.loss)


# ---- from logits -------------------------------------------------------------------------------


def batch(pairs, tokens, vocab, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2 * pairs, tokens, vocab, generator=g) * 2).to(dtype)
    targets = torch.randint(0, vocab, (2 * pairs, tokens), generator=g)
    for b in range(2 * pairs):
        targets[b, : b % 3] = IGNORE  # prompts of different lengths
        if b % 2:
            targets[b, tokens - 1 - b % 2 :] = IGNORE  # padding
    ref = -torch.rand(2 * pairs, generator=g) * 10
    return logits, targets, ref


def eager_from_logits(logits, targets, ref, loss, beta, eps):
    keep = targets != IGNORE
    lp = torch.log_softmax(logits, -1).gather(-1, torch.where(keep, targets, 0)[..., None])[..., 0]
    s = torch.where(keep, lp, 0).sum(-1)
    n = keep.sum(-1).clamp(min=1) if loss == "ipo" else torch.ones(len(s))
    half = len(s) // 2
    return eager(
        s[:half], s[half:], ref[:half], ref[half:], loss=loss, beta=beta, eps=eps,
        n_w=n[:half], n_l=n[half:],
    )  # fmt: skip


def truth_from_logits(logits, targets, ref, loss, beta, eps):
    b, t, v = logits.shape
    flat, y = logits.double().reshape(-1, v).numpy(), targets.reshape(-1).numpy()
    lp, _, _ = reference_logprobs.token_logprobs(flat, y)
    s, n = lp.reshape(b, t).sum(-1), (y != IGNORE).reshape(b, t).sum(-1)
    if loss != "ipo":
        n = np.ones(b)
    r = ref.double().numpy()
    h = b // 2
    out = reference.preference_loss(
        s[:h], s[h:], r[:h], r[h:], loss=loss, beta=beta, label_smoothing=eps,
        chosen_lengths=n[:h], rejected_lengths=n[h:],
    )  # fmt: skip
    g = np.repeat(np.concatenate([out.d_chosen, out.d_rejected]), t)
    return out, reference_logprobs.token_logprobs_gradient(flat, y, g).reshape(b, t, v)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 5, 257), (3, 7, 3001)], ids=str)
def test_from_logits(isa, loss, dtype, shape):
    logits, targets, ref = batch(*shape, dtype)
    beta, eps = 0.1, 0.05
    results = []
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        out = ff.preference_loss_from_logits(
            x, targets, ref_logprobs=ref, loss=loss, beta=beta, label_smoothing=eps, inplace=inplace
        )
        out.loss.backward()
        results.append((out, x.grad))
        assert (x.grad.data_ptr() == x.data_ptr()) is inplace
    y = logits.clone().requires_grad_()
    e = eager_from_logits(y, targets, ref.to(dtype), loss, beta, eps)
    e.backward()
    t, dz = truth_from_logits(logits, targets, ref, loss, beta, eps)
    (out, grad), (out2, grad2) = results
    check("loss", out.loss, e, t.loss)
    check("gradient", grad, y.grad, dz)
    assert torch.equal(grad, grad2)
    assert torch.equal(out.loss, out2.loss)
    assert out.accuracy.item() == pytest.approx(t.accuracy)


def test_reference_logits_and_none():
    logits, targets, _ = batch(2, 5, 33, torch.float32)
    ref_logits = torch.randn_like(logits)
    s = ff.sequence_logprobs(ff.token_logprobs(ref_logits, targets))
    a = ff.preference_loss_from_logits(logits, targets, ref_logits=ref_logits.requires_grad_())
    b = ff.preference_loss_from_logits(logits, targets, ref_logprobs=s)
    assert torch.equal(a.loss, b.loss)
    assert not a.loss.requires_grad
    free = ff.preference_loss_from_logits(logits, targets)
    zero = ff.preference_loss_from_logits(logits, targets, ref_logprobs=torch.zeros(4))
    assert torch.equal(free.loss, zero.loss)
    empty = ff.preference_loss_from_logits(torch.zeros(0, 5, 33), targets[:0])
    assert empty.loss == 0


def test_prompt_logits_are_not_read():
    logits, targets, ref = batch(2, 6, 19, torch.float32)
    logits[targets == IGNORE] = float("nan")
    x = logits.requires_grad_()
    out = ff.preference_loss_from_logits(x, targets, ref_logprobs=ref)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert (x.grad[targets == IGNORE] == 0).all()
    assert torch.isfinite(x.grad).all()


# ---- autograd, compile, torch's own checks -----------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    lp, (n_w, n_l) = vectors(4, torch.float64, scale=3.0)
    x = [v.requires_grad_() for v in lp]

    def f(*v):
        return ff.preference_loss(
            *v, loss=loss, beta=0.7, label_smoothing=0.1, chosen_lengths=n_w, rejected_lengths=n_l
        ).loss

    assert torch.autograd.gradcheck(f, x)
    logits, targets, ref = batch(1, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: ff.preference_loss_from_logits(z, targets, ref_logprobs=ref, loss=loss).loss,
        (logits.requires_grad_(),),
    )


def test_opcheck():
    lp, (n_w, n_l) = vectors(4)
    t, z = torch.tensor(0.1), torch.tensor(0.0)
    torch.library.opcheck(RAW.preference_forward.default, (*lp, None, None, 0.1, 0.0, 0, 2))
    torch.library.opcheck(
        RAW.preference_forward.default,
        (lp[0], lp[1], None, None, n_w.float(), n_l.float(), 0.1, 0.0, 1, 0),
    )
    torch.library.opcheck(RAW.preference_forward.tensor, (*lp, None, None, t, z, 2, 1))
    x = [v.clone().requires_grad_() for v in lp[:2]]
    torch.library.opcheck(RAW.preference_loss.default, (*x, *lp[2:]))
    logits, targets, ref = batch(2, 3, 11, torch.float32)
    torch.library.opcheck(
        RAW.preference_loss_from_logits.default,
        (logits.requires_grad_(), targets),
        {"ref_logprobs": ref},
    )


def test_backward_through_the_raw_op_raises():
    lp, _ = vectors(3)
    x = lp[0].requires_grad_()
    out = RAW.preference_forward(x, *lp[1:], None, None, 0.1, 0.0, 0, 2)
    with pytest.raises(RuntimeError, match="preference_forward is a raw op"):
        out[0].backward()
    x.grad = None
    (g,) = torch.autograd.grad(ff.preference_loss(x, *lp[1:]).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.functional.hessian(
            lambda v: ff.preference_loss(v, *lp[1:]).loss, lp[0].detach()
        )


def test_compile(counter):
    logits, targets, ref = batch(2, 4, 21, torch.float32)

    def step(x, beta):
        return ff.preference_loss_from_logits(
            x, targets, ref_logprobs=ref, beta=beta, label_smoothing=beta / 2
        ).loss

    compiled = torch.compile(step, fullgraph=True)
    counted = torch.compile(step, backend=counter, fullgraph=True)
    for i in range(12):
        beta = 0.05 + 0.01 * i
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = compiled(x, beta), step(y, beta)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x.grad, y.grad)
        counted(x, beta)
    assert 1 <= counter.graphs <= 2


def test_autocast():
    layer = torch.nn.Linear(8, 33)
    x = torch.randn(4, 5, 8)
    targets = torch.randint(0, 33, (4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        out = ff.preference_loss_from_logits(layer(x), targets)
    assert out.loss.dtype is torch.float32
    out.loss.backward()
    assert layer.weight.grad is not None


# ---- wrong arguments ---------------------------------------------------------------------------


def test_wrong_arguments():
    lp, (n_w, _) = vectors(3)
    a, b = lp[:2]
    with pytest.raises(ValueError, match="loss: 'dpo'; allowed: 'sigmoid', 'ipo', 'hinge'"):
        ff.preference_loss(a, b, loss="dpo")
    with pytest.raises(ValueError, match="give both or neither"):
        ff.preference_loss(a, b, a)
    with pytest.raises(ValueError, match="divides by the completions' lengths"):
        ff.preference_loss(a, b, loss="ipo")
    with pytest.raises(ValueError, match="divides by the completions' lengths"):
        ff.preference_loss(a, b, loss="ipo", chosen_lengths=n_w)
    with pytest.raises(ValueError, match="rejected_lengths: element 1 is -2.0"):
        ff.preference_loss(
            a, b, loss="ipo", chosen_lengths=n_w, rejected_lengths=torch.tensor([1, -2, 3])
        )
    with pytest.raises(ValueError, match=r"rejected: shape \(2,\); chosen has \(3,\)"):
        ff.preference_loss(a, b[:2])
    for pair, name in (((a, None), "rejected"), ((None, b), "chosen")):
        with pytest.raises(TypeError, match=f"{name}: a tensor, not None"):
            ff.preference_loss(*pair)
    with pytest.raises(TypeError, match="rejected: a tensor, not None"):
        RAW.preference_forward(a, None, None, None, None, None, 0.1, 0.0, 0, 2)
    with pytest.raises(TypeError, match="rejected: a tensor, not list"):
        ff.preference_loss(a, [1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="chosen: dtype torch.int64"):
        ff.preference_loss(a.long(), b)
    with pytest.raises(ValueError, match="rejected: on meta; chosen is on cpu"):
        ff.preference_loss(a, b.to("meta"))
    for beta in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta: .*positive and finite"):
            ff.preference_loss(a, b, beta=beta)
        with pytest.raises(ValueError, match="beta: .*positive and finite"):
            ff.preference_loss(a, b, beta=torch.tensor(beta))
    for eps in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing"):
            ff.preference_loss(a, b, label_smoothing=eps)
    with pytest.raises(ValueError, match="reduction: 'avg'"):
        ff.preference_loss(a, b, reduction="avg")
    logits, targets, ref = batch(2, 3, 7, torch.float32)
    f = ff.preference_loss_from_logits
    with pytest.raises(ValueError, match="pairs: 'interleaved'; allowed: 'halves'"):
        f(logits, targets, pairs="interleaved")
    with pytest.raises(ValueError, match=r"logits: shape \(3, 3, 7\); allowed: \(2·pairs, T, V\)"):
        f(logits[:3], targets[:3])
    with pytest.raises(ValueError, match="give one of the two"):
        f(logits, targets, ref_logprobs=ref, ref_logits=logits)
    with pytest.raises(ValueError, match=r"ref_logprobs: shape \(2,\); allowed: \(4,\)"):
        f(logits, targets, ref_logprobs=ref[:2])
    with pytest.raises(ValueError, match="ref_logits: shape"):
        f(logits, targets, ref_logits=logits[:2])
    with pytest.raises(TypeError, match="ref_logprobs: a tensor, not list"):
        f(logits, targets, ref_logprobs=[0.0] * 4)
    with pytest.raises(TypeError, match="ref_logprobs: dtype torch.int64"):
        f(logits, targets, ref_logprobs=ref.long())
    with pytest.raises(ValueError, match="targets: element 0 is 7"):
        f(logits, targets.clone().fill_(7))
    with pytest.raises(TypeError, match="logits: a tensor"):
        f(None, targets)


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.integers(0, 9),
    loss=st.sampled_from(sorted(LOSSES)),
    beta=st.floats(1e-3, 10),
    eps=st.floats(0, 0.49),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_random(pairs, loss, beta, eps, scale, seed):
    lp, _ = vectors(pairs, seed=seed, scale=scale)
    x = [v.clone().requires_grad_() for v in lp[:2]]
    out = ff.preference_loss(
        *x,
        *lp[2:],
        loss=loss,
        beta=beta,
        label_smoothing=eps,
        normalize_lengths=False,
        reduction="none",
    )
    out.loss.sum().backward()
    t = reference.preference_loss(
        *(v.double().numpy() for v in lp),
        loss=loss,
        beta=beta,
        label_smoothing=eps,
        reduction="none",
    )
    check("loss", out.loss, t.loss, t.loss)
    check("d chosen", x[0].grad, t.d_chosen, t.d_chosen)
    check("d rejected", x[1].grad, t.d_rejected, t.d_rejected)
