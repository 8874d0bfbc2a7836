"""Policy-gradient losses from logits against float64."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args.policy import POLICY_LOSSES as LOSSES
from guards import between_guards
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import (
    IGNORE,
    METRICS,
    OPTIONS,
    arguments,
    batch,
    check_scalar,
    close,
    eager_from_logits,
    ours,
    ours_from_logits,
    run,
    truth_from_logits,
    vectors,
)
from tolerances import check


def run_logits(function, logits, actions, advantages, kwargs):
    x = logits.clone().requires_grad_()
    out = function(x, actions, advantages, **kwargs)
    getattr(out, "loss", out).sum().backward()
    return out, x


# 1, 2: no vocabulary to speak of; 257, 3001: no multiple of a vector
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (3, 5, 257), (2, 4, 3001)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_from_logits(isa, shape, dtype):
    logits, actions, v = batch(*shape, dtype)
    for loss, options in (("ppo", "plain"), ("grpo", "kl"), ("gspo", "k2")):
        kwargs = {
            "loss": loss, "entropy_coef": 0.02, "temperature": 0.8, **arguments(v, OPTIONS[options]),
        }  # fmt: skip
        e, theirs = run_logits(eager_from_logits, logits, actions, v.advantages, kwargs)
        loss_t, dz, entropy, t = truth_from_logits(logits, actions, v.advantages, **kwargs)
        for inplace in (False, True):
            out, x = run_logits(
                ours_from_logits, logits, actions, v.advantages, {**kwargs, "inplace": inplace}
            )
            check_scalar(f"loss {loss}", out.loss, e, loss_t, t.terms)
            check(f"gradient {loss}", x.grad, theirs.grad, dz)
            check("entropy", out.entropy, entropy, entropy)
            for name in METRICS:
                check(name, getattr(out, name), getattr(t, name), getattr(t, name))
            assert (x.grad.data_ptr() == x.data_ptr()) is inplace
            assert (x.grad[~v.mask] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_from_logits(loss, options):
    given_options = OPTIONS[options]
    if "importance" in given_options and loss in ("rloo", "vespo"):
        given_options = {k: v for k, v in given_options.items() if k != "importance"}
    logits, actions, v = batch(3, 5, 130)
    if given_options.get("by_token"):
        v.advantages = torch.randn(3, 5)
    for reduction in (None, "none", "sum"):
        kwargs = {
            "loss": loss, "reduction": reduction, "entropy_coef": 0.01,
            **arguments(v, given_options),
        }  # fmt: skip
        out, x = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
        e, theirs = run_logits(eager_from_logits, logits, actions, v.advantages, kwargs)
        loss_t, dz, _, t = truth_from_logits(logits, actions, v.advantages, **kwargs)
        check_scalar(f"loss {reduction}", out.loss, e, loss_t, t.terms)
        check(f"gradient {reduction}", x.grad, theirs.grad, dz)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_and_two_agree(loss):
    """The gradient made in the forward, and made by the backward (under saved-tensor hooks, at a
    second backward), and no gradient wanted: the same numbers."""
    logits, actions, v = batch(3, 7, 500)
    kwargs = {"loss": loss, "entropy_coef": 0.1, **arguments(v, OPTIONS["kl"])}
    out, x = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        two, y = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    torch.testing.assert_close(out.loss, two.loss)
    close(x.grad, y.grad)
    with torch.no_grad():
        none = ours_from_logits(logits, actions, v.advantages, **kwargs)
    for a, b, c in zip(out, two, none, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(b, c)
    z = logits.clone().requires_grad_()
    value = ours_from_logits(z, actions, v.advantages, **kwargs).loss
    for factor in (1.0, 3.0):
        z.grad = None
        (factor * value).backward(retain_graph=True)
        close(z.grad, factor * x.grad)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_from_logits(loss):
    logits, actions, v = batch(2, 3, 5, torch.float64)
    kwargs = {"loss": loss, "entropy_coef": 0.3, "temperature": 1.3, **arguments(v, OPTIONS["kl"])}
    if loss in ("cispo", "vespo"):  # their stop-gradient is no derivative
        _, x = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
        _, dz, _, _ = truth_from_logits(logits, actions, v.advantages, **kwargs)
        check("gradient", x.grad, dz, dz)
        return
    assert torch.autograd.gradcheck(
        lambda z: ours_from_logits(z, actions, v.advantages, **kwargs).loss,
        (logits.clone().requires_grad_(),),
    )


@settings(max_examples=40, deadline=None)
@given(
    loss=st.sampled_from(list(LOSSES)), sequences=st.integers(1, 3), tokens=st.integers(1, 4),
    vocab=st.integers(2, 600), seed=st.integers(0, 2**31), spread=st.floats(0.01, 8.0),
    temperature=st.floats(0.3, 3.0),
)  # fmt: skip
def test_policy_gradient_sums_to_zero(loss, sequences, tokens, vocab, seed, spread, temperature):
    """Over the vocabulary: adding a number to a row of logits changes no probability."""
    logits, actions, v = batch(sequences, tokens, vocab, torch.float64, seed, spread)
    kwargs = {
        "loss": loss, "entropy_coef": 0.1, "temperature": temperature, **arguments(v, OPTIONS["kl"]),
    }  # fmt: skip
    _, x = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    rows = x.grad.sum(-1).abs()
    assert (rows <= 1e-13 * x.grad.abs().sum(-1).clamp(min=1e-30)).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_minus_infinity(loss):
    """-inf logits: probability 0, a finite loss, entropy and gradient; as the action as documented."""
    logits, actions, v = batch(2, 4, 40)
    logits[..., 20:] = -math.inf
    actions = actions % 20
    v.mask[:] = True
    v.old, v.ref = (
        torch.log_softmax(logits, -1).gather(-1, actions[..., None])[..., 0] for _ in range(2)
    )
    kwargs = {"loss": loss, "entropy_coef": 0.1, **arguments(v, OPTIONS["kl"])}
    out, x = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    loss_t, dz, entropy, t = truth_from_logits(logits, actions, v.advantages, **kwargs)
    assert torch.isfinite(out.loss)
    assert torch.isfinite(x.grad).all()
    assert (x.grad[..., 20:] == 0).all()
    check_scalar("loss", out.loss, loss_t, loss_t, t.terms)
    check("gradient", x.grad, dz, dz)
    check("entropy", out.entropy, entropy, entropy)


def test_action_of_probability_0():
    """lp = -inf: the ratio is e^-60, its gradient 0; NaN stays in its own row."""
    logits, actions, v = batch(2, 3, 9)
    v.mask[:] = True
    logits[0, 0, actions[0, 0]] = -math.inf
    out, x = run_logits(
        ours_from_logits, logits, actions, torch.ones(2), {"old_logprobs": v.old, "mask": v.mask}
    )
    assert torch.isfinite(out.loss)
    assert torch.isfinite(x.grad).all()
    assert (x.grad[0, 0] == 0).all()
    logits[0, 0] = math.nan
    out, x = run_logits(
        ours_from_logits, logits, actions, torch.ones(2), {"old_logprobs": v.old, "mask": v.mask}
    )
    assert torch.isnan(out.loss)
    assert torch.isnan(x.grad[0, 0]).all()
    assert torch.isfinite(x.grad[0, 1:]).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_logits_are_not_read(loss):
    logits, actions, v = batch(3, 5, 60)
    kwargs = {"loss": loss, "entropy_coef": 0.1, **arguments(v, OPTIONS["kl"])}
    want, clean = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    logits[~v.mask] = math.nan
    wild = actions.masked_fill(~v.mask, 10**12)  # nor are masked actions
    out, x = run_logits(ours_from_logits, logits, wild, v.advantages, kwargs)
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(x.grad, clean.grad)
    ignored = actions.masked_fill(~v.mask, IGNORE)
    without = {k: x for k, x in kwargs.items() if k != "mask"}
    out, x = run_logits(ours_from_logits, logits, ignored, v.advantages, without)
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(x.grad, clean.grad)
    nothing = {**kwargs, "mask": torch.zeros_like(v.mask)}
    out, x = run_logits(ours_from_logits, logits, actions, v.advantages, nothing)
    assert out.loss == 0
    assert out.entropy == 0
    assert (x.grad == 0).all()
    for shape in ((0, 5, 7), (2, 0, 7)):
        z = torch.zeros(shape, requires_grad=True)
        out = ff.policy_loss_from_logits(
            z, torch.zeros(shape[:2], dtype=torch.long), advantages=torch.ones(shape[0]), loss=loss
        )
        out.loss.backward()
        assert out.loss == 0
        assert z.grad.shape == shape


@pytest.mark.parametrize("loss", ["ppo", "grpo", "gspo"])
def test_packed_logits(loss):
    logits, actions, v = batch(3, 6, 50)
    v.mask = torch.arange(6)[None] < torch.tensor([4, 0, 6])[:, None]
    kwargs = {"loss": loss, "entropy_coef": 0.1, **arguments(v, OPTIONS["kl"])}
    want, x = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    flat = {
        k: x[v.mask] if isinstance(x, torch.Tensor) else x for k, x in kwargs.items() if k != "mask"
    }
    flat["cu_seqlens"] = torch.tensor([0, 4, 4, 10])
    out, y = run_logits(ours_from_logits, logits[v.mask], actions[v.mask], v.advantages, flat)
    torch.testing.assert_close(out.loss, want.loss)
    assert torch.equal(y.grad, x.grad[v.mask])


def test_strides_slices_and_in_place():
    logits, actions, v = batch(3, 6, 257)
    v.mask[:] = True
    kwargs = arguments(v, {})
    want, x = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    longer = torch.cat([logits, torch.full((3, 1, 257), math.nan)], 1).requires_grad_()
    out = ours_from_logits(longer[:, :-1], actions, v.advantages, **kwargs)
    out.loss.backward()
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(longer.grad[:, :-1], x.grad)
    turned = logits.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    ours_from_logits(turned, actions, v.advantages, **kwargs).loss.backward()
    assert torch.equal(turned.grad, x.grad)
    spent = logits.clone().requires_grad_()
    value = ours_from_logits(spent, actions, v.advantages, inplace=True, **kwargs).loss
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed|modified by an inplace"):
        value.backward()
    saved = logits.clone().requires_grad_()
    other = saved.exp() * saved
    ours_from_logits(saved, actions, v.advantages, inplace=True, **kwargs)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        other.sum().backward()


def test_upstream_is_applied_once():
    logits, actions, v = batch(2, 4, 100)
    kwargs = arguments(v, {})
    _, x = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    for factor in (0.5, 0.0):
        y = logits.clone().requires_grad_()
        (factor * ours_from_logits(y, actions, v.advantages, **kwargs).loss).backward()
        torch.testing.assert_close(y.grad, factor * x.grad)
    y = logits.clone()
    y[~v.mask] = math.inf
    y.requires_grad_()
    (ours_from_logits(y, actions, v.advantages, **kwargs).loss * math.inf).backward()
    assert (y.grad[~v.mask] == 0).all()


def test_long_rows():
    """262144 classes, in one row and in a slice that begins anywhere."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 2, 262144, generator=g) * 3
    actions = torch.tensor([[0, 262143], [131072, 7]])
    v = vectors(2, 2)
    lp = torch.log_softmax(logits.double(), -1).gather(-1, actions[..., None])[..., 0]
    kwargs = {"entropy_coef": 0.01, "old_logprobs": lp + 0.1, "mask": torch.ones(2, 2).bool()}
    for dtype in (torch.float32, torch.bfloat16):
        z = logits.to(dtype)
        out, x = run_logits(ours_from_logits, z, actions, v.advantages, kwargs)
        e, y = run_logits(eager_from_logits, z, actions, v.advantages, {**kwargs, "loss": "ppo"})
        loss_t, dz, entropy, t = truth_from_logits(z, actions, v.advantages, **kwargs)
        check_scalar("loss", out.loss, e, loss_t, t.terms)
        check("gradient", x.grad, y.grad, dz)
        check("entropy", out.entropy, entropy, entropy)


def test_more_than_2_31_elements():
    """Rows beyond 2^31 elements are addressed correctly: one row of memory, seen as 2^16 + 3 rows whose
    last three are far behind it, in memory that was reserved but for them never touched."""
    import mmap

    vocab, rows = 1 << 15, (1 << 16) + 3
    assert vocab * rows > 2**31
    memory = mmap.mmap(
        -1,
        vocab * rows * 2,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000,  # MAP_NORESERVE
    )
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).view(rows, vocab)
    tail = torch.randn(3, vocab).bfloat16()
    logits[-3:] = tail
    actions = torch.full((rows,), IGNORE)
    actions[-3:] = torch.tensor([5, 0, vocab - 1])
    A, old = torch.zeros(rows), torch.zeros(rows)
    A[-3:], old[-3:] = torch.tensor([1.0, -2.0, 0.5]), -10.0
    with torch.no_grad():
        out = ff.policy_loss_from_logits(
            logits, actions, advantages=A, old_logprobs=old, clip_high=1e9
        )
        want = ff.policy_loss_from_logits(
            tail, actions[-3:], advantages=A[-3:], old_logprobs=old[-3:], clip_high=1e9
        )
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(out.entropy, want.entropy)
    x = tail.clone().requires_grad_()
    ff.policy_loss_from_logits(
        x, actions[-3:], advantages=A[-3:], old_logprobs=old[-3:], clip_high=1e9
    ).loss.backward()
    # the last rows alone, as a view of the whole: row strides beyond 2^31 in the gradient, too
    far = torch.as_strided(logits, (2, vocab), ((rows - 1) * vocab, 1)).detach()
    far.copy_(tail[:2])
    z = far.requires_grad_()
    out = ff.policy_loss_from_logits(
        z, actions[-3:-1], advantages=A[-3:-1], old_logprobs=old[-3:-1], clip_high=1e9, inplace=True
    )
    y = tail[:2].clone().requires_grad_()
    ff.policy_loss_from_logits(
        y, actions[-3:-1], advantages=A[-3:-1], old_logprobs=old[-3:-1], clip_high=1e9
    ).loss.backward()
    assert torch.equal(z.detach(), y.grad)


@pytest.mark.parametrize("at_end", [False, True])
def test_guard_pages(isa, at_end):
    """Not a byte outside the arrays is touched."""
    guarded = lambda x: between_guards(x.numpy(), at_end)  # noqa: E731
    t = lambda x: torch.from_numpy(guarded(x))  # noqa: E731
    for length in (5, 8, 16):  # 8 and 16: whole vectors end at the guard
        v = vectors(3, length)
        plain = arguments(v, OPTIONS["k2"])
        kwargs = {k: t(x) if isinstance(x, torch.Tensor) else x for k, x in plain.items()}
        for loss in LOSSES:
            run(ours, t(v.lp), t(v.advantages), {"loss": loss, **kwargs})
        ff.value_loss(t(v.lp), t(v.old), t(v.ref), clip=0.2, mask=t(v.mask))
        ff.gae(t(v.lp), t(v.old), gamma=0.9, lam=0.9, mask=t(v.mask))
        ff.group_advantages(t(v.lp), length)
    for dtype in (torch.float32, torch.float64, torch.float16):
        for vocab in (1, 7, 130, 1027):
            logits, actions, w = batch(2, 3, vocab, dtype)
            z = t(logits).requires_grad_()
            out = ff.policy_loss_from_logits(
                z, t(actions), advantages=t(w.advantages), old_logprobs=t(w.old), inplace=True
            )
            out.loss.backward()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    logits, actions, v = batch(8, 9, 3001)
    kwargs = {"entropy_coef": 0.1, **arguments(v, OPTIONS["kl"])}
    torch.set_num_threads(1)
    want, x = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    torch.set_num_threads(threads)
    out, y = run_logits(ours_from_logits, logits, actions, v.advantages, kwargs)
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    assert torch.equal(x.grad, y.grad)
