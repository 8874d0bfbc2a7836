"""Modules on a batch whose rows have different adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._op import accumulator
from ._passes import Pass, note
from .segmented import lora_linear_segmented


class _Slot(NamedTuple):
    """An adapter's factors and what tells whether they changed since they were copied."""

    factors: tuple[Tensor, Tensor]
    versions: tuple[Any, ...]
    scale: float

    def same(self, other: _Slot) -> bool:
        return (
            all(a is b for a, b in zip(self.factors, other.factors, strict=True))
            and self.versions == other.versions
            and self.scale == other.scale
        )


def _slot(layer: Any, name: str) -> _Slot:
    factors = layer.lora_A[name], layer.lora_B[name]
    versions = tuple((f._version, f.data_ptr(), f.dtype) for f in factors)
    return _Slot(factors, versions, layer.scaling[name])


class Stack(NamedTuple):
    """Adapters of a layer as one: A (n, r, in), B (n, out, r), zeros up to the largest rank, scale (n,)."""

    places: dict[str, int]
    lora_a: Tensor
    lora_b: Tensor
    scale: Any
    slots: dict[str, _Slot]


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    size = rank - factor.shape[dim]
    if size == 0:
        return factor
    return nn.functional.pad(factor, (0, size) if dim == 1 else (0, 0, 0, size))


def _make(layer: Any, names: Sequence[str], slots: dict[str, _Slot]) -> Stack:
    factors = [(layer.lora_A[name], layer.lora_B[name]) for name in names]
    if len(names) == 1:
        (a, b), scale = factors[0], layer.scaling[names[0]]
        return Stack({names[0]: 0}, a[None], b[None], scale, slots)
    rank = max(len(a) for a, _ in factors)
    return Stack(
        {name: place for place, name in enumerate(names)},
        torch.stack([_padded(a, rank, 0) for a, _ in factors]),
        torch.stack([_padded(b, rank, 1) for _, b in factors]),
        torch.tensor(
            [layer.scaling[name] for name in names],
            dtype=accumulator(factors[0][0].dtype),
            device=factors[0][0].device,
        ),
        slots,
    )


def stacked(layer: Any, names: Sequence[str]) -> Stack:
    """Of these adapters at least.

    While nobody wants a gradient the copy of all that were asked for so far stays with the layer. Each call
    compares the factors themselves, their memory and torch's counts of their changes with those of the copy.
    """
    factors = [f for name in names for f in (layer.lora_A[name], layer.lora_B[name])]
    if layer.training or (torch.is_grad_enabled() and any(f.requires_grad for f in factors)):
        layer.stack = None
        return _make(layer, names, {})
    if len(names) == 1 or any(f.is_inference() for f in factors):  # no copy; no counts
        return _make(layer, names, {})
    old: Stack | None = layer.stack
    now = {name: _slot(layer, name) for name in names}
    if old is not None and all(n in old.slots and old.slots[n].same(now[n]) for n in names):
        return old
    for name in old.slots if old is not None else ():
        if name in layer.adapters:
            now.setdefault(name, _slot(layer, name))
    # Not an inference tensor: those cannot be kept for a backward through x.
    with torch.inference_mode(False), torch.no_grad():
        layer.stack = new = _make(layer, list(now), now)
    return new


def mixed_linear(layer: Any, x: Tensor, call: Pass) -> Tensor | None:
    """What a LoRALinear gives; None where no row has an adapter of it."""
    assert call.names is not None
    call.check_rows(x)
    if layer.merged is not None:
        raise ValueError(f"adapter_names: adapter {layer.merged!r} is merged; unmerge() before")
    names = [name for name in dict.fromkeys(call.names) if name in layer.adapters]
    if not names or not layer.enabled:
        return None
    adapters = [layer.adapters[name] for name in names]
    for name, adapter in zip(names, adapters, strict=True):
        if adapter.dora:
            raise ValueError(f"adapter_names: {name!r} has dora; allowed: adapters without")
    dropouts = {a.dropout for a in adapters} if layer.training else {0.0}
    if len(dropouts) > 1:
        raise ValueError(f"adapter_names: dropout {sorted(dropouts)} in one batch; allowed: one p")
    note(layer)
    stack = stacked(layer, names)
    return lora_linear_segmented(
        x, layer.weight, stack.lora_a, stack.lora_b, call.ids(stack.places, x.device),
        scale=stack.scale, bias=layer.bias, dropout=dropouts.pop(),
    )  # fmt: skip


ROWWISE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def mixed_module(holder: Any, args: tuple[Any, ...], options: Any, call: Pass) -> Any:
    """What a ModuleToSave gives: each of its copies runs on its own rows."""
    assert call.names is not None
    copies = dict(holder.modules_to_save.items()) if holder.enabled else {}
    owners = [copies.get(name, holder.original_module) for name in call.names]
    modules = list(dict.fromkeys(owners))
    x = args[0] if args else None
    call.check_rows(x)
    note(holder)
    if len(modules) < 2:
        return (modules[0] if modules else holder.original_module)(*args, **options)
    if not isinstance(holder.original_module, ROWWISE):
        allowed = ", ".join(kind.__name__ for kind in ROWWISE)
        raise TypeError(
            f"adapter_names: a {type(holder.original_module).__name__} of modules_to_save; what can have "
            f"different copies in one batch: {allowed}"
        )
    rows = [[i for i, owner in enumerate(owners) if owner is module] for module in modules]
    parts = [m(args[0][r], *args[1:], **options) for m, r in zip(modules, rows, strict=True)]
    back = torch.tensor([i for part in rows for i in part]).argsort().to(parts[0].device)
    return torch.cat(parts)[back]
