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
from mmcompile.kernels.top_keys import KeyList, Wanted

KEYS = 2048  # keys that are counted in one step
LISTED = 1024  # keys that are listed in one step
CHUNKS = 32  # most chunks of a row
BINS = 256
SHIFTS = (23, 15, 7, 0)  # of the digits; the sign is never set, so that the last has seven bits
ROWS = 128  # positions of one program of `reached`
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
SIZES = ["plans", "orders", "length", "chunk", "weight_stride", "times", "least", "most", "tiles", "room"]


@triton.jit
def _bits(weight, key_slots, position, inside, times, least):
    """Slots of some keys, and their weights as integers of the same order; 0 for those that are not to be listed."""
    slot = tl.load(key_slots + position, mask=inside, other=0)
    of_key = tl.load(weight + slot, mask=inside, other=0.0)
    return slot, tl.where(of_key * times > least, of_key.to(tl.int32, bitcast=True), 0)


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
    weight, key_slots, key_row, counts_before, counts, known_before, known, above, hot_tiles,
    plans, orders, length, chunk, weight_stride, times, least, most, tiles,
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
        tl.store(known + row * 2 + 1, most, mask=part == 0)
        tl.store(above + program, 0)
        # For the last launch, which sets some.
        share = tl.cdiv(tiles, CHUNKS)
        last = tl.minimum((part + 1) * share, tiles)
        for start in range(part * share, last, BINS):
            tile = start + tl.arange(0, BINS)
            tl.store(hot_tiles + row * tiles + tile, tl.zeros([BINS], tl.int1), mask=tile < last)
    else:
        prefix, left, chunk_above, chunk_match = _narrow(
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
        slot, bits = _bits(weight, key_slots, position, position < end, times, least)
        matches = position < end
        if BEFORE is not None:
            matches &= (bits >> BEFORE) == (prefix >> BEFORE)
        digit = (bits >> SHIFT) & ((1 << ((31 if BEFORE is None else BEFORE) - SHIFT)) - 1)
        found += tl.histogram(digit, BINS, mask=matches)
    tl.store(counts + program.to(tl.int64) * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=SIZES)
def _list_keys_kernel(
    weight, key_slots, key_row, counts, known, above, slots, positions, listed, cold, hot_tiles,
    plans, orders, length, chunk, weight_stride, times, least, tiles, room,
    SHIFT: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The listed keys of one chunk: `KeyList`."""
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    part = tl.program_id(0) % CHUNKS
    last, left, chunk_above, chunk_match = _narrow(
        counts + row * CHUNKS * BINS, known + row * 2, SHIFT, CHUNKS, BINS
    )
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
        slot, bits = _bits(weight, key_slots, position, inside, times, least)
        more = bits > last
        match = (bits == last) & inside
        up_to = matching + tl.cumsum(match.to(tl.int32), 0)
        chosen = more | (match & (up_to <= left))
        entry = before + tl.cumsum(more.to(tl.int32), 0) + tl.minimum(up_to, left) - 1
        tl.store(slots + entry, slot, mask=chosen)
        tl.store(positions + entry, position, mask=chosen)
        tl.store(cold + row * length + slot, ~chosen, mask=inside)
        tl.store(hot_tiles + row * tiles + slot // TILE, chosen, mask=chosen)
        before += tl.sum(more.to(tl.int32))
        matching += tl.sum(match.to(tl.int32))
    if part == 0:
        count = tl.sum(chunk_above) + tl.minimum(tl.sum(chunk_match), left)
        tl.store(listed + row, count)
        for start in range(count, room, LISTED):
            entry = start + tl.arange(0, LISTED)
            tl.store(slots + entry, tl.zeros([LISTED], tl.int32), mask=entry < room)
            tl.store(positions + entry, tl.full([LISTED], 2147483647, tl.int32), mask=entry < room)


def list_top_keys(weight: Tensor, key_slots: Tensor, key_row: Tensor, room: int, wanted: Wanted) -> KeyList:
    """`top_keys.list_top_keys`."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, length = weight.shape
    tiles, device = tile_count(length), weight.device
    slots, positions = torch.empty(2, rows, room, dtype=torch.int32, device=device).unbind(0)
    listed = torch.empty(rows, dtype=torch.int32, device=device)
    cold = torch.empty(rows, length, dtype=torch.bool, device=device)
    hot_tiles = torch.empty(rows, tiles, dtype=torch.bool, device=device)
    counts = torch.empty(len(SHIFTS), rows, CHUNKS, BINS, dtype=torch.int32, device=device).unbind(0)
    known = torch.empty(len(SHIFTS), rows, 2, dtype=torch.int32, device=device).unbind(0)
    above = torch.empty(rows, CHUNKS, dtype=torch.int32, device=device)
    read = weight, key_slots.contiguous(), key_row.contiguous()
    sizes = key_row.shape[1], key_slots.shape[1], length, triton.cdiv(length, CHUNKS), weight.stride(0)
    limits = wanted.times, wanted.least
    with torch.cuda.device_of(weight):
        for index, shift in enumerate(SHIFTS):
            before = max(index - 1, 0)  # of the first digit there is none, and nothing is read
            _count_digits_kernel[(rows * CHUNKS,)](
                *read, counts[before], counts[index], known[before], known[index], above, hot_tiles,
                *sizes, *limits, min(wanted.most, length), tiles,
                SHIFTS[before] if index else None, shift, CHUNKS, BINS, KEYS, **OPTIONS,
            )  # fmt: skip
        _list_keys_kernel[(rows * CHUNKS,)](
            *read, counts[-1], known[-1], above, slots, positions, listed, cold, hot_tiles, *sizes, *limits, tiles, room,
            SHIFTS[-1], CHUNKS, BINS, LISTED, TILE, **OPTIONS,
        )  # fmt: skip
    return KeyList(slots, positions, listed, cold, hot_tiles)


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
