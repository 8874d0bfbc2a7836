"""Tables of a run: on the terminal, as JSON, as Markdown and as a plot.

A result is {"title", "machine", "runs": {name: {"limits", "tables"}}}: on a CPU one family, a run for
each allocator; on a GPU one device, a run for each family.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from finefuse import _C, __version__
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
Cells = dict[str, Any]  # a row, as JSON holds it

ALLOCATORS = {"default": "the default allocator", "huge": "huge pages for all (GLIBC_TUNABLES)"}
COLUMNS = ("", "ms", "±", "ratio", "MB moved", "GB/s", "of limit", "extra MB", "error")
# of losses on top of a linear layer
COLUMNS_OF_PRODUCTS = (
    "", "ms", "±", "ratio", "to bare", "extra MB", "resident MB", "float32 dW MB", "error", "error of dW",
)  # fmt: skip
LEGEND = """\
Candidates take turns in one run, the second of two runs a turn counts; medians, ± half the range between
the quartiles. Ratio: to the time of the first row. MB moved: what must be read and written at least;
GB/s: that over the time; of limit: over the copy bandwidth measured in the same run. Extra MB: the
peak above the start, counted by torch's allocator. Error: of the output or, with a backward, of the
gradient against float64, on a few rows of the whole vocabulary; the largest, relative to the largest
true value."""
LEGEND_OF_PRODUCTS = """\
To bare: the ratio to the time of the bare products, the last rows, of which the fastest counts: 2·M·H·V
operations each for the logits, for the gradient of the hidden states and for that of the weight, those that
the case needs. Extra MB is counted beyond these gradients; resident MB is the same in pages that the system
counts, with what torch's allocator does not see. Float32 dW MB: a gradient of a 16-bit weight that is
gathered in float32, which neither of the two contains. Errors: of the gradient of the hidden states (of the
output where there is no backward) and of the weight's, on a smaller shape, each relative to the largest
true value."""


def machine(device: str) -> str:
    """The machine in words."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    cpu = f"{cpu}, {os.cpu_count()} CPUs"
    if device == "cpu":
        return (
            f"{cpu}, {_C.isa()}; torch {torch.__version__} with {torch.get_num_threads()} threads; "
            f"finefuse {__version__}"
        )
    gpu = torch.cuda.get_device_properties(0)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    return (
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors, "
        f"driver {driver}, CUDA {torch.version.cuda}; on {cpu}; torch {torch.__version__}, "
        f"Triton {version('triton')}; finefuse {__version__}"
    )


def measured(limits: dict[str, dict[str, float]]) -> str:
    parts = {"bandwidth": "GB/s", "products": "GFLOP/s"}
    return "; ".join(
        f"{unit} " + ", ".join(f"{name} {value:.1f}" for name, value in limits[part].items())
        for part, unit in parts.items()
    )


def columns(rows: list[Cells]) -> tuple[str, ...]:
    return COLUMNS_OF_PRODUCTS if "of_bare" in rows[0] else COLUMNS


def cells(row: Cells, first: Cells) -> list[str]:
    def shown(name: str, form: str) -> str:
        return "" if row[name] is None else form.format(row[name])

    ms = row["ms"]
    head = [
        row["name"],
        f"{ms:.2f}" if ms >= 1 else f"{ms * 1e3:.1f} us",
        f"{row['spread']:.0%}",
        f"{ms / first['ms']:.2f}",
    ]
    if "of_bare" in row:
        return [
            *head,
            shown("of_bare", "{:.2f}"),
            shown("extra_mb", "{:.1f}"),
            shown("resident_mb", "{:.1f}"),
            shown("accumulator_mb", "{:.1f}"),
            shown("error", "{:.1e}"),
            shown("error_weight", "{:.1e}"),
        ]
    return [
        *head,
        shown("moved_mb", "{:.0f}"),
        shown("gb_s", "{:.1f}"),
        shown("of_limit", "{:.0%}"),
        shown("extra_mb", "{:.1f}"),
        shown("error", "{:.1e}"),
    ]


def show(rows: list[Cells]) -> None:
    out = Table(title=rows[0]["case"], title_justify="left", box=SIMPLE_HEAD)
    for i, column in enumerate(columns(rows)):
        out.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        out.add_row(*cells(row, rows[0]))
    Console(width=140).print(out)  # in a narrower terminal lines wrap and nothing is cut


def markdown(result: Result) -> str:
    lines = [f"# Benchmarks: {result['title']}", "", result["machine"] + ".", "", LEGEND, ""]
    tables = [rows for part in result["runs"].values() for rows in part["tables"]]
    if any(columns(rows) is COLUMNS_OF_PRODUCTS for rows in tables):
        lines += [LEGEND_OF_PRODUCTS, ""]
    for name, part in result["runs"].items():
        lines += [f"## {ALLOCATORS.get(name, name)}", ""]
        lines += [f"Measured: {measured(part['limits'])}.", ""]
        for rows in part["tables"]:
            head = columns(rows)
            lines += [f"### {rows[0]['case']}", "", "| " + " | ".join(head) + " |"]
            lines += ["|" + "---|" * len(head)]
            lines += ["| " + " | ".join(cells(r, rows[0])) + " |" for r in rows]
            lines += [""]
    return "\n".join(lines)


def plot(result: Result, path: Path) -> None:
    """Times relative to the first row of each case, a panel a run; without the cases that are only calls."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "font.size": 7,
        "font.sans-serif": ["DejaVu Sans"],
        "text.color": "#7a7a7a",  # the contrast is the same on white and on GitHub's dark page
        "ytick.labelcolor": "#7a7a7a",
        "svg.fonttype": "none",
        "svg.hashsalt": "finefuse",
    }
    blue, grey = "#3b82f6", "#9a9a9a"
    panels = {
        ALLOCATORS.get(name, name): [
            rows for rows in part["tables"] if rows[0]["gb_s"] or "of_bare" in rows[0]
        ]
        for name, part in result["runs"].items()
    }
    lines = max(sum(len(rows) + 2 for rows in tables) for tables in panels.values())
    with matplotlib.rc_context(style):
        figure = Figure((4.2 * len(panels), 0.6 + 0.14 * lines), layout="constrained")
        head = f"{result['title']}: times relative to the first of each case (shorter is faster)"
        where = textwrap.fill(result["machine"], 60 * len(panels))
        figure.suptitle(f"{head}\n{where}", size="medium")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, tables) in zip(axes, panels.items(), strict=True):
            names, y = {}, 0
            for rows in tables:
                y += 2
                ax.text(0, y - 1, rows[0]["case"], va="center", weight="bold")
                for row in rows:
                    ratio = row["ms"] / rows[0]["ms"]
                    colour = blue if row["name"].startswith("finefuse") else grey
                    ax.hlines(y, 0, ratio, color=colour, linewidth=6)
                    label = f"{row['ms']:.3g} ms" if row is rows[0] else f"{ratio:.1f}"
                    ax.text(ratio, y, " " + label, va="center")
                    names[y] = row["name"]
                    y += 1
            ax.set(title=name, ylim=(lines + 0.5, 0), yticks=list(names), xticks=[])
            ax.set_yticklabels(names.values())
            ax.set_xlim(0, 1.1 * ax.get_xlim()[1])
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def write(result: Result, path: Path) -> None:
    """path.json, path.md and path.svg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    plot(result, path.with_suffix(".svg"))
    print(f"written: {path}.json, .md, .svg")
