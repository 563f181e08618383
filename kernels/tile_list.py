"""From chosen tiles to the lists that a kernel walks, and the cap on how many there are."""

import torch
from torch import Tensor

from mmcompile.kernels.a_shape import Intervals
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_bounds import TileBounds


class TileChoice:
    """The tiles of one pattern, evaluated a run of query tiles at a time.

    must: tiles that no cap removes. may: the rest of the pattern; None for every tile. reach: tiles of a
    matching span are chosen up to this many tokens away; None for no such tiles.
    """

    def __init__(self, bounds: TileBounds, must: Intervals, may: Intervals | None, reach: int | None) -> None:
        self.bounds, self.must, self.may, self.reach = bounds, must, may, reach

    def mandatory(self, rows: slice) -> Tensor:
        """bool [B, rows, nK]; may hold empty tiles."""
        return self.must.cover(rows, self.bounds.shape[2])

    def optional(self, rows: slice) -> Tensor:
        """bool [B, rows, nK]; may hold mandatory and empty tiles."""
        if self.may is None:
            batch, _, key_tiles = self.bounds.shape
            return self.bounds.query.first.new_ones(batch, rows.stop - rows.start, key_tiles, dtype=torch.bool)
        chosen = self.may.cover(rows, self.bounds.shape[2])
        if self.reach is not None:
            chosen |= self.bounds.span_match(rows) & (self.bounds.distance(rows) < self.reach)
        return chosen


def distance_cut(choice: TileChoice, density: float) -> Tensor:
    """How far an optional tile may lie, for the listed tiles to stay within a fraction of the non-empty ones.

    One threshold for a whole batch row: mandatory tiles are counted first, then optional tiles ring by ring
    of distance, for as long as a whole ring fits. density: in (0, 1). Returns int32 [B], in tiles, -1 for
    none.
    """
    batch, _, key_tiles = choice.bounds.shape
    device = choice.bounds.query.first.device
    total = torch.zeros(batch, dtype=torch.int64, device=device)
    mandatory = torch.zeros_like(total)
    rings = torch.zeros(batch, key_tiles + 1, dtype=torch.int64, device=device)
    for rows in choice.bounds.chunks():
        non_empty, must = choice.bounds.non_empty(rows), choice.mandatory(rows)
        total += non_empty.sum((1, 2))
        mandatory += (must & non_empty).sum((1, 2))
        optional = (choice.optional(rows) & non_empty & ~must).int()
        # Counted a row at a time: tiles of one row seldom share a ring, so the additions seldom collide.
        counted = optional.new_zeros(*optional.shape[:2], key_tiles + 1)
        counted.scatter_add_(-1, _ring(choice.bounds, rows).long(), optional)
        rings += counted.sum(1)
    budget = (total.double() * density).floor().long()
    fits = mandatory.unsqueeze(1) + rings.cumsum(1) <= budget.unsqueeze(1)
    return (fits.sum(1) - 1).int()


def choose(choice: TileChoice, rows: slice, cut: Tensor | None) -> Tensor:
    """The tiles to list, bool [B, rows, nK]; no empty ones. cut: int32 [B] from `distance_cut`, or None."""
    chosen = choice.optional(rows)
    if cut is not None:
        chosen &= _ring(choice.bounds, rows) <= cut[:, None, None]
    chosen |= choice.mandatory(rows)
    return chosen & choice.bounds.non_empty(rows)


def compact(chosen: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Tile lists: full tiles ascending from the front, partial tiles ascending from the back.

    chosen, full: bool [B, rows, nK]. Returns counts int32 [B, rows, 2] (full, partial) and tiles int32
    [B, rows, nK] with -1 in unused entries.
    """
    key_tiles = chosen.shape[-1]
    full, partial = chosen & full, chosen & ~full
    full_rank = full.cumsum(-1, dtype=torch.int32)
    partial_rank = partial.cumsum(-1, dtype=torch.int32)
    counts = torch.stack([full_rank[..., -1], partial_rank[..., -1]], -1)
    entry = torch.where(full, full_rank - 1, torch.where(partial, key_tiles - partial_rank, key_tiles))
    tile = torch.arange(key_tiles, dtype=torch.int32, device=chosen.device).expand_as(entry)
    listed = torch.full((*chosen.shape[:-1], key_tiles + 1), -1, dtype=torch.int32, device=chosen.device)
    # Tiles that are not chosen all land in the last column, which is cut off.
    return counts, listed.scatter_(-1, entry.long(), tile)[..., :key_tiles]


def _ring(bounds: TileBounds, rows: slice) -> Tensor:
    """Distance in tiles, rounded up: 0 on the diagonal, 1 next to it. int32 [B, rows, nK]."""
    return ((bounds.distance(rows) + (TILE - 1)) // TILE).clamp_(0, bounds.shape[2])
