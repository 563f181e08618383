"""How fast the portable attention kernel is in each of a few launch shapes, over a small walk of its own.

Bounded, whatever the prompt: at most MOST shapes, none begun after SECONDS, in MEBIBYTES; nothing of the caller's is
read, and its random numbers stay as they are. A shape is out before it is compiled where its tiles cannot fit, and
after where registers spill.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from mmcompile.kernels.attention_config import LARGE, SMALL, Config, shared_memory
from mmcompile.kernels.bulk_copies import takes_descriptors
from mmcompile.kernels.patterns import TILE
from mmcompile.kernels.tile_walk import TileWalk

MOST, SECONDS, MEBIBYTES = 6, 30.0, 100
TURNS = 7  # of each shape
MOST_SPILLS = 16  # registers of a thread; more would go to memory and back in every step
MOST_SUMS = 160  # registers of a thread for scores and output; the other 95 hold what they are made of
MOST_PRODUCTS = 512  # of a thread and step outside the matrix units; more spill, and take long to compile
# Most promising first. Two bytes an element: products in matrix units. Four: outside them, from registers.
SHAPES = {
    2: (
        Config(64, 128, 4, 2),
        Config(128, 64, 4, 3),
        Config(64, 64, 4, 2),
        Config(128, 128, 8, 2),
        Config(128, 64, 8, 3),
        Config(64, 32, 4, 2),
        Config(128, 32, 8, 2),
        Config(64, 64, 8, 2),
        Config(64, 32, 8, 1),
    ),
    4: (
        Config(64, 32, 8, 1),
        Config(32, 32, 8, 1),
        Config(32, 32, 4, 1),
        Config(16, 32, 8, 1),
        Config(16, 32, 4, 1),
        Config(64, 32, 4, 1),
        Config(64, 64, 8, 1),
        Config(128, 32, 8, 1),
    ),
}
# Tiles of the walk: a query tile lists FULL tiles, the one on the diagonal, and COLUMNS keys of the first tile.
QUERY_TILES, FULL, COLUMNS = 32, 12, 64
KEY_TILES = QUERY_TILES + FULL + 1
GROUP, MOST_GROUPS = 8, 8  # heads that share a copy of the keys, as models have it
log = logging.getLogger(__name__)

# Fills an output [B, Sq, H, D]: arguments of `block_sparse.launch`, and the compiled kernel comes back.
Run = Callable[[Tensor, Tensor, Tensor, Tensor, TileWalk, float, Config, bool], Any]


def shapes_to_try(element_size: int, padded: int) -> tuple[Config, ...]:
    """Every launch shape that may be chosen, those of the table first."""
    tables = (table[element_size, padded] for table in (LARGE, SMALL) if (element_size, padded) in table)
    return tuple(dict.fromkeys((*tables, *SHAPES[element_size])))


def may_fit(config: Config, element_size: int, padded: int, shared: int, warp: int) -> bool:
    """Whether a tile of keys and one of values fit `shared` bytes, and the rest the registers of warps of so many
    threads."""
    threads = config.warps * warp
    tiles = 2 * config.block_n * padded * element_size
    sums = config.block_m * (padded + config.block_n) // threads
    products = 0 if element_size == 2 else config.block_m * config.block_n * padded // threads
    return tiles <= shared and sums <= MOST_SUMS and products <= MOST_PRODUCTS


def measure(run: Run, device: torch.device, dtype: torch.dtype, padded: int, table: Config) -> dict[Config, float]:
    """Milliseconds of each shape that was measured, in which the table's comes first; none if nothing ran."""
    warp = torch.cuda.get_device_properties(device).warp_size
    limits = dtype.itemsize, padded, shared_memory(device), warp
    shapes = [config for config in shapes_to_try(dtype.itemsize, padded) if config == table or may_fit(config, *limits)]
    shapes.sort(key=table.__ne__)
    with torch.cuda.device(device):
        try:
            walk = _Walk.on(device, dtype, padded)
        except torch.OutOfMemoryError as error:
            log.warning("no memory to measure launch shapes in: %s", error)
            return {}
        return race(shapes, partial(walk.spills, run), partial(walk.milliseconds, run))


def race(
    shapes: Iterable[Config],
    spills: Callable[[Config], int],
    milliseconds: Callable[[Config], float],
    clock: Callable[[], float] = time.monotonic,
) -> dict[Config, float]:
    """Medians of the first MOST shapes that compile and hardly spill; the first one may. They run in turns, so that the
    device's drift hits all alike.

    spills: compiles and runs a shape once. milliseconds: of one run.
    """
    stop = clock() + SECONDS
    found: dict[Config, list[float]] = {}
    for config in shapes:
        if len(found) == MOST or clock() > stop:
            break
        try:
            spilled = spills(config)
        except (TritonError, RuntimeError) as error:  # too large for the device, or more than its compiler can do
            log.debug("%s does not run: %s", config, error)
            continue
        log.debug("%s spills %d registers", config, spilled)
        if spilled <= MOST_SPILLS or not found:
            found[config] = []
    for _ in range(TURNS):
        if clock() > stop and all(found.values()):
            break
        for config, times in found.items():
            times.append(milliseconds(config))
    return {config: median(times) for config, times in found.items()}


@dataclass(frozen=True)
class _Walk:
    """Random heads, and the walk over them."""

    query: Tensor  # [1, H, QUERY_TILES * TILE, D], the same for each head
    key: Tensor  # [1, H // GROUP, KEY_TILES * TILE, D]
    value: Tensor
    output: Tensor  # [1, QUERY_TILES * TILE, H, D]
    walk: TileWalk

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, padded: int) -> "_Walk":
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
        queries, keys = QUERY_TILES * TILE, KEY_TILES * TILE
        a_row = padded * dtype.itemsize
        a_group = (GROUP * queries + 2 * keys) * a_row
        groups = min(MOST_GROUPS, (MEBIBYTES * 2**20 - queries * a_row) // a_group)
        heads = groups * GROUP
        query = draw(1, 1, queries, padded).expand(1, heads, -1, -1)  # once, which leaves room for more programs
        key, value = (draw(1, groups, keys, padded) for _ in "kv")
        output = torch.empty(1, queries, heads, padded, device=device, dtype=dtype)
        return cls(query, key, value, output, synthetic_walk(heads, device))

    def spills(self, run: Run, config: Config) -> int:
        return int(self._run(run, config).n_spills)

    def milliseconds(self, run: Run, config: Config) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._run(run, config)  # keeps the device busy while the host prepares the launch that is timed
        start.record()
        self._run(run, config)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _run(self, run: Run, config: Config) -> Any:
        scale = self.query.shape[3] ** -0.5
        tensors = self.output, self.query, self.key, self.value
        return run(*tensors, self.walk, scale, config, takes_descriptors(self.key))


def synthetic_walk(heads: int, device: torch.device) -> TileWalk:
    """What a sparse plan looks like: for each query tile mostly full tiles, a partial one, and single keys."""
    offset = KEY_TILES - QUERY_TILES
    tile = torch.arange(QUERY_TILES, dtype=torch.int32)
    tiles = tile[:, None] + torch.tensor([*range(offset - FULL, offset), offset], dtype=torch.int32)
    each = tiles.shape[1]
    counts = torch.stack([torch.tensor([start, FULL, 1, 0, COLUMNS]) for start in range(0, tiles.numel(), each)])
    key_position = torch.arange(KEY_TILES * TILE)
    query_tags, key_tags = (
        torch.stack([position, torch.zeros_like(position), torch.full_like(position, -1)]).int().view(1, 1, 3, -1)
        for position in (key_position[offset * TILE :], key_position)
    )
    row = torch.zeros(1, 1, dtype=torch.int32, device=device)
    return TileWalk(
        query_tags.to(device),
        key_tags.to(device),
        row,
        row,
        counts.int().view(1, 1, -1, 5).to(device),
        tiles.view(1, 1, -1).to(device),
        torch.arange(COLUMNS, dtype=torch.int32, device=device).view(1, 1, -1),
        (key_position >= COLUMNS).view(1, 1, -1).to(device),
        head_plan=(0,) * heads,
        key_head=tuple(head // GROUP for head in range(heads)),
        window=None,
        segments=False,
        spans=False,
    )
