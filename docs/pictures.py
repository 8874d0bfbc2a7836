"""python docs/pictures.py: the picture of each family's data flow, docs/pictures/<stem>.svg.

Left what is read, in the middle the pass that does it, right what is written; on the arrows bytes of an
element where they decide the time. Dashed: what plain torch builds and a fused pass does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).parent / "pictures"
GREY, BLUE, AMBER = "#7a7a7a", "#3b82f6", "#d97706"  # alike on white and on GitHub's dark page
STYLE = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": GREY,
    "svg.fonttype": "none",
    "svg.hashsalt": "finefuse",
}


class Flow(NamedTuple):
    reads: dict[str, str]  # a tensor to what its arrow says
    does: tuple[str, ...]  # lines of the pass
    writes: dict[str, str]
    never: str  # not built


FLOWS = {
    "codebook": Flow(
        {"codes (N, K / 2), 4 bits": "½ B", "absmax, one a block": "4 B / 64", "x (M, K)": "once"},
        ("a look-up in 16 values", "times absmax", "times x, summed"),
        {"y (M, N)": "once"},
        "W decoded (N, K)",
    ),
    "lora": Flow(
        {"x (M, K)": "", "W (N, K), dense or 4 bits": "", "A (r, K), B (N, r)": ""},
        ("y = x Wᵀ, by the library", "h = x Aᵀ", "y += s h Bᵀ, in place"),
        {"y (M, N)": "", "h (M, r), for the backward": ""},
        "s B A, and the update (M, N) apart",
    ),
    "dora": Flow(
        {"W (N, K)": "once", "A (r, K), B (N, r)": "", "magnitude (N,)": "", "y of LoRA (M, N)": ""},
        ("‖W + s B A‖ a row, in registers", "y ← magnitude / norm · y"),
        {"y (M, N), in place": "", "norm (N,)": ""},
        "W + s B A (N, K)",
    ),
    "segmented": Flow(
        {"x (M, K), rows sorted by adapter": "", "A, B of every adapter": "those used"},
        ("a segment of rows an adapter:", "h = x Aᵢᵀ", "y += s h Bᵢᵀ"),
        {"y (M, N)": ""},
        "x and y of each adapter, copied",
    ),
    "logprobs": Flow(
        {"logits (B, T, V)": "sizeof(T)", "targets (B, T)": ""},
        ("max and Σ exp of a row", "in one read, float32", "a row is a token"),
        {"log p of the targets (B, T)": "4 B a row", "d logits, may be the same memory": "sizeof(T)"},
        "log-softmax (B, T, V)",
    ),
    "preference": Flow(
        {"logits (B, T, V)": "read twice", "targets (B, T)": "", "reference (B,)": ""},
        ("log p of each sequence", "loss and slope of a pair", "gradient of every logit"),
        {"loss, margins, accuracy": "", "d logits, may be the same memory": "sizeof(T)"},
        "log-softmax, in forward and backward",
    ),
    "policy": Flow(
        {"logits (B, T, V)": "sizeof(T)", "actions, old log p, advantages": ""},
        ("statistics and entropy of a row", "surrogate and its slope", "the row's gradient, still in cache"),
        {"loss, clip fractions, KL, entropy": "", "d logits, may be the same memory": "sizeof(T)"},
        "log-softmax, p, p log p (B, T, V)",
    ),
    "distill": Flow(
        {"student's logits (N, V)": "sizeof(T)", "teacher's logits (N, V)": "sizeof(T)"},
        ("statistics of both rows", "divergence", "the gradient, rows still in cache"),
        {"loss": "", "d student, may be the same memory": "sizeof(T)"},
        "two log-softmaxes and the mixture",
    ),
    "linear": Flow(
        {"hidden (N, H)": "", "head W (V, H), b": "", "targets": ""},
        ("a chunk of rows at a time:", "logits, loss, d logits", "d hidden; dW is summed"),
        {"loss": "", "d hidden (N, H)": "", "dW (V, H)": ""},
        "logits (N, V)",
    ),
    "prune": Flow(
        {"W": "once a digit", "norm of the activations": ""},
        ("count scores by their digits,", "highest first: the threshold", "and how many of its equals go"),
        {"mask, a byte a weight": "1 B", "or W, zeros in place": ""},
        "W sorted, and its indices",
    ),
    "bandit": Flow(
        {"probabilities of the arms": "", "a random stream": ""},
        ("softmax of the logits", "draw, reward, update", "an agent's steps in one loop"),
        {"rewards (agents, steps)": "", "logits (agents, arms)": ""},
        "a Python call a step",
    ),
}  # fmt: skip


def draw(flow: Flow, path: Path) -> None:
    rows = max(len(flow.reads), len(flow.writes), 2)
    height = 0.62 * rows + 0.62
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.4, height))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, 9.4), ylim=(0, height))
        ax.set_axis_off()
        middle = 0.62 + 0.31 * rows

        def box(
            x: float, y: float, w: float, h: float, text: str, colour: str, **style: str
        ) -> None:
            shape = "round,pad=0.02,rounding_size=0.12" if colour == BLUE else "square,pad=0.02"
            patch = FancyBboxPatch(
                (x, y - h / 2), w, h, shape, fill=False, ec=colour, lw=1.2, **style
            )
            ax.add_patch(patch)
            ax.text(x + w / 2, y, text, ha="center", va="center", linespacing=1.4)

        def places(count: int) -> list[float]:
            return [middle + 0.62 * ((count - 1) / 2 - i) for i in range(count)]

        def arrow(start: tuple[float, float], end: tuple[float, float], text: str) -> None:
            line = {"arrowstyle": "->", "color": GREY, "lw": 1.0}
            ax.annotate("", end, start, arrowprops=line)
            x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
            ax.text(x, y + 0.06, text, ha="center", va="bottom", size=7)

        box(3.5, middle, 2.4, 0.24 * len(flow.does) + 0.26, "\n".join(flow.does), BLUE)
        for y, (name, label) in zip(places(len(flow.reads)), flow.reads.items(), strict=True):
            box(0.1, y, 2.6, 0.4, name, GREY)
            arrow((2.75, y), (3.45, middle + 0.3 * (y - middle)), label)
        for y, (name, label) in zip(places(len(flow.writes)), flow.writes.items(), strict=True):
            box(6.7, y, 2.6, 0.4, name, GREY)
            arrow((5.95, middle + 0.3 * (y - middle)), (6.65, y), label)
        box(3.1, 0.28, 3.2, 0.38, f"never built: {flow.never}", AMBER, linestyle="dashed")
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for stem, flow in FLOWS.items():
        draw(flow, OUT / f"{stem}.svg")


if __name__ == "__main__":
    main()
