"""Preference losses against TRL's own trainers, their models taken out."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from preference_cases import batch, kept, vectors

dpo = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed")
kto = pytest.importorskip("trl.trainer.kto_trainer", reason="trl is not installed")
reward = pytest.importorskip("trl.trainer.reward_trainer", reason="trl is not installed")
cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="trl is not installed")
orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="trl is not installed")

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)


def trainer(**fields):
    return SimpleNamespace(
        accelerator=ACCELERATOR, model=SimpleNamespace(training=False), aux_loss_enabled=False,
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, precompute_ref_logps=True,
        beta=0.3, **fields,
    )  # fmt: skip


def outputs(logits, targets):
    """What TRL's fused head returns, for positions 1 and on."""
    keep = targets != -100
    lp = torch.log_softmax(logits, -1)
    picked = lp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    zeros = torch.zeros_like(picked).detach()
    return SimpleNamespace(
        log_probs=torch.where(keep, picked, 0), log_sum_sq_probs=(2 * lp).logsumexp(-1),
        entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
    )  # fmt: skip


def sequences(targets):
    """input_ids, attention_mask and completion_mask, which are a position longer."""
    mask = torch.nn.functional.pad(targets != -100, (1, 0)).long()
    return {
        "input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask,
    }  # fmt: skip


def same(ours, theirs, x, y, tol=1e-12):
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=tol, atol=tol)
    torch.testing.assert_close(x.grad, y.grad, rtol=tol, atol=tol)


def check_dpo(losses, weights=None, f_divergence="reverse_kl", eps=0.0, ld_alpha=None, wpo=False,
              dtype=torch.float64, tol=1e-12):  # fmt: skip
    logits, targets, ref = batch(3, 7, 21, dtype)
    # near the policy: TRL's discopop overflows to NaN where ratios are large
    ref = outputs(logits, targets).log_probs.sum(-1) + ref.to(dtype) / 10 + 0.5
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    weights = weights or [1.0] * len(losses)
    theirs_name = {"js": "js_divergence", "alpha": "alpha_divergence"}
    fake = trainer(
        ld_alpha=ld_alpha, f_divergence_type=theirs_name.get(f_divergence, f_divergence),
        f_alpha_divergence_coef=0.5, loss_types=losses, loss_weights=weights, label_smoothing=eps,
        use_weighting=wpo, args=SimpleNamespace(discopop_tau=0.05),
    )  # fmt: skip
    inputs = {
        **sequences(targets), "ref_chosen_logps": ref[:3], "ref_rejected_logps": ref[3:],
    }  # fmt: skip
    out = outputs(y, targets)
    theirs = dpo.DPOTrainer._compute_loss(fake, lambda **kwargs: out, inputs, False)
    pair_weights = None
    if wpo:
        aligned = ((out.log_probs - out.log_sum_sq_probs) * (targets != -100)).sum(-1)
        w, l = (aligned / kept(targets)[1]).exp().detach().chunk(2)
        pair_weights = w * l
    ours = ff.preference_loss_from_logits(
        x, targets, ref_logprobs=ref, loss=losses, loss_weights=weights, beta=0.3,
        label_smoothing=eps, f_divergence=f_divergence, alpha=0.5, ld_alpha=ld_alpha,
        pair_weights=pair_weights,
    )  # fmt: skip
    same(ours.loss, theirs, x, y, tol)
    for name, a in (
        ("chosen", ours.chosen_rewards), ("rejected", ours.rejected_rewards),
        ("margins", ours.margins), ("accuracies", ours.accuracy),
    ):  # fmt: skip
        assert a.mean().item() == pytest.approx(
            fake._metrics["eval"][f"rewards/{name}"][0], rel=max(tol, 1e-6), abs=tol
        )


# exo_pair takes the logarithms of its label_smoothing in float32
DPO_LOSSES = {
    "sigmoid": 0.0, "hinge": 0.0, "ipo": 0.0, "exo_pair": 0.125, "nca_pair": 0.0, "robust": 0.1,
    "bco_pair": 0.0, "sppo_hard": 0.0, "aot": 0.1, "aot_unpaired": 0.1, "apo_zero": 0.0,
    "apo_down": 0.0, "discopop": 0.0, "sft": 0.0, "sigmoid_norm": 0.0,
}  # fmt: skip


def exact(loss):
    return 1e-6 if loss == "exo_pair" else 1e-12


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_dpo(loss):
    eps = DPO_LOSSES[loss]
    check_dpo([loss], eps=eps, tol=exact(loss))
    if loss not in ("hinge", "sft"):  # in TRL they fail: it multiplies in place what autograd needs
        check_dpo([loss], eps=eps, wpo=True, tol=exact(loss))
    check_dpo(
        [loss], eps=eps, ld_alpha=0.5, tol=exact(loss)
    )  # which leaves the NLL of sft as it is


@pytest.mark.parametrize(
    "loss", ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "sft"]
)
@pytest.mark.parametrize("f_divergence", ["forward_kl", "js", "alpha"])
def test_dpo_f_divergence(loss, f_divergence):
    narrow = f_divergence == "alpha"  # TRL's has no float64
    dtype = torch.float32 if narrow else torch.float64
    tol = 1e-4 if narrow else exact(loss)
    check_dpo([loss], f_divergence=f_divergence, eps=DPO_LOSSES[loss], dtype=dtype, tol=tol)


def test_dpo_lists():
    check_dpo(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])  # MPO
    check_dpo(["robust", "aot", "ipo", "nca_pair"], [0.5, -0.25, 0.01, 2.0], eps=0.1, wpo=True)


def test_sigmoid_honours_label_smoothing():
    """Ours on purpose; TRL's DPO drops it, its CPO has the formula."""
    lp, _ = vectors(5, torch.float64)
    fake = trainer(alpha=0.0, loss_type="sigmoid", label_smoothing=0.1)
    theirs = cpo.CPOTrainer.cpo_loss(fake, lp[0], lp[1])[0].mean()
    ours = ff.dpo_loss(lp[0], lp[1], beta=0.3, label_smoothing=0.1).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "hinge", "ipo"])
def test_cpo(loss):
    """TRL's hinge and ipo of CPO are ours without a reference."""
    lp, (n_w, n_l) = vectors(5, torch.float64)
    x, y = ([v.clone().requires_grad_() for v in lp[:2]] for _ in range(2))
    smoothing = 0.0 if loss in ("hinge", "ipo") else 0.1
    fake = trainer(alpha=0.0, loss_type=loss, simpo_gamma=0.8, label_smoothing=smoothing)
    by_length = loss in ("ipo", "simpo")
    given = (y[0] / n_w, y[1] / n_l) if by_length else y
    theirs = cpo.CPOTrainer.cpo_loss(fake, *given)[0].mean()
    name, nll_weight = ("cpo" if loss == "sigmoid" else loss), 0.0
    if loss in ("sigmoid", "simpo"):
        nll_weight = 0.7
        theirs = theirs + nll_weight * -y[0].sum() / n_w.sum()
    ours = ff.preference_loss(
        *x, loss=name, beta=0.3, gamma=0.8, label_smoothing=smoothing, sft_weight=nll_weight,
        chosen_lengths=n_w, rejected_lengths=n_l,
    )  # fmt: skip
    same(ours.loss, theirs, x[0], y[0])
    torch.testing.assert_close(x[1].grad, y[1].grad, rtol=1e-12, atol=1e-12)


def test_orpo():
    """TRL computes in float32."""
    lp, (n_w, n_l) = vectors(5, torch.float64)
    x, y = ([v.clone().requires_grad_() for v in lp[:2]] for _ in range(2))
    nll = -y[0].sum() / n_w.sum()
    theirs = nll - orpo.ORPOTrainer.odds_ratio_loss(trainer(), y[0] / n_w, y[1] / n_l)[0].mean()
    ours = ff.orpo_loss(*x, beta=0.3, chosen_lengths=n_w, rejected_lengths=n_l)
    same(ours.loss, theirs, x[0], y[0], 1e-5)
    torch.testing.assert_close(x[1].grad, y[1].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto(loss):
    logits, targets, ref = batch(3, 7, 21, torch.float64)
    label = torch.tensor([True, False, True, True, False, True])  # 4 and 2
    ref = -3 * kept(targets)[1].double() + ref.double() / 10
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    kl, kl_ref = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 1.0]).double()
    weights = (1.5, 0.6) if loss == "kto" else (1.0, 1.0)
    fake = trainer(
        calculate_KL=loss == "kto", loss_type=loss, desirable_weight=weights[0],
        undesirable_weight=weights[1], _compute_kl_logps=lambda model, batch: kl,
    )  # fmt: skip
    inputs = {**sequences(targets), "label": label, "ref_logps": ref, "ref_KL_logps": kl_ref}
    out = outputs(y, targets)
    theirs = kto.KTOTrainer._compute_loss(fake, lambda **kwargs: out, inputs, False)
    lp = ff.sequence_logprobs(ff.token_logprobs(x, targets))
    ours = ff.preference_loss(
        lp[label], lp[~label], ref[label], ref[~label], loss=loss, beta=0.3, kl=kl - kl_ref,
        desirable_weight=1.5, undesirable_weight=0.6,
    )  # fmt: skip
    same(ours.loss, theirs, x, y)
    assert ours.margins.item() == pytest.approx(fake._metrics["eval"]["rewards/margins"][0])


@pytest.mark.parametrize("center", [None, 0.3])
@pytest.mark.parametrize("margins", [False, True])
def test_reward(margins, center):
    x = torch.randn(8, 1, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    margin = torch.rand(4, dtype=torch.float64) if margins else None
    fake = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = {} if margin is None else {"margin": margin}
    theirs = reward.RewardTrainer.compute_loss(
        fake, lambda **kwargs: SimpleNamespace(logits=y), inputs
    )
    w, l = x[:, 0].chunk(2)
    same(ff.reward_loss(w, l, margin=margin, center_coef=center or 0.0), theirs, x, y)
