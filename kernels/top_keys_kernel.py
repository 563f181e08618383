"""Triton kernels of `kernels/top_keys.py`, and their launches.

The weight of the last key to list is found a digit at a time, as in a radix sort: weights are not negative, so that
their bits are as their values. Each launch counts the keys of every digit that match what is known of that weight, in
chunks of positions; from these counts the last launch knows where each chunk's keys stand in the list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_bounds import tile_count
from mmcompile.kernels.top_keys import KeyList

KEYS = 2048  # keys that are counted in one step
LISTED = 1024  # keys that are listed in one step
CHUNKS = 32  # most chunks of a row
SHORTEST = 4096  # keys of a chunk, at least
BINS = 256
SHIFTS = (23, 15, 7, 0)  # of the digits; the sign is never set, so that the last has seven bits
ROWS = 128  # positions of one program of `reached`
TILES = 32  # tiles of one program of `hot_tiles`
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
SIZES = ["plans", "orders", "length", "chunk", "weight_stride", "room"]


@triton.jit
def _bits(weight, key_slots, position, inside):
    """Slots of some keys, and their weights as integers of the same order; 0 for those without any."""
    slot = tl.load(key_slots + position, mask=inside, other=0)
    of_key = tl.load(weight + slot, mask=inside, other=0.0)
    return slot, tl.where(of_key > 0.0, of_key.to(tl.int32, bitcast=True), 0)


@triton.jit
def _narrow(counts, known, SHIFT: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr):
    """One more digit of the weight of the last key to list.

    counts: int32 [CHUNKS, BINS], keys of each digit. known: int32 [2], the digits before, and how many keys that match
    them are to be listed. Returns these with the digit; and of each chunk the keys above it, and those that match it.
    """
    bins = tl.arange(0, BINS)
    by_chunk = tl.load(counts + tl.arange(0, CHUNKS)[:, None] * BINS + bins[None, :])
    by_digit = tl.sum(by_chunk, 0)
    prefix = tl.load(known)
    left = tl.load(known + 1)
    above = tl.sum(by_digit) - tl.cumsum(by_digit, 0)
    digit = tl.minimum(tl.sum((above >= left).to(tl.int32)), BINS - 1)  # none is left: the last, which no key has
    left -= tl.sum(tl.where(bins > digit, by_digit, 0))
    chunk_above = tl.sum(tl.where(bins[None, :] > digit, by_chunk, 0), 1)
    chunk_match = tl.sum(tl.where(bins[None, :] == digit, by_chunk, 0), 1)
    return prefix | (digit << SHIFT), left, chunk_above, chunk_match


@triton.jit
def _of_chunk(values, chunk, CHUNKS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, CHUNKS) == chunk, values, 0))


@triton.jit(do_not_specialize=SIZES)
def _count_digits_kernel(
    weight, key_slots, key_row, counts_before, counts, known_before, known, above,
    plans, orders, length, chunk, weight_stride, room,
    BEFORE: tl.constexpr, SHIFT: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One digit of the keys of one chunk. BEFORE: shift of the digit before, or None for the first.

    counts: int32 [N, CHUNKS, BINS]. known: int32 [N, 2], see `_narrow`, of the digits before this one. above: int32
    [N, CHUNKS], keys above what is known.
    """
    program = tl.program_id(0)
    row = (program // CHUNKS).to(tl.int64)
    part = program % CHUNKS
    if BEFORE is None:
        prefix = 0
        tl.store(known + row * 2, 0, mask=part == 0)
        tl.store(known + row * 2 + 1, tl.minimum(room, length), mask=part == 0)
        tl.store(above + program, 0)
    else:
        prefix, left, chunk_above, _match = _narrow(
            counts_before + row * CHUNKS * BINS, known_before + row * 2, BEFORE, CHUNKS, BINS
        )
        tl.store(known + row * 2, prefix, mask=part == 0)
        tl.store(known + row * 2 + 1, left, mask=part == 0)
        tl.store(above + program, tl.load(above + program) + _of_chunk(chunk_above, part, CHUNKS))
    weight += row * weight_stride
    key_slots += (row // plans * orders + tl.load(key_row + row)) * length
    found = tl.zeros([BINS], tl.int32)
    end = tl.minimum((part + 1) * chunk, length)
    for start in range(part * chunk, end, KEYS):
        position = start + tl.arange(0, KEYS)
        _slot, bits = _bits(weight, key_slots, position, position < end)
        matches = position < end
        if BEFORE is not None:
            matches &= (bits >> BEFORE) == (prefix >> BEFORE)
        digit = (bits >> SHIFT) & ((1 << ((31 if BEFORE is None else BEFORE) - SHIFT)) - 1)
        if tl.max(matches.to(tl.int32)) > 0:  # seldom, from the third digit on
            found += tl.histogram(digit, BINS, mask=matches)
    tl.store(counts + program.to(tl.int64) * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=SIZES)
def _list_keys_kernel(
    weight, key_slots, key_row, counts, known, above, slots, positions, listed, cold,
    plans, orders, length, chunk, weight_stride, room,
    SHIFT: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The listed keys of one chunk: `KeyList`."""
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    part = tl.program_id(0) % CHUNKS
    last, left, chunk_above, chunk_match = _narrow(counts + row * CHUNKS * BINS, known + row * 2, SHIFT, CHUNKS, BINS)
    left = tl.where(last > 0, left, 0)  # without weight no key is listed
    chunk_above += tl.load(above + row * CHUNKS + tl.arange(0, CHUNKS))
    earlier = tl.arange(0, CHUNKS) < part
    before = tl.sum(tl.where(earlier, chunk_above, 0))
    matching = tl.sum(tl.where(earlier, chunk_match, 0))
    weight += row * weight_stride
    key_slots += (row // plans * orders + tl.load(key_row + row)) * length
    slots += row * room
    positions += row * room
    end = tl.minimum((part + 1) * chunk, length)
    for start in range(part * chunk, end, LISTED):
        position = start + tl.arange(0, LISTED)
        inside = position < end
        slot, bits = _bits(weight, key_slots, position, inside)
        more = bits > last
        match = (bits == last) & inside
        # Of each key and those before it in this step: more weight in the lower half, as much in the upper one.
        ranks = tl.cumsum(tl.where(more, 1, tl.where(match, 65536, 0)), 0)
        up_to = matching + (ranks >> 16)
        chosen = more | (match & (up_to <= left))
        entry = before + (ranks & 65535) + tl.minimum(up_to, left) - 1
        tl.store(slots + entry, slot, mask=chosen)
        tl.store(positions + entry, position, mask=chosen)
        tl.store(cold + row * length + slot, ~chosen, mask=inside)
        before += tl.sum(more.to(tl.int32))
        matching += tl.sum(match.to(tl.int32))
    if part == 0:
        count = tl.sum(chunk_above) + tl.minimum(tl.sum(chunk_match), left)
        tl.store(listed + row, count)
        for start in range(count, room, LISTED):
            entry = start + tl.arange(0, LISTED)
            tl.store(slots + entry, tl.zeros([LISTED], tl.int32), mask=entry < room)
            tl.store(positions + entry, tl.full([LISTED], 2147483647, tl.int32), mask=entry < room)


def list_top_keys(weight: Tensor, key_slots: Tensor, key_row: Tensor, room: int) -> KeyList:
    """`top_keys.list_top_keys`."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, length = weight.shape
    device = weight.device
    slots, positions = torch.empty(2, rows, room, dtype=torch.int32, device=device).unbind(0)
    listed = torch.empty(rows, dtype=torch.int32, device=device)
    cold = torch.empty(rows, length, dtype=torch.bool, device=device)
    chunks = min(CHUNKS, triton.next_power_of_2(triton.cdiv(length, SHORTEST)))
    counts = torch.empty(len(SHIFTS), rows, chunks, BINS, dtype=torch.int32, device=device).unbind(0)
    known = torch.empty(len(SHIFTS), rows, 2, dtype=torch.int32, device=device).unbind(0)
    above = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    read = weight, key_slots.contiguous(), key_row.contiguous()
    sizes = key_row.shape[1], key_slots.shape[1], length, triton.cdiv(length, chunks), weight.stride(0), room
    with torch.cuda.device_of(weight):
        for index, shift in enumerate(SHIFTS):
            before = max(index - 1, 0)  # of the first digit there is none, and nothing is read
            _count_digits_kernel[(rows * chunks,)](
                *read, counts[before], counts[index], known[before], known[index], above, *sizes,
                SHIFTS[before] if index else None, shift, chunks, BINS, KEYS, **OPTIONS,
            )  # fmt: skip
        _list_keys_kernel[(rows * chunks,)](
            *read, counts[-1], known[-1], above, slots, positions, listed, cold, *sizes,
            SHIFTS[-1], chunks, BINS, LISTED, **OPTIONS,
        )  # fmt: skip
    return KeyList(slots, positions, listed, cold)


@triton.jit(do_not_specialize=["last_stride", "count", "room", "steps"])
def _reached_kernel(positions, last, output, last_stride, count, room, steps, ROWS: tl.constexpr):
    """How many of the ascending positions, int32 [N, room], are at most each of last, int32 [N, count]."""
    blocks = tl.cdiv(count, ROWS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    value = tl.load(last + row * last_stride + index, mask=index < count, other=-1)
    positions += row * room
    low = tl.zeros([ROWS], tl.int32)
    high = low + room
    for _ in range(steps):
        middle = (low + high) // 2
        after = (low < high) & (tl.load(positions + middle, mask=low < high, other=0) <= value)
        high = tl.where(after, high, middle)
        low = tl.where(after, middle + 1, low)
    tl.store(output + row * count + index, low, mask=index < count)


def reached(keys: KeyList, last: Tensor) -> Tensor:
    """`top_keys.reached`."""
    last = last if last.stride(1) == 1 else last.contiguous()
    rows, count = last.shape
    room = keys.positions.shape[1]
    output = torch.empty(rows, count, dtype=torch.int32, device=last.device)
    with torch.cuda.device_of(last):
        _reached_kernel[(rows * triton.cdiv(count, ROWS),)](
            keys.positions, last, output, last.stride(0), count, room, room.bit_length(), ROWS, num_warps=4
        )
    return output


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
