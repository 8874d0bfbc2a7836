"""Prints what the kernels of finefuse._CUDA take, and fails where a hot one spills to local memory.

    python tests/cuda_resources.py build/.../_CUDA*.so

No device is needed: cuobjdump (Triton's wheel carries one) reads it from the machine code.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Bound by memory over the logits or the weight; float64 is there for gradcheck, not for speed.
HOT = re.compile(
    r"^(token_logprobs|token_logprobs_backward|cross_entropy|scale_gradient|quantize|dequantize|"
    r"codebook_linear|codebook_linear_transposed|shrink|outer|expand|dropout|lora_linear|"
    r"dora_norm|dora_scale|dora_columns|segmented_shrink|segmented_few|segmented_outer|"
    r"segmented_expand|policy_logits|prune_histogram|prune_ties|prune_apply|prune_row|"
    r"prune_group|distill)_kernel<(?!double)"
)


def cuobjdump() -> str:
    """The one that Triton carries, or one on PATH."""
    spec = find_spec("triton")
    carried = (
        Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    )
    found = str(carried) if carried and carried.exists() else shutil.which("cuobjdump")
    if found is None:
        raise SystemExit("no cuobjdump: neither in Triton nor on PATH")
    return found


# Of a multiprocessor: threads, blocks, bytes of shared memory (CUDA C++ Programming Guide, compute
# capabilities); all have 65536 registers.
MULTIPROCESSORS = {
    "80": (2048, 32, 164 << 10),
    "90a": (2048, 32, 228 << 10),
    "100": (2048, 32, 228 << 10),
    "120": (1536, 24, 100 << 10),
}


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's threads that blocks of so many fill.

    A quarter of the registers belongs to each of four schedulers, which give a warp steps of 256. A block
    takes a KiB of shared memory beside its own, which cuobjdump counts from sm_90 on.
    """
    most_threads, most_blocks, most_shared = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    of_registers = 4 * (16384 // (256 * -(-32 * registers // 256))) // warps
    blocks = min(most_blocks, most_threads // threads, of_registers)
    shared += 1024 if arch == "80" else 0
    blocks = min(blocks, most_shared // max(shared, 1024))
    return blocks * threads / most_threads


def printed_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def launch_bounds(path: str) -> dict[tuple[str, str], int]:
    """The most threads of a block by (architecture, mangled name), where a kernel declares them."""
    found, arch, kernel, lines = (
        {},
        "",
        "",
        iter(printed_by(cuobjdump(), "-elf", path).splitlines()),
    )
    for line in lines:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_")
        elif line.startswith(".nv.info."):
            kernel = line.removeprefix(".nv.info.").strip()
        elif "EIATTR_MAX_THREADS" in line:
            next(lines)  # the format
            x, y, z = (int(n, 16) for n in re.findall(r"0x[0-9a-f]+", next(lines)))
            found[arch, kernel] = x * y * z
    return found


def usage(path: str) -> list[tuple[str, str, int, int, int, str]]:
    """(kernel, architecture, registers, shared bytes, local bytes a thread, occupancy) of every kernel."""
    bounds = launch_bounds(path)
    printed = printed_by(cuobjdump(), "--dump-resource-usage", path)
    names = subprocess.run(["c++filt"], input=printed, capture_output=True, text=True, check=True)
    rows, arch, kernel, mangled = [], "", "", ""
    for line, plain in zip(names.stdout.splitlines(), printed.splitlines(), strict=True):
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_")
        elif line.startswith(" Function "):
            kernel = line.removeprefix(" Function ").rstrip(":").removeprefix("void ")
            kernel = kernel.replace("(anonymous namespace)::", "").replace("finefuse::", "")
            kernel = re.sub(r"(?<=[>\w])\(.*", "", kernel).replace("cuda::", "")
            mangled = plain.removeprefix(" Function ").rstrip(":")
        elif line.startswith("  REG:"):
            n = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            threads = bounds.get((arch, mangled))
            fill = f"{occupancy(arch, threads, n['REG'], n['SHARED']):.0%}" if threads else "?"
            rows.append((kernel, arch, n["REG"], n["SHARED"], n["STACK"] + n["LOCAL"], fill))
    return rows


def table(rows: list[tuple[str, str, int, int, int, str]]) -> str:
    """A line a kernel, a column an architecture."""
    kernels: dict[str, dict[str, str]] = {}
    for kernel, arch, *numbers in sorted(rows):
        kernels.setdefault(kernel, {})[arch] = ", ".join(map(str, numbers))
    archs = sorted({row[1] for row in rows}, key=lambda a: int(a.rstrip("af")))
    lines = [
        "| kernel | " + " | ".join(f"sm_{a}" for a in archs) + " |",
        "|---" * (len(archs) + 1) + "|",
    ]
    lines += [
        f"| {k} | " + " | ".join(c.get(a, "") for a in archs) + " |" for k, c in kernels.items()
    ]
    return "\n".join(lines)


def main(paths: list[str]) -> int:
    rows = [row for path in paths for row in usage(path)]
    if not any(HOT.match(row[0]) for row in rows):
        raise SystemExit(f"no hot kernel in {paths}")
    print(
        "Registers a thread, shared memory a block, local memory a thread (bytes), occupancy: the share of\n"
        "a multiprocessor's threads that are there at once in blocks of the declared size, by registers\n"
        "and static shared memory; ?: no size is declared.\n"
    )
    print(table(rows))
    spilled = [row for row in rows if row[4] and HOT.match(row[0])]
    for kernel, arch, _, _, local, _ in spilled:
        print(f"{kernel} for sm_{arch} uses {local} bytes of local memory", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
