"""Pruning: what its arguments may be."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any

from . import choice, require

# csrc/ops/prune.h
PRUNE_SCOPES = {"tensor": 0, "row": 1, "group": 2}
PRUNE_METHODS = {"magnitude": "tensor", "wanda": "row"}  # the scope that is each one's own


def prune_workspace(rows: int, columns: int, scope: int) -> int:
    """Bytes of scratch that prune takes on a GPU, for one selection after another: csrc/ops/prune.h."""
    count = rows * columns if scope == PRUNE_SCOPES["tensor"] else columns
    return 8 * (4 + 2048 + -(-count // 4096))


def prune_scope(
    sparsity: Any, n: Any, m: Any, scope: Any, method: Any, activation_norm: Any
) -> tuple[int, int, int]:
    """(the scope's number, n, m) of pruning; n and m are 0 where a sparsity is given."""
    if not isinstance(method, str) or method not in PRUNE_METHODS:
        choice("method", method, dict.fromkeys(PRUNE_METHODS, 0))
    if method == "wanda" and activation_norm is None:
        raise ValueError("activation_norm: None; method='wanda' needs it")
    if method == "magnitude" and activation_norm is not None:
        raise ValueError("activation_norm: only of use with method='wanda'")
    if n is None and m is None:
        if sparsity is None:
            raise ValueError("sparsity: None; give sparsity, or n and m")
        if scope is None:
            scope = PRUNE_METHODS[method]
        return choice("scope", scope, {"tensor": 0, "row": 1}), 0, 0
    if sparsity is not None:
        raise ValueError("sparsity: given together with n or m; give sparsity, or n and m")
    for name, value in (("n", n), ("m", m)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: an int, not {value!r}; n and m go together")
    if scope is not None:
        raise ValueError(f"scope: {scope!r}; with n and m it is the m neighbours: None")
    return PRUNE_SCOPES["group"], n, m


def prune_groups(
    shape: Sequence[int], count: int, sparsity: float, n: int, m: int, scope: int
) -> tuple[int, int]:
    """(elements among which one selects, how many of them go) from the shape of the weight."""
    columns = shape[-1] if len(shape) else 1
    if scope == PRUNE_SCOPES["group"]:
        require(m >= 1, "m", m, "1 and above")
        require(0 <= n <= m, "n", n, f"0 to m, {m}")
        if columns % m:
            raise ValueError(f"m: {m}; rows of {columns} elements are no multiple of it")
        return m, m - n
    require(scope in (0, 1), "scope", scope, "0 to 2")
    require(0.0 <= sparsity <= 1.0, "sparsity", sparsity, "0 to 1")
    group = count if scope == PRUNE_SCOPES["tensor"] else columns
    return group, min(floor(sparsity * group + 1e-9), group)


def check_activation_norm(shape: Sequence[int], norm: Sequence[int]) -> None:
    """Of weight (…, in) and ‖x‖₂ (in,)."""
    columns = shape[-1] if len(shape) else 1
    if tuple(norm) != (columns,):
        raise ValueError(f"activation_norm: shape {tuple(norm)}; allowed: ({columns},)")
