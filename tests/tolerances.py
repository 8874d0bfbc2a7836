"""The error rule: no less accurate than what is replaced.

Truth is float64, eager the same formula in plain torch in the input's type. For tensors

    max|ours - truth| <= max|eager - truth| + tol·max|truth|        and the same for the RMS,

where max|truth| is that of the absolute terms for what is a sum whose terms can cancel (`terms`: near the
root of a loss or of its slope, whose own argument is a rounded number, truth and ours are each right but for
the terms' last digits), for scalars over many seeds

    RMS(ours - truth) <= RMS(eager - truth) + tol·RMS(sum of absolute terms).

tol: float64 1e-13, float32 1e-6, bfloat16 and float16 one unit in the last place of max|truth|, and for all
of them what underflows. No test against truth has a tolerance of its own, but for one that asks for more than
this rule (relative digits of certain rows).
"""

from __future__ import annotations

from typing import Any

import numpy as np

# By the name of the type, torch's or NumPy's: torch is not needed here.
TOLERANCE = {
    "float64": 1e-13,
    "float32": 1e-6,
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
}

# Below this nothing is promised: p·log p of a probability under the smallest normal number.
FLOOR = {
    d: 1e3 * float(np.finfo(np.float64 if d == "float64" else np.float32).tiny) for d in TOLERANCE
}


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def as_float64(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):
        return x.detach().double().numpy()
    return np.asarray(x, np.float64)


def _same_non_finite(name: str, ours: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """NaN and inf must stand where they stand in truth; returns where truth is finite."""
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(ours[~finite], truth[~finite], err_msg=f"{name}: NaN or inf")
    assert np.isfinite(ours[finite]).all(), f"{name}: NaN or inf where the truth is finite"
    return finite


def check(
    name: str, ours: Any, eager: object, truth: object, dtype: object = None, terms: object = None
) -> None:
    """Assert the rule on a tensor or array; `dtype` is the type whose tolerance counts (default: ours');
    `terms`: of each element, the sum of the absolute values that were added up (default: the truth's)."""
    dtype = dtype_name(ours.dtype if dtype is None else dtype)
    a, e, t = as_float64(ours), as_float64(eager), as_float64(truth)
    assert a.shape == t.shape, f"{name}: shape {a.shape}, truth {t.shape}"
    finite = _same_non_finite(name, a, t)
    a, e, t = a[finite], e[finite], t[finite]
    if t.size == 0:
        return
    e = np.where(np.isfinite(e), e, t)  # an eager that overflows gives no licence
    scale = np.abs(t if terms is None else as_float64(terms)[finite]).max()
    assert np.isfinite(scale), f"{name}: the scale of its terms is {scale}"
    allowed = np.abs(e - t).max() + TOLERANCE[dtype] * scale + FLOOR[dtype]
    worst = np.abs(a - t).max()
    assert worst <= allowed, f"{name}: max error {worst:.3e}, allowed {allowed:.3e}"

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x * x)))

    allowed = rms(e - t) + TOLERANCE[dtype] * scale + FLOOR[dtype]
    assert rms(a - t) <= allowed, f"{name}: RMS error {rms(a - t):.3e}, allowed {allowed:.3e}"


class ScalarErrors:
    """Collects a scalar over seeds; `check` at the end."""

    def __init__(self, name: str, dtype: object):
        self.name, self.dtype = name, dtype_name(dtype)
        self.rows: list[tuple[float, float, float]] = []

    def add(self, ours: Any, eager: Any, truth: float, terms: float) -> None:
        """`terms`: the sum of the absolute values that were added up (in the scalar's units)."""
        self.rows.append((ours.item() - truth, eager.item() - truth, terms))

    def check(self) -> None:
        assert len(self.rows) >= 32, f"{self.name}: {len(self.rows)} seeds, 32 wanted"
        ours, eager, terms = np.sqrt(np.mean(np.square(np.array(self.rows)), axis=0))
        allowed = eager + TOLERANCE[self.dtype] * terms
        assert ours <= allowed, f"{self.name}: RMS {ours:.3e} over seeds, allowed {allowed:.3e}"
