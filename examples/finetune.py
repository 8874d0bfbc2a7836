"""Fine-tune a small language model twice, with plain PyTorch and with finefuse, and compare.

    python examples/finetune.py                      # about two minutes on two cores
    python examples/finetune.py --quick              # seconds
    python examples/finetune.py --data pairs.jsonl   # your own preference pairs, in TRL's format

A Llama-style decoder learns a text (the documentation that comes with Python), then learns by DPO to
prefer the true continuation of a passage to a foreign one. Both engines see the same weights and the
same batches, so their losses must agree; what differs is the time and the memory that the
vocabulary takes. Look at `PLAIN` and `FINEFUSE` below: the lines that change in your own training.

Needs: torch, tokenizers, rich, matplotlib. Exit code: 0, 1 where the two engines' losses disagree,
2 for wrong input, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

try:
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from torch import Tensor, nn

    import finefuse as ff
except ImportError as error:
    missing = (error.name or str(error)).split(".")[0]
    how = "." if missing == "finefuse" else "torch tokenizers rich matplotlib"
    print(f"finetune: {missing} is not installed or does not load: pip install {how}", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    print("finetune: stopped", file=sys.stderr)
    sys.exit(130)

SEQUENCE = 128  # tokens in a sequence
BATCH = 16  # sequences in a batch; DPO: half of them chosen, half rejected
PROMPT = 32  # tokens of a passage that are its prompt
BETA = 0.1  # DPO's beta
IGNORE = -100  # the target of a position without a loss: prompt, padding, last of its sequence
TOLERANCE = 1e-3  # largest difference between the engines' losses, relative to the first loss
TEXT_LIMIT = 4_000_000  # characters; more would only make the tokenizer slow


# ---- the model -----------------------------------------------------------------------------------


class Block(nn.Module):
    """One decoder layer: attention with rotary positions, then SwiGLU, each behind an RMSNorm."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, T, dim / heads)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Decoder(nn.Module):
    """Tokens (batch, T) to logits (batch, T, vocab); the output shares the embedding's weights."""

    def __init__(self, vocab: int, dim: int = 128, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden=344) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        half = dim // heads // 2
        angles = torch.outer(torch.arange(SEQUENCE), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        length = tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(x), self.embedding.weight)


# ---- the two engines: everything that changes from plain PyTorch to finefuse -----------------------


class Engine(NamedTuple):
    name: str
    cross_entropy: Callable[[Tensor, Tensor], Tensor]
    """(logits, targets) -> loss"""
    sequence_logprobs: Callable[[Tensor, Tensor], Tensor]
    """(logits, targets) -> log-probability of each sequence, (batch,)"""
    dpo: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(logits, targets, ref_logprobs) -> loss, margins; first half of the batch chosen"""


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def plain_sequence_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    logprobs = logits.log_softmax(dim=-1)
    token_logprobs = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return token_logprobs.masked_fill(targets == IGNORE, 0.0).sum(dim=-1)


def plain_dpo(logits: Tensor, targets: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    rewards = BETA * (plain_sequence_logprobs(logits, targets) - ref_logprobs)
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean(), chosen - rejected


# inplace=True: the gradient overwrites the logits, so nothing else of their size is ever allocated.
# Right wherever the logits are not read after the loss, which is the usual training step.


def fused_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return ff.cross_entropy(logits, targets, ignore_index=IGNORE, inplace=True)


def fused_sequence_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return ff.sequence_logprobs(ff.token_logprobs(logits, targets, ignore_index=IGNORE))


def fused_dpo(logits: Tensor, targets: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    out = ff.preference_loss_from_logits(
        logits, targets, ref_logprobs=ref_logprobs, beta=BETA, ignore_index=IGNORE, inplace=True
    )
    return out.loss, out.margins


PLAIN = Engine("plain PyTorch", plain_cross_entropy, plain_sequence_logprobs, plain_dpo)
FINEFUSE = Engine("finefuse", fused_cross_entropy, fused_sequence_logprobs, fused_dpo)


# ---- the data ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Batch(NamedTuple):
    tokens: Tensor  # (batch, T)
    targets: Tensor  # (batch, T): the next token, or IGNORE
    pairs: Tensor  # (batch / 2,) which pairs these are; empty in supervised training


def fail(message: str) -> NoReturn:
    print(f"finetune: {message}", file=sys.stderr)
    sys.exit(2)


def read_text(path: Path | None) -> str:
    if path is None:
        try:
            topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        except ImportError:
            fail("this Python comes without pydoc_data, the default text: give --text FILE")
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(TEXT_LIMIT)
    except OSError as error:
        fail(f"--text {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"--text {path}: not UTF-8 text ({error.reason})")


def read_pairs(path: Path) -> list[dict[str, str]]:
    """TRL's format: one JSON object a line, with the strings prompt, chosen and rejected."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        fail(f"--data {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"--data {path}: not UTF-8 text ({error.reason})")
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"--data {path}, line {number}"
        try:
            pair = json.loads(line)
        except (ValueError, RecursionError) as error:
            fail(f"{where}: not JSON ({error})")
        if not isinstance(pair, dict):
            fail(f"{where}: a JSON {type(pair).__name__}; an object with prompt, chosen, rejected is needed")
        for key in Pair._fields:
            if key not in pair:
                fail(f"{where}: {key!r} is missing")
            if not isinstance(pair[key], str):
                fail(f"{where}: {key!r} is a {type(pair[key]).__name__}; a string is needed")
            if not pair[key] and key != "prompt":
                fail(f"{where}: {key!r} is empty")
            if any("\ud800" <= character <= "\udfff" for character in pair[key]):
                fail(f"{where}: {key!r} holds half a surrogate pair, which is no character")
        pairs.append(pair)
    if not pairs:
        fail(f"--data {path}: no pairs in the file")
    return pairs


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
