"""Wrong arguments of finefuse.numpy's preference losses. Needs no torch."""

from __future__ import annotations

import math

import finefuse.numpy as ffn
import numpy as np
import pytest
from finefuse._args.preference import PREFERENCE_LOSSES as LOSSES
from numpy_preference_cases import (
    DIVERGING,
    batch,
    vectors,
)


def test_wrong_arguments():
    (a, b, ref_w, ref_l), (n_w, n_l) = vectors(3)
    f = ffn.preference_loss
    for bad in (None, [1.0]):
        with pytest.raises(TypeError, match=r"chosen: a numpy.ndarray, not"):
            f(bad, b)
        with pytest.raises(TypeError, match=r"rejected: a numpy.ndarray, not"):
            f(a, bad)
    with pytest.raises(TypeError, match="rejected: dtype int64; allowed: float32"):
        f(a, np.arange(3))
    with pytest.raises(ValueError, match=r"rejected: shape \(2,\); chosen has \(3,\)"):
        f(a, b[:2])
    with pytest.raises(ValueError, match=r"rejected: shape \(2,\); chosen has \(3,\)"):
        f(a, b[:2], loss=["kto", "aot"])
    with pytest.raises(ValueError, match=r"ref_chosen: shape \(3, 1\); chosen has \(3,\)"):
        f(a, b, ref_w[:, None], ref_l)
    with pytest.raises(ValueError, match=r"ref_rejected: shape \(3,\); rejected has \(2,\)"):
        f(a, b[:2], a, b, loss="kto")
    with pytest.raises(ValueError, match="ref_chosen and ref_rejected: give both or neither"):
        f(a, b, ref_w)
    for loss in ("dpo", None, 3, {"sigmoid"}, ["sigmoid", None], ["sigmoid", ["ipo"]], "reward"):
        with pytest.raises(ValueError, match="loss: .*; allowed: 'sigmoid', 'ipo', 'hinge'"):
            f(a, b, loss=loss)
    for names in ([], ["sigmoid"] * 33):
        with pytest.raises(ValueError, match="loss: .*allowed: a name, or a list of 1 to 32"):
            f(a, b, loss=names)
    with pytest.raises(ValueError, match="loss_weights: 1 numbers; allowed: 2, one a loss"):
        f(a, b, loss=["sigmoid", "hinge"], loss_weights=[1.0])
    for bad in (1.0, np.ones(1)):
        with pytest.raises(TypeError, match="loss_weights: a list of numbers, not"):
            f(a, b, loss_weights=bad)
    with pytest.raises(TypeError, match="loss_weights: a number"):
        f(a, b, loss_weights=["1"])
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match=f"loss_weights: {bad}; allowed: finite"):
            f(a, b, loss_weights=[bad])
    for beta in (0.0, -1.0, np.nan, np.inf, np.array(0.0)):
        with pytest.raises(ValueError, match="beta: .*positive and finite"):
            f(a, b, beta=beta)
    for eps in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="label_smoothing: .*0 to below 1"):
            f(a, b, label_smoothing=eps)
    with pytest.raises(ValueError, match=r"label_smoothing: 0\.0; allowed: above 0 with loss='exo"):
        f(a, b, loss="exo_pair")
    with pytest.raises(
        ValueError, match=r"label_smoothing: 0\.5; allowed: below 0\.5 with loss='ro"
    ):
        f(a, b, loss="robust", label_smoothing=0.5)
    for name, values in (
        ("tau", (0.0, -1.0, math.nan, math.inf)), ("gamma", (math.inf, math.nan)),
        ("delta", (math.inf, math.nan)), ("alpha", (math.inf, math.nan)),
        ("sft_weight", (-0.1, math.inf, math.nan)), ("desirable_weight", (-0.1, math.nan)),
        ("undesirable_weight", (-0.1, math.inf)),
    ):  # fmt: skip
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}: .*allowed"):
                f(a, b, **{name: value})
        for value in ("1", None, np.ones(2), 1j):
            with pytest.raises(TypeError, match=f"^{name}: a number or a 0-d array"):
                f(a, b, **{name: value})
    for name in ("beta", "label_smoothing"):
        with pytest.raises(TypeError, match=f"^{name}: a number or a 0-d array"):
            f(a, b, **{name: "0.1"})
    with pytest.raises(ValueError, match="reduction: 'avg'"):
        f(a, b, reduction="avg")
    with pytest.raises(ValueError, match="f_divergence: 'kl'; allowed: 'reverse_kl', 'forward_kl'"):
        f(a, b, f_divergence="kl")
    for loss in LOSSES:
        if loss not in DIVERGING:
            with pytest.raises(ValueError, match=f"f_divergence: 'js' with loss='{loss}'; allowed"):
                f(a, b, loss=loss, f_divergence="js", normalize_lengths=False)
    with pytest.raises(ValueError, match="loss='ipo' divides by the completions' lengths"):
        f(a, b, loss="ipo", chosen_lengths=n_w)
    with pytest.raises(ValueError, match="loss='simpo' divides by"):
        f(a, b, loss=["sigmoid", "simpo"])
    for loss in ("sft", "orpo"):
        with pytest.raises(ValueError, match=f"chosen_lengths.*loss='{loss}'"):
            f(a, b, loss=loss)
    for loss in ("cpo", "slic"):
        assert np.isfinite(f(a, b, loss=loss).loss)
        with pytest.raises(ValueError, match=f"chosen_lengths: loss='{loss}' has the NLL"):
            f(a, b, loss=loss, sft_weight=0.1)
    ipo = {"loss": "ipo", "chosen_lengths": n_w}
    with pytest.raises(ValueError, match=r"rejected_lengths: shape \(2,\); rejected has \(3,\)"):
        f(a, b, rejected_lengths=n_l[:2], **ipo)
    with pytest.raises(
        TypeError, match="rejected_lengths: dtype complex128; allowed: bool, an int"
    ):
        f(a, b, rejected_lengths=n_l.astype(complex), **ipo)
    for bad in (-2, math.nan):
        with pytest.raises(ValueError, match=f"rejected_lengths: element 1 is {bad}"):
            f(a, b, rejected_lengths=np.array([1, bad, 3]), **ipo)
    with pytest.raises(ValueError, match="reduction: 'none' of sigmoid, kto"):
        f(a, b, loss=["sigmoid", "kto"], reduction="none")
    with pytest.raises(ValueError, match="pair_weights: with losses of pairs and"):
        f(a, b, loss=["sigmoid", "kto"], pair_weights=a)
    with pytest.raises(ValueError, match=r"pair_weights: shape \(2,\); allowed: \(3,\)"):
        f(a, b, pair_weights=a[:2])
    with pytest.raises(ValueError, match=r"pair_weights: shape \(3,\); allowed: \(6,\)"):
        f(a, b, loss="kto", pair_weights=a)
    with pytest.raises(ValueError, match=r"chosen_nll: shape \(3,\); allowed: one element"):
        f(a, b, loss="sft", chosen_nll=a)
    for name in ("pair_weights", "kl", "chosen_nll"):
        with pytest.raises(TypeError, match=f"{name}: a numpy.ndarray, not list"):
            f(a, b, loss="sft", normalize_lengths=False, **{name: [1.0]})
        with pytest.raises(TypeError, match=f"{name}: dtype int64; allowed: float32"):
            f(a, b, loss="sft", normalize_lengths=False, **{name: np.ones(3, np.int64)})


def test_wrong_arguments_of_rewards():
    (a, b, *_), _ = vectors(3)
    f = ffn.reward_loss
    with pytest.raises(
        ValueError, match=r"rejected_rewards: shape \(2,\); chosen_rewards has \(3,"
    ):
        f(a, b[:2])
    with pytest.raises(ValueError, match=r"margin: shape \(2,\); chosen_rewards has \(3,\)"):
        f(a, b, margin=a[:2])
    with pytest.raises(TypeError, match="margin: a number"):
        f(a, b, margin="1")
    with pytest.raises(TypeError, match="margin: dtype int64"):
        f(a, b, margin=np.ones(3, np.int64))
    with pytest.raises(TypeError, match="chosen_rewards: a numpy.ndarray, not NoneType"):
        f(None, b)
    with pytest.raises(TypeError, match="rejected_rewards: dtype int64"):
        f(a, np.arange(3))
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"center_coef: {bad}; allowed: 0 and above"):
            f(a, b, center_coef=bad)
    with pytest.raises(TypeError, match="center_coef: a number"):
        f(a, b, center_coef="1")
    with pytest.raises(ValueError, match="reduction: 'avg'"):
        f(a, b, reduction="avg")


def test_wrong_arguments_from_logits():
    logits, y, ref = batch(2, 3, 7)
    out = np.full(logits.shape, 5, np.float32)
    f = ffn.preference_loss_from_logits
    for bad, error, message in (
        ({"pairs": "interleaved"}, ValueError, "pairs: 'interleaved'; allowed: 'halves'"),
        ({"ref_logprobs": ref, "ref_logits": logits}, ValueError, "give one of the two"),
        ({"ref_logprobs": ref[:2]}, ValueError, r"ref_logprobs: shape \(2,\); allowed: \(4,\)"),
        ({"ref_logprobs": [0.0]}, TypeError, "ref_logprobs: a numpy.ndarray, not list"),
        ({"ref_logits": logits[:, :2]}, ValueError, r"ref_logits: shape \(4, 2, 7\); logits have"),
        ({"ref_logits": y}, TypeError, "ref_logits: dtype int64"),
        ({"ref_logits": logits[..., :1]}, ValueError, "targets: element"),
        ({"loss": "dpo"}, ValueError, "loss: 'dpo'"),
        ({"loss": ["sigmoid"], "loss_weights": [1, 2]}, ValueError, "loss_weights: 2 numbers"),
        ({"beta": -1.0}, ValueError, "beta"),
        ({"tau": 0.0}, ValueError, "tau"),
        ({"pair_weights": ref[:3]}, ValueError, r"pair_weights: shape \(3,\); allowed: \(2,\)"),
        ({"ld_alpha": 1.5}, ValueError, r"ld_alpha: 1\.5; allowed: 0 to 1, or None"),
        ({"ld_alpha": math.nan}, ValueError, "ld_alpha: nan; allowed"),
        ({"ld_alpha": "1"}, TypeError, "ld_alpha: a number"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index"),
        ({"reduction": "avg"}, ValueError, "reduction"),
    ):
        with pytest.raises(error, match=message):
            f(logits, y, return_grad=True, grad_out=out, **bad)
    with pytest.raises(ValueError, match=r"logits: shape \(3, 3, 7\); allowed: \(2·pairs, T, V\)"):
        f(logits[:3], y[:3])
    with pytest.raises(ValueError, match=r"logits: shape \(4, 7\)"):
        f(logits[:, 0], y[:, 0])
    with pytest.raises(ValueError, match="targets: element 0 is 7"):
        f(logits, np.full_like(y, 7))
    with pytest.raises(ValueError, match="grad_out: of use only with return_grad"):
        f(logits, y, grad_out=out)
    assert (out == 5).all()
