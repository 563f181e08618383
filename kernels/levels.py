"""How much a pattern wants each tile, as levels: what the cap on tiles is applied to.

Patterns that are known beforehand want near tiles most; patterns estimated from data want those with most attention.
"""

from functools import lru_cache

import torch
from torch import Tensor

from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_bounds import TileBounds
from mmcompile.kernels.tile_list import Layout, Streamed
from mmcompile.kernels.tile_mass import mean_shares

OCTAVE = 16  # levels in a factor of two of attention
MASS_LEVELS = 256


class Rings:
    """Chosen tiles by their distance from the query tile: 0 on the diagonal, 1 next to it."""

    weights = None

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.count = layout.shape[2] + 1

    def of(self, rows: slice) -> Tensor:
        distance = self.layout.of_row(rings(self.layout.bounds, rows))
        return torch.where(self.layout.chosen(rows), distance, self.count)

    def streamed(self) -> Streamed:
        return Streamed()


def rings(bounds: TileBounds, rows: slice) -> Tensor:
    """Distance of each tile from its query tile, in tiles rounded up, int32 [O, rows, nK], at most nK."""
    return ((bounds.distance(rows) + (TILE - 1)) // TILE).clamp_(0, bounds.shape[2])


class MassLevels:
    """Tiles by their share of the query tile's attention, in steps of a sixteenth of an octave.

    A share counts as many times as the query tile has tiles to choose from: one cut for a whole head would else keep
    all of the first queries' few tiles, and next to nothing of the last ones'. The very first, which together are a
    sixteenth of the cap, are wanted whole: they attend to few keys, each of which matters.

    levels: int16 [N, nQ, nK], filled by `put`; anything for empty tiles.
    """

    count = MASS_LEVELS

    def __init__(self, layout: Layout, density: float | None) -> None:
        self.layout = layout
        self.whole = 0.0 if density is None else density**0.5 / 4  # its square is the share of the tiles
        self.levels = torch.empty(layout.shape, dtype=torch.int16, device=layout.pair.device)
        self.weights: Tensor = mass_weights(layout.pair.device)

    def put(self, rows: slice, mass: Tensor) -> None:
        """mass: float32 [N, rows, nK], shares of all attention."""
        if mass.device.type == "cuda":
            # Triton is imported for a GPU only.
            from mmcompile.kernels import levels_kernel

            levels_kernel.put(self, rows, mass)
        else:
            self.put_cpu(rows, mass)

    def put_cpu(self, rows: slice, mass: Tensor) -> None:
        """`put` in torch operations."""
        choice = self.layout.non_empty(rows).sum(-1, keepdim=True) / self.layout.shape[2]
        level = (
            torch.where(choice < self.whole, 1.0, mass * choice)
            .log2_()
            .mul_(-OCTAVE)
            .clamp_(0, MASS_LEVELS - 1)
            .nan_to_num_(MASS_LEVELS - 1)
        )
        self.levels[:, rows] = level.to(torch.int16)

    def put_samples(self, rows: slice, log_mass: Tensor, of_columns: Tensor | None, samples: int) -> Tensor | None:
        """Shares by some queries of each tile, averaged. What columns hold of it: float32 [N, rows], or None.

        log_mass: float32 [N, samples * rows, nK], the logarithm of what each has on each tile. of_columns: float32
        [N, samples * rows], of what it has in columns, or None where there are none.
        """
        if log_mass.device.type == "cuda":
            from mmcompile.kernels import levels_kernel

            return levels_kernel.put_samples(self, rows, log_mass, of_columns, samples)
        return self.put_samples_cpu(rows, log_mass, of_columns, samples)

    def put_samples_cpu(self, rows: slice, log_mass: Tensor, of_columns: Tensor | None, samples: int) -> Tensor | None:
        """`put_samples` in torch operations."""
        in_columns = torch.full_like(log_mass[..., 0], float("-inf")) if of_columns is None else of_columns
        mass, held = mean_shares(log_mass, in_columns, samples)
        self.put_cpu(rows, mass)
        return None if of_columns is None else held

    def of(self, rows: slice) -> Tensor:
        return self.levels[:, rows]

    def streamed(self) -> Streamed:
        return Streamed(plane=self.levels)

    def stop_at(self, last: Tensor) -> None:
        """Want nothing beyond these levels. last: int64 [N, nQ]."""
        self.levels.masked_fill_(self.levels > last.unsqueeze(-1), MASS_LEVELS)


@lru_cache(maxsize=16)
def mass_weights(device: torch.device) -> Tensor:
    """Attention of a tile of each of the `MASS_LEVELS`, the middle of its step, int32: all of it is 2^30.

    The last level has no lower end: what is in it is next to nothing. Kept, because a copy from the host in every call
    would wait for the device.
    """
    steps = [round(2.0 ** (30 - (level + 0.5) / OCTAVE)) for level in range(MASS_LEVELS - 1)]
    return torch.tensor([*steps, 0], dtype=torch.int32, device=device)
