"""python -m benchmarks [--full | --quick] [FAMILY ...] [--device cpu|cuda]: measure, print, write results.

python -m benchmarks: a few cases of every family, about ten minutes; writes benchmarks/results/cpu.json, .md,
.svg and .html and the table in README.md. With families: these alone, on the terminal. --full: all cases of
each family, minutes to a quarter of an hour for each, into benchmarks/results/FAMILY.*. --quick: tiny shapes,
to see that everything runs. --results DIR: what was measured is written there.

On a CPU all is measured twice, in two processes: with the allocator that users have, and with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which gives every candidate huge pages. On a GPU each family runs once
and in full, and one set of files, named after the device (.json, .md, .svg and .html), holds all families.

python -m benchmarks report                  tables, plots and pages anew from the JSON
python -m benchmarks compare A.json B.json   what moved beyond the noise
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import Size

FAMILIES = (
    "bandit", "codebook", "distill", "dora", "linear", "logprobs", "lora", "policy", "preference",
    "prune", "segmented",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# What a result says the versions of, or that it was not there.
PACKAGES = (
    "torch", "numpy", "triton", "peft", "trl", "liger-kernel", "bitsandbytes", "torchao", "transformers",
)  # fmt: skip
STANDARD_SECONDS = 1.0  # after which no further round of a case of that size begins


def measure(families: list[str], device: str, size: Size, out: Path) -> None:
    """Families in this process, with its allocator; what was measured goes to `out`."""
    import torch

    from . import measure, report, roofline

    limits = roofline.limits(device, size == "quick")
    print(f"{report.machine(device)}\n{report.measured(limits)}", flush=True)
    if size == "standard":
        measure.most_seconds = STANDARD_SECONDS
    tables: list[Any] = []
    for number, family in enumerate(families, start=1):
        start = time.perf_counter()
        torch.manual_seed(0)
        for rows in importlib.import_module(f"benchmarks.bench_{family}").run(device, size):
            tables.append([row.as_dict(family, limits["bandwidth"]["copy"]) for row in rows])
            report.show(tables[-1])
        gc.collect()
        seconds = time.perf_counter() - start
        print(f"{family}, {number} of {len(families)}: {seconds:.0f} s\n", flush=True)
    out.write_text(json.dumps({"limits": limits, "tables": tables}))


def in_a_process(args: argparse.Namespace, families: list[str], env: dict[str, str]) -> Any:
    """What `measure` wrote; ends this process with the other's exit code if that failed."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "benchmarks", *families, "--device", args.device]
        command += ["--child", file.name, *([] if args.size == "standard" else [f"--{args.size}"])]
        # the profiler counts memory, silently; TRL's experimental part says so at each import
        quiet = {"KINETO_LOG_LEVEL": "99", "TRL_EXPERIMENTAL_SILENCE": "1"}
        env = {**os.environ, **quiet, **env}
        code = subprocess.run(command, env=env).returncode
        if code:
            sys.exit(code)
        return json.loads(Path(file.name).read_text())


def origin(args: argparse.Namespace, start: float) -> dict[str, Any]:
    """Where a result comes from."""
    from . import report

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(git, capture_output=True, text=True)
    return {
        "machine": report.machine(args.device),
        "size": args.size,
        "versions": versions,
        "missing": [package for package in PACKAGES if package not in versions],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": found.stdout.strip() or None,
        "seconds": round(time.perf_counter() - start, 1),
    }


def on_cpu(args: argparse.Namespace, families: list[str], title: str) -> dict[str, Any]:
    """The result of families under both allocators."""
    from . import report

    start, runs = time.perf_counter(), {}
    for allocator, env in (("default", {}), ("huge", HUGE_PAGES)):
        print(f"== {title}, {report.ALLOCATORS[allocator]}", flush=True)
        runs[allocator] = in_a_process(args, families, env)
    return {"title": title, **origin(args, start), "runs": runs}


def on_gpu(args: argparse.Namespace, family: str) -> tuple[dict[str, Any], str]:
    """The result of the device and the name of its files.

    What stands there of other families stays, if it was measured under the same versions.
    """
    import torch

    print(f"== {family}", flush=True)
    start = time.perf_counter()
    runs = {family: in_a_process(args, [family], {})}
    title, described = torch.cuda.get_device_name(), origin(args, start)
    stem = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
    before = args.results / f"{stem}.json"
    if before.exists():
        result = json.loads(before.read_text())
        if result["machine"] == described["machine"]:
            runs = {**result["runs"], **runs}
    return {"title": title, **described, "runs": runs}, stem


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sizes = parser.add_mutually_exclusive_group()
    for size, text in (("quick", "tiny shapes"), ("full", "all cases")):
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size, help=text)
    parser.add_argument("--results", type=Path, help="where the files go (benchmarks/results)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from . import compare, report

    if args.family[:1] == ["compare"]:
        return compare.main(args.family[1:])
    if args.family == ["report"]:
        for path in sorted((args.results or RESULTS).glob("*.json")):
            report.write(json.loads(path.read_text()), path.with_suffix(""))
        return 0
    for family in args.family:
        if family not in FAMILIES:
            parser.error(f"family {family!r}; allowed: {', '.join(FAMILIES)}")
    args.size = args.size or ("standard" if args.device == "cpu" else "full")
    if args.child:
        measure(args.family, args.device, args.size, args.child)
        return 0
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: no GPU that this torch can use")
    families = args.family or list(FAMILIES)
    keep = args.results or (args.size == "full" or (args.size == "standard" and not args.family))
    args.results = args.results or RESULTS
    if args.device == "cpu" and args.size != "full":
        result = on_cpu(args, families, "cpu")
        if keep:
            report.write(result, args.results / "cpu")
        return 0
    for family in families:
        if args.device == "cpu":
            result, stem = on_cpu(args, [family], family), family
        else:
            result, stem = on_gpu(args, family)
        if keep:
            report.write(result, args.results / stem)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
