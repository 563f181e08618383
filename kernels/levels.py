"""How much a pattern wants each tile, as levels: what the cap on tiles is applied to.

Patterns that are known beforehand want near tiles most; patterns estimated from data want those with most attention.
"""

import torch
from torch import Tensor

from mmcompile.kernels.a_shape import Intervals
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.scene import Rows, each_pair
from mmcompile.kernels.tile_bounds import TileBounds, least_and_greatest
from mmcompile.kernels.tile_list import Layout

OCTAVE = 16  # levels in a factor of two of attention
MASS_LEVELS = 256


class Everything:
    """Every tile alike."""

    count = 1
    table = None

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def of(self, rows: slice) -> Tensor:
        count, _, key_tiles = self.layout.shape
        shape = (count, rows.stop - rows.start, key_tiles)
        return torch.zeros(shape, dtype=torch.int32, device=self.layout.pair.device)


class Nothing(Everything):
    """No tile beyond the mandatory ones."""

    def of(self, rows: slice) -> Tensor:
        return super().of(rows) + self.count


class Rings:
    """Chosen tiles by their distance from the query tile: 0 on the diagonal, 1 next to it.

    may: the pattern's tiles, or None for all. reach: tiles of a matching span are chosen up to this many tokens away;
    None for no such tiles.
    """

    table = None

    def __init__(self, layout: Layout, may: Intervals | None, reach: int | None) -> None:
        self.layout, self.may, self.reach = layout, may, reach
        self.count = layout.shape[2] + 1

    def of(self, rows: slice) -> Tensor:
        bounds: TileBounds = self.layout.bounds
        ring = rings(bounds, rows)
        if self.may is not None:
            chosen = self.may.cover(rows, self.layout.shape[2])
            if self.reach is not None:
                chosen |= bounds.span_match(rows) & (bounds.distance(rows) < self.reach)
            ring = torch.where(chosen, ring, self.count)
        return self.layout.of_row(ring)


def rings(bounds: TileBounds, rows: slice) -> Tensor:
    """Distance of each tile from its query tile, in tiles rounded up, int32 [O, rows, nK], at most nK."""
    return ((bounds.distance(rows) + (TILE - 1)) // TILE).clamp_(0, bounds.shape[2])


class MassLevels:
    """Tiles by their share of the query tile's attention, in steps of a sixteenth of an octave.

    A share counts as many times as the query tile has tiles to choose from: one cut for a whole head would else keep
    all of the first queries' few tiles, and next to nothing of the last ones'. The very first, which together are a
    sixteenth of the cap, are wanted whole: they attend to few keys, each of which matters.

    levels: int16 [N, nQ, nK], filled by `put`.
    """

    count = MASS_LEVELS

    def __init__(self, layout: Layout, density: float | None) -> None:
        self.layout = layout
        self.whole = 0.0 if density is None else density**0.5 / 4  # its square is the share of the tiles
        self.levels = torch.empty(layout.shape, dtype=torch.int16, device=layout.pair.device)
        # The middle of each step. The last one has no lower end: what is in it is next to nothing.
        step = torch.arange(MASS_LEVELS, device=layout.pair.device)
        self.table: Tensor = torch.exp2((step + 0.5) / -OCTAVE).masked_fill_(step == MASS_LEVELS - 1, 0.0)

    def put(self, rows: slice, mass: Tensor) -> None:
        """mass: float [N, rows, nK], shares of all attention."""
        choice = self.layout.non_empty(rows).sum(-1, keepdim=True) / self.layout.shape[2]
        level = (
            torch.where(choice < self.whole, 1.0, mass * choice)
            .log2_()
            .mul_(-OCTAVE)
            .clamp_(0, MASS_LEVELS - 1)
            .nan_to_num_(MASS_LEVELS - 1)
        )
        self.levels[:, rows] = level.to(torch.int16)

    def of(self, rows: slice) -> Tensor:
        return self.levels[:, rows]

    def stop_at(self, last: Tensor) -> None:
        """Want nothing beyond these levels. last: int64 [N, nQ]."""
        self.levels.masked_fill_(self.levels > last.unsqueeze(-1), MASS_LEVELS)


class OwnSites:
    """The tiles that hold a key of a site that the query tile holds a query of, near ones first.

    query_site, key_site: int32 [O, S] in slot order, negative for tokens without a site, which have none in common.
    """

    table = None

    def __init__(self, layout: Layout, query_site: Tensor, key_site: Tensor) -> None:
        self.layout = layout
        self.count = layout.shape[2] + 1
        self.query_first, self.query_last = site_bounds(query_site)
        self.key_first, self.key_last = site_bounds(key_site)

    def of(self, rows: slice) -> Tensor:
        shared = self.key_first.unsqueeze(1) <= self.query_last[:, rows, None]
        shared &= self.query_first[:, rows, None] <= self.key_last.unsqueeze(1)
        return self.layout.of_row(torch.where(shared, rings(self.layout.bounds, rows), self.count))


def site_bounds(site: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest site of each tile, int32 [O, n]; least above greatest where a tile has none."""
    return least_and_greatest(site, site >= 0)


def latest_slots(rows: Rows, length: int) -> Intervals:
    """The `length` slots up to each query's own, in orders where neighbours in position are not neighbours in slot."""
    own = each_pair([rows.scene.own_slot(pair) for pair in rows.pairs]).unsqueeze(1)  # [O, 1, Sq]
    return Intervals((own - (length - 1)).clamp(min=0) // TILE, own // TILE)
