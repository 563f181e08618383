"""Triton kernels of `kernels/tile_bounds.py` and `kernels/tile_classes.py`, and their launches."""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.a_shape import Intervals
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.sum_before import SUMMED, sum_before
from mmcompile.kernels.tile_bounds import TagBounds, TileBounds, tile_count
from mmcompile.kernels.tile_classes import CHOSEN, FULL, MANDATORY, NON_EMPTY, Chosen

TILES = 8  # tiles that one program reads the tags of
KEY_TILES = 256  # key tiles of one step
# Sums and products apart, as torch has them. Named, because Triton 3.10 changes the default and 3.9 warns of it.
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
# Code that knows a size to be 1 or divisible by 16 gains nothing, and would be compiled once more.
SIZES = ["query_stride", "key_stride", "query_length", "key_length", "query_tiles", "key_tiles", "orders"]
CLASS_SIZES = ["must_order_stride", "must_run_stride", "must_runs", "order_stride", "run_stride", "runs"]
CLASS_SIZES += ["length", "query_tiles", "key_tiles", "orders", "window", "reach"]


@triton.jit
def _store_bounds(output, index, stride, mask, least_of, greatest_of):
    """Least of a [TILES, TILE] block into row `index` of [.., rows, n], greatest of another into the next one."""
    tl.store(output + index * stride, tl.min(least_of, 1), mask=mask)
    tl.store(output + (index + 1) * stride, tl.max(greatest_of, 1), mask=mask)


@triton.jit
def _of_tags(
    tags, output, order, block, order_stride, length, tiles, orders,
    OF_KEYS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The bounds of some tiles of one order. output: int32 [9, orders, tiles], the fields of `TagBounds`."""
    LEAST: tl.constexpr = -2147483648
    INVALID: tl.constexpr = 2147483647
    tile = block * TILES + tl.arange(0, TILES)
    slot = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = slot < length
    tags += order * order_stride
    position = tl.load(tags + slot, mask=inside, other=INVALID)
    segment = tl.load(tags + length + slot, mask=inside, other=INVALID)
    span = tl.load(tags + length + length + slot, mask=inside, other=INVALID)
    # What is not valid, or past the end of a ragged tile, counts for nothing but in `last_of_all` of keys.
    usable = position != INVALID
    last = tl.where(usable, position, LEAST)
    stride = orders.to(tl.int64) * tiles
    output += order * tiles + tile
    some = tile < tiles
    _store_bounds(output, 0, stride, some, position, last)
    tl.store(output + 2 * stride, tl.max(position if OF_KEYS else last, 1), mask=some)
    _store_bounds(output, 3, stride, some, tl.where(usable, segment, INVALID), tl.where(usable, segment, LEAST))
    _store_bounds(output, 5, stride, some, tl.where(span < 0, INVALID, span), tl.where(inside, span, LEAST))
    tl.store(output + 7 * stride, tl.min(span, 1), mask=some)
    tl.store(output + 8 * stride, tl.sum(usable.to(tl.int32), 1), mask=some)


@triton.jit(do_not_specialize=SIZES)
def _tag_bounds_kernel(
    query_tags, key_tags, query_bounds, key_bounds,
    query_stride, key_stride, query_length, key_length, query_tiles, key_tiles, orders,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """query_tags, key_tags: int32 [orders, 3, length]. Programs of queries first, then those of keys."""
    of_queries = tl.cdiv(query_tiles, TILES)
    of_keys = tl.cdiv(key_tiles, TILES)
    order = (tl.program_id(0) // (of_queries + of_keys)).to(tl.int64)
    block = tl.program_id(0) % (of_queries + of_keys)
    if block < of_queries:
        _of_tags(
            query_tags, query_bounds, order, block, query_stride, query_length, query_tiles, orders, False, TILE, TILES
        )
    else:
        block -= of_queries
        _of_tags(key_tags, key_bounds, order, block, key_stride, key_length, key_tiles, orders, True, TILE, TILES)


def tag_bounds(query_tags: Tensor, key_tags: Tensor) -> tuple[TagBounds, TagBounds]:
    """`tile_bounds.tag_bounds`. Tags: their last two dimensions contiguous."""
    orders, _, query_length = query_tags.shape
    key_length = key_tags.shape[2]
    query_tiles, key_tiles = tile_count(query_length), tile_count(key_length)
    fields = len(TagBounds._fields)
    of_queries = torch.empty(fields, orders, query_tiles, dtype=torch.int32, device=query_tags.device)
    of_keys = torch.empty(fields, orders, key_tiles, dtype=torch.int32, device=query_tags.device)
    with torch.cuda.device_of(query_tags):
        _tag_bounds_kernel[(orders * (triton.cdiv(query_tiles, TILES) + triton.cdiv(key_tiles, TILES)),)](
            query_tags, key_tags, of_queries, of_keys, query_tags.stride(0), key_tags.stride(0),
            query_length, key_length, query_tiles, key_tiles, orders, TILE, TILES, **OPTIONS,
        )  # fmt: skip
    return TagBounds(*of_queries.unbind(0)), TagBounds(*of_keys.unbind(0))


@triton.jit(do_not_specialize=["length", "tiles", "total"])
def _site_bounds_kernel(site, output, length, tiles, total, TILE: tl.constexpr, TILES: tl.constexpr):
    """site: int32 [orders, length], negative for none. output: int32 [2, orders, tiles]."""
    blocks = tl.cdiv(tiles, TILES)
    order = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks * TILES + tl.arange(0, TILES)
    slot = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    values = tl.load(site + order * length + slot, mask=slot < length, other=-1)
    some = values >= 0
    _store_bounds(
        output + order * tiles + tile, 0, total, tile < tiles,
        tl.where(some, values, 2147483647), tl.where(some, values, -2147483648),
    )  # fmt: skip


def site_bounds(site: Tensor) -> tuple[Tensor, Tensor]:
    """`tile_bounds.site_bounds`."""
    site = site.contiguous()
    orders, length = site.shape
    tiles = tile_count(length)
    output = torch.empty(2, orders, tiles, dtype=torch.int32, device=site.device)
    with torch.cuda.device_of(site):
        _site_bounds_kernel[(orders * triton.cdiv(tiles, TILES),)](
            site, output, length, tiles, orders * tiles, TILE, TILES, **OPTIONS
        )
    return output[0], output[1]


@triton.jit(do_not_specialize=["length", "tiles"])
def _key_positions_kernel(tags, output, bounds, length, tiles, TILE: tl.constexpr, TILES: tl.constexpr):
    """tags: int32 [orders, 3, length]. output: int32 [orders, tiles, TILE]. bounds: int32 [orders, 3, tiles]."""
    blocks = tl.cdiv(tiles, TILES)
    order = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks * TILES + tl.arange(0, TILES)
    slot = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    some = tile < tiles
    position = tl.load(tags + order * 3 * length + slot, mask=slot < length, other=2147483647)
    tl.store(output + order * tiles * TILE + slot, position, mask=some[:, None])
    bounds += order * 3 * tiles + tile
    _store_bounds(bounds, 0, tiles, some, position, tl.where(position == 2147483647, -1, position))
    tl.store(bounds + 2 * tiles, tl.max(position, 1), mask=some)


def key_positions(tags: Tensor) -> tuple[Tensor, Tensor]:
    """`tile_mass.KeyPositions.of`."""
    tags = tags.contiguous()
    batch, orders, _, length = tags.shape
    tiles = tile_count(length)
    output = torch.empty(batch, orders, tiles, TILE, dtype=torch.int32, device=tags.device)
    bounds = torch.empty(batch, orders, 3, tiles, dtype=torch.int32, device=tags.device)
    with torch.cuda.device_of(tags):
        _key_positions_kernel[(batch * orders * triton.cdiv(tiles, TILES),)](
            tags, output, bounds, length, tiles, TILE, TILES, **OPTIONS
        )
    return output, bounds


@triton.jit
def _bound(bounds, field: tl.constexpr, stride, tile, inside):
    return tl.load(bounds + field * stride + tile, mask=inside, other=0)


@triton.jit
def _classified(
    query, query_stride, key, key_stride, tile, inside, window,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Of some key tiles whether they are non-empty, full, and of a span of the query tile; and their distance.

    query: the bounds of one query tile, key: those of all key tiles, with strides between fields.
    """
    q_first = tl.load(query)
    q_last = tl.load(query + query_stride)
    k_first = _bound(key, 0, key_stride, tile, inside)
    k_last = _bound(key, 1, key_stride, tile, inside)
    k_last_of_all = _bound(key, 2, key_stride, tile, inside)
    some = k_first <= q_last
    every = k_last_of_all <= q_first
    match = some & False
    if SPANS:
        q_span = tl.load(query + 6 * query_stride)
        q_span_least = tl.load(query + 7 * query_stride)
        k_span = _bound(key, 6, key_stride, tile, inside)
        k_span_least = _bound(key, 7, key_stride, tile, inside)
        match = (_bound(key, 5, key_stride, tile, inside) <= q_span) & (tl.load(query + 5 * query_stride) <= k_span)
        some |= match
        one_span = (q_span_least == q_span) & (q_span_least >= 0)
        every |= one_span & (k_span_least == q_span_least) & (k_span == q_span_least) & (k_last_of_all != 2147483647)
    if WINDOW:
        some &= k_last > q_first - window
        every &= k_first > q_last - window
    if SEGMENTS:
        q_segment = tl.load(query + 3 * query_stride)
        q_segment_last = tl.load(query + 4 * query_stride)
        k_segment = _bound(key, 3, key_stride, tile, inside)
        k_segment_last = _bound(key, 4, key_stride, tile, inside)
        some &= (k_segment <= q_segment_last) & (q_segment <= k_segment_last)
        every &= (q_segment == q_segment_last) & (k_segment == k_segment_last) & (q_segment == k_segment)
    distance = tl.maximum(tl.maximum(q_first - k_last, k_first - q_last), 0)
    return some & inside, every & inside, match & inside, distance


@triton.jit(do_not_specialize=["query_tiles", "key_tiles", "orders", "window"])
def _count_kernel(
    query_bounds, key_bounds, counts, query_tiles, key_tiles, orders, window,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, SPANS: tl.constexpr, KEY_TILES: tl.constexpr,
):  # fmt: skip
    """Non-empty tiles of each query tile. counts: int32 [orders, query_tiles]."""
    row = tl.program_id(0).to(tl.int64)
    order = row // query_tiles
    count = tl.zeros([KEY_TILES], tl.int32)
    for start in range(0, key_tiles, KEY_TILES):
        tile = start + tl.arange(0, KEY_TILES)
        some, _, _, _ = _classified(
            query_bounds + row, orders.to(tl.int64) * query_tiles,
            key_bounds + order * key_tiles, orders.to(tl.int64) * key_tiles,
            tile, tile < key_tiles, window, WINDOW, SEGMENTS, SPANS,
        )  # fmt: skip
        count += some.to(tl.int32)
    tl.store(counts + row, tl.sum(count))


@triton.jit(do_not_specialize=["query_tiles", "share"])
def _total_kernel(counts, total, part, query_tiles, share, SUMMED: tl.constexpr):
    """Sums of rows of counts, int32 [orders, query_tiles], and the part of them that a share is at most.

    share: the bits of a float64, because a number would come as float32.
    """
    order = tl.program_id(0).to(tl.int64)
    count = sum_before(counts + order * query_tiles, query_tiles, SUMMED)
    tl.store(total + order, count)
    share = tl.cast(share, tl.int64).to(tl.float64, bitcast=True)
    tl.store(part + order, (count.to(tl.float64) * share).to(tl.int64))  # never negative: rounded down


def count_non_empty(bounds: TileBounds, share: float) -> tuple[Tensor, Tensor]:
    """`TileBounds.count_non_empty`."""
    orders, query_tiles, key_tiles = bounds.shape
    counts = torch.empty(orders, query_tiles, dtype=torch.int32, device=bounds.query.first.device)
    total, part = torch.empty(2, orders, dtype=torch.int64, device=counts.device).unbind(0)
    with torch.cuda.device_of(counts):
        _count_kernel[(orders * query_tiles,)](
            bounds.query.first, bounds.key.first, counts, query_tiles, key_tiles, orders, bounds.window or 0,
            bounds.window is not None, bounds.segments, bounds.spans, KEY_TILES, **OPTIONS,
        )  # fmt: skip
        (bits,) = struct.unpack("q", struct.pack("d", share))
        _total_kernel[(orders,)](counts, total, part, query_tiles, bits, SUMMED, **OPTIONS)
    return total, part


@triton.jit
def _run_ends(first, last, order, order_stride, run_stride, runs, slot, length, start, KEY_TILES: tl.constexpr):
    """Runs that start less runs that have ended, at each of the tiles from `start`, of the queries in `slot`."""
    steps = tl.zeros([KEY_TILES], tl.int32)
    for run in range(runs):
        place = order * order_stride + run * run_stride + slot
        begin = tl.load(first + place, mask=slot < length, other=0).to(tl.int32)
        end = tl.load(last + place, mask=slot < length, other=-1).to(tl.int32) + 1
        some = end > begin
        begins = some & (begin >= start) & (begin < start + KEY_TILES)
        ends = some & (end >= start) & (end < start + KEY_TILES)
        if tl.max((begins | ends).to(tl.int32)) > 0:  # seldom, with many key tiles
            steps += tl.histogram(begin - start, KEY_TILES, mask=begins)
            steps -= tl.histogram(end - start, KEY_TILES, mask=ends)
    return steps


@triton.jit(do_not_specialize=CLASS_SIZES)
def _classify_kernel(
    query_bounds, key_bounds,
    must_first, must_last, must_order_stride, must_run_stride, must_runs,
    first, last, order_stride, run_stride, runs,
    query_site_first, query_site_last, key_site_first, key_site_last,
    classes,
    length, query_tiles, key_tiles, orders, window, reach,
    EVERY: tl.constexpr, REACH: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, SPANS: tl.constexpr,
    NON_EMPTY: tl.constexpr, FULL: tl.constexpr, MANDATORY: tl.constexpr, CHOSEN: tl.constexpr,
    TILE: tl.constexpr, KEY_TILES: tl.constexpr,
):  # fmt: skip
    """The classes of the key tiles of one query tile."""
    row = tl.program_id(0).to(tl.int64)
    order = row // query_tiles
    slot = (row % query_tiles).to(tl.int32) * TILE + tl.arange(0, TILE)
    must_before = 0  # runs that cover the tile before the step
    before = 0
    for start in range(0, key_tiles, KEY_TILES):
        tile = start + tl.arange(0, KEY_TILES)
        inside = tile < key_tiles
        some, every, match, distance = _classified(
            query_bounds + row, orders.to(tl.int64) * query_tiles,
            key_bounds + order * key_tiles, orders.to(tl.int64) * key_tiles,
            tile, inside, window, WINDOW, SEGMENTS, SPANS,
        )  # fmt: skip
        steps = _run_ends(
            must_first, must_last, order, must_order_stride, must_run_stride, must_runs, slot, length, start, KEY_TILES
        )
        must = some & (must_before + tl.cumsum(steps, 0) > 0)
        must_before += tl.sum(steps)
        chosen = inside & EVERY
        if first is not None:
            steps = _run_ends(first, last, order, order_stride, run_stride, runs, slot, length, start, KEY_TILES)
            chosen |= before + tl.cumsum(steps, 0) > 0
            before += tl.sum(steps)
        if REACH:
            chosen |= match & (distance < reach)
        if query_site_first is not None:
            q_first = tl.load(query_site_first + row)
            q_last = tl.load(query_site_last + row)
            k_first = tl.load(key_site_first + order * key_tiles + tile, mask=inside, other=0)
            k_last = tl.load(key_site_last + order * key_tiles + tile, mask=inside, other=0)
            chosen |= (k_first <= q_last) & (q_first <= k_last)
        classes_here = tl.where(some, NON_EMPTY, 0) | tl.where(every, FULL, 0)
        classes_here |= tl.where(must, MANDATORY, 0) | tl.where(chosen, CHOSEN, 0)
        tl.store(classes + row * key_tiles + tile, classes_here.to(tl.uint8), mask=inside)


def classify(bounds: TileBounds, must: Intervals, chosen: Chosen) -> Tensor:
    """`tile_classes.classify`."""
    orders, query_tiles, key_tiles = bounds.shape
    classes = torch.empty(bounds.shape, dtype=torch.uint8, device=bounds.query.first.device)
    with torch.cuda.device_of(classes):
        _classify_kernel[(orders * query_tiles,)](
            bounds.query.first, bounds.key.first,
            *_runs(must),
            *((None, None, 0, 0, 0) if chosen.runs is None else _runs(chosen.runs)),
            *((None,) * 4 if chosen.sites is None else chosen.sites),
            classes,
            must.first.shape[2], query_tiles, key_tiles, orders, bounds.window or 0, chosen.reach or 0,
            chosen.every, chosen.reach is not None,
            bounds.window is not None, bounds.segments, bounds.spans,
            NON_EMPTY, FULL, MANDATORY, CHOSEN,
            TILE, KEY_TILES, **OPTIONS,
        )  # fmt: skip
    return classes


def _runs(runs: Intervals) -> tuple[Tensor | int, ...]:
    """Both ends, integer [O, M, Sq], with equal strides, the last one 1; strides of the others, and M."""
    return runs.first, runs.last, *runs.first.stride()[:2], runs.first.shape[1]
