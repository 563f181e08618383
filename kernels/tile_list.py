"""From chosen tiles to the lists that a kernel walks, and the caps on how many there are."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmcompile.kernels.a_shape import Intervals
from mmcompile.kernels.tile_bounds import TileBounds, row_chunks


class Levels(Protocol):
    """How much a pattern wants each tile: 0 most, `count` not at all."""

    count: int

    @property
    def table(self) -> Tensor | None:
        """Attention of a tile of each level, to a factor that a query tile's tiles share: float [count], or None where
        it is not known."""

    def of(self, rows: slice) -> Tensor:
        """Integer [N, rows, nK]; `rows` are query tiles."""


class Layout(NamedTuple):
    """Where the tokens of N plan rows stand: classification and mandatory tiles of each of O pairs of orders."""

    bounds: TileBounds  # of [O, nQ, nK]
    must: Intervals  # tiles that no cap removes, [O, *, Sq]
    pair: Tensor  # int64 [N], the pair of orders of each row

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
        return self.of_row(self.bounds.non_empty(rows))

    def full(self, rows: slice) -> Tensor:
        return self.of_row(self.bounds.full(rows))

    def mandatory(self, rows: slice) -> Tensor:
        """bool [N, rows, nK]; no empty tiles."""
        return self.of_row(self.must.cover(rows, self.shape[2]) & self.bounds.non_empty(rows))


class Cut(NamedTuple):
    """The last level that is listed, for each plan row and for each of its query tiles."""

    of_row: Tensor  # int64 [N]
    of_tile: Tensor | None  # int64 [N, nQ]
    rest: Tensor | None  # int64 [N], what is left of the budget for tiles of the level after `of_row`
    next: Tensor | None  # int64 [N], how many these are


def find_cut(layout: Layout, levels: Levels, budget: Tensor | None, recall: Tensor | None) -> Cut | None:
    """Where to stop: each query tile at `recall` of its attention, each plan row within `budget` tiles.

    Mandatory tiles are counted first, then tiles level by level, for as long as a whole level fits; where attention is
    known, what is left goes to tiles of the next level, spread evenly. budget: int64 [N] or None. recall: float [N, nQ]
    or None.
    """
    if budget is None and recall is None:
        return None
    device = layout.pair.device
    mandatory = torch.zeros(layout.shape[0], dtype=torch.int64, device=device)
    tiles_of = torch.zeros(layout.shape[0], levels.count + 1, dtype=torch.int64, device=device)  # by level
    reached: list[Tensor] = []
    for rows in layout.chunks():
        must = layout.mandatory(rows)
        wanted = levels.of(rows).long()
        level = torch.where(layout.non_empty(rows) & ~must, wanted, levels.count)
        # Counted a row at a time: tiles of one row seldom share a level, so the additions seldom collide. And counted
        # in integers: sums of floats would come out in another order from run to run.
        one = torch.ones((), dtype=torch.int32, device=device).expand_as(level)
        counted = torch.zeros(*level.shape[:2], levels.count + 1, dtype=torch.int32, device=device)
        counted.scatter_add_(-1, level, one)
        if recall is not None and levels.table is not None:
            table = torch.nn.functional.pad(levels.table, (0, 1))
            of_must = (table[wanted] * must).sum(-1, keepdim=True)
            held = (counted[..., :-1] * levels.table).cumsum(-1)
            held = torch.cat([of_must, held + of_must], -1)  # with no level, with level 0, with 0 and 1, ...
            target = held[..., -1:] * recall[:, rows, None]
            within = ((held < target).sum(-1) - 1).clamp(max=levels.count - 1)
            reached.append(within)
            counted *= torch.arange(levels.count + 1, device=device) <= within.unsqueeze(-1)
        mandatory += must.sum((1, 2))
        tiles_of += counted.sum(1)
    of_tile = torch.cat(reached, 1) if reached else None
    if budget is None:
        return Cut(torch.full_like(mandatory, levels.count - 1), of_tile, None, None)
    used = mandatory.unsqueeze(1) + tiles_of[:, :-1].cumsum(1)
    last = (used <= budget.unsqueeze(1)).sum(1) - 1
    if levels.table is None:
        return Cut(last, of_tile, None, None)
    spent = torch.cat([mandatory.unsqueeze(1), used], 1).gather(1, (last + 1).unsqueeze(1)).squeeze(1)
    following = torch.nn.functional.pad(tiles_of[:, :-1], (0, 1)).gather(1, (last + 1).unsqueeze(1)).squeeze(1)
    return Cut(last, of_tile, (budget - spent).clamp(min=0), following)


def list_tiles(
    layout: Layout, levels: Levels, cut: Cut | None, hot_tiles: Tensor | None, counts: Tensor, tiles: Tensor
) -> None:
    """Write the tiles up to a cut: for each query tile the full ones ascending, then the partial ones ascending.

    hot_tiles: bool [N, nK], tiles with a key that a column has: they are never full. counts: int32 [N, nQ, 5], of which
    the first three are written: first entry, full, partial. tiles: int32 [N, T]; unused entries become -1.
    """
    length = tiles.shape[1]
    room = torch.full((tiles.shape[0], length + 1), -1, dtype=torch.int32, device=tiles.device)
    start = torch.zeros(tiles.shape[0], 1, dtype=torch.int64, device=tiles.device)
    tile = torch.arange(layout.shape[2], dtype=torch.int32, device=tiles.device)
    seen = torch.zeros(tiles.shape[0], dtype=torch.int64, device=tiles.device)  # tiles of the level after the cut
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
        counts[:, rows, 0] = first.clamp(max=length)
        counts[:, rows, 1] = torch.minimum(full_count, (length - first).clamp(min=0))
        counts[:, rows, 2] = torch.minimum(partial_count, (length - first - full_count).clamp(min=0))
    tiles.copy_(room[:, :length])


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
