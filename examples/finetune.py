"""The whole story of fine-tuning on finefuse's kernels, on real text, in minutes.

    python examples/finetune.py                       # under five minutes on two cores
    python examples/finetune.py --quick               # under one
    python examples/finetune.py --compare             # each stage with plain PyTorch, too
    python examples/finetune.py --data pairs.jsonl    # your own pairs (TRL's format) or `messages`
    python examples/finetune.py --model DIR           # a local Hugging Face model instead of our own

A base model is trained on the documentation that comes with Python and quantised to NF4; with QLoRA it
learns to answer questions, then to prefer good answers, then, by policy gradients, what a rule and a reward
model reward; it is distilled into a smaller one and pruned. Every stage is judged on what was held out,
before and after. story/engines.py has the lines that change from plain PyTorch to finefuse, docs/demo.md says
what each stage shows.

Exit code: 0; 1 where the engines' losses disagree; 2 for wrong input; 130 after Ctrl-C: --resume goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

try:
    import finefuse as ff
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from story import data, engines, model, report, stages, training
    from tokenizers import Tokenizer
except ImportError as error:
    name = (error.name or str(error)).split(".")[0]
    install = "." if name == "finefuse" else "torch tokenizers safetensors rich matplotlib"
    print(f"finetune: cannot import {name}: pip install {install}", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    print("finetune: stopped", file=sys.stderr)
    sys.exit(130)

# Steps of each stage, by default and with --quick.
STEPS = {
    "pretrain": (240, 60),
    "sft": (80, 24),
    "preference": (40, 16),
    "policy": (40, 24),
    "reward": (40, 40),
    "rlhf": (40, 16),
    "distill": (80, 24),
    "prune": (40, 12),
}
TOLERANCE = 1e-3  # largest difference between the engines' losses, relative to a stage's largest


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        data.fail(message)  # one line


def parse_arguments() -> argparse.Namespace:
    def number(low: int, high: int) -> Callable[[str], int]:
        def convert(text: str) -> int:
            if not text.isdecimal() or not low <= int(text) <= high:
                raise argparse.ArgumentTypeError(f"{text!r}; allowed: {low} to {high}")
            return int(text)

        return convert

    parser = Parser(prog="finetune", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--text", type=Path, help="text to learn instead of Python's documentation")
    add(
        "--data", type=Path, help="JSON lines: prompt, chosen, rejected (TRL's format), or messages"
    )
    add("--model", type=Path, help="folder of a Hugging Face causal language model to start from")
    losses = ["dpo", *engines.PREFERENCES]
    add(
        "--preference",
        choices=losses,
        default="dpo",
        metavar="LOSS",
        help=f"{', '.join(losses)} (dpo)",
    )
    policies = engines.POLICIES
    add(
        "--policy",
        choices=policies,
        default="grpo",
        metavar="LOSS",
        help=f"{', '.join(policies)} (grpo)",
    )
    add(
        "--compare", action="store_true", help="train with plain PyTorch too, from the same numbers"
    )
    add("--quick", action="store_true", help="fewer steps, a smaller vocabulary and model")
    add("--steps", type=number(1, 10**6), help="steps in each stage instead of the stage's own")
    add("--vocab", type=number(300, 200_000), help="size of the vocabulary (4096; --quick: 2048)")
    add("--seed", type=number(0, 2**31 - 1), default=0, help="(0)")
    add("--out", type=Path, default=Path("out"), help="folder of checkpoints and the figure (out)")
    add("--resume", action="store_true", help="go on after the last stage that --out holds")
    arguments = parser.parse_args()
    arguments.vocab = arguments.vocab or (2048 if arguments.quick else 4096)
    if arguments.preference == "dpo":
        arguments.preference = "sigmoid"
    return arguments


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing: a stage counts as done once its result is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    os.replace(part, path)


def as_json(result: training.Result) -> dict[str, Any]:
    return {**result._asdict(), "runs": {name: list(run) for name, run in result.runs.items()}}


def read_result(path: Path) -> training.Result:
    value = json.loads(path.read_text())
    runs = {engine: training.Run(*run) for engine, run in value.pop("runs").items()}
    return training.Result(**value, runs=runs)


def open_folder(arguments: argparse.Namespace, source: str) -> dict[str, training.Result]:
    """Make the folder ready; the results in it that --resume takes."""
    out, settings = arguments.out, {**vars(arguments), "data or text": source}
    for name in ("resume", "out", "text", "data"):
        del settings[name]
    settings["model"] = str(arguments.model)
    run_file, done = out / "run.json", {}
    try:
        if arguments.resume:
            try:
                before = json.loads(run_file.read_text())
            except (OSError, ValueError):
                data.fail(f"--resume: {out} holds no run to go on with")
            for name, value in settings.items():
                if before.get(name) != value:
                    data.fail(f"--resume: the run in {out} was with another {name}")
            for stage in stages.STAGES:
                if not (out / stage / "result.json").exists():
                    break
                done[stage] = read_result(out / stage / "result.json")
        for stage in stages.STAGES:
            if stage not in done:
                shutil.rmtree(out / stage, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        write_json(run_file, settings)
        (out / "finetune.png").touch()  # now, not after the training
    except OSError as error:
        data.fail(f"--out {out}: {error.strerror}")
    return done


def prepare(arguments: argparse.Namespace) -> tuple[data.Data, data.Tokens, dict[str, Any]]:
    torch.manual_seed(arguments.seed)
    text, examples = data.read_data(arguments.text, arguments.data)
    source = hashlib.sha256(json.dumps([text, examples]).encode()).hexdigest()
    if arguments.model:
        model.load_model(arguments.model)  # what is wrong with it is said now
        tokens = model.load_tokenizer(arguments.model)
    done = open_folder(arguments, source)
    if not arguments.model:
        kept = arguments.out / "tokenizer.json"
        if arguments.resume and kept.exists():
            tokenizer = Tokenizer.from_file(str(kept))
        else:
            corpus = [text, *(text for example in examples for text in example[:2])]
            tokenizer = data.train_tokenizer(corpus, arguments.vocab)
            tokenizer.save(str(kept))
        tokens = data.as_tokens(tokenizer)
    return data.prepare(text, examples, tokens), tokens, done


def main() -> int:
    arguments = parse_arguments()
    story_data, tokens, done = prepare(arguments)
    size = {"dim": 96, "layers": 2} if arguments.quick else {}
    settings = training.Settings(
        {stage: arguments.steps or steps[arguments.quick] for stage, steps in STEPS.items()},
        preference=arguments.preference,
        policy=arguments.policy,
        model=arguments.model,
        **size,
    )
    console = Console(highlight=False)
    console.print(
        f"{len(story_data.text):,} tokens of text, vocabulary {tokens.size:,}; "
        f"{len(story_data.pairs):,} pairs to learn from, {len(story_data.pairs_held_out)} to judge by; "
        f"{torch.get_num_threads()} threads; finefuse {ff.__version__}, torch {torch.__version__}"
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    took = (engines.FINEFUSE, engines.PLAIN) if arguments.compare else (engines.FINEFUSE,)
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        whole = progress.add_task("the whole story", total=len(stages.STAGES), completed=len(done))
        for number, (stage, run) in enumerate(stages.STAGES.items()):
            if stage in done:
                continue
            title = stages.TITLES[stage]
            task = progress.add_task(title, total=None)

            def show(
                step: int, total: int, text: str, task: Any = task, title: str = title
            ) -> None:
                progress.update(task, completed=step, total=total, description=f"{title}: {text}")

            torch.manual_seed(1000 * arguments.seed + number)
            start = time.perf_counter()
            result = run(training.Story(story_data, tokens, settings, arguments.out, took, show))
            write_json(arguments.out / stage / "result.json", as_json(result))
            done[stage] = result
            progress.remove_task(task)
            progress.advance(whole)
            console.print(
                f"{title}, {time.perf_counter() - start:.0f} s: {result.metric} {result.before:.3f} → "
                f"{result.after:.3f}" + "".join(f"\n  {note}" for note in result.notes),
                markup=False,
            )

    figure = arguments.out / "finetune.png"
    report.draw(done, figure)
    console.print(report.results(done))
    console.print(f"Loss curves: {figure}", soft_wrap=True)
    for stage, result in done.items():
        if result.runs and not result.good:
            console.print(f"{stages.TITLES[stage]} is not where it should be: {result.worst:.3f}")
    if arguments.compare:
        stage, largest = max(
            ((stage, report.difference(result)) for stage, result in done.items()),
            key=lambda item: item[1],
        )
        summary = (
            f"the engines' losses differ by at most {largest:.1e} of a stage's largest ({stage})"
        )
        if not largest <= TOLERANCE:  # NaN too
            print(f"finetune: {summary}; allowed: {TOLERANCE:.0e}", file=sys.stderr)
            return 1
        console.print(f"Agreement: {summary}; allowed: {TOLERANCE:.0e}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("finetune: stopped; --resume goes on after the last stage done", file=sys.stderr)
        sys.exit(130)
