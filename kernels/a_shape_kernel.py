"""Triton kernels of `kernels/a_shape.py` and their launches: which runs of key tiles each query chooses."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.a_shape import BEYOND, AShapeRuns, Intervals, KeyGroups
from mmcompile.kernels.patterns import MAX_TOKENS, MODALITIES, TILE
from mmcompile.kernels.sum_before import SUMMED, sum_before
from mmcompile.kernels.tags import INVALID

KEYS = 1024  # keys of one program
QUERIES = 128  # queries of one program
# Sums and products apart, as torch has them. Named, because Triton 3.10 changes the default and 3.9 warns of it.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
UNSPECIALIZED = ["query_stride", "query_length", "key_length", "steps", "sink", "local", "last", "window", "total"]


@triton.jit(do_not_specialize=["order_stride", "length"])
def _sort_key_kernel(
    tags, modality, output, order_stride, length, BEYOND, MODALITIES: tl.constexpr, KEYS: tl.constexpr
):
    """What keys are sorted by. tags: int32 [O, 3, length], modality: int32 [O, length] or None, output: int64."""
    blocks = tl.cdiv(length, KEYS)
    order = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    inside = slot < length
    position = tl.load(tags + order * order_stride + slot, mask=inside, other=0)
    group = tl.load(tags + order * order_stride + length + slot, mask=inside, other=0).to(tl.int64) * MODALITIES
    if modality is not None:
        group += tl.load(modality + order * length + slot, mask=inside, other=0)
    by = tl.where(position == 2147483647, BEYOND, group * length + position)
    tl.store(output + order * length + slot, by, mask=inside)


def sort_keys(tags: Tensor, modality: Tensor | None) -> Tensor:
    """`a_shape.sort_keys`. tags: their last two dimensions contiguous. modality: contiguous."""
    orders, _, length = tags.shape
    output = torch.empty(orders, length, dtype=torch.int64, device=tags.device)
    with torch.cuda.device_of(tags):
        _sort_key_kernel[(orders * triton.cdiv(length, KEYS),)](
            tags, modality, output, tags.stride(0), length, BEYOND, MODALITIES, KEYS, **OPTIONS
        )
    return output


@triton.jit(do_not_specialize=["length", "tiles", "copies", "position_stride", "slot_stride"])
def _rank_valid_kernel(
    position, usable, slot, output, output_slots, after, length, tiles, copies, position_stride, slot_stride,
    INVALID: tl.constexpr, BEYOND: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Valid keys by rank. Each batch row of position and usable is for `copies` rows of slot and outputs."""
    blocks = tl.cdiv(length, KEYS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    batch = row // copies
    start = tl.program_id(0) % blocks * KEYS
    token = start + tl.arange(0, KEYS)
    inside = token < length
    usable += batch * tiles
    before = sum_before(usable, start // TILE, SUMMED)
    total = sum_before(usable, tiles, SUMMED)
    valid = tl.load(position + batch * position_stride + token, mask=inside, other=INVALID) != INVALID
    of_slot = tl.load(slot + row * slot_stride + token, mask=valid, other=0).to(tl.int64)
    up_to = before + tl.cumsum(valid.to(tl.int32), 0)
    rank = up_to - 1
    tl.store(after + row * length + token, up_to.to(tl.int32), mask=inside)
    output += row * length
    output_slots += row * length
    tl.store(output + rank, token.to(tl.int64), mask=valid)
    tl.store(output_slots + rank, of_slot, mask=valid)
    beyond = inside & (token >= total)
    tl.store(output + token, tl.full([KEYS], BEYOND, tl.int64), mask=beyond)
    tl.store(output_slots + token, tl.zeros([KEYS], tl.int64), mask=beyond)


def rank_valid_keys(position: Tensor, usable: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`a_shape.rank_valid_keys_cpu`. The last dimension of position and slot is contiguous, as is usable."""
    rows, length = slot.shape
    output, output_slots = torch.empty(2, rows, length, dtype=torch.int64, device=slot.device).unbind(0)
    after = torch.empty(rows, length, dtype=torch.int32, device=slot.device)
    with torch.cuda.device_of(slot):
        _rank_valid_kernel[(rows * triton.cdiv(length, KEYS),)](
            position, usable, slot, output, output_slots, after, length, usable.shape[1], rows // position.shape[0],
            position.stride(0), slot.stride(0), INVALID, BEYOND, TILE, KEYS, SUMMED, **OPTIONS,
        )  # fmt: skip
    return output, output_slots, after


@triton.jit
def _rank_after(keys, value, length, steps):
    """How many of the ascending `keys`, int64 [length], are at most `value`."""
    low = tl.zeros_like(value).to(tl.int32)
    high = low + length
    for _ in range(steps):
        middle = (low + high) // 2
        key = tl.load(keys + middle, mask=low < high, other=0)
        after = (low < high) & (key <= value)
        high = tl.where(after, high, middle)
        low = tl.where(after, middle + 1, low)
    return low


@triton.jit
def _key_of(keys, rank, length):
    """Position of the key of a rank, int64; arbitrary where the rank is no key's."""
    rest = tl.load(keys + tl.minimum(tl.maximum(rank, 0), length - 1)) % length
    return tl.where(rest < 0, rest + length, rest)  # of a segment below 0


@triton.jit
def _tile_of(slots, rank, length, TILE: tl.constexpr):
    """Key tile of the key of a rank."""
    return (tl.load(slots + tl.minimum(tl.maximum(rank, 0), length - 1)) // TILE).to(tl.int32)


@triton.jit
def _store_run(first, last, run, slots, begin, end, slot, inside, query_length, key_length, TILE: tl.constexpr):
    """The tiles from the key of rank `begin` to the one before rank `end`."""
    some = end > begin
    place = run * query_length + slot
    tl.store(first + place, tl.where(some, _tile_of(slots, begin, key_length, TILE), 1), mask=inside)
    tl.store(last + place, tl.where(some, _tile_of(slots, end - 1, key_length, TILE), 0), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _runs_kernel(
    query_tags, keys, slots, after, group_keys, group_slots, last_query, output,
    query_stride, query_length, key_length, steps, sink, local, last, window, total,
    GROUPS: tl.constexpr, WINDOW: tl.constexpr, LOCAL: tl.constexpr, LAST: tl.constexpr,
    MODALITIES: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Runs of one block of queries: sinks of each group, the nearest key, local bands of each group, the last queries'.

    keys, slots: all valid keys sorted; after: int32 [O, key_length], the rank that follows each position, where all
    keys are of one segment. group_keys, group_slots: sorted within each modality, where there are GROUPS of them.
    output: int32 [2, O, runs, query_length].
    """
    blocks = tl.cdiv(query_length, QUERIES)
    order = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    inside = slot < query_length
    query_tags += order * query_stride
    position = tl.load(query_tags + slot, mask=inside, other=0)
    segment = tl.load(query_tags + query_length + slot, mask=inside, other=0).to(tl.int64) * MODALITIES * key_length
    keys += order * key_length
    slots += order * key_length
    group_keys += order * key_length
    group_slots += order * key_length
    RUNS: tl.constexpr = GROUPS + 1 + (GROUPS if LOCAL else 0) + (1 if LAST else 0)
    first_tile = output + order * RUNS * query_length
    last_tile = first_tile + total
    reached = tl.minimum(tl.maximum(position, -1), key_length - 1)

    if after is None:
        start = _rank_after(keys, segment - 1, key_length, steps)
        end = _rank_after(keys, segment + reached, key_length, steps)
        group_end = _rank_after(keys, segment + (key_length - 1), key_length, steps)
    else:
        after += order * key_length
        start = tl.zeros_like(reached)
        end = tl.load(after + reached, mask=reached >= 0, other=0)
        group_end = start + tl.load(after + key_length - 1)
    for group in tl.static_range(GROUPS):
        if GROUPS > 1:
            of_group = segment + group * key_length
            begin = _rank_after(group_keys, of_group - 1, key_length, steps)
            stop = _rank_after(group_keys, of_group + reached, key_length, steps)
        else:
            begin = start
            stop = end
        _store_run(
            first_tile, last_tile, group, group_slots, begin, tl.minimum(begin + sink, stop),
            slot, inside, query_length, key_length, TILE,
        )  # fmt: skip
        if LOCAL:
            _store_run(
                first_tile, last_tile, GROUPS + 1 + group, group_slots, tl.maximum(begin, stop - local), stop,
                slot, inside, query_length, key_length, TILE,
            )  # fmt: skip

    before = end > start  # a key of the segment lies at or before the query
    latest = _key_of(keys, end - 1, key_length)
    near = before & (latest > position - window) if WINDOW else before
    rank = end - near.to(tl.int32)
    _store_run(
        first_tile, last_tile, GROUPS, slots, rank, tl.minimum(rank + 1, group_end),
        slot, inside, query_length, key_length, TILE,
    )  # fmt: skip
    if LAST:
        limit = tl.minimum(tl.maximum(tl.load(last_query + order), -1), key_length - 1)
        if after is None:
            following = _rank_after(keys, segment + limit, key_length, steps) - end
        else:
            following = tl.load(after + limit, mask=limit >= 0, other=0) - end
        chosen = before & (latest == position) & (following < last)
        place = (RUNS - 1) * query_length + slot
        tl.store(first_tile + place, tl.where(chosen, 0, 1), mask=inside)
        tl.store(last_tile + place, tl.where(chosen, (key_length - 1) // TILE, 0), mask=inside)


def runs(
    query_tags: Tensor,
    keys: KeyGroups,
    groups: KeyGroups,
    sink: int,
    window: int | None,
    local: int | None,
    last: int | None,
) -> AShapeRuns:
    """`a_shape.runs_cpu`. query_tags: their last two dimensions contiguous."""
    orders, _, query_length = query_tags.shape
    count = 1 if groups is keys else MODALITIES
    must = count + 1
    every = must + (0 if local is None else count) + (0 if last is None else 1)
    ends = torch.empty(2, orders, every, query_length, dtype=torch.int32, device=query_tags.device)
    last_query = None if last is None else query_tags[:, 0].amax(-1)
    with torch.cuda.device_of(query_tags):
        _runs_kernel[(orders * triton.cdiv(query_length, QUERIES),)](
            query_tags, keys.sorted, keys.slots, keys.after, groups.sorted, groups.slots, last_query, ends,
            query_tags.stride(0), query_length, keys.length, keys.length.bit_length(),
            sink, local or 0, last or 0, min(window or 0, MAX_TOKENS), ends[0].numel(),
            count, window is not None, local is not None, last is not None,
            MODALITIES, TILE, QUERIES, **OPTIONS,
        )  # fmt: skip
    return AShapeRuns(
        Intervals(ends[0, :, :must], ends[1, :, :must]),
        None if every == must else Intervals(ends[0, :, must:], ends[1, :, must:]),
    )
