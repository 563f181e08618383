"""Tile walks for measurements: a causal mask, and of its tiles a random part of a given size."""

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import TileWalk


def tiles_of_density(length: int, density: float, device: str) -> Tensor:
    """A fraction of the causal tiles of each query tile, as counts [nQ]. length: a multiple of TILE."""
    causal = torch.arange(1, length // TILE + 1, device=device)
    return (causal * density).round().long()


def scattered_walk(tiles: Tensor, heads: int, key_heads: int) -> TileWalk:
    """One plan row for all heads; of each query tile's causal tiles the first, its own, and random ones.

    tiles: how many each query tile lists, [nQ], over nQ * TILE tokens; brought to at least the first and its own, at
    most all. Scattered tiles are the hardest to load: those of a planner come in runs.
    """
    count, device = len(tiles), tiles.device
    tile = torch.arange(count, device=device)
    priority = torch.rand(count, count, device=device, generator=torch.Generator(device).manual_seed(0))
    priority[:, 0] = 2.0
    priority.masked_fill_(tile[:, None] < tile, -1.0)  # [nQ, nK]; keys after the query tile come last
    priority.diagonal().fill_(-0.5)  # its own tile is listed apart, as the partial one
    full = torch.minimum(tiles.clamp(min=2) - 1, tile)
    chosen = priority.argsort(1, descending=True)
    listed = torch.where(tile < full[:, None], chosen, count).sort(1).values
    listed = torch.where(tile == full[:, None], tile[:, None], listed)  # the partial one follows the full ones
    none = torch.zeros_like(full)
    counts = torch.stack([tile * count, full, torch.ones_like(full), none, none], 1).int()
    entries = listed.clamp(max=count - 1).int().flatten()
    position = torch.arange(count * TILE, dtype=torch.int32, device=device)
    tags = torch.stack([position, torch.zeros_like(position), torch.full_like(position, -1)]).view(1, 1, 3, -1)
    group = heads // key_heads
    key_head = tuple(head // group for head in range(heads))
    row = torch.zeros(1, 1, dtype=torch.int32, device=device)
    columns = torch.empty(1, 1, 0, dtype=torch.int32, device=device)
    lists = (row, row, counts[None, None], entries[None, None], columns, columns.bool())
    return TileWalk(tags, tags.clone(), *lists, (0,) * heads, key_head, None, False, False)


def listed_tiles(walk: TileWalk) -> int:
    """Tiles that one head computes, as a count."""
    return int(walk.counts[..., 1:3].sum())
