"""What only a GPU can show: the mark of such tests, and a step in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GPU

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def capture(step: Callable[[], Any]) -> tuple[Any, Any]:
    """(the graph, what step() returned in it): nothing there may be allocated outside of torch's pool, and
    nothing may synchronise."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured
