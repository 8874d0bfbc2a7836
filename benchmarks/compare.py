"""python -m benchmarks compare A.json B.json: what of ours moved from A to B beyond the noise.

Machines, and one machine from hour to hour, differ in absolute time. So milliseconds are shown, but the
verdict is on our time relative to a peer that took turns with us in the same case: the one that was the
fastest in A and is in B as well. Where a case has no peer, the bare product stands for it; where it has
neither, times are not judged.

A change counts when the logarithm of the relative time moved by more than each of these:
- Three standard errors, of all four medians combined. Half the range between the quartiles is 0.6745
  standard deviations of a call, and the median of n calls has a standard error of 1.2533 / sqrt(n) standard
  deviations, if calls scatter normally. Three, because a run has about a hundred rows. A file without the
  times themselves has their spread; n is then taken as 4, the fewest that are measured.
- Three times the scatter of such changes over all rows of the two files: 1.4826 times the median distance
  from their median, a standard deviation that a few real changes do not move. Where memory lies and what
  else the machine does differs from process to process, and the calls of one process do not show it.
- 5 %.

Errors count from twice the old value on, peak extra memory from 1 MB + 1 % on.

Exit code: 0 nothing got worse, 1 something did, 2 a file cannot be read or compared.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import candidates, report
from .candidates import Cells

Case = tuple[str, str, str]  # run, family, case
Cases = dict[Case, dict[str, Cells]]  # rows by name

FEWEST = 4  # rounds
ERRORS = 3.0
FLOOR = math.log(1.05)


def read(path: str) -> tuple[dict[str, Any], Cases]:
    """The result and its rows; ValueError where it is no result."""
    try:
        result = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    cases: Cases = {}
    try:
        for run, part in result["runs"].items():
            for rows in part["tables"]:
                # files of one family do not say which in each row
                default = result["title"] if run in report.ALLOCATORS else run
                key = run, rows[0].get("family", default), rows[0]["case"]
                if key in cases:
                    raise ValueError(f"{path}: twice in it: {', '.join(key)}")
                cases[key] = {row["name"]: row for row in rows}
                for row in rows:
                    if not (row["ms"] > 0 and row["spread"] >= 0):
                        raise ValueError(f"{path}: no time in {', '.join(key)}: {row['name']}")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a result of python -m benchmarks ({what})") from error
    return result, cases


def variance(row: Cells) -> float:
    """Of the logarithm of the row's median."""
    times, spread = row.get("times_ms") or [], row["spread"]
    if len(times) > 1:
        low, middle, high = statistics.quantiles(times, n=4)
        spread = (high - low) / 2 / middle
    rounds = len(times) or FEWEST
    return float((1.2533 / 0.6745 * spread) ** 2 / rounds)


def reference(before: dict[str, Cells], after: dict[str, Cells]) -> str | None:
    """The name of the row that ours is held against."""
    rows = list(before.values())
    bare = [row for row in rows if candidates.is_bare(row)]
    for row in [*candidates.peers(rows), *bare]:
        if row["name"] in after:
            return str(row["name"])
    return None


def ours_in_both(before: dict[str, Cells], after: dict[str, Cells]) -> list[str]:
    return [name for name, row in before.items() if name in after and candidates.is_ours(row)]


def moved_by(
    before: dict[str, Cells], after: dict[str, Cells], name: str, other: str
) -> tuple[float, float]:
    """By how much our relative time moved, and the standard error of that: both logarithms."""
    rows = before[name], before[other], after[name], after[other]
    ours_a, other_a, ours_b, other_b = (math.log(row["ms"]) for row in rows)
    return (ours_b - other_b) - (ours_a - other_a), math.sqrt(sum(variance(row) for row in rows))


def scatter_of(pairs: list[tuple[dict[str, Cells], dict[str, Cells]]]) -> float:
    """Of the changes over all our rows: robust standard deviation of their logarithms."""
    changes = [
        moved_by(before, after, name, other)[0]
        for before, after in pairs
        if (other := reference(before, after)) is not None
        for name in ours_in_both(before, after)
    ]
    if not changes:
        return 0.0
    middle = statistics.median(changes)
    return 1.4826 * statistics.median(abs(change - middle) for change in changes)


def differences(
    before: dict[str, Cells], after: dict[str, Cells], scatter: float
) -> list[tuple[str, str, bool]]:
    """(name, what moved, whether it is worse) of our rows of a case."""
    found = []
    other = reference(before, after)
    for name in ours_in_both(before, after):
        a, b = before[name], after[name]
        if other is not None:
            moved, error = moved_by(before, after, name, other)
            noise = max(ERRORS * error, ERRORS * scatter, FLOOR)
            if abs(moved) > noise:
                was, now = a["ms"] / before[other]["ms"], b["ms"] / after[other]["ms"]
                times = f"{a['ms']:.4g} to {b['ms']:.4g} ms"
                what = f"time, to {other}: {was:.3g} to {now:.3g}, {math.expm1(moved):+.0%} "
                what += f"(noise {math.expm1(math.copysign(noise, moved)):+.0%}); {times}"
                found.append((name, what, moved > 0))
        for key, title in (("error", "error"), ("error_weight", "error of dW")):
            was, now = a.get(key), b.get(key)
            if was is not None and now is not None and (now > 2 * was or was > 2 * now):
                found.append((name, f"{title}: {was:.1e} to {now:.1e}", now > was))
        was, now = a.get("extra_mb"), b.get("extra_mb")
        if was is not None and now is not None and abs(now - was) > 1 + 0.01 * was:
            found.append((name, f"extra memory: {was:.1f} to {now:.1f} MB", now > was))
    return found


def only_in(mine: Cases, theirs: Cases) -> list[str]:
    """Cases and rows that the other file lacks."""
    found = []
    for key, rows in mine.items():
        where = ", ".join(key)
        if key not in theirs:
            found.append(f"{where}: all {len(rows)} rows")
        elif missing := [name for name in rows if name not in theirs[key]]:
            found.append(f"{where}: {'; '.join(missing)}")
    return found


def main(paths: list[str]) -> int:
    try:
        if len(paths) != 2:
            raise ValueError("usage: python -m benchmarks compare A.json B.json")
        (a, before), (b, after) = (read(path) for path in paths)
        both = [key for key in before if key in after]
        if not both:
            raise ValueError(f"{paths[0]} and {paths[1]} have no case in common")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console(width=max(140, Console().width), highlight=False, markup=False)
    if a["machine"] != b["machine"]:
        console.print(f"Other machine or versions:\n  A: {a['machine']}\n  B: {b['machine']}")
    for name, lines in (("A", only_in(before, after)), ("B", only_in(after, before))):
        for line in lines:
            console.print(f"only in {name}: {line}")
    scatter = scatter_of([(before[key], after[key]) for key in both])
    found = [(key, *one) for key in both for one in differences(before[key], after[key], scatter)]
    worse = [one for one in found if one[-1]]
    table = Table(
        box=SIMPLE_HEAD, title="Moved beyond the noise, the worse first", title_justify="left"
    )
    for column in ("", "run", "family", "case", "row", "what"):
        table.add_column(column, overflow="fold")
    for (run, family, case), name, what, is_worse in sorted(found, key=lambda one: not one[-1]):
        table.add_row("worse" if is_worse else "better", run, family, case, name, what)
    if found:
        console.print(table)
    unjudged = sum(reference(before[key], after[key]) is None for key in both)
    console.print(
        f"{len(both)} cases in both: {len(worse)} changes for the worse, {len(found) - len(worse)} for the "
        f"better; {unjudged} without a peer, of which times are not judged. "
        f"Relative times scatter by {math.expm1(scatter):.0%} from A to B."
    )
    return 1 if worse else 0
