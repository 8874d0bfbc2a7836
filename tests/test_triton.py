"""What compile_triton.py compiles is what can be launched; one variant really compiles.

That the kernels are right is in test_<stem>_backends.py, where `place` also sees to it that nothing is
launched that compile_triton.py does not know.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the Triton kernels take torch tensors")
triton = pytest.importorskip("triton", reason="Triton is not installed")

import compile_triton
from finefuse.kernels import _common, _softmax_row


def test_no_variant_is_left_out():
    """What is compiled by default shows all that the whole would: every choice of what can be launched, with
    every type that it is not the same code for, on one architecture; on each every kernel with every type
    and every loop that may spill."""
    variants = compile_triton.all_variants()
    chosen = list(compile_triton.chosen(variants))
    assert len(chosen) < len(variants)
    for architecture in compile_triton.ARCHITECTURES:
        on = [v for v, a in chosen if a == architecture]
        there = [v for v in variants if architecture in v.architectures]
        for of in (lambda v: v.name, compile_triton.typed, compile_triton.loop):
            assert set(map(of, on)) == set(map(of, there))
    shown = set().union(
        *(compile_triton.shows(v) for v, a in chosen if a == compile_triton.EVERYTHING_ON)
    )
    assert shown == set().union(*map(compile_triton.shows, variants))
    # left out of it are choices with float16 and float64 in two families alone
    left = {(pair[0].split("_")[0], pair[1]) for pair in compile_triton.known_pairs() - shown}
    assert left <= {(family, t) for family in ("distill", "prune") for t in ("fp16", "fp64")}
    assert {v.name for v in variants} >= set(compile_triton.HOT)


def test_no_global_is_nan():
    """At each launch Triton compares the globals that a kernel uses with what they were: NaN has changed."""
    for module in (*compile_triton.MODULES, _common, _softmax_row):
        for name, value in vars(module).items():
            if isinstance(value, triton.language.constexpr):
                assert value.value == value.value, f"{module.__name__}.{name}"


def test_a_variant_compiles():
    """One cubin for each architecture, without a device; .ci/run compiles them all."""
    code = """
import compile_triton as c
for architecture in c.ARCHITECTURES:
    usage = c.all_variants()[0].compile(architecture)
    assert usage["registers"] > 0 and usage["local"] == 0, usage
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=environment, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
