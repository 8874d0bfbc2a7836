"""Adapters in a model: putting them in, choosing among them, taking them out."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import _groups, _passes
from ._args import require
from ._layers import LAYERS, Adapter, LoRALinear, check_name, keep_hooks, kind_of, linear_weight
from ._mixed import mixed_module
from .codebook import CodebookTensor
from .codebook import quantize as _quantize


class ModuleToSave(nn.Module, _passes.Holder):
    """A module with a copy of it for each adapter, which trains; the active adapter's copy runs.

    What `add_lora(modules_to_save=…)` puts in the place of a module. Attributes that it lacks are those of
    the module that runs.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.enabled = True

    @property
    def adapters(self) -> Iterable[str]:  # type: ignore[override]
        return self.modules_to_save.keys()

    def train(self, mode: bool = True) -> ModuleToSave:
        self.forget_mixed()
        return super().train(mode)

    def add_adapter(self, name: str) -> None:
        """A trained copy of this name, from the module as it was."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module)
        self.set_adapter(name)

    def set_adapter(self, name: str | None, trains: Collection[str] | None = None) -> None:
        """The copy of this name runs (None: the module as it was); `trains`: the names whose copies train."""
        self.active = name
        for key, module in self.modules_to_save.items():
            wanted = key == name if trains is None else key in trains
            for parameter in module.parameters():
                parameter.requires_grad_(wanted and _trains(parameter))

    def enable(self) -> None:
        """The copy that was set runs again."""
        self.enabled = True

    def disable(self) -> None:
        """The module as it was runs, whichever copy is set."""
        self.enabled = False

    def current(self) -> nn.Module:
        """What runs: a copy or the module as it was."""
        if self.active is None or not self.enabled:
            return self.original_module
        return self.modules_to_save[self.active]

    def forward(self, *args: Any, **options: Any) -> Any:
        if _passes.in_force or self.mixed_trained:
            named, y = self._mixed(args, options)
            if named:
                return y
        return self.current()(*args, **options)

    @_passes.untraced
    def _mixed(self, args: Any, options: Any) -> tuple[bool, Any]:
        call = _passes.names_for(self)
        return call is not None, None if call is None else mixed_module(self, args, options, call)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "modules_to_save" not in self.__dict__.get("_modules", {}):
                raise  # while it is being made or unpickled
            return getattr(self.current(), name)


def _trains(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and not isinstance(parameter, CodebookTensor)


ModuleToSave.__module__ = "finefuse.nn"


# ---- which modules -------------------------------------------------------------------------------


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, as before wrapping: nothing inside of LoRALinear and ModuleToSave."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def walk(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            if "_orig_mod" in child._modules:  # torch.compile's wrapper has no name of its own
                child = child.get_submodule("_orig_mod")
            if child in seen:
                continue
            seen.add(child)
            found[prefix + name] = child
            if not isinstance(child, (LoRALinear, ModuleToSave)):
                walk(child, f"{prefix}{name}.")

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: a torch.nn.Module, not {type(model).__name__}")
    walk(model, "")
    return found


def is_target(targets: str | Sequence[str], name: str) -> bool:
    """PEFT's rule: a regular expression of the whole name, or names and ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """All linear layers but a language model's head and those whose forward nobody calls."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return [
        name
        for name, module in modules.items()
        if (linear_weight(module) is not None or isinstance(module, nn.Linear))
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and module is not head
        and not _bypassed(model, name)
    ]


def _bypassed(model: nn.Module, name: str) -> bool:
    """Whether a parent reads the layer's weight without calling it, as in torch's fused encoder layers."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention))


def modules_to_save_of(names: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """PEFT's rule: ends of names. Nothing inside of what is found."""
    ends = tuple(names)
    found: list[str] = []
    for name in modules:
        if name.endswith(ends) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def from_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the name or, after a dot, its end."""
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise ValueError(f"rank_pattern, alpha_pattern: {pattern!r}: {error}") from error
        if matches:
            return value
    return default


def targets_of(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    save: Sequence[str],
) -> list[str]:
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model, modules)
    try:
        return [
            name
            for name in modules
            if is_target(targets, name)
            and not (exclude and is_target(exclude, name))
            and not any(name == outer or name.startswith(f"{outer}.") for outer in save)
        ]
    except re.error as error:
        raise ValueError(f"targets: {targets!r}, {exclude!r}: {error}") from error


def _check_layer(model: nn.Module, name: str, module: nn.Module) -> None:
    if linear_weight(module) is None:
        raise TypeError(f"targets: {name} is a {kind_of(module)}; allowed: {LAYERS}")
    if "forward" in vars(module):
        raise ValueError(f"targets: {name} has a forward of its own, which would be lost")
    if _bypassed(model, name):
        parent = kind_of(model.get_submodule(name.rpartition(".")[0]))
        raise ValueError(
            f"targets: {name}: its parent, a {parent}, reads its weight without calling it: the adapter "
            "would not count"
        )


def _holders(model: nn.Module) -> list[LoRALinear | ModuleToSave]:
    return [m for m in model.modules() if isinstance(m, (LoRALinear, ModuleToSave))]


def adapter_names(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for holder in _holders(model) for name in holder.adapters))


def _strings(name: str, value: Any) -> list[str]:
    names: list[Any] = [None]
    if isinstance(value, Iterable) and not isinstance(value, str):
        names = list(value)
    if not all(isinstance(v, str) and v for v in names):
        raise TypeError(f"{name}: names, not {value!r}")
    return names


# ---- wrapping --------------------------------------------------------------------------------------


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    *,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    quantize: str | Tensor | None = None,
    blocksize: int = 64,
    double_quant: bool = False,
    init_lora_weights: bool | str = True,
    modules_to_save: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    groups: str | Sequence[Sequence[str]] | None = None,
    name: str = "default",
) -> nn.Module:
    """Put `LoRALinear` modules in the place of a model's linear layers and freeze everything else, in place.

        ff.nn.add_lora(model, 16, 32, targets=["q_proj", "v_proj"], quantize="nf4")
        optimizer = torch.optim.AdamW(ff.nn.trainable_parameters(model))

    (LoRA, arXiv:2106.09685.) The new adapter becomes the active one, also if it is a second one of another
    name: the layers that have an adapter get another, with memory and base in common.

    Args:
        model: targets can be of the types that `LoRALinear.from_linear` takes, and LoRALinear.
        rank, alpha, dropout, rslora, dora, init_lora_weights, name: as for `LoRALinear`.
        targets: as PEFT's target_modules. Names: a layer of this name, or whose name ends in a dot and this.
            A string: a regular expression of the whole name. "all-linear": all linear layers but a
            transformers model's output layer.
        exclude: what targets shall not match, in either form.
        quantize: None or a codebook ("nf4", "fp4", …): target layers' weights become CodebookTensors
            (QLoRA); weights that are already packed stay. blocksize, double_quant: as for
            `finefuse.quantize`.
        modules_to_save: ends of names of modules that train whole, beside the adapters: a copy of each
            for each adapter, which is saved with it.
        rank_pattern, alpha_pattern: name, end of name or regular expression of either to another rank or
            alpha; the first that matches counts.
        groups: layers that are called with the same tensor: it is read once for all their updates, see
            `lora_linear_group`. Lists of the last names of siblings, [["q_proj", "k_proj", "v_proj"]];
            "auto": found from the first call of the model, used from the second on. Where they are not
            called with the same tensor after all, they run by themselves.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, before anything is changed.
    """
    modules = modules_of(model)
    if not isinstance(targets, str):
        targets = _strings("targets", targets)
    if not isinstance(exclude, str):
        exclude = _strings("exclude", exclude)
    ends = _strings("modules_to_save", modules_to_save)
    check_name(name)
    require(
        name not in adapter_names(model), "name", name, "a name that no adapter of the model has"
    )
    for end in ends:
        require(
            bool(modules_to_save_of([end], modules)),
            "modules_to_save",
            end,
            "the end of a module's name",
        )
    save = modules_to_save_of(ends, modules)
    for outer in save:
        holds = any(isinstance(m, LoRALinear) for m in modules[outer].modules())
        require(not holds, "modules_to_save", outer, "modules without LoRALinear in them")
    names = targets_of(model, modules, targets, exclude, save)
    if not names:
        raise ValueError(f"targets: {targets!r} matches no module")
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    for what, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        for pattern in patterns:
            used = any(from_pattern({pattern: True}, n, False) for n in names)
            require(used, what, pattern, "what matches a target")
    first = Adapter(rank, alpha, dropout, rslora, init_lora_weights, dora).check()
    plan = {}
    for target in names:
        _check_layer(model, target, modules[target])
        r, a = from_pattern(ranks, target, rank), from_pattern(alphas, target, alpha)
        plan[target] = first._replace(rank=r, alpha=a).check()
    if quantize is not None:
        _quantize(torch.zeros(1), quantize, blocksize, double_quant)  # raises what it would raise
        if any(isinstance(modules[target], LoRALinear) for target in names):
            raise ValueError("quantize: a target has an adapter already; allowed: None")
    sizes = {}
    for target, module in modules.items():
        if target in plan or isinstance(module, LoRALinear):
            weight = linear_weight(module)
            assert weight is not None
            sizes[target] = weight.shape[1]
    groups = _groups.check(groups, sizes)
    wrap(model, modules, plan, save, name, (quantize, blocksize, double_quant))
    _groups.put(model, groups)
    return model


def wrap(
    model: nn.Module,
    modules: dict[str, nn.Module],
    plan: Mapping[str, Adapter],
    save: Iterable[str],
    name: str,
    packing: tuple[Any, int, bool] = (None, 64, False),
) -> None:
    """Carry it out. Takes from `modules` what it replaces: layers that were packed are freed one by one."""
    model.requires_grad_(False)
    where: dict[nn.Module, list[tuple[nn.Module, str]]] = {}  # a module may stand in several places
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                where.setdefault(child, []).append((parent, key))

    def put(module: nn.Module, old: nn.Module) -> None:
        for parent, key in where.pop(old):
            setattr(parent, key, module)

    for target, adapter in plan.items():
        module = modules.pop(target)
        if isinstance(module, LoRALinear):
            module.add_adapter(name, *adapter)
            continue
        code, blocksize, double_quant = packing
        packed = isinstance(linear_weight(module), CodebookTensor)
        layer = LoRALinear.from_linear(
            module, **adapter._asdict(), name=name, quantize=None if packed else code,
            blocksize=blocksize, double_quant=double_quant,
        )  # fmt: skip
        keep_hooks(module, layer)
        put(layer, module)
    for target in save:
        module = modules.pop(target)
        if not isinstance(module, ModuleToSave):
            wrapper = ModuleToSave(module).train(module.training)
            put(wrapper, module)
            module = wrapper
        module.add_adapter(name)
    _passes.watch(model)
    set_adapter(model, name)


# ---- using -----------------------------------------------------------------------------------------


def set_adapter(model: nn.Module, name: str, *, trains: Sequence[str] | None = None) -> None:
    """Make an adapter the active one; merged ones are unmerged.

    Args:
        name: of the adapter.
        trains: the adapters whose parameters require a gradient, such as all those of the batches of
            `mixed_batch`. None: the active one.

    Raises:
        ValueError: if no module of the model has one of them.
    """
    names = adapter_names(model)
    known = ", ".join(map(repr, names)) or "none: no adapter is there"
    require(name in names, "name", name, known)
    for other in () if trains is None else _strings("trains", trains):
        require(other in names, "trains", other, known)
    for holder in _holders(model):
        holder.set_adapter(name if name in holder.adapters else None, trains)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model is what it was before `add_lora`: a reference model, with no memory of its own.

        with ff.nn.disable_adapter(model), torch.no_grad():
            reference = model(tokens)

    Merged adapters are unmerged.
    """
    holders = [holder for holder in _holders(model) if holder.enabled]
    try:
        for holder in holders:
            holder.disable()
        yield model
    finally:
        for holder in holders:
            holder.enable()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, each once: what an optimizer takes.

    After `add_lora` those of the active adapter: every lora_A, lora_B and lora_magnitude_vector, and the
    copies of modules_to_save.
    """
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the active adapter and put plain layers back in place: the model without finefuse's modules.

    A packed weight stays packed (its layer a `CodebookLinear`). Other adapters are dropped.

    Returns:
        The model, or what takes its place where it is a layer itself; nothing in it requires a gradient.
    """
    _passes.unwatch(model)
    replacement: dict[nn.Module, nn.Module] = {}
    for holder in _holders(model):
        if isinstance(holder, ModuleToSave):
            replacement[holder] = holder.current()
            continue
        if holder.merged is None and holder.active is not None and holder.enabled:
            holder.merge()
        replacement[holder] = layer = holder.to_linear()
        keep_hooks(holder, layer)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in replacement:
                setattr(parent, key, replacement[child])
    model = replacement.get(model, model)
    model.requires_grad_(False)
    return model
