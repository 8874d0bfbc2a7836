"""A softmax policy on a multi-armed bandit under four reward adjustments; saves a figure of the three
curves of each.

    python examples/bandit.py [--probs 0.2 0.5 0.8] [--steps 500] [--agents 1] [--figure bandit.png]

One agent runs on a NumPy stream, all four adjustments on the same one; with --agents N the curves are
means over N agents, which run in parallel.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
from finefuse.numpy import bandit

ADJUSTMENTS = {
    "none": {},
    "scale": {"scale": 2.0},
    "clip": {"clip_val": 0.5},
    "temp": {"temp": 1.0},
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bandit: {message}\n")  # one line


def arguments() -> argparse.Namespace:
    parser = Parser(prog="bandit", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--probs", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="of a reward"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--agents", type=int, default=1, help="curves are means over them")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("bandit.png"))
    parser.add_argument("--quick", action="store_true", help="at most 100 steps")
    args = parser.parse_args()
    if args.quick:
        args.steps = min(args.steps, 100)
    if args.steps < 1 or args.agents < 1:
        parser.error("--steps and --agents: 1 and above")
    return args


def run(args: argparse.Namespace, name: str) -> tuple[bandit.AgentRuns, float]:
    """What happened under an adjustment, arrays (agents, ...), and the seconds it took."""
    options = {"reward_adjust": name, **ADJUSTMENTS[name]}
    begin = time.perf_counter()
    if args.agents > 1:
        runs = bandit.train_agents(
            args.probs,
            n_agents=args.agents,
            n_steps=args.steps,
            lr=args.lr,
            seed=args.seed,
            **options,
        )
    else:
        env = bandit.MultiArmedBandit(args.probs, seed=args.seed)
        policy = bandit.SoftmaxPolicy(env.n_actions, lr=args.lr)
        arrays = bandit.train_agent(env, policy, args.steps, **options)
        runs = bandit.AgentRuns(*(a[None] for a in (*arrays, policy.logits)))
    return runs, time.perf_counter() - begin


def main() -> int:
    args = arguments()
    best = int(np.argmax(args.probs))
    results = {}
    try:
        env = bandit.MultiArmedBandit(args.probs, seed=0)
        bandit.train_agent(env, bandit.SoftmaxPolicy(env.n_actions), 1)  # first calls are slower
        print(f"{'':8}{'mean reward':>14}{'last quarter':>14}{'p(best arm)':>14}{'steps/s':>12}")
        for name in ADJUSTMENTS:
            runs, seconds = run(args, name)
            results[name] = runs
            p = np.exp(runs.logits - runs.logits.max(axis=1, keepdims=True))
            share = (p[:, best] / p.sum(axis=1)).mean()
            late = runs.rewards[:, -max(1, args.steps // 4) :].mean()
            rate = runs.rewards.size / seconds
            print(f"{name:8}{runs.rewards.mean():14.3f}{late:14.3f}{share:14.3f}{rate:12.2g}")
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        bandit.plot(results, args.figure)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"bandit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"figure: {args.figure}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("bandit: stopped", file=sys.stderr)
        sys.exit(130)
