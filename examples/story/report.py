"""The table and the figure at the end."""

from __future__ import annotations

import statistics
from math import nan
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .engines import FINEFUSE, PLAIN
from .stages import TITLES
from .training import Result

COLOURS = {PLAIN.name: ("tab:orange", 4, 0.5), FINEFUSE.name: ("black", 1, 1.0)}


def speed(result: Result) -> float:
    """How many times faster finefuse is: the median over steps. NaN: not compared."""
    if len(result.runs) < 2:
        return nan
    pairs = zip(result.runs[PLAIN.name].seconds, result.runs[FINEFUSE.name].seconds, strict=True)
    return statistics.median(plain / fused for plain, fused in pairs)


def difference(result: Result) -> float:
    """The largest difference of the engines' losses at any step, relative to the stage's largest loss.

    Relative to 0.1 where that is smaller: policy losses cancel to almost nothing.
    """
    if len(result.runs) < 2 or not result.runs[PLAIN.name].losses:
        return 0.0
    plain, fused = result.runs[PLAIN.name].losses, result.runs[FINEFUSE.name].losses
    return max(abs(a - b) for a, b in zip(plain, fused, strict=True)) / max(0.1, *map(abs, plain))


def results(done: dict[str, Result]) -> Table:
    compared = any(len(result.runs) > 1 for result in done.values())
    table = Table("stage", box=box.SIMPLE, padding=(0, 1, 0, 0))
    titles = ["before", "after", "", "tokens/s", "peak MiB"]
    for title in titles + (["x plain", "of its MiB"] if compared else []):
        table.add_column(title, justify="right", no_wrap=True)
    for stage, result in done.items():
        fused, plain = result.runs.get(FINEFUSE.name), result.runs.get(PLAIN.name)
        row = [TITLES[stage], f"{result.before:.3f}", f"{result.after:.3f}"]
        row.append("" if not result.runs else "[green]✓[/]" if result.good else "[red]✗[/]")
        if fused:
            rate = result.per_step / statistics.median(fused.seconds)
            row += [f"{rate:,.0f}" if result.unit == "tokens" else "", f"{fused.peak:.0f}"]
        if fused and plain:
            row += [f"{speed(result):.2f}", f"{fused.peak / plain.peak if plain.peak else nan:.2f}"]
        table.add_row(*row)
    return table


def draw(done: dict[str, Result], path: Path) -> None:
    columns = 4
    shown = {stage: result for stage, result in done.items() if result.runs}
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (stage, result) in zip(panels, shown.items(), strict=False):
        axes.set_title(
            f"{TITLES[stage]}\n{result.metric}: {result.before:.3f} → {result.after:.3f}"
        )
        axes.title.set_fontsize(9)
        if any(run.losses for run in result.runs.values()):
            for name, (colour, width, alpha) in COLOURS.items():
                if name in result.runs:
                    losses = result.runs[name].losses
                    steps = range(1, len(losses) + 1)
                    axes.plot(steps, losses, color=colour, lw=width, alpha=alpha, label=name)
            axes.set(xlabel="step", ylabel="loss")
            axes.legend(fontsize=8)
        else:
            axes.bar(["before", "after"], [result.before, result.after], color="grey")
            axes.set_ylabel(result.metric)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
