"""How far a sparse attention is from dense, in query tiles that are drawn anew for each prefill.

Streamed over the keys, so that memory stays bounded at any length; nothing waits for the host. The softmax of a query
does not care in which order its keys come, so keys and their tags are taken as the plan has them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.head_indices import head_indices
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_bounds import tile_count
from mmcompile.kernels.tile_walk import TileWalk

KEYS_AT_ONCE = 32 * TILE  # in torch operations
ELEMENTS_AT_ONCE = 2**25  # of scores in float32, 128 MiB; where a kernel has no scores, of a query tile's keys
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
    for part in drawn.split(_at_once(query.device, key.shape[2])):
        one = Drawn.of(part, query_order, walk, heads, query_length)
        dense, held = _attend(one, query, key, value, walk, scale)
        wrong = (one.rows_of(output) - dense).square().sum(-1)
        figures = torch.stack([wrong, dense.square().sum(-1), held.nan_to_num(0.0), (~held.isnan()).float()], -1)
        sums.index_add_(0, one.head, figures.masked_fill(~one.inside.unsqueeze(-1), 0.0).sum(1))
    wrong, norm, held, queries = sums.unbind(1)
    # A head whose values are all 0 is right whatever it computes.
    error = (wrong / norm.clamp(min=1e-30)).sqrt().masked_fill(queries == 0, torch.nan)
    return error, held / queries  # 0 / 0 is NaN: none of the head's tiles was drawn


def _at_once(device: torch.device, key_length: int) -> int:
    """Query tiles of which everything that is made takes bounded memory."""
    each = key_length if device.type == "cuda" else TILE * min(KEYS_AT_ONCE, key_length)
    return max(1, ELEMENTS_AT_ONCE // each)


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


class Drawn(NamedTuple):
    """N query tiles, each of one head of one sequence; contiguous."""

    batch: Tensor  # int64 [N]
    head: Tensor  # int64 [N]
    copy: Tensor  # int64 [N], of the keys
    key_row: Tensor  # int64 [N], the key order
    token: Tensor  # int64 [N, TILE], the queries of the tile, the last one again where it is not whole
    inside: Tensor  # bool [N, TILE], False there
    query_tags: Tensor  # int32 [N, 3, TILE]
    computed: Tensor  # bool [N, Sk], the keys that the plan computes, where the mask allows them

    @classmethod
    def of(cls, tiles: Tensor, query_order: Tensor, walk: TileWalk, heads: int, query_length: int) -> "Drawn":
        """tiles: int64 [N], counted over batch, heads and query tiles."""
        of_head = tile_count(query_length)
        batch, head, tile = tiles // (of_head * heads), tiles // of_head % heads, tiles % of_head
        plan, first_copy = (head_indices(of, tiles.device).long()[head] for of in (walk.head_plan, walk.key_head))
        query_row, key_row = walk.query_row[batch, plan].long(), walk.key_row[batch, plan].long()
        slot = tile.unsqueeze(1) * TILE + torch.arange(TILE, device=tiles.device)
        inside = slot < query_length
        slot = slot.clamp_(max=query_length - 1)
        token = query_order[batch, query_row].gather(1, slot).long()
        query_tags = walk.query_tags[batch, query_row].gather(2, slot.unsqueeze(1).expand(-1, 3, -1))
        computed = _computed(walk, batch, plan, tile)
        return cls(batch, head, first_copy + key_row, key_row, token, inside, query_tags, computed)

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows of these queries in x [B, H, Sq, D]: float32 [N, TILE, D]."""
        return x[self.batch.unsqueeze(1), self.head.unsqueeze(1), self.token].float()


def _attend(
    drawn: Drawn, query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention of drawn queries, float32 [N, TILE, D], 0 where one has no key; and what the plan's tiles and
    single keys hold of its softmax, float32 [N, TILE], NaN there."""
    if query.device.type == "cuda":
        # Triton is imported for a GPU only.
        from mmcompile.kernels import compare_with_dense_kernel

        return compare_with_dense_kernel.attend(drawn, query, key, value, walk, scale)
    return _attend_cpu(drawn, query, key, value, walk, scale)


def _attend_cpu(
    drawn: Drawn, query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float
) -> tuple[Tensor, Tensor]:
    """`_attend` in torch operations, streamed over the keys."""
    rows = drawn.rows_of(query) * scale
    highest = rows.new_full(rows.shape[:2], LOWEST)
    total, held = torch.zeros_like(highest), torch.zeros_like(highest)
    result = torch.zeros_like(rows)
    tags = walk.key_tags[drawn.batch, drawn.key_row]  # [N, 3, Sk]
    for start in range(0, key.shape[2], KEYS_AT_ONCE):
        keys = slice(start, start + KEYS_AT_ONCE)
        scores = rows @ key[drawn.batch, drawn.copy, keys].float().transpose(1, 2)  # [N, TILE, K]
        scores.masked_fill_(~walk.allowed(drawn.query_tags, tags[..., keys]), float("-inf"))
        before, highest = highest, torch.maximum(highest, scores.amax(-1))
        weights = scores.sub_(highest.unsqueeze(-1)).exp_()
        shrink = (before - highest).exp_()
        total = total * shrink + weights.sum(-1)
        held = held * shrink + (weights @ drawn.computed[:, keys].float().unsqueeze(-1)).squeeze(-1)
        result = result * shrink.unsqueeze(-1) + weights @ value[drawn.batch, drawn.copy, keys].float()
    dense = (result / total.unsqueeze(-1)).masked_fill_(total.unsqueeze(-1) == 0, 0.0)
    return dense, held / total


def _computed(walk: TileWalk, batch: Tensor, plan: Tensor, tile: Tensor) -> Tensor:
    """`Drawn.computed`. batch, plan, tile: int64 [N]."""
    first, full, partial, start, single = walk.counts[batch, plan, tile].long().unbind(1)
    key_length = walk.key_tags.shape[3]
    tiles = torch.zeros(len(tile), tile_count(key_length) + 1, dtype=torch.int8, device=tile.device)
    for kind, begin, count in ((2, first, full), (1, first + full, partial)):
        _mark(tiles, walk.tiles, batch, plan, begin, count, kind)
    of_key = tiles[:, :-1].repeat_interleave(TILE, 1)[:, :key_length]
    if not walk.columns.shape[2]:
        return of_key > 0
    columns = torch.zeros(len(tile), key_length + 1, dtype=torch.bool, device=tile.device)
    _mark(columns, walk.columns, batch, plan, start, single, True)
    return (of_key == 2) | ((of_key == 1) & walk.cold[batch, plan]) | columns[:, :-1]


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
