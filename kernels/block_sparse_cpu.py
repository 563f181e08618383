"""Block-sparse attention on the CPU, in torch operations: only the listed tiles are multiplied.

One step takes a query tile of every head that shares a plan row, as one batch of matrix products over the key
copies: each torch operation wakes all threads once, so that few large ones beat many small ones. Products and
softmax run in float32 whatever the dtype.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tags import INVALID, INVALID_SPAN
from mmcompile.kernels.tile_walk import TileWalk

# Scores of one step of the running softmax, in elements: memory stays bounded at any length and density.
STEP_SCORES = 2**22


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, walk: TileWalk, scale: float) -> Tensor:
    """The op of that name for CPU tensors; shapes as there. [B, H, Sq, D] in [B, Sq, H, D] memory."""
    batch, heads, query_length, width = query.shape
    output = query.new_empty(batch, query_length, heads, width)  # [B, Sq, H, D]
    walk = walk._replace(key_tags=_padded_tags(walk.key_tags))
    for b in range(batch):
        key_tiles, value_tiles = _tiled(key[b]), _tiled(value[b])  # [C, nK, TILE, D]
        for plan, copies, group in _groups(walk):
            _Group(walk, b, plan, group, key_tiles[copies], value_tiles[copies]).attend(query[b], output[b], scale)
    return output.transpose(1, 2)


def _groups(walk: TileWalk) -> Iterator[tuple[int, list[int] | slice, list[int]]]:
    """Plan row, its key copies, and its heads, as many for each copy and ordered by copy."""
    heads_of: dict[tuple[int, int], list[int]] = {}
    for head, pair in enumerate(zip(walk.head_plan, walk.key_head, strict=True)):
        heads_of.setdefault(pair, []).append(head)
    copies_of: dict[tuple[int, int], list[int]] = {}
    for (plan, copy), heads in sorted(heads_of.items()):
        copies_of.setdefault((plan, len(heads)), []).append(copy)
    for (plan, _), copies in copies_of.items():
        heads = [head for copy in copies for head in heads_of[plan, copy]]
        # Neighbours are taken as a view, not as a copy.
        run = copies == list(range(copies[0], copies[-1] + 1))
        yield plan, slice(copies[0], copies[-1] + 1) if run else copies, heads


def _tiled(rows: Tensor) -> Tensor:
    """[C, S, D] as float32 [C, nK, TILE, D], zeros past the end; no copy where none is needed."""
    missing = -rows.shape[1] % TILE
    rows = torch.nn.functional.pad(rows.float(), (0, 0, 0, missing)) if missing else rows.float()
    return rows.contiguous().unflatten(1, (-1, TILE))


def _padded_tags(key_tags: Tensor) -> Tensor:
    """[B, P, 3, Sk] with the last tile completed by keys that no query may see."""
    missing = -key_tags.shape[3] % TILE
    absent = key_tags.new_tensor([INVALID, 0, INVALID_SPAN]).view(3, 1)
    return torch.cat([key_tags, absent.expand(*key_tags.shape[:3], missing)], dim=3)


class _Group:
    """Heads of one plan row in one batch row: C key copies, and G heads for each of them."""

    def __init__(
        self, walk: TileWalk, b: int, plan: int, heads: list[int], key_tiles: Tensor, value_tiles: Tensor
    ) -> None:
        self.walk = walk
        self.query_tags = walk.query_tags[b, plan]  # [3, Sq]
        self.key_tags = walk.key_tags[b, plan].unflatten(1, (-1, TILE))  # [3, nK, TILE]
        self.counts = walk.counts[b, plan].tolist()
        self.tiles = walk.tiles[b, plan].tolist()
        self.heads = heads
        self.key_tiles, self.value_tiles = key_tiles, value_tiles  # [C, nK, TILE, D]
        self.step = max(1, STEP_SCORES // (len(heads) * TILE * TILE))  # tiles
        # One buffer for the scores of every step: fresh pages would cost as much as the exponentials.
        self.scratch = key_tiles.new_empty(len(heads) * TILE * self.step * TILE)

    def attend(self, query: Tensor, output: Tensor, scale: float) -> None:
        """Fill output[:, heads], [Sq, H, D], from query[heads], [H, Sq, D]."""
        length = query.shape[1]
        for index, start in enumerate(range(0, length, TILE)):
            rows = slice(start, min(start + TILE, length))
            # Base 2, because exp of -inf takes a slow path on the CPU and exp2 does not.
            q = query[self.heads, rows].float() * (scale / math.log(2.0))  # [C * G, rows, D]
            by_copy = q.reshape(len(self.key_tiles), -1, q.shape[2])  # [C, G * rows, D]
            result = self._attend_rows(by_copy, rows, index).view(q.shape)
            output[rows, self.heads] = result.transpose(0, 1).to(output.dtype)

    def _attend_rows(self, q: Tensor, rows: slice, query_tile: int) -> Tensor:
        """Scaled queries [C, G * rows, D] of one query tile against its listed tiles; the same shape back."""
        full, partial = self.counts[query_tile]
        listed = self.tiles[query_tile]
        listed = listed[:full] + listed[len(listed) - partial :]
        maximum = q.new_full((*q.shape[:2], 1), float("-inf"))
        total, accumulator = torch.zeros_like(maximum), torch.zeros_like(q)
        for first in range(0, len(listed), self.step):
            chunk = listed[first : first + self.step]
            scores = self._scores(q, rows, chunk, masked=chunk[max(full - first, 0) :])
            new_maximum = torch.maximum(maximum, scores.amax(2, keepdim=True))
            # Rows that have seen no key yet keep a maximum of -inf; subtracting it would give NaN.
            shift = new_maximum.masked_fill(new_maximum == float("-inf"), 0.0)
            weights = scores.sub_(shift).exp2_()
            decay = (maximum - shift).exp2_()
            total.mul_(decay).add_(weights.sum(2, keepdim=True))
            accumulator.mul_(decay).baddbmm_(weights, _gather(self.value_tiles, chunk))
            maximum = new_maximum
        return accumulator.div_(total.masked_fill_(total == 0.0, 1.0))

    def _scores(self, q: Tensor, rows: slice, chunk: list[int], masked: list[int]) -> Tensor:
        """q against a chunk's tiles, [C, G * rows, n * TILE]; `masked` ends it, under the element mask."""
        keys = _gather(self.key_tiles, chunk)
        shape = (*q.shape[:2], keys.shape[1])
        scores = self.scratch[: math.prod(shape)].view(shape)
        torch.bmm(q, keys.transpose(1, 2), out=scores)
        if masked:
            key_tags = self.key_tags[:, masked].flatten(1)
            allowed = self.walk.allowed(self.query_tags[:, rows], key_tags)  # [rows, n * TILE]
            by_head = scores.view(len(self.heads), *allowed.shape[:1], -1)
            by_head[..., -allowed.shape[1] :].masked_fill_(~allowed, float("-inf"))
        return scores


def _gather(tiles: Tensor, listed: list[int]) -> Tensor:
    """The listed tiles of [C, nK, TILE, D] under each other, [C, n * TILE, D]; a run of neighbours is a view."""
    first, last = listed[0], listed[-1]
    if listed == list(range(first, last + 1)):
        return tiles[:, first : last + 1].flatten(1, 2)
    return tiles.index_select(1, torch.tensor(listed)).flatten(1, 2)
