"""Which backend runs: the choice, what it refuses, what info() and check() say."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")

import finefuse as ff
from conftest import GPU, unavailable
from finefuse import _backend

needs_emulated = pytest.mark.skipif(
    bool(unavailable("cuda")) or GPU, reason=unavailable("cuda") or "there is a GPU"
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FINEFUSE_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**env, **environment}
    )


def test_choice_is_scoped_and_named():
    assert _backend.chosen == "auto"
    with ff.backend("eager"):
        assert _backend.chosen == "eager"
        with ff.backend("cpu"):
            assert ff.info()["backend"] == "cpu"
        assert _backend.chosen == "eager"
        with pytest.raises(ZeroDivisionError), ff.backend("cpu"):
            raise ZeroDivisionError
        assert _backend.chosen == "eager"
    assert _backend.chosen == "auto"
    for wrong in ("gpu", "", None, 3):
        with pytest.raises(
            ValueError, match=r"backend: .*; allowed: 'auto', 'cpu', 'cuda', 'triton'"
        ):
            ff.backend(wrong).__enter__()
    assert _backend.chosen == "auto"


def test_backward_runs_where_its_forward_ran(place, monkeypatch):
    """Also when the `with` has ended by then."""
    seen = []
    launch = _backend.launch
    monkeypatch.setattr(
        _backend,
        "launch",
        lambda *args: (seen.append((_backend.in_force(), args[1])), launch(*args))[1],
    )
    x = torch.randn(3, 9, device=place.device, requires_grad=True)
    y = torch.tensor([1, 2, 3], device=place.device)
    lp = ff.token_logprobs(x, y)
    with ff.backend("auto"):
        lp.sum().backward()
        assert _backend.chosen == "auto"
    want = [(place.backend, "token_logprobs"), (place.backend, "token_logprobs_backward")]
    assert seen == ([] if place.backend == "eager" else want)


def test_eager_differentiates_twice():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, -100, 4])
    mask = torch.tensor([True, False, True])
    with ff.backend("eager"):
        for f in (
            lambda z: ff.token_logprobs(z, y, stats=True, temperature=0.7)[1].sum(),
            lambda z: ff.cross_entropy(z, y, label_smoothing=0.1),
            lambda z: (
                ff.preference_loss(z[:, 0], z[:, 1], loss="ipo", normalize_lengths=False).loss
            ),
            lambda z: ff.sequence_logprobs(z[:, 0], mask=mask).exp(),
        ):
            assert torch.autograd.gradgradcheck(f, (x,))


def test_eager_under_compile():
    """The choice is seen while compiling: plain operations in the graph, no op of ours."""
    x, y = torch.randn(3, 5), torch.tensor([1, 2, 4])
    graphs = []

    def record(module, inputs):
        graphs.append(str(module.graph))
        return module

    torch._dynamo.reset()
    step = torch.compile(lambda z: ff.token_logprobs(z, y), backend=record, fullgraph=True)
    torch.testing.assert_close(step(x), ff.token_logprobs(x, y))
    with ff.backend("eager"):
        torch.testing.assert_close(step(x), ff.token_logprobs(x, y))
    assert "finefuse" in graphs[0]
    assert "finefuse" not in graphs[1]
    assert len(graphs) == 2


def test_eager_under_compile_keeps_infinities():
    """A scalar is a tensor there: what it multiplies by 0 must not become NaN."""
    x, y = torch.randn(3, 5), torch.tensor([1, 2, 4])
    x[:, 0] = -torch.inf
    chosen = torch.tensor([-torch.inf, 3.0])
    with ff.backend("eager"):
        torch._dynamo.reset()
        compiled = torch.compile(ff.cross_entropy, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, y), ff.cross_entropy(x, y))
        loss = torch.compile(
            lambda c: ff.preference_loss(c, torch.zeros(2), reduction="none").loss, backend="eager"
        )
        assert loss(chosen)[0] == torch.inf
        assert torch.isfinite(loss(chosen)[1])


def test_a_backward_in_another_thread_changes_nothing_here(place):
    """As autograd's threads for GPUs do: the choice of the process stays what it is."""
    x = torch.randn(40, 3000, device=place.device, requires_grad=True)
    y = torch.zeros(40, dtype=torch.long, device=place.device)
    loss = ff.token_logprobs(x, y).sum()
    seen = set()
    with ff.backend("auto"):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        while thread.is_alive():
            seen.add(_backend.chosen)
            seen.add(_backend.in_force())
        thread.join()
    assert seen <= {"auto"}
    assert _backend.chosen == place.backend
    assert x.grad is not None


def test_eager_checks_what_kernels_check():
    x, y = torch.randn(3, 5), torch.tensor([1, 2, 4])
    with ff.backend("eager"):
        with pytest.raises(ValueError, match="targets: element 1 is 5; allowed are 0 to 4"):
            ff.cross_entropy(x, torch.tensor([1, 5, 4]))
        with pytest.raises(ValueError, match="temperature: 0.0"):
            ff.token_logprobs(x, y, temperature=0.0)
        with pytest.raises(ValueError, match="label_smoothing: 1.5"):
            ff.cross_entropy(x, y, label_smoothing=1.5)
        with pytest.raises(ValueError, match=r"targets: shape \(2,\)"):
            ff.token_logprobs(x, y[:2])
        with pytest.raises(ValueError, match="beta: -1"):
            ff.preference_loss(x[0], x[1], beta=-1.0)
        with pytest.raises(ValueError, match=r"mask: shape \(2,\)"):
            ff.sequence_logprobs(x[0], mask=torch.ones(2, dtype=torch.bool))
        with pytest.raises(ValueError, match="reduction: 'avg'"):
            ff.cross_entropy(x, y, reduction="avg")


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_backend_that_cannot_run_says_why():
    out = python(
        "import finefuse as ff\n"
        "for name in ('triton', 'cuda'):\n"
        "    try:\n"
        "        with ff.backend(name): pass\n"
        "        print(name, 'runs')\n"
        "    except RuntimeError as e:\n"
        "        print(e)"
    ).stdout
    assert "backend 'triton': " in out
    assert "triton runs" not in out
    assert "backend 'cuda': " in out or not unavailable("cuda")


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_environment():
    code = (
        "import torch, finefuse as ff\n"
        "print(ff.info()['backend'])\n"
        "try: print(ff.token_logprobs(torch.zeros(1, 4), torch.zeros(1, dtype=int)))\n"
        "except RuntimeError as e: print(e)"
    )
    out = python(code, FINEFUSE_BACKEND="triton")
    assert out.stdout.startswith("triton\nbackend 'triton' cannot run on tensors on cpu")
    out = python(code, FINEFUSE_BACKEND="eager")
    assert out.stdout == "eager\ntensor([-1.3863])\n"
    out = python(code, FINEFUSE_BACKEND="gpu")
    assert out.stdout == "auto\ntensor([-1.3863])\n"
    assert (
        "FINEFUSE_BACKEND='gpu' is ignored; allowed: auto, cpu, cuda, triton, eager" in out.stderr
    )


@needs_emulated
@pytest.mark.parametrize("on", ["1", "0"])
def test_check_on_every_call(on):
    out = python(
        "import torch, finefuse as ff\n"
        "with ff.backend('cuda'):\n"
        "    print(ff.token_logprobs(torch.zeros(1, 4), torch.full((1,), 9)))",
        FINEFUSE_CHECK=on,
    )
    if on == "1":
        assert (
            "ValueError: targets: an element was neither in [0, V) nor ignore_index" in out.stderr
        )
    else:
        assert out.stdout == "tensor([nan])\n"


def test_auto_table_and_architectures():
    """Every stem with GPU kernels has a line; machine code runs on its own major version, PTX on anything
    newer."""
    from test_layout import MISSING, stems

    on_gpus = [stem for stem in stems() if f"kernels/{stem}.py" not in MISSING]
    assert sorted(_backend.AUTO) == sorted(on_gpus)
    built = "80-real,90a-real,100-real,120"
    for device, runs in {
        (7, 5): False, (8, 0): True, (8, 6): True, (8, 9): True, (9, 0): True, (10, 0): True,
        (10, 3): True, (11, 0): False, (12, 0): True, (12, 1): True, (13, 0): True,
    }.items():  # fmt: skip
        assert _backend._covers(built, *device) is runs, device
    assert not _backend._covers("90a-real", 9, 1)
    assert _backend._covers("100a-real,103a-real", 10, 3)  # the first of its major is not the last
    assert _backend._covers("90", 10, 0)
    assert _backend._covers("80-virtual", 8, 6)
    assert _backend._covers("all-major", 9, 0)
    assert not _backend._covers("none", 9, 0)


def test_info_and_main():
    info = ff.info()
    assert info["finefuse"] == ff.__version__
    assert info["torch"] == torch.__version__
    out = python("import runpy; runpy.run_module('finefuse', run_name='__main__')").stdout
    for name in ("finefuse", "isa", "threads", "torch", "cuda", "triton", "backend"):
        assert any(line.startswith(name) for line in out.splitlines()), name


def test_other_devices_take_plain_operations():
    assert _backend.resolve("logprobs", torch.device("mps")) == "eager"
    with pytest.raises(RuntimeError, match="'cpu' cannot run on tensors on mps"), ff.backend("cpu"):
        _backend.resolve("logprobs", torch.device("mps"))
