"""What every planner of one attention looks at, and the plan rows it plans for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmcompile.kernels.arrange import Arrangement
from mmcompile.kernels.head_indices import batch_rows, head_indices
from mmcompile.kernels.orders import modalities, slots
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_bounds import TileBounds, by_tile, tile_count
from mmcompile.kernels.tile_mass import (
    KeyPositions,
    SampledRows,
    column_mass,
    slots_log_mass,
    tile_log_mass,
    tile_shares,
)

Made = TypeVar("Made")
Pair = tuple[int, int]  # a row of the query orders, a row of the key orders


@dataclass(frozen=True, eq=False)
class Scene:
    """One attention: lengths are Sq and Sk, Oq and Ok its orders."""

    query: Tensor | None  # [B, H, Sq, D] in token order
    key: Tensor | None  # [B, KV * Ok, Sk, D]: each key head in each key order, in slot order
    arrangement: Arrangement
    query_tags: Tensor  # int32 [B, 3, Sq] in token order
    key_tags: Tensor  # int32 [B, 3, Sk] in token order
    raster: tuple[int | None, int | None]  # the orders of queries and of keys in which slots are positions
    offsets: Tensor  # int32 [M + 1], of the segments of the query tokens
    modality: Tensor  # int32 [M]
    query_offset: int
    scale: float
    window: int | None
    segments: bool
    spans: bool
    made: dict[tuple[str, Any], Any] = field(default_factory=dict)  # what several planners ask for

    @property
    def batch(self) -> int:
        return self.arrangement.query_order.shape[0]

    @property
    def query_tiles(self) -> int:
        return tile_count(self.arrangement.query_order.shape[2])

    @property
    def key_tiles(self) -> int:
        return tile_count(self.arrangement.key_order.shape[2])

    @property
    def query_length(self) -> int:
        return self.arrangement.query_order.shape[2]

    @property
    def query_modality(self) -> Tensor:
        """int32 [B, Sq] in token order."""
        return self._modalities()[0]

    @property
    def key_modality(self) -> Tensor:
        """int32 [B, Sk] in token order."""
        return self._modalities()[1]

    def _modalities(self) -> tuple[Tensor, Tensor]:
        sizes = self.batch, self.query_length, self.key_tags.shape[2], self.query_offset
        return self.once("modalities", None, lambda: modalities(self.offsets, self.modality, *sizes))

    def pair_tags(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Tags of queries and keys in each pair of orders, int32 [O, 3, Sq] and [O, 3, Sk]."""
        queries = [self.arrangement.query_tags[:, query] for query, _ in pairs]
        keys = [self.arrangement.key_tags[:, key] for _, key in pairs]
        return (queries[0], keys[0]) if len(pairs) == 1 else (each_pair(queries), each_pair(keys))

    def bounds(self, pairs: tuple[Pair, ...]) -> TileBounds:
        """The tiles of each pair of orders."""
        return self.once("bounds", pairs, lambda: self._bounds(*self.pair_tags(pairs)))

    def raster_bounds(self) -> TileBounds:
        """The tiles of queries and keys in token order."""
        query, key = self.raster
        if query is not None and key is not None:
            return self.bounds(((query, key),))
        return self.once("raster bounds", None, lambda: self._bounds(self.query_tags, self.key_tags))

    def _bounds(self, query_tags: Tensor, key_tags: Tensor) -> TileBounds:
        return TileBounds.of(query_tags, key_tags, self.window, self.segments, self.spans)

    def key_slots(self) -> Tensor:
        """int32 [B, Ok, Sk], position -> slot of each key order."""
        order = self.arrangement.key_order
        if self.keys_in_raster:
            return order  # its own inverse
        return self.once("key slots", None, lambda: slots(order))

    @property
    def keys_in_raster(self) -> bool:
        """Whether key slots are positions in every order."""
        return self.arrangement.key_order.shape[1] == 1 and self.raster[1] is not None

    def key_slot(self, row: int) -> Tensor:
        """int32 [B, Sk], position -> slot of a key order."""
        return self.key_slots()[:, row]

    def own_slot(self, pair: Pair) -> Tensor:
        """The key slot of each query slot's own token, int64 [B, Sq]; of the nearest key where it has none."""
        return self.once("own slot", pair, lambda: self._own_slot(pair))

    def last_positions(self) -> Tensor:
        """The greatest position of each query tile in each order, int32 [B, Oq, nQ]."""
        tags = self.arrangement.query_tags
        return self.once("last positions", None, lambda: by_tile(tags[:, :, 0], -1).amax(-1))

    def key_positions(self) -> KeyPositions:
        return self.once("key positions", None, lambda: KeyPositions.of(self.arrangement.key_tags))

    def _own_slot(self, pair: Pair) -> Tensor:
        position = self.arrangement.query_tags[:, pair[0], 0].long()
        return self.key_slot(pair[1]).gather(-1, position.clamp(0, self.key_tags.shape[-1] - 1)).long()

    def once(self, what: str, of: Any, make: Callable[[], Made]) -> Made:
        """What `make` gives, made the first time. of: what tells it from others of that name."""
        if (what, of) not in self.made:
            self.made[what, of] = make()
        made: Made = self.made[what, of]
        return made


@dataclass(frozen=True, eq=False)
class Rows:
    """The plan rows of some heads that share a pattern: N = B * heads, the heads of one batch row together."""

    scene: Scene
    heads: tuple[int, ...]
    pairs: tuple[Pair, ...]
    by_site: tuple[bool, ...]  # of each pair, whether tokens stand by site
    query_row: Tensor  # int32 [B, heads], the query order of each
    key_row: Tensor  # int32 [B, heads], the key order of each
    pair: Tensor  # int64 [N], index into the pairs of all batch rows, [B * pairs]

    @classmethod
    def of_each_pair(
        cls, scene: Scene, heads: tuple[int, ...], pairs: tuple[Pair, ...], by_site: tuple[bool, ...]
    ) -> "Rows":
        """Each head in each pair of orders, the heads of one pair together."""
        device = scene.arrangement.query_order.device
        pair = tuple(index for index in range(len(pairs)) for _ in heads)
        query_row, key_row = (
            head_indices(tuple(order[index] for index in pair) * scene.batch, device).view(scene.batch, -1)
            for order in zip(*pairs, strict=True)
        )
        of_row = batch_rows(scene.batch * len(pairs), len(heads), device)
        return cls(scene, heads * len(pairs), pairs, by_site, query_row, key_row, of_row)

    @property
    def rows(self) -> int:
        """N."""
        return self.scene.batch * len(self.heads)

    @property
    def _batch(self) -> Tensor:
        """int64 [B, 1]"""
        return batch_rows(self.scene.batch, 1, self.pair.device).unsqueeze(1)

    @cached_property
    def _query_order(self) -> tuple[Tensor, Tensor]:
        """Index of each row into what is known of each query order, [B, Oq, ...]."""
        return self._batch, self.query_row.long()

    @cached_property
    def _key_order(self) -> tuple[Tensor, Tensor]:
        """Index of each row into what is known of each key order, [B, Ok, ...]."""
        return self._batch, self.key_row.long()

    def of_pairs(self, of_pair: Sequence[Tensor]) -> Tensor:
        """What is known of each pair, [B, ...] each, for the rows: [N, ...]."""
        return each_pair(of_pair).index_select(0, self.pair)

    def of_query_orders(self, of_order: Tensor) -> Tensor:
        """What is known of each query order, [B, Oq, ...], for the rows: [N, ...]."""
        return self._of_orders(of_order, self._query_order)

    def of_key_orders(self, of_order: Tensor) -> Tensor:
        """What is known of each key order, [B, Ok, ...], for the rows: [N, ...]."""
        return self._of_orders(of_order, self._key_order)

    def _of_orders(self, of_order: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
        if of_order.shape[1] == 1:  # mostly without a copy
            return of_order.expand(-1, len(self.heads), *of_order.shape[2:]).flatten(0, 1)
        return of_order[index].flatten(0, 1)

    def at_queries(self, of_order: Tensor, slot: Tensor) -> Tensor:
        """What is known of the slots of each query order, [B, Oq, Sq], in slots int64 [N, R] of the rows: [N, R]."""
        batch, order = self._query_order
        return of_order[batch.unsqueeze(2), order.unsqueeze(2), self._by_head(slot)].flatten(0, 1)

    def at_keys(self, of_order: Tensor, slot: Tensor) -> Tensor:
        """What is known of the slots of each key order, [B, Ok, Sk], in slots int64 [N, R] of the rows: [N, R]."""
        batch, order = self._key_order
        return of_order[batch.unsqueeze(2), order.unsqueeze(2), self._by_head(slot)].flatten(0, 1)

    def last_positions(self) -> Tensor:
        """The greatest position of each query tile, int32 [N, nQ]."""
        return self.of_query_orders(self.scene.last_positions())

    def own_tiles(self, slot: Tensor) -> Tensor:
        """The key tile of each sampled query's own token, or of the nearest key where it has none.

        slot: int64 [N, R]. Returns int32 [N, R].
        """
        if slot.device.type == "cuda":
            from mmcompile.kernels import scene_kernel

            return scene_kernel.own_tiles(self, slot)
        return self.own_tiles_cpu(slot)

    def own_tiles_cpu(self, slot: Tensor) -> Tensor:
        """`own_tiles` in torch operations."""
        position = self.at_queries(self.scene.arrangement.query_tags[:, :, 0], slot).long()
        return self.at_keys(self.scene.key_slots(), position.clamp(0, self.scene.key_tags.shape[-1] - 1)) // TILE

    def tile_mass(self, slot: Tensor, cold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax of sampled queries by key tile. slot: int64 [N, R], query slots. cold: bool [N, Sk].

        Returns the share of each tile among the keys that are cold, float [N, R, nK], and the log of their total,
        [N, R].
        """
        return tile_shares(self.tile_log_mass(slot, cold))

    def tile_log_mass(self, slot: Tensor, cold: Tensor | None) -> Tensor:
        """Log of the sum of exp(score) of sampled queries over each key tile, float [N, R, nK]. As `tile_mass`."""
        return tile_log_mass(self._sampled(slot), None if cold is None else self._by_head(cold)).flatten(0, 1)

    def slots_log_mass(self, slot: Tensor, key_slot: Tensor, listed: Tensor) -> Tensor:
        """Log of the sum of exp(score) of sampled queries over the first keys of a list: float [N, R].

        slot: int64 [N, R], query slots. key_slot: int32 [N, C]. listed: int32 [N], how many of them count.
        """
        return slots_log_mass(self._sampled(slot), self._by_head(key_slot), self._by_head(listed)).flatten(0, 1)

    def key_mass(self, slot: Tensor, total: Tensor, skip_tiles: int, groups: int = 1) -> Tensor:
        """`column_mass` of queries whose own tiles nobody has looked up."""
        own = self.own_tiles(slot) if skip_tiles else torch.empty_like(total, dtype=torch.int32)  # near nothing
        return self.column_mass(slot, total, own, skip_tiles, groups)

    def column_mass(self, slot: Tensor, total: Tensor, own_tile: Tensor, skip_tiles: int, groups: int = 1) -> Tensor:
        """Mean weight of each key over the sampled queries that see it, float [N, groups, Sk] in key slots, the keys of
        the `skip_tiles` latest tiles left out. groups: runs of the samples with means of their own.

        slot: int64 [N, R], query slots. total: float [N, R], the log of each query's sum, -inf for those that do not
        count. own_tile: int32 [N, R].
        """
        sampled = self._sampled(slot)
        return column_mass(sampled, self._by_head(total), self._by_head(own_tile), skip_tiles, groups).flatten(0, 1)

    def _by_head(self, of_row: Tensor) -> Tensor:
        """[N, ...] as [B, heads, ...]."""
        return of_row.unflatten(0, (self.scene.batch, -1))

    def of_copies(self, of_copy: Tensor) -> Tensor:
        """What is known of each key copy, [B, C, ...], for the rows: [N, ...]."""
        copy = head_indices(self.first_copies, self.pair.device) + self.key_row  # [B, heads]
        return of_copy[self._batch, copy.long()].flatten(0, 1)

    def keys(self) -> Tensor:
        """The keys of each row, [N, Sk, D]: a copy, for estimates that need every key by itself."""
        assert self.scene.key is not None
        return self.of_copies(self.scene.key)

    def queries(self, slot: Tensor) -> Tensor:
        """Queries in slots. slot: int64 [N, R]. Returns [N, R, D]."""
        scene = self.scene
        assert scene.query is not None
        token = self._by_head(self.at_queries(scene.arrangement.query_order, slot)).long()  # [B, heads, R]
        head = head_indices(self.heads, token.device).long().view(1, -1, 1)
        return scene.query[self._batch.unsqueeze(2), head, token].flatten(0, 1)

    @cached_property
    def first_copies(self) -> tuple[int, ...]:
        scene = self.scene
        assert scene.query is not None and scene.key is not None
        orders = scene.arrangement.key_order.shape[1]
        group = scene.query.shape[1] // (scene.key.shape[1] // orders)
        return tuple(head // group * orders for head in self.heads)

    def _sampled(self, slot: Tensor) -> SampledRows:
        scene = self.scene
        assert scene.query is not None and scene.key is not None
        return SampledRows(
            scene.query,
            scene.key,
            scene.arrangement.query_order,
            scene.arrangement.query_tags,
            scene.arrangement.key_tags,
            scene.key_positions(),
            self._by_head(slot),
            self.query_row,
            self.key_row,
            self.heads,
            self.first_copies,
            scene.scale,
            scene.window,
            scene.segments,
            scene.spans,
        )


def each_pair(of_pair: Sequence[Tensor]) -> Tensor:
    """What is known of each pair of orders, [B, ...] each, as [B * pairs, ...]: the index of `Rows.pair`."""
    return torch.stack(list(of_pair), 1).flatten(0, 1)


SCATTERED = 37  # rows that `scattered` moves on by, from tile to tile


def scattered(tile: Tensor, offset: int) -> Tensor:
    """A slot of each tile, int64: `offset` rows further, and other rows from tile to tile. By site, tokens of one frame
    stand at regular distances, and a fixed row might meet no other frame."""
    return tile * TILE + (tile * SCATTERED + offset) % TILE


def tile_slots(rows: slice, length: int, device: torch.device) -> Tensor:
    """Every query slot of some tiles, int64 [rows * TILE]; past the end the last one."""
    return torch.arange(rows.start * TILE, rows.stop * TILE, device=device).clamp_(max=length - 1)
