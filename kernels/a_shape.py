"""A-shape as intervals of key tiles: for each query, the first and the latest valid keys it may use.

"First" and "latest" count valid keys of the query's own segment, so that padding and packing move the sink
and the local band with the tokens; in a 2D-Boundary order they count within each key modality (arXiv
2504.16083, section 3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmcompile.kernels.patterns import MAX_TOKENS, MODALITIES, TILE
from mmcompile.kernels.tags import INVALID

BEYOND = 2**63 - 1  # sorts after every key


class Intervals(NamedTuple):
    """Runs of key tiles, N a query slot: int32 [B, N, Sq] each, both ends included; none if last < first."""

    first: Tensor
    last: Tensor

    @classmethod
    def stack(cls, runs: "list[Intervals]") -> "Intervals":
        if len(runs) == 1:
            return runs[0]
        return cls(torch.cat([run.first for run in runs], 1), torch.cat([run.last for run in runs], 1))

    def cover(self, rows: slice, key_tiles: int) -> Tensor:
        """The union of the runs over the queries of each tile, bool [B, rows, nK]; `rows` are query tiles."""
        first = self.first[:, :, rows.start * TILE : rows.stop * TILE]
        last = self.last[:, :, rows.start * TILE : rows.stop * TILE]
        count, width = rows.stop - rows.start, key_tiles + 1
        row_start = torch.arange(first.shape[-1], device=first.device) // TILE * width  # int64
        # +1 where a run starts, -1 after it ends: the running sum counts the runs over a tile.
        steps = torch.zeros(first.shape[0], count * width, dtype=torch.int32, device=first.device)
        one = torch.ones((), dtype=torch.int32, device=first.device).expand_as(first).flatten(1)
        steps.scatter_add_(1, (row_start + first).flatten(1), one)
        steps.scatter_add_(1, (row_start + last + 1).flatten(1), -one)
        return steps.unflatten(1, (count, width))[..., :key_tiles].cumsum(-1, dtype=torch.int32) > 0


class KeyGroups:
    """The valid keys sorted by (segment, modality, position): a group is a run of ranks."""

    def __init__(self, sorted: Tensor, slots: Tensor, after: Tensor | None = None) -> None:
        """sorted: int64 [O, Sk], what keys are sorted by, those that are not valid last. slots: theirs, likewise.

        after: int32 [O, Sk], the rank that follows each position, where that is known of a single group.
        """
        self.length = sorted.shape[-1]
        self.sorted, self.slots, self.after = sorted, slots, after

    @classmethod
    def of(cls, tags: Tensor, modality: Tensor | None) -> "KeyGroups":
        """tags: int32 [O, 3, Sk] in slot order. modality: int32 [O, Sk] too, or None for one group over all."""
        return cls(*sort_keys(tags, modality).sort(-1))

    @classmethod
    def of_one_segment(cls, position: Tensor, usable: Tensor, slot: Tensor) -> "KeyGroups":
        """One group of all valid keys of one segment, which need no sorting: their positions are their order.

        position: int32 [B, Sk], in token order, 2^31 - 1 where not valid. usable: int32 [B, nK], how many are valid of
        each tile. slot: int32 [O, Sk], position -> slot in each of O pairs of orders, those of a batch row together.
        """
        if position.device.type == "cuda":
            from mmcompile.kernels import a_shape_kernel

            return cls(*a_shape_kernel.rank_valid_keys(position, usable, slot))
        return cls(*rank_valid_keys_cpu(position, usable, slot))

    def rank_after(self, segment: Tensor, modality: int, position: Tensor | int) -> Tensor:
        """Rank that follows the group's last key at or before `position`: its first rank for position -1.

        segment: int32 [B, Sq], position: int32 [B, Sq] or a number. Returns int64 [B, Sq].
        """
        if isinstance(position, Tensor):
            reached: Tensor | int = position.long().clamp(-1, self.length - 1)
        else:  # never a tensor of its own: its copy to the device would wait
            reached = max(-1, min(position, self.length - 1))
        return torch.searchsorted(self.sorted, self._start(segment, modality) + reached, right=True)

    def position(self, rank: Tensor) -> Tensor:
        """Position of the key of a rank, int64 [B, Sq]; arbitrary where the rank is no key's."""
        return self.sorted.gather(-1, rank.clamp(0, self.length - 1)).remainder(self.length)

    def tile(self, rank: Tensor) -> Tensor:
        """Tile of the key of a rank, int32 [B, Sq]; arbitrary where the rank is no key's."""
        return (self.slots.gather(-1, rank.clamp(0, self.length - 1)) // TILE).int()

    def _start(self, segment: Tensor, modality: Tensor | int) -> Tensor:
        return group_start(segment, modality, self.length)


def group_start(segment: Tensor, modality: Tensor | int, length: int) -> Tensor:
    """What the keys of a group are sorted by, less their positions."""
    # 32 bits of segment, 3 of modality and 28 of length fit int64.
    return (segment.long() * MODALITIES + modality) * length


def sort_keys(tags: Tensor, modality: Tensor | None) -> Tensor:
    """What orders keys by (segment, modality, position), those that are not valid last: int64 [B, Sk]."""
    if tags.device.type == "cuda":
        from mmcompile.kernels import a_shape_kernel

        return a_shape_kernel.sort_keys(tags, modality)
    return sort_keys_cpu(tags, modality)


def sort_keys_cpu(tags: Tensor, modality: Tensor | None) -> Tensor:
    """`sort_keys` in torch operations."""
    position, segment = tags[:, 0], tags[:, 1]
    start = group_start(segment, 0 if modality is None else modality, tags.shape[-1])
    return torch.where(position == INVALID, BEYOND, start + position)


def rank_valid_keys_cpu(position: Tensor, _usable: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`KeyGroups.of_one_segment` in torch operations."""
    by, token = torch.where(position == INVALID, BEYOND, position.long()).sort(-1)
    after = (position != INVALID).cumsum(-1, dtype=torch.int32)
    copies = slot.shape[0] // position.shape[0]
    by, token, after = (of_row.repeat_interleave(copies, 0) for of_row in (by, token, after))
    return by, slot.gather(-1, token).long(), after


class AShapeRuns(NamedTuple):
    """What an A-shape chooses: what no cap removes, and the rest of it."""

    must: Intervals
    may: Intervals | None


def runs(
    query_tags: Tensor,
    keys: KeyGroups,
    groups: KeyGroups,
    sink: int,
    window: int | None,
    local: int | None,
    last: int | None,
) -> AShapeRuns:
    """For each query the `sink` first valid keys and one near it; and, where not None, the `local` latest ones of each
    group, and every key for the `last` queries of each segment.

    query_tags: int32 [O, 3, Sq], in slot order. keys: of all modalities together. groups: within each modality, where
    the pattern holds within each, else `keys`. window: keys or None.
    """
    if query_tags.device.type == "cuda":
        from mmcompile.kernels import a_shape_kernel

        return a_shape_kernel.runs(query_tags, keys, groups, sink, window, local, last)
    return runs_cpu(query_tags, keys, groups, sink, window, local, last)


def runs_cpu(
    query_tags: Tensor,
    keys: KeyGroups,
    groups: KeyGroups,
    sink: int,
    window: int | None,
    local: int | None,
    last: int | None,
) -> AShapeRuns:
    """`runs` in torch operations."""
    shape = AShape(query_tags, keys, groups)
    may = [] if local is None else [shape.local(local)]
    may += [] if last is None else [shape.everything_for_last(last)]
    return AShapeRuns(Intervals.stack([shape.sink(sink), shape.nearest(window)]), Intervals.stack(may) if may else None)


def own_blocks(query_tags: Tensor, key_length: int, stride: Tensor) -> Intervals:
    """The keys of each query's own block of `stride` tokens (int64, no dimensions), in raster order."""
    own = query_tags[:, 0].long().clamp(0, key_length - 1).unsqueeze(1)  # [B, 1, Sq]
    return Intervals((own - own % stride) // TILE, own // TILE)


class AShape:
    """The parts of `runs_cpu`."""

    def __init__(self, query_tags: Tensor, keys: KeyGroups, groups: KeyGroups) -> None:
        self.query_position = query_tags[:, 0].contiguous()
        self.segment = query_tags[:, 1]
        self.keys, self.groups = keys, groups
        start = keys.rank_after(self.segment, 0, -1)
        self.end = keys.rank_after(self.segment, 0, self.query_position)
        self.before = self.end > start  # a key of the segment lies at or before the query
        if groups is keys:
            self.ranges = [(start, self.end)]
        else:
            self.ranges = [
                (
                    groups.rank_after(self.segment, each, -1),
                    groups.rank_after(self.segment, each, self.query_position),
                )
                for each in range(MODALITIES)
            ]

    def sink(self, length: int) -> Intervals:
        """The `length` first valid keys at or before each query, in each group."""
        return Intervals.stack(
            [self._run(self.groups, start, torch.minimum(start + length, end)) for start, end in self.ranges]
        )

    def local(self, length: int) -> Intervals:
        """The `length` latest valid keys at or before each query, in each group."""
        return Intervals.stack(
            [self._run(self.groups, torch.maximum(start, end - length), end) for start, end in self.ranges]
        )

    def nearest(self, window: int | None) -> Intervals:
        """One key for each query: itself, else the nearest valid one of its segment before it, else the nearest after.

        It keeps a row with any allowed key from being without tiles, whatever a cap takes away. If any key before is
        allowed, the nearest is. A key after is allowed by a span alone, and where spans are runs of tokens, the nearest
        valid one is of the span if any is; where a span goes on after a gap it may not be, and a query with no key
        before it can be left without tiles.
        """
        before = self.before
        if window is not None:
            before = before & (self.keys.position(self.end - 1) > self.query_position - min(window, MAX_TOKENS))
        rank = self.end - before.long()
        group_end = self.keys.rank_after(self.segment, 0, self.keys.length)
        return self._run(self.keys, rank, torch.minimum(rank + 1, group_end))

    def everything_for_last(self, count: int) -> Intervals:
        """Every tile, for the `count` last queries of each segment whose own key is valid."""
        own_valid = self.before & (self.keys.position(self.end - 1) == self.query_position)
        # Keys past the last query (room of a static cache) follow no query's end.
        last_query = self.query_position.amax(-1, keepdim=True)
        following = self.keys.rank_after(self.segment, 0, last_query) - self.end
        chosen = (own_valid & (following < count)).unsqueeze(1)  # [B, 1, Sq]
        last_tile = (self.keys.length - 1) // TILE
        return Intervals(*(torch.where(chosen, end, none).int() for end, none in ((0, 1), (last_tile, 0))))

    def _run(self, groups: KeyGroups, start: Tensor, end: Tensor) -> Intervals:
        """The tiles from the key of rank `start` to the one before rank `end`, int32 [B, 1, Sq]."""
        some = end > start
        first, last = groups.tile(start), groups.tile(end - 1)
        return Intervals(first.where(some, 1).unsqueeze(1), last.where(some, 0).unsqueeze(1))
