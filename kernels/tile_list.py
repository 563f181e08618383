"""From chosen tiles to the lists that a kernel walks, and the caps on how many there are."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmcompile.kernels.a_shape import Intervals
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_bounds import TileBounds, row_chunks
from mmcompile.kernels.tile_classes import CHOSEN, FULL, MANDATORY, NON_EMPTY, Chosen, classify


class Streamed(NamedTuple):
    """What a kernel makes the levels of one query tile from: `plane`, or `diagonals`, or else the tile classes and
    distances, as `levels.Rings` has them."""

    plane: Tensor | None = None  # integer [N, nQ, nK], the levels themselves
    diagonals: Tensor | None = None  # int32 [N, nK + 1], the level of each distance before the query's own tile
    own: Tensor | None = None  # int32 [N, 2, nQ], own tiles of each query tile, for `diagonals`
    row_lines: Tensor | None = None  # bool [N, nQ], query tiles that choose every tile, as `CHOSEN` ones
    column_lines: Tensor | None = None  # bool [N, nK], key tiles that every query tile chooses


class Levels(Protocol):
    """How much a pattern wants each tile: 0 most, `count` not at all."""

    count: int

    @property
    def weights(self) -> Tensor | None:
        """Attention of a tile of each level, to a factor that a query tile's tiles share: int32 [count], or None where
        it is not known. In integers, so that sums are the same in any order."""

    def of(self, rows: slice) -> Tensor:
        """Integer [N, rows, nK]; `rows` are query tiles."""

    def streamed(self) -> Streamed:
        """The same, tile by tile."""


class Places(NamedTuple):
    """Where the tokens stand in each of O pairs of orders, and what that makes of the tiles."""

    bounds: TileBounds  # of [O, nQ, nK]
    must: Intervals  # tiles that no cap removes, [O, *, Sq]
    classes: Tensor  # uint8 [O, nQ, nK], see tile_classes.py

    @classmethod
    def of(cls, bounds: TileBounds, must: Intervals, chosen: Chosen) -> "Places":
        return cls(bounds, must, classify(bounds, must, chosen))

    def choosing(self, chosen: Chosen) -> "Places":
        """The same places for a pattern that chooses other tiles."""
        return Places.of(self.bounds, self.must, chosen)


class Layout(NamedTuple):
    """The places of N plan rows."""

    places: Places
    pair: Tensor  # int64 [N], the pair of orders of each row

    @property
    def bounds(self) -> TileBounds:
        return self.places.bounds

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, nQ, nK)."""
        return self.pair.shape[0], self.bounds.shape[1], self.bounds.shape[2]

    def chunks(self) -> "list[slice]":
        return list(row_chunks(max(self.shape[0], self.bounds.shape[0]), *self.shape[1:]))

    def of_row(self, of_pair: Tensor) -> Tensor:
        """[O, ...] as [N, ...]."""
        return of_pair.index_select(0, self.pair)

    def non_empty(self, rows: slice) -> Tensor:
        return self._has(NON_EMPTY, rows)

    def full(self, rows: slice) -> Tensor:
        return self._has(FULL, rows)

    def mandatory(self, rows: slice) -> Tensor:
        """bool [N, rows, nK]; no empty tiles."""
        return self._has(MANDATORY, rows)

    def chosen(self, rows: slice) -> Tensor:
        return self._has(CHOSEN, rows)

    def _has(self, which: int, rows: slice) -> Tensor:
        return self.of_row(self.places.classes[:, rows] & which != 0)


class Limits(NamedTuple):
    """Where a plan row's list ends: at a cap, and where each query tile has the attention that it is to have."""

    budget: Tensor | None = None  # int64 [B], tiles that each plan row may compute
    recall: float | None = None  # share of a query tile's attention
    columns: Tensor | None = None  # int32 [N, nQ], single keys of each query tile; `TILE` of them cost a tile
    held: Tensor | None = None  # float32 [N, nQ], the share that these hold, and tiles need not

    def tiles(self, rows: int) -> Tensor:
        """What the budget leaves each of N plan rows for tiles, int64 [N]."""
        assert self.budget is not None
        left = self.budget.repeat_interleave(rows // self.budget.shape[0])
        return left if self.columns is None else left - (self.columns.sum(-1) + TILE - 1) // TILE

    def target(self) -> Tensor | float:
        """What tiles are to hold of the attention that single keys leave to them, float32 [N, nQ]."""
        assert self.recall is not None
        if self.held is None:
            return self.recall
        return ((self.recall - self.held) / (1.0 - self.held).clamp(min=1e-6)).clamp(min=0.0)


class Cut(NamedTuple):
    """The last level that is listed, for each plan row and for each of its query tiles."""

    of_row: Tensor  # int64 [N]
    of_tile: Tensor | None  # integer [N, nQ]
    rest: Tensor | None  # int64 [N], what is left of the budget for tiles of the level after `of_row`
    next: Tensor | None  # int64 [N], how many these are


def find_cut(layout: Layout, levels: Levels, limits: Limits) -> Cut | None:
    """Where to stop, or None where nothing stops.

    Mandatory tiles are counted first, then tiles level by level, for as long as a whole level fits; where attention is
    known, what is left goes to tiles of the next level, spread evenly, and no query tile has more than its recall.
    """
    if limits.budget is None and limits.recall is None:
        return None
    if layout.pair.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import tile_list_kernel

        return tile_list_kernel.find_cut(layout, levels, limits)
    return find_cut_cpu(layout, levels, limits)


def find_cut_cpu(layout: Layout, levels: Levels, limits: Limits) -> Cut:
    """`find_cut` in torch operations."""
    device = layout.pair.device
    mandatory = torch.zeros(layout.shape[0], dtype=torch.int64, device=device)
    tiles_of = torch.zeros(layout.shape[0], levels.count + 1, dtype=torch.int64, device=device)  # by level
    reached: list[Tensor] = []
    share = torch.ones(layout.shape[:2], device=device)
    if limits.recall is not None:
        share *= limits.target()
    for rows in layout.chunks():
        must = layout.mandatory(rows)
        wanted = levels.of(rows).long()
        level = torch.where(layout.non_empty(rows) & ~must, wanted, levels.count)
        # Counted a row at a time: tiles of one row seldom share a level, so the additions seldom collide. And counted
        # in integers: sums of floats would come out in another order from run to run.
        one = torch.ones((), dtype=torch.int32, device=device).expand_as(level)
        counted = torch.zeros(*level.shape[:2], levels.count + 1, dtype=torch.int32, device=device)
        counted.scatter_add_(-1, level, one)
        if limits.recall is not None and levels.weights is not None:
            weights = torch.nn.functional.pad(levels.weights.long(), (0, 1))
            of_must = weights[torch.where(must, wanted, levels.count)].sum(-1, keepdim=True)
            held = (counted[..., :-1] * weights[:-1]).cumsum(-1)
            # With no level, with level 0, with 0 and 1, ...: integers that float64 holds exactly.
            held = torch.cat([of_must, held + of_must], -1).double()
            target = held[..., -1:] * share[:, rows, None].double()
            within = ((held < target).sum(-1) - 1).clamp(max=levels.count - 1)
            reached.append(within)
            counted *= torch.arange(levels.count + 1, device=device) <= within.unsqueeze(-1)
        mandatory += must.sum((1, 2))
        tiles_of += counted.sum(1)
    of_tile = torch.cat(reached, 1) if reached else None
    if limits.budget is None:
        return Cut(torch.full_like(mandatory, levels.count - 1), of_tile, None, None)
    budget = limits.tiles(layout.shape[0])
    used = mandatory.unsqueeze(1) + tiles_of[:, :-1].cumsum(1)
    last = (used <= budget.unsqueeze(1)).sum(1) - 1
    if levels.weights is None:
        return Cut(last, of_tile, None, None)
    spent = torch.cat([mandatory.unsqueeze(1), used], 1).gather(1, (last + 1).unsqueeze(1)).squeeze(1)
    following = torch.nn.functional.pad(tiles_of[:, :-1], (0, 1)).gather(1, (last + 1).unsqueeze(1)).squeeze(1)
    return Cut(last, of_tile, (budget - spent).clamp(min=0), following)


def list_tiles(
    layout: Layout,
    levels: Levels,
    cut: Cut | None,
    hot_tiles: Tensor | None,
    columns: Tensor | None,
    counts: Tensor,
    tiles: Tensor,
) -> None:
    """Write the tiles up to a cut: for each query tile the full ones ascending, then the partial ones ascending.

    N = B * R plan rows. hot_tiles: bool [N, nK], tiles with a key that a column has: they are never full. columns:
    int32 [N, nQ], single keys of each query tile, of a list that it shares with the others. counts: int32
    [B, R, nQ, 5], a view, as of `TilePlan`. tiles: int32 [B, R, T], a view; unused entries become -1.
    """
    if tiles.device.type == "cuda":
        from mmcompile.kernels import tile_list_kernel

        tile_list_kernel.list_tiles(layout, levels, cut, hot_tiles, columns, counts, tiles)
    else:
        list_tiles_cpu(layout, levels, cut, hot_tiles, columns, counts, tiles)


def list_tiles_cpu(
    layout: Layout,
    levels: Levels,
    cut: Cut | None,
    hot_tiles: Tensor | None,
    columns: Tensor | None,
    counts: Tensor,
    tiles: Tensor,
) -> None:
    """`list_tiles` in torch operations."""
    batch, count, length = tiles.shape
    room = torch.full((batch * count, length + 1), -1, dtype=torch.int32, device=tiles.device)
    start = torch.zeros(batch * count, 1, dtype=torch.int64, device=tiles.device)
    tile = torch.arange(layout.shape[2], dtype=torch.int32, device=tiles.device)
    seen = torch.zeros(batch * count, dtype=torch.int64, device=tiles.device)  # tiles of the level after the cut
    for rows in layout.chunks():
        chosen, seen = _choose(layout, levels, cut, rows, seen)
        full = layout.full(rows)
        if hot_tiles is not None:
            full &= ~hot_tiles.unsqueeze(1)
        full, partial = chosen & full, chosen & ~full
        full_rank = full.cumsum(-1, dtype=torch.int32)
        partial_rank = partial.cumsum(-1, dtype=torch.int32)
        full_count, partial_count = full_rank[..., -1], partial_rank[..., -1]  # [N, rows]
        listed = (full_count + partial_count).cumsum(-1, dtype=torch.int64)
        first = start + listed - full_count - partial_count
        start = start + listed[:, -1:]
        entry = torch.where(full, full_rank, full_count.unsqueeze(-1) + partial_rank) - 1 + first.unsqueeze(-1)
        # What is not chosen lands in the last entry, which is cut off. So would tiles beyond the room there is.
        entry = torch.where(chosen, entry, length).clamp_(max=length)
        room.scatter_(1, entry.flatten(1), tile.expand_as(entry).flatten(1))
        full_room, partial_room = (length - first).clamp(min=0), (length - first - full_count).clamp(min=0)
        written = (
            first.clamp(max=length),
            torch.minimum(full_count, full_room),
            torch.minimum(partial_count, partial_room),
        )
        counts[:, :, rows, :3] = torch.stack(written, -1).unflatten(0, (batch, count)).int()
    tiles.copy_(room[:, :length].unflatten(0, (batch, count)))
    counts[..., 3] = 0
    counts[..., 4] = 0 if columns is None else columns.unflatten(0, (batch, count))


def _choose(layout: Layout, levels: Levels, cut: Cut | None, rows: slice, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The tiles to list, bool [N, rows, nK], no empty ones; and `seen` with the tiles of these rows."""
    level = levels.of(rows)
    wanted = level < levels.count
    must = layout.mandatory(rows)
    wanted &= layout.non_empty(rows) & ~must
    if cut is None:
        return wanted | must, seen
    if cut.of_tile is not None:
        wanted &= level <= cut.of_tile[:, rows, None]
    chosen = wanted & (level <= cut.of_row[:, None, None])
    if cut.rest is not None and cut.next is not None:
        following = (wanted & (level == cut.of_row[:, None, None] + 1)).flatten(1)
        rank = seen.unsqueeze(1) + following.cumsum(1)  # from 1
        # Of `next` tiles every so many-th, `rest` in all.
        share = [(number * cut.rest.unsqueeze(1)) // cut.next.clamp(min=1).unsqueeze(1) for number in (rank, rank - 1)]
        chosen |= (following & (share[0] > share[1])).view_as(chosen)
        seen = rank[:, -1]
    return chosen | must, seen


def density(counts: Tensor, causal: Tensor, result: Tensor) -> None:
    """Computed tiles over those of dense attention; `TILE` columns of a query tile count as one.

    counts: int32 [B, P, nQ, 5] of a plan. causal: int64 [B]. result: float32 [B, P], written.
    """
    if counts.device.type == "cuda":
        from mmcompile.kernels import tile_list_kernel

        tile_list_kernel.density(counts, causal, result)
    else:
        density_cpu(counts, causal, result)


def density_cpu(counts: Tensor, causal: Tensor, result: Tensor) -> None:
    """`density` in torch operations."""
    _, full, partial, _, columns = counts.sum(2, dtype=torch.float64).unbind(-1)  # [B, P]
    result.copy_((full + partial + columns / TILE) / causal.clamp(min=1).unsqueeze(1))
