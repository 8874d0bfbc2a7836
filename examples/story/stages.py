"""The methods, a function each: it trains, judges on what was held out, saves, and says what it found.

A stage starts from what earlier stages saved, so that an interrupted run goes on where it was. All engines
start it from the same numbers and take the same batches in turn; what is judged and saved is the first
engine's.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import nan
from statistics import fmean
from typing import NamedTuple

import finefuse as ff
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .data import IGNORE, Batch, Pair, answers_batch, pairs_batch, shuffled_batches, text_batches
from .engines import FINEFUSE, Engine, Rollouts
from .model import Decoder, Model, clone, linears, sample
from .training import (
    Result,
    Run,
    Story,
    answers_loss,
    chunks,
    cross_entropy,
    save,
    saved_again,
    sequence_logprobs,
    share_of_wins,
    step_peak,
    text_loss,
    train,
)

ANSWER = 24  # tokens of a sampled answer, at most
GROUP = 8  # answers to a prompt in policy training
EPOCHS = 2  # steps on the same answers
KL_BETA = 0.05  # towards the supervised model
LAMBDA = 0.95  # of the generalised advantage estimates of ppo
VALUE_WEIGHT = 0.1  # of the value function's loss
ROUNDS = 3  # of SPIN
WINS = {
    "sft": 0.6
}  # the least share of pairs won, where it is not 0.7: sft never reads the rejected


def pretrain(story: Story) -> Result:
    """The base model learns the text. A model that was given is only judged."""
    model = story.base()
    before = text_loss(story, model)
    steps, batch = story.steps("pretrain"), story.settings.batch
    metric = "held-out loss of the text"
    if story.settings.model:
        return Result(metric, before, before, False, nan, "tokens", 0, {}, ["a model was given"])
    models = story.engine_models(model, qlora=False)
    batches = text_batches(story.data.text, steps, batch)
    runs, tokens = train(story, "pretrain", models, cross_entropy, batches, 3e-3)
    model = models[story.engines[0].name]
    save(story.out / "pretrain" / "model.safetensors", model.state_dict())
    after = text_loss(story, model)
    return Result(metric, before, after, False, before - 0.5, "tokens", tokens, runs, [])


def quantize(story: Story) -> Result:
    """The weights of the linear layers in NF4."""
    model = story.base()
    before = text_loss(story, model)
    weights = [layer.weight.detach() for layer in linears(model).values()]
    runs = {}
    for engine in story.engines:
        quantize_all = partial(quantize_weights, engine, weights)
        quantize_all()
        run = Run([], [], step_peak(quantize_all))
        for _ in range(5):
            start = time.perf_counter()
            quantize_all()
            run.seconds.append(time.perf_counter() - start)
        runs[engine.name] = run
        story.show(1, 1, engine.name)
    packed = [ff.quantize(weight, "nf4") for weight in weights]
    elements = sum(weight.numel() for weight in weights)
    bits = 8 * sum(q.codes.numel() + 4 * q.absmax.numel() for q in packed) / elements
    errors = [(ff.dequantize(q) - w).square().sum() for q, w in zip(packed, weights, strict=True)]
    error = (sum(errors) / sum(w.square().sum() for w in weights)).sqrt().item()

    model = story.qlora()
    after = text_loss(story, model)
    state = {name: x for name, x in model.body.state_dict().items() if ".lora_" not in name}
    save(story.out / "quantize" / "model.safetensors", state)
    tokens = story.data.text_held_out[None, :32]
    with torch.no_grad():
        if not torch.equal(model(tokens), story.qlora()(tokens)):
            raise AssertionError("the quantised weights that were saved give other outputs")
    notes = [
        f"{bits:.2f} bits a weight instead of 32, root mean square error {error:.1%} of the weights'",
        "quantised weights saved and loaded again: equal outputs",
    ]
    metric = "held-out loss of the text"
    return Result(metric, before, after, False, before + 0.05, "weights", elements, runs, notes)


def quantize_weights(engine: Engine, weights: list[Tensor]) -> None:
    for weight in weights:
        engine.quantize(weight)


def sft(story: Story) -> Result:
    """QLoRA: the adapter learns the chosen answers."""
    model = story.qlora()
    before = answers_loss(story, model)
    pairs, steps = story.data.pairs, story.steps("sft")
    batches = [
        answers_batch([(pairs[i].prompt, pairs[i].chosen) for i in indices])
        for indices in shuffled_batches(len(pairs), steps, story.settings.batch)
    ]
    models = story.engine_models(model, qlora=True)
    runs, tokens = train(story, "sft", models, cross_entropy, batches, 5e-3)
    model = models[story.engines[0].name]
    notes = [saved_again(story, "sft", model)]
    after = answers_loss(story, model)
    metric = "held-out loss of the answers"
    return Result(metric, before, after, False, before - 0.3, "tokens", tokens, runs, notes)


def preference(story: Story) -> Result:
    """The adapter goes on to prefer the chosen answers; the reference is where it started.

    Judged by margins over the reference, which are 0 at first: half of the pairs count as won. SPIN's are
    over the last round's opponent.
    """
    loss, pairs, judged = story.settings.preference, story.data.pairs, story.data.pairs_held_out
    models = story.engine_models(story.qlora("sft"), qlora=True)
    model = models[story.engines[0].name]
    opponent: list[tuple[list[Pair], Tensor]] = []  # the last is who is judged against
    if loss == "spin":
        batches: Iterable[Batch] = spin_batches(story, model, opponent)
    else:
        opponent.append((judged, sequence_logprobs(model, judged)))
        batches = preference_batches(story, model, pairs, story.steps("preference"))

    def loss_of(engine: Engine, model: Model, batch: Batch) -> Tensor:
        hidden = model(batch.tokens)
        return engine.preference(hidden, model.head, batch.targets, batch.extra, loss)

    runs, tokens = train(story, "preference", models, loss_of, batches, 2e-3)
    judged, ref = opponent[-1]
    chosen, rejected = sequence_logprobs(model, judged) - ref
    after = share_of_wins(chosen - rejected)
    notes = [saved_again(story, "preference", model)]
    if loss == "spin":
        notes.append(f"{ROUNDS} rounds: rejected is sampled and the reference moves at each")
    metric = "held-out pairs, chosen ahead"
    return Result(metric, 0.5, after, True, WINS.get(loss, 0.7), "tokens", tokens, runs, notes)


def preference_batches(
    story: Story, reference: Model, pairs: list[Pair], steps: int
) -> list[Batch]:
    size = story.settings.batch
    chosen = shuffled_batches(len(pairs), steps, size)
    pairs = [pairs[i] for i in itertools.chain(*chosen)]
    ref = sequence_logprobs(reference, pairs)  # (2, pairs): before anything is trained
    return [
        pairs_batch(part, ref_part.flatten())
        for part, ref_part in zip(chunks(pairs, size), ref.split(size, dim=1), strict=True)
    ]


def own_answers(story: Story, model: Model, pairs: list[Pair]) -> list[Pair]:
    """The same pairs, rejected what the model answers."""
    answers = sample(model, [pair.prompt for pair in pairs], ANSWER, story.tokens.end)
    return [
        Pair(pair.prompt, pair.chosen, answer) for pair, answer in zip(pairs, answers, strict=True)
    ]


def spin_batches(
    story: Story, model: Model, opponent: list[tuple[list[Pair], Tensor]]
) -> Iterator[Batch]:
    """SPIN: each round's opponent, and reference, is the model as it is when the round begins."""
    total, pairs = story.steps("preference"), story.data.pairs
    for number in range(ROUNDS):
        steps = total * (number + 1) // ROUNDS - total * number // ROUNDS
        count = min(len(pairs), steps * story.settings.batch)
        if count:
            judged = own_answers(story, model, story.data.pairs_held_out)
            opponent.append((judged, sequence_logprobs(model, judged)))
            drawn = [pairs[i] for i in torch.randperm(len(pairs))[:count].tolist()]
            drawn = own_answers(story, model, drawn)
            yield from preference_batches(story, model, drawn, steps)


class RewardModel(nn.Module):
    """A score a token, averaged over the answer's."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.score = nn.Linear(model.head.weight.shape[1], 1, bias=False)
        nn.init.zeros_(self.score.weight)  # all draws at first

    def forward(self, batch: Batch) -> Tensor:
        counts = batch.targets != IGNORE
        scores = self.score(self.model(batch.tokens)).squeeze(-1)
        return (scores * counts).sum(dim=-1) / counts.sum(dim=-1)

    @torch.no_grad()
    def judge(self, rows: list[tuple[list[int], list[int]]]) -> Tensor:
        return torch.cat([self(judged_batch(part)) for part in chunks(rows, 32)])


def judged_batch(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """Up to the answers' last tokens, which predict nothing but are judged."""
    return answers_batch([(prompt, [*answer, 0]) for prompt, answer in rows])


def reward(story: Story) -> Result:
    """A reward model: the supervised model, its adapter going on, with a score for a head."""
    pairs, judged = story.data.pairs, story.data.pairs_held_out
    first = RewardModel(story.qlora("sft"))
    models = {engine.name: clone(first) for engine in story.engines}
    for engine in story.engines:
        models[engine.name].model = engine.qlora(first.model)
    first = models[story.engines[0].name]
    batches = [
        judged_batch(
            [(pairs[i].prompt, pairs[i].chosen) for i in indices]
            + [(pairs[i].prompt, pairs[i].rejected) for i in indices]
        )
        for indices in shuffled_batches(
            len(pairs), story.steps("reward"), story.settings.batch // 2
        )
    ]

    def loss_of(engine: Engine, model: RewardModel, batch: Batch) -> Tensor:
        return engine.reward(model(batch))

    def accuracy() -> float:
        chosen = first.judge([(pair.prompt, pair.chosen) for pair in judged])
        return share_of_wins(chosen - first.judge([(p.prompt, p.rejected) for p in judged]))

    before = accuracy()
    runs, tokens = train(story, "reward", models, loss_of, batches, 2e-3)
    ff.nn.save_adapter(first.model.body, story.out / "reward" / "adapter")
    save(story.out / "reward" / "score.safetensors", first.score.state_dict())
    metric = "held-out pairs, chosen ahead"
    return Result(metric, before, accuracy(), True, 0.7, "tokens", tokens, runs, [])


Judge = Callable[[list[tuple[list[int], list[int]]]], Tensor]


def plain_words(story: Story) -> Judge:
    """A reward that the text itself verifies: the share of an answer's words that are among the text's 50
    commonest."""

    def share(answer: list[int]) -> float:
        words = re.findall(r"[a-z]+", story.tokens.decode(answer).lower())
        return fmean(word in story.data.plain_words for word in words) if words else 0.0

    return lambda rows: torch.tensor([share(answer) for _, answer in rows])


def reward_model(story: Story) -> Judge:
    model = RewardModel(story.qlora("reward"))
    model.score.load_state_dict(load_file(story.out / "reward" / "score.safetensors"))
    return model.judge


class Actor(nn.Module):
    """A policy, and for ppo a value of every token, from the same hidden states."""

    def __init__(self, model: Model, values: bool) -> None:
        super().__init__()
        self.model, self.value = model, None
        if values:
            self.value = nn.Linear(model.head.weight.shape[1], 1)
            for parameter in self.value.parameters():  # the same start for every engine
                nn.init.zeros_(parameter)

    def values(self, hidden: Tensor) -> Tensor:
        return self.value(hidden).squeeze(-1)


class Experience(NamedTuple):
    """What a step learns from."""

    rollouts: Rollouts
    old_values: Tensor | None = None  # (batch, T), of ppo alone
    returns: Tensor | None = None


def policy(
    judge_of: Callable[[Story], Judge], stage: str, metric: str, gain: float, story: Story
) -> Result:
    """Policy gradients: the model answers, answers are judged, the adapter learns which were better."""
    judge, judged, name = judge_of(story), story.data.pairs_held_out, story.settings.policy
    reference = story.qlora("sft")
    models = {
        engine: Actor(model, values=name == "ppo")
        for engine, model in story.engine_models(reference, qlora=True).items()
    }
    actor = models[story.engines[0].name]

    def loss_of(engine: Engine, actor: Actor, batch: Batch) -> Tensor:
        hidden, head = actor.model(batch.tokens), actor.model.head
        rollouts, old, returns = batch.extra
        loss = engine.policy(hidden, head, batch.targets, rollouts, name)
        if actor.value is None:
            return loss
        counts = batch.targets != IGNORE
        return loss + VALUE_WEIGHT * engine.value(actor.values(hidden), returns, old, counts)

    def mean_reward() -> float:
        torch.manual_seed(0)
        return judge(answers(story, actor.model, [pair.prompt for pair in judged])).mean().item()

    seed = torch.random.get_rng_state()
    before = mean_reward()
    torch.random.set_rng_state(seed)
    batches = rollout_batches(story, stage, actor, reference, judge)
    runs, tokens = train(story, stage, models, loss_of, batches, 3e-3)
    after = mean_reward()
    example = answers(story, actor.model, [judged[0].prompt])[0]
    notes = [
        saved_again(story, stage, actor.model),
        f"now: {story.tokens.decode(example[0])!r} {story.tokens.decode(example[1])!r}",
    ]
    return Result(metric, before, after, True, before + gain, "tokens", tokens, runs, notes)


def answers(
    story: Story, model: Model, prompts: list[list[int]]
) -> list[tuple[list[int], list[int]]]:
    return list(zip(prompts, sample(model, prompts, ANSWER, story.tokens.end), strict=True))


def rollout_batches(
    story: Story, stage: str, actor: Actor, reference: Model, judge: Judge
) -> Iterator[Batch]:
    """Answers of the model as it is now (all engines learn from these), each taken for EPOCHS steps."""
    by_length: dict[int, list[list[int]]] = {}
    for pair in story.data.pairs:  # prompts of one length, which are sampled without padding
        by_length.setdefault(len(pair.prompt), []).append(pair.prompt)
    lengths, count = list(by_length), max(2, story.settings.batch // 4)
    weights = torch.tensor([float(len(by_length[length])) for length in lengths])
    for start in range(0, story.steps(stage), EPOCHS):
        prompts = by_length[lengths[int(torch.multinomial(weights, 1))]]
        chosen = [prompts[i] for i in torch.randint(len(prompts), (count,)).tolist()]
        rows = answers(story, actor.model, [prompt for prompt in chosen for _ in range(GROUP)])
        batch = experience(story, actor, reference, answers_batch(rows), judge(rows))
        yield from [batch] * min(EPOCHS, story.steps(stage) - start)


@torch.no_grad()
def experience(
    story: Story, actor: Actor, reference: Model, batch: Batch, rewards: Tensor
) -> Batch:
    """The batch with what is learnt from it: advantages over the other answers to a prompt or, of ppo, of
    each token over its value, where the reward comes with the answer's last."""
    hidden, head, name = actor.model(batch.tokens), actor.model.head, story.settings.policy
    old = FINEFUSE.token_logprobs(hidden, head, batch.targets)
    ref = FINEFUSE.token_logprobs(reference(batch.tokens), reference.head, batch.targets)
    if actor.value is None:
        advantages = ff.group_advantages(
            rewards,
            GROUP,
            scale="none" if name in ("dr_grpo", "rloo") else "group",
            baseline="leave_one_out" if name == "rloo" else "mean",
        )
        return batch._replace(extra=Experience(Rollouts(old, ref, advantages, KL_BETA)))
    counts, values = batch.targets != IGNORE, actor.values(hidden)
    last = counts & (counts.cumsum(dim=-1) == counts.sum(dim=-1, keepdim=True))
    advantages, returns = ff.gae(
        last * rewards[:, None], values, gamma=1.0, lam=LAMBDA, mask=counts
    )
    taken = advantages[counts]
    advantages = (advantages - taken.mean()) / (taken.std() + 1e-6)
    return batch._replace(
        extra=Experience(Rollouts(old, ref, advantages, KL_BETA), values, returns)
    )


def distill(story: Story) -> Result:
    """A smaller model learns the text, alone and with the base model as its teacher: the same steps."""
    teacher = story.base().requires_grad_(False)
    settings, steps = story.settings, story.steps("distill")
    dim = settings.dim // 2
    student = Decoder(teacher.head.weight.shape[0], dim, max(1, settings.layers - 1))
    batches = text_batches(story.data.text, steps, settings.batch)

    def loss_of(engine: Engine, model: Model, batch: Batch) -> Tensor:
        with torch.no_grad():
            taught = teacher(batch.tokens)
        hidden = model(batch.tokens)
        return engine.distill(hidden, model.head, batch.targets, taught, teacher.head)

    alone = {story.engines[0].name: clone(student)}
    only = story._replace(engines=story.engines[:1])
    train(only, "distill", alone, cross_entropy, batches, 3e-3)
    before = text_loss(story, *alone.values())
    models = story.engine_models(student, qlora=False)
    runs, tokens = train(story, "distill", models, loss_of, batches, 3e-3)
    student = models[story.engines[0].name]
    save(story.out / "distill" / "model.safetensors", student.state_dict())
    after = text_loss(story, student)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    notes = [
        f"{sizes[1]:,} parameters instead of {sizes[0]:,}; the teacher's loss {text_loss(story, teacher):.3f}"
    ]
    metric = "held-out loss, student alone → taught"
    return Result(metric, before, after, False, before, "tokens", tokens, runs, notes)


def prune(pattern: str, stage: str, story: Story) -> Result:
    """Half of the linear layers' weights go, and the others learn the text again."""
    model = story.base().requires_grad_(True)
    whole = text_loss(story, model)
    masks = {
        name: FINEFUSE.prune_mask(layer.weight.detach(), pattern)
        for name, layer in linears(model).items()
    }

    def keep_pruned(model: Model) -> None:
        with torch.no_grad():
            for name, layer in linears(model).items():
                layer.weight.mul_(masks[name])

    keep_pruned(model)
    before = text_loss(story, model)
    models = story.engine_models(model, qlora=False)
    batches = text_batches(story.data.text, story.steps("prune"), story.settings.batch)
    runs, tokens = train(story, "prune", models, cross_entropy, batches, 1e-3, keep_pruned)
    model = models[story.engines[0].name]
    save(story.out / stage / "model.safetensors", model.state_dict())
    after = text_loss(story, model)
    notes = [f"before pruning {whole:.3f}; without recovery {before:.3f}"]
    metric = "held-out loss, pruned → recovered"
    return Result(metric, before, after, False, whole + 0.1, "tokens", tokens, runs, notes)


STAGES: dict[str, Callable[[Story], Result]] = {
    "pretrain": pretrain,
    "quantize": quantize,
    "sft": sft,
    "preference": preference,
    "policy": partial(policy, plain_words, "policy", "share of plain words", 0.05),
    "reward": reward,
    "rlhf": partial(policy, reward_model, "rlhf", "reward model's score", 0.1),
    "distill": distill,
    "prune 50%": partial(prune, "50%", "prune 50%"),
    "prune 2:4": partial(prune, "2:4", "prune 2:4"),
}
TITLES = {
    "pretrain": "base model",
    "quantize": "NF4",
    "sft": "QLoRA supervised",
    "preference": "preference",
    "policy": "policy, verified",
    "reward": "reward model",
    "rlhf": "policy, judged",
    "distill": "distillation",
    "prune 50%": "pruned to 50%",
    "prune 2:4": "pruned to 2:4",
}
