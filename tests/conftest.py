"""Fixtures: every ISA level that this machine has, thread counts, seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Inductor's cache on disk does not know that an op's fake function changed since yesterday.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

try:
    import torch

    torch.manual_seed(0)
    # Without a GPU Triton's kernels run in its interpreter. It is asked for when triton is first imported.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
except ImportError:
    torch = None  # the tests that need it say so

from finefuse import _C

LEVELS = ["baseline", "avx2", "avx512", "avx512bf16"]
MACHINE_LEVELS = LEVELS[: LEVELS.index(_C.machine_isa()) + 1]


@pytest.fixture(params=MACHINE_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each level from baseline to the machine's."""
    before = _C._set_isa(request.param)
    yield request.param
    _C._set_isa(before)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leaves torch's thread count as it was."""
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class GraphCounter:
    """A torch.compile backend that runs the graph as it is and counts how often it was called."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, module: object, inputs: object) -> object:
        self.graphs += 1
        return module


@pytest.fixture
def counter() -> GraphCounter:
    return GraphCounter()


def pytest_report_header(config: pytest.Config) -> str:
    return f"finefuse: levels {', '.join(MACHINE_LEVELS)}; {os.cpu_count()} CPUs"
