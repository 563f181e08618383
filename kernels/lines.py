"""Patterns made of lines, estimated from a few queries: Vertical-Slash and Grid (arXiv 2504.16083, section 3.1)."""

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


def last_slots(rows: Rows, grouped: bool) -> Tensor:
    """The slots of the last 64 queries, int64 [N, R]; of each modality where the order groups them."""
    scene = rows.scene
    back = torch.arange(-LAST_QUERIES, 0, device=rows.choice.device)
    if grouped:
        each = torch.arange(MODALITIES, device=rows.choice.device).view(1, -1, 1)
        end = (scene.query_modality.unsqueeze(1) <= each).sum(-1)  # [B, MODALITIES], where each group ends
        slot = (end.unsqueeze(-1) + back).flatten(1)
    else:
        slot = (scene.query_modality.shape[1] + back).expand(scene.batch, -1)
    return slot.clamp(min=0).repeat_interleave(len(rows.heads), 0)


class Diagonals:
    """Tiles on chosen diagonals: those as many tiles before the query's own key as the last queries attended to.

    levels: the rank of each distance, most attention first, int64 [N, nK + 1]; the last entry is for later tiles.
    """

    weights = None

    def __init__(self, rows: Rows, layout: Layout, mass: Tensor, own_tiles: Tensor, wanted: int) -> None:
        """mass: float [N, R, nK] of some queries, own_tiles: int32 [N, R] theirs."""
        key_tiles = layout.shape[2]
        self.count = min(wanted, key_tiles)
        distance = own_tiles.unsqueeze(-1) - torch.arange(key_tiles, device=mass.device)
        distance = torch.where(distance >= 0, distance, key_tiles).long()
        held = mass.new_zeros(mass.shape[0], key_tiles + 1).scatter_add_(1, distance.flatten(1), mass.flatten(1))
        best = held[:, :-1].topk(self.count, -1).indices
        rank = torch.arange(self.count, device=mass.device).expand_as(best)
        self.levels = torch.full_like(distance[:, 0], self.count)
        self.levels = torch.nn.functional.pad(self.levels, (0, 1), value=self.count).scatter_(1, best, rank)
        # The own keys of a tile of queries lie in two tiles at most where both stand in one order.
        length = rows.scene.query_modality.shape[1]
        first = torch.arange(layout.shape[1], device=mass.device) * TILE
        ends = torch.cat([first, (first + TILE - 1).clamp(max=length - 1)]).expand(rows.rows, -1)
        self.own = torch.stack(rows.own_tiles(ends).chunk(2, 1))  # [2, N, nQ]
        self.key_tile = torch.arange(key_tiles, device=mass.device)

    def of(self, rows: slice) -> Tensor:
        key_tiles = self.key_tile.shape[0]
        levels = []
        for own in self.own:
            distance = own[:, rows, None] - self.key_tile
            distance = torch.where(distance >= 0, distance, key_tiles).long()
            levels.append(self.levels.gather(1, distance.flatten(1)).view(distance.shape))
        return torch.minimum(*levels)

    def streamed(self) -> Streamed:
        return Streamed(diagonals=self.levels, own=self.own)


def vertical_slash(rows: Rows, layout: Layout, pattern: HeadPattern, most: int) -> tuple[Columns, Diagonals]:
    """The single keys with the largest column sums, and the diagonals with the largest sums, of the last 64 queries.

    A diagonal is 128 keys wide, as tiles are. In a grouped order each modality's last queries count for themselves.
    most: keys that a cap leaves room for.
    """
    slot = last_slots(rows, pattern.boundary in ("q", "2d"))
    mass, total = rows.tile_mass(slot)
    weight = rows.key_mass(slot, total, 0, slot.shape[1] // LAST_QUERIES).amax(1)
    best = weight.topk(min(most, weight.shape[-1]), -1)
    columns = Columns.of(rows, best.indices, best.values > 0.0)
    wanted_diagonals = -(-pattern.slash // TILE)
    return columns, Diagonals(rows, layout, mass, rows.own_tiles(slot), wanted_diagonals)


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
        self.sites = max(scene.query_modality.shape[1], scene.key_modality.shape[1])  # more than there can be
        query_site, key_site = pair_sites(scene, rows.pairs)
        self.vertical = torch.zeros(layout.shape[::2], dtype=torch.bool, device=rows.choice.device)  # [N, nK]
        self.horizontal = torch.zeros(layout.shape[:2], dtype=torch.bool, device=rows.choice.device)  # [N, nQ]
        if "v" in lines:
            site = self._most_attended(rows, layout.of_row(key_site))
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
        """The site with the most attention of the probes, int64 [N]."""
        seen = glance(rows)
        weight = rows.column_mass(seen.probes.choosing, seen.counted, seen.probes.own_tiles, 0).squeeze(1)
        total = weight.new_zeros(weight.shape[0], self.sites + 1).scatter_add_(1, (key_site + 1).long(), weight)
        return total[:, 1:].argmax(-1)

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


def _holds(layout: Layout, site: Tensor, wanted: Tensor) -> Tensor:
    """Tiles that may hold a token of a site. site: int32 [O, S], wanted: int64 [N]. bool [N, n]."""
    first, last = (layout.of_row(bound) for bound in site_bounds(site))
    return (first <= wanted.unsqueeze(1)) & (wanted.unsqueeze(1) <= last)
