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
    """How near the first row comes to the limit: the bare products of the case where the table has them,
    else the bandwidth of a copy."""
    bare = [row["ms"] for row in rows if is_bare(row)]
    limit: float | None = min(bare) / rows[0]["ms"] if bare else rows[0]["of_limit"]
    return limit
