"""Who is who in a table: our rows, the peers' and the floors that nobody can be faster than."""

from __future__ import annotations

from typing import Any

Cells = dict[str, Any]  # a row, as JSON holds it

# not another library's way to do the case, only what it cannot do without
FLOORS = ("fill_ of the output", "x + x")


def is_ours(row: Cells) -> bool:
    return row["name"].startswith("finefuse")


def is_bare(row: Cells) -> bool:
    """The matrix products that the case needs, alone."""
    return row["name"].removeprefix("the ").startswith("bare")


def peers(rows: list[Cells]) -> list[Cells]:
    """Rows of others that do the whole case, the fastest first; none in a table that does not begin with
    ours: such a table shows what the parts of a call cost."""
    if not is_ours(rows[0]):
        return []
    found = [r for r in rows if not (is_ours(r) or is_bare(r) or r["name"] in FLOORS)]
    return sorted(found, key=lambda row: row["ms"])


def of_limit(rows: list[Cells]) -> float | None:
    """How near the first row comes to its limit: the bare products where the table has them, else the
    bandwidth of a copy.

    Bare products of few rows are no limit where they mostly wait for bytes (more than half of their time at
    that bandwidth) and the first row moves fewer of them, packed.
    """
    bare, ours = min(filter(is_bare, rows), key=lambda row: row["ms"], default=None), rows[0]
    bandwidth: float | None = ours["of_limit"]
    if bare is None:
        return bandwidth
    if bandwidth and bare["moved_mb"] > ours["moved_mb"] and bare["of_limit"] > 0.5:
        return bandwidth
    return float(bare["ms"] / ours["ms"])
