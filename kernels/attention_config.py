"""Launch shapes of the attention kernel: a table, so that nothing is measured in a first prefill where the table was.

Elsewhere `choose_config.py` measures.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

MEASURED_ON = {("NVIDIA H200", "3.6")}  # GPUs and Triton versions on which nothing faster than the table was found
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


# Keyed on (bytes of an element, padded head dim). Where programs have much shared memory: the fastest on an H200.
LARGE = {
    (2, 16): Config(64, 128, 4, 2),
    (2, 32): Config(64, 128, 4, 2),
    (2, 64): Config(64, 128, 4, 2),
    (2, 128): Config(128, 128, 8, 2),
    (2, 256): Config(128, 64, 8, 3),
}
# Fits in 64 KiB of shared memory, and by the code that Triton makes for compute capability 8.0 the registers. Float32
# products are exact, so they run outside the tensor cores.
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


def table_config(
    device: torch.device, dtype: torch.dtype, head_dim: int, large: Mapping[tuple[int, int], Config] = LARGE
) -> Config:
    """The table's launch shape. large: in place of LARGE, where the device has the shared memory for it."""
    key = dtype.itemsize, padded_head_dim(head_dim)
    return large[key] if key in large and _large_shared_memory(device) else SMALL[key]


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have on a GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@lru_cache
def _large_shared_memory(device: torch.device) -> bool:
    # Without a GPU: the interpreter.
    return device.type == "cuda" and shared_memory(device) >= LARGE_SHARED_MEMORY
