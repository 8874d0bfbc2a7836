"""Preference losses under autograd and torch.compile, torch's own checks."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from preference_cases import (
    NUMBERS,
    batch,
    raw_arguments,
    vectors,
)

RAW = torch.ops.finefuse


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, reduction):
    lp, (n_w, n_l) = vectors(4, torch.float64, scale=3.0)
    x = [v.requires_grad_() for v in lp]
    options = {**NUMBERS, "loss": loss, "label_smoothing": 0.1, "reduction": reduction}

    def f(*v):
        return ff.preference_loss(
            *v, beta=0.7, chosen_lengths=n_w, rejected_lengths=n_l, **options
        ).loss

    assert torch.autograd.gradcheck(f, x)
    if LOSSES[loss].nll:
        nll = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda v: (
                ff.preference_loss(
                    *lp, chosen_lengths=n_w, rejected_lengths=n_l, chosen_nll=v, **options
                ).loss
            ),
            (nll,),
        )
    logits, targets, ref = batch(2, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: (
            ff.preference_loss_from_logits(
                z, targets, ref_logprobs=ref, ld_alpha=0.4, **options
            ).loss
        ),
        (logits.requires_grad_(),),
    )


def test_opcheck():
    lp, (n_w, n_l) = vectors(4)
    n = (n_w.float(), n_l.float())
    order = torch.stack([torch.randperm(4), torch.randperm(4)])
    everything = (torch.rand(4), torch.tensor(0.5), torch.rand(3), order, order)
    weights = torch.rand(3, dtype=torch.float64)
    mix = {"codes": (8, 9, 18), "by_length": (False, False, True), "loss_weights": weights}
    unpaired = [lp[0], lp[1][:3], lp[2], lp[3][:3]]
    opcheck = torch.library.opcheck
    forward, backward = RAW.preference_forward, RAW.preference_backward
    for args in (  # the plainest are those of the composites, below
        raw_arguments([*lp[:2], None, None], n, codes=(1,), by_length=(True,), reduction=0),
        raw_arguments(lp, n, everything, want_ref=True, **mix),
        raw_arguments(unpaired, codes=(19,), reduction=0, want_ref=True),
        raw_arguments(unpaired, codes=(19,), reduction=2),
    ):
        opcheck(forward.default, args)
    tensors = raw_arguments(lp, n, everything, want_ref=True, number=torch.tensor, **mix)
    opcheck(forward.tensor, tensors)
    opcheck(
        backward.default,
        (torch.rand(4), *raw_arguments(lp, n, everything, want_ref=True, reduction=0, **mix)),
    )
    opcheck(backward.default, (torch.rand(7), *raw_arguments(unpaired, codes=(20,), reduction=0)))
    x = [v.clone().requires_grad_() for v in lp[:2]]
    opcheck(RAW.preference_loss.default, (*x, *lp[2:]))
    opcheck(RAW.reward_loss.default, tuple(x))
    logits, targets, ref = batch(2, 3, 11, torch.float32)
    opcheck(
        RAW.preference_loss_from_logits.default,
        (logits.requires_grad_(), targets),
        {"ref_logprobs": ref, "loss": "cpo", "sft_weight": 0.5},
    )


def test_backward_through_the_raw_op_raises():
    lp, _ = vectors(3)
    x = lp[0].requires_grad_()
    out = RAW.preference_forward(*raw_arguments([x, *lp[1:]]))
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

    counter.backend = "inductor"
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for i in range(12):
        beta = 0.05 + 0.01 * i
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = compiled(x, beta), step(y, beta)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x.grad, y.grad)
    assert 1 <= counter.graphs <= 2


def test_compile_of_numbers(counter):
    """Values of beta, gamma, weights change without new graphs; aot sorts in the graph."""
    lp, (n_w, n_l) = vectors(5)

    def step(w, l, ref_w, ref_l, number):
        out = ff.preference_loss(
            w, l, ref_w, ref_l, loss=["simpo", "aot", "discopop"], beta=number, gamma=2 * number,
            tau=number, loss_weights=[number, 1.0, 0.5], chosen_lengths=n_w, rejected_lengths=n_l,
            reduction="none",
        )  # fmt: skip
        return out.loss.sum() + ff.reward_loss(w, l, margin=ref_w, center_coef=number)

    # The graphs and their gradients are what is asked for; test_compile has Inductor's code for them.
    counter.backend = "aot_eager"
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for i in range(4):
        number = 0.05 + 0.01 * i
        x, y = ([v.clone().requires_grad_() for v in lp] for _ in range(2))
        a, b = compiled(*x, number), step(*y, number)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        for v, w in zip(x, y, strict=True):
            torch.testing.assert_close(v.grad, w.grad)
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
