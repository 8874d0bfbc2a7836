"""Which kernels run where: the choice of a backend, what this machine has, what GPU kernels flagged."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from . import _C

BACKENDS = ("auto", "cpu", "cuda", "triton", "eager")

# What `auto` takes on an NVIDIA GPU, stem by stem: the first that is installed and was built for the
# device. CUDA stands first where the two have not been measured yet; figures go beside the line.
AUTO = {
    "logprobs": ("cuda", "triton"),  # not measured yet
    "preference": ("cuda", "triton"),  # not measured yet
    "policy": ("cuda", "triton"),  # not measured yet
    "distill": ("cuda", "triton"),  # not measured yet
    "prune": ("cuda", "triton"),  # not measured yet
    "codebook": ("cuda", "triton"),  # not measured yet
    "lora": ("cuda", "triton"),  # not measured yet
    "dora": ("cuda", "triton"),  # not measured yet
    "segmented": ("cuda", "triton"),  # not measured yet
    # cuda: the library's products and CUDA row kernels; triton: one fused kernel for log-probabilities
    "linear": ("cuda", "triton"),  # not measured yet
}

# csrc/core/place.h, enum Flag
FLAGS = (
    "targets: an element was neither in [0, V) nor ignore_index; its row became NaN",
    "cu_seqlens: did not rise from 0 to the number of tokens; its sequences became NaN",
    "chosen_lengths, rejected_lengths: an element was negative or NaN; its pair became NaN",
    "adapter: an element was not in [-1, adapters); its row became NaN",
    "teacher_indices, teacher_logits: an index was not in [0, V) or came twice, or the probabilities of a "
    "row add up to more than 1; the row became NaN",
)

# The choice in force, for the whole process: compiled graphs must see it too. A backward runs in a thread
# of autograd's, on the backend of its forward: `running_backward` sets that for its own thread alone.
chosen = os.environ.get("FINEFUSE_BACKEND") or "auto"
if chosen not in BACKENDS:
    warnings.warn(
        f"FINEFUSE_BACKEND={chosen!r} is ignored; allowed: {', '.join(BACKENDS)}", stacklevel=2
    )
    chosen = "auto"

_check_always = os.environ.get("FINEFUSE_CHECK", "") not in ("", "0")
_flags: dict[Any, Any] = {}  # torch.device -> int32 tensor of len(FLAGS)
_flags_lock = threading.Lock()
_thread = threading.local()


# ---- the public three --------------------------------------------------------------------------


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operations inside the `with` on one backend.

        with finefuse.backend("triton"):
            ...

    Args:
        name: "auto" (the default: CPU kernels for CPU tensors, CUDA or Triton kernels for GPU
            tensors, plain torch operations where there is no kernel), "cpu", "cuda", "triton" (on a
            CPU in Triton's interpreter, where TRITON_INTERPRET=1), or "eager": plain torch operations on
            any device, differentiable any number of times.

    The choice holds for the whole process, not for one thread; FINEFUSE_BACKEND sets it from outside. A
    backward runs on the backend of its forward; a compiled graph on the one in force when it runs.

    Raises:
        ValueError: for another name. RuntimeError: where the backend cannot run here, or, at the
            operation, on tensors of another device.
    """
    global chosen
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r}; allowed: {', '.join(map(repr, BACKENDS))}")
    missing = _missing(name)
    if missing:
        raise RuntimeError(f"backend {name!r}: {missing}")
    before, chosen = chosen, name
    try:
        yield
    finally:
        chosen = before


@contextlib.contextmanager
def running_backward(name: str) -> Iterator[None]:
    """This thread alone runs on the backend `name`."""
    before = in_force()
    _thread.chosen = name
    try:
        yield
    finally:
        _thread.chosen = before if before != chosen else None


def in_force() -> str:
    """The choice for this thread."""
    return getattr(_thread, "chosen", None) or chosen


def check() -> None:
    """Raise what GPU kernels found wrong with their inputs since the last check.

    On a CPU a wrong index raises before anything is written. On a GPU looking at it would
    synchronise: the kernel never follows it, writes NaN for its row and sets a flag, which this function
    reads (it synchronises every device used). Under FINEFUSE_CHECK=1 every call checks itself.

    Raises:
        ValueError: saying which argument.
    """
    for flags in list(_flags.values()):
        if flags.is_cuda:
            import torch

            torch.cuda.synchronize(flags.device)
        found = [text for text, bad in zip(FLAGS, flags.tolist(), strict=True) if bad]
        if found:
            flags.zero_()
            raise ValueError("; ".join(found))


def info() -> dict[str, str]:
    """What this machine runs, as text: version, instruction set, threads, torch, CUDA, Triton, backend."""
    from importlib.metadata import version

    lines = {
        "finefuse": version("finefuse"),
        "isa": f"{_C.isa()} (this machine runs up to {_C.machine_isa()})",
        "huge pages": _huge_pages(),
        "backend": chosen,
    }
    if find_spec("torch") is None:
        return lines | {"torch": "not installed: finefuse.numpy works"}
    import torch

    lines["threads"] = str(torch.get_num_threads())
    lines["torch"] = torch.__version__
    lines["gpu"] = (
        ", ".join(
            "{} (sm_{}{})".format(
                torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)
            )
            for i in range(torch.cuda.device_count())
        )
        or "none"
    )
    for name in ("cuda", "triton"):
        lines[name] = _missing(name) or "available"
    if _installed("finefuse._CUDA"):
        from . import _CUDA

        lines["cuda"] += f"; built for {_CUDA.architectures}"
    if _installed("triton"):
        lines["triton"] += f"; {version('triton')}"
    lines["auto on a GPU"] = ", ".join(f"{stem}: {' or '.join(c)}" for stem, c in AUTO.items())
    return lines


def _huge_pages() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"


# ---- what runs ---------------------------------------------------------------------------------


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0") and _installed("triton")


def _emulated() -> bool:
    """Whether _CUDA is the build for the tests, which runs the kernels on the CPU."""
    if not _installed("finefuse._CUDA"):
        return False
    from . import _CUDA

    return _CUDA.emulated


@functools.cache
def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _missing(name: str) -> str:
    """Why this backend cannot run here; empty if it can."""
    if name in ("auto", "cpu", "eager"):
        return ""
    import torch

    if name == "triton":
        if not _installed("triton"):
            return "triton is not installed: pip install triton"
        if interpreting() or torch.cuda.is_available() or torch.xpu.is_available():
            return ""
        return "no GPU (on a CPU, TRITON_INTERPRET=1 runs it in Triton's interpreter)"
    if not _installed("finefuse._CUDA"):
        return "this build has no CUDA kernels: install from source with FINEFUSE_CUDA=ON and nvcc"
    if torch.version.hip:
        return "this torch is for ROCm"
    if torch.cuda.is_available() and _emulated():
        return "_CUDA was built for CPU tensors (FINEFUSE_CUDA=ON_CPU)"
    if torch.cuda.is_available() or _emulated():
        return ""
    return "no NVIDIA GPU that torch can use"


def _kernels(stem: str, kind: str, index: int | None) -> str:
    """What `auto` takes on a device that is not a CPU; "eager" where there is no kernel for it."""
    import torch

    if kind == "xpu":
        return "triton" if "triton" in AUTO[stem] and not _missing("triton") else "eager"
    if kind != "cuda":
        return "eager"
    for name in AUTO[stem]:
        if _missing(name):
            continue
        if name == "cuda":
            from . import _CUDA

            major, minor = torch.cuda.get_device_capability(index)
            if not _covers(_CUDA.architectures, major, minor):
                continue
        return name
    return "eager"


# While compiling a constant: Dynamo need not follow the imports. It is what
# torch.compiler.assume_constant_result sets, without importing the compiler here.
_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _covers(architectures: str, major: int, minor: int) -> bool:
    """Whether machine code for these CMake architectures ("80-real,90a-real,120") runs on the device."""
    if architectures in ("all", "all-major"):
        return True
    for part in architectures.split(","):
        number, _, form = part.partition("-")
        digits = number.rstrip("af")
        if not digits.isdecimal():  # "none"
            continue
        built = divmod(int(digits), 10)
        alone = number.endswith("a")  # code of one device
        same_or_older = built[1] == minor or (built[1] < minor and not alone)
        if form != "virtual" and built[0] == major and same_or_older:
            return True
        if form != "real" and built <= (major, minor) and not alone:
            return True  # PTX, which the driver compiles
    return False


def resolve(stem: str, device: Any, name: str | None = None) -> str:
    """The backend that runs a stem's operations on tensors of a device, by the choice in force or `name`."""
    name, kind = name or chosen, device.type
    if name == "eager":
        return "eager"
    if kind == "cpu" or kind == "meta":
        if name in ("auto", "cpu"):
            return "cpu"
        if (name == "triton" and interpreting()) or (name == "cuda" and _emulated()):
            return name
    elif name == "auto":
        return _kernels(stem, kind, device.index)
    elif name == "triton" and kind in ("cuda", "xpu"):
        return "triton"
    elif name == "cuda" and kind == "cuda":
        return "cuda"
    raise RuntimeError(f"backend {name!r} cannot run on tensors on {device}")


def launch(stem: str, name: str, first: Any, args: tuple[Any, ...]) -> None:
    """Run a kernel of a stem where its first tensor is, if that is not the CPU's own kernels."""
    import torch

    device = first.device
    where = resolve(stem, device, in_force())
    if where == "cpu":
        getattr(_C, name)(first, *args, torch.get_num_threads())
        return
    if where == "eager":
        raise RuntimeError(
            f"finefuse has no kernel for {device}: {stem}.{name}; its public functions have "
            'plain torch operations (backend "eager")'
        )
    if missing := _missing(where):
        raise RuntimeError(f"backend {where!r}: {missing}")
    flags = _flags.get(device)
    if flags is None:
        flags = _make_flags(device)
    module = (
        importlib.import_module("finefuse._CUDA")
        if where == "cuda"
        else importlib.import_module(f"finefuse.kernels.{stem}")
    )
    if device.type == "cpu":
        getattr(module, name)(first, *args, (0, flags))
    else:
        with getattr(torch, device.type).device(device):
            stream = torch.cuda.current_stream(device).cuda_stream if where == "cuda" else 0
            getattr(module, name)(first, *args, (stream, flags))
    if _check_always and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        check()


def _make_flags(device: Any) -> Any:
    """The flags of a device, at its first kernel."""
    import torch

    with _flags_lock:
        if device not in _flags:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "finefuse: call the operation once before it is captured in a CUDA graph, as a "
                    "warm-up: its first call on a device makes what all later ones share"
                )
            flags = torch.zeros(len(FLAGS), dtype=torch.int32, device=device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # any stream may set one from here on
            _flags[device] = flags
        return _flags[device]
