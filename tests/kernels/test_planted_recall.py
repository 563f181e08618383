"""`patterns="auto"` finds what planted heads look at: 0.99 of the planted mass at twice the planted density.

Density is counted in tiles, as everywhere. What is planted costs the tiles that hold a planted pair, in the better of
raster order and the order by the true site, besides the tiles that every plan has (the first keys, each query's
nearest), and a 128th of a tile for each planted single key of a query tile. At a few thousand tokens that is much more
than the share of the pairs that are planted: a line of 40 tokens still takes whole tiles.

MMCOMPILE_PLANTS=200 draws as many plants of each kind instead of 10, MMCOMPILE_PLANT_TOKENS=8192 makes them longer.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.planted_heads import PLANT_KINDS, Planted, plant_heads, random_plant, softmax_rows
from mmcompile.kernels.attend import Planned, plan_attention
from mmcompile.kernels.patterns import TILE, HeadPattern

PLANTS = int(os.environ.get("MMCOMPILE_PLANTS", "10"))
TOKENS = int(os.environ.get("MMCOMPILE_PLANT_TOKENS", "4096"))
ROWS = 256  # measured queries
AUTO = HeadPattern("top_p", order="auto", columns=2048)
NEEDED, OF_PLANTS = 0.99, 0.95


@dataclass(frozen=True)
class Found:
    """What a plan of one plant computes of the planted mass."""

    seed: int
    density: float  # the plan's
    cap: float
    recall: float

    def __str__(self) -> str:
        return f"plant {self.seed}: {self.recall:.4f} at {self.density:.3f}"


def planted_density(planted: Planted) -> float:
    """Share of the causal tiles that a plan needs for what head 0 looks at, if it knows the truth."""
    plant, truth = planted.plant, planted.truth
    tokens, tiles = plant.tokens, -(-plant.tokens // TILE)
    single = torch.zeros(tokens, dtype=torch.bool)
    for index, look in enumerate(plant.heads[0].looks):
        if look.kind == "columns":
            single |= truth.keys[0, index]
    mask = truth.mask(0, torch.arange(tokens))
    # Every query tile computes the columns before its end.
    last = torch.arange(1, tiles + 1).mul(TILE).clamp(max=tokens) - 1
    of_columns = float(single.cumsum(0)[last].sum()) / TILE
    site = torch.where(truth.modality > 0, truth.site, -1)
    of_tiles = min(_tiles_of(mask & ~single, order) for order in (torch.arange(tokens), site.argsort(stable=True)))
    return (of_tiles + of_columns) / (tiles * (tiles + 1) / 2)


def _tiles_of(mask: Tensor, order: Tensor) -> int:
    """How many tiles hold a pair of the mask, the first key or a query's own key. mask: bool [S, S], order: [S]."""
    missing = -len(order) % TILE
    in_order = pad(mask[order][:, order], (0, missing, 0, missing))
    tiles = in_order.unflatten(1, (-1, TILE)).any(2).unflatten(0, (-1, TILE)).any(1)
    tiles |= torch.eye(len(tiles), dtype=torch.bool)
    tiles[:, 0] = True
    return int(tiles.sum())


def computed_keys(planned: Planned, head: int, rows: Tensor) -> Tensor:
    """The keys that a plan computes for some queries. rows: int64 [R]. Returns bool [R, S]."""
    row = planned.rows.of_head[head]
    arrangement, lists = planned.arrangement, planned.lists
    query_order = arrangement.query_order[0, lists.query_row[0, row]].long()
    key_order = arrangement.key_order[0, lists.key_row[0, row]].long()
    tokens = len(key_order)
    of_tile = torch.zeros(lists.counts.shape[2], -(-tokens // TILE) * TILE, dtype=torch.bool)
    for index, (first, full, partial, column, columns) in enumerate(lists.counts[0, row].tolist()):
        chosen = lists.tiles[0, row, first : first + full + partial].long()
        of_tile[index].unflatten(0, (-1, TILE))[chosen] = True
        if lists.columns.shape[2]:
            of_tile[index, :tokens] &= lists.cold[0, row]
            of_tile[index, lists.columns[0, row, column : column + columns].long()] = True
    slot = torch.empty_like(query_order).scatter_(0, query_order, torch.arange(len(query_order)))
    in_slots = of_tile[slot[rows] // TILE, :tokens]
    computed = torch.zeros_like(in_slots).index_copy_(1, key_order, in_slots)
    return computed & (torch.arange(tokens) <= rows[:, None])


def find(kind: str, seed: int) -> Found:
    planted = plant_heads(random_plant(kind, TOKENS, seed))
    cap = min(2 * planted_density(planted), 0.999)
    planned = plan_attention(planted.query, planted.key, AUTO, planted.boundaries, density=cap, recall=1.0)
    # At random, because evenly spread queries may all be of one site.
    rows = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))[:ROWS].sort().values
    if any(look.kind == "site" for look in planted.plant.heads[0].looks):
        # The plant counts sites on through the text; a prompt's text has none, and no order brings it together.
        rows = rows[planted.truth.modality[rows] > 0]
    held = next(softmax_rows(planted, rows)) * planted.truth.mask(0, rows)
    computed = held * computed_keys(planned, 0, rows)
    assert planned.density[0, 0] <= cap
    return Found(seed, float(planned.density[0, 0]), cap, float(computed.sum() / held.sum()))


# Kinds that miss the target, and the share of plants in which they do reach it.
_MISSED = {
    "grid h": 0.7,  # a few queries look at all keys alike, and no sampled query need be one of them
    "grid h+v": 0.8,
    "q": 0.8,  # keys that text alone looks at stand out in few of the sampled queries
}


@pytest.mark.parametrize("kind", PLANT_KINDS)
def test_recall_of_the_planted_mass(kind):
    plants = [find(kind, seed) for seed in range(PLANTS)]
    good = sum(found.recall >= NEEDED for found in plants) / PLANTS
    mean = sum(found.recall for found in plants) / PLANTS
    summary = f"{kind}: {good:.2f} of the plants, mean recall {mean:.4f}\n" + "\n".join(map(str, plants))
    assert good >= _MISSED.get(kind, OF_PLANTS), summary
    assert mean >= NEEDED, summary
