"""A head's Pareto front as a search left it: error against time, and the pattern that the head was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcompile.drawing import set_title
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.pictures.palette import BLACK, GREY, KINDS, YELLOW
from mmcompile.tables import HeadFinding

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_front(finding: HeadFinding, pattern: HeadPattern, title: str) -> Figure:
    """Each point of the front in its kind's colour, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axis = figure.subplots()
    times, errors = [point.ms for point in finding.front], [point.error for point in finding.front]
    axis.step(times, errors, where="post", color=GREY, linewidth=1)
    for index, kind in enumerate(dict.fromkeys(point.pattern.kind for point in finding.front)):
        of_kind = [point for point in finding.front if point.pattern.kind == kind]
        where = [point.ms for point in of_kind], [point.error for point in of_kind]
        axis.scatter(*where, label=kind, color=KINDS[kind], marker="os^Dv<>PX"[index], s=40, zorder=2, clip_on=False)
    axis.scatter(
        finding.ms, finding.error, label=f"chosen:\n{pattern.kind}",
        marker="*", s=260, color=YELLOW, edgecolor=BLACK, zorder=3, clip_on=False,
    )  # fmt: skip
    axis.set(xlabel="milliseconds of the head's share of the kernel", ylabel="error of the output", ylim=(0, None))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    set_title(figure, title)
    return figure
