"""What a few sampled queries tell: the order a head wants, the single keys that stand out, the recall of a plan.

Probes stand in query tiles spread evenly over the slots, and in the tile of the last query of each modality: the last
queries alone mislead where they are text and the prompt is video. Some queries of a tile choose, and another, which had
no say, measures.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.last_queries import last_queries
from mmcompile.kernels.orders import slots
from mmcompile.kernels.patterns import MODALITIES, TILE
from mmcompile.kernels.scene import Pair, Rows, Scene, scattered
from mmcompile.kernels.scores import SAMPLES, sample_slots
from mmcompile.kernels.single_keys import Columns
from mmcompile.kernels.tile_mass import spread_out_share, tile_shares, tile_shares_cpu

SPREAD = 24  # query tiles, besides those of the modalities' last queries
PROBED = SPREAD + MODALITIES  # query tiles, in two halves: every other one
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
    """Sampled queries of some plan rows: in each of T probed tiles `SAMPLES` that choose, and one that measures.

    Those that choose come first: of the tiles of one half the first sample of each, then the second and so on, then
    those of the other half; and then, in the same order of tiles, those that measure.
    """

    slots: Tensor  # int64 [N, (SAMPLES + 1) * T], of all
    choosing: Tensor  # int64 [N, SAMPLES * T], of those that choose
    own_tiles: Tensor  # int32 [N, SAMPLES * T], the tile of each one's own key, or of the nearest
    positions: Tensor  # int32 [N, SAMPLES * T], of each one
    weight: Tensor  # float [N, T], 0 for the tile of a modality that the prompt has not

    @classmethod
    def of(cls, rows: Rows) -> "Probes":
        scene = rows.scene
        last = scene.once("last queries", None, lambda: last_queries(scene.query_modality))
        query_slots = scene.once("query slots", None, lambda: slots(scene.arrangement.query_order))
        if last.device.type == "cuda":
            # Triton is imported for a GPU only.
            from mmcompile.kernels import probes_kernel

            return probes_kernel.place(rows, last, query_slots)
        return cls.of_cpu(rows, last, query_slots)

    @classmethod
    def of_cpu(cls, rows: Rows, last: Tensor, query_slots: Tensor) -> "Probes":
        """`of` in torch operations. last: int32 [B, MODALITIES], query_slots: int32 [B, Oq, Sq], position -> slot."""
        scene = rows.scene
        batch, orders, length = query_slots.shape
        of_last = query_slots.gather(2, last.clamp(min=0).long().unsqueeze(1).expand(-1, orders, -1)) // TILE
        of_last = of_last.masked_fill(last.unsqueeze(1) < 0, 0).long()
        spread = _spread(SPREAD, scene.query_tiles, last.device).expand(batch, orders, -1)
        tile = torch.cat([spread, of_last], 2).unflatten(2, (-1, 2)).transpose(2, 3)  # [B, Oq, halves, tiles]
        slot = _slots_of_tiles(scene.query_tiles, length, last.device)[:, tile]  # [samples, B, Oq, halves, tiles]
        choosing, measuring = slot[:SAMPLES].permute(1, 2, 3, 0, 4).flatten(2), slot[SAMPLES].flatten(2)
        every = rows.of_query_orders(torch.cat([choosing, measuring], 2))
        weight = torch.nn.functional.pad((last >= 0).float(), (SPREAD, 0), value=1.0)
        weight = weight.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1).repeat_interleave(len(rows.heads), 0)
        choosing = every[:, : SAMPLES * PROBED]
        positions = rows.at_queries(scene.arrangement.query_tags[:, :, 0], choosing)
        return cls(every, choosing, rows.own_tiles(choosing), positions, weight)

    @property
    def measuring(self) -> Tensor:
        """int64 [N, T]"""
        return self.slots[:, -PROBED:]


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


class Glance(NamedTuple):
    """What the probes of some plan rows attend to among all keys."""

    probes: Probes
    log_mass: Tensor  # float [N, R, nK], the logarithm of what each sample has on each key tile
    every: Tensor  # float [N, R], of its total
    counted: Tensor  # float [N, SAMPLES * T], of those that choose; -inf where their probe has no weight


def glance(rows: Rows) -> Glance:
    return rows.scene.once("glance", rows, lambda: _glance(rows))


def _glance(rows: Rows) -> Glance:
    probes = Probes.of(rows)
    log_mass = rows.tile_log_mass(probes.slots, None)
    return Glance(probes, log_mass, *_totals(log_mass, probes.weight))


def _totals(log_mass: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`Glance.every` and `Glance.counted`."""
    if log_mass.device.type == "cuda":
        from mmcompile.kernels import probes_kernel

        return probes_kernel.totals(log_mass, weight)
    return _totals_cpu(log_mass, weight)


def _totals_cpu(log_mass: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    every = torch.logsumexp(log_mass, -1)
    counts = weight.view(-1, 2, 1, PROBED // 2).expand(-1, -1, SAMPLES, -1).flatten(1) > 0
    return every, every[:, : SAMPLES * PROBED].masked_fill(~counts, NONE)


class Measured(NamedTuple):
    """Where the attention of the measuring queries lies: of each of M rows' T probed tiles one."""

    slot: Tensor  # int64 [M, T]
    log_mass: Tensor  # float [M, T, nK], the logarithm of what each has on each key tile, without the keys of columns
    every: Tensor  # float [M, T], of its total, with those
    outside: Tensor  # float [M, T], share of the keys of columns
    weight: Tensor  # float [M, T]
    row: Tensor  # int64 [N], which of the M rows a plan row is

    @classmethod
    def of(cls, rows: Rows, columns: Columns | None) -> "Measured":
        row = _every_row(rows.rows, rows.pair.device)
        if columns is None:
            seen = glance(rows)
            every, weight = seen.every[:, -PROBED:], seen.probes.weight
            weight = weight * (every > NONE)
            return cls(seen.probes.measuring, seen.log_mass[:, -PROBED:], every, torch.zeros_like(weight), weight, row)
        probes = Probes.of(rows)
        log_mass = rows.tile_log_mass(probes.measuring, columns.cold)
        _, total = tile_shares(log_mass)
        every = torch.logaddexp(total, rows.slots_log_mass(probes.measuring, columns.slots, columns.listed))
        weight = probes.weight * (every > NONE)
        return cls(probes.measuring, log_mass, every, _outside(total, every), weight, row)

    def recall(self, counts: Tensor, tiles: Tensor) -> Tensor:
        """Share of this attention that a plan computes: float [N], the mean over the probes.

        counts: int32 [N, nQ, 5], tiles: int32 [N, entries], as in `TilePlan`.
        """
        if counts.device.type == "cuda":
            from mmcompile.kernels import probes_kernel

            return probes_kernel.recall(self, counts, tiles)
        return self.recall_cpu(counts, tiles)

    def recall_cpu(self, counts: Tensor, tiles: Tensor) -> Tensor:
        """`recall` in torch operations."""
        slot, log_mass, every, outside, weight = (of.index_select(0, self.row) for of in self[:5])
        key_tiles = log_mass.shape[2]
        of_tile = counts.gather(1, (slot // TILE).unsqueeze(-1).expand(-1, -1, 5)).long()
        first, listed = of_tile[..., 0:1], of_tile[..., 1:2] + of_tile[..., 2:3]
        step = torch.arange(key_tiles, device=counts.device)
        entry = (first + step).clamp_(max=tiles.shape[1] - 1)
        tile = tiles.gather(1, entry.flatten(1)).view(entry.shape).long()
        tile = torch.where(step < listed, tile, key_tiles)
        computed = torch.zeros(*slot.shape, key_tiles + 1, device=slot.device).scatter_(-1, tile, 1.0)
        share = (log_mass - every.unsqueeze(-1)).exp_().nan_to_num_(0.0)
        return _mean((share * computed[..., :-1]).sum(-1) + outside, weight)


@lru_cache(maxsize=64)
def _every_row(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


class Sighting(NamedTuple):
    """What probes found in one pair of orders, or in the pair that each row chose."""

    measured: Measured
    columns: Columns | None


def choose_orders(
    scene: Scene,
    heads: tuple[int, ...],
    pairs: tuple[Pair, ...],
    by_site: tuple[bool, ...],
    columns: int,
    density: float | None,
) -> tuple[Rows, Sighting]:
    """For each head the pair of orders in which as many tiles hold the most attention, and what was seen there."""
    each = Rows.of_each_pair(scene, heads, pairs, by_site)
    seen, held = look(each, columns, density)
    if len(pairs) == 1:
        return each, seen
    site = by_site.index(True)  # the one order that is not raster order
    spread_out = _spread_out(scene, heads, pairs[site], _of_pair(seen.columns, scene.batch, len(pairs), site))
    *chosen, row = _choose(scene, held, seen.measured, spread_out, pairs, site, density)
    rows = Rows(scene, heads, pairs, by_site, *chosen)
    picked = None if seen.columns is None else Columns(*(of.index_select(0, row) for of in seen.columns))
    return rows, Sighting(seen.measured._replace(row=row), picked)


def look(rows: Rows, columns: int, density: float | None) -> tuple[Sighting, Tensor]:
    """Probe: find up to `columns` single keys, and what some queries of each probed tile attend to.

    Keys that become columns need no tiles in any order. density: share of the causal tiles that may be computed. The
    second result is how far the queries of each probed tile agree on tiles, float [N, T]: see `_agreement`.
    """
    probes, log_mass, every, _ = glance(rows)
    picked = _hot_keys(rows, glance(rows), columns, density)
    if picked is not None:
        log_mass = rows.tile_log_mass(probes.slots, picked.cold)
    wanted = max(1, round((UNCAPPED if density is None else density) * log_mass.shape[2] / 2))
    held, outside, weight = _agreement(log_mass, every, probes.weight, min(wanted, log_mass.shape[2]))
    row = _every_row(rows.rows, held.device)
    measured = Measured(probes.measuring, log_mass[:, -PROBED:], every[:, -PROBED:], outside, weight, row)
    return Sighting(measured, picked), held


def _agreement(log_mass: Tensor, every: Tensor, weight: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """How far queries of one tile agree on tiles, a share of their attention outside columns; the share of columns,
    and the weight of the probe, 0 where nothing is seen. float [N, T] each.

    The `wanted` tiles that some queries attend to most are tried on another: what they share is what a tile list can
    hold. Tiles that are wanted as much as the last one count in part.
    log_mass: float [N, R, nK] without the keys of columns, every: [N, R], of the totals with them.
    """
    if log_mass.device.type == "cuda":
        from mmcompile.kernels import probes_kernel

        return probes_kernel.agreement(log_mass, every, weight, wanted)
    return _agreement_cpu(log_mass, every, weight, wanted)


def _agreement_cpu(log_mass: Tensor, every: Tensor, weight: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    mass, total = tile_shares_cpu(log_mass)
    chooses = mass[:, : SAMPLES * PROBED].unflatten(1, (2, SAMPLES, -1)).sum(2).flatten(1, 2)
    tried, total, every = mass[:, -PROBED:], total[:, -PROBED:], every[:, -PROBED:]
    least = chooses.topk(wanted, -1).values[..., -1:]
    more, equal = chooses > least, chooses == least
    part = (wanted - more.sum(-1)) / equal.sum(-1)
    held = (tried * more).sum(-1) + (tried * equal).sum(-1) * part
    return held, _outside(total, every), weight * (every > NONE)


def _of_pair(columns: Columns | None, batch: int, pairs: int, index: int) -> Columns | None:
    """Those of one of the pairs of orders."""
    if columns is None:
        return None
    return Columns(*(of.unflatten(0, (batch, pairs, -1))[:, index].flatten(0, 1) for of in columns))


def _spread_out(scene: Scene, heads: tuple[int, ...], pair: Pair, columns: Columns | None) -> Tensor:
    """Of some queries of an order by site, what each puts where tiles are not worth listing: float [N, 2 * SEARCHED].

    An order by site holds that by computing whole query tiles, those of sites whose queries look at everything. They
    are few, so that the other probes seldom meet one; and no other order makes them few.
    """
    rows = Rows.of_each_pair(scene, heads, (pair,), (True,))
    slot = _searched_slots(scene.query_tiles, scene.query_length, rows.pair.device).expand(rows.rows, -1)
    log_mass = rows.tile_log_mass(slot, None if columns is None else columns.cold)
    if columns is None:
        in_columns = log_mass.new_full(slot.shape, NONE)
    else:
        in_columns = rows.slots_log_mass(slot, columns.slots, columns.listed)
    return spread_out_share(log_mass, in_columns, SPREAD_OUT)


def _choose(
    scene: Scene,
    held: Tensor,
    measured: Measured,
    spread_out: Tensor,
    pairs: tuple[Pair, ...],
    site: int,
    density: float | None,
) -> tuple[Tensor, ...]:
    """The pair of orders of each head: its query order and key order, int32 [B, heads]; the index of the pair among
    those of all batch rows, and of the head's row among M, int64 [B * heads].

    held: float [M, T], M = B * pairs * heads. spread_out: of `pairs[site]`. What horizontal lines hold counts for an
    order by site, where the tiles that it takes to compute them are no more than half of what the budget is for.
    """
    of_queries = scene.arrangement.query_site
    searched = _searched_slots(scene.query_tiles, of_queries.shape[2], held.device)
    most = (UNCAPPED if density is None else density) / 2
    found = held, measured.outside, measured.weight, spread_out
    if held.device.type == "cuda":
        from mmcompile.kernels import probes_kernel

        return probes_kernel.choose(*found, searched, of_queries, pairs, site, most)
    return _choose_cpu(*found, searched, of_queries, pairs, site, most)


def _choose_cpu(
    held: Tensor,
    outside: Tensor,
    weight: Tensor,
    spread_out: Tensor,
    searched: Tensor,
    query_site: Tensor,
    pairs: tuple[Pair, ...],
    site: int,
    most: float,
) -> tuple[Tensor, ...]:
    batch = query_site.shape[0]
    shape = batch, len(pairs), held.shape[0] // (batch * len(pairs))
    within = weight * (1.0 - outside)
    share = _mean(held, within).unflatten(0, shape)
    share[:, 0] += RASTER_LEAD
    # Text has no site. A query counts for as much as it and its neighbour both put outside other lines.
    sited = query_site[:, pairs[site][0]][:, searched].unsqueeze(1) >= 0
    outer = (spread_out.unflatten(0, (batch, -1)) * sited).unflatten(2, (2, -1)).amin(2)
    # Where many queries spread out half as much, this order is the wrong one for what they look at.
    exceptional = (outer > HORIZONTAL / 2).float().mean(-1) <= most
    lines = (outer * (outer > HORIZONTAL)).mean(-1) * exceptional
    share[:, site] += lines / _mean(1.0 - outside, weight).unflatten(0, shape)[:, site].clamp(min=1e-6)
    choice = share.argmax(1)  # [B, heads]
    orders = (torch.tensor(of, dtype=torch.int32, device=held.device)[choice] for of in zip(*pairs, strict=True))
    batch_row = torch.arange(batch, device=held.device).unsqueeze(1)
    pair = batch_row * len(pairs) + choice
    return *orders, pair.flatten(), (pair * shape[2] + torch.arange(shape[2], device=held.device)).flatten()


def _hot_keys(rows: Rows, seen: Glance, columns: int, density: float | None) -> Columns | None:
    """Keys that queries of all probed tiles attend to, up to `columns` and to half of the budget."""
    keys = rows.scene.key_tags.shape[2]
    # Of a query tile's causal tiles, half of all, two at least are mandatory: its own and the first.
    share = UNCAPPED if density is None else density
    share = max(0.0, min(share / 2, share - 4 / rows.scene.key_tiles))
    room = min(columns, keys, math.ceil(share * keys))
    if room == 0:
        return None
    probes = seen.probes
    mass = rows.column_mass(probes.choosing, seen.counted, probes.own_tiles, NEAR_TILES, groups=2)
    return Columns.of(rows, _hot_weight(rows, probes.positions, seen.counted, mass), room)


def _hot_weight(rows: Rows, positions: Tensor, counted: Tensor, mass: Tensor) -> Tensor:
    """Mean weight of each key in two halves of the probed tiles, whichever is less: float [N, Sk] in key slots, 0 where
    that is not `HOT`.

    The queries of one tile may share what they look at (their own site), and a mean over few tiles would take that for
    what all look at. A key that one half is too early to see has the other's weight. positions: int32
    [N, SAMPLES * T], counted: float, the log of each query's sum, -inf for those that do not count. mass: float
    [N, 2, Sk].
    """
    if mass.device.type == "cuda":
        from mmcompile.kernels import probes_kernel

        return probes_kernel.hot_weight(rows, positions, counted, mass)
    return _hot_weight_cpu(rows, positions, counted, mass)


def _hot_weight_cpu(rows: Rows, positions: Tensor, counted: Tensor, mass: Tensor) -> Tensor:
    last = positions.masked_fill(counted == NONE, -1).unflatten(1, (2, -1)).amax(-1)
    both_see = rows.of_key_orders(rows.scene.arrangement.key_tags[:, :, 0]) <= last.amin(1, True)
    least, most = mass.aminmax(dim=1)
    weight = torch.where(both_see, least, most)
    return weight.masked_fill_(weight * weight.shape[1] <= HOT, 0.0)


def _outside(total: Tensor, every: Tensor) -> Tensor:
    """Share of the attention outside some keys, from the logs of their total and of all: 0 where a row has none."""
    return 1.0 - (total - every).exp().nan_to_num(1.0)


def _mean(figure: Tensor, weight: Tensor) -> Tensor:
    """[N, T] to [N]."""
    return (figure * weight).sum(-1) / weight.sum(-1).clamp(min=1e-6)
