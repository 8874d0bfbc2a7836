"""What the NumPy functions share: arrays as a kernel can walk them, numbers, threads.

A kernel takes native byte order, aligned elements and rows whose elements are contiguous. An array
that lies otherwise is copied.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _args
from .._args import Layout, check_row_shapes, overlaps, row_strides

Array = NDArray[Any]

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
# The kernels' numbers. ml_dtypes.bfloat16 joins when the first array of it comes, so that nothing
# is imported for it.
DTYPES = {np.dtype(name): n for name, n in _args.DTYPES.items() if name != "bfloat16"}
# What statistics and losses come out as, by the number of the logits' type.
ACCUMULATOR = (FLOAT32, FLOAT32, FLOAT32, FLOAT64)
_IS_INT32 = {np.dtype(np.int64): False, np.dtype(np.int32): True}

_ndarray = np.ndarray


# ---- threads -----------------------------------------------------------------------------------


def _default_threads() -> int:
    """OMP_NUM_THREADS (the first, where it is a list), or the CPUs that this process may run on."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return int(first)
    return len(os.sched_getaffinity(0))


_threads = _default_threads()


def get_num_threads() -> int:
    """How many threads a call may use."""
    return _threads


def set_num_threads(threads: int) -> None:
    """How many threads a call may use; at first OMP_NUM_THREADS or the CPUs of this process.

    The results do not depend on it.

    Raises:
        TypeError, ValueError: for what is no int above 0.
    """
    global _threads
    if not isinstance(threads, int):
        raise TypeError(f"threads: an int, not {threads!r}")
    _args.require(threads > 0, "threads", threads, "1 and above")
    _threads = threads


# ---- arguments ---------------------------------------------------------------------------------


def scalar(name: str, value: Any) -> float:
    """A number, of Python or NumPy, or a 0-d array."""
    if type(value) is float:
        return value
    if isinstance(value, _ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: a number or a 0-d array, not {value!r}")
    return float(value)


def integer(name: str, value: Any) -> int:
    if isinstance(value, np.integer):
        value = int(value)
    _args.check_index(name, value)
    return value


def array(name: str, value: Any) -> Array:
    """An ndarray, of its subclasses too, or a NumPy scalar; not a masked array, whose mask no kernel sees."""
    if type(value) is _ndarray:
        return value
    if not isinstance(value, (_ndarray, np.generic)) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: a numpy.ndarray, not {type(value).__name__}")
    return np.asarray(value)


def float_array(name: str, value: Any) -> Array:
    """An array of one of the four float types, in native byte order."""
    value = array(name, value)
    dtype = value.dtype
    if dtype not in DTYPES:
        code = _args.DTYPES.get(dtype.name)
        if code is None:
            raise TypeError(f"{name}: dtype {dtype}; allowed: float32, bfloat16, float16, float64")
        if not dtype.isnative:
            return float_array(name, value.astype(dtype.newbyteorder("=")))
        DTYPES[dtype] = code
    return value


def float_dtype(what: str, value: Any) -> np.dtype[Any]:
    """One of the four float types, in native byte order."""
    try:
        dtype = np.dtype(value)
    except TypeError:
        dtype = None
    code = None if dtype is None else _args.DTYPES.get(dtype.name)
    if dtype is None or code is None:
        shown = repr(value) if dtype is None else dtype
        raise TypeError(f"{what} {shown}; allowed: float32, bfloat16, float16, float64")
    dtype = dtype.newbyteorder("=")
    DTYPES[dtype] = code
    return dtype


def dtype_named(name: str) -> np.dtype[Any]:
    """The type of a name that a file holds."""
    if name != "bfloat16":
        return float_dtype("dtype:", name)
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("dtype: bfloat16 arrays need ml_dtypes: pip install ml_dtypes") from None
    return float_dtype("dtype:", ml_dtypes.bfloat16)


def check_out(name: str, value: Any) -> None:
    """An array that can be written, an element in each place."""
    array(name, value)
    if not value.flags.writeable:
        raise ValueError(f"{name}: a read-only array; allowed: a writeable one")
    if not value.flags.c_contiguous and overlaps(value.shape, value.strides, value.itemsize):
        raise ValueError(f"{name}: its elements share memory; allowed: an element each")


def index_array(name: str, value: Any) -> Array:
    """Targets or offsets as contiguous int64 or int32; smaller integers are widened."""
    value = array(name, value)
    dtype = value.dtype
    if dtype not in _IS_INT32:
        wide = {"int32": np.int32}.get(dtype.name, np.int64)
        if dtype.name not in ("int64", "int32", "int16", "int8", "uint8"):
            raise TypeError(f"{name}: dtype {dtype}; allowed: int64, int32, int16, int8, uint8")
        return value.astype(wide, order="C")
    return contiguous(value)


def number_array(name: str, value: Any) -> Array:
    """A mask or lengths: bool or any number."""
    value = array(name, value)
    if value.dtype.kind not in "biuf" and value.dtype.name not in _args.DTYPES:
        raise TypeError(f"{name}: dtype {value.dtype}; allowed: bool, an integer or a float type")
    return value


def mask_array(value: Any, shape: tuple[int, ...]) -> Array | None:
    """True where an element counts."""
    if value is None:
        return None
    mask = number_array("mask", value)
    if mask.shape != shape:
        raise ValueError(f"mask: shape {mask.shape}; allowed: {shape}")
    return contiguous(mask if mask.dtype == np.bool_ else mask != 0)


def contiguous(value: Array, dtype: Any = None) -> Array:
    """In C order and aligned, copied only where it must be; 0-d stays 0-d."""
    if value.flags.carray and (dtype is None or value.dtype == dtype):
        return value
    return np.require(value, dtype, ["C", "A"])


def is_int32(index: Array) -> bool:
    return _IS_INT32[index.dtype]


def result(value: Array) -> Any:
    """What NumPy returns where there are no dimensions: a scalar."""
    return value if value.ndim else value[()]


# ---- rows of logits ----------------------------------------------------------------------------


def logit_rows(
    logits: Any, targets: Any, name: str = "targets"
) -> tuple[Array, Layout, Array, bool]:
    """(logits as rows that a kernel can walk, their layout, contiguous targets, whether they are int32).

    `name` is what the caller calls the targets. Whether the targets are in range is checked by the kernel.
    """
    if type(logits) is _ndarray and type(targets) is _ndarray:
        code, int32, shape = DTYPES.get(logits.dtype), _IS_INT32.get(targets.dtype), logits.shape
        if (
            code is not None
            and int32 is not None
            and logits.flags.carray
            and targets.flags.carray
            and shape
            and shape[:-1] == targets.shape
            and shape[-1]
        ):  # the usual call, without a step more
            rows, vocab = targets.size, shape[-1]
            return logits, (code, rows, vocab, rows, 0, vocab), targets, int32
    logits, targets = float_array("logits", logits), index_array(name, targets)
    check_row_shapes(logits.shape, targets.shape, name)
    logits, layout = float_rows(logits, targets.size)
    return logits, layout, targets, _IS_INT32[targets.dtype]


def float_rows(x: Array, rows: int) -> tuple[Array, Layout]:
    """Any (…, V) of a float type as rows that a kernel can walk, and their layout."""
    layout = _layout(x, rows)
    if layout is None:
        x = contiguous(x)
        layout = _layout(x, rows)
    assert layout is not None
    return x, layout


def _layout(logits: Array, rows: int) -> Layout | None:
    """How a kernel walks the rows of an array; None where it cannot."""
    code, itemsize, vocab = DTYPES.get(logits.dtype), logits.itemsize, logits.shape[-1]
    strides = logits.strides
    if code is None or not logits.flags.aligned:
        return None
    if logits.flags.c_contiguous:
        return code, rows, vocab, rows, 0, vocab
    if (vocab > 1 and strides[-1] != itemsize) or any(s % itemsize for s in strides):
        return None
    walk = row_strides(logits.shape, [s // itemsize for s in strides])
    return None if walk is None else (code, rows, vocab, *walk)


def gradient_rows(
    logits: Array,
    rows: Array,
    layout: Layout,
    return_grad: bool,
    grad_out: Any,
    read: Sequence[Array] = (),
) -> tuple[Any, Any, Layout]:
    """(the gradient as it is returned, what the kernel writes it to, its layout); None twice without one.

    `rows` are the logits as the kernel reads them, a copy perhaps. The two arrays differ where the
    kernel cannot write to `grad_out` as it lies: the caller then copies. So they do where something else
    that the kernel reads may lie there, too.
    """
    if not return_grad:
        if grad_out is not None:
            raise ValueError("grad_out: of use only with return_grad=True")
        return None, None, layout
    count, vocab = layout[1], layout[2]
    fresh: Layout = (layout[0], count, vocab, count, 0, vocab)
    if grad_out is None:
        gradient = np.empty(logits.shape, rows.dtype)
        return gradient, gradient, fresh
    check_out("grad_out", grad_out)
    if grad_out.shape != logits.shape or grad_out.dtype != logits.dtype:
        raise ValueError(
            f"grad_out: {grad_out.shape} {grad_out.dtype}; the logits are {logits.shape} {logits.dtype}"
        )
    if any(np.may_share_memory(grad_out, other) for other in read):
        pass
    elif np.may_share_memory(grad_out, rows):
        if _address(grad_out) == _address(rows) and grad_out.strides == rows.strides:
            return grad_out, grad_out, layout
    elif (lies := _layout(grad_out, count)) is not None:
        return grad_out, grad_out, lies
    return grad_out, np.empty(logits.shape, rows.dtype), fresh


def _address(value: Array) -> int:
    address: int = value.__array_interface__["data"][0]
    return address


def cast(value: Array, dtype: np.dtype[Any]) -> Array:
    """Contiguous and of this type; what the type cannot hold is inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        return contiguous(value if value.dtype == dtype else value.astype(dtype))


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What statistics, losses and products come out as: float32, or float64 for float64 input."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def product_gradient(upstream: Any, shape: tuple[int, ...], return_grad: bool) -> Any:
    """The upstream gradient of a product; None, where there is none, stands for ones."""
    if upstream is None:
        return None
    if not return_grad:
        raise ValueError("upstream: of use only with return_grad=True")
    upstream = float_array("upstream", upstream)
    if upstream.shape != shape:
        raise ValueError(f"upstream: shape {upstream.shape}; allowed: {shape}")
    return upstream


def row_gradient(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An upstream gradient, one number a row."""
    value = float_array(name, value)
    if value.shape != shape:
        raise ValueError(f"{name}: shape {value.shape}; allowed: {shape}")
    return contiguous(value, dtype)
