"""python benchmarks/gpu.py [--sanitize] [FAMILY]: build for this machine's GPU, run the tests, measure.

It uses the Python that runs it, with what that has, and leaves it as it is: finefuse goes to
build/gpu/site. Nothing is downloaded. PYTEST_FLAGS is passed on.

--sanitize runs the tests of the CUDA kernels under compute-sanitizer instead, for addresses (memcheck) and
for races in shared memory (racecheck), without captured graphs and the largest tensors.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build/gpu/site"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
PACKAGES = (
    "pip", "torch", "triton", "numpy", "ml_dtypes", "scikit-build-core", "pybind11", "pytest",
    "pytest-xdist", "hypothesis", "rich", "matplotlib", "jinja2",
)  # fmt: skip
SANITIZER = shutil.which("compute-sanitizer") or str(
    Path(NVCC).resolve().parent / "compute-sanitizer"
)


def installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def missing(families: list[str]) -> list[str]:
    """What this machine lacks, a line each."""
    lines = [f"a family {f!r}" for f in families if not (ROOT / f"tests/test_{f}.py").exists()]
    packages = [p for p in PACKAGES if not installed(p)]
    packages += [p for p in ("cmake", "ninja") if not installed(p) and not shutil.which(p)]
    if "torch" in packages:
        if not any(Path("/dev").glob("nvidia[0-9]*")):
            lines.append("an NVIDIA GPU")
    else:
        import torch

        if not torch.cuda.is_available() or torch.version.cuda is None:
            lines.append(f"an NVIDIA GPU that torch {torch.__version__} can use")
    if not shutil.which(NVCC):
        lines.append("nvcc: on the PATH, in CUDACXX or as /usr/local/cuda/bin/nvcc")
    if installed("finefuse"):
        origin = metadata.distribution("finefuse").read_text("direct_url.json") or ""
        if '"editable": true' in origin:
            lines.append(
                "a Python without an editable finefuse, which would hide the one built here"
            )
    if packages:
        lines.append(f"Python packages for {sys.executable}: {', '.join(packages)}")
    return lines


def run(*arguments: str, under: Sequence[str] = (), **env: str) -> None:
    """A Python command, an argument of `under` if that is given; exits with its code if it fails."""
    print("+", shlex.join([*under, "python", *arguments]), flush=True)
    command = [*under, sys.executable, *arguments]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}).returncode
    if code:
        sys.exit(code)


def sanitize(families: list[str], path: str) -> None:
    """Each allocation by itself (torch's cache would hide what is beyond the end of one), in one process."""
    tests = [
        str(test)
        for family in families or ["*"]
        for kind in ("backends", "cuda")
        for test in sorted(ROOT.glob(f"tests/test_{family}_{kind}.py"))
    ]
    for tool in ("memcheck", "racecheck"):
        run(
            "-m", "pytest", "-q", "-x", *tests,
            "-k", "cuda and not cuda_graph and not elements and not large",
            under=[SANITIZER, "--tool", tool, "--error-exitcode", "1"],
            PYTHONPATH=path, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip


def main() -> None:
    families = [argument for argument in sys.argv[1:] if argument != "--sanitize"]
    lacking = missing(families)
    if "--sanitize" in sys.argv and not Path(SANITIZER).exists():
        lacking.append(f"compute-sanitizer: on the PATH or as {SANITIZER}")
    if lacking:
        print("make gpu: what is missing", *lacking, sep="\n  ", file=sys.stderr)
        sys.exit(2)
    run(
        "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index",
        "--no-build-isolation", "--no-deps", "--upgrade", "--target", str(SITE),
        "-C", "build-dir=build/gpu/cmake", "-C", "cmake.define.CMAKE_CUDA_ARCHITECTURES=native", ".",
        FINEFUSE_CUDA="ON", CUDACXX=NVCC,
    )  # fmt: skip
    path = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))
    if "--sanitize" in sys.argv:
        return sanitize(families, path)
    flags = shlex.split(os.environ.get("PYTEST_FLAGS", ""))
    tests = [str(t) for f in families for t in sorted(ROOT.glob(f"tests/test_{f}*.py"))]
    run("-m", "pytest", *flags, *tests, PYTHONPATH=path)
    run("-m", "benchmarks", *families, "--device", "cuda", PYTHONPATH=path)


if __name__ == "__main__":
    main()
