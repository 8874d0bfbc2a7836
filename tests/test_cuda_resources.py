"""The occupancy that cuda_resources.py prints, by hand from the CUDA programming guide's table."""

import pytest
from cuda_resources import occupancy


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "share"),
    [
        ("80", 256, 32, 0, 1.0),  # 1024 registers a warp: 64 warps
        ("90a", 1024, 64, 1024, 0.5),  # 2048 a warp: 32 warps, one block
        ("120", 1024, 64, 1024, 1024 / 1536),
        (
            "90a",
            512,
            94,
            3072,
            0.25,
        ),  # 3072 a warp: 5 of each scheduler, 20 in all, one block of 16
        ("90a", 128, 80, 1024, 0.375),  # 2560 a warp: 6 of each scheduler, 24: six blocks of 4
        ("90a", 128, 32, 64 << 10, 3 * 128 / 2048),  # shared memory: three blocks of 228 KiB
        ("80", 128, 32, 54 << 10, 2 * 128 / 2048),  # and a KiB beside each: two of 164, not three
        ("120", 32, 32, 1024, 24 * 32 / 1536),  # the most blocks
        ("90a", 32, 32, 1024, 0.5),
        ("90a", 1024, 128, 1024, 0.0),  # such a block cannot start
    ],
)
def test_occupancy(arch, threads, registers, shared, share):
    assert occupancy(arch, threads, registers, shared) == pytest.approx(share)
