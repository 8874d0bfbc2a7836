"""A pass of a model: where it begins and ends, and which adapter each row of its batch has."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ._args import require

BASE = "__base__"  # the name of no adapter, as PEFT has it

# Whether anywhere names are in force. What torch.compile traced without them is guarded by it.
in_force = False

_lock = threading.Lock()
_stacks: dict[int, list[Pass]] = {}  # by thread
_numbers = itertools.count(1)

# Called with the number of each outermost call that ends, and whether it gave something.
at_end: list[Callable[[int, bool], None]] = []


def untraced(function: Any) -> Any:
    """Where torch.compile traces, a break in the graph; elsewhere the function, without importing that."""
    apart = torch._disable_dynamo(function)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return apart(*args) if is_compiling() else function(*args)

    return run


class Holder:
    """Of modules that have adapters by name."""

    adapters: Iterable[str]
    # Batches with names, since train(), that a backward may recompute and has not yet; and whether there are
    # any: torch.compile compiles anew for each value of what a forward looks at.
    mixed_pending = 0
    mixed_trained = False

    def forget_mixed(self) -> None:
        self.mixed_pending, self.mixed_trained = 0, False


class Pass:
    """One call of a model, or what a `mixed_batch` encloses.

    names: one a row, None if this call has none of its own. holders: the modules they are for.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...] | None = None,
        holders: Iterable[nn.Module] = (),
        call: bool = True,
    ) -> None:
        self.model, self.names, self.holders, self.call = model, names, frozenset(holders), call
        self.number = next(_numbers)
        self._ids: dict[Any, Tensor] = {}

    def ids(self, places: dict[str, int], device: torch.device) -> Tensor:
        """The place of each row's name, -1 for names without one. Layers of equal places share it."""
        assert self.names is not None
        ids = tuple(places.get(name, -1) for name in self.names)
        if (ids, device) not in self._ids:
            self._ids[ids, device] = torch.tensor(ids, dtype=torch.int64, device=device)
        return self._ids[ids, device]

    def check_rows(self, x: Any) -> None:
        assert self.names is not None
        rows = x.shape[0] if isinstance(x, Tensor) and x.ndim else None
        if rows != len(self.names):
            raise ValueError(f"adapter_names: {len(self.names)} of them; the batch has {rows} rows")


def in_backward() -> bool:
    """Whether this runs because a backward recomputes it, as under torch.utils.checkpoint."""
    return torch._C._current_graph_task_id() != -1


def _push(item: Pass) -> None:
    global in_force
    with _lock:
        _stacks.setdefault(threading.get_ident(), []).append(item)
        in_force = in_force or item.names is not None


def _pop(item: Pass) -> None:
    """With all that an exception left above it."""
    global in_force
    with _lock:
        stack = _stacks[threading.get_ident()]
        del stack[stack.index(item) :]
        if not stack:
            del _stacks[threading.get_ident()]
        in_force = any(p.names is not None for stack in _stacks.values() for p in stack)


def current() -> int:
    """The number of the outermost call of this thread; 0 outside of any."""
    return next((p.number for p in _stacks.get(threading.get_ident(), ()) if p.call), 0)


def names_for(holder: Any) -> Pass | None:
    """The innermost pass of this thread whose names are for a module.

    A call without names does not take those of an outer call of the same model, which may be one that was
    interrupted. A backward on a GPU recomputes in a thread of its own: there what encloses it counts.
    """
    again = set()
    for item in reversed(_stacks.get(threading.get_ident(), ())):
        if item.names is None:
            again.add(item.model)
        elif holder in item.holders and not (item.call and item.model in again):
            return item
    if not in_backward():
        return None
    with _lock:
        others = [p for stack in _stacks.values() for p in stack]
    found = [p for p in others if not p.call and p.names is not None and holder in p.holders]
    if not found and holder.mixed_trained:  # silence would be another function's gradient
        raise RuntimeError(
            "adapter_names: a backward recomputes this layer, and which adapters its rows had is over; run "
            "the backward within finefuse.nn.mixed_batch too (model.train() forgets batches without one)"
        )
    if len(found) > 1:
        raise RuntimeError(
            "mixed_batch: several threads are in one; whose backward this is cannot be known"
        )
    return found[0] if found else None


def note(holder: Any) -> None:
    """A batch with names goes through a holder: a backward may recompute it, or this is that."""
    if in_backward():
        holder.mixed_pending = max(holder.mixed_pending - 1, 0)
    elif holder.training or torch.is_grad_enabled():
        holder.mixed_pending += 1
    holder.mixed_trained = holder.mixed_pending > 0


def _names(model: nn.Module, names: Any) -> tuple[tuple[str, ...], list[Any]]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"adapter_names: a list of names, not {names!r}")
    holders = [m for m in model.modules() if isinstance(m, Holder)]
    known = dict.fromkeys(n for holder in holders for n in holder.adapters)
    for name in names:
        allowed = ", ".join(map(repr, [*known, BASE]))
        require(isinstance(name, str) and name in (*known, BASE), "adapter_names", name, allowed)
    return tuple(names), holders


@untraced
def _begin_named(model: nn.Module, names: Any) -> None:
    _push(Pass(model))  # what `end` pops, also where the names are wrong
    chosen, holders = _names(model, names)
    stack = _stacks[threading.get_ident()]
    _pop(stack[-1])
    _push(Pass(model, chosen, holders))


def begin(model: nn.Module, args: Any, options: dict[str, Any]) -> Any:
    """The forward pre-hook of a model with adapters: takes adapter_names out of the arguments."""
    if options.get("adapter_names") is not None:
        options = dict(options)
        _begin_named(model, options.pop("adapter_names"))
        return args, options
    if "adapter_names" in options:
        options = {key: value for key, value in options.items() if key != "adapter_names"}
    if not is_compiling():
        # One that an interrupt left here would hide that a new pass begins.
        for item in _stacks.get(threading.get_ident(), ())[:]:
            if item.call and item.names is None and item.model is model:
                _stacks[threading.get_ident()].remove(item)
        _push(Pass(model))
    return args, options


def end(model: nn.Module, args: Any, result: Any) -> None:
    """The forward hook, also after an exception."""
    if is_compiling() and not in_force:
        return
    _end(model, result is not None)


@untraced
def _end(model: nn.Module, whole: bool) -> None:
    for item in reversed(_stacks.get(threading.get_ident(), ())):
        if item.call and item.model is model:
            outermost = item.number == current()
            _pop(item)
            for function in at_end if outermost else ():
                function(item.number, whole)
            return


_HANDLES = "_finefuse_handles"


def watch(model: nn.Module) -> None:
    """Put the hooks on a model, the one inside of torch.compile's, once.

    Their handles stay with the model: through them a pickle says which numbers of hooks are taken.
    """
    model = model._modules.get("_orig_mod") or model
    if _HANDLES not in vars(model):
        vars(model)[_HANDLES] = (
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end, always_call=True),
        )


def unwatch(model: nn.Module) -> None:
    for module in model.modules():
        for handle in vars(module).pop(_HANDLES, ()):
            handle.remove()


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[nn.Module]:
    """Within it each row of a batch has an adapter of its own, in every call of the model or a part of it.

        with ff.nn.mixed_batch(model, ["french", "__base__", "french", "german"]):
            model.generate(prompts)

    The same as `model(x, adapter_names=[...])` where that call is somebody else's. Layers that lack an
    adapter of the name give its rows the base's output, and so does "__base__". One name for each entry of
    the first dimension of what a layer takes: for beam search as many as there are beams.

    It trains too: each adapter that is named gets gradients if its parameters require them
    (`set_adapter(model, name, trains=[...])`).
    Where activations are recomputed (torch.utils.checkpoint) the backward must run within it too.

    Args:
        adapter_names: for each row the name of an adapter that a layer of the model has, or "__base__".

    Raises:
        TypeError, ValueError: naming the argument. ValueError from the layers for another number of rows, a
            merged adapter, one with dora, and for adapters that differ in dropout while that is on.
    """
    names, holders = _names(model, adapter_names)
    item = Pass(model, names, holders, call=False)
    _push(item)
    try:
        yield model
    finally:
        _pop(item)
