"""The bandit: one agent against the plain NumPy program, many agents, wrong arguments, the figure."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import finefuse.numpy as ffn
import numpy as np
import pytest
from finefuse import _C
from finefuse.numpy import bandit
from finefuse.reference import bandit as reference
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
ADJUSTMENTS = {
    "none": {},
    "scale": {"scale": -2.5},
    "clip": {"clip_val": 0.7},
    "temp": {"temp": 0.4},
}


def keywords(how: str) -> dict:
    return {"reward_adjust": how, **ADJUSTMENTS[how]}


def against_the_program(probs, n_steps, *, seed=0, lr=0.1, logits=None, how="none", baseline=0.0):
    """Runs both on the same stream; rewards, adjusted rewards, stream and logits must be the program's.

    Actions are not returned: with another one anywhere the logits would differ.
    """
    env = bandit.MultiArmedBandit(probs, seed=seed)
    policy = bandit.SoftmaxPolicy(env.n_actions, lr=lr)
    want_logits = np.zeros(len(probs))
    if logits is not None:
        policy.logits[...] = want_logits[...] = logits
    kept = policy.logits
    rng = np.random.RandomState(seed)
    got = bandit.train_agent(env, policy, n_steps, **keywords(how), baseline=baseline)
    _, *want = reference.train_agent(
        np.array(probs, float), want_logits, rng, n_steps, lr, baseline, how=how, **ADJUSTMENTS[how]
    )
    for name, a, b in zip(("rewards", "adjusted", "cumulative"), got, want, strict=True):
        assert a.dtype == np.float64
        assert a.shape == (n_steps,)
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert policy.logits is kept
    scale = max(1.0, float(np.abs(want_logits[np.isfinite(want_logits)]).max()))
    np.testing.assert_allclose(policy.logits, want_logits, rtol=0, atol=1e-12 * scale)
    for a, b in zip(env.rng.get_state(), rng.get_state(), strict=True):
        assert np.array_equal(a, b)


# ---- one agent ---------------------------------------------------------------------------------

# 1; fewer, as many and more than a vector of 2, 4 or 8; 7, 8, 9: NumPy sums from 8 on in eight parts; the
# most in registers (4 vectors) and one more; 128, 129: from there on it halves; 1000: the largest promised
ARMS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 16, 17, 32, 33, 100, 128, 129, 257, 1000)


@pytest.mark.parametrize("how", ADJUSTMENTS)
@pytest.mark.parametrize("arms", ARMS)
def test_is_the_plain_program(arms, how, isa):
    for seed in range(2 if arms > 100 else 4):
        probs = np.random.default_rng(seed).random(arms)
        against_the_program(probs, 150, seed=seed, how=how, baseline=0.25 * seed)


@pytest.mark.parametrize("how", ADJUSTMENTS)
def test_many_seeds(how):
    for seed in range(100):
        against_the_program(
            [0.2, 0.5, 0.8, 0.3, 0.1, 0.6, 0.4, 0.7, 0.9, 0.05], 100, seed=seed, how=how
        )


@pytest.mark.parametrize("how", ADJUSTMENTS)
def test_long(how, isa):
    against_the_program(np.linspace(0.1, 0.9, 10), 5000, how=how, baseline=0.5)


@pytest.mark.parametrize("lr", [0.0, 1e-8, 3.0, 50.0, 1e6, 1e300])
@pytest.mark.parametrize("arms", [2, 10, 100])
def test_learning_rates(arms, lr, isa):
    """Large ones saturate the softmax; small differences would grow where a policy unlearns."""
    for baseline in (0.0, 0.5):
        against_the_program(np.linspace(0.1, 0.9, arms), 200, lr=lr, baseline=baseline)


@pytest.mark.parametrize("spread", [1.0, 100.0, 600.0, 800.0, 1e5])
def test_far_logits(spread, isa):
    """exp to denormal numbers and to 0, and an action that is shut off."""
    for arms in (3, 10, 100):
        logits = np.random.default_rng(arms).standard_normal(arms) * spread
        logits[1] = -np.inf
        against_the_program(np.full(arms, 0.5), 100, logits=logits, how="scale")


def test_certain_rewards(isa):
    """A probability of 0 never pays, one of 1 always."""
    against_the_program([0.0, 1.0], 200)
    against_the_program([0.0] * 5, 50)
    against_the_program([1.0] * 5, 50)
    env = bandit.MultiArmedBandit([1.0, 1.0], seed=0)
    assert (bandit.train_agent(env, bandit.SoftmaxPolicy(2), 100)[0] == 1).all()
    env = bandit.MultiArmedBandit([0.0], seed=0)
    assert (bandit.train_agent(env, bandit.SoftmaxPolicy(1), 100)[0] == 0).all()


def test_no_steps_and_no_update():
    against_the_program([0.2, 0.8], 0)
    env, policy = bandit.MultiArmedBandit([0.2, 0.8], seed=0), bandit.SoftmaxPolicy(2)
    bandit.train_agent(env, policy, 100, "scale", scale=0.0)  # no advantage: nothing is learnt
    assert (policy.logits == 0).all()


def test_two_calls_are_one(monkeypatch):
    """The stream and the policy go on; blocks of a call are not seen."""
    parts = []
    for block, calls in ((bandit._BLOCK, [500]), (bandit._BLOCK, [123, 377]), (64, [500])):
        monkeypatch.setattr(bandit, "_BLOCK", block)
        env, policy = bandit.MultiArmedBandit([0.2, 0.8, 0.5], seed=3), bandit.SoftmaxPolicy(3)
        runs = [bandit.train_agent(env, policy, n) for n in calls]
        parts.append((np.concatenate([r[0] for r in runs]), policy.logits))
        np.testing.assert_array_equal(runs[-1][2], np.cumsum(runs[-1][0]))
    for rewards, logits in parts[1:]:
        np.testing.assert_array_equal(rewards, parts[0][0])
        np.testing.assert_array_equal(logits, parts[0][1])


def test_global_generator():
    """seed=None: the generator that numpy.random.seed sets."""
    runs = []
    for _ in range(2):
        np.random.seed(11)  # noqa: NPY002
        env = bandit.MultiArmedBandit([0.2, 0.8])
        runs.append(bandit.train_agent(env, bandit.SoftmaxPolicy(2), 100)[0])
    after = np.random.random_sample()  # noqa: NPY002
    np.testing.assert_array_equal(*runs)
    rng = np.random.RandomState(11)
    rng.random_sample(200)
    assert rng.random_sample() == after


def test_logits_of_any_strides():
    policies = [bandit.SoftmaxPolicy(4) for _ in range(2)]
    policies[1].logits = np.zeros(8)[::2]
    for policy in policies:
        bandit.train_agent(bandit.MultiArmedBandit([0.1, 0.4, 0.9, 0.3], seed=1), policy, 200)
    np.testing.assert_array_equal(policies[0].logits, policies[1].logits)
    assert policies[0].logits.any()


def test_parts_by_hand():
    """The classes' own methods are the loop that train_agent runs."""
    env, policy = bandit.MultiArmedBandit([0.2, 0.5, 0.8], seed=0), bandit.SoftmaxPolicy(3, lr=0.3)
    rewards = []
    for _ in range(300):
        action = policy.sample(env.rng)
        rewards.append(env.step(action))
        policy.update(action, 2 * rewards[-1], baseline=0.5)
    other, fused = bandit.MultiArmedBandit([0.2, 0.5, 0.8], seed=0), bandit.SoftmaxPolicy(3, lr=0.3)
    got = bandit.train_agent(other, fused, 300, "scale", scale=2.0, baseline=0.5)
    np.testing.assert_array_equal(got[0], rewards)
    np.testing.assert_allclose(fused.logits, policy.logits, rtol=0, atol=1e-12)
    assert abs(policy.probs().sum() - 1) < 1e-15
    assert other.rng.random_sample() == env.rng.random_sample()


@settings(max_examples=60, deadline=None)
@given(
    probs=st.lists(st.floats(0, 1), min_size=1, max_size=40),
    n_steps=st.integers(0, 80),
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(0, 20),
    how=st.sampled_from(sorted(ADJUSTMENTS)),
    baseline=st.floats(-2, 2),
)
def test_random(probs, n_steps, seed, lr, how, baseline):
    against_the_program(probs, n_steps, seed=seed, lr=lr, how=how, baseline=baseline)


# ---- adjustments -------------------------------------------------------------------------------


def adjusted_values(**options) -> tuple[float, float]:
    """What rewards of 0 and of 1 become."""
    values = []
    for p in (0.0, 1.0):
        env, policy = bandit.MultiArmedBandit([p], seed=0), bandit.SoftmaxPolicy(1)
        values.append(float(bandit.train_agent(env, policy, 1, **options)[1][0]))
    return values[0], values[1]


def test_adjustments():
    assert adjusted_values() == (0, 1)
    assert adjusted_values(reward_adjust="scale", scale=3.0) == (0, 3)
    assert adjusted_values(reward_adjust="clip", clip_val=0.25) == (0, 0.25)
    assert adjusted_values(reward_adjust="clip", clip_val=2) == (0, 1)
    low, high = adjusted_values(reward_adjust="temp", temp=2.0)
    assert high == 1
    assert abs(low - np.exp(-0.5)) < 1e-15
    assert adjusted_values(reward_adjust="temp", temp=1e-3) == (0, 1)  # e^{1000} overflows
    assert adjusted_values(reward_adjust="none", scale=3.0, temp=2.0) == (0, 1)


# ---- many agents -------------------------------------------------------------------------------


@pytest.mark.parametrize("agents", [1, 7, 8, 33])  # of a group of 4, 8 or 16: fewer, one, more
@pytest.mark.parametrize("arms", [1, 3, 10, 100])
def test_agents_do_not_depend_on_threads_or_number(agents, arms, isa):
    probs = np.random.default_rng(arms).random(arms)
    ffn.set_num_threads(1)
    runs = bandit.train_agents(probs, n_agents=agents, n_steps=200, seed=5, baseline=0.3)
    assert runs.rewards.shape == runs.adjusted.shape == runs.cumulative.shape == (agents, 200)
    assert runs.logits.shape == (agents, arms)
    assert runs.rewards.dtype == np.float64
    for threads in (2, 3, 8):
        ffn.set_num_threads(threads)
        again = bandit.train_agents(probs, n_agents=agents, n_steps=200, seed=5, baseline=0.3)
        for a, b in zip(runs, again, strict=True):
            np.testing.assert_array_equal(a, b)
    more = bandit.train_agents(probs, n_agents=agents + 9, n_steps=300, seed=5, baseline=0.3)
    np.testing.assert_array_equal(more.rewards[:agents, :200], runs.rewards)
    np.testing.assert_array_equal(runs.cumulative, np.cumsum(runs.rewards, axis=1))
    np.testing.assert_array_equal(runs.adjusted, runs.rewards)


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds, as the paper has them."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (b >> 32) ^ counter[1] ^ key[0], b & 0xFFFFFFFF,
            (a >> 32) ^ counter[3] ^ key[1], a & 0xFFFFFFFF,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


class Counters:
    """What train_agents draws for an agent, as a RandomState would give it."""

    def __init__(self, seed: int, agent: int) -> None:
        self.seed, self.agent, self.step, self.rest = seed, agent, 0, []

    def random_sample(self) -> float:
        if not self.rest:
            w = philox4x32(
                [
                    self.agent & 0xFFFFFFFF,
                    self.agent >> 32,
                    self.step & 0xFFFFFFFF,
                    self.step >> 32,
                ],
                [self.seed & 0xFFFFFFFF, self.seed >> 32],
            )
            self.rest = [((w[i] >> 5) * 2**26 + (w[i + 1] >> 6)) / 2**53 for i in (2, 0)]
            self.step += 1
        return self.rest.pop()

    def choice(self, n: int, p: np.ndarray) -> int:
        cdf = p.cumsum()
        return int((cdf / cdf[-1]).searchsorted(self.random_sample(), side="right"))


def test_philox_known_answers():
    """From the vectors that the authors publish with Random123."""
    assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip


@pytest.mark.parametrize("how", ADJUSTMENTS)
def test_agents_are_the_plain_program_on_counters(how, isa):
    seed = 2**63 + 12345
    for arms in (1, 2, 10, 50):
        probs = np.random.default_rng(arms).random(arms)
        runs = bandit.train_agents(
            probs, n_agents=11, n_steps=60, seed=seed, lr=0.5, baseline=0.1, **keywords(how)
        )
        for agent in (0, 3, 10):
            logits = np.zeros(arms)
            _, *want = reference.train_agent(
                probs, logits, Counters(seed, agent), 60, 0.5, 0.1, how=how, **ADJUSTMENTS[how]
            )
            np.testing.assert_array_equal(runs.rewards[agent], want[0])
            np.testing.assert_array_equal(runs.adjusted[agent], want[1])
            np.testing.assert_array_equal(runs.cumulative[agent], want[2])
            np.testing.assert_allclose(runs.logits[agent], logits, rtol=0, atol=1e-12)


def test_agents_statistics(isa):
    """They find the best arm; different agents and seeds differ."""
    runs = bandit.train_agents([0.2, 0.5, 0.9], n_agents=400, n_steps=2000, seed=1)
    first, last = runs.rewards[:, :20].mean(), runs.rewards[:, -200:].mean()
    assert abs(first - 1.6 / 3) < 0.05
    assert 0.87 < last <= 0.91
    assert (runs.logits.argmax(axis=1) == 2).mean() > 0.97
    assert len(np.unique(runs.rewards, axis=0)) == 400
    other = bandit.train_agents([0.2, 0.5, 0.9], n_agents=400, n_steps=2000, seed=2)
    assert (other.rewards != runs.rewards).any(axis=1).all()
    fair = bandit.train_agents([0.5] * 4, n_agents=1000, n_steps=100, seed=3).rewards
    assert abs(fair.mean() - 0.5) < 5 * 0.5 / np.sqrt(fair.size)  # five standard errors
    assert abs(np.corrcoef(fair[:, :-1].ravel(), fair[:, 1:].ravel())[0, 1]) < 5 / np.sqrt(
        fair.size
    )


def test_agents_at_the_edges(isa):
    runs = bandit.train_agents([0.0, 1.0], n_agents=9, n_steps=100, lr=1e6)
    assert np.isfinite(runs.logits).all()
    assert (runs.rewards[:, 1:] <= 1).all()
    assert bandit.train_agents([0.5], n_agents=3, n_steps=0).rewards.shape == (3, 0)
    assert (bandit.train_agents([0.5], n_agents=3, n_steps=0).logits == 0).all()
    assert bandit.train_agents([0.5], n_agents=0, n_steps=5).cumulative.shape == (0, 5)
    assert (bandit.train_agents([1.0], n_agents=3, n_steps=5).rewards == 1).all()
    assert (bandit.train_agents([0.0], n_agents=3, n_steps=5).rewards == 0).all()


def test_agents_without_a_seed():
    runs = []
    for seed in (4, 4, 5):
        np.random.seed(seed)  # noqa: NPY002
        runs.append(bandit.train_agents([0.5], n_agents=2, n_steps=64, seed=None).rewards)
    assert (runs[0] == runs[1]).all()
    assert (runs[0] != runs[2]).any()


# ---- wrong arguments ---------------------------------------------------------------------------


def test_wrong_bandits_and_policies():
    for probs, error, message in (
        ([0.5, 1.5], ValueError, r"probs: element 1 is 1\.5; allowed: 0 to 1"),
        ([-0.1, 0.5], ValueError, r"probs: element 0 is -0\.1; allowed: 0 to 1"),
        ([0.5, np.nan], ValueError, "probs: element 1 is nan"),
        ([], ValueError, r"probs: shape \(0,\); allowed: \(n_actions,\), at least one"),
        ([[0.5]], ValueError, r"probs: shape \(1, 1\)"),
        (["a"], TypeError, "probs: a sequence of numbers"),
    ):
        with pytest.raises(error, match=message):
            bandit.MultiArmedBandit(probs)
        with pytest.raises(error, match=message):
            bandit.train_agents(probs, n_agents=1, n_steps=1)
    with pytest.raises(ValueError, match="seed: -1; "):
        bandit.MultiArmedBandit([0.5], seed=-1)
    for n_actions, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="n_actions: "):
            bandit.SoftmaxPolicy(n_actions)
    for lr, error in (
        (-0.1, ValueError),
        (np.inf, ValueError),
        (np.nan, ValueError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match="lr: "):
            bandit.SoftmaxPolicy(2, lr=lr)
    env, policy = bandit.MultiArmedBandit([0.5, 0.5], seed=0), bandit.SoftmaxPolicy(2)
    for action in (-1, 2):
        with pytest.raises(ValueError, match=f"action: {action}; allowed: 0 to 1"):
            env.step(action)
        with pytest.raises(ValueError, match=f"action: {action}; allowed: 0 to 1"):
            policy.update(action, 1.0)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"reward_adjust": "max"}, ValueError, "reward_adjust: 'max'; allowed: 'none', 'scale'"),
        ({"reward_adjust": "clip"}, ValueError, "clip_val: None; reward_adjust='clip' needs"),
        ({"reward_adjust": "clip", "clip_val": -1.0}, ValueError, r"clip_val: -1\.0; allowed: 0"),
        ({"reward_adjust": "clip", "clip_val": np.nan}, ValueError, "clip_val: nan"),
        ({"reward_adjust": "temp", "temp": 0.0}, ValueError, r"temp: 0\.0; allowed: positive"),
        ({"reward_adjust": "temp", "temp": -1.0}, ValueError, r"temp: -1\.0; allowed: positive"),
        ({"temp": np.nan}, ValueError, "temp: nan"),
        ({"scale": np.inf}, ValueError, "scale: inf; allowed: finite"),
        ({"scale": "2"}, TypeError, "scale: a number"),
        ({"baseline": np.nan}, ValueError, "baseline: nan; allowed: finite"),
        ({"n_steps": -1}, ValueError, "n_steps: -1; allowed: 0 and above"),
        ({"n_steps": 1.5}, TypeError, "n_steps: "),
        ({"reward_adjust": "scale", "scale": 1e308}, ValueError, "lr: .* could leave float64"),
    ],
)
def test_wrong_training(bad, error, message):
    env, policy = bandit.MultiArmedBandit([0.5, 0.5], seed=0), bandit.SoftmaxPolicy(2)
    with pytest.raises(error, match=message):
        bandit.train_agent(env, policy, **{"n_steps": 500, **bad})
    assert env.rng.random_sample() == np.random.RandomState(0).random_sample()  # nothing drawn
    with pytest.raises(error, match=message):
        bandit.train_agents([0.5, 0.5], n_agents=2, **{"n_steps": 500, **bad})


def test_wrong_objects_and_seeds():
    env, policy = bandit.MultiArmedBandit([0.5, 0.5], seed=0), bandit.SoftmaxPolicy(2)
    with pytest.raises(TypeError, match="env: a MultiArmedBandit, not list"):
        bandit.train_agent([0.5], policy)
    with pytest.raises(TypeError, match="policy: a SoftmaxPolicy, not int"):
        bandit.train_agent(env, 2)
    with pytest.raises(ValueError, match=r"policy\.logits: shape \(3,\); allowed: \(2,\)"):
        bandit.train_agent(env, bandit.SoftmaxPolicy(3))
    for logits in ([0, np.nan], [0, np.inf], [-np.inf, -np.inf]):
        policy.logits = np.array(logits, float)
        with pytest.raises(ValueError, match=r"policy\.logits: allowed: finite"):
            bandit.train_agent(env, policy)
    policy.logits = np.zeros(2, np.float32)
    with pytest.raises(TypeError, match=r"policy\.logits: a float64"):
        bandit.train_agent(env, policy)
    for seed, error in ((-1, ValueError), (2**64, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="seed: "):
            bandit.train_agents([0.5], n_agents=1, n_steps=1, seed=seed)
    for bad, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="n_agents: "):
            bandit.train_agents([0.5], n_agents=bad, n_steps=1)
    with pytest.raises(TypeError, match="probs"):
        _C.bandit_agent(None, 1, None, 0, [0, 1], [0, 1], 0.1, None, None, None, None, 0.0)


# ---- the figure, the example, the modules ------------------------------------------------------


def test_one_module():
    import finefuse as ff

    assert ff.bandit.train_agent is ffn.bandit.train_agent is bandit.train_agent
    assert ff.bandit.__all__ == sorted(ff.bandit.__all__)


def panels(results, path, monkeypatch):
    """The figure that plot saves."""
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))
    )
    bandit.plot(results, path)
    return seen[0]


def test_plot(tmp_path, monkeypatch):
    results = {}
    for how in ADJUSTMENTS:
        env, policy = bandit.MultiArmedBandit([0.2, 0.5, 0.8], seed=0), bandit.SoftmaxPolicy(3)
        results[how] = bandit.train_agent(env, policy, 500, **keywords(how))
    figure = panels(results, tmp_path / "one.png", monkeypatch)
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert [re.sub(r" \(.*", "", ax.get_title()) for ax in figure.axes] == [
        "rewards", "adjusted rewards", "cumulative rewards",
    ]  # fmt: skip
    for ax in figure.axes:
        assert ax.get_xlabel() == "step"
        assert ax.get_ylabel()
        assert [line.get_label() for line in ax.lines] == list(ADJUSTMENTS)
        assert len({(line.get_color(), line.get_linewidth()) for line in ax.lines}) == 4
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(ADJUSTMENTS)
    for line, result in zip(figure.axes[2].lines, results.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), result[2])
    smooth, rewards = figure.axes[0].lines[0].get_ydata(), results["none"][0]  # over 50 steps
    assert abs(smooth[-1] - rewards[-50:].mean()) < 1e-12
    assert smooth[0] == rewards[0]
    assert abs(smooth[3] - rewards[:4].mean()) < 1e-12


def test_plot_of_runs(tmp_path, monkeypatch):
    runs = bandit.train_agents([0.2, 0.8], n_agents=50, n_steps=30)
    figure = panels(runs, str(tmp_path / "many.svg"), monkeypatch)
    np.testing.assert_allclose(
        figure.axes[2].lines[0].get_ydata(), runs.cumulative.mean(axis=0), rtol=1e-12
    )
    assert (tmp_path / "many.svg").read_text().lstrip().startswith("<?xml")


def test_wrong_plots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    one = np.zeros(3)
    for results in (
        {},
        {"a": (one, one)},
        {"a": (one, one, np.zeros(4))},
        {"a": 3},
        (one[:0],) * 3,
    ):
        with pytest.raises(ValueError, match="results: "):
            bandit.plot(results, tmp_path / "no.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        bandit.plot((one, one, one), tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_example(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "examples/bandit.py")]
    figure = tmp_path / "out" / "bandit.png"
    out = subprocess.run(
        [*command, "--quick", "--figure", str(figure)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert figure.exists()
    assert all(f"\n{how}" in out.stdout for how in ADJUSTMENTS)
    for bad in (
        ["--probs", "0.5", "1.5"],
        ["--steps", "-1"],
        ["--figure", str(tmp_path / "a.nonsense")],
    ):
        out = subprocess.run(
            [*command, "--quick", *bad], capture_output=True, text=True, cwd=tmp_path
        )
        assert out.returncode == 2, bad
        assert len(out.stderr.strip().splitlines()) == 1
        assert "Traceback" not in out.stderr
