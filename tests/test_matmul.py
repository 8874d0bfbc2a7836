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


@pytest.fixture
def turning(engine, monkeypatch):
    """As on AMD with AVX2, whatever this machine is."""
    monkeypatch.setattr(_matmul, "_turning_is_faster", lambda: True)


@pytest.mark.parametrize("m", [3, 4, 15, 16, 384, 385])
def test_which_products_are_turned(turning, monkeypatch, m):
    """On a CPU what is multiplied as float32: 4 rows (16 where the weight lies column by column) to 384, of
    1024 numbers or more."""
    taken = []
    turned = _matmul._turned
    monkeypatch.setattr(_matmul, "_turned", lambda *a: taken.append(1) or turned(*a))
    for dtype in DTYPES:
        for n, k in ((2048, 1023), (1023, 1024), (1024, 1024), (2047, 2050), (2048, 2048)):
            for weight in (torch.zeros(n, k), torch.zeros(k, n).t()):
                x = torch.zeros(k, m).to(dtype).t()
                taken.clear()
                _matmul.linear(x, weight.to(dtype))
                assert not taken  # an outer product
                x = x.contiguous()
                _matmul.linear(x, weight.to(dtype))
                if weight.stride(1) == 1:
                    want = 4 <= m <= 384 and n * k >= 2**20 and k >= 1024
                else:
                    want = 16 <= m <= 384 and n * k >= 2**22 and n >= 2048
                want &= _matmul.product_dtype(x) is torch.float32
                want &= not _matmul._onednn_is_faster()
                assert bool(taken) == want, (dtype, n, k, weight.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turned(turning, monkeypatch, dtype):
    """One piece, whole pieces and a short one; strides; a bias; onto what is there."""
    for name in ("_WIDTH", "_ELEMENTS", "_STRIDED_ELEMENTS", "_STRIDED_COLUMNS"):
        monkeypatch.setattr(_matmul, name, 1)
    for m, k, n in ((4, 7, 2048), (32, 256, 2049), (200, 3, 4096), (384, 3, 4101), (5, 9, 11)):
        x, w, b = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,)))
        truth = x.double() @ w.double().t()
        check("y", _matmul.linear(x, w), x @ w.t(), truth)
        check("y + b", _matmul.linear(x, w, b), torch.addmm(b, x, w.t()), truth + b.double())
        wide = torch.randn(m, 2 * k).to(dtype)[:, ::2].copy_(x)
        check("x strided", _matmul.linear(wide, w), x @ w.t(), truth)
        dy = torch.randn(m, k + 3).to(dtype)[:, :k]
        v = torch.randn(k, n).to(dtype)
        check("dx", _matmul.linear(dy, v.t()), dy @ v, dy.double() @ v.double())
        y = torch.randn(m, n).to(_matmul.product_dtype(x))
        want, eager = y.double() + truth, y.to(dtype) + x @ w.t()
        onto = _matmul.linear_onto(y, x, w)
        assert onto.dtype is y.dtype
        check("onto", onto.to(dtype), eager, want)
        if not _matmul._onednn_is_faster():
            assert onto.data_ptr() == y.data_ptr()


@pytest.mark.parametrize(
    ("capability", "amd", "turns"),
    [("AVX2", True, True), ("AVX512", True, False), ("AVX2", False, False)],
)
def test_where_products_are_turned(monkeypatch, capability, amd, turns):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(_matmul, "_is_amd", lambda: amd)
    assert _matmul._turning_is_faster.__wrapped__() is turns


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
