"""Triton kernels of `kernels/lines.py`, and their launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

DISTANCES = 128  # distances of one program
AT_ONCE = 8  # samples of one step
RANKED = 32  # distances of one program that ranks them
OTHERS = 128  # distances that these are compared with in one step
# Sums and products apart, as torch has them. Named, because Triton 3.10 changes the default and 3.9 warns of it.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
SIZES = ["samples", "key_tiles", "own_stride", "count"]


@triton.jit(do_not_specialize=SIZES)
def _sum_diagonals_kernel(
    mass, own, held, samples, key_tiles, own_stride, DISTANCES: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Attention of some queries by distance. mass: float32 [N, samples, nK]. own: int32 [N, samples]. held: [N, nK]."""
    blocks = tl.cdiv(key_tiles, DISTANCES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    distance = tl.program_id(0) % blocks * DISTANCES + tl.arange(0, DISTANCES)
    mass += row * samples * key_tiles
    own += row * own_stride
    total = tl.zeros([DISTANCES], tl.float32)
    for start in range(0, samples, AT_ONCE):
        for index in tl.static_range(AT_ONCE):  # so that their loads need not wait for each other
            tile = tl.load(own + start + index, mask=start + index < samples, other=-1) - distance
            total += tl.load(mass + tile, mask=tile >= 0, other=0.0)
            mass += key_tiles
    tl.store(held + row * key_tiles + distance, total, mask=distance < key_tiles)


@triton.jit(do_not_specialize=SIZES)
def _rank_diagonals_kernel(held, levels, key_tiles, count, RANKED: tl.constexpr, OTHERS: tl.constexpr):
    """levels: int32 [N, nK + 1]. Each is compared with all: they are few."""
    blocks = tl.cdiv(key_tiles, RANKED)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    distance = block * RANKED + tl.arange(0, RANKED)
    held += row * key_tiles
    levels += row * (key_tiles + 1)
    mine = tl.load(held + distance, mask=distance < key_tiles, other=0.0)
    rank = tl.zeros([RANKED], tl.int32)
    for start in range(0, key_tiles, OTHERS):
        index = start + tl.arange(0, OTHERS)
        other = tl.load(held + index, mask=index < key_tiles, other=-1.0)  # less than any
        nearer = index[None, :] < distance[:, None]
        first = (other[None, :] > mine[:, None]) | ((other[None, :] == mine[:, None]) & nearer)
        rank += tl.sum(first.to(tl.int32), 1)
    tl.store(levels + distance, tl.minimum(rank, count), mask=distance < key_tiles)
    tl.store(levels + key_tiles, count, mask=block == 0)


def rank_diagonals(mass: Tensor, own_tiles: Tensor, count: int) -> Tensor:
    """`lines.rank_diagonals`. mass: contiguous."""
    rows, samples, key_tiles = mass.shape
    held = mass.new_empty(rows, key_tiles)
    levels = torch.empty(rows, key_tiles + 1, dtype=torch.int32, device=mass.device)
    with torch.cuda.device_of(mass):
        _sum_diagonals_kernel[(rows * triton.cdiv(key_tiles, DISTANCES),)](
            mass, own_tiles, held, samples, key_tiles, own_tiles.stride(0), DISTANCES, AT_ONCE, **OPTIONS
        )
        _rank_diagonals_kernel[(rows * triton.cdiv(key_tiles, RANKED),)](
            held, levels, key_tiles, count, RANKED, OTHERS, **OPTIONS | {"num_warps": 4}
        )
    return levels
