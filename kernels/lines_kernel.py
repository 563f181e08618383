"""Triton kernels of `kernels/lines.py`, and their launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.lines import WHOLE

DISTANCES = 128  # distances of one program
AT_ONCE = 8  # samples of one step
RANKED = 32  # distances of one program that ranks them
OTHERS = 128  # distances that these are compared with in one step
KEYS = 1024  # keys of one program
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


@triton.jit(do_not_specialize=["keys", "sites"])
def _site_totals_kernel(weight, site, pair, total, keys, sites, WHOLE: tl.constexpr, KEYS: tl.constexpr):
    """total: int64 [N, sites], added to. Keys of a site mostly follow each other: where a run of them ends, the sum of
    all so far is added to its site, and taken from the next one."""
    blocks = tl.cdiv(keys, KEYS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.arange(0, KEYS)
    slot = tl.program_id(0) % blocks * KEYS + index
    inside = slot < keys
    site += tl.load(pair + row) * keys
    mine = tl.load(site + slot, mask=inside, other=-1)
    following = tl.load(site + slot + 1, mask=slot + 1 < keys, other=-1)
    of_key = tl.load(weight + row * keys + slot, mask=inside, other=0.0)
    so_far = tl.cumsum((of_key.to(tl.float64) * WHOLE).to(tl.int64), 0)
    is_last = index == KEYS - 1
    ends = inside & (is_last | (mine != following))
    total += row * sites
    tl.atomic_add(total + mine, so_far, mask=ends & (mine >= 0))
    tl.atomic_add(total + following, -so_far, mask=ends & ~is_last & (following >= 0))


def site_totals(weight: Tensor, site: Tensor, pair: Tensor, sites: int) -> Tensor:
    """`lines.site_totals`."""
    rows, keys = weight.shape
    total = torch.zeros(rows, sites, dtype=torch.int64, device=weight.device)
    with torch.cuda.device_of(weight):
        _site_totals_kernel[(rows * triton.cdiv(keys, KEYS),)](
            weight.contiguous(), site.contiguous(), pair, total, keys, sites, WHOLE, KEYS, **OPTIONS | {"num_warps": 4}
        )
    return total
