"""Policy-gradient losses from log-probabilities, value loss and advantages against float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from finefuse._args.policy import POLICY_LOSSES as LOSSES
from finefuse.reference import policy as reference
from policy_cases import (
    METRICS,
    OPTIONS,
    arguments,
    check_scalar,
    eager,
    ours,
    run,
    truth,
    vectors,
)
from tolerances import ScalarErrors, check

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
