"""What a few sampled queries tell: the order a head wants, the single keys that stand out, the recall of a plan.

Probes stand in query tiles spread evenly over the slots, and in the tile of the last query of each modality: the last
queries alone mislead where they are text and the prompt is video. Some queries of a tile choose, and another, which had
no say, measures.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.scene import Pair, Rows, Scene, scattered
from mmcompile.kernels.scores import sample_slots
from mmcompile.kernels.single_keys import Columns

SPREAD = 24  # query tiles, besides those of the modalities' last queries
MEASURING = 3 * TILE // 4  # row of a probed tile, which `scattered` moves on from tile to tile
NEAR_TILES = 2  # the own tile of a query and the one before, which no single key is picked from
RASTER_LEAD = 0.02  # another order must hold so much more attention than the first
HOT = 16.0  # times an even share of the attention
UNCAPPED = 0.1  # share of the tiles at which orders are compared where no cap is given
HORIZONTAL = 0.5  # share of its attention that a query must put outside other lines for its site to see everything
SEARCHED = 256  # query tiles in which horizontal lines are looked for
SPREAD_OUT = 4.0  # times an even share of the attention: what a tile holds less of is not worth listing by itself


class Probes(NamedTuple):
    """Sampled queries of some plan rows."""

    choosing: tuple[Tensor, ...]  # slots int64 [N, T], some of each probed tile
    measuring: Tensor  # slots int64 [N, T]
    weight: Tensor  # float [N, T], 0 for the tile of a modality that the prompt has not

    @classmethod
    def of(cls, rows: Rows) -> "Probes":
        scene = rows.scene
        spread = torch.arange(1, SPREAD + 1, device=rows.choice.device) * scene.query_tiles // SPREAD - 1
        spread = spread.clamp(min=0).expand(scene.batch, -1)
        tile = rows.of_pairs([torch.cat([spread, scene.last_tiles(query)], 1) for query, _ in rows.pairs])
        weight = torch.cat([torch.ones_like(spread), scene.has_modality().long()], 1).float()
        measuring = scattered(tile, MEASURING).clamp(max=scene.query_modality.shape[1] - 1)
        return cls(sample_slots(rows, tile), measuring, weight.repeat_interleave(len(rows.heads), 0))


class Measured(NamedTuple):
    """Where the attention of the measuring queries lies: of each row's T probed tiles one."""

    slot: Tensor  # int64 [N, T]
    mass: Tensor  # float [N, T, nK], share of each key tile among the keys that are attended through tiles
    outside: Tensor  # float [N, T], share of the keys that are not: those of columns
    weight: Tensor  # float [N, T]

    @classmethod
    def of(cls, rows: Rows, cold: Tensor | None) -> "Measured":
        """cold: bool [N, Sk], False for the keys of columns; None without columns."""
        probes = Probes.of(rows)
        mass, total = rows.tile_mass(probes.measuring, cold)
        every = total if cold is None else rows.tile_mass(probes.measuring)[1]
        return cls(probes.measuring, mass, _outside(total, every), probes.weight * (every > float("-inf")))

    def recall(self, counts: Tensor, tiles: Tensor) -> Tensor:
        """Share of this attention that a plan computes: float [N], the mean over the probes.

        counts: int32 [N, nQ, 5], tiles: int32 [N, T], as in `TilePlan`.
        """
        key_tiles = self.mass.shape[-1]
        of_probe = counts.gather(1, (self.slot // TILE).unsqueeze(-1).expand(-1, -1, 5)).long()
        first, listed = of_probe[..., 0:1], of_probe[..., 1:2] + of_probe[..., 2:3]
        step = torch.arange(key_tiles, device=counts.device)
        entry = (first + step).clamp_(max=tiles.shape[1] - 1)
        tile = tiles.gather(1, entry.flatten(1)).view(entry.shape).long()
        tile = torch.where(step < listed, tile, key_tiles)
        computed = self.mass.new_zeros(*self.mass.shape[:2], key_tiles + 1).scatter_(-1, tile, 1.0)
        held = (self.mass * computed[..., :-1]).sum(-1)
        return _mean(held * (1.0 - self.outside) + self.outside, self.weight)


class Sighting(NamedTuple):
    """What probes found in one pair of orders, or in the pair that each row chose."""

    measured: Measured
    columns: Columns | None


def look(rows: Rows, columns: int, density: float | None) -> tuple[Sighting, Tensor]:
    """Probe in one pair of orders: find up to `columns` single keys, and see how far probes agree on tiles.

    In each probed tile the tiles that some queries attend to most are tried on another: what they share is what a
    tile list can hold. Keys that become columns need no tiles in any order. density: share of the causal tiles that may
    be computed. The second result is what they share: float [N], of the trying queries' attention outside columns.
    """
    scene = rows.scene
    probes = Probes.of(rows)
    slot = torch.cat([*probes.choosing, probes.measuring], -1)
    samples = len(probes.choosing)
    choosing = samples * probes.weight.shape[1]
    mass, every = rows.tile_mass(slot)
    picked: Columns | None = None
    outside = torch.zeros_like(every)
    if columns:
        weight = probes.weight.repeat(1, samples)
        total = every[:, :choosing].masked_fill(weight == 0, float("-inf"))
        picked = _hot_columns(
            rows, _agreed_weight(rows, slot[:, :choosing], total, probes.weight.shape[1]), columns, density
        )
        mass, total = rows.tile_mass(slot, picked.cold)
        outside = _outside(total, every)
    chooses, tried = mass[:, :choosing].unflatten(1, (samples, -1)).sum(1), mass[:, choosing:]
    tiles = max(1, round((UNCAPPED if density is None else density) * scene.key_tiles / 2))
    wanted = chooses.topk(min(tiles, scene.key_tiles), -1).indices
    of_tried = outside[:, choosing:]
    weight = probes.weight * (every[:, choosing:] > float("-inf"))
    held = _mean(tried.gather(-1, wanted).sum(-1), weight * (1.0 - of_tried))
    return Sighting(Measured(probes.measuring, tried, of_tried, weight), picked), held


def choose_orders(
    scene: Scene,
    heads: tuple[int, ...],
    pairs: tuple[Pair, ...],
    by_site: tuple[bool, ...],
    columns: int,
    density: float | None,
) -> tuple[Rows, Sighting]:
    """For each head the pair of orders in which as many tiles hold the most attention, and what was seen there."""
    none = torch.zeros(scene.batch, len(heads), dtype=torch.int64, device=scene.query_modality.device)
    each = [Rows(scene, heads, (pair,), (site,), none) for pair, site in zip(pairs, by_site, strict=True)]
    looks = [look(rows, columns, density) for rows in each]
    seen, shared = [one for one, _ in looks], [held for _, held in looks]
    for index, row in enumerate(each):
        if row.by_site[0]:
            shared[index] = shared[index] + _horizontal_lines(row, *seen[index], density)
    choice = torch.stack([shared[0] + RASTER_LEAD, *shared[1:]]).argmax(0)  # [N]

    def chosen(of_pair: list[Tensor]) -> Tensor:
        result = of_pair[0]
        for index, other in enumerate(of_pair[1:], 1):
            result = torch.where((choice == index).view(-1, *[1] * (other.dim() - 1)), other, result)
        return result

    measured = Measured(*(chosen(list(part)) for part in zip(*(one.measured for one in seen), strict=True)))
    picked: Columns | None = None
    if columns:
        picked = Columns(
            *(chosen(list(part)) for part in zip(*(one.columns for one in seen if one.columns), strict=True))
        )
    rows = Rows(scene, heads, pairs, by_site, choice.unflatten(0, (scene.batch, -1)))
    return rows, Sighting(measured, picked)


def _horizontal_lines(rows: Rows, measured: Measured, columns: Columns | None, density: float | None) -> Tensor:
    """What an order by site holds by computing some query tiles whole, those of sites whose queries look at everything:
    float [N], of the attention outside columns. 0 where these are more than half of what the budget is for.

    They are few, so that the other probes seldom meet one; and no other order makes them few.
    """
    scene = rows.scene
    tile = torch.arange(1, SEARCHED + 1, device=rows.choice.device) * scene.query_tiles // SEARCHED - 1
    tile = tile.clamp(min=0).expand(rows.rows, -1)
    # Two neighbours: one query alone may be an exception.
    slot = torch.cat([tile * TILE + TILE // 2 - 1, tile * TILE + TILE // 2], -1)
    slot = slot.clamp(max=scene.query_modality.shape[1] - 1)
    mass, total = rows.tile_mass(slot, None if columns is None else columns.cold)
    even = SPREAD_OUT / (mass > 0).sum(-1, keepdim=True).clamp(min=1)
    spread_out = (mass * (mass < even)).sum(-1)
    if columns is not None:
        in_columns = rows.slots_log_mass(slot, columns.slots, columns.listed)
        spread_out *= torch.sigmoid(total - in_columns).nan_to_num_(0.0)
    # Text has no site.
    site = rows.of_pairs([scene.arrangement.query_site[:, query] for query, _ in rows.pairs]).gather(1, slot)
    spread_out = (spread_out * (site >= 0)).unflatten(1, (2, -1)).amin(1)
    horizontal = spread_out > HORIZONTAL
    # Where many queries spread out half as much, this order is the wrong one for what they look at.
    exceptional = (spread_out > HORIZONTAL / 2).float().mean(-1) <= (UNCAPPED if density is None else density) / 2
    held = (spread_out * horizontal).mean(-1) * exceptional
    return held / _mean(1.0 - measured.outside, measured.weight).clamp(min=1e-6)


def _agreed_weight(rows: Rows, slot: Tensor, total: Tensor, tiles: int) -> Tensor:
    """Mean weight of each key in two halves of the probed tiles, whichever is less: float [N, Sk] in key slots.

    The queries of one tile may share what they look at (their own site), and a mean over few tiles would take that for
    what all look at. A key that one half is too early to see has the other's weight. slot: int64 [N, 2 * T], total:
    float [N, 2 * T], the log of each query's sum, -inf for those that do not count.
    """
    scene = rows.scene
    half = torch.arange(slot.shape[1], device=slot.device) % tiles % 2
    position = rows.of_pairs([scene.arrangement.query_tags[:, query, 0] for query, _ in rows.pairs]).gather(1, slot)
    key_position = rows.of_pairs([scene.arrangement.key_tags[:, key, 0] for _, key in rows.pairs])
    weights, sees = [], []
    for each in (0, 1):
        counts = (half == each) & (total > float("-inf"))
        weights.append(rows.key_mass(slot, total.masked_fill(~counts, float("-inf")), NEAR_TILES))
        sees.append(key_position <= position.masked_fill(~counts, -1).amax(-1, keepdim=True))
    least = torch.minimum(*weights)
    return torch.where(sees[0] & sees[1], least, torch.maximum(*weights))


def _hot_columns(rows: Rows, weight: Tensor, most: int, density: float | None) -> Columns:
    """Keys that queries of all probed tiles attend to, up to `most` and to half of the budget.

    weight: float [N, Sk] in key slots.
    """
    keys = weight.shape[-1]
    best = weight.topk(min(most, keys), -1)
    # Of a query tile's causal tiles, half of all, two at least are mandatory: its own and the first.
    share = UNCAPPED if density is None else density
    share = max(0.0, min(share / 2, share - 4 / rows.scene.key_tiles))
    affordable = torch.arange(best.values.shape[-1], device=weight.device) < share * keys
    return Columns.of(rows, best.indices, (best.values * keys > HOT) & affordable)


def _outside(total: Tensor, every: Tensor) -> Tensor:
    """Share of the attention outside some keys, from the logs of their total and of all: 0 where a row has none."""
    return 1.0 - (total - every).exp().nan_to_num(1.0)


def _mean(figure: Tensor, weight: Tensor) -> Tensor:
    """[N, T] to [N]."""
    return (figure * weight).sum(-1) / weight.sum(-1).clamp(min=1e-6)
