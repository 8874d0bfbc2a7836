"""What the stages have in common: the training loop, which takes the engines in turn, and the judging."""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import finefuse as ff
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import IGNORE, Batch, Data, Pair, Tokens, answers_batch, pairs_batch, whole_text
from .engines import FINEFUSE, Engine
from .model import Decoder, Model, clone, load_model


class Settings(NamedTuple):
    steps: dict[str, int]  # of each stage that trains
    dim: int = 128
    layers: int = 3
    batch: int = 16  # sequences a step
    rank: int = 8
    preference: str = "sigmoid"
    policy: str = "grpo"
    model: Path | None = None


class Run(NamedTuple):
    """One engine's training in a stage."""

    losses: list[float]
    seconds: list[float]  # of each step
    peak: float  # MiB of resident memory that one step adds at its peak; NaN: the system does not tell


class Result(NamedTuple):
    metric: str
    before: float
    after: float
    up: bool  # whether more is better
    worst: float  # what `after` must not miss
    unit: str  # what is counted a second
    per_step: float
    runs: dict[str, Run]  # by the engine's name
    notes: list[str]

    @property
    def good(self) -> bool:
        return self.after > self.worst if self.up else self.after < self.worst


class Story(NamedTuple):
    """What the stages have in common."""

    data: Data
    tokens: Tokens
    settings: Settings
    out: Path
    engines: tuple[Engine, ...]
    show: Callable[[int, int, str], None]  # steps done, steps in all, text

    def base(self) -> Model:
        if self.settings.model:
            return load_model(self.settings.model)
        model = Decoder(self.tokens.size, self.settings.dim, self.settings.layers)
        if (self.out / "pretrain" / "model.safetensors").exists():
            model.load_state_dict(load_file(self.out / "pretrain" / "model.safetensors"))
        return model

    def qlora(self, adapter: str | None = None) -> Model:
        """The base in NF4 with a LoRA adapter: a new one, or what a stage has saved."""
        model = self.base()
        rank = self.settings.rank
        ff.nn.add_lora(model.body, rank, 2 * rank, targets="all-linear", quantize="nf4")
        packed = self.out / "quantize" / "model.safetensors"
        if packed.exists():
            model.body.load_state_dict(load_file(packed), strict=False)
        if adapter:
            ff.nn.load_adapter(model.body, self.out / adapter / "adapter")
        return model

    def engine_models(self, model: Model, qlora: bool) -> dict[str, Model]:
        return {e.name: e.qlora(model) if qlora else clone(model) for e in self.engines}

    def steps(self, stage: str) -> int:
        return self.settings.steps[stage]


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.detach().clone().contiguous() for name, x in tensors.items()}, path)


# ---- training --------------------------------------------------------------------------------------


def step_peak(step: Callable[[], None]) -> float:
    """Peak of the process's resident memory during a step, above what was resident before it, in MiB."""
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve this step unseen
        Path("/proc/self/clear_refs").write_text("5")  # the kernel counts a new peak, VmHWM
        before = int(status.read_text().split("VmHWM:")[1].split()[0])
        step()
        return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1024
    except (OSError, AttributeError, IndexError):
        return nan


def train(
    story: Story,
    stage: str,
    models: dict[str, Any],
    loss_of: Callable[[Engine, Any, Batch], Tensor],
    batches: Iterable[Batch],
    learning_rate: float,
    after_step: Callable[[Any], None] = lambda model: None,
) -> tuple[dict[str, Run], float]:
    """Train each engine's model, in turn at every step: a busy moment hits both. Also tokens a step."""
    total, count = story.steps(stage), 0
    optimizers = {
        name: torch.optim.AdamW(trained(model), learning_rate, weight_decay=0.01, fused=True)
        for name, model in models.items()
    }
    iterator = iter(batches)
    first = next(iterator)
    runs = {}
    for engine in story.engines:  # on a spare copy: the first step pays for what is set up once
        spare = clone(models[engine.name])
        loss_of(engine, spare, first).backward()
        peak = step_peak(lambda e=engine, m=spare: loss_of(e, m, first).backward())
        runs[engine.name] = Run([], [], peak)
    for number, batch in enumerate(itertools.chain([first], iterator)):
        warm, left = (number + 1) / max(1, total // 20), 1 - number / total
        for engine in story.engines if number % 2 else reversed(story.engines):
            model, optimizer = models[engine.name], optimizers[engine.name]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, warm) * (0.1 + 0.9 * left)
            start = time.perf_counter()
            loss = loss_of(engine, model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(trained(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            after_step(model)
            runs[engine.name].seconds.append(time.perf_counter() - start)
            runs[engine.name].losses.append(loss.item())
        count += batch.tokens.numel()
        story.show(number + 1, total, f"loss {loss.item():.3f}")
    return runs, count / total


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def cross_entropy(engine: Engine, model: Model, batch: Batch) -> Tensor:
    return engine.cross_entropy(model(batch.tokens), model.head, batch.targets)


@torch.no_grad()
def held_out_loss(model: Model, batches: list[Batch]) -> float:
    """Nats a token."""
    total = count = 0.0
    for batch in batches:
        logprobs = FINEFUSE.token_logprobs(model(batch.tokens), model.head, batch.targets)
        total -= logprobs.sum().item()
        count += (batch.targets != IGNORE).sum().item()
    return total / count


def text_loss(story: Story, model: Model) -> float:
    return held_out_loss(model, whole_text(story.data.text_held_out, story.settings.batch))


def answers_loss(story: Story, model: Model) -> float:
    rows = [(pair.prompt, pair.chosen) for pair in story.data.pairs_held_out]
    return held_out_loss(model, [answers_batch(part) for part in chunks(rows, 16)])


def chunks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for i in range(0, len(rows), size):
        yield rows[i : i + size]


@torch.no_grad()
def sequence_logprobs(model: Model, pairs: list[Pair]) -> Tensor:
    """Of the chosen and the rejected answers, (2, pairs)."""
    parts = []
    for part in chunks(pairs, 16):
        batch = pairs_batch(part)
        logprobs = FINEFUSE.token_logprobs(model(batch.tokens), model.head, batch.targets)
        parts.append(logprobs.sum(dim=-1).view(2, -1))
    return torch.cat(parts, dim=1)


def share_of_wins(margins: Tensor) -> float:
    """The share of pairs whose chosen answer is ahead; a draw is half."""
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item()


@torch.no_grad()
def saved_again(story: Story, stage: str, model: Model) -> str:
    """Save the adapter, load it into a fresh model, compare what they put out."""
    ff.nn.save_adapter(model.body, story.out / stage / "adapter")
    tokens = story.data.text_held_out[None, :32]
    if not torch.equal(model(tokens), story.qlora(stage)(tokens)):
        raise AssertionError(f"{stage}: the adapter that was saved gives other outputs")
    return "adapter saved and loaded again: equal outputs"
