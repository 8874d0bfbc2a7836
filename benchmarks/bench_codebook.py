"""Packed weights: dequantising, quantising and the linear layer, NF4 with blocks of 64 unless a case says
otherwise.

aten's int4 layer holds other numbers, of a uniform code in bfloat16: its error is not compared.

Bytes at least, of an element: half a byte of codes (one in 8 bits), four bytes a block of absmax, and the
element itself, read or written once. The layer reads codes, absmax and x and writes y. "The bare product" is
the fastest one of a library here, of the weight already decoded (in float32 where the type's own crawls): the
limit of many tokens. Few tokens take the time that their bytes take to be read, and the packed ones are
fewer. Where a case says "one thread" every candidate has one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import finefuse as ff
import torch
from finefuse import _matmul
from torch import Tensor
from torch.nn import functional

from . import peers, roofline
from .measure import Row, Size, compare_calls, compare_outputs, forward, name_of, repeated
from .peers import BITSANDBYTES, OURS, TORCH, TORCHAO, Candidates

BLOCKSIZE = 64
QUICK_SIZE = 512
SHAPES = {"cpu": (4096, 4096), "cuda": (4096, 14336)}
IN_L2 = (256, 1024)  # 256 K elements
# tokens, type of x, whether on one thread
LINEAR = {
    "cpu": (
        (1, torch.bfloat16, True),
        (8, torch.bfloat16, True),
        (64, torch.bfloat16, True),
        (512, torch.bfloat16, True),
        (1, torch.float32, True),
        (8, torch.float32, True),
        (64, torch.float32, True),
        (512, torch.float32, True),
        (512, torch.float32, False),
    ),
    "cuda": tuple((tokens, torch.bfloat16, False) for tokens in (1, 2, 4, 8, 16, 512)),
}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    yield
    torch.set_num_threads(before)


def packed(x: Tensor) -> int:
    """Bytes of x in NF4."""
    return x.numel() // 2 + 4 * x.numel() // BLOCKSIZE


def nf4_by_bitsandbytes(weight: Tensor) -> Any:
    """(codes, quant state)."""
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")


def nf4_by_torchao(weight: Tensor) -> Any:
    from torchao.quantization import to_nf4

    return to_nf4(weight, BLOCKSIZE, 256)


def made(name: str, needs: str, make: Callable[[], Callable[[], Any]]) -> Candidates:
    """A candidate that prepares its inputs first, if its package is there and can."""
    if not peers.load({name: (needs, make)}, "any"):
        return {}
    try:
        return {name: (needs, make())}
    except Exception as error:  # a peer's own limits
        peers.left_out(name, f"{type(error).__name__}: {error}")
        return {}


# ---- dequantise --------------------------------------------------------------------------------


def in_c(weight: Tensor) -> Callable[[], Callable[[], Tensor]]:
    def make() -> Callable[[], Tensor]:
        codes, state = nf4_by_bitsandbytes(weight)
        out = torch.empty(weight.shape, dtype=torch.bfloat16)
        return lambda: peers.dequantize_in_c(codes, state.absmax, out, BLOCKSIZE)

    return make


def dequantize_out(
    weight: Tensor, calls: int = 1, note: str = "", nested: bool = False
) -> list[Row]:
    """Into memory that is there: what the kernel is worth."""
    q = ff.quantize(weight, blocksize=BLOCKSIZE, double_quant=nested)
    truth = ff.dequantize(q, torch.float64)
    out = torch.empty_like(weight, dtype=torch.bfloat16)

    def bitsandbytes() -> Callable[[], Tensor]:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(
            weight.bfloat16(), blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=nested
        )
        return lambda: dequantize_4bit(codes, state, out=out)

    runs: Candidates = {"finefuse": (OURS, lambda: ff.dequantize(q, out=out))}
    if weight.is_cpu and not nested:
        runs |= made("bitsandbytes, its C function", BITSANDBYTES, in_c(weight))
    else:
        runs |= made("bitsandbytes", BITSANDBYTES, bitsandbytes)
    case = f"dequantize NF4 {shape(weight)} to bfloat16, out= given{note}"
    moved = packed(weight) + out.nbytes
    rows = compare_outputs(case, peers.load(runs, weight.device.type), truth, moved, calls)
    blank = torch.empty_like(out)
    (fill,) = compare_outputs(case, {"fill_ of the output": blank.zero_}, truth, out.nbytes, calls)
    fill.error = None
    return [*rows, fill]


def dequantize_fresh(weight: Tensor, dtype: torch.dtype) -> list[Row]:
    """The public calls, which make their output."""
    q = ff.quantize(weight, blocksize=BLOCKSIZE)
    decode = peers.compiled(peers.nf4_decoded)

    def bitsandbytes() -> Callable[[], Tensor]:
        from bitsandbytes.functional import dequantize_4bit

        codes, state = nf4_by_bitsandbytes(weight.to(dtype))
        return lambda: dequantize_4bit(codes, state)

    def torchao() -> Callable[[], Tensor]:
        form = nf4_by_torchao(weight.to(dtype))
        return form.get_original_weight

    runs: Candidates = {
        "finefuse": (OURS, lambda: ff.dequantize(q, dtype)),
        "torch.compile": (
            TORCH, lambda: decode(q.codes, q.code, q.absmax, BLOCKSIZE, dtype).view(weight.shape)
        ),
    }  # fmt: skip
    runs |= made("bitsandbytes", BITSANDBYTES, bitsandbytes)
    runs |= made("torchao", TORCHAO, torchao)
    return compare_outputs(
        f"dequantize NF4 {shape(weight)} to {name_of(dtype)}, fresh output",
        no_grad(peers.load(runs, weight.device.type)),
        ff.dequantize(q, torch.float64),
        packed(weight) + weight.numel() * dtype.itemsize,
    )


def dequantize_8bit(weight: Tensor) -> list[Row]:
    q = ff.quantize(weight, "dynamic8", 256)

    def bitsandbytes() -> Callable[[], Tensor]:
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        _, state = quantize_blockwise(weight, blocksize=256)
        codes = q.codes.view(weight.shape)  # its own are not always the nearest
        return lambda: dequantize_blockwise(codes, state)

    runs: Candidates = {"finefuse": (OURS, lambda: ff.dequantize(q))}
    runs |= made("bitsandbytes", BITSANDBYTES, bitsandbytes)
    return compare_outputs(
        f"dequantize 8 bits {shape(weight)}, block 256, to float32, fresh output",
        peers.load(runs, weight.device.type),
        ff.dequantize(q, torch.float64),
        q.codes.nbytes + q.absmax.nbytes + weight.nbytes,
    )


# ---- quantise ----------------------------------------------------------------------------------


def quantize(weight: Tensor) -> list[Row]:
    """Errors: of what the codes decode to, against the weight."""
    table = ff.quantize(weight).code
    thresholds = (table[:-1] + table[1:]) / 2
    encode = peers.compiled(peers.nf4_quantized)

    def tried(function: Callable[[Tensor], Any]) -> Callable[[], Callable[[], Any]]:
        """What cannot run fails here, and is left out."""

        def make() -> Callable[[], Any]:
            function(weight)
            return lambda: function(weight)

        return make

    runs: Candidates = {
        "finefuse": (OURS, lambda: ff.quantize(weight, blocksize=BLOCKSIZE)),
        "torch.compile": (TORCH, lambda: encode(weight, thresholds, BLOCKSIZE)),
    }
    runs |= made("bitsandbytes", BITSANDBYTES, tried(nf4_by_bitsandbytes))
    runs |= made("torchao", TORCHAO, tried(nf4_by_torchao))

    def read(out: Any) -> Tensor:
        if isinstance(out, ff.CodebookTensor):
            return ff.dequantize(out)
        if not isinstance(out, tuple):
            return out.get_original_weight()
        codes, absmax = out[0].flatten(), getattr(out[1], "absmax", out[1])
        return peers.nf4_decoded(codes, table, absmax, BLOCKSIZE, torch.float32).view(weight.shape)

    case = f"quantize NF4 {shape(weight)} float32"
    moved = weight.nbytes + packed(weight)
    return compare_outputs(
        case, peers.load(runs, weight.device.type), weight.double(), moved, read=read
    )


def quantize_8bit(weight: Tensor) -> list[Row]:
    def bitsandbytes() -> Callable[[], Any]:
        from bitsandbytes.functional import quantize_blockwise

        return lambda: quantize_blockwise(weight, blocksize=256)

    def read(out: Any) -> Tensor:
        if isinstance(out, ff.CodebookTensor):
            return ff.dequantize(out)
        codes, state = out
        values = state.code[codes.flatten().int()].view(-1, 256) * state.absmax[:, None]
        return values.view(weight.shape)

    runs: Candidates = {"finefuse": (OURS, lambda: ff.quantize(weight, "dynamic8", 256))}
    runs |= made("bitsandbytes", BITSANDBYTES, bitsandbytes)
    return compare_outputs(
        f"quantize 8 bits {shape(weight)} float32, block 256",
        peers.load(runs, weight.device.type),
        weight.double(),
        weight.nbytes + weight.numel() + 4 * weight.numel() // 256,
        read=read,
    )


# ---- the linear layer --------------------------------------------------------------------------


def linear(weight: Tensor, tokens: int, dtype: torch.dtype, one_thread: bool) -> list[Row]:
    """bitsandbytes with a gradient asked for (its training path) and, in a layer, without (which repacks
    where the CPU has bfloat16 products)."""
    q = ff.quantize(weight, blocksize=BLOCKSIZE)
    x = torch.randn(tokens, weight.shape[1], device=weight.device).to(dtype)
    runs: Candidates = {"finefuse": (OURS, lambda: ff.codebook_linear(x, q))}
    if peers.crawls(weight.device.type, dtype, len(weight)):
        peers.left_out("products in bfloat16 (F.linear, bitsandbytes)", peers.CRAWLS)
    else:
        runs |= torch_products(weight, ff.dequantize(q, dtype), x)
    if weight.is_cpu and dtype is torch.bfloat16:
        runs |= made("aten int4 (uniform)", TORCH, lambda: int4(weight, x))
    case = f"codebook_linear {tokens} x {shape(weight)} {name_of(dtype)}"
    rows = compare_with_product(
        case + (", one thread" if one_thread else ""),
        runs, x, ff.dequantize(q, dtype), x.double() @ ff.dequantize(q, torch.float64).t(),
    )  # fmt: skip
    for row in rows:
        row.error = None if row.name.startswith("aten") else row.error
    return rows


def compare_with_product(
    case: str, runs: Candidates, x: Tensor, plain: Tensor, truth: Tensor
) -> list[Row]:
    """Candidates for x · plainᵀ from packed bytes, and the bare product, which reads what is decoded."""
    device, rest = x.device.type, x.nbytes + truth.numel() * x.itemsize
    runs = {**runs, "the bare product": (TORCH, roofline.bare_product(x, plain))}
    rows = compare_outputs(case, peers.load(runs, device), truth, packed(plain) + rest)
    rows[-1].moved = plain.numel() * _matmul.product_dtype(x).itemsize + rest
    return rows


def int4(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(weight.shape[1] // BLOCKSIZE, weight.shape[0], 2).bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, pack, BLOCKSIZE, scales)


def torch_products(weight: Tensor, plain: Tensor, x: Tensor) -> Candidates:
    leaf = x.clone().requires_grad_()

    def training() -> Callable[[], Tensor]:
        import bitsandbytes as bnb

        codes, state = nf4_by_bitsandbytes(weight.to(x.dtype))
        return lambda: bnb.matmul_4bit(leaf, codes.t(), quant_state=state).detach()

    def inference() -> Callable[[], Tensor]:
        layer = forward(peers.linear4bit(weight.to(x.dtype)).eval())
        return lambda: layer(x)

    runs: Candidates = {"F.linear, not quantised": (TORCH, lambda: functional.linear(x, plain))}
    runs |= made("bitsandbytes, training", BITSANDBYTES, training)
    return runs | made("bitsandbytes, inference", BITSANDBYTES, inference)


def linear_backward(weight: Tensor, tokens: int, dtype: torch.dtype) -> list[Row]:
    """dx alone, from an upstream gradient."""
    q = ff.quantize(weight, blocksize=BLOCKSIZE)
    plain = ff.dequantize(q, dtype)
    x = torch.zeros(tokens, weight.shape[1], device=weight.device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, weight.shape[0], device=weight.device).to(dtype)

    def gradient(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        y = function()
        return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    def bitsandbytes() -> Callable[[], Tensor]:
        import bitsandbytes as bnb

        codes, state = nf4_by_bitsandbytes(weight.to(dtype))
        return gradient(lambda: bnb.matmul_4bit(x, codes.t(), quant_state=state))

    runs = peers.load({"finefuse": (OURS, lambda: ff.codebook_linear(x, q))}, weight.device.type)
    candidates: Candidates = {name: (TORCH, gradient(run)) for name, run in runs.items()}
    if not peers.crawls(weight.device.type, dtype, len(weight)):
        candidates["F.linear, not quantised"] = (
            TORCH,
            gradient(lambda: functional.linear(x, plain)),
        )
        candidates |= made("bitsandbytes", BITSANDBYTES, bitsandbytes)
    return compare_with_product(
        f"codebook_linear's dx {tokens} x {shape(weight)} {name_of(dtype)}",
        candidates, dy, plain.t(), dy.double() @ ff.dequantize(q, torch.float64),
    )  # fmt: skip


def calls() -> list[Row]:
    """Where calling is all: 4 x 64 x 64."""
    weight = draw(64, 64)
    q, x, plain = ff.quantize(weight), torch.randn(4, 64), weight.clone()
    leaf, dy = x.clone().requires_grad_(), torch.ones(4, 64)

    def both(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            leaf.grad = None
            function(leaf).backward(dy)

        return call

    def bitsandbytes() -> Callable[[], Tensor]:
        layer = peers.linear4bit(weight).eval()
        return lambda: layer(x)

    runs: Candidates = {
        "x + x": (TORCH, lambda: x + x),
        "F.linear": (TORCH, lambda: functional.linear(x, plain)),
        "codebook_linear": (OURS, lambda: ff.codebook_linear(x, q)),
        "F.linear, forward + backward": (TORCH, both(lambda x: functional.linear(x, plain))),
        "codebook_linear, forward + backward": (OURS, both(lambda x: ff.codebook_linear(x, q))),
    }
    runs |= made("bitsandbytes, inference", BITSANDBYTES, bitsandbytes)
    repeats = {name: repeated(f, 100) for name, f in peers.load(runs, "cpu").items()}
    return compare_calls("a call on 4x64, weight 64x64", repeats, "cpu", 100, rounds=41)


# ---- all of it ---------------------------------------------------------------------------------


def draw(rows: int, columns: int, device: str = "cpu") -> Tensor:
    """Numbers that bfloat16 holds: forms made from either type have the same codes."""
    return (torch.randn(rows, columns, device=device) * 0.02).bfloat16().float()


def shape(weight: Tensor) -> str:
    return "x".join(map(str, weight.shape))


def no_grad(runs: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    return {name: forward(run) for name, run in runs.items()}


def run(device: str, size: Size) -> Iterator[list[Row]]:
    quick = size == "quick"
    warnings.filterwarnings("ignore", module="bitsandbytes|torchao")
    rows, columns = (QUICK_SIZE, QUICK_SIZE) if quick else SHAPES[device]
    weight = draw(rows, columns, device)
    yield dequantize_out(weight)
    if size == "standard":
        yield quantize(weight)
        for tokens in (1, 64):
            with threads(1):
                yield linear(weight, tokens, torch.float32, True)
        return
    if device == "cpu":
        yield calls()
        with threads(1):
            yield dequantize_out(draw(*IN_L2), 100, ", in L2, one thread")
        for dtype in (torch.bfloat16, torch.float32):
            yield dequantize_fresh(weight, dtype)
        yield dequantize_8bit(weight)
        yield quantize_8bit(weight)
    else:
        yield dequantize_out(weight, note=", double quantisation", nested=True)
    yield quantize(weight)
    for tokens, dtype, one_thread in LINEAR[device]:
        with threads(1 if one_thread else None):
            yield linear(weight, tokens, dtype, one_thread)
    for tokens in (1, 16, 512):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        yield linear_backward(weight, tokens, dtype)
