"""Tables of a run: on the terminal, as JSON, as Markdown and as a plot.

A result is {"title", "machine", "runs": {name: {"limits", "tables"}}, …}: on a CPU all families or one, a run
for each allocator; on a GPU one device, a run for each family. What holds all families has a page, too; the
first cases of the CPU's, titled "cpu", are README's table and plot.
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

from . import candidates
from .candidates import Cells

Result = dict[str, Any]

ALLOCATORS = {"default": "the default allocator", "huge": "huge pages for all (GLIBC_TUNABLES)"}
TEXT, BLUE, GREY = "#7a7a7a", "#3b82f6", "#9a9a9a"  # alike on white and on GitHub's dark page
STYLE = {
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.labelcolor": TEXT,
    "svg.fonttype": "none",
    "svg.hashsalt": "finefuse",
}
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
    where = [result["machine"], result.get("date"), result.get("commit")]
    lines = [f"# Benchmarks: {result['title']}", "", "; ".join(filter(None, where)) + "."]
    lines += ["", LEGEND, ""]
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

    panels = {
        ALLOCATORS.get(name, name): [
            rows for rows in part["tables"] if rows[0]["gb_s"] or "of_bare" in rows[0]
        ]
        for name, part in result["runs"].items()
    }
    lines = max(sum(len(rows) + 2 for rows in tables) for tables in panels.values())
    with matplotlib.rc_context({**STYLE, "font.size": 7}):
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
                    colour = BLUE if candidates.is_ours(row) else GREY
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


README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- figures: written by python -m benchmarks report -->"
END = "<!-- end of figures -->"


def first_cases(result: Result) -> list[dict[str, list[Cells]]]:
    """Of each family the first case that begins with ours and has a peer, by run."""
    found: dict[str, dict[str, list[Cells]]] = {}
    for name, part in result["runs"].items():
        for rows in part["tables"]:
            if candidates.is_ours(rows[0]) and candidates.peers(rows):
                found.setdefault(rows[0]["family"], {}).setdefault(name, rows)
    return [runs for runs in found.values() if set(runs) == set(result["runs"])]


def both(ours: float | None, other: float | None, form: str) -> str:
    """Ours and another's; nothing where both have none."""
    shown = ["none" if value is None else form.format(value) for value in (ours, other)]
    return "" if ours is None and other is None else ", ".join(shown)


def figures(result: Result) -> str:
    """The table in README.md: a line a family, losses as everything else."""
    lines = [
        "| the first case of each family | finefuse, ms | times faster than | with huge pages for all "
        "| extra MB: ours, the fastest peer's | error: ours, the fastest peer's |",
        "|---|---|---|---|---|---|",
    ]
    for runs in first_cases(result):
        rows = runs["default"]
        ours, others = rows[0], candidates.peers(rows)
        faster = ", ".join(f"{row['name']} {row['ms'] / ours['ms']:.3g}" for row in others)
        huge = runs["huge"]
        best = candidates.peers(huge)[0]
        lines.append(
            f"| {ours['case']} | {ours['ms']:.3g} | {faster} "
            f"| {best['name']} {best['ms'] / huge[0]['ms']:.3g} "
            f"| {both(ours['extra_mb'], others[0]['extra_mb'], '{:.1f}')} "
            f"| {both(ours['error'], others[0]['error'], '{:.1e}')} |"
        )
    spreads = sorted(
        row["spread"] for part in result["runs"].values() for rows in part["tables"] for row in rows
    )
    return "\n".join(
        [
            f"{result['machine']}; {result['date']}, {result['seconds'] / 60:.0f} minutes.",
            "",
            *lines,
            "",
            "Medians of candidates that took turns; the spread of a row is "
            f"±{spreads[len(spreads) // 2]:.0%} in the median, ±{spreads[-1]:.0%} at most. "
            "All cases and candidates: [benchmarks/results/cpu.md](benchmarks/results/cpu.md).",
        ]
    )


def write_readme(result: Result, path: Path) -> None:
    """Put the figures between README's two marks."""
    text = path.read_text()
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"{path}: the lines {BEGIN} and {END} are not there")
    path.write_text(f"{before}{BEGIN}\n{figures(result)}\n{END}{after}")


def plot_first_cases(result: Result, path: Path) -> None:
    """How many times faster than the fastest peer, a line a family, a dot for each allocator."""
    import matplotlib
    from matplotlib.figure import Figure

    every = first_cases(result)
    with matplotlib.rc_context({**STYLE, "font.size": 8}):
        figure = Figure((8, 0.9 + 0.3 * len(every)), layout="constrained")
        ax = figure.subplots()
        ax.axvline(1.0, color=GREY, linewidth=1)
        for name, colour, marker in (("default", BLUE, "o"), ("huge", "#f59e0b", "D")):
            pairs = [(rows[name][0], candidates.peers(rows[name])[0]) for rows in every]
            ratios = [best["ms"] / ours["ms"] for ours, best in pairs]
            ax.plot(ratios, range(len(every)), marker, color=colour, label=ALLOCATORS[name])
            if name == "default":
                for y, (ratio, (_, best)) in enumerate(zip(ratios, pairs, strict=True)):
                    ax.text(ratio, y - 0.22, f"{ratio:.3g} ({best['name']})", ha="center", size=6)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_yticks(range(len(every)), [rows["default"][0]["case"] for rows in every])
        ax.set_ylim(len(every) - 0.4, -0.8)
        ax.set_xlabel("times faster than the fastest peer; 1: as fast")
        ax.tick_params(length=0, which="both")
        ax.spines[:].set_visible(False)
        ax.legend(loc="lower right", frameon=False, labelcolor=TEXT)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def write(result: Result, path: Path) -> None:
    """path.json, path.md and path.svg; of a GPU and of all families on a CPU path.html, too, and where it
    is the project's own result of these the figures in README.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    written, of_cpu = ".json, .md, .svg", result["title"] == "cpu"
    if of_cpu or not ALLOCATORS.keys() >= result["runs"].keys():
        from . import page

        path.with_suffix(".html").write_text(page.html(result))
        written += f"; the page: {path.with_suffix('.html').resolve()}"
    if of_cpu:
        plot_first_cases(result, path.with_suffix(".svg"))
        if path == Path(__file__).parent / "results/cpu":
            write_readme(result, README)
    else:
        plot(result, path.with_suffix(".svg"))
    print(f"written: {path}{written}")
