"""What a few sampled queries tell: the order a head wants, the single keys that stand out, the recall of a plan.

Probes stand in query tiles spread evenly over the slots, and in the tile of the last query of each modality: the last
queries alone mislead where they are text and the prompt is video. Some queries of a tile choose, and another, which had
no say, measures.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.scene import Pair, Rows, Scene, scattered
from mmcompile.kernels.scores import SAMPLES, sample_slots
from mmcompile.kernels.single_keys import Columns
from mmcompile.kernels.tile_mass import listed_share, spread_out_share

SPREAD = 24  # query tiles, besides those of the modalities' last queries
MEASURING = 3 * TILE // 4  # row of a probed tile, which `scattered` moves on from tile to tile
NEAR_TILES = 2  # the own tile of a query and the one before, which no single key is picked from
RASTER_LEAD = 0.02  # another order must hold so much more attention than the first
HOT = 16.0  # times an even share of the attention
UNCAPPED = 0.1  # share of the tiles at which orders are compared where no cap is given
HORIZONTAL = 0.5  # share of its attention that a query must put outside other lines for its site to see everything
SEARCHED = 256  # query tiles in which horizontal lines are looked for
NONE = float("-inf")  # the log of no attention
SPREAD_OUT = 4.0  # times an even share of the attention: what a tile holds less of is not worth listing by itself


class Probes(NamedTuple):
    """Sampled queries of some plan rows, in T probed tiles."""

    slots: Tensor  # int64 [N, SAMPLES + 1, T]: some that choose, and last one that measures
    weight: Tensor  # float [N, T], 0 for the tile of a modality that the prompt has not

    @classmethod
    def of(cls, rows: Rows) -> "Probes":
        scene = rows.scene
        weight = scene.once("probe weights", None, lambda: _probe_weights(scene))
        return cls(
            rows.of_query_orders(scene.once("probe slots", None, lambda: _probe_slots(scene))),
            weight.repeat_interleave(len(rows.heads), 0),
        )

    @property
    def choosing(self) -> Tensor:
        """int64 [N, SAMPLES * T]"""
        return self.slots[:, :SAMPLES].flatten(1)

    @property
    def measuring(self) -> Tensor:
        """int64 [N, T]"""
        return self.slots[:, SAMPLES]


def _probe_slots(scene: Scene) -> Tensor:
    """Of each query order, int64 [B, Oq, SAMPLES + 1, T]."""
    last = scene.last_tiles()
    spread = _spread(SPREAD, scene.query_tiles, last.device).expand(*last.shape[:2], -1)
    of_tile = _slots_of_tiles(scene.query_tiles, scene.query_modality.shape[1], last.device)
    return of_tile[:, torch.cat([spread, last], 2)].permute(1, 2, 0, 3).contiguous()


def _probe_weights(scene: Scene) -> Tensor:
    """float [B, T]"""
    has = (scene.last_queries() >= 0).float()
    return torch.nn.functional.pad(has, (SPREAD, 0), value=1.0)


# Kept, because they depend on lengths alone.
@lru_cache(maxsize=64)
def _slots_of_tiles(query_tiles: int, length: int, device: torch.device) -> Tensor:
    """The slots of a probe in each tile, int64 [SAMPLES + 1, nQ]."""
    measuring = scattered(torch.arange(query_tiles, device=device), MEASURING).clamp_(max=length - 1)
    return torch.cat([sample_slots(query_tiles, length, device), measuring.unsqueeze(0)])


@lru_cache(maxsize=64)
def _spread(count: int, tiles: int, device: torch.device) -> Tensor:
    """`count` of some tiles, spread evenly up to the last one, int64 [count]."""
    return (torch.arange(1, count + 1, device=device) * tiles // count - 1).clamp_(min=0)


@lru_cache(maxsize=64)
def _searched_slots(query_tiles: int, length: int, device: torch.device) -> Tensor:
    """Two neighbours of each query tile in which horizontal lines are looked for, int64 [2 * SEARCHED]: one query alone
    may be an exception."""
    middle = _spread(SEARCHED, query_tiles, device) * TILE + TILE // 2
    return torch.cat([middle - 1, middle]).clamp_(max=length - 1)


class Measured(NamedTuple):
    """Where the attention of the measuring queries lies: of each row's T probed tiles one."""

    slot: Tensor  # int64 [N, T]
    mass: Tensor  # float [N, T, nK], share of each key tile among the keys that are attended through tiles
    outside: Tensor  # float [N, T], share of the keys that are not: those of columns
    weight: Tensor  # float [N, T]

    @classmethod
    def of(cls, rows: Rows, columns: Columns | None) -> "Measured":
        probes = Probes.of(rows)
        mass, total = rows.tile_mass(probes.measuring, None if columns is None else columns.cold)
        if columns is None:
            return cls(probes.measuring, mass, torch.zeros_like(total), probes.weight * (total > NONE))
        every = torch.logaddexp(total, rows.slots_log_mass(probes.measuring, columns.slots, columns.listed))
        return cls(probes.measuring, mass, _outside(total, every), probes.weight * (every > NONE))

    def recall(self, counts: Tensor, tiles: Tensor) -> Tensor:
        """Share of this attention that a plan computes: float [N], the mean over the probes.

        counts: int32 [N, nQ, 5], tiles: int32 [N, T], as in `TilePlan`.
        """
        held = listed_share(self.mass, self.slot // TILE, counts, tiles)
        return _mean(held * (1.0 - self.outside) + self.outside, self.weight)


class Sighting(NamedTuple):
    """What probes found in one pair of orders, or in the pair that each row chose."""

    measured: Measured
    columns: Columns | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Sighting":
        """With each tensor changed."""
        columns = None if self.columns is None else Columns(*map(change, self.columns))
        return Sighting(Measured(*map(change, self.measured)), columns)


def look(rows: Rows, columns: int, density: float | None) -> tuple[Sighting, Tensor]:
    """Probe: find up to `columns` single keys, and what some queries of each probed tile attend to.

    Keys that become columns need no tiles in any order. density: share of the causal tiles that may be computed. The
    second result is by tile, outside columns: float [N, T, nK].
    """
    probes = Probes.of(rows)
    slot = probes.slots.flatten(1)
    choosing = SAMPLES * probes.weight.shape[1]
    mass, every = rows.tile_mass(slot)
    picked: Columns | None = None
    outside = torch.zeros_like(every)
    if columns:
        total = every[:, :choosing].unflatten(1, (SAMPLES, -1)).masked_fill(probes.weight.unsqueeze(1) == 0, NONE)
        weight = _agreed_weight(rows, probes.slots[:, :SAMPLES], total)
        picked = _hot_columns(rows, weight, columns, density)
        mass, total = rows.tile_mass(slot, picked.cold)
        outside = _outside(total, every)
    chooses, tried = mass[:, :choosing].unflatten(1, (SAMPLES, -1)).sum(1), mass[:, choosing:]
    weight = probes.weight * (every[:, choosing:] > NONE)
    return Sighting(Measured(probes.measuring, tried, outside[:, choosing:], weight), picked), chooses


def choose_orders(
    scene: Scene,
    heads: tuple[int, ...],
    pairs: tuple[Pair, ...],
    by_site: tuple[bool, ...],
    columns: int,
    density: float | None,
) -> tuple[Rows, Sighting]:
    """For each head the pair of orders in which as many tiles hold the most attention, and what was seen there."""
    # Each head in each pair of orders, the heads of one pair together.
    pair = torch.arange(len(pairs), device=scene.query_modality.device).repeat_interleave(len(heads))
    each = Rows(scene, heads * len(pairs), pairs, by_site, pair.expand(scene.batch, -1))
    seen, chooses = look(each, columns, density)
    if len(pairs) == 1:
        return each, seen
    shape = (scene.batch, len(pairs), len(heads))
    held = _agreed(seen.measured, chooses, density).unflatten(0, shape)
    held[:, 0] += RASTER_LEAD
    for index, site in enumerate(by_site):
        if site:
            first = torch.zeros(scene.batch, len(heads), dtype=torch.int64, device=pair.device)
            one = Rows(scene, heads, pairs[index : index + 1], (True,), first)
            held[:, index] += _horizontal_lines(one, _of_pair(seen, shape, index), density).view_as(first)
    choice = held.argmax(1)  # [B, heads]
    rows = Rows(scene, heads, pairs, by_site, choice)
    row = rows.pair * len(heads) + torch.arange(len(heads), device=pair.device).repeat(scene.batch)
    return rows, seen.each(lambda of: of.index_select(0, row))


def _of_pair(seen: Sighting, shape: tuple[int, int, int], index: int) -> Sighting:
    """What was seen in one of the pairs of orders. shape: batch rows, pairs, heads."""
    return seen.each(lambda of_row: of_row.unflatten(0, shape)[:, index].flatten(0, 1))


def _agreed(measured: Measured, chooses: Tensor, density: float | None) -> Tensor:
    """How far queries of one tile agree on tiles: float [N], a share of their attention outside columns.

    The tiles that some queries attend to most are tried on another: what they share is what a tile list can hold.
    chooses: float [N, T, nK].
    """
    key_tiles = chooses.shape[-1]
    tiles = max(1, round((UNCAPPED if density is None else density) * key_tiles / 2))
    wanted = chooses.topk(min(tiles, key_tiles), -1).indices
    held = measured.mass.gather(-1, wanted).sum(-1)
    return _mean(held, measured.weight * (1.0 - measured.outside))


def _horizontal_lines(rows: Rows, seen: Sighting, density: float | None) -> Tensor:
    """What an order by site holds by computing some query tiles whole, those of sites whose queries look at everything:
    float [N], of the attention outside columns. 0 where these are more than half of what the budget is for.

    They are few, so that the other probes seldom meet one; and no other order makes them few.
    """
    scene, (measured, columns) = rows.scene, seen
    slot = _searched_slots(scene.query_tiles, scene.query_modality.shape[1], rows.choice.device).expand(rows.rows, -1)
    log_mass = rows.tile_log_mass(slot, None if columns is None else columns.cold)
    if columns is None:
        in_columns = log_mass.new_full(slot.shape, NONE)
    else:
        in_columns = rows.slots_log_mass(slot, columns.slots, columns.listed)
    spread_out = spread_out_share(log_mass, in_columns, SPREAD_OUT)
    # Text has no site.
    site = rows.at_queries(scene.arrangement.query_site, slot)
    spread_out = (spread_out * (site >= 0)).unflatten(1, (2, -1)).amin(1)
    horizontal = spread_out > HORIZONTAL
    # Where many queries spread out half as much, this order is the wrong one for what they look at.
    exceptional = (spread_out > HORIZONTAL / 2).float().mean(-1) <= (UNCAPPED if density is None else density) / 2
    held = (spread_out * horizontal).mean(-1) * exceptional
    return held / _mean(1.0 - measured.outside, measured.weight).clamp(min=1e-6)


def _agreed_weight(rows: Rows, slot: Tensor, total: Tensor) -> Tensor:
    """Mean weight of each key in two halves of the probed tiles, whichever is less: float [N, Sk] in key slots.

    The queries of one tile may share what they look at (their own site), and a mean over few tiles would take that for
    what all look at. A key that one half is too early to see has the other's weight. slot: int64 [N, samples, T],
    total: float, the log of each query's sum, -inf for those that do not count. T is even.
    """
    scene = rows.scene
    slot, total = (of.unflatten(2, (-1, 2)).permute(0, 3, 1, 2).flatten(1) for of in (slot, total))  # halves
    position = rows.at_queries(scene.arrangement.query_tags[:, :, 0], slot)
    last = position.masked_fill_(total == NONE, -1).unflatten(1, (2, -1)).amax(-1)
    both_see = rows.of_key_orders(scene.arrangement.key_tags[:, :, 0]) <= last.amin(1, True)
    least, most = rows.key_mass(slot, total, NEAR_TILES, groups=2).aminmax(dim=1)
    return torch.where(both_see, least, most)


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
