"""A map of one head's attention with what its plan computes, in token order and in the head's own order.

Attention is pooled into cells as it is made, some queries at a time, so that no map holds queries x keys.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmcompile.errors import OptionError
from mmcompile.kernels.attend import Planned
from mmcompile.kernels.orders import of_keys, slots
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pictures.head import Head, HeadPlan

POOLS = ("max", "mean")
CELLS = 512  # the most along one side


@dataclass(frozen=True, eq=False)
class Panel:
    """Attention in one order of queries and keys, pooled: [Cq, Ck] each, queries downwards.

    covered, missed: float32, attention of keys that are computed for their query, and of the others: weights times the
        number of keys that the mask allows the query, so that 1 is uniform attention.
    computed, allowed: int64, elements of the cell that are computed, and that the mask allows.
    query_modality, key_modality: int64 [Cq], [Ck], of the first token of each cell.
    changes: slots of (queries, keys) where another segment, or in an order of its own another modality, begins.
    """

    covered: Tensor
    missed: Tensor
    computed: Tensor
    allowed: Tensor
    query_modality: Tensor
    key_modality: Tensor
    changes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Both panels of a head, and its figures.

    cell: tokens along a side of a cell. recall: share of the true attention that is computed, over all queries.
    """

    raster: Panel
    ordered: Panel
    cell: int
    pool: str
    query_length: int
    key_length: int
    density: float
    recall: float

    @property
    def reordered(self) -> bool:
        """Whether the head has an order of its own."""
        return self.raster is not self.ordered


def attention_map(
    seen: SeenAttention,
    planned: Planned,
    head: int,
    batch: int = 0,
    *,
    pool: str = "max",
    cells: int = CELLS,
    step: Callable[[str], None] = lambda name: None,
) -> AttentionMap:
    """The true attention of one head of one sequence beside what a plan of the attention computes.

    pool: "max" takes a cell's largest weight, "mean" the mean over its allowed elements. cells: the most along one side
    of the map. step: called with the name of each query tile as it begins.

    Raises OptionError for an unknown pool.
    """
    require_pool(pool)
    one, plan = Head.of(seen, head, batch), HeadPlan.of(planned, head, batch)
    device, (query_length, key_length) = one.key.device, (len(one.query), len(one.key))
    cell = 2 ** max(0, math.ceil(math.log2(max(query_length, key_length) / cells)))
    in_tokens = (torch.arange(query_length, device=device), torch.arange(key_length, device=device))
    in_slots = (plan.query_order, plan.key_order)
    pools = [_Pool(query_length, key_length, None, cell, pool, device)]
    if not all(map(torch.equal, in_tokens, in_slots)):
        pools.append(_Pool(query_length, key_length, in_slots, cell, pool, device))
    covered, with_keys = 0.0, 0
    tiles = plan.query_tiles()
    for tile, queries in enumerate(tiles):
        step(f"query tile {tile + 1} of {len(tiles)}")
        allowed, computed = one.allowed(queries), plan.keys_of(tile)
        weights = one.weights(queries, allowed)
        times_uniform = weights * allowed.sum(-1, keepdim=True)
        for target in pools:
            target.add(queries, times_uniform, computed, allowed)
        covered += float((weights * computed).sum())
        with_keys += int(allowed.any(-1).sum())
    parts = _segments(seen, batch)
    kinds = torch.cat([seen.boundaries[1].long(), seen.boundaries[1].new_zeros(1).long()])
    of_query, of_key = (kinds[part] for part in parts)
    raster = ordered = pools[0].panel(of_query, of_key, parts)
    if len(pools) > 1:
        modalities = (of_query[plan.query_order], of_key[plan.key_order])
        ordered = pools[1].panel(*modalities, modalities)
    sizes = (query_length, key_length)
    return AttentionMap(raster, ordered, cell, pool, *sizes, plan.density, covered / max(1, with_keys))


def require_pool(pool: str) -> None:
    """Raises OptionError for an unknown one."""
    if pool not in POOLS:
        raise OptionError(f"pool={pool!r}: must be one of {', '.join(POOLS)}")


def _segments(seen: SeenAttention, batch: int) -> tuple[Tensor, Tensor]:
    """The segment of each query and key of a sequence, int64 [S]; M for tokens that no boundary tells, such as those of
    a cached prefix."""
    offsets, modality, _ = seen.boundaries
    query_length, key_length = seen.query.shape[2], seen.key.shape[2]
    token = torch.arange(query_length, device=offsets.device) + batch * query_length
    of_query = torch.searchsorted(offsets[1:].contiguous(), token, right=True)
    of_key = of_keys(of_query[None], key_length, seen.query_offset, len(modality))[0]
    return of_query, of_key


class _Pool:
    """Cells of attention in one order (of queries and keys; None for the tokens'), filled some queries at a time."""

    def __init__(
        self,
        query_length: int,
        key_length: int,
        orders: tuple[Tensor, Tensor] | None,
        cell: int,
        pool: str,
        device: torch.device,
    ) -> None:
        self.key_order = None if orders is None else orders[1]
        slot = torch.arange(query_length, device=device) if orders is None else slots(orders[0].int()).long()
        self.cell, self.pool, self.cell_of_query = cell, pool, slot // cell
        shape = (-(-query_length // cell), -(-key_length // cell))
        self.covered, self.missed = torch.zeros(2, *shape, device=device)
        self.computed, self.allowed = torch.zeros(2, *shape, dtype=torch.int64, device=device)

    def add(self, queries: Tensor, weights: Tensor, computed: Tensor, allowed: Tensor) -> None:
        """queries: int64 [R]. weights: [R, Sk], computed: bool [Sk], allowed: bool [R, Sk], in token order."""
        rows = self.cell_of_query[queries]
        if self.key_order is not None:
            weights, computed, allowed = (one.index_select(-1, self.key_order) for one in (weights, computed, allowed))
        for target, part in ((self.covered, weights * computed), (self.missed, weights * ~computed)):
            if self.pool == "max":
                pooled = self._cells(part).amax(-1)
                target.scatter_reduce_(0, rows[:, None].expand_as(pooled), pooled, "amax")
            else:
                target.index_add_(0, rows, self._cells(part).sum(-1))
        for count, elements in ((self.computed, allowed & computed), (self.allowed, allowed)):
            count.index_add_(0, rows, self._cells(elements).sum(-1))

    def _cells(self, of_keys: Tensor) -> Tensor:
        """[R, Sk] to [R, Ck, cell]."""
        return pad(of_keys, (0, -of_keys.shape[1] % self.cell)).unflatten(1, (-1, self.cell))

    def panel(self, query_modality: Tensor, key_modality: Tensor, parts: tuple[Tensor, Tensor]) -> Panel:
        """Modalities and parts (of which a line shows each change) of queries and of keys, int64 [S] in slot order."""
        each = 1 if self.pool == "max" else self.allowed.clamp(min=1)
        starts = tuple(tuple(((part[1:] != part[:-1]).nonzero()[:, 0] + 1).tolist()) for part in parts)
        modalities = (query_modality[:: self.cell], key_modality[:: self.cell])
        return Panel(
            self.covered / each, self.missed / each, self.computed, self.allowed, *modalities, (starts[0], starts[1])
        )
