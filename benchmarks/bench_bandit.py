"""The bandit: one agent step by step, and many at once. Times are of 1,000 steps (of one agent each).

Peers: the loop of the first notebook in NumPy (finefuse.reference), the same in pure Python with math.exp,
and NumPy vectorised over agents, in place where it can be. On a CPU: a simulator has no GPU kernels.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import finefuse.numpy as ffn
import numpy as np
from finefuse.numpy import bandit
from finefuse.reference import bandit as reference

from .measure import Row, Size, compare_calls

LR = 0.1


def ours(probs: Any, steps: int) -> Any:
    env = bandit.MultiArmedBandit(probs, seed=0)
    return bandit.train_agent(env, bandit.SoftmaxPolicy(env.n_actions, LR), steps)


def numpy_loop(probs: Any, steps: int) -> Any:
    return reference.train_agent(
        probs, np.zeros(len(probs)), np.random.RandomState(0), steps, LR, how="none"
    )


def pure_python(probs: list[float], steps: int) -> Any:
    logits, draw, exp = [0.0] * len(probs), random.Random(0).random, math.exp
    rewards = []
    for _ in range(steps):
        top = max(logits)
        e = [exp(z - top) for z in logits]
        running = list(itertools.accumulate(e))
        total = running[-1]
        action = min(bisect.bisect_right(running, draw() * total), len(e) - 1)
        reward = 1.0 if draw() < probs[action] else 0.0
        if reward:
            by = LR * reward / total
            logits = [z - by * w for z, w in zip(logits, e, strict=True)]
            logits[action] += LR * reward
        rewards.append(reward)
    return rewards, rewards, list(itertools.accumulate(rewards))


def ours_agents(probs: Any, agents: int, steps: int, threads: int) -> Any:
    before = ffn.get_num_threads()
    ffn.set_num_threads(threads)
    try:
        return bandit.train_agents(probs, n_agents=agents, n_steps=steps, lr=LR)
    finally:
        ffn.set_num_threads(before)


def numpy_agents(probs: Any, agents: int, steps: int) -> Any:
    rng, rows = np.random.default_rng(0), np.arange(agents)
    logits = np.zeros((agents, len(probs)))
    e, running = np.empty_like(logits), np.empty_like(logits)
    rewards = np.empty((agents, steps))
    for t in range(steps):
        np.subtract(logits, logits.max(axis=1, keepdims=True), out=e)
        np.exp(e, out=e)
        np.cumsum(e, axis=1, out=running)
        total = running[:, -1]
        below = running <= (rng.random(agents) * total)[:, None]
        action = np.minimum(below.sum(axis=1), len(probs) - 1)
        reward = (rng.random(agents) < probs[action]).astype(np.float64)
        np.multiply(e, (LR * reward / total)[:, None], out=e)
        np.subtract(logits, e, out=logits)
        logits[rows, action] += LR * reward
        rewards[:, t] = reward
    return rewards, rewards, np.cumsum(rewards, axis=1), logits


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    if device != "cpu":
        return
    every = (10,) if size == "standard" else (10, 1000)
    for arms in every:
        steps = (1000 if quick else 20000) if arms == 10 else 1000
        probs = np.linspace(0.1, 0.9, arms)
        runs: dict[str, Callable[[], Any]] = {
            "finefuse": functools.partial(ours, probs, steps),
            "pure Python": functools.partial(pure_python, probs.tolist(), steps),
            "NumPy loop": functools.partial(numpy_loop, probs, steps),
        }
        case = f"one agent, {arms} arms, 1,000 steps"
        yield compare_calls(case, runs, device, steps // 1000, rounds=9)
    agents, threads = (200 if quick else 2000), ffn.get_num_threads()
    for arms in every:
        steps = 100 if arms == 10 else 10
        probs = np.linspace(0.1, 0.9, arms)
        runs = {
            f"finefuse, {threads} threads": functools.partial(
                ours_agents, probs, agents, steps, threads
            ),
            "finefuse, 1 thread": functools.partial(ours_agents, probs, agents, steps, 1),
            "NumPy over agents": functools.partial(numpy_agents, probs, agents, steps),
        }
        case = f"{agents} agents, {arms} arms, 1,000 of their steps"
        yield compare_calls(case, runs, device, agents * steps // 1000, rounds=9)
