"""A map of one head's attention with what its plan computes, in token order and in the head's own order.

Attention is pooled into cells as it is made, some queries at a time, so that no map holds queries x keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mmcompile.errors import OptionError
from mmcompile.kernels.attend import Planned
from mmcompile.kernels.orders import of_keys, slots
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pictures.head import Head, HeadPlan
from mmcompile.pictures.palette import BLUE, VERMILLION, modality_colour, modality_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POOLS = ("max", "mean")
CELLS = 512  # the most along one side
STEPS = 24  # of each colour
COMPUTED, SKIPPED, FORBIDDEN = "#dcebf7", "#ffffff", "#eeeeee"


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
    step: Callable[[int, int], None] = lambda done, of: None,
) -> AttentionMap:
    """The true attention of one head of one sequence beside what a plan of the attention computes.

    pool: "max" takes a cell's largest weight, "mean" the mean over its allowed elements. cells: the most along one side
    of the map. step: called with the number of query tiles that are done, and of all.

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
        allowed, computed = one.allowed(queries), plan.keys_of(tile)
        weights = one.weights(queries, allowed)
        times_uniform = weights * allowed.sum(-1, keepdim=True)
        for target in pools:
            target.add(queries, times_uniform, computed, allowed)
        covered += float((weights * computed).sum())
        with_keys += int(allowed.any(-1).sum())
        step(tile + 1, len(tiles))
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


_POOLED = {"max": "largest", "mean": "mean"}
MOST_LINES = 64  # more boundaries than that would hide the map


def draw_attention_map(drawn: AttentionMap, title: str) -> Figure:
    """Both panels as a matplotlib figure; one, where the head keeps the order of the tokens."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = [("token order", drawn.raster)] + ([("the head's own order", drawn.ordered)] if drawn.reordered else [])
    figure = Figure(figsize=(5.4 * len(names) + 1.6, 6.6), layout="constrained")
    *axes, scale = figure.subplots(1, len(names) + 1, width_ratios=[*(1 for _ in names), 0.07])
    largest = max(float(part.max()) for part in (drawn.raster.covered, drawn.raster.missed))
    norm = LogNorm(1.0, max(10.0, largest))  # uniform attention is as bright as nothing at all
    for axis, (name, panel) in zip(axes, names, strict=True):
        _draw_panel(axis, panel, drawn, norm)
        axis.set_title(name, fontsize=11, pad=14)
    _draw_scale(scale, norm, f"attention over uniform attention, {_POOLED[drawn.pool]} of a cell")
    kinds = sorted({*drawn.raster.query_modality.tolist(), *drawn.raster.key_modality.tolist()})
    figure.legend(handles=_patches(kinds), loc="outside lower center", ncols=3 + len(kinds), frameon=False, fontsize=9)
    held = f"{drawn.density:.1%} of the causal tiles hold {drawn.recall:.1%} of the attention"
    figure.suptitle(f"{title}\n{held}", fontsize=11)
    return figure


def _patches(kinds: list[int]) -> list[Any]:
    from matplotlib.patches import Patch

    grounds = ((COMPUTED, "computed tiles and keys"), (SKIPPED, "skipped"), (FORBIDDEN, "masked"))
    return [
        *(Patch(facecolor=colour, edgecolor="#888888", label=label) for colour, label in grounds),
        *(Patch(facecolor=modality_colour(kind), label=modality_name(kind)) for kind in kinds),
    ]


def _draw_scale(axis: Any, norm: Any, label: str) -> None:
    """One scale of weights for both colours that attention has."""
    axis.set_box_aspect(14)
    axis.set(yscale="log", ylim=(norm.vmin, norm.vmax), xlim=(0, 2), xticks=())
    edges = np.geomspace(norm.vmin, norm.vmax, 257)
    strength = np.repeat(np.linspace(0, 1, 256)[:, None], 2, 1)
    axis.pcolormesh([0, 1, 2], edges, _blend(strength * (1, 0), strength * (0, 1)))
    for place, name in ((0.25, "computed"), (0.75, "missed")):
        where = {"ha": "center", "va": "top", "transform": axis.transAxes}
        axis.text(place, 0.99, name, rotation=90, fontsize=8, color="white", **where)
    axis.tick_params(labelsize=8)
    axis.yaxis.tick_right()
    axis.yaxis.set_label_position("right")
    axis.set_ylabel(label, fontsize=9)


def _draw_panel(axis: Any, panel: Panel, drawn: AttentionMap, norm: Any) -> None:
    height, width = (size * drawn.cell for size in panel.covered.shape)
    axis.imshow(_colours(panel, norm), extent=(0, width, height, 0), interpolation="nearest")
    axis.set(xlim=(0, drawn.key_length), ylim=(drawn.query_length, 0), xlabel="keys", ylabel="queries", aspect="auto")
    axis.set_box_aspect(1)
    axis.tick_params(labelsize=8)
    for lines, draw in zip(panel.changes, (axis.axhline, axis.axvline), strict=True):
        for at in lines if len(lines) <= MOST_LINES else ():
            draw(at, color="#555555", linewidth=0.6, linestyle=(0, (4, 3)))
    for box, of, extent in (
        ((0, 1.008, 1, 0.022), panel.key_modality[None], (0, width, 0, 1)),
        ((1.008, 0, 0.022, 1), panel.query_modality[:, None], (0, 1, height, 0)),
    ):
        strip = axis.inset_axes(box)
        strip.imshow(_of_modality(of.cpu().numpy()), extent=extent, aspect="auto", interpolation="nearest")
        strip.set_axis_off()
        limits = {"xlim": axis.get_xlim()} if of.shape[0] == 1 else {"ylim": axis.get_ylim()}
        strip.set(**limits)


def _of_modality(modality: np.ndarray) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(modality_colour(kind)) for kind in range(256)])[modality]


def _colours(panel: Panel, norm: Any) -> np.ndarray:
    """RGB [Cq, Ck, 3]: the ground says what is computed, and attention lies over it."""
    from matplotlib.colors import to_rgb

    covered, missed, computed, allowed = (
        tensor.cpu().numpy() for tensor in (panel.covered, panel.missed, panel.computed, panel.allowed)
    )
    shown = _blend(_strength(covered, norm), _strength(missed, norm), computed / np.maximum(allowed, 1))
    shown[allowed == 0] = to_rgb(FORBIDDEN)
    return shown


def _blend(covered: np.ndarray, missed: np.ndarray, computed: np.ndarray | float = 0.0) -> np.ndarray:
    """RGB [..., 3] of strengths from 0 to 1."""
    from matplotlib.colors import to_rgb

    shown = np.broadcast_to(to_rgb(SKIPPED), (*covered.shape, 3))
    for colour, strength in ((COMPUTED, computed), (BLUE, covered), (VERMILLION, missed)):
        shown = shown + np.asarray(strength)[..., None] * (np.array(to_rgb(colour)) - shown)
    return shown


def _strength(weights: np.ndarray, norm: Any) -> np.ndarray:
    """From 0 to 1, in steps: what the eye cannot tell apart would make the file three times as long."""
    strength = np.clip(np.ma.filled(norm(np.maximum(weights, norm.vmin)), 0.0), 0.0, 1.0)
    return np.round(strength * STEPS) / STEPS
