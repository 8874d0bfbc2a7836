"""The benchmarks' sizes, what is written of a result, and the README's figures. Nothing is timed here."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import __main__ as command
from benchmarks import measure, report
from benchmarks.__main__ import FAMILIES, RESULTS

ROOT = RESULTS.parents[1]


def row(name: str, ms: float, family: str = "bandit", case: str = "a case") -> dict[str, Any]:
    return {
        "family": family, "case": case, "name": name, "ms": ms, "times_ms": [ms] * 4, "spread": 0.01,
        "moved_mb": 8.0, "gb_s": 4.0, "of_limit": 0.5, "extra_mb": 2.0, "error": 1e-7,
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    """Ours twice as fast in one family (three times with huge pages), half as fast in the other; no peer in
    a third."""

    def part(fast: float) -> dict[str, Any]:
        limits = {"bandwidth": {"copy": 8.0}, "products": {"float32": 100.0}}
        tables = [
            [row("finefuse", 2.0), row("eager", 9.0), row("torch.compile", fast), row("x + x", 0.1)],
            [row("finefuse", 1.0, case="a second case"), row("eager", 77.0, case="a second case")],
            [row("finefuse", 4.0, "lora", "a loss"), row("the bare product", 1.0, "lora", "a loss"),
             row("PEFT", 2.0, "lora", "a loss")],
            [row("finefuse", 4.0, "dora", "alone")],
        ]  # fmt: skip
        return {"limits": limits, "tables": tables}

    return {
        "title": "cpu", "size": "standard", "machine": "a machine", "versions": {"torch": "2"},
        "missing": ["trl"], "date": "2026-01-02", "commit": None, "seconds": 1.0,
        "runs": {"default": part(4.0), "huge": part(6.0)},
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_sizes(family: str) -> None:
    run = importlib.import_module(f"benchmarks.bench_{family}").run
    assert list(inspect.signature(run).parameters) == ["device", "size"]
    assert inspect.signature(run).parameters["size"].annotation == "Size"
    assert "standard" in inspect.getsource(run)


def test_rows_keep_their_times() -> None:
    made = measure.Row("a case", "finefuse", [0.00123456, 0.002, 0.003], moved=10**6).as_dict(
        "bandit", 10.0
    )
    assert made["family"] == "bandit"
    assert made["times_ms"] == [1.235, 2.0, 3.0]
    assert made["ms"] == 2.0


def rounds_of(monkeypatch: pytest.MonkeyPatch, most: float, budget: float) -> int:
    """How many rounds are run of at most nine, a second each by a clock that is not real."""
    clock = iter(range(1000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(measure, "most_seconds", most)
    made = measure.Row("a case", "finefuse")
    measure.interleaved(
        [made], [lambda: None], lambda call: 0.0, 9, budget, lambda: None, twice=False
    )
    return len(made.times)


def test_the_budget_of_the_standard_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounds_of(monkeypatch, math.inf, 20.0) == 9
    assert rounds_of(monkeypatch, 0.5, 20.0) == 4  # never fewer
    assert rounds_of(monkeypatch, math.inf, 0.5) == 4


def test_readme_block(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_readme(result, path)
    once = path.read_text()
    assert once.startswith(f"before\n{report.BEGIN}\na machine; 2026-01-02")
    assert once.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in once
    lines = [line for line in once.splitlines() if line.startswith("| a ")]
    assert [line.split(" | ")[1:4] for line in lines] == [
        ["2", "torch.compile 2, eager 4.5", "torch.compile 3"],
        ["4", "PEFT 0.5", "PEFT 0.5"],  # a loss is shown, and a bare product is no peer
    ]
    assert "a second case" not in once
    report.write_readme(result, path)
    assert path.read_text() == once


def test_readme_without_markers(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"{report.BEGIN}\nand no end\n")
    with pytest.raises(ValueError, match="are not there"):
        report.write_readme(result, path)
    assert path.read_text() == f"{report.BEGIN}\nand no end\n"


def test_readme_is_what_was_measured() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    block = text.partition(report.BEGIN)[2].partition(report.END)[0]
    assert block.strip() == report.figures(json.loads((RESULTS / "cpu.json").read_text()))


def test_markdown_has_every_row(result: dict[str, Any]) -> None:
    text = report.markdown(result)
    for part in result["runs"].values():
        for rows in part["tables"]:
            for made in rows:
                assert f"| {made['name']} | " in text
    assert text.count("### a loss") == 2
    assert "a machine; 2026-01-02." in text


def test_plot_of_the_first_cases(result: dict[str, Any], tmp_path: Path) -> None:
    report.plot_first_cases(result, tmp_path / "cpu.svg")
    text = (tmp_path / "cpu.svg").read_text()
    assert "a loss" in text
    assert "a second case" not in text
    report.plot_first_cases(result, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def test_old_results_are_read(tmp_path: Path) -> None:
    old = json.loads((RESULTS / "bandit.json").read_text())
    for key in ("size", "versions", "missing", "date", "commit", "seconds"):
        old.pop(key, None)
    for part in old["runs"].values():
        for made in (r for rows in part["tables"] for r in rows):
            made.pop("family", None)
            made.pop("times_ms", None)
    report.write(old, tmp_path / "bandit")
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".svg"}


def test_a_gpu_has_a_page(result: dict[str, Any], tmp_path: Path) -> None:
    limits, tables = result["runs"]["default"].values()
    families = {rows[0]["family"]: [] for rows in tables}
    for rows in tables:
        families[rows[0]["family"]].append(rows)
    runs = {family: {"limits": limits, "tables": found} for family, found in families.items()}
    report.write({**result, "title": "A GPU 100", "runs": runs}, tmp_path / "a-gpu-100")
    assert {p.name for p in tmp_path.iterdir()} == {
        f"a-gpu-100.{kind}" for kind in ("json", "md", "svg", "html")
    }
    page = (tmp_path / "a-gpu-100.html").read_text()
    assert "<h1>finefuse benchmarks: A GPU 100</h1>" in page
    assert "make gpu" in page
    assert "data-show=" not in page  # nothing to choose: one run of each family


def test_versions_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PACKAGES", ("torch", "a-package-that-nobody-has"))
    found = command.origin(argparse.Namespace(device="cpu", size="quick"), 0.0)
    assert found["versions"].keys() == {"python", "torch"}
    assert found["missing"] == ["a-package-that-nobody-has"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--quick", "--full"], "not allowed with"),
        (["nothing"], "family 'nothing'; allowed: bandit"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert says in done.stderr
