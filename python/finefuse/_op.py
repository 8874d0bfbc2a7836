"""How an operation is wired in torch: the one piece that every stem reuses.

A stem defines *raw ops*, `finefuse::<name>_forward` and `finefuse::<name>_backward`, that know nothing of
autograd, and one public function that wraps them in a `torch.autograd.Function`:

    _KERNEL = kernel("stem", "name")                # _C's, _CUDA's or Triton's, where the tensor is
    NAME_FORWARD = raw_op("name_forward(Tensor x, float scale) -> Tensor", run=..., fake=...)

    class _Name(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):                 # saves, notes the backend, calls the raw op
        @staticmethod
        @once_differentiable                        # a double backward raises
        def backward(ctx, g):                       # calls the other raw op

    def name(x, *, scale=1.0):
        scale = scalar("scale", scale)
        if runs_eagerly("stem", x):                 # a device without a kernel, or by choice
            return eager.stem.name(x, scale)
        if wants_gradient(x):
            return _Name.apply(x, scale)
        return NAME_FORWARD(x, scale)               # a third of the cost

    composite("name(Tensor x, *, float scale=1.0) -> Tensor", name)   # torch.ops.finefuse.name

`raw_op` registers
- the function that runs, on CPUs and GPUs alike: it checks everything a kernel relies on (types, shapes,
  devices, scalars), makes the outputs and hands tensors to the kernel, which takes their addresses
  while it holds them;
- the fake function, for `torch.compile`: outputs from shapes alone, contiguous like the real ones;
- an overload `<name>.tensor` in which every `float` is a 0-d tensor. A Python float would be burnt into
  the graph, one graph a value; `scalar` makes the tensor while compiling, so that two graphs serve all;
- an autograd kernel that lets the call through but raises when a backward reaches it: torch's default
  for an op without a gradient is zeros and a warning.
"""

from __future__ import annotations

import functools
import numbers
import re
from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _C, _args, _backend
from ._args import Layout, check_row_shapes, overlaps, row_strides

_LIB = torch.library.Library("finefuse", "DEF")

DTYPES = {getattr(torch, name): number for name, number in _args.DTYPES.items()}
INDEX_DTYPES = (torch.int64, torch.int32)
WIDE = (torch.float32, torch.float64)

get_num_threads = torch.get_num_threads
_grad_enabled = torch.is_grad_enabled
_modes = torch._C._len_torch_dispatch_stack
# The hooks in force, or None; torch before 2.7 cannot tell.
_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_is_wrapped = torch._is_functional_tensor
_transforms = torch._C._are_functorch_transforms_active
_profiling = torch._C._autograd._profiler_enabled


# ---- registration ------------------------------------------------------------------------------


class _NoGradient(torch.autograd.Function):
    """Stands in the graph for a raw op that was called on tensors that require a gradient."""

    @staticmethod
    def forward(ctx: Any, name: str, below: Callable[..., Any], *args: Any) -> Any:
        ctx.name = name
        return below(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"finefuse::{ctx.name} is a raw op and has no gradient; "
            "call finefuse's public function, which has"
        )


def raw_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an op without autograd (see the module's docstring); call it with all arguments in order."""
    match = re.fullmatch(r"(\w+)\((.*)\) -> (.*)", schema)
    assert match, schema
    name, arguments, returns = match.groups()
    parsed = arguments.split(", ")
    floats = [i for i, a in enumerate(parsed) if a.startswith("float ")]
    tensors_end = 1 + max(i for i, a in enumerate(parsed) if a.startswith("Tensor"))
    mutates = "!" in arguments

    def run_tensor(*args: Any) -> Any:
        values = list(args)
        for i in floats:
            values[i] = values[i].item()
        return run(*values)

    def register(overload: str, schema: str, function: Callable[..., Any]) -> Any:
        _LIB.define(schema, tags=torch.Tag.pt2_compliant_tag)
        for key in ("CPU", "CUDA", "XPU"):
            _LIB.impl(overload, function, key)
        torch.library.register_fake(f"finefuse::{overload}", fake, lib=_LIB)
        op = getattr(getattr(torch.ops.finefuse, name), "tensor" if "." in overload else "default")

        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        end = None if "." in overload else tensors_end  # there the floats are tensors, too

        def autograd(*args: Any) -> Any:
            if _plain(args[:end]):
                return function(*args)
            if _has_tangent(args):
                raise RuntimeError(f"finefuse::{name} has no forward-mode derivative")
            if _grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
                if not mutates:
                    return _NoGradient.apply(name, below, *args)
                raise RuntimeError(
                    f"finefuse::{name} is a raw op that writes into an argument and has no gradient; "
                    "call finefuse's public function, which has"
                )
            return below(*args)

        _LIB.impl(overload, autograd, "Autograd")
        return op

    default = tensor = register(name, schema, run)
    first_float = floats[0] if floats else None
    if floats:
        tensors = [f"Tensor {a[6:]}" if a.startswith("float ") else a for a in parsed]
        tensor = register(
            f"{name}.tensor", f"{name}.tensor({', '.join(tensors)}) -> {returns}", run_tensor
        )

    def call(*args: Any) -> Any:
        if not is_compiling():
            if _plain(args[:tensors_end]):
                return run(*args)
            return default(*args)
        if first_float is not None and type(args[first_float]) is not float:
            return tensor(*args)
        return default(*args)

    return call


def _plain(args: tuple[Any, ...]) -> bool:
    """Ordinary CPU or CUDA tensors, no gradient wanted of this op, and nobody watching.

    Then the dispatcher would only look up the function; called at once it is 5 us sooner.
    """
    if watched():
        return False
    grad = _grad_enabled()
    for a in args:
        if type(a) is Tensor:
            if (
                not (a.is_cpu or a.is_cuda)
                or (grad and a.requires_grad)
                or a.is_neg()
                or a._is_zerotensor()
                or _is_wrapped(a)
            ):
                return False
        elif a is not None and isinstance(a, Tensor):
            return False
    return True


def watched() -> bool:
    """Whether a mode, a functorch transform, the profiler or forward-mode gradients look at every call."""
    return bool(_modes() or _transforms() or _profiling() or forward_ad._current_level >= 0)


def _has_tangent(args: tuple[Any, ...]) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    )


class _OnceOnly(torch.autograd.Function):
    """Ties gradients to all they were made from, and raises where they are differentiated again."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> Any:
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("finefuse: ops are once_differentiable; their gradient has no gradient")


class _Read:
    """A backward's ctx whose saved tensors are read already: where activations are recomputed
    (checkpointing) that can be done once."""

    __slots__ = ("_ctx", "saved_tensors")

    def __init__(self, ctx: Any) -> None:
        object.__setattr__(self, "_ctx", ctx)
        object.__setattr__(self, "saved_tensors", ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that is not differentiated itself: under create_graph a second one raises.

    It runs on the backend that the forward noted as ctx.backend. torch's own decorator lets it pass, as
    zeros, where the upstream gradient is a constant. The tensors that the gradient depends on must be
    among ctx.saved_tensors.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if is_compiling():
            return backward(ctx, *grads)
        if ctx.backend != _backend.in_force():
            with _backend.running_backward(ctx.backend):
                return wrapper(ctx, *grads)
        if not _grad_enabled():
            return backward(ctx, *grads)
        ctx = _Read(ctx)
        sources = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor)]
        with torch.no_grad():
            outputs = list(backward(ctx, *grads))
        places = [i for i, o in enumerate(outputs) if o is not None]
        tied = _OnceOnly.apply(len(places), *[outputs[i] for i in places], *sources)
        for i, o in zip(places, tied, strict=True):
            outputs[i] = o
        return tuple(outputs)

    return wrapper


def composite(schema: str, function: Callable[..., Any]) -> None:
    """Register a public function as `torch.ops.finefuse.<name>`; it differentiates through its parts.

    While compiling, its floats are constants of the graph; the public function's are not.
    """
    _LIB.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIB.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")


# ---- where it runs ------------------------------------------------------------------------------

_ON_CPU = ("auto", "cpu")


def kernel(stem: str, name: str) -> Callable[..., None]:
    """A stem's kernel of this name, called where its first argument is; see csrc/bindings/<stem>.h.

    The last argument of all, threads or stream, is added here.
    """
    cpu = getattr(_C, name)

    def call(first: Tensor, *args: Any) -> None:
        if first.is_cpu and _backend.in_force() in _ON_CPU:
            cpu(first, *args, get_num_threads())
        else:
            _backend.launch(stem, name, first, args)

    return call


def runs_eagerly(stem: str, tensor: Tensor) -> bool:
    """Whether the public function shall be plain torch operations: by choice, or for want of a kernel."""
    if tensor.is_cpu:
        return _backend.chosen == "eager"
    return _backend.resolve(stem, tensor.device) == "eager"


# ---- arguments ---------------------------------------------------------------------------------


def scalar(name: str, value: Any) -> Any:
    """A runtime number: a Python float in eager, a 0-d float64 tensor while compiling.

    Takes a number or a 0-d tensor (on which nothing is ever specialised). Its range is checked by
    the raw op, where it is a float in both cases.
    """
    if type(value) is float and not is_compiling():
        return value
    if isinstance(value, Tensor):
        if value.is_complex() or value.numel() != 1:
            raise ValueError(f"{name}: a number or a 0-d tensor, not of shape {tuple(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name}: has no gradient here; pass {name}.detach()")
        value = value.reshape(()).to(torch.float64)
        return value if is_compiling() else value.item()
    if is_compiling():
        return torch.ones((), dtype=torch.float64) * value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: a number or a 0-d tensor, not {value!r}")
    return float(value)


def shaped(y: Tensor, shape: Any) -> Tensor:
    """y, which nobody else holds, in another shape, and not as a view: callers may write into it."""
    return y if y.shape == shape else torch.ops.aten._unsafe_view(y, shape)


def wants_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast, as in torch.nn.functional.linear, wants products of x; None: its own."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def index_tensor(name: str, value: Any, other_name: str, other: Tensor) -> Tensor:
    """Indices as int64 or int32; smaller integers are widened, anything else refused."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: a tensor of integers, not {type(value).__name__}")
    if not (value.is_cpu and other.is_cpu):
        same_device(name, value, other_name, other)
    dtype = value.dtype
    if dtype is torch.int64 or dtype is torch.int32:
        return value
    if dtype in (torch.int8, torch.int16, torch.uint8):
        return value.to(torch.int64)
    raise TypeError(f"{name}: dtype {dtype}; allowed: int64, int32, int16, int8, uint8")


def mask_tensor(mask: Any) -> Tensor | None:
    """As bool, of a mask that is bool or a number that is not 0 where something counts."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: a tensor, not {type(mask).__name__}")
    return mask if mask.dtype is torch.bool else mask != 0


def mask_of(mask: Any, name: str, like: Tensor, shape: torch.Size) -> Tensor | None:
    """bool, of that shape, on the device of `like`, which the caller gave as `name`."""
    mask = mask_tensor(mask)
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask: shape {tuple(mask.shape)}; allowed: {tuple(shape)}")
    same_device("mask", mask, name, like)
    return mask


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def float_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: a tensor, not {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name}: dtype {value.dtype}; allowed: float32, bfloat16, float16, float64"
        )
    return value


def same_device(name: str, value: Tensor | None, other_name: str, other: Tensor) -> None:
    if value is not None and value.device != other.device:
        raise ValueError(f"{name}: on {value.device}; {other_name} is on {other.device}")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What statistics and losses come out as: float32, or float64 for float64 input."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def logit_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Layout]:
    """Logits as rows that a kernel can walk, and (dtype, rows, vocab, inner, outer and inner stride).

    Row r starts at element (r // inner)·outer_stride + (r % inner)·inner_stride. That covers
    contiguous tensors and slices such as logits[:, :-1] without a copy; other strides (a transposed
    last dimension, three or more uneven leading dimensions) are copied. Checks what kernels over
    rows rely on; whether the targets are in range is checked by the kernel.
    """
    shape, code = logits.shape, DTYPES.get(logits.dtype)
    if not (logits.is_cpu and targets.is_cpu):
        same_device("targets", targets, "logits", logits)
    if (
        code is None
        or targets.dtype not in INDEX_DTYPES
        or not shape
        or shape[:-1] != targets.shape
    ):
        check_rows(logits, targets)
    if shape[-1] == 0:
        check_rows(logits, targets)
    return float_rows(logits, targets.numel())


def float_rows(x: Tensor, rows: int) -> tuple[Tensor, Layout]:
    """The same of any (…, V) of a float type that was checked."""
    shape, code = x.shape, DTYPES[x.dtype]
    vocab = shape[-1]
    if x.is_contiguous():
        return x, (code, rows, vocab, rows, 0, vocab)
    if vocab == 1 or x.stride(-1) == 1:
        strides = row_strides(shape, x.stride())
        if strides is not None:
            return x, (code, rows, vocab, *strides)
    return float_rows(x.contiguous(), rows)


def check_rows(logits: Tensor, targets: Tensor, name: str = "targets") -> None:
    """Raise what is wrong with logits (…, V) and targets (…), if anything is."""
    float_tensor("logits", logits)
    if targets.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: dtype {targets.dtype}; allowed: int64, int32")
    check_row_shapes(logits.shape, targets.shape, name)


def check_targets(targets: Tensor, vocab: Any, ignore_index: int, name: str = "targets") -> None:
    """On a CPU, before anything is computed; a GPU's kernels, and those of a graph, flag a bad row."""
    if is_compiling() or not targets.is_cpu:
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if bad.any():
        i = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"{name}: element {i} is {int(targets.flatten()[i])}; allowed are 0 to {vocab - 1} and "
            f"ignore_index ({ignore_index})"
        )


def may_share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the memory that they span meets."""

    def span(t: Tensor) -> tuple[int, int]:
        if t.is_contiguous():
            return t.data_ptr(), t.data_ptr() + t.nbytes
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    if a.numel() == 0 or b.numel() == 0 or a.is_meta or b.is_meta:
        return False
    (begin, end), (first, last) = span(a), span(b)
    return first < end and begin < last


# ---- gradients ----------------------------------------------------------------------------------


def scaled(gradient: Tensor, mask: Tensor | None, g: Tensor) -> Tensor:
    """A gradient times a scalar from above; what is masked out stays 0, where 0·inf is not."""
    gradient = gradient * g
    if mask is not None and (is_compiling() or not (g.is_cpu and isfinite(g.item()))):
        gradient.masked_fill_(~mask, 0)
    return gradient


SPENT = "inplace=True: the logits were consumed by the first backward"


def gradient_buffer(logits: Tensor, inplace: bool) -> Tensor:
    """Where the gradient of the logits goes: fresh memory, or the logits' own (`inplace=True`)."""
    if not inplace or is_compiling():  # while compiling, Inductor plans the memory
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    if overlaps(logits.shape, logits.stride()):
        raise ValueError("inplace=True: the logits' elements share memory")
    return logits.detach()


def consumed(logits: Tensor) -> None:
    """Let autograd know that the logits were overwritten: whoever saved them then raises."""
    torch.autograd.graph.increment_version(logits)


def row_gradient(name: str, g: Tensor | None, targets: Tensor, dtype: torch.dtype) -> Tensor | None:
    """An upstream gradient, one number a row, as the kernel reads it."""
    if g is None:
        return None
    same_device(name, g, "logits", targets)
    if g.shape != targets.shape:
        raise ValueError(f"{name}: shape {tuple(g.shape)}; allowed: {tuple(targets.shape)}")
    if g.dtype is dtype and g.is_contiguous():
        return g
    return g.to(dtype).contiguous()


def scalar_gradient(g: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    same_device("g", g, "logits", logits)
    if g.numel() != 1:
        raise ValueError(f"g: shape {tuple(g.shape)}; allowed: a scalar")
    return g if g.dtype is dtype else g.to(dtype)


def gradient_rows(logits: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Any, Tensor, Any]:
    """Rows of the logits and of the gradient; in place both are the same rows."""
    rows, layout = logit_rows(logits, targets)
    if out.shape != logits.shape or out.dtype != logits.dtype:
        raise ValueError(
            f"out: {tuple(out.shape)} {out.dtype}; the logits are {tuple(logits.shape)} {logits.dtype}"
        )
    same_device("out", out, "logits", logits)
    if out.is_contiguous() and logits.is_contiguous():
        return rows, layout, out, layout
    if out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride():
        return rows, layout, rows, layout
    return rows, layout, *logit_rows(out, targets)


def write_back(out: Tensor, out_rows: Tensor) -> None:
    """Where the strides of `out` made the kernel write into a copy."""
    if out_rows.data_ptr() != out.data_ptr():
        out.copy_(out_rows)


def gradient_in_forward(logits: Tensor) -> bool:
    """Whether a loss that visits each row once makes its gradient in the forward.

    Not in float16, where p/N underflows before a loss scaler's factor arrives, and not where saved-tensor
    hooks (checkpointing, offloading) would rather not keep it; then the backward makes it.
    """
    if is_compiling() or logits.dtype is torch.float16:
        return False
    return _saved_tensor_hooks is None or _saved_tensor_hooks(False) is None
