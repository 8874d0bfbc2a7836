"""The named codebooks, and what a codebook and its packed codes must look like. No torch here.

The formats are bitsandbytes' own where it has them: float32 tables, codes packed most significant
bits first. "Array" below is a torch tensor or a NumPy array; what differs between them is passed in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._args import DTYPES, require

Table = NDArray[np.float32]

BITS = {4: 2, 8: 3, 16: 4, 256: 8}  # entries of a codebook: bits of a code
BLOCKSIZES = tuple(2**i for i in range(4, 13))
SORTED, FP4 = 0, 1  # how the nearest entry is found; csrc/ops/codebook.h

# Up to so many tokens `codebook_linear` multiplies from the packed bytes, forward and backward; above, the
# weight is decoded and multiplied by a library. 4096×4096 float32 on AVX2, times what a product with the
# decoded weight takes, from the bytes | decoded and multiplied; T: threads. Not measured on AVX-512.
#
#     tokens          1           8           16          24          32          64
#     forward  T1     0.53        0.56        0.83|0.79   1.09        1.34        1.93|0.83
#              T2     0.32        0.56        0.68|0.87               0.86|0.84   1.04|0.81
#     backward T1     1.16|2.12   0.78|1.30   0.91|1.20   1.13|1.14   1.09|1.19   1.38|1.07
#              T2     0.86|2.00   0.65|1.39   0.86|1.18               0.91|1.14   0.93|1.16
KERNEL_TOKENS, KERNEL_TOKENS_BACKWARD = 16, 32


# ---- the named tables ---------------------------------------------------------------------------

_NF4 = """bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
          3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"""


def _nf4() -> Table:
    """Quantiles of the normal distribution, 0 among them (QLoRA, arXiv:2305.14314, appendix E)."""
    return np.array([int(word, 16) for word in _NF4.split()], np.uint32).view(np.float32)


def _fp4() -> Table:
    """Bit 3 is the sign; both zeros decode to +0."""
    magnitudes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    return np.array([*magnitudes, *(-m for m in magnitudes)], np.float32) / np.float32(12)


def _int4() -> Table:
    """The integers -8 to 7 over 7: a symmetric scale, in which -8 is never the nearest."""
    return np.arange(-8, 8).astype(np.float32) / np.float32(7)


def _dynamic8() -> Table:
    """0, 1 and, for i = 0..6, ±10^(i-6) times the midpoints of linspace(0.1, 1, 2^i + 1).

    The type of "8-bit optimizers via block-wise quantization" (arXiv:2110.02861). In float32 as
    torch.linspace computes it: from both ends, one rounding an entry.
    """
    entries = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    start = np.float32(0.1)
    for i in range(7):
        count = 2**i + 1
        step = float((np.float32(1) - start) / np.float32(count - 1))
        k = np.arange(count)
        line = np.where(k < count // 2, float(start) + step * k, 1 - step * (count - 1 - k))
        line = line.astype(np.float32)
        means = np.float32(10.0 ** (i - 6)) * ((line[:-1] + line[1:]) / np.float32(2))
        entries += [means, -means]
    return np.sort(np.concatenate(entries))


NAMED = {"nf4": _nf4(), "fp4": _fp4(), "dynamic8": _dynamic8(), "int4": _int4()}


def codebook(code: Any) -> tuple[Table, int, str | None]:
    """(the table, the rule that finds the nearest entry, its name if it has one) of a name or an array."""
    if isinstance(code, str):
        if code not in NAMED:
            raise ValueError(
                f"code: {code!r}; allowed: {', '.join(map(repr, NAMED))}, or a sorted table"
            )
        return NAMED[code], FP4 if code == "fp4" else SORTED, code
    table = np.asarray(code, np.float32)
    if table.ndim != 1 or table.size not in BITS:
        raise ValueError(
            f"code: shape {table.shape}; allowed: ({', '.join(map(str, BITS))} entries,)"
        )
    for name, known in NAMED.items():
        if np.array_equal(table, known):
            return codebook(name)
    if not np.isfinite(table).all() or (table[1:] < table[:-1]).any():
        raise ValueError("code: entries that are not finite and in ascending order")
    return table, SORTED, None


# ---- sizes --------------------------------------------------------------------------------------


def check_blocksize(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name}: an int, not {value!r}")
    require(value in BLOCKSIZES, name, value, "powers of two from 16 to 4096")


def packed_bytes(count: Any, bits: int) -> Any:
    """2, 4 and 8 bits fill bytes; 3 bits fill groups of eight codes in three bytes."""
    return (count + 7) // 8 * 3 if bits == 3 else (count * bits + 7) // 8


def blocks(count: Any, blocksize: int) -> Any:
    return (count + blocksize - 1) // blocksize


# ---- packed codes -------------------------------------------------------------------------------


class Nested(NamedTuple):
    """Double quantisation: the tensor's absmax is uint8 codes q, decoded code[q]·absmax + offset."""

    code: Any
    """float32 (256,)."""
    absmax: Any
    """float32, one number a block of `blocksize` codes."""
    offset: Any
    """float32 (), the mean of what was quantised; always on the CPU, where reading it costs nothing."""
    blocksize: int


# What stands for packed codes in a call, in this order: codes, code, absmax, nested_code, nested_absmax,
# nested_offset, nested_blocksize, blocksize; the nested ones None (0) if there are none.
Fields = tuple[Any, Any, Any, Any, Any, Any, int, int]
# (name, value, type's name, elements, of what): raises where the value is no such array.
CheckArray = Callable[[str, Any, str, Any, str], None]


def check_fields(values: Fields, count: Any, check: CheckArray) -> None:
    """Raise, naming the field, where kernels would read past an end."""
    codes, code, absmax, nested_code, nested_absmax, nested_offset, nested_blocksize, blocksize = (
        values
    )
    check_blocksize("blocksize", blocksize)
    entries = int(math.prod(code.shape))  # never a symbol
    if entries not in BITS:
        raise ValueError(f"code: {entries} entries; allowed: {', '.join(map(str, BITS))}")
    check("code", code, "float32", entries, "")
    of = f"{count} codes of {BITS[entries]} bits take"
    check("codes", codes, "uint8", packed_bytes(count, BITS[entries]), of)
    scales = blocks(count, blocksize)
    of = f"{count} elements in blocks of {blocksize} have"
    check("absmax", absmax, "float32" if nested_absmax is None else "uint8", scales, of)
    if nested_absmax is not None:
        check_blocksize("nested_blocksize", nested_blocksize)
        check("nested_code", nested_code, "float32", 256, "8 bits index")
        of = f"{scales} elements in blocks of {nested_blocksize} have"
        check("nested_absmax", nested_absmax, "float32", blocks(scales, nested_blocksize), of)
        check("nested_offset", nested_offset, "float32", 1, "it is")


# ---- bitsandbytes' quant state ------------------------------------------------------------------

_BITSANDBYTES = ("nf4", "fp4")
_NESTED_KEYS = (
    "nested_absmax",
    "nested_quant_map",
    "nested_blocksize",
    "nested_dtype",
    "nested_offset",
)
_KEYS = ("absmax", "quant_map", *_NESTED_KEYS)
_STATE_NAMES = {"code": "quant_map", "nested_code": "nested_quant_map"}


class About(NamedTuple):
    """What a quant state holds beside arrays."""

    quant_type: str | None
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_blocksize: int = 0
    nested_offset: float = 0.0


def check_bitsandbytes_form(quant_type: str | None, blocksize: int, q: Any) -> None:
    if quant_type not in _BITSANDBYTES or blocksize == 16:
        raise ValueError(
            f"to_bitsandbytes: {q!r} has no bitsandbytes form; allowed: nf4 and fp4 with a "
            "blocksize of 32 and above"
        )


def pack_about(about: About) -> tuple[str, bytearray]:
    """(the last key of a quant state, the JSON under it). The key ends in bitsandbytes__nf4 or, where
    bitsandbytes has no such format, in finefuse__dynamic8, finefuse__custom and so on."""
    kind = about.quant_type or "custom"
    values: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": about.blocksize,
        "dtype": about.dtype,
        "shape": list(about.shape),
    }
    if about.nested_blocksize:
        values |= {
            "nested_blocksize": about.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": about.nested_offset,
        }
    family = "bitsandbytes" if kind in _BITSANDBYTES else "finefuse"
    return f"quant_state.{family}__{kind}", bytearray(json.dumps(values).encode())


def _values(
    state: Mapping[str, Any], families: Sequence[str], data: Callable[[str, Any], bytes]
) -> tuple[str, dict[str, Any]]:
    """(the name of the packed key, all keys without their prefixes, with what it holds)."""
    if not isinstance(state, Mapping):
        raise TypeError(f"quant_state: a dict, not {type(state).__name__}")
    values: dict[str, Any] = {}
    for key, value in state.items():
        name = key.split(".")[-1]
        if name in values and (name in _KEYS or name.split("__")[0] in families):
            raise ValueError(
                f"{name}: of more than one tensor, the last {key!r}; give one tensor's keys"
            )
        values[name] = value
    packed = [key for key in values if key.split("__")[0] in families]
    if not packed:
        return "quant_state", values
    if len(packed) > 1:
        raise ValueError(f"quant_state: {' and '.join(packed)}; allowed: one")
    name = f"quant_state.{packed[0]}"
    text = data(name, values.pop(packed[0]))
    try:
        about = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{name}: a JSON object, not {about!r}")
    if about.get("quant_type") != packed[0].split("__")[1]:
        raise ValueError(f"{name}: its quant_type is {about.get('quant_type')!r}")
    return name, values | about


def read_state(
    state: Mapping[str, Any],
    families: Sequence[str],
    data: Callable[[str, Any], bytes],
    table: Callable[[str, Any, str, bool], Any],
) -> tuple[About, Any, Any, Any, Any]:
    """(what it is about, absmax, code, nested_absmax, nested_code) of a quant state; every field is checked.

    `data(name, value)` gives the bytes of a uint8 array; `table(name, value, type's name, whether to
    look for NaN and inf)` a flat array of that type.
    """
    name, values = _values(state, families, data)

    def get(key: str) -> Any:
        if values.get(key) is None:
            raise ValueError(f"{key}: missing in {name}")
        return values[key]

    def dtype_of(key: str, allowed: Sequence[str]) -> str:
        dtype = str(get(key)).removeprefix("torch.")
        if dtype not in allowed:
            raise ValueError(f"{key}: {get(key)!r}; allowed: {', '.join(allowed)}")
        return dtype

    shape = get("shape")
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape: {shape!r}; allowed: sizes")
    if math.prod(max(n, 1) for n in shape) >= 1 << 62:
        raise ValueError(f"shape: {list(shape)} is more than any memory holds")
    kind = get("quant_type")
    known = _BITSANDBYTES if families == ("bitsandbytes",) else (*NAMED, "custom")
    if kind not in known:
        raise ValueError(f"quant_type: {kind!r}; allowed: {', '.join(map(repr, known))}")
    check_blocksize("blocksize", get("blocksize"))
    code = table("quant_map", get("quant_map"), "float32", True)
    if kind != "custom" and code.shape != NAMED[kind].shape:
        raise ValueError(f"quant_map: {len(code)} entries; {kind} has {NAMED[kind].size}")
    nested = any(values.get(key) is not None for key in _NESTED_KEYS)
    absmax = table("absmax", get("absmax"), "uint8" if nested else "float32", nested)
    about = About(
        None if kind == "custom" else kind,
        get("blocksize"),
        dtype_of("dtype", tuple(DTYPES)),
        tuple(shape),
    )
    if not nested:
        return about, absmax, code, None, None
    get("nested_absmax")
    dtype_of("nested_dtype", ("float32",))
    offset = get("nested_offset")
    if type(offset) not in (int, float) or not abs(offset) <= float(np.finfo(np.float32).max):
        raise ValueError(f"nested_offset: {offset!r}; allowed: a number that float32 holds")
    check_blocksize("nested_blocksize", get("nested_blocksize"))
    about = about._replace(nested_blocksize=get("nested_blocksize"), nested_offset=offset)
    nested_code = table("nested_quant_map", get("nested_quant_map"), "float32", True)
    nested_absmax = table("nested_absmax", get("nested_absmax"), "float32", True)
    return about, absmax, code, nested_absmax, nested_code


def check_state_fields(values: Fields, count: Any, check: CheckArray) -> None:
    """`check_fields`, by the names that a quant state has."""
    check_fields(values, count, lambda name, *args: check(_STATE_NAMES.get(name, name), *args))
