"""Recall against density: what each pattern covers of the attention of some heads as its cap grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmcompile.drawing import set_title
from mmcompile.kernels.attend import plan_attention
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.options import AUTO_PATTERN
from mmcompile.passes.record_attention import SeenAttention
from mmcompile.pictures.head import Head, HeadPlan
from mmcompile.pictures.palette import BLACK, KINDS, YELLOW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
QUERIES = 256  # measured of each head
_TICKS = [step * 10.0**power for power in range(-5, 0) for step in (1, 2, 3, 5)] + [1.0]


def swept_patterns(key_length: int) -> dict[str, HeadPattern]:
    """Patterns that want more than the caps give, so that these decide what is computed."""
    single = min(key_length, 8192)  # a plan has room for so many keys of each query tile
    return {
        "auto": replace(AUTO_PATTERN, mass=1.0),
        "top_p": HeadPattern("top_p", mass=1.0),
        "columns": HeadPattern("columns", columns=single),
        "vertical_slash": HeadPattern("vertical_slash", vertical=single, slash=key_length),
        "grid": HeadPattern("grid", lines="hvs"),
        "a_shape": HeadPattern("a_shape", local=key_length),
    }


@dataclass(frozen=True)
class RecallPoint:
    """One pattern under one cap; means over heads.

    density: computed tiles over those of dense attention. recall: share of the true attention that is computed.
    """

    cap: float
    density: float
    recall: float


def recall_curves(
    seen: SeenAttention,
    heads: Sequence[int],
    patterns: Mapping[str, HeadPattern],
    caps: Sequence[float] = CAPS,
    *,
    queries: int = QUERIES,
    step: Callable[[str], None] = lambda name: None,
) -> dict[str, list[RecallPoint]]:
    """The points of each pattern by rising cap, for the first sequence of a batch.

    heads: of the attention, whose mean is taken; where a pattern searches a stride, it does in these. queries: how many
    of each head are measured, a random one of each run of equal length. step: called with the name of each pattern as
    it begins.
    """
    group = seen.query.shape[1] // seen.key.shape[1]
    query, key = seen.query[:, list(heads)], seen.key[:, [head // group for head in heads]]
    sampled = spread_queries(query.shape[2], queries).to(query.device)
    own = [Head.of(seen, head) for head in heads]
    curves: dict[str, list[RecallPoint]] = {}
    for name, pattern in patterns.items():
        step(name)
        for cap in caps:
            planned = plan_attention(query, key, pattern, seen.boundaries, density=cap, **seen.mask)
            plans = [HeadPlan.of(planned, head) for head in range(len(heads))]
            recalls = [covered(head, plan, sampled) for head, plan in zip(own, plans, strict=True)]
            density = sum(plan.density for plan in plans) / len(plans)
            curves.setdefault(name, []).append(RecallPoint(cap, density, sum(recalls) / len(recalls)))
    return curves


def covered(head: Head, plan: HeadPlan, queries: Tensor) -> float:
    """Share of the true attention of some queries that a plan computes. queries: int64 [R]."""
    allowed = head.allowed(queries)
    held = (head.weights(queries, allowed) * plan.computed(queries)).sum(-1)
    return float(held[allowed.any(-1)].mean())


def spread_queries(length: int, count: int) -> Tensor:
    """A random query of each of `count` runs: even steps could hit the same sites of every frame. int64, rising."""
    count = min(count, length)
    edges = torch.arange(count + 1) * length // count
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return edges[:-1] + (drawn * edges.diff()).long()


def draw_recall_curves(
    curves: Mapping[str, Sequence[RecallPoint]], title: str, own: tuple[float, float] | None = None
) -> Figure:
    """A line for each pattern as a matplotlib figure. own: density and recall of the pattern that the head has."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axis = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        marker, dashes = "os^Dv<>PX"[index % 9], ("-", "--", ":", "-.")[index % 4]
        # Caps that a pattern cannot reach, or has no use for, give the same plan again.
        different = list({f"{point.density:.3g}": point for point in points}.values())
        density, recall = ([getattr(point, name) for point in different] for name in ("density", "recall"))
        axis.plot(density, recall, marker=marker, linestyle=dashes, color=KINDS.get(name, BLACK), label=name)
    if own is not None:
        axis.scatter(*own, label="the head's own", marker="*", s=260, color=YELLOW, edgecolor=BLACK, zorder=3)
    axis.set(xscale="log", xlabel="computed share of the causal tiles", ylabel="share of the attention computed")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if low <= tick <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{100 * tick:g}%"))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_ylim(top=1.02)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    set_title(figure, title)
    return figure
