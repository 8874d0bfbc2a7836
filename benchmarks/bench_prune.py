"""Pruning: masks by magnitude over a tensor, by Wanda over rows, 2 of every 4; and zeros in place.

Bytes at least: the weight read once and a byte of the mask an element; in place the weight read and written.

Candidates stand beside the share of elements whose fate is not that of the truth: the smallest scores in
float64, of equal ones the lower index. A mask by a threshold (`kthvalue`) keeps or drops all equal scores at
once, and `topk` takes any of them: in bfloat16, where many are equal, these are the errors seen. The table's
"error" is that share. A selection by sorting takes seconds: such a candidate is timed once, without a spread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import finefuse as ff
import torch
from torch import Tensor

from . import peers
from .measure import Row, interleaved, peak_extra, timer
from .peers import OURS, TORCH

Mask = Callable[[], Tensor]

TYPES = (torch.float32, torch.bfloat16)


def exact(score: Tensor, drop: int) -> Tensor:
    """Of each row the `drop` smallest scores go, of equal ones the lower index; in float64."""
    order = score.double().argsort(dim=-1, stable=True)
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, order[..., :drop], False)


def table(
    case: str,
    runs: dict[str, tuple[str, Mask]],
    slow: dict[str, Mask],
    weight: Tensor,
    truth: Tensor,
) -> list[Row]:
    """Times, memory, and the share of elements unlike the truth; `slow` run once."""
    device = weight.device.type
    moved = weight.nbytes + weight.numel()
    seconds_of = timer(device)
    fast = peers.load(runs, device)
    rows = [Row(case, name, moved=moved) for name in fast]
    rounds, budget = (30, 5.0) if device == "cuda" else (9, 10.0)
    interleaved(rows, list(fast.values()), seconds_of, rounds, budget, lambda: None)
    found = [run() for run in fast.values()]
    for name, run in slow.items():
        out: list[Tensor] = []
        call = functools.partial(keep, run, out)
        times = [seconds_of(call)] * 2 if device == "cpu" else [seconds_of(call) for _ in range(5)]
        rows.append(Row(case, name, times, moved=moved))
        found.append(out[-1])
    for row, run, mask in zip(rows, [*fast.values(), *slow.values()], found, strict=True):
        row.extra = peak_extra(device, run)
        row.error = float((mask != truth).float().mean())
    return rows


def keep(run: Mask, out: list[Tensor]) -> None:
    out[:] = [run()]


def in_place(case: str, weight: Tensor, **options: Any) -> list[Row]:
    """What is pruned already is read and written like anything else; eager has its mask given."""
    device, source = weight.device.type, weight.clone()
    mask = ff.prune_mask(weight, **options)
    runs = peers.load(
        {
            "finefuse": (OURS, lambda: ff.prune_(weight, **options)),
            "torch, the mask given": (TORCH, lambda: weight.mul_(mask)),
        },
        device,
    )
    rows = [Row(case, name, moved=2 * weight.nbytes) for name in runs]
    rounds, budget = (30, 5.0) if device == "cuda" else (9, 10.0)
    setup = functools.partial(weight.copy_, source)
    interleaved(rows, list(runs.values()), timer(device), rounds, budget, setup)
    for row, run in zip(rows, runs.values(), strict=True):
        setup()
        row.extra = peak_extra(device, run)
        row.error = float(((weight == 0) != ((source == 0) | ~mask)).float().mean())
    setup()
    return rows


def run(device: str, quick: bool) -> Iterator[list[Row]]:
    rows, columns = (64, 512) if quick else (4096, 14336)
    norm = 0.5 + torch.rand(columns, device=device)
    for dtype in TYPES:
        weight = torch.randn(rows, columns, device=device).mul_(0.02).to(dtype)
        half = weight.numel() // 2
        of = f"{rows}x{columns} {str(dtype).removeprefix('torch.')}"

        fused = functools.partial(ff.prune_mask, weight, sparsity=0.5)
        yield table(
            f"half of a tensor, {of}", {"finefuse": (OURS, fused)},
            {
                "kthvalue": functools.partial(peers.prune_kthvalue, weight, half),
                "topk, as l1_unstructured": functools.partial(peers.prune_topk, weight, half),
            },
            weight, exact(weight.abs().flatten(), half).view(rows, columns),
        )  # fmt: skip
        score = weight.abs().float() * norm
        fused = functools.partial(
            ff.prune_mask, weight, sparsity=0.5, method="wanda", activation_norm=norm
        )
        yield table(
            f"half of each row by Wanda, {of}", {"finefuse": (OURS, fused)},
            {
                "sort, as Wanda": functools.partial(peers.wanda_sort, weight, norm, columns // 2),
                "kthvalue": functools.partial(peers.wanda_kthvalue, weight, norm, columns // 2),
                "topk": functools.partial(peers.wanda_topk, weight, norm, columns // 2),
            },
            weight, exact(score, columns // 2),
        )  # fmt: skip
        fused = functools.partial(ff.prune_mask, weight, n=2, m=4)
        compiled = peers.compiled(peers.prune_2_4)
        by_topk = functools.partial(peers.prune_2_4, weight)
        yield table(
            f"2 of every 4, {of}",
            {"finefuse": (OURS, fused), "torch.compile": (TORCH, functools.partial(compiled, weight))},
            {"topk": by_topk},
            weight, exact(weight.abs().view(-1, 4), 2).view(rows, columns),
        )  # fmt: skip
        for name, options in (
            ("half of a tensor", {"sparsity": 0.5}),
            ("2 of every 4", {"n": 2, "m": 4}),
        ):
            yield in_place(f"prune_, {name}, {of}", weight, **options)
