"""Triton kernels of `kernels/tile_list.py`, and their launches.

One program walks the key tiles of one query tile of one plan row, a step of them at a time: it reads the class of each
tile, makes its level and either counts it or lists it. Nothing of a tile is kept from one kernel to the next: making a
level again is cheaper than storing it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.sum_before import SUMMED, sum_before
from mmcompile.kernels.tile_classes import CHOSEN, FULL, MANDATORY, NON_EMPTY
from mmcompile.kernels.tile_list import Cut, Layout, Levels, Limits


class Steps(NamedTuple):
    """How a kernel walks: measured on an H200 at 32K, 128K and 1M tokens, where 256 to 1024 tiles differ little."""

    key_tiles: int  # of one step
    warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        # Sums and products apart, as torch has them. Named, because Triton 3.10 changes the default, and 3.9 warns.
        return {"num_warps": self.warps, "enable_fp_fusion": False}


COUNT, LIST = Steps(512, 4), Steps(256, 1)
QUERY_TILES = 8  # query tiles that one program counts the levels of
# Code that knows a size to be 1 or divisible by 16 gains nothing, and would be compiled once more.
SIZES = ["query_tiles", "key_tiles", "orders", "level_count"]


@triton.jit
def _has(classes, which: tl.constexpr):
    return (classes & which) != 0


@triton.jit
def _any(classes, which: tl.constexpr):
    """Whether a step has any such tile: half of all tiles come after their queries, and cost next to nothing."""
    return tl.max((classes & which).to(tl.int32), 0) > 0


@triton.jit
def _diagonal(diagonals, own, tile, inside, key_tiles):
    """Levels of tiles by their distance before the tile `own`. diagonals: [key_tiles + 1], later ones last."""
    distance = own - tile
    distance = tl.where(distance >= 0, distance, key_tiles)
    return tl.load(diagonals + distance, mask=inside, other=0)


@triton.jit
def _level(
    classes, tile, inside, n, row, place, order,
    plane, diagonals, own, row_lines, column_lines, query_bounds, key_bounds,
    query_tiles, key_tiles, orders, level_count,
    CHOSEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How much the pattern wants some key tiles of a query tile: `Levels.of`.

    n, row: the plan row, and the query tile among those of all plan rows; order, place: the same of the pair of orders.
    """
    if plane is not None:
        level = tl.load(plane + row * key_tiles + tile, mask=inside, other=0).to(tl.int32)
    elif diagonals is not None:
        diagonals += n * (key_tiles + 1)
        own += n * query_tiles + row  # twice what comes before this plan row, and its query tile
        first = _diagonal(diagonals, tl.load(own), tile, inside, key_tiles)
        level = tl.minimum(first, _diagonal(diagonals, tl.load(own + query_tiles), tile, inside, key_tiles))
    else:
        chosen = _has(classes, CHOSEN)
        if row_lines is not None:
            chosen |= tl.load(row_lines + row) != 0
            chosen |= tl.load(column_lines + n * key_tiles + tile, mask=inside, other=0) != 0
        key_bounds += order * key_tiles + tile
        key_stride = orders.to(tl.int64) * key_tiles
        q_first = tl.load(query_bounds + place)
        q_last = tl.load(query_bounds + orders.to(tl.int64) * query_tiles + place)
        k_first = tl.load(key_bounds, mask=inside, other=0)
        k_last = tl.load(key_bounds + key_stride, mask=inside, other=0)
        distance = tl.maximum(tl.maximum(q_first - k_last, k_first - q_last), 0)
        ring = tl.minimum(tl.maximum((distance + (TILE - 1)) // TILE, 0), key_tiles)
        level = tl.where(chosen, ring, level_count)
    return level


@triton.jit
def _wanted(classes, level, level_count, NON_EMPTY: tl.constexpr, MANDATORY: tl.constexpr):
    """Tiles that a cut decides on."""
    return _has(classes, NON_EMPTY) & ((classes & MANDATORY) == 0) & (level < level_count)


@triton.jit
def _following(wanted, level, n, row, last_level, of_tile):
    """Of the wanted tiles those of the level after the last one that is listed."""
    if of_tile is not None:
        wanted &= level <= tl.load(of_tile + row)
    return wanted & (level == tl.load(last_level + n) + 1)


@triton.jit
def _chosen(
    classes, level, n, row, seen, level_count, last_level, of_tile, rest, following_count,
    NON_EMPTY: tl.constexpr, MANDATORY: tl.constexpr,
):  # fmt: skip
    """The tiles to list; and `seen`, the tiles of the level after the cut, with those of these tiles."""
    wanted = _wanted(classes, level, level_count, NON_EMPTY, MANDATORY)
    chosen = wanted
    if of_tile is not None:
        chosen &= level <= tl.load(of_tile + row)
    if last_level is not None:
        chosen &= level <= tl.load(last_level + n)
    if rest is not None:
        following = _following(wanted, level, n, row, last_level, of_tile)
        left = tl.load(rest + n)
        among = tl.maximum(tl.load(following_count + n), 1)
        rank = seen + tl.cumsum(following.to(tl.int32), 0)  # from 1
        # Of `among` tiles every so many-th, `left` in all: where rank * left // among grows.
        chosen |= following & (_remainder(rank * left, among) < left)
        seen += tl.sum(following.to(tl.int32))
    return chosen | _has(classes, MANDATORY), seen


@triton.jit
def _remainder(value, divisor):
    """`value % divisor` of integers that are not negative, int64, for quotients below 2^50: a division of 64-bit
    integers takes a hundred instructions. The quotient from float64 is one too large or too small at most."""
    quotient = (value.to(tl.float64) * (1.0 / divisor.to(tl.float64))).to(tl.int64)
    rest = value - quotient * divisor
    rest = tl.where(rest < 0, rest + divisor, rest)
    return tl.where(rest >= divisor, rest - divisor, rest)


@triton.jit(do_not_specialize=[*SIZES, "recall"])
def _count_levels_kernel(
    classes, pair, plane, diagonals, own, row_lines, column_lines, query_bounds, key_bounds,
    weights, column_share, counts, of_tile,
    query_tiles, key_tiles, orders, level_count, recall,
    NON_EMPTY: tl.constexpr, MANDATORY: tl.constexpr, CHOSEN: tl.constexpr, TILE: tl.constexpr,
    LEVELS: tl.constexpr, KEY_TILES: tl.constexpr, QUERY_TILES: tl.constexpr,
):  # fmt: skip
    """counts: int64 [N, 1 + level_count], added to: mandatory tiles, and others of each level; None where nobody asks.

    Where `weights` tell what a tile of each of LEVELS levels is worth and somebody asks for `of_tile`, int32 [N, nQ],
    each query tile's tiles are counted up to the level by which it has `recall` of that, less what its columns hold.
    """
    blocks = tl.cdiv(query_tiles, QUERY_TILES)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * QUERY_TILES
    order = tl.load(pair + n)
    mandatory = tl.zeros([KEY_TILES], tl.int32)
    total = tl.zeros([LEVELS], tl.int32)
    bins = tl.arange(0, LEVELS)
    for query_tile in range(first, tl.minimum(first + QUERY_TILES, query_tiles)):
        row = n * query_tiles + query_tile
        place = order * query_tiles + query_tile
        counted = tl.zeros([LEVELS], tl.int32)
        held = tl.zeros([KEY_TILES], tl.int64)  # by mandatory tiles
        for start in range(0, key_tiles, KEY_TILES):
            tile = start + tl.arange(0, KEY_TILES)
            inside = tile < key_tiles
            here = tl.load(classes + place * key_tiles + tile, mask=inside, other=0)
            if _any(here, NON_EMPTY):
                level = _level(
                    here, tile, inside, n, row, place, order, plane, diagonals, own, row_lines, column_lines,
                    query_bounds, key_bounds, query_tiles, key_tiles, orders, level_count, CHOSEN, TILE,
                )  # fmt: skip
                must = _has(here, MANDATORY)
                wanted = _wanted(here, level, level_count, NON_EMPTY, MANDATORY)
                mandatory += must.to(tl.int32)
                if weights is not None:
                    counted += tl.histogram(level, LEVELS, mask=wanted)
                    held += tl.load(weights + level, mask=must & (level < level_count), other=0)
                elif counts is not None:
                    tl.atomic_add(counts + n * (level_count + 1) + 1 + level, tl.full([KEY_TILES], 1, tl.int64), wanted)
        if of_tile is not None:
            of_must = tl.sum(held)
            weight = tl.load(weights + bins).to(tl.int64)
            by_level = of_must + tl.cumsum(counted * weight, 0)
            every = of_must + tl.sum(counted * weight)
            share = recall
            if column_share is not None:
                in_columns = tl.load(column_share + row)
                share = tl.maximum(tl.div_rn(recall - in_columns, tl.maximum(1.0 - in_columns, 1e-6)), 0.0)
            target = every.to(tl.float64) * share.to(tl.float64)
            within = tl.sum((by_level.to(tl.float64) < target).to(tl.int32))
            within = within + (of_must.to(tl.float64) < target).to(tl.int32) - 1
            tl.store(of_tile + row, within)
            counted = tl.where(bins <= within, counted, 0)
        total += counted
    if counts is not None:
        counts += n * (level_count + 1)
        tl.atomic_add(counts, tl.sum(mandatory).to(tl.int64))
        if weights is not None:
            tl.atomic_add(counts + 1 + bins, total.to(tl.int64), (total > 0) & (bins < level_count))


@triton.jit(do_not_specialize=["plans", "query_tiles", "level_count"])
def _cut_kernel(
    counts, budget, columns, last_level, rest, following, plans, query_tiles, level_count,
    TILE: tl.constexpr, LEVELS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """The cut of one plan row. counts: int64 [N, 1 + level_count], as above. last_level, rest, following: int64 [N]."""
    n = tl.program_id(0).to(tl.int64)
    counts += n * (level_count + 1)
    most = tl.load(budget + n // plans)
    if columns is not None:
        most -= (sum_before(columns + n * query_tiles, query_tiles, SUMMED) + TILE - 1) // TILE
    used = tl.load(counts)  # the mandatory ones
    spent = used
    last = -1
    for start in range(0, level_count, LEVELS):
        level = start + tl.arange(0, LEVELS)
        inside = level < level_count
        up_to = used + tl.cumsum(tl.load(counts + 1 + level, mask=inside, other=0), 0)
        fits = inside & (up_to <= most)
        last += tl.sum(fits.to(tl.int32))
        spent = tl.maximum(spent, tl.max(tl.where(fits, up_to, 0)))
        used = tl.max(up_to)
    tl.store(last_level + n, last)
    tl.store(rest + n, tl.maximum(most - spent, 0))
    tl.store(following + n, tl.load(counts + 2 + last, mask=last + 1 < level_count, other=0))


def find_cut(layout: Layout, levels: Levels, limits: Limits) -> Cut:
    """`tile_list.find_cut`."""
    n, query_tiles, _ = layout.shape
    device = layout.pair.device
    weights, budget, recall = levels.weights, limits.budget, limits.recall
    counts = of_tile = held = columns = None
    if budget is not None:
        counts = torch.zeros(n, 1 + levels.count, dtype=torch.int64, device=device)
        columns = None if limits.columns is None else limits.columns.contiguous()
    if recall is not None and weights is not None:
        of_tile = torch.empty(n, query_tiles, dtype=torch.int32, device=device)
        held = None if limits.held is None else limits.held.contiguous()
    last, rest, following = torch.empty(3, n, dtype=torch.int64, device=device).unbind(0)
    with torch.cuda.device_of(layout.pair):
        _count_levels_kernel[(n * triton.cdiv(query_tiles, QUERY_TILES),)](
            *_tiles(layout, levels), weights, held, counts, of_tile, *_sizes(layout, levels), float(recall or 0.0),
            NON_EMPTY, MANDATORY, CHOSEN, TILE, 1 if weights is None else _power_of_two(levels.count),
            COUNT.key_tiles, QUERY_TILES, **COUNT.options,
        )  # fmt: skip
        if budget is None:
            return Cut(last.fill_(levels.count - 1), of_tile, None, None)
        _cut_kernel[(n,)](
            counts, budget, columns, last, rest, following, n // budget.shape[0], query_tiles, levels.count,
            TILE, COUNT.key_tiles, SUMMED, **COUNT.options,
        )  # fmt: skip
    return Cut(last, of_tile, *((None, None) if weights is None else (rest, following)))


@triton.jit(do_not_specialize=SIZES)
def _count_following_kernel(
    classes, pair, plane, diagonals, own, row_lines, column_lines, query_bounds, key_bounds,
    last_level, of_tile, counts,
    query_tiles, key_tiles, orders, level_count,
    NON_EMPTY: tl.constexpr, MANDATORY: tl.constexpr, CHOSEN: tl.constexpr, TILE: tl.constexpr,
    KEY_TILES: tl.constexpr,
):  # fmt: skip
    """Tiles of the level after the cut. counts: int32 [N, nQ]."""
    row = tl.program_id(0).to(tl.int64)
    n = row // query_tiles
    order = tl.load(pair + n)
    place = order * query_tiles + row % query_tiles
    count = tl.zeros([KEY_TILES], tl.int32)
    for start in range(0, key_tiles, KEY_TILES):
        tile = start + tl.arange(0, KEY_TILES)
        inside = tile < key_tiles
        here = tl.load(classes + place * key_tiles + tile, mask=inside, other=0)
        if _any(here, NON_EMPTY):
            level = _level(
                here, tile, inside, n, row, place, order, plane, diagonals, own, row_lines, column_lines,
                query_bounds, key_bounds, query_tiles, key_tiles, orders, level_count, CHOSEN, TILE,
            )  # fmt: skip
            wanted = _wanted(here, level, level_count, NON_EMPTY, MANDATORY)
            count += _following(wanted, level, n, row, last_level, of_tile).to(tl.int32)
    tl.store(counts + row, tl.sum(count))


@triton.jit(do_not_specialize=[*SIZES, "plans", "count_batch_stride", "tile_batch_stride", "room"])
def _list_tiles_kernel(
    classes, pair, plane, diagonals, own, row_lines, column_lines, query_bounds, key_bounds,
    last_level, of_tile, rest, following_count, following, hot_tiles, columns, listed,
    counts, tiles,
    query_tiles, key_tiles, orders, level_count,
    plans, count_batch_stride, tile_batch_stride, room,
    NON_EMPTY: tl.constexpr, FULL: tl.constexpr, MANDATORY: tl.constexpr, CHOSEN: tl.constexpr, TILE: tl.constexpr,
    KEY_TILES: tl.constexpr, SUMMED: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Count the tiles of one query tile, and then, in another launch, WRITE them after those of the earlier ones.

    following: int32 [N, nQ], tiles of the level after the cut. listed: int32 [N, nQ, 2], full and partial tiles.
    counts, tiles: of `list_tiles`, where `plans` rows of a batch row follow each other.
    """
    row = tl.program_id(0).to(tl.int64)
    n = row // query_tiles
    query_tile = row % query_tiles
    order = tl.load(pair + n)
    place = order * query_tiles + query_tile
    seen = tl.zeros([], tl.int64)
    if rest is not None:
        seen = sum_before(following + n * query_tiles, query_tile.to(tl.int32), SUMMED)
    full_entry = tl.zeros([], tl.int64)
    partial_entry = tl.zeros([], tl.int64)
    both = tl.zeros([KEY_TILES], tl.int32)  # of each lane, full tiles in the lower half, partial ones in the upper
    if WRITE:
        full_entry = sum_before(listed + n * query_tiles * 2, query_tile.to(tl.int32) * 2, SUMMED)
        full_count = tl.load(listed + row * 2)
        partial_count = tl.load(listed + row * 2 + 1)
        partial_entry = full_entry + full_count
        batch = n // plans
        counts += batch * count_batch_stride + (n % plans * query_tiles + query_tile) * 5
        tiles += batch * tile_batch_stride + n % plans * room
        tl.store(counts, tl.minimum(full_entry, room).to(tl.int32))
        left = tl.maximum(room - full_entry, 0)
        tl.store(counts + 1, tl.minimum(full_count, left).to(tl.int32))
        tl.store(counts + 2, tl.minimum(partial_count, tl.maximum(room - partial_entry, 0)).to(tl.int32))
        tl.store(counts + 3, 0)
        tl.store(counts + 4, 0 if columns is None else tl.load(columns + row))
    for start in range(0, key_tiles, KEY_TILES):
        tile = start + tl.arange(0, KEY_TILES)
        inside = tile < key_tiles
        here = tl.load(classes + place * key_tiles + tile, mask=inside, other=0)
        if _any(here, NON_EMPTY):
            level = _level(
                here, tile, inside, n, row, place, order, plane, diagonals, own, row_lines, column_lines,
                query_bounds, key_bounds, query_tiles, key_tiles, orders, level_count, CHOSEN, TILE,
            )  # fmt: skip
            chosen, seen = _chosen(
                here, level, n, row, seen, level_count, last_level, of_tile, rest, following_count,
                NON_EMPTY, MANDATORY,
            )  # fmt: skip
            full = chosen & _has(here, FULL)
            if hot_tiles is not None:
                full &= tl.load(hot_tiles + n * key_tiles + tile, mask=inside, other=0) == 0
            which = tl.where(chosen, tl.where(full, 1, 65536), 0)
            if WRITE:
                rank = tl.cumsum(which, 0)  # from 1
                step_total = tl.sum(which)
                entry = tl.where(full, full_entry + (rank & 65535), partial_entry + (rank >> 16)) - 1
                tl.store(tiles + entry, tile, mask=chosen & (entry < room))
                full_entry += step_total & 65535
                partial_entry += step_total >> 16
            else:
                both += which
    if not WRITE:
        tl.store(listed + row * 2, tl.sum(both & 65535))
        tl.store(listed + row * 2 + 1, tl.sum(both >> 16))


def list_tiles(
    layout: Layout,
    levels: Levels,
    cut: Cut | None,
    hot_tiles: Tensor | None,
    columns: Tensor | None,
    counts: Tensor,
    tiles: Tensor,
) -> None:
    """`tile_list.list_tiles`."""
    n, query_tiles, _ = layout.shape
    device = tiles.device
    last, of_tile, rest, following_count = (None,) * 4 if cut is None else cut
    shape, sizes = _tiles(layout, levels), _sizes(layout, levels)
    listed = torch.empty(n, query_tiles, 2, dtype=torch.int32, device=device)
    following = None
    columns = None if columns is None else columns.contiguous()
    tiles.fill_(-1)
    with torch.cuda.device_of(tiles):
        if rest is not None:
            following = torch.empty(n, query_tiles, dtype=torch.int32, device=device)
            _count_following_kernel[(n * query_tiles,)](
                *shape, last, of_tile, following, *sizes,
                NON_EMPTY, MANDATORY, CHOSEN, TILE, LIST.key_tiles, **LIST.options,
            )  # fmt: skip
        for write in (False, True):
            _list_tiles_kernel[(n * query_tiles,)](
                *shape, last, of_tile, rest, following_count, following, hot_tiles, columns, listed, counts, tiles,
                *sizes,
                tiles.shape[1], counts.stride(0), tiles.stride(0), tiles.shape[2],
                NON_EMPTY, FULL, MANDATORY, CHOSEN, TILE, LIST.key_tiles, SUMMED, write, **LIST.options,
            )  # fmt: skip


@triton.jit(do_not_specialize=["plans", "query_tiles"])
def _density_kernel(counts, causal, density, plans, query_tiles, TILE: tl.constexpr, SUMMED: tl.constexpr):
    """counts: int32 [B, P, nQ, 5]. causal: int64 [B]. density: float32 [B, P]."""
    row = tl.program_id(0).to(tl.int64)
    counts += row * query_tiles * 5
    tiles = tl.zeros([SUMMED], tl.int64)
    columns = tl.zeros([SUMMED], tl.int64)
    for start in range(0, query_tiles, SUMMED):
        query_tile = start + tl.arange(0, SUMMED)
        inside = query_tile < query_tiles
        tiles += tl.load(counts + query_tile * 5 + 1, mask=inside, other=0)
        tiles += tl.load(counts + query_tile * 5 + 2, mask=inside, other=0)
        columns += tl.load(counts + query_tile * 5 + 4, mask=inside, other=0)
    dense = tl.maximum(tl.load(causal + row // plans), 1).to(tl.float64)
    # In columns, an integer: float64 holds it exactly, and `TILE` is a power of two.
    computed = (tl.sum(tiles) * TILE + tl.sum(columns)).to(tl.float64)
    tl.store(density + row, (computed / (dense * TILE)).to(tl.float32))


def density(counts: Tensor, causal: Tensor, result: Tensor) -> None:
    """`tile_list.density`; all contiguous."""
    batch, plans, query_tiles, _ = counts.shape
    with torch.cuda.device_of(counts):
        _density_kernel[(batch * plans,)](counts, causal, result, plans, query_tiles, TILE, SUMMED, **COUNT.options)


def _tiles(layout: Layout, levels: Levels) -> tuple[Tensor | None, ...]:
    """What a kernel reads of tiles, its first arguments."""
    bounds = layout.bounds
    return layout.places.classes, layout.pair, *levels.streamed(), bounds.query.first, bounds.key.first


def _sizes(layout: Layout, levels: Levels) -> tuple[int, int, int, int]:
    return *layout.shape[1:], layout.bounds.shape[0], levels.count


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
