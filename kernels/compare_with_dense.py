"""How far a sparse attention is from dense, in query tiles that are drawn anew for each prefill.

Exact in float32, streamed over the keys, so that memory stays bounded at any length; nothing waits for the host. The
softmax of a query does not care in which order its keys come, so keys and their tags are taken as the plan has them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_bounds import tile_count
from mmcompile.kernels.tile_walk import TileWalk

KEYS_AT_ONCE = 32 * TILE
SCORES_AT_ONCE = 2**25  # in float32: 128 MiB
LOWEST = -1e30  # the running maximum before the first key: finite, so that no difference is NaN


def compare_with_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_order: Tensor,
    walk: TileWalk,
    scale: float,
    seed: Tensor,
    site: int,
    share: float,
) -> tuple[Tensor, Tensor]:
    """The op of that name; arguments as there. float32 [H] each."""
    batch, heads, query_length, _ = query.shape
    drawn = draw_tiles(seed, site, share, batch * heads * tile_count(query_length))
    sums = torch.zeros(heads, 4, device=query.device)  # squared error, squared norm, held share, queries
    keys_at_once = min(KEYS_AT_ONCE, tile_count(key.shape[2]) * TILE)
    for part in drawn.split(max(1, SCORES_AT_ONCE // (TILE * keys_at_once))):
        one = _Drawn.of(part, query_order, walk, heads, query_length)
        dense, held = one.attend(query, key, value, walk, scale, keys_at_once)
        wrong = (one.rows_of(output) - dense).square().sum(-1)
        figures = torch.stack([wrong, dense.square().sum(-1), held.nan_to_num(0.0), (~held.isnan()).float()], -1)
        sums.index_add_(0, one.head, figures.masked_fill(~one.inside.unsqueeze(-1), 0.0).sum(1))
    wrong, norm, held, queries = sums.unbind(1)
    # A head whose values are all 0 is right whatever it computes.
    error = (wrong / norm.clamp(min=1e-30)).sqrt().masked_fill(queries == 0, torch.nan)
    return error, held / queries  # 0 / 0 is NaN: none of the head's tiles was drawn


def draw_tiles(seed: Tensor, site: int, share: float, tiles: int) -> Tensor:
    """A random one of each run of as many tiles, int64 [N], rising; at least one, and all of them where share is 1.

    seed: int64 [1], on the device. site: another draws other tiles.
    """
    count = max(1, min(tiles, round(share * tiles)))
    run = torch.arange(count + 1, device=seed.device)
    edges = run * tiles // count
    random = _hash(_hash(_hash(seed) + site) + run[:-1])  # below 2^32
    return edges[:-1] + (random * edges.diff() >> 32)


def _hash(number: Tensor) -> Tensor:
    """32 bits that look random, of numbers from 0 on; no state, so that a prefill's draw is its seed's. int64."""
    number = number & 0xFFFFFFFF
    number = ((number ^ number >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    number = ((number ^ number >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return number ^ number >> 16


class _Drawn(NamedTuple):
    """N query tiles, each of one head of one sequence."""

    batch: Tensor  # int64 [N]
    head: Tensor  # int64 [N]
    key_row: Tensor  # int64 [N], the key order
    token: Tensor  # int64 [N, TILE], the queries of the tile, the last one again where it is not whole
    inside: Tensor  # bool [N, TILE], False there
    query_tags: Tensor  # int32 [N, 3, TILE]
    listed: Tensor  # int64 [N, nK]: 2 for a full tile, 1 for a partial one, 0 for none
    single: Tensor  # bool [N, Sk], the single keys

    @classmethod
    def of(cls, tiles: Tensor, query_order: Tensor, walk: TileWalk, heads: int, query_length: int) -> "_Drawn":
        """tiles: int64 [N], counted over batch, heads and query tiles."""
        of_head = tile_count(query_length)
        batch, head, tile = tiles // (of_head * heads), tiles // of_head % heads, tiles % of_head
        row = head_indices(walk.head_plan, tiles.device).long()[head]
        query_row, key_row = walk.query_row[batch, row].long(), walk.key_row[batch, row].long()
        slot = tile.unsqueeze(1) * TILE + torch.arange(TILE, device=tiles.device)
        inside = slot < query_length
        slot = slot.clamp(max=query_length - 1)
        token = query_order[batch, query_row].gather(1, slot).long()
        query_tags = walk.query_tags[batch, query_row].gather(2, slot.unsqueeze(1).expand(-1, 3, -1))
        first, full, partial, start, single = walk.counts[batch, row, tile].long().unbind(1)
        key_length = walk.key_tags.shape[3]
        listed = torch.zeros(len(tiles), tile_count(key_length) + 1, dtype=torch.int64, device=tiles.device)
        for kind, begin, count in ((2, first, full), (1, first + full, partial)):
            _mark(listed, walk.tiles, batch, row, begin, count, kind)
        columns = torch.zeros(len(tiles), key_length + 1, dtype=torch.bool, device=tiles.device)
        _mark(columns, walk.columns, batch, row, start, single, True)
        return cls(batch, head, key_row, token, inside, query_tags, listed[:, :-1], columns[:, :-1])

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows of these queries in x [B, H, Sq, D]: float32 [N, TILE, D]."""
        return x[self.batch.unsqueeze(1), self.head.unsqueeze(1), self.token].float()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float, at_once: int
    ) -> tuple[Tensor, Tensor]:
        """Dense attention of these queries, float32 [N, TILE, D], 0 where a query has no key; and what the plan's
        tiles and single keys hold of its softmax, float32 [N, TILE], NaN there."""
        rows = self.rows_of(query) * scale
        highest = rows.new_full(rows.shape[:2], LOWEST)
        total, held = torch.zeros_like(highest), torch.zeros_like(highest)
        result = torch.zeros_like(rows)
        copy = head_indices(walk.key_head, rows.device).long()[self.head] + self.key_row
        tags = walk.key_tags[self.batch, self.key_row]  # [N, 3, Sk]
        computed = self._computed(walk)
        for start in range(0, key.shape[2], at_once):
            keys = slice(start, start + at_once)
            scores = rows @ key[self.batch, copy, keys].float().transpose(1, 2)  # [N, TILE, K]
            scores.masked_fill_(~walk.allowed(self.query_tags, tags[..., keys]), float("-inf"))
            before, highest = highest, torch.maximum(highest, scores.amax(-1))
            weights = scores.sub_(highest.unsqueeze(-1)).exp_()
            shrink = (before - highest).exp_()
            total = total * shrink + weights.sum(-1)
            held = held * shrink + (weights @ computed[:, keys].float().unsqueeze(-1)).squeeze(-1)
            result = result * shrink.unsqueeze(-1) + weights @ value[self.batch, copy, keys].float()
        result = (result / total.unsqueeze(-1)).masked_fill_(total.unsqueeze(-1) == 0, 0.0)
        return result, (held / total).clamp_(max=1.0)

    def _computed(self, walk: TileWalk) -> Tensor:
        """Which keys the plan computes, where the mask allows them: bool [N, Sk]."""
        of_key = self.listed.repeat_interleave(TILE, 1)[:, : self.single.shape[1]]
        if not walk.columns.shape[2]:
            return of_key > 0
        row = head_indices(walk.head_plan, self.head.device).long()[self.head]
        return (of_key == 2) | ((of_key == 1) & walk.cold[self.batch, row]) | self.single


def _mark(
    marks: Tensor, lists: Tensor, batch: Tensor, row: Tensor, first: Tensor, count: Tensor, mark: int | bool
) -> None:
    """Mark in row n of `marks` the `count[n]` entries from `first[n]` on of a plan's list, lists[batch[n], row[n]].

    lists: int32 [B, P, T]. The last column of `marks` is for entries that are none.
    """
    none = marks.shape[1] - 1
    step = torch.arange(min(none, lists.shape[2]), device=marks.device)
    entry = (first.unsqueeze(1) + step).clamp_(max=lists.shape[2] - 1)
    listed = lists[batch.unsqueeze(1), row.unsqueeze(1), entry].long()
    marks.scatter_(1, torch.where(step < count.unsqueeze(1), listed, none), mark)
