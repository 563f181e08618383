"""Patterns made of lines, estimated from a few queries: Vertical-Slash and Grid (arXiv 2504.16083, section 3.1)."""

from functools import lru_cache

import torch
from torch import Tensor

from mmcompile.kernels.levels import rings
from mmcompile.kernels.orders import NO_SITE
from mmcompile.kernels.patterns import MODALITIES, TILE, HeadPattern
from mmcompile.kernels.places import pair_sites
from mmcompile.kernels.probes import HORIZONTAL, glance
from mmcompile.kernels.scene import Rows
from mmcompile.kernels.single_keys import Columns
from mmcompile.kernels.tile_bounds import site_bounds
from mmcompile.kernels.tile_list import Layout, Streamed

LAST_QUERIES = 64
WHOLE = 2**40  # what a weight of 1 is in sums of integers


def last_slots(rows: Rows, grouped: bool) -> Tensor:
    """The slots of the last 64 queries, int64 [N, R]; of each modality where the order groups them."""
    scene = rows.scene
    if not grouped:
        return _last_slots(scene.query_length, rows.rows, rows.pair.device)
    back = torch.arange(-LAST_QUERIES, 0, device=rows.pair.device)
    each = torch.arange(MODALITIES, device=rows.pair.device).view(1, -1, 1)
    end = (scene.query_modality.unsqueeze(1) <= each).sum(-1)  # [B, MODALITIES], where each group ends
    return (end.unsqueeze(-1) + back).flatten(1).clamp(min=0).repeat_interleave(len(rows.heads), 0)


# Kept, because they depend on lengths alone.
@lru_cache(maxsize=64)
def _last_slots(length: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(length - LAST_QUERIES, length, device=device).clamp_(min=0).repeat(rows, 1)


@lru_cache(maxsize=64)
def _tile_ends(query_tiles: int, length: int, device: torch.device) -> Tensor:
    """The first and the last slot of each query tile, int64 [2 * nQ]."""
    first = torch.arange(query_tiles, device=device) * TILE
    return torch.cat([first, (first + TILE - 1).clamp(max=length - 1)])


class Diagonals:
    """Tiles on chosen diagonals: those as many tiles before the query's own key as the last queries attended to.

    levels: the rank of each distance, most attention first, int32 [N, nK + 1]; the last entry is for later tiles.
    """

    weights = None

    def __init__(self, rows: Rows, layout: Layout, mass: Tensor, own_tiles: Tensor, wanted: int) -> None:
        """mass: float [N, R, nK] of some queries, own_tiles: int32 [N, R] theirs."""
        _, query_tiles, key_tiles = layout.shape
        self.count = min(wanted, key_tiles)
        self.levels = rank_diagonals(mass, own_tiles, self.count)
        # The own keys of a tile of queries lie in two tiles at most where both stand in one order.
        ends = _tile_ends(query_tiles, rows.scene.query_length, mass.device)
        self.own = rows.own_tiles(ends.expand(rows.rows, -1)).unflatten(1, (2, -1))  # [N, 2, nQ]
        self.key_tiles = key_tiles

    def of(self, rows: slice) -> Tensor:
        tile = torch.arange(self.key_tiles, device=self.levels.device)
        levels = []
        for own in self.own.unbind(1):
            distance = own[:, rows, None] - tile
            distance = torch.where(distance >= 0, distance, self.key_tiles).long()
            levels.append(self.levels.gather(1, distance.flatten(1)).view(distance.shape))
        return torch.minimum(*levels)

    def streamed(self) -> Streamed:
        return Streamed(diagonals=self.levels, own=self.own)


def rank_diagonals(mass: Tensor, own_tiles: Tensor, count: int) -> Tensor:
    """The `count` diagonals with the most attention by rank, and `count` for the others: `Diagonals.levels`.

    mass: float [N, R, nK] of some queries, own_tiles: int32 [N, R] theirs. Of equal ones the nearest comes first.
    """
    if mass.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import lines_kernel

        return lines_kernel.rank_diagonals(mass, own_tiles, count)
    return rank_diagonals_cpu(mass, own_tiles, count)


def rank_diagonals_cpu(mass: Tensor, own_tiles: Tensor, count: int) -> Tensor:
    """`rank_diagonals` in torch operations."""
    rows, _, key_tiles = mass.shape
    distance = own_tiles.unsqueeze(-1) - torch.arange(key_tiles, device=mass.device)
    distance = torch.where(distance >= 0, distance, key_tiles).long()
    held = mass.new_zeros(rows, key_tiles + 1).scatter_add_(1, distance.flatten(1), mass.flatten(1))
    best = held[:, :-1].argsort(dim=-1, descending=True, stable=True)[:, :count]
    rank = torch.arange(count, dtype=torch.int32, device=mass.device).expand_as(best)
    return torch.full((rows, key_tiles + 1), count, dtype=torch.int32, device=mass.device).scatter_(1, best, rank)


def vertical_slash(rows: Rows, layout: Layout, pattern: HeadPattern, most: int) -> tuple[Columns, Diagonals]:
    """The single keys with the largest column sums, and the diagonals with the largest sums, of the last 64 queries.

    A diagonal is 128 keys wide, as tiles are. In a grouped order each modality's last queries count for themselves.
    most: keys that a cap leaves room for.
    """
    slot = last_slots(rows, pattern.boundary in ("q", "2d"))
    mass, total = rows.tile_mass(slot)
    groups = slot.shape[1] // LAST_QUERIES
    weight = rows.key_mass(slot, total, 0, groups)
    room = min(most, weight.shape[-1])
    columns = Columns.of(rows, weight.amax(1) if groups > 1 else weight.squeeze(1), room)
    return columns, Diagonals(rows, layout, mass, rows.own_tiles(slot), -(-pattern.slash // TILE))


class GridLines:
    """Tiles on the lines of a grid, near ones first; tokens stand by site, so that a line is a run of slots.

    Vertical lines are the keys of the site with the most attention, horizontal ones the queries of the site that puts
    the most attention elsewhere. Slash lines, each query's own site, are the layout's chosen tiles.
    """

    weights = None

    def __init__(self, rows: Rows, layout: Layout, lines: str) -> None:
        scene = rows.scene
        self.layout = layout
        self.count = layout.shape[2] + 1
        self.sites = max(scene.query_length, scene.key_tags.shape[2])  # more than there can be
        query_site, key_site = pair_sites(scene, rows.pairs)
        self.vertical = torch.zeros(layout.shape[::2], dtype=torch.bool, device=rows.pair.device)  # [N, nK]
        self.horizontal = torch.zeros(layout.shape[:2], dtype=torch.bool, device=rows.pair.device)  # [N, nQ]
        if "v" in lines:
            site = self._most_attended(rows, key_site)
            self.vertical = _holds(layout, key_site, site)
        if "h" in lines:
            site = self._sees_elsewhere(rows, layout.of_row(query_site))
            self.horizontal = _holds(layout, query_site, site)

    def of(self, rows: slice) -> Tensor:
        bounds = self.layout.bounds
        return torch.where(self._on_lines(rows), self.layout.of_row(rings(bounds, rows)), self.count)

    def streamed(self) -> Streamed:
        return Streamed(row_lines=self.horizontal, column_lines=self.vertical)

    def _on_lines(self, rows: slice) -> Tensor:
        """bool [N, rows, nK]."""
        return self.layout.chosen(rows) | self.vertical.unsqueeze(1) | self.horizontal[:, rows, None]

    def _most_attended(self, rows: Rows, key_site: Tensor) -> Tensor:
        """The site with the most attention of the probes, int64 [N]. key_site: int32 [O, Sk]."""
        seen = glance(rows)
        weight = rows.column_mass(seen.probes.choosing, seen.counted, seen.probes.own_tiles, 0).squeeze(1)
        return site_totals(weight, key_site, rows.pair, self.sites).argmax(-1)

    def _sees_elsewhere(self, rows: Rows, query_site: Tensor) -> Tensor:
        """The site whose queries, one a tile, put the most attention outside the other lines, int64 [N]; `NO_SITE`
        where none puts half of it there."""
        length = query_site.shape[1]
        middle = torch.arange(self.layout.shape[1], device=query_site.device) * TILE + TILE // 2
        slot = middle.clamp_(max=length - 1).expand(rows.rows, -1)
        outside = []
        for part in self.layout.chunks():
            chosen = self._on_lines(part) | self.layout.mandatory(part)
            outside.append((rows.tile_mass(slot[:, part])[0] * ~chosen).sum(-1))
        site = query_site.gather(1, slot)
        weight = torch.cat(outside, 1)
        # The mean over the tiles of a site.
        total = weight.new_zeros(weight.shape[0], self.sites + 1).scatter_add_(1, (site + 1).long(), weight)
        count = torch.zeros_like(total).scatter_add_(1, (site + 1).long(), torch.ones_like(weight))
        mean = total[:, 1:] / count[:, 1:].clamp(min=1)
        most, index = mean.max(-1)
        return torch.where(most > HORIZONTAL, index, NO_SITE)


def site_totals(weight: Tensor, site: Tensor, pair: Tensor, sites: int) -> Tensor:
    """What the keys of each site have together, 1 as 2^40: int64 [N, sites], so that sums are the same in any order.

    weight: float [N, Sk], at most 1. site: int32 [O, Sk], negative for keys without one. pair: int64 [N], the row of
    `site` of each plan row.
    """
    if weight.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import lines_kernel

        return lines_kernel.site_totals(weight, site, pair, sites)
    return site_totals_cpu(weight, site, pair, sites)


def site_totals_cpu(weight: Tensor, site: Tensor, pair: Tensor, sites: int) -> Tensor:
    """`site_totals` in torch operations."""
    total = torch.zeros(weight.shape[0], sites + 1, dtype=torch.int64, device=weight.device)
    each = (site.index_select(0, pair) + 1).clamp(min=0).long()
    return total.scatter_add_(1, each, (weight.double() * WHOLE).long())[:, 1:]


def _holds(layout: Layout, site: Tensor, wanted: Tensor) -> Tensor:
    """Tiles that may hold a token of a site. site: int32 [O, S], wanted: int64 [N]. bool [N, n]."""
    first, last = (layout.of_row(bound) for bound in site_bounds(site))
    return (first <= wanted.unsqueeze(1)) & (wanted.unsqueeze(1) <= last)
