"""What whole tiles are before any data is looked at: a byte for each tile of each pair of orders.

Made once, and read by every plan row that takes the pair, in each step of its planning.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.a_shape import Intervals
from mmcompile.kernels.tile_bounds import TileBounds

NON_EMPTY = 1  # may hold an allowed element
FULL = 2  # every element is allowed
MANDATORY = 4  # no cap removes it; never of an empty tile
CHOSEN = 8  # of the pattern, where orders and mask alone tell


class Chosen(NamedTuple):
    """The tiles that a pattern chooses without looking at data: all that any field names."""

    every: bool = False
    runs: Intervals | None = None  # [O, *, Sq]
    reach: int | None = None  # tiles of a matching span up to this many tokens away
    # Tiles that share a site: least and greatest one of each query tile, int32 [O, nQ], and key tile, [O, nK].
    sites: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def classify(bounds: TileBounds, must: Intervals, chosen: Chosen) -> Tensor:
    """uint8 [O, nQ, nK]. must: the tiles that no cap removes, [O, *, Sq]."""
    if bounds.query.first.device.type == "cuda":
        from mmcompile.kernels import tile_bounds_kernel

        return tile_bounds_kernel.classify(bounds, must, chosen)
    return classify_cpu(bounds, must, chosen)


def classify_cpu(bounds: TileBounds, must: Intervals, chosen: Chosen) -> Tensor:
    """`classify` in torch operations."""
    classes = torch.empty(bounds.shape, dtype=torch.uint8, device=bounds.query.first.device)
    key_tiles = bounds.shape[2]
    for rows in bounds.chunks():
        some = bounds.non_empty(rows)
        mine = torch.full_like(some, chosen.every)
        if chosen.runs is not None:
            mine |= chosen.runs.cover(rows, key_tiles)
        if chosen.reach is not None:
            mine |= bounds.span_match(rows) & (bounds.distance(rows) < chosen.reach)
        if chosen.sites is not None:
            query_first, query_last, key_first, key_last = chosen.sites
            mine |= (key_first.unsqueeze(1) <= query_last[:, rows, None]) & (
                query_first[:, rows, None] <= key_last.unsqueeze(1)
            )
        named = (NON_EMPTY, some), (FULL, bounds.full(rows)), (MANDATORY, must.cover(rows, key_tiles) & some)
        classes[:, rows] = sum(bit * tiles.to(torch.uint8) for bit, tiles in (*named, (CHOSEN, mine)))
    return classes
