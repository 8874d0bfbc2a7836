"""The product that ops multiply with: errors on every engine, and which engine a CPU gets."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

from finefuse import _matmul
from tolerances import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["torch", "oneDNN"])
def engine(request, monkeypatch):
    """Both, whichever the table gives to this machine."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(_matmul, "_onednn_is_faster", lambda: request.param == "oneDNN")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(engine, dtype):
    """One token, an odd shape, one with whole vectors; forward, backward, bias, strides."""
    for m, k, n in ((1, 64, 48), (33, 75, 19), (64, 128, 96), (5, 1, 1)):
        x, w, b = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,)))
        dy = torch.randn(m, n).to(dtype)
        truth = x.double() @ w.double().t()
        y = _matmul.linear(x, w)
        assert y.dtype is dtype
        check("y", y, x @ w.t(), truth)
        check("y + b", _matmul.linear(x, w, b), torch.addmm(b, x, w.t()), truth + b.double())
        check("dx", _matmul.linear(dy, w.t()), dy @ w, dy.double() @ w.double())
        wide = _matmul.linear(x, w.to(_matmul.product_dtype(x)))
        assert torch.equal(wide, y)
        check("x strided", _matmul.linear(x.t().contiguous().t(), w), x @ w.t(), truth)
    with torch.autocast("cpu", torch.bfloat16):
        x, w = torch.randn(4, 64), torch.randn(8, 64)
        check("under autocast", _matmul.linear(x, w), x @ w.t(), x.double() @ w.double().t())
        assert _matmul.linear(x, w).dtype is torch.float32


def test_empty(engine):
    for m, k, n in ((0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)):
        y = _matmul.linear(torch.ones(m, k), torch.ones(n, k), torch.ones(n))
        assert torch.equal(y, torch.full((m, n), 1.0 + k))
        assert _matmul.linear(torch.ones(m, k), torch.ones(n, k)).shape == (m, n)


@pytest.mark.parametrize(
    ("capability", "amd", "onednn"),
    [
        ("AVX512", True, True),
        ("AVX512", False, False),
        ("AVX2", True, False),
        ("DEFAULT", False, False),
    ],
)
def test_table(monkeypatch, capability, amd, onednn):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(_matmul, "_is_amd", lambda: amd)
    faster = _matmul._onednn_is_faster.__wrapped__()
    assert faster == (onednn and torch.backends.mkldnn.is_available())


def test_types(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(_matmul, "_has_bfloat16_product", lambda: native)
        want = {torch.float16: torch.float32}
        if not native:
            want[torch.bfloat16] = torch.float32
        for dtype in DTYPES:
            assert _matmul.product_dtype(torch.ones(1, dtype=dtype)) is want.get(dtype, dtype)
    assert _matmul.product_dtype(torch.ones(1, dtype=torch.float16, device="meta")) is torch.float16


SHAPES = [
    (31, 5, 2100),
    (32, 7, 2048),
    (100, 33, 2049),
    (512, 3, 2600),
    (513, 4, 2100),
    (40, 9, 100),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows(engine, dtype):
    """On both sides of what goes piece by piece, of whole pieces and a short one; strides; a bias."""
    for m, k, n in SHAPES:
        dtype_of_product = _matmul.product_dtype(torch.empty(1, dtype=dtype))
        x, w, b = (torch.randn(s).to(dtype_of_product) for s in ((m, k), (n, k), (n,)))
        truth = x.double() @ w.double().t()
        check("y", _matmul.few_rows(x, w), x @ w.t(), truth)
        check("y + b", _matmul.few_rows(x, w, b), torch.addmm(b, x, w.t()), truth + b.double())
        wide = torch.randn(m, 2 * k).to(dtype_of_product)[:, ::2].copy_(x)
        check("x strided", _matmul.few_rows(wide, w), x @ w.t(), truth)
        dy = torch.randn(m, n + 3).to(dtype_of_product)[:, :n]
        check("dx", _matmul.few_rows(dy, w.t()), dy @ w, dy.double() @ w.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_add_outer(engine, monkeypatch, dtype):
    """A sum of two terms, whole and in pieces, in float32 for 16-bit factors; what was there first is not."""
    monkeypatch.setattr(_matmul, "_SUM_BYTES", 4000)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for m, k, n in ((5, 33, 70), (1, 1, 1), (64, 16, 257)):
        total = torch.full((n, k), torch.nan, dtype=wide)
        eager = truth = 0
        for first in (True, False):
            y, x = torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)
            _matmul.add_outer(total, y, x, first)
            eager = eager + (y.t() @ x).to(wide)
            truth = truth + y.double().t() @ x.double()
        assert total.dtype is wide
        check("sum", total, eager, truth)
