"""Preference losses on every backend beside the CPU's: CUDA, Triton, plain torch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import GPU
from finefuse._args import PREFERENCE_LOSSES as LOSSES
from finefuse.reference import preference as reference
from test_preference import batch, eager_from_logits, truth_from_logits, vectors
from tolerances import check

NAMES = ("loss", "chosen_rewards", "rejected_rewards", "margins")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pairs", [1, 5, 700])  # 700: several rounds of the one block
def test_vectors(place, loss, pairs, dtype):
    lp, (n_w, n_l) = vectors(pairs, dtype)
    for reduction, eps in (("mean", 0.0), ("sum", 0.1), ("none", 0.1)):
        *x, a, b = place.put(*lp, n_w, n_l)
        x = [v.clone().requires_grad_() for v in x]
        out = ff.preference_loss(
            *x, loss=loss, beta=0.3, label_smoothing=eps, reduction=reduction,
            chosen_lengths=a, rejected_lengths=b,
        )  # fmt: skip
        out.loss.sum().backward()
        divided = (n_w.numpy(), n_l.numpy()) if loss == "ipo" else (1.0, 1.0)
        t = reference.preference_loss(
            *(v.double().numpy() for v in lp), loss=loss, beta=0.3, label_smoothing=eps,
            reduction=reduction, chosen_lengths=divided[0], rejected_lengths=divided[1],
        )  # fmt: skip
        for name in NAMES:
            want = getattr(t, name)
            check(f"{name} {reduction}", getattr(out, name).detach().cpu(), want, want)
        assert out.accuracy.item() == pytest.approx(t.accuracy)
        for v, want in zip(x, (t.d_chosen, t.d_rejected, -t.d_chosen, -t.d_rejected), strict=True):
            check(f"gradient {reduction}", v.grad.cpu(), want, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_from_logits(place, loss, dtype):
    logits, targets, ref = batch(2, 5, 1501, dtype)
    x, y, r = place.put(logits.clone(), targets, ref)
    for inplace in (False, True):
        z = x.clone().requires_grad_()
        out = ff.preference_loss_from_logits(
            z, y, ref_logprobs=r, loss=loss, label_smoothing=0.05, inplace=inplace
        )
        out.loss.backward()
        eager = logits.clone().requires_grad_()
        e = eager_from_logits(eager, targets, ref.to(dtype), loss, 0.1, 0.05)
        e.backward()
        t, dz = truth_from_logits(logits, targets, ref, loss, 0.1, 0.05)
        check("loss", out.loss.detach().cpu(), e, t.loss)
        check("gradient", z.grad.cpu(), eager.grad, dz)
        assert out.accuracy.item() == pytest.approx(t.accuracy)


def test_extremes(place):
    inf, nan = float("inf"), float("nan")
    big = torch.tensor([1e30, -1e30, 0.0, -inf, nan])
    a, zero = place.put(big, torch.zeros(5))
    out = ff.preference_loss(a, zero, reduction="none").loss.tolist()
    assert out[0] == 0
    assert out[1] == pytest.approx(1e29)
    assert out[3] == inf
    assert out[4] != out[4]
    empty = torch.zeros(0, device=place.device, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        out = ff.preference_loss(empty, empty, reduction=reduction)
        assert out.loss.sum() == 0
        assert out.accuracy == 0
        out.loss.sum().backward()
    # an empty completion counts as one token
    lp, (n_w, n_l) = vectors(3)
    n_w[1] = 0
    *x, a, b = place.put(*lp, n_w, n_l)
    loss = ff.preference_loss(*x, loss="ipo", chosen_lengths=a, rejected_lengths=b).loss
    n_w[1] = 1
    (a,) = place.put(n_w)
    assert loss == ff.preference_loss(*x, loss="ipo", chosen_lengths=a, rejected_lengths=b).loss


def test_negative_lengths_are_flagged(place):
    lp, (n_w, n_l) = vectors(3)
    n_w[1] = -2
    *x, a, b = place.put(*lp, n_w, n_l)

    def call():
        return ff.preference_loss(
            *x, loss="ipo", chosen_lengths=a, rejected_lengths=b, reduction="none"
        )

    if place.backend == "eager":
        if not GPU:
            with pytest.raises(ValueError, match="chosen_lengths: element 1 is -2"):
                call()
        return
    out = call()
    assert torch.isnan(out.loss).tolist() == [False, True, False]
    with pytest.raises(
        ValueError, match="chosen_lengths, rejected_lengths: an element was negative"
    ):
        ff.check()
