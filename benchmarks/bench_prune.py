"""Pruning: masks and zeros in place, half of the tensor, half of each row by Wanda's score, 2 of every 4.

Bytes at least: the weight is read once and a byte an element written; in place the weight is written too.

Error here: the share of elements that would have to change for exactly the smallest scores to be gone, and as
many as asked for, whichever of equal scores went. A threshold takes all that equal it: a candidate that
did not prune the number asked for says by how many. Slow candidates have few turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor

from . import peers
from .measure import Row, Size, interleaved, name_of, peak_extra, timer
from .peers import OURS, TORCH, Candidates

SHAPE = (4096, 14336)
QUICK_SHAPE = (64, 1024)
DTYPES = (torch.float32, torch.bfloat16)


def misplaced(keep: Tensor, score: Tensor, cut: Tensor, drop: int) -> tuple[float, int]:
    """(the share of elements that would have to change, how many are pruned beyond what was asked)."""
    keep = keep.view(score.shape)
    low = ((score < cut) & keep).sum(-1)
    high = ((score > cut) & ~keep).sum(-1)
    pruned = (~keep).sum(-1)
    wrong = low + high + (pruned + low - high - drop).abs()
    return float(wrong.sum() / keep.numel()), int(pruned.sum()) - drop * keep.shape[0]


def compare_masks(
    case: str,
    runs: dict[str, Callable[[], Tensor]],
    weight: Tensor,
    score: Tensor,
    group: int,
    drop: int,
    inplace: bool = False,
) -> list[Row]:
    """Times, memory and exactness; in place the weight is restored before each run."""
    device, source = weight.device.type, weight.clone()

    def setup() -> None:
        if inplace:
            weight.copy_(source)

    moved = weight.numel() if not inplace else weight.nbytes
    rows = [Row(case, name, moved=weight.nbytes + moved) for name in runs]
    calls = list(runs.values())
    rounds, budget = (30, 5.0) if device == "cuda" else (9, 6.0)
    interleaved(rows, calls, timer(device), rounds, budget, setup, slow=1.0)
    score = score.view(-1, group)
    cut = score.kthvalue(drop, dim=-1, keepdim=True).values
    for row, call in zip(rows, calls, strict=True):
        setup()
        row.extra = peak_extra(device, call)
        setup()
        out = call()
        row.error, beyond = misplaced(out != 0 if inplace else out, score, cut, drop)
        if beyond:
            row.name += f", {abs(beyond)} too {'many' if beyond > 0 else 'few'}"
    setup()
    return rows


def zeroed(weight: Tensor, mask: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: weight.masked_fill_(~mask(), 0.0)


def cases(weight: Tensor, norm: Tensor) -> Iterator[tuple[str, int, int, Tensor, Any, Candidates]]:
    """What is pruned, (group, drop, scores), our options, the peers' masks."""
    columns = weight.shape[-1]
    half, size = weight.numel() // 2, weight.abs()
    yield (
        "50% of the tensor", weight.numel(), half, size, {"sparsity": 0.5}, {
            "torch.topk": (TORCH, lambda: peers.keep_topk(weight, half)),
            "torch.kthvalue": (TORCH, lambda: peers.keep_kthvalue(weight, half)),
        },
    )  # fmt: skip
    k = columns // 2
    yield (
        "50% of each row, Wanda", columns, k, size * norm,
        {"sparsity": 0.5, "method": "wanda", "activation_norm": norm}, {
            "torch.sort, as Wanda": (TORCH, lambda: peers.keep_sorted_rows(weight, norm, k)),
            "torch.topk": (TORCH, lambda: peers.keep_topk_rows(weight, norm, k)),
        },
    )  # fmt: skip
    counted = peers.compiled(peers.keep_counted_of_4)
    yield (
        "2:4", 4, 2, size, {"n": 2, "m": 4}, {
            "torch.compile, counted": (TORCH, lambda: counted(weight)),
            "torch.topk": (TORCH, lambda: peers.keep_topk_of_4(weight)),
        },
    )  # fmt: skip


def of_type(device: str, rows: int, columns: int, dtype: torch.dtype) -> Iterator[list[Row]]:
    weight = torch.randn(rows, columns, device=device).mul_(0.02).to(dtype)
    norm = torch.rand(columns, device=device) + 0.5
    of = f"{rows}x{columns} {name_of(dtype)}"
    for what, group, drop, score, options, others in cases(weight, norm):
        ours = {"finefuse": (OURS, functools.partial(ff.prune_mask, weight, **options))}
        runs = peers.load({**ours, **others}, device)
        yield compare_masks(f"prune_mask {of}, {what}", runs, weight, score, group, drop)
        if "activation_norm" in options:
            continue  # as the mask: the sort of rows takes nearly all of the time
        ours = {"finefuse": (OURS, functools.partial(ff.prune_, weight, **options))}
        name, (needs, mask) = next(iter(others.items()))  # the exact one
        zeros = {f"{name}, then masked_fill_": (needs, zeroed(weight, mask))}
        runs = peers.load({**ours, **zeros}, device)
        yield compare_masks(f"prune_ {of}, {what}", runs, weight, score, group, drop, inplace=True)


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    if size == "standard":
        yield from of_type(device, 2048, 4096, torch.float32)
        return
    for dtype in DTYPES:
        yield from of_type(device, *(QUICK_SHAPE if quick else SHAPE), dtype)
