"""python -m benchmarks [FAMILY ...] [--device cpu|cuda] [--quick]: measure, print, write the results.

On a CPU every family runs twice, in two processes: with the allocator that users have, and with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which gives every candidate huge pages; the files are named
after the family. On a GPU it runs once, and one set of files, named after the device, holds all families.

`python -m benchmarks report` writes the tables and plots anew from the JSON.
`python -m benchmarks compare A.json B.json` shows what moved beyond the noise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FAMILIES = (
    "bandit", "codebook", "distill", "dora", "linear", "logprobs", "lora", "policy", "preference",
    "prune", "segmented",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def measure(family: str, device: str, quick: bool, out: Path) -> None:
    """One family in this process, with its allocator; what was measured goes to `out`."""
    import torch

    from . import report, roofline

    torch.manual_seed(0)
    limits = roofline.limits(device, quick)
    print(f"{report.machine(device)}\n{report.measured(limits)}", flush=True)
    tables: list[Any] = []
    for rows in importlib.import_module(f"benchmarks.bench_{family}").run(device, quick):
        tables.append([row.as_dict(limits["bandwidth"]["copy"]) for row in rows])
        report.show(tables[-1])
    out.write_text(json.dumps({"limits": limits, "tables": tables}))


def in_a_process(args: argparse.Namespace, family: str, env: dict[str, str]) -> Any:
    """What `measure` wrote; ends this process with the other's exit code if that failed."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "benchmarks", family, "--device", args.device]
        command += ["--child", file.name, *(["--quick"] * args.quick)]
        # the profiler counts memory, silently; TRL's experimental part says so at each import
        quiet = {"KINETO_LOG_LEVEL": "99", "TRL_EXPERIMENTAL_SILENCE": "1"}
        env = {**os.environ, **quiet, **env}
        code = subprocess.run(command, env=env).returncode
        if code:
            sys.exit(code)
        return json.loads(Path(file.name).read_text())


def on_cpu(args: argparse.Namespace, family: str) -> tuple[dict[str, Any], str]:
    """The result of a family and the name of its files."""
    from . import report

    runs = {}
    for allocator, env in (("default", {}), ("huge", HUGE_PAGES)):
        print(f"== {family}, {report.ALLOCATORS[allocator]}", flush=True)
        runs[allocator] = in_a_process(args, family, env)
    return {"title": family, "machine": report.machine("cpu"), "runs": runs}, family


def on_gpu(args: argparse.Namespace, family: str) -> tuple[dict[str, Any], str]:
    """The result of the device and the name of its files.

    What stands there of other families stays, if it was measured under the same versions.
    """
    import torch

    from . import report

    print(f"== {family}", flush=True)
    runs = {family: in_a_process(args, family, {})}
    title, machine = torch.cuda.get_device_name(), report.machine("cuda")
    stem = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
    before = args.results / f"{stem}.json"
    if before.exists():
        result = json.loads(before.read_text())
        if result["machine"] == machine:
            runs = {**result["runs"], **runs}
    return {"title": title, "machine": machine, "runs": runs}, stem


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument(
        "--results", type=Path, help="where the files go: benchmarks/results; with --quick nowhere"
    )
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
    if args.child:
        measure(args.family[0], args.device, args.quick, args.child)
        return 0
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: no GPU that this torch can use")
    keep = args.results is not None or not args.quick
    args.results = args.results or RESULTS
    for family in args.family or FAMILIES:
        result, stem = (on_cpu if args.device == "cpu" else on_gpu)(args, family)
        if keep:
            report.write(result, args.results / stem)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
