"""Policy-gradient losses, value loss and advantages against float64: from log-probs and from logits."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args.policy import POLICY_LOSSES as LOSSES
from finefuse.reference import logprobs as reference_logprobs
from finefuse.reference import policy as reference
from guards import between_guards
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ScalarErrors, as_float64, check

RAW = torch.ops.finefuse
IGNORE = -100
SEQUENCE = [name for name, spec in LOSSES.items() if spec.importance != "token"]
TOKEN = [name for name in LOSSES if name not in SEQUENCE]
METRICS = ("clip_fraction_low", "clip_fraction_high", "approx_kl")

# Each option in some set; what a loss has no use for it must not mind.
OPTIONS = {
    "plain": {},
    "kl": {"kl_beta": 0.3, "kl": "k3", "dual_clip": 1.5},
    "kl times ratio": {"kl_beta": 0.2, "kl": "k1", "kl_times_ratio": True, "delta": 1.4},
    "k2": {"kl_beta": 0.5, "kl": "k2", "clip_low": 0.1, "clip_high": 0.4, "weighted": True},
    "sequence": {"importance": "sequence", "by_token": True, "weighted": True},
    "temperatures": {"tau_pos": 0.7, "tau_neg": 1.6, "num_tokens": 11.0, "max_length": 23},
}


def vectors(sequences, length, dtype=torch.float32, seed=0, spread=0.3, by_token=False):
    """Log-probabilities, of now, old and of the reference, advantages, mask, weights."""
    g = torch.Generator().manual_seed(seed)
    shape = (sequences, length)
    lp = -torch.rand(shape, generator=g) * 4
    old = lp + torch.randn(shape, generator=g) * spread
    ref = lp + torch.randn(shape, generator=g) * spread
    advantages = torch.randn(shape if by_token else shape[:1], generator=g)
    mask = torch.rand(shape, generator=g) < 0.8
    if sequences > 2:
        mask[1] = False  # a sequence without tokens
    weights = torch.rand(shape, generator=g) * (torch.rand(shape, generator=g) < 0.9)
    floats = (t.to(dtype) for t in (lp, old, ref, advantages, weights))
    lp, old, ref, advantages, weights = floats
    return SimpleNamespace(
        lp=lp, old=old, ref=ref, advantages=advantages, mask=mask, weights=weights
    )


def arguments(v, options, mask=True):
    """Keyword arguments of both ff.policy_loss and the reference, but for advantages."""
    options = dict(options)
    weighted, _ = options.pop("weighted", False), options.pop("by_token", False)
    kwargs = {"old_logprobs": v.old, "mask": v.mask if mask else None, **options}
    if weighted:
        kwargs["weights"] = v.weights
    if "kl_beta" in options:
        kwargs["ref_logprobs"] = v.ref
    return kwargs


def numpy(kwargs):
    return {
        k: x.double().numpy() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in kwargs.items()
    }


def check_scalar(name, ours, eager, truth, terms):
    """The error rule for a sum that may cancel: the scale is that of its absolute terms."""
    if np.ndim(truth):  # a number a token
        check(name, ours, eager, truth)
        return
    check(
        name,
        *(np.array([as_float64(x).item(), terms]) for x in (ours, eager, truth)),
        dtype=ours.dtype,
    )


def close(ours, other):
    """Two ways to the same number, each rounded to float32 on its way."""
    scale = other.abs().max().item()
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6 * scale)


def truth(lp, advantages, kwargs, upstream=None):
    return reference.policy_loss(
        lp.double().numpy(), advantages.double().numpy(), upstream=upstream, **numpy(kwargs)
    )


# ---- the formulas, as TRL writes them, in the type of their input ----------------------------------


def eager(lp, advantages, *, loss, old_logprobs=None, mask=None, weights=None, ref_logprobs=None,
          clip_low=0.2, clip_high=None, dual_clip=None, delta=None, kl_beta=0.0, kl="k3",
          kl_times_ratio=False, importance=None, reduction=None, max_length=None, num_tokens=None,
          tau_pos=1.0, tau_neg=1.05):  # fmt: skip
    mask = torch.ones_like(lp) if mask is None else mask.to(lp.dtype)
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    old = lp.detach() if old_logprobs is None else old_logprobs
    log_ratio = lp - old
    high = clip_high if clip_high is not None else (5.0 if loss == "cispo" else 0.2)
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    whole = loss == "rloo"
    if whole:
        log_weights = (log_ratio * mask).sum(-1, keepdim=True)
    elif importance == "sequence" or (importance is None and loss in ("gspo", "luspo")):
        log_weights = (log_ratio * mask).sum(-1, keepdim=True) / n
    else:
        log_weights = log_ratio
    ratio = torch.exp(log_weights)
    if loss == "cispo":
        value = -ratio.clamp(max=high).detach() * A * lp
    elif loss == "reinforce":
        value = -A * lp
    elif loss == "sapo":
        tau = torch.full_like(A, tau_neg).masked_fill(A > 0, tau_pos)
        value = -A * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    elif loss == "vespo":
        log_w = (log_ratio.clamp(-20, 20) * mask).sum(-1, keepdim=True)
        log_w = log_w.clamp(math.log(1e-8), 20.0)
        k, lam = torch.where(A >= 0, 2.0, 3.0), torch.where(A >= 0, 3.0, 2.0)
        value = -torch.exp(lam + k * log_w - lam * torch.exp(log_w)).detach() * A * lp
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + high)
        capped = ratio if delta is None else ratio.clamp(max=delta)
        value = -torch.min(capped * A, clipped * A)
        if dual_clip is not None:
            value = torch.where(A < 0, torch.min(value, -A * dual_clip), value)
    if weights is not None:
        value = value * weights
    if whole:
        value = value / n
    if kl_beta != 0.0:
        d = ref_logprobs - lp
        per_token = {"k1": -d, "k2": 0.5 * d**2, "k3": torch.exp(d) - d - 1}[kl]
        value = value + kl_beta * (per_token * ratio if kl_times_ratio else per_token)
    value = value * mask  # (B, 1) where all of it is a sequence's
    how = reduction or loss
    if how == "none":
        return value
    if how == "sum":
        return value.sum()
    if how in ("grpo", "gspo", "sapo"):
        return (value.sum(-1) / n[:, 0]).mean()
    if how in ("ppo", "bnpo", "reinforce", "mean"):
        return value.sum() / mask.sum().clamp(min=1.0)
    if how == "dr_grpo":
        return value.sum() / (lp.size(0) * (max_length or lp.size(1)))
    if how in ("dapo", "cispo", "vespo"):
        return value.sum() / (num_tokens or mask.sum().clamp(min=1.0))
    assert how in ("luspo", "rloo")
    return value.sum(-1).mean()


def run(function, lp, advantages, kwargs, upstream=None):
    """(what it returned, gradient by lp)."""
    x = lp.clone().requires_grad_()
    out = function(x, advantages, **kwargs)
    loss = getattr(out, "loss", out)
    (loss if upstream is None else (loss * upstream).sum()).backward()
    return out, x.grad


def ours(lp, advantages, **kwargs):
    return ff.policy_loss(lp, advantages=advantages, **kwargs)


# ---- from log-probabilities ------------------------------------------------------------------------


def test_one_table():
    """Losses in _args and in the reference are the same, and every code has a formula."""
    assert {k: tuple(v[:3]) for k, v in LOSSES.items()} == reference.LOSSES
    assert all(v.clip_high == (5.0 if k == "cispo" else 0.2) for k, v in LOSSES.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(isa, loss, options, dtype):
    given_options = OPTIONS[options]
    if "importance" in given_options and loss in ("rloo", "vespo"):
        given_options = {k: v for k, v in given_options.items() if k != "importance"}
    for sequences, length, mask in ((1, 1, False), (5, 17, True), (3, 40, False)):
        v = vectors(sequences, length, dtype, by_token=given_options.get("by_token", False))
        kwargs = {"loss": loss, **arguments(v, given_options, mask)}
        out, grad = run(ours, v.lp, v.advantages, kwargs)
        e, e_grad = run(eager, v.lp, v.advantages, kwargs)
        t = truth(v.lp, v.advantages, kwargs)
        check_scalar(f"loss {sequences}x{length}", out.loss, e, t.loss, t.terms)
        check(f"gradient {sequences}x{length}", grad, e_grad, t.gradient)
        for name in METRICS:
            check(name, getattr(out, name), getattr(t, name), getattr(t, name))
            assert not getattr(out, name).requires_grad
        assert out.entropy is None
        assert (grad[~v.mask] == 0).all() or not mask


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "grpo", "dr_grpo", "dapo", "rloo"])
@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(loss, reduction):
    v = vectors(4, 9, torch.float64)
    kwargs = {"loss": loss, "reduction": reduction, **arguments(v, OPTIONS["kl"])}
    up = torch.randn(4, 9, dtype=torch.float64) if reduction == "none" else None
    out, grad = run(ours, v.lp, v.advantages, kwargs, up)
    e, e_grad = run(eager, v.lp, v.advantages, kwargs, up)
    t = truth(v.lp, v.advantages, kwargs, None if up is None else up.numpy())
    check_scalar("loss", out.loss, e, t.loss, t.terms)
    check("gradient", grad, e_grad, t.gradient)
    check("eager", e, t.loss, t.loss)
    check("eager's gradient", e_grad, t.gradient, t.gradient)
    if reduction == "none":
        assert (out.loss[~v.mask] == 0).all()
        whole = ours(v.lp, v.advantages, **{**kwargs, "reduction": "sum"}).loss
        torch.testing.assert_close(out.loss.sum(), whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_scalar_over_seeds(loss):
    errors = ScalarErrors(loss, torch.float32)
    for seed in range(40):
        v = vectors(4, 16, seed=seed)
        kwargs = {"loss": loss, **arguments(v, OPTIONS["kl"])}
        t = truth(v.lp, v.advantages, kwargs)
        errors.add(
            ours(v.lp, v.advantages, **kwargs).loss,
            eager(v.lp, v.advantages, **kwargs),
            t.loss,
            t.terms,
        )
    errors.check()


TRL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss", TRL_LOSSES)
def test_trl(loss, importance):
    """The loss and metrics of TRL's own GRPOTrainer, its model taken out."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
    v = vectors(4, 9, torch.float64)
    kwargs = {"old_logprobs": v.old, "ref_logprobs": v.ref, "kl_beta": 0.1, "delta": 1.5}
    kwargs["tau_neg"] = 1.25  # which float32 has exactly: TRL makes τ in it
    recorded: dict = {"train": trainer.defaultdict(list), "eval": trainer.defaultdict(list)}
    fake = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=importance, beta=0.1, loss_type=loss, epsilon_low=0.2,
        epsilon_high=5.0 if loss == "cispo" else 0.2, model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=1.5, use_bias_correction_kl=False, sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.25, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0,
            vespo_lambda_neg=2.0, steps_per_generation=1,
        ),
        use_vllm=False, vllm_importance_sampling_correction=False, max_completion_length=9,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, _metrics=recorded,
        get_gamma_weights=trainer.GRPOTrainer.get_gamma_weights, use_adaptive_entropy=False,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x,
            gather_for_metrics=lambda x: x, sync_gradients=True,
        ),
    )  # fmt: skip
    x = v.lp.clone().requires_grad_()
    fake._get_per_token_logps_and_entropies = lambda *a, **k: (x, torch.zeros_like(x), None)
    ids = torch.zeros(4, 9, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
        "completion_mask": v.mask.long(), "advantages": v.advantages,
        "old_per_token_logps": v.old, "ref_per_token_logps": v.ref,
        "num_items_in_batch": v.mask.sum(),
    }  # fmt: skip
    try:
        theirs = trainer.GRPOTrainer._compute_loss(fake, None, inputs)
    except AttributeError as error:  # another version's trainer has other parts
        pytest.skip(f"this trl's trainer cannot be taken apart: {error}")
    theirs.backward()
    if loss == "vespo" and importance == "token":
        importance = None
    out, grad = run(
        ours, v.lp, v.advantages, {"loss": loss, "mask": v.mask, "importance": importance, **kwargs}
    )
    torch.testing.assert_close(out.loss.detach(), theirs.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, x.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_by_autograd(loss):
    """Of the reference formula in float64, differentiated by torch, and by differences."""
    for name, options in OPTIONS.items():
        if "importance" in options and loss in ("rloo", "vespo"):
            continue
        v = vectors(3, 6, torch.float64, seed=3, by_token=options.get("by_token", False))
        kwargs = {"loss": loss, **arguments(v, options)}
        _, grad = run(ours, v.lp, v.advantages, kwargs)
        _, want = run(eager, v.lp, v.advantages, kwargs)
        check(f"gradient {name}", grad, want, want)
        if loss in ("cispo", "vespo"):
            continue  # their stop-gradient is no derivative
        assert torch.autograd.gradcheck(
            lambda z: ours(z, v.advantages, **kwargs).loss, (v.lp.clone().requires_grad_(),)
        )


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_ratio_on_a_boundary(loss):
    """Exactly on a bound the gradient passes, as torch.clamp's does, and nothing counts as clipped."""
    for x, A in ((0.5, 1.0), (0.5, -1.0), (-0.5, 1.0), (-0.5, -1.0)):
        rho = math.exp(x)
        lp = torch.tensor([[x]], dtype=torch.float64)
        low, high = (1 - rho, 0.3) if x < 0 else (0.2, rho - 1)
        high = rho if loss == "cispo" else high  # the cap itself
        kwargs = {
            "loss": loss, "old_logprobs": torch.zeros(1, 1, dtype=torch.float64), "clip_low": low,
            "clip_high": high,
        }  # fmt: skip
        if loss != "cispo" and 1 + (rho - 1) != rho and 1 - (1 - rho) != rho:
            continue  # the bound itself is rounded
        out, grad = run(ours, lp, torch.tensor([A]).double(), kwargs)
        _, want = run(eager, lp, torch.tensor([A]).double(), kwargs)
        assert grad.item() != 0
        assert grad.item() == pytest.approx(want.item(), rel=1e-14)
        assert out.clip_fraction_low == out.clip_fraction_high == 0
    one = torch.zeros(2, 3, requires_grad=True)  # on-policy: ρ = 1, and both bounds at 1
    out = ff.policy_loss(
        one, advantages=torch.tensor([1.0, -2.0]), old_logprobs=torch.zeros(2, 3), loss=loss,
        clip_low=0.0, clip_high=1.0 if loss == "cispo" else 0.0,
    )  # fmt: skip
    out.loss.backward()
    share = 1 / 6
    assert out.loss.item() == (0.5 if loss != "cispo" else 0.0)
    torch.testing.assert_close(one.grad, torch.tensor([[-share] * 3, [2 * share] * 3]))
    assert out.clip_fraction_low == out.clip_fraction_high == 0


def test_dual_clip_and_delta():
    lp, old = torch.tensor([[2.0]]).requires_grad_(), torch.zeros(1, 1)
    rho = math.exp(2.0)
    A = torch.tensor([-1.0])
    free = ff.policy_loss(lp, advantages=A, old_logprobs=old).loss
    assert free.item() == pytest.approx(rho)
    out = ff.policy_loss(lp, advantages=A, old_logprobs=old, dual_clip=3.0).loss
    assert out.item() == 3.0
    out.backward()
    assert lp.grad.item() == 0
    lp.grad = None
    out = ff.policy_loss(lp, advantages=A, old_logprobs=old, delta=4.0).loss
    assert out.item() == 4.0
    out.backward()
    assert lp.grad.item() == 0
    # for A > 0 neither matters
    for option in ({"dual_clip": 3.0}, {"delta": 4.0}):
        out = ff.policy_loss(lp, advantages=-A, old_logprobs=old, **option).loss
        assert out.item() == pytest.approx(-1.2)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_old_logprobs(loss):
    """The ratio is 1 with a gradient, whatever the log-probability; metrics are 0."""
    v = vectors(3, 5, torch.float64)
    kwargs = {"loss": loss, "mask": v.mask}
    out, grad = run(ours, v.lp, v.advantages, kwargs)
    e, want = run(eager, v.lp, v.advantages, kwargs)
    check("loss", out.loss, e, e)
    check("gradient", grad, want, want)
    assert [getattr(out, m).item() for m in METRICS] == [0, 0, 0]
    if loss in ("ppo", "grpo", "gspo", "sapo"):
        lp = v.lp.clone()
        lp[0, 0] = -math.inf
        out, grad = run(ours, lp, v.advantages, kwargs)
        assert torch.isfinite(out.loss)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_positions(loss):
    """What is masked is never read: NaN and inf there leave no trace; nothing is left: 0, not NaN."""
    v = vectors(4, 6)
    kwargs = {"loss": loss, **arguments(v, {**OPTIONS["kl"], "weighted": True})}
    want, want_grad = run(ours, v.lp, v.advantages, kwargs)
    dirty = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()}
    lp = v.lp.clone()
    for i, x in enumerate((lp, *(dirty[k] for k in ("old_logprobs", "ref_logprobs", "weights")))):
        x[~v.mask] = (math.nan, math.inf, -math.inf)[i % 3]
    advantages = v.advantages.clone()
    advantages[1] = math.nan  # of the sequence without tokens
    out, grad = run(ours, lp, advantages, dirty)
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(grad, want_grad)
    assert all(torch.equal(a, b) for a, b in zip(out[1:4], want[1:4], strict=True))
    nothing = {**dirty, "mask": torch.zeros_like(v.mask)}
    x = lp.clone().requires_grad_()
    out = ours(x, advantages, **nothing)
    (out.loss * math.inf).backward()
    assert (x.grad == 0).all()
    for reduction in (None, "sum", "mean", "grpo", "none"):
        out, grad = run(ours, lp, advantages, {**nothing, "reduction": reduction}, torch.ones(()))
        assert (out.loss == 0).all()
        assert [getattr(out, m).item() for m in METRICS] == [0, 0, 0]
        assert (grad == 0).all()
    for shape in ((0, 5), (3, 0)):
        empty = torch.zeros(shape, requires_grad=True)
        out = ff.policy_loss(empty, advantages=torch.ones(shape[0]), old_logprobs=empty, loss=loss)
        assert out.loss == 0
        out.loss.backward()
        assert empty.grad.shape == shape


@pytest.mark.parametrize("loss", LOSSES)
def test_ratios_that_overflow(loss):
    """A log-ratio beyond ±60 is clamped there and passes no gradient through the ratio."""
    old = torch.zeros(2, 3)
    for x, A in ((1e4, -1.0), (1e4, 1.0), (-1e4, -1.0), (-1e4, 1.0), (61.0, -1.0)):
        lp = torch.full((2, 3), x)
        kwargs = {
            "loss": loss, "old_logprobs": old, "ref_logprobs": -lp, "kl_beta": 0.1, "kl": "k3",
            "kl_times_ratio": True,
        }  # fmt: skip
        out, grad = run(ours, lp, torch.full((2,), A), kwargs)
        t = truth(lp, torch.full((2,), A), kwargs)
        assert torch.isfinite(out.loss)
        assert torch.isfinite(grad).all()
        assert all(torch.isfinite(m) for m in out[1:4])
        check_scalar("loss", out.loss, t.loss, t.loss, t.terms)
        check("gradient", grad, t.gradient, t.gradient)
        if loss == "ppo":
            _, grad = run(ours, lp, torch.full((2,), A), {"old_logprobs": old})
            assert (grad == 0).all()


def test_shapes_of_advantages():
    v = vectors(3, 5)
    kwargs = {"loss": "grpo", **arguments(v, {})}
    want = ours(v.lp, v.advantages, **kwargs).loss
    assert torch.equal(want, ours(v.lp, v.advantages[:, None], **kwargs).loss)
    assert torch.equal(want, ours(v.lp, v.advantages[:, None].expand(3, 5), **kwargs).loss)
    assert torch.equal(want, ours(v.lp.view(3, 1, 5), v.advantages.view(3, 1), **{
        k: x.view(3, 1, 5) if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()
    }).loss)  # fmt: skip
    row = {k: x[0] if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()}
    one = {k: x[:1] if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()}
    assert torch.equal(
        ours(v.lp[0], v.advantages[0], **row).loss, ours(v.lp[:1], v.advantages[:1], **one).loss
    )
    strided = {
        k: x.t().contiguous().t() if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()
    }
    assert torch.equal(want, ours(v.lp.t().contiguous().t(), v.advantages, **strided).loss)
    per_row = {**kwargs, "weights": torch.tensor([0.5, 1.0, 2.0])}
    full = {**kwargs, "weights": per_row["weights"][:, None].expand(3, 5)}
    assert torch.equal(
        ours(v.lp, v.advantages, **per_row).loss, ours(v.lp, v.advantages, **full).loss
    )


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_packed_sequences(loss, index):
    """cu_seqlens are the sequences of a padded batch, without the padding."""
    lengths = [3, 0, 6, 1]
    v = vectors(4, 6)
    v.mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    kwargs = {"loss": loss, **arguments(v, {**OPTIONS["kl"], "weighted": True, "max_length": 6})}
    want, want_grad = run(ours, v.lp, v.advantages, kwargs)
    flat = {
        k: x[v.mask] if isinstance(x, torch.Tensor) else x for k, x in kwargs.items() if k != "mask"
    }
    flat["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths)], dtype=index)
    for advantages in (v.advantages, v.advantages[:, None].expand(4, 6)[v.mask]):
        out, grad = run(ours, v.lp[v.mask], advantages, flat)
        assert torch.equal(out.loss, want.loss)
        assert torch.equal(grad, want_grad[v.mask])
        assert all(torch.equal(a, b) for a, b in zip(out[1:4], want[1:4], strict=True))
    keep = torch.tensor([True, False] * 5)
    both, _ = run(ours, v.lp[v.mask], v.advantages, {**flat, "mask": keep})
    masked = v.mask.clone()
    masked[v.mask] = keep
    assert torch.equal(both.loss, ours(v.lp, v.advantages, **{**kwargs, "mask": masked}).loss)


def test_types():
    """16-bit log-probabilities are widened exactly; one float64 makes it all float64."""
    v = vectors(3, 4, torch.bfloat16)
    kwargs = arguments(v, OPTIONS["kl"])
    out, grad = run(ours, v.lp, v.advantages, kwargs)
    wide = {
        k: x.float() if getattr(x, "is_floating_point", bool)() else x for k, x in kwargs.items()
    }
    want, want_grad = run(ours, v.lp.float(), v.advantages.float(), wide)
    assert torch.equal(out.loss, want.loss)
    assert out.loss.dtype is torch.float32
    assert torch.equal(grad, want_grad.bfloat16())
    mixed, grad = run(ours, v.lp, v.advantages.double(), kwargs)
    assert mixed.loss.dtype is torch.float32
    mixed, grad = run(ours, v.lp, v.advantages, {**kwargs, "old_logprobs": v.old.double()})
    assert mixed.loss.dtype is torch.float64
    assert grad.dtype is torch.bfloat16


def test_constants():
    """Only logprobs gets a gradient; a number may be a 0-d tensor; threads change no bit."""
    v = vectors(64, 300)
    kwargs = arguments(v, OPTIONS["kl"])
    old = v.old.clone().requires_grad_()
    out, want = run(ours, v.lp, v.advantages, {**kwargs, "old_logprobs": old})
    assert old.grad is None
    tensors = {k: torch.tensor(x) if isinstance(x, float) else x for k, x in kwargs.items()}
    assert torch.equal(out.loss, ours(v.lp, v.advantages, **tensors).loss)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again, grad = run(ours, v.lp, v.advantages, kwargs)
        assert torch.equal(grad, want)
        assert all(torch.equal(a, b) for a, b in zip(out[:4], again[:4], strict=True))


# ---- from logits ------------------------------------------------------------------------------------


def batch(sequences, tokens, vocab, dtype=torch.float32, seed=0, spread=2.0):
    """Logits, actions, and vectors whose ratios are near 1."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(sequences, tokens, vocab, generator=g) * spread).to(dtype)
    actions = torch.randint(0, vocab, (sequences, tokens), generator=g)
    v = vectors(sequences, tokens, torch.float64 if dtype is torch.float64 else torch.float32, seed)
    lp = torch.log_softmax(logits.double(), -1).gather(-1, actions[..., None])[..., 0]
    noise = v.old - v.lp, v.ref - v.lp
    v.old, v.ref = (lp + n for n in noise)
    v.lp = None
    return logits, actions, v


def eager_from_logits(logits, actions, advantages, *, entropy_coef=0.0, temperature=1.0, **kwargs):
    """In the type of the logits, as a user of torch writes it."""
    mask = kwargs["mask"]
    logp = torch.log_softmax(logits / temperature, -1)
    lp = logp.gather(-1, actions[..., None])[..., 0]
    kwargs = {
        k: x.to(lp.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in kwargs.items()
    }
    loss = eager(lp, advantages.to(lp.dtype), **kwargs)
    entropy = -(logp.exp() * logp).sum(-1)
    if kwargs.get("reduction") == "none":
        return loss - entropy_coef * entropy * mask
    return loss - entropy_coef * (entropy * mask).sum() / mask.sum().clamp(min=1)


def truth_from_logits(logits, actions, advantages, *, entropy_coef=0.0, temperature=1.0, **kwargs):
    """(loss, gradient of the logits, entropy, the reference's output; its terms with the entropy's)."""
    b, t, v = logits.shape
    flat = logits.double().reshape(-1, v).numpy()
    mask = kwargs["mask"]
    y = torch.where(mask, actions, IGNORE).reshape(-1).numpy()
    lp, entropy, _ = reference_logprobs.token_logprobs(flat, y, temperature)
    out = truth(torch.from_numpy(lp).reshape(b, t), advantages, kwargs)
    n = max(int(mask.sum()), 1)
    none = kwargs.get("reduction") == "none"
    h = np.full(len(y), -entropy_coef * (1 if none else 1 / n))
    dz = reference_logprobs.token_logprobs_gradient(
        flat, y, out.gradient.reshape(-1), h, temperature=temperature
    )
    bonus = entropy_coef * (entropy.reshape(b, t) if none else entropy.sum() / n)
    out = out._replace(terms=out.terms + abs(entropy_coef) * entropy.sum() / n)
    return out.loss - bonus, dz.reshape(b, t, v), entropy.sum() / n, out


def run_logits(function, logits, actions, advantages, kwargs):
    x = logits.clone().requires_grad_()
    out = function(x, actions, advantages, **kwargs)
    getattr(out, "loss", out).sum().backward()
    return out, x


def ours_from_logits(logits, actions, advantages, **kwargs):
    return ff.policy_loss_from_logits(logits, actions, advantages=advantages, **kwargs)


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


# ---- value loss, advantages ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 63, 9001])  # 9001: three partial sums
def test_value_loss(isa, count, dtype):
    g = torch.Generator().manual_seed(count)
    v, r, old = (torch.randn(count, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    mask = torch.rand(count, generator=g) < 0.7
    for clip, m in ((None, None), (0.2, None), (0.2, mask), (0.0, mask)):
        x, y = v.clone().requires_grad_(), v.clone().requires_grad_()
        out = ff.value_loss(x, r, old, clip=clip, mask=m)
        out.backward()
        loss = (y - r) ** 2
        if clip is not None:
            loss = torch.max(loss, (torch.min(torch.max(y, old - clip), old + clip) - r) ** 2)
        keep = torch.ones_like(loss) if m is None else m.to(dtype)
        e = 0.5 * (loss * keep).sum() / keep.sum().clamp(min=1)
        e.backward()
        arrays = (None if z is None else z.double().numpy() for z in (v, r, old))
        t, dt = reference.value_loss(*arrays, clip, None if m is None else m.numpy())
        check("loss", out, e, t)
        check("gradient", x.grad, y.grad, dt)
    nan = torch.where(mask, v, math.nan).requires_grad_()
    out = ff.value_loss(nan, r, old, clip=0.2, mask=mask)
    out.backward()
    assert torch.isfinite(out)
    assert (nan.grad[~mask] == 0).all()
    empty = torch.zeros(0, dtype=dtype, requires_grad=True)
    out = ff.value_loss(empty, empty)
    out.backward()
    assert out == 0


def test_masks_of_any_bytes():
    """A bool whose byte is neither 0 nor 1, as a view of other bytes has, counts once."""
    odd = torch.tensor([[2, 0, 1, 255, 7], [0, 0, 3, 1, 0]], dtype=torch.uint8).view(torch.bool)
    plain = odd.view(torch.uint8) != 0
    v = vectors(2, 5)
    for loss in LOSSES:
        kwargs = {"loss": loss, "old_logprobs": v.old}
        out, grad = run(ours, v.lp, v.advantages, {**kwargs, "mask": odd})
        want, want_grad = run(ours, v.lp, v.advantages, {**kwargs, "mask": plain})
        assert torch.equal(out.loss, want.loss)
        assert torch.equal(grad, want_grad)
    assert torch.equal(ff.value_loss(v.lp, v.old, mask=odd), ff.value_loss(v.lp, v.old, mask=plain))


def test_value_loss_at_the_edges():
    mask = torch.tensor([True, False, True, False])
    v = torch.ones(4, requires_grad=True)
    (ff.value_loss(v, torch.zeros(4), mask=mask) * math.inf).backward()
    assert (v.grad[~mask] == 0).all()
    old = torch.tensor([math.nan, 0.0])
    x = torch.ones(2, requires_grad=True)
    out = ff.value_loss(x, torch.zeros(2), old, clip=0.1)
    out.backward()
    assert torch.isnan(out)  # as torch.max of the two squares
    assert torch.isnan(x.grad[0])
    assert not torch.isnan(x.grad[1])


def test_temperatures_of_sapo_that_overflow():
    lp, old = torch.tensor([[-5.0, 3.0]]), torch.zeros(1, 2)
    for tau in (1000.0, 1e6):
        kwargs = {"loss": "sapo", "old_logprobs": old, "tau_pos": tau, "tau_neg": tau}
        for A in (1.0, -1.0):
            out, grad = run(ours, lp, torch.tensor([A]), kwargs)
            assert torch.isfinite(out.loss)
            assert torch.isfinite(grad).all()


def test_value_loss_autograd():
    v, r, old = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
    for clip in (None, 0.3):
        assert torch.autograd.gradcheck(
            lambda x: ff.value_loss(x, r, old, clip=clip), (v.clone().requires_grad_(),)
        )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.functional.hessian(lambda x: ff.value_loss(x, r), v)
    narrow = torch.randn(6).bfloat16().requires_grad_()
    out = ff.value_loss(narrow, torch.zeros(6))
    out.backward()
    assert out.dtype is torch.float32
    assert narrow.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_group_advantages(isa, scale, baseline):
    g = torch.Generator().manual_seed(0)
    for groups, size in ((1, 1), (3, 2), (5, 8), (2, 300)):
        for dtype in (torch.float32, torch.float64):
            r = torch.randn(groups * size, generator=g, dtype=torch.float64).to(dtype)
            if size > 2:
                r[1], r[-1] = math.nan, math.nan
            want = reference.group_advantages(r.double().numpy(), size, scale, baseline)
            out = ff.group_advantages(r, size, scale=scale, baseline=baseline)
            check(f"{groups}x{size}", out, want, want)
            assert torch.equal(out, ff.group_advantages(r.view(groups, size), size, scale=scale,
                                                        baseline=baseline).view(-1))  # fmt: skip
    same = ff.group_advantages(torch.ones(6, requires_grad=True), 3, scale=scale, baseline=baseline)
    assert (same == 0).all()
    assert not same.requires_grad
    assert (ff.group_advantages(torch.full((4,), math.nan), 2, scale=scale) == 0).all()
    assert ff.group_advantages(torch.tensor([1, 0, 1, 1]), 2, scale=scale).dtype is torch.float32
    assert ff.group_advantages(torch.zeros(0), 4).shape == (0,)


def test_group_advantages_are_trl_s():
    r = torch.rand(6, 4, dtype=torch.float64)
    want = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(ff.group_advantages(r.view(-1), 4), want.view(-1))
    loo = r - (r.sum(1, keepdim=True) - r) / 3
    out = ff.group_advantages(r.view(-1), 4, scale="none", baseline="leave_one_out")
    torch.testing.assert_close(out, loo.view(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 40), (5, 700)], ids=str)
def test_gae(isa, shape, dtype):
    g = torch.Generator().manual_seed(0)
    r = torch.randn(shape, generator=g).to(dtype)
    longer = torch.randn(*shape[:-1], shape[-1] + 1, generator=g).to(dtype)
    mask = torch.rand(shape, generator=g) < 0.8
    for values in (longer[..., :-1], longer):
        for m in (None, mask):
            A, returns = ff.gae(r, values, gamma=0.97, lam=0.9, mask=m)
            t = reference.gae(
                r.double().numpy(), values.double().numpy(), 0.97, 0.9,
                None if m is None else m.numpy(),
            )  # fmt: skip
            check("advantages", A, t[0], t[0])
            check("returns", returns, t[1], t[1])
    nan = torch.where(mask, r, math.nan)
    A, _ = ff.gae(
        nan, torch.where(mask, longer[..., :-1], math.nan), gamma=1.0, lam=0.95, mask=mask
    )
    assert torch.isfinite(A).all()
    assert (A[~mask] == 0).all()
    assert ff.gae(torch.zeros(3, 0), torch.zeros(3, 0), gamma=1, lam=1)[0].shape == (3, 0)


def test_gae_as_trl_writes_it():
    r, v = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    last, reverse = torch.zeros(4, dtype=torch.float64), []
    for t in reversed(range(9)):
        following = v[:, t + 1] if t < 8 else 0.0
        last = r[:, t] + 0.99 * following - v[:, t] + 0.99 * 0.95 * last
        reverse.append(last)
    want = torch.stack(reverse[::-1], 1)
    A, returns = ff.gae(r, v, gamma=0.99, lam=0.95)
    torch.testing.assert_close(A, want)
    torch.testing.assert_close(returns, want + v)
    mixed, _ = ff.gae(r.float(), v, gamma=0.99, lam=0.95)
    assert mixed.dtype is torch.float64


# ---- autograd, compile, torch's own checks ------------------------------------------------------------


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
    backend = "inductor" if loss == "ppo" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    counted = torch.compile(step, backend=counter, fullgraph=True)
    for i in range(12):
        beta, coef = 0.05 + 0.01 * i, 0.1 / (i + 1)
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = compiled(x, beta, coef), step(y, beta, coef)
        a.backward()
        b.backward()
        torch.testing.assert_close(a, b)
        close(x.grad, y.grad)
        counted(x, beta, coef)
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


# ---- wrong arguments ------------------------------------------------------------------------------------


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
