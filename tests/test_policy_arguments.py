"""Wrong arguments of policy losses, value loss and advantages."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from policy_cases import (
    batch,
    vectors,
)


def wrong_arguments():
    v = vectors(3, 5)
    A, old = v.advantages, v.old
    inf, nan = math.inf, math.nan
    yield TypeError, "logprobs: a tensor", lambda: ff.policy_loss([1.0], advantages=A)
    yield TypeError, "logprobs: dtype", lambda: ff.policy_loss(v.mask, advantages=A)
    yield ValueError, "logprobs: a scalar", lambda: ff.policy_loss(torch.zeros(()), advantages=A)
    for value, error, message in (
        (None, TypeError, "advantages: a tensor, not NoneType"),
        (torch.ones(5), ValueError, r"advantages: shape \(5,\); allowed: \(3, 5\), \(3,\) or"),
        (v.mask, TypeError, "advantages: dtype"),
    ):
        yield error, message, lambda value=value: ff.policy_loss(v.lp, advantages=value)
    options = {
        "loss": ("gppo", r"loss: 'gppo'; allowed: 'reinforce', 'rloo'"),
        "kl": ("k4", "kl: 'k4'; allowed: 'k1', 'k2', 'k3'"),
        "importance": ("word", "importance: 'word'; allowed: 'token', 'sequence'"),
        "reduction": ("avg", "reduction: 'avg'; allowed: 'none', 'sum', 'mean', 'reinforce'"),
        "clip_low": (-0.1, "clip_low: -0.1; allowed"),
        "clip_high": (nan, "clip_high: nan; allowed"),
        "dual_clip": (1.0, "dual_clip: 1.0; allowed: above 1"),
        "delta": (0.0, "delta: 0.0; allowed: positive"),
        "kl_beta": (inf, "kl_beta: inf; allowed: finite"),
        "tau_pos": (0.0, "tau_pos: 0.0; allowed"),
        "tau_neg": (inf, "tau_neg: inf; allowed"),
        "old_logprobs": (old[:2], r"old_logprobs: shape \(2, 5\); allowed: \(3, 5\)"),
        "weights": (torch.ones(5), r"weights: shape \(5,\); allowed"),
        "mask": (v.mask[:2], r"mask: shape \(2, 5\); allowed: \(3, 5\)"),
    }
    for name, (value, message) in options.items():
        yield (
            ValueError,
            message,
            lambda n=name, x=value: ff.policy_loss(v.lp, advantages=A, **{n: x}),
        )
    yield TypeError, "mask: a tensor", lambda: ff.policy_loss(v.lp, advantages=A, mask=[True])
    yield (
        TypeError,
        "old_logprobs: a tensor",
        lambda: ff.policy_loss(v.lp, advantages=A, old_logprobs=1.0),
    )
    yield (
        TypeError,
        "clip_low: a number",
        lambda: ff.policy_loss(v.lp, advantages=A, clip_low="0.2"),
    )
    yield (
        ValueError,
        "kl_beta: 0.1; it needs ref_logprobs",
        lambda: ff.policy_loss(v.lp, advantages=A, kl_beta=0.1),
    )
    yield (
        ValueError,
        "num_tokens: -1.0; allowed",
        lambda: ff.policy_loss(v.lp, advantages=A, loss="dapo", num_tokens=-1),
    )
    yield (
        TypeError,
        "max_length: a number",
        lambda: ff.policy_loss(v.lp, advantages=A, loss="dr_grpo", max_length="7"),
    )
    for loss in ("rloo", "vespo"):
        yield (
            ValueError,
            "importance: 'token'; loss=",
            lambda loss=loss: ff.policy_loss(v.lp, advantages=A, loss=loss, importance="token"),
        )
    flat = v.lp[0]
    for ends in ([0, 6], [1, 5], [0, 4, 2, 5], [0, 4]):
        yield (
            ValueError,
            "cu_seqlens: element",
            lambda ends=ends: ff.policy_loss(flat, advantages=flat, cu_seqlens=torch.tensor(ends)),
        )
    yield (
        ValueError,
        "cu_seqlens: shape",
        lambda: ff.policy_loss(v.lp, advantages=v.lp, cu_seqlens=torch.tensor([0, 15])),
    )
    yield (
        ValueError,
        "max_length: None",
        lambda: ff.policy_loss(
            flat, advantages=flat, cu_seqlens=torch.tensor([0, 5]), loss="dr_grpo"
        ),
    )
    logits, actions, w = batch(3, 5, 7)
    A = w.advantages
    yield (
        TypeError,
        "logits: a tensor",
        lambda: ff.policy_loss_from_logits(1, actions, advantages=A),
    )
    yield TypeError, "actions: dtype", lambda: ff.policy_loss_from_logits(logits, old, advantages=A)
    yield (
        ValueError,
        "actions: shape",
        lambda: ff.policy_loss_from_logits(logits, actions[:2], advantages=A),
    )
    for leaf in (False, True):
        for bad in (7, -1):
            yield ValueError, f"actions: element 3 is {bad}", (
                lambda bad=bad, leaf=leaf: ff.policy_loss_from_logits(
                    logits.clone().requires_grad_(leaf), actions.view(-1).index_fill(
                        0, torch.tensor(3), bad).view(3, 5), advantages=A
                )
            )  # fmt: skip
        for name, value in (("temperature", 0.0), ("temperature", nan), ("entropy_coef", inf)):
            yield (
                ValueError,
                f"{name}: ",
                lambda n=name, x=value, leaf=leaf: ff.policy_loss_from_logits(
                    logits.clone().requires_grad_(leaf), actions, advantages=A, **{n: x}
                ),
            )
    yield (
        TypeError,
        "ignore_index: an int",
        lambda: ff.policy_loss_from_logits(logits, actions, advantages=A, ignore_index=1.5),
    )
    yield ValueError, "clip: it needs old_values", lambda: ff.value_loss(old, old, clip=0.2)
    yield ValueError, "clip: -1.0; allowed", lambda: ff.value_loss(old, old, old, clip=-1)
    yield ValueError, "returns: ", lambda: ff.value_loss(old, old[:2])
    yield TypeError, "returns: a tensor", lambda: ff.value_loss(old, None)
    yield ValueError, "mask: shape", lambda: ff.value_loss(old, old, mask=v.mask[0])
    r = old.view(-1)
    yield ValueError, "group_size: 4; 15 rewards", lambda: ff.group_advantages(r, 4)
    yield ValueError, "group_size: 0; allowed", lambda: ff.group_advantages(r, 0)
    yield TypeError, "group_size: an int", lambda: ff.group_advantages(r, 3.0)
    yield ValueError, "scale: 'all'; allowed", lambda: ff.group_advantages(r, 3, scale="all")
    yield ValueError, "baseline: 'x'; allowed", lambda: ff.group_advantages(r, 3, baseline="x")
    yield TypeError, "rewards: a tensor", lambda: ff.group_advantages([1.0], 1)
    yield ValueError, "gamma: 1.5; allowed: 0 to 1", lambda: ff.gae(old, old, gamma=1.5, lam=1.0)
    yield ValueError, "lam: -1.0; allowed: 0 to 1", lambda: ff.gae(old, old, gamma=1.0, lam=-1)
    yield ValueError, "values: shape", lambda: ff.gae(old, old[:, :3], gamma=1.0, lam=1.0)
    yield ValueError, "mask: shape", lambda: ff.gae(old, old, gamma=1.0, lam=1.0, mask=v.mask[:1])


@pytest.mark.parametrize("case", range(len(list(wrong_arguments()))))
def test_wrong_arguments(case):
    error, message, call = list(wrong_arguments())[case]
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_written_where_an_argument_is_wrong():
    logits, actions, v = batch(2, 3, 7)
    before = logits.clone()
    actions[1, 2] = 7
    with pytest.raises(ValueError, match="actions: element 5 is 7"):
        ff.policy_loss_from_logits(
            logits.requires_grad_(), actions, advantages=v.advantages, inplace=True
        )
    assert torch.equal(logits.detach(), before)
