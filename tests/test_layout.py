"""The tree's one idea: a stem in every folder. And what `import finefuse` promises without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "csrc/ops/{}.h",
    "csrc/ops/{}.cpp",
    "csrc/ops/{}.cu",
    "csrc/bindings/{}.h",
    "kernels/{}.py",
    "python/finefuse/{}.py",
    "python/finefuse/reference/{}.py",
    "python/finefuse/numpy/{}.py",
    "tests/test_{}.py",
    "benchmarks/bench_{}.py",
    "docs/{}.md",
    "docs/pictures/{}.svg",
)
# What a stem does not have, and why. Each line is deleted by the change that adds the file.
MISSING: dict[str, str] = {
    "csrc/ops/linear.h": "its products are a library's, its kernels over rows those of the losses",
    "csrc/ops/linear.cpp": "as the header",
    "csrc/ops/linear.cu": "as the header",
    "python/finefuse/numpy/linear.py": "NumPy has no products to put a chunk of logits between",
    "csrc/bindings/linear.h": "as the header",
    "csrc/ops/bandit.cu": "a simulator: CPU only",
    "csrc/bindings/bandit.h": "a simulator: bound in module.cpp alone",
    "kernels/bandit.py": "a simulator: CPU only",
}


def built() -> list[str]:
    listed = re.search(r"set\(FINEFUSE_OPS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert listed
    return listed[1].split()


def stems() -> list[str]:
    """Those built from csrc/ops, and one that is made of their kernels and a library's products."""
    return [*built(), "linear"]


def test_stems_are_what_is_built():
    assert sorted(built()) == sorted(p.stem for p in (ROOT / "csrc/ops").glob("*.cpp"))


@pytest.mark.parametrize("stem", stems())
def test_every_stem_in_every_folder(stem):
    for folder in FOLDERS:
        path = folder.format(stem)
        if path in MISSING:
            assert not (ROOT / path).exists(), f"{path} is there: delete its line in MISSING"
        else:
            assert (ROOT / path).exists(), f"{path} is missing"


def imports(path: Path) -> set[str]:
    return set(re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.M))


BELOW = {
    "bandit": {".numpy.bandit"},  # a simulator of NumPy arrays: the torch door leads there
    "codebook": set(),
    "distill": {".logprobs"},
    "dora": {".codebook", "._low_rank"},
    "linear": {
        "._linear_distill",
        "._linear_logprobs",
        "._linear_policy",
        "._linear_preference",
    },
    "logprobs": set(),
    "lora": {".codebook", ".dora", "._low_rank"},
    "policy": {".logprobs", "._advantages"},
    "preference": {".logprobs", "._preference_pairs"},
    "prune": {".codebook"},
    "segmented": {".codebook", "._low_rank"},
}  # the stems that a stem may build on


# The front of each is its stem: what it is made of, a file each, on _args and _op alone.
BEHIND = {"_advantages": "policy", "_preference_pairs": "preference"}

# The stems whose checks of arguments a stem shares, in _args/, beside its own and those of all.
ARGS = {"dora": "lora", "segmented": "lora", "_low_rank": "lora"}


def args_of(stem: str, package: str) -> set[str]:
    """Where a stem's checks of arguments are."""
    stem = stem.removeprefix("_linear_")
    return {package, f"{package}.{ARGS.get(stem, stem)}"}


# The stems whose kernels a stem's kernels are made of, in csrc/ops, kernels/ and reference/.
# (Of `linear` the Triton kernels take tiles of `lora`, and the reference is made of those of the losses.)
KERNELS_BELOW = {
    "distill": ("logprobs",),
    "dora": ("lora",),
    "linear": ("lora", "distill", "logprobs", "policy", "preference"),
    "segmented": ("lora",),
}


# Below all stems: matrix products, the chunk driver of the losses from hidden states, the tensor of packed
# codes, what describes it.
SHARED = {"._matmul", "._linear_loss", "._codebook_tensor", "._codebooks"}

# The losses from hidden states, a file a family, behind `linear`: what each builds on beside SHARED.
_HEAD = {"._linear_head", "._linear_gradients", "._linear_logprobs"}
LINEAR = {
    "_linear_head": {".codebook"},
    "_linear_gradients": {".logprobs"},
    "_linear_parallel": {"._linear_head"},
    # and the fused kernel's size of its scratch, when it is launched
    "_linear_logprobs": {*_HEAD, "._linear_parallel", ".logprobs", ".kernels.linear"},
    "_linear_policy": {*_HEAD, ".logprobs", ".policy"},
    "_linear_preference": {*_HEAD, ".logprobs", ".preference", "._preference_pairs"},
    "_linear_distill": {*_HEAD, ".logprobs", ".distill"},
}


# The floors below: what each file builds on. (What the low-rank layers share stands on `codebook`.)
FLOORS = {
    "_backend": {"."},
    "_op": {".", "._args"},
    "_matmul": set(),
    "_linear_loss": {".", "._matmul"},  # the driver knows no loss
    "_codebooks": {"._args"},
    "_codebook_tensor": {".", "._codebooks"},
    "_low_rank": {".", "._args.lora", "._codebook_tensor", "._op", ".codebook"},
    "numpy/_array": {"..", ".._args"},
    "numpy/_low_rank": {"..", ".._args.lora", "._array", ".codebook"},
}


# Above all stems: modules, and what each of their files builds on.
MODULES = {
    "_passes": set(),
    "_mixed": {"._op", "._passes", ".segmented"},
    "_groups": {".", "._codebook_tensor", ".lora"},
    "_layers": {".", "._codebook_tensor", "._mixed", ".codebook", ".dora", ".lora"},
    "_adapters": {".", "._layers", "._mixed", ".codebook"},
    "_adapter_files": {"._layers", "._adapters"},
    "nn": {"._layers", "._adapters", "._adapter_files", "._passes"},
}


def test_imports_run_downhill():
    for path in (ROOT / "python/finefuse/reference").glob("*.py"):
        below = {f".{stem}" for stem in KERNELS_BELOW.get(path.stem, ())}
        plain = {
            "__future__", "collections.abc", "itertools", "math", "numpy", "numpy.typing", "typing",
        }  # fmt: skip
        assert imports(path) <= plain | below, path
    for stem in stems():
        for folder, allowed in (
            ("python/finefuse", {".", *args_of(stem, "._args"), "._op", ".eager", *SHARED}),
            (
                "python/finefuse/numpy",
                {"..", *args_of(stem, ".._args"), ".._codebooks", "._array"},
            ),
        ):
            path = f"{folder}/{stem}.py"
            if path not in MISSING:
                local = {i for i in imports(ROOT / path) if i.startswith(".")}
                assert local <= allowed | BELOW[stem], path
    for name, below in LINEAR.items():
        path = ROOT / f"python/finefuse/{name}.py"
        local = {i for i in imports(path) if i.startswith(".")}
        assert local <= below | {".", *args_of(name, "._args"), "._op", ".eager", *SHARED}, name
    for name, stem in BEHIND.items():
        local = {i for i in imports(ROOT / f"python/finefuse/{name}.py") if i.startswith(".")}
        assert local <= {".", *args_of(stem, "._args"), "._op", ".eager"}, name
    for path in (ROOT / "python/finefuse/_args").glob("*.py"):  # on those of all, no other's
        assert {i for i in imports(path) if i.startswith(".")} <= {"."}, path
    assert {p.stem for p in (ROOT / "python/finefuse").glob("_linear_*.py")} == {
        "_linear_loss", *LINEAR,
    }  # fmt: skip
    for path in (ROOT / "python/finefuse").glob("**/*.py"):
        if path.stem not in ("linear", *LINEAR, *MODULES):
            above = {i.rpartition(".")[2] for i in imports(path) if i.startswith(".")}
            assert not above & set(LINEAR), path
    for name, below in FLOORS.items():
        local = {i for i in imports(ROOT / f"python/finefuse/{name}.py") if i.startswith(".")}
        assert local <= below, name
    for path in (ROOT / "python/finefuse/eager").glob("*.py"):
        below = {f".{stem}" for stem in ("codebook", *KERNELS_BELOW.get(path.stem, ()))}
        local = {i for i in imports(path) if i.startswith(".")}
        assert local <= {".", ".._codebooks", *args_of(path.stem, ".._args"), *below}, path
    placed = {*stems(), *LINEAR, *BEHIND, *MODULES, *FLOORS, "__init__", "__main__"}
    assert {p.stem for p in (ROOT / "python/finefuse").glob("*.py")} <= placed
    for name, below in MODULES.items():
        local = {i for i in imports(ROOT / f"python/finefuse/{name}.py") if i.startswith(".")}
        assert local <= below | {"._args"}, name
    for path in (ROOT / "python/finefuse").glob("**/*.py"):
        if path.stem not in MODULES:
            above = {i.rpartition(".")[2] for i in imports(path) if i.startswith(".")}
            assert not above & set(MODULES), path
    for path in (ROOT / "csrc/ops").iterdir():
        stem = path.stem.partition("_")[0]  # a part of it: <stem>_table.h, _tiles.cuh, _decode.h
        allowed = ("core/", *(f"ops/{below}" for below in (stem, *KERNELS_BELOW.get(stem, ()))))
        for header in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert header.startswith(allowed), path
    for path in (ROOT / "kernels").glob("*.py"):
        local = {i for i in imports(path) if i.startswith(".")}
        below = {"._common", "._softmax_row", *(f".{b}" for b in KERNELS_BELOW.get(path.stem, ()))}
        assert local <= (below if path.stem[0] != "_" else {"._common"}), path
    for path in (ROOT / "csrc/core").iterdir():
        for header in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert header.startswith("core/"), path


def test_no_torch_below_the_numpy_functions():
    folder = ROOT / "python/finefuse"
    for path in (
        folder / "_codebooks.py",
        *(folder / "_args").glob("*.py"),
        *(folder / "numpy").glob("*.py"),
    ):
        assert not any(i.split(".")[0] == "torch" for i in imports(path)), path
    for path in (folder / "numpy").glob("*.py"):  # nor by way of the torch functions
        above = {i for i in imports(path) if i.startswith("..")}
        assert above <= {"..", *args_of(path.stem, ".._args"), ".._codebooks"}, path
        assert set(re.findall(r"^from \.\. import (.*)", path.read_text(), re.M)) <= {"_C", "_args"}


def test_no_std_in_the_files_compiled_per_level():
    """Weak symbols of the standard library could be picked for the baseline."""
    for name in (
        "core/vec.h",
        "core/parallel.h",
        "core/philox.h",
        "core/sizes.h",
        "core/segments.h",
        "core/softmax_row.h",
        "core/logit_rows.h",
    ):
        assert "std::" not in (ROOT / "csrc" / name).read_text(), name
    for path in (ROOT / "csrc/ops").iterdir():
        assert path.suffix not in (".h", ".cpp") or "std::" not in path.read_text(), path


def test_without_torch():
    """`import finefuse` and finefuse.numpy work; a torch name raises the ImportError that says what to
    install."""
    code = """
import importlib.util as u, sys
find = u.find_spec
u.find_spec = lambda name, *a: None if name == "torch" else find(name, *a)
sys.modules["torch"] = None
import finefuse
assert "torch" not in [m for m in sys.modules if sys.modules[m] is not None]
for name in ("token_logprobs", "preference_loss", "quantize"):
    try:
        getattr(finefuse, name)
    except ImportError as e:
        assert "pip install" in str(e) and name in str(e), e
    else:
        raise SystemExit(f"{name}: no ImportError")
assert not hasattr(finefuse, "nonsense")
import numpy as np
import finefuse.numpy as ffn
logits, targets = np.zeros((2, 3, 4), np.float32), np.array([[0, 1, 2], [3, -100, 1]])
loss, gradient = ffn.cross_entropy(logits, targets, return_grad=True)
assert abs(loss - np.log(4)) < 1e-6 and abs(gradient[0, 0, 0] + 0.15) < 1e-6
out, gradient = ffn.preference_loss_from_logits(logits, targets, return_grad=True)
assert out.margins.shape == (1,) and gradient.shape == logits.shape
weight = np.eye(3, dtype=np.float32)
q = ffn.quantize(weight, blocksize=16)
assert (ffn.dequantize(q) == weight).all() and (ffn.codebook_linear(weight, q) == weight).all()
assert "torch" not in [m for m in sys.modules if sys.modules[m] is not None]
env = finefuse.bandit.MultiArmedBandit([0.2, 0.8], seed=0)
assert ffn.bandit.train_agent(env, ffn.bandit.SoftmaxPolicy(2), 10)[0].shape == (10,)
from finefuse import _C
print(_C.isa())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() in ("baseline", "avx2", "avx512", "avx512bf16")


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512bf16", "nonsense"])
def test_isa_environment(level):
    """FINEFUSE_ISA lowers the level and never raises it past the machine."""
    code = (
        "import sys; sys.modules['torch'] = None  # whose import takes 2 s\n"
        "from finefuse import _C; print(_C.isa(), _C.machine_isa())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"FINEFUSE_ISA": level}
    )
    isa, machine = out.stdout.split()
    levels = ["baseline", "avx2", "avx512", "avx512bf16"]
    lowered = level in levels and levels.index(level) < levels.index(machine)
    assert isa == (level if lowered else machine)


def test_kernels_are_installed():
    import importlib.util

    assert importlib.util.find_spec("finefuse.kernels") is not None
