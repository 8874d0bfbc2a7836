"""A small Llama-style decoder, or a local Hugging Face model; both give hidden states and a head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import SEQUENCE, Tokens, fail


class Head(NamedTuple):
    """What makes logits of hidden states: z = hidden Wᵀ + b, or with a softcap c tanh(z / c)."""

    weight: Tensor  # (vocab, dim)
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """Attention with rotary positions, then SwiGLU, each behind an RMSNorm."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list[Tensor] | None) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, T, dim / heads)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past is not None:  # sampling: the keys and values of the tokens before
            if past:
                key, value = (
                    torch.cat(both, dim=2) for both in zip(past, (key, value), strict=True)
                )
            past[:] = key, value
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """Tokens (batch, T) to hidden states (batch, T, dim); the head is the embedding's weight."""

    def __init__(self, vocab: int, dim: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        hidden = (dim * 8 // 3 + 63) // 64 * 64
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        half = dim // heads // 2
        angles = torch.outer(torch.arange(SEQUENCE), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @property
    def body(self) -> nn.Module:
        """The module whose linear layers are quantised, adapted and pruned."""
        return self

    @property
    def head(self) -> Head:
        return Head(self.embedding.weight)

    def new_cache(self) -> list[list[Tensor]]:
        return [[] for _ in self.blocks]

    def forward(self, tokens: Tensor, cache: list[list[Tensor]] | None = None) -> Tensor:
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        here = slice(start, start + tokens.shape[1])
        x = self.embedding(tokens)
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, self.cos[here], self.sin[here], past)
        return self.norm(x)


class HuggingFace(nn.Module):
    """A causal language model of transformers, seen as Decoder is."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    @property
    def head(self) -> Head:
        output = self.body.get_output_embeddings()
        softcap = getattr(self.body.config, "final_logit_softcapping", None)
        return Head(output.weight, getattr(output, "bias", None), softcap)

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        model, config = self.body.base_model, self.body.config
        hidden = model(tokens, past_key_values=cache, use_cache=cache is not None)[0]
        # what some models multiply (Cohere) or divide (Granite) their logits by; MPT's is None
        times, over = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
        scale = (times or 1.0) / (over or 1.0)
        return hidden if scale == 1.0 else hidden * scale


Model = Decoder | HuggingFace


def load_model(folder: Path) -> HuggingFace:
    """The model in a folder, in float32; a line and exit code 2 where that cannot be."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        fail("--model needs transformers: pip install transformers")
    if not (folder / "config.json").is_file():
        fail(f"--model {folder}: no config.json there; a folder of a Hugging Face model is needed")
    try:
        body = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        fail(f"--model {folder}: {first_line(error)}")
    model = HuggingFace(body.eval())
    limit = getattr(body.config, "max_position_embeddings", None)
    if limit is not None and limit < SEQUENCE:
        fail(f"--model {folder}: {limit} positions; at least {SEQUENCE} are needed")
    tokens = torch.arange(8)[None] % model.head.weight.shape[0]
    with torch.no_grad():
        ours, its = model.head.logits(model(tokens)), body(tokens).logits
    if (ours - its).abs().max() > 1e-3 * its.abs().max():
        fail(
            f"--model {folder}: its logits are more than its head's product, a scale and a softcap"
        )
    return model


def load_tokenizer(folder: Path) -> Tokens:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
        fail(f"--model {folder}, its tokenizer: {first_line(error)}")
    end = tokenizer.eos_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    if start is None:
        fail(f"--model {folder}, its tokenizer: neither a beginning nor an end of text is defined")
    return Tokens(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        start=start,
        end=start if end is None else end,
        size=len(tokenizer),
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def sample(model: Model, prompts: list[list[int]], count: int, end: int) -> list[list[int]]:
    """At most `count` tokens after each prompt, drawn from the model; `end` ends one and is kept."""
    drawn: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):  # no padding: alike lengths together
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        tokens, cache, ended = torch.tensor([prompts[i] for i in rows]), model.new_cache(), set()
        for _ in range(count):
            logits = model.head.logits(model(tokens, cache)[:, -1])
            tokens = torch.multinomial(logits.softmax(dim=-1), 1)  # (rows, 1)
            for i, token in zip(rows, tokens[:, 0].tolist(), strict=True):
                if i not in ended:
                    drawn[i].append(token)
                    if token == end:
                        ended.add(i)
            if len(ended) == len(rows):
                break
    return drawn


def clone(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def linears(model: Model) -> dict[str, Any]:
    """The linear layers of the body, its output layer left out: name to module."""
    head = model.head.weight
    return {
        name: module
        for name, module in model.body.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module.weight is not head
    }
