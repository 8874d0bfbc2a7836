"""Fixtures: every ISA level and every backend that this machine has, thread counts, seeds."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest

# Caches of graphs on disk do not know that an op's fake function changed since yesterday, and yesterday's
# shapes are not today's. What Inductor still keeps is machine code, by its source: 3 s of g++ each.
for cache in (
    "TORCHINDUCTOR_FX_GRAPH_CACHE",
    "TORCHINDUCTOR_AUTOGRAD_CACHE",
    "TORCH_DYNAMO_AUTOMATIC_DYNAMIC_LOCAL_PGO",
):
    os.environ[cache] = "0"

# Before anything loads OpenMP or NumPy's BLAS. Where there are more threads than cores, two workers of
# pytest-xdist or a build beside the tests, threads that wait in a loop hold up those that they wait for:
# test_lora.py's test_shapes took 5 to 9 times as long, and a product of 8 rows in NumPy 170 ms for 0.2 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

try:
    import torch

    torch.manual_seed(0)
    GPU = torch.cuda.is_available()
    if not GPU:  # before anybody imports triton
        os.environ["TRITON_INTERPRET"] = "1"
except ImportError:
    torch = None  # the tests that need it say so
    GPU = False

try:
    from hypothesis import settings

    # A landing is judged by the same examples each time; everyday runs look for new ones.
    settings.register_profile("ci", derandomize=True, deadline=None, database=None)
    if os.environ.get("CI"):
        settings.load_profile("ci")
except ImportError:
    pass

import finefuse.numpy as ffn
from finefuse import _C

LEVELS = ["baseline", "avx2", "avx512", "avx512bf16"]
MACHINE_LEVELS = LEVELS[: LEVELS.index(_C.machine_isa()) + 1]


@pytest.fixture(params=MACHINE_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each level from baseline to the machine's."""
    before = _C._set_isa(request.param)
    yield request.param
    _C._set_isa(before)


class Place(NamedTuple):
    """A backend and the device whose tensors it takes."""

    backend: str
    device: str

    def put(self, *tensors: Any) -> list[Any]:
        return [t if t is None else t.to(self.device) for t in tensors]


def unavailable(backend: str) -> str:
    """Why a backend cannot be tested here; empty if it can."""
    if torch is None:
        return "torch is not installed"
    if backend == "triton" and find_spec("triton") is None:
        return "triton is not installed"
    if backend == "cuda" and find_spec("finefuse._CUDA") is None:
        return "built without _CUDA (FINEFUSE_CUDA=ON, or ON_CPU where there is no GPU)"
    if backend == "cuda":
        from finefuse import _CUDA

        if _CUDA.emulated == GPU:
            return "_CUDA was built with FINEFUSE_CUDA=" + ("ON_CPU" if GPU else "ON; no GPU")
    return ""


def _is_compiled(variant: Any) -> None:
    """Triton kernels are compiled for GPUs by compile_triton.py: it must know all that is launched."""
    import compile_triton

    unknown = compile_triton.pairs(variant) - compile_triton.known_pairs()
    assert not unknown, f"compile_triton.py does not compile {unknown}"


@pytest.fixture(scope="session")
def quick_interpreter() -> None:
    """Triton's interpreter looks through all of triton.language at each call of a function inside a kernel
    for what the kernel's start has replaced already, and finds nothing: a third of these tests' time. At the
    start itself it goes through every member of these modules, which are the same ones each time."""
    if GPU:
        return
    from triton.runtime import interpreter

    patch, tl = getattr(interpreter, "_patch_lang", None), interpreter.tl
    builtins: dict[Any, list[str]] = {}

    def remembered(pkg: Any, *builder_and_scope: Any) -> None:
        if pkg not in builtins:
            members = inspect.getmembers(pkg, tl.core.is_builtin)
            builtins[pkg] = [name for name, _ in members]
        for name in builtins[pkg]:
            if tl.core.is_builtin(member := getattr(pkg, name)):
                interpreter._patch_attr(pkg, name, member, *builder_and_scope)

    def once(function: Any) -> Any:
        langs = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        return patch(function) if any(tl.core.is_builtin(x.load) for x in langs) else None

    if patch is not None:
        interpreter._patch_lang = once
        interpreter._patch_builtin = remembered
    if hasattr(interpreter, "_get_np_dtype"):  # which makes a table of all types to look up one
        scalar = functools.cache(interpreter._get_np_dtype)

        def np_dtype(dtype: Any) -> Any:
            element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
            return scalar(tl.uint64 if isinstance(element, tl.pointer_type) else element)

        interpreter._get_np_dtype = np_dtype


@pytest.fixture
def triton_kernels(quick_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch is looked up in what compile_triton.py compiles."""
    import compile_triton

    launch = compile_triton.recording(_is_compiled, call=True)
    for module in compile_triton.MODULES:
        monkeypatch.setattr(module, "launch", launch)


@pytest.fixture(params=["cuda", "triton", "eager"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Runs the test on every backend beside the CPU's: on the GPU where there is one; else CUDA
    kernels on the CPU (tests/cuda_on_cpu) and Triton kernels in Triton's interpreter."""
    why = unavailable(request.param)
    if why:
        pytest.skip(why)
    import finefuse as ff

    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
    with ff.backend(request.param):
        yield Place(request.param, "cuda" if GPU else "cpu")
        ff.check()  # a flag that a test did not expect


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leaves the thread counts of torch and of finefuse.numpy as they were."""
    of_torch, of_numpy = torch and torch.get_num_threads(), ffn.get_num_threads()
    yield
    ffn.set_num_threads(of_numpy)
    if torch is not None:
        torch.set_num_threads(of_torch)


@pytest.fixture
def one_thread(threads: None) -> None:
    """Small products are slower on several; a test of threads sets its own numbers."""
    torch.set_num_threads(1)


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """chunk(n): n rows of logits exist at a time, in the losses from hidden states."""
    from linear_cases import use_chunks

    return lambda size: use_chunks(monkeypatch, size)


class GraphCounter:
    """A torch.compile backend that counts graphs and hands each to `backend`: "eager" runs it as it is,
    "aot_eager" makes its gradients, "inductor" its code, at some seconds of g++ a kernel."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs, self.backend = 0, "eager"

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.backend)(module, inputs)


@pytest.fixture
def counter() -> Iterator[GraphCounter]:
    counter = GraphCounter()
    yield counter
    assert counter.graphs > 0, "nothing was compiled"


@pytest.fixture
def peft():
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    return pytest.importorskip("peft", reason="peft is not installed")


def pytest_report_header(config: pytest.Config) -> str:
    backends = [b for b in ("cuda", "triton", "eager") if not unavailable(b)]
    where = "GPU" if GPU else "CPU"
    return (
        f"finefuse: levels {', '.join(MACHINE_LEVELS)}; {os.cpu_count()} CPUs; "
        f"backends beside cpu, on the {where}: {', '.join(backends)}"
    )
