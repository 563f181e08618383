"""Planners: from boundaries, mask tensors, head patterns, queries and keys to tile lists and single keys.

Everything stays on the device and no shape depends on data, so that a prefill never waits for the host. All
masking comes from the tags; boundaries, patterns and estimates only steer which tiles are computed.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from mmcompile.kernels.arrange import Arrangement
from mmcompile.kernels.levels import MassLevels, Rings
from mmcompile.kernels.lines import GridLines, vertical_slash
from mmcompile.kernels.orders import in_tokens
from mmcompile.kernels.pair_levels import PairLevels
from mmcompile.kernels.patterns import MODALITIES, TILE, HeadPattern, Order, decode, distinct_orders
from mmcompile.kernels.places import block_length, chosen, place
from mmcompile.kernels.probes import Measured, Sighting, choose_orders
from mmcompile.kernels.scene import Pair, Rows, Scene
from mmcompile.kernels.scores import SAMPLES, antidiagonal_mass, pooled_mass, sampled_chunks, sampled_mass
from mmcompile.kernels.single_keys import Columns, block_end_count, block_ends, list_own_keys
from mmcompile.kernels.tile_bounds import tile_count
from mmcompile.kernels.tile_list import Layout, Levels, Limits, find_cut, list_tiles
from mmcompile.kernels.tile_list import density as density_of

LEVELS_AT_ONCE = 2**26  # tiles of the plan rows that are estimated together: 128 MiB of levels


class TilePlan(NamedTuple):
    """Tile lists and single keys of P plan rows; int32 unless said otherwise.

    For each query tile `counts` holds: first entry of its tiles, full tiles, partial tiles, first entry of its columns,
    columns. A full tile has every element allowed. A tile known to have no allowed element is never listed. A key of a
    column is attended there and through no tile.
    """

    query_row: Tensor  # [B, P], the query order of each row
    key_row: Tensor  # [B, P], the key order
    counts: Tensor  # [B, P, nQ, 5]
    tiles: Tensor  # [B, P, T]: full tiles ascending, then partial ones, of one query tile after the other; -1 unused
    columns: Tensor  # [B, P, C], key slots
    cold: Tensor  # bool [B, P, Sk], False where a key of a column is; [B, P, 0] where C is 0


class PlanStats(NamedTuple):
    """What came of a plan, float32 [B, P]."""

    density: Tensor  # computed tiles (128 columns of a query tile count as one) over the causal ones
    recall: Tensor  # estimated share of the attention that they hold; NaN where nothing was estimated


def plan_shapes(
    batch: int | SymInt,
    query_length: int | SymInt,
    key_length: int | SymInt,
    query_offset: int | SymInt,
    segments: bool,
    spans: bool,
    patterns: str,
    density: float | None,
) -> tuple[tuple[int | SymInt, ...], ...]:
    """The shapes of a `TilePlan`, in its order. Arguments as of `plan`; lengths and the offset may be symbolic."""
    heads = decode(patterns)
    query_tiles, key_tiles = tile_count(query_length), tile_count(key_length)
    columns = _column_room(heads, query_tiles, key_length, density)
    seen = key_tiles if spans else query_offset // TILE + 2  # of the keys, by the first query tile
    tiles = _tile_room(heads, query_tiles, key_tiles, seen, segments, density)
    return (
        (batch, len(heads)),
        (batch, len(heads)),
        (batch, len(heads), query_tiles, 5),
        (batch, len(heads), tiles),
        (batch, len(heads), columns),
        (batch, len(heads), key_length if isinstance(columns, SymInt) or columns > 0 else 0),
    )


def empty_plan(
    batch: int | SymInt,
    query_length: int | SymInt,
    key_length: int | SymInt,
    query_offset: int | SymInt,
    segments: bool,
    spans: bool,
    patterns: str,
    density: float | None,
    device: torch.device,
) -> TilePlan:
    """An uninitialised, contiguous plan."""
    *shapes, cold = plan_shapes(batch, query_length, key_length, query_offset, segments, spans, patterns, density)
    lists = [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]
    return TilePlan(*lists, torch.empty(cold, dtype=torch.bool, device=device))  # type: ignore[call-arg]


def plan(
    query: Tensor | None,
    key: Tensor | None,
    arrangement: Arrangement,
    offsets: Tensor,
    modality: Tensor,
    grid: Tensor,
    query_offset: int,
    scale: float,
    window: int | None,
    segments: bool,
    spans: bool,
    patterns: str,
    heads: Sequence[int],
    density: float | None,
    recall: float | None,
) -> tuple[TilePlan, PlanStats]:
    """Which tiles of attention to compute, for each of the P plan rows.

    query: [B, H, Sq, D] in token order; key: [B, C, Sk, D], each key head in each key order, in slot order. None where
        no pattern needs data.
    arrangement: orders of `distinct_orders(patterns)`. offsets, modality, grid, query_offset: as it was made with.
    scale: of the scores. window: keys, or None. segments, spans: whether the mask has such parts.
    patterns: from `patterns.encode`, one a plan row. heads: the query head that a row is estimated for, else -1.
    density: None for the patterns as they are; 1.0 for every tile with an allowed element; between, a cap on the
        computed tiles as a fraction of those in raster order, for each plan row: the tiles of the sink and of each
        query's nearest key stay, and of the rest the cap keeps what the pattern wants most. Where a pattern has a cap
        of its own the smaller holds.
    recall: what "top_p" covers of each query tile's attention within the cap, instead of the patterns' `mass`.

    Raises ValueError naming the argument, its value, and what would be right.
    """
    rows = decode(patterns)
    batch, _, query_length = arrangement.query_order.shape
    key_length = arrangement.key_order.shape[2]
    _require(rows, heads, query, key, window, density, recall)
    device = arrangement.query_order.device
    result = empty_plan(batch, query_length, key_length, query_offset, segments, spans, patterns, density, device)
    orders = distinct_orders(rows)
    raster = _raster(orders[0]), _raster(orders[1])
    query_tags = _in_raster(arrangement.query_tags, arrangement.query_order, raster[0])
    key_tags = _in_raster(arrangement.key_tags, arrangement.key_order, raster[1])
    prompt = offsets, modality, query_offset
    scene = Scene(query, key, arrangement, query_tags, key_tags, raster, *prompt, scale, window, segments, spans)
    # What dense attention computes, and the cap.
    causal, most = scene.raster_bounds().count_non_empty(1.0 if density is None else density)
    stats = PlanStats(
        torch.empty(batch, len(rows), device=device), torch.full((batch, len(rows)), math.nan, device=device)
    )
    for pattern, parts in _groups(rows, scene):
        pairs = _pairs(rows, pattern)
        if pattern.kind != "top_p" or density == 1.0:  # nothing to choose a pair by
            pairs = pairs[:1]
        cap = _cap(pattern, density)
        budget = None if cap is None or cap == 1.0 else most
        if cap is not None and cap != density:
            budget = scene.once("budget", cap, partial(_share_of, causal, cap))
        for part in parts:
            one = TilePlan(*(tensor[:, part] for tensor in result))
            held = stats.recall[:, part]
            _plan_rows(scene, pattern, heads[part], pairs, grid, budget, cap, recall, one, held)
    density_of(result.counts, causal, stats.density)
    return result, stats


def _share_of(tiles: Tensor, cap: float) -> Tensor:
    """As many of some tiles, int64 [B], as a cap allows."""
    return (tiles.double() * cap).floor().long()


def _cap(pattern: HeadPattern, density: float | None) -> float | None:
    """The cap that holds for a pattern; 1.0 for every tile."""
    if density is None or density == 1.0 or pattern.density is None:
        return density or pattern.density
    return min(density, pattern.density)


def _groups(rows: Sequence[HeadPattern], scene: Scene) -> Iterator[tuple[HeadPattern, list[slice]]]:
    """Runs of plan rows with one pattern, each in parts so short that what is kept of each tile stays small."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (rows[end] is not rows[start] and rows[end] != rows[start]):
            most = len(rows)
            if _keeps_levels(rows[start]):
                most = max(1, LEVELS_AT_ONCE // (scene.batch * scene.query_tiles * scene.key_tiles))
            yield rows[start], [slice(first, min(first + most, end)) for first in range(start, end, most)]
            start = end


def _keeps_levels(pattern: HeadPattern) -> bool:
    """Whether something is kept of each tile; other patterns tell of a tile what it is when they are asked."""
    return any(one.kind in ("top_p", "columns") for one in (pattern, *(one for _, _, one in pattern.pairs)))


def _plan_rows(
    scene: Scene,
    pattern: HeadPattern,
    heads: Sequence[int],
    pairs: tuple[Pair, ...],
    grid: Tensor,
    budget: Tensor | None,
    density: float | None,
    recall: float | None,
    one: TilePlan,
    held: Tensor,
) -> None:
    """Fill the plan rows of one pattern; `one` is a view of them, and `held` of their estimated recall.

    pairs: the pairs of orders it may take. budget: int64 [B], the tiles that a row may have.
    """
    dense = density == 1.0
    estimated = pattern.needs_data and not dense
    most_columns = int(pattern.most_columns(scene.key_tags.shape[2]))
    seen: Sighting | None = None
    if pattern.kind == "top_p" and estimated:
        rows, seen = choose_orders(scene, tuple(heads), pairs, pattern.by_site, most_columns, density)
    else:
        rows = Rows.of_each_pair(scene, tuple(heads), pairs, pattern.by_site[:1])
    one.query_row.copy_(rows.query_row)
    one.key_row.copy_(rows.key_row)
    # Not before: while a device looks at probes there is time to ask for this.
    layout = Layout(scene.once("places", pattern, lambda: place(scene, pattern, pairs, grid, dense)), rows.pair)
    wanted = _Wanted(Rings(layout)) if dense else _wanted(rows, layout, pattern, grid, seen, density, recall)
    columns = wanted.columns
    if columns is not None:
        _write(one.columns, columns.slots, 0)
        _write(one.cold, columns.cold, True)
    elif one.columns.shape[2]:
        one.columns.zero_()
        one.cold.fill_(True)
    target = None if pattern.pairs else _target(pattern, recall)
    hot_tiles, counts = (None, None) if columns is None else (columns.hot_tiles(), columns.counts)
    cut = None if dense else find_cut(layout, wanted.levels, Limits(budget, target, counts, wanted.held))
    list_tiles(layout, wanted.levels, cut, hot_tiles, counts, one.counts, one.tiles)
    if pattern.kind == "columns" and not dense:
        own = list_own_keys(rows, layout, most_columns, _affordable(layout, density, most_columns))
        _write(one.columns, own.slots, 0)
        one.counts[..., 3] = own.first
        _write(one.counts[..., 4], own.counts, 0)
    if estimated and pattern.kind != "columns":
        measured = Measured.of(rows, columns) if seen is None else seen.measured
        _write(held, measured.recall(one.counts.flatten(0, 1), one.tiles.flatten(0, 1)), math.nan)


class _Wanted(NamedTuple):
    """What a pattern wants: tiles by levels, and single keys with the share of the attention that they hold."""

    levels: Levels
    columns: Columns | None = None
    held: Tensor | None = None  # float [N, nQ], of the attention, by the single keys


def _wanted(
    rows: Rows,
    layout: Layout,
    pattern: HeadPattern,
    grid: Tensor,
    seen: Sighting | None,
    density: float | None,
    recall: float | None,
) -> _Wanted:
    if not pattern.pairs:
        return _of_kind(rows, layout, pattern, grid, seen, density)
    of_pairs = []
    for query, key, intra in pattern.pairs:
        own = layout.places.choosing(chosen(rows.scene, intra, rows.pairs, pattern.boundary == "2d", grid))
        levels = _of_kind(rows, layout._replace(places=own), intra, grid, None, None).levels
        if isinstance(levels, MassLevels):  # one cut for the levels of all pairs would mean nothing
            _stop_at(levels, layout, Limits(recall=_target(intra, recall)))
        of_pairs.append((query, key, levels))
    rest = _of_kind(rows, layout, pattern, grid, seen, density)
    if isinstance(rest.levels, MassLevels):
        _stop_at(rest.levels, layout, Limits(recall=_target(pattern, recall), held=rest.held))
    return rest._replace(levels=PairLevels(rows, layout, of_pairs, rest.levels))


def _of_kind(
    rows: Rows,
    layout: Layout,
    pattern: HeadPattern,
    grid: Tensor,
    seen: Sighting | None,
    density: float | None,
) -> _Wanted:
    match pattern.kind:
        case "vertical_slash":
            columns, levels = vertical_slash(rows, layout, pattern, _affordable(layout, density, pattern.vertical))
            return _Wanted(levels, columns)
        case "grid":
            return _Wanted(GridLines(rows, layout, pattern.lines))
        case "top_p":
            return _most_attended(rows, layout, pattern, seen, density)
        case "sf_fixed":
            return _Wanted(Rings(layout), block_ends(rows, block_length(pattern, grid)))
        case _:
            return _Wanted(Rings(layout))


def _most_attended(
    rows: Rows, layout: Layout, pattern: HeadPattern, seen: Sighting | None, density: float | None
) -> _Wanted:
    """Kind "top_p"."""
    columns = None if seen is None else seen.columns
    levels = MassLevels(layout, density)
    held: list[Tensor | None] = []
    if pattern.scores == "sampled":
        for part in sampled_chunks(layout):
            held.append(levels.put_samples(part, *sampled_mass(rows, part, columns), SAMPLES))
    else:
        for part in layout.chunks():
            mass = {"pooled": pooled_mass, "antidiagonal": antidiagonal_mass}[pattern.scores](rows, layout, part)
            levels.put(part, mass)
    of_columns = [part for part in held if part is not None]
    return _Wanted(levels, columns, torch.cat(of_columns, 1) if of_columns else None)


def _target(pattern: HeadPattern, recall: float | None) -> float | None:
    """The share of each query tile's attention that is wanted."""
    if pattern.kind != "top_p":
        return None
    return pattern.mass if recall is None else recall


def _stop_at(levels: MassLevels, layout: Layout, limits: Limits) -> None:
    cut = find_cut(layout, levels, limits)
    if cut is not None and cut.of_tile is not None:
        levels.stop_at(cut.of_tile)


def _affordable(layout: Layout, density: float | None, most: int) -> int:
    """How many single keys a query tile of mean length can have under a cap, two tiles being mandatory."""
    if density is None:
        return most
    return max(1, min(most, int(TILE * (density * layout.shape[2] / 2 - 2))))


def _pairs(rows: Sequence[HeadPattern], pattern: HeadPattern) -> tuple[Pair, ...]:
    """The pairs of orders that a pattern may take, as rows of the arrangement of all patterns of the plan."""
    queries, keys = distinct_orders(rows)
    return tuple((queries.index(query), keys.index(key)) for query, key in pattern.orders)


def _raster(orders: tuple[Order, ...]) -> int | None:
    """Which of them is the one in which slots are positions."""
    return orders.index(Order()) if Order() in orders else None


def _in_raster(tags: Tensor, orders: Tensor, raster: int | None) -> Tensor:
    """Tags [B, O, 3, S] of some orders, int32 [B, O, S], in token order: [B, 3, S]. raster: which of them is that."""
    return in_tokens(tags[:, 0], orders[:, 0]) if raster is None else tags[:, raster]


def _write(target: Tensor, values: Tensor, rest: float) -> None:
    """values: [B * R, ...], into the front of the last dimension of target [B, R, ...], a view, and `rest` behind."""
    values = values.unflatten(0, target.shape[:2])
    target[..., : values.shape[-1]].copy_(values)
    if values.shape[-1] < target.shape[-1]:
        target[..., values.shape[-1] :].fill_(rest)


def _column_room(
    patterns: Sequence[HeadPattern], query_tiles: int | SymInt, key_length: int | SymInt, density: float | None
) -> int | SymInt:
    """Entries of a plan row's list of single keys."""
    room: int | SymInt = 0
    if density == 1.0:
        return room
    for pattern in dict.fromkeys(patterns):
        match pattern.kind:
            case "vertical_slash":
                own: int | SymInt = pattern.vertical
            case "columns":
                own = query_tiles * pattern.most_columns(key_length)
            case "sf_fixed":
                own = block_end_count(key_length)
            case _:
                own = pattern.most_columns(key_length)
        room = torch.sym_max(room, own)
    return room


def _tile_room(
    patterns: Sequence[HeadPattern],
    query_tiles: int | SymInt,
    key_tiles: int | SymInt,
    seen: int | SymInt,
    segments: bool,
    density: float | None,
) -> int | SymInt:
    """Entries of a plan row's tile list: all tiles, or what the cap and the mandatory tiles can be at most.

    seen: key tiles that hold all that the first query tile may see; each query tile sees one more than the one before.
    """
    every = query_tiles * key_tiles
    caps = [_cap(pattern, density) for pattern in patterns]
    if None in caps or 1.0 in caps:
        return every
    density = max(cap for cap in caps if cap is not None)
    unseen = torch.sym_min(torch.sym_max(key_tiles - seen, 0), query_tiles)
    if segments:
        return every  # a segment's tokens may stand anywhere, and its first ones with them
    # Of a query tile: each query's nearest key, and a sink for each modality that keys are counted in. In the order of
    # the pattern a sink's valid keys follow each other, with none between them: at most a tile for each.
    groups = MODALITIES if any(pattern.boundary == "2d" for pattern in patterns) else 1
    mandatory = TILE + groups * (max(pattern.sink for pattern in patterns) + 1)
    causal = torch.sym_max(every - unseen * (unseen + 1) // 2, 0)  # never negative, which a tracer cannot know
    return torch.sym_min(every, causal * math.ceil(density * 2**16) // 2**16 + query_tiles * mandatory)


def _require(
    rows: Sequence[HeadPattern],
    heads: Sequence[int],
    query: Tensor | None,
    key: Tensor | None,
    window: int | None,
    density: float | None,
    recall: float | None,
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window={window} allows no key; at least 1, or None for no window")
    for name, value in (("density", density), ("recall", recall)):
        if value is not None and not 0.0 < value <= 1.0:
            raise ValueError(f"{name}={value} is not a fraction; in (0, 1], or None")
    if len(heads) != len(rows):
        raise ValueError(f"heads has {len(heads)} entries; {len(rows)}, one for each of the patterns")
    for row, (pattern, head) in enumerate(zip(rows, heads, strict=True)):
        if pattern.needs_data and density != 1.0:
            if query is None or key is None:
                raise ValueError(f"patterns[{row}]: {pattern} is estimated from query and key; pass both")
            if not 0 <= head < query.shape[1]:
                raise ValueError(f"heads[{row}]={head} is not a head of query; from 0 to {query.shape[1] - 1}")
