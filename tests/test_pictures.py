"""The pictures of docs/: nothing overlaps, nothing is cut, and the files are what docs/pictures.py draws."""

from __future__ import annotations

import html
import importlib.util
import re
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

DOCS = Path(__file__).parent.parent / "docs"
_spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
assert _spec
assert _spec.loader
pictures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pictures)


@pytest.mark.parametrize("stem", pictures.PICTURES)
def test_boxes_are_apart_and_inside(stem):
    picture = pictures.PICTURES[stem]
    for key, box in picture.boxes.items():
        w, h = box.half
        assert w < box.x < picture.width - w, key
        assert h < box.y < picture.height - h, key
    for (a, one), (b, other) in combinations(picture.boxes.items(), 2):
        (w, h), (v, i) = one.half, other.half
        assert abs(one.x - other.x) > w + v or abs(one.y - other.y) > h + i, (a, b)


@pytest.mark.parametrize("stem", pictures.PICTURES)
def test_the_file_is_what_is_drawn(stem):
    """By its texts: another matplotlib may draw the same in other words."""
    picture = pictures.PICTURES[stem]
    drawn = [line for box in picture.boxes.values() for line in box.text.splitlines()]
    drawn += [arrow.text for arrow in picture.arrows if arrow.text]
    drawn += ["in memory", "one pass", "never built"]
    svg = (DOCS / f"pictures/{stem}.svg").read_text()
    found = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    assert sorted(found) == sorted(drawn)
    assert len(svg) < 15_000
