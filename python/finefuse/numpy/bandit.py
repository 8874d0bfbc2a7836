"""A multi-armed bandit and softmax policies that learn on it by REINFORCE, one agent or thousands.

    env = bandit.MultiArmedBandit([0.2, 0.5, 0.8], seed=0)
    policy = bandit.SoftmaxPolicy(env.n_actions, lr=0.1)
    rewards, adjusted, cumulative = bandit.train_agent(env, policy, n_steps=500)

A step draws an action from p = softmax(logits), then a reward, 1 with the action's probability, else 0;
with r' the adjusted reward and b the baseline

    logits += lr·(onehot(action) - p)·(r' - b)

which is REINFORCE for a softmax policy (Williams 1992; Sutton and Barto, section 2.8).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import inf
from typing import Any, NamedTuple

import numpy as np

from .. import _C
from .._args import choice, require
from ._array import FLOAT64, Array, get_num_threads, integer, scalar

ADJUSTMENTS = {"none": 0, "scale": 1, "clip": 2, "temp": 3}

_BLOCK = 1 << 12  # steps of a call of the kernel: 64 kB of random numbers, which stay in the cache


# ---- the two parts -----------------------------------------------------------------------------


def _probabilities(probs: Any) -> Array:
    try:
        p = np.array(probs, FLOAT64)
    except (TypeError, ValueError):
        raise TypeError(f"probs: a sequence of numbers, not {probs!r}") from None
    if p.ndim != 1 or p.size == 0:
        raise ValueError(f"probs: shape {p.shape}; allowed: (n_actions,), at least one action")
    bad = np.flatnonzero(~((p >= 0) & (p <= 1)))
    if bad.size:
        raise ValueError(f"probs: element {bad[0]} is {float(p[bad[0]])!r}; allowed: 0 to 1")
    return p


def _rate(lr: Any) -> float:
    lr = scalar("lr", lr)
    require(0 <= lr < inf, "lr", lr, "0 and above, finite")
    return lr


class MultiArmedBandit:
    """Actions that pay 1 with a probability of their own, else 0.

    Args:
        probs: (n_actions,), each in [0, 1].
        seed: what numpy.random.RandomState takes; None: NumPy's global generator, which
            numpy.random.seed sets.

    Attributes:
        probs: (n_actions,) float64. rng: the numpy.random.RandomState. n_actions: how many.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, probs: Any, seed: Any = None) -> None:
        self.probs = _probabilities(probs)
        self.n_actions = self.probs.size
        try:
            # what numpy.random.seed and numpy.random.choice are methods of
            self.rng: np.random.RandomState = (
                np.random.mtrand._rand if seed is None else np.random.RandomState(seed)
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"seed: {seed!r}; {error}") from None

    def step(self, action: Any) -> float:
        """The reward of an action, 1.0 or 0.0: one number of the stream is drawn."""
        action = integer("action", action)
        require(0 <= action < self.n_actions, "action", action, f"0 to {self.n_actions - 1}")
        return float(self.rng.random_sample() < self.probs[action])

    pull = step


class SoftmaxPolicy:
    """Draws actions from softmax(logits); the logits begin at 0.

    Args:
        n_actions: at least 1.
        lr: the learning rate, 0 and above.

    Attributes:
        logits: (n_actions,) float64, updated in place. lr: the learning rate. n_actions: how many.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, n_actions: Any, lr: Any = 0.1) -> None:
        self.n_actions = integer("n_actions", n_actions)
        require(self.n_actions > 0, "n_actions", n_actions, "1 and above")
        self.lr = _rate(lr)
        self.logits = np.zeros(self.n_actions, FLOAT64)

    def probs(self) -> Array:
        """softmax(logits), (n_actions,)."""
        e = np.exp(self.logits - np.max(self.logits))
        return e / e.sum()

    def sample(self, rng: np.random.RandomState) -> int:
        """An action: one number of the stream is drawn."""
        return int(rng.choice(self.n_actions, p=self.probs()))

    def update(self, action: Any, adjusted: Any, baseline: Any = 0.0) -> None:
        """logits += lr·(onehot(action) - p)·(adjusted - baseline), in place."""
        action = integer("action", action)
        require(0 <= action < self.n_actions, "action", action, f"0 to {self.n_actions - 1}")
        gradient = -self.probs()
        gradient[action] += 1.0
        self.logits += (
            self.lr * gradient * (scalar("adjusted", adjusted) - scalar("baseline", baseline))
        )


# ---- training ----------------------------------------------------------------------------------


def _table(
    reward_adjust: Any, scale: Any, clip_val: Any, temp: Any, baseline: Any
) -> tuple[list[float], list[float]]:
    """The adjusted rewards of 0 and of 1, and the same less the baseline."""
    how = choice("reward_adjust", reward_adjust, ADJUSTMENTS)
    scale, temp = scalar("scale", scale), scalar("temp", temp)
    baseline = scalar("baseline", baseline)
    require(-inf < scale < inf, "scale", scale, "finite")
    require(0 < temp < inf, "temp", temp, "positive and finite")
    require(-inf < baseline < inf, "baseline", baseline, "finite")
    if clip_val is not None:
        clip_val = scalar("clip_val", clip_val)
        require(clip_val >= 0, "clip_val", clip_val, "0 and above")
    elif how == ADJUSTMENTS["clip"]:
        raise ValueError("clip_val: None; reward_adjust='clip' needs a number, 0 and above")
    adjusted = [0.0, 1.0]
    if how == ADJUSTMENTS["scale"]:
        adjusted = [0.0 * scale, 1.0 * scale]
    elif how == ADJUSTMENTS["clip"]:
        adjusted = [0.0, min(1.0, clip_val)]
    elif how == ADJUSTMENTS["temp"]:
        with np.errstate(over="ignore"):
            top = float(np.exp(1.0 / temp))
        # where that overflows: the limit
        adjusted = [1.0 / top, top / top] if top < inf else [0.0, 1.0]
    return adjusted, [value - baseline for value in adjusted]


def _check_reach(largest: float, n_steps: int, lr: float, advantage: list[float]) -> None:
    """A step moves a logit by at most lr·|advantage|: none may leave float64."""
    by = lr * max(map(abs, advantage))
    if not largest + n_steps * by < np.finfo(FLOAT64).max:
        raise ValueError(
            f"lr: {lr!r}; with advantages up to {max(map(abs, advantage))!r} and {n_steps} steps the "
            "logits could leave float64"
        )


def train_agent(
    env: MultiArmedBandit,
    policy: SoftmaxPolicy,
    n_steps: Any = 500,
    reward_adjust: str = "none",
    scale: Any = 1.0,
    clip_val: Any = None,
    temp: Any = 1.0,
    baseline: Any = 0.0,
) -> tuple[Array, Array, Array]:
    """Train one policy, step by step, on the environment's own stream of random numbers.

    Each step draws two numbers from env.rng: the action's, as RandomState.choice does, and the reward's.
    Actions and rewards are those of the same loop in plain NumPy (finefuse.reference.bandit), the state of
    env.rng afterwards too, and the logits agree to 1e-12.

    Args:
        env: a MultiArmedBandit. policy: a SoftmaxPolicy of as many actions; its logits are updated in
            place.
        n_steps: 0 and above.
        reward_adjust: what the policy learns from, of a reward r: "none": r; "scale": r·scale;
            "clip": clip(r, 0, clip_val); "temp": e^{r/temp} / e^{1/temp}.
        scale: finite. clip_val: 0 and above, needed by "clip". temp: positive.
        baseline: what is subtracted from the adjusted reward, finite.

    Returns:
        (rewards, adjusted, cumulative), each (n_steps,) float64; `cumulative` sums the rewards.

    Raises:
        TypeError, ValueError: naming the argument, before anything is drawn or written.
    """
    if not isinstance(env, MultiArmedBandit):
        raise TypeError(f"env: a MultiArmedBandit, not {type(env).__name__}")
    if not isinstance(policy, SoftmaxPolicy):
        raise TypeError(f"policy: a SoftmaxPolicy, not {type(policy).__name__}")
    probs, lr = _probabilities(env.probs), _rate(policy.lr)
    n_steps = integer("n_steps", n_steps)
    require(n_steps >= 0, "n_steps", n_steps, "0 and above")
    adjusted_of, advantage = _table(reward_adjust, scale, clip_val, temp, baseline)
    logits = policy.logits
    if not isinstance(logits, np.ndarray) or logits.dtype != FLOAT64:
        raise TypeError("policy.logits: a float64 numpy.ndarray")
    if logits.shape != probs.shape or not logits.flags.writeable:
        raise ValueError(f"policy.logits: shape {logits.shape}; allowed: {probs.shape}, writeable")
    if np.isnan(logits).any() or not -inf < logits.max() < inf:
        raise ValueError("policy.logits: allowed: finite numbers and, but for all, -inf")
    largest = float(np.abs(logits[logits > -inf]).max())
    _check_reach(largest, n_steps, lr, advantage)

    walked = np.array(logits)  # native, contiguous; what the kernel updates
    rewards, adjusted, cumulative = (np.empty(n_steps, FLOAT64) for _ in range(3))
    try:
        for begin in range(0, n_steps, _BLOCK):
            part = slice(begin, min(begin + _BLOCK, n_steps))
            steps = part.stop - begin
            _C.bandit_agent(
                probs, probs.size, env.rng.random_sample(2 * steps), steps, adjusted_of, advantage,
                lr, walked, rewards[part], adjusted[part], cumulative[part],
                float(cumulative[begin - 1]) if begin else 0.0,
            )  # fmt: skip
    finally:  # also what was learnt before an interruption
        logits[...] = walked
    return rewards, adjusted, cumulative


class AgentRuns(NamedTuple):
    """What many agents did."""

    rewards: Array
    """(n_agents, n_steps) float64, 0 or 1."""
    adjusted: Array
    """(n_agents, n_steps) float64, what the policies learnt from."""
    cumulative: Array
    """(n_agents, n_steps) float64, the sums of the rewards."""
    logits: Array
    """(n_agents, n_actions) float64, after the last step."""


def train_agents(
    probs: Any,
    *,
    n_agents: Any,
    n_steps: Any,
    lr: Any = 0.1,
    seed: Any = 0,
    reward_adjust: str = "none",
    scale: Any = 1.0,
    clip_val: Any = None,
    temp: Any = 1.0,
    baseline: Any = 0.0,
) -> AgentRuns:
    """Train many independent policies, each from logits 0 on random numbers of its own.

    The numbers of a step are Philox4x32-10 of (seed; agent, step): they depend neither on the number of
    threads (finefuse.numpy.set_num_threads) nor on n_agents and n_steps, so that more agents or steps
    extend a run. Between instruction sets results may differ in the last bits.

    Args:
        probs: (n_actions,), each in [0, 1].
        n_agents, n_steps: 0 and above.
        lr: the learning rate, 0 and above.
        seed: 0 to 2^64 - 1; None draws one from NumPy's global generator.
        reward_adjust, scale, clip_val, temp, baseline: as in `train_agent`.

    Returns:
        AgentRuns(rewards, adjusted, cumulative, logits).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    p, lr = _probabilities(probs), _rate(lr)
    n_agents, n_steps = integer("n_agents", n_agents), integer("n_steps", n_steps)
    require(n_agents >= 0, "n_agents", n_agents, "0 and above")
    require(n_steps >= 0, "n_steps", n_steps, "0 and above")
    if seed is None:
        seed = int(np.random.randint(0, 2**63, dtype=np.int64))  # noqa: NPY002
    elif isinstance(seed, np.integer):
        seed = int(seed)
    if not isinstance(seed, int):
        raise TypeError(f"seed: an int or None, not {seed!r}")
    require(0 <= seed < 2**64, "seed", seed, "0 to 2**64 - 1")
    adjusted_of, advantage = _table(reward_adjust, scale, clip_val, temp, baseline)
    _check_reach(0.0, n_steps, lr, advantage)
    shape = (n_agents, n_steps)
    runs = AgentRuns(*(np.empty(s, FLOAT64) for s in (shape, shape, shape, (n_agents, p.size))))
    _C.bandit_agents(
        p, p.size, n_agents, n_steps, seed, adjusted_of, advantage, lr,
        runs.logits, runs.rewards, runs.adjusted, runs.cumulative, get_num_threads(),
    )  # fmt: skip
    return runs


# ---- the figure --------------------------------------------------------------------------------

_PANELS = ("rewards", "adjusted rewards", "cumulative rewards")
# Told apart by the colour-blind; wide below narrow, so that curves that coincide are all seen.
_COLOURS = ("#56b4e9", "#e69f00", "#007d5b", "#000000", "#cc79a7", "#d55e00", "#0072b2")
_WIDTHS = (5.0, 3.4, 2.0, 0.9)


def _curves(name: str, result: Any) -> list[Array]:
    """The three arrays of a result, each (agents, steps)."""
    try:
        arrays = [np.asarray(a, FLOAT64) for a in result[:3]]
    except (TypeError, ValueError, KeyError):
        arrays = []
    shapes = {a.shape for a in arrays}
    if len(arrays) != 3 or len(shapes) != 1 or arrays[0].ndim not in (1, 2) or 0 in arrays[0].shape:
        raise ValueError(
            f"results: {name!r}; allowed: (rewards, adjusted, cumulative) of one shape, (n_steps,) or "
            "(n_agents, n_steps), at least one step, as train_agent and train_agents return them"
        )
    return [np.atleast_2d(a) for a in arrays]


def _moving_average(values: Array, window: int) -> Array:
    """The mean of each value and up to window - 1 before it."""
    sums = np.cumsum(values)
    counts = np.minimum(np.arange(1, values.size + 1), window)
    sums[window:] -= np.cumsum(values)[:-window]
    return sums / counts


def plot(results: Any, path: str | os.PathLike[str]) -> None:
    """Draw rewards, adjusted rewards and cumulative rewards over the steps, a panel each, into a file.

    Rewards are 0 or 1: the first two panels show moving averages, over the number of steps in their
    titles; of many agents all panels show the mean.

    Args:
        results: {name: result}, a curve for each in every panel, or one result; a result is what
            `train_agent` or `train_agents` returned: (rewards, adjusted, cumulative, ...).
        path: of the file; its suffix is the format (.png, .svg, .pdf).

    Raises:
        ImportError: without matplotlib. ValueError: where a result is none.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ImportError("bandit.plot draws with matplotlib: pip install matplotlib") from None
    named = dict(results) if isinstance(results, Mapping) else {"": results}
    if not named:
        raise ValueError("results: empty; allowed: at least one result")
    curves = {name: _curves(str(name), result) for name, result in named.items()}
    agents = min(c[0].shape[0] for c in curves.values())
    longest = max(c[0].shape[1] for c in curves.values())
    window = max(1, longest // (10 if agents < 20 else 100))
    figure = Figure((13, 4.2), layout=ConstrainedLayoutEngine(wspace=0.06), dpi=150)
    for panel, (ax, title) in enumerate(zip(figure.subplots(1, 3), _PANELS, strict=True)):
        for i, (name, arrays) in enumerate(curves.items()):
            values = arrays[panel]
            mean, steps = values.mean(axis=0), np.arange(1, values.shape[1] + 1)
            if panel < 2:
                mean = _moving_average(mean, window)
            colour = _COLOURS[i % len(_COLOURS)]
            width = _WIDTHS[min(i, len(_WIDTHS) - 1)]
            ax.plot(steps, mean, color=colour, linewidth=width, label=str(name))
        averaged = f" (mean of {window} steps)" if panel < 2 and window > 1 else ""
        ax.set_title(title + averaged)
        ax.set_xlabel("step")
        ax.set_ylabel(title.removesuffix("s") if panel < 2 else "sum of rewards")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    if any(str(name) for name in curves):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 7), handlelength=4
        )
    figure.savefig(path)
