"""The named codebooks, and what a codebook and its packed codes must look like. No torch here.

The formats are bitsandbytes' own where it has them: float32 tables, codes packed most significant
bits first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._args import require

Table = NDArray[np.float32]

BITS = {4: 2, 8: 3, 16: 4, 256: 8}  # entries of a codebook: bits of a code
BLOCKSIZES = tuple(2**i for i in range(4, 13))
SORTED, FP4 = 0, 1  # how the nearest entry is found; csrc/ops/codebook.h


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
