"""Small models and what the tests of adapters do with them: wrap, fill, run, compare, read files."""

from __future__ import annotations

import copy
import io
import pickle

import finefuse as ff
import pytest
import torch
from codebook_cases import numbers
from tolerances import check
from torch import nn

TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


class Tiny(nn.Module):
    """Names that are ends of other names: up and block.up, 0 in a Sequential; a head of its own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 24)
        self.block = nn.ModuleDict({"up": nn.Linear(24, 24), "down": nn.Linear(24, 16, bias=False)})
        self.mix = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.block["down"](torch.tanh(self.block["up"](torch.tanh(self.up(x)))))
        return self.head(self.mix(x))


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny()


def llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()


def fill(model, seed=3):
    """Trained-looking numbers in every parameter that trains."""
    for i, parameter in enumerate(ff.nn.trainable_parameters(model)):
        with torch.no_grad():
            parameter.add_(0.1 * numbers(*parameter.shape, seed=seed + i))
    return model


def output(model, x=None, **options):
    """Logits, without a gradient."""
    with torch.no_grad():
        if x is None:
            x = torch.arange(24).view(2, 12) % 64 if hasattr(model, "config") else numbers(5, 12)
        if x.is_floating_point():
            x = x.to(next(model.parameters()).dtype)
        y = model(x, **options)
    return getattr(y, "logits", y)


def same_function(ours, theirs, **options):
    """The error rule; truth is theirs in float64."""
    truth = output(copy.deepcopy(theirs).double(), **options)
    check("y", output(ours, **options), output(theirs, **options), truth)


def adapted(model):
    return [n for n, m in model.named_modules() if isinstance(m, ff.nn.LoRALinear)]


def peft_config(peft, options):
    names = {
        "targets": "target_modules", "dropout": "lora_dropout", "rslora": "use_rslora",
        "modules_to_save": "modules_to_save", "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern", "init_lora_weights": "init_lora_weights", "dora": "use_dora",
    }  # fmt: skip
    return peft.LoraConfig(r=4, lora_alpha=8, **{names[k]: v for k, v in options.items()})


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def train(model, steps):
    """The losses of `steps` steps of AdamW on what trains."""
    optimizer = torch.optim.AdamW(ff.nn.trainable_parameters(model), lr=1e-2)
    x, y = numbers(64, 12), numbers(64, 4, seed=1)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def copies(model):
    """By deepcopy, by pickle, by torch.save."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    )
