"""Planners: from boundaries, mask tensors, head patterns, queries and keys to tile lists and single keys.

Everything stays on the device and no shape depends on data, so that a prefill never waits for the host. All
masking comes from the tags; boundaries, patterns and estimates only steer which tiles are computed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from mmcompile.kernels.a_shape import AShape, Intervals
from mmcompile.kernels.arrange import Arrangement
from mmcompile.kernels.levels import Everything, MassLevels, Nothing, OwnSites, Rings, latest_slots
from mmcompile.kernels.lines import GridLines, vertical_slash
from mmcompile.kernels.orders import in_tokens, of_keys, token_modality
from mmcompile.kernels.pair_levels import PairLevels
from mmcompile.kernels.patterns import MODALITIES, TILE, HeadPattern, decode, distinct_orders
from mmcompile.kernels.probes import Measured, Sighting, choose_orders
from mmcompile.kernels.scene import Pair, Rows, Scene, each_pair
from mmcompile.kernels.scores import antidiagonal_mass, pooled_mass, sampled_chunks, sampled_mass
from mmcompile.kernels.single_keys import LEAST_BLOCK, Columns, block_end_count, block_ends, list_own_keys
from mmcompile.kernels.tile_bounds import TileBounds, row_chunks, tile_count
from mmcompile.kernels.tile_list import Layout, Levels, find_cut, list_tiles

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
    min_tokens: int,
) -> tuple[TilePlan, PlanStats]:
    """Which tiles of attention to compute, for each of the P plan rows.

    query: [B, H, Sq, D] in token order; key: [B, C, Sk, D], each key head in each key order, in slot order. None where
        no pattern needs data.
    arrangement: orders of `distinct_orders(patterns)`. offsets, modality, grid, query_offset: as it was made with.
    scale: of the scores. window: keys, or None. segments, spans: whether the mask has such parts.
    patterns: from `patterns.encode`, one a plan row. heads: the query head that a row is estimated for, else -1.
    density: None for the patterns as they are; 1.0 for every tile with an allowed element; between, a cap on the
        computed tiles as a fraction of those in raster order, for each plan row: the tiles of the sink and of each
        query's nearest key stay, and of the rest the cap keeps what the pattern wants most.
    recall: what "top_p" covers of each query tile's attention within the cap, instead of the patterns' `mass`.
    min_tokens: shorter key lengths get no tiles; attention then runs dense.

    Raises ValueError naming the argument, its value, and what would be right.
    """
    rows = decode(patterns)
    batch, _, query_length = arrangement.query_order.shape
    key_length = arrangement.key_order.shape[2]
    _require(rows, heads, query, key, window, density, recall)
    device = arrangement.query_order.device
    result = empty_plan(batch, query_length, key_length, query_offset, segments, spans, patterns, density, device)
    stats = PlanStats(*(torch.full((batch, len(rows)), value, device=device) for value in (1.0, float("nan"))))
    if key_length < min_tokens:
        return _without_tiles(result), stats
    of_query = token_modality(offsets, modality, batch, query_length)
    scene = Scene(
        query,
        key,
        arrangement,
        in_tokens(arrangement.key_tags[:, 0], arrangement.key_order[:, 0]),
        of_query,
        of_keys(of_query, key_length, query_offset, 0),
        scale,
        window,
        segments,
        spans,
    )
    causal = _causal_tiles(scene)
    frame = (grid[:, 1].long() * grid[:, 2]).amax() if grid.shape[0] else offsets.new_zeros((), dtype=torch.int64)
    for pattern, part in _groups(rows, scene):
        of_heads = tuple(heads[part])
        one = TilePlan(*(tensor[:, part] for tensor in result))
        of_stats = PlanStats(*(stat[:, part] for stat in stats))
        _plan_rows(scene, pattern, of_heads, _pairs(rows, pattern), frame, causal, density, recall, one, of_stats)
    return result, stats


def _groups(rows: Sequence[HeadPattern], scene: Scene) -> Iterator[tuple[HeadPattern, slice]]:
    """Runs of plan rows with one pattern, short enough that what is kept of each tile stays small."""
    most = max(1, LEVELS_AT_ONCE // (scene.batch * scene.query_tiles * scene.key_tiles))
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[start] or end - start == most:
            yield rows[start], slice(start, end)
            start = end


def _plan_rows(
    scene: Scene,
    pattern: HeadPattern,
    heads: tuple[int, ...],
    pairs: tuple[Pair, ...],
    frame: Tensor,
    causal: Tensor,
    density: float | None,
    recall: float | None,
    one: TilePlan,
    stats: PlanStats,
) -> None:
    """Fill the plan rows of one pattern; `one` and `stats` are views of them.

    pairs: the pairs of orders it may take. frame: tokens of a frame, int64 without dimensions, 0 where unknown. causal:
    int64 [B], tiles of dense attention.
    """
    dense = density == 1.0
    estimated = pattern.needs_data and not dense
    seen: Sighting | None = None
    if pattern.kind == "top_p" and estimated:
        rows, seen = choose_orders(scene, heads, pairs, pattern.by_site, pattern.columns, density)
    else:
        rows = Rows(scene, heads, pairs[:1], pattern.by_site[:1], torch.zeros_like(one.query_row, dtype=torch.int64))
    one.query_row.copy_(rows.query_row)
    one.key_row.copy_(rows.key_row)
    layout, shape = _layout(rows, pattern)
    counts = torch.empty_like(one.counts, memory_format=torch.contiguous_format).flatten(0, 1)
    tiles = torch.empty_like(one.tiles, memory_format=torch.contiguous_format).flatten(0, 1)
    counts.zero_()
    if one.columns.shape[2]:
        one.columns.zero_()
        one.cold.fill_(True)
    causal = causal.repeat_interleave(len(heads))
    wanted = (
        _Wanted(Everything(layout)) if dense else _wanted(rows, layout, shape, pattern, frame, seen, density, recall)
    )
    columns = wanted.columns
    if columns is not None:
        _write(one.columns, columns.slots)
        _write(one.cold, columns.cold)
        counts[..., 4] = columns.counts
    budget = None
    if density is not None and not dense:
        spent = -(-counts[..., 4].sum(-1, dtype=torch.int64) // TILE)
        budget = (causal.double() * density).floor().long() - spent
    target = None if pattern.pairs else _target(pattern, recall, wanted.held, layout)
    cut = None if dense else find_cut(layout, wanted.levels, budget, target)
    list_tiles(layout, wanted.levels, cut, None if columns is None else columns.hot_tiles(), counts, tiles)
    if pattern.kind == "columns" and not dense:
        own = list_own_keys(rows, layout, pattern.columns, _affordable(layout, density, pattern.columns))
        _write(one.columns, own.slots)
        counts[..., 3], counts[..., 4] = own.first, own.counts
    _write(one.counts, counts)
    _write(one.tiles, tiles)
    computed = counts[..., 1:3].sum((1, 2)).double() + counts[..., 4].sum(1).double() / TILE
    _write(stats.density, (computed / causal.clamp(min=1)).float())
    if estimated and pattern.kind != "columns":
        measured = Measured.of(rows, columns) if seen is None else seen.measured
        _write(stats.recall, measured.recall(counts, tiles))


def _layout(rows: Rows, pattern: HeadPattern) -> tuple[Layout, AShape]:
    """Where the tokens stand in each pair of orders, and the A-shape there."""
    scene = rows.scene
    query_tags = each_pair([scene.arrangement.query_tags[:, query] for query, _ in rows.pairs])
    key_tags = each_pair([scene.arrangement.key_tags[:, key] for _, key in rows.pairs])
    bounds = TileBounds.of(query_tags, key_tags, scene.window, scene.segments, scene.spans)
    key_slot = each_pair([scene.key_slot(key) for _, key in rows.pairs])
    times = len(rows.pairs)
    modality = scene.key_modality.repeat_interleave(times, 0) if pattern.boundary == "2d" else None
    shape = AShape(query_tags, scene.key_tags.repeat_interleave(times, 0), modality, key_slot)
    sink = pattern.sink
    if any(pattern.by_site):
        # The first valid keys stand together there, a tile of them, but not those of each modality or segment.
        sink = 1 if pattern.boundary == "2d" or scene.segments else min(sink, TILE)
    must = Intervals.stack([shape.sink(sink), shape.nearest(bounds.window)])
    return Layout(bounds, must, rows.pair), shape


class _Wanted(NamedTuple):
    """What a pattern wants: tiles by levels, and single keys with the share of the attention that they hold."""

    levels: Levels
    columns: Columns | None = None
    held: Tensor | None = None  # float [N, nQ], of the attention, by the single keys


def _wanted(
    rows: Rows,
    layout: Layout,
    shape: AShape,
    pattern: HeadPattern,
    frame: Tensor,
    seen: Sighting | None,
    density: float | None,
    recall: float | None,
) -> _Wanted:
    if not pattern.pairs:
        return _of_kind(rows, layout, shape, pattern, frame, seen, density)
    of_pairs = []
    for query, key, intra in pattern.pairs:
        levels = _of_kind(rows, layout, shape, intra, frame, None, None).levels
        if isinstance(levels, MassLevels):  # one cut for the levels of all pairs would mean nothing
            _stop_at(levels, layout, _target(intra, recall, None, layout))
        of_pairs.append((query, key, levels))
    rest = _of_kind(rows, layout, shape, pattern, frame, seen, density)
    if isinstance(rest.levels, MassLevels):
        _stop_at(rest.levels, layout, _target(pattern, recall, rest.held, layout))
    return rest._replace(levels=PairLevels(rows, layout, of_pairs, rest.levels))


def _of_kind(
    rows: Rows,
    layout: Layout,
    shape: AShape,
    pattern: HeadPattern,
    frame: Tensor,
    seen: Sighting | None,
    density: float | None,
) -> _Wanted:
    match pattern.kind:
        case "dense":
            return _Wanted(Rings(layout, None, None))
        case "a_shape" | "tri_shape":
            may = latest_slots(rows, pattern.local) if any(pattern.by_site) else shape.local(pattern.local)
            if pattern.kind == "tri_shape":
                may = Intervals.stack([may, shape.everything_for_last(pattern.last)])
            return _Wanted(Rings(layout, may, pattern.local if layout.bounds.spans else None))
        case "sf_fixed":
            stride = frame if pattern.stride == 0 else torch.full_like(frame, pattern.stride)
            stride = stride.clamp(min=LEAST_BLOCK)
            return _Wanted(Rings(layout, shape.since(stride), None), block_ends(rows, stride))
        case "sf_strided":
            arrangement = rows.scene.arrangement
            query_site = each_pair([arrangement.query_site[:, query] for query, _ in rows.pairs])
            key_site = each_pair([arrangement.key_site[:, key] for _, key in rows.pairs])
            return _Wanted(OwnSites(layout, query_site, key_site))
        case "vertical_slash":
            columns, levels = vertical_slash(rows, layout, pattern, _affordable(layout, density, pattern.vertical))
            return _Wanted(levels, columns)
        case "grid":
            return _Wanted(GridLines(rows, layout, pattern.lines))
        case "columns":
            return _Wanted(Nothing(layout))
        case _:
            return _most_attended(rows, layout, pattern, seen, density)


def _most_attended(
    rows: Rows, layout: Layout, pattern: HeadPattern, seen: Sighting | None, density: float | None
) -> _Wanted:
    """Kind "top_p"."""
    columns = None if seen is None else seen.columns
    levels = MassLevels(layout, density)
    held = []
    if pattern.scores == "sampled":
        for part in sampled_chunks(layout):
            mass, of_columns = sampled_mass(rows, layout, part, columns)
            held.append(of_columns)
            levels.put(part, mass)
    else:
        for part in layout.chunks():
            mass = {"pooled": pooled_mass, "antidiagonal": antidiagonal_mass}[pattern.scores](rows, layout, part)
            levels.put(part, mass)
    return _Wanted(levels, columns, torch.cat(held, 1) if held else None)


def _target(pattern: HeadPattern, recall: float | None, held: Tensor | None, layout: Layout) -> Tensor | None:
    """What tiles are to hold of the attention that single keys leave to them: float [N, nQ]. held: of all, by these."""
    if pattern.kind != "top_p":
        return None
    target = pattern.mass if recall is None else recall
    if held is None:
        return torch.full(layout.shape[:2], target, device=layout.pair.device)
    return ((target - held) / (1.0 - held).clamp(min=1e-6)).clamp(min=0.0)


def _stop_at(levels: MassLevels, layout: Layout, target: Tensor | None) -> None:
    cut = find_cut(layout, levels, None, target)
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


def _causal_tiles(scene: Scene) -> Tensor:
    """Tiles with an allowed element in raster order: what dense attention computes. int64 [B]."""
    query_tags = in_tokens(scene.arrangement.query_tags[:, 0], scene.arrangement.query_order[:, 0])
    bounds = TileBounds.of(query_tags, scene.key_tags, scene.window, scene.segments, scene.spans)
    total = torch.zeros(scene.batch, dtype=torch.int64, device=query_tags.device)
    for part in row_chunks(*bounds.shape):
        total += bounds.non_empty(part).sum((1, 2))
    return total


def _write(target: Tensor, values: Tensor) -> None:
    """values: [B * R, ...], into the front of target [B, R, ...], a view."""
    values = values.unflatten(0, target.shape[:2])
    if target.dim() == 3:
        target = target[:, :, : values.shape[2]]
    target.copy_(values)


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
                own = query_tiles * pattern.columns
            case "sf_fixed":
                own = block_end_count(key_length)
            case _:
                own = pattern.columns
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
    if density is None or density == 1.0:
        return every
    unseen = torch.sym_min(torch.sym_max(key_tiles - seen, 0), query_tiles)
    if segments:
        return every  # a segment's tokens may stand anywhere, and its first ones with them
    # Of a query tile: each query's nearest key, and a sink for each modality that keys are counted in. In the order of
    # the pattern a sink's valid keys follow each other, with none between them: at most a tile for each.
    groups = MODALITIES if any(pattern.boundary == "2d" for pattern in patterns) else 1
    mandatory = TILE + groups * (max(pattern.sink for pattern in patterns) + 1)
    causal = torch.sym_max(every - unseen * (unseen + 1) // 2, 0)  # never negative, which a tracer cannot know
    return torch.sym_min(every, causal * math.ceil(density * 2**16) // 2**16 + query_tiles * mandatory)


def _without_tiles(result: TilePlan) -> TilePlan:
    """The first orders, no tiles."""
    for tensor in result:
        tensor.zero_()
    result.tiles.fill_(-1)
    return result


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
