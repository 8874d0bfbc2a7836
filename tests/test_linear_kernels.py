"""The Triton kernels of `linear` against float64: tiles of logits that no array holds.

On the GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
triton = pytest.importorskip("triton", reason="Triton is not installed")

from finefuse.kernels import linear
from tolerances import as_float64, check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("triton_kernels")


class Case(NamedTuple):
    hidden: Any
    weight: Any
    bias: Any
    targets: Any
    temperature: float = 1.0
    softcap: float = 0.0


def case(rows, vocab, inner, dtype, *, bias=False, index=torch.int64, scale=1.0, **numbers):
    g = torch.Generator().manual_seed(rows + vocab + inner)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    hidden = (normal(rows, inner) * scale).to(dtype)
    weight = normal(vocab, inner).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=g).to(index)
    return Case(hidden, weight, normal(vocab).to(dtype) if bias else None, targets, **numbers)


def run(c, *, splits=None, entropy=True, lse=True, saved=True):
    """What the kernels write over rubbish: (logprobs, entropy, lse, saved, flags)."""
    rows, inner = c.hidden.shape
    shape = linear.partial_shape(rows, c.weight.shape[0], inner)
    partial = torch.full((splits or shape[0], *shape[1:]), float("nan"), device=DEVICE)
    out = [torch.full((rows,), 7.0, device=DEVICE) for _ in range(3)]
    kept = torch.full((2 + entropy, rows), 7.0, dtype=torch.float64, device=DEVICE)
    flags = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    tensors = [t if t is None else t.to(DEVICE) for t in c[:4]]
    given = [out[0], out[1] if entropy else None, out[2] if lse else None, kept if saved else None]
    linear.linear_token_logprobs(*tensors, IGNORE, *c[4:], *given, partial, (0, flags))
    return *(None if t is None else t.cpu() for t in given), flags.tolist()


def logits(c, dtype):
    """z/T, computed in a type."""
    z = c.hidden.to(dtype) @ c.weight.to(dtype).T
    if c.bias is not None:
        z = z + c.bias.to(dtype)
    if c.softcap:
        z = c.softcap * torch.tanh(z / c.softcap)
    return z


def formulas(z, c):
    """logprobs, entropy, lse, and what is saved: the maximum, the rest of the sum, the entropy."""
    kept = (c.targets >= 0) & (c.targets < z.shape[1])
    top = z.max(-1).values
    z, top_t = z / c.temperature, top / c.temperature
    rest = torch.logsumexp(z - top_t[:, None], -1)
    lse = top_t + rest
    logp = torch.log_softmax(z, -1)
    at_y = torch.where(kept, c.targets, 0).long()[:, None]
    entropy = -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)
    values = [logp.gather(1, at_y)[:, 0], entropy, lse, top, rest]
    return [torch.where(kept, v, 0.0) for v in values]


NAMES = ("logprobs", "entropy", "lse", "saved: ref", "saved: log-sum", "saved: entropy")


def assert_right(c, **options):
    got = run(c, **options)
    logp, entropy, lse, saved, flags = got
    truth = formulas(logits(c, torch.float64), c)
    eager = formulas(logits(c, c.hidden.dtype).float(), c)
    ours = [logp, entropy, lse, *([None] * 3 if saved is None else [*saved, None])[:3]]
    truth, eager = [*truth, truth[1]], [*eager, eager[1]]
    for name, a, e, t in zip(NAMES, ours, eager, truth, strict=True):
        if a is not None:
            check(name, a.float(), e, t)
    assert not any(flags)
    return got


# 5 and 33 rows: one tile and not full, two with one row in the last. 1 and 37 columns: less than a tile; 130:
# two columns beyond one; 300: a second split. 1 and 16: less than a step of a product; 33 and 70: one
# number, six numbers beyond whole steps.
SHAPES = (
    (1, 1, 1), (1, 37, 16), (1, 300, 70), (5, 1, 33), (5, 37, 70), (5, 130, 1), (33, 130, 33), (33, 300, 16),
)  # fmt: skip
CHOICES = itertools.cycle(
    itertools.product((0.0, 4.0), (1.0, 0.6), (False, True), (torch.int64, torch.int32))
)
CASES = [(shape, dtype, next(CHOICES)) for dtype, shape in itertools.product(DTYPES, SHAPES)]


@pytest.mark.parametrize(("shape", "dtype", "choice"), CASES, ids=str)
def test_odd_shapes(shape, dtype, choice):
    softcap, temperature, bias, index = choice
    c = case(*shape, dtype, bias=bias, index=index, softcap=softcap, temperature=temperature)
    assert_right(c)


# 5, 33 and 70 rows: each tile. 64 and 128: one step of a product of 16-bit numbers, and two; 300 columns:
# more than one tile, and not full.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inner", "softcap"), [(5, 128, 0.0), (33, 64, 3.0), (70, 64, 0.0)]
)
def test_whole_steps(rows, inner, softcap, dtype):
    assert_right(case(rows, 300, inner, dtype, bias=rows != 33, softcap=softcap, temperature=1.3))


def test_largest_tile(monkeypatch):
    """Which needs the shared memory of sm_90. 300 columns: a tile, and 44 of the next."""
    monkeypatch.setattr(linear, "shared_memory", lambda device: 1 << 18)
    assert_right(case(70, 300, 64, torch.bfloat16, bias=True))


def test_what_may_be_absent():
    c = case(5, 37, 16, torch.float32)
    whole = assert_right(c)
    for entropy, lse, saved in itertools.product((False, True), repeat=3):
        got = run(c, entropy=entropy, lse=lse, saved=saved)
        assert torch.equal(got[0], whole[0])
        assert (got[1] is None) == (not entropy)
        if saved:
            assert got[3].shape == (2 + entropy, 5)
            assert torch.equal(got[3], whole[3][: 2 + entropy])


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 200])
def test_splits(splits):
    """Of 3 units of columns. 5 and 200: some have no columns; 200 are more than are read at a time."""
    assert_right(case(5, 600, 16, torch.float32, bias=True, softcap=4.0), splits=splits)


def test_number_of_splits():
    for rows, vocab in itertools.product((1, 33, 8192, 1 << 20), (1, 256, 300, 50257, 131072)):
        splits, n, numbers = linear.partial_shape(rows, vocab, 4096)
        length = triton.cdiv(triton.cdiv(vocab, 256), splits) * 256
        assert (n, numbers) == (rows, 4)
        assert (splits - 1) * length < vocab <= splits * length  # none without columns
        assert splits * rows <= max(1024 * 128 + rows, 8 * rows)
    assert linear.splits(8192, 131072, 4096) == 16


def test_same_bits():
    c = case(33, 300, 33, torch.bfloat16, bias=True)
    for a, b in zip(run(c)[:4], run(c)[:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inner", [33, 64])
def test_rows_of_any_stride(inner):
    """What lies between rows is NaN, and not read."""
    c = case(5, 130, inner, torch.float32)
    hidden = torch.full((5, inner + 16), float("nan"))
    weight = torch.full((130, inner + 3), float("nan"))
    hidden[:, :inner], weight[:, 1 : inner + 1] = c.hidden, c.weight
    assert_right(c._replace(hidden=hidden[:, :inner], weight=weight[:, 1 : inner + 1]))


# ---- rows that do not count, and bad ones ----------------------------------------------------------


@pytest.mark.parametrize("inner", [33, 64])
def test_ignored_rows(inner):
    """Rows 16 to 31 are a tile of their own; NaN there and beside kept rows."""
    c = case(33, 300, inner, torch.bfloat16, bias=True)
    c.targets[torch.tensor([0, 4, *range(16, 32)])] = IGNORE
    c.hidden[c.targets == IGNORE] = float("nan")
    clean = c._replace(hidden=c.hidden.nan_to_num(0.0))
    logp, entropy, lse, saved, flags = run(c)
    for a, b in zip((logp, entropy, lse, saved), assert_right(clean)[:4], strict=True):
        assert torch.equal(a, b)
        assert (a[..., c.targets == IGNORE] == 0).all()
    assert not any(flags)


def test_nothing_but_ignored_rows():
    c = case(5, 37, 16, torch.float32)
    c.targets.fill_(IGNORE)
    c.hidden.fill_(float("nan"))
    *outputs, flags = run(c)
    assert all((t == 0).all() for t in outputs)
    assert not any(flags)


@pytest.mark.parametrize("bad", [-1, 37, 2**31 - 1])
def test_bad_targets(bad):
    c = case(5, 37, 16, torch.float32, index=torch.int32)
    good = run(c)
    c.targets[3] = bad
    logp, entropy, lse, saved, flags = run(c)
    assert flags[0] == 1
    assert not any(flags[1:])
    others = torch.arange(5) != 3
    for a, b in zip((logp, entropy, lse), good[:3], strict=True):
        assert a[3].isnan()
        assert torch.equal(a[others], b[others])
    assert torch.equal(saved[:, others], good[3][:, others])


def test_no_rows():
    assert run(case(0, 37, 16, torch.float32)._replace(targets=torch.zeros(0).long()))[0].shape == (
        0,
    )


# ---- infinities and NaN ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [37, 600])
def test_minus_inf_logits(vocab):
    """By the bias: half of the columns, a whole tile and a whole split of 600 among them, and a target."""
    c = case(5, vocab, 16, torch.float32, bias=True, temperature=0.8)
    c.bias[: vocab // 2] = -torch.inf
    c.targets[:] = torch.randint(vocab // 2, vocab, (5,))
    c.targets[2] = 1
    logp, entropy, *_ = assert_right(c)
    assert logp[2] == -torch.inf
    assert (entropy > 0).all()


def test_nothing_but_minus_inf():
    c = case(5, 300, 16, torch.float32, bias=True)
    c.bias.fill_(-torch.inf)
    logp, *_, flags = run(c)
    assert logp.isnan().all()
    assert not any(flags)
    c.bias[c.targets[1]] = 0.5  # one left: probability 1
    c.targets[:] = c.targets[1]
    logp, entropy, *_ = run(c)
    assert (logp == 0).all()
    assert (entropy == 0).all()


def test_minus_inf_under_a_cap():
    """c·tanh: -c, as any other logit."""
    c = case(5, 37, 16, torch.float32, bias=True, softcap=4.0)
    c.bias[:20] = -torch.inf
    c.bias[20] = torch.inf
    assert_right(c)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 299])
def test_nan_and_inf_stay_in_their_row(column, value):
    c = case(5, 300, 16, torch.float32)
    good = run(c)
    c.hidden[1] = 0.0
    c.hidden[1, 2] = value  # NaN logits, or some of each infinity
    bad = run(c)
    others = torch.arange(5) != 1
    for a, b in zip(bad[:3], good[:3], strict=True):
        assert a[1].isnan()
        assert torch.equal(a[others], b[others])
    c.hidden[1] = 0.0
    biased = c._replace(bias=torch.zeros(300))
    biased.bias[column] = value
    logp, entropy, lse, *_ = run(biased)
    assert (logp.isnan() & entropy.isnan() & lse.isnan()).all()


# ---- digits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [7, 299])
def test_digits_near_zero(high):
    """A sum lacks the 1 of its maximum, in either split: -log(1 + 299·e^-25) to float32's digits."""
    c = Case(torch.zeros(2, 16), torch.ones(300, 16), torch.zeros(300), torch.tensor([high, 5]))
    c.bias[high] = 25.0
    logp, entropy, *_ = run(c)
    rest = 299 * np.exp(-25.0)
    np.testing.assert_allclose(as_float64(logp), [-np.log1p(rest), -25 - np.log1p(rest)], rtol=1e-6)
    np.testing.assert_allclose(
        as_float64(entropy), np.log1p(rest) + 25 * rest / (1 + rest), rtol=1e-6
    )


def test_softcap_digits():
    """tanh from its polynomial to its end, in units in the last place."""
    x = torch.tensor([0.0, 1e-30, 1e-4, 0.1, 0.6249, 0.6251, 1.0, 2.0, 5.0, 9.0, 20.0, 1e30])
    z = 30 * torch.cat([-x, x])
    # one column a row, so that ref is the logit under its cap
    c = Case(z[:, None], torch.ones(1, 1), None, torch.zeros(24).long(), softcap=30.0)
    ref = run(c)[3][0].numpy()
    truth = 30 * np.tanh(as_float64(z) / 30)
    assert (np.abs(ref - truth) <= 4 * np.spacing(np.abs(truth).astype(np.float32))).all()
