"""Policy-gradient losses, value loss and advantages on every backend beside the CPU's.

On a reduced grid: what is common to all backends, the arguments and the autograd, is in test_policy*.py.
Few rows and sequences: one takes Triton's interpreter some hundredths of a second.
"""

from __future__ import annotations

import itertools
import math
import mmap

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import GPU
from finefuse._args.policy import POLICY_LOSSES as LOSSES
from finefuse.reference import policy as reference
from on_gpu import capture, needs_gpu
from policy_cases import (
    IGNORE,
    METRICS,
    OPTIONS,
    arguments,
    batch,
    eager,
    eager_from_logits,
    truth,
    truth_from_logits,
    vectors,
)
from tolerances import check

RAW = torch.ops.finefuse
WIDE = (torch.float32, torch.float64)

# NumPy's, from Triton's interpreter, at what a GPU does silently: -inf - -inf, overflow to inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def put(place, kwargs):
    return {k: place.put(x)[0] if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()}


def run(place, lp, advantages, kwargs, upstream=None):
    """(output, gradient by lp) on the place, back on the CPU."""
    x, A, up = place.put(lp.clone(), advantages, upstream)
    x.requires_grad_()
    out = ff.policy_loss(x, advantages=A, **put(place, kwargs))
    (out.loss if up is None else (out.loss * up).sum()).backward()
    return [None if o is None else o.detach().cpu() for o in out], x.grad.cpu()


def run_logits(place, logits, actions, advantages, kwargs):
    z, y, A = place.put(logits.clone(), actions, advantages)
    z.requires_grad_()
    out = ff.policy_loss_from_logits(z, y, advantages=A, **put(place, kwargs))
    out.loss.sum().backward()
    return [o.detach().cpu() for o in out], z.grad.cpu()


def run_eager(lp, advantages, kwargs, upstream=None):
    x = lp.clone().requires_grad_()
    loss = eager(x, advantages, **kwargs)
    (loss if upstream is None else (loss * upstream).sum()).backward()
    return loss, x.grad


def usable(loss, options):
    """The options that a loss takes."""
    fixed = LOSSES[loss].importance in ("sum", "whole")
    return {k: v for k, v in OPTIONS[options].items() if k != "importance" or not fixed}


# ---- from log-probabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_from_logprobs(place, loss):
    some = list(OPTIONS)[list(LOSSES).index(loss) % 2 :: 2]  # with each loss every other set
    for i, name in enumerate(some):
        options = usable(loss, name)
        v = vectors(3, 17, WIDE[i % 2], by_token=options.get("by_token", False))
        kwargs = {"loss": loss, **arguments(v, options)}
        dirty = {**kwargs, "old_logprobs": v.old.masked_fill(~v.mask, math.nan)}  # never read
        out, grad = run(place, v.lp.masked_fill(~v.mask, math.nan), v.advantages, dirty)
        e, e_grad = run_eager(v.lp, v.advantages, kwargs)
        t = truth(v.lp, v.advantages, kwargs)
        check(f"loss, {name}", out[0], e, t.loss)
        check(f"gradient, {name}", grad, e_grad, t.gradient)
        for metric, a in zip(METRICS, out[1:4], strict=True):
            check(f"{metric}, {name}", a, getattr(t, metric), getattr(t, metric))
        assert (grad[~v.mask] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "rloo", "dr_grpo"])
def test_reductions(place, reduction):
    for loss in ("ppo", "gspo"):
        v = vectors(3, 9)
        kwargs = {"loss": loss, "reduction": reduction, **arguments(v, OPTIONS["kl times ratio"])}
        up = torch.randn(3, 9) if reduction == "none" else None
        out, grad = run(place, v.lp, v.advantages, kwargs, up)
        e, e_grad = run_eager(v.lp, v.advantages, kwargs, up)
        t = truth(v.lp, v.advantages, kwargs, None if up is None else up.double().numpy())
        check("loss", out[0], e, t.loss)
        check("gradient", grad, e_grad, t.gradient)


@pytest.mark.parametrize("loss", ["ppo", "grpo", "gspo", "rloo", "vespo"])
def test_packed(place, loss):
    v = vectors(1, 900)
    lp, old, ref, mask, weights = (x[0] for x in (v.lp, v.old, v.ref, v.mask, v.weights))
    ends = torch.tensor([0, 3, 3, 880, 900])  # one without tokens, one of several blocks
    A = torch.randn(4)
    for m, advantages, index in (
        (mask, A, torch.int32),
        (None, torch.randn(900), torch.int64),
    ):
        kwargs = {
            "loss": loss, "old_logprobs": old, "ref_logprobs": ref, "kl_beta": 0.1, "weights": weights,
            "mask": m, "cu_seqlens": ends.to(index),
        }  # fmt: skip
        out, grad = run(place, lp, advantages, kwargs)
        t = truth(lp, advantages, kwargs)
        check("loss", out[0], t.loss, t.loss)
        check("gradient", grad, t.gradient, t.gradient)
        for metric, a in zip(METRICS, out[1:4], strict=True):
            check(metric, a, getattr(t, metric), getattr(t, metric))


@pytest.mark.parametrize("loss", ["ppo", "gspo", "rloo", "cispo", "sapo", "vespo", "reinforce"])
def test_ratios_that_overflow(place, loss):
    for x, A in ((1e4, -1.0), (1e4, 1.0), (-1e4, -1.0), (-1e4, 1.0)):
        lp = torch.full((2, 3), x)
        kwargs = {
            "loss": loss, "old_logprobs": torch.zeros(2, 3), "ref_logprobs": -lp, "kl_beta": 0.1,
            "kl_times_ratio": True,
        }  # fmt: skip
        out, grad = run(place, lp, torch.full((2,), A), kwargs)
        t = truth(lp, torch.full((2,), A), kwargs)
        assert all(torch.isfinite(m) for m in out[:4])
        check("loss", out[0], t.loss, t.loss)
        check("gradient", grad, t.gradient, t.gradient)


def test_without_old_logprobs(place):
    """ρ = 1, also where lp is -inf."""
    lp = -torch.rand(2, 5)
    lp[0, 0] = -math.inf
    for loss in ("ppo", "gspo", "cispo", "vespo"):
        kwargs = {"loss": loss, "mask": torch.tensor([[True] * 4 + [False]] * 2)}
        out, grad = run(place, lp[:, 1:], torch.ones(2), {**kwargs, "mask": kwargs["mask"][:, 1:]})
        t = truth(lp[:, 1:], torch.ones(2), {**kwargs, "mask": kwargs["mask"][:, 1:]})
        check("loss", out[0], t.loss, t.loss)
        check("gradient", grad, t.gradient, t.gradient)
        assert out[3] == 0
    out, grad = run(place, lp, torch.ones(2), {"loss": "ppo"})
    assert out[0] == -1
    assert torch.isfinite(grad).all()


# ---- from logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_from_logits(place, loss, dtype):
    names = ("plain", "kl") if dtype == torch.float32 else ("k2", "temperatures")
    for i, name in enumerate(names):
        logits, actions, v = batch(2, 2, 257, dtype)  # an odd tail
        v.mask[:] = torch.tensor([[True, False], [True, True]])
        kwargs = {
            "loss": loss, "entropy_coef": 0.02 * (i % 2), "temperature": 0.8,
            **arguments(v, usable(loss, name)),
        }  # fmt: skip
        loss_t, dz, entropy, t = truth_from_logits(logits, actions, v.advantages, **kwargs)
        x = logits.clone().requires_grad_()
        e = eager_from_logits(x, actions, v.advantages, **kwargs)
        e.backward()
        logits[~v.mask] = math.nan  # never read
        out, grad = run_logits(
            place, logits, actions, v.advantages, {**kwargs, "inplace": i % 2 == 1}
        )
        check(f"loss, {name}", out[0], e, loss_t)
        check(f"gradient, {name}", grad, x.grad, dz)
        check(f"entropy, {name}", out[4], entropy, entropy)
        for metric, a in zip(METRICS, out[1:4], strict=True):
            check(f"{metric}, {name}", a, getattr(t, metric), getattr(t, metric))
        assert (grad[~v.mask] == 0).all()


# 1: no vocabulary to speak of. 3001: several blocks of threads. 33001: of Triton's loop, and longer
# than what a block keeps in shared memory; 32768: aligned
@pytest.mark.parametrize("vocab", [1, 3001, 32768, 33001, *([151936] if GPU else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_long_rows(place, vocab, dtype):
    if place.backend == "eager":
        pytest.skip("plain torch has plain torch's errors")
    logits, actions, v = batch(1, 2, vocab, dtype)
    kwargs = {"loss": "grpo", "entropy_coef": 0.1, **arguments(v, OPTIONS["kl"])}
    out, grad = run_logits(place, logits, actions, v.advantages, kwargs)
    x = logits.clone().requires_grad_()
    e = eager_from_logits(x, actions, v.advantages, **kwargs)
    e.backward()
    loss_t, dz, entropy, _ = truth_from_logits(logits, actions, v.advantages, **kwargs)
    check("loss", out[0], e, loss_t)
    check("gradient", grad, x.grad, dz)
    check("entropy", out[4], entropy, entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_minus_infinity_and_nan(place, dtype):
    logits, actions, v = batch(2, 2, 300, dtype)
    ones = torch.ones(2)  # losses of one sign: nothing cancels
    logits[..., ::3] = -math.inf
    actions = actions // 3 * 3 + 1
    v.mask[:] = True
    kwargs = {"entropy_coef": 0.1, "mask": v.mask, "loss": "ppo", "kl_beta": 0.2}
    lp = torch.log_softmax(logits.double(), -1).gather(-1, actions[..., None])[..., 0]
    kwargs |= {"old_logprobs": (lp + 0.1).to(v.old.dtype), "ref_logprobs": lp.to(v.old.dtype)}
    out, grad = run_logits(place, logits, actions, ones, kwargs)
    loss_t, dz, entropy, _ = truth_from_logits(logits, actions, ones, **kwargs)
    check("loss", out[0], loss_t, loss_t)
    check("gradient", grad, dz, dz)
    check("entropy", out[4], entropy, entropy)
    actions[0, 1] = 0  # an action of probability 0: its ratio is e^-60, its gradient 0
    kwargs |= {"entropy_coef": 0.0, "kl_beta": 0.0}
    out, grad = run_logits(place, logits, actions, ones, kwargs)
    assert torch.isfinite(out[0])
    assert (grad[0, 1] == 0).all()
    for bad in (math.nan, math.inf):
        logits[0, 0, 5] = bad
        out, grad = run_logits(place, logits, actions, ones, kwargs)
        assert torch.isnan(out[0])
        assert torch.isnan(grad[0, 0]).all()
        assert torch.isfinite(grad[1]).all()


def test_strides(place):
    """Slices without a copy, rows that are not aligned, int32 actions and offsets."""
    base = torch.randn(2, 3, 258)
    y = torch.randint(0, 257, (2, 2))
    A, old = torch.randn(2), -torch.rand(2, 2) * 6
    moved, y, A, old = place.put(base, y, A, old)
    logits = moved[:, :-1, 1:]
    results = []
    for z, actions in ((logits.contiguous(), y), (logits, y), (logits, y.int())):
        x = z.detach().requires_grad_()
        out = ff.policy_loss_from_logits(x, actions, advantages=A, old_logprobs=old, loss="grpo")
        out.loss.backward()
        results.append((out.loss.item(), x.grad.cpu()))
    flat = logits.reshape(4, 257).requires_grad_()
    for index in (torch.int32, torch.int64):
        flat.grad = None
        out = ff.policy_loss_from_logits(
            flat, y.view(-1), advantages=A, old_logprobs=old.view(-1), loss="grpo",
            cu_seqlens=torch.tensor([0, 2, 4], dtype=index, device=place.device),
        )  # fmt: skip
        out.loss.backward()
        results.append((out.loss.item(), flat.grad.view(2, 2, 257).cpu()))
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(grad, results[0][1])


def test_empty(place):
    """Nothing to add up: 0, not NaN."""
    for shape in ((0, 5), (3, 0)):
        z = torch.zeros(*shape, 7, device=place.device, requires_grad=True)
        y = torch.zeros(shape, dtype=torch.long, device=place.device)
        A = torch.ones(shape[0], device=place.device)
        for loss in ("ppo", "grpo", "gspo"):
            out = ff.policy_loss_from_logits(z, y, advantages=A, loss=loss, entropy_coef=0.1)
            out.loss.backward()
            assert [o.item() for o in out] == [0.0] * 5
            out = ff.policy_loss(z[..., 0], advantages=A, loss=loss)
            assert [o.item() for o in out[:4]] == [0.0] * 4
    z = torch.full((1, 2, 5), math.nan, device=place.device, requires_grad=True)
    y = torch.full((1, 2), IGNORE, device=place.device)
    A = torch.full((1,), math.nan, device=place.device)
    for loss in LOSSES:
        z.grad = None
        out = ff.policy_loss_from_logits(z, y, advantages=A, loss=loss, entropy_coef=0.1)
        out.loss.backward()
        assert [o.item() for o in out] == [0.0] * 5
        assert (z.grad == 0).all()
    nothing = torch.zeros(0, device=place.device)
    ends = torch.zeros(1, dtype=torch.long, device=place.device)
    assert ff.policy_loss(nothing, advantages=nothing, cu_seqlens=ends).loss == 0


# ---- what is wrong with the input ------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ppo", "gspo"])  # in one pass, in two
def test_bad_actions_are_flagged(place, loss):
    """Never followed: the loss is NaN, the other rows' gradients are right, and check() says so."""
    logits, actions, v = batch(1, 3, 50)
    A, kwargs = v.advantages, {"loss": loss, "old_logprobs": v.old}
    _, want = run_logits(place, logits, actions, A, kwargs)
    for bad in (-1, 50, 2**31, -(2**40)):
        actions[0, 1] = bad
        if place.backend == "eager" and place.device == "cpu":
            with pytest.raises(ValueError, match=f"element 1 is {bad}"):
                run_logits(place, logits, actions, A, kwargs)
            continue
        out, grad = run_logits(place, logits, actions, A, kwargs)
        assert torch.isnan(out[0])
        assert (torch.isnan(grad[0, 1]) | (grad[0, 1] == 0)).all()
        if loss == "ppo":
            torch.testing.assert_close(grad[0, ::2], want[0, ::2])
        if place.backend != "eager":
            with pytest.raises(ValueError, match="an element was neither in"):
                ff.check()
            ff.check()  # it is reported once


def test_bad_offsets_are_flagged(place):
    forms = itertools.cycle((("ppo", "grpo"), ("gspo", "sum"), ("ppo", "none")))
    for ends in (
        [0, 3, 2, 4],
        [1, 2, 3, 4],
        [0, 2, 3, 3],
        [0, -4, 3, 4],
        [0, 2, 400, 4],
        [0, 5, 4, 4],
    ):
        cu_seqlens = torch.tensor(ends)
        loss, reduction = next(forms)
        kwargs = {"loss": loss, "reduction": reduction, "cu_seqlens": cu_seqlens}
        given = -torch.rand(4), torch.ones(3), kwargs, torch.ones(())
        if place.backend == "eager":
            if place.device == "cpu":
                with pytest.raises(ValueError, match="cu_seqlens: element"):
                    run(place, *given)
            continue
        out, _ = run(place, *given)
        assert torch.isnan(out[0]).any(), ends
        with pytest.raises(ValueError, match="cu_seqlens: did not rise"):
            ff.check()
        out, _ = run_logits(
            place, torch.randn(4, 5), torch.zeros(4, dtype=torch.long), torch.ones(3),
            {"loss": "grpo", "cu_seqlens": cu_seqlens},
        )  # fmt: skip
        assert torch.isnan(out[0]), ends
        with pytest.raises(ValueError, match="cu_seqlens: did not rise"):
            ff.check()


# ---- as the CPU's kernels --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_as_on_the_cpu(place, dtype):
    """The one-pass op with an upstream gradient and without, and every output it has."""
    if place.backend == "eager":
        pytest.skip("has no raw op")
    logits, actions, v = batch(2, 2, 1501, dtype)
    actions[1, 0] = IGNORE
    tokens = [
        v.old.to(v.weights.dtype), v.ref.to(v.weights.dtype), v.weights, v.advantages.to(v.weights.dtype),
        None,
    ]  # fmt: skip
    inf = math.inf
    for surrogate, kl, reduction in ((0, 2, 2), (1, 0, 3), (2, 1, 4), (3, 2, 5), (4, 2, 1)):
        high = 1.1 if surrogate == 2 else 0.2
        numbers = (0.9, 0.05, 0.2, high, 1.5, inf, 0.1, 1.0, 1.05, 7.0)
        codes = surrogate, 0, kl, True, reduction, IGNORE
        results = []
        for backend, device in (("cpu", "cpu"), (place.backend, place.device)):
            z, y, *given = (t if t is None else t.to(device) for t in (logits, actions, *tokens))
            out = torch.full_like(z, math.nan)
            g = torch.tensor(-1.5, dtype=v.weights.dtype, device=device)
            with ff.backend(backend):
                loss, metrics = RAW.policy_logits_forward_backward(
                    z, y, *given, out, *numbers, *codes
                )
                first = out.cpu()
                out.fill_(math.nan)
                RAW.policy_logits_backward(g, z, y, *given, out, *numbers, *codes)
            results.append((loss.cpu(), metrics.cpu(), first, out.cpu()))
        for name, want, got in zip(("loss", "metrics", "first", "again"), *results, strict=True):
            check(f"{name} of {surrogate}", got, want, want)


def test_same_bits_every_time(place):
    logits, actions, v = batch(1, 3, 5000, torch.bfloat16)
    kwargs = {"entropy_coef": 0.1, **arguments(v, OPTIONS["kl"])}
    for loss in ("grpo", "gspo"):
        first, second = (
            run_logits(place, logits, actions, v.advantages, {"loss": loss, **kwargs})
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
        assert torch.equal(first[1], second[1])


# ---- value loss, advantages ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_value_loss(place, dtype):
    for count in (1, 9001):  # 9001: three partial sums
        v, r, old = (torch.randn(count, dtype=torch.float64).to(dtype) for _ in range(3))
        mask = torch.rand(count) < 0.7
        for clip, m in ((None, None), (0.2, None), (0.2, mask), (0.0, mask)):
            x, a, b, keep = place.put(v if m is None else v.masked_fill(~m, math.nan), r, old, m)
            x = x.clone().requires_grad_()
            loss = ff.value_loss(x, a, b, clip=clip, mask=keep)
            loss.backward()
            t, dt = reference.value_loss(
                *(z.double().numpy() for z in (v, r, old)), clip, None if m is None else m.numpy()
            )
            check("loss", loss.detach().cpu(), t, t)
            check("gradient", x.grad.cpu(), dt, dt)
    empty = torch.zeros(0, dtype=dtype, device=place.device, requires_grad=True)
    loss = ff.value_loss(empty, empty)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_group_advantages(place, scale, baseline):
    for groups, size, dtype in (
        (1, 1, WIDE[0]),
        (3, 2, WIDE[1]),
        (5, 8, WIDE[0]),
        (2, 700, WIDE[1]),
    ):
        r = torch.randn(groups * size, dtype=torch.float64).to(dtype)
        if size > 2:
            r[1], r[-1] = math.nan, math.nan
        want = reference.group_advantages(r.double().numpy(), size, scale, baseline)
        (x,) = place.put(r)
        out = ff.group_advantages(x, size, scale=scale, baseline=baseline)
        check(f"{groups}x{size}", out.cpu(), want, want)
    same = torch.ones(2 * 49, device=place.device)  # 49·(1/49) is not 1
    assert (ff.group_advantages(same, 49, scale=scale, baseline=baseline) == 0).all()
    assert (ff.group_advantages(same * math.nan, 7, scale=scale, baseline=baseline) == 0).all()
    assert ff.group_advantages(same[:0], 4, scale=scale, baseline=baseline).shape == (0,)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 1, 40), (1, 700)], ids=str)  # 700: two blocks
def test_gae(place, shape, dtype):
    r, longer = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], shape[-1] + 1).to(dtype)
    mask = torch.rand(shape) < 0.8
    for values, m, gamma, lam in (
        (longer[..., :-1], None, 0.97, 0.9), (longer, mask, 1.0, 1.0), (longer, mask, 0.97, 0.0),
    ):  # fmt: skip
        hidden = r if m is None else r.masked_fill(~m, math.nan)
        x, v, keep = place.put(hidden, values, m)
        results = ff.gae(x, v, gamma=gamma, lam=lam, mask=keep)
        t = reference.gae(
            r.double().numpy(),
            values.double().numpy(),
            gamma,
            lam,
            None if m is None else m.numpy(),
        )
        for name, got, want in zip(("advantages", "returns"), results, t, strict=True):
            check(name, got.cpu(), want, want)
    empty = torch.zeros(3, 0, device=place.device)
    assert ff.gae(empty, empty, gamma=1, lam=1)[0].shape == (3, 0)


# ---- beyond 2^31 elements --------------------------------------------------------------------------


def test_rows_far_apart(place):
    """64-bit offsets: two rows with 2^31 elements between them, in memory that is never touched."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    vocab, stride = 300, 2**31 + 16
    count = stride + vocab
    if GPU:
        memory = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.bfloat16)
    rows = memory.as_strided((2, vocab), (stride, 1))
    source = torch.randn(2, vocab).bfloat16()
    rows.copy_(source)
    y, A, old = place.put(torch.tensor([[7, 250]]), torch.ones(1), torch.full((1, 2), -5.0))
    z = rows.view(1, 2, vocab).requires_grad_()
    out = ff.policy_loss_from_logits(
        z, y, advantages=A, old_logprobs=old, entropy_coef=0.1, inplace=True
    )
    out.loss.backward()
    want, grad = run_logits(
        place, source.view(1, 2, vocab), y, A, {"old_logprobs": old, "entropy_coef": 0.1}
    )
    assert out.loss.item() == want[0].item()
    assert torch.equal(z.grad.cpu(), grad)


@needs_gpu
def test_more_than_2_to_31_elements(place):
    """4.3 G elements, the last rows of which count."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    rows, vocab = 33_600, 128_256
    logits = torch.zeros(1, rows, vocab, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(2, vocab).bfloat16()
    logits[0, -2:] = tail.cuda()
    actions = torch.full((1, rows), IGNORE, device="cuda")
    actions[0, -2:] = torch.tensor([3, vocab - 1])
    old = torch.full((1, rows), -12.0, device="cuda")
    x = logits.requires_grad_()
    A = torch.ones(1, device="cuda")
    out = ff.policy_loss_from_logits(x, actions, advantages=A, old_logprobs=old, inplace=True)
    out.loss.backward()
    want, grad = run_logits(place, tail[None], actions[:, -2:], A, {"old_logprobs": old[:, -2:]})
    assert out.loss.item() == pytest.approx(want[0].item(), rel=1e-6)
    torch.testing.assert_close(x.grad[0, -2:].cpu(), grad[0])
    assert (x.grad[0, :-2] == 0).all()


@needs_gpu
def test_cuda_graph(place):
    """No allocation of ours, no synchronisation: forward and backward are captured and replayed."""
    if place.backend == "eager":
        pytest.skip("plain torch is not ours to promise")
    logits, actions, v = batch(5, 8, 3001, torch.bfloat16)
    other = batch(5, 8, 3001, torch.bfloat16, seed=5)[0].cuda()
    y, A = actions.cuda(), v.advantages.cuda()
    kwargs = put(place, {"entropy_coef": 0.1, **arguments(v, OPTIONS["kl"])})
    rewards = torch.randn(40, device="cuda")
    x = logits.cuda().requires_grad_()

    def step(x):
        x.grad = None
        loss = torch.zeros((), device="cuda")
        for name in ("grpo", "gspo"):
            loss = loss + ff.policy_loss_from_logits(x, y, advantages=A, loss=name, **kwargs).loss
        loss.backward()
        A_t, returns = ff.gae(rewards.view(5, 8), rewards.view(5, 8), gamma=0.9, lam=0.9)
        return loss.detach(), x.grad, ff.group_advantages(rewards, 8), ff.value_loss(A_t, returns)

    graph, captured = capture(lambda: step(x))
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(other.clone().requires_grad_()), strict=True):
        assert torch.equal(a, b)
