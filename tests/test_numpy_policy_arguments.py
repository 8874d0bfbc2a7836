"""Wrong arguments of finefuse.numpy's policy losses, value loss and advantages. Needs no torch."""

from __future__ import annotations

import finefuse.numpy as ffn
import numpy as np
import pytest
from numpy_cases import (
    read_only,
)
from numpy_policy_cases import (
    batch,
    tokens,
)

NUMBERS = (
    ({"loss": "dpo"}, ValueError, "loss: 'dpo'; allowed: 'reinforce', 'rloo'"),
    ({"loss": None}, ValueError, "loss: None"),
    ({"kl": "k4"}, ValueError, "kl: 'k4'; allowed: 'k1', 'k2', 'k3'"),
    ({"importance": "row"}, ValueError, "importance: 'row'; allowed: 'token', 'sequence'"),
    ({"importance": "token", "loss": "vespo"}, ValueError, "importance: 'token'; loss='vespo'"),
    ({"reduction": "avg"}, ValueError, "reduction: 'avg'; allowed: 'none', 'sum', 'mean'"),
    ({"reduction": ["mean"]}, ValueError, "reduction: "),
    ({"clip_low": -0.1}, ValueError, "clip_low: -0.1"),
    ({"clip_high": np.inf}, ValueError, "clip_high: inf"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip: 1.0; allowed: above 1, or None"),
    ({"delta": 0.0}, ValueError, "delta: 0.0; allowed: positive, or None"),
    ({"kl_beta": 0.1}, ValueError, "kl_beta: 0.1; it needs ref_logprobs"),
    ({"kl_beta": np.nan}, ValueError, "kl_beta: nan; allowed: finite"),
    ({"tau_pos": 0}, ValueError, "tau_pos: 0.0"),
    ({"tau_neg": np.inf}, ValueError, "tau_neg: inf"),
    (
        {"loss": "dapo", "num_tokens": -1},
        ValueError,
        "num_tokens: -1.0; allowed: 0 and",
    ),
    ({"loss": "dr_grpo", "max_length": np.inf}, ValueError, "max_length: inf"),
    ({"clip_low": "0.2"}, TypeError, "clip_low: a number or a 0-d array, not '0.2'"),
    ({"clip_high": np.zeros(2)}, TypeError, "clip_high: a number"),
    ({"loss": "dapo", "num_tokens": [3]}, TypeError, "num_tokens: a number"),
)


def test_wrong_numbers():
    lp, _, _, _, A = tokens((2, 3))
    logits, actions = np.zeros((2, 3, 7), np.float32), np.zeros((2, 3), int)
    out = np.full(logits.shape, 5, np.float32)
    for bad, error, message in NUMBERS:
        with pytest.raises(error, match=message):
            ffn.policy_loss(lp, advantages=A, **bad)
        with pytest.raises(error, match=message):
            ffn.policy_loss_from_logits(
                logits, actions, advantages=A, return_grad=True, grad_out=out, **bad
            )
    for bad, error, message in (
        ({"temperature": 0.0}, ValueError, "temperature: 0.0"),
        ({"temperature": "1"}, TypeError, "temperature: a number"),
        ({"entropy_coef": np.inf}, ValueError, "entropy_coef: inf; allowed: finite"),
        ({"entropy_coef": None}, TypeError, "entropy_coef: a number"),
        ({"ignore_index": 1.5}, TypeError, r"ignore_index: an int, not 1\.5"),
    ):
        with pytest.raises(error, match=message):
            ffn.policy_loss_from_logits(
                logits, actions, advantages=A, return_grad=True, grad_out=out, **bad
            )
    assert (out == 5).all()


def test_wrong_arrays():
    lp, old, _, _, A = tokens((2, 3))
    f = ffn.policy_loss
    for bad, error, message in (
        ({"advantages": None}, TypeError, "advantages: a numpy.ndarray, not NoneType"),
        ({"advantages": [1.0]}, TypeError, "advantages: a numpy.ndarray, not list"),
        ({"advantages": A.astype(int)}, TypeError, "advantages: dtype int64"),
        (
            {"advantages": A[:1]},
            ValueError,
            r"advantages: shape \(1,\); allowed: \(2, 3\), \(2,\) or",
        ),
        ({"old_logprobs": old[:1]}, ValueError, r"old_logprobs: shape \(1, 3\); allowed: \(2, 3\)"),
        ({"old_logprobs": 0.0}, TypeError, "old_logprobs: a numpy.ndarray, not float"),
        ({"ref_logprobs": old.T}, ValueError, r"ref_logprobs: shape \(3, 2\)"),
        ({"ref_logprobs": old > 0}, TypeError, "ref_logprobs: dtype bool"),
        ({"weights": old[0]}, ValueError, r"weights: shape \(3,\); allowed: \(2, 3\), \(2,\) or"),
        ({"mask": old[0] > 0}, ValueError, r"mask: shape \(3,\); allowed: \(2, 3\)"),
        ({"mask": [True]}, TypeError, "mask: a numpy.ndarray, not list"),
        ({"mask": old.astype(complex)}, TypeError, "mask: dtype complex128; allowed: bool"),
        ({"mask": np.ma.masked_array(old)}, TypeError, "mask: a numpy.ndarray, not MaskedArray"),
        ({"cu_seqlens": np.array([0, 6])}, ValueError, "cu_seqlens: shape"),
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens: a numpy.ndarray, not list"),
        ({"cu_seqlens": np.array([0.0, 6.0])}, TypeError, "cu_seqlens: dtype float64"),
    ):
        with pytest.raises(error, match=message):
            f(lp, **{"advantages": A, **bad})
    with pytest.raises(TypeError, match="logprobs: dtype int64"):
        f(np.zeros((2, 3), int), advantages=A)
    with pytest.raises(TypeError, match="logprobs: a numpy.ndarray, not list"):
        f([0.0], advantages=A)
    with pytest.raises(ValueError, match="logprobs: a scalar"):
        f(np.float32(0), advantages=np.float32(0))
    flat, one = lp.reshape(-1), np.ones(1, np.float32)
    for ends in ([0, 7], [1, 6], [0, 4, 2, 6], [0, 5], [-1, 6]):
        with pytest.raises(ValueError, match="cu_seqlens: element"):
            f(flat, advantages=np.ones(len(ends) - 1, np.float32), cu_seqlens=np.array(ends))
    with pytest.raises(ValueError, match="cu_seqlens: one element, no sequence, with 6 tokens"):
        f(flat, advantages=one[:0], cu_seqlens=np.array([0]))
    packed = {"advantages": one, "cu_seqlens": np.array([0, 6])}
    with pytest.raises(ValueError, match=r"weights: shape \(1,\); allowed: \(6,\)"):
        f(flat, weights=one, **packed)
    with pytest.raises(ValueError, match=r"max_length: None; reduction 'dr_grpo' of packed"):
        f(flat, loss="dr_grpo", **packed)
    with pytest.raises(ValueError, match=r"advantages: shape \(2,\); allowed: \(6,\), \(1,\) or"):
        f(flat, **packed | {"advantages": A})


def test_wrong_logits():
    logits, actions, options = batch((2, 3, 7))
    out = np.full(logits.shape, 5, np.float32)
    f = ffn.policy_loss_from_logits

    def bad(error, message, *args, **more):
        with pytest.raises(error, match=message):
            f(*args, **{**options, "return_grad": True, "grad_out": out, **more})

    bad(TypeError, "logits: a numpy.ndarray, not list", [[0.0]], actions)
    bad(TypeError, "logits: dtype int64", logits.astype(int), actions)
    bad(ValueError, "logits: shape .*at least one class", logits[..., :0], actions)
    bad(TypeError, "actions: a numpy.ndarray, not list", logits, [1])
    bad(TypeError, "actions: dtype float64", logits, actions.astype(float))
    bad(TypeError, "actions: dtype uint64", logits, actions.astype(np.uint64))
    bad(ValueError, r"actions: shape \(1, 3\)", logits, actions[:1])
    bad(ValueError, r"mask: shape \(3,\)", logits, actions, mask=np.ones(3, bool))
    bad(
        ValueError,
        r"old_logprobs: shape \(3,\)",
        logits,
        actions,
        old_logprobs=options["old_logprobs"][0],
    )
    bad(ValueError, r"advantages: shape \(3,\)", logits, actions, advantages=np.ones(3, np.float32))
    bad(ValueError, "actions: a scalar", logits[0, 0], np.int64(1))
    bad(ValueError, r"grad_out: \(1, 3, 7\)", logits, actions, grad_out=out[:1])
    bad(ValueError, "grad_out: a read-only array", logits, actions, grad_out=read_only(out))
    bad(
        ValueError,
        "grad_out: of use only with return_grad=True",
        logits,
        actions,
        return_grad=False,
    )
    for loss, how, grad in (("ppo", None, True), ("gspo", None, True), ("ppo", "none", True),
                            ("ppo", None, False)):  # fmt: skip
        for y in (7, -1, 2**31 - 1):
            wrong = actions.copy()
            wrong[1, 0] = y
            more = {"loss": loss, "reduction": how}
            if not grad:
                more |= {"return_grad": False, "grad_out": None}
            message = rf"actions: element 3 is {y}; allowed are 0 to 6 and ignore_index \(-100\)"
            bad(ValueError, message, logits, wrong, **more)
            bad(ValueError, message, logits, wrong.astype(np.int32), **more)
    flat = {"advantages": np.ones(1, np.float32), "old_logprobs": None, "ref_logprobs": None}
    bad(ValueError, "cu_seqlens: element", logits.reshape(6, 7), actions.reshape(6),
        cu_seqlens=np.array([0, 5]), grad_out=out.reshape(6, 7), **flat)  # fmt: skip
    assert (out == 5).all()


def test_wrong_arguments_of_values_and_advantages():
    x = np.zeros((2, 3), np.float32)
    for args, more, error, message in (
        (([0.0], x), {}, TypeError, "values: a numpy.ndarray, not list"),
        ((x.astype(int), x), {}, TypeError, "values: dtype int64"),
        ((x, None), {}, TypeError, "returns: a numpy.ndarray, not NoneType"),
        ((x, x[0]), {}, ValueError, r"returns: shape \(3,\); allowed: \(2, 3\)"),
        ((x, x, x[0]), {"clip": 0.1}, ValueError, r"old_values: shape \(3,\)"),
        ((x, x), {"clip": 0.1}, ValueError, "clip: it needs old_values"),
        ((x, x, x), {"clip": -0.1}, ValueError, "clip: -0.1; allowed: 0 and above, or None"),
        ((x, x, x), {"clip": np.nan}, ValueError, "clip: nan"),
        ((x, x, x), {"clip": "1"}, TypeError, "clip: a number"),
        ((x, x), {"mask": x[0] > 0}, ValueError, r"mask: shape \(3,\)"),
    ):
        with pytest.raises(error, match=message):
            ffn.value_loss(*args, **more)
    for args, more, error, message in (
        (([1.0], 1), {}, TypeError, "rewards: a numpy.ndarray, not list"),
        ((x.astype(complex), 1), {}, TypeError, "rewards: dtype complex128"),
        ((x, 4), {}, ValueError, "group_size: 4; 6 rewards are no multiple of it"),
        ((x, 0), {}, ValueError, "group_size: 0; allowed: 1 and above"),
        ((x, 2.0), {}, TypeError, r"group_size: an int, not 2\.0"),
        ((x, True), {}, TypeError, "group_size: an int, not True"),
        ((x, 2), {"scale": "std"}, ValueError, "scale: 'std'; allowed: 'none', 'group', 'batch'"),
        (
            (x, 2),
            {"baseline": None},
            ValueError,
            "baseline: None; allowed: 'mean', 'leave_one_out'",
        ),
    ):
        with pytest.raises(error, match=message):
            ffn.group_advantages(*args, **more)
    for args, more, error, message in (
        (([1.0], x), {}, TypeError, "rewards: a numpy.ndarray, not list"),
        ((x, x.astype(complex)), {}, TypeError, "values: dtype complex128"),
        ((x, x[:, :2]), {}, ValueError, r"values: shape \(2, 2\); allowed: \(2, 3\) or, with"),
        ((np.float32(1), x), {}, ValueError, "rewards: a scalar"),
        ((x, x), {"mask": x[0] > 0}, ValueError, r"mask: shape \(3,\); allowed: \(2, 3\)"),
        ((x, x), {"gamma": 1.5}, ValueError, "gamma: 1.5; allowed: 0 to 1"),
        ((x, x), {"lam": np.nan}, ValueError, "lam: nan; allowed: 0 to 1"),
        ((x, x), {"gamma": None}, TypeError, "gamma: a number"),
    ):
        with pytest.raises(error, match=message):
            ffn.gae(*args, **{"gamma": 1.0, "lam": 1.0, **more})
