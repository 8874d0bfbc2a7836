"""Modules on finefuse's functions."""

from ._adapter_files import load_adapter, save_adapter
from ._adapters import (
    ModuleToSave,
    add_lora,
    disable_adapter,
    merge_and_unload,
    set_adapter,
    trainable_parameters,
)
from ._layers import CodebookLinear, LoRALinear
from ._passes import mixed_batch

__all__ = [
    "CodebookLinear",
    "LoRALinear",
    "ModuleToSave",
    "add_lora",
    "disable_adapter",
    "load_adapter",
    "merge_and_unload",
    "mixed_batch",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
]
