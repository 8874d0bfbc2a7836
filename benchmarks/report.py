"""Tables of a run: on the terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from finefuse import _C, __version__
from rich.console import Console
from rich.table import Table

ALLOCATORS = {"default": "the default allocator", "huge": "huge pages for all (GLIBC_TUNABLES)"}
COLUMNS = ("", "ms", "±", "x ours", "GB/s", "of limit", "extra MB", "error")


def machine() -> str:
    """The machine in words."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    return (
        f"{cpu}, {os.cpu_count()} CPUs, {_C.isa()}; torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads; finefuse {__version__}"
    )


def cells(row: dict[str, Any], ours: float) -> list[str]:
    ms = row["ms"]
    moved = row["gb_s"] > 0
    return [
        row["name"],
        f"{ms:.2f}" if ms >= 1 else f"{ms * 1e3:.1f} us",
        f"{row['spread']:.0%}",
        f"{ms / ours:.2f}",
        f"{row['gb_s']:.1f}" if moved else "",
        f"{row['of_limit']:.0%}" if moved else "",
        f"{row['extra_mb']:.1f}" if moved else "",
        "" if row["error"] is None else f"{row['error']:.1e}",
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title=rows[0]["case"], title_justify="left")
    for i, column in enumerate(COLUMNS):
        out.add_column(column, justify="left" if i == 0 else "right")
    ours = next((r["ms"] for r in rows if r["name"] == "finefuse"), rows[0]["ms"])
    for row in rows:
        out.add_row(*cells(row, ours))
    return out


def show(rows: list[dict[str, Any]]) -> None:
    Console().print(table(rows))


def write(result: dict[str, Any], path: Path) -> None:
    """path.json and path.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [f"# Benchmarks: {result['family']}", "", result["machine"] + ".", ""]
    lines += [
        "Candidates take turns in one run, the second of two runs a turn counts; medians, ± half the range "
        "between the quartiles. GB/s: the bytes that must be moved at least, over the time; of limit: "
        "over the copy bandwidth measured in the same run. Extra MB: the peak above the start, "
        "counted by torch's allocator. Error: of the gradient against float64, largest, relative to "
        "the largest gradient.",
        "",
    ]
    for allocator, part in result["runs"].items():
        limits = ", ".join(f"{k} {v:.1f}" for k, v in part["bandwidth"].items())
        lines += [f"## {ALLOCATORS[allocator]}", "", f"Measured GB/s: {limits}.", ""]
        for rows in part["tables"]:
            ours = next((r["ms"] for r in rows if r["name"] == "finefuse"), rows[0]["ms"])
            lines += [f"### {rows[0]['case']}", "", "| " + " | ".join(COLUMNS) + " |"]
            lines += ["|" + "---|" * len(COLUMNS)]
            lines += ["| " + " | ".join(cells(r, ours)) + " |" for r in rows]
            lines += [""]
    path.with_suffix(".md").write_text("\n".join(lines))
