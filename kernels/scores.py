"""Estimates of the attention that each query tile puts on each key tile: what "top_p" keeps the most of.

All but `sampled_mass` return, for some query tiles, the share of each key tile: float [N, rows, nK], 0 for empty tiles.
"""

from functools import lru_cache

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.scene import Rows, scattered, tile_slots
from mmcompile.kernels.single_keys import Columns
from mmcompile.kernels.tags import INVALID
from mmcompile.kernels.tile_bounds import by_tile
from mmcompile.kernels.tile_list import Layout

SAMPLES = 3  # queries of a tile
BETWEEN = TILE // 4  # row of the one that is neither first nor last, which `scattered` moves on from tile to tile
SAMPLED_AT_ONCE = 2**25  # tiles: of each, three logarithms, 384 MiB in all
ANTIDIAGONAL = 16  # queries and keys of one antidiagonal (XAttention's stride)


# Kept, because they depend on lengths alone.
@lru_cache(maxsize=64)
def sample_slots(query_tiles: int, length: int, device: torch.device) -> Tensor:
    """Query slots that stand for each query tile, int64 [SAMPLES, nQ].

    The first and the last: in raster order a slanted line enters the tile's keys at one and leaves them at the other;
    by site, where a tile holds queries of two sites, each has one of them. And one between, others from tile to tile.
    """
    tile = torch.arange(query_tiles, device=device)
    slots = tile * TILE, tile * TILE + TILE - 1, scattered(tile, BETWEEN)
    return torch.stack(slots).clamp_(max=length - 1)


def sampled_chunks(layout: Layout) -> list[slice]:
    """Query tiles in runs that `sampled_mass` keeps few enough numbers of."""
    count, query_tiles, key_tiles = layout.shape
    step = max(1, SAMPLED_AT_ONCE // (count * key_tiles))
    return [slice(start, min(start + step, query_tiles)) for start in range(0, query_tiles, step)]


def sampled_mass(of: Rows, rows: slice, columns: Columns | None) -> tuple[Tensor, Tensor | None]:
    """Exact attention of the samples of each tile: the logarithm of what each has on each key tile, float
    [N, SAMPLES * rows, nK], and of what it has in columns, [N, SAMPLES * rows], or None where there are none."""
    scene = of.scene
    samples = sample_slots(scene.query_tiles, scene.query_length, of.pair.device)
    slot = samples[:, rows].flatten().expand(of.rows, -1)
    if columns is None:
        return of.tile_log_mass(slot, None), None
    return of.tile_log_mass(slot, columns.cold), of.slots_log_mass(slot, columns.slots, columns.listed)


def pooled_mass(of: Rows, layout: Layout, rows: slice) -> Tensor:
    """Mean query against mean key (FlexPrefill, arXiv 2502.20766; FlashPrefill pools keys alike)."""
    query = of.queries(tile_slots(rows, of.scene.query_length, layout.pair.device).expand(of.rows, -1))
    query = query.float().unflatten(1, (-1, TILE)).mean(2)
    key, usable = _pooled_keys(of)
    scores = query @ key.transpose(1, 2) * of.scene.scale + usable.log().unsqueeze(1)
    return _shares(scores, layout.non_empty(rows))


def antidiagonal_mass(of: Rows, layout: Layout, rows: slice) -> Tensor:
    """Sums of scores along antidiagonals of 16 x 16 blocks, softmax over blocks, summed by tile (XAttention, arXiv
    2503.16428). In blocks of a few rows, because there are 64 blocks in a tile."""
    scene, device = of.scene, layout.pair.device
    key = _padded(of.keys()).unflatten(1, (-1, ANTIDIAGONAL)).flatten(2)  # [N, nK * 8, 16 * D]
    shares = []
    for start in range(rows.start, rows.stop, max(1, (rows.stop - rows.start) // 16)):
        part = slice(start, min(start + max(1, (rows.stop - rows.start) // 16), rows.stop))
        query = of.queries(tile_slots(part, scene.query_length, device).expand(of.rows, -1))
        query = query.unflatten(1, (-1, ANTIDIAGONAL)).flip(2).flatten(2)  # [N, rows * 8, 16 * D]
        # Scaled first: sums of so many products could pass what float16 holds.
        scores = ((query * (scene.scale / ANTIDIAGONAL)) @ key.transpose(1, 2)).float()
        blocks = TILE // ANTIDIAGONAL
        allowed = layout.non_empty(part).repeat_interleave(blocks, 1).repeat_interleave(blocks, 2)
        shares.append(_shares(scores, allowed).unflatten(1, (-1, blocks)).unflatten(3, (-1, blocks)).mean(2).sum(-1))
    return torch.cat(shares, 1)


def _shares(scores: Tensor, allowed: Tensor) -> Tensor:
    return torch.softmax(scores.masked_fill_(~allowed, float("-inf")), -1).nan_to_num_(0.0)


def _pooled_keys(of: Rows) -> tuple[Tensor, Tensor]:
    """Mean of the valid keys of each tile, float [N, nK, D], and how many they are, float [N, nK]."""
    scene = of.scene
    assert scene.key is not None
    usable = by_tile(scene.arrangement.key_tags[:, :, 0] != INVALID, False)  # [B, Ok, nK, TILE]
    copies = scene.key.shape[1] // usable.shape[1]
    usable = usable.repeat(1, copies, 1, 1)  # [B, C, nK, TILE]
    count = usable.sum(-1).float()
    weight = (usable / count.clamp(min=1).unsqueeze(-1)).to(scene.key.dtype)
    keys = _padded(scene.key).unflatten(2, (-1, TILE))
    # A matrix product, so that no float32 copy of the keys is made.
    pooled = (weight.unsqueeze(-2) @ keys).squeeze(-2).float()
    return of.of_copies(pooled), of.of_copies(count)


def _padded(rows: Tensor) -> Tensor:
    missing = -rows.shape[-2] % TILE
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
