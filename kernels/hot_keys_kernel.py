"""Triton kernels of `probes._hot_keys`, and their launches: of each plan row the keys with the greatest weights, up to
a number of them, in the order of their positions.

Weights are sorted into levels, steps of a 128th of an octave, and of the last level that is taken the first keys are.
"""

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.probes import HOT, Probes
from mmcompile.kernels.scene import Rows
from mmcompile.kernels.single_keys import Columns

KEYS = 2048  # of one program
QUERY_TILES = 32
LEVELS = 4096  # more than lie between 1 and the least weight of so many keys as there may be
DROPPED = 16  # of a float's bits the lowest, which a level has not
SUMMED = 64
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _least_position(positions, counted, CHOOSING: tl.constexpr, PADDED: tl.constexpr):
    """The last position of a query that counts, in the half of the queries where that is earlier; -1 for none."""
    sample = tl.arange(0, PADDED)
    counts = tl.load(counted + sample, mask=sample < CHOOSING, other=float("-inf")) > float("-inf")
    position = tl.load(positions + sample, mask=counts, other=-1)
    first = tl.max(tl.where(sample < CHOOSING // 2, position, -1))
    return tl.minimum(first, tl.max(tl.where(sample >= CHOOSING // 2, position, -1)))


@triton.jit(do_not_specialize=["heads", "key_orders", "keys", "hot", "least_level", "scratch_stride"])
def _levels_kernel(
    mass, positions, counted, key_tags, key_order, key_row, level, cold, histogram,
    heads, key_orders, keys, hot, least_level, scratch_stride,
    CHOOSING: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, LEVELS: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    """The level of some keys: 0 where they are not hot. level: int16 [N, Sk] by position, cold: [N, Sk] in slots."""
    blocks = tl.cdiv(keys, KEYS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    inside = slot < keys
    of_order = row // heads * key_orders + tl.load(key_row + row)
    both = _least_position(positions + row * CHOOSING, counted + row * CHOOSING, CHOOSING, PADDED)
    position = tl.load(key_tags + of_order * 3 * keys + slot, mask=inside, other=0)
    one = tl.load(mass + row * 2 * keys + slot, mask=inside, other=0.0)
    other = tl.load(mass + (row * 2 + 1) * keys + slot, mask=inside, other=0.0)
    weight = tl.where(position <= both, tl.minimum(one, other), tl.maximum(one, other))
    bits = weight.to(tl.int32, bitcast=True) >> DROPPED
    found = tl.minimum(tl.maximum(bits - least_level + 1, 1), LEVELS - 1)
    found = tl.where(inside & (weight * keys > hot), found, 0)
    token = tl.load(key_order + of_order * keys + slot, mask=inside, other=0)
    tl.store(level + row * keys + token, found.to(tl.int16), mask=inside)
    tl.store(cold + row * keys + slot, tl.full([KEYS], 1, tl.int8), mask=inside)
    tl.atomic_add(histogram + row * scratch_stride + found, tl.full([KEYS], 1, tl.int32), mask=found > 0)


@triton.jit
def _cut(histogram, most, LEVELS: tl.constexpr):
    """The last level of which keys are taken, and how many of it."""
    level = tl.arange(0, LEVELS)
    count = tl.load(histogram + level)
    above = tl.sum(count) - tl.cumsum(count, 0)
    cut = tl.sum((above > most).to(tl.int32))
    return cut, most - tl.max(tl.where(above <= most, above, 0))


@triton.jit(do_not_specialize=["keys", "most", "scratch_stride"])
def _count_kernel(level, histogram, cuts, counts, keys, most, scratch_stride, KEYS: tl.constexpr, LEVELS: tl.constexpr):
    """Of some keys those above the cut, and those at it. cuts: int32 [N, 2], counts: int32 [N, blocks, 2]."""
    blocks = tl.cdiv(keys, KEYS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cut, rest = _cut(histogram + row * scratch_stride, most, LEVELS)
    token = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    found = tl.load(level + row * keys + token, mask=token < keys, other=0).to(tl.int32)
    counts += tl.program_id(0).to(tl.int64) * 2
    tl.store(counts, tl.sum(((found > 0) & (found > cut)).to(tl.int32)))
    tl.store(counts + 1, tl.sum(((found > 0) & (found == cut)).to(tl.int32)))
    tl.store(cuts + row * 2, cut)  # by all programs of the row, and the same
    tl.store(cuts + row * 2 + 1, rest)


@triton.jit(do_not_specialize=["heads", "key_orders", "keys", "scratch_stride"])
def _list_kernel(
    level, cuts, counts, key_slots, key_row, slots, listed, cold, heads, key_orders, keys, scratch_stride,
    KEYS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """List some keys of one row, after those of earlier positions."""
    blocks = tl.cdiv(keys, KEYS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    counts += row * blocks * 2
    above = tl.zeros([SUMMED], tl.int32)
    at_cut = tl.zeros([SUMMED], tl.int32)
    for start in range(0, block, SUMMED):
        earlier = start + tl.arange(0, SUMMED)
        above += tl.load(counts + earlier * 2, mask=earlier < block, other=0)
        at_cut += tl.load(counts + earlier * 2 + 1, mask=earlier < block, other=0)
    cut = tl.load(cuts + row * 2)
    rest = tl.load(cuts + row * 2 + 1)
    token = block * KEYS + tl.arange(0, KEYS)
    found = tl.load(level + row * keys + token, mask=token < keys, other=0).to(tl.int32)
    is_at_cut = (found > 0) & (found == cut)
    rank = tl.sum(at_cut) + tl.cumsum(is_at_cut.to(tl.int32), 0)  # from 1
    taken = ((found > 0) & (found > cut)) | (is_at_cut & (rank <= rest))
    before = tl.sum(above) + tl.minimum(tl.sum(at_cut), rest)
    entry = before + tl.cumsum(taken.to(tl.int32), 0) - 1
    key_slots += (row // heads * key_orders + tl.load(key_row + row)) * keys
    slot = tl.load(key_slots + token, mask=taken, other=0)
    tl.store(slots + row * scratch_stride + entry, slot, mask=taken)
    tl.store(cold + row * keys + slot, tl.zeros([KEYS], tl.int8), mask=taken)
    if block == blocks - 1:
        tl.store(listed + row, before + tl.sum(taken.to(tl.int32)))


@triton.jit(
    do_not_specialize=["heads", "query_orders", "key_orders", "query_length", "keys", "scratch_stride", "steps"]
)
def _reach_kernel(
    slots, listed, query_tags, key_tags, query_row, key_row, counts,
    heads, query_orders, key_orders, query_length, keys, scratch_stride, steps,
    SPANS: tl.constexpr, TILE: tl.constexpr, QUERY_TILES: tl.constexpr,
):  # fmt: skip
    """How many keys of a list some query tiles can reach. counts: int32 [N, nQ]."""
    query_tiles = tl.cdiv(query_length, TILE)
    blocks = tl.cdiv(query_tiles, QUERY_TILES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks * QUERY_TILES + tl.arange(0, QUERY_TILES)
    low = tl.zeros([QUERY_TILES], tl.int32)
    high = low + tl.load(listed + row)
    if SPANS:  # later keys may be reached as well
        low = high
    else:
        batch = row // heads
        query_tags += (batch * query_orders + tl.load(query_row + row)) * 3 * query_length
        key_tags += (batch * key_orders + tl.load(key_row + row)) * 3 * keys
        query = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        last = tl.max(tl.load(query_tags + query, mask=query < query_length, other=-1), 1)
        for _ in range(steps):
            middle = (low + high) // 2
            open_ = low < high
            slot = tl.load(slots + row * scratch_stride + middle, mask=open_, other=0)
            reached = open_ & (tl.load(key_tags + slot, mask=open_, other=0) <= last)
            low = tl.where(reached, middle + 1, low)
            high = tl.where(open_ & ~reached, middle, high)
    tl.store(counts + row * query_tiles + tile, low, mask=tile < query_tiles)


def hot_keys(rows: Rows, probes: Probes, counted: Tensor, mass: Tensor, room: int, most: int) -> Columns:
    """`probes._hot_keys_cpu` for CUDA tensors."""
    scene, device = rows.scene, mass.device
    count, _, keys = mass.shape
    query_tags, key_tags = (tags.contiguous() for tags in (scene.arrangement.query_tags, scene.arrangement.key_tags))
    query_row, key_row = rows.query_row.contiguous(), rows.key_row.contiguous()
    heads, orders = len(rows.heads), (query_tags.shape[1], key_tags.shape[1])
    blocks = triton.cdiv(keys, KEYS)
    zeros = torch.zeros(count, LEVELS + room, dtype=torch.int32, device=device)
    histogram, slots, stride = zeros[:, :LEVELS], zeros[:, LEVELS:], LEVELS + room
    level = torch.empty(count, keys, dtype=torch.int16, device=device)
    cold = torch.empty(count, keys, dtype=torch.int8, device=device)
    cuts = torch.empty(count, 2, dtype=torch.int32, device=device)
    of_blocks = torch.empty(count, blocks, 2, dtype=torch.int32, device=device)
    listed = torch.empty(count, dtype=torch.int32, device=device)
    counts = torch.empty(count, scene.query_tiles, dtype=torch.int32, device=device)
    (least,) = struct.unpack("i", struct.pack("f", HOT / keys))
    with torch.cuda.device_of(mass):
        _levels_kernel[(count * blocks,)](
            mass.contiguous(), probes.positions, counted, key_tags, scene.arrangement.key_order.contiguous(), key_row,
            level, cold, histogram, heads, orders[1], keys, HOT, least >> DROPPED, stride,
            counted.shape[1], triton.next_power_of_2(counted.shape[1]), KEYS, LEVELS, DROPPED, **OPTIONS,
        )  # fmt: skip
        _count_kernel[(count * blocks,)](
            level, histogram, cuts, of_blocks, keys, most, stride, KEYS, LEVELS, **OPTIONS
        )  # fmt: skip
        _list_kernel[(count * blocks,)](
            level, cuts, of_blocks, scene.key_slots().contiguous(), key_row, slots, listed, cold,
            heads, orders[1], keys, stride, KEYS, SUMMED, **OPTIONS,
        )  # fmt: skip
        _reach_kernel[(count * triton.cdiv(scene.query_tiles, QUERY_TILES),)](
            slots, listed, query_tags, key_tags, query_row, key_row, counts,
            heads, *orders, query_tags.shape[3], keys, stride, room.bit_length() + 1,
            scene.spans, TILE, QUERY_TILES, **OPTIONS,
        )  # fmt: skip
    return Columns(slots, listed, counts, cold.view(torch.bool))
