"""Launch shapes of the attention kernel.

A small table instead of autotuning: nothing is measured in a user's first prefill, and every run is alike.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

LARGE_SHARED_MEMORY = 200 * 1024  # bytes a program; what LARGE needs at most
# Arguments of the attention kernels. Code that knows a length to be 1 or divisible by 16 gains nothing, and would be
# compiled once more.
UNSPECIALIZED = [
    "batches",
    "heads",
    "plans",
    "query_orders",
    "key_orders",
    "tile_entries",
    "column_entries",
    "query_length",
    "key_length",
    "scale_log2",
    "window",
]


class Config(NamedTuple):
    """Query rows and keys of one step, warps of one program, pipeline depth."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Keyed on (bytes of an element, padded head dim). Chosen by the registers, spills and shared memory of the
# code that Triton 3.6 and 3.9 make for compute capability 9.0 (LARGE) and 8.0 (SMALL).
LARGE = {
    (2, 16): Config(128, 128, 8, 3),
    (2, 32): Config(128, 128, 8, 3),
    (2, 64): Config(128, 128, 8, 3),
    (2, 128): Config(128, 128, 8, 3),
    (2, 256): Config(128, 64, 8, 3),
}
# Fits in 64 KiB of shared memory. Float32 products are exact, so they run outside the tensor cores.
SMALL = {
    (2, 16): Config(128, 64, 4, 2),
    (2, 32): Config(128, 64, 4, 2),
    (2, 64): Config(64, 64, 4, 2),
    (2, 128): Config(128, 32, 8, 2),
    (2, 256): Config(64, 32, 8, 1),
    (4, 16): Config(64, 32, 4, 1),
    (4, 32): Config(64, 32, 4, 1),
    (4, 64): Config(64, 32, 8, 1),
    (4, 128): Config(32, 32, 8, 1),
    (4, 256): Config(16, 32, 8, 1),
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a tile of this head dim fills; a matrix product takes at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def attention_config(query: Tensor) -> Config:
    """The launch shape for queries [B, H, S, D] of this dtype, head dim and device."""
    key = query.element_size(), padded_head_dim(query.shape[3])
    return LARGE[key] if key in LARGE and _large_shared_memory(query.device) else SMALL[key]


@lru_cache
def _large_shared_memory(device: torch.device) -> bool:
    if device.type != "cuda":  # the interpreter
        return False
    limit = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return limit >= LARGE_SHARED_MEMORY
