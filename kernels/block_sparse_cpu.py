"""Block-sparse attention on the CPU: torch's own attention of each query tile over its gathered tiles and columns.

Only listed keys are multiplied. One call takes a query tile of every head that shares a plan row: each torch
operation wakes all threads once, so that few large ones beat many small ones. It runs in float32 whatever the
dtype, which is exact and, on CPUs without bfloat16 matrix units, faster.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.permute_cpu import permute, unpermute
from mmcompile.kernels.tags import INVALID, INVALID_SPAN, NO_SPAN
from mmcompile.kernels.tile_walk import TileWalk

# Elements of a mask that is repeated for each head of a key copy. Stacked heads make taller and faster matrix
# products; where many keys are listed the mask would cost more than that saves.
STACKED_MASK = 2**22

Index = slice | list[int]


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float, query_order: Tensor | None = None
) -> Tensor:
    """The op of that name for CPU tensors; arguments as there. [B, H, Sq, D] in [B, Sq, H, D] memory."""
    batch, heads, query_length, width = query.shape
    if query_order is not None:
        query = permute(query, query_order, walk.query_row, range(heads), walk.head_plan)
        output = block_sparse_attention(query, key, value, walk, scale)
        return unpermute(output, query_order, walk.query_row, walk.head_plan)
    output = query.new_empty(batch, query_length, heads, width)  # [B, Sq, H, D]
    # Rows past the end attend to whatever their neighbours do, and are dropped; keys past the end nobody sees.
    query_tags = _whole_tiles(walk.query_tags, [0, 0, NO_SPAN])  # [B, Oq, 3, nQ, TILE]
    key_tags = _whole_tiles(walk.key_tags, [INVALID, 0, INVALID_SPAN])  # [B, Ok, 3, nK, TILE]
    query_row, key_row = walk.query_row.tolist(), walk.key_row.tolist()
    for b in range(batch):
        key_tiles, value_tiles = _tiled(key[b]), _tiled(value[b])  # [C, nK, TILE, D]
        for plan, copies, group in _groups(walk, key_row[b]):
            one = _Group(
                walk,
                query_tags[b, query_row[b][plan]],
                key_tags[b, key_row[b][plan]],
                walk.counts[b, plan].tolist(),
                walk.tiles[b, plan],
                walk.columns[b, plan],
                walk.cold[b, plan],
                key_tiles[copies],
                value_tiles[copies],
            )
            one.attend(query[b], output[b], group, scale)
    return output.transpose(1, 2)


def _groups(walk: TileWalk, key_row: list[int]) -> Iterator[tuple[int, Index, Index]]:
    """Plan row, its key copies, and its heads, as many for each copy and ordered by copy.

    key_row: the key order of each plan row, in one batch row.
    """
    heads_of: dict[tuple[int, int], list[int]] = {}
    for head, (plan, first) in enumerate(zip(walk.head_plan, walk.key_head, strict=True)):
        heads_of.setdefault((plan, first + key_row[plan]), []).append(head)
    copies_of: dict[tuple[int, int], list[int]] = {}
    for (plan, copy), heads in sorted(heads_of.items()):
        copies_of.setdefault((plan, len(heads)), []).append(copy)
    for (plan, _), copies in copies_of.items():
        yield plan, _index(copies), _index([head for copy in copies for head in heads_of[plan, copy]])


def _index(values: list[int]) -> Index:
    """The same as an index; a slice, which copies nothing, where the values are neighbours in order or none."""
    run = slice(values[0], values[-1] + 1) if values else slice(0, 0)
    return run if values == list(range(run.start, run.stop)) else values


def _tiled(rows: Tensor) -> Tensor:
    """[C, S, D] as float32 [C, nK, TILE, D], zeros past the end; no copy where none is needed."""
    missing = -rows.shape[1] % TILE
    rows = pad(rows.float(), (0, 0, 0, missing)) if missing else rows.float()
    return rows.contiguous().unflatten(1, (-1, TILE))


def _whole_tiles(tags: Tensor, absent: list[int]) -> Tensor:
    """Tags [B, O, 3, S] as [B, O, 3, n, TILE], the last tile completed by `absent`."""
    missing = -tags.shape[3] % TILE
    rest = tags.new_tensor(absent).view(3, 1).expand(*tags.shape[:3], missing)
    return torch.cat([tags, rest], dim=3).unflatten(3, (-1, TILE))


class _Group(NamedTuple):
    """What the heads of one plan row have in common, in one batch row: C key copies, G heads for each."""

    walk: TileWalk
    query_tags: Tensor  # [3, nQ, TILE]
    key_tags: Tensor  # [3, nK, TILE]
    counts: list[list[int]]
    tiles: Tensor  # every entry of the plan row, of which `counts` says which are whose
    columns: Tensor  # likewise
    cold: Tensor  # [Sk], or [0] where there are no columns
    key_tiles: Tensor  # [C, nK, TILE, D]
    value_tiles: Tensor

    def attend(self, query: Tensor, output: Tensor, heads: Index, scale: float) -> None:
        """Fill output[:, heads], [Sq, H, D], from query[heads], [H, Sq, D]."""
        query_tiles = _tiled(query[heads]).transpose(0, 1).contiguous()  # [nQ, C * G, TILE, D]
        for index, q in enumerate(query_tiles):
            rows = slice(index * TILE, min((index + 1) * TILE, query.shape[1]))
            result = self._attend_tile(q, index, scale).transpose(0, 1)  # [TILE, C * G, D]
            output[rows, heads] = result[: rows.stop - rows.start].to(output.dtype)

    def _attend_tile(self, q: Tensor, index: int, scale: float) -> Tensor:
        """One query tile [C * G, TILE, D] against its listed tiles and columns; the same shape."""
        first, full, partial, start, single = self.counts[index]
        listed = self.tiles[first : first + full + partial].tolist()
        columns = self.columns[start : start + single]
        if not listed and not single:
            return torch.zeros_like(q)
        keys, values = (_gather(x, listed, columns).unsqueeze(1) for x in (self.key_tiles, self.value_tiles))
        group = q.shape[0] // len(keys)
        stacked = group if group * TILE * keys.shape[2] <= STACKED_MASK else 1
        by_copy = q.view(len(keys), -1, stacked * TILE, q.shape[2])
        keys, values = (x.expand(-1, by_copy.shape[1], -1, -1) for x in (keys, values))
        masked = partial or single
        mask = self._mask(index, full, listed[full:], columns) if masked else None  # [TILE, n * TILE + single]
        repeated = None if mask is None else mask.repeat(stacked, 1)
        result = scaled_dot_product_attention(by_copy, keys, values, attn_mask=repeated, scale=scale).view(q.shape)
        if mask is not None and full == 0:
            result = result.masked_fill((mask < 0).all(1, keepdim=True), 0.0)
        return result

    def _mask(self, index: int, full: int, partial: list[int], columns: Tensor) -> Tensor:
        """What to add to the scores of the rows against the listed keys, [TILE, n * TILE + single]."""
        key_tags = torch.cat([self.key_tags[:, partial].flatten(1), self.key_tags.flatten(1)[:, columns]], 1)
        allowed = self.walk.allowed(self.query_tags[:, index], key_tags)
        if len(self.cold):
            # Slots past the end are not allowed whatever is said of them here.
            slots = torch.tensor(partial, dtype=torch.int64).view(-1, 1) * TILE + torch.arange(TILE)
            allowed[:, : len(partial) * TILE] &= self.cold[slots.flatten().clamp(max=len(self.cold) - 1)]
        mask = torch.zeros(TILE, full * TILE + allowed.shape[1])
        mask[:, full * TILE :].masked_fill_(~allowed, float("-inf"))
        return mask


def _gather(tiles: Tensor, listed: list[int], columns: Tensor) -> Tensor:
    """The listed tiles of [C, nK, TILE, D] and the rows at some slots under each other, [C, n * TILE + single, D]."""
    index = _index(listed)
    chosen = tiles[:, index] if isinstance(index, slice) else tiles.index_select(1, torch.tensor(index))
    chosen = chosen.flatten(1, 2)
    return torch.cat([chosen, tiles.flatten(1, 2).index_select(1, columns)], 1) if len(columns) else chosen
