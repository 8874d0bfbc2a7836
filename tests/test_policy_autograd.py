"""Policy losses under autograd, torch.compile, torch's own checks; the memory they take."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from policy_cases import (
    IGNORE,
    OPTIONS,
    arguments,
    batch,
    close,
    ours,
    ours_from_logits,
    vectors,
)

RAW = torch.ops.finefuse


def raw_calls(grad=False):
    v = vectors(2, 4)
    logits, actions, w = batch(2, 4, 9)
    lp = v.lp.requires_grad_(grad)
    logits.requires_grad_(grad)
    numbers = (0.2, 0.3, 3.0, 4.0, 0.1, 1.0, 1.05, 1.0)
    tensors = tuple(map(torch.tensor, numbers))
    tokens = (v.old, v.ref, v.weights, v.advantages, None)
    w_tokens = (w.old.float(), w.ref.float(), None, w.advantages, None)
    packed = (v.old[0], None, None, v.advantages, torch.tensor([0, 1, 4]))
    codes, none, whole = (0, 0, 2, False, 2), (0, 0, 2, True, 0), (0, 3, 2, False, 4)
    out = torch.empty(2, 4, 9)
    yield RAW.policy_forward.default, (lp, v.mask, *tokens, *numbers, *codes)
    yield RAW.policy_forward.tensor, (lp, None, *tokens, *tensors, *none)
    yield (
        RAW.policy_forward.default,
        (lp[0], None, *packed, *numbers[:4], 0.0, *numbers[5:], *whole),
    )
    yield RAW.policy_backward.default, (torch.ones(2, 4), lp, v.mask, *tokens, *numbers, *none)
    yield RAW.policy_backward.tensor, (torch.ones(2, 4), lp, v.mask, *tokens, *tensors, *none)
    more = (*w_tokens, out, 0.9, 0.01, *numbers, *codes, IGNORE)
    yield RAW.policy_logits_forward_backward.default, (logits, actions, *more)
    t = (*w_tokens, out, torch.tensor(0.9), torch.tensor(0.01), *tensors, *codes, IGNORE)
    yield RAW.policy_logits_forward_backward.tensor, (logits, actions, *t)
    yield RAW.policy_logits_backward.default, (torch.tensor(1.0), logits, actions, *more)
    yield RAW.policy_logits_backward.tensor, (torch.tensor(1.0), logits, actions, *t)
    yield RAW.value_loss_forward.default, (lp, v.old, v.ref, v.mask, 0.2)
    yield RAW.value_loss_forward.tensor, (lp, v.old, None, None, torch.tensor(0.2))
    yield RAW.group_advantages_forward.default, (v.ref, 4, 1, 0)
    yield RAW.gae_forward.default, (v.ref, v.old, v.mask, 0.9, 0.95)
    yield RAW.gae_forward.tensor, (v.ref, v.old, None, torch.tensor(0.9), torch.tensor(0.95))


@pytest.mark.parametrize("case", range(len(list(raw_calls()))))
def test_opcheck_raw(case):
    op, args = list(raw_calls())[case]
    torch.library.opcheck(op, args)


def test_opcheck_public():
    v = vectors(2, 4)
    logits, actions, w = batch(2, 4, 9)
    torch.library.opcheck(
        RAW.policy_loss.default, (v.lp.requires_grad_(),),
        {"advantages": v.advantages, "old_logprobs": v.old},
    )  # fmt: skip
    torch.library.opcheck(
        RAW.policy_loss_from_logits.default, (logits.requires_grad_(), actions),
        {"advantages": w.advantages, "old_logprobs": w.old.float(), "entropy_coef": 0.1},
    )  # fmt: skip
    torch.library.opcheck(RAW.value_loss.default, (v.lp.requires_grad_(), v.old))
    torch.library.opcheck(RAW.group_advantages.default, (v.old, 4))
    torch.library.opcheck(RAW.gae.default, (v.old, v.ref), {"gamma": 0.9, "lam": 0.9})


def test_backward_through_a_raw_op_raises():
    def differentiate(op, args):
        out = op(*args)
        sum(o.sum() for o in (out if isinstance(out, (tuple, list)) else [out])).backward()

    seen = 0
    for op, args in raw_calls(grad=True):
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            seen += 1
            with pytest.raises(RuntimeError, match="is a raw op"):
                differentiate(op, args)
    assert seen >= 8


def test_double_backward_raises():
    v = vectors(2, 4)
    logits, actions, w = batch(2, 4, 9)
    for function, x in (
        (lambda z: ours(z.tanh(), v.advantages, old_logprobs=v.old).loss, v.lp),
        (lambda z: ours_from_logits(z.tanh(), actions, w.advantages).loss, logits),
        (lambda z: ours_from_logits(z.tanh(), actions, w.advantages, loss="gspo").loss, logits),
    ):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.square().sum().backward()


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo", "vespo"])
def test_compile(loss, counter):
    logits, actions, v = batch(2, 5, 40)

    def step(x, beta, coef):
        out = ff.policy_loss_from_logits(
            x, actions, advantages=v.advantages, old_logprobs=v.old.float(),
            ref_logprobs=v.ref.float(), mask=v.mask, loss=loss, kl_beta=beta, entropy_coef=coef,
        )  # fmt: skip
        return out.loss + 0 * out.entropy

    # Inductor once: the others differ in what the opaque ops are told
    counter.backend = "inductor" if loss == "ppo" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(12):
        beta, coef = 0.05 + 0.01 * i, 0.1 / (i + 1)
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = compiled(x, beta, coef), step(y, beta, coef)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        close(x.grad, y.grad)
    assert 1 <= counter.graphs <= 2


def test_compile_the_rest():
    v = vectors(2, 6)

    def step(lp, gamma):
        A, returns = ff.gae(v.ref, v.old, gamma=gamma, lam=0.9, mask=v.mask)
        out = ff.policy_loss(lp, advantages=A, old_logprobs=v.old, mask=v.mask, reduction="none")
        return (
            out.loss.sum()
            + ff.value_loss(lp, returns, v.old, clip=0.2)
            + ff.group_advantages(v.ref.view(-1), 4).sum()
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for gamma in (0.9, 0.95, 0.99):
        x, y = v.lp.clone().requires_grad_(), v.lp.clone().requires_grad_()
        a, b = compiled(x, gamma), step(y, gamma)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    logits, actions, v = batch(2, 5, 300)
    kwargs = {"entropy_coef": 0.1, **arguments(v, OPTIONS["kl"])}

    def function(x):
        return ours_from_logits(x * 1.0, actions, v.advantages, **kwargs).loss

    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(function, a, use_reentrant=use_reentrant).backward()
    function(b).backward()
    close(a.grad, b.grad)


def test_float16_gradients_meet_the_loss_scale():
    """In float16 the backward makes the gradient: p/N would underflow before the scaler's factor."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(8, 64, 8000, generator=g)).half().requires_grad_()
    actions = torch.randint(0, 8000, (8, 64), generator=g)
    A = torch.ones(8)
    (ff.policy_loss_from_logits(logits, actions, advantages=A).loss * 16384.0).backward()
    rows = logits.grad.double().sum(-1).abs()
    at_action = logits.grad.double().gather(-1, actions[..., None])[..., 0].abs()
    assert (rows <= 0.004 * at_action).all()


def test_extra_memory():
    """The gradient, and 32 bytes a row beside it; none of the logits' size in place."""
    rows, vocab = 512, 2000
    logits = torch.randn(8, rows // 8, vocab)
    actions = torch.randint(0, vocab, (8, rows // 8))
    A, old = torch.randn(8), -torch.rand(8, rows // 8) * 5
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        with torch.profiler.profile(profile_memory=True) as profile:
            ff.policy_loss_from_logits(
                x, actions, advantages=A, old_logprobs=old, entropy_coef=0.01, inplace=inplace
            ).loss.backward()
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        gradient = 0 if inplace else logits.nbytes
        assert gradient <= peak <= gradient + 40 * rows + 4096
