"""Packed codes as NumPy arrays, for the tests of kernels: types, codebooks, blocks at the edge."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from finefuse.reference import codebook as reference

ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {np.dtype(np.float32): 0, BF16: 1, np.dtype(np.float16): 2}
INT8 = (np.arange(256) - 127.5).astype(np.float32) / np.float32(127.5)
CODES = {
    **reference.CODES,
    "2 bits": np.array([-1, -0.3, 0.25, 1], np.float32),
    "3 bits": np.array([-1, -0.6, -0.3, 0, 0.2, 0.4, 0.7, 1], np.float32),
    "int4": (np.arange(16) - 8).astype(np.float32) / np.float32(8),
    "denormal": np.array([-1, -1e-39, 0, *np.geomspace(1e-42, 1, 13)], np.float32),
    "beyond 1": np.linspace(-3, 5, 16).astype(np.float32),
    "repeated": np.repeat(np.array([-1, -0.5, 0.5, 1], np.float32), 4),
    # thresholds that share buckets of a look-up by the upper bits: dense, at 0, far below
    "dense": np.sort(np.tanh(np.linspace(-1, 1, 256) ** 9)).astype(np.float32),
    "0 between": INT8,
    "uniform": np.append(np.linspace(-1, 1, 255), 2.0),
    "tiny": np.sort(np.concatenate([np.geomspace(1e-38, 1, 128), -np.geomspace(1e-30, 1, 128)])),
}
CODES = {name: np.asarray(code, np.float32) for name, code in CODES.items()}


class Nested(NamedTuple):
    """Absmax as the kernels take it: given, or quantised itself."""

    absmax: Any = None
    codes: Any = None
    code: Any = None
    nested_absmax: Any = None
    blocksize: int = 0
    offset: float = 0.0


def bits(x: np.ndarray) -> np.ndarray:
    """For comparisons that tell -0 from 0; every NaN is one."""
    x = np.where(np.isnan(x.astype(np.float32)), np.asarray(np.nan, x.dtype), x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


EDGES = {
    "zeros": [0.0],
    "negative zeros": [-0.0],
    "one": [0.0, 1.0],
    "NaN": [1.0, np.nan, -2.0],
    "negative NaN": [-np.float32(np.nan), 3.0],
    "inf": [1.0, np.inf, 0.0, -1.0],
    "-inf": [1.0, -np.inf, 0.0, -1.0],
    "both": [np.inf, -np.inf, 1.0],
    "inf and NaN": [np.inf, np.nan],
    "denormal": [1e-39, -3e-40, 1e-45, 0.0],
    "least": [1e-45, -1e-45],
    "reciprocal barely finite": [2.0**-128 * 1.0001, 1e-39],
    "reciprocal barely infinite": [2.0**-128, -1e-39],
    "largest": [3.4028235e38, -1e38, 1.0],
    "denormal reciprocal": [2.0**126 * 1.5, -(2.0**126), 2.0**125],
}
