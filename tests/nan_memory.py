"""Free memory full of NaN: what a product reads beside its own numbers then shows.

A processor's matrix units take their operands in tiles, and a library that reads beyond the edge of a matrix counts on
multiplying what it finds there by zero; where that is NaN, the product is not zero (see `ONEDNN_MAX_CPU_ISA` in
conftest.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools

import torch

_KEEP = -3  # M_MMAP_THRESHOLD: larger blocks would go back to the system, and come from it as zeros
_SIZES = [2**power for power in range(6, 23)]
_TOTAL = 64 * 2**20


def fill_free_memory_with_nan() -> None:
    """Take about 64 MiB in blocks of all sizes, write NaN all over them, and give them back to the allocator."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc: whatever its allocator keeps
        ctypes.CDLL(None).mallopt(_KEEP, 2**25)
    blocks, taken = [], 0
    for size in itertools.cycle(_SIZES):
        blocks.append(torch.full((size // 2,), float("nan"), dtype=torch.bfloat16))
        taken += size
        if taken > _TOTAL:
            break
    del blocks
    gc.collect()
