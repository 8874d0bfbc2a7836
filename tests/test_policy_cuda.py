"""Rows of logits that one block, a cluster of blocks, or nobody keeps: what is particular to CUDA.

tests/cuda_on_cpu keeps 2 KB a block and runs clusters of up to 8, so that short rows show all three.
"""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import GPU, unavailable
from tolerances import check

pytestmark = pytest.mark.skipif(bool(unavailable("cuda")), reason=unavailable("cuda"))

# Elements of a row: for one block, for clusters of 2, 4 and 8, and read twice, whatever the type. Odd
# ones, so that rows begin anywhere in a vector and the last block of a cluster has the least; of 513
# float32 it has all but nothing. On a GPU those are the long ones.
ROWS = (257, 513, 521, 1031, 2049, 4099, 9001)
LONG = (128256, 151936, 262144, 1000003) if GPU else ()


def batch(vocab, dtype):
    """Six rows: -inf here and there, the largest in every part in turn, parts of -inf alone, one ignored."""
    z = torch.randn(6, vocab + 1)[:, :vocab] * 3
    z[:, ::5] = -math.inf
    for r in range(5):
        z[r, (vocab - 1) * r // 4] = 9.0
    z[4, : vocab // 2] = -math.inf
    y = torch.tensor([0, vocab - 1, vocab // 2, vocab // 3, vocab - 1, -100])
    live = torch.arange(5), y[:5]
    z[live] = z[live].clamp(min=-4.0)
    z[5] = math.nan
    return z.to(dtype), y


def policy(z, y, A):
    return ff.policy_loss_from_logits(
        z.unflatten(0, (2, 3)), y.view(2, 3), advantages=A, entropy_coef=0.01, temperature=0.7
    ).loss


def cross_entropy(z, y, A):
    return ff.cross_entropy(z, y) * A[0]


def smoothed(z, y, A):  # where a logit of -inf would make it inf
    return ff.cross_entropy(z.clamp(min=-20.0), y, label_smoothing=0.1)


def run(backend, loss, z, y, A):
    device = "cuda" if GPU and backend == "cuda" else "cpu"
    z, y, A = z.to(device, copy=True).requires_grad_(), y.to(device), A.to(device)
    with ff.backend(backend):
        value = loss(z, y, A)
        value.backward()
    return value.detach().cpu(), z.grad[:5].cpu(), z.grad[5:].cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [*ROWS, *LONG])
def test_rows_in_clusters(vocab, dtype):
    """As on the CPU, and the same bits again."""
    z, y = batch(vocab, dtype)
    A = torch.tensor([1.5, -0.5], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for loss in (policy, cross_entropy, smoothed):
        value, gradient, ignored = run("cuda", loss, z, y, A)
        truth, true_gradient, _ = run("cpu", loss, z.double(), y, A.double())
        usual, usual_gradient, _ = run("cpu", loss, z, y, A)
        check(f"{loss.__name__}, gradient", gradient, usual_gradient, true_gradient)
        check(f"{loss.__name__}", value, usual, truth)
        if loss is not smoothed:  # clamp's own gradient of NaN
            assert (ignored == 0).all()
        again = run("cuda", loss, z, y, A)
        assert torch.equal(again[0], value)
        assert torch.equal(again[1], gradient)
