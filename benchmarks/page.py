"""One HTML page of a result, from its JSON alone: nothing is loaded from elsewhere.

`page.html.jinja` beside this file holds the layout, the style and the script; here are the numbers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import candidates, report
from .candidates import Cells

Tables = list[list[Cells]]

LABELS = {"default": "default allocator", "huge": "huge pages"}

# what a column of `report.columns` is sorted by
KEYS = {
    "": "name", "ms": "ms", "±": "spread", "ratio": "ms", "MB moved": "moved_mb", "GB/s": "gb_s",
    "of limit": "of_limit", "extra MB": "extra_mb", "error": "error", "to bare": "of_bare",
    "resident MB": "resident_mb", "float32 dW MB": "accumulator_mb", "error of dW": "error_weight",
}  # fmt: skip
SUMMARY = (
    "case", "times faster", "our ms", "best peer", "its ms", "of limit", "extra MB", "its extra MB",
    "error", "its error", "family",
)  # fmt: skip
TICKS = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]


def by_run(result: report.Result) -> dict[str, dict[str, Tables]]:
    """Tables by run and family. On a GPU each family has a run of its own: they are one here."""
    found: dict[str, dict[str, Tables]] = {}
    for run, part in result["runs"].items():
        allocator = run in report.ALLOCATORS
        for rows in part["tables"]:
            family = rows[0].get("family", result["title"] if allocator else run)
            families = found.setdefault(run if allocator else "", {})
            families.setdefault(family, []).append(rows)
    return found


def cell(text: str, value: Any = None) -> dict[str, Any]:
    """What is shown, and what it is sorted by: an empty value comes last."""
    return {"text": text, "value": "" if value is None else value}


def table(rows: list[Cells]) -> dict[str, Any]:
    """A case in full."""
    head = report.columns(rows)
    body = []
    for row in rows:
        texts = report.cells(row, rows[0])
        cells = [cell(text, row[KEYS[c]]) for c, text in zip(head, texts, strict=True)]
        body.append({"cells": cells, "ours": candidates.is_ours(row), "loss": False})
    return {"case": rows[0]["case"], "head": ["candidate", *head[1:]], "rows": body}


def summary(families: dict[str, Tables]) -> list[dict[str, Any]]:
    """A row for each case that begins with ours: ours beside the fastest peer."""
    found = []
    for family, tables in families.items():
        for rows in tables:
            ours = rows[0]
            if not candidates.is_ours(ours):
                continue
            best = next(iter(candidates.peers(rows)), None)
            ratio = round(best["ms"] / ours["ms"], 4) if best else None
            limit = candidates.of_limit(rows)

            def of(row: Cells | None, column: str, rows: list[Cells] = rows) -> dict[str, Any]:
                if row is None:
                    return cell("")
                shown = dict(zip(report.columns(rows), report.cells(row, rows[0]), strict=True))
                return cell(shown[column], row[KEYS[column]])

            cells = [
                cell(ours["case"], ours["case"]),
                cell(f"{ratio:.2f}" if ratio else "", ratio),
                of(ours, "ms"),
                of(best, ""),
                of(best, "ms"),
                cell(f"{limit:.0%}" if limit else "", limit),
                of(ours, "extra MB"),
                of(best, "extra MB"),
                of(ours, "error"),
                of(best, "error"),
                cell(family, family),
            ]
            loss = ratio is not None and ratio < 1
            found.append({"cells": cells, "ours": False, "loss": loss})
    return found


def axis(ratios: list[float]) -> tuple[list[tuple[str, float]], Any]:
    """Ticks of a logarithmic axis, with their places in percent, and the function that gives a place."""
    # at least from a half to double, so that noise looks like noise
    low, high = math.log(min([*ratios, 0.5])), math.log(max([*ratios, 2.0]))
    margin = 0.06 * (high - low)

    def place(ratio: float) -> float:
        return round(100 * (math.log(ratio) - low + margin) / (high - low + 2 * margin), 2)

    inside = [tick for tick in TICKS if low - margin <= math.log(tick) <= high + margin]
    if len(inside) > 7:
        inside = [tick for tick in inside if abs(math.log10(tick) % 1) < 1e-9]
    return [(f"{tick:g}", place(tick)) for tick in inside], place


def plot(runs: dict[str, dict[str, Tables]], family: str) -> dict[str, Any]:
    """Dots on a logarithmic axis of times relative to the first row of each case, one for each run."""
    cases: dict[str, dict[str, list[float]]] = {}
    for families in runs.values():
        for rows in families.get(family, []):
            for row in rows:
                names = cases.setdefault(row["case"], {})
                names.setdefault(row["name"], []).append(row["ms"] / rows[0]["ms"])
    ratios = [ratio for names in cases.values() for found in names.values() for ratio in found]
    ticks, place = axis(ratios)

    def line(name: str, found: list[float]) -> dict[str, Any]:
        return {
            "name": name,
            "ours": candidates.is_ours({"name": name}),
            "dots": [place(ratio) for ratio in found],
            "text": " / ".join(f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" for ratio in found),
        }

    lines = [
        {"case": case, "lines": [line(*one) for one in names.items()]}
        for case, names in cases.items()
    ]
    return {"ticks": ticks, "one": place(1.0), "cases": lines}


def html(result: report.Result) -> str:
    """The page."""
    runs = by_run(result)
    families = list(dict.fromkeys(family for part in runs.values() for family in part))
    every = [rows for part in runs.values() for tables in part.values() for rows in tables]
    sections = [
        {
            "family": family,
            "plot": plot(runs, family),
            "tables": {
                run: [table(rows) for rows in part.get(family, [])] for run, part in runs.items()
            },
        }
        for family in families
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    limits = {
        LABELS.get(name, name): report.measured(part["limits"])
        for name, part in result["runs"].items()
    }
    details = {key: result.get(key) for key in ("date", "commit", "seconds", "size")}
    return environment.get_template("page.html.jinja").render(
        title=result["title"],
        machine=result["machine"],
        versions=result.get("versions", {}),
        missing=result.get("missing", []),
        **details,
        gpu="" in runs,
        runs={run: LABELS.get(run, run) for run in runs},
        limits=limits,
        legend=report.LEGEND,
        legend_of_products=report.LEGEND_OF_PRODUCTS
        if any("of_bare" in r[0] for r in every)
        else "",
        summary_head=SUMMARY,
        summaries={run: summary(part) for run, part in runs.items()},
        sections=sections,
    )
