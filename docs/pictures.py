"""Draw the data flow of every family: docs/pictures/<stem>.svg.

    python docs/pictures.py [STEM …]

A picture is data: boxes at their centres, in points, and arrows between them. How they are drawn is the same
for all.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.textpath import TextPath

FOLDER = Path(__file__).parent / "pictures"
GREY, BLUE = "#7a7a7a", "#3b82f6"  # the contrast is the same on white and on GitHub's dark page
SIZE, LINE = 8.0, 11.0
STYLE = {
    "font.size": SIZE,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": GREY,
    "svg.fonttype": "none",
    "svg.hashsalt": "finefuse",
}


class Box(NamedTuple):
    x: float
    y: float
    text: str
    kind: str = "tensor"  # in memory; "pass": one fused pass; "never": never built

    @property
    def half(self) -> tuple[float, float]:
        lines = self.text.splitlines()
        wide = [TextPath((0, 0), line, size=SIZE).get_extents().width for line in lines]
        return max(wide, default=2) / 2 + 7, LINE * len(lines) / 2 + 4


class Arrow(NamedTuple):
    start: str
    end: str
    text: str = ""
    bend: str = "straight"  # "across": first horizontal, then vertical; "down": the other way round
    side: str = ""  # of the text: "above", "below", "left", "right"


class Picture(NamedTuple):
    width: float
    height: float
    boxes: dict[str, Box]
    arrows: list[Arrow]


def fused(x: float, y: float, text: str) -> Box:
    return Box(x, y, text, "pass")


def never(x: float, y: float, text: str) -> Box:
    return Box(x, y, text, "never")


PICTURES = {
    "codebook": Picture(
        520, 190,
        {
            "w": Box(55, 34, "weight, float32\n4 B an element"),
            "quantize": fused(192, 34, "quantize: absmax,\nthen the nearest entry"),
            "codes": Box(352, 34, "codes, 4 bits: 0.5 B an element\nabsmax, 4 B a block of 64"),
            "few": fused(352, 96, "up to 16 tokens: decoded\nin registers, multiplied"),
            "many": fused(352, 150, "more: decoded 4 MB at a time,\nthen a library's product"),
            "x": Box(192, 123, "x\n(tokens, in)"),
            "y": Box(477, 123, "y\n(tokens, out)"),
            "decoded": never(70, 123, "decoded weight, in\nthe forward"),
        },
        [
            Arrow("w", "quantize"), Arrow("quantize", "codes"),
            Arrow("codes", "few", "read once for all tokens"),
            Arrow("x", "few", bend="down"), Arrow("x", "many", bend="down"),
            Arrow("few", "y", bend="across"), Arrow("many", "y", bend="across"),
        ],
    ),
    "lora": Picture(
        520, 176,
        {
            "x": Box(45, 70, "x\n(tokens, in)"),
            "base": fused(270, 30, "base product with W (out, in),\nfrozen, dense or packed"),
            "shrink": fused(168, 110, "D(x) Aᵀ: dropout\nand product at once"),
            "h": Box(282, 110, "h\n(tokens, r)"),
            "expand": fused(382, 110, "+ s·h Bᵀ,\nonto y"),
            "y": Box(477, 70, "y\n(tokens, out)"),
            "ba": never(232, 156, "BA (out, in)"),
            "mask": never(360, 156, "dropout mask (tokens, in)"),
        },
        [
            Arrow("x", "base", bend="down"), Arrow("x", "shrink", "read once", "down"),
            Arrow("shrink", "h"), Arrow("h", "expand"),
            Arrow("base", "y", bend="across"), Arrow("expand", "y", bend="across"),
        ],
    ),
    "dora": Picture(
        520, 190,
        {
            "w": Box(62, 34, "W (out, in)\nA (r, in), B (out, r)"),
            "norm": fused(236, 34, "norms: rows of W + s·BA, made\nand squared tile by tile"),
            "c": Box(420, 34, "c = m / norm\n(out,)"),
            "x": Box(62, 110, "x\n(tokens, in)"),
            "plain": fused(182, 110, "as plain LoRA:\none base product"),
            "z": Box(300, 110, "z (tokens, out),\nkept where m trains"),
            "scale": fused(420, 110, "c·z + bias"),
            "y": Box(420, 168, "y (tokens, out)"),
            "ba": never(190, 168, "BA (out, in)"),
            "sum": never(310, 168, "W + s·BA (out, in)"),
        },
        [
            Arrow("w", "norm"), Arrow("norm", "c"), Arrow("c", "scale"), Arrow("x", "plain"),
            Arrow("plain", "z"), Arrow("z", "scale"), Arrow("scale", "y"),
        ],
    ),
    "segmented": Picture(
        520, 186,
        {
            "x": Box(50, 68, "x (rows, in),\nwhere it lies"),
            "base": fused(270, 30, "one base product for all rows"),
            "h": fused(205, 102, "16 rows of an adapter a:\nh_t = D(x_t) A_aᵀ"),
            "add": fused(365, 102, "+ s_a·h_t B_aᵀ,\nonto their rows of y"),
            "y": Box(473, 68, "y (rows, out)"),
            "ids": Box(50, 160, "adapter (rows,)"),
            "sort": fused(139, 160, "counting sort"),
            "order": Box(235, 160, "order (rows,)"),
            "sorted": never(450, 160, "x sorted, or padded"),
        },
        [
            Arrow("x", "base", bend="down"), Arrow("base", "y", bend="across"),
            Arrow("x", "h", bend="down"), Arrow("h", "add"), Arrow("add", "y", bend="across"),
            Arrow("ids", "sort"), Arrow("sort", "order"), Arrow("order", "h", "gathered by"),
            Arrow("order", "add", bend="across"),
        ],
    ),
    "logprobs": Picture(
        520, 176,
        {
            "logits": Box(62, 76, "logits (rows, V)\nbfloat16"),
            "forward": fused(228, 34, "row statistics"),
            "saved": Box(228, 76, "16 B a row"),
            "backward": fused(228, 118, "row gradient"),
            "lp": Box(425, 34, "lp, entropy, lse\n(rows,)"),
            "dz": Box(425, 118, "dz (rows, V): fresh,\nor over the logits"),
            "p": never(225, 158, "softmax (rows, V)"),
            "lsm": never(360, 158, "log-softmax (rows, V)"),
        },
        [
            Arrow("logits", "forward", "reads 2 B a logit", "down"), Arrow("forward", "lp"),
            Arrow("forward", "saved"), Arrow("saved", "backward"),
            Arrow("logits", "backward", "reads 2 B a logit", "down", "below"),
            Arrow("backward", "dz", "writes 2 B a logit", side="below"),
        ],
    ),
    "preference": Picture(
        520, 206,
        {
            "logits": Box(66, 90, "logits\n(2·pairs, T, V)\nbfloat16"),
            "forward": fused(228, 34, "row statistics,\nsums of sequences"),
            "s": Box(368, 34, "lp (2·pairs,)"),
            "pair": fused(368, 90, "pair loss with\nits derivative"),
            "ref": Box(240, 90, "ref (2·pairs,)"),
            "out": Box(468, 90, "loss, rewards,\nmargins, accuracy"),
            "d": Box(368, 148, "d loss / d lp\n(2·pairs,)"),
            "backward": fused(228, 148, "row gradient"),
            "dz": Box(228, 190, "dz: fresh, or over the logits"),
            "p": never(420, 190, "softmax, log-softmax (2·pairs, T, V)"),
        },
        [
            Arrow("logits", "forward", "reads 2 B a logit", "down"), Arrow("forward", "s"),
            Arrow("s", "pair"), Arrow("ref", "pair"), Arrow("pair", "out"), Arrow("pair", "d"),
            Arrow("d", "backward"), Arrow("logits", "backward", "reads 2 B a logit", "down"),
            Arrow("backward", "dz", "writes 2 B a logit"),
        ],
    ),
    "policy": Picture(
        520, 176,
        {
            "logits": Box(62, 48, "logits (B, T, V)\nbfloat16"),
            "old": Box(62, 104, "old, ref, advantages,\nmask"),
            "pass": fused(
                245, 76, "a row: statistics, lp, entropy;\nits coefficient from the table;\n"
                "its gradient, while the\nrow is in the cache",
            ),
            "out": Box(440, 48, "loss, clip fractions,\nKL, entropy"),
            "dz": Box(440, 104, "dz: fresh, or\nover the logits"),
            "p": never(165, 156, "softmax (B, T, V)"),
            "lsm": never(315, 156, "log-softmax (B, T, V)"),
        },
        [
            Arrow("logits", "pass", "reads 2 B", side="above"), Arrow("old", "pass"),
            Arrow("pass", "out"), Arrow("pass", "dz", "writes 2 B a logit", side="below"),
        ],
    ),
    "distill": Picture(
        520, 176,
        {
            "student": Box(62, 48, "student (rows, V)\nbfloat16"),
            "teacher": Box(62, 104, "teacher (rows, V)\nbfloat16"),
            "pass": fused(
                250, 76, "a row of both: log-sum-exps\nand D; its gradient, while\nthe rows are in the cache",
            ),
            "loss": Box(440, 58, "loss"),
            "dz": Box(440, 104, "d student: fresh, or\nover the student"),
            "p": never(165, 156, "softmaxes (rows, V)"),
            "m": never(315, 156, "log m (rows, V)"),
        },
        [
            Arrow("student", "pass", "reads 2 B"), Arrow("teacher", "pass", "reads 2 B", side="below"),
            Arrow("pass", "loss"), Arrow("pass", "dz", "writes 2 B", side="below"),
        ],
    ),
    "linear": Picture(
        520, 206,
        {
            "hidden": Box(62, 34, "hidden (rows, H)\na chunk: m rows"),
            "product": fused(190, 34, "z = x Wᵀ + b"),
            "z": Box(318, 34, "one chunk of logits\n(m, V), reused"),
            "row": fused(318, 96, "the row kernel of\nthe loss: z becomes dz"),
            "loss": Box(465, 96, "loss"),
            "dx": fused(150, 96, "dx = dz W"),
            "dw": fused(318, 158, "dW += dzᵀ x"),
            "dhidden": Box(62, 150, "d hidden\n(rows, H)"),
            "dweight": Box(458, 158, "dW (V, H),\nif it trains"),
            "logits": never(185, 178, "logits (rows, V)"),
        },
        [
            Arrow("hidden", "product"), Arrow("product", "z"), Arrow("z", "row", "in place"),
            Arrow("row", "loss"), Arrow("row", "dx"), Arrow("row", "dw"),
            Arrow("dx", "dhidden", bend="across"), Arrow("dw", "dweight"),
        ],
    ),
    "prune": Picture(
        520, 180,
        {
            "w": Box(58, 92, "weight (out, in)\nfloat32"),
            "sample": fused(220, 30, "a sample: two scores\nthat the cut is between"),
            "pass": fused(220, 92, "one pass: above kept, below\ngone, between put aside"),
            "mask": Box(440, 92, "mask (out, in)"),
            "between": Box(220, 154, "between: about 1%"),
            "cut": fused(345, 154, "the cut, exactly"),
            "scores": never(440, 30, "scores, sorted or not"),
        },
        [
            Arrow("w", "sample", bend="down"), Arrow("sample", "pass"), Arrow("w", "pass", "4 B"),
            Arrow("pass", "mask", "writes 1 B an element"), Arrow("pass", "between"),
            Arrow("between", "cut"), Arrow("cut", "mask", "put right", "across", "below"),
        ],
    ),
    "bandit": Picture(
        520, 176,
        {
            "u": fused(62, 42, "u: Philox of\n(seed; agent, step)"),
            "logits": Box(62, 98, "logits of the agents,\none in each lane"),
            "act": fused(
                235, 70, "p = softmax(logits)\naction ~ p, by one u\nr: whether the other u is\n"
                "below probs[action]",
            ),
            "learn": fused(235, 148, "logits += lr·(onehot - p)·(r' - b)"),
            "out": Box(430, 70, "rewards, adjusted, cumulative:\n24 B an agent and step"),
            "random": never(430, 148, "random numbers (agents, steps, 2)"),
        },
        [
            Arrow("u", "act"), Arrow("logits", "act"), Arrow("act", "out"), Arrow("act", "learn"),
            Arrow("learn", "logits", "the next step", "across"),
        ],
    ),
}  # fmt: skip


def ends(a: Box, b: Box, bend: str) -> list[tuple[float, float]]:
    """The corners of an arrow's line from a's edge to b's."""
    (aw, ah), (bw, bh) = a.half, b.half
    right, down = (1 if b.x > a.x else -1), (1 if b.y > a.y else -1)
    if bend == "across":
        return [(a.x + right * aw, a.y), (b.x, a.y), (b.x, b.y - down * bh)]
    if bend == "down":
        return [(a.x, a.y + down * ah), (a.x, b.y), (b.x - right * bw, b.y)]
    left, end = max(a.x - aw, b.x - bw), min(a.x + aw, b.x + bw)
    top, bottom = max(a.y - ah, b.y - bh), min(a.y + ah, b.y + bh)
    if (left < end) == (top < bottom):
        raise ValueError(f"no straight line between {a} and {b}")
    if top < bottom:  # side by side: in the middle of what both span
        y = (top + bottom) / 2
        return [(a.x + right * aw, y), (b.x - right * bw, y)]
    x = (left + end) / 2
    return [(x, a.y + down * ah), (x, b.y - down * bh)]


def draw_box(ax: Axes, box: Box) -> None:
    w, h = box.half
    edge = BLUE if box.kind == "pass" else GREY
    style = f"round,pad=0,rounding_size={min(9, h)}" if box.kind == "pass" else "square,pad=0"
    ax.add_patch(
        FancyBboxPatch(
            (box.x - w, box.y - h), 2 * w, 2 * h, boxstyle=style, edgecolor=edge, linewidth=1,
            facecolor=(*matplotlib.colors.to_rgb(edge), 0.08) if box.kind == "pass" else "none",
            linestyle=(0, (3, 2)) if box.kind == "never" else "solid", clip_on=False,
        )
    )  # fmt: skip
    lines = box.text.splitlines()
    for i, line in enumerate(lines):
        y = box.y + (i - (len(lines) - 1) / 2) * LINE
        ax.text(box.x, y, line, ha="center", va="center_baseline", clip_on=False)


def draw_arrow(ax: Axes, picture: Picture, arrow: Arrow) -> None:
    points = ends(picture.boxes[arrow.start], picture.boxes[arrow.end], arrow.bend)
    if len(points) == 3:
        ax.plot(*zip(*points[:2], strict=True), color=GREY, linewidth=1, clip_on=False)
    ax.add_patch(
        FancyArrowPatch(
            *points[-2:], arrowstyle="-|>,head_length=3,head_width=2", color=GREY, linewidth=1,
            shrinkA=0, shrinkB=0, mutation_scale=1.4, clip_on=False,
        )
    )  # fmt: skip
    if arrow.text:
        (x0, y0), (x1, y1) = points[-2:] if arrow.bend == "down" else points[:2]
        x, y, side = (x0 + x1) / 2, (y0 + y1) / 2, arrow.side
        side = side or ("above" if y0 == y1 else "right")
        dx, dy = {"above": (0, -7), "below": (0, 7), "left": (-5, 0), "right": (5, 0)}[side]
        align = {"left": "right", "right": "left"}.get(side, "center")
        ax.text(x + dx, y + dy, arrow.text, ha=align, va="center_baseline", clip_on=False)


def draw(stem: str) -> None:
    picture = PICTURES[stem]
    legend = {
        "in memory": Box(0, 0, ""), "one pass": fused(0, 0, ""), "never built": never(0, 0, ""),
    }  # fmt: skip
    with matplotlib.rc_context(STYLE):
        height = picture.height + 26
        figure = Figure((picture.width / 72, height / 72))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, picture.width), ylim=(height, 0))
        ax.axis("off")
        for arrow in picture.arrows:
            draw_arrow(ax, picture, arrow)
        for box in picture.boxes.values():
            draw_box(ax, box)
        for i, (text, box) in enumerate(legend.items()):
            draw_box(ax, box._replace(x=18 + 90 * i, y=picture.height + 14))
            ax.text(32 + 90 * i, picture.height + 14, text, va="center_baseline")
        FOLDER.mkdir(exist_ok=True)
        metadata = {"Date": None, "Creator": None, "Title": f"The data flow of {stem}"}
        figure.savefig(FOLDER / f"{stem}.svg", transparent=True, metadata=metadata)


if __name__ == "__main__":
    for stem in sys.argv[1:] or PICTURES:
        draw(stem)
