"""Preference losses from logits against float64."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from preference_cases import (
    IGNORE,
    batch,
    eager_from_logits,
    kept,
    truth_from_logits,
)
from tolerances import check

# ---- from logits -------------------------------------------------------------------------------


# The pass over the logits knows no loss, and the losses no logits: every loss once, and all types and shapes
# with one that takes sums, one that divides by lengths and one with an NLL. 2: the least vocabulary; 257: an
# odd tail; 3001: beyond a block.
_LOGITS = [(loss, torch.float32, (2, 5, 257)) for loss in LOSSES]
_LOGITS += [
    (loss, dtype, shape)
    for loss in ("sigmoid", "ipo", "orpo")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for shape in ((1, 3, 2), (2, 5, 257), (3, 7, 3001))
    if (dtype, shape) != (torch.float32, (2, 5, 257))
]


@pytest.mark.parametrize(("loss", "dtype", "shape"), _LOGITS, ids=str)
def test_from_logits(isa, loss, dtype, shape):
    logits, targets, ref = batch(*shape, dtype)
    beta, eps, numbers = 0.1, 0.05, {"gamma": 0.8, "sft_weight": 0.7}
    results = []
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        out = ff.preference_loss_from_logits(
            x, targets, ref_logprobs=ref, loss=loss, beta=beta, label_smoothing=eps, inplace=inplace,
            **numbers,
        )  # fmt: skip
        out.loss.backward()
        results.append((out, x.grad))
        assert (x.grad.data_ptr() == x.data_ptr()) is inplace
    y = logits.clone().requires_grad_()
    e = eager_from_logits(y, targets, ref.to(dtype), loss, beta, eps, **numbers)
    e.backward()
    t, dz = truth_from_logits(logits, targets, ref, loss, beta, eps, **numbers)
    (out, grad), (out2, grad2) = results
    check("loss", out.loss, e, t.loss)
    check("gradient", grad, y.grad, dz)
    assert torch.equal(grad, grad2)
    assert torch.equal(out.loss, out2.loss)
    assert out.accuracy.item() == pytest.approx(t.accuracy)


@pytest.mark.parametrize("normalize_lengths", [None, False])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sft", "simpo", "orpo", "kto"])
def test_ld_alpha(loss, normalize_lengths):
    """Tokens past the shorter answer's length count less, but not in lengths and NLL."""
    logits, targets, ref = batch(3, 7, 21, torch.float64)
    assert len(set(kept(targets)[1].tolist())) > 1
    for ld_alpha in (0.0, 0.3, 1.0):
        x = logits.clone().requires_grad_()
        out = ff.preference_loss_from_logits(
            x, targets, ref_logprobs=ref.double(), loss=loss, ld_alpha=ld_alpha, sft_weight=0.5,
            normalize_lengths=normalize_lengths,
        )  # fmt: skip
        out.loss.backward()
        if normalize_lengths is None:
            t, dz = truth_from_logits(
                logits, targets, ref, loss, 0.1, 0.0, ld_alpha, sft_weight=0.5
            )
            check("loss", out.loss, t.loss, t.loss)
            check("gradient", x.grad, dz, dz)
    plain = ff.preference_loss_from_logits(
        logits, targets, ref_logprobs=ref.double(), loss=loss, sft_weight=0.5,
        normalize_lengths=normalize_lengths,
    )  # fmt: skip
    check("at 1", out.loss, plain.loss, plain.loss)
    tensor = ff.preference_loss_from_logits(
        logits, targets, ref_logits=logits, loss="sigmoid", ld_alpha=torch.tensor(0.3)
    )
    assert tensor.loss.item() == pytest.approx(math.log(2))  # the reference's logits count alike


def test_options_from_logits():
    logits, targets, ref = batch(2, 5, 33, torch.float32)
    s = ff.sequence_logprobs(ff.token_logprobs(logits, targets))
    n = kept(targets)[1]
    options = {
        "loss": ["simpo", "bco_pair", "discopop", "sft"], "loss_weights": [1.0, 0.5, 2.0, 0.1],
        "pair_weights": torch.tensor([0.5, 2.0]), "gamma": 0.8, "sft_weight": 0.7, "delta": 0.3,
        "tau": 0.4, "beta": 0.3,
    }  # fmt: skip
    kto = {
        "loss": "kto", "kl": torch.ones(2), "desirable_weight": 1.5, "undesirable_weight": 0.5,
        "reduction": "none",
    }  # fmt: skip
    other = {"f_divergence": "alpha", "alpha": 0.3, "label_smoothing": 0.1}
    nll = {"loss": "orpo", "chosen_nll": torch.tensor(1.5)}
    for each in (options, kto, other, nll):
        a = ff.preference_loss_from_logits(logits, targets, ref_logprobs=ref, **each)
        b = ff.preference_loss(
            *s.chunk(2), *ref.chunk(2), chosen_lengths=n[:2], rejected_lengths=n[2:], **each
        )
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


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


def test_tokens_of_weight_0():
    """ld_alpha = 0: an impossible token past the shorter answer's end adds nothing."""
    logits, targets = torch.randn(2, 4, 5), torch.tensor([[1, 2, -100, -100], [3, 1, 0, 2]])
    logits[1, 3, 2] = -torch.inf
    x = logits.clone().requires_grad_()
    out = ff.preference_loss_from_logits(x, targets, ld_alpha=0.0)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(x.grad).all()
    targets[1, 2:] = -100
    assert torch.equal(out.loss, ff.preference_loss_from_logits(logits, targets).loss)
