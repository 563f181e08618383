"""Single keys: lists that all query tiles of a plan row share, and lists of each query tile's own."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.scene import Rows, tile_slots
from mmcompile.kernels.tags import INVALID
from mmcompile.kernels.tile_bounds import by_tile
from mmcompile.kernels.tile_list import Layout
from mmcompile.kernels.top_keys import list_top_keys

SCORES_AT_ONCE = 2**25  # mean queries x keys


class Columns(NamedTuple):
    """Single keys that every query tile computes: none of them is attended through a tile."""

    slots: Tensor  # int32 [N, C], ascending positions, unused entries last
    listed: Tensor  # int32 [N], how many there are
    counts: Tensor  # int32 [N, nQ], how many of them a query tile can reach
    cold: Tensor  # bool [N, Sk] in key slots: False for the keys above

    @classmethod
    def of(cls, rows: Rows, weight: Tensor, room: int) -> "Columns":
        """The keys with the most weight, as many as there is room for, but none without. weight: float [N, Sk] in key
        slots."""
        key_slots = None if rows.scene.keys_in_raster else rows.scene.key_slots()
        keys = list_top_keys(weight, key_slots, rows.key_row, room, rows.last_positions())
        if rows.scene.spans:  # later keys may be reached as well
            return cls(*keys)._replace(counts=keys.listed.unsqueeze(-1).expand(-1, rows.scene.query_tiles))
        return cls(*keys)

    def hot_tiles(self) -> Tensor:
        """Tiles with a key that is not cold, bool [N, nK]."""
        if self.cold.device.type == "cuda":
            # Triton is imported for a GPU only.
            from mmcompile.kernels import top_keys_kernel

            return top_keys_kernel.hot_tiles(self.cold)
        return self.hot_tiles_cpu()

    def hot_tiles_cpu(self) -> Tensor:
        """`hot_tiles` in torch operations."""
        return by_tile(~self.cold, False).any(-1)


def block_ends(rows: Rows, stride: Tensor) -> Columns:
    """The last key of each block of `stride` tokens, an int64 tensor without dimensions, in raster order."""
    position = rows.scene.key_tags[:, 0]
    keys = position.shape[1]
    is_end = torch.arange(1, keys + 1, device=stride.device) % stride == 0
    weight = (is_end & (position != INVALID)).float()
    return Columns.of(rows, weight.repeat_interleave(len(rows.heads), 0), block_end_count(keys))


LEAST_BLOCK = 64  # tokens of a block; what a list of their ends has room for


def block_end_count(keys: Any) -> Any:  # an int, or a SymInt while tracing
    return keys // LEAST_BLOCK + 1  # never 0, whatever the length: without columns a plan has no `cold`


class OwnKeys(NamedTuple):
    """Single keys of each query tile."""

    slots: Tensor  # int32 [N, nQ * C]
    first: Tensor  # int32 [nQ], where the list of each query tile starts
    counts: Tensor  # int32 [N, nQ]


def list_own_keys(rows: Rows, layout: Layout, room: int, most: int) -> OwnKeys:
    """The `most` keys that each query tile's mean query attends to, outside the mandatory tiles (VecAttention)."""
    scene = rows.scene
    count, query_tiles, _ = layout.shape
    keys = scene.key_tags.shape[-1]
    key = rows.keys().float()  # [N, Sk, D]
    key_position = rows.of_key_orders(scene.arrangement.key_tags[:, :, 0])
    last = rows.last_positions()
    step = max(1, SCORES_AT_ONCE // (count * keys))
    found = min(most, keys)
    listed, counts = [], []
    for start in range(0, query_tiles, step):
        part = slice(start, min(start + step, query_tiles))
        slot = tile_slots(part, scene.query_length, key.device)
        query = rows.queries(slot.expand(count, -1)).float().unflatten(1, (-1, TILE)).mean(2)
        scores = query @ key.transpose(1, 2)  # their order is all that counts
        usable = layout.non_empty(part) & ~layout.mandatory(part)
        usable = usable.repeat_interleave(TILE, -1)[..., :keys] & (key_position != INVALID).unsqueeze(1)
        if not scene.spans:
            usable &= key_position.unsqueeze(1) <= last[:, part, None]
        best = scores.masked_fill_(~usable, float("-inf")).topk(found, -1)
        listed.append(torch.nn.functional.pad(best.indices.int(), (0, room - found)))
        counts.append((best.values > float("-inf")).sum(-1, dtype=torch.int32))
    first = torch.arange(query_tiles, dtype=torch.int32, device=key.device) * room
    return OwnKeys(torch.cat(listed, 1).flatten(1), first, torch.cat(counts, 1))
