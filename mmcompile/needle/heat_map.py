"""The recall of every method by length and depth, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmcompile.drawing import set_title
from mmcompile.needle.results import Results, thousands

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 6  # panels in a row
PANEL = (2.5, 2.2)  # inches


def draw_heat_maps(results: Results) -> Figure:
    """A panel for each task and method as a matplotlib figure: recall from 0 to 1, lengths across, depths down."""
    from matplotlib.figure import Figure as NewFigure

    panels = list(dict.fromkeys((one.task, one.method) for one in results.records))
    rows = -(-len(panels) // COLUMNS)
    figure = NewFigure(figsize=(COLUMNS * PANEL[0], rows * PANEL[1] + 0.8), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True).flatten()
    depths = results.settings["depths"]
    image = None
    for axis, (task, method) in zip(axes, panels, strict=False):
        of_panel = sorted(
            (one for one in results.records if (one.task, one.method) == (task, method)), key=lambda one: one.tokens
        )
        shares = [[_share(one.right[place], one.asked[place]) for one in of_panel] for place in range(len(depths))]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_xticks(range(len(of_panel)), [thousands(one.tokens) for one in of_panel], fontsize=7)
        axis.set_yticks(*_ticks(depths), fontsize=7)
        mean = _share(sum(sum(one.right) for one in of_panel), sum(sum(one.asked) for one in of_panel))
        axis.set_title(f"{method}, {task}: {100 * mean:.1f}%", fontsize=8)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="recall", shrink=0.8)
    set_title(figure, f"{results.figure.title}, {results.figure.device}")
    return figure


def _share(right: int, asked: int) -> float:
    return right / asked if asked else float("nan")


def _ticks(depths: Sequence[float]) -> tuple[list[int], list[str]]:
    places = sorted({0, len(depths) // 2, len(depths) - 1})
    return places, [f"{depths[place]:.0%}" for place in places]
