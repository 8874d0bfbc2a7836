"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._adapters import (
    ModuleToSave,
    adapter_names,
    from_pattern,
    is_target,
    modules_of,
    modules_to_save_of,
    set_adapter,
    targets_of,
    wrap,
)
from ._args import require
from ._layers import LAYERS, Adapter, LoRALinear, check_name, kind_of, linear_weight

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapters' files need safetensors: pip install safetensors") from error
    return safetensors


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model under torch.compile and DistributedDataParallel, whose names files have."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _short(names: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """target_modules that match these names and no other."""
    ends = {name.rpartition(".")[2] for name in names}
    for candidate in (sorted(ends), sorted(names)):
        if candidate[0].isdigit():  # of a list; true, but it says nothing
            continue
        if {name for name in modules if is_target(candidate, name)} == set(names):
            return candidate
    return "|".join(map(re.escape, names))


def _common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _one(what: str, values: Iterable[Any]) -> Any:
    different = set(values)
    if len(different) > 1:
        raise ValueError(f"{what}: {sorted(different)} in different layers; PEFT's files have one")
    return different.pop()


def save_adapter(model: nn.Module, dir: str | os.PathLike[str], name: str = "default") -> None:
    """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    `peft.PeftModel.from_pretrained(base_model, dir)` reads it, and `load_adapter`. The keys are
    "base_model.model.<layer>.lora_A.weight", ".lora_B.weight", for DoRA ".lora_magnitude_vector", and those
    of modules_to_save.

    Args:
        model: one that has the adapter; also under torch.compile or DistributedDataParallel.
        dir: a folder; made if it is missing.
        name: the adapter's. It is not part of the files.

    Raises:
        ValueError: for a name that no layer has, and for what PEFT's configuration cannot say.
        ImportError: without safetensors.
    """
    safetensors = _safetensors()
    model = _unwrapped(model)
    modules = modules_of(model)
    known = ", ".join(map(repr, adapter_names(model))) or "none: no adapter is there"
    layers = {n: m for n, m in modules.items() if isinstance(m, LoRALinear) and name in m.adapters}
    require(bool(layers), "name", name, known)
    saved = {n: m for n, m in modules.items() if isinstance(m, ModuleToSave) and name in m.adapters}
    if modules_to_save_of(saved, modules) != list(saved):
        raise ValueError(f"modules_to_save: {list(saved)} are ends of other modules' names too")
    adapters = {n: layer.adapters[name] for n, layer in layers.items()}
    rank = _common(a.rank for a in adapters.values())
    alpha = _common(a.alpha for a in adapters.values())
    init = _one("init_lora_weights", (a.init_lora_weights for a in adapters.values()))
    config = {
        "alpha_pattern": {
            f"^{re.escape(n)}": a.alpha for n, a in adapters.items() if a.alpha != alpha
        },
        "auto_mapping": {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        },
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": init,
        "lora_alpha": alpha,
        "lora_dropout": _one("dropout", (a.dropout for a in adapters.values())),
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {f"^{re.escape(n)}": a.rank for n, a in adapters.items() if a.rank != rank},
        "revision": None,
        "target_modules": _short(list(layers), modules),
        "task_type": None,
        "use_dora": _one("dora", (a.dora for a in adapters.values())),
        "use_rslora": _one("rslora", (a.rslora for a in adapters.values())),
    }
    tensors = {}
    for n, layer in layers.items():
        tensors[f"{PREFIX}{n}.lora_A.weight"] = layer.lora_A[name].detach().contiguous()
        tensors[f"{PREFIX}{n}.lora_B.weight"] = layer.lora_B[name].detach().contiguous()
        magnitude = layer.magnitude(name)
        if magnitude is not None:
            tensors[f"{PREFIX}{n}.lora_magnitude_vector"] = magnitude.detach().contiguous()
    for n, module in saved.items():
        for key, value in module.modules_to_save[name].state_dict().items():
            tensors[f"{PREFIX}{n}.{key}"] = value.contiguous()
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


# What load_adapter reads, what says nothing about the function, and what only says how A and B began.
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "rank_pattern",
    "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "exclude_modules",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Initialisations that leave the base weights as they are.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: not 'LORA'")
    for key in ("r", "lora_alpha", "target_modules"):
        if config.get(key) is None:
            raise ValueError(f"{path}: {key}: missing")
    for key, value in config.items():
        if key == "bias" and value in (None, "none"):
            continue
        if key == "init_lora_weights" and value not in _INITS:
            raise NotImplementedError(f"{path}: {key}: {value!r}; allowed: {_INITS}")
        if key not in _READ and key not in _HARMLESS and value:
            raise NotImplementedError(f"{path}: {key}: {value!r} is not there yet")
    return config


_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")  # LoRALinear.parameters_of


class _File(NamedTuple):
    """An adapter's tensors, sorted: by layer and their names there; of modules_to_save by key."""

    layers: dict[str, dict[str, Tensor]]
    saved: dict[str, Tensor]


def _read_weights(path: Path) -> _File:
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    layers: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{path}: {key}: not a key of PEFT's, which begin with {PREFIX!r}")
        rest = key[len(PREFIX) :]
        factor = re.fullmatch(r"(.+)\.(lora_[AB]\.weight|lora_magnitude_vector)", rest)
        if factor:
            layers.setdefault(factor[1], {})[factor[2]] = tensor
        elif re.search(r"\.lora_\w+(\.weight|\.bias)?$", rest):
            raise NotImplementedError(f"{path}: {key}: not there yet")
        else:
            saved[rest] = tensor
    return _File(layers, saved)


def _copy_of(module: nn.Module, name: str) -> nn.Module:
    """Whose state dict has the keys that are saved."""
    if isinstance(module, ModuleToSave):
        return module.modules_to_save[name] if name in module.adapters else module.original_module
    return module


def load_adapter(model: nn.Module, dir: str | os.PathLike[str], name: str = "default") -> nn.Module:
    """Read an adapter that PEFT or `save_adapter` wrote, into a model in place; it becomes the active one.

    If the model has no adapter of this name, the layers that the file names get one and everything else is
    frozen, as by `add_lora`. If it has one, its numbers are replaced: the layers, ranks and scales must be
    the file's. Whether dropout is on is the model's own mode, which stays as it is.

    Args:
        model: the base model, whose layers have the names in the file.
        dir: the folder with adapter_config.json and adapter_model.safetensors.
        name: what the adapter is called in the model.

    Returns:
        The model.

    Raises:
        ValueError: naming the key, for files that are damaged or do not fit the model; nothing is changed.
        NotImplementedError: naming the option, for adapters with what finefuse has not (biases, pissa, …).
        FileNotFoundError; ImportError without safetensors.
    """
    check_name(name)
    inner = _unwrapped(model)
    folder = Path(dir)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    file = _read_weights(path)
    modules = modules_of(inner)
    ends = config.get("modules_to_save") or []
    save = modules_to_save_of(ends, modules)
    targets = targets_of(
        inner, modules, config["target_modules"], config.get("exclude_modules") or (), save
    )
    if config.get("layers_to_transform") is None:
        for target in targets:
            if target not in file.layers:
                raise ValueError(f"{path}: {PREFIX}{target}.lora_A.weight: missing")
    plan = {}
    for target, factors in file.layers.items():
        plan[target] = _planned(path, target, modules.get(target), factors, config)
    if not plan:
        raise ValueError(f"{path}: no key of a lora_A")
    _check_saved(path, file.saved, save, modules, name)
    layers = {n: m for n, m in modules.items() if isinstance(m, LoRALinear) and name in m.adapters}
    if name in adapter_names(inner):
        saved = [n for n, m in modules.items() if _has(m, name)]
        _check_same(path, layers, plan, set(saved) ^ set(save), name)
        set_adapter(inner, name)
    else:
        wrap(inner, modules, plan, save, name)
    modules = modules_of(inner)
    with torch.no_grad():
        for target, factors in file.layers.items():
            layer = modules[target]
            assert isinstance(layer, LoRALinear)
            for parameter, key in zip(layer.parameters_of(name), _FACTORS, strict=False):
                parameter.copy_(factors[key])
    for n in save:
        prefix = f"{n}."
        state = {k[len(prefix) :]: v for k, v in file.saved.items() if k.startswith(prefix)}
        _copy_of(modules[n], name).load_state_dict(state)
    return model


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(module, ModuleToSave) and name in module.adapters


def _planned(
    path: Path, target: str, module: nn.Module | None, factors: dict[str, Tensor], config: Any
) -> Adapter:
    """The adapter of a layer, its tensors checked."""
    key = f"{path}: {PREFIX}{target}."
    if module is None:
        raise ValueError(f"{key}{_FACTORS[0]}: the model has no module {target}")
    weight = linear_weight(module)
    if weight is None:
        raise ValueError(f"{key}{_FACTORS[0]}: {target} is a {kind_of(module)}; allowed: {LAYERS}")
    rank = from_pattern(config.get("rank_pattern") or {}, target, config["r"])
    alpha = from_pattern(config.get("alpha_pattern") or {}, target, config["lora_alpha"])
    init = config.get("init_lora_weights", True)
    adapter = Adapter(
        rank,
        alpha,
        config.get("lora_dropout") or 0.0,
        bool(config.get("use_rslora")),
        init if isinstance(init, bool) or init == "gaussian" else True,
        bool(config.get("use_dora")),
    ).check()
    rows, columns = weight.shape
    shapes: tuple[tuple[int, ...], ...] = ((rank, columns), (rows, rank), (rows,))
    for name, shape in zip(_FACTORS, shapes, strict=True):
        if name == _FACTORS[2] and not adapter.dora:
            if name in factors:
                raise ValueError(f"{key}{name}: there, and use_dora is false")
            continue
        if name not in factors:
            raise ValueError(f"{key}{name}: missing")
        tensor = factors[name]
        if not tensor.is_floating_point() or tensor.shape != shape:
            raise ValueError(
                f"{key}{name}: {tensor.dtype} {tuple(tensor.shape)}; allowed: floats {shape}"
            )
    return adapter


def _check_saved(
    path: Path,
    tensors: Mapping[str, Tensor],
    save: Iterable[str],
    modules: Mapping[str, nn.Module],
    name: str,
) -> None:
    wanted = {
        f"{n}.{key}": value
        for n in save
        for key, value in _copy_of(modules[n], name).state_dict().items()
    }
    for key in tensors:
        if key not in wanted:
            raise ValueError(f"{path}: {PREFIX}{key}: no tensor of the model that is to be saved")
    for key, value in wanted.items():
        if key not in tensors:
            raise ValueError(f"{path}: {PREFIX}{key}: missing")
        if tensors[key].shape != value.shape:
            raise ValueError(
                f"{path}: {PREFIX}{key}: shape {tuple(tensors[key].shape)}; the model has "
                f"{tuple(value.shape)}"
            )


def _check_same(
    path: Path,
    layers: Mapping[str, LoRALinear],
    plan: Mapping[str, Adapter],
    different: set[str],
    name: str,
) -> None:
    """Whether the model's adapter of this name is what the file holds."""
    for target in [*plan, *layers]:
        if (target in plan) != (target in layers):
            where = "file" if target in plan else "model"
            raise ValueError(f"{path}: name: {name!r} has {target} only in the {where}")
        ours, theirs = layers[target].adapters[name], plan[target]
        if (ours.rank, ours.scale()) != (theirs.rank, theirs.scale()):
            raise ValueError(
                f"{path}: {target}: rank {theirs.rank}, scale {theirs.scale():g}; {name!r} in the model "
                f"has {ours.rank}, {ours.scale():g}"
            )
        if ours.dora != theirs.dora:
            raise ValueError(
                f"{path}: use_dora: {theirs.dora}; {name!r} in the model has dora={ours.dora} in {target}"
            )
        if layers[target].merged is not None:
            raise ValueError(f"name: {name!r} is merged in {target}; unmerge before")
    if different:
        raise ValueError(
            f"{path}: name: only the file or only {name!r} in the model saves {different}"
        )
