"""A map of layers x heads: each head's pattern, and what is known of it in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcompile.drawing import set_title
from mmcompile.kernels.patterns import KINDS, HeadPattern
from mmcompile.pictures.palette import DARK
from mmcompile.pictures.palette import KINDS as COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER_LETTERS = {"raster": "", "site": "s", "column": "c", "auto": "a"}
BOUNDARY_LETTERS = {"none": "", "k": "", "q": "q", "2d": "2"}
MEANING = {
    "s": "by site",
    "c": "by column",
    "a": "raster or site",
    "q": "queries by modality",
    "2": "queries and keys by modality",
}
MOST_LETTERS = 40  # layers or heads; letters of more would run into each other


def letters(pattern: HeadPattern) -> str:
    """The order of a head in a letter or two; nothing for the order of the tokens."""
    order = "site" if pattern.by_site[0] and pattern.order == "raster" else pattern.order
    return ORDER_LETTERS[order] + BOUNDARY_LETTERS[pattern.boundary]


def draw_head_map(
    layers: Sequence[Sequence[HeadPattern]], figures: Mapping[str, Sequence[Sequence[float]]], title: str
) -> Figure:
    """Patterns, and a panel for each of the figures, as a matplotlib figure.

    layers: `[layer][head]`. figures: name to `[layer][head]`; what is not finite stays blank.
    """
    from matplotlib.figure import Figure

    rows, columns = len(layers), len(layers[0])
    height = min(12.0, max(3.2, 0.2 * rows + 2.0))
    width = min(7.0, max(2.6, 0.2 * columns + 1.0))
    figure = Figure(figsize=(width * (1 + len(figures)) + 0.6, height), layout="constrained")
    axes = figure.subplots(1, 1 + len(figures), squeeze=False, sharey=True)[0]
    _draw_patterns(figure, axes[0], layers)
    for axis, (name, values) in zip(axes[1:], figures.items(), strict=True):
        _draw_figures(figure, axis, name, np.array(values, dtype=float))
    for axis in axes:
        axis.set(xlabel="head", xticks=_ticks(columns), yticks=_ticks(rows))
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("layer")
    set_title(figure, title)
    return figure


def _draw_patterns(figure: Any, axis: Any, layers: Sequence[Sequence[HeadPattern]]) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    axis.imshow([[to_rgb(COLOURS[pattern.kind]) for pattern in heads] for heads in layers], aspect="auto")
    _draw_grid(axis, len(layers), len(layers[0]))
    axis.set_title("pattern", fontsize=10)
    written = {letter for heads in layers for pattern in heads for letter in letters(pattern)}
    if max(len(layers), len(layers[0])) <= MOST_LETTERS:
        for layer, heads in enumerate(layers):
            for head, pattern in enumerate(heads):
                ink = "white" if COLOURS[pattern.kind] in DARK else "black"
                axis.text(head, layer, letters(pattern), fontsize=6.5, color=ink, ha="center", va="center")
    else:
        written = set()
    kinds = {pattern.kind for heads in layers for pattern in heads}
    entries: list[Any] = [Patch(facecolor=COLOURS[kind], label=kind) for kind in KINDS if kind in kinds]
    entries += [
        Line2D([], [], linestyle="none", marker=rf"$\mathrm{{{letter}}}$", color="black", label=meaning)
        for letter, meaning in MEANING.items()
        if letter in written
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def _draw_figures(figure: Any, axis: Any, name: str, values: np.ndarray) -> None:
    from matplotlib.colors import LogNorm

    known, positive = np.isfinite(values), values[np.isfinite(values) & (values > 0)]
    axis.set_title(name, fontsize=10)
    axis.set(facecolor="#eeeeee", xlim=(-0.5, values.shape[1] - 0.5))
    if not positive.size:
        axis.text(0.5, 0.5, "0 everywhere" if known.all() else "not known", ha="center", transform=axis.transAxes)
        return
    low, high = float(positive.min()), float(positive.max())
    shown = np.ma.masked_where(~known, np.maximum(values, low))  # 0 has no place on a logarithmic scale
    norm = LogNorm(low / 1.05, high * 1.05)  # a scale of one value would be none
    image = axis.imshow(shown, cmap="cividis", norm=norm, aspect="auto")
    _draw_grid(axis, *values.shape)
    bar = figure.colorbar(image, ax=axis, fraction=0.06, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    ticks = np.unique(np.geomspace(low, high, 5).round(4)) if high < 100 * low else None
    if ticks is not None:
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        bar.ax.minorticks_off()


def _draw_grid(axis: Any, rows: int, columns: int) -> None:
    axis.set_xticks(np.arange(0.5, columns - 1), minor=True)
    axis.set_yticks(np.arange(0.5, rows - 1), minor=True)
    axis.grid(which="minor", color="white", linewidth=0.5 if max(rows, columns) <= MOST_LETTERS else 0.2)
    axis.tick_params(which="minor", length=0)


def _ticks(count: int) -> range:
    return range(0, count, max(1, -(-count // 16)))
