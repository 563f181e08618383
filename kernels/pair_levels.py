"""Patterns of their own for each (query modality, key modality), of one head (arXiv 2504.16083, section 3.2)."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from mmcompile.kernels.patterns import MODALITIES
from mmcompile.kernels.scene import Rows
from mmcompile.kernels.tile_bounds import by_tile
from mmcompile.kernels.tile_list import Layout, Levels, Streamed


class PairLevels:
    """A tile that holds queries and keys of several modalities is wanted as much as any of its pairs wants it.

    of_pairs: (query modality, key modality or -1 for all, levels); `rest` has the pairs that are not named.
    """

    weights = None

    def __init__(self, rows: Rows, layout: Layout, of_pairs: Sequence[tuple[int, int, Levels]], rest: Levels) -> None:
        self.layout, self.rest, self.of_pairs = layout, rest, of_pairs
        self.count = max([rest.count, *(levels.count for _, _, levels in of_pairs)])
        scene = rows.scene
        self.query_has = rows.of_pairs(
            [_modalities(scene.query_modality, scene.arrangement.query_order[:, query]) for query, _ in rows.pairs]
        )  # bool [N, MODALITIES, nQ]
        self.key_has = rows.of_pairs(
            [_modalities(scene.key_modality, scene.arrangement.key_order[:, key]) for _, key in rows.pairs]
        )

    def of(self, rows: slice) -> Tensor:
        named = {(query, key) for query, key, _ in self.of_pairs}
        unnamed = torch.zeros_like(self._in_pair(rows, 0, 0))
        for query in range(MODALITIES):
            for key in range(MODALITIES):
                if (query, key) not in named and (query, -1) not in named:
                    unnamed |= self._in_pair(rows, query, key)
        level = self._within(self.rest, rows, unnamed)
        for query, key, levels in self.of_pairs:
            level = torch.minimum(level, self._within(levels, rows, self._in_pair(rows, query, key)))
        return level

    def streamed(self) -> Streamed:
        return Streamed(plane=self._plane)

    @cached_property
    def _plane(self) -> Tensor:
        """Integer [N, nQ, nK]. Asked for by the cut and by the list, and too rare for a kernel of its own: torch
        operations, a few query tiles at a time."""
        dtype = torch.int16 if self.count < 2**15 else torch.int32
        return torch.cat([self.of(rows).to(dtype) for rows in self.layout.chunks()], 1)

    def _in_pair(self, rows: slice, query: int, key: int) -> Tensor:
        """Tiles with a query and a key of these modalities, bool [N, rows, nK]."""
        of_key = self.key_has.any(1) if key < 0 else self.key_has[:, key]
        return self.query_has[:, query, rows, None] & of_key.unsqueeze(1)

    def _within(self, levels: Levels, rows: slice, tiles: Tensor) -> Tensor:
        level = levels.of(rows).int()
        return torch.where(tiles & (level < levels.count), level, self.count)


def _modalities(modality: Tensor, order: Tensor) -> Tensor:
    """Which modalities each tile of an order holds, bool [B, MODALITIES, n]."""
    in_order = by_tile(modality.gather(-1, order.long()), -1)  # [B, n, TILE]
    return torch.stack([(in_order == each).any(-1) for each in range(MODALITIES)], 1)
