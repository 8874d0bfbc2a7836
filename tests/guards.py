"""Arrays against pages that must not be touched."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def between_guards(array: np.ndarray, at_end: bool) -> np.ndarray:
    """A copy that begins or ends at a page that must not be touched: one byte too far crashes."""
    pages = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    start = np.frombuffer(memory, np.uint8).ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + mmap.PAGESIZE + pages):
        assert libc.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) == 0
    offset = mmap.PAGESIZE + (pages - array.nbytes if at_end else 0)
    raw = np.frombuffer(memory, np.uint8, array.nbytes, offset)
    raw[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return raw.view(array.dtype).reshape(array.shape)


def tensor_between_guards(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """The same of a CPU tensor."""
    import torch

    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    copy = torch.from_numpy(between_guards(raw, at_end))
    return copy.view(tensor.dtype).view(tensor.shape)
