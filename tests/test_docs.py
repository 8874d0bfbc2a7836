"""The documentation: every Python example of README.md and docs/ runs and prints what it says it prints, and
every link leads somewhere.

A page's examples run in order in one namespace, those that call `finefuse.numpy` (`ffn`) in another, so
that these also run where torch is not installed. The tool for this, sybil, was considered and left: two
namespaces a page and examples that skip without torch would take as many lines of it.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import warnings
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import finefuse
import numpy as np
import pytest

try:
    import torch
except ImportError:
    torch = None

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
# ```pycon or ```Python would not be run, and nobody would know.
LANGUAGES = {"", "sh", "text", "python", "math", "{eval-rst}", "{toctree}"}
TOLERANCE = 2  # units of the last digit that is shown: other versions have other random numbers


class Example(NamedTuple):
    line: int
    source: str
    printed: str | None  # the block that follows at once
    prints: bool  # that block is of language text: it is what is printed, and no diagram


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def examples(page: Path, numpy: bool) -> list[Example]:
    """Those for `finefuse.numpy`, or those for torch."""
    text, found = page.read_text(), []
    blocks = [*FENCE.finditer(text), None]
    for block, after in pairwise(blocks):
        if block[1] == "python" and numpy == bool(re.search(r"\bffn\b", block[2])):
            follows = (
                after and after[1] in ("", "text") and not text[block.end() : after.start()].strip()
            )
            line = text[: block.start()].count("\n") + 1
            printed, prints = (after[2], after[1] == "text") if follows else (None, False)
            found.append(Example(line, block[2], printed, prints))
    return found


# ---- what the examples of a page take as given --------------------------------------------------


def given(stem: str) -> dict[str, Any]:
    """As arrays: what a reader of this family's page has already. 8 answers of 6 tokens of 32."""
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    logits, tokens = floats(8, 6, 32), rng.integers(0, 32, (8, 6))
    mask, lp, chosen = rng.random((8, 6)) < 0.8, -np.abs(floats(8, 6)), -np.abs(floats(4))
    policy = {"actions": tokens, "old": lp, "mask": mask, "rewards": floats(8)}
    return {
        "logprobs": {"logits": logits, "targets": tokens, "mask": mask, "g": floats(8, 6)},
        "policy": {**policy, "logits": logits, "lp": lp, "ref": lp, "A": floats(8), "values": lp,
                   "old_values": lp, "token_rewards": floats(8, 6)},
        "preference": {"logits": logits, "targets": tokens, "ref": lp.sum(1), "chosen": chosen,
                       "rejected": chosen - 1, "ref_chosen": chosen, "ref_rejected": chosen,
                       "good": chosen, "bad": chosen[:3], "ref_good": chosen, "ref_bad": chosen[:3],
                       "kl": floats(4)},
        "distill": {"student_logits": logits, "teacher_logits": floats(8, 6, 32), "completion": mask,
                    "labels": tokens, "top_logprobs": np.log(np.full((8, 6, 4), 0.2, np.float32)),
                    "top_tokens": np.broadcast_to(np.arange(4), (8, 6, 4)).copy()},
        "linear": {"input_ids": rng.integers(0, 32, (8, 7)), "actions": tokens, "A": floats(8),
                   "old": lp, "ref": lp.sum(1), "teacher_hidden": floats(8, 6, 24),
                   "teacher_weight": floats(32, 24)},
    }.get(stem, {})  # fmt: skip


def as_tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    tensors = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
    for key in {"logits", "student_logits"} & tensors.keys():
        tensors[key].requires_grad_()
    if "teacher_weight" in tensors:  # what the page calls `model`: one of transformers' causal ones
        embedding, head = torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32, bias=False)

        def body(ids: Any) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=embedding(ids))

        tensors["model"] = SimpleNamespace(model=body, lm_head=head)
    return tensors


# ---- they run -----------------------------------------------------------------------------------


def run(page: Path, found: list[Example], scope: dict[str, Any]) -> dict[str, Any]:
    for line, source, printed, prints in found:
        for package in re.findall(r"^\s*(?:import|from) (\w+)", source, re.M):
            if find_spec(package) is None:
                pytest.skip(f"{package}, which line {line} imports, is not installed")
        out = io.StringIO()
        # empty lines first, so that a traceback names the page's own line
        code = compile("\n" * line + source, str(page), "exec")
        with contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="bitsandbytes")
            exec(code, scope)
        if printed is not None and (prints or out.getvalue()):
            assert_printed(out.getvalue(), printed)
    return scope


def assert_printed(got: str, want: str) -> None:
    number = re.compile(r"-?\d+\.\d+")
    assert number.sub("#", got).split() == number.sub("#", want).split()
    for a, b in zip(number.findall(got), number.findall(want), strict=True):
        unit = 10.0 ** -len(b.partition(".")[2])
        assert abs(float(a) - float(b)) <= (TOLERANCE + 1e-6) * unit, f"{a}, the page says {b}"


def with_examples(numpy: bool) -> list[Any]:
    return [pytest.param(p, id=name(p)) for p in PAGES if examples(p, numpy)]


@pytest.mark.parametrize("page", with_examples(numpy=False))
def test_examples(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a file
    if torch is None and page.stem != "bandit":  # a simulator of NumPy arrays
        pytest.skip("the examples are of the torch functions")
    arrays = given(page.stem)
    run(page, examples(page, False), as_tensors(arrays) if arrays else {})


@pytest.mark.parametrize("page", with_examples(numpy=True))
def test_numpy_examples(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = run(page, examples(page, True), given(page.stem))
    if page.name == "README.md":
        assert scope["gradient"].shape == scope["logits"].shape


def test_the_pages_have_examples():
    """All pages that call functions are among those above: the functions that look for them work."""
    torch_pages, numpy_pages = ({p.id for p in with_examples(numpy)} for numpy in (False, True))
    families = {f"docs/{p.stem}.md" for p in (ROOT / "csrc/ops").glob("*.cpp")}
    assert {"README.md", "docs/quickstart.md", "docs/linear.md", *families} <= torch_pages
    assert {"README.md", "docs/bitsandbytes.md", "docs/codebook.md", "docs/lora.md"} <= numpy_pages


@pytest.mark.parametrize("wrong", ["a 0.1019", "b 0.1016", "a 0.1016 0.1"])
def test_what_is_printed_counts(wrong):
    assert_printed("a 0.1018\n", "a 0.1016\n")
    with pytest.raises(AssertionError):
        assert_printed(wrong, "a 0.1016\n")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fences(page):
    text = page.read_text()
    assert {block[1] for block in FENCE.finditer(text)} <= LANGUAGES
    assert "```" not in FENCE.sub("", text), (
        "a fence that is not closed, or not at the line's beginning"
    )
    assert "$$" not in text, (
        "formulas in ```math: in $$ GitHub takes some of their characters for Markdown"
    )


# ---- links and names ----------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name)
def test_links(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def documented() -> list[str]:
    return re.findall(r"^\.\. auto\w+:: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M)


def public() -> set[str]:
    modules = {"finefuse": finefuse, "finefuse.nn": finefuse.nn, "finefuse.bandit": finefuse.bandit}
    names = {f"{module}.{n}" for module, m in modules.items() for n in m.__all__}
    return names - modules.keys()


@pytest.mark.skipif(torch is None, reason="the names are of the torch functions")
def test_every_public_name_is_documented():
    """Once on the page of all functions, and on one that a person wrote."""
    assert sorted(documented()) == sorted({*public(), "finefuse.numpy"})
    written = "\n".join(p.read_text() for p in PAGES if p.name != "api.md")
    # what calls return
    returned = {"PolicyOutput", "PreferenceOutput", "AgentRuns", "ModuleToSave"}
    for short in {full.rpartition(".")[2] for full in public()} - returned:
        assert re.search(rf"\b{short}\b", written), f"{short} is on no page"


def formulas(function: Any) -> list[str]:
    """The indented lines of a docstring, above its arguments."""
    text = (inspect.getdoc(function) or "").partition("\nArgs:")[0]
    return [line for line in text.splitlines() if line.startswith("    ")]


# Functions whose gradients the two doors return in different ways.
OWN_FORMULAS = {"codebook_linear", "cross_entropy", "token_logprobs"}


@pytest.mark.skipif(torch is None, reason="half of what is compared are the torch functions")
def test_both_doors_have_the_same_formulas():
    doors = [
        {name: f for name, f in vars(door).items() if inspect.isfunction(f) and name[0] != "_"}
        for door in (finefuse, finefuse.numpy)
    ]
    both = doors[0].keys() & doors[1].keys()
    assert len(both) >= 20
    assert both >= OWN_FORMULAS
    assert sum(len(formulas(doors[0][name])) for name in both) >= 50
    different = {name for name in both if formulas(doors[0][name]) != formulas(doors[1][name])}
    assert different == OWN_FORMULAS
