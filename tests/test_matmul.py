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
