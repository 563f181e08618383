"""Tile walks for measurements: a causal mask, and of its tiles a random part of a given size."""

import torch

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import TileWalk


def causal_walk(length: int, density: float, heads: int, key_heads: int, device: str) -> TileWalk:
    """One plan row for all heads; of each query tile's causal tiles the first, its own, and random ones.

    density: listed tiles as a fraction of the causal ones. Scattered tiles are the hardest to load: those of a
    planner come in runs. length: a multiple of TILE.
    """
    count = length // TILE
    tile = torch.arange(count, device=device)
    priority = torch.rand(count, count, device=device, generator=torch.Generator(device).manual_seed(0))
    priority[:, 0] = 2.0
    priority.masked_fill_(tile[:, None] < tile, -1.0)  # [nQ, nK]; keys after the query tile come last
    priority.diagonal().fill_(-0.5)  # its own tile is listed apart, as the partial one
    wanted = ((tile + 1) * density).round().long().clamp(min=1)
    # At least the first tile and its own.
    full = torch.minimum(wanted.clamp(min=2) - 1, tile)
    chosen = priority.argsort(1, descending=True)
    listed = torch.where(tile < full[:, None], chosen, count).sort(1).values
    listed = torch.where(tile == full[:, None], tile[:, None], listed)  # the partial one follows the full ones
    start = tile * count
    none = torch.zeros_like(full)
    counts = torch.stack([start, full, torch.ones_like(full), none, none], 1).int()
    tiles = listed.clamp(max=count - 1).int().flatten()
    position = torch.arange(length, dtype=torch.int32, device=device)
    tags = torch.stack([position, torch.zeros_like(position), torch.full_like(position, -1)]).view(1, 1, 3, -1)
    group = heads // key_heads
    key_head = tuple(head // group for head in range(heads))
    row = torch.zeros(1, 1, dtype=torch.int32, device=device)
    columns = torch.empty(1, 1, 0, dtype=torch.int32, device=device)
    lists = (row, row, counts[None, None], tiles[None, None], columns, columns.bool())
    return TileWalk(tags, tags.clone(), *lists, (0,) * heads, key_head, None, False, False)


def listed_tiles(walk: TileWalk) -> int:
    """Tiles that one head computes, as a count."""
    return int(walk.counts[..., 1:3].sum())
