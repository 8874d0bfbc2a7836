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


def usage(path: str) -> list[tuple[str, str, int, int, int]]:
    """(kernel, architecture, registers, shared bytes, local bytes a thread) of every kernel."""
    printed = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    names = subprocess.run(["c++filt"], input=printed, capture_output=True, text=True, check=True)
    rows, arch, kernel = [], "", ""
    for line in names.stdout.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_")
        elif line.startswith(" Function "):
            kernel = line.removeprefix(" Function ").rstrip(":").removeprefix("void ")
            kernel = kernel.rsplit("(", 1)[0].split("(anonymous namespace)::")[-1]
            kernel = kernel.replace("finefuse::", "")
        elif line.startswith("  REG:"):
            n = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            rows.append((kernel, arch, n["REG"], n["SHARED"], n["STACK"] + n["LOCAL"]))
    return rows


def table(rows: list[tuple[str, str, int, int, int]]) -> str:
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
    print("Registers a thread, shared memory a block, local memory a thread (bytes).\n")
    print(table(rows))
    spilled = [row for row in rows if row[4] and HOT.match(row[0])]
    for kernel, arch, *_, local in spilled:
        print(f"{kernel} for sm_{arch} uses {local} bytes of local memory", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
