"""Fine-tune a small language model twice, with plain PyTorch and with finefuse, and compare.

    python examples/finetune.py                      # one to two minutes on two cores
    python examples/finetune.py --quick              # seconds
    python examples/finetune.py --data pairs.jsonl   # your own preference pairs, in TRL's format

A Llama-style decoder learns a text (the documentation that comes with Python), then learns by DPO to
prefer the true continuation of a passage to a scrambled one. Both engines get the same weights and the
same batches, so their losses must agree; what differs is the time and the memory that the vocabulary
takes. `PLAIN` and `FINEFUSE` below hold the lines that would change in your own training.

Exit code: 0; 1 where the losses disagree; 2 for wrong input; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from math import nan
from pathlib import Path
from typing import NamedTuple, NoReturn

try:
    import finefuse as ff
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from torch import Tensor, nn
except ImportError as error:
    name = (error.name or str(error)).split(".")[0]
    install = "." if name == "finefuse" else "torch tokenizers rich matplotlib"
    print(f"finetune: cannot import {name}: pip install {install}", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    print("finetune: stopped", file=sys.stderr)
    sys.exit(130)

SEQUENCE = 128  # tokens in a sequence
BATCH = 16  # sequences in a batch; DPO: half of them chosen, half rejected
PASSAGE, PROMPT = 96, 32  # tokens of a passage, and how many of them are its prompt
BETA = 0.1  # DPO's beta
START = 0  # the token that every prompt begins with
IGNORE = -100  # the target where no loss is taken: prompt and padding
TOLERANCE = 1e-3  # largest difference between the engines' losses, relative to the first loss


# ---- the two engines: all that changes from plain PyTorch to finefuse --------------------------------
# logits (batch, T, vocab) and targets (batch, T); in DPO the first half of the batch is chosen.


def plain_sequence_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    logprobs = logits.log_softmax(dim=-1)
    token_logprobs = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return token_logprobs.masked_fill(targets == IGNORE, 0.0).sum(dim=-1)


def plain_dpo(logits: Tensor, targets: Tensor, ref_logprobs: Tensor) -> Tensor:
    rewards = BETA * (plain_sequence_logprobs(logits, targets) - ref_logprobs)
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def finefuse_sequence_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return ff.sequence_logprobs(ff.token_logprobs(logits, targets))


# inplace=True: the gradient overwrites the logits, and nothing else of their size is ever allocated.
# It is right wherever nothing reads the logits after the loss, as in the usual training step.


def finefuse_dpo(logits: Tensor, targets: Tensor, ref_logprobs: Tensor) -> Tensor:
    return ff.preference_loss_from_logits(
        logits, targets, ref_logprobs=ref_logprobs, beta=BETA, inplace=True
    ).loss


def finefuse_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return ff.cross_entropy(logits, targets, inplace=True)


class Engine(NamedTuple):
    name: str
    cross_entropy: Callable[[Tensor, Tensor], Tensor]
    sequence_logprobs: Callable[[Tensor, Tensor], Tensor]
    dpo: Callable[[Tensor, Tensor, Tensor], Tensor]


PLAIN = Engine("PyTorch", plain_cross_entropy, plain_sequence_logprobs, plain_dpo)
FINEFUSE = Engine("finefuse", finefuse_cross_entropy, finefuse_sequence_logprobs, finefuse_dpo)
ENGINES = (PLAIN, FINEFUSE)


# ---- the model -----------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """Attention with rotary positions, then SwiGLU, each behind an RMSNorm."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, T, dim / heads)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """Tokens (batch, T) to logits (batch, T, vocab); the output shares the embedding's weights."""

    def __init__(self, vocab: int, dim: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden=344) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        half = dim // heads // 2
        angles = torch.outer(torch.arange(SEQUENCE), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        return F.linear(self.norm(x), self.embedding.weight)


# ---- the data ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Batch(NamedTuple):
    tokens: Tensor  # (batch, T)
    targets: Tensor  # (batch, T): the next token, or IGNORE
    pairs: Tensor | None = None  # (batch / 2,): which pairs these are


def fail(message: str) -> NoReturn:
    print(f"finetune: {message}", file=sys.stderr)
    sys.exit(2)


def read_file(option: str, path: Path, characters: int = -1) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(characters)
    except OSError as error:
        fail(f"{option} {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{option} {path}: not UTF-8 text ({error.reason})")


def documentation() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        fail("this Python comes without pydoc_data, the default text: give --text FILE")
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_pairs(path: Path) -> list[dict[str, str]]:
    """TRL's format: one JSON object a line, with the strings prompt, chosen and rejected."""
    pairs = []
    for number, line in enumerate(read_file("--data", path).split("\n"), start=1):
        if line.strip():
            try:
                pair = json.loads(line)
                problem = pair_problem(pair)
            except (ValueError, RecursionError) as error:
                problem = f"not JSON ({error})"
            if problem:
                fail(f"--data {path}, line {number}: {problem}")
            pairs.append(pair)
    if not pairs:
        fail(f"--data {path}: no pairs in the file")
    return pairs


def pair_problem(pair: object) -> str | None:
    if not isinstance(pair, dict):
        return f"a {type(pair).__name__}; an object with prompt, chosen and rejected is needed"
    for key in Pair._fields:
        if key not in pair:
            return f"{key!r} is missing"
        if not isinstance(pair[key], str):
            return f"{key!r} is a {type(pair[key]).__name__}; a string is needed"
        if not pair[key] and key != "prompt":
            return f"{key!r} is empty"
        if any("\ud800" <= character <= "\udfff" for character in pair[key]):
            return f"{key!r} holds half of a surrogate pair, which is no character"
    return None


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|start|>"],  # the first id, START
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def text_batches(text: Tensor, steps: int) -> list[Batch]:
    """Random windows. The targets are shifted here, once, so that no logits need be sliced."""
    starts = torch.randint(len(text) - SEQUENCE, (steps, BATCH, 1))
    windows = text[starts + torch.arange(SEQUENCE + 1)]  # (steps, BATCH, SEQUENCE + 1)
    return [Batch(window[:, :-1], window[:, 1:]) for window in windows]


def pairs_from_text(text: list[int], count: int) -> list[Pair]:
    """Start of a passage, its true continuation, and that one in scrambled order."""
    passages = [text[i : i + PASSAGE] for i in range(0, len(text) - PASSAGE + 1, PASSAGE)]
    pairs = []
    for i in torch.randperm(len(passages))[:count]:
        prompt, chosen = passages[i][:PROMPT], passages[i][PROMPT:]
        pieces = [chosen[j : j + 4] for j in range(0, len(chosen), 4)]
        scrambled = [token for j in torch.randperm(len(pieces)) for token in pieces[j]]
        pairs.append(Pair(prompt, chosen, scrambled))
    return pairs


def encode_pair(tokenizer: Tokenizer, pair: dict[str, str]) -> Pair:
    """Of what is too long, the end of the prompt and the start of the completion stay."""
    prompt, chosen, rejected = (tokenizer.encode(pair[key]).ids for key in Pair._fields)
    prompt = prompt[-SEQUENCE // 2 :]
    room = SEQUENCE - len(prompt)
    return Pair(prompt, chosen[:room], rejected[:room])


def pair_batch(pairs: list[Pair], indices: Tensor) -> Batch:
    rows = [(pairs[i].prompt, pairs[i].chosen) for i in indices]
    rows += [(pairs[i].prompt, pairs[i].rejected) for i in indices]
    shape = len(rows), max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens, targets = torch.full(shape, START), torch.full(shape, IGNORE)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor([START, *prompt, *completion[:-1]])
        targets[row, len(prompt) : end] = torch.tensor(completion)
    return Batch(tokens, targets, indices)


# ---- training ------------------------------------------------------------------------------------


class Run(NamedTuple):
    losses: list[float]
    seconds: list[float]  # of each step
    peak_rss: float  # MiB that one step adds at its peak; NaN where the system does not tell


def step_peak_rss(step: Callable[[], None]) -> float:
    """Peak of the process's resident memory during a step, above what was resident before it."""
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve this step unseen
        Path("/proc/self/clear_refs").write_text("5")  # the kernel counts a new peak, VmHWM
        before = int(status.read_text().split("VmHWM:")[1].split()[0])
        step()
        return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1024
    except (OSError, AttributeError):
        return nan


def train(
    model: Decoder,
    batches: list[Batch],
    loss_of: Callable[[Engine, Decoder, Batch], Tensor],
    learning_rate: float,
    show: Callable[[float], None],
) -> tuple[dict[Engine, Decoder], dict[Engine, Run]]:
    """Train a copy of the model with each engine, in turn at every step: a busy moment hits both."""
    policies = {engine: copy.deepcopy(model) for engine in ENGINES}
    optimizers = {e: torch.optim.AdamW(policies[e].parameters(), learning_rate) for e in ENGINES}
    runs = {}
    for engine in ENGINES:  # on a spare copy: the first step pays for what torch sets up once
        spare = copy.deepcopy(model)
        loss_of(engine, spare, batches[0]).backward()
        peak = step_peak_rss(lambda e=engine, m=spare: loss_of(e, m, batches[0]).backward())
        runs[engine] = Run([], [], peak)
    for number, batch in enumerate(batches):
        for engine in ENGINES if number % 2 else reversed(ENGINES):
            start = time.perf_counter()
            loss = loss_of(engine, policies[engine], batch)
            loss.backward()
            optimizers[engine].step()
            optimizers[engine].zero_grad()
            runs[engine].losses.append(loss.item())
            runs[engine].seconds.append(time.perf_counter() - start)
        show(loss.item())
    return policies, runs


@torch.no_grad()
def pair_logprobs(engine: Engine, model: Decoder, pairs: list[Pair]) -> Tensor:
    """Log-probabilities of the chosen and of the rejected completions, (2, pairs)."""
    parts = []
    for indices in torch.arange(len(pairs)).split(BATCH // 2):
        tokens, targets, _ = pair_batch(pairs, indices)
        parts.append(engine.sequence_logprobs(model(tokens), targets).view(2, -1))
    return torch.cat(parts, dim=1)


def accuracy(logprobs: Tensor, ref_logprobs: Tensor) -> float:
    """The share of pairs with a positive margin."""
    chosen_reward, rejected_reward = logprobs - ref_logprobs
    return (chosen_reward > rejected_reward).float().mean().item()


# ---- the report ----------------------------------------------------------------------------------

Stages = dict[str, dict[Engine, Run]]


def results(stages: Stages, tokens_per_step: dict[str, float]) -> Table:
    table = Table("stage", "engine", box=box.SIMPLE)
    for title in ("first, last loss", "tokens/s", "speed", "peak RSS", "memory"):
        table.add_column(title, justify="right")
    for stage, runs in stages.items():
        plain = runs[PLAIN]
        for engine, run in runs.items():
            ratios = [p / s for p, s in zip(plain.seconds, run.seconds, strict=True)]
            table.add_row(
                stage,
                engine.name,
                f"{run.losses[0]:.4f} {run.losses[-1]:.4f}",
                f"{tokens_per_step[stage] / statistics.median(run.seconds):,.0f}",
                f"{statistics.median(ratios):.2f}x",
                f"+{run.peak_rss:.0f} MiB",
                f"{run.peak_rss / plain.peak_rss if plain.peak_rss else nan:.2f}x",
            )
    return table


def largest_difference(stages: Stages) -> float:
    """Of the engines' losses at any step, relative to the stage's first loss."""
    losses = torch.tensor([[runs[engine].losses for engine in ENGINES] for runs in stages.values()])
    plain, fused = losses.double().unbind(1)
    return ((plain - fused).abs() / plain[:, :1]).max().item()


def draw(stages: Stages, path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (stage, runs) in zip(figure.subplots(1, 2), stages.items(), strict=True):
        steps = range(1, len(runs[PLAIN].losses) + 1)
        axes.plot(steps, runs[PLAIN].losses, "tab:orange", lw=5, alpha=0.5, label=PLAIN.name)
        axes.plot(steps, runs[FINEFUSE].losses, "black", lw=1, label=FINEFUSE.name)
        axes.set(title=stage, xlabel="step", ylabel="loss")
        axes.legend()
    figure.savefig(path, dpi=150)


# ---- the whole job -------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    def number(low: int, high: int) -> Callable[[str], int]:
        def convert(text: str) -> int:
            if not text.isdecimal() or not low <= int(text) <= high:
                raise argparse.ArgumentTypeError(f"{text!r}; allowed: {low} to {high}")
            return int(text)

        return convert

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="preference pairs: JSON lines in TRL's format")
    parser.add_argument("--text", type=Path, help="text to learn instead of Python's documentation")
    parser.add_argument("--steps", type=number(1, 10**6), help="steps in each stage (60)")
    parser.add_argument("--vocab", type=number(300, 200_000), help="size of the vocabulary (4096)")
    parser.add_argument("--seed", type=number(0, 2**63 - 1), default=0, help="(0)")
    parser.add_argument("--quick", action="store_true", help="6 steps, vocabulary of 2048")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure (out)")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (6 if arguments.quick else 60)
    arguments.vocab = arguments.vocab or (2048 if arguments.quick else 4096)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    steps, figure = arguments.steps, arguments.out / "finetune.png"
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        figure.touch()  # now, not after the training
    except OSError as error:
        fail(f"--out {arguments.out}: {error.strerror}")
    torch.manual_seed(arguments.seed)

    # With --data, its chosen answers are learnt in the supervised stage too.
    text = read_file("--text", arguments.text, 4_000_000) if arguments.text else documentation()
    given = read_pairs(arguments.data) if arguments.data else []
    texts = [text, *(pair["prompt"] + pair["chosen"] for pair in given)]
    tokenizer = train_tokenizer(texts, arguments.vocab)
    tokens = [token for part in texts for token in tokenizer.encode(part).ids]
    if len(tokens) < 16 * PASSAGE:
        fail(f"the text is too small: {len(tokens)} tokens; at least {16 * PASSAGE} are needed")
    count = BATCH // 2 * steps
    if given:
        pairs = [encode_pair(tokenizer, given[i]) for i in torch.randperm(len(given))]
    else:
        pairs = pairs_from_text(tokens, min(count, 256) + 64)
    held_out = pairs[: min(64, len(pairs) // 5)] or pairs  # too few pairs: all train, all judge
    pairs = (pairs[len(held_out) :] or pairs)[:count]
    order = torch.cat([torch.randperm(len(pairs)) for _ in range(count // len(pairs) + 1)])
    pair_batches = [pair_batch(pairs, i) for i in order.split(BATCH // 2)[:steps]]
    windows = text_batches(torch.tensor(tokens), steps)

    vocab = tokenizer.get_vocab_size()
    model = Decoder(vocab)
    console = Console(highlight=False)
    console.print(
        f"{len(tokens):,} tokens of text, vocabulary {vocab:,}; {len(pairs)} preference pairs to "
        f"learn, {len(held_out)} to judge by; {sum(p.numel() for p in model.parameters()):,} "
        f"parameters; {steps} steps of {BATCH} sequences a stage; {torch.get_num_threads()} threads"
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("supervised", total=2 * steps)

        def show(stage: str, loss: float) -> None:
            progress.update(task, advance=1, description=f"{stage}: loss {loss:.3f}")

        def supervised_loss(engine: Engine, model: Decoder, batch: Batch) -> Tensor:
            return engine.cross_entropy(model(batch.tokens), batch.targets)

        policies, supervised_runs = train(
            model, windows, supervised_loss, 2e-3, partial(show, "supervised")
        )

        # Both engines start DPO from one model. Frozen it is the reference, whose log-probabilities
        # are computed once, before the first step.
        model = policies[PLAIN]
        ref = {engine: pair_logprobs(engine, model, pairs) for engine in ENGINES}
        before = {engine: pair_logprobs(engine, model, held_out) for engine in ENGINES}

        def dpo_loss(engine: Engine, model: Decoder, batch: Batch) -> Tensor:
            ref_logprobs = ref[engine][
                :, batch.pairs
            ].flatten()  # chosen, rejected, as in the batch
            return engine.dpo(model(batch.tokens), batch.targets, ref_logprobs)

        policies, dpo_runs = train(model, pair_batches, dpo_loss, 3e-4, partial(show, "DPO"))
        after = {e: pair_logprobs(e, policies[e], held_out) for e in ENGINES}

    tokens_per_step = {
        "supervised": BATCH * SEQUENCE,
        "DPO": sum(b.tokens.numel() for b in pair_batches) / steps,
    }
    stages = {"supervised": supervised_runs, "DPO": dpo_runs}
    console.print(results(stages, tokens_per_step))
    console.print("speed: median over steps. peak RSS: what one forward and backward adds.")
    shares = [
        f"{e.name} {accuracy(before[e], before[e]):.0%} -> {accuracy(after[e], before[e]):.0%}"
        for e in ENGINES
    ]
    console.print(f"Pairs with a positive margin, before -> after DPO: {'; '.join(shares)}")
    console.print("(before DPO the policy is the reference: every margin is 0, none is positive)")
    draw(stages, figure)
    console.print(f"Loss curves: {figure}", soft_wrap=True)
    difference = largest_difference(stages)
    summary = f"the engines' losses differ by at most {difference:.1e} of the first loss"
    if not difference <= TOLERANCE:  # NaN too
        print(f"finetune: {summary}; allowed: {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    console.print(f"Agreement: {summary} (allowed: {TOLERANCE:.0e})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("finetune: stopped", file=sys.stderr)
        sys.exit(130)
