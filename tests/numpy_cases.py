"""What the tests of the NumPy functions share: types, formulas of rows of logits, arrays of every kind. Needs
no torch."""

from __future__ import annotations

import numpy as np
import pytest

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None
TYPES = {"float32": np.float32, "float16": np.float16, "float64": np.float64}
if ml_dtypes is not None:
    TYPES["bfloat16"] = ml_dtypes.bfloat16
BFLOAT16 = pytest.param(
    "bfloat16",
    marks=pytest.mark.skipif(ml_dtypes is None, reason="bfloat16 arrays need ml_dtypes"),
)
DTYPES = ["float32", "float16", "float64", BFLOAT16]
IGNORE = -100


def wide_of(dtype):
    return np.float64 if dtype == "float64" else np.float32


def wide(x):
    """In float64; what is no array as it is."""
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x


def same(a, b):
    """The same bits (NaN included), type and shape."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def bits(value):
    """All arrays of a result, flattened."""
    return [x for v in value for x in bits(v)] if isinstance(value, tuple) else [np.asarray(value)]


def assert_same(a, b, name=""):
    a, b = bits(a), bits(b)
    assert len(a) == len(b), name
    assert all(same(x, y) for x, y in zip(a, b, strict=True)), name


# ---- the plain NumPy formulas ------------------------------------------------------------------
# In the type of the logits; 16-bit types, as frameworks do, in float32 and rounded at the end.


def softmax_parts(logits, temperature=1.0):
    """(log softmax, log-sum-exp) of the rows."""
    z = np.asarray(logits)
    z = z.astype(np.float64 if z.dtype == np.float64 else np.float32) / z.dtype.type(temperature)
    with np.errstate(invalid="ignore", divide="ignore"):
        top = z.max(-1, keepdims=True)
        log_sum = np.log(np.exp(z - top).sum(-1, keepdims=True))
        return z - top - log_sum, (top + log_sum)[..., 0]


def eager_stats(logits, targets, temperature=1.0):
    logp, lse = softmax_parts(logits, temperature)
    keep = targets != IGNORE
    rows = np.arange(len(targets))
    lp = logp[rows, np.where(keep, targets, 0)]
    p = np.exp(logp)
    with np.errstate(invalid="ignore"):
        entropy = -np.where(p > 0, p * logp, 0).sum(-1)
    return tuple(np.where(keep, x, 0).astype(logits.dtype) for x in (lp, entropy, lse))


def eager_gradient(logits, targets, g, h, l, temperature=1.0):
    logp, _ = softmax_parts(logits, temperature)
    g, h, l = (u.astype(logp.dtype)[:, None] for u in (g, h, l))
    p = np.exp(logp)
    keep = targets != IGNORE
    with np.errstate(invalid="ignore"):
        entropy = -np.where(p > 0, p * logp, 0).sum(-1, keepdims=True)
        dz = -g * p - h * np.where(p > 0, p * (logp + entropy), 0) + l * p
    dz[np.arange(len(targets)), np.where(keep, targets, 0)] += g[:, 0]
    return np.where(keep[:, None], dz / logp.dtype.type(temperature), 0).astype(logits.dtype)


# ---- arrays of every kind ----------------------------------------------------------------------


def misaligned(x):
    """The same values, one byte off every boundary that the type has."""
    raw = np.empty(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert x.itemsize == 1 or x.size == 0 or not view.flags.aligned
    return view


def in_a_struct(x):
    """The same values as a field of a packed struct: strides that are no multiple of the element."""
    packed = np.zeros(x.shape, np.dtype([("pad", "i1"), ("x", x.dtype)]))
    packed["x"] = x
    return packed["x"]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def swapped(x):
    return x.astype(x.dtype.newbyteorder())


class Subclass(np.ndarray):
    pass


def layouts(cube):
    """Views of (6, 9, V) logits and copies of odd memory, by name."""
    return {
        "shifted": cube[:, :-1],
        "every other": cube[::2, ::3],
        "rows reversed": cube[::-1, ::-2],
        "classes strided": cube[..., ::2],
        "classes reversed": cube[..., ::-1],
        "transposed rows": cube.transpose(1, 0, 2),
        "transposed classes": cube.transpose(0, 2, 1),
        "Fortran": np.asfortranarray(cube),
        "expanded": np.broadcast_to(cube[:1], cube.shape),
        "one row for all": np.broadcast_to(cube[0, 0], cube.shape),
        "one class": cube[..., :1],
        "one class, strided": cube[:, ::2, 5:6],
        "4-D uneven": cube.reshape(2, 3, 9, -1)[:, :2, ::2],
        "byte-swapped": swapped(cube),
        "read-only": read_only(cube),
        "misaligned": misaligned(cube),
        "in a struct": in_a_struct(cube),
        "subclass": cube.view(Subclass),
        "one row": cube[0, 0],
        "empty": cube[:0],
    }


# ---- derivatives against differences -----------------------------------------------------------


def slope(f, x, direction, step=2e-6):
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)
