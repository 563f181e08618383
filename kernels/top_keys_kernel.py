"""Triton kernels of `kernels/top_keys.py` and `Columns.hot_tiles`, and their launches.

One program lists the keys of one plan row. The weight of the last of them is found a digit at a time, as in a radix
sort: weights are not negative, so that their bits are as their values. Every digit is another walk over the keys;
several programs for a row would each need a launch of their own for it, which take longer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_bounds import tile_count
from mmcompile.kernels.top_keys import KeyList

KEYS = 4096  # keys of one step
ROWS = 1024  # positions that are looked up in one step
DIGITS = 5  # of a weight's bits: the two highest are never set
DIGIT = 6  # bits of a digit: more take more counters, fewer more walks
TILES = 32  # tiles of one program of `hot_tiles`
OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}


@triton.jit
def _bits(weight, key_slots, position, inside, MOST: tl.constexpr):
    """Slots of some keys, and their weights as integers of the same order, at most MOST; 0 for those without any."""
    slot = position
    if key_slots is not None:
        slot = tl.load(key_slots + position, mask=inside, other=0)
    of_key = tl.load(weight + slot, mask=inside, other=0.0)
    return slot, tl.where(of_key > 0.0, tl.minimum(of_key.to(tl.int32, bitcast=True), MOST), 0)


@triton.jit(do_not_specialize=["plans", "orders", "length", "weight_stride", "room", "last_stride", "count", "steps"])
def _list_top_keys_kernel(
    weight, key_slots, key_row, last, slots, positions, listed, counts, cold,
    plans, orders, length, weight_stride, room, last_stride, count, steps,
    DIGITS: tl.constexpr, DIGIT: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`KeyList` of one plan row; and positions: int32 [N, room], of the listed keys."""
    row = tl.program_id(0).to(tl.int64)
    weight += row * weight_stride
    if key_slots is not None:
        key_slots += (row // plans * orders + tl.load(key_row + row)) * length
    slots += row * room
    positions += row * room
    cold += row * length
    counts += row * count

    BINS: tl.constexpr = 1 << DIGIT
    MOST: tl.constexpr = (1 << DIGITS * DIGIT) - 1
    bins = tl.arange(0, BINS)
    least = 0  # of the last key to list, as far as it is known
    left = tl.minimum(room, length)  # keys to list of those that match it
    for digit in tl.static_range(DIGITS):
        shift = (DIGITS - 1 - digit) * DIGIT
        found = tl.zeros([BINS], tl.int32)
        for start in range(0, length, KEYS):
            position = start + tl.arange(0, KEYS)
            _slot, bits = _bits(weight, key_slots, position, position < length, MOST)
            matches = (position < length) & ((bits >> (shift + DIGIT)) == (least >> (shift + DIGIT)))
            if tl.max(matches.to(tl.int32)) > 0:  # seldom, at the last digits
                found += tl.histogram((bits >> shift) & (BINS - 1), BINS, mask=matches)
        above = tl.sum(found) - tl.cumsum(found, 0)
        value = tl.sum((above >= left).to(tl.int32))
        left -= tl.sum(tl.where(bins > value, found, 0))
        least |= value << shift

    left = tl.where(least > 0, left, 0)  # without weight no key is listed
    entries = 0
    matched = 0
    for start in range(0, length, KEYS):
        position = start + tl.arange(0, KEYS)
        inside = position < length
        slot, bits = _bits(weight, key_slots, position, inside, MOST)
        more = bits > least
        match = (bits == least) & inside
        # Of each key and those before it in this step: more weight in the lower half, as much in the upper one.
        ranks = tl.cumsum(tl.where(more, 1, tl.where(match, 65536, 0)), 0)
        up_to = matched + (ranks >> 16)
        chosen = more | (match & (up_to <= left))
        entry = entries + (ranks & 65535) + tl.minimum(up_to, left) - 1
        tl.store(slots + entry, slot, mask=chosen)
        tl.store(positions + entry, position, mask=chosen)
        tl.store(cold + slot, ~chosen, mask=inside)
        entries += tl.sum(more.to(tl.int32))
        matched += tl.sum(match.to(tl.int32))
    entries += tl.minimum(matched, left)
    tl.store(listed + row, entries)
    for start in range(entries, room, ROWS):
        entry = start + tl.arange(0, ROWS)
        tl.store(slots + entry, tl.zeros([ROWS], tl.int32), mask=entry < room)

    tl.debug_barrier()  # other threads wrote the positions
    for start in range(0, count, ROWS):
        index = start + tl.arange(0, ROWS)
        end = tl.load(last + row * last_stride + index, mask=index < count, other=-1)
        low = tl.zeros([ROWS], tl.int32)
        high = low + entries
        for _ in range(steps):
            middle = (low + high) // 2
            after = (low < high) & (tl.load(positions + middle, mask=low < high, other=0) <= end)
            high = tl.where(after, high, middle)
            low = tl.where(after, middle + 1, low)
        tl.store(counts + index, low, mask=index < count)


def list_top_keys(weight: Tensor, key_slots: Tensor | None, key_row: Tensor, room: int, last: Tensor) -> KeyList:
    """`top_keys.list_top_keys`."""
    weight, last = (of if of.stride(1) == 1 else of.contiguous() for of in (weight, last))
    rows, length = weight.shape
    device, count = weight.device, last.shape[1]
    slots, positions = torch.empty(2, rows, room, dtype=torch.int32, device=device).unbind(0)
    listed = torch.empty(rows, dtype=torch.int32, device=device)
    counts = torch.empty(rows, count, dtype=torch.int32, device=device)
    cold = torch.empty(rows, length, dtype=torch.bool, device=device)
    orders = 1 if key_slots is None else key_slots.shape[1]
    with torch.cuda.device_of(weight):
        _list_top_keys_kernel[(rows,)](
            weight, None if key_slots is None else key_slots.contiguous(), key_row.contiguous(), last,
            slots, positions, listed, counts, cold,
            key_row.shape[1], orders, length, weight.stride(0), room, last.stride(0), count, room.bit_length(),
            DIGITS, DIGIT, KEYS, ROWS, **OPTIONS,
        )  # fmt: skip
    return KeyList(slots, listed, counts, cold)


@triton.jit(do_not_specialize=["length", "tiles"])
def _hot_tiles_kernel(cold, output, length, tiles, TILE: tl.constexpr, TILES: tl.constexpr):
    """cold: int8 [N, length]. output: int8 [N, tiles], whether some key of a tile is not cold."""
    blocks = tl.cdiv(tiles, TILES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks * TILES + tl.arange(0, TILES)
    slot = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    of_key = tl.load(cold + row * length + slot, mask=slot < length, other=1)
    tl.store(output + row * tiles + tile, (1 - tl.min(of_key, 1)).to(tl.int8), mask=tile < tiles)


def hot_tiles(cold: Tensor) -> Tensor:
    """`Columns.hot_tiles`."""
    rows, length = cold.shape
    tiles = tile_count(length)
    output = torch.empty(rows, tiles, dtype=torch.bool, device=cold.device)
    with torch.cuda.device_of(cold):
        _hot_tiles_kernel[(rows * triton.cdiv(tiles, TILES),)](
            cold.contiguous().view(torch.int8), output.view(torch.int8), length, tiles, TILE, TILES, num_warps=4
        )
    return output
