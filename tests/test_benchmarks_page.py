"""The page of a benchmark's result, and the comparison of two results; on made-up figures."""

import copy
import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
for package in ("rich", "jinja2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not here: the benchmarks'", allow_module_level=True)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import candidates, compare, page

NASTY = '<script>alert("x")</script> & 2:4'
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def row(family, case, name, ms, **more):
    """As Row.as_dict gives it, with eight times that scatter by 2 %."""
    scatter = (0.96, 0.98, 0.99, 1.0, 1.0, 1.01, 1.02, 1.04)
    found = {
        "family": family, "case": case, "name": name, "ms": ms, "spread": 0.02, "moved_mb": 131.1,
        "gb_s": 12.0, "of_limit": 0.6, "extra_mb": 10.0, "error": 1e-7,
        "times_ms": [float(f"{ms * s:.4g}") for s in scatter],
    }  # fmt: skip
    return {**found, **more}


def result():
    products = {"of_bare": 1.25, "resident_mb": 40.0, "accumulator_mb": None, "error_weight": 2e-7}
    products |= {"moved_mb": None, "gb_s": None, "of_limit": None}

    def tables(factor):
        return [
            [
                row("preference", "DPO", "finefuse", 10.0 * factor),
                row("preference", "DPO", "finefuse in place", 8.0 * factor),
                row("preference", "DPO", "TRL", 40.0 * factor, extra_mb=524.3),
                row("preference", "DPO", "eager", 30.0 * factor, extra_mb=262.1, error=None),
            ],
            [
                row("prune", NASTY, "finefuse", 30.0 * factor),
                row("prune", NASTY, "torch.topk", 20.0 * factor),
            ],
            [
                row("linear", "cross-entropy", "finefuse", 100.0 * factor, **products),
                row("linear", "cross-entropy", "eager", 120.0 * factor, **products),
                row("linear", "cross-entropy", "the bare products", 80.0 * factor, **products),
            ],
            [
                row("logprobs", "a call", "x + x", 0.003),
                row("logprobs", "a call", "token_logprobs", 0.02),
            ],
        ]

    limits = {"bandwidth": {"copy": 20.0}, "products": {"float32": 130.0}}
    return {
        "title": "cpu", "size": "standard", "machine": "Two <CPUs> & more", "date": "2026-01-31",
        "versions": {"torch": "9.8.7"}, "missing": ["liger-kernel"], "commit": "abc1234", "seconds": 600.0,
        "runs": {
            "default": {"limits": limits, "tables": tables(1.0)},
            "huge": {"limits": limits, "tables": tables(0.5)},
        },
    }  # fmt: skip


class Page(HTMLParser):
    """Text, ids, and rows of tables as lists of (text, value)."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.rows, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.addresses += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append(["", attrs.get("data-value")])
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data.strip())
            if "tr" in self.open and data.strip():
                cell = self.rows[-1][-1]
                cell[0] = f"{cell[0]} {data.strip()}".strip()


@pytest.fixture(scope="module")
def shown():
    text = page.html(result())
    found = Page(text)
    assert not found.open
    return text, found


def summary_rows(found, case):
    width = len(page.SUMMARY)
    return [
        [c[0] for c in cells] for cells in found.rows if len(cells) == width and cells[0][0] == case
    ]


def test_page_holds_what_the_result_says(shown):
    text, found = shown
    words = " ".join(found.words)
    for part in (
        "Two <CPUs> & more",
        "torch 9.8.7",
        "liger-kernel",
        "2026-01-31",
        "abc1234",
        "10.0 minutes",
    ):
        assert part in words, part
    assert "make bench" in words
    assert "copy 20.0" in words
    for run in ("default", "huge"):
        assert f'data-run="{run}"' in text
        assert f'data-show="{run}"' in text
    for name in ("TRL", "torch.topk", "x + x", "the bare products"):
        assert sum(cells[0][0] == name for cells in found.rows) == 2, (
            name
        )  # once for each allocator


def test_page_is_escaped_and_loads_nothing(shown):
    text, found = shown
    assert text.lstrip().startswith("<!doctype html>")
    assert NASTY not in text
    assert "&lt;script&gt;" in text
    assert text.count("<script") == 1
    assert found.addresses
    assert all(address.startswith("#") for address in found.addresses)
    assert {address[1:] for address in found.addresses} <= set(found.ids)
    assert not re.search(r"https?:|@import|url\(", text)


def test_summary_shows_the_fastest_peer_and_our_losses(shown):
    _, found = shown
    dpo = [
        "DPO",
        "3.00",
        "10.00",
        "eager",
        "30.00",
        "60%",
        "10.0",
        "262.1",
        "1.0e-07",
        "",
        "preference",
    ]
    half = [*dpo[:2], "5.00", "eager", "15.00", *dpo[5:]]
    assert summary_rows(found, "DPO") == [dpo, half]
    loss = summary_rows(found, NASTY)
    assert [cells[1] for cells in loss] == ["0.67 slower"] * 2
    # of the limit: of the bare product, which is no peer
    assert [c[3:6] for c in summary_rows(found, "cross-entropy")] == [
        ["eager", "120.00", "80%"], ["eager", "60.00", "80%"],
    ]  # fmt: skip
    assert summary_rows(found, "a call") == []  # begins with no row of ours
    assert " ".join(" ".join(found.words).split()).count("faster in 2, slower in 1.") == 2


def test_cells_sort_by_what_was_measured(shown):
    _, found = shown
    line = next(cells for cells in found.rows if cells[0][0] == "TRL")
    assert [value for _, value in line] == [
        "TRL", "40.0", "0.02", "40.0", "131.1", "12.0", "0.6", "524.3", "1e-07",
    ]  # fmt: skip


def test_plot_places_dots_on_a_logarithmic_axis():
    ticks, place = page.axis([0.25, 1.0, 4.0])
    assert place(0.25) + place(4.0) == pytest.approx(2 * place(1.0)) == 100
    assert ("1", 50) in ticks
    assert 3 <= len(ticks) <= 7
    ticks, place = page.axis([0.9, 300.0])
    assert [text for text, _ in ticks] == ["1", "10", "100"]
    assert all(0 < place(ratio) < 100 for ratio in (0.5, 300.0))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_page_of_every_stored_result(path):
    old = json.loads(path.read_text())
    text = page.html(old)
    assert not Page(text).open
    assert len(text) < 2e6
    names = {r["name"] for part in old["runs"].values() for rows in part["tables"] for r in rows}
    assert all(name in Page(text).words for name in names)


def test_page_of_a_gpu_is_one_run_of_all_families():
    a = result()
    rows = a["runs"]["default"]["tables"]
    limits = a["runs"]["default"]["limits"]
    a["title"] = "A GPU"
    a["runs"] = {t[0]["family"]: {"limits": limits, "tables": [t]} for t in rows}
    text = page.html(a)
    found = Page(text)
    assert "data-show=" not in text
    assert {"preference", "prune", "linear"} <= set(found.ids)
    assert len(summary_rows(found, "DPO")) == 1
    assert "make gpu" in " ".join(found.words)


def test_the_limit_of_packed_weights():
    ours = row("f", "c", "finefuse", 10.0, moved_mb=10.0)
    product = row("f", "c", "the bare product", 8.0, moved_mb=70.0)
    assert candidates.of_limit([ours]) == 0.6  # of the bandwidth
    # many rows: arithmetic bounds both; the fastest product counts
    slow = {**product, "ms": 9.0, "of_limit": 0.9}
    assert candidates.of_limit([ours, slow, {**product, "of_limit": 0.1}]) == 0.8
    # few rows: reading the weight bounds the product, and ours reads fewer bytes
    assert candidates.of_limit([ours, {**product, "ms": 30.0, "of_limit": 0.9}]) == 0.6
    # as many bytes: the product is the limit, whatever bounds it
    assert candidates.of_limit([{**ours, "moved_mb": 70.0}, {**product, "of_limit": 0.9}]) == 0.8


def test_peers_are_others_that_do_the_case():
    rows = [row("f", "c", n, ms) for n, ms in (
        ("finefuse", 5), ("TRL", 4), ("finefuse in place", 1), ("the bare product", 2), ("bare", 2),
        ("fill_ of the output", 1), ("eager", 3),
    )]  # fmt: skip
    assert [r["name"] for r in candidates.peers(rows)] == ["eager", "TRL"]
    assert candidates.peers(rows[1:]) == []
    assert candidates.of_limit(rows) == 2 / 5
    assert candidates.of_limit(rows[:2]) == 0.6


# -- compare


def run_compare(tmp_path, a, b, capsys):
    paths = []
    for name, content in (("a", a), ("b", b)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
    code = compare.main([str(path) for path in paths])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


def changed(name, change, case="DPO", run="default"):
    """The result with rows of that name changed."""
    found = result()
    for rows in found["runs"][run]["tables"]:
        for r in rows:
            if r["case"] == case and r["name"] == name:
                r.update(change(r))
    return found


def slower(factor):
    return lambda r: {"ms": factor * r["ms"], "times_ms": [factor * t for t in r["times_ms"]]}


@pytest.mark.parametrize(
    ("name", "change", "code", "says"),
    [
        ("finefuse", slower(1.0), 0, "0 changes for the worse, 0 for the better"),
        ("finefuse", slower(1.04), 0, "0 changes for the worse, 0 for the better"),
        ("finefuse", slower(1.3), 1, "0.333 to 0.433, +30%"),
        ("finefuse in place", slower(1.3), 1, "worse default preference DPO finefuse in place"),
        ("finefuse", slower(0.7), 0, "better default preference DPO finefuse time, to eager"),
        # a peer that is slower makes us look better; eager is the fastest in both
        ("eager", slower(1.2), 0, "0 changes for the worse, 2 for the better"),
        ("eager", slower(0.8), 1, "2 changes for the worse, 0 for the better"),
        ("TRL", slower(1.2), 0, "0 changes for the worse, 0 for the better"),
        ("TRL", slower(0.1), 0, "0 changes for the worse, 0 for the better"),
        ("finefuse", lambda r: {"error": 2.1e-7}, 1, "error: 1.0e-07 to 2.1e-07"),
        ("finefuse", lambda r: {"error": 1.9e-7}, 0, "0 changes for the worse, 0 for the better"),
        ("finefuse", lambda r: {"error": 1e-8}, 0, "0 changes for the worse, 1 for the better"),
        ("finefuse", lambda r: {"extra_mb": 11.2}, 1, "extra memory: 10.0 to 11.2 MB"),
        ("finefuse", lambda r: {"extra_mb": 11.0}, 0, "0 changes for the worse, 0 for the better"),
        ("TRL", lambda r: {"extra_mb": 9999.0, "error": 1.0}, 0, "0 changes for the worse, 0 for the better"),
    ],
)  # fmt: skip
def test_verdicts(tmp_path, capsys, name, change, code, says):
    found, out, err = run_compare(tmp_path, result(), changed(name, change), capsys)
    assert (found, err) == (code, "")
    assert says in out


def test_a_machine_that_is_slower_throughout_changes_nothing(tmp_path, capsys):
    b = result()
    b["machine"] = "another"
    for part in b["runs"].values():
        for rows in part["tables"]:
            for r in rows:
                r.update(slower(3.0)(r))
    code, out, _ = run_compare(tmp_path, result(), b, capsys)
    assert code == 0
    assert "0 changes for the worse, 0 for the better" in out
    assert "Other machine" in out
    assert "another" in out


def test_noise_grows_with_the_scatter_and_shrinks_with_the_rounds(tmp_path, capsys):
    a, b = result(), changed("finefuse", slower(1.3))
    for one in (a, b):
        for r in one["runs"]["default"]["tables"][0]:
            r["times_ms"] = [r["ms"] * s for s in (0.6, 0.8, 1.0, 1.2, 1.4)]
    assert run_compare(tmp_path, a, b, capsys)[0] == 0
    for one in (a, b):
        for r in one["runs"]["default"]["tables"][0]:
            r["times_ms"] *= 60
    assert run_compare(tmp_path, a, b, capsys)[0] == 1


def many(factors):
    """A result of as many cases, in which our times are multiplied."""
    found = result()
    found["runs"] = {"default": {**found["runs"]["default"], "tables": [
        [row("f", f"case {i}", "finefuse", 10.0 * factor), row("f", f"case {i}", "eager", 30.0)]
        for i, factor in enumerate(factors)
    ]}}  # fmt: skip
    return found


def test_one_case_is_judged_by_the_scatter_of_all(tmp_path, capsys):
    before, step = many([1.0] * 9), (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
    code, out, _ = run_compare(tmp_path, before, many([*step, 1.3]), capsys)
    assert code == 0
    # the middle one of the distances from 1 is that of 0.9, and 0.9 ** -1.4826 = 1.169
    assert "scatter by 17%" in out
    assert run_compare(tmp_path, before, many([*step, 2.0]), capsys)[0] == 1
    assert run_compare(tmp_path, before, many([1.0] * 8 + [1.3]), capsys)[0] == 1
    # all of them slower is no scatter
    assert "9 changes for the worse" in run_compare(tmp_path, before, many([1.3] * 9), capsys)[1]


def test_files_without_times_are_judged_by_their_spread(tmp_path, capsys):
    def old(found, spread):
        for part in found["runs"].values():
            for rows in part["tables"]:
                for r in rows:
                    del r["times_ms"]
                    r["spread"] = spread
        return {key: found[key] for key in ("title", "machine", "runs")}

    a, b = result(), changed("finefuse", slower(1.3))
    assert run_compare(tmp_path, *(old(copy.deepcopy(x), 0.02) for x in (a, b)), capsys)[0] == 1
    assert run_compare(tmp_path, *(old(copy.deepcopy(x), 0.2) for x in (a, b)), capsys)[0] == 0


def test_what_only_one_has_is_listed(tmp_path, capsys):
    b = result()
    tables = b["runs"]["default"]["tables"]
    tables[0] = [
        r for r in tables[0] if r["name"] != "eager"
    ]  # the fastest peer is gone: TRL it is
    del tables[1]
    b["runs"]["huge"]["tables"][0].append(row("preference", "DPO", "Liger", 25.0))
    code, out, _ = run_compare(tmp_path, result(), b, capsys)
    assert code == 0
    assert "only in A: default, preference, DPO: eager" in out
    assert f"only in A: default, prune, {NASTY}: all 2 rows" in out
    assert "only in B: huge, preference, DPO: Liger" in out
    assert "7 cases in both" in out


BAD = {
    "not JSON": "{",
    "a list": "[]",
    "no runs": '{"title": "cpu", "machine": "m"}',
    "no rows": '{"title": "cpu", "machine": "m", "runs": {"default": {"tables": [[]]}}}',
    "no ms": '{"title": "cpu", "machine": "m", "runs": {"huge": {"tables": [[{"case": "c", "name": "n"}]]}}}',
    "nothing in common": '{"title": "cpu", "machine": "m", "runs": {}}',
    "ms is 0": json.dumps(changed("finefuse", lambda r: {"ms": 0.0})),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_files(tmp_path, capsys, bad):
    code, out, err = run_compare(tmp_path, result(), BAD[bad], capsys)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "b.json" in err


def test_wrong_arguments(tmp_path, capsys):
    assert compare.main([str(tmp_path / "none.json")] * 2) == 2
    assert "No such file" in capsys.readouterr().err
    assert compare.main(["a.json"]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_command(tmp_path, monkeypatch, capsys):
    from benchmarks import __main__

    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(result()))
    b.write_text(json.dumps(changed("finefuse", slower(2.0))))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "compare", str(a), str(b)])
    assert __main__.main() == 1
    assert "worse" in capsys.readouterr().out
