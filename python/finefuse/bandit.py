"""The softmax-policy bandit, `finefuse.numpy.bandit`: a simulator on NumPy arrays, without torch."""

from .numpy.bandit import (
    AgentRuns,
    MultiArmedBandit,
    SoftmaxPolicy,
    plot,
    train_agent,
    train_agents,
)

__all__ = [
    "AgentRuns",
    "MultiArmedBandit",
    "SoftmaxPolicy",
    "plot",
    "train_agent",
    "train_agents",
]
