"""Compiles every Triton kernel for sm_90 and sm_80, without a device, and prints what it takes.

    python tests/compile_triton.py [--all]

The variants are what the host functions launch when they are called with every combination of types and
options, long and short rows, aligned and not; nothing else lists them. Compiled are enough of these to have
every choice with every type of number and every loop of the hot kernels (--all: everything, some minutes):
on sm_90 all of these, on sm_80 each kernel with each type and each hot loop, where registers, copies and
products of matrices differ; what a choice outside of the loops makes of the source is the same for both.
Fails where a hot kernel goes to local memory inside a loop: a number or two of the row put aside for as long
as the loop runs, as some versions of ptxas do, cost nothing. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from cuda_resources import cuobjdump
from finefuse._args import DTYPES, REDUCTIONS
from finefuse._args.distill import DISTILL_KINDS
from finefuse._args.policy import KL, SURROGATES
from finefuse.kernels import (
    codebook,
    distill,
    dora,
    linear,
    logprobs,
    lora,
    policy,
    preference,
    prune,
    segmented,
)

ARCHITECTURES = (80, 90)
EVERYTHING_ON = 90
# Memory-bound over the logits or the weight: a spill there costs what the fusion saves.
HOT = (
    "token_logprobs_kernel", "token_logprobs_backward_kernel", "cross_entropy_kernel",
    "quantize_kernel", "dequantize_kernel", "codebook_linear_kernel",
    "codebook_linear_transposed_kernel", "shrink_kernel", "outer_kernel", "expand_kernel",
    "product_kernel", "dropout_kernel", "dora_norm_kernel",
    "dora_scale_kernel", "dora_columns_kernel", "segmented_shrink_kernel", "segmented_outer_kernel",
    "segmented_expand_kernel", "policy_logits_kernel", "prune_histogram_kernel",
    "prune_ties_kernel", "prune_apply_kernel", "prune_row_kernel", "prune_group_kernel",
    "distill_kernel", "linear_token_logprobs_kernel",
)  # fmt: skip
# The argument whose type is what a kernel computes on.
COMPUTED = ("logits", "gradient", "x", "y", "z", "dy", "weight")
MODULES = (codebook, distill, dora, linear, logprobs, lora, policy, preference, prune, segmented)

_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip


@dataclass
class Variant:
    """One launch: what Triton specialises a kernel on."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    fuse: bool
    num_stages: int

    @cached_property
    def specialised(self) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
        """(signature, constants, attributes) as triton.jit makes them from the arguments of a call."""
        signature: dict[str, str] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[Any, Any] = {}
        for i, (name, value) in enumerate(self._arguments().items()):
            parameter = self.kernel.params[i]
            special = not parameter.do_not_specialize
            if (
                parameter.is_constexpr
                or value is None
                or (special and type(value) is int and value == 1)
            ):
                signature[name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + _NAMES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = parameter.annotation_type or "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if special and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes

    def _arguments(self) -> dict[str, Any]:
        named = dict(zip(self.kernel.arg_names, self.args, strict=False))
        return named | self.constants

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def choices(self) -> dict[str, str]:
        """What was chosen: the types of the tensors, what is absent, the constants, the alignment."""
        found = {"kernel": self.name, "num_warps": str(self.num_warps)}
        for name, value in self._arguments().items():
            if value is None or isinstance(value, torch.Tensor):
                found[name] = "-" if value is None else _NAMES[value.dtype]
            elif name in self.constants:
                found[name] = str(value)
            elif name == "vocab":
                found["aligned"] = "yes" if value % 16 == 0 else "no"
        return found

    @property
    def hot(self) -> bool:
        """In the types that models are trained in."""
        return self.name in HOT and not self.wide

    @property
    def wide(self) -> bool:
        """Whether it computes on float64."""
        return "fp64" in (self.choices.get(name) for name in COMPUTED)

    @property
    def architectures(self) -> tuple[int, ...]:
        """Where a host function launches it: tiles of the most shared memory not on sm_80."""
        large = self.name == "linear_token_logprobs_kernel" and self.choices["COLUMNS"] == "256"
        return ARCHITECTURES[large:]

    def compile(self, architecture: int) -> dict[str, int]:
        """What the cubin takes: see resource_usage."""
        source = triton.compiler.ASTSource(self.kernel, *self.specialised)
        compiled = triton.compile(
            source,
            target=triton.backends.compiler.GPUTarget("cuda", architecture, 32),
            options={
                "num_warps": self.num_warps,
                "num_stages": self.num_stages,
                "enable_fp_fusion": self.fuse,
            },
        )
        return resource_usage(compiled.asm["cubin"])


def dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [cuobjdump(), what, file.name], capture_output=True, text=True, check=True
        ).stdout


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, shared and local memory (bytes), and spills in a loop (instructions)."""
    printed = dump(cubin, "--dump-resource-usage")
    usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", printed)}
    local = usage["STACK"] + usage["LOCAL"]  # what is spilled stands in the stack frame
    return {
        "registers": usage["REG"],
        "shared": usage["SHARED"],
        "local": local,
        "in loops": spills_in_loops(dump(cubin, "-sass")) if local else 0,
    }


def spills_in_loops(sass: str) -> int:
    """Loads and stores of local memory between a branch backwards and where it leads."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\w+)([^;]*);", sass)
    code = [(int(address, 16), name, rest) for address, name, rest in found]
    loops = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name == "BRA" and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    spills = [address for address, name, _ in code if name in ("LDL", "STL")]
    return sum(any(low <= address <= high for low, high in loops) for address in spills)


# ---- the variants ------------------------------------------------------------------------------


def recording(into: Callable[[Variant], None], call: bool) -> Any:
    """A `launch` that hands each launch to `into`, and makes it if `call`."""
    real = logprobs.launch

    def launch(
        kernel: Any, programs: int, *args: Any, num_warps: int, fuse: bool = True, num_stages: int = 3,
        **constants: Any,
    ) -> None:  # fmt: skip
        into(Variant(kernel, args, constants, num_warps, fuse, num_stages))
        if call:
            options = {"num_warps": num_warps, "fuse": fuse, "num_stages": num_stages}
            real(kernel, programs, *args, **options, **constants)

    return launch


def all_variants() -> list[Variant]:
    """Calls the host functions with everything they take and keeps what they would launch."""
    found: list[Variant] = []
    before = [module.launch for module in MODULES]
    for module in MODULES:
        module.launch = recording(found.append, call=False)
    try:
        _call_everything()
    finally:
        for module, launch in zip(MODULES, before, strict=True):
            module.launch = launch
    unique = {repr(sorted(v.choices.items())): v for v in found}
    return list(unique.values())


def _call_everything() -> None:
    def tensor(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(0, dtype=dtype)

    place = (0, tensor(torch.int32))
    f64 = tensor(torch.float64)
    indices = [tensor(d) for d in (torch.int64, torch.int32)]
    # long and short rows, and one between that is read twice; aligned, and not
    vocabs = (151936, 50257, 8192, 8191, 512, 257)
    for (name, code), y, vocab in itertools.product(DTYPES.items(), indices, vocabs):
        z, layout = tensor(getattr(torch, name)), (code, 4096, vocab, 4096, 0, vocab)
        x = f64 if z.dtype == torch.float64 else tensor(torch.float32)
        head, int32 = (z, layout, y), y is indices[1]
        for entropy, lse, saved in itertools.product((None, x), (None, x), (None, f64)):
            logprobs.token_logprobs(*head, int32, -100, 0.7, x, entropy, lse, saved, place)
        for h in (None, x):
            logprobs.token_logprobs_backward(
                z, layout, z, layout, y, int32, -100, 0.7, f64, x, h, None, place
            )
        for gradient, upstream, eps, reduction in itertools.product(
            (None, z), (None, x), (0.0, 0.1), REDUCTIONS.values()
        ):
            logprobs.cross_entropy(
                z, layout, gradient, layout, y, int32, -100, eps, reduction,
                x if upstream is None else None, f64 if reduction else None, upstream, place,
            )  # fmt: skip
        logprobs.scale_gradient(*head, int32, -100, x, place)
    for x, mask, offsets in itertools.product(
        (f64, tensor(torch.float32)), (None, tensor(torch.bool)), (None, *indices)
    ):
        for function in (logprobs.sequence_sums, logprobs.sequence_sums_backward):
            function(x, x is f64, mask, offsets, offsets is indices[1], 9, 9, 99, True, x, place)
        for code in (0, 8):  # one that does not sort, one that does
            order = indices[0] if code == 8 else None
            options = ([code], [False], [1.0], *[0.5] * 10, 0, True, 2)
            preference.preference(
                *[x] * 9, 7, order, None, x is f64, 9, 9, options, x, *[x] * 8, place
            )
    _call_codebook(tensor, place)
    _call_lora(tensor, place)
    _call_segmented(tensor, place)
    _call_dora(tensor, place)
    _call_policy(tensor, place)
    _call_prune(tensor, place)
    _call_distill(tensor, place)
    _call_linear(place)


def _call_codebook(tensor: Callable[[torch.dtype], torch.Tensor], place: Any) -> None:
    u8, f32 = tensor(torch.uint8), tensor(torch.float32)
    dtypes = [(tensor(getattr(torch, name)), code) for name, code in list(DTYPES.items())[:3]]
    rules = ((4, 0), (8, 0), (16, 0), (256, 0), (16, 1))
    for (x, dtype), (entries, rule), blocksize in itertools.product(
        dtypes, rules, (*(2**k for k in range(3, 13)), 24)
    ):
        codebook.quantize(x, dtype, 4096, f32, entries, rule, blocksize, u8, f32, place)
    given, nested = (f32, None, None, None, 0, 0.0), (None, u8, f32, f32, 256, 0.5)
    odd = (None, u8, f32, f32, 100, 0.5)  # a nested block size that is no power of two
    for (x, dtype), (entries, _), scales, blocksize in itertools.product(
        dtypes, rules[:4], (given, nested, odd), (64, 24, 7)
    ):
        codebook.dequantize(u8, 4096, f32, entries, *scales, blocksize, x, dtype, place)
        for tokens, columns, transposed, bias in itertools.product(
            (1, 2, 4, 8), (4096, 129), (False, True), (None, x)
        ):
            codebook.codebook_linear(
                x, dtype, tokens, u8, f32, entries, *scales, blocksize, 4096, columns, transposed,
                bias, x, place,
            )  # fmt: skip


def _call_lora(tensor: Callable[[torch.dtype], torch.Tensor], place: Any) -> None:
    dtypes = [(tensor(getattr(torch, name)), code) for name, code in DTYPES.items()]
    drops = ((None, 0, 1.0), (tensor(torch.int64), 1 << 30, 2.0))
    before = lora.shared_memory, torch.get_float32_matmul_precision()
    for (x, dtype), (factor, other), tokens, columns, rank, dropout, precision in itertools.product(
        dtypes, dtypes, (4096, 8), (4096, 75), (8, 32, 64), drops, ("highest", "high")
    ):
        torch.set_float32_matmul_precision(precision)
        h = x if x.dtype == torch.float64 else dtypes[0][0]
        given = (rank, factor, other, columns, 1)
        lora.lora_shrink(
            x, dtype, tokens, columns, *given, h, 1.0, h, h, 1.0, *dropout, place,
        )  # fmt: skip
        for bias, accumulate in ((None, True), (x, False)):
            lora.lora_expand(
                h, tokens, columns, *given, 1.0, bias, accumulate, x, dtype, *dropout, place,
            )  # fmt: skip
        for size, bias in itertools.product((96 << 10, 227 << 10), (None, x)):
            lora.shared_memory = lambda device, size=size: size
            for few in (8, 32, 64) if tokens == 8 else (tokens,):
                lora.lora_product(
                    x, dtype, few, columns, x, columns, 1, columns, h, *given, 1.0, bias, x, *dropout,
                    place,
                )  # fmt: skip
    lora.shared_memory = before[0]
    torch.set_float32_matmul_precision(before[1])


def _call_segmented(tensor: Callable[[torch.dtype], torch.Tensor], place: Any) -> None:
    """Of many adapters, made of lora's steps: each choice once with a type or two; dropout alone."""
    i64, f32 = tensor(torch.int64), tensor(torch.float32)
    drops = (None, 0, 1.0), (i64, 1 << 30, 2.0)
    before = torch.get_float32_matmul_precision()
    for name, dtype in DTYPES.items():
        x = tensor(getattr(torch, name))
        h = x if x.dtype == torch.float64 else f32
        for tokens, columns, rank, (factor, other), scale, dropout, precision in (
            (4096, 4096, 64, (x, dtype), None, drops[0], "highest"),
            (8, 75, 8, (f32, 0), h, drops[1], "high"),
            (4096, 75, 64, (x, dtype), h, drops[1], "high"),
        ):
            torch.set_float32_matmul_precision(precision)
            if x.dtype == torch.float16:  # as bfloat16
                if scale is not None:
                    continue
                tokens, rank, scale = 8, 8, h
            given = (i64, i64, 9, factor, other, rank * columns, columns, 1)
            segmented.segmented_shrink(
                x,
                dtype,
                tokens,
                columns,
                rank,
                *given,
                h,
                scale,
                h,
                h,
                scale,
                tokens == 8,
                *dropout,
                place,
            )
            segmented.segmented_expand(
                h, tokens, columns, rank, *given, scale, x, dtype, *dropout, place
            )
        lora.lora_dropout(x, dtype, 4096, True, x, *drops[1], place)
    torch.set_float32_matmul_precision(before)


def _call_dora(tensor: Callable[[torch.dtype], torch.Tensor], place: Any) -> None:
    f32 = tensor(torch.float32)
    for name, dtype in DTYPES.items():
        x = tensor(getattr(torch, name))
        h = x if x.dtype == torch.float64 else f32
        narrow = (tensor(torch.bfloat16), 1), (tensor(torch.float16), 2)
        others = {"float32": narrow, "float64": ()}.get(name, ((f32, 0),))
        for factor, other in ((x, dtype), *others):
            given = (16, factor, other, 1, 16, factor, other, 4096, 1)
            dora.dora_norm(x, dtype, 4096, 4096, *given, 1.0, h, place)
        for bias in (None, x):
            dora.dora_scale(x, dtype, 4096, 4096, h, bias, True, x, place)
        for dz in (None, x):
            dora.dora_scale_backward(
                x, x, dtype, 4096, 4096, None if dz is None else h, dz, h, place
            )


def _call_policy(tensor: Callable[[torch.dtype], torch.Tensor], place: Any) -> None:
    f64, mask = tensor(torch.float64), tensor(torch.bool)
    i64, i32 = tensor(torch.int64), tensor(torch.int32)

    def options(surrogate: int, kl: int) -> tuple[Any, ...]:
        return (surrogate, 0, kl, False, 1, 0.2, 0.2, 2.0, 2.0, 0.1, 1.0, 1.0, 1.0)

    # A token is computed in float64 whatever its type is: every surrogate, KL, kind of offsets and type
    # once, not with each other.
    f32 = tensor(torch.float32)
    table = list(zip(SURROGATES.values(), itertools.cycle(KL.values()), strict=False))
    offsets = (None, i64, i32, None, i64)
    for (surrogate, kl), ends in zip(table, offsets, strict=True):
        x, m = (f64, mask) if surrogate % 2 else (f32, None)
        policy.policy(
            x, x is f64, m, ends, ends is i32, 9, 11, 99, x, x, x, x, True, options(surrogate, kl), x, x,
            x, x, f64, place,
        )  # fmt: skip
    for x, m in ((f32, None), (f64, mask), (f32, mask)):
        policy.value_loss(x, x is f64, 99, x, x, m, 0.2, x, x, f64, place)
        policy.gae(x, x is f64, 9, 11, x, True, m, 0.9, 0.9, x, x, place)
        policy.group_advantages(x, x is f64, 9, 11, 1, False, x, place)
    policy.gae(f64, True, 9, 11, f64, True, None, 0.9, 0.9, f64, f64, place)
    # Of logits what shapes the loops over the row: the tiles of `tile`, the entropy's gradient, the type;
    # float16, whose gradient is not made in the forward, once.
    long, short = [(151936, 0.0), (151936, 0.1), (8192, 0.0), (512, 0.0)], [(512, 0.0)]
    rows = {"float32": long, "bfloat16": [*long, (50257, 0.0)], "float16": short, "float64": short}
    choices = itertools.cycle(zip(table, offsets, strict=True))
    for name, vocabs in rows.items():
        z = tensor(getattr(torch, name))
        x = f64 if z.dtype == torch.float64 else f32
        for vocab, coef in vocabs:
            (surrogate, kl), ends = next(choices)
            layout = (DTYPES[name], 4096, vocab, 4096, 0, vocab)
            policy.policy_logits(
                z, layout, z, layout, ends if ends is i32 else i64, ends is i32, -100, 0.7, coef,
                ends, ends is i32, 9, 11, x, x, x, x, True, options(surrogate, kl), x, x, x, f64, place,
            )  # fmt: skip


def _call_prune(tensor: Callable[[torch.dtype], torch.Tensor], place: Any) -> None:
    """With a norm and without, a mask and zeros in place: each with every type, not with each other."""
    u8, mask = tensor(torch.uint8), tensor(torch.bool)
    scopes = [(0, 0), (1, 0), *((2, group) for group in (4, 8, 16, 32))]
    for name, dtype in DTYPES.items():
        x = tensor(getattr(torch, name))
        norm = x if x.dtype == torch.float64 else tensor(torch.float32)
        for (scope, group), (scale, kept) in itertools.product(
            scopes, ((None, mask), (norm, None))
        ):
            prune.prune(
                x, dtype, 4096, 4096, scope, 2, group, scale, kept, kept is None, u8, place
            )  # fmt: skip
    for bits in (2, 3, 4, 8):
        prune.prune_codes(u8, 4096, bits, 7, mask, place)


def _call_distill(tensor: Callable[[torch.dtype], torch.Tensor], place: Any) -> None:
    """Every kind with every type, and the tiles; two types, and what may be absent, once each."""
    f64, f32, mask = tensor(torch.float64), tensor(torch.float32), tensor(torch.bool)
    i64, i32 = tensor(torch.int64), tensor(torch.int32)
    rows = itertools.cycle(itertools.product((None, mask), (None, i64, i32)))
    of_top = itertools.cycle((i64, i32, i32, i64, i64))
    for (name, code), (other, teacher_code) in itertools.product(DTYPES.items(), DTYPES.items()):
        z, t = tensor(getattr(torch, name)), tensor(getattr(torch, other))
        x = f64 if z.dtype == torch.float64 else f32
        vocabs = (151936, 50257, 8192, 8191, 257, 512) if name == other else (512,)
        # jsd first, which takes the most: each tile's loop is compiled with it
        for vocab, kind in itertools.product(vocabs, reversed(DISTILL_KINDS.values())):
            layout = (code, 4096, vocab, 4096, 0, vocab)
            short = name == other and vocab == 512
            for gradient, reduction in itertools.product((z, None), (0, 2)):
                for _ in range(6 if short else 1):
                    m, y = next(rows)
                    numbers = (0.3, 0.7, 0.5, 0.5 if y is not None else 0.0)
                    rest = (
                        kind, numbers, m, y, y is i32, -100, reduction, x, f64 if reduction else None, x,
                        place,
                    )  # fmt: skip
                    before = (z, layout, vocab, gradient, layout, t)
                    of_teacher = (teacher_code, 4096, vocab, 4096, 0, vocab)
                    distill.distill(*before, of_teacher, None, False, *rest)
                    indices = next(of_top)
                    widths = [(teacher_code, 4096, k, 4096, 0, k) for k in (16, 20, 512)]
                    for teacher_layout in widths if short else widths[:1]:
                        distill.distill(*before, teacher_layout, indices, indices is i32, *rest)


def _call_linear(place: Any) -> None:
    """Few rows and many, much shared memory and little; an inner dimension of whole tiles, and an odd one."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    indices = itertools.cycle((torch.int64, torch.int32))
    left = itertools.cycle(itertools.product((False, True), (False, True)))
    before, vocab = linear.shared_memory, 131072
    for name, rows, size, inner, biased, softcap, with_entropy in itertools.product(
        list(DTYPES)[:3], (8, 40, 4096), (96 << 10, 227 << 10), (4096, 75), (True, False), (30.0, 0.0),
        (True, False),
    ):  # fmt: skip
        linear.shared_memory = lambda device, size=size: size
        dtype, x = getattr(torch, name), tensor(rows)
        lse, saved = next(left)
        linear.linear_token_logprobs(
            tensor(rows, inner, dtype=dtype), tensor(vocab, inner, dtype=dtype),
            tensor(vocab, dtype=dtype) if biased else None, tensor(rows, dtype=next(indices)), -100, 0.7,
            softcap, x, x if with_entropy else None, x if lse else None,
            tensor(2 + with_entropy, rows, dtype=torch.float64) if saved else None,
            tensor(*linear.partial_shape(rows, vocab, inner)), place,
        )  # fmt: skip
    linear.shared_memory = before


def pairs(variant: Variant) -> set[tuple[str, ...]]:
    """Each choice of a variant, with its kernel and with the type that it computes on."""
    first = next(iter(variant.kernel.arg_names))
    kernel, dtype = variant.name, variant.choices[first]
    return {(kernel, dtype, name, value) for name, value in variant.choices.items()}


@functools.cache
def known_pairs() -> set[tuple[str, ...]]:
    """All choices of all that can be launched."""
    return set().union(*map(pairs, all_variants()))


def loop(variant: Variant) -> tuple[str, ...] | None:
    """What shapes the loop of a hot kernel: its tile; over a row of logits, where unaligned bfloat16 stands
    for all, the row's pieces and what is made of them."""
    c = variant.choices
    if variant.hot and "TOKENS" in c:
        tile = ("num_warps", "TOKENS", "COLUMNS", "INNER", "RANKS")
        return (variant.name, c[variant.kernel.arg_names[0]], *(c.get(name, "") for name in tile))
    if variant.name.startswith("distill") and c.get("logits") == "fp16":  # as bfloat16
        return None
    if not variant.hot or "logits" not in c or (c["logits"] != "bf16" and c["aligned"] == "no"):
        return None
    names = ("kernel", "logits", "num_warps", "BLOCK", "aligned", "SMOOTHING", "ENTROPY")
    absent = [str(c.get(name) == "-") for name in ("entropy", "h", "gradient")]
    return (*(c.get(name, "") for name in names), *absent)


def shows(variant: Variant) -> set[tuple[str, ...]]:
    """What compiling it shows. Distillation and pruning compute on float32 whatever 16 bits they read, and on
    float64 as on float32: every pair of float32 and bfloat16, float16 once, float64 with each constant."""
    found, choices = pairs(variant), variant.choices
    if variant.name.startswith(("distill_", "prune_")):
        dtype = choices.get("logits", choices.get("weight"))
        if dtype == "fp16":
            return {pair for pair in found if pair[2] == "kernel"}
        if dtype == "fp64":
            return {pair for pair in found if pair[2] in ("kernel", "KIND", "HARD", "ZERO")}
    return found


def typed(variant: Variant) -> tuple[str, str, bool]:
    """A kernel, the type of its first argument, and whether it computes on float64."""
    return variant.name, variant.choices[next(iter(variant.kernel.arg_names))], variant.wide


def cover(candidates: list[tuple[Variant, set[Any]]]) -> Iterator[Variant]:
    """Few that show all that the candidates do: always the one that shows most of what is missing."""
    missing = set().union(*(shown for _, shown in candidates))
    while missing:
        v, shown = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        missing -= shown
        yield v


def chosen(variants: list[Variant]) -> list[tuple[Variant, int]]:
    """What is compiled, and for which architecture: see above."""
    by_kernel: dict[str, list[Variant]] = {}
    for v in variants:
        by_kernel.setdefault(v.name, []).append(v)
    jobs: list[tuple[Variant, int]] = []
    for few in by_kernel.values():
        everything = cover([(v, shows(v) | ({loop(v)} - {None})) for v in few])
        jobs += [(v, EVERYTHING_ON) for v in everything]
        for a in ARCHITECTURES:
            if a != EVERYTHING_ON:
                there = [v for v in few if a in v.architectures]
                others = cover([(v, {typed(v)} | ({loop(v)} - {None})) for v in there])
                jobs += [(v, a) for v in others]
    return jobs


# ---- the table ---------------------------------------------------------------------------------


def _compile(job: tuple[int, int]) -> tuple[dict[str, int], float]:
    """What the cubin takes, and the seconds of CPU that it took."""
    index, architecture = job
    before = sum(os.times()[:4])
    usage = _VARIANTS[index].compile(architecture)
    return usage, sum(os.times()[:4]) - before


_VARIANTS: list[Variant] = []


def main() -> int:
    global _VARIANTS
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("TRITON_INTERPRET is set: there is nothing to compile")
    found = all_variants()
    total = len(found)
    pairs_of = [(v, a) for v in found for a in v.architectures]
    chosen_jobs = pairs_of if "--all" in sys.argv[1:] else chosen(found)
    _VARIANTS = [v for v, _ in chosen_jobs]
    jobs = [(index, architecture) for index, (_, architecture) in enumerate(chosen_jobs)]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor() as pool:
            results = list(pool.map(_compile, jobs, chunksize=2))
    print("| kernel | variant | arch | registers | shared | spills (local bytes, in loops) |")
    print("|---|---|---|---|---|---|")
    failed = 0
    largest: dict[tuple[str, int], list[int]] = {}  # of each kernel, float64 apart
    taken: dict[str, list[float]] = {}  # of each module: the seconds of each cubin
    for (index, architecture), (usage, seconds) in zip(jobs, results, strict=True):
        v = _VARIANTS[index]
        taken.setdefault(v.kernel.fn.__module__, []).append(seconds)
        options = ", ".join(f"{k} {w}" for k, w in v.choices.items() if k != "kernel")
        spilled = v.hot and usage["in loops"] > 0
        failed += spilled
        print(
            f"| {v.name} | {options} | sm_{architecture} | {usage['registers']} | {usage['shared']} "
            f"| {usage['local']}, {usage['in loops']}{' FAILS' if spilled else ''} |"
        )
        name = v.name + (" float64" if v.wide else "")
        most = largest.setdefault((name, architecture), [0, 0, 0])
        most[:] = map(max, most, (usage["registers"], usage["shared"], usage["local"]))
    print("\nThe most of any variant: registers a thread, shared, local memory (bytes).\n")
    print("| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |")
    print("|---" * (len(ARCHITECTURES) + 1) + "|")
    for name in sorted({name for name, _ in largest}):
        cells = [", ".join(map(str, largest[name, a])) for a in ARCHITECTURES]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| module | cubins | CPU seconds, all | the slowest |\n|---|---|---|---|")
    for module, times in sorted(taken.items(), key=lambda item: -sum(item[1])):
        print(f"| {module} | {len(times)} | {sum(times):.0f} | {max(times):.1f} |")
    print(f"\n{len(set(map(id, _VARIANTS)))} of {total} variants, Triton {triton.__version__}")
    if failed:
        print(f"{failed} hot kernels spill to local memory in a loop", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
