"""python -m benchmarks [FAMILY ...] [--quick]: measure, print, write benchmarks/results/<family>.*

Every family runs twice, in two processes: with the allocator that users have, and with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which gives every candidate huge pages.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FAMILIES = ("logprobs", "preference")
RESULTS = Path(__file__).parent / "results"


def measure(family: str, quick: bool, out: Path) -> None:
    """One family in this process's allocator; the tables go to `out`."""
    from . import report, roofline

    bandwidth = roofline.bandwidth(64 if quick else 512)
    tables: list[Any] = []
    module = importlib.import_module(f"benchmarks.bench_{family}")
    for rows in module.run(quick):
        tables.append([row.as_dict(bandwidth["copy"]) for row in rows])
        report.show(tables[-1])
    out.write_text(json.dumps({"bandwidth": bandwidth, "tables": tables}))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    families = args.family or FAMILIES
    for family in families:
        if family not in FAMILIES:
            parser.error(f"family {family!r}; allowed: {', '.join(FAMILIES)}")
    if args.child:
        measure(families[0], args.quick, Path(args.child))
        return 0
    from . import report

    for family in families:
        runs = {}
        for allocator in report.ALLOCATORS:
            print(f"== {family}, {report.ALLOCATORS[allocator]}", flush=True)
            env = {**os.environ, "KINETO_LOG_LEVEL": "99"}  # the profiler counts memory, silently
            if allocator == "huge":
                env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            with tempfile.NamedTemporaryFile() as file:
                command = [sys.executable, "-m", "benchmarks", family, "--child", file.name]
                code = subprocess.run([*command, *(["--quick"] * args.quick)], env=env).returncode
                if code:
                    return code
                runs[allocator] = json.loads(Path(file.name).read_text())
        result = {"family": family, "machine": report.machine(), "runs": runs}
        if not args.quick:
            report.write(result, RESULTS / family)
            print(f"written: {RESULTS / family}.json, .md")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
