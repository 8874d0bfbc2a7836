"""Wrong arguments of preference losses."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from preference_cases import (
    DIVERGING,
    batch,
    raw_arguments,
    vectors,
)

RAW = torch.ops.finefuse


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
    with pytest.raises(ValueError, match="loss='simpo' divides by"):
        ff.preference_loss(a, b, loss=["sigmoid", "simpo"])
    for names in ([], ["sigmoid"] * 33):
        with pytest.raises(ValueError, match="loss: .*allowed: a name, or a list of 1 to 32"):
            ff.preference_loss(a, b, loss=names)
    for loss in (None, 3, {"sigmoid"}, ["sigmoid", None], ["sigmoid", ["ipo"]], "reward"):
        with pytest.raises(ValueError, match="loss: .*allowed: 'sigmoid'"):
            ff.preference_loss(a, b, loss=loss)
    with pytest.raises(ValueError, match="loss_weights: 1 numbers; allowed: 2, one a loss"):
        ff.preference_loss(a, b, loss=["sigmoid", "hinge"], loss_weights=[1.0])
    with pytest.raises(TypeError, match="loss_weights: a list of numbers, not float"):
        ff.preference_loss(a, b, loss_weights=1.0)
    with pytest.raises(TypeError, match="loss_weights: a number"):
        ff.preference_loss(a, b, loss_weights=["1"])
    with pytest.raises(ValueError, match="loss_weights: inf; allowed: finite"):
        ff.preference_loss(a, b, loss_weights=[math.inf])
    for loss in ("sft", "orpo"):
        with pytest.raises(ValueError, match=f"chosen_lengths.*loss='{loss}'"):
            ff.preference_loss(a, b, loss=loss)
    for loss in ("cpo", "slic"):
        assert ff.preference_loss(a, b, loss=loss).loss.isfinite()
        with pytest.raises(ValueError, match=f"chosen_lengths: loss='{loss}' has the NLL"):
            ff.preference_loss(a, b, loss=loss, sft_weight=0.1)
    for loss in LOSSES:
        if loss not in DIVERGING:
            with pytest.raises(
                ValueError, match=f"f_divergence: 'js' with loss='{loss}'; allowed with"
            ):
                ff.preference_loss(a, b, loss=loss, f_divergence="js", normalize_lengths=False)
    with pytest.raises(ValueError, match="f_divergence: 'kl'; allowed: 'reverse_kl', 'forward_kl'"):
        ff.preference_loss(a, b, f_divergence="kl")
    with pytest.raises(
        ValueError, match="label_smoothing: 0.0; allowed: above 0 with loss='exo_pair'"
    ):
        ff.preference_loss(a, b, loss="exo_pair")
    with pytest.raises(
        ValueError, match="label_smoothing: 0.5; allowed: below 0.5 with loss='robust'"
    ):
        ff.preference_loss(a, b, loss="robust", label_smoothing=0.5)
    for name, bad in (
        ("tau", (0.0, -1.0, math.nan, math.inf)), ("gamma", (math.inf, math.nan)),
        ("delta", (math.inf, math.nan)), ("alpha", (math.inf, math.nan)),
        ("sft_weight", (-0.1, math.inf, math.nan)), ("desirable_weight", (-0.1, math.nan)),
        ("undesirable_weight", (-0.1, math.inf)),
    ):  # fmt: skip
        for value in bad:
            with pytest.raises(ValueError, match=f"^{name}: .*allowed"):
                ff.preference_loss(a, b, **{name: value})
        with pytest.raises(TypeError, match=f"^{name}: a number"):
            ff.preference_loss(a, b, **{name: "1"})
    with pytest.raises(ValueError, match="reduction: 'none' of sigmoid, kto"):
        ff.preference_loss(a, b, loss=["sigmoid", "kto"], reduction="none")
    with pytest.raises(ValueError, match="pair_weights: with losses of pairs and"):
        ff.preference_loss(a, b, loss=["sigmoid", "kto"], pair_weights=a)
    with pytest.raises(ValueError, match=r"pair_weights: shape \(2,\); allowed: \(3,\)"):
        ff.preference_loss(a, b, pair_weights=a[:2])
    with pytest.raises(ValueError, match=r"pair_weights: shape \(3,\); allowed: \(6,\)"):
        ff.preference_loss(a, b, loss="kto", pair_weights=a)
    with pytest.raises(ValueError, match=r"rejected: shape \(2,\); chosen has \(3,\)"):
        ff.preference_loss(a, b[:2], loss=["kto", "aot"])
    with pytest.raises(ValueError, match=r"ref_rejected: shape \(3,\); rejected has \(2,\)"):
        ff.preference_loss(a, b[:2], a, b, loss="kto")
    with pytest.raises(ValueError, match=r"chosen_nll: shape \(3,\); allowed: one element"):
        ff.preference_loss(a, b, loss="sft", chosen_nll=a)
    for name in ("pair_weights", "kl", "chosen_nll"):
        with pytest.raises(TypeError, match=f"{name}: a tensor, not list"):
            ff.preference_loss(a, b, loss="orpo", normalize_lengths=False, **{name: [1.0]})
        with pytest.raises(TypeError, match=f"{name}: dtype torch.int64"):
            ff.preference_loss(a, b, loss="sft", normalize_lengths=False, **{name: torch.tensor(1)})
    with pytest.raises(
        ValueError, match=r"rejected_rewards: shape \(2,\); chosen_rewards has \(3,\)"
    ):
        ff.reward_loss(a, b[:2])
    with pytest.raises(ValueError, match=r"margin: shape \(2,\); chosen_rewards has"):
        ff.reward_loss(a, b, margin=a[:2])
    with pytest.raises(TypeError, match="margin: a number"):
        ff.reward_loss(a, b, margin="1")
    with pytest.raises(TypeError, match="chosen_rewards: a tensor"):
        ff.reward_loss(None, b)
    with pytest.raises(ValueError, match="center_coef: -1.0; allowed: 0 and above"):
        ff.reward_loss(a, b, center_coef=-1.0)
    with pytest.raises(ValueError, match="reduction: 'avg'"):
        ff.reward_loss(a, b, reduction="avg")
    with pytest.raises(ValueError, match="rejected_lengths: element 1 is -2.0"):
        ff.preference_loss(
            a, b, loss="ipo", chosen_lengths=n_w, rejected_lengths=torch.tensor([1, -2, 3])
        )
    with pytest.raises(ValueError, match=r"rejected: shape \(2,\); chosen has \(3,\)"):
        ff.preference_loss(a, b[:2])
    for pair, name in (((a, None), "rejected"), ((None, b), "chosen")):
        with pytest.raises(TypeError, match=f"{name}: a tensor, not None"):
            ff.preference_loss(*pair)
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


def test_wrong_arguments_of_the_raw_op():
    lp, _ = vectors(3)
    f = RAW.preference_forward
    with pytest.raises(TypeError, match="rejected: dtype torch.float64; chosen has torch.float32"):
        f(*raw_arguments([lp[0], lp[1].double(), None, None]))
    for codes, name in (
        ((22,), "losses"),
        ((-1,), "losses"),
        ((), "losses"),
        ((0, 1), "by_length"),
    ):
        with pytest.raises(ValueError, match=f"{name}: "):
            f(*raw_arguments(lp, codes=codes))
    with pytest.raises(ValueError, match="reduction: 3"):
        f(*raw_arguments(lp, reduction=3))
    with pytest.raises(ValueError, match="chosen_lengths, rejected_lengths: None"):
        f(*raw_arguments(lp, codes=(1,), by_length=(True,)))
    with pytest.raises(TypeError, match="aot_order: a tensor, not None"):
        f(*raw_arguments(lp, codes=(8,)))
    order = torch.arange(6).view(2, 3)
    with pytest.raises(ValueError, match=r"aot_order: \(2, 2\) torch.int64; allowed: \(2, 3\)"):
        f(*raw_arguments(lp, codes=(8,), others=(None, None, None, order[:, :2], None)))
    # an index out of range is not followed
    out = f(*raw_arguments(lp, codes=(8,), others=(None, None, None, order, None)))
    assert torch.isnan(out[0])
    with pytest.raises(ValueError, match=r"g: \(2,\) torch.float32; allowed: \(3,\)"):
        RAW.preference_backward(torch.ones(2), *raw_arguments(lp, reduction=0))
    with pytest.raises(ValueError, match="reduction: 2; allowed: 0"):
        RAW.preference_backward(torch.ones(3), *raw_arguments(lp))


def test_mixed_losses_have_no_single_elements():
    lp, _ = vectors(4)
    with pytest.raises(ValueError, match="reduction: 'none'"):
        RAW.preference_forward(
            *raw_arguments(lp, codes=(0, 19), by_length=(False, False), reduction=0)
        )
