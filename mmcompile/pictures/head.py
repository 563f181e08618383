"""One attention head: what it really attends to, and what a plan computes of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompile.kernels.attend import Planned
from mmcompile.kernels.orders import slots
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tags import TokenMask, element_mask, token_tags
from mmcompile.passes.record_attention import SeenAttention


@dataclass(frozen=True, eq=False)
class Head:
    """Queries and keys of one head of one sequence, in token order.

    query: [Sq, D], key: [Sk, D], float32. query_tags: int32 [3, Sq], key_tags: int32 [3, Sk], of the mask, with window,
    segments and spans as `element_mask` takes them. scale: of the scores.
    """

    query: Tensor
    key: Tensor
    query_tags: Tensor
    key_tags: Tensor
    scale: float
    window: int | None = None
    segments: bool = False
    spans: bool = False

    @classmethod
    def of(cls, seen: SeenAttention, head: int, batch: int = 0) -> "Head":
        """One head of an attention."""
        (_, heads, query_length, _), (_, kv_heads, key_length, _) = seen.query.shape, seen.key.shape
        device = seen.query.device
        parts = (*(seen.segments or (None, None)), *(seen.spans or (None, None)), seen.key_valid)
        of_query, of_key, span_of_query, span_of_key, valid = (
            None if part is None else part.expand(len(seen.query), -1)[batch : batch + 1] for part in parts
        )
        return cls(
            seen.query[batch, head].float(),
            seen.key[batch, head // (heads // kv_heads)].float(),
            token_tags(TokenMask(seen.query_offset, None, of_query, span_of_query), 1, query_length, device)[0],
            token_tags(TokenMask(0, valid, of_key, span_of_key), 1, key_length, device)[0],
            seen.scale,
            seen.window,
            seen.segments is not None,
            seen.spans is not None,
        )

    def allowed(self, queries: Tensor) -> Tensor:
        """Which keys some queries may use. queries: int64 [R]. Returns bool [R, Sk]."""
        return element_mask(self.query_tags[:, queries], self.key_tags, self.window, self.segments, self.spans)

    def weights(self, queries: Tensor, allowed: Tensor) -> Tensor:
        """The softmax of some queries over their allowed keys, float32 [R, Sk]; 0 in a row that has none."""
        scores = self.query[queries] @ self.key.T * self.scale  # [R, Sk]
        scores.masked_fill_(~allowed, float("-inf"))
        return scores.softmax(-1).masked_fill_(~allowed.any(-1, keepdim=True), 0.0)


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """What a plan computes of one head.

    query_order: int64 [Sq], key_order: int64 [Sk], slot -> token. tiles: bool [nQ, nK], tiles of slots that are
    computed. columns: of each query tile the slots of its single keys.
    density: computed tiles over those of dense attention. recall: the planner's own estimate, NaN where it made none.
    """

    query_order: Tensor
    key_order: Tensor
    tiles: Tensor
    columns: tuple[Tensor, ...]
    density: float
    recall: float

    @classmethod
    def of(cls, planned: Planned, head: int, batch: int = 0) -> "HeadPlan":
        """The plan of one head of an attention."""
        row, lists, arrangement = planned.rows.of_head[head], planned.lists, planned.arrangement
        query_order = arrangement.query_order[batch, lists.query_row[batch, row]].long()
        key_order = arrangement.key_order[batch, lists.key_row[batch, row]].long()
        counts = lists.counts[batch, row].tolist()
        tiles = torch.zeros(len(counts), -(-len(key_order) // TILE), dtype=torch.bool, device=key_order.device)
        columns = []
        for of_tile, (first, full, partial, first_column, single) in zip(tiles, counts, strict=True):
            of_tile[lists.tiles[batch, row, first : first + full + partial].long()] = True
            columns.append(lists.columns[batch, row, first_column : first_column + single].long())
        figures = (float(figure[batch, row]) for figure in (planned.density, planned.recall))
        return cls(query_order, key_order, tiles, tuple(columns), *figures)

    def query_tiles(self) -> tuple[Tensor, ...]:
        """The queries of each tile, int64 [at most 128] each."""
        return self.query_order.split(TILE)

    def keys_of(self, query_tile: int) -> Tensor:
        """Which keys are computed for the queries of one tile, as far as the mask allows: bool [Sk] in token order."""
        in_slots = self.tiles[query_tile].repeat_interleave(TILE)[: len(self.key_order)]
        in_slots = in_slots.index_fill(0, self.columns[query_tile], True)
        return torch.empty_like(in_slots).index_copy_(0, self.key_order, in_slots)

    def computed(self, queries: Tensor) -> Tensor:
        """The same for any queries. queries: int64 [R]. Returns bool [R, Sk]."""
        tile_of_query = slots(self.query_order.int()).long()[queries] // TILE
        tiles, index = tile_of_query.unique(return_inverse=True)
        return torch.stack([self.keys_of(tile) for tile in tiles.tolist()])[index]
