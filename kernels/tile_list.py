"""From chosen tiles to the lists that a kernel walks, and the caps on how many there are."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmcompile.kernels.a_shape import Intervals
from mmcompile.kernels.tile_bounds import TileBounds, row_chunks


class Levels(Protocol):
    """How much a pattern wants each tile: 0 most, `count` not at all."""

    count: int

    def of(self, rows: slice) -> Tensor:
        """Integer [N, rows, nK]; `rows` are query tiles."""

    def mass(self, rows: slice) -> Tensor | None:
        """Share of each query tile's attention, float [N, rows, nK]; None where nothing estimates it."""


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


def find_cut(layout: Layout, levels: Levels, budget: Tensor | None, recall: Tensor | float | None) -> Cut | None:
    """Where to stop: each query tile at `recall` of its attention, each plan row within `budget` tiles.

    Mandatory tiles are counted first, then tiles level by level, for as long as a whole level fits. budget: int64 [N]
    or None. recall: a share, float or float [N, 1], or None.
    """
    if budget is None and recall is None:
        return None
    rows_of = layout.shape[0]
    device = layout.pair.device
    mandatory = torch.zeros(rows_of, dtype=torch.int64, device=device)
    tiles_of = torch.zeros(rows_of, levels.count + 1, dtype=torch.int64, device=device)  # by level
    reached: list[Tensor] = []
    for rows in layout.chunks():
        must = layout.mandatory(rows)
        level = levels.of(rows).long()
        level = torch.where(layout.non_empty(rows) & ~must, level, levels.count)
        mass = None if recall is None else levels.mass(rows)
        if mass is not None:
            # Counted a row at a time: tiles of one row seldom share a level, so the additions seldom collide.
            held = mass.new_zeros(*level.shape[:2], levels.count + 1).scatter_add_(-1, level, mass * ~must).cumsum(-1)
            of_must = (mass * must).sum(-1, keepdim=True)
            held = torch.cat([of_must, held[..., :-1] + of_must], -1)  # with no level, with level 0, with 0 and 1, ...
            target = held[..., -1:] * (recall if isinstance(recall, float) else recall.unsqueeze(-1))  # type: ignore
            within = ((held < target).sum(-1) - 1).clamp(max=levels.count - 1)
            reached.append(within)
            level = torch.where(level <= within.unsqueeze(-1), level, levels.count)
        if budget is not None:
            mandatory += must.sum((1, 2))
            one = torch.ones((), dtype=torch.int32, device=device).expand_as(level)
            counted = torch.zeros(*level.shape[:2], levels.count + 1, dtype=torch.int32, device=device)
            tiles_of += counted.scatter_add_(-1, level, one).sum(1)
    last = torch.full_like(mandatory, levels.count - 1)
    if budget is not None:
        fits = mandatory.unsqueeze(1) + tiles_of[:, :-1].cumsum(1) <= budget.unsqueeze(1)
        last = fits.sum(1) - 1
    return Cut(last, torch.cat(reached, 1) if reached else None)


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
    for rows in layout.chunks():
        chosen = _choose(layout, levels, cut, rows)
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


def _choose(layout: Layout, levels: Levels, cut: Cut | None, rows: slice) -> Tensor:
    """The tiles to list, bool [N, rows, nK]; no empty ones."""
    level = levels.of(rows)
    chosen = level < levels.count
    if cut is not None:
        chosen &= level <= cut.of_row[:, None, None]
        if cut.of_tile is not None:
            chosen &= level <= cut.of_tile[:, rows, None]
    return (chosen & layout.non_empty(rows)) | layout.mandatory(rows)
