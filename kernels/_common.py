"""What the Triton kernels of every stem share: float64 functions of one number, segments, the launch.

The subset of Triton that compiles alike under 3.6 and later and that its interpreter runs:

- a 16-bit number becomes float32 right after its load and 16-bit again at its store, for the interpreter's
  bfloat16 arithmetic gives NaN;
- a Python float reaches a kernel as float32 unless its parameter is annotated tl.float64; the interpreter
  hands over the float itself, so a kernel takes it through `number`;
- a condition on one number and one on a block do not go together (the interpreter's `&` makes integers of
  them): what is optional is masked by its count, n or 0;
- no libdevice and no inline assembly: log1p and expm1 are made of tl.log and tl.exp here.
"""

import os

import triton
import triton.language as tl

# Whether Triton's interpreter runs the kernels, on a CPU.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "") not in ("", "0"))

# Places in the flags: csrc/core/place.h, enum Flag.
BAD_TARGETS = tl.constexpr(0)
BAD_CU_SEQLENS = tl.constexpr(1)
BAD_LENGTHS = tl.constexpr(2)
BAD_ADAPTER = tl.constexpr(3)
BAD_TEACHER = tl.constexpr(4)

# csrc/core/dtype.h, enum Reduction.
REDUCE_NONE = tl.constexpr(0)
REDUCE_SUM = tl.constexpr(1)
REDUCE_MEAN = tl.constexpr(2)


def with_presence(tensors, stand_in):
    """What may be absent, each with whether it is there (1, 0): `stand_in` in its place is never followed, so
    that one kernel serves whatever is there."""
    return [x for t in tensors for x in (stand_in if t is None else t, int(t is not None))]


def launch(kernel, programs, *args, num_warps, fuse=True, num_stages=3, **constants):
    """Run `programs` programs of a kernel on torch's current stream.

    fuse: a·b + c in one instruction, said here since Triton's default has changed; not where bits are
    promised. num_stages: loads ahead of a loop of products.
    """
    kernel[(programs,)](
        *args, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fuse
    )


@triton.jit
def number(value):
    """A float argument, or a constant, as float64."""
    return tl.full((), value, tl.float64)


@triton.jit
def integer(value):
    """An integer argument as int64, also where Triton made it a constant because it is 1."""
    return tl.full((), value, tl.int64)


@triton.jit
def log1p(u):
    """log(1 + u), float64. What 1 + u rounds away is put back by u / ((1 + u) - 1)."""
    w = 1.0 + u
    exact = w == 1.0
    return tl.where(exact, u, tl.log(w) * (u / tl.where(exact, 1.0, w - 1.0)))


@triton.jit
def expm1(x, e):
    """e^x - 1, float64, given e = e^x. What e rounds away near 1 is put back by x / log(e)."""
    near_one = e == 1.0
    gone = e == 0.0  # also for x = -inf
    log_e = tl.log(tl.where(near_one | gone, 2.0, e))
    return tl.where(near_one, x, tl.where(gone, -1.0, (e - 1.0) * (x / log_e)))


@triton.jit
def segment(offsets, i, segments, length, total, flags):
    """[begin, end) of segment i within [0, total), and whether the offsets there are in order.

    Where they are not, the range is widened to whatever lies between them, so that all segments together
    cover every token whatever the offsets are.
    """
    begin = i * length
    end = begin + length
    good = begin <= end
    if offsets is not None:
        first = tl.load(offsets + i).to(tl.int64)
        second = tl.load(offsets + i + 1).to(tl.int64)
        # as csrc/bindings/module.cpp, check_offsets: from 0, never falling, to total
        good = (first >= 0) & (first <= second) & (second <= total)
        good = good & ((i > 0) | (first == 0)) & ((i + 1 < segments) | (second == total))
        begin = tl.where(i == 0, 0, first)
        end = tl.where(i + 1 == segments, total, second)
        low = tl.minimum(begin, end)
        end = tl.minimum(tl.maximum(begin, end), total)
        begin = tl.maximum(low, 0)
        if good == 0:
            tl.store(flags + BAD_CU_SEQLENS, 1)
    return begin, end, good


def flag_tokens_of_no_sequence(total, place):
    """Without a segment no kernel sees the offsets; with tokens they cannot be right."""
    if total > 0:
        place[1][BAD_CU_SEQLENS.value].fill_(1)
