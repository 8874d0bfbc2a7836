"""Layers of one input, such as a model's q, k and v: the first that is called computes for all of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _backend, _passes
from ._codebook_tensor import CodebookTensor
from .lora import lora_linear_group

# Under saved-tensor hooks, which non-reentrant checkpoints are, a recomputation must save what the forward
# saved, whatever became of the group in between. An older torch does not say whether there are any.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_PLAIN = (Tensor, nn.Parameter, CodebookTensor)  # not those of a shard


class Member:
    """Of layers that can be in a group. `place`: which one of it."""

    group: Siblings | None = None
    place = 0


class _Kept(NamedTuple):
    """Outputs that were computed with another member's, by place, and all that they depend on."""

    x: weakref.ref[Tensor]
    version: int
    mode: Any
    states: list[tuple[list[Any], list[Any]]]
    outputs: dict[int, Tensor]
    number: int  # of the pass


class _Thread(threading.local):
    def __init__(self) -> None:
        self.kept: dict[Group, _Kept] = {}


_thread = _Thread()


def _mode(x: Tensor) -> Any:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, _backend.in_force()


def _dropout(layer: Any) -> float:
    return layer.adapters[layer.active].dropout if layer.training else 0.0


def _state(layer: Any) -> tuple[list[Any], list[Any]]:
    """What a layer's output depends on: things that stay the same objects, and values."""
    name = layer.active
    tensors = [layer.weight, layer.bias, layer.lora_A[name], layer.lora_B[name]]
    versions = [None if t is None or t.is_inference() else t._version for t in tensors]
    return tensors, [name, layer.scaling[name], _dropout(layer), *versions]


def _same(a: tuple[list[Any], list[Any]], b: tuple[list[Any], list[Any]]) -> bool:
    return all(x is y for x, y in zip(a[0], b[0], strict=True)) and a[1] == b[1]


def _ready(layer: Any, x: Tensor) -> bool:
    name = layer.active
    if name is None or not layer.enabled or layer.merged is not None or layer.adapters[name].dora:
        return False
    if _dropout(layer) and not torch.is_grad_enabled():
        return False  # a reentrant checkpoint's: its recomputation draws the masks one by one
    tensors = layer.weight, layer.lora_A[name], layer.lora_B[name]
    return all(type(t) in _PLAIN and t.device == x.device for t in tensors)


class Siblings:
    """Layers that know each other. Copies and pickles of them make a new one, of those that are in it."""

    def __init__(self, size: int) -> None:
        self.members: list[weakref.ref[Any] | None] = [None] * size

    def join(self, layer: Any, place: int) -> None:
        self.members[place] = weakref.ref(layer)
        layer.group, layer.place = self, place

    def layers(self) -> list[Any]:
        return [member and member() for member in self.members]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "members": [None] * len(self.members)}

    def output(self, layer: Any, x: Any) -> Tensor | None:
        """What a layer gives; None if it is to run by itself."""
        raise NotImplementedError

    def clear(self) -> None:
        """Let go of outputs that wait."""
        _thread.kept.pop(self, None)  # type: ignore[call-overload]


class Group(Siblings):
    """Siblings that are called with the same tensor.

    A member called with a tensor computes the outputs of all, with one read of it, and the others' wait, each
    for one call with that very tensor, unchanged, in the same thread and mode. If one is not called for, the
    group was a mistake: from then on its layers run by themselves. They do so, too, under saved-tensor hooks
    and in a backward: a recomputation shares nothing with a forward.
    """

    dissolved = False

    def output(self, layer: Any, x: Any) -> Tensor | None:
        if self.dissolved or type(x) not in _PLAIN or x.is_inference() or _passes.in_backward():
            return None
        layers = self.layers()
        # A replica of a layer (DataParallel's) is no member itself, and the others are another device's.
        if layers[layer.place] is not layer:
            return None
        number = _passes.current()
        if number == 0:  # nobody would say when to let go of what is not called for
            return None
        kept = _thread.kept.get(self)
        if kept is not None and kept.number == number:
            return self._take(kept, layer, x)
        if torch.is_grad_enabled() and (_top_hooks is None or _top_hooks(True) is not None):
            return None
        if not all(m is not None and _ready(m, x) for m in layers):
            return None
        outputs = lora_linear_group(
            x,
            [m.weight for m in layers],
            [m.lora_A[m.active] for m in layers],
            [m.lora_B[m.active] for m in layers],
            scale=[m.scaling[m.active] for m in layers],
            bias=[m.bias for m in layers],
            dropout=[_dropout(m) for m in layers],
        )
        waiting = dict(enumerate(outputs))
        y = waiting.pop(layer.place)
        _thread.kept[self] = _Kept(
            weakref.ref(x), x._version, _mode(x), [_state(m) for m in layers], waiting,
            number,
        )  # fmt: skip
        return y

    def _take(self, kept: _Kept, layer: Any, x: Tensor) -> Tensor | None:
        place = layer.place
        same = kept.x() is x and kept.version == x._version and kept.mode == _mode(x)
        if same and place not in kept.outputs:
            return None  # called twice with the same
        if not same or not _same(kept.states[place], _state(layer)):
            self.dissolve()
            return None
        y = kept.outputs.pop(place)
        if not kept.outputs:
            self.clear()
        return y

    def dissolve(self) -> None:
        self.dissolved = True
        self.clear()


class Watch(Siblings):
    """Siblings of which one pass shows who is called with the same tensor, one right after the other.

    They are groups from the next pass on.
    """

    thread = number = 0
    last: Any = None

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.runs: list[list[int]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "runs": [], "last": None, "number": 0}

    def output(self, layer: Any, x: Any) -> Tensor | None:
        number, thread = _passes.current(), threading.get_ident()
        if number == 0 or self.layers()[layer.place] is not layer:  # 0: a backward's, too
            return None
        if self.number == 0:
            self.number, self.thread = number, thread
        if thread != self.thread:
            return None
        if number != self.number:
            self._part()
            return None if layer.group is None else layer.group.output(layer, x)
        known = isinstance(x, Tensor) and not x.is_inference()
        if self.last and self.last[0]() is x and self.last[1] == x._version:
            self.runs[-1].append(layer.place)
        else:
            self.runs.append([layer.place])
        self.last = (weakref.ref(x), x._version) if known else None
        return None

    def _part(self) -> None:
        layers = self.layers()
        for layer in layers:
            if layer is not None and layer.group is self:
                layer.group = None
        calls = [place for run in self.runs for place in run]
        for run in self.runs:
            found = [layers[place] for place in run if layers[place] is not None]
            once = all(calls.count(place) == 1 for place in run)
            if once and len(found) > 1 and len({layer.in_features for layer in found}) == 1:
                make(found)


def make(layers: Sequence[Any], kind: type[Siblings] = Group) -> None:
    siblings = kind(len(layers))
    for place, layer in enumerate(layers):
        siblings.join(layer, place)


def _finish(number: int, whole: bool) -> None:
    """At the end of a pass: what still waits was not called for, unless an exception ended it."""
    for group, kept in list(_thread.kept.items()):
        if kept.number == number:
            del _thread.kept[group]
            if whole:
                group.dissolve()


_passes.at_end.append(_finish)


# ---- which layers ------------------------------------------------------------------------------


def check(groups: Any, sizes: Mapping[str, int]) -> Any:
    """The argument, checked against the layers that there will be, their names to in_features."""
    if groups is None or (isinstance(groups, str) and groups == "auto"):
        return groups
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups: None, 'auto' or lists of names, not {groups!r}")
    lists: list[list[str]] = []
    for group in groups:
        if isinstance(group, str) or not all(isinstance(n, str) and n for n in group):
            raise TypeError(f"groups: None, 'auto' or lists of names, not {groups!r}")
        lists.append(list(group))
        if len(set(lists[-1])) < 2 or len(set(lists[-1])) != len(lists[-1]):
            raise ValueError(f"groups: {group!r}; allowed: at least two names, each once")
    names = [name for group in lists for name in group]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"groups: {name!r} in two of them")
    for group in lists:
        parents: dict[str, set[int]] = {}
        counts: dict[str, int] = {}
        for name, size in sizes.items():
            parent, _, last = name.rpartition(".")
            if last in group:
                parents.setdefault(parent, set()).add(size)
                counts[parent] = counts.get(parent, 0) + 1
        if not any(count > 1 for count in counts.values()):
            raise ValueError(f"groups: {group!r}; no module has two layers with adapters of these")
        for parent, different in parents.items():
            if len(different) > 1:
                raise ValueError(
                    f"groups: {group!r} in {parent!r} have in_features {sorted(different)}; "
                    "allowed: the same"
                )
    return lists


def put(model: nn.Module, groups: Any) -> None:
    """Carry it out on the layers that there are."""
    if groups is None:
        return
    for parent in list(model.modules()):
        children: dict[str, Any] = {
            name: child for name, child in parent._modules.items() if isinstance(child, Member)
        }
        if groups == "auto":
            by_size: dict[int, list[Any]] = {}
            for layer in dict.fromkeys(children.values()):
                if layer.group is None:
                    by_size.setdefault(layer.in_features, []).append(layer)
            for layers in by_size.values():
                if len(layers) > 1:
                    make(layers, Watch)
            continue
        for group in groups:
            layers = list(dict.fromkeys(children[name] for name in group if name in children))
            if len(layers) > 1:
                make(layers)
